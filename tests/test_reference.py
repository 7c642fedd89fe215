"""The oracle, proved: every draw and every decision of every rule is enumerated, and the laws compared exactly."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import cases
import numpy as np
import pytest
import torch
from laws import (
    Choices,
    Context,
    DraftedTree,
    Law,
    Model,
    Rule,
    Tosses,
    all_runs,
    depth,
    distances,
    enumerate_branches,
    fixed_model,
    random_model,
)

from mcsd_kernels import reference
from mcsd_kernels.reference import Coins, Outcome, Problem, candidate_law, row_law
from mcsd_kernels.sampling import SamplingParams
from mcsd_kernels.types import DRAW_BLOCK, PLACEHOLDER, Status

RULES: dict[str, Rule] = {"recursive": reference.recursive, "traversal": reference.traversal}

EXACT = 1e-12
BIASED = 1e-3


def error(model: Model, law: dict[Context, float], count: int) -> float:
    """The largest difference from the target's joint law of `count` tokens, the target continuing what was emitted."""
    return distances(model, law, count)[0]


def named_model(name: str) -> Model:
    """The pair of laws `cases.LAWS[name]`, their tokens renamed by a permutation that depends on the context."""
    p, q, _ = cases.LAWS[name]
    return fixed_model(p, q)


# what sampling does to a model, and why it is here
SAMPLED: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "target-argmax": ({"temperature": 0.0}, {}),
    "draft-argmax-leaves-one-candidate": ({}, {"temperature": 0.0}),
    "both-argmax": ({"temperature": 0.0}, {"temperature": 0.0}),
    "same-filters": ({"temperature": 0.7, "top_k": 3, "top_p": 0.9}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}),
    "draft-top-two-leaves-two-candidates": ({"min_p": 0.1}, {"top_k": 2}),
    "target-narrower-than-draft": ({"temperature": 1.5, "top_p": 0.6}, {}),
}


def prove(
    model: Model, parents: list[int], proposal: str, virtual: tuple[int, ...] = (), points: tuple[int, ...] = ()
) -> None:
    """Both rules are lossless, and traversal accepts at least as many nodes."""
    accepted = {}
    for name, rule in RULES.items():
        emitted = enumerate_branches(model, parents, proposal, rule, virtual=virtual, points=points)
        assert abs(sum(emitted.law.values()) - 1) <= EXACT, name
        assert error(model, emitted.law, depth(parents) + 1) <= EXACT, name
        if not virtual:
            assert emitted.length == pytest.approx(emitted.accepted + 1, abs=EXACT), name
        accepted[name] = emitted.accepted
    assert accepted["traversal"] >= accepted["recursive"] - EXACT


PROPOSALS = pytest.mark.parametrize("proposal", cases.PROPOSALS)


@PROPOSALS
@pytest.mark.parametrize("law", cases.LAWS)
@pytest.mark.parametrize("tree", ["root-alone", "one-child", "star", "chain"])
def test_lossless_for_named_laws(tree: str, law: str, proposal: str) -> None:
    prove(named_model(law), cases.TREES[tree][0], proposal)


@PROPOSALS
@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("parents", [[-1, 0, 0, 0], [-1, 0, 0, 1, 1]], ids=["star", "two-then-two"])
def test_lossless_after_temperature_and_filters(parents: list[int], sampled: str, proposal: str) -> None:
    target, draft = SAMPLED[sampled]
    prove(random_model(4, 11, target, draft), parents, proposal)


@PROPOSALS
@pytest.mark.parametrize(
    ("vocab", "parents"),
    [
        pytest.param(4, [-1, 0, 0, 1, 1, 2, 2], id="two-by-two"),
        pytest.param(4, [-1, 0, 0, 1, 3], id="uneven-to-depth-three"),
        pytest.param(4, [-1, 0, -1, 0, 1, -1, 3], id="padded"),
        pytest.param(5, [-1, 0, 1, 1, 0], id="depth-first-order"),
        pytest.param(6, [-1, 0, 0, 0], id="star-of-six"),
        pytest.param(6, [-1, 0, 1, 2], id="chain-of-six"),
    ],
)
def test_lossless_for_trees(vocab: int, parents: list[int], proposal: str) -> None:
    # a draft that keeps three tokens keeps the largest tree small enough to enumerate, and lets a candidate be missing
    draft = {"top_k": 3.0} if parents.count(2) else {}
    prove(random_model(vocab, 3, {}, draft), parents, proposal)


