"""Heads as drafter: small networks that read the target's last hidden state and guess several tokens ahead."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams
from mcsd_kernels import _checks as check
from mcsd_kernels.verify import PROPOSALS

from ..cache import TreeCache
from ..graphs import fingerprint
from ..placement import output_shape
from ..trees import StaticTree
from .base import Captures, State
from .levels import LevelDrafter
from .stopping import Stopping


class Heads(Protocol):
    """What `HeadsDrafter` asks of its heads: see `MedusaHeads` and `MLPSpeculator`."""

    shares_rows: bool
    """Whether all nodes of a level have one law, because the heads do not look at the tokens between."""

    @property
    def count(self) -> int:
        """How many tokens ahead there is a head for."""

    def start(self, hidden: torch.Tensor) -> torch.Tensor:
        """The root's state.

        Args:
            hidden: `[batch, hidden]`, the target's last hidden state at the token before the root.

        Returns:
            `[batch, 1, width]`.
        """

    def level(self, level: int, state: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The laws of the children of a level's nodes.

        Args:
            level: depth of the nodes, 0 for the root.
            state: `[batch, nodes, width]` of the nodes' parents, of the root's predecessor at level 0; nodes is 1 if
                rows are shared.
            tokens: `[batch, nodes]`, the nodes' own; those < 0 are missing.

        Returns:
            `[batch, nodes, vocab]` logits, `[batch, nodes, width]` the nodes' state; nodes is 1 if rows are shared.
        """


# heads -> an empty cache that lives as long: graphs go with what they point to
_KEPT: WeakKeyDictionary[nn.Module, TreeCache] = WeakKeyDictionary()


class HeadsDrafter(LevelDrafter):
    """Grows a tree from heads on the target's last hidden state; there is no draft model and no cache.

    The state that the heads read is the one that predicted the root: head 0 guesses the token after the root.

    Args:
        heads: `MedusaHeads`, `MLPSpeculator`, or your own.
        branching: children of a node at depth 0, 1, ...; not deeper than there are heads.
        proposal: how children are drawn. "point" takes each head's most probable tokens; the others draw them from its
            law, which is lossless as well: where the heads do not see the tokens between, all nodes of a level have the
            same row, and each draws from it on its own.
        parents, sampling, stopping: see `LevelDrafter`.

    Raises:
        ValueError: the tree or `proposal` is wrong.
    """

    reads_hidden = True

    def __init__(
        self,
        heads: Heads,
        branching: Sequence[int] = (4, 2, 2),
        proposal: str = "point",
        *,
        parents: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        check.choice("proposal", proposal, PROPOSALS)
        super().__init__(branching, proposal, parents=parents, sampling=sampling, stopping=stopping)
        self.heads, self.shares_rows = heads, heads.shares_rows
        self._check_depth("branching" if parents is None else "parents")
        self._hidden = self._states = torch.empty(0)
        self._seen: int | None = None  # what a graph has of the heads

    def with_tree(self, parents: Sequence[int], proposal: str) -> HeadsDrafter:
        """The same heads with a tree of any shape.

        Raises:
            ValueError: the tree is deeper than there are heads.
        """
        other = super().with_tree(parents, proposal)
        other._check_depth("parents")
        return other

    def begin(self, state: State) -> None:
        """Take the state at each prompt's last token but one; a prompt of one token has none, zeros stand for it."""
        super().begin(state)
        self._seen = None
        assert state.hidden is not None
        self._hidden = _rows(nn.functional.pad(state.hidden, (0, 0, 1, 0)), state.prefix.lengths.long())

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """The last accepted node is the one that predicted the next root."""
        assert state.hidden is not None
        self._hidden = _rows(state.hidden, path.gather(1, length[:, None].long() - 1)[:, 0].long())

    def captures(self, state: State) -> Captures | None:
        """Where the heads are a module, which is then taken to compute from its arguments alone."""
        if not self._steps_alike() or not isinstance(self.heads, nn.Module):
            return None
        if self._seen is None:
            self._seen = fingerprint(self.heads)
            cache = _KEPT.setdefault(self.heads, TreeCache([], 0))
            self._memory = cache.serial, cache.version
        return Captures(len(self.parents), (self._seen, self.parents, id(self.sampling)), (self._memory,))

    def carried(self) -> tuple[torch.Tensor, ...]:
        """The hidden state that the heads read next."""
        return (self._hidden,)

    def carry(self, state: State, tensors: tuple[torch.Tensor, ...]) -> None:
        """See `carried`."""
        (self._hidden,) = tensors

    def forgetful(self) -> HeadsDrafter:
        """See `Drafter`; captured steps stay with the target and shall not keep the heads alive, nor what they hold."""
        other = super().forgetful()
        other.heads = weakref.proxy(self.heads)
        return other

    def end(self) -> None:
        """Forget the text."""
        super().end()
        self._hidden = self._states = torch.empty(0)

    def _level(self, state: State, level: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One head."""
        if level == 0:
            states = self.heads.start(self._hidden)
        else:
            states = self._states if self.shares_rows else self._states[:, self._plan.tree.above[level]]
        logits, self._states = self.heads.level(level, states, tokens)
        return logits, self._states

    def _check_depth(self, name: str) -> None:
        depth = StaticTree.of(self.parents).depth
        if depth > self.heads.count:
            raise ValueError(f"{name}: expected at most {self.heads.count} levels, one a head, got {depth}")


def check_fit(target: PreTrainedModel, hidden: int, vocab: int, what: str) -> None:
    """Refuse heads that were made for another model.

    Raises:
        ValueError: the target's output head has another shape than `[vocab, hidden]`.
    """
    found = output_shape(target)
    if found != (vocab, hidden):
        raise ValueError(f"target: expected an output head of shape {(vocab, hidden)} for {what}, got {found}")


def _rows(hidden: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`[batch, width]`: one row of each request's `[batch, rows, width]`."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), row]
