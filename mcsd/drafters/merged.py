"""Several drafters at once: their trees merged into one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from .base import Adapter, Drafter, Proposal, State


class MergedDrafter(Drafter):
    """Proposes what all of its drafters propose, each node once.

    One of them may draw its candidates (a model, heads); the others choose theirs ("point"). In the merged tree the
    drawn siblings stand first, in the order in which they were drawn, and chosen ones come after them, where
    verification offers each what is left of the target's law. A chosen node whose token a sibling already has, drawn or
    chosen, is joined with it: it is dropped, and its children become chosen children of that sibling. All children of a
    node are thus drawn from one row or chosen, which is what keeps the law. Two drafters that draw cannot be merged:
    siblings from two laws would have to be verified one law after the other, and the residual of that is no longer
    given by three scalars.

    A request's nodes stand together, its padding after them: their numbers choose the coins, which must not depend on
    the sizes of other requests' trees.

    A node counts for the drafter that came first (`Proposal.origin`, the drafter's place in the list; the drawing one
    before all others), and `Stats.accepted_by_origin` says which earns its cost.

    Args:
        drafters: two or more; objects with `propose` will do.

    Raises:
        ValueError: fewer than two, or two of them draw.
    """

    def __init__(self, drafters: Sequence[Any]) -> None:
        if len(drafters) < 2 or not all(hasattr(drafter, "propose") for drafter in drafters):
            names = ", ".join(type(drafter).__name__ for drafter in drafters) or "none"
            raise ValueError(f"drafters: expected two or more objects with propose, got {names}")
        if len({id(drafter) for drafter in drafters}) < len(drafters):
            raise ValueError("drafters: expected each drafter once, got one twice")
        self.drafters = [drafter if isinstance(drafter, Drafter) else Adapter(drafter) for drafter in drafters]
        drawing = [index for index, drafter in enumerate(self.drafters) if drafter.proposal != "point"]
        if len(drawing) > 1:
            names = ", ".join(f"{index} ({self.drafters[index].proposal})" for index in drawing)
            raise ValueError(
                f'drafters: expected at most one that draws its candidates, the others "point", got {names}'
            )
        self.proposal = self.drafters[drawing[0]].proposal if drawing else "point"
        self.reads_hidden = any(drafter.reads_hidden for drafter in self.drafters)
        self.reads_cache = any(drafter.reads_cache for drafter in self.drafters)
        self.order = drawing + [index for index in range(len(self.drafters)) if index not in drawing]
        self._places: list[torch.Tensor] = []

    def parts(self) -> list[Any]:
        """This one and all that are merged."""
        return [self, *(part for drafter in self.drafters for part in drafter.parts())]

    def begin(self, state: State) -> None:
        """All begin."""
        for drafter in self.drafters:
            drafter.alone = False
            drafter.begin(state)

    def restart(self, state: State) -> None:
        """All do."""
        for drafter in self.drafters:
            drafter.restart(state)

    def propose(self, state: State) -> Proposal:
        """The first tree as it is, and of each further one what is new in it."""
        first, *others = self.order
        tree = _with_rows(self.drafters[first].propose(state))
        batch, nodes = tree.tokens.shape
        origin = torch.full((batch, nodes), first, dtype=torch.int32, device=tree.tokens.device)
        points = torch.zeros((batch, nodes), dtype=torch.bool, device=tree.tokens.device)
        if tree.point_nodes is not None:
            points = points | tree.point_nodes
        parents = torch.where(_in_use(tree, self.proposal), tree.parents.expand(batch, nodes), -1)
        tree = replace(
            tree, parents=parents, point_nodes=points, origin=origin, ancestors=None, node_depth=None, scored=None
        )
        self._places = [torch.arange(nodes, device=tree.tokens.device).expand(batch, nodes)]
        for index in others:
            tree, places = merge(tree, self.drafters[index].propose(state), index)
            self._places.append(places)
        tree, self._places = padding_last(tree, self._places)
        return replace(tree, point_nodes=None) if self.proposal == "point" else tree

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """Tell each drafter in the numbers of its own tree; nodes that are not in it have numbers past its own."""
        for index, places in zip(self.order, self._places, strict=True):
            drafter = self.drafters[index]
            own = places.shape[1]
            known = path.long()[:, :, None] == torch.where(places >= 0, places, -2)[:, None]  # [batch, depth, own]
            number = torch.where(known.any(-1), known.int().argmax(-1), own + path)
            told = state
            if state.hidden is not None and drafter.reads_hidden:
                rows = places.clamp(min=0)[..., None].expand(-1, -1, state.hidden.shape[-1])
                told = copy.copy(state)
                told.hidden = torch.cat([state.hidden.gather(1, rows), state.hidden], 1)
            drafter.keep(told, torch.where(path >= 0, number, -1).to(path.dtype), length)

    def end(self) -> None:
        """All end, the last one first, whatever becomes of the others."""
        with ExitStack() as stack:
            for drafter in self.drafters:
                drafter.alone = True
                stack.callback(drafter.end)


def merge(tree: Proposal, other: Proposal, origin: int) -> tuple[Proposal, torch.Tensor]:
    """Add the nodes of a tree of chosen candidates that are not in another tree yet; everything stays on the device.

    Args:
        tree: with `parents`, `point_nodes` and `origin` `[batch, nodes]`.
        other: its candidates are all "point".
        origin: of the new nodes.

    Returns:
        The merged tree, `other`'s nodes after those of `tree` (a joined one leaves padding there), and where each node
        of `other` is now, `[batch, other's nodes]`, -1 for padding.
    """
    batch, nodes = tree.tokens.shape
    added = other.tokens.shape[1] - 1
    device = tree.tokens.device
    up = other.parents.expand(batch, added + 1).long()
    there = (up >= 0) & (other.tokens >= 0)
    same_token = (other.tokens[:, :, None] == tree.tokens[:, None]) & there[:, :, None]
    place = torch.full((batch, added + 1), -1, dtype=torch.int64, device=device)
    place[:, 0] = 0
    for _ in range(min(tree.depth, other.depth)):  # each round finds the nodes that are one level deeper
        above = torch.where(up >= 0, place.gather(1, up.clamp(min=0)), -1)
        same = same_token & (tree.parents[:, None] == above[:, :, None]) & (above >= 0)[:, :, None]
        place = torch.where(same.any(-1), same.int().argmax(-1), place)
    found = place >= 0
    new = nodes - 1 + torch.arange(added + 1, device=device)
    place = torch.where(found, place, torch.where(there, new, -1))
    fresh = there & ~found
    parents = torch.where(fresh, place.gather(1, up.clamp(min=0)), -1)
    merged = replace(
        tree,
        tokens=torch.cat([tree.tokens, torch.where(fresh, other.tokens, -1)[:, 1:]], 1),
        parents=torch.cat([tree.parents, parents[:, 1:].to(tree.parents.dtype)], 1),
        depth=max(tree.depth, other.depth),
        point_nodes=_append(tree.point_nodes, torch.ones_like(fresh)),
        origin=_append(tree.origin, torch.full_like(fresh, origin, dtype=torch.int32)),
    )
    if tree.draft_rows is not None:  # only chosen children: any row will do, and the root's is there
        merged.draft_rows = torch.cat([tree.draft_rows, tree.draft_rows[:, :1].expand(-1, added)], 1)
    return merged, place


def padding_last(tree: Proposal, places: list[torch.Tensor]) -> tuple[Proposal, list[torch.Tensor]]:
    """Move padding behind the last node of each request.

    Args:
        tree: as `merge` returns it.
        places: where each drafter's nodes are in it, `[batch, nodes of the drafter]`, -1 for padding.

    Returns:
        the tree, and where the nodes are now.
    """
    used = tree.parents >= 0
    used[:, 0] = True
    order = used.to(torch.int8).argsort(stable=True, dim=1, descending=True)
    number = torch.where(used, used.cumsum(1) - 1, -1)

    def moved(labels: torch.Tensor) -> torch.Tensor:
        return labels.gather(1, order)

    def renumbered(nodes: torch.Tensor) -> torch.Tensor:
        return torch.where(nodes >= 0, number.gather(1, nodes.clamp(min=0).long()), -1)

    assert tree.point_nodes is not None and tree.origin is not None
    packed = replace(
        tree,
        tokens=moved(torch.where(used, tree.tokens, -1)),
        parents=moved(renumbered(tree.parents).to(tree.parents.dtype)),
        point_nodes=moved(tree.point_nodes | ~used),
        origin=moved(tree.origin),
        draft_rows=None if tree.draft_rows is None else moved(tree.draft_rows),
    )
    return packed, [renumbered(place) for place in places]


def _in_use(tree: Proposal, proposal: str) -> torch.Tensor:
    """`[batch, nodes]` bool: all but padding, and but for missing candidates at the very end.

    Those may be there for the sake of a neighbour's larger tree. Of "greedy" siblings the last one is the drawn one,
    missing or not: so they stay.
    """
    used = tree.parents.expand(tree.tokens.shape) >= 0
    if proposal == "greedy":
        return used
    return used & ((tree.tokens >= 0).flip(1).cumsum(1).flip(1) > 0)


def _append(labels: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """`[batch, nodes + added]`: without the new root, which is the old one."""
    assert labels is not None
    return torch.cat([labels, new[:, 1:]], 1)


def _with_rows(tree: Proposal) -> Proposal:
    """The same tree with a row for every node: leaves, which may get chosen children, point at the root's."""
    if tree.draft_logits is None:
        return tree
    batch, nodes = tree.tokens.shape
    device = tree.tokens.device
    logits, rows = tree.draft_logits, tree.draft_rows
    if rows is None:
        rows = torch.arange(batch * nodes, dtype=torch.int32, device=device).view(batch, nodes)
        logits = logits.flatten(0, 1)
    up = tree.parents.expand(batch, nodes).long()
    inner = torch.zeros((batch, nodes + 1), dtype=torch.bool, device=device).scatter_(1, up + 1, True)[:, 1:]
    return replace(tree, draft_logits=logits, draft_rows=torch.where(inner, rows, rows[:, :1]))
