"""The oracle is proved here: every draw and every decision of every rule is enumerated, and the laws compared exactly."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cases
from mcsd_kernels import reference
from mcsd_kernels.reference import Candidate, Coins, Outcome, Problem, candidate_law, row_law
from mcsd_kernels.sampling import SamplingParams
from mcsd_kernels.types import DRAW_BLOCK, PLACEHOLDER, Status

Law = NDArray[np.float64]
Context = tuple[int, ...]
Rule = Callable[[Problem, Coins], Outcome]
RULES: dict[str, Rule] = {"recursive": reference.recursive, "traversal": reference.traversal}

EXACT = 1e-12
BIASED = 1e-3


# How every branch is visited: a run takes its choices from a prefix, and from there on always the first possible one;
# the others it leaves behind are the prefixes of runs to come.


class Choices:
    """The choices of one run, the probability of having made them, and the prefixes not taken."""

    def __init__(self, prefix: tuple[int, ...]) -> None:
        self.prefix = prefix
        self.made: list[int] = []
        self.probability = 1.0
        self.left: list[tuple[int, ...]] = []

    def choose(self, probabilities: list[float]) -> int:
        if len(self.made) < len(self.prefix):
            choice = self.prefix[len(self.made)]
        else:
            choice, *others = [i for i, probability in enumerate(probabilities) if probability > 0]
            self.left += [(*self.made, other) for other in others]
        self.made.append(choice)
        self.probability *= probabilities[choice]
        return choice


def all_runs(run: Callable[[Choices], Any]) -> Iterator[tuple[Any, float]]:
    prefixes: list[tuple[int, ...]] = [()]
    while prefixes:
        choices = Choices(prefixes.pop())
        yield run(choices), choices.probability
        prefixes += choices.left


class EveryBranch:
    """Coins that take every side in turn; the final draw is kept as a law, since nothing comes after it."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.drawn: Law | None = None

    def accept(self, node: int, scale: float, mass: float) -> bool:
        probability = 0.0 if mass <= 0 else 1.0 if mass >= scale else mass / scale
        return self.choices.choose([probability, 1 - probability]) == 0

    def draw(self, weights: Law) -> int:
        self.drawn = weights / weights.sum()
        return PLACEHOLDER


@dataclass(frozen=True)
class Model:
    """A target and a draft whose laws depend on the tokens since the root."""

    target: Callable[[Context], Law]
    draft: Callable[[Context], Law]


@dataclass
class DraftedTree:
    """A tree whose candidates are drawn when a rule first asks for them: those it never sees cannot change its law."""

    model: Model
    parents: list[int]
    proposal: str
    choices: Choices
    virtual: tuple[int, ...] = ()
    start: Context = ()
    arrange: Callable[[Law, Context], Context] = lambda q, candidates: candidates
    drawn_as: str | None = None
    tokens: dict[int, int] = field(default_factory=dict)

    def context(self, node: int) -> Context:
        return self.start if node == 0 else (*self.context(self.parents[node]), self.tokens[node])

    def children(self, node: int) -> list[Candidate]:
        nodes = [i for i, parent in enumerate(self.parents) if parent == node and i > 0]
        if not nodes:
            return []
        if nodes[0] not in self.tokens:
            q = self.model.draft(self.context(node))
            tuples = candidate_law(q, len(nodes), self.drawn_as or self.proposal)
            chosen = tuples[self.choices.choose([probability for _, probability in tuples])][0]
            self.tokens.update(zip(nodes, self.arrange(q, chosen), strict=True))
        return [Candidate(i, self.tokens[i], i in self.virtual) for i in nodes]

    def problem(self) -> Problem:
        return Problem(
            target=lambda node: self.model.target(self.context(node)),
            draft=lambda node: self.model.draft(self.context(node)),
            children=self.children,
            proposal=self.proposal,
        )


