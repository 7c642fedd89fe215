"""Adaptive trees of every drafter that grows its tree level by level: the law, and a budget that follows acceptance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import mcsd
from mcsd import Proposal, State
from mcsd.adaptive import AdaptiveDrafter
from mcsd.drafters import EarlyExitDrafter, FeatureDrafter, HeadsDrafter, LevelDrafter, MergedDrafter, NgramDrafter
from mcsd.profile import Ladder
from mcsd_kernels import Verified
from tests.small_law import P, few, p_of, sample
from tests.test_drafters_heads import medusa
from tests.test_feature_drafter import feature_model
from tests.tiny import VOCAB, greedy, pad, perturbed, prompt, tiny

LADDER = Ladder(
    parents=(-1, 0, 1, 0, 1, 3, 2),
    values=(1.0, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1),
    sizes=(2, 4, 7),
    seconds=(1.0, 1.2, 1.5),
)
QUICK = {"prior": 0.2, "decay": 0.5}  # so that sizes differ from step to step and from request to request

MADE: dict[str, Callable[[Any], LevelDrafter]] = {
    "feature": lambda target: FeatureDrafter(feature_model(target, target.config.vocab_size - 1)),
    "heads": lambda target: HeadsDrafter(medusa(target)),
    "early exit": lambda target: EarlyExitDrafter(target, 1),
}


class Sizes:
    """How many nodes each request had in each step, as an observer sees it."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, state: State, tree: Proposal, logits: torch.Tensor, verified: Verified) -> None:
        counts = (tree.tokens >= 0).sum(1).tolist()
        self.seen.append([n if active else 0 for n, active in zip(counts, state.active, strict=True)])


@pytest.mark.parametrize(
    ("kind", "proposal"),
    [("feature", "without_replacement"), ("feature", "point"), ("heads", "with_replacement"), ("early exit", "point")],
)
def test_the_law_is_kept(kind: str, proposal: str) -> None:
    drafter = AdaptiveDrafter(MADE[kind](few()), replace(LADDER, proposal=proposal), **QUICK)
    sizes = Sizes()
    found, _ = sample(drafter, observer=sizes)
    assert len({n for step in sizes.seen for n in step} & {2, 4, 7}) > 1
    assert p_of(found) > P


@pytest.mark.parametrize("kind", MADE)
def test_at_temperature_0_it_chooses_candidates_and_writes_the_greedy_text(kind: str) -> None:
    target = tiny()
    ids, mask = pad([prompt(5), prompt(9, 1), prompt(1, 2)])
    drafter = AdaptiveDrafter(MADE[kind](target), LADDER, prior=0.5)
    sizes = Sizes()
    found = mcsd.generate(target, drafter, ids, mask, max_new_tokens=16, temperature=0.0, observer=sizes)
    assert torch.equal(found.sequences, greedy(target, ids, mask, 16))
    # of a drawn draft a sibling would be missing, and 3 nodes of 4 be there
    assert {n for step in sizes.seen for n in step} <= {0, 2, 4, 7} and sizes.seen[0][0] == 4
    assert drafter.proposal == "without_replacement", "it is left as it was"


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    target = tiny()
    drafter = AdaptiveDrafter(FeatureDrafter(feature_model(target, 70)), LADDER, prior=0.5, decay=0.7)
    prompts = [prompt(6, seed) for seed in range(3)]
    together = mcsd.generate(target, drafter, torch.tensor(prompts), max_new_tokens=20, seed=5).sequences
    for row, text in enumerate(prompts):
        alone = mcsd.generate(target, drafter, torch.tensor([text]), max_new_tokens=20, seed=5 + row).sequences
        assert torch.equal(alone[0], together[row])


class Oracle(LevelDrafter):
    """Knows each request's text up to a place, and is wrong from there on."""

    shares_rows = True

    def __init__(self, texts: list[list[int]], known: list[int]) -> None:
        super().__init__((1,), "point")
        self.texts, self.known = texts, known

    def _level(self, state: State, level: int, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = torch.zeros(len(self.texts), 1, state.vocab)
        for row, text, known, sequence in zip(rows, self.texts, self.known, state.sequences, strict=True):
            place = min(len(sequence) + level, len(text) - 1)
            row[0] = (torch.arange(state.vocab) - text[place]) % VOCAB  # the right token comes last
            row[0] *= -1 if place < known else 1
        return rows, None


def test_the_budget_follows_what_is_accepted() -> None:
    target = tiny()
    ids, mask = pad([prompt(6), prompt(6, 1), prompt(6, 2)])
    wanted = greedy(target, ids, mask, 60)
    oracle = Oracle(wanted.tolist(), [100, 0, 40])
    sizes = Sizes()
    cheap = replace(LADDER, seconds=(1.0, 1.2, 1.4))  # the more is accepted, the better the largest tree
    found = mcsd.generate(
        target, AdaptiveDrafter(oracle, cheap), ids, mask, max_new_tokens=60, temperature=0.0, observer=sizes
    )
    assert torch.equal(found.sequences, wanted)
    right, wrong, both = ([step[request] for step in sizes.seen if step[request]] for request in range(3))
    assert right[-1] == 7 and max(wrong) < 7 and wrong[-1] == 2
    grown = both.index(7)
    assert both[grown:] == sorted(both[grown:], reverse=True) and both[-1] < 7, "it shrinks when the knowledge ends"


def test_it_may_be_one_of_several() -> None:
    target = tiny()
    ids, mask = pad([prompt(9), prompt(3, 1)])
    adaptive = AdaptiveDrafter(perturbed(target), LADDER, proposal="point", **QUICK)
    merged = MergedDrafter([adaptive, NgramDrafter()])
    found = mcsd.generate(target, merged, ids, mask, max_new_tokens=30, temperature=0.0).sequences
    assert torch.equal(found, greedy(target, ids, mask, 30))


def test_what_takes_no_trees_is_refused() -> None:
    with pytest.raises(ValueError, match="draft: expected a model or a drafter that takes any tree"):
        AdaptiveDrafter(NgramDrafter(), LADDER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parents: expected at most 1 levels"):
        AdaptiveDrafter(HeadsDrafter(medusa(tiny(), 1), (2,)), LADDER)
