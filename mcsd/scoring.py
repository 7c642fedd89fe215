"""A causal language model that scores token trees against its own cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .attention import TreeStep, takes_tree_attention, tree_attention_in
from .cache import TreeCache
from .trees import chain_bits

ATTENTION = ("auto", "tree", "dense")
PREFILL_CHUNK = 512
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
# their positions come from the 2-D attention mask, not from position_ids
_ALIBI = ("bloom", "mpt", "falcon")
_OWN_MASKS = {
    "gpt_neo": "has local attention layers that make their own masks",
    "doge": "computes its attention mask from the keys",
}


class UnsupportedModelError(ValueError):
    """The model cannot score token trees; the text says why."""


def refusal(model: object, attention: str = "auto") -> str | None:
    """Why this model cannot score token trees, or None; looks at classes and configuration only, see `mcsd.check`."""
    if not isinstance(model, PreTrainedModel):
        return f"expected a Hugging Face model, got {type(model).__name__}"
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is an encoder-decoder; mcsd decodes decoder-only models"
    if not model.can_generate():
        return f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # a configuration that no cache can be made for
        return f"no key-value cache can be made for {type(model).__name__}: {error}"
    odd = sorted({type(layer).__name__ for layer in layers if type(layer) not in _LAYERS})
    if odd:
        return f"{type(model).__name__} keeps recurrent or compressed state ({', '.join(odd)}), which has no tree form"
    if config.model_type in _OWN_MASKS:
        return f"{type(model).__name__} {_OWN_MASKS[config.model_type]}, which cannot describe a tree"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return f"{type(model).__name__} attends in chunks, which trees across a chunk's end would break"
    if attention != "dense" and takes_tree_attention(model):
        return None
    if attention == "tree":
        return f"{type(model).__name__} does not use transformers' AttentionInterface; try attention='dense'"
    if config.model_type in _ALIBI and (config.model_type != "falcon" or getattr(config, "alibi", False)):
        return f"{type(model).__name__} takes positions from its 2-D attention mask, which cannot describe a tree"
    if any(isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)) for layer in layers):
        return f"{type(model).__name__} has sliding windows, which a dense mask cannot describe; use attention='tree'"
    return None


class Scorer:
    """One model, its cache, and the two ways into it: whole prompts, and trees.

    Args:
        model: any decoder that `refusal` lets through.
        capacity: slots a request.
        attention: "tree", "dense" (4-D masks), or "auto": "tree" where the model takes it.

    Raises:
        UnsupportedModelError: the model cannot score trees.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, attention: str = "auto") -> None:
        reason = refusal(model, attention)
        if reason:
            raise UnsupportedModelError(reason)
        self.model = model
        config = model.config.get_text_config(decoder=True)
        self.tree = attention != "dense" and takes_tree_attention(model)
        self.cache = TreeCache(config.num_hidden_layers, capacity)
        embedding = model.get_input_embeddings().weight
        self.device, self.vocab = embedding.device, embedding.shape[0]
        self.positions: int = getattr(config, "max_position_embeddings", 0) or 0
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._forward_takes_tree = True

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The model attends by tree inside this context."""
        with tree_attention_in(self.model) if self.tree else nullcontext():
            yield

    def prefill(self, tokens: torch.Tensor, lengths: list[int], start: list[int] | None = None) -> None:
        """Put tokens into the cache, without scores.

        Args:
            tokens: `[batch, longest]` int64, each request's from column 0 on.
            lengths: how many of them count.
            start: how many tokens each request has in the cache already; None: none.
        """
        first = start or [0] * len(lengths)
        for at in range(0, max(lengths, default=0), PREFILL_CHUNK):
            chunk = tokens[:, at : min(at + PREFILL_CHUNK, max(lengths))]
            begin = [f + at for f in first]
            self.score(chunk, chain_bits(chunk.shape[1], self.device), None, begin, last_only=True)

    def score(
        self,
        tokens: torch.Tensor,
        ancestors: torch.Tensor,
        depth: torch.Tensor | None,
        prefix: list[int],
        *,
        offset: int = 0,
        last_only: bool = False,
    ) -> torch.Tensor:
        """One forward over nodes of a tree.

        Args:
            tokens: `[batch, rows]` int64; what is no token (a missing candidate) is read as 0.
            ancestors: `[batch or 1, rows, words]` int32.
            depth: `[rows]` or `[batch, rows]` int64, in tokens below the root; None: a chain.
            prefix: each request's slots before its tree.
            offset: the first row's node number.
            last_only: skip the other rows' logits where the model can; the result is then not used.

        Returns:
            `[batch, rows, vocab]` logits in the model's dtype.
        """
        rows = tokens.shape[1]
        device = self.device
        if depth is None:
            depth = torch.arange(rows, device=device)
        prefix_lengths = torch.tensor(prefix, dtype=torch.int32, device=device)
        positions = prefix_lengths.long()[:, None] + depth
        if self.positions:
            positions = positions.clamp(max=self.positions - 1)  # nodes past the last position are never emitted
        self.cache.place([start + offset for start in prefix], rows, max(prefix))
        step = TreeStep(ancestors, prefix_lengths)
        options: dict[str, Any] = {"logits_to_keep": 1} if last_only and self._last_only else {}
        if self.tree:
            options |= {"attention_mask": step.packed(), "mcsd_tree": step}
        else:
            options |= {"attention_mask": self._additive(step)}
        output = self.model(
            input_ids=torch.where((tokens >= 0) & (tokens < self.vocab), tokens, 0),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        logits: torch.Tensor = output.logits
        return logits

    def keep(self, prefix: list[int], path: torch.Tensor, length: torch.Tensor) -> None:
        """Move the accepted nodes to the end of each request's prefix."""
        self.cache.keep(torch.tensor(prefix, dtype=torch.int32, device=self.device), path, length)

    def _additive(self, step: TreeStep) -> torch.Tensor:
        """A float mask, which eager attention and SDPA both take; eager adds a bool one as if it were 0 and 1."""
        mask = step.mask(self.cache.used)
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
