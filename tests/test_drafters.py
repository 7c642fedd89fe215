"""Drafters: what they propose, what they remember, and how the loop treats them."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import elsewhere
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, RepetitionPenaltyLogitsProcessor

import mcsd
from mcsd import Drafter, MergedDrafter, ModelDrafter, NgramDrafter, Proposal, State
from mcsd.drafters.base import Adapter
from mcsd_kernels import SamplingParams, Status
from tests.cases import PROPOSALS, RULES
from tests.small_law import P, few, p_of, sample
from tests.tiny import VOCAB, greedy, pad, perturbed, plain_logits, prompt, tiny

PROMPTS = [prompt(17, 1), prompt(4, 2), prompt(9, 3)]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny()


def state_of(sequences: list[list[int]], **options: Any) -> State:
    fields: dict[str, Any] = {
        "sequences": sequences,
        "active": [True] * len(sequences),
        "seeds": torch.arange(len(sequences)),
        "step": 0,
        "sampling": SamplingParams(),
        "device": torch.device("cpu"),
        "capacity": 200,
        "vocab": VOCAB,
    }
    return State(**{**fields, **options})


def paths_of(proposal: Proposal, request: int) -> dict[int, list[int]]:
    """node -> the tokens from the root's child down to it, for all nodes whose tokens are there."""
    nodes = proposal.tokens.shape[1]
    parents = proposal.parents.expand(len(proposal.tokens), nodes)[request].tolist()
    tokens = proposal.tokens[request].tolist()
    paths: dict[int, list[int]] = {0: []}
    for node in range(1, nodes):
        if parents[node] in paths and tokens[node] >= 0:
            paths[node] = [*paths[parents[node]], tokens[node]]
    return paths


# A model as drafter


class Watched(ModelDrafter):
    """Compares every row of draft logits with a plain forward over the text and the node's path."""

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.plain = copy.deepcopy(model)
        self.rows = self.steps = 0
        self.error = 0.0
        self.lengths: list[list[int]] = []

    def propose(self, state: State) -> Proposal:
        proposal = super().propose(state)
        self.steps += 1
        self.lengths.append([len(sequence) for sequence in state.sequences])
        assert proposal.tokens[:, 0].tolist() == [sequence[-1] for sequence in state.sequences]
        if proposal.draft_logits is not None:
            assert proposal.draft_rows is not None
            for request, sequence in enumerate(state.sequences):
                if state.active[request]:
                    self.compare(proposal, request, sequence)
        return proposal

    def compare(self, proposal: Proposal, request: int, sequence: list[int]) -> None:
        assert proposal.draft_logits is not None and proposal.draft_rows is not None
        parents = proposal.parents.expand(proposal.tokens.shape)[request].tolist()
        by_depth: dict[int, list[tuple[int, list[int]]]] = {}
        for node, path in paths_of(proposal, request).items():
            if node in parents:
                by_depth.setdefault(len(path), []).append((node, path))
        for same in by_depth.values():
            texts = torch.tensor([sequence + path for _, path in same])
            plain = self.plain(texts, attention_mask=torch.ones_like(texts), use_cache=False).logits[:, -1]
            rows = proposal.draft_rows[request, [node for node, _ in same]].long()
            self.error = max(self.error, float((proposal.draft_logits[rows] - plain).abs().max()))
            self.rows += len(same)


@pytest.mark.parametrize("attention", ["auto", "dense"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", ["without_replacement", "with_replacement", "greedy"])
def test_draft_logits_are_plain_logits_at_every_step(
    proposal: str, rule: str, attention: str, llama: PreTrainedModel
) -> None:
    ids, mask = pad(PROMPTS)
    drafter = Watched(perturbed(llama), (3, 2, 2), proposal, attention)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=20, rule=rule, seed=5)
    stats = found.stats
    assert 0 < sum(stats.accepted_by_depth) < sum(stats.tested_by_depth)
    assert stats.accepted_by_depth[2] > 0, "whole paths were accepted too, so leaves had to be read afterwards"
    assert drafter.steps == stats.target_calls > 5 and drafter.rows > 50
    steps = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(drafter.lengths)]
    assert len(set(steps)) > 2, "requests advance each by its own length"
    assert drafter.error < 1e-4


