"""A smaller model as drafter: it grows the tree level by level, with tree attention over its own cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams

from ..trees import chain_bits, chain_depths, columns
from .base import Captures, State
from .levels import LevelDrafter
from .reading import read_all, scorer_of
from .stopping import Stopping


@runtime_checkable
class SubVocabulary(Protocol):
    """A model that knows some of the target's tokens only, such as `mcsd.draft_model.SubVocabularyDraft`."""

    @property
    def sub_vocab(self) -> torch.Tensor:
        """`[columns]` int64, ascending: the target's tokens that it knows."""

    def reduced(self) -> AbstractContextManager[None]:
        """Inside this context its logits have one column for each of them."""


class ModelDrafter(LevelDrafter):
    """Draws the children of every node from a smaller model with the same vocabulary, or a part of it.

    Args:
        model: a causal language model.
        branching, proposal, parents, sampling, stopping: see `LevelDrafter`.
        attention: "auto", "tree" or "dense", as in `mcsd.generate`.

    Raises:
        ValueError: `branching` is not a list of whole numbers >= 1, or `parents` is no tree.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        branching: Sequence[int] = (4, 2, 2),
        proposal: str = "without_replacement",
        attention: str = "auto",
        *,
        parents: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        super().__init__(branching, proposal, parents=parents, sampling=sampling, stopping=stopping)
        self.model, self.attention = model, attention

    def begin(self, state: State) -> None:
        """Read the prompts, all but what `propose` will read anyway."""
        super().begin(state)
        self._scorer = scorer_of(self.model, self.attention, state, len(self.parents))
        self._contexts.enter_context(self._scorer.attending())
        if isinstance(self.model, SubVocabulary):
            self._knows(self.model.sub_vocab)
            self._contexts.enter_context(self.model.reduced())
        prompts = [sequence[:-1] for sequence in state.sequences]
        self._read_up_to = [len(prompt) for prompt in prompts]
        self._unread = 1  # how many of the committed tokens the next step reads, if it is alone
        self._chains = {n: (chain_bits(n, state.device), chain_depths(n, state.device)) for n in (1, 2)}
        self._scorer.prefill(columns(prompts, state.device), self._read_up_to, join=True)

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """Keep the accepted nodes that were read while drafting; leaves never were."""
        self._read_up_to = [len(sequence) for sequence in state.sequences]
        self._unread = 2
        tree = self._plan.tree
        if len(tree.inner) == tree.depth:
            return  # what was read is a chain, which lies in place
        # -1 and other drafters' nodes find the -1 at the end
        slots = tree.slots.take(path.clamp(max=tree.nodes).long())
        self._scorer.keep(state.prefix, slots, (slots >= 0).sum(1, dtype=torch.int32))

    def captures(self, state: State) -> Captures | None:
        """From the second step on, unless what it does depends on more than the text: see `Drafter`.

        `_read_up_to` falls behind while steps are replayed; only a drafter that is not alone looks at it.
        """
        as_it_is = type(self) is ModelDrafter and self.alone and self.nodes is None and self.stopping is None
        if not as_it_is or not self._scorer.ready:
            return None
        self._scorer.reserve(state.prefix, len(self.parents))
        return Captures(len(self.parents), (self.parents, id(self.sampling)), (self._scorer.version,))

    def forgetful(self) -> ModelDrafter:
        """See `Drafter`; captured steps stay with the target and shall not keep this model alive."""
        other = super().forgetful()
        other.model, other._scorer = weakref.proxy(self.model), weakref.proxy(self._scorer)
        return other

    def end(self) -> None:
        """Give the model its own attention back, and the cache's memory free."""
        super().end()
        if hasattr(self, "_scorer"):
            del self._scorer

    def _level(self, state: State, level: int, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        """One forward of the model."""
        if level == 0:
            return self._read(state), None
        tree = self._plan.tree
        first, after = tree.levels[level], tree.levels[level + 1]
        bits, depth = tree.ancestors[:, first:after], tree.inner_depth[first:after]
        return self._scorer.score(tokens, bits, depth, state.prefix, offset=first), None

    def _read(self, state: State) -> torch.Tensor:
        """Read what is committed and not yet cached: the root, and before it a leaf that was accepted.

        Returns:
            `[batch, 1, columns]` logits after each request's root.
        """
        if not self.alone:
            return read_all(self._scorer, state, self._read_up_to)
        # always two tokens, whatever was accepted, so that shapes and a request's numbers depend on nothing else
        bits, depth = self._chains[self._unread]
        before = state.prefix if self._unread == 1 else state.shorter
        return self._scorer.score(state.tail[:, -self._unread :], bits, depth, before, last_only=True)[:, -1:]
