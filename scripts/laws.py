"""What proofs and evidence are made of: problems, every branch of a rule or random ones, and how far laws are apart.

A run takes its choices from a prefix, and from there on always the first possible one; the others that it leaves behind
are the prefixes of runs to come. So every draw and every decision is visited once, with its probability.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mcsd_kernels.reference import Candidate, Coins, Outcome, Problem, candidate_law, row_law
from mcsd_kernels.sampling import RANGES, SamplingParams
from mcsd_kernels.types import PLACEHOLDER

Law = NDArray[np.float64]
Context = tuple[int, ...]
Rule = Callable[[Problem, Coins], Outcome]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Model:
    """A target and a draft whose laws depend on the tokens since the root."""

    target: Callable[[Context], Law]
    draft: Callable[[Context], Law]


def random_model(
    vocab: int, seed: int, target: dict[str, Any] | None = None, draft: dict[str, Any] | None = None
) -> Model:
    """Unrelated random logits after every context, through temperature and filters."""

    def logits(side: int, context: Context) -> Law:
        # halves, so that ties at the cut-off occur
        return np.round(np.random.default_rng([seed, side, *context]).normal(size=vocab) * 3) / 2

    return Model(
        functools.cache(lambda context: row_law(logits(0, context), **(target or {}))),
        functools.cache(lambda context: row_law(logits(1, context), **(draft or {}))),
    )


def fixed_model(p: list[float], q: list[float]) -> Model:
    """Two given laws, their tokens renamed by a permutation that depends on the context."""

    def order(context: Context) -> NDArray[np.int64]:
        return np.random.default_rng([7, *context]).permutation(len(p)) if context else np.arange(len(p))

    return Model(
        functools.cache(lambda context: np.array(p)[order(context)] / sum(p)),
        functools.cache(lambda context: np.array(q)[order(context)] / sum(q)),
    )


def law_of(logits: Law, sampling: SamplingParams) -> Law:
    """The law that temperature and filters make of a row."""
    return row_law(logits, **{name: getattr(sampling, name) for name in RANGES})


def logit_rows(
    rows: int, vocab: int, sampling: SamplingParams, draft_sampling: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, vocab]` float32 logits of a target and a draft whose laws overlap by 0.4 to 0.5 in every row."""
    rng = np.random.default_rng(7)
    pairs: list[list[Law]] = []
    while len(pairs) < rows:
        pair = [rng.normal(size=vocab) * 1.2 for _ in range(2)]
        p, q = (law_of(row, side) for row, side in zip(pair, (sampling, draft_sampling), strict=True))
        if 0.5 <= np.abs(p - q).sum() / 2 < 0.6:
            pairs.append(pair)
    target, draft = (torch.tensor(np.stack(side)).float() for side in zip(*pairs, strict=True))
    return target, draft


class Choices:
    """The choices of one run, the probability of having made them, and the prefixes not taken.

    Args:
        prefix: the choices to begin with.
    """

    def __init__(self, prefix: tuple[int, ...]) -> None:
        self.prefix = prefix
        self.made: list[int] = []
        self.probability = 1.0
        self.left: list[tuple[int, ...]] = []

    def choose(self, probabilities: list[float]) -> int:
        """The number of one of several events that exclude each other."""
        if len(self.made) < len(self.prefix):
            choice = self.prefix[len(self.made)]
        else:
            choice, *others = [i for i, probability in enumerate(probabilities) if probability > 0]
            self.left += [(*self.made, other) for other in others]
        self.made.append(choice)
        self.probability *= probabilities[choice]
        return choice


def all_runs(run: Callable[[Choices], Result]) -> Iterator[tuple[Result, float]]:
    """What each possible run returns, and its probability."""
    prefixes: list[tuple[int, ...]] = [()]
    while prefixes:
        choices = Choices(prefixes.pop())
        yield run(choices), choices.probability
        prefixes += choices.left


