"""What the engines' tree layouts have in common: trees as `verify` takes them, without a host read."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Ordered(NamedTuple):
    """Nodes in an order that `verify` takes: parents first, siblings as they were drawn.

    Args:
        node: `[batch, nodes]` int64, the engine's number of the node at each place.
        parents: `[batch, nodes]` int64, places; -1 for the root and for nodes that hang on nothing.
    """

    node: torch.Tensor
    parents: torch.Tensor


def linked(first_child: torch.Tensor, next_sibling: torch.Tensor) -> Ordered:
    """Trees given as linked lists: each node's first child, and the sibling that comes after it.

    Args:
        first_child: `[batch, nodes]` int64, -1 for none; node 0 is the root.
        next_sibling: `[batch, nodes]` int64, -1 for none.
    """
    batch, nodes = first_child.shape
    number = torch.arange(nodes, device=first_child.device).expand(batch, nodes)
    before = _inverse(next_sibling, number)
    above = _inverse(first_child, number)
    # the oldest sibling knows the parent, and the number of steps to it is the rank; each round doubles the reach
    eldest = torch.where(before >= 0, before, number)
    rank = (before >= 0).long()
    for _ in range(_rounds(nodes)):
        rank = rank + rank.gather(1, eldest)
        eldest = eldest.gather(1, eldest)
    return ordered(above.gather(1, eldest), rank)


def ordered(parents: torch.Tensor, rank: torch.Tensor | None = None) -> Ordered:
    """Trees whose nodes may stand in any order, the root at 0.

    Args:
        parents: `[batch, nodes]` int64, -1 for the root and for padding.
        rank: `[batch, nodes]` int64, a node's place among its siblings; None: siblings are in order already.
    """
    batch, nodes = parents.shape
    number = torch.arange(nodes, device=parents.device).expand(batch, nodes)
    up = torch.where(parents >= 0, parents, number)
    depth = (parents >= 0).long()
    for _ in range(_rounds(nodes)):
        depth = depth + depth.gather(1, up)
        up = up.gather(1, up)
    stray = up != 0  # what does not lead to the root goes last
    level = torch.where(stray, nodes, depth)
    key = level * nodes + (0 if rank is None else rank.clamp(max=nodes - 1))
    node = key.argsort(stable=True, dim=1)
    place = torch.empty_like(node).scatter_(1, node, number)
    parent = parents.gather(1, node)
    found = (parent >= 0) & ~stray.gather(1, node)
    return Ordered(node, torch.where(found, place.gather(1, parent.clamp(min=0)), -1))


def _inverse(pointers: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """`[batch, nodes]`: which node points here, -1 for none."""
    batch, nodes = pointers.shape
    inside = (pointers >= 0) & (pointers < nodes)
    back = torch.full((batch, nodes + 1), -1, dtype=torch.int64, device=pointers.device)
    back.scatter_(1, torch.where(inside, pointers, nodes), number)
    return back[:, :nodes]


def _rounds(nodes: int) -> int:
    return max(nodes - 1, 1).bit_length()


def chain(nodes: int, device: torch.device) -> torch.Tensor:
    """`[nodes]` int64 parents of a chain."""
    return torch.arange(-1, nodes - 1, device=device)


def rows_of(name: str, value: torch.Tensor) -> torch.Tensor:
    """`[a, b, vocab]` as `[a * b, vocab]`, the same memory.

    Raises:
        ValueError: it is no such tensor, or its rows lie so that only a copy could do that.
    """
    if value.dim() != 3:
        raise ValueError(f"{name}: expected three axes, the last one the vocabulary, got {list(value.shape)}")
    if value.shape[0] > 1 and value.shape[1] > 0 and value.stride(0) != value.shape[1] * value.stride(1):
        raise ValueError(f"{name}: expected rows at equal distances, got strides {value.stride()}; make it contiguous")
    return value.flatten(0, 1)
