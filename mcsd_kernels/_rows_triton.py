"""Rows of logits as probability laws, inside a Triton program: statistics, residual masses, draws.

Vocabulary-wide work is done a draw block (`DRAW_BLOCK` consecutive ids) at a time: every block leaves one number in
scratch, and the numbers of a row are reduced together afterwards. So a result depends neither on the batch nor on how
a row was split between programs, provided that every kernel is launched with `options()`: the order in which a block is
summed follows from the number of warps.

A row travels as a tuple, built by the caller from `combine_statistics`:

    row = (row_ptr, scale, cutoff, top, inverse, argmax)

`row_ptr` its first logit; `scale` 1 / temperature, or 0 for temperature 0; `cutoff` the lowest logit its filters keep,
-inf for all; `top` the largest logit; `inverse` 1 / sum of exp((x - top) scale) over the kept logits x; `argmax` the
lowest id of `top`, which only temperature 0 needs (else -1). The law of token v with logit x is
exp((x - top) scale) inverse where x >= cutoff and 0 elsewhere; at temperature 0, 1 at `argmax`.

`BLOCKS` is always `blocks_of(vocab)`, the number of draw blocks rounded up to a power of two; `TILE` is the number of
draw blocks that a pass over the vocabulary loads at once, a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import types

DRAW_BLOCK = tl.constexpr(types.DRAW_BLOCK)
NAN_ROW = tl.constexpr(int(types.Status.NAN_ROW))
EMPTY_ROW = tl.constexpr(int(types.Status.EMPTY_ROW))
INFINITY = tl.constexpr(float("inf"))

# 4 Ki logits a tile: two 16-byte loads of bf16 in flight in each thread of 8 warps.
TILE_BLOCKS = 4


def options() -> dict[str, Any]:
    """The launch options of every kernel that sums over a row.

    Without fused multiply-adds, whose choice is the compiler's, two kernels compute the same law bit for bit. The limit
    on registers keeps NVIDIA's assembler from spilling a few for the sake of more resident programs than there are.
    """
    limit = {"maxnreg": 128} if torch.version.hip is None else {}
    return {"num_warps": 8, "enable_fp_fusion": False, **limit}


def blocks_of(vocab: int) -> int:
    """The number of draw blocks of a row, rounded up to a power of two: the constexpr `BLOCKS`."""
    return int(triton.next_power_of_2(-(-vocab // types.DRAW_BLOCK)))


def tile_of(vocab: int) -> int:
    """The constexpr `TILE`: no result depends on it."""
    return min(TILE_BLOCKS, blocks_of(vocab))


@triton.jit
def load_logits(
    row_ptr,  # logits of one row
    ids,  # int32 block of token ids
    wanted,  # bool: False reads nothing
    VOCAB: tl.constexpr,
):
    """The logits of `ids` as f32; -inf outside the vocabulary, and everywhere if not `wanted`."""
    return tl.load(row_ptr + ids, mask=(ids < VOCAB) & wanted, other=-INFINITY).to(tl.float32)


@triton.jit
def law(
    row,  # tuple
    logits,  # f32 block
    ids,  # int32, of the same shape
):
    """The probabilities of `ids`, whose logits are `logits`; -inf has none."""
    scale, cutoff, top, inverse, argmax = row[1], row[2], row[3], row[4], row[5]
    weights = tl.exp((logits - top) * scale) * inverse
    kept = tl.where(logits >= cutoff, weights, 0.0)
    return tl.where(scale > 0.0, kept, (ids == argmax).to(tl.float32))


@triton.jit
def law_at(
    row,  # tuple
    token,  # int32, in [0, VOCAB)
):
    """The probability of one token."""
    return law(row, tl.load(row[0] + token).to(tl.float32), token)


@triton.jit
def store_statistics(
    row_ptr,  # logits of one row
    scale,  # f32: 1 / temperature, 0 for temperature 0
    cutoff,  # f32
    maxima_ptr,  # [blocks of the row] f32, written: the largest logit of each block, +inf if it holds NaN
    sums_ptr,  # [blocks of the row] f32, written: sum of exp((x - largest) scale) over the kept logits of each block
    first,  # int32: the first block to do
    last,  # int32: one past the last
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """One pass over the draw blocks [first, last) of a row."""
    for start in range(first, last, TILE):
        block = start + tl.arange(0, TILE)
        ids = block[:, None] * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)[None, :]
        logits = load_logits(row_ptr, ids, block[:, None] < last, VOCAB)
        logits = tl.where(logits == logits, logits, INFINITY)  # a maximum drops NaN
        largest = tl.max(logits, 1)
        shift = tl.where(largest == -INFINITY, 0.0, largest)
        weights = tl.where(logits >= cutoff, tl.exp((logits - shift[:, None]) * scale), 0.0)
        tl.store(maxima_ptr + block, largest, mask=block < last)
        tl.store(sums_ptr + block, tl.sum(weights, 1), mask=block < last)


@triton.jit
def combine_statistics(
    row_ptr,  # logits of one row
    scale,  # f32
    maxima_ptr,  # [blocks of the row] f32, from `store_statistics`
    sums_ptr,  # [blocks of the row] f32
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(top, inverse, argmax, status) of a row; with a status other than 0 the others mean nothing."""
    tl.debug_barrier()  # other threads of this program may have stored the statistics
    index = tl.arange(0, BLOCKS)
    there = index < tl.cdiv(VOCAB, DRAW_BLOCK)
    maxima = tl.load(maxima_ptr + index, mask=there, other=-INFINITY)
    sums = tl.load(sums_ptr + index, mask=there, other=0.0)
    top = tl.max(maxima, 0)
    status = tl.where(top == INFINITY, NAN_ROW, tl.where(top == -INFINITY, EMPTY_ROW, 0))
    shift = tl.where(status == 0, top, 0.0)
    total = tl.sum(tl.where(maxima > -INFINITY, sums * tl.exp((maxima - shift) * scale), 0.0), 0)
    inverse = tl.where((status == 0) & (scale > 0.0), 1.0 / total, 0.0)
    argmax = -1
    if scale == 0.0:
        argmax = _first_equal(row_ptr, top, maxima, VOCAB, BLOCKS)
    return top, inverse, argmax, status


