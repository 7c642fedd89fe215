"""Trees of a given shape, grown level by level: what all drafters that do so have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F

from mcsd_kernels import SamplingParams, draw_candidates

from ..trees import StaticTree, check_branching, check_parents, parents_of
from .base import Drafter, Proposal, State
from .stopping import Stopping, check_hook, going_on

_Some = TypeVar("_Some", bound="LevelDrafter")


def repeat(sampling: SamplingParams, times: int) -> SamplingParams:
    """Each request's parameters `times` times in a row."""
    fields = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return SamplingParams(
        *(f.repeat_interleave(times) if isinstance(f, torch.Tensor) and f.dim() else f for f in fields)
    )


@dataclass(frozen=True)
class Plan:
    """What the trees of one shape need at every step of a generation.

    Args:
        tree: the shape.
        proposal: how siblings are drawn.
        draws: for each level and each of its calls: seeds, node numbers and sampling parameters by row.
        parts: for each level its rows among those of all levels.
        draft_rows: `[batch, nodes]` int32, the row that each inner node's children are drawn from.
    """

    tree: StaticTree
    proposal: str
    draws: list[list[tuple[torch.Tensor, torch.Tensor, SamplingParams]]]
    parts: list[slice]
    draft_rows: torch.Tensor

    @staticmethod
    def of(
        parents: tuple[int, ...],
        state: State,
        proposal: str,
        sampling: SamplingParams | None = None,
        shares_rows: bool = False,
    ) -> Plan:
        """The plan for a tree with these parents.

        Args:
            parents: see `StaticTree.of`.
            state: its requests, seeds and device; nothing of it changes while the generation lasts.
            proposal: how siblings are drawn.
            sampling: of the draft; None: the target's.
            shares_rows: all nodes of a level draw from one row.
        """
        tree = StaticTree.of(parents, state.device, proposal == "greedy")
        batch = len(state.sequences)
        law = SamplingParams() if proposal == "point" else sampling or state.sampling
        draws = []
        for level in tree.draws:
            calls = []
            for draw in level:
                count = 1 if shares_rows and proposal == "point" else len(draw.nodes)
                calls.append(
                    (state.seeds.repeat_interleave(count), draw.nodes[:count].repeat(batch), repeat(law, count))
                )
            draws.append(calls)
        starts, row = tree.levels, tree.slots[:-1].clamp(min=0)
        if shares_rows:
            starts, row = tuple(range(tree.depth + 1)), tree.node_depth.clamp(max=tree.depth - 1)
        first = torch.arange(batch, device=state.device)[:, None] * starts[-1]
        return Plan(tree, proposal, draws, [slice(*part) for part in pairwise(starts)], (first + row).int())

    def draw(
        self,
        level: int,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        step: int | torch.Tensor,
        goes_on: torch.Tensor | None = None,
        token_of: torch.Tensor | None = None,
    ) -> None:
        """In place: the children of a level's nodes.

        Args:
            level: depth of the nodes.
            logits: `[batch, nodes, columns]`, or `[batch, 1, columns]` if they share a row.
            tokens: `[batch, nodes of the tree]` int64, gets the children.
            step: see `draw_candidates`.
            goes_on: `[batch, nodes]` bool, which nodes get children; None: all.
            token_of: `[columns + 1]` int64, the token of each column, and -1; None: columns are tokens.
        """
        batch, rows, columns = logits.shape
        for draw, (seeds, numbers, sampling) in zip(self.tree.draws[level], self.draws[level], strict=True):
            count = len(draw.nodes)
            some = logits if draw.rows is None or rows == 1 else logits[:, draw.rows]
            if rows == 1 and self.proposal != "point":  # with one row, "point" has the same children everywhere
                some = some.expand(-1, count, -1)
            children = draw_candidates(
                some.reshape(-1, columns),
                draw.width,
                seeds,
                step,
                proposal=self.proposal,
                sampling=sampling,
                nodes=numbers,
            ).view(batch, -1, draw.width)
            if token_of is not None:
                children = token_of.take(children)  # a missing child, -1, finds the -1 at the end
            if goes_on is not None:
                some_go_on = goes_on if draw.rows is None else goes_on[:, draw.rows]
                children = children.masked_fill(~some_go_on[..., None], -1)
            tokens[:, draw.children] = draw.pick(children.expand(-1, count, -1))


