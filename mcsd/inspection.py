"""What happens inside a step: the drafted tree, both laws at every candidate, and what `verify` made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams, Status, Verified, verify
from mcsd_kernels.reference import Law, row_law

from .decode import _coins, generate
from .drafters import Drafter, Proposal, State


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
    **options: Any,
) -> list[Step]:
    """Generate, and record the first steps.

    Args:
        target: the model.
        drafter: where the trees come from.
        input_ids: `[1, length]` int64.
        decode: tokens to text.
        steps: how many; fewer come if the text ends before.
        rule: as for `mcsd.generate`.
        options: further arguments of `mcsd.generate`.

    Returns:
        the steps, as that generation took them.

    Raises:
        ValueError: as `mcsd.generate`.
    """
    recorder = _Recorder(drafter, decode, rule)

    def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), len(recorder.steps) >= steps, device=ids.device)

    generation = generate(
        target,
        recorder,
        input_ids,
        torch.ones_like(input_ids),
        rule=rule,
        logits_processor=recorder.see,
        stopping_criteria=enough,
        **options,
    )
    if generation.stats.interrupted:
        raise KeyboardInterrupt
    return recorder.steps


class _Recorder(Drafter):
    """Hands everything on to a drafter and notes what it sees; as a logits processor it changes nothing."""

    def __init__(self, drafter: Drafter, decode: Callable[[list[int]], str], rule: str) -> None:
        self.drafter, self.decode, self.rule = drafter, decode, rule
        self.proposal = drafter.proposal
        self.steps: list[Step] = []

    def begin(self, state: State) -> None:
        self.drafter.begin(state)

    def end(self) -> None:
        self.drafter.end()

    def propose(self, state: State) -> Proposal:
        self._length = len(state.sequences[0])
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}
        self._tree = self.drafter.propose(state)
        return self._tree

    def see(self, contexts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note the target's logits after each context, which names the node by the tokens on the way to it."""
        for context, row in zip(contexts[:, self._length :].tolist(), scores, strict=True):
            self._rows.setdefault(tuple(context), row)
        return scores

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        self.drafter.keep(state, path, length)
        tree = self._tree
        tokens = tree.tokens[0].tolist()
        parents = tree.parents.reshape(-1, len(tokens))[0].tolist()
        ways: dict[int, tuple[int, ...]] = {0: ()}
        for node in range(1, len(tokens)):
            if parents[node] in ways:
                ways[node] = (*ways[parents[node]], tokens[node])
        # a missing candidate has no row, and none is read
        some = self._rows[()]
        logits = torch.stack([self._rows.get(ways.get(node, ()), some) for node in range(len(tokens))])[None]
        uniforms = _coins(state, tree)
        verified = verify(
            logits,
            tree.draft_logits,
            tree.tokens,
            tree.parents,
            uniforms,
            proposal=self.proposal,
            rule=self.rule,
            sampling=state.sampling,
            draft_rows=tree.draft_rows,
            max_depth=tree.depth,
        )
        assert torch.equal(verified.path, path), "the recorded step differs from the one that was taken"
        self.steps.append(self._step(state, tree, tokens, parents, ways, logits[0], uniforms[0].tolist(), verified))

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
        p_law: dict[int, Law | None] = {}
        q_law: dict[int, Law | None] = {}
        for node in {*children, path[-1]}:
            p_law[node] = _law(logits[node], state.sampling)
            q_law[node] = None
            if tree.draft_logits is not None and node in children:
                at: Any = (0, node) if tree.draft_rows is None else tree.draft_rows[0, node]
                q_law[node] = _law(tree.draft_logits[at], state.sampling)
        tested = _tested(children, path, self.proposal, self.rule)
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
                    None if q is None else _at(q, token),
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


def _tested(children: dict[int, list[int]], path: list[int], proposal: str, rule: str) -> set[int]:
    """The nodes that were offered to the target before the walk ended."""

    def subtree(node: int) -> set[int]:
        below = {node}
        for child in children.get(node, []):
            below |= subtree(child)
        return below

    tested: set[int] = set()
    for node, accepted in zip(path, [*path[1:], None], strict=True):
        siblings = children.get(node, [])
        if proposal == "greedy":  # the drawn one, the last, is tested first
            siblings = siblings[-1:] + siblings[:-1]
        for child in siblings:
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
