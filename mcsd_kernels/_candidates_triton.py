"""`draw_candidates` in Triton: one program a row, one pass over it, and then one draw block a candidate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _sampling_triton as sampling_triton
from ._random_triton import uniform
from ._rows_triton import (
    DRAW_BLOCK,
    INFINITY,
    SMALL_MASS,
    block_weights,
    blocks_of,
    draw,
    find_law,
    law_masses,
    lift,
    load_logits,
    probability,
    row_options,
    strike_out,
    total_of,
)
from ._sampling_triton import parameters
from ._schedule import choose_row_launch
from .random import CANDIDATE_STREAM


@triton.jit
def _take_most_probable(
    row,  # tuple
    count,  # int32: how many
    tokens_ptr,  # [count] int64, written: in descending order, the lower id first among equals; -1 where none has mass
    maxima_ptr,  # [blocks of the row] f32: the largest logit of each block; of those not taken, on return
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The `count` most probable tokens of a row."""
    index = tl.arange(0, BLOCKS)
    there = index < tl.cdiv(VOCAB, DRAW_BLOCK)
    largest, token = tl.full([], INFINITY, tl.float32), tl.full([], -1, tl.int32)
    for i in range(count):
        tl.debug_barrier()
        maxima = tl.load(maxima_ptr + index, mask=there, other=-INFINITY)
        best = tl.max(maxima, 0)
        block = tl.min(tl.where(maxima == best, index, BLOCKS), 0)
        ids = block * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)
        logits = load_logits(row[0], row[1], ids, True, VOCAB)
        # what has been taken is all that comes before (largest, token) in the order of taking
        taken = (logits > largest) | ((logits == largest) & (ids <= token))
        left = tl.where(taken, -INFINITY, logits)
        found = tl.min(tl.where((left == best) & ~taken, ids, VOCAB), 0)
        if (found < VOCAB) & (probability(row, tl.where(found < VOCAB, found, -1), VOCAB) > 0.0):
            largest, token = best, found
            tl.store(tokens_ptr + i, found.to(tl.int64))
            tl.store(maxima_ptr + block, tl.max(tl.where(ids == found, -INFINITY, left), 0))


