"""Devices that are simulated on the CPU, "elsewhere:0", "elsewhere:1", ...: what tells a device's tensors from others.

Tensors there have data, and can only be computed with beside each other, as on GPUs. `COUNTS` has what crossed over to
the host, and what made it wait. Source of the interface: `torch.utils.backend_registration` (experimental in torch).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import DispatchKey
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"
COUNTS: Counter[str] = Counter()  # "to host", "from host", "waits"
_WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"}
_opaque = False


class Elsewhere(torch.Tensor):
    """A tensor on a simulated device.

    Args:
        held: what it holds, on the CPU; views of one tensor hold views of one tensor.
        device: where it is.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Elsewhere:
        with torch.inference_mode(False):  # no view of a tensor that is none could be made inside it
            made: Elsewhere = torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=device,
            )
        made.held = held
        return made

    # subclasses of a tensor have neither
    def tolist(self) -> Any:
        """As any tensor's."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As any tensor's."""
        if not force:
            raise TypeError("can't convert a tensor elsewhere to numpy")
        return self.cpu().numpy()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})


@contextmanager
def opaque_kernels() -> Iterator[None]:
    """Our operators run as one launch each, like Triton's kernels, and wait for nothing; else as torch's backend."""
    global _opaque
    _opaque = True
    try:
        yield
    finally:
        _opaque = False


def moved(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """In place: a module's parameters, as plain tensors, and buffers on another device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    tensors[name] = tensor.detach().to(device)
    return module


def _run(operator: Any, args: Any, kwargs: Any) -> Any:
    name = operator._schema.name.partition("::")[2]
    if operator.namespace == "mcsd_kernels" and not _opaque:
        return operator._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), DispatchKey.CompositeImplicitAutograd):
        return operator.decompose(*args, **kwargs)  # inference mode leaves it whole
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = {tensor.device for tensor in tensors if isinstance(tensor, Elsewhere)}
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    if name in ("_to_copy", "copy_"):
        source, target = (args[0], wanted or args[0].device) if name == "_to_copy" else (args[1], args[0].device)
        if source.device.type != target.type:
            COUNTS["to host" if target.type == "cpu" else "from host"] += 1
    else:
        COUNTS["waits"] += name in _WAITS
        beside = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
        sent_for = operator.namespace == "aten" and name in ("index", "index_put", "index_put_", "_index_put_impl_")
        COUNTS["from host"] += len(beside) if sent_for and here else 0
        if len(here) > 1 or (here and beside and not sent_for):
            raise RuntimeError(f"{name}: expected tensors on one device, got {[t.device for t in tensors]}")
    held: dict[int, Elsewhere] = {}

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, Elsewhere):
            held[id(leaf.held)] = leaf
            return leaf.held
        return leaf

    args, kwargs = tree_map(inside, args), tree_map(inside, kwargs)
    if wanted is not None:
        kwargs["device"] = "cpu"
    found = operator(*args, **kwargs)
    if name == "copy_":
        return held.get(id(found), found)
    if name == "_to_copy" and found is args[0]:
        found = found.clone()
    for wrapper in held.values():
        assert wrapper.held.shape == wrapper.shape, f"{operator} has resized its output"
    place = wanted if wanted is not None else next(iter(here), None)
    if place is None or place.type != NAME:
        return found

    def outside(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return held[id(leaf)] if id(leaf) in held else Elsewhere(leaf, place)

    return outside(found) if isinstance(found, torch.Tensor) else tree_map(outside, found)


class _Module(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:
        return False  # nobody shall choose it by himself

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


def _copy_from(source: torch.Tensor, target: Elsewhere, non_blocking: bool = False) -> Elsewhere:
    COUNTS["from host"] += 1
    target.held.copy_(source)
    return target


def _factory(operator: Any) -> Callable[..., Elsewhere]:
    """What would make an empty tensor and resize it."""

    def made(*args: Any, device: torch.device, pin_memory: bool | None = None, **kwargs: Any) -> Elsewhere:
        return Elsewhere(operator(*args, device="cpu", **kwargs), device)

    return made


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
_EVERYTHING = torch.library.Library("_", "IMPL")
_EVERYTHING.fallback(lambda operator, *args, **kwargs: _run(operator, args, kwargs), "PrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
_ATEN.impl("_copy_from", _copy_from, "PrivateUse1")
_ARANGE, _EYE = torch.ops.aten.arange, torch.ops.aten.eye
_MADE = (_ARANGE.default, _ARANGE.start, _ARANGE.start_step, _EYE.default, _EYE.m)
for _operator in (torch.ops.aten.empty_strided.default, *_MADE):
    _ATEN.impl(_operator.name().removeprefix("aten::"), _factory(_operator), "PrivateUse1")