@PROPOSALS
@pytest.mark.parametrize(
    ("parents", "virtual"),
    [
        pytest.param([-1, 0], (1,), id="the-only-child"),
        pytest.param([-1, 0, 0, 0], (1, 3), id="first-and-last-sibling"),
        pytest.param([-1, 0, 0, 0], (2,), id="middle-sibling"),
        pytest.param([-1, 0, 0, 1, 1], (2, 3), id="at-two-levels"),
        pytest.param([-1, 0, 1, 2], (3,), id="end-of-a-chain"),
        pytest.param([-1, 0, 0, 1, 1], (1,), id="with-children-that-nobody-reaches"),
    ],
)
def test_lossless_with_virtual_nodes(parents: list[int], virtual: tuple[int, ...], proposal: str) -> None:
    for seed in range(2):
        prove(random_model(4, seed), parents, proposal, virtual)
    prove(named_model("narrow-draft"), parents, proposal, virtual)


@PROPOSALS
@pytest.mark.parametrize(
    ("parents", "points", "virtual"),
    [
        pytest.param([-1, 0, 0], (2,), (), id="one-of-each"),
        pytest.param([-1, 0, 0, 0, 0], (1, 4), (), id="before-and-after-the-drawn-ones"),
        pytest.param([-1, 0, 0], (1, 2), (), id="none-drawn"),
        pytest.param([-1, 0, 0, 2, 2], (2, 4), (), id="at-two-levels"),
        pytest.param([-1, 0, 0, 0, 3], (3,), (1,), id="beside-a-virtual-node"),
        pytest.param([-1, 0, 0, 0], (2, 3), (3,), id="a-virtual-one"),
    ],
)
def test_lossless_with_chosen_siblings_beside_drawn_ones(
    parents: list[int], points: tuple[int, ...], virtual: tuple[int, ...], proposal: str
) -> None:
    for seed in range(2):
        prove(random_model(4, seed), parents, proposal, virtual, points)
    for law in ("equal", "narrow-draft", "disjoint", "confident-draft"):
        prove(named_model(law), parents, proposal, virtual, points)


# Negative controls: what an enumeration must be able to see.


def test_control_a_chosen_sibling_tested_as_if_drawn_is_biased() -> None:
    def as_if_drawn(q: Law, candidates: Context) -> Context:
        return (candidates[0], int(np.argmax(q)))

    model = random_model(5, 1)
    for rule in RULES.values():
        emitted = enumerate_branches(model, [-1, 0, 0], "with_replacement", rule, arrange=as_if_drawn)
        assert error(model, emitted.law, 2) > BIASED


def test_a_weight_of_one_survives_a_residual_of_rounding_size() -> None:
    """Computed as (s + 1) - c, the c of a node entered with weight 1 would leave 1, and the root draw from nothing."""
    prove(random_model(4, 110), [-1, 0, 0, 0], "without_replacement")


def test_control_candidates_sorted_by_q_are_biased() -> None:
    model = random_model(5, 1)

    def by_q(q: Law, candidates: Context) -> Context:
        return tuple(sorted(candidates, key=lambda x: -q[x]))

    for rule in RULES.values():
        emitted = enumerate_branches(model, [-1, 0, 0], "without_replacement", rule, arrange=by_q)
        assert error(model, emitted.law, 2) > BIASED


def test_control_a_filter_on_sampled_candidates_is_biased() -> None:
    model = random_model(5, 1)

    def only_likely(q: Law, candidates: Context) -> Context:
        return tuple(x if q[x] > 0.2 else -1 for x in candidates)

    for rule in RULES.values():
        emitted = enumerate_branches(model, [-1, 0, 0], "with_replacement", rule, arrange=only_likely)
        assert error(model, emitted.law, 2) > BIASED


def test_control_a_stale_residual_is_biased() -> None:
    def stale(problem: Problem, coins: Coins) -> Outcome:
        p, q = problem.target(0), problem.draft(0)
        for candidate in problem.candidates(0):
            if coins.accept(candidate.node, q[candidate.token], p[candidate.token]):
                return [0, candidate.node], coins.draw(problem.target(candidate.node))
        return [0], coins.draw(np.maximum(p - q, 0.0))

    model = random_model(5, 1)
    assert error(model, enumerate_branches(model, [-1, 0], "without_replacement", stale).law, 2) <= EXACT
    for proposal in ("with_replacement", "without_replacement"):
        assert error(model, enumerate_branches(model, [-1, 0, 0], proposal, stale).law, 2) > BIASED


