"""The oracle: the operations once more, slow, in float64, one request at a time; read it beside docs/algorithm.md.

Nothing here is fast and nothing here is clever. The backends are compared with these functions, which are themselves
proved by enumerating every draw and every decision. That is why a rule never sees a random number: it asks a `Coins`
object to accept or to draw, and the tests answer with all the branches in turn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray

from .sampling import RANGES, SamplingParams
from .types import DRAW_BLOCK, LEAST_TEMPERATURE, PLACEHOLDER, Status, Verified

Law = NDArray[np.float64]

PROPOSALS = ("without_replacement", "with_replacement", "greedy", "point")
RULES = ("recursive", "traversal")

MISSING = -1
"""The token of a candidate that was never drawn."""

NO_WEIGHT = 1e-30
"""A child that would be entered with less than this share is not entered: traversal would stop there once in 1e30."""

SMALL_DRAFT_MASS = 1e-2
"""Below this, what subtraction left of the draft's mass is summed afresh over the untried tokens."""

LOST_DRAFT_MASS = 2.0**-90
"""With less than this left to draw from, later candidates are passed over: in float32 they have no law to test by."""


def row_cutoff(
    logits: torch.Tensor | Law, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> float:
    """The smallest logit that the filters keep; -inf where they keep everything.

    Args:
        logits: `[vocab]`, any float dtype, no NaN, no +inf.
        temperature: >= 0; at 0 the law is one-hot whatever the filters say, so nothing is cut.
        top_k: 0 or less is off, else the cut-off is the k-th largest logit.
        top_p: 1 or more is off, else a token stays if the tokens strictly above it hold less than this share of what
            top-k left.
        min_p: 0 or less is off, else a token stays if p(v) >= min_p * max p.

    Returns:
        The cut-off logit. A token stays if its logit is at least that, so ties stay together.
    """
    return _cutoff(_float64(logits), temperature, top_k, top_p, min_p)[0]


def row_law(
    logits: torch.Tensor | Law, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Law:
    """The law of a token: softmax(logits / temperature) over the tokens that the filters keep.

    Args:
        logits: `[vocab]`, any float dtype, no NaN, no +inf, at least one finite entry.
        temperature: >= 0; 0 is one-hot at the first argmax.
        top_k: as in `row_cutoff`, and so are the others.
        top_p: share of the mass.
        min_p: share of the largest probability.

    Returns:
        float64 `[vocab]`, summing to 1.
    """
    values = _float64(logits)
    law = np.zeros(values.shape[0])
    if temperature == 0:
        law[int(np.argmax(values))] = 1.0
        return law
    kept = values >= _cutoff(values, temperature, top_k, top_p, min_p)[0]
    law[kept] = np.exp((values[kept] - values.max()) * (1.0 / max(temperature, LEAST_TEMPERATURE)))
    return law / law.sum()


def _cutoff(values: Law, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[float, float]:
    """The cut-off logit, and how close the closest comparison with a filter's threshold was."""
    cut, margin = -math.inf, math.inf
    if temperature == 0:
        return cut, margin
    if top_k > 0:
        cut = float(np.sort(values)[::-1][min(int(top_k), len(values)) - 1])
    # distinct logits from the top down, each with the mass of one token and how many tie: they share one fate
    levels, ties = np.unique(values[values >= cut], return_counts=True)
    levels, ties = levels[::-1], ties[::-1]
    relative = np.exp((levels - levels[0]) * (1.0 / max(temperature, LEAST_TEMPERATURE)))
    if top_p < 1:
        total = float((ties * relative).sum())
        above = np.cumsum(ties * relative) - ties * relative
        margin = min([margin, *(np.abs(above[1:] / total - top_p))])
        cut = max(cut, float(levels[above < top_p * total][-1]))
    if min_p > 0:
        margin = min([margin, *(np.abs(relative[1:] - min_p) / np.maximum(relative[1:], min_p))])
        cut = max(cut, float(levels[relative >= min_p][-1]))
    return cut, float(margin)


def _float64(logits: torch.Tensor | Law) -> Law:
    if isinstance(logits, torch.Tensor):
        return logits.detach().to("cpu", torch.float64).numpy()
    return np.asarray(logits, dtype=np.float64)


class Coins(Protocol):
    """What decides: uniform numbers in `verify`, every branch in turn in an enumeration."""

    def accept(self, node: int, scale: float, mass: float) -> bool:
        """True with probability min(1, mass / scale), 0 where mass is 0."""

    def draw(self, weights: Law) -> int:
        """A token with probability proportional to its weight; the last thing that a rule asks for."""


class UniformCoins:
    """Coins from one request's row of uniform numbers, remembering the closest call.

    Args:
        uniforms: `[nodes + 2]`: a coin for each node, then the block and the place of the final draw.
    """

    def __init__(self, uniforms: Sequence[float]) -> None:
        self.uniforms = [float(u) for u in uniforms]
        self.margin = math.inf

    def accept(self, node: int, scale: float, mass: float) -> bool:
        """Whether the node's coin times `scale` is strictly below `mass`."""
        threshold = self.uniforms[node] * scale
        size = max(scale, mass)
        if size > 0:
            self.margin = min(self.margin, abs(threshold - mass) / size)
        return threshold < mass

    def draw(self, weights: Law) -> int:
        """The token at the two last numbers' block and place."""
        u_block, u_place = self.uniforms[-2:]
        blocks = _block_masses(weights)
        self._near(np.cumsum(blocks), u_block)
        first = _first_above(blocks, u_block) * DRAW_BLOCK
        self._near(np.cumsum(weights[first : first + DRAW_BLOCK]), u_place)
        return block_draw(weights, u_block, u_place)

    def _near(self, cumulative: Law, u: float) -> None:
        # the upper end of the last interval decides nothing: whatever lies beyond it falls back on that interval
        inner = cumulative[cumulative < cumulative[-1]]
        if len(inner):
            self.margin = min(self.margin, float(np.abs(inner / cumulative[-1] - u).min()))


def block_draw(weights: torch.Tensor | Law, u_block: float, u_place: float) -> int:
    """Draw one token from non-negative weights: a block of `DRAW_BLOCK` consecutive ids first, then a place inside it.

    Args:
        weights: `[vocab]`, non-negative, at least one of them positive; they need not sum to 1.
        u_block: in [0, 1), picks the first block whose cumulative mass exceeds `u_block` times the total.
        u_place: in [0, 1), picks the first place whose cumulative mass exceeds `u_place` times the block's mass.

    Returns:
        The token's id. Its weight is positive even where rounding leaves no block or no place.
    """
    values = _float64(weights)
    block = _first_above(_block_masses(values), u_block)
    first = block * DRAW_BLOCK
    return first + _first_above(values[first : first + DRAW_BLOCK], u_place)


def _block_masses(weights: Law) -> Law:
    return np.array([weights[i : i + DRAW_BLOCK].sum() for i in range(0, len(weights), DRAW_BLOCK)])


def _first_above(masses: Law, u: float) -> int:
    cumulative = np.cumsum(masses)
    above = np.flatnonzero((cumulative > u * cumulative[-1]) & (masses > 0))
    return int(above[0]) if len(above) else int(np.flatnonzero(masses > 0)[-1])


@dataclass(frozen=True)
class Candidate:
    """A child of the current node.

    Args:
        node: its id.
        token: its token, or `MISSING`.
        virtual: it has no target row.
        chosen: it was chosen, not drawn; its turn comes after the drawn ones.
    """

    node: int
    token: int
    virtual: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Problem:
    """One request's tree as a rule sees it; a rule only ever asks about nodes that it has reached.

    Args:
        target: node -> float64 `[vocab]`, the law of the token after this node.
        draft: node -> float64 `[vocab]`, the law that this node's children were drawn from.
        children: node -> its children in draw order, the missing ones among them; none at a leaf.
        proposal: how the children were drawn.
        rounded: the draft's laws came as probabilities, which need not sum up to 1 in their last digits.
    """

    target: Callable[[int], Law]
    draft: Callable[[int], Law]
    children: Callable[[int], list[Candidate]]
    proposal: str
    rounded: bool = False

    def candidates(self, node: int) -> list[Candidate]:
        """The children of a node; a node all of whose children are missing is a leaf."""
        siblings = self.children(node)
        return siblings if any(sibling.token != MISSING for sibling in siblings) else []


Outcome = tuple[list[int], int]
"""The accepted nodes from the root on, and the last token."""


class UnusableRow(Exception):
    """A row that has been reached holds no law; `path` is what was accepted before.

    Args:
        status: what is wrong with it.
    """

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status
        self.path: list[int] = [0]


def _residual(p: Law, q: Law, w: float, beta: float) -> Law:
    """(w p - beta q)_+, the one-parameter family that all residuals belong to."""
    return np.maximum(w * p - beta * q, 0.0)


def _untried_mass(q: Law, tried: list[int]) -> float:
    untried = np.ones(len(q), dtype=bool)
    untried[tried] = False
    return float(q[untried].sum())


def _split(siblings: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """The siblings that were drawn, and those that were chosen."""
    return [s for s in siblings if not s.chosen], [s for s in siblings if s.chosen]


def _less(Z: float, q: Law, tried: list[int], rounded: bool) -> float:
    """The draft mass that is still drawable once the last of `tried` is struck out."""
    Z -= float(q[tried[-1]])
    return _untried_mass(q, tried) if rounded or Z < SMALL_DRAFT_MASS else Z


def _without(p: Law, tokens: list[int]) -> Law:
    rest = p.copy()
    rest[tokens] = 0.0
    return rest


def _split_greedy(q: Law, siblings: list[Candidate]) -> tuple[list[Candidate], list[int], Candidate | None, Law]:
    """The most probable siblings (distinct, none missing), their tokens T, the drawn sibling, and its law q'.

    The drawn sibling is None where it is missing, repeats one of the others, or came from what is as good as nothing:
    it then has no turn.
    """
    top = _distinct(siblings[:-1])
    tokens = [t.token for t in top]
    drawn = siblings[-1] if siblings and siblings[-1].token != MISSING else None
    rest = _without(q, tokens)
    # no draw was made where the others hold all the mass there was
    left = not tokens or rest.sum() >= LOST_DRAFT_MASS
    drawn_law = rest / rest.sum() if drawn is not None and left and rest.sum() > 0 else np.zeros_like(q)
    if drawn is not None and (drawn.token in tokens or not left):
        drawn = None
    return top, tokens, drawn, drawn_law


def _draw(weights: Law, tested: list[Candidate], p: Law, coins: Coins) -> int:
    """The final draw; where rounding left no mass, the last tested candidate that the target allows.

    A candidate that cannot have been drawn may leave neither; then the draw is from p.
    """
    if weights.sum() > 0:
        return coins.draw(weights)
    allowed = [candidate.token for candidate in tested if p[candidate.token] > 0]
    return allowed[-1] if allowed else coins.draw(p)


def recursive(problem: Problem, coins: Coins) -> Outcome:
    """Top down: at each node test the children one after the other, move to the first one accepted, else draw and stop.

    Args:
        problem: the tree and its laws.
        coins: what decides.

    Returns:
        The accepted nodes from the root on, and the last token.

    Raises:
        UnusableRow: a row that was reached holds no law; its `path` says how far the walk came.
    """
    test = {
        "without_replacement": _test_drawn,
        "with_replacement": _test_drawn,
        "greedy": _test_greedy,
        "point": _test_point,
    }[problem.proposal]
    path = [0]
    while True:
        try:
            p = problem.target(path[-1])
            siblings = problem.candidates(path[-1])
            if not siblings:
                return path, coins.draw(p)
            verdict = test(p, problem, path[-1], siblings, coins)
        except UnusableRow as error:
            error.path = path
            raise
        if isinstance(verdict, int):
            return path, verdict
        if verdict.virtual:
            return path, verdict.token
        path.append(verdict.node)


def _test_drawn(p: Law, problem: Problem, node: int, siblings: list[Candidate], coins: Coins) -> Candidate | int:
    """With and without replacement: the accepted child, or the token drawn after all were rejected."""
    q = problem.draft(node)
    drawn, chosen = _split(siblings)
    beta, S, Z = 0.0, 1.0, 1.0
    tried: list[int] = []
    for sibling in drawn:
        x = sibling.token
        if x == MISSING:
            continue
        if coins.accept(sibling.node, q[x] * S, max(p[x] - beta * q[x], 0.0) * Z):
            return sibling
        next_beta = beta + S / Z
        next_S = float(_residual(p, q, 1.0, next_beta).sum())
        if next_S <= 0:
            # only rounding, or a token that was never drawn from q, comes here
            if p[x] > 0:
                return sibling
            continue
        beta, S = next_beta, next_S
        if problem.proposal == "without_replacement":
            tried.append(x)
            Z = _less(Z, q, tried, problem.rounded)
            if Z < LOST_DRAFT_MASS:
                break
    return _test_chosen(_residual(p, q, 1.0, beta), S, chosen, coins)


def _test_point(p: Law, problem: Problem, node: int, siblings: list[Candidate], coins: Coins) -> Candidate | int:
    """Deterministic children: the accepted child, or the token drawn after all were rejected."""
    return _test_chosen(p, 1.0, siblings, coins)


def _test_chosen(p: Law, left: float, siblings: list[Candidate], coins: Coins) -> Candidate | int:
    """Each chosen sibling is offered its own share of p, a measure of mass `left`."""
    tested: list[Candidate] = []
    for sibling in _distinct(siblings):
        x = sibling.token
        if coins.accept(sibling.node, left, p[x]):
            return sibling
        if left - p[x] <= 0:
            if p[x] > 0:
                return sibling
            continue
        left -= p[x]
        tested.append(sibling)
    return _draw(_without(p, [t.token for t in tested]), tested, p, coins)


def _test_greedy(p: Law, problem: Problem, node: int, siblings: list[Candidate], coins: Coins) -> Candidate | int:
    """The most probable children and one draw: the accepted child, or the token drawn after all were rejected."""
    siblings, chosen = _split(siblings)
    top, T, drawn, q_drawn = _split_greedy(problem.draft(node), siblings)
    tested: list[Candidate] = []
    if drawn is not None:
        x = drawn.token
        if coins.accept(drawn.node, q_drawn[x], p[x]):
            return drawn
        if p[T].sum() + _without(_residual(p, q_drawn, 1.0, 1.0), T).sum() <= 0:
            if p[x] > 0:
                return drawn
            q_drawn = np.zeros_like(p)
        tested.append(drawn)
    # what is left of p: all of it at the most probable children, the residual elsewhere
    rest = _residual(p, q_drawn, 1.0, 1.0)
    rest[T] = p[T]
    left = float(rest.sum())
    for sibling in _distinct(top + chosen):
        t = sibling.token
        if coins.accept(sibling.node, left, rest[t]):
            return sibling
        if rest[t] > 0:
            tested.append(sibling)
            if left - rest[t] <= 0:
                return sibling
            left -= rest[t]
        rest[t] = 0.0
    return _draw(rest, tested, p, coins)


def _distinct(siblings: list[Candidate]) -> list[Candidate]:
    """Those that are there and repeat no earlier one."""
    found: dict[int, Candidate] = {}
    for sibling in siblings:
        if sibling.token != MISSING:
            found.setdefault(sibling.token, sibling)
    return list(found.values())


def traversal(problem: Problem, coins: Coins) -> Outcome:
    """Bottom up: enter the children depth first with a weight each, stop at the first node that its coin accepts.

    Entering needs no coin; the decision to stop at a node is that node's coin. The root always stops. A virtual node is
    a leaf whose stop emits its own token, with the weight that it was entered with.

    Args:
        problem: the tree and its laws.
        coins: what decides.

    Returns:
        The accepted nodes from the root on, and the last token.

    Raises:
        UnusableRow: a row that was reached holds no law; nothing is accepted, for nothing is before the last token.
    """
    outcome = _enter(problem, coins, [0], 1.0)
    assert outcome is not None, "the root always stops"
    return outcome


def _enter(problem: Problem, coins: Coins, path: list[int], w: float) -> Outcome | None:
    """Visit the subtree under the last node of `path` with weight `w`; None: it failed back to its parent."""
    visit = {
        "without_replacement": _visit_drawn,
        "with_replacement": _visit_drawn,
        "greedy": _visit_greedy,
        "point": _visit_point,
    }[problem.proposal]
    siblings = problem.candidates(path[-1])
    if not siblings:  # the row of a leaf that fails is not looked at
        return (path, coins.draw(problem.target(path[-1]))) if _stops(path, 1.0, w, coins) else None
    return visit(problem.target(path[-1]), problem, path, siblings, w, coins)


def _stops(path: list[int], scale: float, mass: float, coins: Coins) -> bool:
    return len(path) == 1 or coins.accept(path[-1], scale, mass)


def _enter_child(
    problem: Problem, coins: Coins, path: list[int], child: Candidate, scale: float, mass: float
) -> Outcome | None:
    """Enter a child with weight min(1, mass / scale); one of (next to) no weight fails without a look at its rows."""
    if mass <= scale * NO_WEIGHT:
        return None
    w = 1.0 if mass >= scale else mass / scale
    if child.virtual:
        return (path, child.token) if coins.accept(child.node, 1.0, w) else None
    return _enter(problem, coins, [*path, child.node], w)


def _visit_drawn(
    p: Law, problem: Problem, path: list[int], siblings: list[Candidate], w: float, coins: Coins
) -> Outcome | None:
    """With and without replacement."""
    q = problem.draft(path[-1])
    drawn, chosen = _split(siblings)
    beta, kappa, Z, c = 0.0, 1.0, 1.0, w
    tried: list[int] = []
    for sibling in drawn:
        x = sibling.token
        if x == MISSING:
            continue
        mass = kappa * max(w * p[x] - beta * q[x], 0.0) * Z
        outcome = _enter_child(problem, coins, path, sibling, q[x], mass)
        if outcome is not None:
            return outcome
        next_beta = beta + 1.0 / (kappa * Z)
        s = kappa * float(_residual(p, q, w, next_beta).sum())
        # grouped so that c = 1 stays exactly 1, however small s is: a node entered with weight 1 cannot fail
        norm = s + (1.0 - c)
        if norm <= 0:
            # nothing is left of w = 1: only rounding comes here, and the residual before this test is still a law
            continue
        beta, kappa, c = next_beta, kappa / norm, s / norm
        if problem.proposal == "without_replacement":
            tried.append(x)
            Z = _less(Z, q, tried, problem.rounded)
            if Z < LOST_DRAFT_MASS:
                break
    rest = _residual(p, q, w, beta)
    if chosen:
        return _visit_chosen(kappa * rest, 1.0, p, problem, path, chosen, coins)
    return (path, coins.draw(rest)) if _stops(path, 1.0, c, coins) else None


def _visit_point(
    p: Law, problem: Problem, path: list[int], siblings: list[Candidate], w: float, coins: Coins
) -> Outcome | None:
    """Deterministic children."""
    return _visit_chosen(w * p, 1.0, p, problem, path, siblings, coins)


def _visit_greedy(
    p: Law, problem: Problem, path: list[int], siblings: list[Candidate], w: float, coins: Coins
) -> Outcome | None:
    """The most probable children and one draw."""
    siblings, chosen = _split(siblings)
    top, T, drawn, q_drawn = _split_greedy(problem.draft(path[-1]), siblings)
    if drawn is not None:
        outcome = _enter_child(problem, coins, path, drawn, q_drawn[drawn.token], w * p[drawn.token])
        if outcome is not None:
            return outcome
        if _greedy_left(p, q_drawn, w, T) <= 0:
            q_drawn = np.zeros_like(p)
    # what is left of w p: all of it at the most probable children, the residual elsewhere
    rest = _residual(p, q_drawn, w, 1.0)
    rest[T] = w * p[T]
    return _visit_chosen(rest, _greedy_left(p, q_drawn, w, T), p, problem, path, top + chosen, coins, drawn)


def _visit_chosen(
    rest: Law,
    left: float,
    p: Law,
    problem: Problem,
    path: list[int],
    siblings: list[Candidate],
    coins: Coins,
    failed: Candidate | None = None,
) -> Outcome | None:
    """Each chosen sibling is offered its own share of `rest`; the part of `left` that is in no share fails back."""
    tested = [failed] if failed is not None else []
    siblings = _distinct(siblings)
    for sibling in siblings:
        share = float(rest[sibling.token])
        outcome = _enter_child(problem, coins, path, sibling, left, share)
        if outcome is not None:
            return outcome
        tested.append(sibling)
        if left - share > 0:
            left -= share
    rest = _without(rest, [t.token for t in siblings])
    return (path, _draw(rest, tested, p, coins)) if _stops(path, left, float(rest.sum()), coins) else None


def _greedy_left(p: Law, q_drawn: Law, w: float, T: list[int]) -> float:
    """1 - m, with m = sum over the tokens outside T of min(w p, q')."""
    return 1.0 - float(_without(np.minimum(w * p, q_drawn), T).sum())


@overload
def verify(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    proposal: str = ...,
    rule: str = ...,
    sampling: SamplingParams = ...,
    draft_sampling: SamplingParams | None = ...,
    target_rows: torch.Tensor | None = ...,
    draft_rows: torch.Tensor | None = ...,
    max_depth: int | None = ...,
    inputs: str = ...,
    draft_inputs: str | None = ...,
    point_nodes: torch.Tensor | None = ...,
    bitmask: torch.Tensor | None = ...,
    draft_ids: torch.Tensor | None = ...,
    return_margin: Literal[False] = ...,
) -> Verified: ...


@overload
def verify(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    proposal: str = ...,
    rule: str = ...,
    sampling: SamplingParams = ...,
    draft_sampling: SamplingParams | None = ...,
    target_rows: torch.Tensor | None = ...,
    draft_rows: torch.Tensor | None = ...,
    max_depth: int | None = ...,
    inputs: str = ...,
    draft_inputs: str | None = ...,
    point_nodes: torch.Tensor | None = ...,
    bitmask: torch.Tensor | None = ...,
    draft_ids: torch.Tensor | None = ...,
    return_margin: Literal[True],
) -> tuple[Verified, torch.Tensor]: ...


def verify(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    proposal: str = "without_replacement",
    rule: str = "recursive",
    sampling: SamplingParams = SamplingParams(),
    draft_sampling: SamplingParams | None = None,
    target_rows: torch.Tensor | None = None,
    draft_rows: torch.Tensor | None = None,
    max_depth: int | None = None,
    inputs: str = "logits",
    draft_inputs: str | None = None,
    point_nodes: torch.Tensor | None = None,
    bitmask: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    return_margin: bool = False,
) -> Verified | tuple[Verified, torch.Tensor]:
    """Decide which tokens of each request's tree the target keeps.

    Args:
        target_logits: this and all the others but the last: as in `mcsd_kernels.verify`, and not checked again.
        draft_logits: there.
        tokens: there.
        parents: there.
        uniforms: there.
        proposal: there.
        rule: there.
        sampling: there.
        draft_sampling: there.
        target_rows: there.
        draft_rows: there.
        max_depth: there.
        inputs: there.
        draft_inputs: there.
        point_nodes: there.
        bitmask: there.
        draft_ids: there.
        return_margin: return also how close the closest decision was, for comparisons with lower precision.

    Returns:
        `Verified`; with `return_margin` also float64 `[batch]`: the smallest relative distance of a test from its
        threshold, of the final draw from a neighbouring token and of a filter from a tie, and 0 where rows that differ
        by a few float32 roundings lead to another answer.
    """
    batch, nodes = tokens.shape
    width = (nodes - 1 if max_depth is None else max_depth) + 1
    out = Verified(
        path=torch.full((batch, width), -1, dtype=torch.int32),
        length=torch.zeros(batch, dtype=torch.int32),
        tokens=torch.full((batch, width), -1, dtype=torch.int64),
        status=torch.zeros(batch, dtype=torch.int32),
    )
    margins = torch.full((batch,), math.inf, dtype=torch.float64)
    for b in range(batch):
        request = _Request(
            target_logits=target_logits if target_rows is not None else target_logits[b],
            draft_logits=draft_logits if draft_rows is not None or draft_logits is None else draft_logits[b],
            tokens=tokens[b].tolist(),
            parents=(parents if parents.dim() == 1 else parents[b]).tolist(),
            uniforms=uniforms[b].tolist(),
            proposal=proposal,
            sampling=_of_request(sampling, b),
            draft_sampling=_of_request(sampling if draft_sampling is None else draft_sampling, b),
            target_rows=list(range(nodes)) if target_rows is None else target_rows[b].tolist(),
            draft_rows=list(range(nodes)) if draft_rows is None else draft_rows[b].tolist(),
            max_depth=width - 1,
            target_inputs=inputs,
            draft_inputs=draft_inputs or inputs,
            chosen=[False] * nodes if point_nodes is None else point_nodes.expand(batch, nodes)[b].tolist(),
            bitmask=None if bitmask is None else bitmask[b],
            draft_ids=None if draft_ids is None else draft_ids.cpu().numpy(),
        )
        answer = request.run(rule, return_margin)
        out.path[b, : len(answer.path)] = torch.tensor(answer.path, dtype=torch.int32)
        out.tokens[b, : len(answer.tokens)] = torch.tensor(answer.tokens)
        out.length[b] = len(answer.path)
        out.status[b] = int(answer.status)
        margins[b] = answer.margin
    verified = Verified(*(field.to(target_logits.device) for field in out))
    return (verified, margins) if return_margin else verified


def _of_request(sampling: SamplingParams, b: int) -> dict[str, float]:
    """The sampling parameters of request b as numbers."""
    values = {name: getattr(sampling, name) for name in RANGES}
    return {name: float(v[b]) if isinstance(v, torch.Tensor) else float(v) for name, v in values.items()}


@dataclass(frozen=True)
class _Answer:
    path: list[int]
    tokens: list[int]
    status: Status
    margin: float


@dataclass
class _Request:
    """One request of a batch, in plain Python: see `mcsd_kernels.verify` for what the fields mean."""

    target_logits: torch.Tensor
    draft_logits: torch.Tensor | None
    tokens: list[int]
    parents: list[int]
    uniforms: list[float]
    proposal: str
    sampling: dict[str, float]
    draft_sampling: dict[str, float]
    target_rows: list[int]
    draft_rows: list[int]
    max_depth: int
    target_inputs: str
    draft_inputs: str
    chosen: list[bool]
    bitmask: torch.Tensor | None
    draft_ids: NDArray[np.int64] | None

    @property
    def vocab(self) -> int:
        return self.target_logits.shape[-1]

    def run(self, rule: str, with_margin: bool) -> _Answer:
        status = self.check()
        if status & ~Status.BAD_TOKEN:
            return _Answer([0], [PLACEHOLDER], status, math.inf)
        answer = self.walk(rule, status, None)
        if not with_margin:
            return answer
        for seed, sign in itertools.product(range(2), (-1.0, 1.0)):
            shaken = self.walk(rule, status, _Shaker(seed, sign))
            if (shaken.path, shaken.tokens, shaken.status) != (answer.path, answer.tokens, answer.status):
                return _Answer(answer.path, answer.tokens, answer.status, 0.0)
        return answer

    def check(self) -> Status:
        """What can be known before the walk."""
        status = Status(0)
        nodes = range(1, len(self.tokens))
        padding = [i for i in nodes if self.parents[i] == -1]
        inside = [i for i in nodes if self.parents[i] >= 0]
        if any(not -1 <= self.tokens[i] < self.vocab for i in inside):
            status |= Status.BAD_TOKEN
        if (
            self.parents[0] != -1
            or any(not -1 <= self.parents[i] < i for i in nodes)
            or any(self.parents[i] in padding for i in inside)
        ):
            status |= Status.BAD_TREE
        if self.target_rows[0] == -1 or any(
            not -1 <= self.target_rows[i] < self.target_logits.shape[0] for i in [0, *inside]
        ):
            status |= Status.BAD_TREE
        if self.proposal != "point" and not status & Status.BAD_TREE:
            assert self.draft_logits is not None
            inner = {self.parents[i] for i in inside if 0 <= self.tokens[i] < self.vocab}
            read = [i for i in inner if self.target_rows[i] != -1]
            if any(not 0 <= self.draft_rows[i] < self.draft_logits.shape[0] for i in read):
                status |= Status.BAD_TREE
        if status & Status.BAD_TREE:
            status &= ~Status.BAD_TOKEN
        if any(not 0 <= u < 1 for u in self.uniforms):
            status |= Status.BAD_UNIFORM
        for used, inputs, sampling in (
            (True, self.target_inputs, self.sampling),
            (self.proposal != "point", self.draft_inputs, self.draft_sampling),
        ):
            if used and inputs == "logits" and _out_of_range(sampling):
                status |= Status.BAD_SAMPLING
        return status

    def walk(self, rule: str, status: Status, shaker: _Shaker | None) -> _Answer:
        coins = UniformCoins(self.uniforms)

        def target(node: int) -> Law:
            values = _float64(self.target_logits[self.target_rows[node]])
            if self.bitmask is not None:
                values = np.where(_allowed(self.bitmask[node], len(values)), values, -math.inf)
            return self._row(values, self.target_inputs, self.sampling, coins, shaker)

        def draft(node: int) -> Law:
            assert self.draft_logits is not None
            values = _float64(self.draft_logits[self.draft_rows[node]])
            law = self._row(values, self.draft_inputs, self.draft_sampling, coins, shaker)
            if self.draft_ids is None:
                return law
            whole = np.zeros(self.vocab)
            for token, mass in zip(self.draft_ids, law, strict=True):
                if 0 <= token < self.vocab:
                    whole[token] += mass
            if self.draft_inputs == "probabilities":
                return whole
            known = whole.sum()  # what was drawn, given that it is a token
            return whole / known if known >= LOST_DRAFT_MASS else np.zeros(self.vocab)

        def children(node: int) -> list[Candidate]:
            if self._depth(node) >= self.max_depth:
                return []
            return [
                Candidate(i, x if 0 <= x < self.vocab else MISSING, self.target_rows[i] == -1, self.chosen[i])
                for i, x in enumerate(self.tokens)
                if i > 0 and self.parents[i] == node
            ]

        problem = Problem(target, draft, children, self.proposal, self.draft_inputs == "probabilities")
        try:
            path, token = (recursive if rule == "recursive" else traversal)(problem, coins)
        except UnusableRow as error:
            path, token, status = error.path, PLACEHOLDER, status | error.status
        return _Answer(path, [*(self.tokens[i] for i in path[1:]), token], status, coins.margin)

    def _depth(self, node: int) -> int:
        return 0 if node == 0 else 1 + self._depth(self.parents[node])

    @staticmethod
    def _row(values: Law, inputs: str, sampling: dict[str, float], coins: UniformCoins, shaker: _Shaker | None) -> Law:
        if inputs == "probabilities":
            if not np.isfinite(values).all():
                raise UnusableRow(Status.NAN_ROW)
            values = np.maximum(values, 0.0)  # what is below 0 is no mass
            if not values.any():
                raise UnusableRow(Status.EMPTY_ROW)
            return values if shaker is None else shaker(values)
        if np.isnan(values).any() or np.isposinf(values).any():
            raise UnusableRow(Status.NAN_ROW)
        if not np.isfinite(values).any():
            raise UnusableRow(Status.EMPTY_ROW)
        parameters = (sampling["temperature"], int(sampling["top_k"]), sampling["top_p"], sampling["min_p"])
        coins.margin = min(coins.margin, _cutoff(values, *parameters)[1])
        law = row_law(values, *parameters)
        return law if shaker is None else shaker(law)


def _allowed(words: torch.Tensor, vocab: int) -> NDArray[np.bool_]:
    """`[vocab]`: whether bit v % 32 of word v // 32 is set."""
    return np.unpackbits(words.cpu().contiguous().numpy().view(np.uint8), bitorder="little")[:vocab].astype(bool)


def _out_of_range(sampling: dict[str, float]) -> bool:
    for name, (low, high, open_low) in RANGES.items():
        value = sampling[name]
        if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
            return True
    return False


class _Shaker:
    """Moves every probability by a few float32 roundings, so that an answer that hangs on them shows itself.

    A row is scaled as a whole, as by a rounded normaliser, and every entry by itself; `sign` gives the mirror image, so
    that of the two one moves a close decision towards its other side.
    """

    SIZE = 4e-6

    def __init__(self, seed: int, sign: float) -> None:
        self.generator = np.random.default_rng(seed)
        self.sign = sign

    def __call__(self, law: Law) -> Law:
        whole = self.generator.choice([-1.0, 1.0])
        each = self.generator.uniform(-1.0, 1.0, len(law))
        return law * (1.0 + self.sign * self.SIZE * (whole + each) / 2)


def candidate_law(q: torch.Tensor | Law, k: int, proposal: str) -> list[tuple[tuple[int, ...], float]]:
    """Every ordered tuple of k candidates that can be drawn, with its probability.

    Args:
        q: `[vocab]`, the draft's law after its filters.
        k: how many candidates.
        proposal: how they are drawn; `point` has one tuple, the k most probable tokens.

    Returns:
        (candidates, probability) pairs; -1 stands for a candidate that could not be drawn because too few tokens have
        mass.
    """
    law = _float64(q)
    support = [int(x) for x in np.flatnonzero(law)]
    by_mass = [int(x) for x in np.argsort(-law, kind="stable")]
    if proposal == "with_replacement":
        return [(c, math.prod(float(law[x]) for x in c)) for c in itertools.product(support, repeat=k)]
    if proposal == "point":
        return [(_filled(by_mass[:k], k), 1.0)]
    if proposal == "greedy":
        top = [x for x in by_mass[: k - 1] if law[x] > 0]
        rest = _without(law, top)
        if rest.sum() == 0:
            return [(_filled(top, k), 1.0)]
        return [((*_filled(top, k - 1), x), float(rest[x] / rest.sum())) for x in support if x not in top]
    tuples = []
    for c in itertools.permutations(support, min(k, len(support))):
        probability = 1.0
        for j, x in enumerate(c):
            probability *= float(law[x]) / _untried_mass(law, list(c[:j]))
        tuples.append((_filled(list(c), k), probability))
    return tuples


def _filled(candidates: list[int], k: int) -> tuple[int, ...]:
    return (*candidates, *[MISSING] * (k - len(candidates)))


def ancestor_bits(parents: torch.Tensor) -> torch.Tensor:
    """Who a node may look at inside the tree: bit j of row i is set if j is i or an ancestor of i.

    Args:
        parents: `[nodes]` or `[batch, nodes]`; a padding node (-1 for i > 0) sees itself alone.

    Returns:
        int32 `[batch, nodes, ceil(nodes / 32)]`, node j in bit j % 32 of word j // 32; batch 1 for `[nodes]`.
    """
    rows = parents.reshape(-1, parents.shape[-1]).tolist()
    nodes = parents.shape[-1]
    bits = np.zeros((len(rows), nodes, -(-nodes // 32)), dtype=np.uint32)
    for b, row in enumerate(rows):
        for i in range(nodes):
            for j in _lineage(row, i):
                bits[b, i, j // 32] |= np.uint32(1 << (j % 32))
    return torch.from_numpy(bits.view(np.int32))


def _lineage(parents: list[int], node: int) -> list[int]:
    """A node and its ancestors, the node first."""
    lineage = [node]
    while parents[lineage[-1]] >= 0:
        lineage.append(parents[lineage[-1]])
    return lineage


def _members(words: list[int]) -> list[int]:
    """The nodes whose bits are set, in increasing order: from the root down."""
    return [32 * k + j for k, word in enumerate(words) for j in range(32) if (word >> j) & 1]


def tree_attention_mask(parents: torch.Tensor, prefix_lengths: torch.Tensor, total: int) -> torch.Tensor:
    """The dense mask of a tree behind a prefix: a node sees the prefix, itself and its ancestors.

    Args:
        parents: `[nodes]` or `[batch, nodes]`.
        prefix_lengths: `[batch]`; node j stands in slot prefix_lengths[b] + j.
        total: how many slots the mask has.

    Returns:
        bool `[batch, 1, nodes, total]`, True where a node may look.
    """
    batch, nodes = prefix_lengths.shape[0], parents.shape[-1]
    rows = parents.expand(batch, nodes).tolist()
    mask = torch.zeros(batch, 1, nodes, total, dtype=torch.bool)
    for b, prefix in enumerate(prefix_lengths.tolist()):
        for i in range(nodes):
            mask[b, 0, i, :prefix] = True
            for j in _lineage(rows[b], i):
                if prefix + j < total:
                    mask[b, 0, i, prefix + j] = True
    return mask


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ancestors: torch.Tensor,
    prefix_lengths: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of tree nodes over a prefix and their own ancestors, one query row at a time.

    softmax over the visible slots s of ``scale * q . k_s``, then the same mixture of the values.

    Args:
        query: `[batch, q_heads, rows, head_dim]`; the rows may be fewer than the tree's nodes, one level for instance.
        key: `[batch, kv_heads, slots, head_dim]`, the prefix and then the tree's nodes; with `block_table`
            `[blocks, kv_heads, block_size, head_dim]`. Query head h reads head h // (q_heads / kv_heads).
        value: like `key`.
        ancestors: int32 `[batch or 1, rows, words]`, bits as in `ancestor_bits`. A row's depth is how many bits it has
            set, minus one.
        prefix_lengths: `[batch]`.
        scale: of the scores; None: head_dim ** -0.5.
        window: a query at position prefix + depth sees only positions less than this far behind it; slots of the
            prefix have their index as position, tree slots prefix + their node's depth.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: `[q_heads]`, a score for each head that takes its share of the softmax and carries no value.
        block_table: int32 `[batch, max_blocks]`: slot s is in block block_table[b, s // block_size].

    Returns:
        float64, shaped like `query`.
    """
    batch, q_heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    words = ancestors.expand(batch, *ancestors.shape[1:]).tolist()
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b, prefix in enumerate(prefix_lengths.tolist()):
        for i in range(rows):
            lineage = _members(words[b][i])
            position = prefix + len(lineage) - 1
            places = [(s, s) for s in range(prefix)] + [(prefix + j, prefix + d) for d, j in enumerate(lineage)]
            visible = [slot for slot, at in places if window is None or position - at < window]
            if not visible:
                continue
            keys, values = (_slots(cache, b, visible, block_table) for cache in (key, value))
            for h in range(q_heads):
                kv = h // (q_heads // kv_heads)
                scores = keys[kv] @ query[b, h, i].double().cpu() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double().cpu()])
                share = torch.softmax(scores, dim=0)[: len(visible)]
                out[b, h, i] = share @ values[kv]
    return out.to(query.device)


def _slots(cache: torch.Tensor, b: int, slots: list[int], block_table: torch.Tensor | None) -> torch.Tensor:
    """float64 `[kv_heads, len(slots), head_dim]`: what the cache holds for request b in these slots."""
    if block_table is None:
        return cache[b][:, slots].double().cpu()
    size = cache.shape[2]
    found = [cache[int(block_table[b, slot // size]), :, slot % size] for slot in slots]
    return torch.stack(found, dim=1).double().cpu()


def keep_path(
    key: torch.Tensor, value: torch.Tensor, prefix_lengths: torch.Tensor, path: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the accepted slots to the end of the prefix, in copies; every other slot stays as it is.

    Args:
        key: `[batch, kv_heads, slots, head_dim]`, node j in slot prefix_lengths[b] + j.
        value: like `key`.
        prefix_lengths: `[batch]`.
        path: `[batch, width]`, the accepted node ids; only the first `length[b]` of a row are read.
        length: `[batch]`.

    Returns:
        The new key and value: slot prefix + t holds what node path[b, t] held.
    """
    kept = (key.clone(), value.clone())
    for b, prefix in enumerate(prefix_lengths.tolist()):
        for t, node in enumerate(path[b, : int(length[b])].tolist()):
            for new, old in zip(kept, (key, value), strict=True):
                new[b, :, prefix + t] = old[b, :, prefix + node]
    return kept


def philox_4x32_10(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox: four 32-bit words that depend on nothing but the counter and the key.

    Args:
        counter: four 32-bit words.
        key: two 32-bit words.

    Returns:
        Four 32-bit words.

    Source:
        Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    word = 2**32
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = odd // word ^ c1 ^ k0, odd % word, even // word ^ c3 ^ k1, even % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return c0, c1, c2, c3


def draw_uniforms(seeds: torch.Tensor, step: int, count: int) -> torch.Tensor:
    """Counter-based uniform numbers: request b's depend on its seed and the step alone.

    Number i is lane i % 4 of Philox at counter (i // 4, 0, step, 0), under the low and the high half of the seed as
    key; its upper 24 bits become a multiple of 2^-24.

    Args:
        seeds: `[batch]` int64.
        step: the number of the call.
        count: how many numbers a request gets.

    Returns:
        float32 `[batch, count]` in [0, 1).
    """
    rows = []
    for seed in seeds.tolist():
        key = (seed % 2**32, (seed >> 32) % 2**32)
        words = [philox_4x32_10((i // 4, 0, step, 0), key)[i % 4] for i in range(count)]
        rows.append([(word >> 8) * 2.0**-24 for word in words])
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), count).to(seeds.device)
