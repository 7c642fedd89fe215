"""Forwards captured as CUDA graphs on their first use and replayed where the same shapes come again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

LOG = logging.getLogger(__name__)
LARGEST = 256  # rows; a forward over more of them is busy enough
PADDING = 16  # rows added at most
_PREFIX_BUCKET = 512


class Outputs(NamedTuple):
    """Of a forward.

    Args:
        logits: `[batch, rows, vocab]`.
        hidden: `[batch, rows, hidden]`, where they are read.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None


Forward = Callable[[], Outputs]


@dataclass(frozen=True)
class Captured:
    """One graph: what it reads, how it is run, and where its results lie, which the next replay overwrites."""

    inputs: tuple[torch.Tensor, ...]
    replay: Callable[[], None]
    outputs: Outputs


def capture(forward: Forward, device: torch.device) -> tuple[Callable[[], None], Outputs]:
    """Capture a forward on its device, after two runs beside it that compile and allocate."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = forward()
    return graph.replay, outputs


class Graphs:
    """The captured forwards of one model and one cache.

    Args:
        report: gets a line for each capture, and the reason if there can be none; None: the log.

    Attributes:
        reason: why forwards run eagerly; "" as long as they do not.
    """

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        self.report = report or LOG.info
        self.reason = ""
        self._captured: dict[Hashable, Captured] = {}
        self._version = -1

    def __len__(self) -> int:
        return len(self._captured)

    def run(
        self,
        key: tuple[int, ...],
        version: int,
        forward: Callable[..., Outputs],
        inputs: Sequence[torch.Tensor],
    ) -> Outputs:
        """A forward over these inputs, replayed if it was captured.

        Args:
            key: what the graph depends on besides the inputs' shapes: batch, rows, first row, prefix, rows of logits.
            version: of the memory the graph points into; graphs of another version are dropped.
            forward: what to run; it may do nothing that depends on numbers on the host, and running it twice must do
                no harm.
            inputs: its arguments, tensors whose content changes from call to call.
        """
        if self.reason:
            return forward(*inputs)
        if version != self._version:
            self._captured.clear()
            self._version = version
        known = (*key, *(size for tensor in inputs for size in tensor.shape))
        if known not in self._captured:
            start = time.perf_counter()
            held = tuple(tensor.clone() for tensor in inputs)
            try:
                self._captured[known] = Captured(held, *capture(lambda: forward(*held), held[0].device))
            except Exception as error:  # whatever a model does that cannot be captured is the reason
                self.reason = f"forwards run eagerly: {type(error).__name__}: {error}"
                self.report(self.reason)
                return forward(*inputs)
            batch, rows, first, prefix, _ = key
            self.report(
                f"captured a forward: batch {batch}, rows {first} to {first + rows - 1}, prefixes up to {prefix}, "
                f"in {time.perf_counter() - start:.2f} s"
            )
        found = self._captured[known]
        for held_tensor, tensor in zip(found.inputs, inputs, strict=True):
            held_tensor.copy_(tensor)
        found.replay()
        return found.outputs


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
