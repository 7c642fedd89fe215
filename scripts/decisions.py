"""Every decision of a backend, from both sides of its threshold.

What `verify` emits for given candidates is a step function of its uniform numbers. The oracle says where the steps are;
here a backend is asked right before and right behind each of them, for every tuple of candidates that can be drawn. If
all answers are the oracle's, every box of uniform numbers that has one answer is the oracle's to within `MARGIN` at
each of its sides: the backend's law is the target's, to about 1e-4, which samples would not show in a lifetime.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict, dataclass
from typing import Any

import laws
import numpy as np
import torch
from laws import Choices, Context, DraftedTree, Law, Tosses

from mcsd_kernels import SamplingParams, reference, verify

RULES = {"recursive": reference.recursive, "traversal": reference.traversal}
SAMPLING = SamplingParams(temperature=0.8)
DRAFT_SAMPLING = SamplingParams(temperature=1.3)
MARGIN = 1e-5  # a float32 backend may be off by some 1e-7
SHIFT = 1e-3  # of a logit: at temperature 0.8 this moves less than 3e-4 of a law's mass
LARGEST = 1 - 2.0**-24


@dataclass(frozen=True)
class Tree:
    """A tree all of whose candidates are enumerated.

    Args:
        vocab: how many tokens.
        parents: of each node.
        virtual: nodes without a row of the target's, which saves asking for every token that may be drawn there.
    """

    vocab: int
    parents: tuple[int, ...]
    virtual: tuple[int, ...]


# Siblings alone; levels, so that a walk goes down and, under "traversal", back again; and both.
TREES = (
    Tree(5, (-1, 0, 0, 0), (1, 2, 3)),
    Tree(3, (-1, 0, 1, 2), (3,)),
    Tree(3, (-1, 0, 0, 1, 1), (3, 4)),
)


class Sides(Tosses):
    """Tosses that note a uniform number for each, next to the threshold, on the side that was chosen."""

    def __init__(self, choices: Choices, nodes: int) -> None:
        super().__init__(choices)
        self.uniforms = [0.5] * (nodes + 2)

    def accept(self, node: int, scale: float, mass: float) -> bool:
        """True on one side, False on the other."""
        taken = super().accept(node, scale, mass)
        self.uniforms[node] = _beside(min(mass / scale, 1.0), -1 if taken else 1)
        return taken

    def draw(self, weights: Law) -> int:
        """Each token, by both ends of its interval."""
        super().draw(weights)
        assert self.drawn is not None
        token, end = self.choices.choose(list(self.drawn)), self.choices.choose([0.5, 0.5])
        ends = np.cumsum([0.0, *self.drawn]).round(12)[token : token + 2]
        assert ends[1] - ends[0] > 4 * MARGIN, "a token too rare for the margin"
        self.uniforms[-1] = _beside(float(ends[end]), 1 - 2 * end)
        return token


def _beside(threshold: float, side: int) -> float:
    """A number in [0, 1) a margin away; thresholds of 0 and 1 have one side only."""
    assert threshold in (0.0, 1.0) or 2 * MARGIN < threshold < 1 - 2 * MARGIN, "a threshold too near to an end"
    return min(max(threshold + side * MARGIN, 0.0), LARGEST)


@dataclass
class Found:
    """What a backend answered.

    Args:
        tuples: of candidates, as far as a rule looked at them.
        requests: how many it was asked.
        wrong: how many answers are not the oracle's.
    """

    tuples: int
    requests: int
    wrong: int


def row(rule: str, proposal: str, backend: str, device: str = "cpu") -> dict[str, Any]:
    """`decide` as a row of a table, and as a control how many answers are wrong with a shift of `SHIFT`."""
    found = decide(rule, proposal, backend, device)
    control = decide(rule, proposal, backend, device, SHIFT).wrong
    return {"rule": rule, "proposal": proposal, **asdict(found), "control": control}


def decide(rule: str, proposal: str, backend: str, device: str = "cpu", shift: float = 0.0) -> Found:
    """Ask a backend for every decision of a rule.

    Args:
        rule, proposal, backend: as in `verify`.
        device: where the tensors are.
        shift: a mistake: added to the first logit of each row that the backend reads of the target.
    """
    found = Found(0, 0, 0)
    for tree in TREES:
        contexts = [
            context
            for length in range(laws.depth(list(tree.parents)) + 1)
            for context in itertools.product(range(tree.vocab), repeat=length)
        ]
        row_of = {context: row for row, context in enumerate(contexts)}
        target, draft = laws.logit_rows(len(contexts), tree.vocab, SAMPLING, DRAFT_SAMPLING)
        p = {c: laws.law_of(row.double().numpy(), SAMPLING) for c, row in zip(contexts, target, strict=True)}
        q = {c: laws.law_of(row.double().numpy(), DRAFT_SAMPLING) for c, row in zip(contexts, draft, strict=True)}
        run = functools.partial(_ask, tree, laws.Model(p.__getitem__, q.__getitem__), rule, proposal)
        requests = [request for request, _ in laws.all_runs(run)]
        draft_rows = torch.tensor([[row_of[context] for context in r.contexts] for r in requests]).int()
        target_rows = draft_rows.clone()
        target_rows[:, list(tree.virtual)] = -1
        got = verify(
            (target + shift * (torch.arange(tree.vocab) == 0)).to(device),
            draft.to(device),
            torch.tensor([[0, *(context[-1] for context in r.contexts[1:])] for r in requests], device=device),
            torch.tensor(tree.parents, device=device),
            torch.tensor([r.uniforms for r in requests], dtype=torch.float32, device=device),
            proposal=proposal,
            rule=rule,
            sampling=SAMPLING,
            draft_sampling=DRAFT_SAMPLING,
            target_rows=target_rows.to(device),
            draft_rows=draft_rows.to(device),
            backend=backend,
        )
        answers = [tuple(token for token in text if token >= 0) for text in got.tokens.tolist()]
        found.requests += len(requests)
        found.tuples += len({r.contexts for r in requests})
        found.wrong += sum(
            bool(status) or answer != r.emitted
            for status, answer, r in zip(got.status.tolist(), answers, requests, strict=True)
        )
    return found


@dataclass(frozen=True)
class _Request:
    contexts: tuple[Context, ...]  # of each node, its own token last; a node that no rule looks at has some token
    uniforms: list[float]
    emitted: Context  # by the oracle


def _ask(tree: Tree, model: laws.Model, rule: str, proposal: str, choices: Choices) -> _Request:
    drafted = DraftedTree(model, list(tree.parents), proposal, choices, virtual=tree.virtual)
    coins = Sides(choices, len(tree.parents))
    path, last = RULES[rule](drafted.problem(), coins)
    emitted = (*(drafted.tokens[node] for node in path[1:]), last)
    contexts: list[Context] = [()]
    for node, parent in enumerate(tree.parents[1:], 1):
        contexts.append((*contexts[parent], drafted.tokens.get(node, 0)))
    return _Request(tuple(contexts), coins.uniforms, emitted)
