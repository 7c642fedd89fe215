"""Choosing the tree: the search against brute force, replay against real runs, adaptive trees, profiles, pictures."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mcsd
from mcsd import ModelDrafter
from mcsd.adaptive import AdaptiveDrafter
from mcsd.drafters.heads import HeadsDrafter
from mcsd.drafters.medusa import MedusaHeads
from mcsd.plots import plot_file
from mcsd.profile import Ladder, Profile
from mcsd.trees import check_parents, parents_of
from mcsd.tune import HAND_MADE, branching_of, measure, tune
from mcsd.tune.measure import Contender, record_labels
from mcsd.tune.search import (
    Costs,
    TreeSearch,
    acceptance_table,
    depths_of,
    level_widths,
    nested_order,
    renumbered,
    replay,
    tree_values,
)
from mcsd_kernels import SamplingParams
from tests.cases import PROPOSALS
from tests.small_law import START, P, few, p_of, sample
from tests.tiny import VOCAB, perturbed, prompt, tiny

IRREGULAR = (-1, 0, 0, 0, 1, 1, 2, 4, 4)


def some_acceptance(seed: int, depth: int, widths: int, same: bool) -> Any:
    """`same`: a rank's acceptance does not depend on how many siblings there are."""
    random = np.random.default_rng(seed)
    table = np.zeros((depth, widths, widths))
    for level in range(depth):
        ranks = random.dirichlet(np.ones(widths + 1))[:widths]
        for count in range(1, widths + 1):
            some = ranks if same else random.dirichlet(np.ones(widths + 1))
            table[level, count - 1, :count] = some[:count]
    return table


def brute_force(acceptance: Any, size: int, inner: int) -> float:
    """The best tree by trying every number of children and every way to share out the nodes."""
    depth, widths = acceptance.shape[:2]

    @lru_cache(None)
    def tree(level: int, nodes: int, left: int) -> float:
        if nodes == 1:
            return 1.0 if left == 0 else -np.inf
        if level == depth or left < 1:
            return -np.inf
        return max(1 + forest(level, k, 0, nodes - 1, left - 1) for k in range(1, min(widths, nodes - 1) + 1))

    @lru_cache(None)
    def forest(level: int, count: int, rank: int, nodes: int, left: int) -> float:
        if rank == count:
            return 0.0 if nodes == left == 0 else -np.inf
        best = -np.inf
        for own, below in itertools.product(range(1, nodes + 1), range(left + 1)):
            value = tree(level + 1, own, below)
            if value > -np.inf:
                rest = forest(level, count, rank + 1, nodes - own, left - below)
                best = max(best, acceptance[level, count - 1, rank] * value + rest)
        return best

    return tree(0, size, inner)


@pytest.mark.parametrize("same", [True, False])
def test_the_search_finds_the_best_tree(same: bool) -> None:
    acceptance = some_acceptance(5, 3, 3, same)
    search, free = TreeSearch(acceptance, 8, 7), TreeSearch(acceptance, 8)
    for size in range(2, 9):
        wanted = [brute_force(acceptance, size, inner) for inner in range(8)]
        assert search.values()[size].tolist() == pytest.approx(wanted)
        assert free.best(size)[0] == pytest.approx(max(wanted))
        for inner, value in enumerate(wanted):
            if value > -np.inf:
                parents = check_parents(search.best(size, inner)[1])
                assert (len(parents), len(set(parents[1:]))) == (size, inner)
                assert sum(tree_values(acceptance, parents)) == pytest.approx(value)


def test_costs_between_and_beyond_the_measured_sizes() -> None:
    costs = Costs({2: 1.0, 4: 2.0, 8: 2.0}, {1: 0.1, 3: 0.3}, {2: 0.5, 8: 0.5})
    assert level_widths(IRREGULAR) == [1, 2, 1]
    assert costs.step((-1, 0, 0)) == pytest.approx(1.5 + 0.1 + 0.5)
    assert costs.step(IRREGULAR) == pytest.approx(2.0 + 0.1 + 0.2 + 0.1 + 0.5)
    assert costs.line() == pytest.approx((0.0, 0.1))
    rising = Costs({2: 1.0, 4: 2.0}, {1: 0.1}, {2: 0.5})
    assert rising.step((-1, *[0] * 7)) == pytest.approx(4.0 + 0.1 + 0.5)  # on with the last slope


