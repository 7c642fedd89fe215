"""The tree of most tokens a second, for a pair of models on this machine: measured, searched, and measured again."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams
from mcsd_kernels import _checks as check
from mcsd_kernels.verify import PROPOSALS

from ..checking import unwrapped
from ..drafters import Drafter
from ..placement import input_device, input_vocab, text_limit
from ..profile import Ladder, Profile
from ..trees import LARGEST_TREE, check_branching, parents_of
from .measure import (
    Contender,
    context_length,
    measure_costs,
    race,
    record_labels,
    takes_tree,
    tree_drafter,
)
from .search import (
    WIDEST,
    Costs,
    Floats,
    Labels,
    TreeSearch,
    acceptance_table,
    children_of,
    depths_of,
    nested_order,
    renumbered,
    replay,
    tree_values,
)

__all__ = ["HAND_MADE", "tune"]

HAND_MADE = ((1,), (2,), (4,), (1, 1, 1, 1), (4, 2, 2), (4, 2, 2, 1))
"""Trees that people choose by hand; they run beside what the search finds."""

TOP, TOP_TRAVERSAL = 3, 2
FREE = 1e-3
"""A draft node that costs less than this share of a target step is taken as free in the search."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Guess:
    """A tree and what it should do."""

    parents: tuple[int, ...]
    proposal: str
    tokens_per_call: float
    tokens_per_second: float


