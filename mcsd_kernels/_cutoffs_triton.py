"""The lowest logit that a row's filters keep, found without sorting: a search over the float32 numbers themselves.

Top-k and top-p both ask for the largest number t such that the kept logits >= t measure at least so much: their count
reaches k, or their mass reaches top_p of the total. The measure falls as t grows, so the answer is bracketed between a
`low` that holds and a `high` that does not. Every pass over the row measures two pivots inside the bracket and finds
the smallest and the largest logit in it, to which the bracket shrinks; when these are equal, that is the answer. The
pivots cut the bracket into thirds in the order of the float32 numbers, so 22 passes are enough for any row.
The answer is a logit of the row, exactly; the sums behind it do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _rows_triton as rows_triton
from . import _sampling_triton as sampling_triton
from ._rows_triton import INFINITY, load_logits
from ._sampling_triton import parameters

# Logits that a pass loads at once; every lane keeps sums of its own until the end of the pass.
LANES = 2048


@triton.jit
def _place(
    number,  # f32
):
    """uint32: the place of a number in the order of the float32 numbers."""
    bits = number.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _number(
    place,  # uint32
):
    """The float32 at a place; the inverse of `_place`."""
    return tl.where(place >= 0x80000000, place ^ 0x80000000, place ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _measure(
    row_ptr,  # logits of one row
    top,  # f32: the largest logit
    scale,  # f32: 1 / temperature for masses; 0 for counts
    floor,  # f32: lower logits do not count
    first,  # f32: pivots
    second,
    low,  # f32: the bracket [low, high)
    high,
    VOCAB: tl.constexpr,
    LANES: tl.constexpr,
):
    """One pass: the measure of the logits >= each pivot, the smallest logit >= low, and the largest below high."""
    measure_1 = tl.zeros([LANES], tl.float32)
    measure_2 = tl.zeros([LANES], tl.float32)
    smallest = tl.full([LANES], INFINITY, tl.float32)
    largest = tl.full([LANES], -INFINITY, tl.float32)
    for start in range(0, VOCAB, LANES):
        logits = load_logits(row_ptr, start + tl.arange(0, LANES), True, VOCAB)
        weights = tl.where(logits >= floor, tl.exp((logits - top) * scale), 0.0)
        measure_1 += tl.where(logits >= first, weights, 0.0)
        measure_2 += tl.where(logits >= second, weights, 0.0)
        smallest = tl.minimum(smallest, tl.where(logits >= low, logits, INFINITY))
        largest = tl.maximum(largest, tl.where(logits < high, logits, -INFINITY))
    return tl.sum(measure_1, 0), tl.sum(measure_2, 0), tl.min(smallest, 0), tl.max(largest, 0)


@triton.jit
def _search(
    row_ptr,  # logits of one row
    top,  # f32: the largest logit
    scale,  # f32: 1 / temperature for masses; 0 for counts
    floor,  # f32: lower logits do not count; the measure of the others is at least `wanted`
    wanted,  # f32
    reach,  # f32 > 0: how far below the top the answer is expected at most, in logits; only a guess
    VOCAB: tl.constexpr,
    LANES: tl.constexpr,
):
    """The largest t such that the logits >= max(t, floor) measure at least `wanted`: a logit, or -inf."""
    low = _place(floor)  # holds
    high = _place(top) + 1  # does not hold, or nothing above the top has to be looked at
    first, second = _place(top - reach), _place(top - reach * 0.375)
    while high - low > 1:
        # strictly inside the bracket, so the weight of -inf, which is no number where scale is 0, enters no sum
        first = tl.minimum(tl.maximum(first, low + 1), high - 1)
        second = tl.minimum(tl.maximum(second, low + 1), high - 1)
        measure_1, measure_2, smallest, largest = _measure(
            row_ptr, top, scale, floor, _number(first), _number(second), _number(low), _number(high),
            VOCAB, LANES,
        )  # fmt: skip
        holds_1, holds_2 = measure_1 >= wanted, measure_2 >= wanted
        # where an end of the bracket stays, it moves to the nearest logit
        next_low = tl.where(holds_2, second, tl.where(holds_1, first, _place(smallest)))
        next_high = tl.where(holds_2, _place(largest) + 1, tl.where(holds_1, second, first))
        only = smallest >= largest
        low = tl.where(only, _place(smallest), tl.maximum(next_low, low))
        high = tl.where(only, low + 1, tl.minimum(next_high, high))
        third = (high - low) // 3
        first, second = low + third, high - 1 - third
    return _number(low)


@triton.jit
def cutoff_of(
    row_ptr,  # logits of one row
    scale,  # f32: 1 / temperature, or 0 for temperature 0
    top_k,  # f32: 0 is off
    top_p,  # f32: 1 is off
    log_min_p,  # f64: -inf is off
    VOCAB: tl.constexpr,
    LANES: tl.constexpr,
):
    """f32: a row's filters keep the logits >= it; -inf if none filters, at temperature 0, and for a broken row."""
    cutoff = tl.full([], -INFINITY, tl.float32)
    if (scale > 0.0) & ((top_k > 0.0) | (top_p < 1.0) | (log_min_p > -INFINITY)):
        largest = tl.full([LANES], -INFINITY, tl.float32)
        for start in range(0, VOCAB, LANES):
            logits = load_logits(row_ptr, start + tl.arange(0, LANES), True, VOCAB)
            largest = tl.maximum(largest, tl.where(logits == logits, logits, INFINITY))
        top = tl.max(largest, 0)
        if (top > -INFINITY) & (top < INFINITY):
            # log_min_p / scale to nearly 48 bits, without a division in float64, which is a subroutine on a GPU
            below = (log_min_p.to(tl.float32) / scale).to(tl.float64)
            rest = (log_min_p - below * scale.to(tl.float64)).to(tl.float32) / scale
            least = (top.to(tl.float64) + below + rest.to(tl.float64)).to(tl.float32)
            least = tl.where(log_min_p > -INFINITY, least, -INFINITY)
            for filter in range(2):
                if ((filter == 0) & (top_k > 0.0)) | ((filter == 1) & (top_p < 1.0)):
                    unit, wanted, reach = scale * 0.0, top_k, scale * 0.0 + 16.0
                    if filter == 1:
                        total, _, _, _ = _measure(
                            row_ptr, top, scale, cutoff, cutoff, cutoff, cutoff, top, VOCAB, LANES
                        )  # fmt: skip
                        # all the logits up to the answer hold at least 1 - top_p of a mass that is 1 or more
                        unit, wanted, reach = scale, top_p * total, tl.log(VOCAB / (1.0 - top_p)) / scale
                    cutoff = _search(row_ptr, top, unit, cutoff, wanted, reach, VOCAB, LANES)
            cutoff = tl.maximum(cutoff, least)
    return cutoff


