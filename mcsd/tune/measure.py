"""What `tune` measures: which siblings are accepted, what forwards cost, and how fast whole trees are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams, Verified

from ..checking import unwrapped
from ..decode import generate
from ..diagnostics import draft_logits_of, laws, with_replacement_stages
from ..drafters import Drafter, ModelDrafter, Proposal, State
from ..placement import input_device, text_limit
from ..plain import plain_decoding
from ..stats import Stats, device_time
from ..trees import columns, parents_of
from .search import Costs, Labels

CONTEXT = 96
"""Tokens before the trees whose steps are timed; fewer where the target has no positions for them."""

WARM_UP = 2
"""Steps of a generation that are not timed."""

REPEATS = 8
"""Steps of each size that are timed."""


def record_labels(
    target: PreTrainedModel,
    draft: Any,
    prompts: Sequence[torch.Tensor],
    *,
    width: int,
    tokens: int,
    sampling: SamplingParams,
    seed: int = 0,
    batch: int = 8,
    attention: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Labels]]:
    """Let the target write, a token a step, and note for every proposal which sibling was accepted.

    Each step offers `width` siblings that nothing follows, so every token of the text gets a label. The text comes from
    one proposal; the others' labels are drawn, or follow, from the law of their label given the context and the token,
    which has the same joint law as if they had written the text.

    Args:
        target: the model.
        draft: its draft.
        prompts: `[1, length]` int64 each.
        width: siblings.
        tokens: of each text.
        sampling: numbers, of target and draft alike; at temperature 0 there is "point" alone.
        seed: of the texts.
        batch: texts written together.
        attention: as for `mcsd.generate`.
        progress: called with the texts written so far, and all.

    Returns:
        proposal -> for each text `[width, length]` int8, see `search.replay`.
    """
    labels: dict[str, list[Labels]] = {}
    for first in range(0, len(prompts), batch):
        some = [prompt[0].tolist() for prompt in prompts[first : first + batch]]
        recorder = _LabelRecorder(draft, width, sampling, attention, seed + first)
        _to_the_end(
            target,
            recorder,
            columns(some, input_device(target)),
            columns([[1] * len(ids) for ids in some], input_device(target)),
            max_new_tokens=tokens,
            seed=seed + first,
            observer=recorder.observe,
            attention=attention,
            **numbers(sampling),
        )
        for proposal, texts in recorder.labels.items():
            labels.setdefault(proposal, []).extend(np.array(text, np.int8).T for text in texts.values())
        if progress is not None:
            progress(first + len(some), len(prompts))
    return labels


class _LabelRecorder(Drafter):
    """A star of siblings that the target does not read, so that a step emits one token; notes which it was."""

    def __init__(self, draft: Any, width: int, sampling: SamplingParams, attention: str, seed: int) -> None:
        self.greedy = sampling.temperature == 0
        proposal = "point" if self.greedy else "without_replacement"
        self.inner = tree_drafter(draft, parents_of((width,)), proposal, attention)
        self.proposal, self.width = proposal, width
        self.reads_hidden, self.reads_cache = self.inner.reads_hidden, self.inner.reads_cache
        self.begin, self.keep, self.end = self.inner.begin, self.inner.keep, self.inner.end  # type: ignore[method-assign]
        self.labels: dict[str, dict[int, list[list[int]]]] = {}
        self._coins = torch.Generator().manual_seed(seed)

    def propose(self, state: State) -> Proposal:
        return replace(self.inner.propose(state), scored=1)

    def observe(self, state: State, tree: Proposal, logits: torch.Tensor, verified: Verified) -> None:
        """Label the token that each request's step emitted."""
        running = [request for request, active in enumerate(state.active) if active]
        y = verified.tokens[running, 0]
        siblings = tree.tokens[running, 1:]
        found = {self.proposal: _ranks(siblings, y)}
        if not self.greedy:
            q_logits = draft_logits_of(tree, running, [0] * len(running), state.vocab)
            p = laws(logits[running, 0], state.sampling)
            q = laws(q_logits, tree.draft_sampling or state.sampling)
            coins = torch.rand(2, len(running), generator=self._coins, dtype=torch.float64).to(p.device)
            found["with_replacement"] = _with_replacement(p, q, y, self.width, coins[0])
            found["greedy"] = _greedy(p, q, y, self.width, coins[1])
            found["point"] = _ranks(q_logits.argsort(stable=True, dim=-1, descending=True)[:, : self.width], y)
        for name, ranks in found.items():
            for request, column in zip(running, ranks.tolist(), strict=True):
                self.labels.setdefault(name, {}).setdefault(request, []).append(column)


