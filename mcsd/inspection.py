"""What happens inside a step: the drafted tree, both laws at every candidate, and what `verify` made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams, Status, Verified
from mcsd_kernels.reference import Law, row_law

from .decode import generate
from .diagnostics import Recorder, chosen_nodes, draft_logits_of
from .drafters import Drafter, Proposal, State
from .stats import Stats
from .step import coins_of


@dataclass(frozen=True)
class Node:
    """A node of a drafted tree.

    Args:
        id: its number; 0 is the root.
        parent: number of its parent, -1 for the root.
        depth: 0 for the root.
        token: -1 for a missing candidate.
        text: of the token.
        p: its probability under the target's law at its parent.
        q: the same under the draft's law; None for deterministic candidates.
        coin: the uniform number of its test.
        verdict: "accepted", "rejected", "untested" or "missing".
    """

    id: int
    parent: int
    depth: int
    token: int
    text: str
    p: float
    q: float | None
    coin: float
    verdict: str


@dataclass(frozen=True)
class Last:
    """The token that follows the accepted path.

    Args:
        token: its id.
        text: of the token.
        p: its probability under the target's law at the end of the path.
        source: "bonus" (from p, where there was nothing to test), "residual" (from what the rejected candidates left
            of p), or "placeholder" (the target's row is unusable).
    """

    token: int
    text: str
    p: float
    source: str


@dataclass(frozen=True)
class Step:
    """One target call.

    Args:
        number: of the step, from 0 on.
        nodes: of the tree, without padding.
        path: accepted nodes from the root on.
        tokens: what was emitted.
        text: the same as text.
        last: the token after the path.
        status: `Status` bits.
    """

    number: int
    nodes: list[Node]
    path: list[int]
    tokens: list[int]
    text: str
    last: Last
    status: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_steps(
    target: PreTrainedModel,
    drafter: Drafter,
    input_ids: torch.Tensor,
    decode: Callable[[list[int]], str],
    *,
    steps: int = 1,
    rule: str = "recursive",
    recorder: Recorder | None = None,
    **options: Any,
) -> tuple[list[Step], Stats]:
    """Generate, and record the first steps.

    Args:
        target: the model.
        drafter: where the trees come from.
        input_ids: `[1, length]` int64.
        decode: tokens to text.
        steps: how many; fewer come if the text ends before, or someone presses Ctrl-C.
        rule: as for `mcsd.generate`.
        recorder: gets the same steps, for diagnostics.
        options: further arguments of `mcsd.generate`.

    Returns:
        the steps, as that generation took them, and its statistics, which say whether it was interrupted.

    Raises:
        ValueError: as `mcsd.generate`.
    """
    seen = _Steps(decode, drafter.proposal, rule, recorder)

    def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), len(seen.steps) >= steps, device=ids.device)

    generation = generate(
        target,
        drafter,
        input_ids,
        torch.ones_like(input_ids),
        rule=rule,
        observer=seen.observe,
        stopping_criteria=enough,
        **options,
    )
    return seen.steps, generation.stats


class _Steps:
    """Takes down what it observes of a generation."""

    def __init__(self, decode: Callable[[list[int]], str], proposal: str, rule: str, recorder: Recorder | None) -> None:
        self.decode, self.proposal, self.rule, self.recorder = decode, proposal, rule, recorder
        self.steps: list[Step] = []

    def observe(self, state: State, tree: Proposal, logits: torch.Tensor, verified: Verified) -> None:
        """One step, as `mcsd.generate` hands it to its observer."""
        tokens = tree.tokens[0].tolist()
        parents = tree.parents.reshape(-1, len(tokens))[0].tolist()
        ways: dict[int, tuple[int, ...]] = {0: ()}
        for node in range(1, len(tokens)):
            if parents[node] in ways:
                ways[node] = (*ways[parents[node]], tokens[node])
        coins = coins_of(state, tree)[0].tolist()
        step = self._step(state, tree, tokens, parents, ways, logits[0], coins, verified)
        if self.recorder is not None:
            self.recorder.observe(state, tree, logits, verified)
        self.steps.append(step)  # last: Ctrl-C may come anywhere before, and then there is no such step

    def _step(
        self,
        state: State,
        tree: Proposal,
        tokens: list[int],
        parents: list[int],
        ways: dict[int, tuple[int, ...]],
        logits: torch.Tensor,
        coins: list[float],
        verified: Verified,
    ) -> Step:
        length = int(verified.length[0])
        path, emitted = verified.path[0, :length].tolist(), verified.tokens[0, :length].tolist()
        status = int(verified.status[0])
        children: dict[int, list[int]] = {}
        for node in list(ways)[1:]:
            children.setdefault(parents[node], []).append(node)
        chosen = chosen_nodes(tree, self.proposal)[0].tolist()
        drawn_from = {parents[node] for node in list(ways)[1:] if not chosen[node]}
        p_law: dict[int, Law | None] = {}
        q_law: dict[int, Law | None] = {}
        for node in {*children, path[-1]}:
            p_law[node] = _law(logits[node], state.sampling)
            q_law[node] = None
            if tree.draft_logits is not None and node in drawn_from:
                row = draft_logits_of(tree, [0], [node], logits.shape[-1])[0]
                q_law[node] = _law(row, tree.draft_sampling or state.sampling)
        turns = {node: _turns(some, tokens, chosen, self.proposal) for node, some in children.items()}
        tested = _tested(turns, path, self.rule)
        nodes = []
        for node, way in ways.items():
            token, parent = tokens[node], parents[node]
            verdict = "accepted" if node in path else "rejected" if node in tested else "untested"
            p, q = p_law.get(parent), q_law.get(parent)
            nodes.append(
                Node(
                    node,
                    parent,
                    len(way),
                    token,
                    self.decode([token]) if token >= 0 else "",
                    1.0 if node == 0 else _at(p, token),
                    None if q is None or chosen[node] else _at(q, token),
                    coins[node],
                    verdict if token >= 0 else "missing",
                )
            )
        to_test = any(tokens[node] >= 0 for node in children.get(path[-1], []))
        source = "residual" if to_test and length - 1 < tree.depth else "bonus"
        if status & ~Status.BAD_TOKEN:
            source = "placeholder"
        last = Last(emitted[-1], self.decode(emitted[-1:]), _at(p_law[path[-1]], emitted[-1]), source)
        return Step(state.step, nodes, path, emitted, self.decode(emitted), last, status)


def _turns(siblings: list[int], tokens: list[int], chosen: list[bool], proposal: str) -> list[int]:
    """Siblings in the order in which they are tested: drawn ones, then each token that is offered its share of p."""
    drawn = [node for node in siblings if not chosen[node]]
    offered = [node for node in siblings if chosen[node]]
    if proposal == "greedy":  # the last of them alone was drawn
        drawn, offered = drawn[-1:], drawn[:-1] + offered
    first: dict[int, int] = {}
    for node in offered:  # a repeated token has no turn
        first.setdefault(tokens[node], node)
    return drawn + list(first.values())


def _tested(turns: dict[int, list[int]], path: list[int], rule: str) -> set[int]:
    """The nodes that were offered to the target before the walk ended."""

    def subtree(node: int) -> set[int]:
        below = {node}
        for child in turns.get(node, []):
            below |= subtree(child)
        return below

    tested: set[int] = set()
    for node, accepted in zip(path, [*path[1:], None], strict=True):
        for child in turns.get(node, []):
            if child == accepted:
                break
            tested |= subtree(child) if rule == "traversal" else {child}
    return tested | set(path)


def _law(logits: torch.Tensor, sampling: SamplingParams) -> Law | None:
    """A row's law; None if the row has none."""
    if not bool(logits.isfinite().any()) or bool((logits.isnan() | logits.isposinf()).any()):
        return None
    numbers = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    temperature, top_k, top_p, min_p = (float(number) for number in numbers)
    return row_law(logits, temperature, int(top_k), top_p, min_p)


def _at(law: Law | None, token: int) -> float:
    return float(law[token]) if law is not None and 0 <= token < len(law) else 0.0
