"""`ancestor_bits`, `node_depths`, `tree_attention_mask` and `keep_path` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORD_BITS = 32
# Words of ancestor bits that a program holds.
_WORDS_AT_ONCE = 4096
_DEPTHS_AT_ONCE = 128
_MASK_ROWS, _MASK_SLOTS = 4, 1024
_MOVES_AT_ONCE = 16
_INTEGERS = {2: torch.int16, 4: torch.int32}


@triton.jit
def count_bits(words):
    """How many bits of each uint32 are set, int32."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    halves = eights + (eights >> 8)
    return ((halves + (halves >> 16)) & 0x3F).to(tl.int32)


# ---- ancestor_bits


@triton.jit(do_not_specialize=["parents_stride_batch", "parents_stride_node", "nodes", "words"])
def _ancestor_bits_kernel(
    parents_ptr,  # [batch, nodes] int32 or int64
    bits_ptr,  # [batch, nodes, words] int32, out
    parents_stride_batch,
    parents_stride_node,
    nodes,  # int32
    words,  # int32
    BLOCK_NODES: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Grid (nodes / BLOCK_NODES, batch): every node walks up to its root and sets the bit of each node it meets."""
    request = tl.program_id(1).to(tl.int64)
    node = tl.program_id(0) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    word = tl.arange(0, BLOCK_WORDS)
    parents_row = parents_ptr + request * parents_stride_batch
    bits = tl.zeros([BLOCK_NODES, BLOCK_WORDS], tl.uint32)
    one = tl.full([BLOCK_NODES], 1, tl.uint32)
    at = tl.where(node < nodes, node, -1)
    while tl.max(at, 0) >= 0:
        own = one << (at & 31).to(tl.uint32)
        bits |= tl.where((at >> 5)[:, None] == word[None, :], own[:, None], 0)
        parent = tl.load(parents_row + at.to(tl.int64) * parents_stride_node, mask=at >= 0, other=-1)
        at = tl.where((parent >= 0) & (parent < at), parent, -1).to(tl.int32)
    tl.store(
        bits_ptr + (request * nodes + node)[:, None] * words + word[None, :],
        bits.to(tl.int32, bitcast=True),
        mask=(node < nodes)[:, None] & (word < words)[None, :],
    )


def ancestor_bits(parents: torch.Tensor) -> torch.Tensor:
    """The operator behind `mcsd_kernels.ancestor_bits`."""
    batch, nodes = (1, *parents.shape)[-2:]
    words = triton.cdiv(nodes, _WORD_BITS)
    bits = parents.new_empty(batch, nodes, words, dtype=torch.int32)
    if not batch:
        return bits
    block_words = triton.next_power_of_2(words)
    block_nodes = min(triton.next_power_of_2(nodes), max(1, _WORDS_AT_ONCE // block_words), 128)
    _ancestor_bits_kernel[(triton.cdiv(nodes, block_nodes), batch)](
        parents_ptr=parents,
        bits_ptr=bits,
        parents_stride_batch=0 if parents.dim() == 1 else parents.stride(0),
        parents_stride_node=parents.stride(-1),
        nodes=nodes,
        words=words,
        BLOCK_NODES=block_nodes,
        BLOCK_WORDS=block_words,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return bits


def ancestor_bits_bytes(batch: int, nodes: int, index_bytes: int = 8) -> int:
    """Bytes that `ancestor_bits` must read and write; a walk up the tree reads its parents from the cache."""
    return batch * nodes * (index_bytes + 4 * -(-nodes // _WORD_BITS))


# ---- node_depths


@triton.jit(do_not_specialize=["rows", "words"])
def _node_depths_kernel(
    ancestors_ptr,  # [rows, words] int32
    depths_ptr,  # [rows] int64, out
    rows,  # int32
    words,  # int32
    BLOCK: tl.constexpr,
):
    """Grid (rows / BLOCK)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.full([BLOCK], -1, tl.int32)
    for word in range(words):
        bits = tl.load(ancestors_ptr + row * words + word, mask=row < rows, other=0)
        depth += count_bits(bits.to(tl.uint32, bitcast=True))
    tl.store(depths_ptr + row, depth.to(tl.int64), mask=row < rows)


def node_depths(ancestors: torch.Tensor) -> torch.Tensor:
    """The operator behind `mcsd_kernels.tree.node_depths`."""
    batch, nodes, words = ancestors.shape
    depths = ancestors.new_empty(batch, nodes, dtype=torch.int64)
    rows = batch * nodes
    if rows:
        _node_depths_kernel[(triton.cdiv(rows, _DEPTHS_AT_ONCE),)](
            ancestors_ptr=ancestors.contiguous(),
            depths_ptr=depths,
            rows=rows,
            words=words,
            BLOCK=_DEPTHS_AT_ONCE,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return depths


# ---- tree_attention_mask


@triton.jit(do_not_specialize=["ancestors_stride_batch", "prefix_lengths_stride", "nodes", "words"])
def _tree_attention_mask_kernel(
    ancestors_ptr,  # [batch or 1, nodes, words] int32
    prefix_lengths_ptr,  # [batch] int32 or int64
    mask_ptr,  # [batch, nodes, total] int8, out
    ancestors_stride_batch,
    prefix_lengths_stride,
    nodes,  # int32
    words,  # int32
    total,  # int32
    BLOCK_NODES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Grid (total / BLOCK_SLOTS, nodes / BLOCK_NODES, batch)."""
    request = tl.program_id(2).to(tl.int64)
    node = tl.program_id(1) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    slot = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    prefix = tl.load(prefix_lengths_ptr + request * prefix_lengths_stride).to(tl.int64)
    other = slot - prefix  # the node in each slot
    inside = (node < nodes)[:, None] & ((other >= 0) & (other < nodes))[None, :]
    row = ancestors_ptr + request * ancestors_stride_batch + node.to(tl.int64) * words
    bits = tl.load(row[:, None] + (other >> 5)[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
    seen = ((bits >> (other & 31).to(tl.uint32)[None, :]) & 1) != 0
    seen = (seen & inside) | (other < 0)[None, :]
    tl.store(
        mask_ptr + (request * nodes + node)[:, None] * total + slot[None, :],
        seen.to(tl.int8),
        mask=(node < nodes)[:, None] & (slot < total)[None, :],
    )


def tree_attention_mask(parents: torch.Tensor, prefix_lengths: torch.Tensor, total: int) -> torch.Tensor:
    """The operator behind `mcsd_kernels.tree_attention_mask`."""
    ancestors = ancestor_bits(parents)
    batch, nodes = prefix_lengths.shape[0], parents.shape[-1]
    mask = parents.new_empty(batch, 1, nodes, total, dtype=torch.bool)
    if not batch:
        return mask
    grid = (triton.cdiv(total, _MASK_SLOTS), triton.cdiv(nodes, _MASK_ROWS), batch)
    _tree_attention_mask_kernel[grid](
        ancestors_ptr=ancestors,
        prefix_lengths_ptr=prefix_lengths,
        mask_ptr=mask.view(torch.int8),
        ancestors_stride_batch=0 if ancestors.shape[0] == 1 else ancestors.stride(0),
        prefix_lengths_stride=prefix_lengths.stride(0),
        nodes=nodes,
        words=ancestors.shape[2],
        total=total,
        BLOCK_NODES=_MASK_ROWS,
        BLOCK_SLOTS=_MASK_SLOTS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return mask


def tree_attention_mask_bytes(batch: int, nodes: int, total: int, index_bytes: int = 8) -> int:
    """Bytes that `tree_attention_mask` must read and write, its ancestor bits included."""
    bits = 4 * nodes * -(-nodes // _WORD_BITS)
    return ancestor_bits_bytes(batch, nodes, index_bytes) + batch * (bits + index_bytes + nodes * total)


# ---- keep_path


@triton.jit(do_not_specialize=["prefix_lengths_stride", "path_stride_batch", "path_stride_step", "length_stride",
                               "slots", "width"])  # fmt: skip
def _keep_path_kernel(
    key_ptr,  # [batch, heads, slots, KEY_DIM] integers of the entries' size, changed
    value_ptr,  # [batch, heads, slots, VALUE_DIM] the same
    prefix_lengths_ptr,  # [batch] int32 or int64
    path_ptr,  # [batch, width] int32 or int64
    length_ptr,  # [batch] int32 or int64
    key_stride_batch,
    key_stride_head,
    key_stride_slot,
    key_stride_dim,
    value_stride_batch,
    value_stride_head,
    value_stride_slot,
    value_stride_dim,
    prefix_lengths_stride,
    path_stride_batch,
    path_stride_step,
    length_stride,
    slots,  # int32
    width,  # int32
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_MOVES: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Grid (heads, batch): a program reads some moves' sources, waits for all its threads, and writes the targets.

    Node ids ascend along a path and step t holds an id of at least t, so what one round writes no later round reads.
    """
    head, request = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    prefix = tl.load(prefix_lengths_ptr + request * prefix_lengths_stride).to(tl.int64)
    length = tl.load(length_ptr + request * length_stride)
    length = tl.minimum(length, width).to(tl.int32)
    in_key, in_value = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    key_row = key_ptr + request * key_stride_batch + head * key_stride_head + in_key[None, :] * key_stride_dim
    value_row = (
        value_ptr + request * value_stride_batch + head * value_stride_head + in_value[None, :] * value_stride_dim
    )
    for start in range(0, length, BLOCK_MOVES):
        step = start + tl.arange(0, BLOCK_MOVES)
        node = tl.load(
            path_ptr + request * path_stride_batch + step.to(tl.int64) * path_stride_step, mask=step < length, other=-1
        ).to(tl.int64)
        source, target = prefix + node, prefix + step
        moves = (node >= 0) & (node != step)
        moves = moves & (source >= 0) & (target >= 0) & (source < slots) & (target < slots)
        of_keys, of_values = (
            moves[:, None] & (in_key < KEY_DIM)[None, :],
            moves[:, None] & (in_value < VALUE_DIM)[None, :],
        )
        keys = tl.load(key_row + source[:, None] * key_stride_slot, mask=of_keys, other=0)
        values = tl.load(value_row + source[:, None] * value_stride_slot, mask=of_values, other=0)
        # a target of one thread is a source of another
        tl.debug_barrier()
        tl.store(key_row + target[:, None] * key_stride_slot, keys, mask=of_keys)
        tl.store(value_row + target[:, None] * value_stride_slot, values, mask=of_values)


def keep_path(
    key: torch.Tensor, value: torch.Tensor, prefix_lengths: torch.Tensor, path: torch.Tensor, length: torch.Tensor
) -> None:
    """The operator behind `mcsd_kernels.keep_path`."""
    batch, heads, slots, key_dim = key.shape
    width, value_dim = path.shape[1], value.shape[3]
    if not batch * heads * width:
        return
    _keep_path_kernel[(heads, batch)](
        key_ptr=key.view(_INTEGERS[key.element_size()]),
        value_ptr=value.view(_INTEGERS[value.element_size()]),
        prefix_lengths_ptr=prefix_lengths,
        path_ptr=path,
        length_ptr=length,
        key_stride_batch=key.stride(0),
        key_stride_head=key.stride(1),
        key_stride_slot=key.stride(2),
        key_stride_dim=key.stride(3),
        value_stride_batch=value.stride(0),
        value_stride_head=value.stride(1),
        value_stride_slot=value.stride(2),
        value_stride_dim=value.stride(3),
        prefix_lengths_stride=prefix_lengths.stride(0),
        path_stride_batch=path.stride(0),
        path_stride_step=path.stride(1),
        length_stride=length.stride(0),
        slots=slots,
        width=width,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_MOVES=min(_MOVES_AT_ONCE, triton.next_power_of_2(width)),
        BLOCK_KEY=triton.next_power_of_2(key_dim),
        BLOCK_VALUE=triton.next_power_of_2(value_dim),
        num_warps=4,
        enable_fp_fusion=False,
    )


def keep_path_bytes(moves: int, heads: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes that `keep_path` must read and write for this many entries that move, all else being small beside them."""
    return 2 * moves * heads * (key_dim + value_dim) * itemsize
