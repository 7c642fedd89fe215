"""Token trees: ancestor bits, the dense attention mask, and moving the accepted path inside a key-value cache."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks as check
from ._backend import choose
from ._library import operator


def ancestor_bits(parents: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Which nodes of its tree each node may attend to, as packed bits.

    Args:
        parents: `[nodes]` or `[batch, nodes]` int32 or int64; ``parents[0] = -1``, ``parents[i] < i``, -1 for padding.
            A parent that is out of order counts as -1.
        backend: "torch" or "triton"; None to choose by device.

    Returns:
        `[batch, nodes, ceil(nodes / 32)]` int32 (batch is 1 for `[nodes]`): bit j % 32 of word j // 32 of row i is set
        if j is i or an ancestor of i.

    Raises:
        ValueError: a wrong shape or dtype, or a backend that cannot run here.
    """
    _check_parents(parents)
    bits: torch.Tensor = _ANCESTOR_BITS(parents, choose(backend, parents.device))
    return bits


def node_depths(ancestors: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """How many ancestors each node has besides itself: its position behind the prefix.

    Args:
        ancestors: `[batch or 1, rows, words]` int32, from `ancestor_bits`.
        backend: "torch" or "triton"; None to choose by device.

    Returns:
        `[batch or 1, rows]` int64, 0 for a root; -1 for a row without any bit.

    Raises:
        ValueError: a wrong shape or dtype, or a backend that cannot run here.
    """
    check.tensor("ancestors", ancestors, (None, None, None), (torch.int32,))
    depths: torch.Tensor = _NODE_DEPTHS(ancestors, choose(backend, ancestors.device))
    return depths


def tree_attention_mask(
    parents: torch.Tensor, prefix_lengths: torch.Tensor, total: int, *, backend: str | None = None
) -> torch.Tensor:
    """The dense attention mask of token trees whose nodes follow their prefix, for SDPA and (made additive) eager.

    Args:
        parents: `[nodes]` or `[batch, nodes]`, as for `ancestor_bits`.
        prefix_lengths: `[batch]` int32 or int64: request b's prefix fills slots 0 to prefix_lengths[b] - 1, its node j
            lies in slot prefix_lengths[b] + j.
        total: slots, the size of the key axis.
        backend: "torch" or "triton"; None to choose by device.

    Returns:
        `[batch, 1, nodes, total]` bool: true at the prefix and at the node's ancestors and itself.

    Raises:
        ValueError: a wrong shape or dtype, `total` below the number of nodes, or a backend that cannot run here.
    """
    _check_parents(parents)
    check.tensor("prefix_lengths", prefix_lengths, (None,), check.INTEGERS)
    if parents.dim() == 2 and parents.shape[0] != prefix_lengths.shape[0]:
        raise ValueError(f"prefix_lengths: expected [{parents.shape[0]}], got {list(prefix_lengths.shape)}")
    check.same_device("parents", parents, {"prefix_lengths": prefix_lengths})
    total = check.whole("total", total, parents.shape[-1])
    mask: torch.Tensor = _TREE_ATTENTION_MASK(parents, prefix_lengths, total, choose(backend, parents.device))
    return mask


def keep_path(
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lengths: torch.Tensor,
    path: torch.Tensor,
    length: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """In place: move the accepted nodes' keys and values to the end of the prefix; nothing else moves.

    Args:
        key, value: `[batch, kv_heads, slots, head_dim]`, any strides; layers may be folded into the head axis. One may
            be a part of the other, as where keys and values are read from one latent cache.
        prefix_lengths: `[batch]` int32 or int64; node j lies in slot prefix_lengths[b] + j.
        path: `[batch, depth + 1]` int32 or int64, as `verify` returns it: entry t moves to slot
            prefix_lengths[b] + t. Ids ascend, as they do on every way down a tree. What would move from or to a slot
            that there is not stays.
        length: `[batch]` int32 or int64, how many entries of `path` are valid.
        backend: "torch" or "triton"; None to choose by device.

    Raises:
        ValueError: a wrong shape, dtype or device, or a backend that cannot run here.
    """
    check.tensor("key", key, (None, None, None, None), check.FLOATS)
    check.tensor("value", value, (*key.shape[:3], None), check.FLOATS)
    batch = key.shape[0]
    check.tensor("prefix_lengths", prefix_lengths, (batch,), check.INTEGERS)
    check.tensor("path", path, (batch, None), check.INTEGERS)
    check.tensor("length", length, (batch,), check.INTEGERS)
    check.same_device("key", key, {"value": value, "prefix_lengths": prefix_lengths, "path": path, "length": length})
    _KEEP_PATH(key, value, prefix_lengths, path, length, choose(backend, key.device))


def _check_parents(parents: torch.Tensor) -> None:
    if not isinstance(parents, torch.Tensor) or parents.dim() not in (1, 2) or parents.shape[-1] == 0:
        got = list(parents.shape) if isinstance(parents, torch.Tensor) else type(parents).__name__
        raise ValueError(f"parents: expected a tensor [nodes] or [batch, nodes] with at least one node, got {got}")
    check.tensor("parents", parents, tuple(parents.shape), check.INTEGERS)


def _backend_of(name: str, twin: Any) -> Any:
    """What runs an operator: `name` in `_tree_triton`, or its torch twin, as the last argument says."""

    def run(*arguments: Any) -> Any:
        *rest, backend = arguments
        if backend == "triton":
            from . import _tree_triton  # only here may triton be imported

            return getattr(_tree_triton, name)(*rest)
        return twin(*rest)

    return run


def _ancestor_bits(parents: torch.Tensor) -> torch.Tensor:
    parents = parents.reshape(-1, parents.shape[-1]).long()
    batch, nodes = parents.shape
    device = parents.device
    node = torch.arange(nodes, device=device)
    up = torch.where((parents >= 0) & (parents < node), parents, node)  # a root points at itself
    bits = torch.zeros(batch, nodes, -(-nodes // 32), dtype=torch.int32, device=device)
    own = torch.ones((), dtype=torch.int32, device=device) << (node % 32).int()
    bits.scatter_(2, (node // 32).expand(batch, nodes)[..., None], own.expand(batch, nodes)[..., None])
    for _ in range(max(nodes - 1, 1).bit_length()):  # each round doubles the ancestors a node knows
        bits |= bits.gather(1, up[..., None].expand_as(bits))
        up = up.gather(1, up)
    return bits


def _node_depths(ancestors: torch.Tensor) -> torch.Tensor:
    return unpack_bits(ancestors, 32 * ancestors.shape[-1]).sum(-1) - 1


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """`[..., words]` int32 as `[..., count]` bool."""
    node = torch.arange(count, device=bits.device)
    return (bits[..., node // 32] >> (node % 32).int() & 1).bool()


def dense_mask(visible: torch.Tensor, prefix_lengths: torch.Tensor, total: int) -> torch.Tensor:
    """`[batch, rows, total]` bool from `visible` `[batch or 1, rows, nodes]` bool over the tree's slots."""
    batch = prefix_lengths.shape[0]
    rows, nodes = visible.shape[1:]
    slot = torch.arange(total, device=visible.device)
    offset = slot - prefix_lengths[:, None]  # [batch, total]: the node in each slot
    inside = ((offset >= 0) & (offset < nodes))[:, None]
    index = offset.clamp(0, nodes - 1)[:, None].expand(batch, rows, total)
    return (visible.expand(batch, -1, -1).gather(2, index) & inside) | (offset < 0)[:, None]


def _tree_attention_mask(parents: torch.Tensor, prefix_lengths: torch.Tensor, total: int) -> torch.Tensor:
    visible = unpack_bits(_ancestor_bits(parents), parents.shape[-1])
    return dense_mask(visible, prefix_lengths.long(), total)[:, None]


def _keep_path(
    key: torch.Tensor, value: torch.Tensor, prefix_lengths: torch.Tensor, path: torch.Tensor, length: torch.Tensor
) -> None:
    slots = key.shape[2]
    moves = [
        (request, start + node, start + place)
        for request, (nodes, count, start) in enumerate(
            zip(path.tolist(), length.tolist(), prefix_lengths.tolist(), strict=True)
        )
        for place, node in enumerate(nodes[: max(count, 0)])
        if node != place and node >= 0 and 0 <= start + place < slots and 0 <= start + node < slots
    ]
    if not moves:
        return
    # down the tree numbers grow, so whatever a move overwrites was moved before
    if key.is_cpu and len(moves) <= _ONE_BY_ONE and all(source > target for _, source, target in moves):
        for request, source, target in moves:
            for cache in (key, value):
                of_slots = cache[request].transpose(0, 1)
                of_slots[target] = of_slots[source]
        return
    batch, sources, targets = torch.tensor(moves, device=key.device).unbind(1)
    rows = key.transpose(1, 2), value.transpose(1, 2)
    kept = [some[batch, sources] for some in rows]  # both first: they may share memory
    for some, of_path in zip(rows, kept, strict=True):
        some[batch, targets] = of_path


_ONE_BY_ONE = 8


def _fake_bits(parents: torch.Tensor, backend: str) -> torch.Tensor:
    batch, nodes = (1, *parents.shape)[-2:]
    return parents.new_empty(batch, nodes, -(-nodes // 32), dtype=torch.int32)


def _fake_depths(ancestors: torch.Tensor, backend: str) -> torch.Tensor:
    return ancestors.new_empty(ancestors.shape[:2], dtype=torch.int64)


def _fake_mask(parents: torch.Tensor, prefix_lengths: torch.Tensor, total: int, backend: str) -> torch.Tensor:
    return parents.new_empty(prefix_lengths.shape[0], 1, parents.shape[-1], total, dtype=torch.bool)


def _fake_keep(
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lengths: torch.Tensor,
    path: torch.Tensor,
    length: torch.Tensor,
    backend: str,
) -> None:
    return None


_ANCESTOR_BITS = operator(
    "ancestor_bits(Tensor parents, str backend) -> Tensor", _backend_of("ancestor_bits", _ancestor_bits), _fake_bits
)
_NODE_DEPTHS = operator(
    "node_depths(Tensor ancestors, str backend) -> Tensor", _backend_of("node_depths", _node_depths), _fake_depths
)
_TREE_ATTENTION_MASK = operator(
    "tree_attention_mask(Tensor parents, Tensor prefix_lengths, SymInt total, str backend) -> Tensor",
    _backend_of("tree_attention_mask", _tree_attention_mask),
    _fake_mask,
)
_KEEP_PATH = operator(
    "keep_path(Tensor(a!) key, Tensor(b!) value, Tensor prefix_lengths, Tensor path, Tensor length, str backend) -> ()",
    _backend_of("keep_path", _keep_path),
    _fake_keep,
)