def _with_replacement(
    p: torch.Tensor, q: torch.Tensor, token: torch.Tensor, width: int, coin: torch.Tensor
) -> torch.Tensor:
    """`[rows, width]`: the rank under which the emitted token was accepted, given that it was emitted.

    `P(rank j | y) = reached_j min(q(y), (p(y) - β_j q(y))_+ / S_j) / p(y)`.
    """
    beta, mass, reached = with_replacement_stages(p, q, width)
    p_token, q_token = (law.gather(1, token[:, None]) for law in (p, q))
    share = torch.minimum(q_token, (p_token - beta * q_token).clamp(min=0) / mass.clamp(min=1e-300))
    below = (reached * share / p_token).cumsum(1)
    rank = (below <= coin[:, None]).sum(1)
    count = torch.arange(1, width + 1, device=p.device)
    return torch.where(rank[:, None] < count, rank[:, None], -1)


def _greedy(p: torch.Tensor, q: torch.Tensor, token: torch.Tensor, width: int, coin: torch.Tensor) -> torch.Tensor:
    """The same for k - 1 most probable tokens T and a draw from q', which is q outside T.

    A token of T is always accepted as itself, one outside as the draw with probability `min(1, q'(y) / p(y))`.
    """
    p_token, q_token = (law.gather(1, token[:, None])[:, 0] for law in (p, q))
    top = q.argsort(stable=True, dim=-1, descending=True)[:, :width]
    place = _place(top, token)
    above = q.gather(1, top).cumsum(1)
    columns_ = []
    for count in range(1, width + 1):
        rest = 1 - (above[:, count - 2] if count > 1 else 0.0)
        drawn = coin * p_token * rest < q_token  # division-free: coin < q' / p
        chosen = (place >= 0) & (place < count - 1)
        columns_.append(torch.where(chosen, place, torch.where(drawn, count - 1, -1)))
    return torch.stack(columns_, 1)


