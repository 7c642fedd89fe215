"""Context tries as drafter: every earlier continuation of the last tokens, merged and counted."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from .base import State
from .lookup import LookupDrafter

_SHIFT = 32


class ContextTrie:
    """Counts of all n-grams of a growing text, up to a length.

    A node stands for an n-gram. One that was met once keeps the place where it ended instead of children, and is opened
    when it is met again; so a token adds two nodes on average, and costs at most `longest` steps.

    Args:
        longest: of the n-grams.
        width: how many followers of an n-gram are kept in order, the most frequent ones.
    """

    def __init__(self, longest: int, width: int) -> None:
        self.longest, self.width = longest, width
        self.text: list[int] = []
        self.count = [0]  # of each node; 0 is the empty n-gram, the root
        self._place = [-1]  # of a node that was met once: where what follows it stands; -1: it has children
        self._best: dict[int, list[int]] = {}  # node -> its tokens of the largest counts, largest first
        self._child: dict[int, int] = {}  # node and token -> node
        self._open: list[int] = []  # the nodes of the text's endings, the longest first

    def extend(self, tokens: Sequence[int]) -> None:
        """Take more of the text in."""
        for token in tokens:
            place = len(self.text) + 1
            self.text.append(token)
            grown = []
            for node in (*self._open, 0):
                child, new = self._step(node, token, place)
                if not new:
                    grown.append(child)
            # a full n-gram has no followers
            self._open = grown[1:] if len(grown) == self.longest else grown

    def _step(self, node: int, token: int, place: int) -> tuple[int, bool]:
        """The node after `node` and `token`, met once more at `place`, and whether this was the first time."""
        key = node << _SHIFT | token
        child = self._child.get(key)
        new = child is None
        if child is None:
            child = self._child[key] = self._add(place)
        else:
            self._opened(child)
            self.count[child] += 1
        self._rank(node, token)
        return child, new

    def _add(self, place: int) -> int:
        self.count.append(1)
        self._place.append(place)
        return len(self.count) - 1

    def _opened(self, node: int) -> None:
        """Give a node that was met once its only follower as a child."""
        place = self._place[node]
        if 0 <= place < len(self.text):
            self._place[node] = -1
            token = self.text[place]
            self._child[node << _SHIFT | token] = self._add(place + 1)
            self._best[node] = [token]

    def _rank(self, node: int, token: int) -> None:
        """Keep the followers in order, of equal counts the most recent first."""
        best = self._best.setdefault(node, [])
        count = self.count[self._child[node << _SHIFT | token]]
        if token in best:
            best.remove(token)
        at = len(best)
        while at and self.count[self._child[node << _SHIFT | best[at - 1]]] <= count:
            at -= 1
        if at < self.width:
            best.insert(at, token)
            del best[self.width :]

    def find(self, tokens: Sequence[int]) -> int | None:
        """The node of an n-gram, None if it never occurred; n-grams that occurred once are opened on the way."""
        node: int | None = 0
        for token in tokens:
            assert node is not None
            self._opened(node)
            node = self._child.get(node << _SHIFT | token)
            if node is None:
                return None
        return node

    def followers(self, node: int) -> list[tuple[int, int, int]]:
        """(token, node, count) of what most often followed, at most `width`, the most frequent first."""
        self._opened(node)
        found = ((token, self._child[node << _SHIFT | token]) for token in self._best.get(node, ()))
        return [(token, child, self.count[child]) for token, child in found]


class TrieDrafter(LookupDrafter):
    """Continues as the text did most often after its last tokens; needs no model.

    Every n-gram that the text ends in is looked up, and what followed it anywhere before grows the tree, the most
    frequent paths first: after an n-gram that was met c times before, a follower of count f has weight f / (c + 1), and
    the 1 / (c + 1) that is left goes to the next shorter n-gram. `NgramDrafter` instead follows single places, the most
    recent ones.

    Args:
        longest, shortest, depth, nodes: see `LookupDrafter`.
        continuations: children of a node, at most, for each n-gram.

    Raises:
        ValueError: a number is out of range.

    Source: Cleary and Witten, "Data compression using adaptive coding and partial string matching", IEEE Transactions
    on Communications 1984 (the weights).
    """

    def __init__(
        self, longest: int = 4, shortest: int = 1, depth: int = 8, continuations: int = 4, nodes: int = 16
    ) -> None:
        super().__init__(longest, shortest, depth, continuations, nodes)

    def begin(self, state: State) -> None:
        """An empty trie for each request; the first tree reads the prompt."""
        self._tries = [ContextTrie(self.longest + self.depth, self.continuations) for _ in state.sequences]

    def end(self) -> None:
        """Forget the texts."""
        self._tries = []

    def _tree(self, request: int, sequence: list[int]) -> tuple[list[int], list[int]]:
        trie = self._tries[request]
        trie.extend(sequence[len(trie.text) :])
        tokens, parents = [trie.text[-1]], [-1]
        children: dict[tuple[int, int], int] = {}
        # minus the weight, a number for ties, parent in the tree, token, node in the trie, depth
        paths: list[tuple[float, int, int, int, int, int]] = []

        tie = itertools.count()

        def offer(weight: float, parent: int, node: int, depth: int) -> None:
            for token, child, count in trie.followers(node):
                heapq.heappush(paths, (-weight * count / trie.count[node], next(tie), parent, token, child, depth))

        weight = 1.0
        for n in range(min(self.longest, len(trie.text)), self.shortest - 1, -1):
            node = trie.find(trie.text[-n:])
            assert node is not None
            offer(weight, 0, node, 1)
            weight /= trie.count[node]  # the text's ending is one of them, and has no follower
        while paths and len(tokens) < self.nodes:
            minus, _, parent, token, node, depth = heapq.heappop(paths)
            child = children.get((parent, token))
            if child is None:
                child = children[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
            if depth < self.depth:
                offer(-minus, child, node, depth + 1)
        return tokens, parents
