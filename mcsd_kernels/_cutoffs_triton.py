"""`row_cutoffs` in Triton: one program a row runs the search that every law goes through."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _sampling_triton as sampling_triton
from ._rows_triton import DRAW_BLOCK, blocks_of, filter_row, row_options
from ._sampling_triton import parameters
from ._schedule import choose_row_launch


@triton.jit
def _row_cutoffs_kernel(
    logits_ptr,  # [rows, VOCAB] f16, bf16 or f32
    cutoffs_ptr,  # [rows] f32, out
    statistics_ptr,  # [rows, 2, blocks] f32, scratch
    logits_stride_row,
    sampling,  # tuple: `_sampling_triton.arguments`
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    scale, top_k, top_p, log_min_p, sound = parameters(sampling, row, VOCAB)
    settings = (tl.where(sound, scale, 0.0), top_k, top_p, log_min_p)  # at temperature 0 nothing is filtered
    row_ptr = logits_ptr + row * logits_stride_row
    statistics_ptr += row * 2 * tl.cdiv(VOCAB, DRAW_BLOCK)
    cutoff, _, _, _ = filter_row(
        (row_ptr, row_ptr), (None, None, None), settings, statistics_ptr, True, False, 2, VOCAB, TILE, BLOCKS
    )  # fmt: skip
    tl.store(cutoffs_ptr + row, cutoff)


def row_cutoffs_bytes(rows: int, vocab: int, logit_bytes: int) -> int:
    """The bytes that `row_cutoffs` must read and write: every logit once, from then on they are in the cache."""
    return rows * (vocab * logit_bytes + 4)


def row_cutoffs(logits: torch.Tensor, numbers: list[float], tensors: list[torch.Tensor | None]) -> torch.Tensor:
    """See `cutoffs.row_cutoffs`."""
    count, vocab = logits.shape
    cutoffs = torch.empty(count, dtype=torch.float32, device=logits.device)
    if not count:
        return cutoffs
    blocks = blocks_of(vocab)
    launch = choose_row_launch(vocab)

    _row_cutoffs_kernel[(count,)](
        logits_ptr=logits,
        cutoffs_ptr=cutoffs,
        statistics_ptr=torch.empty(count, 2, blocks, dtype=torch.float32, device=logits.device),
        logits_stride_row=logits.stride(0),
        sampling=sampling_triton.arguments(numbers, tensors),
        VOCAB=vocab,
        TILE=launch.tile_blocks,
        BLOCKS=triton.next_power_of_2(blocks),
        **row_options(launch.num_warps),
    )
    return cutoffs
