"""Inputs of the verification benchmarks: logits with a stated overlap, and candidates drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mcsd.trees import StaticTree, parents_of
from mcsd_kernels import draw_candidates, draw_uniforms

# Gaussian logits of this spread, and a draft this far from the target: overlap sum min(p, q) of about 0.6
SPREAD, DISTANCE = 2.0, 1.0


@dataclass
class Inputs:
    """Logits of one batch of trees, and the candidates and uniform numbers of several calls."""

    target: torch.Tensor
    draft: torch.Tensor
    drawn: list[tuple[torch.Tensor, torch.Tensor]]  # tokens and uniforms, a pair a call
    parents: torch.Tensor
    depth: int

    @property
    def overlap(self) -> float:
        """Mean of sum min(p, q) over all nodes."""
        return float(torch.minimum(self.target.softmax(-1), self.draft.softmax(-1)).sum(-1).mean())


def make(branching: tuple[int, ...], vocab: int, batch: int = 1, calls: int = 32, seed: int = 0) -> Inputs:
    """Float32 inputs of `[batch, nodes, vocab]`."""
    random = torch.Generator().manual_seed(seed)
    shape = StaticTree.of(parents_of(branching))
    target = torch.randn(batch, shape.nodes, vocab, generator=random) * SPREAD
    draft = target + torch.randn(batch, shape.nodes, vocab, generator=random) * DISTANCE
    seeds = torch.arange(batch) + seed
    parents = shape.parents.tolist()
    drawn = []
    for step in range(calls):
        tokens = torch.zeros(batch, shape.nodes, dtype=torch.long)
        for node in shape.inner.tolist():
            first, width = parents.index(node), parents.count(node)
            nodes = torch.full((batch,), node)
            tokens[:, first : first + width] = draw_candidates(draft[:, node], width, seeds, step, nodes=nodes)
        drawn.append((tokens, draw_uniforms(seeds, step, shape.nodes + 2)))
    return Inputs(target, draft, drawn, shape.parents, len(branching))