def test_replay_by_hand() -> None:
    labels = np.array([[-1, 0, -1, -1, -1, 0], [1, 0, 1, -1, 1, 0]], np.int8)  # accepted with one sibling, with two
    # steps of 1, 2, 1, 1 tokens, and one whose bonus token was not recorded, which does not count
    assert replay([labels], (-1, 0)) == (5, 4)
    # rank 1, its child, the bonus token; nothing; then an unfinished one
    assert replay([labels], (-1, 0, 0, 1, 2)) == (4, 2)


def test_all_texts_are_recorded() -> None:
    target = tiny()
    prompts = [torch.tensor([prompt(6, seed)]) for seed in range(5)]
    options: dict[str, Any] = {"width": 2, "tokens": 8, "sampling": SamplingParams()}
    labels = record_labels(target, perturbed(target, 0.5), prompts, batch=2, **options)
    assert {name: len(texts) for name, texts in labels.items()} == dict.fromkeys(PROPOSALS, 5)


def test_greedy_labels_have_the_rules_own_probabilities() -> None:
    """Behind one most probable token the drawn child is accepted with min(1, q'(y) / p(y)), q' being q without it."""
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).expand(4000, 3)
    q = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).expand(4000, 3)
    coins = (torch.arange(4000) + 0.5) / 4000
    for token, accepted in ((1, 1.0), (2, 0.25 / 0.3)):  # q' = 0.75, 0.25
        ranks = measure._greedy(p, q, torch.full((4000,), token), 2, coins.double())[:, 1]
        assert float((ranks == 1).double().mean()) == pytest.approx(accepted, abs=1e-3)
    assert (measure._greedy(p, q, torch.zeros(4000).long(), 2, coins.double())[:, 1] == 0).all()


def test_a_draft_level_costs_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a level are those of a tree that has it less those of the root's, which every tree has."""

    def timed(target: Any, drafter: Any, context: Any, *, callback: Any, **_: Any) -> Any:
        nodes, stats = len(drafter.parents), mcsd.Stats()
        for _ in range(measure.WARM_UP + 4):
            deep = max(depths_of(drafter.parents)) > 1
            for name, spent in (("draft", 2.0 + deep * 0.5 * nodes), ("score", 1.0), ("verify", 0.25)):
                stats.seconds[name] = stats.seconds.get(name, 0.0) + spent
            callback(stats)
        return mcsd.Generation(torch.zeros(1, 1), stats)

    monkeypatch.setattr(measure, "generate", timed)
    target = tiny()
    costs = measure.measure_costs(
        target, perturbed(target), torch.tensor([prompt(6, 0)]), nodes=5, sampling=SamplingParams()
    )
    assert costs.draft == pytest.approx({1: 2.0, 2: 0.5 * 5})
    assert set(costs.target.values()) == {1.0} and set(costs.rest.values()) == {0.25}


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_replay_predicts_what_generation_does(proposal: str) -> None:
    """Labels of one recording against real trees of a chosen shape: the same tokens per call within their noise."""
    target = tiny()
    draft = perturbed(target, 0.5)
    prompts = [torch.tensor([prompt(6, seed)]) for seed in range(8)]
    labels = record_labels(target, draft, prompts, width=3, tokens=120, sampling=SamplingParams(), seed=4)
    tokens, calls = replay(labels[proposal], IRREGULAR)
    drafter = ModelDrafter(draft, parents=IRREGULAR, proposal=proposal)
    stats = mcsd.generate(target, drafter, torch.cat(prompts), max_new_tokens=120, seed=900).stats
    # about 750 calls a side whose tokens vary by 0.7: a standard error of 0.035
    assert tokens / calls == pytest.approx(stats.tokens_per_call, abs=0.14)


def test_acceptance_leans_on_all_depths_where_few_were_seen() -> None:
    labels = [np.array([[0, -1] * 200], np.int8)]
    table = acceptance_table(labels, 3)
    assert table[0, 0, 0] > 0.95 and table[1, 0, 0] < 0.05
    assert table[2, 0, 0] == pytest.approx(0.5)  # never reached: the mean of all


def test_branching_of_trees() -> None:
    assert branching_of(parents_of((3, 2, 1))) == [3, 2, 1]
    assert branching_of(IRREGULAR) is None


def test_nested_trees_keep_parents_and_draw_order() -> None:
    values = [1.0, 0.2, 0.5, 0.1, 0.1, 0.05, 0.3, 0.09, 0.01]  # a later sibling of more value waits for its elder
    order = nested_order(IRREGULAR, values)
    assert order[:4] == [0, 1, 2, 6]
    parents = check_parents(renumbered(IRREGULAR, order))
    for size in range(2, len(parents) + 1):
        kept = set(order[:size])
        for node in kept - {0}:
            elder = [n for n in range(1, node) if IRREGULAR[n] == IRREGULAR[node]]
            assert IRREGULAR[node] in kept and set(elder) <= kept


