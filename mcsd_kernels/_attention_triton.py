"""`tree_attention` in Triton: attention over a split prefix and the tree behind it, and the sum over the splits.

A program takes one key-value head, a block of rows (all query heads of that head and some nodes, packed as
node * group + head, so that a key is read once for all of them) and one split of the prefix. The prefix needs no mask
but at its end and for a window; the last split then walks the tree in tiles of 32 keys, for which a row needs exactly
one word of its ancestor bits. With more than one split, a second kernel adds the parts, each weighted by the
exponential of its log-sum-exp. Nothing of size nodes x slots exists.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._schedule import every_register, processors
from ._tree_triton import count_bits
from .attention import LARGEST_TRITON_HEAD, empty_output

_WORD_BITS = tl.constexpr(32)
_LOG2_E = tl.constexpr(1.4426950408889634)
# No program gets fewer keys than this to itself: writing and adding its part would cost more.
_KEYS_PER_SPLIT = 256
# Entries of the parts that a program of the second kernel adds, of one row or of several.
_COMBINED_ENTRIES = 2048
# Of one row, more than this would not fit its registers.
_MOST_COMBINED = 1 << 14


@dataclass(frozen=True)
class AttentionLaunch:
    """Launch choices of `tree_attention`.

    Args:
        block_rows: rows (node, query head) of a program, 16 or more.
        block_keys: keys of the prefix that it reads at once.
        num_warps: of a program.
        num_stages: loads in flight, in blocks of keys.
        resident: programs that a multiprocessor is expected to hold.
        splits: programs among which a prefix is divided.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    resident: int
    splits: int = 1


# (bytes of an entry, head dimension) -> launches by their rows; both keys are upper bounds. Not timed yet: these are
# large tiles with which no kernel spills registers.
_LAUNCHES = {
    (2, 64): (
        AttentionLaunch(16, 128, 4, 3, 3),
        AttentionLaunch(32, 128, 4, 3, 2),
        AttentionLaunch(64, 64, 4, 3, 2),
        AttentionLaunch(128, 128, 8, 3, 1),
    ),
    (2, 128): (
        AttentionLaunch(16, 64, 4, 3, 2),
        AttentionLaunch(32, 64, 4, 3, 2),
        AttentionLaunch(64, 64, 8, 3, 1),
        AttentionLaunch(128, 64, 8, 3, 1),
    ),
    (2, 256): (AttentionLaunch(16, 32, 4, 2, 2), AttentionLaunch(32, 32, 8, 2, 1)),
    (4, 64): (AttentionLaunch(16, 32, 4, 2, 2),),
    (4, 128): (AttentionLaunch(16, 32, 8, 2, 1),),
    (4, 256): (AttentionLaunch(16, 16, 8, 2, 1),),
}


