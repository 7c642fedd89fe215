"""The most probable tree: the same as one grown path by path in plain Python."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mcsd
from mcsd import Proposal, State
from mcsd.drafters.stopping import ConfidenceStop
from mcsd.drafters.topk import TopKDrafter
from tests.small_law import P, few, p_of, sample
from tests.test_drafters import PROMPTS, paths_of, state_of
from tests.tiny import greedy, pad, perturbed, prompt, tiny

Path = tuple[int, ...]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny()


@pytest.fixture(scope="module")
def draft(llama: PreTrainedModel) -> PreTrainedModel:
    return perturbed(llama)


def grown(
    model: PreTrainedModel, text: list[int], depth: int, beam: int, budget: int, stop: ConfidenceStop | None = None
) -> dict[Path, float]:
    """The paths of the tree and their log-probabilities, by plain forwards."""
    on_offer: dict[Path, float] = {}
    level: dict[Path, float] = {(): 0.0}
    for _ in range(depth):
        texts = torch.tensor([[*text, *path] for path in level])
        logits = model(texts, attention_mask=torch.ones_like(texts), use_cache=False).logits[:, -1:]
        offered = {}
        for (path, score), row in zip(level.items(), logits, strict=True):
            if stop is None or bool(stop(0, row[None])):
                best = torch.log_softmax(row[0], -1).topk(beam)
                for token, mass in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                    offered[(*path, token)] = score + mass
        on_offer |= offered
        level = dict(sorted(offered.items(), key=lambda item: -item[1])[:beam])
        if not level:
            break
    return dict(sorted(on_offer.items(), key=lambda item: -item[1])[:budget])


class Watched(TopKDrafter):
    """Compares every tree with the one grown in plain Python."""

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.plain = copy.deepcopy(model)
        self.trees: set[tuple[int, ...]] = set()

    def propose(self, state: State) -> Proposal:
        proposal = super().propose(state)
        assert proposal.tokens.shape == (len(state.sequences), 1 + self.budget)
        for request, sequence in enumerate(state.sequences):
            if state.active[request]:
                parents, tokens = proposal.parents[request].tolist(), proposal.tokens[request].tolist()
                assert all(parent < node for node, parent in enumerate(parents)) and -1 not in parents[1:]
                found = [tuple(path) for path in paths_of(proposal, request).values() if path]
                wanted = grown(self.plain, sequence, self.depth, self.beam, self.budget, self.stopping)  # type: ignore[arg-type]
                assert len(found) == len(set(found)) == sum(token >= 0 for token in tokens[1:])
                assert set(found) == set(wanted)
                siblings: dict[Path, list[float]] = {}
                for path in found:
                    siblings.setdefault(path[:-1], []).append(wanted[path])
                assert all(scores == sorted(scores, reverse=True) for scores in siblings.values())
                self.trees.add(tuple(parents))
        return proposal


def test_stopping_is_asked_once_a_level(draft: PreTrainedModel) -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []

    def note(level: int, logits: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        asked.append((level, tuple(logits.shape[:2])))
        return torch.ones(logits.shape[:2], dtype=torch.bool)

    ids, mask = pad(PROMPTS)
    mcsd.generate(draft, TopKDrafter(draft, 3, 2, 6, stopping=note), ids, mask, max_new_tokens=1)
    assert asked == [(0, (3, 1)), (1, (3, 2)), (2, (3, 2))]


@pytest.mark.parametrize(
    ("depth", "beam", "budget"), [(1, 4, 4), (3, 1, 3), (4, 3, 12), (3, 4, 36), (2, 6, 7)], ids=str
)
def test_the_tree_is_the_most_probable_one(
    depth: int, beam: int, budget: int, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    ids, mask = pad([*PROMPTS, prompt(1, 5)])
    drafter = Watched(draft, depth, beam, budget)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 12))
    assert sum(found.stats.accepted_by_depth) > 0
    if (depth, beam, budget) in ((4, 3, 12), (2, 6, 7)):
        assert len(drafter.trees) > 10, "requests and steps differ in shape"


def test_stopped_nodes_have_no_children(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    drafter = Watched(draft, 3, 3, 15, stopping=ConfidenceStop(0.3))
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 12)) and found.stats.status == [0, 0, 0]
    assert sum(found.stats.accepted_by_depth) > 0


@pytest.mark.parametrize("name", ["mistral", "gpt2", "gptj"])
def test_other_architectures(name: str) -> None:
    model = tiny(name)
    ids, mask = pad(PROMPTS)
    drafter = Watched(perturbed(model), 3, 3, 9)
    found = mcsd.generate(model, drafter, ids, mask, max_new_tokens=10, temperature=0.0)
    assert torch.equal(found.sequences, greedy(model, ids, mask, 10))


def test_a_proposal_depends_on_its_own_request(draft: PreTrainedModel) -> None:
    def tree(texts: list[list[int]]) -> Proposal:
        drafter = TopKDrafter(draft, 3, 4, 10)
        state = state_of(texts)
        with torch.inference_mode():
            drafter.begin(state)
            proposal = drafter.propose(state)
            drafter.end()
        return proposal

    together = tree(PROMPTS)
    for request, text in enumerate(PROMPTS):
        alone = tree([text])
        assert torch.equal(alone.tokens[0], together.tokens[request])
        assert torch.equal(alone.parents[0], together.parents[request])


def test_a_text_at_the_end_of_its_room_beside_one_that_grows(draft: PreTrainedModel) -> None:
    long, short = prompt(60, 1), prompt(5, 2)
    drafter = TopKDrafter(draft, 2, 1, 2)
    state = state_of([long, short], capacity=60, active=[False, True])
    with torch.inference_mode():
        drafter.begin(state)
        drafter.propose(state)
        state.sequences[1] += prompt(20, 3)  # as after a long path of another drafter, in a merged tree
        state.refresh()
        proposal = drafter.propose(state)
        drafter.end()
    found = {tuple(path) for path in paths_of(proposal, 1).values() if path}
    assert found == set(grown(draft, state.sequences[1], 2, 1, 2))
    assert {tuple(p) for p in paths_of(proposal, 0).values() if p} == set(grown(draft, long, 2, 1, 2))


def test_a_certain_draft_keeps_parents_before_children(llama: PreTrainedModel) -> None:
    certain = copy.deepcopy(llama)
    with torch.no_grad():
        certain.lm_head.weight.mul_(1e4)  # log-probabilities of exactly 0: a child ties with its parent
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(llama, TopKDrafter(certain, 4, 3, 8), ids, mask, max_new_tokens=12, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 12))
    assert found.stats.tokens_per_call > 3.5 and found.stats.status == [0, 0, 0]


def test_sampled_text_has_the_targets_law() -> None:
    found, stats = sample(TopKDrafter(perturbed(few(), 0.7), 2, 2, 4))
    assert 0 < stats.accepted_by_depth[1] < stats.tested_by_depth[1]
    assert p_of(found) > P


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("depth", {"depth": 0}),
        ("beam", {"beam": True}),
        ("budget", {"budget": 0}),
        ("budget", {"depth": 2, "beam": 3, "budget": 13}),
        ("budget", {"depth": 9, "beam": 40, "budget": 1024}),
    ],
    ids=["no-depth", "a-flag", "no-budget", "more-than-on-offer", "more-than-a-tree-holds"],
)
def test_mistakes_are_named(name: str, options: dict[str, Any], draft: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=name):
        TopKDrafter(draft, **options)