class Dice:
    """Choices made at random."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def choose(self, probabilities: list[float]) -> int:
        """The number of one of several events that exclude each other."""
        below = np.cumsum(probabilities)
        return int(np.searchsorted(below, self.rng.random() * below[-1], side="right"))


class Tosses:
    """`Coins` over `Choices`, which take every side in turn, or over `Dice`.

    With `Choices` the final draw is kept as a law, since nothing comes after it; `Dice` draw it.
    """

    def __init__(self, choices: Choices | Dice) -> None:
        self.choices = choices
        self.drawn: Law | None = None

    def accept(self, node: int, scale: float, mass: float) -> bool:
        """True with probability min(1, mass / scale)."""
        probability = 0.0 if mass <= 0 else 1.0 if mass >= scale else mass / scale
        return self.choices.choose([probability, 1 - probability]) == 0

    def draw(self, weights: Law) -> int:
        """A token with probability proportional to its weight."""
        assert weights.sum() > 0, "a rule asked for a draw from nothing"
        self.drawn = weights / weights.sum()
        return self.choices.choose(list(self.drawn)) if isinstance(self.choices, Dice) else PLACEHOLDER


@dataclass
class DraftedTree:
    """A tree whose candidates are drawn when a rule first asks for them: those it never sees cannot change its law.

    Args:
        model: the two laws.
        parents: of each node.
        proposal: how the candidates are said to have been drawn.
        choices: what decides.
        virtual: nodes without a row of the target.
        points: nodes that were chosen and not drawn, by their number, so that some repeat a drawn sibling and some have
            no mass under the draft.
        start: tokens before the root's children.
        drawn_as: how candidates really were drawn; None: as it is said.
        arrange: what is done to the drawn candidates of a node afterwards, given q.
        tokens: of the nodes that a rule has seen.
    """

    model: Model
    parents: list[int]
    proposal: str
    choices: Choices | Dice
    virtual: tuple[int, ...] = ()
    points: tuple[int, ...] = ()
    start: Context = ()
    drawn_as: str | None = None
    arrange: Callable[[Law, Context], Context] = lambda q, candidates: candidates
    tokens: dict[int, int] = field(default_factory=dict)

    def context(self, node: int) -> Context:
        """The tokens up to a node."""
        return self.start if node == 0 else (*self.context(self.parents[node]), self.tokens[node])

    def children(self, node: int) -> list[Candidate]:
        """A node's candidates."""
        nodes = [i for i, parent in enumerate(self.parents) if parent == node and i > 0]
        if nodes and nodes[0] not in self.tokens:
            q = self.model.draft(self.context(node))
            drawn = [i for i in nodes if i not in self.points]
            tuples = _tuples(self.model, self.context(node), len(drawn), self.drawn_as or self.proposal)
            chosen = tuples[self.choices.choose([probability for _, probability in tuples])][0]
            self.tokens.update(zip(drawn, self.arrange(q, chosen), strict=True))
            self.tokens.update((i, i % len(q)) for i in nodes if i in self.points)
        return [Candidate(i, self.tokens[i], i in self.virtual, i in self.points) for i in nodes]

    def problem(self) -> Problem:
        """The tree as a rule sees it."""
        return Problem(
            target=lambda node: self.model.target(self.context(node)),
            draft=lambda node: self.model.draft(self.context(node)),
            children=self.children,
            proposal=self.proposal,
        )


_TUPLES: dict[Any, list[tuple[Context, float]]] = {}


def _tuples(model: Model, context: Context, k: int, proposal: str) -> list[tuple[Context, float]]:
    if k == 0:
        return [((), 1.0)]
    key = (model, context, k, proposal)
    if key not in _TUPLES:
        _TUPLES[key] = candidate_law(model.draft(context), k, proposal)
    return _TUPLES[key]


@dataclass
class Emitted:
    """What one call emits.

    Args:
        law: the joint law of the tokens, however many.
        accepted: how many nodes are accepted on average. An accepted virtual node counts, though it costs its call the
            token that would have followed it.
        branches: from how many branches this was summed.
    """

    law: dict[Context, float]
    accepted: float
    branches: int

    @property
    def length(self) -> float:
        """Tokens a call."""
        return sum(len(text) * probability for text, probability in self.law.items())