def test_the_measured_speed_and_its_error() -> None:
    contender = Contender((-1, 0), runs=[(10, 5, 1.0), (10, 8, 1.0), (10, 6, 2.0)])
    assert contender.tokens_per_call == pytest.approx(30 / 19)
    assert contender.tokens_per_second == pytest.approx(7.5)
    assert 0 < contender.error < 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tune_end_to_end(temperature: float, tmp_path: Path) -> None:
    target = tiny()
    draft = perturbed(target, 0.3)
    prompts = [torch.tensor([prompt(6, seed)]) for seed in range(2)]
    said: list[str] = []
    profile = tune(
        target,
        draft,
        prompts,
        nodes=5,
        depth=2,
        width=2,
        tokens=8,
        hand_made=((2, 1),),
        temperature=temperature,
        report=lambda what, done, of: said.append(what),
    )
    assert profile.tokens_per_second == max(row["tokens_per_second"] for row in profile.shapes)
    assert any(row["hand_made"] and row["branching"] == [2, 1] for row in profile.shapes)
    assert [row["nodes"] for row in profile.curve] == [2, 3, 4, 5]
    assert set(profile.acceptance) == ({"point"} if temperature == 0 else set(PROPOSALS))
    assert {"recording what is accepted", "timing forwards", "searching trees"} <= set(said)
    path = tmp_path / "profile.json"
    profile.save(path)
    assert json.loads(path.read_text())["mcsd_profile"] == 1
    assert Profile.load(path).ladder == profile.ladder
    ids = prompts[0]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "rule": profile.rule}
    drafter = ModelDrafter(draft, parents=profile.parents, proposal=profile.proposal)
    by_hand = mcsd.generate(target, drafter, ids, **options)
    assert torch.equal(
        mcsd.generate(target, draft, ids, profile=path, **options | {"rule": None}).sequences, by_hand.sequences
    )


