"""transformers: token trees inside `model.generate`, and our verification inside its assisted decoding.

Source: two extension points of transformers 5.0 to 5.23, in src/transformers/generation/utils.py:
`generate(custom_generate=)` and `_speculative_sampling`, which `_assisted_decoding` calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, utils
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from mcsd_kernels import SamplingParams, verify
from mcsd_kernels import _checks as check
from mcsd_kernels.verify import RULES

from ..decode import generate
from ..drafters import Drafter
from ..stats import Stats
from ._trees import chain, rows_of


class TreeDecoding:
    """`model.generate(**inputs, custom_generate=TreeDecoding(draft=...))`: the same text law, fewer target forwards.

    Of `generate`'s options everything that shapes the text works: lengths, `do_sample`, temperature and filters, the
    logits processors it builds or is given, stopping criteria, `max_time`, special tokens, `num_return_sequences`,
    `return_dict_in_generate`. What cannot be had is refused by name: beams, scores, attentions and hidden states as
    output, a cache brought along, embeddings as input, other kinds of assistance. A request that a stopping
    criterion has ended is padded, whether or not the model has an end token.

    `generate` keeps three arguments to itself without a word. `streamer` and `tokenizer`, and so `stop_strings`, belong
    here: a streamer given to `generate` gets the prompt and no end, and whoever iterates over it waits for ever.
    `assistant_model` belongs here as `draft`.

    Args:
        draft: a smaller model, a `Drafter` or "ngram", as in `mcsd.generate`, and so are the next three.
        branching: children of a tree node at depth 0, 1, ...
        proposal: how siblings are drawn.
        rule: "recursive" or "traversal".
        seed: request b's numbers depend on `seed + b`. None: drawn from torch's generator, so that `set_seed` counts.
        streamer: gets the prompt and then every token; batch 1 only.
        stop_strings: end a request when its text ends in one of these; needs `tokenizer`.
        tokenizer: for `stop_strings`.
        attention: "auto", "tree" or "dense", as in `mcsd.generate`.
        progress: show a progress bar on stderr.

    Attributes:
        stats: the last call's `Stats`.
    """

    def __init__(
        self,
        draft: Any = "ngram",
        branching: Sequence[int] = (4, 2, 2),
        *,
        proposal: str | None = None,
        rule: str = "recursive",
        seed: int | Sequence[int] | None = None,
        streamer: Any = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: Any = None,
        attention: str = "auto",
        progress: bool = False,
    ) -> None:
        self.draft, self.seed = draft, seed
        self.options: dict[str, Any] = {
            "branching": branching,
            "proposal": proposal,
            "rule": rule,
            "streamer": streamer,
            "stop_strings": stop_strings,
            "tokenizer": tokenizer,
            "attention": attention,
            "progress": progress,
        }
        self.stats: Stats | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls, with everything it has prepared; returns what its own `_sample` would.

        Raises:
            ValueError: an option that trees do not have, or one that `mcsd.generate` refuses.
        """
        _refuse(generation_config, model_kwargs)
        owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
        if owner is not model:
            raise ValueError(
                f"custom_generate: {type(owner).__name__} changes what the model reads, which trees cannot"
            )
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:  # generate drops a mask of ones
            attention_mask = torch.ones_like(input_ids)
        _check_positions(model_kwargs.get("position_ids"), attention_mask)
        processors, sampling = _split(logits_processor)
        if not generation_config.do_sample:
            sampling["temperature"] = 0.0
        criteria, ends = _criteria(stopping_criteria, generation_config)
        pad = generation_config._pad_token_tensor
        generation = generate(
            model,
            self.draft,
            input_ids,
            attention_mask,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            seed=int(torch.randint(2**63 - 1, ())) if self.seed is None else self.seed,
            eos_token_id=ends,
            pad_token_id=None if pad is None else int(pad),
            logits_processor=[_by_request(processor, input_ids) for processor in processors],
            stopping_criteria=criteria,
            **self.options,
            **sampling,
        )
        self.stats = generation.stats
        if generation_config.return_dict_in_generate:
            return utils.GenerateDecoderOnlyOutput(sequences=generation.sequences)
        return generation.sequences


# option -> the values that ask for nothing
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    "use_mtp": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
_CACHES = ("dynamic", "dynamic_full", "static", "hybrid", "sliding_window", "hybrid_chunked")
_READ = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")