@triton.jit(do_not_specialize=["step", "k"])
def _draw_candidates_kernel(
    logits_ptr,  # [rows, VOCAB] f16, bf16 or f32
    seeds_ptr,  # [rows] int64
    steps_ptr,  # [rows] int64 or int32; None: `step` for every row
    nodes_ptr,  # [rows] int64 or int32; None: 0 for every row
    tokens_ptr,  # [rows, k] int64, out
    statistics_ptr,  # [rows, 2, blocks] f32, scratch
    logits_stride_row,
    seeds_stride,
    steps_stride,
    nodes_stride,
    sampling,  # tuple: `_sampling_triton.arguments`
    step,  # int64
    k,
    PROPOSAL: tl.constexpr,
    FILTERS: tl.constexpr,
    STREAM: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A row's candidates in draw order; grid (rows,)."""
    request = tl.program_id(0).to(tl.int64)
    statistics_ptr += request * 2 * tl.cdiv(VOCAB, DRAW_BLOCK)
    tokens_ptr += request * k
    for start in range(0, k, 128):
        place = start + tl.arange(0, 128)
        tl.store(tokens_ptr + place, tl.full([128], -1, tl.int64), mask=place < k)

    scale, top_k, top_p, log_min_p, sound = parameters(sampling, request, VOCAB)
    if sound:
        plain, no_row = (None, None, None), (None, (None, None, None), None)
        row_ptr = logits_ptr + request * logits_stride_row
        numbers, bits = find_law(
            (row_ptr, row_ptr), plain, (scale, top_k, top_p, log_min_p), statistics_ptr,
            FILTERS, False, VOCAB, TILE, BLOCKS,
        )  # fmt: skip
        row = ((row_ptr, row_ptr), plain, numbers)
        if bits == 0:
            masses = law_masses(row, statistics_ptr, VOCAB, BLOCKS)
            certain = 0
            if PROPOSAL == "point" or PROPOSAL == "greedy":
                certain = k if PROPOSAL == "point" else k - 1
                _take_most_probable(row, certain, tokens_ptr, statistics_ptr, VOCAB, BLOCKS)
                tl.debug_barrier()
            if PROPOSAL == "greedy":
                masses = strike_out(masses, row, no_row, 0.0, tokens_ptr, certain, VOCAB, BLOCKS)
            scale, cutoff, top, inverse, only = numbers
            if PROPOSAL != "point":
                seed = tl.load(seeds_ptr + request * seeds_stride)
                at, node = step, 0
                if steps_ptr is not None:
                    at = tl.load(steps_ptr + request * steps_stride)
                if nodes_ptr is not None:
                    node = tl.load(nodes_ptr + request * nodes_stride)
                for i in range(k - certain):
                    pair = tl.arange(0, 2)
                    coins = uniform(2 * i + pair, seed, node, at, STREAM)
                    u_block = tl.sum(tl.where(pair == 0, coins, 0.0), 0)
                    u_place = tl.sum(tl.where(pair == 1, coins, 0.0), 0)
                    struck = 0 if PROPOSAL == "with_replacement" else certain + i
                    if total_of(masses) < SMALL_MASS:
                        rest = ((row_ptr, row_ptr), plain, (scale, cutoff, top, inverse, only))
                        inverse *= lift(rest, statistics_ptr, tokens_ptr, struck, VOCAB, BLOCKS)
                        rest = ((row_ptr, row_ptr), plain, (scale, cutoff, top, inverse, only))
                        masses = law_masses(rest, statistics_ptr, VOCAB, BLOCKS)
                        masses = strike_out(masses, rest, no_row, 0.0, tokens_ptr, struck, VOCAB, BLOCKS)
                    row = ((row_ptr, row_ptr), plain, (scale, cutoff, top, inverse, only))
                    token = draw(masses, row, no_row, 0.0, tokens_ptr, struck, u_block, u_place, VOCAB)
                    tl.debug_barrier()
                    tl.store(tokens_ptr + certain + i, token.to(tl.int64))
                    tl.debug_barrier()
                    if PROPOSAL == "without_replacement":  # noqa: SIM102 (decided when compiling)
                        if token >= 0:
                            block = token // DRAW_BLOCK
                            left = tl.sum(block_weights(row, no_row, 0.0, block, tokens_ptr, struck + 1, VOCAB), 0)
                            masses = tl.where(tl.arange(0, BLOCKS) == block, left, masses)


def draw_candidates_bytes(rows: int, vocab: int, logit_bytes: int, k: int) -> int:
    """The bytes that `draw_candidates` must read and write: every logit once, a seed and k tokens a row."""
    return rows * (vocab * logit_bytes + 8 + k * 8)


def draw_candidates(
    draft_logits: torch.Tensor,
    k: int,
    seeds: torch.Tensor,
    step: int,
    step_tensor: torch.Tensor | None,
    proposal: str,
    numbers: list[float],
    tensors: list[torch.Tensor | None],
    nodes: torch.Tensor | None,
) -> torch.Tensor:
    """The operator behind `mcsd_kernels.draw_candidates`; arguments as there, already checked."""
    rows, vocab = draft_logits.shape
    tokens = torch.empty(rows, k, dtype=torch.int64, device=draft_logits.device)
    if not rows:
        return tokens
    blocks = blocks_of(vocab)
    launch = choose_row_launch(vocab)

    _draw_candidates_kernel[(rows,)](
        logits_ptr=draft_logits,
        seeds_ptr=seeds,
        steps_ptr=step_tensor,
        nodes_ptr=nodes,
        tokens_ptr=tokens,
        statistics_ptr=torch.empty(rows, 2, blocks, dtype=torch.float32, device=draft_logits.device),
        logits_stride_row=draft_logits.stride(0),
        seeds_stride=seeds.stride(0),
        steps_stride=step_tensor.stride(0) if step_tensor is not None and step_tensor.dim() else 0,
        nodes_stride=nodes.stride(0) if nodes is not None else 0,
        sampling=sampling_triton.arguments(numbers, tensors),
        step=step,
        k=k,
        PROPOSAL=proposal,
        FILTERS=sampling_triton.filters(numbers, tensors, vocab),
        STREAM=CANDIDATE_STREAM,
        VOCAB=vocab,
        TILE=launch.tile_blocks,
        BLOCKS=triton.next_power_of_2(blocks),
        **row_options(launch.num_warps),
    )
    return tokens
