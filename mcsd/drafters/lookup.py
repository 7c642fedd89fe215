"""Drafters that look the end of a text up in the text itself: what they share."""

from __future__ import annotations

from abc import abstractmethod

import torch

from ..trees import check_branching
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
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest: expected a number in [1, longest = {longest}], got {shortest}")
        check_branching((depth,))
        check_branching((continuations,))
        if nodes < 2:
            raise ValueError(f"nodes: expected at least 2, the root and a child, got {nodes}")
        self.longest, self.shortest = longest, shortest
        self.depth, self.continuations, self.nodes = depth, continuations, nodes

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