# three children, of which the first has two and the last one; the nodes are numbered depth first
UNEVEN = [-1, 0, 1, 2, 1, 0, 0, 6]


@pytest.mark.parametrize("proposal", ["without_replacement", "with_replacement", "greedy"])
def test_trees_of_any_shape(proposal: str, llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    drafter = Watched(perturbed(llama), proposal=proposal, parents=UNEVEN)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=20, seed=5)
    assert found.stats.accepted_by_depth[2] > 0 and found.stats.status == [0, 0, 0]
    assert drafter.rows > 30 and drafter.error < 1e-4
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=20, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 20))


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gpt2", "gpt_oss", "gptj"])
def test_draft_logits_in_other_architectures(name: str, llama: PreTrainedModel) -> None:
    model = tiny(name)
    ids, mask = pad(PROMPTS)
    drafter = Watched(perturbed(model), (3, 2))
    found = mcsd.generate(model, drafter, ids, mask, max_new_tokens=20)
    assert 0 < sum(found.stats.accepted_by_depth) < sum(found.stats.tested_by_depth)
    assert drafter.error < 1e-4
    # target and drafter need not be of one architecture
    found = mcsd.generate(llama, Watched(model, (3, 2)), ids, mask, max_new_tokens=20, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 20))


def test_a_long_prompt_is_read_in_chunks(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.scoring.PREFILL_CHUNK", 5)
    ids, mask = pad(PROMPTS)
    drafter = Watched(perturbed(llama), (2, 2))
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=9, temperature=0.0, proposal=None)
    assert drafter.error < 1e-4 and drafter.rows > 0
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 9))


def test_point_proposes_the_most_probable_tokens(llama: PreTrainedModel) -> None:
    model = perturbed(llama)
    state = state_of([PROMPTS[0], PROMPTS[1]], sampling=SamplingParams(temperature=0.0))
    drafter = ModelDrafter(model, (3, 2), "point")
    with torch.inference_mode():
        drafter.begin(state)
        proposal = drafter.propose(state)
        drafter.end()
    assert proposal.draft_logits is None and proposal.depth == 2 and proposal.tokens.shape == (2, 10)
    for request, sequence in enumerate(state.sequences):
        paths = paths_of(proposal, request)
        assert len(paths) == 10
        top = plain_logits(model, sequence).topk(3).indices.tolist()
        assert proposal.tokens[request, 1:4].tolist() == top
        for child in range(3):
            best = plain_logits(model, [*sequence, top[child]]).topk(2).indices.tolist()
            assert proposal.tokens[request, 4 + 2 * child : 6 + 2 * child].tolist() == best


def test_what_a_drafter_draws_depends_on_seed_and_step_alone(llama: PreTrainedModel) -> None:
    def tokens(sequences: list[list[int]], seeds: list[int], step: int) -> torch.Tensor:
        state = state_of(sequences, seeds=torch.tensor(seeds), step=step)
        drafter = ModelDrafter(llama, (3, 2))
        with torch.inference_mode():
            drafter.begin(state)
            proposal = drafter.propose(state)
            drafter.end()
        return proposal.tokens

    both = tokens([PROMPTS[0], PROMPTS[1]], [4, 5], 3)
    assert torch.equal(both[1:], tokens([PROMPTS[1]], [5], 3))
    assert not torch.equal(both[1:], tokens([PROMPTS[1]], [5], 4))
    assert not torch.equal(both[1:], tokens([PROMPTS[1]], [6], 3))
    same = tokens([PROMPTS[1]] * 2, [5, 5], 3)
    assert torch.equal(same[0], same[1])
    # the children of sister nodes are drawn apart
    chains = tokens([PROMPTS[1]] * 64, list(range(64)), 0)
    assert any(len({tuple(pair) for pair in row[4:].view(3, 2).tolist()}) > 1 for row in chains)


