"""Forwards and whole steps captured as CUDA graphs on their first use, and replayed where they come again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

LOG = logging.getLogger(__name__)
LARGEST = 256  # rows; a forward over more of them is busy enough
PADDING = 16  # rows added at most
_PREFIX_BUCKET = 512
_MOST = 64  # graphs over one cache


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


@dataclass(frozen=True)
class Captured:
    """One graph: where it points, what it reads, how it is run, and its results, which the next replay overwrites."""

    memory: Memory
    inputs: tuple[torch.Tensor, ...]
    replay: Callable[[], None]
    outputs: Any

    def is_lost(self, memory: Memory) -> bool:
        """Whether something it points to has moved since."""
        now = dict(memory)
        return any(now.get(cache, moved) != moved for cache, moved in self.memory)


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture a function on its device, after two runs beside it that compile and allocate."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
    return graph.replay, outputs


_under_way = threading.local()


def capturing() -> bool:
    """Whether this thread is about to capture something: what is captured within that becomes a part of it."""
    return getattr(_under_way, "yes", False)


class Graphs:
    """What was captured over one cache or two.

    Args:
        otherwise: what happens where nothing can be captured, for the report.
        report: gets a line for each capture, and the reason if there can be none; None: the log.

    Attributes:
        reason: why nothing is captured; "" as long as it is.
    """

    def __init__(self, otherwise: str, report: Callable[[str], None] | None = None) -> None:
        self.otherwise = otherwise
        self.report = report or LOG.info
        self.reason = ""
        self._captured: dict[Hashable, Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(
        self,
        key: tuple[Hashable, ...],
        memory: Memory,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        what: str,
    ) -> Any:
        """A function of these inputs, replayed if it was captured.

        Args:
            key: what the graph depends on besides the inputs' shapes and dtypes.
            memory: the caches that it points into.
            function: what to run; it may do nothing that depends on numbers on the host which `key` leaves out, and
                running it twice must do no harm.
            inputs: its arguments, tensors whose content changes from call to call.
            what: this is, for the report.

        Returns:
            the function's result; a replay's lies where the one before it lay.
        """
        if self.reason or capturing():
            return function(*inputs)
        known = (*key, memory, *((tensor.shape, tensor.dtype) for tensor in inputs))
        found = self._captured.pop(known, None)
        if found is None:
            found = self._capture(memory, function, inputs, what)
            if found is None:
                return function(*inputs)
            # dropped here, for now none of them is being replayed
            kept = [(key, one) for key, one in self._captured.items() if not one.is_lost(memory)]
            self._captured = dict(kept[-(_MOST - 1) :])
        self._captured[known] = found  # at the end, as the one that was in use last
        for held, tensor in zip(found.inputs, inputs, strict=True):
            held.copy_(tensor)
        found.replay()
        return found.outputs

    def _capture(
        self, memory: Memory, function: Callable[..., Any], inputs: Sequence[torch.Tensor], what: str
    ) -> Captured | None:
        """The graph; None, and the reason is known from then on, where there can be none."""
        start = time.perf_counter()
        held = tuple(tensor.clone() for tensor in inputs)
        _under_way.yes = True
        try:
            replay, outputs = capture(lambda: function(*held), held[0].device)
        except Exception as error:  # whatever a model does that cannot be captured is the reason
            self.reason = f"{self.otherwise}: {type(error).__name__}: {error}"
            self.report(self.reason)
            return None
        finally:
            _under_way.yes = False
        self.report(f"captured {what}, in {time.perf_counter() - start:.2f} s")
        return Captured(memory, held, replay, outputs)


def fingerprint(model: torch.nn.Module) -> int:
    """What a captured forward has taken from the model for good: where its weights lie, and its modules' settings."""
    weights = tuple(parameter.data_ptr() for parameter in model.parameters())
    settings = tuple(
        (id(module), name, repr(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, list, tuple))
    )
    return hash((weights, settings))


def row_bucket(rows: int) -> int:
    """Rows to capture for so many: a power of two, from 16 on a multiple of 16."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16


def prefix_bucket(longest: int) -> int:
    """Slots to read for prefixes of this length: a power of two, at least 512, which the kernels take as a bound."""
    return max(_PREFIX_BUCKET, 1 << (longest - 1).bit_length()) if longest else _PREFIX_BUCKET
