"""The verification rules as scalar programs: what `docs/algorithm.md` derives, for one request, without a vocabulary.

A rule is a generator. It asks for what needs a pass over the vocabulary by yielding one of three requests, and is sent
the answer; everything else is arithmetic on a few numbers. So one program serves a single request and a batch, whose
requests then share their passes. Letters (p, q, beta, S, Z, w, kappa, c) are those of `docs/algorithm.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

MISSING = -1

# Of a computed law: what is subtracted from 1 is known to 1e-7.
SMALL_DRAFT_MASS = 1e-2

# Less than this is nothing, and later candidates are passed over: float32 does not hold the law that they come from.
LOST_DRAFT_MASS = 2.0**-90


class Rows(NamedTuple):
    """Load p and q of a node; answered with (p(x), q(x)) of the tokens, as two lists."""

    node: int
    tokens: list[int]


class Mass(NamedTuple):
    """Sum of (w p - beta q)_+ over the tokens outside `without`; w = 0, beta = -1 is the mass of q."""

    w: float
    beta: float
    without: tuple[int, ...] = ()


class Draw(NamedTuple):
    """One token from (w p - beta q)_+ outside `without`; answered with the token, None where there is no mass."""

    w: float
    beta: float
    without: tuple[int, ...] = ()


class Enter(NamedTuple):
    """Visit the subtree of a child with weight w; answered with the token emitted there, or None: it failed."""

    path: list[int]
    w: float


Child = tuple[int, int]  # node id, token or MISSING
Siblings = list[tuple[Child, float, float]]  # each with p and q at its token
Offer = tuple[int, int, float]  # node id, token, and what is left of p there
Step = Generator[Rows | Mass | Draw | Enter, Any, Any]


class Tree:
    """One request's tree and coins, and the path accepted so far.

    Args:
        children: (node, its depth) -> its (id, token) in draw order, a missing candidate as (id, MISSING); none where
            all are missing.
        uniforms: `nodes + 2` numbers; entry i is node i's coin.
        is_virtual: node -> whether it has no target row.
        is_point: node -> whether it was chosen, not drawn, though its proposal draws; None: no node was.
        rounded: the draft's laws came as probabilities, which need not sum up to 1 in their last digits.
    """

    def __init__(
        self,
        children: Callable[[int, int], list[Child]],
        uniforms: list[float],
        is_virtual: Callable[[int], bool],
        is_point: Callable[[int], bool] | None = None,
        rounded: bool = False,
    ) -> None:
        self.children, self.uniforms, self.is_virtual, self.is_point = children, uniforms, is_virtual, is_point
        # below this, what subtraction left of the draft's mass is summed afresh
        self.small_mass = 2.0 if rounded else SMALL_DRAFT_MASS
        self.path = [0]

    def split(self, siblings: list[Child], p: list[float], q: list[float]) -> tuple[Siblings, Siblings]:
        """The siblings that were drawn, and those that were chosen, whose turn comes after them."""
        every = list(zip(siblings, p, q, strict=True))
        if self.is_point is None:
            return every, []
        chosen = [s for s in every if self.is_point(s[0][0])]
        return [s for s in every if not self.is_point(s[0][0])], chosen


def recursive(tree: Tree, proposal: str) -> Step:
    """Top down: test the children of the current node in turn; move to the one accepted, or draw and stop.

    Returns:
        the last token, None where a final draw found no mass; `tree.path` holds the accepted nodes.
    """
    test = _RECURSIVE[proposal]
    node = 0
    while True:
        siblings = tree.children(node, len(tree.path) - 1)
        p, q = yield Rows(node, [token for _, token in siblings])
        if not siblings:
            return (yield Draw(1.0, 0.0))
        verdict = yield from test(tree, *tree.split(siblings, p, q))
        if not isinstance(verdict, tuple):
            return verdict
        node, token = verdict
        if tree.is_virtual(node):
            return token
        tree.path.append(node)


def _test_without_replacement(tree: Tree, drawn: Siblings, chosen: Siblings) -> Step:
    return _test_drawn(tree, drawn, chosen, False)


def _test_with_replacement(tree: Tree, drawn: Siblings, chosen: Siblings) -> Step:
    return _test_drawn(tree, drawn, chosen, True)


def _test_drawn(tree: Tree, drawn: Siblings, chosen: Siblings, replaced: bool) -> Step:
    """The accepted child, or the token drawn after all were rejected."""
    u, small = tree.uniforms, tree.small_mass
    beta, S, Z = 0.0, 1.0, 1.0
    tried: list[int] = []
    for i, ((node, x), p, q) in enumerate(drawn):
        if x == MISSING:
            continue
        if u[node] * q * S < max(p - beta * q, 0.0) * Z:
            return node, x
        next_beta = beta + S / Z
        next_S = yield Mass(1.0, next_beta)
        if next_S <= 0.0:  # rounding, or a token that cannot have been drawn
            if p > 0.0:
                return node, x
            continue
        beta, S = next_beta, next_S
        if not replaced:
            tried.append(x)
            Z -= q
            if Z < small and i + 1 < len(drawn):  # noqa: SIM300 - Z is no constant
                Z = yield Mass(0.0, -1.0, tuple(tried))
                if Z < LOST_DRAFT_MASS:
                    break
    if not chosen:
        return (yield Draw(1.0, beta))
    return (yield from _spend(u, _offers(chosen, 1.0, beta), S, Draw(1.0, beta), None))


def _test_point(tree: Tree, drawn: Siblings, chosen: Siblings) -> Step:
    """Deterministic children: each is offered its own mass."""
    return _spend(tree.uniforms, _offers(drawn, 1.0, 0.0), 1.0, Draw(1.0, 0.0), None)


def _test_greedy(tree: Tree, drawn: Siblings, chosen: Siblings) -> Step:
    """The drawn child first, then the most probable ones, each of which is offered its own mass."""
    u = tree.uniforms
    top = _offers(drawn[:-1], 1.0, 0.0)
    T = tuple(x for _, x, _ in top)
    beta, tested = 0.0, None
    for (node, x), p, q in drawn[-1:]:
        if x == MISSING:
            continue
        beta = yield from _inverse_mass(T)
        if x not in T and beta > 0.0:
            if u[node] * q * beta < p:
                return node, x
            tested = (node, x) if p > 0.0 else None
    R = yield Mass(1.0, beta, T)
    left = sum(share for _, _, share in top) + R
    if left <= 0.0:
        if tested:
            return tested
        beta, left = 0.0, 1.0
    offers = top + _offers(chosen, 1.0, beta, T)
    return (yield from _spend(u, offers, left, Draw(1.0, beta), tested))


def _inverse_mass(T: tuple[int, ...]) -> Step:
    """1 / (mass of q outside T), so that q' = q times this; 0 where nothing is left to draw: no candidate."""
    mass = (yield Mass(0.0, -1.0, T)) if T else 1.0
    return 1.0 / mass if mass >= LOST_DRAFT_MASS else 0.0


