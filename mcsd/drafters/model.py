"""A smaller model as drafter: it grows the tree level by level, with tree attention over its own cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams
from mcsd_kernels import _checks as check

from ..checking import compiled, unwrapped
from ..trees import chain_bits, chain_depths, check_branching, columns, parents_of
from .base import Captures, State
from .levels import LevelDrafter
from .reading import read_all, scorer_of
from .stopping import Stopping

_BRANCHING = (4, 2, 2)


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
        model: a causal language model, compiled or not.
        branching: children of a node at depth 0, 1, ...; None: it and `proposal` are what `mcsd.generate` is told.
        proposal, parents, sampling, stopping: see `LevelDrafter`.
        attention: "auto", "tree" or "dense", as in `mcsd.generate`.
        shared_vocab: the ids below this number mean the same to the model and the target, and only they are drafted;
            `len(tokenizer)`, where both have that tokenizer and embeddings padded to different sizes. None: all ids do,
            and there are as many in both. What the text is like does not depend on it: ids that the model has no
            embedding for are read as its last one, and candidates that mean something else are rejected.

    Raises:
        ValueError: `branching` is not a list of whole numbers >= 1, `parents` is no tree, or `shared_vocab` no number
            of tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        branching: Sequence[int] | None = _BRANCHING,
        proposal: str = "without_replacement",
        attention: str = "auto",
        *,
        parents: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        stopping: Stopping | None = None,
        shared_vocab: int | None = None,
    ) -> None:
        given = _BRANCHING if branching is None else branching
        super().__init__(given, proposal, parents=parents, sampling=sampling, stopping=stopping)
        self.model, self._given, self.attention = unwrapped(model), model, attention
        self._own_branching = branching is not None
        self.shared_vocab = None if shared_vocab is None else check.whole("shared_vocab", shared_vocab, 1)

    def with_branching(self, branching: Sequence[int], proposal: str) -> ModelDrafter:
        """A drafter with the same model and this tree; itself, if a tree was given to it."""
        if self._own_branching or self.branching is None:
            return self
        other = self.with_tree(parents_of(check_branching(branching)), proposal)
        other.branching, other._own_branching = check_branching(branching), True
        return other

    def check_vocab(self, vocab: int) -> None:
        """Raise unless this can draft for a target with so many tokens."""
        own = self.model.config.get_text_config(decoder=True).vocab_size
        if self.shared_vocab is not None:
            if isinstance(self.model, SubVocabulary):
                raise ValueError(
                    f"shared_vocab: expected None for a {type(self.model).__name__}, got {self.shared_vocab}"
                )
            check.whole("shared_vocab", self.shared_vocab, 1, min(own, vocab))
        elif own != vocab:
            raise ValueError(
                f"draft: expected the target's vocabulary of {vocab} tokens, got {own}; if both have one tokenizer and "
                f"only padding differs, ModelDrafter(model, None, shared_vocab={min(own, vocab)}) takes the model"
            )

    def begin(self, state: State) -> None:
        """Read the prompts, all but what `propose` will read anyway.

        Raises:
            ValueError: the vocabularies do not fit.
        """
        self.check_vocab(state.vocab)
        super().begin(state)
        self._scorer = scorer_of(self.model, self.attention, state, len(self.parents))
        self._contexts.enter_context(self._scorer.attending())
        self._contexts.enter_context(compiled(self._given))
        if isinstance(self.model, SubVocabulary):
            self._knows(self.model.sub_vocab.to(state.device))
            self._contexts.enter_context(self.model.reduced())
        elif self.shared_vocab is not None and self.shared_vocab < state.vocab:
            self._knows(torch.arange(self.shared_vocab, device=state.device))
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
        if not self._steps_alike() or self._scorer.graphs is None:
            return None
        self._scorer.reserve(state.prefix, len(self.parents))
        key = self.parents, id(self.sampling), self.shared_vocab, self._ids_key
        return Captures(len(self.parents), key, self._scorer.memory)

    def forgetful(self) -> ModelDrafter:
        """See `Drafter`; captured steps stay with the target and shall not keep this model alive."""
        other = super().forgetful()
        other.model = other._given = weakref.proxy(self.model)
        other._scorer = weakref.proxy(self._scorer)
        return other

    def end(self) -> None:
        """Give the model its own attention back, and the cache's memory free."""
        super().end()
        if hasattr(self, "_scorer"):
            del self._scorer

    def _level(self, state: State, level: int, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        """One forward of the model."""
        if level == 0:
            return self._read(state)[..., : self.shared_vocab], None
        tree = self._plan.tree
        first, after = tree.levels[level], tree.levels[level + 1]
        bits, depth = tree.ancestors[:, first:after], tree.inner_depth[first:after]
        logits = self._scorer.score(tokens, bits, depth, state.prefix, offset=first)
        return logits[..., : self.shared_vocab], None

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
