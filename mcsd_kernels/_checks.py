"""Argument checks shared by the operations. They look at shapes, dtypes and strides, never at device memory."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def tensor(name: str, value: Any, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless `value` is a tensor of this shape (None: any size) and one of these dtypes."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.shape != shape and not _fits(value.shape, shape):
        text = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: expected shape [{text}], got {list(value.shape)}")
    if value.dtype not in dtypes:
        text = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {text}, got {str(value.dtype).removeprefix('torch.')}")


def _fits(got: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a shape is the one wanted, whose None stands for any size."""
    if len(got) != len(wanted):
        return False
    for w, size in zip(wanted, got, strict=True):  # noqa: SIM110 - a third of the time of all()
        if w is not None and w != size:
            return False
    return True


def same_device(first: str, reference: torch.Tensor, others: dict[str, torch.Tensor | None]) -> None:
    """Raise unless every tensor lies where `reference` does."""
    device = reference.device
    for name, value in others.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name}: expected the device of {first}, {device}, got {value.device}")


def contiguous_last_axis(name: str, value: torch.Tensor) -> None:
    """Raise unless neighbouring entries of the last axis are neighbours in memory."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last axis (stride 1), got stride {value.stride(-1)}")


def choice(name: str, value: Any, options: Sequence[str | None]) -> None:
    """Raise unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int; raise unless it is a whole number in [low, high], of whatever integer type."""
    integral = type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
    number = int(value) if integral else None
    if number is None or number < low or (high is not None and number > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected a whole number {bounds}, got {value!r}")
    return number