def _offers(siblings: Siblings, w: float, beta: float, without: tuple[int, ...] = ()) -> list[Offer]:
    """(w p - beta q)_+ at each sibling that is there and repeats neither an earlier one nor a token in `without`."""
    found: dict[int, Offer] = {}
    for (node, x), p, q in siblings:
        if x != MISSING and x not in without:
            found.setdefault(x, (node, x, max(w * p - beta * q, 0.0)))
    return list(found.values())


def _spend(u: list[float], offers: list[Offer], left: float, final: Draw, tested: Child | None) -> Step:
    """Offer each candidate its share of what is `left`; a refused share is gone. At the end, the final draw."""
    for node, x, share in offers:
        if u[node] * left < share:
            return node, x
        if share > 0.0:
            tested = node, x
            if left - share <= 0.0:
                return tested
            left -= share
    token = yield final._replace(without=tuple(x for _, x, _ in offers))
    return tested if token is None else token


_RECURSIVE: dict[str, Callable[[Tree, Siblings, Siblings], Step]] = {
    "without_replacement": _test_without_replacement,
    "with_replacement": _test_with_replacement,
    "greedy": _test_greedy,
    "point": _test_point,
}


def traversal(tree: Tree, proposal: str) -> Step:
    """Bottom up: enter the children depth first with a weight each; stop at the first node whose coin says so.

    The root always stops. A virtual node is a leaf whose stop emits its own token.

    Returns:
        the last token, None where a final draw found no mass; `tree.path` holds the accepted nodes, none before a last
        token is known.
    """
    # a stack of its own: a tree may be deeper than Python's
    stack = [_visit(tree, proposal, Enter([0], 1.0))]
    answer: Any = None
    while stack:
        try:
            want = stack[-1].send(answer)
        except StopIteration as stop:
            stack.pop()
            answer = stop.value
            continue
        except _NothingToDraw:
            return None
        if isinstance(want, Enter):
            stack.append(_visit(tree, proposal, want))
            answer = None
        else:
            answer = yield want
    return answer


class _NothingToDraw(Exception):
    """The node that stopped has a row without mass: a law that was handed over and is none."""


def _visit(tree: Tree, proposal: str, enter: Enter) -> Step:
    """The token emitted in the subtree under the last node of the path, or None: it failed back to its parent."""
    path, w = enter
    siblings = tree.children(path[-1], len(path) - 1)
    rows = Rows(path[-1], [token for _, token in siblings])
    visit = _Visit(tree, path, w, rows)
    p, q = yield rows
    if not siblings:
        return (yield from visit.stop(1.0, w, Draw(1.0, 0.0), None))
    drawn, chosen = tree.split(siblings, p, q)
    if proposal == "point":
        return (yield from visit.offer(_offers(drawn, w, 0.0), 1.0, Draw(w, 0.0), None))
    if proposal == "greedy":
        return (yield from _visit_greedy(visit, drawn, chosen))
    return (yield from _visit_drawn(visit, drawn, chosen, proposal == "with_replacement"))


