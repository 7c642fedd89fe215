"""Prompt lookup as drafter: what followed the same words earlier in the text, as a tree of several continuations."""

from __future__ import annotations

from .base import State
from .lookup import LookupDrafter


class NgramDrafter(LookupDrafter):
    """Continues with what followed the longest recent n-grams that the text ends in; needs no model.

    The continuations are merged into one tree of deterministic children ("point"): the longest n-gram's first, and of
    equally long ones the most recent first.

    Args:
        longest, shortest, depth, continuations, nodes: see `LookupDrafter`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, longest: int = 3, shortest: int = 1, depth: int = 8, continuations: int = 3, nodes: int = 16
    ) -> None:
        super().__init__(longest, shortest, depth, continuations, nodes)

    def begin(self, state: State) -> None:
        """Index the prompts."""
        # request -> n-gram -> the places right after it, in text order
        self._after: list[dict[tuple[int, ...], list[int]]] = [{} for _ in state.sequences]
        self._indexed = [0] * len(state.sequences)

    def _tree(self, request: int, sequence: list[int]) -> tuple[list[int], list[int]]:
        self._index(request, sequence)
        tokens, parents = [sequence[-1]], [-1]
        children: dict[tuple[int, int], int] = {}
        inner: set[int] = set()
        followed = 0
        for place in self._places(request, sequence):
            node, branched = 0, False
            for token in sequence[place : place + self.depth]:
                child = children.get((node, token))
                if child is None:
                    if len(tokens) == self.nodes:
                        return tokens, parents
                    child = children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    # the first path, or a fork; a path that only got longer is no other continuation
                    branched |= node in inner or node == 0
                    inner.add(node)
                node = child
            followed += branched
            if followed == self.continuations:
                break
        return tokens, parents

    def _places(self, request: int, sequence: list[int]) -> list[int]:
        """Where continuations begin: after the longest n-grams first, the most recent first, each place once."""
        found: dict[int, None] = {}
        for n in range(min(self.longest, len(sequence)), self.shortest - 1, -1):
            # a loop of one text may hold thousands of places; the recent ones are enough
            for place in self._after[request].get(tuple(sequence[-n:]), [])[: -4 * self.continuations - 1 : -1]:
                found.setdefault(place)
        return list(found)

    def _index(self, request: int, sequence: list[int]) -> None:
        """Take what is new in the text into the index; the ending itself has no continuation yet."""
        index = self._after[request]
        for place in range(max(self._indexed[request], 1), len(sequence)):
            for n in range(self.shortest, min(self.longest, place) + 1):
                index.setdefault(tuple(sequence[place - n : place]), []).append(place)
        self._indexed[request] = len(sequence)