def _refuse(config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise for what would be ignored otherwise."""
    for name, harmless in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value not in harmless:
            raise ValueError(f"{name}: TreeDecoding has no such option, expected the default, got {value!r}")
    kind = config.cache_implementation
    if kind is not None and kind not in _CACHES:
        raise ValueError(f"cache_implementation: expected a plain cache (TreeDecoding keeps its own), got {kind!r}")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(f"past_key_values: expected none, got a cache of {cache.get_seq_length()} tokens")
    for name, value in model_kwargs.items():
        if name not in _READ and value is not None:
            raise ValueError(f"{name}: TreeDecoding does not hand this on to the model, expected None")


def _check_positions(position_ids: Any, attention_mask: torch.Tensor) -> None:
    """Raise unless positions count the tokens from 0, as the loop will."""
    if position_ids is None:
        return
    counted = attention_mask.cumsum(-1) - 1
    if position_ids.shape[-1] != counted.shape[-1] or ((position_ids != counted) & attention_mask.bool()).any():
        raise ValueError("position_ids: expected to count each prompt's tokens from 0 (or None), got something else")


def _split(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """The processors, without those at the end that `verify` applies itself, and what it is told instead."""
    rest, sampling, before = list(processors), {}, len(_WARPERS)
    while rest:
        last = rest[-1]
        if type(last) is not logits_process.LogitNormalization:  # which says nothing about the law
            rank = next((rank for rank, (kind, _) in enumerate(_WARPERS[:before]) if type(last) is kind), None)
            if rank is None or not _is_plain(last):
                break
            name, before = _WARPERS[rank][1], rank
            sampling[name] = getattr(last, name)
        rest.pop()
    return LogitsProcessorList(rest), sampling


def _is_plain(warper: Any) -> bool:
    """Whether `SamplingParams` can say the same: a filter that strikes out, however few remain."""
    kept = 1 if hasattr(warper, "top_k") else getattr(warper, "min_tokens_to_keep", 1)
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and kept == 1 and getattr(warper, "top_p", 1) > 0


# in the order in which `verify` applies them
_WARPERS = (
    (logits_process.TemperatureLogitsWarper, "temperature"),
    (logits_process.TopKLogitsWarper, "top_k"),
    (logits_process.TopPLogitsWarper, "top_p"),
    (logits_process.MinPLogitsWarper, "min_p"),
)


def _by_request(processor: Any, input_ids: torch.Tensor) -> Any:
    """`processor`, told which request a context belongs to if it wants to know: rows are a tree's nodes, not requests.

    Raises:
        ValueError: it keeps state from call to call, or wants to tell equal prompts apart.
    """
    if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
        lengths = processor.prompt_ignore_length
        if not isinstance(lengths, torch.Tensor):
            return processor
        plain = [copy.copy(processor) for _ in range(len(lengths))]
        for one, length in zip(plain, lengths.tolist(), strict=True):
            one.prompt_ignore_length = length
        return _ByRequest(input_ids, plain)
    if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        if len(torch.unique(input_ids, dim=0)) < len(input_ids):
            raise ValueError("prefix_allowed_tokens_fn: expected prompts that differ, got equal ones in one batch")
        ask = processor._prefix_allowed_tokens_fn
        return _ByRequest(input_ids, [_Constrained(ask, request) for request in range(len(input_ids))])
    if isinstance(processor, logits_process.SynthIDTextWatermarkLogitsProcessor):
        raise ValueError("watermarking_config: expected one without memory, got SynthID, which counts its calls")
    return processor


class _ByRequest(LogitsProcessor):
    """Passes each call on to its request's own processor, recognised by the prompt."""

    def __init__(self, input_ids: torch.Tensor, processors: list[Any]) -> None:
        self.prompts, self.processors = input_ids, processors

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        prompt = input_ids[0, : self.prompts.shape[1]]
        request = int((self.prompts == prompt).all(1).int().argmax())
        processed: torch.Tensor = self.processors[request](input_ids, scores)
        return processed


class _Constrained(LogitsProcessor):
    """`prefix_allowed_tokens_fn` for one request's contexts."""

    def __init__(self, ask: Callable[[int, torch.Tensor], list[int]], request: int) -> None:
        self.inner = logits_process.PrefixConstrainedLogitsProcessor(lambda _, text: ask(request, text), 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(text[None], row[None]) for text, row in zip(input_ids, scores, strict=True)])