@functools.lru_cache(maxsize=256)
def choose_attention_launch(
    head_dim: int,
    itemsize: int,
    rows: int,
    slots: int,
    heads: int,
    multiprocessors: int,
    *,
    masked: bool = False,
    amd: bool = False,
) -> AttentionLaunch:
    """The launch of a call; a function of shapes alone, so that no length is copied from the device.

    Args:
        head_dim: the larger one of keys and values.
        itemsize: bytes of an entry.
        rows: nodes * query heads a key-value head.
        slots: keys that a row can see.
        heads: batch * key-value heads.
        multiprocessors: of the device.
        masked: a window or a soft-cap works on the scores, which then need more registers.
        amd: AMD's multiprocessors have less shared memory, and their threads fewer registers.
    """
    launches = next(of for (size, dim), of in _LAUNCHES.items() if size == itemsize and head_dim <= dim)
    if masked and head_dim > 64:  # where 64 rows spill on sm_80
        launches = tuple(one for one in launches if one.block_rows != 64)
    launch = next((one for one in launches if rows <= one.block_rows), launches[-1])
    programs = -(-rows // launch.block_rows) * heads
    # one wave: a program that starts when others have ended lengthens the call by its whole time
    wave = multiprocessors * launch.resident // max(programs, 1)
    splits = min(wave, slots // _KEYS_PER_SPLIT, _MOST_COMBINED // triton.next_power_of_2(head_dim))
    return AttentionLaunch(
        launch.block_rows,
        max(launch.block_keys // 2, 16) if masked or amd else launch.block_keys,
        launch.num_warps,
        min(launch.num_stages, 2) if amd else launch.num_stages,
        launch.resident,
        max(splits, 1),
    )


# ---- device functions


@triton.jit
def _tanh(x):
    """tanh to the last digits of float32: by exponentials, and near 0, where they cancel, by a polynomial."""
    square = x * x
    # tanh(x) / x - 1 on |x| < 0.55, fitted for the least relative error of tanh, 6e-9
    small = -0.0062824466 * square + 0.021077738
    small = small * square - 0.053853853
    small = small * square + 0.13332602
    small = small * square - 0.33333318
    small = x + x * square * small
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.3025, small, tl.where(x < 0.0, -large, large))


@triton.jit
def _load_slots(
    base_ptr,  # the head's first slot
    table_ptr,  # the request's row of the block table, or None
    slots,  # [KEYS] int32
    exists,  # [KEYS] bool; None: all of them
    column,  # [BLOCK_DIM] int32
    stride_block,
    stride_slot,
    stride_dim,
    blocks,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
):
    """`[KEYS, BLOCK_DIM]`: the keys or values in these slots, 0 past DIM and where nothing exists."""
    if table_ptr is None:
        offset = slots.to(tl.int64) * stride_slot
    else:
        if exists is None:
            entry = tl.load(table_ptr + slots // PAGE)
        else:
            entry = tl.load(table_ptr + slots // PAGE, mask=exists, other=0)
        # entries past a request's end may be anything, and no row sees what they name
        entry = tl.minimum(tl.maximum(entry.to(tl.int64), 0), blocks - 1)
        offset = entry * stride_block + (slots % PAGE).to(tl.int64) * stride_slot
    pointers = base_ptr + offset[:, None] + (column * stride_dim)[None, :]
    if exists is None:
        if column.shape[0] == DIM:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=exists[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _scores(
    query,  # [ROWS, BLOCK_HEAD] where CHUNK is as much; else of no meaning, and each chunk is loaded here
    query_row,  # [ROWS] pointers to their rows
    query_stride_dim,
    real,  # [ROWS] bool
    base_ptr,  # here and below: see `_load_slots`
    table_ptr,
    slots,
    exists,
    stride_block,
    stride_slot,
    stride_dim,
    blocks,
    inner,
    softcap,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`[ROWS, KEYS]` f32: query . key, or softcap * tanh(query . key * inner)."""
    if CHUNK == BLOCK_HEAD:
        column = tl.arange(0, BLOCK_HEAD)
        keys = _load_slots(
            base_ptr, table_ptr, slots, exists, column, stride_block, stride_slot, stride_dim, blocks, DIM, PAGE
        )
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    else:
        scores = tl.zeros([real.shape[0], slots.shape[0]], tl.float32)
        for part in tl.static_range(BLOCK_HEAD // CHUNK):
            column = part * CHUNK + tl.arange(0, CHUNK)
            keys = _load_slots(
                base_ptr, table_ptr, slots, exists, column, stride_block, stride_slot, stride_dim, blocks, DIM, PAGE
            )
            some = tl.load(
                query_row[:, None] + (column * query_stride_dim)[None, :],
                mask=real[:, None] & (column < DIM)[None, :],
                other=0.0,
            )
            scores = tl.dot(some, tl.trans(keys), scores, input_precision=PRECISION)
    if SOFTCAP:
        scores = softcap * _tanh(scores * inner)
    return scores


@triton.jit
def _fold(
    scores,  # [ROWS, KEYS] f32, -inf where hidden
    values,  # [KEYS, BLOCK_DIM]
    top,  # [ROWS] f32: the largest score so far
    total,  # [ROWS] f32: sum of exp2((score - top) * factor)
    mixed,  # [ROWS, BLOCK_DIM] f32: the same sum over values
    factor,  # f32 > 0
    PRECISION: tl.constexpr,
):
    """The running softmax after these keys: (top, total, mixed)."""
    highest = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(highest == float("-inf"), 0.0, highest * factor)
    weights = tl.exp2(scores * factor - shift[:, None])
    shrink = tl.exp2(top * factor - shift)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
    return highest, total, mixed


# ---- kernels

_LENGTHS = ["nodes", "words", "slots", "splits", "window", "blocks"]


@triton.jit(do_not_specialize=[*_LENGTHS, "prefix_lengths_stride", "ancestors_stride_batch", "ancestors_stride_row"])
def _tree_attention_kernel(
    query_ptr,  # [batch, q_heads, nodes, HEAD_DIM] f16, bf16 or f32
    key_ptr,  # [batch, kv_heads, slots, HEAD_DIM]; with a block table [blocks, kv_heads, PAGE, HEAD_DIM]
    value_ptr,  # [batch, kv_heads, slots, VALUE_DIM]; with a block table [blocks, kv_heads, PAGE, VALUE_DIM]
    ancestors_ptr,  # [batch or 1, nodes, words] int32
    prefix_lengths_ptr,  # [batch] int32 or int64
    block_table_ptr,  # [batch, blocks a request] int32 or int64; None
    sinks_ptr,  # [q_heads] f16, bf16 or f32; None
    output_ptr,  # [batch, q_heads, nodes, VALUE_DIM], out if there is one split
    parts_ptr,  # [batch, q_heads, nodes, splits, VALUE_DIM] f32, out if there are more; None
    sums_ptr,  # [batch, q_heads, nodes, splits] f32, out with them: log2 of the sum of exp2(score * factor)
    query_stride_batch,
    query_stride_head,
    query_stride_node,
    query_stride_dim,
    key_stride_batch,  # of a block, with a block table
    key_stride_head,
    key_stride_slot,
    key_stride_dim,
    value_stride_batch,
    value_stride_head,
    value_stride_slot,
    value_stride_dim,
    ancestors_stride_batch,
    ancestors_stride_row,
    prefix_lengths_stride,
    block_table_stride,
    output_stride_batch,
    output_stride_head,
    output_stride_node,
    nodes,  # int32: rows of `ancestors`
    words,  # int32
    slots,  # int32: of a request
    splits,  # int32
    window,  # int32; of no meaning where not WINDOW
    blocks,  # int32: in the cache, with a block table
    factor,  # f32 > 0: of what the softmax exponentiates, in powers of 2
    softcap,  # f32; with `inner` of no meaning where not SOFTCAP
    inner,  # f32: scale / softcap
    GROUP: tl.constexpr,  # query heads a key-value head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,  # slots a block, with a block table
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,  # whether there is more than one split
    PRECISION: tl.constexpr,  # of a product of float32 matrices
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,  # HEAD_DIM and VALUE_DIM, rounded up to a power of 2
    BLOCK_VALUE: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of a query that are multiplied at a time; all are kept only if that is BLOCK_HEAD
    BLOCK_WORDS: tl.constexpr,  # words, rounded up to a power of 2; of no meaning where not WINDOW
):
    """Grid (nodes * GROUP / BLOCK_ROWS, kv_heads * splits, batch): neighbours read the same keys, from the L2 cache."""
    request = tl.program_id(2).to(tl.int64)
    head, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    node, query_head = row // GROUP, (head * GROUP + row % GROUP).to(tl.int64)
    real = node < nodes
    wide_node = node.to(tl.int64)

    in_head, in_value = tl.arange(0, BLOCK_HEAD), tl.arange(0, BLOCK_VALUE)
    query_row = (
        query_ptr + request * query_stride_batch + query_head * query_stride_head + wide_node * query_stride_node
    )
    query = query_row
    if CHUNK == BLOCK_HEAD:
        query = tl.load(
            query_row[:, None] + (in_head * query_stride_dim)[None, :],
            mask=real[:, None] & (in_head < HEAD_DIM)[None, :],
            other=0.0,
        )
    bits_row = ancestors_ptr + request * ancestors_stride_batch + wide_node * ancestors_stride_row
    prefix = tl.load(prefix_lengths_ptr + request * prefix_lengths_stride)
    prefix = tl.minimum(tl.maximum(prefix, 0), slots).to(tl.int32)

    key_base, value_base = (
        key_ptr + head.to(tl.int64) * key_stride_head,
        value_ptr + head.to(tl.int64) * value_stride_head,
    )
    table_row = block_table_ptr
    if block_table_ptr is None:
        key_base += request * key_stride_batch
        value_base += request * value_stride_batch
    else:
        table_row += request * block_table_stride

    # [BLOCK_ROWS]: the first slot of the prefix that a row sees, and how many of its first ancestors it does not see
    first_seen, unseen = tl.zeros([BLOCK_ROWS], tl.int32), tl.zeros([BLOCK_ROWS], tl.int32)
    first = 0
    if WINDOW:
        every = tl.arange(0, BLOCK_WORDS)
        inside = real[:, None] & (every < words)[None, :]
        words_of_row = tl.load(bits_row[:, None] + every[None, :], mask=inside, other=0)
        # depth + 1 - window; the words in one load, since after a loop the compiler would not pipeline the next one
        behind = tl.sum(count_bits(words_of_row.to(tl.uint32, bitcast=True)), 1) - window
        first_seen = tl.where(real, tl.maximum(prefix + behind, 0), prefix)
        first = tl.minimum(tl.min(first_seen, 0), prefix)
        unseen = tl.maximum(behind, 0)

    chunk = tl.cdiv(tl.cdiv(prefix - first + nodes, splits), BLOCK_KEYS) * BLOCK_KEYS
    begin = tl.minimum(first + split * chunk, prefix)
    end = tl.minimum(begin + chunk, prefix)
    whole = begin + (end - begin) // BLOCK_KEYS * BLOCK_KEYS

    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mixed = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)

    index = tl.arange(0, BLOCK_KEYS)
    for start in range(begin, whole, BLOCK_KEYS):
        scores = _scores(
            query, query_row, query_stride_dim, real, key_base, table_row, start + index, None,
            key_stride_batch, key_stride_slot, key_stride_dim, blocks, inner, softcap,
            HEAD_DIM, PAGE, SOFTCAP, PRECISION, BLOCK_HEAD, CHUNK,
        )  # fmt: skip
        if WINDOW:
            scores = tl.where((start + index)[None, :] >= first_seen[:, None], scores, float("-inf"))
        values = _load_slots(
            value_base, table_row, start + index, None, in_value,
            value_stride_batch, value_stride_slot, value_stride_dim, blocks, VALUE_DIM, PAGE,
        )  # fmt: skip
        top, total, mixed = _fold(scores, values, top, total, mixed, factor, PRECISION)

    if whole < end:
        slot = whole + index
        scores = _scores(
            query, query_row, query_stride_dim, real, key_base, table_row, slot, slot < end,
            key_stride_batch, key_stride_slot, key_stride_dim, blocks, inner, softcap,
            HEAD_DIM, PAGE, SOFTCAP, PRECISION, BLOCK_HEAD, CHUNK,
        )  # fmt: skip
        scores = tl.where((slot[None, :] < end) & (slot[None, :] >= first_seen[:, None]), scores, float("-inf"))
        values = _load_slots(
            value_base, table_row, slot, slot < end, in_value,
            value_stride_batch, value_stride_slot, value_stride_dim, blocks, VALUE_DIM, PAGE,
        )  # fmt: skip
        top, total, mixed = _fold(scores, values, top, total, mixed, factor, PRECISION)

    lane = tl.arange(0, _WORD_BITS)
    for word in range(tl.where(split == splits - 1, words, 0)):
        bits = tl.load(bits_row + word, mask=real, other=0).to(tl.uint32, bitcast=True)
        if WINDOW:
            # ids ascend with depth: the ancestors that the window hides are the lowest bits
            while tl.max(tl.where(bits != 0, unseen, 0), 0) > 0:
                hidden = (bits != 0) & (unseen > 0)
                bits = tl.where(hidden, bits & tl.sub(bits, 1, sanitize_overflow=False), bits)
                unseen -= hidden.to(tl.int32)
        if tl.max((bits != 0).to(tl.int32), 0) > 0:
            slot = prefix + word * _WORD_BITS + lane
            exists = slot < slots
            visible = (((bits[:, None] >> lane[None, :].to(tl.uint32)) & 1) != 0) & exists[None, :]
            scores = _scores(
                query, query_row, query_stride_dim, real, key_base, table_row, slot, exists,
                key_stride_batch, key_stride_slot, key_stride_dim, blocks, inner, softcap,
                HEAD_DIM, PAGE, SOFTCAP, PRECISION, BLOCK_HEAD, CHUNK,
            )  # fmt: skip
            scores = tl.where(visible, scores, float("-inf"))
            # what no row sees may hold anything, NaN too, and 0 * NaN is NaN
            seen = tl.max(visible.to(tl.int32), 0) > 0
            values = _load_slots(
                value_base, table_row, slot, exists, in_value,
                value_stride_batch, value_stride_slot, value_stride_dim, blocks, VALUE_DIM, PAGE,
            )  # fmt: skip
            values = tl.where(seen[:, None], values, 0.0)
            top, total, mixed = _fold(scores, values, top, total, mixed, factor, PRECISION)

    # The same as above, put differently: what is the same expression would be kept in registers through the loops.
    again = row + GROUP
    node, query_head = again // GROUP - 1, (head * GROUP + again % GROUP).to(tl.int64)
    real = node < nodes
    wide_node = node.to(tl.int64)
    # NaN counts as something: it must reach the output
    peak = tl.where(total == 0.0, float("-inf"), top * factor)
    if SPLIT:
        out = (request * (tl.num_programs(1) // splits * GROUP) + query_head) * nodes + wide_node
        out = out * splits + split
        tl.store(sums_ptr + out, peak + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=real)
        mixed = mixed / total[:, None]
        tl.store(
            parts_ptr + out[:, None] * VALUE_DIM + in_value[None, :],
            mixed,
            mask=(real & (total != 0.0))[:, None] & (in_value < VALUE_DIM)[None, :],
        )
    else:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + query_head).to(tl.float32) * _LOG2_E
            shift = tl.maximum(peak, sink)
            shift = tl.where(shift == float("-inf"), 0.0, shift)
            shrink = tl.exp2(peak - shift)
            mixed = mixed * shrink[:, None]
            total = total * shrink + tl.exp2(sink - shift)
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        output_row = output_ptr + request * output_stride_batch + query_head * output_stride_head
        tl.store(
            (output_row + wide_node * output_stride_node)[:, None] + in_value[None, :],
            mixed.to(output_ptr.dtype.element_ty),
            mask=real[:, None] & (in_value < VALUE_DIM)[None, :],
        )


@triton.jit(do_not_specialize=["rows", "q_heads", "nodes", "splits"])
def _combine_kernel(
    parts_ptr,  # [batch, q_heads, nodes, splits, VALUE_DIM] f32
    sums_ptr,  # [batch, q_heads, nodes, splits] f32; -inf: the part was not written
    sinks_ptr,  # [q_heads] f16, bf16 or f32; None
    output_ptr,  # [batch, q_heads, nodes, VALUE_DIM], out
    output_stride_batch,
    output_stride_head,
    output_stride_node,
    rows,  # int32: batch * q_heads * nodes
    q_heads,  # int32
    nodes,  # int32
    splits,  # int32
    VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Grid (rows / BLOCK_ROWS): the mean of a row's parts, weighted by exp2 of their sums; a sink weighs in with 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    node, head, request = row % nodes, row // nodes % q_heads, row // nodes // q_heads
    split, column = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_VALUE)
    real = row < rows
    place = row[:, None] * splits + split[None, :]
    sums = tl.load(sums_ptr + place, mask=real[:, None] & (split < splits)[None, :], other=float("-inf"))
    parts = tl.load(
        parts_ptr + place[:, :, None] * VALUE_DIM + column[None, None, :],
        mask=(sums != float("-inf"))[:, :, None] & (column < VALUE_DIM)[None, None, :],
        other=0.0,
    )
    shift = tl.max(sums, 1)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * _LOG2_E
        shift = tl.maximum(shift, sink)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    weights = tl.exp2(sums - shift[:, None])
    total = tl.sum(weights, 1)
    if sinks_ptr is not None:
        total += tl.exp2(sink - shift)
    mixed = tl.sum(weights[:, :, None] * parts, 1) / tl.where(total == 0.0, 1.0, total)[:, None]
    output_row = output_ptr + request * output_stride_batch + head * output_stride_head + node * output_stride_node
    tl.store(
        output_row[:, None] + column[None, :],
        mixed.to(output_ptr.dtype.element_ty),
        mask=real[:, None] & (column < VALUE_DIM)[None, :],
    )


# ---- what a call must move and multiply


def attention_bytes(
    batch: int,
    q_heads: int,
    kv_heads: int,
    nodes: int,
    prefix: int,
    head_dim: int,
    itemsize: int,
    *,
    trees: int = 1,
    splits: int = 1,
) -> int:
    """Bytes that `tree_attention` must read and write: each key and value once, whatever the number of query heads.

    Args:
        prefix: slots before the tree, the same for every request.
        itemsize: bytes of an entry of queries, keys and values.
        trees: first axis of `ancestors`.
        splits: with more than one, the parts in float32 are written and read again: not a must, but our price.
    """
    keys_and_values = 2 * batch * kv_heads * (prefix + nodes) * head_dim * itemsize
    rows = batch * q_heads * nodes
    queries_and_outputs = 2 * rows * head_dim * itemsize
    small = trees * nodes * -(-nodes // _WORD_BITS.value) * 4 + batch * 4
    parts = 2 * rows * splits * (head_dim + 1) * 4 if splits > 1 else 0
    return keys_and_values + queries_and_outputs + small + parts


def attention_flops(batch: int, q_heads: int, nodes: int, prefix: int, head_dim: int, tree_pairs: int) -> int:
    """Floating-point operations of the two matrix products, a multiplication and an addition being two.

    Args:
        prefix: slots before the tree, the same for every request.
        tree_pairs: pairs of a node and a node that it sees, itself included: the bits set in a tree's `ancestors`.
    """
    return 4 * batch * q_heads * head_dim * (nodes * prefix + tree_pairs)


# ---- the wrapper


def tree_attention(
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
    *,
    launch: AttentionLaunch | None = None,
) -> torch.Tensor:
    """The operator behind `mcsd_kernels.tree_attention`; arguments as there, already checked.

    Args:
        launch: in place of the table's choice.

    Raises:
        ValueError: a head dimension above 256.
    """
    batch, q_heads, nodes, head_dim = query.shape
    kv_heads, page, value_dim = key.shape[1], key.shape[2], value.shape[3]
    if max(head_dim, value_dim) > LARGEST_TRITON_HEAD:
        raise ValueError(
            f'backend: expected "torch" for head dimensions above {LARGEST_TRITON_HEAD}, got "triton" for'
            f" {max(head_dim, value_dim)}"
        )
    amd = torch.version.hip is not None
    slots = page if block_table is None else page * block_table.shape[1]
    group = q_heads // kv_heads
    if window is not None and window >= slots:
        window = None  # no key is that far behind
    if scale <= 0.0:  # the softmax is taken of scores that grow with the kernel's
        query, scale = (torch.zeros_like(query), 1.0) if scale == 0.0 else (-query, -scale)
    ancestors = ancestors if ancestors.stride(-1) == 1 else ancestors.contiguous()
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    reach = slots if window is None else min(slots, window + nodes)
    if launch is None:
        launch = choose_attention_launch(
            max(head_dim, value_dim),
            query.element_size(),
            nodes * group,
            reach,
            batch * kv_heads,
            processors(query.device),
            masked=window is not None or softcap is not None,
            amd=amd,
        )
    splits = launch.splits

    output = empty_output(query, value, "triton")
    if output.numel() == 0:
        return output
    parts = sums = None
    if splits > 1:
        parts = query.new_empty(batch, q_heads, nodes, splits, value_dim, dtype=torch.float32)
        sums = query.new_empty(batch, q_heads, nodes, splits, dtype=torch.float32)

    block_head = max(16, triton.next_power_of_2(head_dim))
    _tree_attention_kernel[(triton.cdiv(nodes * group, launch.block_rows), kv_heads * splits, batch)](
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        ancestors_ptr=ancestors,
        prefix_lengths_ptr=prefix_lengths,
        block_table_ptr=block_table,
        sinks_ptr=sinks,
        output_ptr=output,
        parts_ptr=parts,
        sums_ptr=sums,
        query_stride_batch=query.stride(0),
        query_stride_head=query.stride(1),
        query_stride_node=query.stride(2),
        query_stride_dim=query.stride(3),
        key_stride_batch=key.stride(0),
        key_stride_head=key.stride(1),
        key_stride_slot=key.stride(2),
        key_stride_dim=key.stride(3),
        value_stride_batch=value.stride(0),
        value_stride_head=value.stride(1),
        value_stride_slot=value.stride(2),
        value_stride_dim=value.stride(3),
        ancestors_stride_batch=0 if ancestors.shape[0] == 1 else ancestors.stride(0),
        ancestors_stride_row=ancestors.stride(1),
        prefix_lengths_stride=prefix_lengths.stride(0),
        block_table_stride=0 if block_table is None else block_table.stride(0),
        output_stride_batch=output.stride(0),
        output_stride_head=output.stride(1),
        output_stride_node=output.stride(2),
        nodes=nodes,
        words=ancestors.shape[2],
        slots=slots,
        splits=splits,
        window=window or 0,
        blocks=key.shape[0],
        factor=(scale if softcap is None else 1.0) * _LOG2_E.value,
        softcap=softcap or 0.0,
        inner=0.0 if softcap is None else scale / softcap,
        GROUP=group,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        PAGE=0 if block_table is None else page,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        SPLIT=splits > 1,
        # NVIDIA multiplies float32 without tensor cores, where a long row's operands need more than all registers;
        # three products of tf32 have about the same accuracy
        PRECISION="tf32x3" if query.dtype == torch.float32 and head_dim > 32 and not amd else "ieee",
        BLOCK_ROWS=launch.block_rows,
        BLOCK_KEYS=launch.block_keys,
        BLOCK_HEAD=block_head,
        BLOCK_VALUE=max(16, triton.next_power_of_2(value_dim)),
        # three tf32 copies of a long query are more than all registers, too
        CHUNK=block_head // 2 if query.dtype == torch.float32 and block_head > 64 else block_head,
        BLOCK_WORDS=1 if window is None else triton.next_power_of_2(ancestors.shape[2]),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
        **(every_register() if query.element_size() == 2 else {}),  # float32 tiles take them all by themselves
    )
    if splits > 1:
        rows, block_splits = batch * q_heads * nodes, triton.next_power_of_2(splits)
        block_value = triton.next_power_of_2(value_dim)
        block_rows = max(1, min(_COMBINED_ENTRIES // block_value, 16) // block_splits)
        _combine_kernel[(triton.cdiv(rows, block_rows),)](
            parts_ptr=parts,
            sums_ptr=sums,
            sinks_ptr=sinks,
            output_ptr=output,
            output_stride_batch=output.stride(0),
            output_stride_head=output.stride(1),
            output_stride_node=output.stride(2),
            rows=rows,
            q_heads=q_heads,
            nodes=nodes,
            splits=splits,
            VALUE_DIM=value_dim,
            BLOCK_ROWS=block_rows,
            BLOCK_SPLITS=block_splits,
            BLOCK_VALUE=block_value,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output