def enumerate_branches(model: Model, parents: list[int], proposal: str, rule: Rule, **options: Any) -> Emitted:
    """Every draw of candidates and every decision of the rule; `options` are those of `DraftedTree`."""

    def run(choices: Choices) -> tuple[Context, int, Law | None]:
        tree, coins = DraftedTree(model, parents, proposal, choices, **options), Tosses(choices)
        path, last = rule(tree.problem(), coins)
        return tuple(tree.tokens[i] for i in path[1:]), last, coins.drawn

    emitted = Emitted(defaultdict(float), 0.0, 0)
    for (accepted, last, drawn), probability in all_runs(run):
        emitted.branches += 1
        emitted.accepted += probability * (len(accepted) + (drawn is None))
        if drawn is None:
            emitted.law[(*accepted, last)] += probability
        else:
            for v in np.flatnonzero(drawn):
                emitted.law[(*accepted, int(v))] += probability * float(drawn[v])
    return emitted


def sample_branches(
    model: Model, parents: list[int], proposal: str, rule: Rule, trials: int, seed: int, **options: Any
) -> dict[Context, int]:
    """How often each full text of `depth + 1` tokens was seen; the target continues what a call emitted."""
    dice, length = Dice(np.random.default_rng(seed)), depth(parents) + 1
    counts: dict[Context, int] = defaultdict(int)
    for _ in range(trials):
        tree = DraftedTree(model, parents, proposal, dice, **options)
        path, last = rule(tree.problem(), Tosses(dice))
        text = (*(tree.tokens[i] for i in path[1:]), last)
        while len(text) < length:
            text = (*text, dice.choose(list(model.target(text))))
        counts[text[:length]] += 1
    return counts


def depth(parents: list[int]) -> int:
    """Of the deepest node."""

    def of(node: int) -> int:
        return 0 if parents[node] < 0 else 1 + of(parents[node])

    return max(of(i) for i in range(len(parents)))


def target_law(model: Model, count: int) -> dict[Context, float]:
    """The target's joint law of `count` tokens."""
    law: dict[Context, float] = {(): 1.0}
    for n in range(count):
        law = continued(model, law, n)
    return law


def continued(model: Model, law: dict[Context, float], length: int) -> dict[Context, float]:
    """Texts of `length` tokens continued by one token of the target; longer ones as they are."""
    longer: dict[Context, float] = defaultdict(float)
    for tokens, probability in law.items():
        if len(tokens) > length:
            longer[tokens] += probability
            continue
        for v, share in enumerate(model.target(tokens)):
            if share > 0:
                longer[(*tokens, v)] += probability * float(share)
    return longer


def distances(model: Model, law: dict[Context, float], count: int) -> tuple[float, float]:
    """How far the joint law of `count` tokens is from the target's: the largest difference, and total variation.

    The target continues what was emitted.
    """
    actual = law
    for n in range(1, count):
        actual = continued(model, actual, n)
    expected = target_law(model, count)
    gaps = [abs(actual.get(text, 0.0) - expected.get(text, 0.0)) for text in {*actual, *expected}]
    return max(gaps), sum(gaps) / 2


def marginal(count: int, pairs: Iterable[tuple[Context, Any]]) -> dict[Context, Any]:
    """What falls on each beginning of `count` tokens: (text, probability) pairs or counts, as a dictionary."""
    total: dict[Context, Any] = {}
    for text, value in pairs:
        total[text[:count]] = total.get(text[:count], 0) + value
    return total


