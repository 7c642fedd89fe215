"""Multi-candidate speculative decoding: draft a tree, score it, verify it, keep what was accepted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from os import PathLike
from threading import Lock
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from mcsd_kernels import SamplingParams, Status, Verified
from mcsd_kernels import _checks as check
from mcsd_kernels.verify import PROPOSALS, RULES

from .checking import compiled, require, unwrapped
from .drafters import Drafter, ModelDrafter, NgramDrafter, Proposal, State
from .drafters.base import Adapter
from .graphs import ReplayError
from .placement import input_device, input_vocab, is_spread, output_shape, text_limit
from .profile import Profile
from .scoring import ATTENTION, Scorer
from .stats import Stats
from .step import Stepped, captured_step, step
from .trees import LARGEST_TREE, check_branching, columns


@dataclass
class Generation:
    """What `generate` returns.

    Args:
        sequences: `[batch, prompt + longest continuation]` int64: prompt, continuation, padding on the right.
        stats: what it cost and what was accepted.
    """

    sequences: torch.Tensor
    stats: Stats = field(repr=False)


def generate(
    target: PreTrainedModel,
    draft: PreTrainedModel | Drafter | str,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    branching: Sequence[int] = (4, 2, 2),
    max_new_tokens: int = 128,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    seed: int | Sequence[int] | torch.Tensor = 0,
    proposal: str | None = None,
    rule: str | None = None,
    profile: Profile | str | PathLike[str] | None = None,
    eos_token_id: int | Sequence[int] | Set[int] | torch.Tensor | None = None,
    pad_token_id: int | torch.Tensor | None = None,
    stopping_criteria: Any = None,
    stop_strings: str | Sequence[str] | Set[str] | None = None,
    tokenizer: Any = None,
    logits_processor: Any = None,
    streamer: Any = None,
    attention: str = "auto",
    graphs: bool | None = None,
    progress: bool = False,
    callback: Callable[[Stats], None] | None = None,
    observer: Callable[[State, Proposal, torch.Tensor, Verified], None] | None = None,
) -> Generation:
    """Generate text with the target's law, several tokens for each of its forwards.

    Sampled text has exactly the target's distribution; at temperature 0 and in float32 the text is that of plain greedy
    decoding. (In bfloat16 a model is not quite the same function of the context when several tokens go through it at
    once, with or without speculation, so token-for-token equality is not promised there.)

    Args:
        target: a decoder-only Hugging Face model, also quantised, on several devices, or inside PEFT's with adapters in
            its layers. `torch.compile(model)` and `model.compile()` are taken, too, but compile its forward again as
            the text grows, up to torch's limit.
        draft: a smaller model with the same vocabulary, a `Drafter` (which serves one generation at a time), or "ngram"
            (prompt lookup, no model). A model with the same tokenizer and an embedding of another size comes as
            `ModelDrafter(model, None, shared_vocab=...)`.
        input_ids: `[batch, length]` int64 prompts, padded on either side.
        attention_mask: `[batch, length]`, 1 at tokens and 0 at padding. None: every column counts, unless the model has
            a padding token that is no end-of-sequence token and occurs.
        branching: children of a tree node at depth 0, 1, ...; at most 1,024 nodes in all. For "ngram" the first number
            is that of the continuations.
        max_new_tokens: of each request; never overshot.
        temperature, top_k, top_p, min_p: see `mcsd_kernels.SamplingParams`; numbers or `[batch]` tensors. They act on
            target and draft alike. The model's own generation configuration is only asked for its special tokens.
        seed: request b's seed is `seed + b`, or `seed[b]`. A request's random numbers depend on nothing else.
        proposal: how siblings are drawn, see `mcsd_kernels.verify`. None: a drafter's own; for a draft model
            "without_replacement", and "point" at temperature 0, where a sampled draft has a single candidate.
        rule: "recursive" or "traversal". None: the profile's, else "recursive".
        profile: what `mcsd tune` found for this pair on this machine, or its file: the tree comes from it in place of
            `branching`, and so do `proposal` and `rule` where they are None. Needs a draft model, or a drafter that
            takes any tree.
        eos_token_id: token or tokens that end a request, [] for none. None: the generation configuration's.
        pad_token_id: for the right end of `sequences`. None: the generation configuration's, else the first
            end-of-sequence token, else 0.
        stopping_criteria: transformers' `StoppingCriteria` or a list of them, asked after every token with
            `[1, length]` ids and no scores.
        stop_strings: end a request when its text ends in one of these; needs `tokenizer`.
        tokenizer: for `stop_strings`.
        logits_processor: transformers' `LogitsProcessor` or a list, applied to the target's logits at every node with
            the node's own context. Whatever shape it gets, it must return.
        streamer: gets the prompt and then every token, as transformers' `generate` does; batch 1 only.
        attention: "tree" (our attention in the model), "dense" (4-D masks), or "auto".
        graphs: capture what a step does as CUDA graphs when its shapes first come, and replay them; graphs and caches
            then stay with the models, those of one batch size. A step is one graph where the drafter allows it
            (`Drafter.captures`: models, heads and early exits do) and nothing needs the host (logits processors do),
            else each forward over a tree is one. A number among the sampling parameters belongs to what is captured, a
            tensor does not. A graph's first two replays are compared with the same step run as always. Where nothing
            can be captured, or a replay is wrong, all runs as always and a line says why. None: on CUDA.
        progress: show a progress bar on stderr.
        callback: called with the running `Stats` after every step. Inside a generation nobody else can run its models,
            callbacks, observers and logits processors included; other generations can, nested and in other threads.
        observer: called in every step with what was verified: the state before it, the tree, the target's logits
            `[batch, scored nodes, vocab]` and `verify`'s answer. The next step may write to their memory.

    Returns:
        `Generation(sequences, stats)`. Interrupted from the keyboard, it holds what was generated so far.

    Raises:
        ValueError: an argument is wrong, or the model cannot score token trees (`UnsupportedModelError`, with the
            reason).

    Source: Yang et al., arXiv 2401.06706.
    """
    check.choice("attention", attention, ATTENTION)
    began = time.perf_counter()
    wrapper, target = target, require("target", target, attention)
    tried_out = time.perf_counter() - began
    prompts = _prompts(target, input_ids, attention_mask)
    batch = len(prompts)
    device = input_device(target)
    sampling = _sampling(temperature, top_k, top_p, min_p, batch, device)
    parents = None
    if profile is not None:
        tuned = Profile.load(profile)
        if not isinstance(unwrapped(draft), PreTrainedModel) and not hasattr(draft, "with_tree"):
            raise ValueError(
                f"profile: expected a draft model or a drafter that takes any tree, got draft = {_what(draft)}"
            )
        own = tuned.proposal if isinstance(temperature, torch.Tensor) else tuned.proposal_at(temperature)
        parents, proposal, rule = tuned.parents, proposal or own, rule or tuned.rule
    drafter = drafter_for(target, draft, branching, proposal, attention, temperature, parents)
    rule = "recursive" if rule is None else rule
    check.choice("rule", rule, RULES)
    max_new_tokens = check.whole("max_new_tokens", _plain(max_new_tokens), 1)
    seeds = _seeds(seed, batch, device)
    _check_methods("callback", callback, "a function", "__call__")
    _check_methods("observer", observer, "a function", "__call__")
    _check_methods("streamer", streamer, "an object with put and end", "put", "end")
    if streamer is not None and batch > 1:
        raise ValueError(f"streamer: expected a batch of 1, got {batch}; stream requests one by one")
    longest = max(map(len, prompts))
    config = target.config.get_text_config(decoder=True)
    positions = text_limit(target)
    left = (positions or 0) - longest
    if positions and longest + max_new_tokens > positions:
        raise ValueError(
            f"max_new_tokens: expected a prompt of {longest} tokens and {max_new_tokens} new ones to fit the model's "
            f"{positions} positions; shorten the prompt{f' or ask for at most {left}' if left > 0 else ''}"
        )
    special = target.generation_config
    eos = _token_ids("eos_token_id", eos_token_id, special.eos_token_id)
    pad = _token_ids("pad_token_id", pad_token_id, special.pad_token_id)
    if pad_token_id is not None and len(pad) != 1:
        raise ValueError(f"pad_token_id: expected one token id, got {pad_token_id!r}")
    ends = _Ends(eos, _criteria(stopping_criteria, stop_strings, tokenizer))
    processors = _list_of("logits_processor", LogitsProcessorList, logits_processor)

    with ExitStack() as stack:
        stack.enter_context(_reserved(drafter))
        room = longest + max_new_tokens + LARGEST_TREE
        stats = Stats(status=[0] * batch)
        with stats.phase("prefill"):
            captured = batch if _are_captured(graphs, target) else None
            scorer = Scorer(target, room, attention, drafter.reads_hidden, captured, _tell if progress else None)
        stats.seconds["prefill"] += tried_out  # once a model
        state = State(
            sequences=[list(prompt) for prompt in prompts],
            active=[True] * batch,
            seeds=seeds,
            step=0,
            sampling=sampling,
            device=scorer.device,
            capacity=longest + max_new_tokens,
            vocab=shape[0] if (shape := output_shape(target)) else config.vocab_size,
            scorer=scorer,
        )
        output = _Output(input_ids, max_new_tokens, ends, streamer, (pad or eos or [0])[0])
        process = partial(_process, processors, output) if processors else None
        stack.enter_context(torch.inference_mode())
        stack.enter_context(scorer.attending())
        stack.enter_context(compiled(wrapper))
        stack.callback(drafter.end)
        bar = stack.enter_context(_bar(max_new_tokens * batch)) if progress else None
        try:
            output.begin()
            with stats.phase("prefill"):
                _read_in(drafter.begin, drafter, scorer, state)
            while any(state.active):
                try:
                    found = None if process else captured_step(drafter, scorer, state, rule, phase=stats.phase)
                    if found is None:
                        found = step(drafter, scorer, state, rule, process=process, phase=stats.phase)
                except ReplayError:  # nothing came of this step, and the caches are not to be relied on
                    with stats.phase("prefill"):
                        scorer.restart()
                        _read_in(drafter.restart, drafter, scorer, state)
                    continue
                with stats.phase("other"):
                    if observer is not None:
                        observer(state, found.tree, found.logits, found.verified)
                    emitted = output.advance(state, found, stats)
                    if bar is not None:
                        bar.update(emitted)
                        bar.set_postfix_str(f"{stats.tokens_per_call:.2f} tokens/call")
                    if callback is not None:
                        callback(stats)
        except KeyboardInterrupt:
            stats.interrupted = True
    return Generation(output.sequences(), stats)


def _are_captured(graphs: bool | None, target: PreTrainedModel) -> bool:
    """Whether steps are: as asked, or where they can be."""
    return input_device(target).type == "cuda" and not is_spread(target) if graphs is None else graphs


def _read_in(begin: Callable[[State], None], drafter: Drafter, scorer: Scorer, state: State) -> None:
    """Target and drafter read each text but for its last token, the root of the tree to come."""
    heads = [sequence[:-1] for sequence in state.sequences]
    join = not (drafter.reads_hidden or drafter.reads_cache)
    scorer.prefill(columns(heads, scorer.device), [len(head) for head in heads], join=join)
    state.hidden = scorer.hidden
    begin(state)


@contextmanager
def _reserved(drafter: Drafter) -> Iterator[None]:
    """A drafter with a memory has one generation at a time; another one, nested or in a thread, is refused."""
    mine = {id(part) for part in drafter.parts() if getattr(type(part), "begin", Drafter.begin) is not Drafter.begin}
    with _LOCK:
        if mine & _RESERVED:
            raise ValueError("draft: expected a drafter that no other generation is in the middle of; make another")
        _RESERVED.update(mine)
    try:
        yield
    finally:
        _RESERVED.difference_update(mine)


_LOCK = Lock()
_RESERVED: set[int] = set()


def _process(processors: LogitsProcessorList, output: _Output, logits: torch.Tensor, tree: Proposal) -> torch.Tensor:
    """The processed logits, `[batch, nodes, vocab]` f32: one call a request and depth: equal depths, equal lengths."""
    processed = logits.to(torch.float32, copy=True)
    batch, nodes = logits.shape[:2]
    parents = tree.parents.expand(tree.tokens.shape).tolist()
    for request in range(batch):
        tokens = tree.tokens[request].tolist()
        paths: dict[int, list[int]] = {0: []}
        for node in range(1, nodes):
            parent = parents[request][node]
            if parent in paths and 0 <= tokens[node] < logits.shape[-1]:
                paths[node] = [*paths[parent], tokens[node]]
        by_depth: dict[int, list[int]] = {}
        for node, path in paths.items():
            by_depth.setdefault(len(path), []).append(node)
        text = output.rows[request]
        for same in by_depth.values():
            contexts = torch.tensor([text + paths[node] for node in same], device=logits.device)
            before = processed[request, same]
            after = processors(contexts, before)
            if not isinstance(after, torch.Tensor) or after.shape != before.shape:
                got = list(after.shape) if isinstance(after, torch.Tensor) else _what(after)
                raise ValueError(f"logits_processor: expected logits {list(before.shape)} back, got {got}")
            processed[request, same] = after.to(processed)
    return processed


@dataclass
class _Ends:
    """When a request is over, apart from its length.

    Args:
        eos: tokens that end it.
        criteria: asked after every other token.
    """

    eos: list[int]
    criteria: StoppingCriteriaList

    def after(self, row: list[int], device: torch.device) -> bool:
        """Whether the text ends with its last token."""
        if row[-1] in self.eos:
            return True
        if not self.criteria:
            return False
        return bool(self.criteria(torch.tensor([row], device=device), None).all())


class _Output:
    """The text of each request as the caller will see it, and the tokens still allowed."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        ends: _Ends,
        streamer: Any,
        pad: int,
    ) -> None:
        self.input_ids, self.ends, self.streamer, self.limit = input_ids, ends, streamer, max_new_tokens
        self.width, self.pad = input_ids.shape[1], pad
        self.rows: list[list[int]] = input_ids.tolist()  # prompts with their padding, as processors see them

    def begin(self) -> None:
        """Hand the prompt to the streamer."""
        if self.streamer is not None:
            self.streamer.put(self.input_ids.cpu())

    def advance(self, state: State, found: Stepped, stats: Stats) -> int:
        """Append what was verified, token by token up to each request's end; returns how many tokens came."""
        rows = _read(found)  # the step's only copy to the host
        width = found.verified.tokens.shape[1]
        stats.target_calls += 1
        came = 0
        for request, (length, status, more, *tokens) in enumerate(rows):
            if not state.active[request]:
                continue
            stats.request_calls += 1
            stats.status[request] |= status
            stats.count(length - 1, length - 1 + more)
            if found.tree.origin is not None:
                stats.count_origins(tokens[2 * width :], tokens[width : 2 * width])
            row = self.rows[request]
            if status & ~Status.BAD_TOKEN:  # the last token is a placeholder, and there is nothing to go on with
                state.active[request] = False
                length -= 1
            for token in tokens[:length]:
                row.append(token)
                state.sequences[request].append(token)
                came += 1
                stats.tokens += 1
                if self.streamer is not None:
                    self.streamer.put(torch.tensor([token]))
                full = len(row) - self.width >= self.limit
                if full or self.ends.after(row, self.input_ids.device):
                    state.active[request] = False
                    break
        state.step += 1
        state.refresh()
        return came

    def sequences(self) -> torch.Tensor:
        """`[batch, longest]` int64, padded on the right."""
        if self.streamer is not None:
            self.streamer.end()
        longest = max(map(len, self.rows))
        padded = [row + [self.pad] * (longest - len(row)) for row in self.rows]
        return torch.tensor(padded, device=self.input_ids.device)


