"""Which implementation of an operation runs."""

from __future__ import annotations

import importlib
from functools import cache

import torch

BACKENDS = ("torch", "triton")


def choose(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`; `backend` overrides the choice.

    Raises:
        ValueError: no such backend, or not for tensors on this device.
    """
    if backend is None:
        return "triton" if device.type == "cuda" and _triton_interprets() is not None else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton":
        interprets = _triton_interprets()
        if interprets is None:
            raise ValueError('backend: expected "torch", because triton cannot be imported, got "triton"')
        if device.type != "cuda" and not interprets:
            raise ValueError(f'backend: expected "torch" for tensors on {device}, got "triton"')
    return backend


@cache
def _triton_interprets() -> bool | None:
    """Whether triton interprets its kernels instead of compiling them; None: there is no triton."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return None
    return bool(triton.knobs.runtime.interpret)
