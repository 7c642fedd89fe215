"""Rows of logits as probability laws, inside a Triton program: statistics, cut-offs, residual masses, draws.

`verify`, `draw_candidates` and `row_cutoffs` share these functions, so a draft row has the same law, bit for bit, when
it is drawn from and when it is verified. Vocabulary-wide sums are sums of whole numbers: a weight counts in units of
2**-60. Such sums do not depend on their order, so no result depends on the launch, the batch, the alignment of the
rows or the hardware's reduction tree, and an inverse CDF over them has no rounding to guard against. Every kernel is
launched with `row_options`: without fused multiply-adds, which are the compiler's choice, every pass sees the same
weights.

A row travels as a tuple

    row = (pointers, kind, numbers)
    pointers = (row_ptr, words_ptr)
    kind = (bitmask, columns_ptr, laws)
    numbers = (scale, cutoff, top, inverse, only)

`row_ptr` points to its first entry. The numbers come from `find_law`: `top` is the largest logit; the law of token v
with logit x is exp((x - top) scale) inverse where x >= cutoff and 0 elsewhere; with only >= 0 (temperature 0) it is 1
at that token alone. The kind is known when a kernel is compiled, each entry by being None or not; a plain row of logits
has three times None:

* `bitmask`: the row is read as if it held -inf at the tokens whose bit is not set in its words, from `words_ptr` on,
  32 tokens a word. Without it `words_ptr` is any pointer.
* `columns_ptr`: the row's columns are a vocabulary of their own (a draft's). `[VOCAB + 2 + 2 columns]` i32: the
  column of each token, -1 where none; -1 if no two columns have the same token; for each column the next one of the
  same token, or -1; each column's token, -1 where it is none; -1 if every column has a token. The columns of one token
  add up.
* `laws`: the row holds probabilities. It has no numbers and no statistics, for the weight of a token is the entry
  itself: single entries are read as they are, and what needs the mass of the row is a pass over it. Such a row may be
  no law. An entry below 0 has no mass. A NaN, an infinity, or a sum of `LARGEST_SUM` or more spoils the mass that a
  pass finds: a draw block gets the mass -1, see `is_spoilt`, and a sum is NaN.

Where there is no row, `(None, (None, None, None), None)` takes its place: of a tuple that holds None, older compilers
cannot say whether it is None itself.

The statistics of a row are `[2, blocks]` f32: the largest logit of each draw block (`DRAW_BLOCK` consecutive ids), and
the block's sum of exp((x - its largest) scale) over the kept logits. One pass makes them, and they alone give the law
and the mass of each of its blocks. `BLOCKS` is the number of draw blocks rounded up to a power of two; `TILE` is the
number of draw blocks that a pass loads at once, a power of two, on which no result depends.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import types
from ._rules import LOST_DRAFT_MASS
from ._schedule import every_register

# The units of a sum of exp(x - top) leave room for so many tokens.
LARGEST_VOCAB = 1 << 20

DRAW_BLOCK = tl.constexpr(types.DRAW_BLOCK)
NAN_ROW = tl.constexpr(int(types.Status.NAN_ROW))
EMPTY_ROW = tl.constexpr(int(types.Status.EMPTY_ROW))
INFINITY = tl.constexpr(float("inf"))

# Units of a probability (they sum to about 1), and of exp(x - top) in a draw block and in a row.
MASS_UNIT = tl.constexpr(2.0**60)
_BLOCK_UNIT = tl.constexpr(2.0**50)
_ROW_UNIT = tl.constexpr(2.0**42)
# A row with this sum or more is no law; twice as much would overflow.
LARGEST_SUM = tl.constexpr(4.0)

# What is left of a law with a smaller mass is multiplied by a power of two before it is counted in units.
_SMALL_EXPONENT = -20
SMALL_MASS = tl.constexpr(2.0**_SMALL_EXPONENT)
_LIFT_BITS = tl.constexpr(2 * 127 + _SMALL_EXPONENT)  # SMALL_MASS over 1, as exponents that float32 stores
# Less than this is nothing: float32 does not hold the law that it has.
_LOST_DRAFT_MASS = tl.constexpr(LOST_DRAFT_MASS)


def row_options(num_warps: int) -> dict[str, Any]:
    """The launch options of every kernel that reads rows."""
    return {"num_warps": num_warps, "enable_fp_fusion": False, **every_register()}


def blocks_of(vocab: int) -> int:
    """The number of draw blocks of a row."""
    return -(-vocab // types.DRAW_BLOCK)


@triton.jit
def _load_masked(
    pointers,  # tuple
    kind,  # tuple
    ids,  # int32 block of token ids
    there,  # bool, of the same shape
):
    """f32: the logits of `ids`; -inf where they are not `there`, or not allowed."""
    row_ptr, words_ptr = pointers
    bitmask, _, _ = kind
    logits = tl.load(row_ptr + ids, mask=there, other=-INFINITY).to(tl.float32)
    if bitmask is not None:
        words = tl.load(words_ptr + (ids >> 5), mask=there, other=0)
        logits = tl.where(((words >> (ids & 31)) & 1) != 0, logits, -INFINITY)
    return logits


@triton.jit
def load_logits(
    pointers,  # tuple
    kind,  # tuple
    ids,  # int32 block of token ids
    wanted,  # bool: False reads nothing
    VOCAB: tl.constexpr,
):
    """The logits of `ids` as f32; -inf outside the vocabulary, and everywhere if not `wanted`."""
    return _load_masked(pointers, kind, ids, (ids < VOCAB) & wanted)


# ---- statistics


@triton.jit
def store_statistics(
    pointers,  # tuple: of a row of logits
    kind,  # tuple
    scale,  # f32 > 0
    cutoff,  # f32
    statistics_ptr,  # [2, blocks of the row] f32, written; NaN and +inf have the maximum +inf
    first,  # int32: the first block to do
    last,  # int32: one past the last
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """One pass over the draw blocks [first, last) of a row."""
    blocks: tl.constexpr = (VOCAB + DRAW_BLOCK - 1) // DRAW_BLOCK
    for start in range(first, last, TILE):
        block = start + tl.arange(0, TILE)
        ids = block[:, None] * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)[None, :]
        logits = load_logits(pointers, kind, ids, block[:, None] < last, VOCAB)
        logits = tl.where(logits == logits, logits, INFINITY)  # a maximum drops NaN
        largest = tl.max(logits, 1)
        shift = tl.where(largest == -INFINITY, 0.0, largest)
        weights = tl.where(logits >= cutoff, tl.exp((logits - shift[:, None]) * scale), 0.0)
        total = tl.sum((weights * _BLOCK_UNIT).to(tl.int64), 1).to(tl.float32) / _BLOCK_UNIT
        tl.store(statistics_ptr + block, largest, mask=block < last)
        tl.store(statistics_ptr + blocks + block, total, mask=block < last)


@triton.jit
def _load_statistics(statistics_ptr, VOCAB: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS] f32 each: the maxima, the sums."""
    blocks: tl.constexpr = (VOCAB + DRAW_BLOCK - 1) // DRAW_BLOCK
    index = tl.arange(0, BLOCKS)
    maxima = tl.load(statistics_ptr + index, mask=index < blocks, other=-INFINITY)
    return maxima, tl.load(statistics_ptr + blocks + index, mask=index < blocks, other=0.0)


