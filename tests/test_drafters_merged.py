"""Several drafters at once: what is joined, who is told what, and the law of drawn and chosen candidates together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mcsd
from mcsd import Drafter, ModelDrafter, NgramDrafter, Proposal, State
from mcsd.adaptive import AdaptiveDrafter
from mcsd.drafters.early_exit import EarlyExitDrafter
from mcsd.drafters.heads import HeadsDrafter
from mcsd.drafters.merged import MergedDrafter, _in_use
from mcsd.drafters.stopping import ConfidenceStop
from mcsd.drafters.topk import TopKDrafter
from mcsd.drafters.trie import TrieDrafter
from mcsd.profile import Ladder
from tests.cases import PROPOSALS, RULES
from tests.small_law import P, few, p_of, sample
from tests.test_drafters import PROMPTS, paths_of, state_of
from tests.test_drafters import Watched as DraftLogits
from tests.test_drafters_heads import medusa
from tests.tiny import greedy, pad, perturbed, prompt, tiny


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny(num_hidden_layers=3)


@pytest.fixture(scope="module")
def draft(llama: PreTrainedModel) -> PreTrainedModel:
    return perturbed(llama)


class Given(Drafter):
    """Proposes given trees, and notes what it is told."""

    def __init__(self, tokens: list[list[int]], parents: list[list[int]] | list[int], **fields: Any) -> None:
        self.tokens, self.parents, self.fields = torch.tensor(tokens), torch.tensor(parents), fields
        self.proposal = "without_replacement" if "draft_logits" in fields else "point"
        self.calls: list[str] = []
        self.told: list[tuple[list[list[int]], list[int], torch.Tensor | None]] = []

    def begin(self, state: State) -> None:
        self.calls.append("begin")

    def propose(self, state: State) -> Proposal:
        return Proposal(self.tokens, self.parents.int(), 3, **self.fields)

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        self.told.append((path.tolist(), length.tolist(), state.hidden))

    def end(self) -> None:
        self.calls.append("end")


def drawn(tokens: list[list[int]], parents: list[int]) -> Given:
    batch, nodes = len(tokens), len(parents)
    return Given(tokens, parents, draft_logits=torch.arange(batch * nodes * 3.0).view(batch, nodes, 3))


# drawn: 0 -> 10, 11; 10 -> 12, 13.    chosen: 0 -> 11 -> 14; 0 -> 10 -> 12 -> 15; 0 -> 16
DRAWN = ([[5, 10, 11, 12, 13]], [-1, 0, 0, 1, 1])
CHOSEN = ([[5, 11, 14, 10, 12, 15, 16]], [-1, 0, 1, 0, 3, 4, 0])


def merged(*drafters: Any, sequences: list[list[int]]) -> tuple[MergedDrafter, Proposal]:
    drafter = MergedDrafter(drafters)
    state = state_of(sequences)
    drafter.begin(state)
    return drafter, drafter.propose(state)


def test_what_is_new_comes_after_and_what_is_not_is_joined() -> None:
    drafter, tree = merged(Given(*CHOSEN), drawn(*DRAWN), sequences=[[1, 5]])
    assert drafter.proposal == "without_replacement"
    assert tree.tokens[0].tolist() == [5, 10, 11, 12, 13, 14, 15, 16, -1, -1, -1]
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 1, 2, 3, 0, -1, -1, -1]
    assert tree.origin is not None and tree.point_nodes is not None and tree.depth == 3
    assert tree.origin[0, 1:8].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert tree.point_nodes[0, 1:8].tolist() == [False] * 4 + [True] * 3
    # every node has a row that is there: its own where its children are drawn, the root's elsewhere
    assert tree.draft_rows is not None and tree.draft_rows[0].tolist() == [0, 1] + [0] * 9
    assert tree.draft_logits is not None and tree.draft_logits.shape == (5, 3)


def test_what_was_chosen_among_drawn_siblings_stays_so() -> None:
    """A tree may bring chosen nodes beside those that it drew."""
    own = torch.tensor([False, False, True, False, True])
    first = drawn(*DRAWN)
    first.fields["point_nodes"] = own
    _, tree = merged(first, Given(*CHOSEN), sequences=[[1, 5]])
    assert tree.point_nodes is not None and tree.point_nodes[0, :5].tolist() == own.tolist()


def test_a_missing_candidate_is_joined_with_nothing() -> None:
    tokens = [[5, -1, 11, 12, 13]]
    _, tree = merged(drawn(tokens, DRAWN[1]), Given([[5, -1, 10, 12, 11]], [-1, 0, 0, 1, 0]), sequences=[[5]])
    # a drawn one keeps its place, and what is below a chosen one goes with it
    assert tree.tokens[0].tolist() == [5, -1, 11, 12, 13, 10, -1, -1, -1]
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 1, 0, -1, -1, -1]


def test_three_trees_of_different_shapes_in_a_batch() -> None:
    one = drawn([[5, 10, 11], [6, 10, 10]], [-1, 0, 0])
    two = Given([[5, 10, 20, 30], [6, 7, 8, 9]], [[-1, 0, 1, 2], [-1, 0, 0, -1]])
    three = Given([[5, 10, 20, 31], [6, 8, 10, 9]], [[-1, 0, 1, 2], [-1, 0, 0, 2]])
    _, tree = merged(one, two, three, sequences=[[5], [6]])
    assert tree.tokens.tolist() == [[5, 10, 11, 20, 30, 31, -1, -1, -1], [6, 10, 10, 7, 8, 9, -1, -1, -1]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 3, 3, -1, -1, -1], [-1, 0, 0, 0, 0, 1, -1, -1, -1]]
    assert tree.origin is not None and tree.origin[:, [1, 3, 5]].tolist() == [[0, 1, 2]] * 2
    _, points = merged(two, three, sequences=[[5], [6]])
    assert points.point_nodes is None and points.draft_logits is None and points.draft_rows is None
    assert points.tokens[0].tolist() == [5, 10, 20, 30, 31, -1, -1]


def test_missing_candidates_at_the_end_are_padding() -> None:
    parents, tokens = torch.tensor([-1, 0, 0, 1, 1]), torch.tensor([[5, 1, -1, 2, -1], [5, -1, -1, -1, -1]])
    there = _in_use(Proposal(tokens, parents, 2), "without_replacement").tolist()
    assert there == [[False, True, True, True, False], [False] * 5]
    # the drawn one of "greedy" siblings is the last, and may be missing
    assert _in_use(Proposal(tokens, parents, 2), "greedy").tolist() == [[False, True, True, True, True]] * 2


def test_each_is_told_in_its_own_numbers() -> None:
    one, two = drawn(*DRAWN), Given(*CHOSEN)
    two.reads_hidden = True
    drafter, _ = merged(one, two, sequences=[[1, 5]])
    assert drafter.reads_hidden and one.calls == two.calls == ["begin"]
    hidden = torch.arange(11.0)[None, :, None].expand(1, 11, 2)
    state = state_of([[1, 5]], hidden=hidden)
    paths = {
        (0, 1, 3, 6): ([0, 1, 3, 11], [0, 3, 4, 5]),
        (0, 1, 4, -1): ([0, 1, 4, -1], [0, 3, 11, -1]),
        (0, 2, 5, -1): ([0, 2, 10, -1], [0, 1, 2, -1]),
        (0, 7, -1, -1): ([0, 12, -1, -1], [0, 6, -1, -1]),
    }
    for path, (first, second) in paths.items():
        length = sum(node >= 0 for node in path)
        drafter.keep(state, torch.tensor([path], dtype=torch.int32), torch.tensor([length], dtype=torch.int32))
        assert one.told[-1][:2] == ([first], [length]) and two.told[-1][:2] == ([second], [length])
        mine = two.told[-1][2]
        assert mine is not None
        accepted = [node for node in second if node >= 0]
        assert mine[0, accepted, 0].tolist() == [float(node) for node in path[:length]], "hidden states go along"
    drafter.end()
    assert one.calls == two.calls == ["begin", "end"]


class Watched(MergedDrafter):
    """Checks that trees are trees, that siblings differ, and that drawn ones are as they were drawn."""

    joined = 0

    def propose(self, state: State) -> Proposal:
        proposal = super().propose(state)
        for request in range(len(state.sequences)):
            parents = proposal.parents[request].tolist()
            assert parents[0] == -1 and all(parent < node for node, parent in enumerate(parents))
            assert all(parents[parent] >= 0 or parent <= 0 for parent in parents), "no child of padding"
            paths = [tuple(path) for path in paths_of(proposal, request).values()]
            assert len(paths) == len(set(paths)) or self.proposal == "with_replacement"
            self.joined += sum(parent < 0 for parent in parents[1:])
            if proposal.point_nodes is not None:
                points = proposal.point_nodes[request].tolist()
                assert points == sorted(points), "chosen nodes come after all drawn ones"
        return proposal


def drafters(llama: PreTrainedModel, draft: PreTrainedModel, proposal: str) -> dict[str, list[Any]]:
    return {
        "model-and-lookup": [ModelDrafter(draft, (3, 2), proposal), NgramDrafter()],
        "lookup-trie-and-top-k": [NgramDrafter(), TrieDrafter(), TopKDrafter(draft, 2, 3, 6)],
        "heads-and-model": [HeadsDrafter(medusa(llama), (3, 2)), ModelDrafter(draft, (2, 2, 1), proposal)],
        "early-exit-and-heads": [EarlyExitDrafter(llama, 2, (2, 2), proposal), HeadsDrafter(medusa(llama), (2, 1))],
    }


PAIRS = ["model-and-lookup", "lookup-trie-and-top-k", "heads-and-model", "early-exit-and-heads"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("pair", PAIRS)
def test_greedy_text_is_plain_greedy(
    pair: str, proposal: str, rule: str, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    ids, mask = pad([PROMPTS[0], [5, 6, 7] * 4, prompt(1, 9)])
    drafter = Watched(drafters(llama, draft, proposal)[pair])
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=20, temperature=0.0, rule=rule)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 20))
    assert found.stats.status == [0, 0, 0] and drafter.joined > 0
    stats = found.stats
    assert set(stats.accepted_by_origin) <= set(stats.proposed_by_origin) <= set(range(len(drafter.drafters)))
    assert sum(stats.accepted_by_origin.values()) == sum(stats.accepted_by_depth) > 0


def test_together_they_accept_what_each_accepts(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    # of the second prompt a model that is never right knows nothing, of the first the lookup nothing
    wrong = perturbed(llama, 3.0, seed=5)
    ids, mask = pad([PROMPTS[0], PROMPTS[1]])
    text = greedy(llama, ids, mask, 40)
    ids, mask = pad([text[0].tolist()[:-20][-17:], prompt(17, 6)])

    def tokens_per_call(drafter: Any) -> float:
        return mcsd.generate(llama, drafter, ids, mask, max_new_tokens=20, temperature=0.0).stats.tokens_per_call

    alone = [tokens_per_call(ModelDrafter(model, (2, 2), "point")) for model in (wrong, draft)]
    both = mcsd.generate(
        llama,
        MergedDrafter([ModelDrafter(wrong, (2, 2), "point"), ModelDrafter(draft, (2, 2), "point")]),
        ids,
        mask,
        max_new_tokens=20,
        temperature=0.0,
    ).stats
    assert both.tokens_per_call >= max(alone) > min(alone)
    assert both.accepted_by_origin[1] > both.accepted_by_origin.get(0, 0)


def test_a_model_reads_what_others_had_accepted(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    model = DraftLogits(draft, (2, 2))
    ids, mask = pad(PROMPTS)
    oracle = TopKDrafter(copy.deepcopy(llama), 5, 1, 5)
    found = mcsd.generate(llama, MergedDrafter([oracle, model]), ids, mask, max_new_tokens=24, temperature=0.0)
    assert found.stats.accepted_by_depth[4] > 0, "paths deeper than the model's own tree"
    assert model.rows > 20 and model.error < 1e-4
    assert model.alone, "given back as it was"


def test_a_proposal_depends_on_its_own_request(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    values = (1.0, 0.6, 0.2, 0.3, 0.1, 0.2, 0.1, 0.1)
    ladder = Ladder((-1, 0, 0, 1, 1, 3, 3, 5), values, (2, 4, 8), (1.0, 1.15, 1.4))
    kinds = [
        [ModelDrafter(draft, (3, 2)), TrieDrafter(nodes=6), HeadsDrafter(medusa(llama), (2,))],
        [NgramDrafter(), TopKDrafter(draft, 2, 3, 6)],  # the first one's trees have the size of the largest
        [AdaptiveDrafter(draft, ladder, prior=0.5), NgramDrafter()],
        [NgramDrafter(), TrieDrafter()],
    ]
    prompts = [PROMPTS[0], [5, 6, 7] * 4, prompt(2, 9)]
    ids, mask = pad(prompts)
    accepted = 0
    for drafter in map(MergedDrafter, kinds):
        for seed in range(4):
            options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.7}
            found = mcsd.generate(llama, drafter, ids, mask, seed=[seed, 50 + seed, 90 + seed], **options)
            accepted += sum(found.stats.accepted_by_depth)
            for request, text in enumerate(prompts):
                alone = mcsd.generate(llama, drafter, *pad([text]), seed=[seed + (0, 50, 90)[request]], **options)
                assert torch.equal(alone.sequences[0, len(text) :], found.sequences[request, ids.shape[1] :])
    assert accepted > 50


# The law


class Favourites(Drafter):
    """Chooses two chains of two tokens that the target likes, in one of two orders that the text decides."""

    def propose(self, state: State) -> Proposal:
        rows = []
        for s in state.sequences:
            first, second = (1, 4) if len(s) % 2 else (4, 2)
            rows.append([s[-1], first, second, second, first])
        return Proposal(torch.tensor(rows), torch.tensor([-1, 0, 0, 1, 2], dtype=torch.int32), 2)


def law_drafter(kind: type[MergedDrafter], proposal: str, width: int = 2) -> MergedDrafter:
    return kind([Favourites(), ModelDrafter(perturbed(few(), 0.7), (width, 1), proposal)])


@pytest.mark.parametrize(
    ("proposal", "rule"),
    [
        ("without_replacement", "recursive"),
        ("without_replacement", "traversal"),
        ("with_replacement", "traversal"),
        ("greedy", "recursive"),
    ],
)
def test_sampled_text_has_the_targets_law(proposal: str, rule: str) -> None:
    found, stats = sample(law_drafter(MergedDrafter, proposal), rule=rule)
    assert stats.accepted_by_origin[0] > 50 and stats.accepted_by_origin[1] > 500
    assert p_of(found) > P


class Dense(ModelDrafter):
    """A row for every node, and rubbish in the rows of leaves, which nobody reads while they are leaves."""

    def propose(self, state: State) -> Proposal:
        tree = super().propose(state)
        assert tree.draft_logits is not None
        logits = torch.full((*tree.tokens.shape, 5), float("nan"))
        logits[:, 0] = tree.draft_logits
        return Proposal(tree.tokens, tree.parents, tree.depth, logits)


def test_chosen_children_of_drawn_leaves_keep_the_law() -> None:
    found, stats = sample(MergedDrafter([Dense(perturbed(few(), 0.7), (3,)), Favourites()]))
    assert stats.accepted_by_depth[1] > 50 and not any(stats.status)
    assert p_of(found) > P


class Sorts(MergedDrafter):
    """Hands the drawn siblings over the most probable first, as a merge by score would."""

    def propose(self, state: State) -> Proposal:
        tree = super().propose(state)
        assert tree.draft_logits is not None and tree.draft_rows is not None
        masses = tree.draft_logits[tree.draft_rows[:, 0].long()].gather(1, tree.tokens[:, 1:4])
        tree.tokens[:, 1:4] = tree.tokens[:, 1:4].gather(1, masses.argsort(1, descending=True))
        return tree


class Mixes(MergedDrafter):
    """Says of the chosen siblings that they were drawn."""

    def propose(self, state: State) -> Proposal:
        tree = super().propose(state)
        tree.point_nodes = None
        return tree


@pytest.mark.parametrize("kind", [Sorts, Mixes])
def test_a_law_test_sees_a_bias(kind: type[MergedDrafter]) -> None:
    options = {"width": 3} if kind is Sorts else {}
    found, _ = sample(law_drafter(kind, "without_replacement", **options))
    assert p_of(found) < P


def test_stopping_goes_along() -> None:
    model = ModelDrafter(perturbed(few(), 0.7), (2, 2), stopping=ConfidenceStop(0.4))
    found, stats = sample(MergedDrafter([model, NgramDrafter()]))
    assert stats.accepted_by_origin[1] > 20
    assert p_of(found) > P


def test_mistakes_are_named(draft: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"two or more objects with propose, got NgramDrafter$"):
        MergedDrafter([NgramDrafter()])
    with pytest.raises(ValueError, match=r"with propose, got NgramDrafter, LlamaForCausalLM$"):
        MergedDrafter([NgramDrafter(), draft])
    with pytest.raises(ValueError, match="each drafter once"):
        MergedDrafter(2 * [NgramDrafter()])
    with pytest.raises(ValueError, match="at most one"):
        MergedDrafter([ModelDrafter(draft), NgramDrafter(), ModelDrafter(draft, proposal="greedy")])


def test_all_end_whatever_becomes_of_one(llama: PreTrainedModel) -> None:
    class Fails(Given):
        def end(self) -> None:
            super().end()
            raise OSError("gone")

    one, two = Given(*CHOSEN), Fails(*CHOSEN)
    drafter = MergedDrafter([one, two, NgramDrafter()])
    with pytest.raises(OSError, match="gone"):
        mcsd.generate(llama, drafter, torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert one.calls == two.calls == ["begin", "end"] and all(each.alone for each in drafter.drafters)


def test_two_drafters_of_one_compiled_model() -> None:
    model = tiny(num_hidden_layers=1)
    wrapped: Any = torch.compile(perturbed(model), backend="eager")
    merged = MergedDrafter([ModelDrafter(wrapped, (2,), "point"), ModelDrafter(wrapped, (3,), "point")])
    ids, mask = pad([prompt(9, 1)])
    torch.compiler.reset()
    try:
        found = mcsd.generate(model, merged, ids, mask, max_new_tokens=3, temperature=0.0)
    finally:
        torch.compiler.reset()
    assert torch.equal(found.sequences, greedy(model, ids, mask, 3))
    assert wrapped._orig_mod._compiled_call_impl is None