def test_control_top_k_children_tested_as_if_sampled_are_biased() -> None:
    model = random_model(5, 1)
    for rule in RULES.values():
        emitted = enumerate_branches(model, [-1, 0, 0], "without_replacement", rule, drawn_as="point")
        assert error(model, emitted.law, 2) > BIASED


class CoinsByPosition(Tosses):
    """One coin for each position of the text: a call that meets a coin again knows in which interval it lies."""

    def __init__(self, choices: Choices, known: dict[int, tuple[float, float]], first: int) -> None:
        super().__init__(choices)
        self.known = known
        self.first = first

    def accept(self, node: int, scale: float, mass: float) -> bool:
        low, high = self.known.get(self.first + node, (0.0, 1.0))
        threshold = min(max(mass / scale, low), high)
        probability = (threshold - low) / (high - low)
        accepted = self.choices.choose([probability, 1 - probability]) == 0
        self.known[self.first + node] = (low, threshold) if accepted else (threshold, high)
        return accepted


@pytest.mark.parametrize("rule", cases.RULES)
def test_control_coins_keyed_by_position_bias_a_rule_that_looks_past_a_rejection(rule: str) -> None:
    model = random_model(4, 5)

    def run(choices: Choices) -> tuple[Context, Law]:
        text: Context = ()
        known: dict[int, tuple[float, float]] = {}
        for parents in ([-1, 0, 1], [-1, 0]):
            tree = DraftedTree(model, parents, "with_replacement", choices, start=text)
            coins = CoinsByPosition(choices, known, len(text))
            path, _ = RULES[rule](tree.problem(), coins)
            text += tuple(tree.tokens[i] for i in path[1:])
            assert coins.drawn is not None
            if parents == [-1, 0]:
                return text, coins.drawn
            text += (choices.choose(list(coins.drawn)),)
        raise AssertionError

    emitted: dict[Context, float] = defaultdict(float)
    for (text, drawn), probability in all_runs(run):
        for v in np.flatnonzero(drawn):
            emitted[(*text, int(v))] += probability * float(drawn[v])
    assert error(model, emitted, 5) <= EXACT if rule == "recursive" else error(model, emitted, 5) > BIASED


# The entry point: uniforms, indices, statuses.


def call(
    p: list[list[float]],
    q: list[list[float]] | None,
    tokens: list[int],
    parents: list[int],
    uniforms: list[float],
    **options: Any,
) -> tuple[list[int], list[int], int]:
    """`verify` for one request whose rows are given as probabilities: valid path, valid tokens, status."""
    rows = [torch.from_numpy(cases.logits_of(np.array(law)))[None].float() if law else None for law in (p, q)]
    got = reference.verify(
        rows[0], rows[1], torch.tensor([tokens]), torch.tensor(parents), torch.tensor([uniforms]), **options
    )
    length = int(got.length[0])
    assert (got.path[0, length:] == -1).all() and (got.tokens[0, length:] == -1).all()
    return got.path[0, :length].tolist(), got.tokens[0, :length].tolist(), int(got.status[0])


P = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]]
Q = [[0.2, 0.2, 0.6], [0.3, 0.4, 0.3], [0.3, 0.4, 0.3]]
TREE = [-1, 0, 0]