def test_a_text_at_the_end_of_its_room_beside_one_that_grows(llama: PreTrainedModel) -> None:
    state = state_of([prompt(60, 1), prompt(5, 2)], capacity=60, active=[False, True])
    drafter = Watched(llama, (1, 1))
    drafter.alone = False
    with torch.inference_mode():
        drafter.begin(state)
        drafter.propose(state)
        drafter.keep(state, torch.tensor([[0, -1], [0, -1]]), torch.tensor([1, 1]))
        state.sequences[1] += prompt(20, 3)  # as after a long path of another drafter, in a merged tree
        state.refresh()
        drafter.propose(state)
        drafter.end()
    assert drafter.error < 1e-4 and drafter.rows == 4


def test_a_drafter_may_be_used_again(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    drafter = Watched(perturbed(llama))
    first = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=9, seed=3).sequences
    mcsd.generate(llama, drafter, *pad([prompt(30, 8)]), max_new_tokens=9)
    assert torch.equal(mcsd.generate(llama, drafter, ids, mask, max_new_tokens=9, seed=3).sequences, first)
    assert drafter.error < 1e-4


def test_a_drafter_given_as_an_object_is_the_same_as_its_model(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    model = perturbed(llama)
    by_name = mcsd.generate(llama, model, ids, mask, max_new_tokens=9, branching=(3, 2), proposal="greedy")
    by_object = mcsd.generate(llama, ModelDrafter(model, (3, 2), "greedy"), ids, mask, max_new_tokens=9)
    assert torch.equal(by_name.sequences, by_object.sequences)


def test_a_narrow_draft_law_leaves_candidates_missing(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    for proposal in PROPOSALS:
        found = mcsd.generate(
            llama, perturbed(llama), ids, mask, max_new_tokens=12, top_k=2, branching=(5, 3), proposal=proposal
        )
        assert found.stats.tokens == 36 and found.stats.status == [0, 0, 0]


# A model with an embedding of another size


def resized(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """A copy with fewer tokens, or with more, which are the most probable ones everywhere."""
    other = copy.deepcopy(model)
    own = other.get_input_embeddings().weight.shape[0]
    other.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for padding in range(own, rows):  # the ids that mean nothing draw in two directions
            other.lm_head.weight[padding] = (-1) ** padding * 3 * other.lm_head.weight[:own].abs().mean(0)
    return other


SIZES = [
    pytest.param(VOCAB - 20, VOCAB - 20, id="fewer-tokens"),
    pytest.param(VOCAB + 20, VOCAB, id="more-tokens"),
    pytest.param(VOCAB + 20, VOCAB - 20, id="more-tokens-of-padding"),
    pytest.param(VOCAB, VOCAB - 20, id="as-many"),
]


@pytest.mark.parametrize(("rows", "shared"), SIZES)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_draft_may_have_an_embedding_of_another_size(
    proposal: str, rows: int, shared: int, llama: PreTrainedModel
) -> None:
    ids, mask = pad(PROMPTS)
    assert int(ids.max()) >= VOCAB - 20, "the prompt has a token that the smaller draft does not know"
    model = resized(perturbed(llama, 0.05), rows)
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.extend(args[0].flatten().tolist()))
    drafted: list[int] = []

    def observe(state: State, tree: Proposal, *_: Any) -> None:
        drafted.extend(tree.tokens[:, 1:].flatten().tolist())

    for rule in RULES:
        drafter = ModelDrafter(model, (3, 2), proposal, shared_vocab=shared)
        options: dict[str, Any] = {"max_new_tokens": 30, "rule": rule, "observer": observe}
        found = mcsd.generate(llama, drafter, ids, mask, temperature=0.0, **options)
        assert torch.equal(found.sequences, greedy(llama, ids, mask, 30))
        assert found.stats.status == [0, 0, 0] and sum(found.stats.accepted_by_depth) > 5
        found = mcsd.generate(llama, drafter, ids, mask, **options)
        assert found.stats.status == [0, 0, 0] and sum(found.stats.accepted_by_depth) > 5
    assert max(drafted) < shared and min(fed) >= 0 and max(fed) < rows


@pytest.mark.parametrize(("rows", "shared"), [(4, 4), (7, 5), (7, 4)], ids=["fewer", "more", "more-of-padding"])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_such_a_draft_leaves_the_law_alone(proposal: str, rows: int, shared: int) -> None:
    drafter = ModelDrafter(resized(perturbed(few(), 0.5), rows), (2, 2), proposal, shared_vocab=shared)
    found, stats = sample(drafter)
    assert 0 < sum(stats.accepted_by_depth) < sum(stats.tested_by_depth)
    assert p_of(found) > P


def test_such_a_draft_takes_the_tree_that_generate_is_told(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    model = resized(perturbed(llama), VOCAB + 5)
    told = ModelDrafter(model, None, shared_vocab=VOCAB)
    found = mcsd.generate(llama, told, ids, mask, max_new_tokens=9, branching=(3, 2, 1), proposal="greedy")
    own = ModelDrafter(model, (3, 2, 1), "greedy", shared_vocab=VOCAB)
    assert torch.equal(found.sequences, mcsd.generate(llama, own, ids, mask, max_new_tokens=9).sequences)
    assert len(found.stats.accepted_by_depth) == 3


def test_another_size_must_be_meant(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = resized(llama, VOCAB + 5)
    for shared in (0, -1, True, 2.0, "97"):
        with pytest.raises(ValueError, match=r"^shared_vocab: expected a whole number >= 1"):
            ModelDrafter(wide, shared_vocab=shared)  # type: ignore[arg-type]
    for model, shared in ((wide, VOCAB + 1), (resized(llama, VOCAB - 5), VOCAB)):
        most = min(VOCAB, model.config.vocab_size)
        drafter = ModelDrafter(model, shared_vocab=shared)
        with pytest.raises(ValueError, match=rf"^shared_vocab: expected a whole number in \[1, {most}\], got {shared}"):
            mcsd.generate(llama, drafter, *pad(PROMPTS), max_new_tokens=3)
    with pytest.raises(ValueError, match=r"^draft: expected the target's vocabulary of 97 tokens, got 102"):
        mcsd.generate(llama, MergedDrafter([ModelDrafter(wide), NgramDrafter()]), *pad(PROMPTS), max_new_tokens=3)


# Prompt lookup


def ngram_tree(sequence: list[int], **options: Any) -> tuple[Proposal, list[list[int]]]:
    drafter = NgramDrafter(**options)
    state = state_of([sequence])
    drafter.begin(state)
    proposal = drafter.propose(state)
    paths = paths_of(proposal, 0)
    parents = proposal.parents.expand(1, proposal.tokens.shape[1])[0].tolist()
    return proposal, [path for node, path in paths.items() if node not in parents and path]


def test_lookup_finds_the_longest_match_first() -> None:
    text = [5, 6, 7, 10, 11, 12, 9, 7, 20, 21, 22, 8, 5, 6, 7]
    _, paths = ngram_tree(text, longest=3, depth=3, continuations=1)
    assert paths == [[10, 11, 12]]
    _, paths = ngram_tree(text, longest=3, depth=3, continuations=2)
    assert paths == [[10, 11, 12], [20, 21, 22]]
    _, paths = ngram_tree(text, longest=3, shortest=2, depth=3, continuations=2)
    assert paths == [[10, 11, 12]]


def test_lookup_prefers_the_recent_among_equals() -> None:
    text = [7, 30, 1, 7, 40, 2, 7, 50, 3, 7]
    _, paths = ngram_tree(text, longest=1, depth=1, continuations=2)
    assert paths == [[50], [40]]
    proposal, _ = ngram_tree(text, longest=1, depth=1, continuations=3)
    assert proposal.tokens[0, 1:4].tolist() == [50, 40, 30]


def test_lookup_merges_what_begins_alike() -> None:
    text = [7, 10, 11, 12, 7, 10, 20, 21, 7, 30, 31, 32, 7]
    proposal, paths = ngram_tree(text, longest=1, depth=3, continuations=3)
    assert sorted(paths) == [[10, 11, 12], [10, 20, 21], [30, 31, 32]]
    assert proposal.tokens.shape == (1, 1 + 8), "the shared first token is one node"


def test_lookup_does_not_count_what_adds_nothing() -> None:
    text = [7, 10, 11, 1, 7, 20, 21, 2, 7, 20, 21, 3, 7, 20, 21, 4, 7]
    _, paths = ngram_tree(text, longest=1, depth=2, continuations=2)
    assert sorted(paths) == [[10, 11], [20, 21]]


def test_lookup_without_a_match_is_plain_decoding() -> None:
    proposal, paths = ngram_tree([1, 2, 3, 4])
    assert paths == [] and (proposal.tokens[:, 1:] < 0).all()
    proposal, paths = ngram_tree([4])
    assert paths == []


@pytest.mark.parametrize("nodes", [2, 5, 16, 40])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_lookup_keeps_to_its_bounds(depth: int, nodes: int) -> None:
    random = torch.Generator().manual_seed(depth * 100 + nodes)
    grew = 0
    for trial in range(20):
        text = torch.randint(4, (60,), generator=random).tolist()
        proposal, paths = ngram_tree(text, depth=depth, nodes=nodes, continuations=4, longest=3)
        assert proposal.tokens.shape[1] <= nodes and proposal.tokens[0, 0] == text[-1]
        assert proposal.depth >= max(map(len, paths)) and max(map(len, paths)) <= depth
        assert proposal.draft_logits is None
        tokens = proposal.tokens[0].tolist()
        parents = proposal.parents[0].tolist()
        assert parents[0] == -1 and all(parent < node for node, parent in enumerate(parents))
        placed = [(parent, token) for parent, token in zip(parents[1:], tokens[1:], strict=True) if token >= 0]
        assert len(placed) == len(set(placed)), f"trial {trial}: siblings repeat"
        for path in paths:
            # each path is a piece of the text, after a piece that the text ends in
            ends = [i for i in range(1, len(text)) if text[i : i + len(path)] == path]
            assert any(text[i - 1] == text[-1] for i in ends)
        grew += len(placed)
    assert grew >= 15 * min(depth, nodes - 1)


def test_lookup_learns_what_was_generated() -> None:
    drafter = NgramDrafter(longest=2, depth=2, continuations=1)
    state = state_of([[1, 2, 3], [9, 8, 9]])
    drafter.begin(state)
    first = drafter.propose(state)
    assert paths_of(first, 0) == {0: []} and list(paths_of(first, 1).values()) == [[], [8], [8, 9]]
    state.sequences[0] += [4, 2]
    state.active[1] = False
    second = drafter.propose(state)
    assert list(paths_of(second, 0).values()) == [[], [3], [3, 4]]
    assert paths_of(second, 1) == {0: []}, "a request that is over proposes nothing"
    drafter.begin(state_of([[1, 2, 7, 2]]))
    assert list(paths_of(drafter.propose(state_of([[1, 2, 7, 2]])), 0).values()) == [[], [7], [7, 2]]


def test_lookup_in_a_text_that_grows_is_lookup_in_the_whole() -> None:
    text = np.random.default_rng(0).integers(0, 3, 80).tolist()
    options: dict[str, Any] = {"longest": 3, "depth": 3, "continuations": 3}
    drafter = NgramDrafter(**options)
    state = state_of([text[:4]])
    drafter.begin(state)
    for step in range(30):
        proposal = drafter.propose(state)
        wanted, _ = ngram_tree(state.sequences[0], **options)
        assert list(paths_of(proposal, 0).values()) == list(paths_of(wanted, 0).values())
        state.sequences[0] += text[len(state.sequences[0]) :][: 1 + step % 3]


@pytest.mark.parametrize(
    "options",
    [
        {"shortest": 0},
        {"longest": 2, "shortest": 3},
        {"depth": 0},
        {"continuations": 0},
        {"nodes": 1},
        {"nodes": 2000},
        {"depth": 2000},
        {"longest": 2.5},
    ],
    ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()),
)
def test_lookup_names_mistakes(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(options)[-1]}: expected a whole number"):
        NgramDrafter(**options)


def test_of_many_places_of_one_ngram_few_are_looked_at() -> None:
    drafter = NgramDrafter()
    state = state_of([[5] * 20_000], capacity=30_000)
    drafter.begin(state)
    proposal = drafter.propose(state)
    assert proposal.tokens[0, : 1 + drafter.depth].tolist() == [5] * (1 + drafter.depth)
    assert len(drafter._places(0, state.sequences[0])) <= 4 * drafter.continuations * drafter.longest


# Drafters of one's own


@pytest.mark.parametrize("restarts", [True, False])
def test_an_object_restarts_in_its_own_way_or_ends_and_begins(restarts: bool) -> None:
    calls: list[str] = []
    names = ("propose", "begin", "keep", "end", *(["restart"] if restarts else []))
    inner = SimpleNamespace(**{name: lambda *_, name=name: calls.append(name) for name in names})
    Adapter(inner).restart(state_of([[1, 2]]))
    assert calls == (["restart"] if restarts else ["end", "begin"])


class Repeats(Drafter):
    """Proposes the last two tokens again, and the token after the last one."""

    proposal = "point"

    def propose(self, state: State) -> Proposal:
        rows = [[s[-1], s[-1], (s[-1] + 1) % state.vocab] for s in state.sequences]
        return Proposal(torch.tensor(rows), torch.tensor([-1, 0, 0]), depth=1)


class Bare:
    """No subclass of anything, and nothing but `propose`."""

    def propose(self, state: State) -> Proposal:
        tokens = torch.tensor([[s[-1], 5, 6] for s in state.sequences])
        return Proposal(tokens, torch.tensor([-1, 0, 1], dtype=torch.int32), 2)


@pytest.mark.parametrize("drafter", [Repeats(), Bare()], ids=["subclass", "duck"])
@pytest.mark.parametrize("rule", RULES)
def test_a_drafter_of_ones_own(rule: str, drafter: Any, llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, temperature=0.0, rule=rule)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 12))


class Oracle(Drafter):
    """Knows the text that will come, and hides it among padding, missing candidates and wrong ones."""

    def __init__(self, text: torch.Tensor, prompts: list[list[int]], width: int) -> None:
        self.rows = [text[b, width:].tolist() for b in range(len(prompts))]
        self.start = [len(p) for p in prompts]
        self.calls: list[str] = []

    def begin(self, state: State) -> None:
        self.calls.append("begin")
        assert [len(s) for s in state.sequences] == self.start

    def propose(self, state: State) -> Proposal:
        self.calls.append("propose")
        tokens, parents = [], []
        for request, sequence in enumerate(state.sequences):
            said = len(sequence) - self.start[request]
            first, second = [*self.rows[request], 7, 7][said : said + 2]
            other = (first + 1) % VOCAB
            # shapes differ: request 1 has padding first, request 2 a missing candidate
            tokens.append([sequence[-1], other if request != 2 else -1, first, other, second])
            parents.append([-1, -1 if request == 1 else 0, 0, 2, 2])
        self.length = [len(sequence) for sequence in state.sequences]
        return Proposal(torch.tensor(tokens), torch.tensor(parents), 2)

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        self.calls.append("keep")
        assert [len(sequence) for sequence in state.sequences] == self.length, "not advanced yet"
        assert path.shape == (len(self.start), 3) and length.shape == (len(self.start),)

    def end(self) -> None:
        self.calls.append("end")


def test_trees_of_different_shapes_in_one_batch(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    wanted = greedy(llama, ids, mask, 12)
    drafter = Oracle(wanted, PROMPTS, ids.shape[1])
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, temperature=0.0)
    assert torch.equal(found.sequences, wanted)
    assert found.stats.target_calls == 4 and found.stats.tokens_per_call == 3.0
    assert drafter.calls == ["begin", *["propose", "keep"] * 4, "end"]
    assert found.stats.status == [0, 0, 0]


class Impossible(Drafter):
    """Proposes tokens that are none, which `verify` rejects and reports, and one that is."""

    def propose(self, state: State) -> Proposal:
        tokens = torch.tensor([[s[-1], state.vocab, 5, state.vocab + 1000, -7] for s in state.sequences])
        return Proposal(tokens, torch.tensor([-1, 0, 0, 2, 2]), 2)


def test_impossible_tokens_are_rejected(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(llama, Impossible(), ids, mask, max_new_tokens=12, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 12))
    assert all(status & Status.BAD_TOKEN for status in found.stats.status)
    processed = mcsd.generate(
        llama,
        Impossible(),
        ids,
        mask,
        max_new_tokens=12,
        temperature=0.0,
        logits_processor=RepetitionPenaltyLogitsProcessor(1.3),
    )
    assert torch.equal(processed.sequences, greedy(llama, ids, mask, 12, [RepetitionPenaltyLogitsProcessor(1.3)]))


def test_a_wrong_proposal_is_named(llama: PreTrainedModel) -> None:
    class Wrong(Drafter):
        def propose(self, state: State) -> Proposal:
            return Proposal(torch.zeros(5, 3, dtype=torch.long), torch.tensor([-1, 0, 0]), 1)

    class Nothing(Drafter):
        def propose(self, state: State) -> Proposal:
            return None  # type: ignore[return-value]

    class Unknown(Repeats):
        proposal = "sampled"

    with pytest.raises(ValueError, match=r"Drafter\.propose: expected a Proposal, got NoneType"):
        mcsd.generate(llama, Nothing(), *pad(PROMPTS), max_new_tokens=3)
    with pytest.raises(ValueError, match="tokens"):
        mcsd.generate(llama, Wrong(), *pad(PROMPTS), max_new_tokens=3)
    with pytest.raises(ValueError, match="proposal"):
        mcsd.generate(llama, Unknown(), *pad(PROMPTS), max_new_tokens=3)


class AnotherRoot(Drafter):
    """Trees that begin with a token of its own."""

    def propose(self, state: State) -> Proposal:
        tokens = [[9, 3, text[-1]] for text in state.sequences]
        return Proposal(torch.tensor(tokens, device=state.device), torch.tensor([-1, 0, 0], device=state.device), 1)


def test_a_root_that_is_not_the_texts_last_token(llama: PreTrainedModel) -> None:
    """It would be another text that is verified; what only a device can see is put right there."""
    ids, mask = pad(PROMPTS)
    with pytest.raises(ValueError, match=r"Proposal\.tokens: expected the texts' last tokens .* got \[9, 9, 9\]"):
        mcsd.generate(llama, AnotherRoot(), ids, mask, max_new_tokens=3)
    device = f"{elsewhere.NAME}:0"
    there = elsewhere.moved(copy.deepcopy(llama), device)
    found = mcsd.generate(
        there, AnotherRoot(), ids.to(device), mask.to(device), max_new_tokens=12, temperature=0.0
    ).sequences
    assert torch.equal(found.cpu(), greedy(llama, ids, mask, 12))


def test_a_drafters_broken_logits_end_no_neighbour(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    model = perturbed(llama)
    calls: list[int] = []

    def breaks(module: torch.nn.Module, args: Any, output: Any) -> None:
        calls.append(0)
        if len(calls) > 6:
            output.logits[1] = float("nan")

    clean = mcsd.generate(llama, model, ids, mask, max_new_tokens=15, temperature=0.0).sequences
    model.register_forward_hook(breaks)
    for proposal in PROPOSALS:
        calls.clear()
        found = mcsd.generate(llama, model, ids, mask, max_new_tokens=15, temperature=0.0, proposal=proposal)
        assert torch.equal(found.sequences[[0, 2]], clean[[0, 2]])
