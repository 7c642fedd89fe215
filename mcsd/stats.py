"""What a generation cost and what it accepted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch


class Phase:
    """A context whose time counts as `name`; a generator would cost twice as much, five times a step."""

    __slots__ = ("name", "seconds", "start")
    finish: ClassVar[Callable[[], None] | None] = None

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if Phase.finish is not None:
            Phase.finish()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start


@contextmanager
def device_time(device: torch.device) -> Iterator[None]:
    """Inside, every phase of this process waits for the device, so that its work counts where it was asked for."""
    before = Phase.finish
    if device.type == "cuda":
        Phase.finish = partial(torch.cuda.synchronize, device)
    try:
        yield
    finally:
        Phase.finish = before


@dataclass
class Stats:
    """Counters of one `generate` call.

    Args:
        target_calls: tree-scoring forwards of the target (prefill not counted).
        request_calls: the same, counted once for each request that was still generating.
        tokens: tokens emitted, over all requests.
        tested_by_depth: entry d: steps in which a node of depth d was accepted and depth d + 1 was on offer.
        accepted_by_depth: entry d: steps in which a node of depth d + 1 was accepted.
        seconds: wall time by phase: prefill (with what a model is asked once, before its first prompt), draft, score,
            verify, keep, other; and step, for steps that were replayed as one. On a GPU that is the time to launch a
            phase's work, and "other" waits for all of it; see `device_time`.
        interrupted: generation was stopped from the keyboard.
        status: for each request the `mcsd_kernels.Status` bits met, 0 for none.
        proposed_by_origin: candidates by `Proposal.origin`, where a drafter says it.
        accepted_by_origin: those accepted.
    """

    target_calls: int = 0
    request_calls: int = 0
    tokens: int = 0
    tested_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    status: list[int] = field(default_factory=list)
    proposed_by_origin: dict[int, int] = field(default_factory=dict)
    accepted_by_origin: dict[int, int] = field(default_factory=dict)

    @property
    def tokens_per_call(self) -> float:
        """Tokens emitted for each target forward of a request; plain decoding has 1."""
        return self.tokens / self.request_calls if self.request_calls else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the steps that accepted a node of depth d + 1 among those that had one on offer there."""
        return [
            accepted / tested if tested else 0.0
            for accepted, tested in zip(self.accepted_by_depth, self.tested_by_depth, strict=True)
        ]

    @property
    def total_seconds(self) -> float:
        """Wall time of all phases."""
        return sum(self.seconds.values())

    def phase(self, name: str) -> Phase:
        """Add the time spent inside to a phase."""
        return Phase(self.seconds, name)

    def count(self, accepted: int, on_offer: int) -> None:
        """Record one request's step: how deep it accepted, and down to which depth it found candidates."""
        for row in (self.tested_by_depth, self.accepted_by_depth):
            row.extend([0] * (on_offer - len(row)))
        for depth in range(min(accepted + 1, on_offer)):
            self.tested_by_depth[depth] += 1
            self.accepted_by_depth[depth] += depth < accepted

    def count_origins(self, proposed: Iterable[int], accepted: Iterable[int]) -> None:
        """Record where one request's candidates came from, and those accepted; a negative entry is none."""
        for row, origins in ((self.proposed_by_origin, proposed), (self.accepted_by_origin, accepted)):
            for origin in origins:
                if origin >= 0:
                    row[origin] = row.get(origin, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        origins = {
            "proposed_by_origin": self.proposed_by_origin,
            "accepted_by_origin": self.accepted_by_origin,
        }
        return {
            "tokens": self.tokens,
            "target_calls": self.target_calls,
            "tokens_per_call": round(self.tokens_per_call, 4),
            "acceptance_by_depth": [round(a, 4) for a in self.acceptance_by_depth],
            "tokens_per_second": round(self.tokens / self.total_seconds, 3) if self.total_seconds else 0.0,
            "seconds": {name: round(value, 6) for name, value in self.seconds.items()},
            "interrupted": self.interrupted,
            "status": self.status,
            **(origins if self.proposed_by_origin else {}),
        }