def _ranks(candidates: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The same where the first candidates are those of any smaller number: the token's place among them."""
    place = _place(candidates, token)[:, None]
    count = torch.arange(1, candidates.shape[1] + 1, device=candidates.device)
    return torch.where(place < count, place, -1)


def _place(top: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """`[rows]`: where the token stands, -1 if nowhere."""
    same = top == token[:, None]
    return torch.where(same.any(1), same.int().argmax(1), -1)


def measure_costs(
    target: PreTrainedModel,
    draft: Any,
    prompt: torch.Tensor,
    *,
    nodes: int,
    sampling: SamplingParams,
    repeats: int = REPEATS,
    attention: str = "auto",
) -> Costs:
    """Time a step's phases by the size of its tree: medians over steps of the loop itself, warmed up.

    A tree of w children with one child each has 2 w + 1 nodes for the target and, for the draft, a level of one node
    and one of w. A draft that allows a single level has 2 w children in their place.

    Args:
        target: the model.
        draft: its draft.
        prompt: `[1, length]` int64, repeated to make a context.
        nodes: of the largest tree.
        sampling: of target and draft.
        repeats: steps of each size.
        attention: as for `mcsd.generate`.
    """
    length = context_length(target, repeats)
    context = prompt.repeat(1, -(-length // prompt.shape[1]))[:, :length]
    proposal = "point" if sampling.temperature == 0 else "without_replacement"
    widths = [1]
    while 2 * widths[-1] + 1 < nodes:
        widths.append(2 * widths[-1])
    deep = takes_tree(draft, parents_of((1, 1)), proposal)
    shapes = [(-1, 0), *(parents_of((width, 1) if deep else (2 * width,)) for width in widths)]
    phases: dict[tuple[int, ...], list[dict[str, float]]] = {shape: [] for shape in shapes}
    for _ in range(2):  # in turn, so that a slow moment of the machine does not hit one size alone
        for shape in shapes:
            steps = phases[shape]
            before: dict[str, float] = {}
            count = 0

            def note(stats: Stats) -> None:
                nonlocal before, count
                count += 1
                if count > WARM_UP:
                    steps.append({name: s - before.get(name, 0.0) for name, s in stats.seconds.items()})  # noqa: B023
                before = dict(stats.seconds)

            def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                return torch.full((ids.shape[0],), count >= WARM_UP + repeats // 2, device=ids.device)  # noqa: B023

            with device_time(input_device(target)):
                _to_the_end(
                    target,
                    tree_drafter(draft, shape, proposal, attention),
                    context,
                    max_new_tokens=_timed_tokens(repeats),
                    stopping_criteria=enough,
                    callback=note,
                    attention=attention,
                    graphs=False,  # whose steps have no phases
                    eos_token_id=[],
                    **numbers(sampling),
                )

    def median(shape: tuple[int, ...], *names: str) -> float:
        return statistics.median(sum(step.get(name, 0.0) for name in names) for step in phases[shape])

    root = median(shapes[0], "draft")
    wide = zip(widths[1:], shapes[2:], strict=True) if deep else ()
    return Costs(
        {len(shape): median(shape, "score") for shape in shapes},
        {1: root} | {w: max(median(shape, "draft") - root, 0.0) for w, shape in wide},
        {len(shape): median(shape, "verify", "keep", "other") for shape in shapes},
    )


def context_length(target: PreTrainedModel, repeats: int = REPEATS) -> int:
    """Tokens of the context in which steps are timed.

    Args:
        target: the model.
        repeats: see `measure_costs`.

    Raises:
        ValueError: the target has too few positions for any.
    """
    positions, new = text_limit(unwrapped(target)), _timed_tokens(repeats)
    if positions and positions <= new:
        raise ValueError(f"target: expected at least {new + 1} positions to time steps in, got {positions}")
    return min(CONTEXT, positions - new) if positions else CONTEXT


def _timed_tokens(repeats: int) -> int:
    return 3 * (WARM_UP + repeats // 2)


def tree_drafter(draft: Any, parents: Sequence[int], proposal: str, attention: str = "auto") -> Drafter:
    """A drafter with this tree: of a model, or of a drafter that takes other trees (`with_tree`).

    Raises:
        ValueError: the drafter's tree is its own.
    """
    if isinstance(unwrapped(draft), PreTrainedModel):
        return ModelDrafter(draft, proposal=proposal, attention=attention, parents=parents)
    if not hasattr(draft, "with_tree"):
        raise ValueError(f"draft: expected a model, whose trees can be chosen, got {type(draft).__name__}")
    found: Drafter = draft.with_tree(parents, proposal)
    return found


def takes_tree(draft: Any, parents: Sequence[int], proposal: str) -> bool:
    """Whether the draft can have this tree."""
    try:
        tree_drafter(draft, parents, proposal)
    except ValueError:
        return False
    return True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def numbers(sampling: SamplingParams) -> dict[str, Any]:
    """Temperature and filters, as `generate` takes them."""
    return {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}


@dataclass
class Contender:
    """A tree that is tried for real, and what came of it.

    Args:
        parents: of the tree; None: plain decoding by transformers.
        proposal: how siblings are drawn.
        rule: how they are verified.
        runs: for each text (tokens, target calls, seconds).
    """

    parents: tuple[int, ...] | None
    proposal: str = "without_replacement"
    rule: str = "recursive"
    runs: list[tuple[int, int, float]] = field(default_factory=list)

    @property
    def tokens_per_call(self) -> float:
        """Over all texts."""
        return sum(run[0] for run in self.runs) / max(sum(run[1] for run in self.runs), 1)

    @property
    def tokens_per_second(self) -> float:
        """Over all texts."""
        return sum(run[0] for run in self.runs) / max(sum(run[2] for run in self.runs), 1e-9)

    @property
    def error(self) -> float:
        """Standard error of `tokens_per_second` over texts, by the jackknife."""
        n = len(self.runs)
        if n < 2:
            return float("nan")
        tokens, seconds = np.array([r[0] for r in self.runs], float), np.array([r[2] for r in self.runs])
        left = (tokens.sum() - tokens) / (seconds.sum() - seconds)
        return float(np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum()))


def _to_the_end(*arguments: Any, **options: Any) -> Stats:
    """`mcsd.generate`, but nothing is measured of a text that Ctrl-C has cut short."""
    stats = generate(*arguments, **options).stats
    if stats.interrupted:
        raise KeyboardInterrupt
    return stats


def race(
    target: PreTrainedModel,
    draft: Any,
    contenders: Sequence[Contender],
    prompts: Sequence[torch.Tensor],
    *,
    tokens: int,
    sampling: SamplingParams,
    seed: int = 0,
    attention: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Decode every prompt with every contender in turn, so that a slow moment of the machine hits them all.

    Args:
        target: the model.
        draft: its draft.
        contenders: get their `runs`.
        prompts: `[1, length]` int64 each.
        tokens: of each text.
        sampling: numbers.
        seed: of the first text.
        attention: as for `mcsd.generate`.
        progress: called with the texts decoded so far, and all.
    """

    def run(contender: Contender, prompt: torch.Tensor, count: int, number: int) -> tuple[int, int, float]:
        _wait(input_device(target))
        start = time.perf_counter()
        if contender.parents is None:
            sequences = plain_decoding(target, prompt, count, numbers(sampling), number)
            emitted = calls = int(sequences.shape[1] - prompt.shape[1])
        else:
            drafter = tree_drafter(draft, contender.parents, contender.proposal, attention)
            stats = _to_the_end(
                target,
                drafter,
                prompt,
                max_new_tokens=count,
                seed=number,
                rule=contender.rule,
                attention=attention,
                eos_token_id=[],  # as many tokens for everyone
                **numbers(sampling),
            )
            emitted, calls = stats.tokens, stats.target_calls
        _wait(input_device(target))
        return emitted, calls, time.perf_counter() - start

    for contender in contenders:
        run(contender, prompts[0], min(4, tokens), seed)
    for number, prompt in enumerate(prompts):
        for contender in contenders:
            contender.runs.append(run(contender, prompt, tokens, seed + number))
        if progress is not None:
            progress(number + 1, len(prompts))
