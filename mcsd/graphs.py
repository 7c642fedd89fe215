"""Forwards and whole steps captured as CUDA graphs on their first use, and replayed where they come again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cache import CACHES

LOG = logging.getLogger(__name__)
LARGEST = 256  # rows; a forward over more of them is busy enough
PADDING = 16  # rows added at most
ROOM = "room"  # what is refused where caches cannot grow to a prefix's bucket
_PREFIX_BUCKET = 512
_MOST = 64  # graphs over one cache
_PATIENCE = 8  # refusals
_TRIALS = 2  # uses: the second has other inputs than those that were there at the capture
_CLOSE = 2**-5  # of an entry's size; kernels that add in no fixed order stay far below
_AT_ONCE = 1 << 24  # entries


class Outputs(NamedTuple):
    """Of a forward.

    Args:
        logits: `[batch, rows, vocab]`.
        hidden: `[batch, rows, hidden]`, where they are read.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None


# the caches that a graph points into, by number, and how often each has moved
Memory = tuple[tuple[int, int], ...]


class ReplayError(RuntimeError):
    """A replay's results are not those of the function that was captured. What it wrote, and where, nobody knows."""


@dataclass
class Captured:
    """One graph.

    Args:
        memory: where it points.
        inputs: what it reads.
        replay: runs it.
        outputs: its results, which the next replay overwrites.
        trials: how many of its next uses are compared with the function.
    """

    memory: Memory
    inputs: tuple[torch.Tensor, ...]
    replay: Callable[[], None]
    outputs: Any
    trials: int = _TRIALS

    @property
    def is_lost(self) -> bool:
        """Whether a cache that it points to has moved since, or is gone."""
        caches = ((CACHES.get(serial), moved) for serial, moved in self.memory)
        return any(cache is None or cache.version != moved for cache, moved in caches)


# of operators that wait for the device, or copy what it has, if they are given a tensor there
_WAITING = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select"}
    | {"bincount", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})


