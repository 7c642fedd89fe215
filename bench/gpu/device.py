"""Where the kernels run and how a call is timed there: a GPU, or the CPU in its place in a smoke run."""

from __future__ import annotations

import contextlib
import gc
import platform
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from . import rows
from .plan import Sizes

Call = Callable[[], Any]


ALLOCATED = 512  # bytes: memory is given in multiples of it


class Replay:
    """A captured call: `run()` does it once more, reading and writing the same memory; `result` is what it writes.

    Args:
        call: what was captured. A graph knows where the call's inputs lie and keeps none of them: they live as long as
            the call does, and it as long as this.
        graph: has `replay`; None: the call is run as it is.
        result: of the call that was captured.
    """

    def __init__(self, call: Call, graph: Any = None, result: Any = None) -> None:
        self.call, self.result = call, result
        self.run: Callable[[], Any] = call if graph is None else graph.replay


class Gpu:
    """A CUDA or ROCm device."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name = str(properties.name)
        self.cold_bytes = max(4 * int(getattr(properties, "L2_cache_size", 0)), 256 << 20)
        self._cold: torch.Tensor | None = None
        self._failed: list[Any] = []

    def captured(self, call: Call) -> Replay:
        """Capture `call` in a graph, after two runs beside it that compile what it needs."""
        ours, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(ours)
        with torch.cuda.stream(beside):
            for _ in range(2):
                call()
        ours.wait_stream(beside)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # a capture that fails leaves its own stream as the current one: the outer context puts that right
            with torch.cuda.stream(ours), torch.cuda.graph(graph, pool=pool):
                result = call()
        except Exception:
            with contextlib.suppress(Exception):  # until then the allocator gives no memory back
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
            # the allocator still asks this graph, and torch's generator refuses every number until a capture ends well
            self._failed.append(graph)
            with torch.cuda.stream(ours), torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=self.device)
            raise
        return Replay(call, graph, result)

    def flush(self) -> None:
        """Read a buffer that the L2 cache cannot hold: what was there is gone, and what comes in is clean."""
        if self._cold is None:
            self._cold = torch.ones(self.cold_bytes // 4, device=self.device)
            self._sink = torch.empty((), device=self.device)
        torch.sum(self._cold, dim=0, out=self._sink)

    def times(
        self,
        contenders: dict[str, Replay],
        load: Callable[[int], None],
        rounds: int,
        every: dict[str, int] | None = None,
    ) -> dict[str, list[float]]:
        """Microseconds of each replay, cold; the contenders take turns.

        Args:
            contenders: name -> what to time.
            load: puts the inputs of round i in place, outside the timed region.
            rounds: how many.
            every: name -> n for those that take part in every n-th round only, the first among them.
        """
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contenders}
        for i in range(rounds):
            load(i)
            for name, replay in _taking_part(contenders, i, every):
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

    def scratch_bytes(self, call: Call) -> int:
        """Memory that a call takes at its height besides what it returns, both as the allocator rounds them."""
        call()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what is given out of a larger piece may be all of it
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before) - given(result)

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
        return Replay(call, _Again(call, result), result)

    def times(
        self,
        contenders: dict[str, Replay],
        load: Callable[[int], None],
        rounds: int,
        every: dict[str, int] | None = None,
    ) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for i in range(rounds):
            load(i)
            for name, replay in _taking_part(contenders, i, every):
                start = time.perf_counter()
                replay.run()
                found[name].append((time.perf_counter() - start) * 1e6)
        return found

    def synchronize(self) -> None:
        """Nothing runs beside the host."""

    def free_bytes(self) -> int:
        return 64 << 20

    def scratch_bytes(self, call: Call) -> int:
        with Allocations() as allocations:
            result = call()
        return allocations.peak - given(result)

    @contextlib.contextmanager
    def forbid_synchronization(self) -> Iterator[None]:
        yield

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


Device = Gpu | Cpu


class _Again:
    """In a graph's place on the CPU: the call once more. It keeps as little alive of what the call reads as a graph."""

    def __init__(self, call: Call, result: Any) -> None:
        self._call, self._result = weakref.ref(call), result

    def replay(self) -> None:
        call = self._call()
        assert call is not None, "what was captured reads memory that has been given back"
        for old, new in zip(tensors_of(self._result), tensors_of(call()), strict=True):
            old.copy_(new)


class Allocations(TorchFunctionMode):
    """Counts the memory of the tensors that Python makes inside, as a GPU's allocator rounds it.

    Attributes:
        peak: bytes at the height.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._taken = 0
        self._sizes: dict[int, int] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; a storage that is not among its arguments' is new."""
        found = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        for storage in (tensor.untyped_storage() for tensor in tensors_of(found)):
            key = storage._cdata
            if key not in known and key not in self._sizes:
                self._sizes[key] = _rounded(storage.nbytes())
                self._taken += self._sizes[key]
                self.peak = max(self.peak, self._taken)
                weakref.finalize(storage, self._free, key)
        return found

    def _free(self, key: int) -> None:
        self._taken -= self._sizes.pop(key)


def _taking_part(contenders: dict[str, Replay], i: int, every: dict[str, int] | None) -> Iterator[tuple[str, Replay]]:
    """The contenders of round i."""
    return ((name, replay) for name, replay in contenders.items() if i % (every or {}).get(name, 1) == 0)


def _rounded(size: int) -> int:
    return -(-size // ALLOCATED) * ALLOCATED


def given(result: Any) -> int:
    """Bytes that the allocator has given for the tensors of a result."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors_of(result))}
    return sum(_rounded(storage.nbytes()) for storage in storages.values())


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


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
        return Replay(call), False
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


def rounds_for(
    device: Device, contenders: dict[str, Replay], load: Callable[[int], None], ours: Collection[str]
) -> tuple[int, dict[str, int]]:
    """How many rounds to time, so that they take the seconds that a row may take, within bounds.

    Half of them are for ours, in every round. A rival that is slow takes part in fewer, and costs the row no more than
    its share of the other half, but for the fewest rounds that it must have.

    Args:
        device: where.
        contenders, load: see `times`.
        ours: names among the contenders.

    Returns:
        rounds, and `every` as `times` takes it.
    """
    fewest, most = device.sizes.rounds
    if fewest == most or not contenders:
        return fewest, {}
    start = time.perf_counter()
    pilot = device.times(contenders, load, 2)
    seconds = (time.perf_counter() - start) / 2
    alone = {name: min(values) * 1e-6 for name, values in pilot.items()}
    beside = max(seconds - sum(alone.values()), 0.0) / len(alone)

    def fitting(names: Collection[str], share: float) -> int:
        return int(share / max(sum(alone[name] + beside for name in names), 1e-9))

    half, theirs = device.sizes.round_seconds / 2, [name for name in contenders if name not in ours]
    rounds = max(fewest, min(most, fitting(ours, half)))
    wanted = {name: max(device.sizes.rival_rounds, fitting([name], half / len(theirs))) for name in theirs}
    return rounds, {name: max(1, rounds // count) for name, count in wanted.items()}


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