class LevelDrafter(Drafter):
    """Grows a tree of a given shape: a subclass says, level by level, what the nodes' children are drawn from.

    Args:
        branching: children of a node at depth 0, 1, ...
        proposal: how they are drawn; "point" takes the most probable ones.
        parents: a tree of any shape in place of `branching`: -1 for the root, then each node's parent, which has a
            smaller number; siblings in draw order.
        sampling: temperature and filters of the draft; None: the target's.
        stopping: asked at each level which of its nodes get children, see `Stopping`; None: all.

    Attributes:
        nodes: the next trees are the first so many nodes of `parents`; None: all. Whatever that depends on must be
            known before anything of a step is drawn.

    Raises:
        ValueError: `branching` is not a list of whole numbers >= 1, or `parents` is no tree.
    """

    shares_rows = False
    """All nodes of a level draw from one row."""

    def __init__(
        self,
        branching: Sequence[int],
        proposal: str,
        *,
        parents: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        self.proposal, self.sampling, self.stopping = proposal, sampling, check_hook(stopping)
        self.branching = None if parents is not None else check_branching(branching)
        self.parents = parents_of(branching) if parents is None else check_parents(parents)
        self.nodes: int | None = None
        self._contexts = ExitStack()
        self._draft_ids: torch.Tensor | None = None
        self._token_of: torch.Tensor | None = None
        self._ids_hash: int | None = None

    def with_tree(self: _Some, parents: Sequence[int], proposal: str) -> _Some:
        """The same drafter with a tree of any shape, see `parents`; models are shared."""
        other = copy.copy(self)
        other.branching, other.parents, other.proposal = None, check_parents(parents), proposal
        other._contexts = ExitStack()
        return other

    def begin(self, state: State) -> None:
        """Forget the generation before."""
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._drawn_from: torch.Tensor | None = None

    @torch.no_grad()
    def propose(self, state: State) -> Proposal:
        """Draw the tree's levels one after the other."""
        parents = self.parents[: self.nodes]
        if parents not in self._plans:
            self._plans[parents] = Plan.of(parents, state, self.proposal, self.sampling, self.shares_rows)
        plan = self._plan = self._plans[parents]
        tree = plan.tree
        tokens = torch.full((len(state.sequences), tree.nodes), -1, device=state.device)
        tokens[:, 0] = state.tail[:, -1]
        drawn_from = None
        for level, nodes in enumerate(tree.level_nodes):
            logits, hidden = self._level(state, level, tokens[:, nodes])
            if self.proposal != "point":
                drawn_from = self._collect(logits, plan.parts[level], plan.parts[-1].stop)
            goes_on = None
            if self.stopping is not None:
                goes_on = going_on(self.stopping, level, logits, hidden, tokens[:, nodes])
            plan.draw(level, logits, tokens, state.step, goes_on, self._token_of)
        proposal = Proposal(tokens, tree.parents, tree.depth, ancestors=tree.node_ancestors, node_depth=tree.node_depth)
        if drawn_from is not None:
            proposal.draft_logits, proposal.draft_rows = drawn_from.flatten(0, 1), plan.draft_rows
            proposal.draft_ids, proposal.draft_sampling = self._draft_ids, self.sampling
        return proposal

    def end(self) -> None:
        """Give models their own settings back, and the memory free."""
        self._contexts.close()
        self._plans, self._drawn_from, self._draft_ids, self._token_of, self._ids_hash = {}, None, None, None, None

    def forgetful(self: _Some) -> _Some:
        """See `Drafter`."""
        other = super().forgetful()
        other._plans = {}
        return other

    def _knows(self, ids: torch.Tensor) -> None:
        """Say which tokens the columns of the logits are, `[columns]` int64, where they are not the target's."""
        self._draft_ids, self._token_of, self._ids_hash = ids, F.pad(ids, (0, 1), value=-1), None

    @property
    def _ids_key(self) -> int | None:
        """Equal for the same `_draft_ids`."""
        if self._ids_hash is None and self._draft_ids is not None:
            self._ids_hash = hash(self._draft_ids.cpu().numpy().tobytes())
        return self._ids_hash

    def _steps_alike(self) -> bool:
        """Whether steps depend on nothing but what the `captures` of this very class knows of."""
        return "captures" in vars(type(self)) and self.alone and self.nodes is None and self.stopping is None

    @abstractmethod
    def _level(self, state: State, level: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the children of a level's nodes are drawn from; `self._plan.tree` is the tree.

        Args:
            state: the batch.
            level: depth of the nodes, 0 for the root.
            tokens: `[batch, nodes]` int64, the nodes' own; -1 where a candidate is missing.

        Returns:
            `[batch, nodes, columns]` logits (nodes is 1 if rows are shared), and the nodes' state for `Stopping`.
        """

    def _collect(self, logits: torch.Tensor, part: slice, rows: int) -> torch.Tensor:
        """`[batch, rows, columns]` for the logits of all levels, with a level's in place.

        It is the same memory at every step: fresh pages cost more than the copy.
        """
        if rows == 1:
            return logits
        shape = (logits.shape[0], rows, logits.shape[2])
        if self._drawn_from is None or self._drawn_from.shape != shape:
            self._drawn_from = logits.new_empty(shape)
        self._drawn_from[:, part] = logits
        return self._drawn_from