def emitted_law(model: Model, parents: list[int], proposal: str, rule: Rule, **options: Any) -> dict[Context, float]:
    """The joint law of the tokens that one call emits, however many they are."""

    def run(choices: Choices) -> tuple[Context, int, Law | None]:
        tree = DraftedTree(model, parents, proposal, choices, **options)
        coins = EveryBranch(choices)
        path, last = rule(tree.problem(), coins)
        return tuple(tree.tokens[i] for i in path[1:]), last, coins.drawn

    law: dict[Context, float] = defaultdict(float)
    for (accepted, last, drawn), probability in all_runs(run):
        if drawn is None:
            law[(*accepted, last)] += probability
        else:
            for v in np.flatnonzero(drawn):
                law[(*accepted, int(v))] += probability * float(drawn[v])
    return law


def error(model: Model, emitted: dict[Context, float], count: int) -> float:
    """The largest difference from the target's joint law of `count` tokens, the target continuing what was emitted."""
    actual, expected = dict(emitted), {(): 1.0}
    for n in range(count):
        expected = _continued(model, expected, n)
        if n > 0:
            actual = _continued(model, actual, n)
    return max(abs(actual.get(tokens, 0.0) - expected.get(tokens, 0.0)) for tokens in {*actual, *expected})


def _continued(model: Model, law: dict[Context, float], length: int) -> dict[Context, float]:
    longer: dict[Context, float] = defaultdict(float)
    for tokens, probability in law.items():
        if len(tokens) > length:
            longer[tokens] += probability
            continue
        for v, share in enumerate(model.target(tokens)):
            if share > 0:
                longer[(*tokens, v)] += probability * float(share)
    return longer


def mean_length(emitted: dict[Context, float]) -> float:
    return sum(len(tokens) * probability for tokens, probability in emitted.items())


def depth(parents: list[int]) -> int:
    def of(node: int) -> int:
        return 0 if parents[node] < 0 else 1 + of(parents[node])

    return max(of(i) for i in range(len(parents)))


def named_model(name: str) -> Model:
    """The pair of laws `cases.LAWS[name]`, their tokens renamed by a permutation that depends on the context."""
    p, q, _ = cases.LAWS[name]

    def order(context: Context) -> NDArray[np.int64]:
        return np.random.default_rng([7, *context]).permutation(len(p)) if context else np.arange(len(p))

    return Model(
        functools.cache(lambda context: np.array(p)[order(context)] / sum(p)),
        functools.cache(lambda context: np.array(q)[order(context)] / sum(q)),
    )


def random_model(
    vocab: int, seed: int, target: dict[str, float] | None = None, draft: dict[str, float] | None = None
) -> Model:
    """Unrelated random logits after every context, through temperature and filters."""

    def logits(side: int, context: Context) -> Law:
        # halves, so that ties at the cut-off occur
        return np.round(np.random.default_rng([seed, side, *context]).normal(size=vocab) * 3) / 2

    return Model(
        functools.cache(lambda context: row_law(logits(0, context), **(target or {}))),
        functools.cache(lambda context: row_law(logits(1, context), **(draft or {}))),
    )


# what sampling does to a model, and why it is here
SAMPLED: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "target-argmax": ({"temperature": 0.0}, {}),
    "draft-argmax-leaves-one-candidate": ({}, {"temperature": 0.0}),
    "both-argmax": ({"temperature": 0.0}, {"temperature": 0.0}),
    "same-filters": ({"temperature": 0.7, "top_k": 3, "top_p": 0.9}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}),
    "draft-top-two-leaves-two-candidates": ({"min_p": 0.1}, {"top_k": 2}),
    "target-narrower-than-draft": ({"temperature": 1.5, "top_p": 0.6}, {}),
}


def prove(model: Model, parents: list[int], proposal: str, virtual: tuple[int, ...] = ()) -> None:
    """Both rules are lossless, and traversal emits at least as many tokens."""
    lengths = {}
    for name, rule in RULES.items():
        emitted = emitted_law(model, parents, proposal, rule, virtual=virtual)
        assert abs(sum(emitted.values()) - 1) <= EXACT, name
        assert error(model, emitted, depth(parents) + 1) <= EXACT, name
        lengths[name] = mean_length(emitted)
    assert lengths["traversal"] >= lengths["recursive"] - EXACT


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


