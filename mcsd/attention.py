"""Tree attention inside Hugging Face models: one attention function, registered under the name `mcsd_tree`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from mcsd_kernels import tree_attention
from mcsd_kernels.tree import dense_mask, unpack_bits

from .overlapping import Overlapping

NAME = "mcsd_tree"


class TreeStep:
    """What every attention layer of one forward needs to know of the tree; dense masks are made once for all layers.

    Args:
        ancestors: `[batch or 1, rows, words]` int32, see `ancestor_bits`.
        prefix_lengths: `[batch]` int32: slots before the tree's.
        before: window -> `[batch]` int32, the same for layers with that window, where they are fewer.
        same: the number that `prefix_lengths` holds everywhere; None: it differs, or nobody knows.
    """

    def __init__(
        self,
        ancestors: torch.Tensor,
        prefix_lengths: torch.Tensor,
        before: dict[int, torch.Tensor] | None = None,
        same: int | None = None,
    ) -> None:
        self.ancestors, self.prefix_lengths, self.same = ancestors, prefix_lengths, same
        self.before = before or {}
        self._elsewhere: dict[torch.device, TreeStep] = {}
        self.windows: list[int | None] = []  # of the layers that took the tree from here, in order
        self._masks: dict[int, torch.Tensor] = {}
        self._additive: dict[tuple[int, int], torch.Tensor] = {}

    def on(self, device: torch.device) -> TreeStep:
        """The same for layers on another device, copied there once."""
        if device == self.prefix_lengths.device:
            return self
        if device not in self._elsewhere:
            before = {window: lengths.to(device) for window, lengths in self.before.items()}
            other = TreeStep(self.ancestors.to(device), self.prefix_lengths.to(device), before, self.same)
            other.windows = self.windows
            self._elsewhere[device] = other
        return self._elsewhere[device]

    def packed(self) -> torch.Tensor:
        """`[batch, 1, rows, words + 1]` int32: the ancestors and, in the last column, the prefix length.

        It travels as the 4-D attention mask, for models that drop unknown keyword arguments.
        """
        batch, rows = self.prefix_lengths.shape[0], self.ancestors.shape[1]
        if self.same is not None:
            return torch.nn.functional.pad(self.ancestors.expand(batch, -1, -1), (0, 1), value=self.same)[:, None]
        prefix = self.prefix_lengths.int()[:, None, None].expand(batch, rows, 1)
        return torch.cat([self.ancestors.expand(batch, -1, -1), prefix], -1)[:, None]

    def placeholder(self) -> torch.Tensor:
        """`[batch, 1, rows, words]`: a mask that says nothing, and only keeps a model from making one of its own.

        It is enough where every layer takes the tree by keyword; its dtype tells it from `packed`.
        """
        expanded = self.ancestors.expand(self.prefix_lengths.shape[0], -1, -1)
        return expanded.view(torch.float32)[:, None]

    def mask(self, total: int) -> torch.Tensor:
        """`[batch or 1, 1, rows, total]` bool, without a sliding window."""
        if total not in self._masks:
            visible = unpack_bits(self.ancestors, min(self.ancestors.shape[-1] * 32, total))
            if self.same is None or visible.shape[0] > 1:
                mask = dense_mask(visible, self.prefix_lengths.long(), total)
            else:
                mask = visible.new_ones(1, visible.shape[1], total)
                mask[..., self.same : self.same + visible.shape[2]] = visible[..., : total - self.same]
            self._masks[total] = mask[:, None]
        return self._masks[total]

    def additive(self, total: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        """`[batch or 1, 1, group * rows, total]`: 0 where `mask` is true, minus infinity elsewhere."""
        if (total, group) not in self._additive:
            mask = self.mask(total)
            added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            self._additive[total, group] = added.repeat(1, 1, group, 1)
        return self._additive[total, group]


def tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    mcsd_tree: TreeStep | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that `AttentionInterface` calls; the tree comes by keyword or as a packed 4-D mask.

    Returns:
        `[batch, rows, q_heads, head_dim]`, and no weights.

    Raises:
        RuntimeError: neither route brought a tree.
    """
    if mcsd_tree is None:
        if attention_mask is None or attention_mask.dtype != torch.int32 or attention_mask.dim() != 4:
            raise RuntimeError(
                f"{type(module).__name__} passed no token tree to its attention. While mcsd generates with a model, "
                "nobody else can run it, callbacks and logits processors included; at other times see mcsd.check(model)"
            )
        mcsd_tree = TreeStep(attention_mask[:, 0, :, :-1].contiguous(), attention_mask[:, 0, 0, -1].contiguous())
    mcsd_tree = mcsd_tree.on(query.device)
    mcsd_tree.windows.append(sliding_window)
    if query.dtype != value.dtype:  # autocast: what turned them by their positions left them in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu" and sliding_window is None and softcap is None and s_aux is None:
        # On the CPU the mask costs as much as the attention, and all layers share it. Query heads of one key-value
        # head are rows to it: neither a boolean mask nor grouped heads are then converted in every layer.
        batch, heads, rows, width = query.shape
        group = heads // key.shape[1]
        mask = mcsd_tree.additive(key.shape[2], group, query.dtype)
        folded = query.reshape(batch, key.shape[1], group * rows, width)
        output = F.scaled_dot_product_attention(folded, key, value, mask, scale=scaling)
        output = output.reshape(batch, heads, rows, value.shape[3])
    else:
        prefix_lengths = mcsd_tree.prefix_lengths
        if sliding_window is not None:
            prefix_lengths = mcsd_tree.before.get(sliding_window, prefix_lengths)
        output = tree_attention(
            query,
            key,
            value,
            mcsd_tree.ancestors,
            prefix_lengths,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
    return output.transpose(1, 2).contiguous(), None


def _padding_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return attention_mask


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, _padding_mask)


def takes_tree_attention(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be replaced; a model that cannot only logs a warning when it is asked."""
    return bool(model._can_set_attn_implementation())


_INSIDE = Overlapping()  # configurations, which models may have in common, and what they say otherwise


@contextmanager
def tree_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """The model uses tree attention inside this context; after the last of several, what it used before the first."""
    parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = list({id(config): config for config in _with_parts(*parts)}.values())
    with _INSIDE.lock:
        for config in configs:
            _INSIDE.enter(config, config._attn_implementation)
    try:
        with _INSIDE.lock:
            model.set_attn_implementation(NAME)
        yield
    finally:
        with _INSIDE.lock:
            for config in configs:  # outer ones first: each changes those inside it, too
                last, before = _INSIDE.leave(config)
                config._attn_implementation = before if last else NAME


def _with_parts(*configs: Any) -> Iterator[Any]:
    """Configurations, each before the ones inside it."""
    for config in configs:
        yield config
        yield from _with_parts(*(part for key in config.sub_configs if (part := getattr(config, key, None))))
