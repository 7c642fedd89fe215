"""Shapes of token trees: parents, depths and levels, from branching factors or from a list of parents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from numbers import Integral

import torch

from mcsd_kernels import ancestor_bits
from mcsd_kernels.tree import unpack_bits

LARGEST_TREE = 1024  # nodes, the root included


@dataclass(frozen=True)
class Draw:
    """Nodes of one level whose children are drawn by one call.

    Args:
        rows: `[rows]` int64, which of the level's inner nodes; None: all, in order.
        nodes: `[rows]` int64, their numbers.
        width: children drawn for each of them.
        children: the children's numbers, `[children]` int64, or a slice where they follow each other.
        row, rank: `[children]` int64, where each child stands among what was drawn; None: all of it, in order.
    """

    rows: torch.Tensor | None
    nodes: torch.Tensor
    width: int
    children: torch.Tensor | slice
    row: torch.Tensor | None
    rank: torch.Tensor | None

    def pick(self, drawn: torch.Tensor) -> torch.Tensor:
        """`[batch, children]` from `[batch, rows, width]`."""
        return drawn.flatten(1) if self.row is None else drawn[:, self.row, self.rank]


@dataclass(frozen=True)
class StaticTree:
    """A tree of any shape, as a drafter grows it that reads inner nodes only, depth by depth.

    Args:
        parents: `[nodes]` int32, -1 for the root; every node after its parent, siblings in draw order.
        depth: of the deepest node.
        inner: `[inner]` int64, the nodes that have children, ordered by depth and then by number.
        slots: `[nodes + 1]` int32, each node's place in `inner`; -1 for a leaf, and at the end for no node.
        levels: where each depth's part of `inner` begins, and after them its length.
        level_nodes: each depth's part of `inner`, a slice where the numbers follow each other.
        above: for each depth, where its inner nodes' parents stand among the inner nodes one level up; 0 for the root.
        inner_depth: `[inner]` int64.
        ancestors: `[1, inner, words]` int32, among inner nodes, see `ancestor_bits`.
        draws: for each depth, the calls that draw the children of its inner nodes.
        node_depth: `[nodes]` int64.
        node_ancestors: `[1, nodes, words]` int32, among all nodes.
    """

    parents: torch.Tensor
    depth: int
    inner: torch.Tensor
    slots: torch.Tensor
    levels: tuple[int, ...]
    level_nodes: tuple[torch.Tensor | slice, ...]
    above: tuple[torch.Tensor, ...]
    inner_depth: torch.Tensor
    ancestors: torch.Tensor
    draws: tuple[tuple[Draw, ...], ...]
    node_depth: torch.Tensor
    node_ancestors: torch.Tensor

    @property
    def nodes(self) -> int:
        """The root included."""
        return len(self.parents)

    @staticmethod
    @lru_cache(maxsize=256)
    def of(parents: tuple[int, ...], device: torch.device | str = "cpu", by_count: bool = False) -> StaticTree:
        """The tree with these parents.

        Args:
            parents: -1, then each node's parent.
            device: where the tensors live.
            by_count: draw for nodes of as many children at a time. Else all of a level are drawn as many as the one
                with most needs, and the others take the first of theirs, which is lossless where a draw depends only
                on those before it ("greedy" is the exception: its one draw is the last).
        """
        depths, children = [0], [[] for _ in parents]  # type: list[int], list[list[int]]
        for node, parent in enumerate(parents[1:], 1):
            depths.append(depths[parent] + 1)
            children[parent].append(node)
        inner = sorted((node for node in range(len(parents)) if children[node]), key=lambda node: (depths[node], node))
        slots = {node: slot for slot, node in enumerate(inner)}
        deepest = max(depths)
        levels = [sum(depths[node] < depth for node in inner) for depth in range(deepest + 1)]
        draws = []
        for first, after in pairwise(levels):
            counts = [len(children[node]) for node in inner[first:after]]
            widths = sorted(set(counts)) if by_count else [max(counts)]
            draws.append(tuple(_draw(inner[first:after], children, width, by_count, device) for width in widths))
        among = torch.tensor([slots.get(parents[node], -1) for node in inner], dtype=torch.int32, device=device)
        parent_tensor = torch.tensor(parents, dtype=torch.int32, device=device)
        return StaticTree(
            parent_tensor,
            deepest,
            torch.tensor(inner, device=device),
            torch.tensor([slots.get(node, -1) for node in range(len(parents) + 1)], dtype=torch.int32, device=device),
            tuple(levels),
            tuple(_index(inner[first:after], device) for first, after in pairwise(levels)),
            tuple(
                torch.tensor([slots.get(parents[node], up) - up for node in inner[first:after]], device=device)
                for up, (first, after) in zip([0, *levels], pairwise(levels), strict=False)
            ),
            torch.tensor([depths[node] for node in inner], device=device),
            ancestor_bits(among),
            tuple(draws),
            torch.tensor(depths, device=device),
            ancestor_bits(parent_tensor),
        )


def _draw(level: list[int], children: list[list[int]], width: int, by_count: bool, device: torch.device | str) -> Draw:
    rows = [place for place, node in enumerate(level) if not by_count or len(children[node]) == width]
    found = [(child, row, rank) for row, at in enumerate(rows) for rank, child in enumerate(children[level[at]])]
    numbers, row, rank = zip(*found, strict=True)
    everything = len(found) == len(rows) * width
    return Draw(
        None if len(rows) == len(level) else torch.tensor(rows, device=device),
        torch.tensor([level[at] for at in rows], device=device),
        width,
        _index(numbers, device),
        None if everything else torch.tensor(row, device=device),
        None if everything else torch.tensor(rank, device=device),
    )


def _index(numbers: Sequence[int], device: torch.device | str) -> torch.Tensor | slice:
    """What picks these from an axis: a slice if they follow each other."""
    first, after = numbers[0], numbers[-1] + 1
    return slice(first, after) if list(numbers) == list(range(first, after)) else torch.tensor(numbers, device=device)


def parents_of(branching: Sequence[int]) -> tuple[int, ...]:
    """Parents of the tree in which every node at depth d has `branching[d]` children, numbered level by level."""
    parents, level = [-1], range(1)
    for width in branching:
        parents += [node for node in level for _ in range(width)]
        level = range(level.stop, len(parents))
    return tuple(parents)


def _whole(numbers: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers of whatever integer type as a tuple; an empty one of anything else."""
    listed = tuple(numbers) if isinstance(numbers, Sequence) and not isinstance(numbers, str) else ()
    sound = all(isinstance(k, Integral) and not isinstance(k, bool) for k in listed)
    return tuple(map(int, listed)) if sound else ()


