"""`tree_attention`: attention of a token tree's nodes to their prefix and their ancestors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import _checks as check
from ._backend import choose
from ._library import operator
from .tree import dense_mask, unpack_bits

# Longest row of keys or values that the Triton kernel takes.
LARGEST_TRITON_HEAD = 256


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ancestors: torch.Tensor,
    prefix_lengths: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of tree nodes over a key-value cache that holds the prefix and then the tree's nodes.

    Node i sees every prefix slot, itself and its ancestors. Its position is prefix + depth(i), and so is that of the
    node in a tree slot; a sliding window counts these positions, not slots.

    Args:
        query: `[batch, q_heads, rows, head_dim]`, f16, bf16 or f32; the rows are the nodes of a tree, or some of them
            (one level), in the order of `ancestors`.
        key, value: `[batch, kv_heads, slots, head_dim]`, q_heads a multiple of kv_heads. Request b's prefix fills slots
            0 to prefix_lengths[b] - 1, its node j lies in slot prefix_lengths[b] + j; later slots are not read. With
            `block_table`: `[blocks, kv_heads, block_size, head_dim]`.
        ancestors: `[batch or 1, rows, words]` int32, from `ancestor_bits`: bit j of row i says that row i sees node j.
        prefix_lengths: `[batch]` int32 or int64, in slots.
        scale: of the scores; None: 1 / sqrt(head_dim).
        window: a key is seen if its position is less than this behind the query's; None: no limit.
        softcap: scores become softcap * tanh(score / softcap); None: they do not.
        block_table: `[batch, blocks a request]` int32 or int64: slot s of request b is entry s % block_size of block
            block_table[b, s // block_size].
        sinks: `[q_heads]`, a score a head that takes part in the softmax and has no value; None: none.
        backend: "torch" or "triton"; None to choose by device. Triton's interpreter (3.6 to 3.9) multiplies the bits of
            bf16 instead of the numbers: give it float32 or f16.

    Returns:
        like `query`, with the last axis of `value`. A row that sees nothing is zero.

    Raises:
        ValueError: a wrong shape, dtype, device or number, or a backend that cannot run here.
    """
    check.tensor("query", query, (None, None, None, None), check.FLOATS)
    batch, heads, rows, width = query.shape
    check.tensor("key", key, (batch if block_table is None else None, None, None, width), (query.dtype,))
    check.tensor("value", value, (*key.shape[:3], None), (query.dtype,))
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"query: expected q_heads to be a multiple of kv_heads {key.shape[1]}, got {heads}")
    words = ancestors.shape[-1] if isinstance(ancestors, torch.Tensor) and ancestors.dim() == 3 else None
    check.tensor("ancestors", ancestors, (None, rows, words), (torch.int32,))
    if ancestors.shape[0] not in (1, batch):
        raise ValueError(f"ancestors: expected a first axis of 1 or {batch}, got {ancestors.shape[0]}")
    check.tensor("prefix_lengths", prefix_lengths, (batch,), check.INTEGERS)
    if block_table is not None:
        check.tensor("block_table", block_table, (batch, None), check.INTEGERS)
    if sinks is not None:
        check.tensor("sinks", sinks, (heads,), check.FLOATS)
    check.same_device(
        "query",
        query,
        {
            "key": key,
            "value": value,
            "ancestors": ancestors,
            "prefix_lengths": prefix_lengths,
            "block_table": block_table,
            "sinks": sinks,
        },
    )
    if window is not None:
        window = check.whole("window", window, 1)
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"softcap: expected a finite positive number or None, got {softcap!r}")
    chosen = choose(backend, query.device)
    if backend is None and max(width, value.shape[3]) > LARGEST_TRITON_HEAD:
        chosen = "torch"
    output: torch.Tensor = _OPERATOR(
        query,
        key,
        value,
        ancestors,
        prefix_lengths,
        width**-0.5 if scale is None else float(scale),
        window,
        softcap,
        block_table,
        sinks,
        chosen,
    )
    return output


def _tree_attention(*arguments: Any) -> torch.Tensor:
    *rest, backend = arguments
    if backend == "triton":
        from . import _attention_triton  # only here may triton be imported

        return _attention_triton.tree_attention(*rest)
    # the output has the query's dtype, whatever is around
    with torch.autocast(rest[0].device.type, enabled=False):
        return _torch_attention(*rest)


