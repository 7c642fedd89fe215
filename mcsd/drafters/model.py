"""A smaller model as drafter: it grows the tree level by level, with tree attention over its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams, draw_candidates
from mcsd_kernels._backend import choose

from ..scoring import Scorer
from ..trees import StaticTree, chain_bits, chain_depths, check_branching, check_parents, columns, parents_of
from .base import Drafter, Proposal, State
from .stopping import Stopping, going_on


@runtime_checkable
class SubVocabulary(Protocol):
    """A model that knows some of the target's tokens only, such as `mcsd.draft_model.SubVocabularyDraft`."""

    @property
    def sub_vocab(self) -> torch.Tensor:
        """`[columns]` int64, ascending: the target's tokens that it knows."""

    def reduced(self) -> AbstractContextManager[None]:
        """Inside this context its logits have one column for each of them."""


@dataclass(frozen=True)
class _Plan:
    """What the trees of one shape need at every step of a generation.

    Args:
        tree: the shape.
        draws: for each level and each of its calls: seeds, node numbers and sampling parameters by row.
        draft_rows: `[batch, nodes]` int32.
    """

    tree: StaticTree
    draws: list[list[tuple[torch.Tensor, torch.Tensor, SamplingParams]]]
    draft_rows: torch.Tensor


class ModelDrafter(Drafter):
    """Draws the children of every node from a smaller model with the same vocabulary, or a part of it.

    Args:
        model: a causal language model.
        branching: children of a node at depth 0, 1, ...
        proposal: how they are drawn; "point" takes the most probable ones.
        attention: "auto", "tree" or "dense", as in `mcsd.generate`.
        parents: a tree of any shape in place of `branching`: -1 for the root, then each node's parent, which has a
            smaller number; siblings in draw order.
        stopping: asked at each level which of its nodes get children, see `Stopping`; None: all.

    Raises:
        ValueError: `branching` is not a list of whole numbers >= 1, or `parents` is no tree.
    """

    alone = True
    """Accepted paths stay in this drafter's own tree: at most a leaf is then unread. False where trees are merged."""

    def __init__(
        self,
        model: PreTrainedModel,
        branching: Sequence[int] = (4, 2, 2),
        proposal: str = "without_replacement",
        attention: str = "auto",
        *,
        parents: Sequence[int] | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        self.model, self.attention, self.stopping = model, attention, stopping
        self.branching = None if parents is not None else check_branching(branching)
        self.parents = parents_of(branching) if parents is None else check_parents(parents)
        self.proposal = proposal
        self._contexts = ExitStack()

    def tree(self, state: State) -> tuple[int, ...]:
        """Parents of the next tree; a subclass may change them from step to step, within the nodes of `parents`.

        Whatever that depends on must be known before anything of the step is drawn.
        """
        return self.parents

    def begin(self, state: State) -> None:
        """Read the prompts, all but what `propose` will read anyway."""
        graphs = None if state.scorer is None else state.scorer.graphs
        batch = None if graphs is None else len(state.sequences)
        report = None if graphs is None else graphs.report
        room = state.capacity + len(self.parents)
        self._scorer = Scorer(self.model, room, self.attention, batch=batch, report=report)
        self._contexts.enter_context(self._scorer.attending())
        self._draft_ids: torch.Tensor | None = None
        if isinstance(self.model, SubVocabulary) and choose(None, state.device) == "torch":
            self._draft_ids = self.model.sub_vocab
            self._contexts.enter_context(self.model.reduced())
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._drawn_from: torch.Tensor | None = None
        prompts = [sequence[:-1] for sequence in state.sequences]
        self._read_up_to = [len(prompt) for prompt in prompts]
        self._unread = 1  # how many of the committed tokens the next step reads, if it is alone
        self._chains = {n: (chain_bits(n, state.device), chain_depths(n, state.device)) for n in (1, 2)}
        self._scorer.prefill(columns(prompts, state.device), self._read_up_to, join=True)

    def propose(self, state: State) -> Proposal:
        """Draw the tree's levels one after the other; each level of inner nodes is one forward of the model."""
        batch = len(state.sequences)
        plan = self._plan = self._planned(state)
        tree = plan.tree
        logits = self._read(state)
        tokens = torch.full((batch, tree.nodes), -1, device=state.device)
        tokens[:, 0] = state.tail[:, -1]
        drawn_from = self._room(logits, len(tree.inner))
        for level, nodes in enumerate(tree.level_nodes):
            first, after = tree.levels[level], tree.levels[level + 1]
            if level:
                logits = self._scorer.score(
                    tokens[:, nodes],
                    tree.ancestors[:, first:after],
                    tree.inner_depth[first:after],
                    state.prefix,
                    offset=first,
                )
            if drawn_from is not None and drawn_from is not logits:
                drawn_from[:, first:after] = logits
            goes_on = None
            if self.stopping is not None:
                goes_on = going_on(self.stopping, level, logits, None, tokens[:, nodes])
            for draw, (seeds, numbers, sampling) in zip(tree.draws[level], plan.draws[level], strict=True):
                some = logits if draw.rows is None else logits[:, draw.rows]
                children = draw_candidates(
                    some.reshape(-1, some.shape[-1]),
                    draw.width,
                    seeds,
                    state.step,
                    proposal=self.proposal,
                    sampling=sampling,
                    nodes=numbers,
                ).view(batch, -1, draw.width)
                if self._draft_ids is not None:
                    children = torch.where(children < 0, -1, self._draft_ids[children])
                if goes_on is not None:
                    some_go_on = goes_on if draw.rows is None else goes_on[:, draw.rows]
                    children = children.masked_fill(~some_go_on[..., None], -1)
                tokens[:, draw.children] = draw.pick(children)
        proposal = Proposal(tokens, tree.parents, tree.depth, ancestors=tree.node_ancestors, node_depth=tree.node_depth)
        if drawn_from is not None:
            proposal.draft_logits, proposal.draft_rows = drawn_from.flatten(0, 1), plan.draft_rows
            proposal.draft_ids = self._draft_ids
        return proposal

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """Keep the accepted nodes that were read while drafting; leaves never were."""
        self._read_up_to = [len(sequence) for sequence in state.sequences]
        self._unread = 2
        tree = self._plan.tree
        if len(tree.inner) == tree.depth:
            return  # what was read is a chain, which lies in place
        slots = tree.slots[path.clamp(0, tree.nodes - 1).long()]
        slots = torch.where((path < 0) | (path >= tree.nodes), -1, slots).int()
        self._scorer.keep(state.prefix, slots, (slots >= 0).sum(1, dtype=torch.int32))

    def end(self) -> None:
        """Give the model its own attention back, and the cache's memory free."""
        self._contexts.close()
        self._drawn_from = None
        self._plans = {}
        if hasattr(self, "_scorer"):
            del self._scorer

    def _planned(self, state: State) -> _Plan:
        parents = self.tree(state)
        if parents not in self._plans:
            tree = StaticTree.of(parents, state.device, self.proposal == "greedy")
            batch = len(state.sequences)
            draws = [[self._by_row(state, draw.nodes) for draw in level] for level in tree.draws]
            first = torch.arange(batch, device=state.device)[:, None] * len(tree.inner)
            self._plans[parents] = _Plan(tree, draws, (first + tree.slots.clamp(min=0)).int())
        return self._plans[parents]

    def _by_row(self, state: State, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, SamplingParams]:
        """Seeds, node numbers and sampling parameters for some nodes of every request."""
        sampling = SamplingParams() if self.proposal == "point" else _repeat(state.sampling, len(nodes))
        return state.seeds.repeat_interleave(len(nodes)), nodes.repeat(len(state.sequences)), sampling

    def _room(self, logits: torch.Tensor, inner: int) -> torch.Tensor | None:
        """`[batch, inner, columns]` for what the children are drawn from; None for "point", where nobody asks.

        It is the same memory at every step: fresh pages cost more than the copy.
        """
        if self.proposal == "point":
            return None
        if inner == 1:
            return logits
        shape = (logits.shape[0], inner, logits.shape[2])
        if self._drawn_from is None or self._drawn_from.shape != shape:
            self._drawn_from = logits.new_empty(shape)
        return self._drawn_from

    def _read(self, state: State) -> torch.Tensor:
        """Read what is committed and not yet cached: the root, and before it a leaf that was accepted.

        Returns:
            `[batch, 1, columns]` logits after each request's root.
        """
        if not self.alone:
            return self._read_all(state)
        # always two tokens, whatever was accepted, so that shapes and a request's numbers depend on nothing else
        bits, depth = self._chains[self._unread]
        before = state.prefix if self._unread == 1 else state.prefix.back(1)
        return self._scorer.score(state.tail[:, -self._unread :], bits, depth, before, last_only=True)[:, -1:]

    def _read_all(self, state: State) -> torch.Tensor:
        """The same where any number of tokens may be unread."""
        lengths = [len(sequence) for sequence in state.sequences]
        width = max(length - read for length, read in zip(lengths, self._read_up_to, strict=True))
        # a request with less that is new reads some of its text again, to no effect, and so stays within its room
        start = [max(length - width, 0) for length in lengths]
        tokens = columns([s[first:] for s, first in zip(state.sequences, start, strict=True)], state.device)
        logits = self._scorer.score(tokens, chain_bits(tokens.shape[1], state.device), None, start)
        last = torch.tensor([n - first - 1 for n, first in zip(lengths, start, strict=True)], device=state.device)
        return logits[torch.arange(len(lengths), device=state.device), last][:, None]


def _repeat(sampling: SamplingParams, times: int) -> SamplingParams:
    """Each request's parameters `times` times in a row."""
    fields = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return SamplingParams(
        *(f.repeat_interleave(times) if isinstance(f, torch.Tensor) and f.dim() else f for f in fields)
    )