def test_tune_names_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "generate", None)  # before any work
    target = tiny()
    ids = [torch.tensor([prompt(4)])]
    for options, message in (
        ({"nodes": 1}, r"nodes: expected a whole number in \[2, 512\]"),
        ({"nodes": 513}, r"nodes: expected a whole number in \[2, 512\]"),
        ({"proposals": ["greedy"], "temperature": 0.0}, "proposals: expected some of point"),
        ({"draft": "ngram"}, "draft: expected a model, whose trees can be chosen"),
        ({"prompts": []}, "prompts: expected at least one"),
        ({"prompts": ids[0]}, r"prompts\[0\]: expected shape \[1, any\], got \[4\]"),
        ({"prompts": [*ids, ids[0].float()]}, r"prompts\[1\]: expected dtype int32 or int64, got float32"),
        ({"prompts": [ids[0][:, :0]]}, r"prompts\[0\]: expected at least one token"),
        ({"prompts": [torch.tensor([prompt(250)])]}, r"prompts\[0\]: expected at most 192 tokens, .* got 250"),
        ({"measured_prompts": 0}, "measured_prompts: expected a whole number >= 1, got 0"),
        ({"width": VOCAB + 1}, rf"width: expected a whole number in \[1, {VOCAB}\], got {VOCAB + 1}"),
        ({"target": tiny(vocab_size=200), "width": 130}, r"width: expected a whole number in \[1, 128\], got 130"),
        ({"target": tiny(max_position_embeddings=18), "tokens": 8}, "target: expected at least 19 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(**{"target": target, "draft": target, "prompts": ids, **options})


def test_tune_fits_a_target_of_few_positions_and_the_widest_nodes() -> None:
    target = tiny("gpt2", n_positions=32, vocab_size=130)
    profile = tune(target, target, [torch.tensor([prompt(6)])], nodes=3, depth=1, width=128, tokens=8, hand_made=[])
    assert len(profile.acceptance["point"][0]) == 128


@pytest.mark.parametrize("heads", [1, 3])
def test_tune_keeps_to_the_levels_of_a_drafter(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny()
    draft = HeadsDrafter(MedusaHeads.of(target, heads), (1,), "point")
    # acceptance that no tree is too deep for
    monkeypatch.setattr("mcsd.tune.acceptance_table", lambda texts, depth: np.full((depth, 2, 2), 0.9))
    options: dict[str, Any] = {"nodes": 8, "width": 2, "tokens": 8}
    ids = [torch.tensor([prompt(6)])]
    profile = tune(target, draft, ids, **options)
    assert max(row["depth"] for row in profile.curve) == heads
    by_hand = [tuple(row["branching"]) for row in profile.shapes if row["hand_made"]]
    assert set(by_hand) == {branching for branching in HAND_MADE if len(branching) <= heads}
    monkeypatch.setattr(measure, "generate", None)
    with pytest.raises(ValueError, match=r"hand_made: expected trees that the drafter allows, got \(1, 1, 1, 1\)"):
        tune(target, draft, ids, hand_made=[(1,), (1, 1, 1, 1)], **options)


# ---- profiles


def test_a_profile_needs_a_draft_model() -> None:
    profile = Profile((-1, 0, 0), "without_replacement")
    with pytest.raises(ValueError, match="profile: expected a draft model"):
        mcsd.generate(tiny(), "ngram", torch.tensor([[3]]), profile=profile)


def test_a_profile_of_sampling_takes_the_top_children_at_temperature_0() -> None:
    assert Profile((-1, 0), "greedy").proposal_at(0) == "point"
    assert Profile((-1, 0), "greedy").proposal_at(0.7) == "greedy"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("no json", "is something else", id="no-json"),
        pytest.param("[1]", "is something else", id="a-list"),
        pytest.param('{"mcsd_profile": 99}', "expected format 1", id="another-format"),
        pytest.param('{"mcsd_profile": 1, "parents": [-1, 1], "proposal": "point"}', "parents: expected -1", id="tree"),
        pytest.param(
            '{"mcsd_profile": 1, "parents": [-1, 0], "proposal": "best"}', "proposal: expected one", id="name"
        ),
        pytest.param('{"mcsd_profile": 1, "parents": [-1, 0], "sibling": 1}', "unknown entries sibling", id="unknown"),
    ],
)
def test_a_bad_profile_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Profile.load(path)
    with pytest.raises(ValueError, match="cannot read"):
        Profile.load(tmp_path / "nowhere.json")


# ---- adaptive trees

LADDER = Ladder(
    parents=(-1, 0, 1, 0, 1, 3, 2),
    values=(1.0, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1),
    sizes=(2, 4, 7),
    seconds=(1.0, 1.2, 1.5),
)


def chosen(drafter: AdaptiveDrafter, accepted: int, steps: int = 20) -> int:
    """The size chosen after as many steps that accepted as much as they could, up to `accepted`."""
    drafter._accepted, drafter._expected, drafter._rungs = [0.0], [0.0], [drafter.ladder.sizes.index(7)]
    for _ in range(steps):
        depth = len(drafter._by_depth[drafter._rungs[0]]) - 1
        drafter._learn(0, min(accepted, depth))
        drafter._rungs = [drafter._best(0)]
    return drafter.ladder.sizes[drafter._rungs[0]]


def test_the_tree_grows_with_acceptance_and_shrinks_without() -> None:
    drafter = AdaptiveDrafter(few(), LADDER)
    assert chosen(drafter, 0) == 2 < chosen(drafter, 2) == 7


def test_what_was_long_ago_counts_for_little() -> None:
    """A hundred good steps and ten bad ones: by the profile much, by what was seen lately little."""
    factors = []
    for decay in (0.8, 1.0):
        drafter = AdaptiveDrafter(few(), LADDER, decay=decay)
        chosen(drafter, 2, steps=100)
        for _ in range(10):
            drafter._learn(0, 0)
        factors.append(drafter.factor(0))
    assert factors[0] < 1 < factors[1]


def test_no_depth_is_likelier_than_the_one_above() -> None:
    """However much more than the profile says was accepted, a chain of three is worth at most its depth."""
    chain = Ladder((-1, 0, 1, 2), (1.0, 0.5, 0.3, 0.2), (2, 3, 4), (1.0, 1.6, 2.2))
    drafter = AdaptiveDrafter(few(), chain)
    drafter._accepted, drafter._expected = [1e6], [1.0]
    # 2, 3 and 4 tokens a step at best: 2, 1.88 and 1.82 a second
    assert drafter.ladder.sizes[drafter._best(0)] == 2


@pytest.mark.parametrize("proposal", ["without_replacement", "with_replacement", "point"])
def test_adaptive_trees_keep_the_law(proposal: str) -> None:
    """A quick temper, so that sizes differ from step to step and from request to request."""
    drafter = AdaptiveDrafter(few(4), replace(LADDER, proposal=proposal), prior=0.2, decay=0.5)
    sizes = set()
    best = drafter._best

    def noted(request: int) -> int:
        sizes.add(best(request))
        return best(request)

    drafter._best = noted  # type: ignore[method-assign]
    found, _ = sample(drafter)
    assert len(sizes) > 1
    assert p_of(found) > P


def test_an_adaptive_text_does_not_depend_on_its_neighbours() -> None:
    drafter = AdaptiveDrafter(perturbed(tiny(), 0.4), LADDER, prior=0.5, decay=0.7)
    ids = torch.tensor([prompt(6, seed) for seed in range(4)])
    seeds = [5, 6, 7, 8]
    together = mcsd.generate(tiny(), drafter, ids, max_new_tokens=30, seed=seeds).sequences
    for row, (text, seed) in enumerate(zip(ids, seeds, strict=True)):
        alone = mcsd.generate(tiny(), drafter, text[None], max_new_tokens=30, seed=[seed]).sequences
        assert torch.equal(alone[0], together[row])


def test_adaptive_at_temperature_0_is_greedy_decoding() -> None:
    target = tiny()
    ids = torch.tensor([prompt(6, 1)])
    drafter = AdaptiveDrafter(perturbed(target, 0.3), LADDER, proposal="point", prior=0.5)
    plain = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False, pad_token_id=0
    )
    assert torch.equal(mcsd.generate(target, drafter, ids, max_new_tokens=25, temperature=0.0).sequences, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (2, 9)}, "sizes: expected ascending numbers"),
        ({"values": (1.0,)}, "values: expected one for each of 7"),
        ({"seconds": (1.0, 0.0, 1.0)}, "seconds: expected a time > 0"),
        ({"proposal": "greedy"}, "proposal: expected one of"),
    ],
)
def test_a_bad_ladder_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LADDER, **options)


