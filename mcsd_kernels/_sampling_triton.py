"""`SamplingParams` inside a Triton program: numbers that hold for every row, or tensors with an entry a row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from .types import LEAST_TEMPERATURE

_LEAST_TEMPERATURE = tl.constexpr(LEAST_TEMPERATURE)


def arguments(numbers: list[float], tensors: list[torch.Tensor | None]) -> tuple[Any, ...]:
    """`sampling.pack`'s result as one argument of a kernel, for `parameters`.

    Returns:
        1 / temperature (0 for temperature 0), top_k, top_p, and log min_p as a sum of two, since a kernel takes its
        numbers as f32; then the four tensors or None; then their strides.
    """
    temperature, top_k, top_p, min_p = numbers
    log_min_p = math.log(min_p) if min_p else -math.inf
    rounded = float(np.float32(log_min_p))
    strides = tuple(tensor.stride(0) if tensor is not None and tensor.dim() else 0 for tensor in tensors)
    return (
        1.0 / max(temperature, LEAST_TEMPERATURE) if temperature else 0.0,
        float(top_k),
        top_p,
        rounded,
        log_min_p - rounded if min_p else 0.0,
        *tensors,
        *strides,
    )


def filters(numbers: list[float], tensors: list[torch.Tensor | None], vocab: int) -> bool:
    """Whether some row may be filtered: False lets a kernel be compiled without the search for cut-offs."""
    _, top_k, top_p, min_p = numbers
    return 0 < top_k < vocab or top_p < 1 or min_p > 0 or any(tensor is not None for tensor in tensors[1:])


@triton.jit
def parameters(
    sampling,  # tuple, from `arguments`
    row,  # int64
    VOCAB: tl.constexpr,
):
    """(scale, top_k, top_p, log_min_p, sound) of a row: three f32, one f64, and whether all are in range.

    `scale` is 1 / temperature, or 0 for temperature 0. A filter that is off comes as top_k 0, top_p 1, log_min_p -inf.
    """
    scale = sampling[0] + tl.full([], 0.0, tl.float32)
    top_k = sampling[1] + tl.full([], 0.0, tl.float32)
    top_p = sampling[2] + tl.full([], 0.0, tl.float32)
    log_min_p = (sampling[3] + tl.full([], 0.0, tl.float64)) + sampling[4]
    sound = scale >= 0.0
    # in float64, as the host does it: 1 / temperature is rounded once
    if sampling[5] is not None:
        temperature = tl.load(sampling[5] + row * sampling[9]).to(tl.float64)
        sound = sound & (temperature >= 0.0) & (temperature < float("inf"))
        inverse = 1.0 / tl.where(temperature > _LEAST_TEMPERATURE, temperature, _LEAST_TEMPERATURE)
        scale = tl.where(temperature > 0.0, inverse, 0.0).to(tl.float32)
    if sampling[6] is not None:
        limit = tl.load(sampling[6] + row * sampling[10]).to(tl.float64)
        sound = sound & (limit >= 0.0) & (tl.floor(limit) == limit)
        top_k = tl.where(limit < VOCAB, limit, 0.0).to(tl.int32).to(tl.float32)
    if sampling[7] is not None:
        share = tl.load(sampling[7] + row * sampling[11]).to(tl.float64)
        sound = sound & (share > 0.0) & (share <= 1.0)
        top_p = share.to(tl.float32)
    if sampling[8] is not None:
        least = tl.load(sampling[8] + row * sampling[12]).to(tl.float64)
        sound = sound & (least >= 0.0) & (least <= 1.0)
        log_min_p = tl.where(least > 0.0, tl.log(tl.where(least > 0.0, least, 1.0)), -float("inf"))
    top_k = tl.where(top_k < VOCAB, top_k, 0.0)
    return scale, top_k, top_p, log_min_p, sound
