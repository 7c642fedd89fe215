"""What the loop asks of a drafter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from mcsd_kernels import SamplingParams


@dataclass
class State:
    """What a drafter may look at: the batch as it stands.

    Args:
        sequences: for each request its committed token ids, prompt and continuation; the last one is the root of the
            next tree.
        active: for each request whether it is still generating.
        seeds: `[batch]` int64, for `draw_candidates`.
        step: number of the target call to come; a drafter's random numbers must depend on it.
        sampling: the draft's temperature and filters.
        device: where the proposal's tensors belong.
        capacity: the longest a request's committed tokens can become.
        vocab: size of the target's vocabulary.
    """

    sequences: list[list[int]]
    active: list[bool]
    seeds: torch.Tensor
    step: int
    sampling: SamplingParams
    device: torch.device
    capacity: int
    vocab: int


@dataclass
class Proposal:
    """A token tree for each request.

    Args:
        tokens: `[batch, nodes]` int64; column 0 is the root, siblings in draw order, -1 a missing candidate.
        parents: `[nodes]` or `[batch, nodes]` int32; -1 for the root and for padding.
        depth: a bound on how deep the deepest node lies; better the same for every step.
        draft_logits: `[batch, nodes, vocab]`, or `[rows, vocab]` with `draft_rows`: what the children of each node were
            drawn from. None for "point".
        draft_rows: `[batch, nodes]` int32 row numbers.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depth: int
    draft_logits: torch.Tensor | None = None
    draft_rows: torch.Tensor | None = None


class Drafter(ABC):
    """Proposes token trees. A subclass needs `propose`; `begin`, `keep` and `end` are for drafters with a memory.

    What a request is proposed must depend on that request alone, or its text comes to depend on its neighbours.

    Args:
        proposal: how siblings are drawn, one of `mcsd_kernels.verify`'s proposals; verification is lossless only if
            this is what `propose` really does.
    """

    proposal: str = "point"

    @abstractmethod
    def propose(self, state: State) -> Proposal:
        """A tree for every request, rooted at the last committed token."""

    def begin(self, state: State) -> None:  # noqa: B027 - optional hook
        """A generation starts: the prompts are in `state`."""

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:  # noqa: B027 - optional hook
        """The target has spoken: `path` and `length` as `verify` returned them; `state` not yet advanced."""

    def end(self) -> None:  # noqa: B027 - optional hook
        """The generation is over, however it ended."""


class Adapter(Drafter):
    """Any object with `propose`, and perhaps `proposal`, `begin`, `keep` and `end`, as a `Drafter`.

    Args:
        inner: the object.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.proposal = getattr(inner, "proposal", "point")
        for name in ("begin", "keep", "end"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def propose(self, state: State) -> Proposal:
        """The object's own proposal."""
        proposal: Proposal = self.inner.propose(state)
        return proposal