# Negative controls: what an enumeration must be able to see.


def test_control_candidates_sorted_by_q_are_biased() -> None:
    model = random_model(5, 1)

    def by_q(q: Law, candidates: Context) -> Context:
        return tuple(sorted(candidates, key=lambda x: -q[x]))

    for rule in RULES.values():
        emitted = emitted_law(model, [-1, 0, 0], "without_replacement", rule, arrange=by_q)
        assert error(model, emitted, 2) > BIASED


def test_control_a_filter_on_sampled_candidates_is_biased() -> None:
    model = random_model(5, 1)

    def only_likely(q: Law, candidates: Context) -> Context:
        return tuple(x if q[x] > 0.2 else -1 for x in candidates)

    for rule in RULES.values():
        emitted = emitted_law(model, [-1, 0, 0], "with_replacement", rule, arrange=only_likely)
        assert error(model, emitted, 2) > BIASED


def test_control_a_stale_residual_is_biased() -> None:
    def stale(problem: Problem, coins: Coins) -> Outcome:
        p, q = problem.target(0), problem.draft(0)
        for candidate in problem.candidates(0):
            if coins.accept(candidate.node, q[candidate.token], p[candidate.token]):
                return [0, candidate.node], coins.draw(problem.target(candidate.node))
        return [0], coins.draw(np.maximum(p - q, 0.0))

    model = random_model(5, 1)
    assert error(model, emitted_law(model, [-1, 0], "without_replacement", stale), 2) <= EXACT
    for proposal in ("with_replacement", "without_replacement"):
        assert error(model, emitted_law(model, [-1, 0, 0], proposal, stale), 2) > BIASED


def test_control_top_k_children_tested_as_if_sampled_are_biased() -> None:
    model = random_model(5, 1)
    for rule in RULES.values():
        emitted = emitted_law(model, [-1, 0, 0], "without_replacement", rule, drawn_as="point")
        assert error(model, emitted, 2) > BIASED


class CoinsByPosition(EveryBranch):
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
    """Chi-square of 1500 calls against the target, p > 1e-3 at a fixed seed: coins and rows meet the right nodes."""
    rng = np.random.default_rng(5)
    trials, parents = 1500, [-1, 0, 0, 1, 2]
    model = random_model(3, 8)
    tokens = np.zeros((trials, 5), dtype=np.int64)
    p, q = np.zeros((trials, 5, 3)), np.zeros((trials, 5, 3))
    for t in range(trials):
        for i in range(5):
            context = tuple(int(tokens[t, j]) for j in reversed(reference._lineage(parents, i)) if j > 0)
            p[t, i], q[t, i] = model.target(context), model.draft(context)
            nodes = [j for j, parent in enumerate(parents) if parent == i and j > 0]
            if nodes:
                tokens[t, nodes] = cases.draw_children(rng, q[t, i], len(nodes), proposal)
    # the caller's point candidates may depend on anything but the coins, random_case's are drawn at random
    got = reference.verify(
        torch.from_numpy(cases.logits_of(p)).float(),
        torch.from_numpy(cases.logits_of(q)).float(),
        torch.from_numpy(tokens),
        torch.tensor(parents),
        torch.from_numpy(rng.random((trials, 7)).astype(np.float32)),
        proposal=proposal,
        rule=rule,
    )
    first, second = got.tokens[:, 0].numpy(), got.tokens[:, 1].numpy()
    statistic = 0.0
    for v in range(3):
        expected = trials * model.target(())[v]
        statistic += ((first == v).sum() - expected) ** 2 / expected
        longer = (first == v) & (second >= 0)
        for w in range(3):
            expected = longer.sum() * model.target((v,))[w]
            statistic += ((longer & (second == w)).sum() - expected) ** 2 / expected
    # 2 + 3 * 2 degrees of freedom; how many tokens come is not independent of the second one, so only for the first
    assert math.isfinite(statistic)
    assert sum(((first == v).sum() - trials * model.target(())[v]) ** 2 / (trials * model.target(())[v]) for v in range(3)) < 13.8