@pytest.mark.parametrize("rule", cases.RULES)
@PROPOSALS
def test_uniforms_give_the_enumerated_law(rule: str, proposal: str) -> None:
    """Chi-square of two tokens over 1500 calls at a fixed seed, p > 1e-3: each coin and each row meets its node."""
    rng = np.random.default_rng(5)
    trials, parents = 1500, [-1, 0, 0, 1, 2]
    model = random_model(3, 8)
    tokens = np.zeros((trials, 5), dtype=np.int64)
    p, q = np.zeros((trials, 5, 3)), np.zeros((trials, 5, 3))
    for t in range(trials):
        contexts: dict[int, Context] = {0: ()}
        for i in range(5):
            if i > 0:
                contexts[i] = (*contexts[parents[i]], int(tokens[t, i]))
            p[t, i], q[t, i] = model.target(contexts[i]), model.draft(contexts[i])
            nodes = [j for j in range(1, 5) if parents[j] == i]
            if nodes:
                tokens[t, nodes] = cases.draw_children(rng, q[t, i], len(nodes), proposal)
    got = reference.verify(
        torch.from_numpy(cases.logits_of(p)).float(),
        torch.from_numpy(cases.logits_of(q)).float(),
        torch.from_numpy(tokens),
        torch.tensor(parents),
        torch.from_numpy(rng.random((trials, 7)).astype(np.float32)),
        proposal=proposal,
        rule=rule,
    )
    assert not got.status.any()
    counts = np.zeros((3, 3))
    for first, second in got.tokens[:, :2].tolist():
        # where the call emitted one token, the target continues
        counts[first, second if second >= 0 else rng.choice(3, p=model.target((first,)))] += 1
    expected = trials * np.array([[model.target(())[v] * model.target((v,))[w] for w in range(3)] for v in range(3)])
    eight_degrees_at_1e_3 = 26.12
    assert ((counts - expected) ** 2 / expected).sum() < eight_degrees_at_1e_3


@pytest.mark.parametrize("rule", cases.RULES)
def test_a_coin_of_zero_takes_no_impossible_token(rule: str) -> None:
    p, q = [[0.0, 0.4, 0.6], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], [[0.8, 0.2, 0.0]] * 3
    path, tokens, status = call(p, q, [9, 0, 1], TREE, [0.0] * 5, rule=rule)
    assert (path, tokens, status) == ([0, 2], [1, 1], 0)


@pytest.mark.parametrize("rule", cases.RULES)
@PROPOSALS
def test_missing_and_bad_tokens_are_passed_over(rule: str, proposal: str) -> None:
    """Neither changes what happens to the others; only an impossible token is reported."""
    parents, uniforms = [-1, 0, 0, 0], [0.0, 0.0, 0.0, 0.45, 0.0, 0.3]
    rows = [P[0], P[1], P[2], P[2]], [Q[0]] * 4
    answers = [call(*rows, [9, 1, odd, 2], parents, uniforms, rule=rule, proposal=proposal) for odd in (-1, 3, -2)]
    assert answers[0][:2] == answers[1][:2] == answers[2][:2]
    assert [status for _, _, status in answers] == [0, Status.BAD_TOKEN, Status.BAD_TOKEN]


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", ["greedy", "point"])
def test_a_repeated_sibling_is_never_accepted(rule: str, proposal: str) -> None:
    """Node 2 repeats node 1, whose coin rejects; its own coin would accept anything."""
    parents, uniforms = [-1, 0, 0, 0], [0.5, 0.99, 0.0, 0.99, 0.5, 0.5]
    got = call([P[0]] * 4, [Q[0]] * 4, [9, 0, 0, 2], parents, uniforms, rule=rule, proposal=proposal)
    assert got == ([0], [1], 0)


def test_a_leaf_draws_the_bonus_token_and_a_node_at_max_depth_is_one() -> None:
    uniforms = [0.0, 0.0, 0.0, 0.5, 0.85]
    assert call(P, Q, [9, 0, 1], [-1, 0, 1], uniforms) == ([0, 1, 2], [0, 1, 1], 0)
    assert call(P, Q, [9, 0, 1], [-1, 0, 1], uniforms, max_depth=1) == ([0, 1], [0, 2], 0)
    assert call(P, Q, [9, 0, 1], [-1, 0, 1], uniforms, max_depth=0) == ([0], [2], 0)


@pytest.mark.parametrize("rule", cases.RULES)
def test_an_accepted_virtual_node_ends_the_tokens_and_is_not_in_the_path(rule: str) -> None:
    p, q = torch.tensor(cases.logits_of(P)).float(), torch.tensor(cases.logits_of(Q)).float()
    got = reference.verify(
        p,
        q,
        torch.tensor([[9, 0, 1]]),
        torch.tensor([-1, 0, 1]),
        torch.zeros(1, 5),
        rule=rule,
        target_rows=torch.tensor([[0, 1, -1]]),
        draft_rows=torch.tensor([[0, 1, 7]]),
    )
    assert got.path.tolist() == [[0, 1, -1]] and got.tokens.tolist() == [[0, 1, -1]] and got.length.tolist() == [2]


