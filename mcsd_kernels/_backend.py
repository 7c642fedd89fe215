"""Which implementation of an operation runs."""

from __future__ import annotations

import torch

BACKENDS = ("torch",)


def choose(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`; `backend` overrides the choice.

    Raises:
        ValueError: no such backend.
    """
    if backend is None:
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend
