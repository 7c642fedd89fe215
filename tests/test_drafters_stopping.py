"""Stopping early: what the rules answer, that they keep the law, and that one that sees the candidates does not."""

from __future__ import annotations

import math

import pytest
import torch

from mcsd import ModelDrafter, Proposal, State
from mcsd.drafters.stopping import ConfidenceStop, EntropyStop, Stopping, going_on
from mcsd.drafters.topk import TopKDrafter
from tests.small_law import P, exact, few, p_of, sample
from tests.tiny import perturbed, tiny


def logits_of(*laws: list[float]) -> torch.Tensor:
    """`[1, nodes, vocab]`."""
    return torch.tensor([laws]).log()


def test_entropy() -> None:
    logits = logits_of([0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1])
    assert EntropyStop(math.log(2) + 1e-6)(0, logits, None).tolist() == [[False, True, True, False]]
    assert EntropyStop(0.0)(0, logits, None).tolist() == [[False, False, True, False]]
    assert EntropyStop(1.0)(1, logits.half() + 5, None).tolist() == [[False, True, True, True]]


def test_confidence() -> None:
    logits = logits_of([0.25] * 4, [0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1])
    assert ConfidenceStop(0.49)(0, logits, None).tolist() == [[False, True, True]]
    assert ConfidenceStop(0.81, top=2)(0, logits, None).tolist() == [[False, True, False]]
    assert ConfidenceStop(0.99, top=9)(0, logits, None).tolist() == [[True, True, True]]


def test_which_token_it_is_does_not_matter() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=random)
    shuffled = logits[..., torch.randperm(11, generator=random)]
    for stop in (EntropyStop(2.0), ConfidenceStop(0.3), ConfidenceStop(0.5, top=3)):
        assert torch.equal(stop(0, logits), stop(0, shuffled))
        assert 0 < int(stop(0, logits).sum()) < 15


def test_nothing_grows_below_what_is_not_there() -> None:
    logits = logits_of([1.0, 0.0], [0.5, 0.5])
    tokens = torch.tensor([[3, -1]])
    assert going_on(None, 0, logits, None, tokens).tolist() == [[True, False]]
    assert going_on(EntropyStop(0.1), 0, logits, None, tokens.abs()).tolist() == [[True, False]]
    shared = logits[:, :1]  # one row for all nodes of the level
    assert going_on(EntropyStop(0.1), 0, shared, None, torch.tensor([[3, -1, 4]])).tolist() == [[True, False, True]]


def test_mistakes_are_named() -> None:
    for threshold in (-0.1, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            EntropyStop(threshold)
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            ConfidenceStop(threshold)
    for top in (0, 1.5, True):
        with pytest.raises(ValueError, match="top"):
            ConfidenceStop(0.5, top)  # type: ignore[arg-type]
    draft = tiny(vocab_size=5)
    with pytest.raises(ValueError, match=r"stopping: expected a function such as EntropyStop\(1.0\), got 0.5"):
        ModelDrafter(draft, stopping=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stopping: expected a function"):
        TopKDrafter(draft, stopping=0.5)  # type: ignore[arg-type]
    for hook in (lambda *_: torch.ones(1, 1), lambda *_: 0.5):
        with pytest.raises(ValueError, match="stopping: expected bool"):
            going_on(hook, 0, torch.ones(1, 1, 5), None, torch.tensor([[1]]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stop", "rule"),
    [(EntropyStop(1.3), "recursive"), (ConfidenceStop(0.45), "traversal")],
    ids=["entropy", "confidence"],
)
def test_stopped_trees_keep_the_targets_law(stop: Stopping, rule: str) -> None:
    drafter = ModelDrafter(perturbed(few(), 0.7), (2, 2), stopping=stop)
    found, stats = sample(drafter, rule=rule)
    offered, accepted = stats.tested_by_depth, stats.accepted_by_depth
    assert 0.1 < offered[1] / accepted[0] < 0.9, "some nodes were stopped and some were not"
    assert p_of(found) > P


class SeesTheCandidates(ModelDrafter):
    """Drops a drawn candidate that the draft itself finds improbable: the rule that a hook cannot express."""

    def propose(self, state: State) -> Proposal:
        tree = super().propose(state)
        assert tree.draft_logits is not None and tree.draft_rows is not None
        laws = torch.softmax(tree.draft_logits[tree.draft_rows[:, 0].long()], -1)
        mass = laws.gather(1, tree.tokens[:, 1:].clamp(min=0))
        tree.tokens[:, 1:] = tree.tokens[:, 1:].masked_fill(mass < 0.2, -1)
        return tree


def test_a_rule_that_sees_the_candidates_is_biased() -> None:
    found, _ = sample(SeesTheCandidates(perturbed(few(), 0.7), (2,)))
    assert p_of(found) < P
    first = torch.bincount(torch.tensor([text[0] for text in found]), minlength=5) / len(found)
    law = torch.zeros(5)
    for text, mass in exact().items():
        law[text[0]] += mass
    assert 0.5 * float((first - law).abs().sum()) > 0.1