class Rehearsal(TorchDispatchMode):
    """Refuses, with its name, what waits for a device or copies between it and the host.

    A capture that meets such an operator fails, and leaves the stream and the allocator in no good state.

    Args:
        device: where everything shall happen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, unless it is to be refused."""
        name = operator._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        indices = [index for index in args[1] if index is not None] if name in _INDEXING else []
        if any(map(self._is_there, tensors)) and (name in _WAITING or any(map(self._is_sent_for, indices))):
            raise RuntimeError(f"{name} waits for the device")
        found = operator(*args, **(kwargs or {}))
        if name in ("to", "_to_copy", "copy_", "copy"):
            source = args[1] if name.startswith("copy") else args[0]
            if self._is_there(source) != self._is_there(found):
                raise RuntimeError(f"{name} copies between the device and the host")
        return found

    def _is_there(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.device.type

    def _is_sent_for(self, index: torch.Tensor) -> bool:
        """Whether an index is counted before it is used, or comes from the host."""
        return index.dtype in (torch.bool, torch.uint8) or not self._is_there(index)


_LOCK = threading.Lock()  # one capture at a time in a process
_FAILED: list[Any] = []  # the graph whose capture failed last, which the allocator still asks


def capture(function: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[Callable[[], None], Any]:
    """Capture a function on its device, after two runs beside it that compile and allocate, the second a rehearsal.

    Args:
        function: what to capture; running it three times must do no harm.
        device: a CUDA device.
        pool: memory shared with other graphs, see `torch.cuda.graph_pool_handle`; None: the graph's own.

    Returns:
        what replays the graph, and the function's result, which a replay writes.

    Raises:
        RuntimeError: there is no CUDA device, or something in the function cannot be captured.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    with _LOCK, torch.cuda.device(device):
        ours, beside = torch.cuda.current_stream(), _beside(device)
        beside.wait_stream(ours)
        try:
            with torch.cuda.stream(beside):
                function()
                with Rehearsal(device):
                    function()
        finally:
            ours.wait_stream(beside)
        graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
        try:
            # a capture that fails leaves its own stream as the current one: the outer context puts that right
            with (
                torch.cuda.stream(ours),
                torch.cuda.graph(graph, pool=pool, stream=beside, capture_error_mode="thread_local"),
            ):
                outputs = function()
        except BaseException:
            _FAILED[:] = [graph]
            with suppress(Exception):  # until then the allocator gives no memory back
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            with suppress(RuntimeError):  # the device's random numbers stay refused until a capture ends well
                again = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=beside, capture_error_mode="thread_local")
                with torch.cuda.stream(ours), again:
                    torch.zeros(1, device=device)
            raise
    return graph.replay, outputs


@cache
def _beside(device: torch.device) -> Any:
    """The stream of a device's captures: graphs with one pool share memory only if they were captured on one stream."""
    return torch.cuda.Stream()


_under_way = threading.local()


def capturing() -> bool:
    """Whether this thread is about to capture something: what is captured within that becomes a part of it."""
    return getattr(_under_way, "yes", False)


class Graphs:
    """What was captured over one cache or two.

    Args:
        otherwise: what happens where nothing can be captured, for the report.
        shared: let the graphs share their memory. A result must then have been read before another graph is replayed.

    Attributes:
        report: gets a line for each capture, and the reasons where there can be none; None: the log gets them, a new
            reason as a warning.
    """

    def __init__(self, otherwise: str, shared: bool = False) -> None:
        self.otherwise, self.shared = otherwise, shared
        self.report: Callable[[str], None] | None = None
        self._captured: dict[tuple[Hashable, Memory], Captured] = {}
        self._refused: dict[Hashable, str] = {}
        self._distrusted = False
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._captured)

    def begin(self, report: Callable[[str], None] | None, again: bool = False) -> None:
        """A generation begins, or begins `again`, where all stays as it is.

        What there was no memory for may be tried again in another generation; other refusals stay.
        """
        self.report = report
        if again:
            return
        self._refused = {key: reason for key, reason in self._refused.items() if "OutOfMemory" not in reason}
        for reason in dict.fromkeys(self._refused.values()):
            (report or LOG.info)(reason)

    @property
    def off(self) -> bool:
        """Whether nothing is tried any more: a replay was wrong, or so much was refused."""
        return self._distrusted or len(self._refused) >= _PATIENCE

    def run(
        self,
        key: tuple[Hashable, ...],
        memory: Memory,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        what: str,
    ) -> Any:
        """A function of these inputs, replayed, and captured when it first comes; inside another capture, it is run.

        In a graph's first uses the function is run as well, and results and caches are compared.

        Args:
            key: what the graph depends on besides the inputs' shapes and dtypes.
            memory: the caches that it points into.
            function: what to run; it may do nothing that depends on numbers on the host which `key` leaves out, and
                running it several times must do no harm.
            inputs: its arguments, tensors whose content changes from call to call.
            what: this is, for the report.

        Returns:
            the function's result; a replay's lies where the one before it lay. None where it cannot be captured.

        Raises:
            ReplayError: they differ, or there was no memory to find that out.
        """
        if capturing():
            return function(*inputs)
        known = (*key, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if self.refuses(known):
            return None
        found = self._captured.pop((known, memory), None)
        if found is None:
            found = self._capture(known, memory, function, inputs, what)
            if found is None:
                return None
        self._captured[known, memory] = found  # at the end, as the one that was in use last
        for held, tensor in zip(found.inputs, inputs, strict=True):
            held.copy_(tensor)
        if not found.trials:
            found.replay()
            return found.outputs
        try:
            wanted = self._without(found, function), _sums(memory)
        except torch.OutOfMemoryError as error:  # nothing is lost: it can be run again
            self.refuse(known, error)
            return None
        found.replay()
        try:
            same = _alike((found.outputs, _sums(memory)), wanted)
        except torch.OutOfMemoryError as error:
            self.refuse(known, error)
            raise ReplayError(self._refused[known]) from error
        if not same:
            self._distrusted = True
            self._keep_only([])
            self.refuse(known, ReplayError(f"a replay of {what} did not do what was captured"))
            raise ReplayError(self._refused[known])
        found.trials -= 1
        return found.outputs

    @staticmethod
    def _without(found: Captured, function: Callable[..., Any]) -> Any:
        """What the function does by itself, run as it was when it was captured."""
        _under_way.yes = True
        try:
            return function(*found.inputs)
        finally:
            _under_way.yes = False

    def refuse(self, known: Hashable, error: BaseException) -> None:
        """Leave one thing uncaptured from now on, and say why."""
        reason = f"{self.otherwise}: {type(error).__name__}: {error}"
        if reason not in self._refused.values():
            (self.report or LOG.warning)(reason)
        self._refused[known] = reason
        self._keep_only([(key, one) for key, one in self._captured.items() if key[0] != known])

    def refuses(self, known: Hashable) -> bool:
        """Whether that has been refused, or everything."""
        return self.off or known in self._refused

    def _keep_only(self, kept: list[tuple[tuple[Hashable, Memory], Captured]]) -> None:
        """Give the other graphs back."""
        devices = {one.inputs[0].device for one in self._captured.values()} if len(kept) < len(self) else set()
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # one of the others may be under way
        self._captured = dict(kept)

    def _capture(
        self, known: Hashable, memory: Memory, function: Callable[..., Any], inputs: Sequence[torch.Tensor], what: str
    ) -> Captured | None:
        """The graph, in place of those that are lost, and of the one longest out of use if there are many; or None."""
        start = time.perf_counter()
        device = inputs[0].device
        self._keep_only([(key, one) for key, one in self._captured.items() if not one.is_lost][-(_MOST - 1) :])
        if self.shared and device.type == "cuda" and not self._captured:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        held = tuple(tensor.clone() for tensor in inputs)
        _under_way.yes = True
        try:
            replay, outputs = capture(lambda: function(*held), device, self._pool)
        except Exception as error:  # whatever a model does that cannot be captured is the reason
            # the end of a capture that failed complains, too
            cause = error.__context__ if "capture" in str(error) and error.__context__ else error
            self.refuse(known, cause)
            if self._pool is not None:
                self._pool = torch.cuda.graph_pool_handle()  # a failed capture may leave the other one in use
            return None
        finally:
            _under_way.yes = False
        (self.report or LOG.info)(f"captured {what}, in {time.perf_counter() - start:.2f} s")
        return Captured(memory, held, replay, outputs)


def _sums(memory: Memory) -> list[torch.Tensor]:
    """What has been written to the caches."""
    return [one for serial, _ in memory if (cache := CACHES.get(serial)) is not None for one in cache.sums()]


def _alike(found: Any, wanted: Any) -> bool:
    """Whether two results hold the same tensors, but for rounding.

    A choice that rounding has turned shows in the numbers that come of it; only what nothing comes of, such as the last
    token, may differ where any number does.
    """
    leaves = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    pairs = [pair for pair in leaves if isinstance(pair[0], torch.Tensor)]
    numbers = [pair for pair in pairs if pair[0].is_floating_point()]
    if not all(_close(*pair, _CLOSE) for pair in numbers):
        return False
    rounded = not all(_close(*pair, 0.0) for pair in numbers)
    return rounded or all(torch.equal(*pair) for pair in pairs if not pair[0].is_floating_point())


def _close(found: torch.Tensor, wanted: torch.Tensor, share: float) -> bool:
    """Whether entries differ by no more than this share of themselves or of what is usual."""
    for ours, theirs in zip(found.flatten().split(_AT_ONCE), wanted.flatten().split(_AT_ONCE), strict=True):
        ours, theirs = ours.float(), theirs.float()
        sizes = theirs.abs()
        sizes = sizes[(sizes > 0) & sizes.isfinite()]  # most of a cache has not been written
        usual = float(sizes.median()) if len(sizes) else 0.0
        if not torch.allclose(ours, theirs, rtol=share, atol=share * usual, equal_nan=True):
            return False
    return True


def fingerprint(model: torch.nn.Module) -> int:
    """What a captured forward has taken from the model for good: where its tensors lie, settings, and hooks."""
    tensors = tuple(tensor.data_ptr() for some in (model.parameters(), model.buffers()) for tensor in some)
    settings = tuple(
        (id(module), name, repr(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, list, tuple))
        or (isinstance(value, dict) and all(isinstance(one, (bool, int, float, str)) for one in value.values()))
    )
    hooks = tuple((*module._forward_pre_hooks, None, *module._forward_hooks) for module in model.modules())
    return hash((tensors, settings, hooks))


def row_bucket(rows: int) -> int:
    """Rows to capture for so many: a power of two, from 16 on a multiple of 16."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16


def prefix_bucket(longest: int) -> int:
    """Slots to read for prefixes of this length: a power of two, at least 512, which the kernels take as a bound."""
    return max(_PREFIX_BUCKET, 1 << (longest - 1).bit_length()) if longest else _PREFIX_BUCKET