class _Visit:
    """One node entered with weight w: its children, and the two things that can end there."""

    def __init__(self, tree: Tree, path: list[int], w: float, rows: Rows) -> None:
        self.tree, self.path, self.w, self.rows = tree, path, w, rows

    def enter(self, child: Child, scale: float, mass: float) -> Step:
        """Enter a child with weight min(1, mass / scale); None: it failed, and this node's rows are loaded again.

        Of a leaf, virtual or not, nothing but the coin has to be known to say that it fails: then no row is touched.
        """
        if not mass > scale * _NO_WEIGHT:  # NaN, of rows that are no laws, included
            return None
        node, x = child
        w = 1.0 if mass >= scale else mass / scale
        virtual = self.tree.is_virtual(node)
        leaf = virtual or not self.tree.children(node, len(self.path))
        if leaf and not self.tree.uniforms[node] < w:
            return None
        if virtual:
            self.tree.path = self.path
            return x
        token = yield Enter([*self.path, node], w)
        if token is None:
            yield self.rows
        return token

    def stop(self, scale: float, mass: float, final: Draw, tested: Child | None) -> Step:
        """Stop here with probability mass / scale, with the final draw; the root always does."""
        node = self.path[-1]
        if len(self.path) > 1 and not self.tree.uniforms[node] * scale < mass:
            return None
        token = yield final
        if token is None:
            if not tested:
                raise _NothingToDraw
            token = tested[1]
        self.tree.path = self.path
        return token

    def offer(self, offers: list[Offer], left: float, final: Draw, tested: Child | None, kappa: float = 1.0) -> Step:
        """Offer each candidate its share of what is `left`, then stop with what remains: kappa times the final mass."""
        for node, x, share in offers:
            token = yield from self.enter((node, x), left, share)
            if token is not None:
                return token
            if share > 0.0:
                tested = node, x
            if left - share > 0.0:
                left -= share
        final = final._replace(without=tuple(x for _, x, _ in offers))
        R = kappa * (yield Mass(*final))
        return (yield from self.stop(left, R, final, tested))


def _visit_drawn(visit: _Visit, drawn: Siblings, chosen: Siblings, replaced: bool) -> Step:
    w, small = visit.w, visit.tree.small_mass
    beta, kappa, Z, c = 0.0, 1.0, 1.0, w
    tried: list[int] = []
    for i, ((node, x), p, q) in enumerate(drawn):
        if x == MISSING:
            continue
        token = yield from visit.enter((node, x), q, kappa * max(w * p - beta * q, 0.0) * Z)
        if token is not None:
            return token
        next_beta = beta + 1.0 / (kappa * Z)
        s = kappa * (yield Mass(w, next_beta))
        rest = s + (1.0 - c)  # in this order a small s survives where c is 1
        if rest <= 0.0:  # w = 1 and nothing is left: rounding
            continue
        beta, kappa, c = next_beta, kappa / rest, s / rest
        if not replaced:
            tried.append(x)
            Z -= q
            if Z < small and i + 1 < len(drawn):  # noqa: SIM300 - Z is no constant
                Z = yield Mass(0.0, -1.0, tuple(tried))
                if Z < LOST_DRAFT_MASS:
                    break
    if not chosen:
        return (yield from visit.stop(1.0, c, Draw(w, beta), None))
    offers = [(node, x, kappa * share) for node, x, share in _offers(chosen, w, beta)]
    return (yield from visit.offer(offers, 1.0, Draw(w, beta), None, kappa))


def _visit_greedy(visit: _Visit, drawn: Siblings, chosen: Siblings) -> Step:
    w = visit.w
    top = _offers(drawn[:-1], w, 0.0)
    T = tuple(x for _, x, _ in top)
    beta, tested = 0.0, None
    for (node, x), p, q in drawn[-1:]:
        if x == MISSING:
            continue
        beta = yield from _inverse_mass(T)
        if x not in T and beta > 0.0:
            token = yield from visit.enter((node, x), q * beta, w * p)
            if token is not None:
                return token
            tested = (node, x) if p > 0.0 else None
    left = (1.0 - w) + sum(share for _, _, share in top) + (yield Mass(w, beta, T))
    if left <= 0.0:
        beta, left = 0.0, 1.0
    offers = top + _offers(chosen, w, beta, T)
    return (yield from visit.offer(offers, left, Draw(w, beta), tested))


# a child entered with less than this share would be accepted less than once in 1e30 visits
_NO_WEIGHT = 1e-30

RULES: dict[str, Callable[[Tree, str], Step]] = {"recursive": recursive, "traversal": traversal}
