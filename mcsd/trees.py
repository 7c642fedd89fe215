"""Shapes of token trees: parents, depths and levels, from branching factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mcsd_kernels import ancestor_bits


@dataclass(frozen=True)
class TreeShape:
    """A tree given by its branching factors, nodes numbered level by level.

    Args:
        branching: children of a node at depth 0, 1, ...
        parents: `[nodes]` int32, -1 for the root.
        depth: `[nodes]` int64.
        ancestors: `[1, nodes, words]` int32, see `ancestor_bits`.
        levels: where each depth's nodes start, and after them the number of nodes.
    """

    branching: tuple[int, ...]
    parents: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    levels: tuple[int, ...]

    @property
    def nodes(self) -> int:
        """The root included."""
        return self.levels[-1]

    @property
    def inner(self) -> int:
        """Nodes that have children: the first ones."""
        return self.levels[-2]

    @staticmethod
    @lru_cache(maxsize=256)
    def of(branching: tuple[int, ...], device: torch.device | str = "cpu") -> TreeShape:
        """The tree in which every node at depth d has `branching[d]` children."""
        parents, depths, levels = [-1], [0], [0, 1]
        for depth, width in enumerate(branching, 1):
            for node in range(levels[-2], levels[-1]):
                parents += [node] * width
            depths += [depth] * (len(parents) - levels[-1])
            levels.append(len(parents))
        parent_tensor = torch.tensor(parents, dtype=torch.int32, device=device)
        return TreeShape(
            branching,
            parent_tensor,
            torch.tensor(depths, device=device),
            ancestor_bits(parent_tensor),
            tuple(levels),
        )


def check_branching(branching: Sequence[int], largest: int = 1024) -> tuple[int, ...]:
    """`branching` as a tuple.

    Raises:
        ValueError: it is empty, an entry is below 1, or the tree has more than `largest` nodes.
    """
    factors = tuple(branching) if isinstance(branching, Sequence) else ()
    if not factors or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in factors):
        raise ValueError(f"branching: expected one or more whole numbers >= 1, got {branching!r}")
    nodes = width = 1
    for k in factors:
        width *= k
        nodes += width
    if nodes > largest:
        raise ValueError(f"branching: expected a tree of at most {largest} nodes, {factors} has {nodes}")
    return factors


def chain_bits(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`[1, length, words]` int32: the ancestors of each node of a chain, which is what plain text is."""
    return TreeShape.of((1,) * (length - 1), device).ancestors


def columns(sequences: list[list[int]], device: torch.device) -> torch.Tensor:
    """`[batch, longest]` int64, each sequence from column 0 on, zeros after it."""
    longest = max(map(len, sequences))
    return torch.tensor([s + [0] * (longest - len(s)) for s in sequences], dtype=torch.long, device=device)
