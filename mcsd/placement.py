"""Where a model's weights lie and how many tokens it knows, however it was quantised, offloaded or spread."""

from __future__ import annotations

from typing import Any

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
    return _size(model.get_input_embeddings(), 0, "num_embeddings")


def output_shape(model: PreTrainedModel) -> tuple[int, int] | None:
    """The number of logits and the width of what they are made of; None: there is no output head to ask."""
    head = model.get_output_embeddings()
    return head and (_size(head, 0, "out_features"), _size(head, 1, "in_features"))


def hidden_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of what the output head reads: the head's own, unless it is quantised."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight.dtype if weight is not None and weight.is_floating_point() else model.dtype


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
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta:
        got = "none" if not isinstance(weight, torch.Tensor) else f"{weight.dtype} on {weight.device}"
        raise ValueError(
            f"{name}: expected a {type(module).__name__} with floating-point weights that are not offloaded, for "
            f"{purpose}, got {got}"
        )
    return weight


def _size(module: Any, axis: int, name: str) -> int:
    """A size of a matrix: its own, or what the module says where it is packed."""
    weight = getattr(module, "weight", None)
    size: int = weight.shape[axis] if weight is not None and weight.is_floating_point() else getattr(module, name)
    return size