def test_a_candidate_that_exhausts_the_residual_is_accepted() -> None:
    """p = q, and a token that q cannot have drawn comes first: its rejection must leave the state as it was."""
    law = [0.6, 0.4, 0.0]
    assert call([law] * 3, [law] * 3, [9, 2, 1], TREE, [0.0, 0.5, 0.9, 0.0, 0.0]) == ([0, 2], [1, 0], 0)


@pytest.mark.parametrize("rule", cases.RULES)
def test_an_unusable_row_stops_the_walk_only_where_it_is_reached(rule: str) -> None:
    accepting, rejecting = [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.999, 0.999, 0.0, 0.0]
    for bad, bit in ((math.nan, Status.NAN_ROW), (math.inf, Status.NAN_ROW), (-math.inf, Status.EMPTY_ROW)):
        target = torch.from_numpy(cases.logits_of(P)).float()
        target[1, 0 if bad != -math.inf else slice(None)] = bad
        for uniforms, status in ((accepting, bit), (rejecting, 0)):
            got = reference.verify(
                target[None],
                torch.from_numpy(cases.logits_of(Q)).float()[None],
                torch.tensor([[9, 2, 1]]),
                torch.tensor(TREE),
                torch.tensor([uniforms]),
                rule=rule,
            )
            # a leaf that its coin refuses is not looked at under either rule
            assert int(got.status[0]) == status
            if status:
                accepted = 1 if rule == "recursive" else 0
                assert int(got.length[0]) == accepted + 1
                assert int(got.tokens[0, accepted]) == PLACEHOLDER


@pytest.mark.parametrize(
    ("change", "bit"),
    [
        pytest.param({"parents": [0, 0, 0]}, Status.BAD_TREE, id="root-with-a-parent"),
        pytest.param({"parents": [-1, 2, 0]}, Status.BAD_TREE, id="parent-after-its-child"),
        pytest.param({"parents": [-1, -1, 1]}, Status.BAD_TREE, id="parent-is-padding"),
        pytest.param({"parents": [-1, -2, 0]}, Status.BAD_TREE, id="parent-below-minus-one"),
        pytest.param({"target_rows": torch.tensor([[-1, 1, 2]])}, Status.BAD_TREE, id="virtual-root"),
        pytest.param({"target_rows": torch.tensor([[0, 1, 3]])}, Status.BAD_TREE, id="row-past-the-end"),
        pytest.param({"draft_rows": torch.tensor([[-1, 1, 2]])}, Status.BAD_TREE, id="draft-row-that-is-read"),
        pytest.param({"draft_rows": torch.tensor([[0, -1, 9]])}, Status(0), id="draft-rows-of-leaves"),
        pytest.param({"uniforms": [0.0, 0.0, 1.0, 0.0, 0.0]}, Status.BAD_UNIFORM, id="coin-of-one"),
        pytest.param({"uniforms": [0.0, 0.0, 0.0, math.nan, 0.0]}, Status.BAD_UNIFORM, id="coin-is-nan"),
        pytest.param({"sampling": SamplingParams(temperature=torch.tensor([-1.0]))}, Status.BAD_SAMPLING, id="cold"),
        pytest.param({"draft_sampling": SamplingParams(top_p=torch.tensor([0.0]))}, Status.BAD_SAMPLING, id="top-p-0"),
    ],
)
def test_what_is_wrong_before_the_walk_accepts_nothing(change: dict[str, Any], bit: Status) -> None:
    options = {"parents": TREE, "uniforms": [0.0] * 5, **change}
    p, q = torch.from_numpy(cases.logits_of(P)).float(), torch.from_numpy(cases.logits_of(Q)).float()
    got = reference.verify(
        p if "target_rows" in options else p[None],
        q if "draft_rows" in options else q[None],
        torch.tensor([[9, 2, 1]]),
        torch.tensor(options.pop("parents")),
        torch.tensor([options.pop("uniforms")]),
        **options,
    )
    assert int(got.status[0]) == bit
    if bit:
        assert got.path.tolist() == [[0, -1, -1]] and got.tokens.tolist() == [[PLACEHOLDER, -1, -1]]


