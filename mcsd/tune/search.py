"""The best tree for a price: dynamic programming over acceptance by depth and sibling rank, and replay of walks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int8]
Shorts = NDArray[np.int16]

SHRINK = 20.0
"""Visits that the acceptance over all depths counts as, beside those of one depth."""


WIDEST = 128
"""Siblings whose ranks `Labels` can hold."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a step's parts, measured.

    Args:
        target: nodes of the tree -> seconds of the target's forward.
        draft: nodes of a draft level -> seconds of its forward and of drawing the children.
        rest: nodes of the tree -> seconds of verifying, keeping and bookkeeping.
    """

    target: dict[int, float]
    draft: dict[int, float]
    rest: dict[int, float]

    def step(self, parents: Sequence[int]) -> float:
        """Seconds of a step with this tree; sizes between the measured ones are interpolated."""
        widths = level_widths(parents)
        drafting = sum(_between(self.draft, width) for width in widths)
        return _between(self.target, len(parents)) + drafting + _between(self.rest, len(parents))

    def line(self) -> tuple[float, float]:
        """A draft level as a line in its nodes, by least squares: seconds of a level, and of each node."""
        widths, seconds = np.array([*self.draft]), np.array([*self.draft.values()])
        if len(widths) == 1:
            return float(seconds[0]), 0.0
        slope, level = np.polyfit(widths, seconds, 1)
        slope = max(float(slope), 0.0)
        return max(float(level), 0.0) if slope else float(seconds.mean()), slope


def _between(table: dict[int, float], size: int) -> float:
    sizes = sorted(table)
    if size > sizes[-1] > sizes[0]:  # beyond the last one: on with the last slope
        a, b = sizes[-2:]
        return table[b] + max(table[b] - table[a], 0.0) / (b - a) * (size - b)
    return float(np.interp(size, sizes, [table[s] for s in sizes]))


def level_widths(parents: Sequence[int]) -> list[int]:
    """For each depth the number of nodes with children: what each draft forward reads."""
    depths = depths_of(parents)
    widths = [0] * max(depths)
    for node in set(parents[1:]):
        widths[depths[node]] += 1
    return widths


def depths_of(parents: Sequence[int]) -> list[int]:
    """Depth of each node."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def children_of(parents: Sequence[int]) -> list[list[int]]:
    """Children of each node, in draw order."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    return children


def replay(labels: Sequence[Labels], parents: Sequence[int]) -> tuple[int, int]:
    """Tokens and target calls that a tree would have needed for recorded texts.

    A label says which sibling was accepted at a place of the text; whether that sibling is in the tree depends on the
    tree alone. Walking the labels gives the very law of tokens per call under the recursive rule, with all dependence
    between depths, for a drafter whose law at a node depends on the node's text alone (a model's does).

    Args:
        labels: for each text `[widths, length]`: entry [k - 1, t] is the rank of the sibling accepted at place t where
            k are drawn, -1 for none. Siblings beyond the widths recorded count as rejected.
        parents: of the tree.

    Returns:
        tokens and calls, over all texts, of the steps that a text has to the end.
    """
    children = children_of(parents)
    tokens = calls = 0
    for text in labels:
        (widths, length), place = text.shape, 0
        while place < length:
            node, start = 0, place
            while place < length:
                count = len(children[node])
                rank = int(text[min(count, widths) - 1, place]) if count else -1
                place += 1
                if rank < 0:
                    tokens, calls = tokens + place - start, calls + 1
                    break
                node = children[node][rank]
    return tokens, calls


def acceptance_table(labels: Sequence[Labels], depth: int) -> Floats:
    """Acceptance by depth, number of siblings and rank, from recorded texts.

    Counted on the walks of the fullest tree: depth d is what was seen after d accepted tokens of a step. Depths that
    were seldom reached lean on the others.

    Args:
        labels: see `replay`.
        depth: how many depths.

    Returns:
        `[depth, widths, widths]`: entry [d, k - 1, r] is the probability that, with k siblings, the one of rank r is
        accepted.
    """
    widths = labels[0].shape[0]
    visits = np.zeros(depth)
    counts = np.zeros((depth, widths, widths))
    at = np.arange(widths)
    for text in labels:
        level = 0
        for place in range(text.shape[1]):
            if level == depth:  # the bonus token, for which nothing was drawn
                level = 0
                continue
            visits[level] += 1
            ranks = text[:, place]
            seen = ranks >= 0
            counts[level, at[seen], ranks[seen]] += 1
            level = level + 1 if ranks[-1] >= 0 else 0
    pooled = counts.sum(0) / max(visits.sum(), 1)
    table: Floats = (counts + SHRINK * pooled) / (visits[:, None, None] + SHRINK)
    return table


def tree_values(acceptance: Floats, parents: Sequence[int]) -> list[float]:
    """For each node the probability that it is accepted, with acceptance independent from depth to depth."""
    children, depths = children_of(parents), depths_of(parents)
    values = [1.0] * len(parents)
    for node, below in enumerate(children):
        for rank, child in enumerate(below):
            values[child] = values[node] * float(acceptance[depths[node], len(below) - 1, rank])
    return values


class TreeSearch:
    """The trees of most accepted tokens, for every number of nodes and of inner nodes.

    With `V[d, m, i]` the best expected number of tokens that a subtree of m nodes, i of them inner, rooted at depth d
    adds once its root is reached, and a(d, k, r) the acceptance of rank r among k siblings,

        V[d, 1, 0] = 1,  V[d, m, i] = 1 + max Σ_r a(d, k, r) V[d + 1, m_r, i_r]

    over k and all ways to share out m - 1 nodes and i - 1 inner nodes.

    Sequoia's recursion has the sizes alone; inner nodes are counted beside them because on a small machine each costs a
    draft forward's row and a draw. Acceptance is taken to depend on depth and rank only, which is approximate.

    Args:
        acceptance: `[depth, widths, widths]`, see `acceptance_table`.
        nodes: of the largest tree.
        inner: how many inner nodes to tell apart; 0: they are free, and not counted.

    Source: Chen et al., "Sequoia", arXiv 2402.12374, section 4.1.
    """

    def __init__(self, acceptance: Floats, nodes: int, inner: int = 0) -> None:
        self.acceptance, self.nodes, self.inner = acceptance, nodes, min(inner, nodes - 1)
        depth, widths = acceptance.shape[:2]
        self.widths = min(widths, nodes - 1)
        shape = (depth + 1, nodes + 1, self.inner + 1)
        self._value = np.full(shape, -np.inf)
        self._value[:, 1, 0] = 1.0
        self._count = np.zeros(shape, np.int16)
        self._split: list[dict[tuple[int, int], tuple[Shorts, Shorts]]] = [{} for _ in range(depth)]
        # where ranks do not depend on how many siblings there are, one pass serves all counts
        same = all(np.array_equal(acceptance[:, k, :k], acceptance[:, -1, :k]) for k in range(1, widths))
        self._shared = same
        for level in reversed(range(depth)):
            self._fill(level)

    def best(self, size: int, inner: int | None = None) -> tuple[float, tuple[int, ...]]:
        """Expected tokens per call and the parents of the best tree of `size` nodes, numbered level by level.

        Args:
            size: nodes, root included, >= 2.
            inner: inner nodes, if they are told apart; None: any number.
        """
        row = self._value[0, size]
        at = int(row.argmax()) if inner is None else inner
        return float(row[at]), self._parents(size, at)

    def values(self) -> Floats:
        """`[nodes + 1, inner + 1]`: expected tokens per call; -inf where there is no such tree."""
        return self._value[0]

    def _fill(self, level: int) -> None:
        below = self._value[level + 1]
        step = 1 if self.inner else 0
        forest = self._empty()
        for count in range(1, self.widths + 1):
            ranks = range(count - 1, count) if self._shared else range(count)
            if not self._shared:
                forest = self._empty()
            for rank in ranks:
                value = np.where(below > -np.inf, below, 0.0) * self.acceptance[level, count - 1, rank]
                forest, sizes, inners = self._add(forest, np.where(below > -np.inf, value, -np.inf))
                self._split[level][count, rank] = (sizes, inners)
            candidate = np.full_like(forest, -np.inf)
            candidate[1:, step:] = 1.0 + forest[:-1, : forest.shape[1] - step]
            candidate[1] = -np.inf
            better = candidate > self._value[level]
            self._value[level][better] = candidate[better]
            self._count[level][better] = count

    def _empty(self) -> Floats:
        forest = np.full((self.nodes + 1, self.inner + 1), -np.inf)
        forest[0, 0] = 0.0
        return forest

    def _add(self, forest: Floats, child: Floats) -> tuple[Floats, Shorts, Shorts]:
        """Join one more child to a forest: the best way to share out nodes and inner nodes between the two."""
        found = np.full_like(forest, -np.inf)
        sizes, inners = np.zeros(forest.shape, np.int16), np.zeros(forest.shape, np.int16)
        for size in range(1, self.nodes):
            for inner in np.flatnonzero(child[size] > -np.inf):
                value = forest[: forest.shape[0] - size, : forest.shape[1] - inner] + child[size, inner]
                place = found[size:, inner:]
                better = value > place
                place[better] = value[better]
                sizes[size:, inner:][better] = size
                inners[size:, inner:][better] = inner
        return found, sizes, inners

    def _parents(self, size: int, inner: int) -> tuple[int, ...]:
        if self._value[0, size, inner] == -np.inf:
            raise ValueError(f"size: expected a tree of {size} nodes and {inner} inner nodes to exist")
        parents, states = [-1], [(0, size, inner)]
        node = 0
        while node < len(states):
            level, size, inner = states[node]
            if size > 1:
                count = int(self._count[level, size, inner])
                size, inner = size - 1, inner - (1 if self.inner else 0)
                shares = []
                for rank in reversed(range(count)):
                    sizes, inners = self._split[level][(rank + 1 if self._shared else count), rank]
                    own = int(sizes[size, inner]), int(inners[size, inner])
                    shares.append((level + 1, *own))
                    size, inner = size - own[0], inner - own[1]
                for share in reversed(shares):
                    states.append(share)
                    parents.append(node)
            node += 1
        return tuple(parents)


def nested_order(parents: Sequence[int], values: Sequence[float]) -> list[int]:
    """The nodes, most valuable first, each after its parent and its earlier siblings."""
    children = children_of(parents)
    order, open_nodes = [0], {0: 0}  # node -> how many of its children are taken
    while len(order) < len(parents):
        waiting = [children[node][taken] for node, taken in open_nodes.items() if taken < len(children[node])]
        chosen = max(waiting, key=lambda node: values[node])
        open_nodes[parents[chosen]] += 1
        open_nodes[chosen] = 0
        order.append(chosen)
    return order


def renumbered(parents: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The same tree with its nodes in this order."""
    number = {node: place for place, node in enumerate(order)}
    return tuple(-1 if node == 0 else number[parents[node]] for node in order)