@triton.jit
def _row_cutoffs_kernel(
    logits_ptr,  # [rows, VOCAB] f16, bf16 or f32
    cutoffs_ptr,  # [rows] f32, out
    logits_stride_row,
    sampling,  # tuple: `_sampling_triton.arguments`
    VOCAB: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    scale, top_k, top_p, log_min_p, sound = parameters(sampling, row, VOCAB)
    scale = tl.where(sound, scale, 0.0)  # nothing is filtered
    cutoff = cutoff_of(logits_ptr + row * logits_stride_row, scale, top_k, top_p, log_min_p, VOCAB, LANES)
    tl.store(cutoffs_ptr + row, cutoff)


def lanes_of(vocab: int) -> int:
    """The constexpr `LANES`: short rows need fewer."""
    return min(LANES, max(1024, int(triton.next_power_of_2(vocab))))


def row_cutoffs_bytes(rows: int, vocab: int, itemsize: int) -> int:
    """The bytes that `row_cutoffs` must read and write: every logit once, from then on they are in the cache."""
    return rows * (vocab * itemsize + 4)


def row_cutoffs(logits: torch.Tensor, numbers: list[float], tensors: list[torch.Tensor | None]) -> torch.Tensor:
    """See `cutoffs.row_cutoffs`."""
    count, vocab = logits.shape
    cutoffs = torch.empty(count, dtype=torch.float32, device=logits.device)
    if not count:
        return cutoffs
    _row_cutoffs_kernel[(count,)](
        logits_ptr=logits,
        cutoffs_ptr=cutoffs,
        logits_stride_row=logits.stride(0),
        sampling=sampling_triton.arguments(numbers, tensors),
        VOCAB=vocab,
        LANES=lanes_of(vocab),
        **rows_triton.options(),
    )
    return cutoffs
