"""A smaller model as drafter: it grows the tree level by level, with tree attention over its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from mcsd_kernels import SamplingParams, draw_candidates

from ..scoring import Scorer
from ..trees import TreeShape, chain_bits, check_branching, columns
from .base import Drafter, Proposal, State


class ModelDrafter(Drafter):
    """Draws the children of every node from a smaller model with the same vocabulary.

    Args:
        model: a causal language model.
        branching: children of a node at depth 0, 1, ...
        proposal: how they are drawn; "point" takes the most probable ones.
        attention: "auto", "tree" or "dense", as in `mcsd.generate`.

    Raises:
        ValueError: `branching` is not a list of whole numbers >= 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        branching: Sequence[int] = (4, 2, 2),
        proposal: str = "without_replacement",
        attention: str = "auto",
    ) -> None:
        self.model, self.attention = model, attention
        self.branching = check_branching(branching)
        self.proposal = proposal
        self._contexts = ExitStack()

    def begin(self, state: State) -> None:
        """Read the prompts, all but what `propose` will read anyway."""
        nodes = TreeShape.of(self.branching).nodes
        self._scorer = Scorer(self.model, state.capacity + nodes, self.attention)
        self._contexts.enter_context(self._scorer.attending())
        self._drawn_from: torch.Tensor | None = None
        prompts = [sequence[:-1] for sequence in state.sequences]
        self._cached = [len(prompt) for prompt in prompts]
        self._scorer.prefill(columns(prompts, state.device), self._cached)

    def propose(self, state: State) -> Proposal:
        """Draw the tree's levels one after the other; each inner level is one forward of the model."""
        device = state.device
        batch = len(state.sequences)
        shape = TreeShape.of(self.branching, device)
        root = [len(sequence) - 1 for sequence in state.sequences]
        self._inner = shape.inner
        logits = self._read(state)
        tokens = torch.tensor([[sequence[-1]] for sequence in state.sequences], device=device)
        drawn_from = self._room(logits, shape.inner)
        for depth, width in enumerate(shape.branching):
            first, after = shape.levels[depth], shape.levels[depth + 1]
            if depth:
                logits = self._scorer.score(
                    tokens[:, first:after],
                    shape.ancestors[:, first:after],
                    shape.depth[first:after],
                    root,
                    offset=first,
                )
            if self.proposal != "point":  # nobody asks what those were drawn from
                drawn_from[:, first:after] = logits
            children = draw_candidates(
                logits.reshape(-1, logits.shape[-1]),
                width,
                state.seeds.repeat_interleave(after - first),
                state.step,
                proposal=self.proposal,
                sampling=SamplingParams() if self.proposal == "point" else _repeat(state.sampling, after - first),
                nodes=torch.arange(first, after, device=device).repeat(batch),
            )
            tokens = torch.cat([tokens, children.reshape(batch, -1)], 1)
        if self.proposal == "point":
            return Proposal(tokens, shape.parents, len(shape.branching))
        inner = torch.arange(shape.nodes, device=device).clamp(max=shape.inner - 1)
        draft_rows = (torch.arange(batch, device=device)[:, None] * shape.inner + inner).int()
        return Proposal(tokens, shape.parents, len(shape.branching), drawn_from.flatten(0, 1), draft_rows)

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """Keep the accepted nodes that were read while drafting; leaves never were."""
        root = [len(sequence) - 1 for sequence in state.sequences]
        kept = ((path >= 0) & (path < self._inner)).sum(1, dtype=torch.int32)
        self._scorer.keep(root, path, kept)
        # a request that is done stays where it is: its root is read again and again, to no effect
        advance = [k if active else 0 for k, active in zip(kept.tolist(), state.active, strict=True)]
        self._cached = [r + k for r, k in zip(root, advance, strict=True)]

    def end(self) -> None:
        """Give the model its own attention back, and the cache's memory free."""
        self._contexts.close()
        self._drawn_from = None
        if hasattr(self, "_scorer"):
            del self._scorer

    def _room(self, logits: torch.Tensor, inner: int) -> torch.Tensor:
        """`[batch, inner, vocab]`, the same memory at every step: fresh pages cost more than the copy."""
        shape = (logits.shape[0], inner, logits.shape[2])
        if self._drawn_from is None or self._drawn_from.shape != shape:
            self._drawn_from = logits.new_empty(shape)
        return self._drawn_from

    def _read(self, state: State) -> torch.Tensor:
        """Read what is committed and not yet cached: the root, and a leaf that was accepted before it.

        Returns:
            `[batch, 1, vocab]` logits after each request's root.
        """
        # a request that ended inside its accepted path is shorter than what was kept for it
        self._cached = [min(c, len(s) - 1) for c, s in zip(self._cached, state.sequences, strict=True)]
        missing = [len(sequence) - cached for sequence, cached in zip(state.sequences, self._cached, strict=True)]
        tokens = columns([s[-m:] for s, m in zip(state.sequences, missing, strict=True)], state.device)
        bits = chain_bits(tokens.shape[1], state.device)
        logits = self._scorer.score(tokens, bits, None, self._cached)
        last = torch.tensor(missing, device=state.device) - 1
        return logits[torch.arange(len(missing), device=state.device), last][:, None]


def _repeat(sampling: SamplingParams, times: int) -> SamplingParams:
    """Each request's parameters `times` times in a row."""
    fields = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return SamplingParams(
        *(f.repeat_interleave(times) if isinstance(f, torch.Tensor) and f.dim() else f for f in fields)
    )
