"""Sampling parameters: how a row of logits becomes the law of a token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch

Number = float | int
Parameter = Number | torch.Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How logits become a probability law; each field is a number, or a `[batch]` tensor to give every request its own.

    The order is that of `transformers`: temperature, top-k, top-p, min-p. Every filter is one cut-off logit a row, and
    tokens that tie with the cut-off stay.

    Args:
        temperature: divides the logits; >= 0. 0 is the one-hot law of the argmax (the lowest index wins ties); what is
            larger counts as 1 / 3e38 at least.
        top_k: keep the k largest logits; 0 keeps all.
        top_p: keep a token if the tokens strictly above it hold less than this share of the mass; in (0, 1].
        min_p: keep a token if its probability is at least this share of the largest one; in [0, 1].

    Raises:
        ValueError: a number is outside its range. A tensor is not read here: `verify` reports it by
            `Status.BAD_SAMPLING`, for the request concerned alone.
    """

    temperature: Parameter = 1.0
    top_k: Parameter = 0
    top_p: Parameter = 1.0
    min_p: Parameter = 0.0

    def __post_init__(self) -> None:
        for name, (low, high, open_low) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name}: expected a number or a [batch] tensor, got {value!r}")
            if not isinstance(value, (int, float)):  # NumPy's, say
                value = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, name, value)
            inside = (low < value if open_low else low <= value) and value <= high and value != math.inf
            if not inside:
                end = f"{high})" if math.isinf(high) else f"{high}]"
                raise ValueError(f"{name}: expected a value in {'(' if open_low else '['}{low}, {end}, got {value!r}")
        if not isinstance(self.top_k, torch.Tensor) and int(self.top_k) != self.top_k:
            raise ValueError(f"top_k: expected a whole number, got {self.top_k!r}")


# name -> (lowest, highest, whether the lowest itself is excluded)
RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, math.inf, False),
    "top_k": (0, math.inf, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
}


def pack(
    name: str, sampling: SamplingParams, count: int, device: torch.device
) -> tuple[list[float], list[torch.Tensor | None]]:
    """`SamplingParams` as an operator takes them: four numbers, and four tensors that win over them."""
    if not isinstance(sampling, SamplingParams):
        raise ValueError(f"{name}: expected SamplingParams, got {type(sampling).__name__}")
    values = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    if _NUMBERS.issuperset(map(type, values)):
        return list(map(float, values)), [None] * len(values)
    numbers: list[float] = []
    tensors: list[torch.Tensor | None] = []
    for field, value in zip(RANGES, values, strict=True):
        if not isinstance(value, torch.Tensor):
            numbers.append(float(value))
            tensors.append(None)
            continue
        if value.shape not in ((), (count,)):
            raise ValueError(f"{name}.{field}: expected shape [{count}], got {list(value.shape)}")
        if value.dtype == torch.bool or value.is_complex():
            raise ValueError(f"{name}.{field}: expected a float or integer tensor, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name}.{field}: expected the device of the logits, {device}, got {value.device}")
        numbers.append(0.0)
        tensors.append(value)
    return numbers, tensors


_NUMBERS = frozenset({int, float})
