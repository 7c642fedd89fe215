"""The torch operator library `mcsd_kernels::` and the one way an operator enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mcsd_kernels", "DEF")


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `schema` with one implementation for every device and a fake kernel that only knows shapes.

    `torch.compile`, `FakeTensorMode` and CUDA-graph capture see one opaque call, so nothing on the host can come to
    depend on the data. A plain eager call goes straight to the implementation: the dispatcher's way there costs about
    20 us with this many arguments.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    implementation = _on_its_device(implementation)
    # no gradient flows through a decision, and none through attention that exists for decoding
    _LIBRARY.impl(name, torch.no_grad()(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mcsd_kernels::{name}", fake, lib=_LIBRARY)
    packet: Callable[..., Any] = getattr(torch.ops.mcsd_kernels, name).default

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched() or not _plain(arguments):
            return packet(*arguments)
        return implementation(*arguments)

    return call


def _is_watched() -> bool:
    """Whether a mode, or one of `torch.func`'s transforms, has tensors of its own that look like ordinary ones."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation` run on the GPU of its first argument, a tensor: Triton launches on the current one, whatever."""

    def run(*arguments: Any) -> Any:
        first = arguments[0]
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return implementation(*arguments)
        with torch.cuda.device(first.device):
            return implementation(*arguments)

    return run


def _plain(arguments: Iterable[Any]) -> bool:
    """Whether every tensor is an ordinary one, with data, that wants no gradient."""
    for argument in arguments:
        kind = type(argument)
        if kind in _SCALARS:
            continue
        if kind is torch.Tensor:
            if argument.requires_grad or argument.is_meta:
                return False
        elif kind is list:
            if not _plain(argument):
                return False
        elif isinstance(argument, torch.Tensor):
            return False
    return True


_SCALARS = frozenset({str, int, float, type(None)})
