"""What the loop asks of a drafter."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from mcsd_kernels import SamplingParams

from ..cache import Prefix

if TYPE_CHECKING:
    from ..scoring import Scorer

_Some = TypeVar("_Some", bound="Drafter")


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
        hidden: for a drafter with `reads_hidden` the target's last hidden states, what its LM head reads, after its
            most recent forward: in `begin` `[batch, longest prompt - 1, hidden]`, row t after the prompt's token t
            (rows past a request's own prompt are undefined); in `keep` `[batch, nodes, hidden]`, row i after node i.
            None otherwise.
        scorer: the target with its cache, for a drafter with `reads_cache`; None in a state made by hand.
        prefix: on the device and on the host, how many tokens each request has before its root.
        shorter: the same without one of them (not below 0), for a drafter that reads the last two tokens.
        tail: `[batch, 2]` int64 on the device: the last two committed tokens; the last one twice, if it is alone.
        coins: a step's number, and `[steps, batch, numbers]` f32 from it on: what the loop gives `verify`. A proposal
            that depends on them is not verified losslessly.
        small: `[5, batch]` int64 on the device, which `prefix`, `shorter`, `tail` and `step_on_device` are read from.
    """

    sequences: list[list[int]]
    active: list[bool]
    seeds: torch.Tensor
    step: int
    sampling: SamplingParams
    device: torch.device
    capacity: int
    vocab: int
    hidden: torch.Tensor | None = None
    scorer: Scorer | None = None
    prefix: Prefix = field(init=False)
    shorter: Prefix = field(init=False)
    tail: torch.Tensor = field(init=False)
    coins: tuple[int, torch.Tensor] | None = field(init=False, repr=False, default=None)
    small: torch.Tensor = field(init=False, repr=False)
    _before: tuple[list[int], list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Bring everything on the device up to `sequences` and `step`, with one copy to it."""
        before = [len(sequence) - 1 for sequence in self.sequences]
        less = [max(n - 1, 0) for n in before]
        last, one_before = [s[-1] for s in self.sequences], [s[-2:][0] for s in self.sequences]
        small = torch.from_numpy(np.array([before, less, one_before, last, [self.step] * len(before)], np.int64))
        if self.device.type != "cpu":
            small = small.to(self.device, non_blocking=True)
        self._before = before, less
        self.read(small)

    def read(self, small: torch.Tensor) -> None:
        """Take from `small` what is on the device."""
        self.small = small
        lengths = small[:2].int()
        self.prefix, self.shorter = Prefix(lengths[0], self._before[0]), Prefix(lengths[1], self._before[1])
        self.tail = small[2:4].T

    @property
    def step_on_device(self) -> torch.Tensor:
        """`[]` int64: `step`."""
        return self.small[4, 0]


@dataclass
class Proposal:
    """A token tree for each request.

    Args:
        tokens: `[batch, nodes]` int64; column 0 is the root, the text's last token (refused on a CPU if it is another,
            put right on other devices); siblings in draw order, -1 a missing candidate.
        parents: `[nodes]` or `[batch, nodes]` int32; -1 for the root and for padding.
        depth: a bound on how deep the deepest node lies; better the same for every step.
        draft_logits: `[batch, nodes, vocab]`, or `[rows, vocab]` with `draft_rows`: what the children of each node were
            drawn from. None for "point".
        draft_rows: `[batch, nodes]` int32 row numbers.
        point_nodes: `[nodes]` or `[batch, nodes]` bool: nodes that were chosen, not drawn; they come after the drawn
            ones among their siblings. None: what `Drafter.proposal` says of all.
        origin: `[nodes]` or `[batch, nodes]` int32 >= 0: which of several drafters proposed a node, for `Stats`.
        draft_ids: `[draft_vocab]` int64, ascending: the target's token of each column of `draft_logits`, which are
            then that wide. None: columns are the target's tokens.
        draft_sampling: the draft's temperature and filters, where they are not the target's.
        ancestors: `[batch or 1, nodes, words]` int32 and
        node_depth: `[nodes]` or `[batch, nodes]` int64: what `parents` say, from a drafter that has it at hand (see
            `mcsd_kernels.ancestor_bits`). None: worked out at every step.
        scored: how many nodes, the first ones, the target scores; those after them are leaves that are tested all the
            same, and an accepted one is the step's last token. None: all.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depth: int
    draft_logits: torch.Tensor | None = None
    draft_rows: torch.Tensor | None = None
    point_nodes: torch.Tensor | None = None
    origin: torch.Tensor | None = None
    draft_ids: torch.Tensor | None = None
    draft_sampling: SamplingParams | None = None
    ancestors: torch.Tensor | None = None
    node_depth: torch.Tensor | None = None
    scored: int | None = None