def test_the_margin_tells_a_close_decision_from_a_clear_one() -> None:
    logits = torch.from_numpy(cases.logits_of([[0.5, 0.25, 0.25]] * 2)).double()[None]
    draft = torch.from_numpy(cases.logits_of([[0.25, 0.5, 0.25]] * 2)).double()[None]
    margins = {}
    for coin in (0.5, 0.25):
        for top_p in (1.0, 0.5):
            uniforms = torch.tensor([[0.0, coin, 0.3, 0.3]])
            margins[coin, top_p] = reference.verify(
                logits,
                draft,
                torch.tensor([[9, 1]]),
                torch.tensor([-1, 0]),
                uniforms,
                sampling=SamplingParams(top_p=top_p),
                draft_sampling=SamplingParams(),
                return_margin=True,
            )[1].item()
    assert margins[0.25, 1.0] > 1e-2
    assert margins[0.5, 1.0] < 1e-12, "the coin lies on its threshold"
    assert margins[0.25, 0.5] < 1e-12, "the tokens above the cut-off hold exactly top_p"


def test_random_cases_are_legal_and_reach_deep_nodes() -> None:
    lengths = []
    for seed in range(60):
        case = cases.random_case(np.random.default_rng(seed))
        got = reference.verify(*case.arguments, **case.options)
        assert not got.status.any(), case.note
        lengths += got.length.tolist()
    assert max(lengths) > 3


# Rows and draws.


def test_row_law_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    for _ in range(200):
        vocab = int(rng.integers(2, 40))
        logits = torch.from_numpy(rng.normal(size=vocab) * 3)
        temperature, top_k = float(rng.uniform(0.3, 2.0)), int(rng.integers(0, vocab + 3))
        top_p, min_p = float(rng.choice([1.0, rng.uniform(0.05, 1)])), float(rng.choice([0.0, rng.uniform(0, 1)]))
        scores = transformers.TemperatureLogitsWarper(temperature)(None, logits[None])
        if top_k > 0:
            scores = transformers.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = transformers.TopPLogitsWarper(top_p)(None, scores)
        if min_p > 0:
            scores = transformers.MinPLogitsWarper(min_p)(None, scores)
        expected = torch.softmax(scores[0], -1).numpy()
        np.testing.assert_allclose(row_law(logits, temperature, top_k, top_p, min_p), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        pytest.param({}, [0, 1, 2, 3], id="off"),
        pytest.param({"top_k": 2}, [0, 1, 2], id="top-k-keeps-the-tie"),
        pytest.param({"top_k": 9}, [0, 1, 2, 3], id="top-k-past-the-vocabulary"),
        pytest.param({"top_p": 0.5}, [0, 1, 2], id="top-p-keeps-the-tie"),
        pytest.param({"top_p": 0.4}, [0], id="top-p-reached-exactly"),
        pytest.param({"top_k": 1, "top_p": 0.9}, [0], id="top-p-of-what-top-k-left"),
        pytest.param({"min_p": 0.625}, [0, 1, 2], id="min-p-reached-exactly"),
        pytest.param({"temperature": 0.5, "min_p": 0.625}, [0], id="min-p-after-temperature"),
    ],
)
def test_filters_keep_ties(options: dict[str, Any], kept: list[int]) -> None:
    law = row_law(np.log([0.4, 0.25, 0.25, 0.1, 1e-300]), **options)
    assert [v for v in np.flatnonzero(law) if v < 4] == kept
    assert law.sum() == pytest.approx(1, abs=EXACT)
    cut = reference.row_cutoff(np.log([0.4, 0.25, 0.25, 0.1, 1e-300]), **options)
    assert (np.log([0.4, 0.25, 0.25, 0.1]) >= cut).nonzero()[0].tolist() == kept


def test_temperature_zero_is_the_first_argmax_whatever_the_filters() -> None:
    assert row_law(np.array([1.0, 3.0, 3.0]), 0.0, 2, 0.1, 0.5).tolist() == [0, 1, 0]


@PROPOSALS
def test_candidate_law_sums_to_one_and_fills_up_with_missing_ones(proposal: str) -> None:
    q = np.array([0.5, 0.0, 0.3, 0.2])
    for k in range(1, 6):
        tuples = candidate_law(q, k, proposal)
        assert sum(probability for _, probability in tuples) == pytest.approx(1, abs=EXACT)
        assert all(len(candidates) == k for candidates, _ in tuples)
        if proposal in ("without_replacement", "greedy"):
            present = [[x for x in candidates if x >= 0] for candidates, _ in tuples]
            assert all(len(set(x)) == len(x) == min(k, 3) and q[x].all() for x in present)