@triton.jit
def _combine_statistics(scale, statistics_ptr, VOCAB: tl.constexpr, BLOCKS: tl.constexpr):
    """(top, sum of exp((x - top) scale) in units of 1 / _ROW_UNIT as float64, status bits) of a row."""
    tl.debug_barrier()  # other threads of this program may have stored the statistics
    maxima, sums = _load_statistics(statistics_ptr, VOCAB, BLOCKS)
    top = tl.max(maxima, 0)
    bits = tl.where(top == INFINITY, NAN_ROW, tl.where(top == -INFINITY, EMPTY_ROW, 0))
    shift = tl.where(bits == 0, top, 0.0)
    weights = sums.to(tl.float64) * tl.exp((maxima - shift) * scale).to(tl.float64)
    total = tl.sum((tl.where(bits == 0, weights, 0.0) * _ROW_UNIT).to(tl.int64), 0).to(tl.float64)
    return top, total, bits


# ---- the cut-off of the filters, found without sorting


@triton.jit
def _order(
    number,  # f32
):
    """uint32: the place of a number in the order of the float32 numbers."""
    bits = number.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _number(
    place,  # uint32
):
    """The float32 at a place; the inverse of `_order`."""
    return tl.where(place >= 0x80000000, place ^ 0x80000000, place ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _search(
    pointers,  # tuple: of a row of logits
    kind,  # tuple
    top,  # f32: the largest logit
    scale,  # f32: 1 / temperature to measure masses; 0 to count tokens
    floor,  # f32: lower logits do not count; the measure of the others is at least `wanted`
    wanted,  # f64: a sum of exp((x - top) scale) in units of 1 / _ROW_UNIT
    reach,  # f32 > 0: how far below the top the answer is expected at most, in logits; only a guess
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest t such that the logits >= max(t, floor) measure at least `wanted`: a logit of the row, or -inf.

    The measure falls as t grows, so the answer lies between a `low` that holds and a `high` that does not. Every pass
    over the row measures two pivots inside this bracket and finds the smallest and the largest logit in it, to which
    the bracket shrinks; when these are equal, that is the answer. The pivots cut the bracket into thirds in the order
    of the float32 numbers, so 22 passes are enough for any row.
    """
    LANES: tl.constexpr = TILE * DRAW_BLOCK
    low = _order(floor)
    high = _order(top) + 1
    first, second = _order(top - reach), _order(top - reach * 0.375)
    while high - low > 1:
        # strictly inside the bracket, so the weight of -inf, which is no number where scale is 0, enters no sum
        first = tl.minimum(tl.maximum(first, low + 1), high - 1)
        second = tl.minimum(tl.maximum(second, low + 1), high - 1)
        measure_1 = tl.zeros([LANES], tl.int64)
        measure_2 = tl.zeros([LANES], tl.int64)
        smallest = tl.full([LANES], INFINITY, tl.float32)
        largest = tl.full([LANES], -INFINITY, tl.float32)
        for start in range(0, VOCAB, LANES):
            logits = load_logits(pointers, kind, start + tl.arange(0, LANES), True, VOCAB)
            weights = (tl.exp((logits - top) * scale) * _ROW_UNIT).to(tl.int64)
            measure_1 += tl.where(logits >= _number(first), weights, 0)
            measure_2 += tl.where(logits >= _number(second), weights, 0)
            smallest = tl.minimum(smallest, tl.where(logits >= _number(low), logits, INFINITY))
            largest = tl.maximum(largest, tl.where(logits < _number(high), logits, -INFINITY))
        holds_1 = tl.sum(measure_1, 0).to(tl.float64) >= wanted
        holds_2 = tl.sum(measure_2, 0).to(tl.float64) >= wanted
        lowest, highest = _order(tl.min(smallest, 0)), _order(tl.max(largest, 0))
        # where an end of the bracket stays, it moves to the nearest logit
        next_low = tl.where(holds_2, second, tl.where(holds_1, first, lowest))
        next_high = tl.where(holds_2, highest + 1, tl.where(holds_1, second, first))
        only = lowest >= highest
        low = tl.where(only, lowest, tl.maximum(next_low, low))
        # a `low` that holds only without rounding crosses `high`; it is the answer then
        high = tl.where(only, low + 1, tl.maximum(tl.minimum(next_high, high), low + 1))
        third = (high - low) // 3
        first, second = low + third, high - 1 - third
    return _number(low)


@triton.jit
def filter_row(
    pointers,  # tuple: of a row of logits
    kind,  # tuple
    settings,  # tuple (scale, top_k, top_p, log_min_p): `_sampling_triton.parameters`
    statistics_ptr,  # [2, blocks of the row] f32, written
    FILTERS: tl.constexpr,  # False: no filter is on
    MEASURED: tl.constexpr,  # the statistics of the unfiltered row are there already
    PASSES: tl.constexpr,  # 3; 2 where only the cut-off is of interest
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Find a row's cut-off, and the statistics of what it keeps.

    Top-k and then top-p ask for the largest cut-off whose kept logits measure enough: their count reaches k, their mass
    reaches top_p of what top-k has kept. Min-p's is a distance from the top.

    Returns:
        the cut-off (-inf at temperature 0, where nothing is filtered); the largest logit; the sum as from
        `_combine_statistics`; status bits, with which the others mean nothing.
    """
    scale, top_k, top_p, log_min_p = settings
    hot = scale > 0.0
    unit = tl.where(hot, scale, 1.0)
    cutoff = tl.full([], -INFINITY, tl.float32)
    if not MEASURED:
        store_statistics(pointers, kind, unit, cutoff, statistics_ptr, 0, tl.cdiv(VOCAB, DRAW_BLOCK), VOCAB, TILE)
    top, total, bits = _combine_statistics(unit, statistics_ptr, VOCAB, BLOCKS)
    if FILTERS:
        sound = hot & (bits == 0)
        # log_min_p / scale to nearly 48 bits, without a division in float64, which is a subroutine on a GPU
        below = (log_min_p.to(tl.float32) / unit).to(tl.float64)
        rest = (log_min_p - below * unit.to(tl.float64)).to(tl.float32) / unit
        least = (top.to(tl.float64) + below + rest.to(tl.float64)).to(tl.float32)
        least = tl.where(sound & (log_min_p > -INFINITY), least, -INFINITY)
        measured = cutoff  # the cut-off of which the statistics are
        for step in range(PASSES):
            if cutoff > measured:
                tl.debug_barrier()  # until here the old statistics may be read
                store_statistics(
                    pointers, kind, unit, cutoff, statistics_ptr, 0, tl.cdiv(VOCAB, DRAW_BLOCK), VOCAB, TILE
                )  # fmt: skip
                _, total, _ = _combine_statistics(unit, statistics_ptr, VOCAB, BLOCKS)
                measured = cutoff
            if sound & (((step == 0) & (top_k > 0.0)) | ((step == 1) & (top_p < 1.0))):
                weight, wanted, reach = unit * 0.0, top_k.to(tl.float64) * _ROW_UNIT, unit * 0.0 + 16.0
                if step == 1:
                    # all the logits up to the answer hold at least 1 - top_p of a mass that is 1 or more
                    weight, wanted, reach = unit, top_p.to(tl.float64) * total, tl.log(VOCAB / (1.0 - top_p)) / unit
                cutoff = _search(pointers, kind, top, weight, cutoff, wanted, reach, VOCAB, TILE)
            if step == 1:
                cutoff = tl.maximum(cutoff, least)
    return cutoff, top, total, bits


# ---- laws


@triton.jit
def find_law(
    pointers,  # tuple: of a row of logits
    kind,  # tuple
    settings,  # tuple (scale, top_k, top_p, log_min_p)
    statistics_ptr,  # [2, blocks of the row] f32, written
    FILTERS: tl.constexpr,
    MEASURED: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(numbers, status bits): a row's law, of no use with any bit, and its statistics."""
    cutoff, top, total, bits = filter_row(
        pointers, kind, settings, statistics_ptr, FILTERS, MEASURED, 3, VOCAB, TILE, BLOCKS
    )  # fmt: skip
    scale = settings[0]
    inverse = (1.0 / tl.where(bits == 0, total, 1.0) * _ROW_UNIT).to(tl.float32)
    only = tl.full([], -1, tl.int32)
    if (scale == 0.0) & (bits == 0):
        maxima, _ = _load_statistics(statistics_ptr, VOCAB, BLOCKS)
        block = tl.min(tl.where(maxima == top, tl.arange(0, BLOCKS), BLOCKS), 0)
        ids = block * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)
        only = tl.min(tl.where(load_logits(pointers, kind, ids, True, VOCAB) == top, ids, VOCAB), 0)
        scale, cutoff, inverse = scale + 1.0, top, inverse * 0.0 + 1.0
    return (scale, cutoff, top, inverse, only), bits


@triton.jit
def law(
    numbers,  # tuple
    logits,  # f32 block
    ids,  # int32, of the same shape
):
    """The probabilities of `ids`, whose logits are `logits`; -inf has none."""
    scale, cutoff, top, inverse, only = numbers
    kept = (logits >= cutoff) & ((ids == only) | (only < 0))
    return tl.where(kept, tl.exp((logits - top) * scale) * inverse, 0.0)


@triton.jit
def _column_laws(
    row,  # tuple
    columns,  # int32 block
    there,  # bool, of the same shape
):
    """f32: the law at a row's own columns, 0 where they are not `there`."""
    pointers, kind, numbers = row
    _, _, laws = kind
    if laws is not None:
        found = tl.load(pointers[0] + columns, mask=there, other=0.0).to(tl.float32)
    else:
        found = law(numbers, _load_masked(pointers, kind, columns, there), columns)
    return found


@triton.jit
def laws_at(
    row,  # tuple
    tokens,  # int32 block of token ids
    there,  # bool: False reads nothing
    VOCAB: tl.constexpr,
):
    """f32: the law at some tokens of the target's vocabulary; 0 where they are not `there`."""
    _, kind, _ = row
    _, columns_ptr, _ = kind
    if columns_ptr is None:
        found = _column_laws(row, tokens, there)
    else:
        columns = tl.load(columns_ptr + tokens, mask=there, other=-1)
        found = _column_laws(row, columns, columns >= 0)
        if tl.load(columns_ptr + VOCAB) >= 0:
            # several columns of a token: as whole numbers, in units of the largest, they have one sum, in whichever
            # order they are chained
            columns = tl.load(columns_ptr + VOCAB + 1 + columns, mask=columns >= 0, other=-1)
            following, most = columns, tl.maximum(found, 0.0)
            while tl.max(following) >= 0:
                most = tl.maximum(most, _column_laws(row, following, following >= 0))
                following = tl.load(columns_ptr + VOCAB + 1 + following, mask=following >= 0, other=-1)
            factor = _power_to_small(most)
            total, units = found, (found * factor * MASS_UNIT).to(tl.int64)
            while tl.max(columns) >= 0:
                more = _column_laws(row, columns, columns >= 0)
                total, units = total + more, units + (more * factor * MASS_UNIT).to(tl.int64)
                columns = tl.load(columns_ptr + VOCAB + 1 + columns, mask=columns >= 0, other=-1)
            whole = units.to(tl.float32) / MASS_UNIT / factor
            found = tl.where((total >= 0.0) & (total < LARGEST_SUM), whole, total)
    return found


@triton.jit
def probability(
    row,  # tuple
    token,  # int32, below the vocabulary's size
    VOCAB: tl.constexpr,
):
    """f64: the law at one token; 0 for a token below 0."""
    _, kind, _ = row
    _, columns_ptr, _ = kind
    if columns_ptr is None:
        found = _column_laws(row, token, token >= 0)
    else:
        one = token + tl.arange(0, 1)
        found = tl.sum(laws_at(row, one, one >= 0, VOCAB), 0)
    return found.to(tl.float64)


@triton.jit
def law_masses(
    row,  # tuple
    statistics_ptr,  # [2, blocks of the row] f32
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """[BLOCKS] i64: the mass of each draw block under the law itself, of logits, without a pass over the row."""
    scale, _, top, inverse, only = row[2]
    maxima, sums = _load_statistics(statistics_ptr, VOCAB, BLOCKS)
    # a block has mass only if its most probable token has: a draw never lands in a block of zeros. None has more than a
    # law: those of tokens struck out of a lifted row, to be summed afresh, would not fit into units.
    best = tl.minimum(tl.exp((maxima - top) * scale) * inverse, LARGEST_SUM)
    masses = (tl.minimum(sums.to(tl.float64) * best.to(tl.float64), LARGEST_SUM) * MASS_UNIT).to(tl.int64)
    masses = tl.where((best * MASS_UNIT).to(tl.int64) > 0, masses, 0)
    here = tl.where(tl.arange(0, BLOCKS) == only // DRAW_BLOCK, 1.0, 0.0)
    return tl.where(only < 0, masses, (here * MASS_UNIT).to(tl.int64))


@triton.jit
def _residuals(
    p,  # row
    q,  # row; without pointers: p itself
    ratio,  # f32
    ids,  # int32 block of token ids
    VOCAB: tl.constexpr,
):
    """f32: (p - ratio q)_+ of `ids`; where the ratio is 0, q is not read. NaN stays where rows are no laws."""
    weights = laws_at(p, ids, ids < VOCAB, VOCAB)
    p_laws, q_laws = p[1][2], q[1][2]
    if q[0] is not None:
        some = tl.where(ratio != 0.0, VOCAB, 0)  # a comparison of numbers would not broadcast in the interpreter
        weights = weights - ratio * laws_at(q, ids, ids < some, VOCAB)
    if (p_laws is not None) or (q_laws is not None):
        weights = tl.where(weights <= 0.0, 0.0, weights)
    elif q[0] is not None:
        weights = tl.maximum(weights, 0.0)
    return weights


@triton.jit
def store_masses(
    p,  # row
    q,  # row; without pointers: p itself
    ratio,  # f32
    masses_ptr,  # [blocks of the row] i64, written
    first,  # int32: the first block to do
    last,  # int32: one past the last
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """The mass of (p - ratio q)_+ in each of the draw blocks [first, last): one pass over two rows, or over p."""
    p_laws, q_laws = p[1][2], q[1][2]
    for start in range(first, last, TILE):
        block = start + tl.arange(0, TILE)
        ids = block[:, None] * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)[None, :]
        weights = _residuals(p, q, ratio, ids, VOCAB)
        masses = tl.sum((weights * MASS_UNIT).to(tl.int64), 1)
        if (p_laws is not None) or (q_laws is not None):
            masses = tl.where(tl.sum(weights, 1) < LARGEST_SUM, masses, -1)
        tl.store(masses_ptr + block, masses, mask=block < last)


@triton.jit
def load_masses(masses_ptr, VOCAB: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS] i64, from `store_masses`."""
    index = tl.arange(0, BLOCKS)
    return tl.load(masses_ptr + index, mask=index < tl.cdiv(VOCAB, DRAW_BLOCK), other=0)


@triton.jit
def block_weights(
    p,  # row
    q,  # row; without pointers: p itself
    ratio,  # f32
    block,  # int32
    without_ptr,  # [count] integers: tokens to leave out; those below 0 change nothing
    count,  # int32, or None to leave none out
    VOCAB: tl.constexpr,
):
    """[DRAW_BLOCK] i64: the weights of one draw block, 0 at the tokens to leave out."""
    ids = block * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)
    weights = (_residuals(p, q, ratio, ids, VOCAB) * MASS_UNIT).to(tl.int64)
    if count is not None:
        for i in range(count):
            weights = tl.where(ids == tl.load(without_ptr + i).to(tl.int32), 0, weights)
    return weights


@triton.jit
def strike_out(
    masses,  # [BLOCKS] i64
    p,  # row
    q,  # row; without pointers: p itself
    ratio,  # f32
    without_ptr,  # [count] integers
    count,  # int32
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The masses with the blocks of the tokens to leave out summed afresh, without them."""
    for i in range(count):
        token = tl.load(without_ptr + i).to(tl.int32)
        if token >= 0:
            block = token // DRAW_BLOCK
            left = tl.sum(block_weights(p, q, ratio, block, without_ptr, count, VOCAB), 0)
            masses = tl.where((tl.arange(0, BLOCKS) == block) & (masses >= 0), left, masses)
    return masses


@triton.jit
def total_of(masses):
    """f64: the sum of the masses, as a probability."""
    return tl.sum(masses, 0).to(tl.float64) / MASS_UNIT


@triton.jit
def is_spoilt(masses):
    """Whether the masses, of rows that came as laws, are those of no law."""
    return (tl.min(masses, 0) < 0) | (tl.sum(masses.to(tl.float64), 0) >= LARGEST_SUM * MASS_UNIT)


@triton.jit
def own_masses(
    row,  # tuple
    statistics_ptr,  # [2, blocks of the row] f32; of a row that came as a law: [blocks] i64, read or written
    measured,  # bool: the masses of such a row are there already
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """[BLOCKS] i64: the mass of each draw block under the law itself, of any row over the target's vocabulary."""
    laws = row[1][2]
    if laws is None:
        masses = law_masses(row, statistics_ptr, VOCAB, BLOCKS)
    else:
        masses_ptr = statistics_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        if not measured:
            no_row = (None, (None, None, None), None)
            store_masses(row, no_row, 0.0, masses_ptr, 0, tl.cdiv(VOCAB, DRAW_BLOCK), VOCAB, TILE)
            tl.debug_barrier()
        masses = load_masses(masses_ptr, VOCAB, BLOCKS)
    return masses


@triton.jit
def lift(
    row,  # tuple: of logits
    statistics_ptr,  # [2, blocks of the row] f32
    tokens_ptr,  # [count] integers: tokens that are left out; those below 0 change nothing
    count,  # int32
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """f32: the power of two that brings the law's largest weight outside some tokens to `SMALL_MASS` or its double.

    1 where nothing is left, or as good as nothing. A row is lifted by multiplying `inverse`; then the weights outside
    the tokens have units enough, and those of the tokens are of no use.
    """
    scale, _, top, inverse, only = row[2]
    index = tl.arange(0, BLOCKS)
    maxima, _ = _load_statistics(statistics_ptr, VOCAB, BLOCKS)
    best = tl.where(only < 0, tl.exp((maxima - top) * scale) * inverse, 0.0)
    for i in range(count):
        token = tl.load(tokens_ptr + i).to(tl.int32)
        if token >= 0:
            ids = token // DRAW_BLOCK * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)
            weights = laws_at(row, ids, ids < VOCAB, VOCAB)
            for j in range(count):
                weights = tl.where(ids == tl.load(tokens_ptr + j).to(tl.int32), 0.0, weights)
            best = tl.where(index == token // DRAW_BLOCK, tl.max(weights, 0), best)
    factor = _power_to_small(tl.max(best, 0))
    return tl.where(inverse * factor < 1.0 / _LOST_DRAFT_MASS * 1024.0, factor, 1.0)


@triton.jit
def _power_to_small(weight):
    """f32: the power of two that brings a weight from 0 to 1 (f32) into [`SMALL_MASS`, 2 `SMALL_MASS`)."""
    exponent = weight.to(tl.int32, bitcast=True) >> 23
    return ((-exponent + _LIFT_BITS) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mass_outside(
    row,  # tuple
    statistics_ptr,  # [2, blocks of the row] f32; not read of a row that came as a law or has columns
    tokens_ptr,  # [count] i32: tokens to leave out; those below 0 change nothing
    count,  # int32
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """f64: the mass of a law outside some tokens; NaN of a row that is no law, 0 for less than `LOST_DRAFT_MASS`.

    Of logits over the target's vocabulary the statistics give it. Else it is a pass over the row's columns, and 1 where
    no token is to be left out, whatever the row's sum. A small mass is found once more, of the lifted law.
    """
    kind = row[1]
    columns_ptr, laws = kind[1], kind[2]
    if (columns_ptr is None) and (laws is None):
        no_row = (None, (None, None, None), None)
        masses = law_masses(row, statistics_ptr, VOCAB, BLOCKS)
        mass = total_of(strike_out(masses, row, no_row, 0.0, tokens_ptr, count, VOCAB, BLOCKS))
        if mass < SMALL_MASS:
            factor = lift(row, statistics_ptr, tokens_ptr, count, VOCAB, BLOCKS)
            scale, cutoff, top, inverse, only = row[2]
            # written out: a function that returns a tuple with None in it does not compile before Triton 3.7
            rest = (row[0], kind, (scale, cutoff, top, inverse * factor, only))
            masses = law_masses(rest, statistics_ptr, VOCAB, BLOCKS)
            mass = total_of(strike_out(masses, rest, no_row, 0.0, tokens_ptr, count, VOCAB, BLOCKS)) / factor
    else:
        mass = tl.full([], 1.0, tl.float64)
        some = tl.full([], -1, tl.int32)
        for i in range(count):
            some = tl.maximum(some, tl.load(tokens_ptr + i))
        if some >= 0:
            mass = known_mass(row, tokens_ptr, count, VOCAB, COLUMNS, TILE)
    return tl.where(mass < _LOST_DRAFT_MASS, 0.0, mass)


@triton.jit
def known_mass(
    row,  # tuple
    tokens_ptr,  # [count] i32: tokens to leave out
    count,  # int32
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """f64: the mass of a row's columns that are some token's, as `mass_outside`; a small one of the lifted law."""
    mass, most = _mass_of_columns(row, tokens_ptr, count, 1.0, VOCAB, COLUMNS, TILE)
    if mass < SMALL_MASS:
        factor = _power_to_small(most)
        mass, most = _mass_of_columns(row, tokens_ptr, count, factor, VOCAB, COLUMNS, TILE)
        mass = mass / factor
    return tl.where(mass < _LOST_DRAFT_MASS, 0.0, mass)


@triton.jit
def _mass_of_columns(
    row,  # tuple
    tokens_ptr,  # [count] i32
    count,  # int32
    factor,  # f32
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The mass of `factor` times a row outside some tokens (f64, NaN of a row that is no law); its largest weight."""
    _, kind, _ = row
    _, columns_ptr, _ = kind
    LANES: tl.constexpr = TILE * DRAW_BLOCK
    units = tl.zeros([LANES], tl.int64)
    total = tl.zeros([LANES], tl.float32)
    most = tl.zeros([LANES], tl.float32)
    for start in range(0, COLUMNS, LANES):
        columns = start + tl.arange(0, LANES)
        tokens = columns
        if columns_ptr is not None:
            tokens = tl.load(columns_ptr + VOCAB + 1 + COLUMNS + columns, mask=columns < COLUMNS, other=-1)
        weights = _column_laws(row, columns, (columns < COLUMNS) & (tokens >= 0))
        weights = tl.where(weights <= 0.0, 0.0, weights)
        for i in range(count):
            weights = tl.where(tokens == tl.load(tokens_ptr + i), 0.0, weights)
        weights = weights * factor
        units += (weights * MASS_UNIT).to(tl.int64)
        total += weights
        most = tl.maximum(most, weights)
    mass = tl.sum(units, 0).to(tl.float64) / MASS_UNIT
    return tl.where(tl.sum(total, 0) < LARGEST_SUM, mass, float("nan")), tl.max(most, 0)


@triton.jit
def _first_above(masses, u):
    """The first lane whose cumulative mass exceeds u times the total, which is positive; its mass is not zero."""
    threshold = (u.to(tl.float64) * tl.sum(masses, 0).to(tl.float64)).to(tl.int64)
    return tl.sum((tl.cumsum(masses, 0) <= threshold).to(tl.int32), 0)


@triton.jit
def draw(
    masses,  # [BLOCKS] i64: of the weights, without the tokens to leave out
    p,  # row
    q,  # row; without pointers: p itself
    ratio,  # f32
    without_ptr,  # [count] integers
    count,  # int32 or None
    u_block,  # f32 in [0, 1)
    u_place,  # f32 in [0, 1)
    VOCAB: tl.constexpr,
):
    """One token from the weights by inverse CDF, first its block and then its place (int32); -1 without mass."""
    token = tl.full([], -1, tl.int32)
    if tl.sum(masses, 0) > 0:
        block = _first_above(masses, u_block)
        token = block * DRAW_BLOCK + _first_above(
            block_weights(p, q, ratio, block, without_ptr, count, VOCAB), u_place
        )  # fmt: skip
    return token
