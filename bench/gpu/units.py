"""A unit of work, and what its run is given."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from . import device as devices
from .device import Device
from .plan import Sizes


@dataclass(frozen=True)
class Unit:
    """Something that is done as a whole or not at all; it yields its rows.

    Args:
        part: the part it belongs to, which names the file of its rows.
        name: unique in its part; a unit with a row is not done again.
        run: makes the rows.
        warm: compiles what `run` will need, as tasks by the group of kernels that they share.
    """

    part: str
    name: str
    run: Callable[[Context], Iterator[dict[str, Any]]]
    warm: dict[Hashable, Callable[[Context], Any]] = field(default_factory=dict)


class Context:
    """The device, the sizes, and what is measured once a process."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.device: Device = devices.Cpu(sizes) if sizes.smoke else devices.Gpu(sizes)
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second, measured."""
        return devices.copy_bandwidth(self.device)

    @cached_property
    def empty_graph(self) -> float:
        """Microseconds."""
        return devices.empty_graph(self.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.compile(function)`, made once; only axes that are marked as dynamic are."""
        if function not in self._compiled:
            self._compiled[function] = self.device.compiled(function)
        return self._compiled[function]

    @staticmethod
    def is_broken(problem: BaseException) -> bool:
        """Whether this process can do no more work on the device; a capture that failed is no such thing."""
        text = f"{type(problem).__name__} {problem}"
        if "captur" in text:
            return False
        return any(sign in text for sign in ("CUDA error", "AcceleratorError", "HIP error", "illegal memory access"))