def tune(
    target: PreTrainedModel,
    draft: PreTrainedModel | Drafter,
    prompts: Sequence[torch.Tensor],
    *,
    nodes: int = 32,
    depth: int = 6,
    width: int = 8,
    tokens: int = 64,
    measured_prompts: int | None = None,
    proposals: Sequence[str] | None = None,
    hand_made: Sequence[Sequence[int]] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    attention: str = "auto",
    names: dict[str, str] | None = None,
    report: Report | None = None,
) -> Profile:
    """Find the tree, its proposal and the rule that give the most tokens a second.

    The target writes a text for each prompt, and for every token it is noted which sibling would have been accepted.
    The forwards of both models are timed by size; dynamic programming gives the best tree of every size and depth;
    replay of the noted texts predicts its tokens per call. The best few, trees made by hand and plain decoding then
    decode the prompts in turn, and the measured best is the result.

    Args:
        target: the model.
        draft: a smaller model with the same vocabulary, or a drafter that takes any tree (`with_tree`).
        prompts: `[1, length]` int64 each, on the target's device.
        nodes: of the largest tree considered, at most 512.
        depth: of the deepest; at most what the drafter allows.
        width: most children of a node, at most 128 and the vocabulary.
        tokens: written after each prompt, when recording and when measuring.
        measured_prompts: how many of the prompts the trees are measured on; None: all.
        proposals: those considered; None: all four, at temperature 0 "point" alone, where a sampled draft has a single
            candidate.
        hand_made: branching of trees to measure besides; None: those of `HAND_MADE` that the drafter allows.
        temperature, top_k, top_p, min_p: numbers, see `mcsd_kernels.SamplingParams`; what is best depends on them.
        seed: of the texts.
        attention: as for `mcsd.generate`.
        names: "target" and "draft" as the profile should call them; None: as the models do.
        report: called with what is being done, how much of it is done, and how much there is.

    Returns:
        The profile.

    Raises:
        ValueError: an argument is wrong.

    Source: Chen et al., "Sequoia", arXiv 2402.12374 (search by dynamic programming, with the hardware's costs).
    """
    check.whole("nodes", nodes, 2, LARGEST_TREE // 2)  # costs are measured up to the next power of 2
    for name, value, least in (("depth", depth, 1), ("tokens", tokens, 8)):
        check.whole(name, value, least)
    check.whole("width", width, 1, min(WIDEST, input_vocab(target)))
    if measured_prompts is not None:
        check.whole("measured_prompts", measured_prompts, 1)
    tree_drafter(draft, (-1, 0), proposals[0] if proposals else "point")  # refuses what has no choice of trees
    prompts = list(prompts)
    _check_prompts(target, prompts, tokens)
    known = PROPOSALS if temperature > 0 else ("point",)
    proposals = known if proposals is None else tuple(proposals)
    if not proposals or not set(proposals) <= set(known):
        raise ValueError(f"proposals: expected some of {', '.join(known)} at this temperature, got {proposals}")
    shapes = _hand_made(draft, hand_made, proposals[0])
    depth = next(levels for levels in range(depth, 0, -1) if takes_tree(draft, range(-1, levels), proposals[0]))
    sampling = SamplingParams(temperature, top_k, top_p, min_p)
    said = report or (lambda what, done, of: None)

    labels = record_labels(
        target,
        draft,
        prompts,
        width=width,
        tokens=tokens,
        sampling=sampling,
        seed=seed,
        attention=attention,
        progress=lambda done, of: said("recording what is accepted", done, of),
    )
    labels = {name: labels[name] for name in proposals}
    said("timing forwards", 0, 1)
    costs = measure_costs(target, draft, prompts[0], nodes=nodes, sampling=sampling, attention=attention)
    acceptance = {name: acceptance_table(texts, depth) for name, texts in labels.items()}
    guesses = _search(acceptance, labels, costs, nodes, lambda done, of: said("searching trees", done, of))
    contenders = _contenders(guesses, shapes, proposals[0], nodes)
    race(
        target,
        draft,
        contenders,
        prompts[:measured_prompts],
        tokens=tokens,
        sampling=sampling,
        seed=seed + len(prompts),  # texts that the search has not seen
        attention=attention,
        progress=lambda done, of: said(f"measuring {len(contenders) - 1} trees and plain decoding", done, of),
    )
    plain, *raced = contenders
    best = max(raced, key=lambda contender: contender.tokens_per_second)
    assert best.parents is not None
    return Profile(
        parents=best.parents,
        proposal=best.proposal,
        rule=best.rule,
        settings=_settings(target, draft, sampling, len(prompts), tokens, seed) | (names or {}),
        tokens_per_call=round(best.tokens_per_call, 4),
        tokens_per_second=round(best.tokens_per_second, 3),
        plain_tokens_per_second=round(plain.tokens_per_second, 3),
        acceptance={name: table.round(4).tolist() for name, table in acceptance.items()},
        costs={
            "target": {str(n): round(s, 6) for n, s in costs.target.items()},
            "draft": {str(n): round(s, 6) for n, s in costs.draft.items()},
            "rest": {str(n): round(s, 6) for n, s in costs.rest.items()},
        },
        curve=_curve(guesses, raced),
        shapes=[_row(contender, labels, costs, shapes) for contender in raced],
        ladder=_ladder(guesses, acceptance, costs, len(best.parents), nodes),
    )


def _check_prompts(target: PreTrainedModel, prompts: list[torch.Tensor], tokens: int) -> None:
    """Refuse prompts that the target cannot read, or not write on for so many tokens.

    Raises:
        ValueError: what is wrong with them.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one")
    positions = text_limit(unwrapped(target))
    for number, prompt in enumerate(prompts):
        check.tensor(f"prompts[{number}]", prompt, (1, None), check.INTEGERS)
        length = prompt.shape[1]
        if length == 0:
            raise ValueError(f"prompts[{number}]: expected at least one token, got none")
        if positions and length + tokens > positions:
            raise ValueError(
                f"prompts[{number}]: expected at most {max(positions - tokens, 0)} tokens, which with {tokens} new "
                f"ones fit the target's {positions} positions, got {length}"
            )
    context_length(target)  # refuses a target without room for it


def _hand_made(
    draft: PreTrainedModel | Drafter, hand_made: Sequence[Sequence[int]] | None, proposal: str
) -> list[tuple[int, ...]]:
    """Parents of the trees made by hand.

    Raises:
        ValueError: one that was asked for is no tree, or the drafter does not allow it.
    """
    if hand_made is None:
        shapes = [parents_of(branching) for branching in HAND_MADE]
        return [parents for parents in shapes if takes_tree(draft, parents, proposal)]
    shapes = []
    for branching in hand_made:
        shapes.append(parents_of(check_branching(branching)))
        try:
            tree_drafter(draft, shapes[-1], proposal)
        except ValueError as error:
            raise ValueError(
                f"hand_made: expected trees that the drafter allows, got {tuple(branching)} ({error})"
            ) from None
    return shapes


def _search(
    acceptance: dict[str, Floats],
    labels: dict[str, list[Labels]],
    costs: Costs,
    nodes: int,
    progress: Callable[[int, int], None],
) -> list[_Guess]:
    """For every proposal and every number of nodes the tree that should be fastest, by replay."""
    level, node = costs.line()
    counted = node > FREE * min(costs.target.values())
    target = [0.0, *(costs.step((-1, *[0] * (n - 1))) if n > 1 else 0.0 for n in range(1, nodes + 1))]
    first = costs.draft[1]  # the root's draft level is in every step
    guesses = []
    work = [(proposal, table[:depth]) for proposal, table in acceptance.items() for depth in range(1, len(table) + 1)]
    best: dict[tuple[str, int], tuple[float, tuple[int, ...]]] = {}
    for done, (proposal, table) in enumerate(work):
        progress(done, len(work))
        search = TreeSearch(table, nodes, nodes if counted else 0)
        values = search.values()
        for size in range(2, nodes + 1):
            for inner in range(values.shape[1]):
                if values[size, inner] < 1:
                    continue
                price = target[size] - first + level * len(table) + node * inner
                speed = float(values[size, inner]) / price
                if speed > best.get((proposal, size), (0.0, ()))[0]:
                    best[proposal, size] = speed, search.best(size, inner)[1]
    for (proposal, _), (_, parents) in best.items():
        guesses.append(_guess(parents, proposal, labels, costs))
    return guesses


def _guess(parents: tuple[int, ...], proposal: str, labels: dict[str, list[Labels]], costs: Costs) -> _Guess:
    tokens, calls = replay(labels[proposal], parents)
    per_call = tokens / max(calls, 1)
    return _Guess(parents, proposal, per_call, per_call / costs.step(parents))


def _contenders(guesses: list[_Guess], shapes: list[tuple[int, ...]], proposal: str, nodes: int) -> list[Contender]:
    """Plain decoding, then the trees to measure, each once."""
    ranked = sorted(guesses, key=lambda guess: -guess.tokens_per_second)
    wanted = [(guess.parents, guess.proposal, "recursive") for guess in ranked[:TOP]]
    wanted += [(guess.parents, guess.proposal, "traversal") for guess in ranked[:TOP_TRAVERSAL]]
    size = 2
    while size <= nodes:
        wanted += [(g.parents, g.proposal, "recursive") for g in ranked if len(g.parents) == size][:1]
        size = 2 * size - 1
    wanted += [(parents, proposal, "recursive") for parents in shapes]
    # a chain has one candidate a node, which all proposals but "point" draw alike
    chains = {
        key: (key[0], proposal, key[2]) for key in wanted if len(set(key[0])) == len(key[0]) and key[1] != "point"
    }
    return [Contender(None), *(Contender(*key) for key in dict.fromkeys(chains.get(key, key) for key in wanted))]


def _curve(guesses: list[_Guess], raced: list[Contender]) -> list[dict[str, Any]]:
    """For every size the tree that should be fastest; measured where one of that size was."""
    rows = []
    for size in sorted({len(guess.parents) for guess in guesses}):
        guess = max((g for g in guesses if len(g.parents) == size), key=lambda g: g.tokens_per_second)
        row: dict[str, Any] = {
            "nodes": size,
            "depth": max(depths_of(guess.parents)),
            "proposal": guess.proposal,
            "predicted_tokens_per_call": round(guess.tokens_per_call, 4),
            "predicted_tokens_per_second": round(guess.tokens_per_second, 3),
        }
        for contender in raced:
            if (contender.parents, contender.proposal, contender.rule) == (guess.parents, guess.proposal, "recursive"):
                row["tokens_per_call"] = round(contender.tokens_per_call, 4)
                row["tokens_per_second"] = round(contender.tokens_per_second, 3)
                row["error"] = round(contender.error, 3)
        rows.append(row)
    return rows


def _row(
    contender: Contender, labels: dict[str, list[Labels]], costs: Costs, shapes: list[tuple[int, ...]]
) -> dict[str, Any]:
    parents = contender.parents
    assert parents is not None
    guess = _guess(parents, contender.proposal, labels, costs)
    return {
        "parents": list(parents),
        "branching": branching_of(parents),
        "hand_made": parents in shapes,
        "nodes": len(parents),
        "depth": max(depths_of(parents)),
        "proposal": contender.proposal,
        "rule": contender.rule,
        # replay knows the recursive rule's walks alone
        "predicted_tokens_per_call": round(guess.tokens_per_call, 4) if contender.rule == "recursive" else None,
        "predicted_tokens_per_second": round(guess.tokens_per_second, 3) if contender.rule == "recursive" else None,
        "tokens_per_call": round(contender.tokens_per_call, 4),
        "tokens_per_second": round(contender.tokens_per_second, 3),
        "error": round(contender.error, 3) if len(contender.runs) > 1 else None,
    }


def branching_of(parents: Sequence[int]) -> list[int] | None:
    """Branching factors, if all nodes of a depth have as many children."""
    children, depths = children_of(parents), depths_of(parents)
    factors: list[int] = []
    for depth in range(max(depths)):
        counts = {len(below) for node, below in enumerate(children) if depths[node] == depth}
        if len(counts) > 1:
            return None
        factors.extend(counts)
    return factors


def _ladder(
    guesses: list[_Guess], acceptance: dict[str, Floats], costs: Costs, chosen: int, nodes: int
) -> Ladder | None:
    """Nested trees up to twice the chosen size, for adaptive decoding."""
    some = [guess for guess in guesses if guess.proposal != "greedy"]
    if not some:
        return None
    size = min(nodes, max(2 * chosen, 8))
    within = [guess for guess in some if len(guess.parents) == size] or some
    guess = max(within, key=lambda g: g.tokens_per_second)
    values = tree_values(acceptance[guess.proposal], guess.parents)
    order = nested_order(guess.parents, values)
    parents = renumbered(guess.parents, order)
    sizes, step = [], 2
    while step < len(parents):
        sizes.append(step)
        step = 2 * step - 1
    sizes.append(len(parents))
    return Ladder(
        parents,
        tuple(round(values[node], 6) for node in order),
        tuple(sizes),
        tuple(round(costs.step(parents[:size]), 6) for size in sizes),
        guess.proposal,
    )


def _settings(
    target: PreTrainedModel, draft: Any, sampling: SamplingParams, prompts: int, tokens: int, seed: int
) -> dict[str, Any]:
    device = input_device(target)
    return {
        "target": target.config.name_or_path or type(target).__name__,
        "draft": getattr(getattr(draft, "config", None), "name_or_path", "") or type(draft).__name__,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(device),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "prompts": prompts,
        "max_new_tokens": tokens,
        "seed": seed,
    }