def _torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ancestors: torch.Tensor,
    prefix_lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    block_table: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    heads = query.shape[1]
    if block_table is not None:
        key, value = _gather_blocks(key, block_table), _gather_blocks(value, block_table)
    nodes = min(ancestors.shape[-1] * 32, key.shape[2])
    hides = window is not None  # whether a row may see nothing without being told so by its bits
    if query.is_cpu:
        prefixes = prefix_lengths.clamp(0, key.shape[2]).tolist()
        shown = _host_mask(ancestors.numpy(), prefixes, nodes, key.shape[2], window)
        seen: np.ndarray[Any, Any] = np.asarray(shown.any(1))
        first = int(seen.any(0).argmax()) if hides else 0
        hides = hides and not shown.any(-1).all()
        key, value = key[:, :, first : shown.shape[2]], value[:, :, first : shown.shape[2]]
        mask, hidden = torch.from_numpy(shown[:, :, first:]), None
        if not seen[:, first:].all():
            hidden = torch.from_numpy(~seen[:, None, first:, None])
    else:
        visible, prefix = unpack_bits(ancestors, nodes), prefix_lengths.long().clamp(0, key.shape[2])
        mask = dense_mask(visible, prefix, key.shape[2])
        if window is not None:
            mask &= _inside_window(visible, prefix, key.shape[2], window)
        hidden = ~mask.any(1)[:, None, :, None]
    if hidden is not None:  # what nobody sees may hold anything, NaN too, and 0 * NaN is NaN
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    group = heads // key.shape[1]
    if softcap is None and sinks is None:
        output = F.scaled_dot_product_attention(query, key, value, mask[:, None], scale=scale, enable_gqa=group > 1)
        return torch.where(mask.any(-1)[:, None, :, None], output, 0.0) if hides else output
    # the heads that share keys are rows of one product: [batch, kv_heads, group, rows, slots]
    rows = query.unflatten(1, (key.shape[1], group)).flatten(2, 3)
    scores = (rows.float() @ key.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(2, (group, -1)).masked_fill(~mask[:, None, None], -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    if sinks is not None:
        sinks = sinks.float().reshape(-1, group, 1, 1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    # a row that sees nothing has a total of 0 and weights of 0
    weights = weights / torch.where(total > 0, total, 1.0)
    output = weights.flatten(2, 3) @ value.float()
    return output.reshape(*query.shape[:3], value.shape[-1]).to(query.dtype)


def _host_mask(
    ancestors: np.ndarray[Any, Any], prefix_lengths: list[int], nodes: int, slots: int, window: int | None
) -> np.ndarray[Any, Any]:
    """`[batch, rows, slots in use]` bool: `dense_mask` and `_inside_window` on a host, in a tenth of their time."""
    used = min(slots, max(prefix_lengths, default=0) + nodes)
    bits = np.unpackbits(np.ascontiguousarray(ancestors).view(np.uint8), axis=-1, bitorder="little", count=nodes)
    bits = bits.astype(bool)
    batch, rows = len(prefix_lengths), bits.shape[1]
    mask = np.zeros((batch, rows, used), bool)
    near = bits
    if window is not None:
        held = bits.sum(-1)  # a row's depth + 1
        near = bits & (held[..., None] - bits.cumsum(-1) < window)
    for b, prefix in enumerate(prefix_lengths):
        b_or_0 = b if len(bits) > 1 else 0
        mask[b, :, :prefix] = True
        if window is not None:
            mask[b, :, :prefix] = np.arange(min(prefix, used)) >= (prefix + held[b_or_0] - window)[:, None]
        mask[b, :, prefix : prefix + nodes] = near[b_or_0][:, : max(used - prefix, 0)]
    return mask


def _gather_blocks(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """`[batch, kv_heads, blocks * block_size, head_dim]`; an entry outside the cache is past a request's end."""
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]  # [batch, blocks, heads, block_size, dim]
    return pages.transpose(1, 2).flatten(2, 3)


def _inside_window(visible: torch.Tensor, prefix: torch.Tensor, used: int, window: int) -> torch.Tensor:
    """`[batch, rows, used]` bool: slots less than `window` positions behind each row's own."""
    depth = visible.sum(-1) - 1  # [batch or 1, rows]
    slot = torch.arange(used, device=prefix.device)
    position = prefix[:, None] + depth
    in_prefix = position[..., None] - slot < window
    # an ancestor's depth is the number of ancestors of this row with a lower id: bits run upwards along a path
    steps = visible.sum(-1, keepdim=True) - visible.cumsum(-1)
    near = dense_mask(visible & (steps < window), prefix, used)
    return torch.where(slot < prefix[:, None, None], in_prefix, near)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ancestors: torch.Tensor,
    prefix_lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    block_table: torch.Tensor | None,
    sinks: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    return empty_output(query, value, backend)


def empty_output(query: torch.Tensor, value: torch.Tensor, backend: str) -> torch.Tensor:
    """Where the result goes: in Triton in the memory order of the query, so that a caller's transpose costs nothing."""
    if backend == "triton" and value.shape[-1] == query.shape[-1] and query.stride(-1) == 1:
        return torch.empty_like(query)
    return query.new_empty(*query.shape[:3], value.shape[-1])


_OPERATOR = operator(
    "tree_attention(Tensor query, Tensor key, Tensor value, Tensor ancestors, Tensor prefix_lengths, float scale,"
    " SymInt? window, float? softcap, Tensor? block_table, Tensor? sinks, str backend) -> Tensor",
    _tree_attention,
    _fake,
)
