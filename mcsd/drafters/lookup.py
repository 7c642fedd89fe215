"""Drafters that look the end of a text up in the text itself: what they share."""

from __future__ import annotations

from abc import abstractmethod

import torch

from mcsd_kernels import _checks as check

from ..trees import LARGEST_TREE
from .base import Drafter, Proposal, State


class LookupDrafter(Drafter):
    """Proposes trees of deterministic children ("point"), a request's from its own text; a subclass finds them.

    Args:
        longest: of the n-grams looked up; shorter ones follow, down to `shortest`.
        shortest: of the n-grams looked up.
        depth: tokens of a continuation.
        continuations: how many different ones to follow.
        nodes: the tree's size at most, root included.

    Raises:
        ValueError: a number is out of range.
    """

    proposal = "point"

    def __init__(self, longest: int, shortest: int, depth: int, continuations: int, nodes: int) -> None:
        self.longest = check.whole("longest", longest, 1)
        self.shortest = check.whole("shortest", shortest, 1, self.longest)
        self.depth = check.whole("depth", depth, 1, LARGEST_TREE - 1)
        self.continuations = check.whole("continuations", continuations, 1, LARGEST_TREE - 1)
        self.nodes = check.whole("nodes", nodes, 2, LARGEST_TREE)  # the root and a child at least

    def propose(self, state: State) -> Proposal:
        """Look every request's ending up; smaller trees are padded to the largest."""
        trees = [
            self._tree(request, sequence) if state.active[request] else ([sequence[-1]], [-1])
            for request, sequence in enumerate(state.sequences)
        ]
        size = max(len(tokens) for tokens, _ in trees)
        tokens, parents = ([row + [-1] * (size - len(row)) for row in rows] for rows in zip(*trees, strict=True))
        return Proposal(
            torch.tensor(tokens, device=state.device),
            torch.tensor(parents, dtype=torch.int32, device=state.device),
            self.depth,
        )

    @abstractmethod
    def _tree(self, request: int, sequence: list[int]) -> tuple[list[int], list[int]]:
        """A request's tree: tokens and parents, the root first."""