class Captures(NamedTuple):
    """What a captured step takes from a drafter for good.

    Args:
        nodes: of its trees.
        key: what `propose` and `keep` depend on besides the tensors in `State`; equal keys, equal steps.
        memory: `Scorer.memory` of each model of the drafter's own.
    """

    nodes: int
    key: Hashable
    memory: tuple[tuple[int, int], ...] = ()


class Drafter(ABC):
    """Proposes token trees. A subclass needs `propose`; the others are for drafters with a memory.

    What a request is proposed must depend on that request alone, or its text comes to depend on its neighbours.

    Args:
        proposal: how siblings are drawn, one of `mcsd_kernels.verify`'s proposals; verification is lossless only if
            this is what `propose` really does.
        reads_hidden: `State.hidden` is wanted.
        reads_cache: `State.scorer` is used, so the target's cache must hold the prompts when `begin` is called.
        alone: accepted paths stay in this drafter's own tree; False during a generation in which trees are merged.
    """

    proposal: str = "point"
    reads_hidden: bool = False
    reads_cache: bool = False
    alone: bool = True

    @abstractmethod
    def propose(self, state: State) -> Proposal:
        """A tree for every request, rooted at the last committed token."""

    def begin(self, state: State) -> None:  # noqa: B027 - optional hook
        """A generation starts: the prompts are in `state`."""

    def restart(self, state: State) -> None:
        """The same generation goes on from these texts as if they were prompts: what was read is not to be relied on.

        The step that was under way comes again.
        """
        self.end()
        self.begin(state)

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:  # noqa: B027 - optional hook
        """The target has spoken: `path` and `length` as `verify` returned them; `state` not yet advanced.

        Where several drafters make up one tree, numbers past a proposal's own nodes belong to the others.
        """

    def end(self) -> None:  # noqa: B027 - optional hook
        """The generation is over, however it ended."""

    def parts(self) -> list[Any]:
        """This drafter and those that it is made of: none serves a second generation in the middle of one."""
        return [self]

    def captures(self, state: State) -> Captures | None:
        """Whether the next step may be captured as a CUDA graph and replayed from then on, in other generations too.

        A replay repeats what the device did and runs no line of the drafter. So only a drafter may answer whose
        `propose` and `keep` look at nothing that changes from step to step but what is `carried` and `State`'s `small`,
        `prefix.lengths`, `shorter.lengths`, `tail`, `seeds`, `step_on_device` and tensors in `sampling`, leave nothing
        behind on the host, and do no harm when they are called several times. What they need room for must be there
        when this returns. Nobody asks before the first step is over.

        Returns:
            what such a graph depends on; None: the step is run as it comes, as by default.
        """
        return None

    def carried(self) -> tuple[torch.Tensor, ...]:
        """Tensors that a step leaves for the next, such as hidden states; always as many, and of the same shapes."""
        return ()

    def carry(self, state: State, tensors: tuple[torch.Tensor, ...]) -> None:  # noqa: B027 - optional hook
        """Take what a captured step has `carried`, in place of `propose` and `keep`; `state` is what `keep` gets."""

    def forgetful(self: _Some) -> _Some:
        """A copy for a step that is being captured: it shares models and caches, and knows nothing of the requests.

        It is kept as long as the graph, with the tensors that the graph reads, and the graph as long as the target: it
        must not hold the target itself.
        """
        return copy.copy(self)


class Adapter(Drafter):
    """Any object with `propose`, and perhaps `begin`, `restart`, `keep` and `end`, as a `Drafter`.

    Args:
        inner: the object.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.proposal = getattr(inner, "proposal", "point")
        self.reads_hidden = bool(getattr(inner, "reads_hidden", False))
        self.reads_cache = bool(getattr(inner, "reads_cache", False))
        for name in ("begin", "restart", "keep", "end"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def parts(self) -> list[Any]:
        """The object."""
        return [self.inner]

    def propose(self, state: State) -> Proposal:
        """The object's own proposal."""
        proposal: Proposal = self.inner.propose(state)
        return proposal
