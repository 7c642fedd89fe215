"""What the evidence is made of: problems, every branch of a rule or random ones, and how far a law is from another."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mcsd_kernels.reference import Candidate, Coins, Outcome, Problem, candidate_law, row_law

Law = NDArray[np.float64]
Context = tuple[int, ...]
Rule = Callable[[Problem, Coins], Outcome]


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


class Choices:
    """The choices of one run: from a prefix, and from there on always the first possible one; the rest is left.

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


class Dice:
    """Choices made at random."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def choose(self, probabilities: list[float]) -> int:
        """The number of one of several events that exclude each other."""
        below = np.cumsum(probabilities)
        return int(np.searchsorted(below, self.rng.random() * below[-1], side="right"))


class Tosses:
    """`Coins` over `Choices`, whose final draw is kept as a law, or over `Dice`, which draw it."""

    def __init__(self, choices: Choices | Dice) -> None:
        self.choices = choices
        self.drawn: Law | None = None

    def accept(self, node: int, scale: float, mass: float) -> bool:
        """True with probability min(1, mass / scale)."""
        probability = 0.0 if mass <= 0 else 1.0 if mass >= scale else mass / scale
        return self.choices.choose([probability, 1 - probability]) == 0

    def draw(self, weights: Law) -> int:
        """A token with probability proportional to its weight."""
        self.drawn = weights / weights.sum()
        return self.choices.choose(list(self.drawn)) if isinstance(self.choices, Dice) else 0


@dataclass
class DraftedTree:
    """A tree whose candidates are drawn when a rule first asks for them.

    Args:
        model: the two laws.
        parents: of each node.
        proposal: how the candidates are said to have been drawn.
        choices: what decides.
        drawn_as: how they really were; None: as it is said.
        arrange: what is done to the candidates of a node afterwards, given q.
    """

    model: Model
    parents: list[int]
    proposal: str
    choices: Choices | Dice
    drawn_as: str | None = None
    arrange: Callable[[Law, Context], Context] = lambda q, candidates: candidates
    tokens: dict[int, int] = field(default_factory=dict)

    def context(self, node: int) -> Context:
        """The tokens from the root to a node."""
        return () if node == 0 else (*self.context(self.parents[node]), self.tokens[node])

    def children(self, node: int) -> list[Candidate]:
        """A node's candidates."""
        nodes = [i for i, parent in enumerate(self.parents) if parent == node and i > 0]
        if nodes and nodes[0] not in self.tokens:
            q = self.model.draft(self.context(node))
            tuples = _tuples(self.model, self.context(node), len(nodes), self.drawn_as or self.proposal)
            chosen = tuples[self.choices.choose([probability for _, probability in tuples])][0]
            self.tokens.update(zip(nodes, self.arrange(q, chosen), strict=True))
        return [Candidate(i, self.tokens[i]) for i in nodes]

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
    key = (model, context, k, proposal)
    if key not in _TUPLES:
        _TUPLES[key] = candidate_law(model.draft(context), k, proposal)
    return _TUPLES[key]


@dataclass
class Emitted:
    """The joint law of the tokens of one call, however many, and from how many branches it was summed."""

    law: dict[Context, float]
    branches: int


def enumerate_branches(model: Model, parents: list[int], proposal: str, rule: Rule, **options: Any) -> Emitted:
    """Every draw of candidates and every decision of the rule, each with its probability."""
    emitted = Emitted(defaultdict(float), 0)
    prefixes: list[tuple[int, ...]] = [()]
    while prefixes:
        choices = Choices(prefixes.pop())
        tree, coins = DraftedTree(model, parents, proposal, choices, **options), Tosses(choices)
        path, last = rule(tree.problem(), coins)
        accepted = tuple(tree.tokens[i] for i in path[1:])
        emitted.branches += 1
        if coins.drawn is None:
            emitted.law[(*accepted, last)] += choices.probability
        else:
            for v in np.flatnonzero(coins.drawn):
                emitted.law[(*accepted, int(v))] += choices.probability * float(coins.drawn[v])
        prefixes += choices.left
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


def distances(model: Model, emitted: Emitted, count: int) -> tuple[float, float]:
    """How far the first `count` tokens are from the target's law: the largest difference, and total variation."""
    actual = emitted.law
    for n in range(1, count):
        actual = continued(model, actual, n)
    expected = target_law(model, count)
    gaps = [abs(actual.get(text, 0.0) - expected.get(text, 0.0)) for text in {*actual, *expected}]
    return max(gaps), sum(gaps) / 2


def chi_square(law: Iterable[tuple[Hashable, float]], counts: dict[Any, int]) -> float:
    """The probability of counts at least this far from the law (Pearson); rare outcomes become one cell.

    An outcome that the law excludes has p = 0.
    """
    expected = {outcome: probability for outcome, probability in law if probability > 0}
    if not set(counts) <= set(expected):
        return 0.0
    trials = sum(counts.values())
    wanted = np.array(list(expected.values())) * trials
    found = np.array([counts.get(outcome, 0) for outcome in expected], dtype=float)
    rare = wanted < 5
    cells = np.array([*wanted[~rare], wanted[rare].sum()]), np.array([*found[~rare], found[rare].sum()])
    kept = cells[0] > 0
    statistic = float(((cells[1] - cells[0])[kept] ** 2 / cells[0][kept]).sum())
    freedom = max(int(kept.sum()) - 1, 1)
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


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