def _read(found: Stepped) -> list[list[int]]:
    """Of each request its length, its status, whether its last node had candidates, its tokens, and origins."""
    tree, _, verified, packed = found
    if packed is not None:
        rows: list[list[int]] = packed.tolist()
        return rows
    # in lists: after a forward each tensor operation that is new to the processor's caches takes 10 us or more
    path, length, tokens, status = (field.tolist() for field in verified)
    nodes = tree.tokens.tolist()
    parents = tree.parents.tolist() if tree.parents.dim() == 2 else [tree.parents.tolist()] * len(nodes)
    more = [
        any(above == node and token >= 0 for above, token in zip(parents[request], nodes[request], strict=True))
        for request, node in enumerate(map(max, path))
    ]
    return [[n, bits, some, *row] for n, bits, some, row in zip(length, status, more, tokens, strict=True)]


def _prompts(target: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """Each request's tokens without padding."""
    if (
        not isinstance(input_ids, torch.Tensor)
        or input_ids.dim() != 2
        or input_ids.dtype not in (torch.int64, torch.int32)
    ):
        got = (
            f"{list(input_ids.shape)} {input_ids.dtype}"
            if isinstance(input_ids, torch.Tensor)
            else type(input_ids).__name__
        )
        raise ValueError(f"input_ids: expected an int64 tensor [batch, length], got {got}")
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected at least one prompt of at least one token, got {list(input_ids.shape)}")
    vocab = input_vocab(target)
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab:
        raise ValueError(
            f"input_ids: expected ids in [0, {vocab}), got {int(input_ids.min())} to {int(input_ids.max())}"
        )
    if attention_mask is None:
        pad, ends = target.generation_config.pad_token_id, _listed(target.generation_config.eos_token_id)
        attention_mask = input_ids != pad if pad is not None and pad not in ends else torch.ones_like(input_ids)
    elif not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask: expected a tensor or None, got {type(attention_mask).__name__}")
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected input_ids' shape, {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    for request, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"input_ids: expected at least one token in every prompt, row {request} is all padding")
    return prompts


def drafter_for(
    target: PreTrainedModel,
    draft: Any,
    branching: Sequence[int],
    proposal: str | None,
    attention: str,
    temperature: float | torch.Tensor,
    parents: Sequence[int] | None = None,
) -> Drafter:
    """What `draft` stands for."""
    branching = check_branching(branching)
    if proposal is not None:
        check.choice("proposal", proposal, PROPOSALS)
    greedy = not isinstance(temperature, torch.Tensor) and temperature == 0
    if isinstance(draft, str) and draft == "ngram":
        draft = NgramDrafter(continuations=branching[0])
    wanted = proposal or ("point" if greedy else "without_replacement")
    vocab = target.config.get_text_config(decoder=True).vocab_size
    if isinstance(unwrapped(draft), PreTrainedModel) or hasattr(draft, "get_base_model"):
        require("draft", draft, attention, exact=False)
        drafter = ModelDrafter(draft, branching, wanted, attention, parents=parents)
        drafter.check_vocab(vocab)
        return drafter
    if isinstance(draft, type) or not hasattr(draft, "propose"):
        raise ValueError(f'draft: expected a model, a Drafter object or "ngram", got {_what(draft)}')
    if isinstance(draft, ModelDrafter):
        draft.check_vocab(vocab)
    if parents is not None:
        draft = draft.with_tree(parents, wanted)
    elif hasattr(draft, "with_branching"):
        draft = draft.with_branching(branching, wanted)
    own = getattr(draft, "proposal", "point")
    check.choice("draft.proposal", own, PROPOSALS)
    if proposal is not None and proposal != own:
        raise ValueError(f"proposal: expected this drafter's own, {own!r}, or None, got {proposal!r}")
    return draft if isinstance(draft, Drafter) else Adapter(draft)


def _sampling(temperature: Any, top_k: Any, top_p: Any, min_p: Any, batch: int, device: torch.device) -> SamplingParams:
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, value in fields.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.shape not in ((), (batch,)) or value.dtype == torch.bool or value.is_complex():
            raise ValueError(
                f"{name}: expected a number or a tensor of numbers [{batch}], got {list(value.shape)} {value.dtype}"
            )
        fields[name] = value.to(device)
    return SamplingParams(**fields)


def _seeds(seed: Any, batch: int, device: torch.device) -> torch.Tensor:
    value = _plain(seed)
    one = isinstance(value, Integral)
    seeds = [value] * batch if one else _listed(value)
    if len(seeds) != batch or any(isinstance(s, bool) or not isinstance(s, Integral) for s in seeds):
        raise ValueError(f"seed: expected a whole number or {batch} of them, got {seed!r}")
    signed = [(int(s) + one * b + 2**63) % 2**64 - 2**63 for b, s in enumerate(seeds)]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _token_ids(name: str, given: Any, own: Any) -> list[int]:
    """The caller's token ids, else the model's own. They need not be in its vocabulary: -1 may stand for none."""
    ids = own if given is None else list(given) if isinstance(given, Set) else given
    return [check.whole(name, token, -(2**63), 2**63 - 1) for token in _listed(ids)]


def _plain(value: Any) -> Any:
    """A tensor or an array as a number, or as a list of them."""
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def _listed(value: Any) -> list[Any]:
    """Nothing, one or several, as a list."""
    value = _plain(value)
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return [] if value is None else [_plain(one) for one in value] if several else [value]


def _criteria(stopping_criteria: Any, stop_strings: Any, tokenizer: Any) -> StoppingCriteriaList:
    """The criteria, and one more for the strings."""
    criteria = _list_of("stopping_criteria", StoppingCriteriaList, stopping_criteria)
    strings = [stop_strings] if isinstance(stop_strings, str) else [] if stop_strings is None else stop_strings
    if not isinstance(strings, (list, tuple, Set)) or not all(isinstance(one, str) and one for one in strings):
        raise ValueError(f"stop_strings: expected a string or a list of them, none of them empty, got {stop_strings!r}")
    if not strings:
        return criteria
    if tokenizer is None:
        raise ValueError("stop_strings: expected a tokenizer beside them, got None")
    needed = ("__call__", "get_vocab", "convert_tokens_to_string")
    _check_methods("tokenizer", tokenizer, "one of transformers' tokenizers", *needed)
    return StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer=tokenizer, stop_strings=list(strings))])


def _list_of(name: str, kind: Any, value: Any) -> Any:
    """`value` as transformers' list type: a list, a single item, or nothing."""
    items = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if isinstance(item, type) or not callable(item):
            expected = kind.__name__.removesuffix("List")
            raise ValueError(f"{name}: expected a {expected}, a list of them or None, got {_what(item)}")
    return value if isinstance(value, kind) else kind(items)


def _check_methods(name: str, value: Any, expected: str, *methods: str) -> None:
    """Raise unless `value` is None or an object with these methods."""
    sound = not isinstance(value, type) and all(callable(getattr(value, method, None)) for method in methods)
    if value is not None and not sound:
        raise ValueError(f"{name}: expected {expected} or None, got {_what(value)}")


def _what(value: Any) -> str:
    """What came, in a few words, for an error: a model's own description has hundreds of lines."""
    return repr(value) if value is None or isinstance(value, (bool, int, float, str, type)) else type(value).__name__


def _tell(line: str) -> None:
    """A line on stderr that leaves the progress bar whole."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stderr)


def _bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="tok")