def chi_square(law: Iterable[tuple[Hashable, float]], counts: dict[Any, int]) -> float:
    """The probability of counts at least this far from the law, by Pearson's chi-square.

    Outcomes of fewer than 5 expected counts, where the chi-square law is a poor approximation, become one cell. An
    outcome that the law excludes has p = 0.

    Args:
        law: (outcome, probability) pairs.
        counts: outcome -> how often it was seen.
    """
    expected = {outcome: probability for outcome, probability in law if probability > 0}
    if not set(counts) <= set(expected):
        return 0.0
    trials = sum(counts.values())
    wanted = np.array(list(expected.values())) * trials
    assert abs(wanted.sum() - trials) < 1e-6 * trials, "the law does not sum to 1"
    found = np.array([counts.get(outcome, 0) for outcome in expected], dtype=float)
    rare = wanted < 5
    cells = np.array([*wanted[~rare], wanted[rare].sum()]), np.array([*found[~rare], found[rare].sum()])
    kept = cells[0] > 0
    statistic = float(((cells[1] - cells[0])[kept] ** 2 / cells[0][kept]).sum())
    return _tail(max(int(kept.sum()) - 1, 1), statistic)


def _tail(freedom: float, statistic: float) -> float:
    """The probability that chi-square exceeds a number."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def smallest_seen(trials: int, outcomes: int, level: float = 0.01, power: float = 0.9) -> float:
    """The total variation, in whatever direction, with which `chi_square` is below `level` as often as `power`.

    A law that is off by d has the non-centrality n sum d^2 / p >= 4 n TV^2, by Cauchy and Schwarz.

    Args:
        trials: n, how many samples are counted.
        outcomes: of the law, none of them rare.
        level: of p.
        power: the probability of seeing it.
    """
    return math.sqrt(_noncentrality(outcomes - 1, level, power) / 4 / trials)


@functools.cache
def _noncentrality(freedom: int, level: float, power: float) -> float:
    """With which chi-square exceeds what it exceeds with probability `level` without any, with probability `power`."""
    critical = _root(lambda x: level - _tail(freedom, x), 1e4)

    def missing(noncentrality: float) -> float:
        seen, weight = 0.0, math.exp(-noncentrality / 2)
        for k in range(int(noncentrality) + 100):
            seen += weight * _tail(freedom + 2 * k, critical)
            weight *= noncentrality / 2 / (k + 1)
        return seen - power

    return _root(missing, 500.0)


def _root(increasing: Callable[[float], float], high: float) -> float:
    """Where a function that is negative at 0 becomes positive."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return high


# Rules that are not lossless, each in its own few lines, as a reader would write it down from the idea alone.


def unchanged_laws(problem: Problem, coins: Coins) -> Outcome:
    """Each sibling is tested against the p and q that the first one was tested against."""
    path = [0]
    while True:
        p, siblings = problem.target(path[-1]), problem.candidates(path[-1])
        if not siblings:
            return path, coins.draw(p)
        q = problem.draft(path[-1])
        for sibling in siblings:
            if sibling.token >= 0 and coins.accept(sibling.node, q[sibling.token], p[sibling.token]):
                path.append(sibling.node)
                break
        else:
            return path, coins.draw(_positive(p - q, p))


def longest_path(problem: Problem, coins: Coins) -> Outcome:
    """Each path from root to leaf is verified as a chain, with coins of its own; the longest accepted one is kept."""
    best = [0]
    for path in _paths(problem, [0]):
        kept = 1
        while kept < len(path):
            p, q = problem.target(path[kept - 1]), problem.draft(path[kept - 1])
            token = _token(problem, path, kept)
            if token < 0 or not coins.accept(path[kept], q[token], p[token]):
                break
            kept += 1
        if kept > len(best):
            best = path[:kept]
    p = problem.target(best[-1])
    siblings = problem.candidates(best[-1])
    return best, coins.draw(_positive(p - problem.draft(best[-1]), p) if siblings else p)


def _paths(problem: Problem, path: list[int]) -> Iterator[list[int]]:
    siblings = problem.candidates(path[-1])
    if not siblings:
        yield path
    for sibling in siblings:
        if sibling.token < 0:
            yield path
        else:
            yield from _paths(problem, [*path, sibling.node])


def _token(problem: Problem, path: list[int], place: int) -> int:
    return next(c.token for c in problem.candidates(path[place - 1]) if c.node == path[place])


def _positive(weights: Law, otherwise: Law) -> Law:
    kept = np.maximum(weights, 0.0)
    return kept if kept.sum() > 0 else otherwise
