"""Where a model's weights lie and how many tokens it knows, however it was quantised, offloaded or spread."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its tokens; a weight that was offloaded lies nowhere until it is needed."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)  # accelerate's
    for one in getattr(hook, "hooks", (hook,)):
        place = getattr(one, "execution_device", None)
        if place is not None:
            return torch.empty(0, device=place).device  # "cuda" and numbers as what they stand for
    weight = getattr(embedding, "weight", None)
    return model.device if weight is None else weight.device


def is_spread(model: PreTrainedModel) -> bool:
    """Whether parts of the model lie on different devices."""
    return len({parameter.device for parameter in model.parameters()}) > 1


def input_vocab(model: PreTrainedModel) -> int:
    """How many tokens the model can read."""
    config = model.config.get_text_config(decoder=True)
    return _size(model.get_input_embeddings(), 0, "num_embeddings") or config.vocab_size


def output_shape(model: PreTrainedModel) -> tuple[int, int] | None:
    """The number of logits and the width of what they are made of; None: there is no output head to ask."""
    head, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    if head is None:
        return None
    return _size(head, 0, "out_features") or config.vocab_size, _size(head, 1, "in_features") or config.hidden_size


def text_limit(model: PreTrainedModel) -> int:
    """How many positions a text may take; 0: no limit is known.

    Past its original length a model with "longrope" reads the whole text with other frequencies, so that what it has
    cached before, and in chunks, would be worth nothing.
    """
    config = model.config.get_text_config(decoder=True)
    limit: int = getattr(config, "max_position_embeddings", 0) or 0
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        original = kind.get("original_max_position_embeddings") if kind.get("rope_type") == "longrope" else None
        limit = min(limit or original, original) if original else limit
    return limit


def hidden_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of what the output head reads: the head's own, unless it is quantised."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight.dtype if _is_plain(weight) else model.dtype


def floating_weight(name: str, module: nn.Module | None, purpose: str) -> torch.Tensor:
    """The weight of an embedding or a head, as numbers to copy.

    Args:
        name: the argument it comes from, for the error.
        module: the embedding or head.
        purpose: who wants it, for the error.

    Raises:
        ValueError: it is quantised, or offloaded.
    """
    weight = getattr(module, "weight", None)
    if not _is_plain(weight) or weight.is_meta:
        got = "none" if not isinstance(weight, torch.Tensor) else f"{weight.dtype} on {weight.device}"
        raise ValueError(
            f"{name}: expected a {type(module).__name__} with floating-point weights that are not offloaded, for "
            f"{purpose}, got {got}"
        )
    return weight


def _is_plain(weight: Any) -> TypeGuard[torch.Tensor]:
    """Whether these are numbers as they are: no bytes, and no float8, which go with scales."""
    return isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.itemsize > 1


def _size(module: Any, axis: int, name: str) -> int | None:
    """A size of a matrix: its own, or what the module says where it is packed; None: nobody says it."""
    weight = getattr(module, "weight", None)
    if weight is not None and weight.is_floating_point():
        return int(weight.shape[axis])
    size: int | None = getattr(module, name, None)
    return size