def check_parents(parents: Sequence[int]) -> tuple[int, ...]:
    """`parents` as a tuple.

    Raises:
        ValueError: they describe no tree with a child, or one of more than `LARGEST_TREE` nodes.
    """
    numbers = _whole(parents)
    if len(numbers) < 2 or numbers[0] != -1 or any(not 0 <= p < node for node, p in enumerate(numbers[1:], 1)):
        raise ValueError(f"parents: expected -1 and then for each node the number of an earlier one, got {parents!r}")
    if len(numbers) > LARGEST_TREE:
        raise ValueError(f"parents: expected a tree of at most {LARGEST_TREE} nodes, got {len(numbers)}")
    return numbers


def check_branching(branching: Sequence[int]) -> tuple[int, ...]:
    """`branching` as a tuple.

    Raises:
        ValueError: it is empty, an entry is below 1, or the tree has more than `LARGEST_TREE` nodes.
    """
    factors = _whole(branching)
    if not factors or min(factors) < 1:
        raise ValueError(f"branching: expected one or more whole numbers >= 1, got {branching!r}")
    nodes = width = 1
    for k in factors:
        width *= k
        nodes += width
    if nodes > LARGEST_TREE:
        raise ValueError(f"branching: expected a tree of at most {LARGEST_TREE} nodes, {factors} has {nodes}")
    return factors


@lru_cache(maxsize=256)
def chain_bits(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`[1, length, words]` int32: the ancestors of each node of a chain, which is what plain text is."""
    return ancestor_bits(torch.arange(-1, length - 1, dtype=torch.int32, device=device))


@lru_cache(maxsize=256)
def chain_depths(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`[length]` int64: 0, 1, 2, ..."""
    return torch.arange(length, device=device)


def after_chain(ancestors: torch.Tensor, count: int) -> torch.Tensor:
    """Ancestor bits of `count` nodes of a chain and then a tree whose root is the child of the last of them.

    Args:
        ancestors: `[batch or 1, nodes, words]` int32, the tree's own.
        count: nodes of the chain.

    Returns:
        `[batch or 1, count + nodes, words]` int32.
    """
    batch, nodes, _ = ancestors.shape
    total = count + nodes
    words = -(-total // 32)
    visible = torch.zeros(batch, total, words * 32, dtype=torch.int64, device=ancestors.device)
    visible[:, :, :count] = 1
    visible[:, :count, :count].tril_()
    visible[:, count:, count:total] = unpack_bits(ancestors, nodes)
    place = torch.arange(32, device=ancestors.device)
    return (visible.view(batch, total, words, 32) << place).sum(-1).int()  # bit 31 is the sign


def columns(sequences: list[list[int]], device: torch.device) -> torch.Tensor:
    """`[batch, longest]` int64, each sequence from column 0 on, zeros after it."""
    longest = max(map(len, sequences))
    return torch.tensor([s + [0] * (longest - len(s)) for s in sequences], dtype=torch.long, device=device)
