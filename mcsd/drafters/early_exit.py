"""Early exit: the target's own first layers, with its norm and head, as the draft model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams
from mcsd_kernels import _checks as check

from ..attention import takes_tree_attention, tree_attention_in
from ..checking import unwrapped
from ..scoring import UnsupportedModelError, refusal
from ..trees import chain_bits
from .base import Captures, State
from .model import ModelDrafter
from .stopping import Stopping


class EarlyExitDrafter(ModelDrafter):
    """Drafts with the first layers of the target itself; no weights are copied, and the cache is the target's.

    What the first layers have computed for the text is in the target's cache already, so the drafter reads no prompt
    and keeps nothing: it writes its nodes to the slots after the prefix, where the target's own forward then overwrites
    them. (With a drafter of another model than the one that `generate` decodes it has a cache of its own.)

    How much the drafts are worth depends on the model: one trained for early exit, as LayerSkip does, predicts well
    from half of its layers; an ordinary one often does not.

    Args:
        target: the model that is decoded.
        layers: how many of its layers draft, from the first one on.
        branching, proposal, parents, sampling, stopping: see `LevelDrafter`.

    Raises:
        UnsupportedModelError: the model is not a plain stack of layers, a norm and a head; the text says why.
        ValueError: `layers` is not between 1 and one less than the target has, or the tree is wrong.

    Source: Elhoushi et al., arXiv 2404.16710 (LayerSkip); Zhang et al., arXiv 2309.08168 (self-speculation).
    """

    reads_cache = True

    def __init__(
        self,
        target: PreTrainedModel,
        layers: int,
        branching: Sequence[int] = (4, 2, 2),
        proposal: str = "without_replacement",
        *,
        parents: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        model = first_layers(target, layers)
        super().__init__(model, branching, proposal, parents=parents, sampling=sampling, stopping=stopping)
        self.target, self.layers = unwrapped(target), layers
        self._shared = False

    def begin(self, state: State) -> None:
        """Take the target's cache, if it is the target that is decoded."""
        scorer = state.scorer
        self._shared = scorer is not None and scorer.model is self.target
        if scorer is None or not self._shared:
            self.attention = "auto"
            if takes_tree_attention(self.target):  # the layers ask the target's configuration which attention to use
                self._contexts.enter_context(tree_attention_in(self.target))
            super().begin(state)
            return
        self.attention = "tree" if scorer.tree else "dense"
        nothing_to_read = copy.copy(state)
        nothing_to_read.sequences = [sequence[-1:] for sequence in state.sequences]
        super().begin(nothing_to_read)
        self._scorer.cache = scorer.cache

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """The target keeps what was accepted."""
        if not self._shared:
            super().keep(state, path, length)

    def captures(self, state: State) -> Captures | None:
        """As those of any model."""
        return super().captures(state)

    def forgetful(self) -> EarlyExitDrafter:
        """See `Drafter`; the target is not held."""
        other = cast(EarlyExitDrafter, super().forgetful())
        other.target = weakref.proxy(self.target)
        return other

    def _read(self, state: State) -> torch.Tensor:
        """Read the root; all before it is in the target's cache."""
        if not self._shared:
            return super()._read(state)
        return self._scorer.score(state.tail[:, -1:], chain_bits(1, state.device), None, state.prefix)


def first_layers(target: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A causal language model of the target's first layers, its final norm and its head; every weight is the target's.

    Raises:
        UnsupportedModelError, ValueError: as `EarlyExitDrafter`.
    """
    target = unwrapped(target)
    reason = refusal(target)
    if reason:
        raise UnsupportedModelError(f"target: {reason}")
    name = type(target).__name__
    decoder = target.get_decoder()
    owners = [path for path, part in target.named_children() if part is decoder]
    if len(owners) != 1 or decoder.config is not target.config:
        raise UnsupportedModelError(f"target: early exit needs a decoder right under the head, {name} has it elsewhere")
    if "forward" in vars(target) or "forward" in vars(decoder):
        raise UnsupportedModelError(f"target: early exit needs {name}'s own forward, which something has replaced")
    total = target.config.num_hidden_layers
    stacks = [path for path, part in decoder.named_children() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(stacks) != 1:
        raise UnsupportedModelError(f"target: early exit needs one list of {total} layers, {name} has {len(stacks)}")
    layers = check.whole("layers", layers, 1, total - 1)
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = layers
    if vars(config).get("layer_types") is not None:
        config.layer_types = config.layer_types[:layers]
    head, body = _view(target), _view(decoder)
    head.config = body.config = config
    setattr(body, stacks[0], getattr(decoder, stacks[0])[:layers])
    setattr(head, owners[0], body)
    return head


def _view(module: PreTrainedModel) -> PreTrainedModel:
    """The same module, whose parts can be replaced without the original noticing."""
    other: PreTrainedModel = module.__class__.__new__(module.__class__)
    other.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    return other
