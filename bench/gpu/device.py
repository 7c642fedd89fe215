"""Where the kernels run and how a call is timed there: a GPU, or the CPU in its place in a smoke run."""

from __future__ import annotations

import contextlib
import gc
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from . import rows
from .plan import Sizes

Call = Callable[[], Any]


class Replay:
    """A captured call: `run()` does it once more, reading and writing the same memory; `result` is what it writes."""

    def __init__(self, run: Callable[[], None], result: Any) -> None:
        self.run, self.result = run, result


class Gpu:
    """A CUDA or ROCm device."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name = str(properties.name)
        self.cold_bytes = max(4 * int(getattr(properties, "L2_cache_size", 0)), 256 << 20)
        self._cold: torch.Tensor | None = None

    def captured(self, call: Call) -> Replay:
        """Capture `call` in a graph, after two runs beside it that compile what it needs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return Replay(graph.replay, result)

    def flush(self) -> None:
        """Read a buffer that the L2 cache cannot hold: what was there is gone, and what comes in is clean."""
        if self._cold is None:
            self._cold = torch.ones(self.cold_bytes // 4, device=self.device)
            self._sink = torch.empty((), device=self.device)
        torch.sum(self._cold, dim=0, out=self._sink)

    def times(self, contenders: dict[str, Replay], load: Callable[[int], None], rounds: int) -> dict[str, list[float]]:
        """Microseconds of each replay, cold; the contenders take turns.

        Args:
            contenders: name -> what to time.
            load: puts the inputs of round i in place, outside the timed region.
            rounds: replays of each.
        """
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contenders}
        for i in range(rounds):
            load(i)
            for name, replay in contenders.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush()
                start.record()
                replay.run()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) * 1e3 for start, end in pairs] for name, pairs in events.items()}

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Device memory that is left."""
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def peak_bytes(self, call: Call) -> int | None:
        """Memory that a call takes at its height, its outputs included."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)

    @contextlib.contextmanager
    def forbid_synchronization(self) -> Iterator[None]:
        """An error where the host waits for the device."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # a shape a row is more than torch recompiles by default, and then it gives up
        torch._dynamo.config.cache_size_limit = 256
        torch._dynamo.config.accumulated_cache_size_limit = 1024
        return torch.compile(function, fullgraph=True, dynamic=False)


class Cpu:
    """The CPU in a GPU's place, with Triton interpreting: nothing is captured or compiled, and times mean nothing."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.device = torch.device("cpu")
        self.name = platform.machine()
        self.cold_bytes = 0

    def captured(self, call: Call) -> Replay:
        result = call()

        def run() -> None:
            for old, new in zip(_tensors(result), _tensors(call()), strict=True):
                old.copy_(new)

        return Replay(run, result)

    def times(self, contenders: dict[str, Replay], load: Callable[[int], None], rounds: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for i in range(rounds):
            load(i)
            for name, replay in contenders.items():
                start = time.perf_counter()
                replay.run()
                found[name].append((time.perf_counter() - start) * 1e6)
        return found

    def synchronize(self) -> None:
        """Nothing runs beside the host."""

    def free_bytes(self) -> int:
        return 64 << 20

    def peak_bytes(self, call: Call) -> int | None:
        return None

    @contextlib.contextmanager
    def forbid_synchronization(self) -> Iterator[None]:
        yield

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


Device = Gpu | Cpu


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in _tensors(part)] if isinstance(result, (tuple, list)) else []


def rival_replay(device: Device, call: Call) -> tuple[Replay, bool]:
    """A rival's call, captured if it can be; one that waits for the device is timed as it is.

    Returns:
        the replay, and whether it is a graph.
    """
    call()
    device.synchronize()
    try:
        with device.forbid_synchronization():
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise

        def run() -> None:
            call()

        return Replay(run, None), False
    return device.captured(call), True


def copy_bandwidth(device: Device) -> float:
    """Bytes a second of a large copy on the device, those read and those written both counted."""
    count = device.sizes.copy_bytes
    source = torch.ones(count // 4, device=device.device)
    target = torch.empty_like(source)
    replay = device.captured(lambda: target.copy_(source))
    times = device.times({"copy": replay}, lambda i: None, device.sizes.rounds[0])["copy"]
    return 2 * count / (rows.percentile(times, 0.5) * 1e-6)


def empty_graph(device: Device) -> float:
    """Microseconds between the events around a graph of one kernel that does next to nothing."""
    tiny = torch.zeros(1, device=device.device)
    replay = device.captured(lambda: tiny.add_(1))
    return rows.percentile(device.times({"tiny": replay}, lambda i: None, device.sizes.rounds[0])["tiny"], 0.5)


def rounds_for(device: Device, contenders: dict[str, Replay], load: Callable[[int], None]) -> int:
    """How many rounds to time: what fits the seconds a row may take, within bounds."""
    fewest, most = device.sizes.rounds
    if fewest == most:
        return fewest
    start = time.perf_counter()
    device.times(contenders, load, 2)
    seconds = (time.perf_counter() - start) / 2
    return max(fewest, min(most, int(device.sizes.round_seconds / max(seconds, 1e-9))))


@contextlib.contextmanager
def _counted(names: list[str]) -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    before = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
            if not warmup:
                names.append(self.fn.__name__)
            return run(self, *arguments, warmup=warmup, **options)

        return counted

    for kind, run in before.items():
        kind.run = counting(run)
    try:
        yield
    finally:
        for kind, run in before.items():
            kind.run = run


def launches(call: Call) -> list[str]:
    """The Triton kernels that a call launches, in order."""
    names: list[str] = []
    with _counted(names):
        call()
    return names


def profiled(device: Device, call: Call) -> dict[str, Any]:
    """What a call, not its first, costs the host: torch's outermost operators and, on a GPU, all that ran there."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        device.synchronize()
    events = profile.events() or []
    operators = [
        event.name
        for event in events
        if event.name.startswith("aten::")
        and not (event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"))
    ]
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"torch_operators": operators, "device_activities": on_device}


def host_microseconds(device: Device, call: Call, calls: int = 50) -> float:
    """Median time for the host to issue a call, the device never waited for."""
    found = []
    for _ in range(1 if device.sizes.smoke else calls):
        device.synchronize()
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
    device.synchronize()
    return rows.percentile(found, 0.5)


def interprets() -> bool:
    """Whether Triton interprets kernels in this process."""
    return bool(triton.knobs.runtime.interpret)
