"""Heads as drafter: small networks that read the target's last hidden state and guess several tokens ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from mcsd_kernels import _checks as check
from mcsd_kernels import draw_candidates
from mcsd_kernels.verify import PROPOSALS

from ..trees import StaticTree, check_branching, check_parents, parents_of
from .base import Drafter, Proposal, State
from .model import _repeat
from .stopping import Stopping, going_on


class Heads(Protocol):
    """What `HeadsDrafter` asks of its heads: see `MedusaHeads` and `MLPSpeculator`."""

    shares_rows: bool
    """Whether all nodes of a level have one law, because the heads do not look at the tokens between."""

    @property
    def count(self) -> int:
        """How many tokens ahead there is a head for."""

    def start(self, hidden: torch.Tensor) -> torch.Tensor:
        """The root's state.

        Args:
            hidden: `[batch, hidden]`, the target's last hidden state at the token before the root.

        Returns:
            `[batch, 1, width]`.
        """

    def level(self, level: int, state: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The laws of the children of a level's nodes.

        Args:
            level: depth of the nodes, 0 for the root.
            state: `[batch, nodes, width]` of the nodes' parents, of the root's predecessor at level 0; nodes is 1 if
                rows are shared.
            tokens: `[batch, nodes]`, the nodes' own; those < 0 are missing.

        Returns:
            `[batch, nodes, vocab]` logits, `[batch, nodes, width]` the nodes' state; nodes is 1 if rows are shared.
        """


class HeadsDrafter(Drafter):
    """Grows a tree from heads on the target's last hidden state; there is no draft model and no cache.

    The state that the heads read is the one that predicted the root: head 0 guesses the token after the root.

    Args:
        heads: `MedusaHeads`, `MLPSpeculator`, or your own.
        branching: children of a node at depth 0, 1, ...; not deeper than there are heads.
        proposal: how children are drawn. "point" takes each head's most probable tokens; the others draw them from its
            law, which is lossless as well: where the heads do not see the tokens between, all nodes of a level have the
            same row, and each draws from it on its own.
        parents: a tree of any shape in place of `branching`, as for `ModelDrafter`.
        stopping: which nodes get children, see `Stopping`.

    Raises:
        ValueError: the tree or `proposal` is wrong.
    """

    reads_hidden = True

    def __init__(
        self,
        heads: Heads,
        branching: Sequence[int] = (4, 2, 2),
        proposal: str = "point",
        *,
        parents: Sequence[int] | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        check.choice("proposal", proposal, PROPOSALS)
        self.heads, self.proposal, self.stopping = heads, proposal, stopping
        self.branching = None if parents is not None else check_branching(branching)
        self.parents = parents_of(branching) if parents is None else check_parents(parents)
        depth = StaticTree.of(self.parents).depth
        if depth > heads.count:
            name = "branching" if parents is None else "parents"
            raise ValueError(f"{name}: expected at most {heads.count} levels, one a head, got {depth}")
        self._hidden: torch.Tensor | None = None
        self._drawn_from: torch.Tensor | None = None

    def begin(self, state: State) -> None:
        """Take the state at each prompt's last token but one; a prompt of one token has none, zeros stand for it."""
        assert state.hidden is not None
        self._hidden = _rows(torch.nn.functional.pad(state.hidden, (0, 0, 1, 0)), state.prefix.lengths.long())
        tree = self._tree = StaticTree.of(self.parents, state.device, self.proposal == "greedy")
        slots = tree.slots.clamp(min=0)
        # of each inner node below the root: where its parent stands in the level above
        level_above = torch.tensor([0, *tree.levels], device=state.device)[tree.node_depth]
        self._above = (slots[tree.parents.clamp(min=0).long()] - level_above)[tree.inner]
        rows = torch.where(tree.slots >= 0, tree.node_depth, 0) if self.heads.shares_rows else slots
        count = tree.depth if self.heads.shares_rows else len(tree.inner)
        self._draft_rows = (torch.arange(len(state.sequences), device=state.device)[:, None] * count + rows).int()

    def propose(self, state: State) -> Proposal:
        """One head a level."""
        assert self._hidden is not None
        tree, shared = self._tree, self.heads.shares_rows
        tokens = torch.full((len(state.sequences), tree.nodes), -1, device=state.device)
        tokens[:, 0] = state.tail[:, -1]
        states = self.heads.start(self._hidden)
        for level, nodes in enumerate(tree.level_nodes):
            first, after = tree.levels[level], tree.levels[level + 1]
            if level and not shared:
                states = states[:, self._above[first:after]]
            logits, states = self.heads.level(level, states, tokens[:, nodes])
            if self.proposal != "point":
                part = slice(level, level + 1) if shared else slice(first, after)
                self._room(logits, tree.depth if shared else len(tree.inner))[:, part] = logits
            going = going_on(self.stopping, level, logits, states, tokens[:, nodes])
            for draw in tree.draws[level]:
                some = logits if shared or draw.rows is None else logits[:, draw.rows]
                goes_on = going if draw.rows is None else going[:, draw.rows]
                children = self._draw(state, some, draw.width, draw.nodes).masked_fill(~goes_on[..., None], -1)
                tokens[:, draw.children] = draw.pick(children)
        shape: dict[str, Any] = {"ancestors": tree.node_ancestors, "node_depth": tree.node_depth}
        if self._drawn_from is None:
            return Proposal(tokens, tree.parents, tree.depth, **shape)
        return Proposal(tokens, tree.parents, tree.depth, self._drawn_from.flatten(0, 1), self._draft_rows, **shape)

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """The last accepted node is the one that predicted the next root."""
        assert state.hidden is not None
        self._hidden = _rows(state.hidden, path.gather(1, length[:, None].long() - 1)[:, 0].long())

    def end(self) -> None:
        """Forget the text."""
        self._hidden = self._drawn_from = None

    def _draw(self, state: State, logits: torch.Tensor, width: int, nodes: torch.Tensor) -> torch.Tensor:
        """`[batch, nodes, width]` children from `[batch, nodes or 1, vocab]` logits."""
        batch, rows, vocab = logits.shape
        if self.proposal == "point":  # what shares a row has the same children
            seeds = state.seeds.repeat_interleave(rows)
            children = draw_candidates(logits.reshape(-1, vocab), width, seeds, state.step, proposal="point")
            return children.view(batch, rows, width).expand(batch, len(nodes), width)
        count = len(nodes)
        children = draw_candidates(
            logits.expand(batch, count, vocab).reshape(-1, vocab),
            width,
            state.seeds.repeat_interleave(count),
            state.step,
            proposal=self.proposal,
            sampling=_repeat(state.sampling, count),
            nodes=nodes.repeat(batch),
        )
        return children.view(batch, count, width)

    def _room(self, logits: torch.Tensor, rows: int) -> torch.Tensor:
        """`[batch, rows, vocab]` for the logits of all levels, the same memory at every step."""
        size = (logits.shape[0], rows, logits.shape[2])
        if self._drawn_from is None or self._drawn_from.shape != size:
            self._drawn_from = logits.new_empty(size)
        return self._drawn_from


def check_fit(target: PreTrainedModel, hidden: int, vocab: int, what: str) -> None:
    """Refuse heads that were made for another model.

    Raises:
        ValueError: the target's output head has another shape than `[vocab, hidden]`.
    """
    head = target.get_output_embeddings()
    found = None if head is None else tuple(head.weight.shape)
    if found != (vocab, hidden):
        raise ValueError(f"target: expected an output head of shape {(vocab, hidden)} for {what}, got {found}")


def _rows(hidden: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`[batch, width]`: one row of each request's `[batch, rows, width]`."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), row]