def _criteria(criteria: StoppingCriteriaList, config: Any) -> tuple[StoppingCriteriaList, list[int]]:
    """The criteria that the loop does not know itself, and the tokens that end a request."""
    rest, ends = StoppingCriteriaList(), []
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ends += criterion.eos_token_id.reshape(-1).tolist()
        elif type(criterion) is not MaxLengthCriteria or criterion.max_length < config.max_length:
            rest.append(criterion)
    return rest, ends


@contextmanager
def lossless_assisted_decoding(rule: str = "recursive", backend: str | None = None) -> Iterator[None]:
    """Inside this context, transformers' assisted decoding verifies with `mcsd_kernels.verify`.

    The law is the same. What changes: no softmax over all rows, no crash where p and q agree to the last digit and the
    coin is almost 1 (their residual is then 0 / 0), and `rule="traversal"` verifies blocks, which accepts more. The
    replacement is made in the module, so it holds for every thread.

    Args:
        rule: "recursive" or "traversal".
        backend: as in `verify`.

    Raises:
        ValueError: an unknown rule, an assistant that is a drafter and no model, or a transformers without the function
            to replace.
    """
    check.choice("rule", rule, RULES)
    original = getattr(utils, "_speculative_sampling", None)
    if original is None:
        raise ValueError("transformers: expected generation.utils._speculative_sampling, this version has none")

    def replacement(
        candidate_input_ids: torch.Tensor,
        candidate_logits: torch.Tensor,
        candidate_length: int,
        new_logits: torch.Tensor,
        *candidates_end_the_text: bool,
        assistant_ensemble_weight: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if assistant_ensemble_weight is not None:
            raise ValueError(
                f"assistant_ensemble_weight: expected None, got {assistant_ensemble_weight}; a mixture is not lossless"
            )
        tokens, accepted = speculative_sampling(
            candidate_input_ids, candidate_logits, candidate_length, new_logits, rule=rule, backend=backend
        )
        if any(candidates_end_the_text) and accepted == candidate_length:  # up to 5.17: then it wants no further token
            return tokens[:, :-1], accepted - 1
        return tokens, accepted

    utils._speculative_sampling = replacement
    try:
        yield
    except AttributeError as error:  # transformers asks for its configuration before it looks at the kind
        if not isinstance(error.obj, Drafter) or error.name != "config":
            raise
        raise ValueError(
            f"assistant_model: expected a model, got a {type(error.obj).__name__}; TreeDecoding(draft=...) takes it"
        ) from error
    finally:
        utils._speculative_sampling = original


def speculative_sampling(
    candidate_input_ids: torch.Tensor,
    candidate_logits: torch.Tensor,
    candidate_length: int,
    new_logits: torch.Tensor,
    *,
    rule: str = "recursive",
    sampling: SamplingParams = SamplingParams(),
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_speculative_sampling` of transformers: one chain, its coins from torch's generator.

    Args:
        candidate_input_ids: `[1, length]` int64, the text and then the candidates.
        candidate_logits: `[1, candidate_length, vocab]`, what they were drawn from.
        candidate_length: how many candidates there are.
        new_logits: `[1, candidate_length + 1, vocab]`, the target's, processed.
        rule: "recursive" or "traversal".
        sampling: on top of what the logits have been through.
        backend: as in `verify`.

    Returns:
        `[1, accepted + 1]` int64 tokens, and how many were accepted, a scalar.
    """
    nodes, device = candidate_length + 1, new_logits.device
    rows = torch.arange(nodes, device=device).clamp(max=max(candidate_logits.shape[1] - 1, 0))
    _, length, tokens, _ = verify(
        new_logits,
        rows_of("candidate_logits", candidate_logits),
        candidate_input_ids[:, -nodes:],
        chain(nodes, device),
        torch.rand(1, nodes + 2, device=device),
        proposal="with_replacement",
        rule=rule,
        sampling=sampling,
        draft_rows=rows[None],
        max_depth=candidate_length,
        backend=backend,
    )
    return tokens[:, : int(length)], length[0] - 1