def test_block_draw_inverts_the_cumulative_law() -> None:
    weights = np.zeros(2 * DRAW_BLOCK + 5)
    weights[[3, 7, DRAW_BLOCK + 1, 2 * DRAW_BLOCK + 4]] = [1.0, 1.0, 2.0, 4.0]
    below = 1 - 2.0**-24
    expected = {
        (0.0, 0.0): 3,
        (0.2, 0.49): 3,
        (0.2, 0.5): 7,
        (0.25, 0.9): DRAW_BLOCK + 1,
        (0.5, 0.0): 2 * DRAW_BLOCK + 4,
        (below, below): 2 * DRAW_BLOCK + 4,
    }
    assert {u: reference.block_draw(weights, *u) for u in expected} == expected
    rng = np.random.default_rng(0)
    weights = rng.random(7) * (rng.random(7) < 0.6)
    middles = (np.arange(4000) + 0.5) / 4000
    counts = np.bincount([reference.block_draw(weights, 0.3, u) for u in middles], minlength=7)
    assert np.abs(counts / 4000 - weights / weights.sum()).max() < 1e-3


# Uniforms.


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known-answer vectors published with Random123."""
    assert list(reference.philox_4x32_10(counter, key)) == words


def test_uniforms_depend_on_seed_and_step_alone() -> None:
    seeds = torch.tensor([0, -1, 2**40 + 3])
    got = reference.draw_uniforms(seeds, 5, 7)
    assert got.shape == (3, 7) and got.dtype == torch.float32
    assert torch.equal(got[1:2], reference.draw_uniforms(seeds[1:2], 5, 7))
    assert torch.equal(got[:, :3], reference.draw_uniforms(seeds, 5, 3))
    assert not torch.equal(got, reference.draw_uniforms(seeds, 6, 7))
    word = reference.philox_4x32_10((1, 0, 5, 0), (3, 2**8))[2]
    assert got[2, 6].item() == (word >> 8) / 2**24
    assert reference.draw_uniforms(torch.tensor([0]), 0, 1).item() == (0x6627E8D5 >> 8) / 2**24


# Trees in the cache.

BRANCHING = [-1, 0, 0, 1, -1, 3]


def test_ancestor_bits() -> None:
    bits = reference.ancestor_bits(torch.tensor(BRANCHING))
    assert bits.dtype == torch.int32
    assert bits[0, :, 0].tolist() == [0b1, 0b11, 0b101, 0b1011, 0b10000, 0b101011]
    chain = reference.ancestor_bits(torch.arange(-1, 39)[None].expand(2, -1))
    assert chain.shape == (2, 40, 2)
    assert chain[1, 31].tolist() == [-1, 0] and chain[1, 39].tolist() == [-1, 0xFF]


def test_tree_attention_mask_holds_the_prefix_and_the_ancestors() -> None:
    mask = reference.tree_attention_mask(torch.tensor(BRANCHING), torch.tensor([2, 0]), 9)
    assert mask.shape == (2, 1, 6, 9)
    assert mask[0, 0, 5].int().tolist() == [1, 1, 1, 1, 0, 1, 0, 1, 0]
    assert mask[1, 0, 5].int().tolist() == [1, 1, 0, 1, 0, 1, 0, 0, 0]
    assert mask[1, 0, 4].int().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def attention_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"query": (batch, 4, 6, 8), "key": (batch, 2, 14, 8), "value": (batch, 2, 14, 8)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


PREFIXES = torch.tensor([7, 3])


def test_tree_attention_agrees_with_dense_attention() -> None:
    inputs = attention_inputs()
    bits = reference.ancestor_bits(torch.tensor(BRANCHING))
    mask = reference.tree_attention_mask(torch.tensor(BRANCHING), PREFIXES, 14)
    for scale in (None, 0.7):
        expected = torch.nn.functional.scaled_dot_product_attention(
            inputs["query"], inputs["key"], inputs["value"], mask, scale=scale, enable_gqa=True
        )
        got = reference.tree_attention(**inputs, ancestors=bits, prefix_lengths=PREFIXES, scale=scale)
        assert (got - expected).abs().max() <= EXACT


def test_tree_attention_of_one_level_is_that_level_of_the_whole() -> None:
    inputs = attention_inputs()
    bits = reference.ancestor_bits(torch.tensor(BRANCHING)).expand(2, -1, -1)
    whole = reference.tree_attention(**inputs, ancestors=bits, prefix_lengths=PREFIXES, window=4)
    rows = [2, 3, 5]
    part = {**inputs, "query": inputs["query"][:, :, rows]}
    got = reference.tree_attention(**part, ancestors=bits[:, rows], prefix_lengths=PREFIXES, window=4)
    assert torch.equal(got, whole[:, :, rows])


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_tree_attention_window_counts_depth_and_not_slots(window: int) -> None:
    """A path of the tree sees what the same tokens would see as a plain sequence."""
    inputs = attention_inputs()
    bits = reference.ancestor_bits(torch.tensor(BRANCHING))
    got = reference.tree_attention(**inputs, ancestors=bits, prefix_lengths=PREFIXES, window=window)
    for b, prefix in enumerate(PREFIXES.tolist()):
        for node, path in ((5, [0, 1, 3, 5]), (2, [0, 2])):
            slots = [*range(prefix), *(prefix + j for j in path)][-window:]
            for h in range(4):
                k, v = inputs["key"][b, h // 2, slots], inputs["value"][b, h // 2, slots]
                share = torch.softmax(k @ inputs["query"][b, h, node] / math.sqrt(8), 0)
                assert (got[b, h, node] - share @ v).abs().max() <= EXACT


def test_tree_attention_softcap_and_sinks() -> None:
    inputs = attention_inputs()
    bits = reference.ancestor_bits(torch.tensor(BRANCHING))
    sinks = torch.tensor([0.5, -30.0, 2.0, 1.0])
    got = reference.tree_attention(**inputs, ancestors=bits, prefix_lengths=PREFIXES, softcap=1.5, sinks=sinks)
    slots = [*range(3), 3, 4, 6, 8]
    for h in range(4):
        scores = inputs["key"][1, h // 2, slots] @ inputs["query"][1, h, 5] / math.sqrt(8)
        weights = torch.exp(1.5 * torch.tanh(scores / 1.5))
        expected = weights @ inputs["value"][1, h // 2, slots] / (weights.sum() + math.exp(float(sinks[h])))
        assert (got[1, h, 5] - expected).abs().max() <= EXACT


def test_tree_attention_reads_pages() -> None:
    inputs = attention_inputs()
    bits = reference.ancestor_bits(torch.tensor(BRANCHING))
    table = torch.tensor([[6, 1, 4, 0], [2, 7, 3, 5]], dtype=torch.int32)
    paged = {"query": inputs["query"]}
    for name in ("key", "value"):
        pages = torch.full((8, 2, 4, 8), math.nan, dtype=torch.float64)
        for b in range(2):
            for slot in range(14):
                pages[table[b, slot // 4], :, slot % 4] = inputs[name][b, :, slot]
        paged[name] = pages
    dense = reference.tree_attention(**inputs, ancestors=bits, prefix_lengths=PREFIXES)
    assert torch.equal(
        reference.tree_attention(**paged, ancestors=bits, prefix_lengths=PREFIXES, block_table=table), dense
    )


def test_keep_path_moves_the_accepted_slots_and_nothing_else() -> None:
    inputs = attention_inputs()
    before = {name: value.clone() for name, value in inputs.items()}
    path = torch.tensor([[0, 1, 3, 5], [0, 2, -1, -1]], dtype=torch.int32)
    key, value = reference.keep_path(inputs["key"], inputs["value"], PREFIXES, path, torch.tensor([4, 2]))
    for new, old in ((key, before["key"]), (value, before["value"])):
        expected = old.clone()
        expected[0, :, 7:11] = old[0, :, [7, 8, 10, 12]]
        expected[1, :, 3:5] = old[1, :, [3, 5]]
        assert torch.equal(new, expected)
    assert torch.equal(inputs["key"], before["key"]) and torch.equal(inputs["value"], before["value"])


def test_what_is_below_0_is_no_mass() -> None:
    """Rows handed over as probabilities may be none; every request has its answer all the same."""
    rows = torch.tensor([[[-1.0, 0.0, -0.5]] * 3, [[-2.0, 0.5, 0.5]] * 3])
    arguments = rows, None, torch.tensor([[0, 0, 1]] * 2), torch.tensor([-1, 0, 0]), torch.full((2, 5), 0.3)
    found = reference.verify(*arguments, proposal="point", inputs="probabilities")
    assert found.status.tolist() == [Status.EMPTY_ROW, 0]
    assert found.tokens[1].tolist() == [1, 1, -1]
