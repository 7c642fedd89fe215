"""The torch operator library `mcsd_kernels::` and the one way an operator enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mcsd_kernels", "DEF")


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `schema` with one implementation for every device and a fake kernel that only knows shapes.

    `torch.compile`, `FakeTensorMode` and CUDA-graph capture see one opaque call, so nothing on the host can come to
    depend on the data.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mcsd_kernels::{name}", fake, lib=_LIBRARY)
    packet: Callable[..., Any] = getattr(torch.ops.mcsd_kernels, name).default
    return packet
