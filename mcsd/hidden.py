"""What a model's LM head reads: its last hidden states, taken by a forward hook."""

from __future__ import annotations

from threading import get_ident
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from .placement import input_device

_CHECKED: WeakSet[PreTrainedModel] = WeakSet()


class HiddenStates:
    """Keeps the decoder's output of the most recent forward inside its context, by the thread that entered it.

    Args:
        model: a causal language model that `why_not` has no objection to.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.last: torch.Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> HiddenStates:
        self._thread = get_ident()
        self._hook = self.model.get_decoder().register_forward_hook(self._take)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        self.last = None

    def _take(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        if get_ident() == self._thread:
            self.last = output[0] if isinstance(output, tuple) else output.last_hidden_state


def why_not(model: PreTrainedModel) -> str | None:
    """Why the hidden states of this model cannot be read, or None: one forward over two tokens, once a model."""
    if model in _CHECKED:
        return None
    name = type(model).__name__
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model or head is None:
        return f"{name} has no decoder and output head that can be told apart"
    read: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    tokens = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    try:
        with torch.inference_mode(), HiddenStates(model) as hidden:
            model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
            same = len(read) == 1 and hidden.last is not None and torch.equal(read[0], hidden.last)
    except Exception as error:  # whatever a model does here is the reason
        return f"the hidden states of {name} cannot be read: {error}"
    finally:
        hook.remove()
    if not same:
        return f"the output head of {name} does not read what {type(decoder).__name__} returns"
    _CHECKED.add(model)
    return None