def test_adaptive_names_mistakes() -> None:
    for arguments, message in (
        ({"prior": 0}, "prior: expected"),
        ({"decay": 1.5}, "decay: expected"),
        ({"proposal": "greedy"}, "proposal: expected another"),
        ({"profile": Profile((-1, 0), "point")}, "expected one with a ladder"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveDrafter(few(), **{"profile": LADDER, **arguments})


# ---- trees of any shape


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_irregular_trees_keep_the_law(proposal: str) -> None:
    """Siblings of different numbers in one level, the node with most of them not the first."""
    drafter = ModelDrafter(few(4), parents=(-1, 0, 0, 1, 2, 2, 2, 5), proposal=proposal)
    found, stats = sample(drafter)
    assert len(START) and stats.accepted_by_depth[1] > 0
    assert p_of(found) > P


# ---- pictures


def some_profile() -> Profile:
    row = {"nodes": 3, "depth": 1, "proposal": "point", "rule": "recursive", "tokens_per_second": 20.0, "error": 1.0}
    predicted = {"predicted_tokens_per_call": 1.4, "predicted_tokens_per_second": 21.0, "tokens_per_call": 1.4}
    shape = {**row, **predicted, "parents": [-1, 0, 0], "branching": [2], "hand_made": True}
    return Profile(
        (-1, 0, 0),
        "point",
        "recursive",
        {"target": "a/b"},
        1.4,
        20.0,
        15.0,
        curve=[{**row, **predicted}],
        shapes=[shape],
    )


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_profile_and_a_recording_can_be_drawn(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, picture = tmp_path / "source", tmp_path / f"picture.{ending}"
    some_profile().save(source)
    assert plot_file(source, picture).stat().st_size > 5000
    first = picture.read_bytes()
    visit = {"depth": 0, "candidates": 2, "accepted": True, "expected": 0.5}
    visit |= {"overlap": 0.4, "optimum_with": 0.6, "optimum_without": 0.7}
    row = {"mcsd_diagnostics": 1, "step": 0, "request": 0, "tokens": 2, "tree_depth": 1, "visits": [visit]}
    source.write_text(json.dumps(row) + "\n")
    assert plot_file(source, picture).read_bytes() != first


@pytest.mark.parametrize("damage", [{"settings": [1]}, {"curve": None}, {"curve": [{}]}, {"shapes": [{}]}])
def test_a_damaged_profile_is_not_drawn(damage: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = tmp_path / "profile.json"
    some_profile().save(source)
    source.write_text(json.dumps({**json.loads(source.read_text()), **damage}))
    with pytest.raises(ValueError, match=r"profile\.json"):
        plot_file(source, tmp_path / "picture.svg")


def test_pictures_name_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "profile.json"
    some_profile().save(source)
    with pytest.raises(ValueError, match="expected a name that ends in"):
        plot_file(source, tmp_path / "picture.bmp")
    with pytest.raises(ValueError, match="picture: expected a file in a folder that exists"):
        plot_file(source, tmp_path / "nowhere" / "picture.svg")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install 'mcsd\\[plots\\]'"):
        plot_file(source, tmp_path / "picture.svg")