@triton.jit
def _first_equal(
    row_ptr,  # logits of one row
    top,  # f32
    maxima,  # [BLOCKS] f32: the largest logit of each block
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The lowest id whose logit is `top`, which is the largest of the maxima."""
    block = tl.min(tl.where(maxima == top, tl.arange(0, BLOCKS), BLOCKS), 0)
    ids = block * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)
    logits = load_logits(row_ptr, ids, True, VOCAB)
    return tl.min(tl.where(logits == top, ids, VOCAB), 0)


@triton.jit
def store_law_masses(
    row,  # tuple
    maxima_ptr,  # [blocks of the row] f32, from `store_statistics`
    sums_ptr,  # [blocks of the row] f32
    masses_ptr,  # [blocks of the row] f32, written; may be `sums_ptr`
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The mass of each draw block under the law itself, from the row's statistics: no pass over the vocabulary."""
    scale, cutoff, top, inverse, argmax = row[1], row[2], row[3], row[4], row[5]
    tl.debug_barrier()
    index = tl.arange(0, BLOCKS)
    there = index < tl.cdiv(VOCAB, DRAW_BLOCK)
    maxima = tl.load(maxima_ptr + index, mask=there, other=-INFINITY)
    sums = tl.load(sums_ptr + index, mask=there, other=0.0)
    tl.debug_barrier()
    # a block has mass only if its most probable token has: a draw never lands in a block of zeros
    best = tl.where(maxima >= cutoff, tl.exp((maxima - top) * scale) * inverse, 0.0)
    masses = tl.where(best > 0.0, sums * best, 0.0)
    masses = tl.where(scale > 0.0, masses, (index == argmax // DRAW_BLOCK).to(tl.float32))
    tl.store(masses_ptr + index, masses, mask=there)


@triton.jit
def residual(
    p,  # row
    q,  # row or None
    use_p,  # f32: 1, or 0 for q alone
    ratio,  # f32: beta / w; -1 for q alone
    ids,  # int32 block of token ids
    VOCAB: tl.constexpr,
):
    """(use_p p - ratio q)_+ of `ids`; a row whose factor is 0 is not read. Without a row q, p itself."""
    if q is None:
        values = law(p, load_logits(p[0], ids, True, VOCAB), ids)
    else:
        p_law = law(p, load_logits(p[0], ids, use_p != 0.0, VOCAB), ids)
        q_law = law(q, load_logits(q[0], ids, ratio != 0.0, VOCAB), ids)
        values = tl.maximum(use_p * p_law - ratio * q_law, 0.0)
    return values


@triton.jit
def store_residual_masses(
    p,  # row
    q,  # row or None
    use_p,  # f32
    ratio,  # f32
    masses_ptr,  # [blocks of the row] f32, written
    first,  # int32: the first block to do
    last,  # int32: one past the last
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """The residual's mass in each of the draw blocks [first, last): one pass over two rows."""
    for start in range(first, last, TILE):
        block = start + tl.arange(0, TILE)
        ids = block[:, None] * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)[None, :]
        values = residual(p, q, use_p, ratio, ids, VOCAB)
        tl.store(masses_ptr + block, tl.sum(values, 1), mask=block < last)


@triton.jit
def block_residual(
    p,  # row
    q,  # row or None
    use_p,  # f32
    ratio,  # f32
    block,  # int32
    without_ptr,  # [count] integers: tokens to leave out; those outside the vocabulary change nothing
    count,  # int32
    VOCAB: tl.constexpr,
):
    """[DRAW_BLOCK] f32: the residual in one draw block, 0 at the tokens to leave out."""
    ids = block * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)
    values = residual(p, q, use_p, ratio, ids, VOCAB)
    for i in range(count):
        values = tl.where(ids == tl.load(without_ptr + i), 0.0, values)
    return values


@triton.jit
def strike_out(
    p,  # row
    q,  # row or None
    use_p,  # f32
    ratio,  # f32
    masses_ptr,  # [blocks of the row] f32, from a `store_..._masses`; those of the struck blocks are written
    without_ptr,  # [count] integers
    count,  # int32
    VOCAB: tl.constexpr,
):
    """Sum the blocks of the tokens to leave out afresh, without them."""
    tl.debug_barrier()
    for i in range(count):
        token = tl.load(without_ptr + i).to(tl.int32)
        if (token >= 0) & (token < VOCAB):
            block = token // DRAW_BLOCK
            values = block_residual(p, q, use_p, ratio, block, without_ptr, count, VOCAB)
            tl.store(masses_ptr + block, tl.sum(values, 0))


@triton.jit
def total_mass(
    masses_ptr,  # [blocks of the row] f32
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The sum of the masses."""
    tl.debug_barrier()
    index = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(masses_ptr + index, mask=index < tl.cdiv(VOCAB, DRAW_BLOCK), other=0.0), 0)


@triton.jit
def first_above(
    weights,  # [SIZE] f32, >= 0
    u,  # f32 in [0, 1)
    SIZE: tl.constexpr,
):
    """The first index whose cumulative weight exceeds u times the total, never one of weight 0; -1 without mass."""
    index = tl.arange(0, SIZE)
    above = tl.cumsum(weights, 0)
    total = tl.sum(tl.where(index == SIZE - 1, above, 0.0), 0)
    positive = weights > 0.0
    found = tl.min(tl.where(positive & (above > total * u), index, SIZE), 0)
    # u * total may be rounded up to the total: then the last one with a weight
    return tl.where(found < SIZE, found, tl.max(tl.where(positive, index, -1), 0))


@triton.jit
def draw(
    p,  # row
    q,  # row or None
    use_p,  # f32
    ratio,  # f32
    masses_ptr,  # [blocks of the row] f32: the residual's, without the tokens to leave out
    u_block,  # f32 in [0, 1)
    u_place,  # f32 in [0, 1)
    without_ptr,  # [count] integers
    count,  # int32
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One token from the residual by inverse CDF, first its block and then its place; -1 without mass (int32)."""
    tl.debug_barrier()
    index = tl.arange(0, BLOCKS)
    masses = tl.load(masses_ptr + index, mask=index < tl.cdiv(VOCAB, DRAW_BLOCK), other=0.0)
    block = first_above(masses, u_block, BLOCKS)
    token = -1
    if block >= 0:
        values = block_residual(p, q, use_p, ratio, block, without_ptr, count, VOCAB)
        token = block * DRAW_BLOCK + first_above(values, u_place, DRAW_BLOCK)
    return token
