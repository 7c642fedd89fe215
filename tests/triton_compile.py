"""Compile kernels for GPUs that are not there, through the wrappers that launch them.

Inside `compile_only` the wrappers run on fake CUDA tensors, and every launch is compiled for the target, with Triton's
own specialisation of its arguments, instead of launched: no GPU, no driver. `resources` reads what the compiled kernel
needs off its binary.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

assert os.environ.get("TRITON_WANTED", triton.__version__) == triton.__version__, "another Triton than was asked for"
assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET must be unset when triton is first imported"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one program may have
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_ADDRESS = 1 << 20


class Resources(NamedTuple):
    """What one compiled kernel needs: registers a thread, bytes spilled a thread, bytes of shared memory."""

    name: str
    warps: int
    registers: int
    spills: int
    shared: int


class _Driver:
    """As much of a driver as a compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class _FakePointers(TorchFunctionMode):
    """Gives fake tensors an address, aligned as the allocator's are, and indexing, which needs a device otherwise."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if args and isinstance(args[0], FakeTensor):
            if name == "data_ptr":
                return _ADDRESS + args[0].storage_offset() * args[0].element_size()
            if name == "__getitem__":
                return _index(*args)
            if name == "__setitem__":
                return None
        return function(*args, **(kwargs or {}))


def _index(tensor: Any, index: Any) -> Any:
    """`tensor[index]` out of operators that work on a fake CUDA tensor without CUDA."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    gap = next(i for i, part in enumerate(parts) if part is Ellipsis)
    named = sum(part is not None and part is not Ellipsis for part in parts)
    parts[gap : gap + 1] = [slice(None)] * (tensor.dim() - named)
    aten, axis = torch.ops.aten, 0
    for part in parts:
        if part is None:
            tensor, axis = tensor.unsqueeze(axis), axis + 1
        elif isinstance(part, slice):
            tensor, axis = aten.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1), axis + 1
        elif isinstance(part, torch.Tensor):
            tensor, axis = aten.index.Tensor(tensor, [None] * axis + [part]), axis + part.dim()
        else:
            tensor = tensor.select(axis, part)
    return tensor


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[list[Any]]:
    """Compile instead of launching; yields the list that the compiled kernels are added to.

    Args:
        target: a key of `TARGETS`.
    """
    compiled: list[Any] = []
    driver, launch = triton.runtime.driver._active, triton.KernelInterface.__getitem__
    hip = torch.version.hip

    def warm_up(kernel: Any, grid: Any) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            result = kernel.warmup(*arguments, grid=grid, **options)
            compiled.extend(result if isinstance(result, list) else [result])

        return call

    triton.runtime.driver.set_active(_Driver(TARGETS[target]))
    torch.version.hip = "none" if TARGETS[target].backend == "hip" else None  # launch options depend on it
    triton.KernelInterface.__getitem__ = warm_up
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _FakePointers():
            yield compiled
    finally:
        triton.KernelInterface.__getitem__ = launch
        triton.runtime.driver._active = driver
        torch.version.hip = hip


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on a CUDA device that is not there; inside `compile_only`."""
    return torch.empty(*shape, dtype=dtype, device="cuda")


def resources(kernel: Any) -> Resources:
    """Read the registers, spills and shared memory of a compiled kernel off its binary."""
    metadata = kernel.metadata
    if metadata.target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        spills = stack + local  # Triton's kernels use the stack for nothing else
    else:
        text = kernel.asm["amdgcn"]
        registers = _amd(text, "vgpr_count")
        spills = _amd(text, "private_segment_fixed_size") + 4 * _amd(text, "vgpr_spill_count")
    return Resources(metadata.name, metadata.num_warps, registers, spills, metadata.shared)


def _amd(text: str, field: str) -> int:
    found = re.search(rf"\.{field}:\s*(\d+)", text)
    assert found is not None, field
    return int(found[1])


def unordered_releases(kernel: Any) -> list[str]:
    """PTX lines of releasing atomics with a global store before them and no barrier of the whole program in between.

    Only one thread executes such an atomic; until Triton 3.9 nothing made it wait for the stores of the others.
    """
    if kernel.metadata.num_warps == 1 or "ptx" not in kernel.asm:
        return []
    found, stored = [], False
    for line in kernel.asm["ptx"].splitlines():
        if re.search(r"\bst\.global", line):
            stored = True
        elif re.search(r"\bbar\.sync|barrier\.(cta|cluster)", line):
            stored = False
        elif stored and re.search(r"\b(atom|red)\.global\S*(release|acq_rel)", line):
            found.append(line.strip())
    return found


# What every kernel needed when somebody last looked: Triton's version -> target -> call -> kernel -> entry.
TABLE = Path(__file__).with_name("kernel_resources.json")
UPDATE = "UPDATE_KERNEL_RESOURCES"
# Versions before the one that the tests are run with are looked at for one target: does everything compile?
TARGETS_HERE = tuple(TARGETS) if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else ("sm_90",)


def entry(kernel: Resources) -> str:
    """A kernel's line in `TABLE`."""
    spilled = f", {kernel.spills} bytes spilled" if kernel.spills else ""
    return f"{kernel.registers} registers, {kernel.shared} bytes shared{spilled}"


def assert_as_committed(target: str, call: str, kernels: Iterable[Resources]) -> None:
    """Fail if a kernel has too much shared memory, or needs other resources than `TABLE` says.

    With the environment variable `UPDATE` set, write the table instead of comparing with it.
    """
    found = {kernel.name: kernel for kernel in kernels}
    for kernel in found.values():
        assert kernel.shared <= SHARED_LIMITS[target], kernel
    entries = {name: entry(kernel) for name, kernel in found.items()}
    table = json.loads(TABLE.read_text())
    if os.environ.get(UPDATE) == "1":
        table.setdefault(triton.__version__, {}).setdefault(target, {})[call] = entries
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        return
    if triton.__version__ not in table:
        pytest.skip(
            f"{TABLE.name} knows no Triton {triton.__version__}: {UPDATE}=1 python -m pytest tests/test_compile_*.py"
        )
    wanted = table[triton.__version__].get(target, {}).get(call)
    assert entries == wanted, f"another version of a kernel: look at the difference, then set {UPDATE}=1 and run again"
