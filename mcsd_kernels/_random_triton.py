"""Philox 4x32-10 in Triton: the numbers of `random.uniforms`, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .random import VERIFY_STREAM

# Philox words of one row that a program makes.
_BLOCK_WORDS = 128


@triton.jit
def philox(
    c0,  # uint32 blocks of one shape: the counter's words
    c1,
    c2,
    c3,
    k0,  # uint32: the key's words
    k1,
):
    """Four uint32 blocks: Philox 4x32-10 of the counter under the key."""
    for _ in tl.static_range(10):
        high_0, low_0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        high_2, low_2 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform(
    index,  # int32, or a block of them: the numbers' places in their row
    seed,  # int64
    node,  # integer
    step,  # integer
    STREAM: tl.constexpr,
):
    """f32 in [0, 1): number `index` of counter (index // 4, node, step, STREAM) under the seed."""
    key = seed.to(tl.uint64)
    index += tl.full([], 0, tl.int32)
    wide = tl.full([], 0, tl.int64)
    zero = (index * 0).to(tl.uint32)
    words = philox(
        (index // 4).to(tl.uint32),
        zero + (wide + node).to(tl.uint32),
        zero + (wide + step).to(tl.uint32),
        zero + STREAM,
        zero + (key & 0xFFFFFFFF).to(tl.uint32),
        zero + (key >> 32).to(tl.uint32),
    )
    place = index % 4
    word = tl.where(place < 2, tl.where(place == 0, words[0], words[1]), tl.where(place == 2, words[2], words[3]))
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit(do_not_specialize=["step", "count"])
def _draw_uniforms_kernel(
    seeds_ptr,  # [rows] int64
    steps_ptr,  # [rows] int64 or int32; any pointer where not PER_ROW_STEP
    uniforms_ptr,  # [rows, count] f32, out
    seeds_stride,
    steps_stride,
    step,  # int64: every row's step where not PER_ROW_STEP
    count,
    PER_ROW_STEP: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows, count / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds_ptr + row * seeds_stride)
    if PER_ROW_STEP:
        step = tl.load(steps_ptr + row * steps_stride)
    numbers = uniform(index, seed, 0, step, STREAM)
    tl.store(uniforms_ptr + row * count + index, numbers, mask=index < count)


def draw_uniforms_bytes(rows: int, count: int) -> int:
    """The bytes that `draw_uniforms` must read and write, for int64 seeds and one step."""
    return rows * 8 + rows * count * 4


def draw_uniforms(seeds: torch.Tensor, step: int, step_tensor: torch.Tensor | None, count: int) -> torch.Tensor:
    """See `random.draw_uniforms`; `step` counts where there is no tensor."""
    rows = seeds.shape[0]
    uniforms = torch.empty(rows, count, dtype=torch.float32, device=seeds.device)
    if not rows or not count:
        return uniforms
    _draw_uniforms_kernel[(rows, triton.cdiv(count, _BLOCK_WORDS))](
        seeds_ptr=seeds,
        steps_ptr=seeds if step_tensor is None else step_tensor,
        uniforms_ptr=uniforms,
        seeds_stride=seeds.stride(0),
        steps_stride=step_tensor.stride(0) if step_tensor is not None and step_tensor.dim() else 0,
        step=step,
        count=count,
        PER_ROW_STEP=step_tensor is not None,
        STREAM=VERIFY_STREAM,
        BLOCK=_BLOCK_WORDS,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return uniforms
