"""What is verified: logits with a stated overlap, and candidates drawn from them by `draw_candidates`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mcsd_kernels import SamplingParams, Verified, draw_candidates, draw_uniforms, verify

from .plan import SAMPLING, Tree

# Gaussian logits of this spread, and a draft this far from the target: overlap sum min(p, q) of about 0.6
SPREAD, DISTANCE = 2.0, 1.0


def logits(
    shape: tuple[int, ...], device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and draft, made in place: at the largest sizes a second copy would not fit."""
    random = torch.Generator(device).manual_seed(seed)
    target, draft = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    target.normal_(0.0, SPREAD, generator=random)
    draft.normal_(0.0, DISTANCE, generator=random).add_(target)
    return target, draft


def draw_tree(
    draft: torch.Tensor,
    tree: Tree,
    seeds: torch.Tensor,
    step: int,
    proposal: str,
    sampling: SamplingParams,
    backend: str = "triton",
) -> torch.Tensor:
    """`[batch, nodes]` tokens of a tree for each request; the roots are token 0.

    Args:
        draft: `[batch, nodes, vocab]` logits.
        tree: the shape that all requests have.
        seeds: `[batch]`.
        step: number of the call.
        proposal: how children are drawn.
        sampling: of the draft.
        backend: of `draw_candidates`.
    """
    tokens = torch.zeros(len(draft), len(tree.parents), dtype=torch.int64, device=draft.device)
    for node, children in tree.children().items():
        drawn = draw_candidates(
            draft[:, node],
            len(children),
            seeds,
            step,
            proposal=proposal,
            sampling=sampling,
            nodes=torch.full_like(seeds, node),
            backend=backend,
        )
        tokens[:, children[0] : children[-1] + 1] = drawn
    return tokens


@dataclass
class Inputs:
    """Logits of a batch of trees, and the candidates and uniform numbers of several calls, filter by filter."""

    target: torch.Tensor
    draft: torch.Tensor
    tree: Tree
    rule: str
    proposal: str
    sets: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]  # filters -> (tokens, uniforms) of each call
    parents: torch.Tensor
    _held: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @staticmethod
    def make(
        batch: int,
        tree: Tree,
        vocab: int,
        rule: str,
        proposal: str,
        sets: int,
        device: torch.device,
        filters: tuple[str, ...],
        seed: int = 0,
        shared: bool = False,
    ) -> Inputs:
        """Draw them.

        Args:
            sets: calls.
            filters: names in `plan.SAMPLING`.
            shared: all requests have the logits of one.
        """
        target, draft = logits((1 if shared else batch, len(tree.parents), vocab), device, seed)
        if shared:
            target, draft = (x.expand(batch, -1, -1) for x in (target, draft))
        seeds = torch.arange(batch, device=device) + seed
        drawn = {
            name: [
                (
                    draw_tree(draft, tree, seeds, step, proposal, SamplingParams(**SAMPLING[name])),
                    draw_uniforms(seeds, step, len(tree.parents) + 2, backend="triton"),
                )
                for step in range(sets)
            ]
            for name in filters
        }
        parents = torch.tensor(tree.parents, dtype=torch.int32, device=device)
        return Inputs(target, draft, tree, rule, proposal, drawn, parents)

    @property
    def overlap(self) -> float:
        """sum min(p, q), mean over the nodes of the first request."""
        laws = [x[0].float().softmax(-1) for x in (self.target, self.draft)]
        return float(torch.minimum(*laws).sum(-1).mean())

    def options(self, filters: str) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "proposal": self.proposal,
            "sampling": SamplingParams(**SAMPLING[filters]),
            "max_depth": self.tree.depth,
        }

    def arguments(
        self, tokens: torch.Tensor, uniforms: torch.Tensor, requests: slice = slice(None)
    ) -> tuple[torch.Tensor | None, ...]:
        """The arguments of `verify` for some of the requests."""
        draft = None if self.proposal == "point" else self.draft[requests]
        return self.target[requests], draft, tokens[requests], self.parents, uniforms[requests]

    def held(self, filters: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens and uniforms that every contender reads; `load` changes what is in them."""
        if filters not in self._held:
            tokens, uniforms = self.sets[filters][0]
            self._held[filters] = tokens.clone(), uniforms.clone()
        return self._held[filters]

    def load(self, i: int) -> None:
        """Put the candidates and uniform numbers of set i in place."""
        for filters, sets in self.sets.items():
            for place, values in zip(self.held(filters), sets[i % len(sets)], strict=True):
                place.copy_(values)

    def call(self, filters: str) -> Callable[[], Verified]:
        """`verify` of what is held."""
        arguments, options = self.arguments(*self.held(filters)), self.options(filters)
        return lambda: verify(*arguments, **options, backend="triton")  # type: ignore[arg-type]
