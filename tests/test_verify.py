"""`verify`: the torch backend against the oracle token for token, laws by chi-square, invariance, and bad input."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cases
import numpy as np
import pytest
import torch
from cases import PROPOSALS, RULES

from mcsd_kernels import SamplingParams, Status, Verified, draw_candidates, draw_uniforms, reference, verify
from mcsd_kernels.types import PLACEHOLDER

EVERY = [pytest.param(rule, proposal, id=f"{rule}-{proposal}") for rule in RULES for proposal in PROPOSALS]

# ---- the oracle, token for token

CALLS = 330
# A float32 decision may differ from the float64 one where the latter is closer than this to its threshold.
CLOSE_CALL = 1e-5


def differences(found: Verified, wanted: Verified) -> list[int]:
    """The requests whose path, length, tokens or status differ."""
    same = torch.stack(
        [(a.cpu() == b.cpu()).reshape(len(wanted.length), -1).all(1) for a, b in zip(found, wanted, strict=True)]
    )
    return (~same.all(0)).nonzero().flatten().tolist()


def check(case: cases.Case, device: torch.device) -> tuple[int, int]:
    """Compare one call with the oracle; returns how many requests it has and how many differ by a close call."""
    there = case.to(device)
    found = verify(*there.arguments, **there.options)
    wanted = reference.verify(*case.arguments, **case.options)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == device
    wrong = differences(found, wanted)
    if wrong:
        _, margins = reference.verify(*case.arguments, **case.options, return_margin=True)
        for b in wrong:
            got, want = ([field[b].tolist() for field in result] for result in (found, wanted))
            assert margins[b] < CLOSE_CALL, f"request {b}: got {got}, expected {want}; {case.note}"
    return len(wanted.length), len(wrong)


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_equals_the_oracle(rule: str, proposal: str, device: torch.device) -> None:
    """2,640 random calls in all, a third of them with a fault in some requests.

    A request is excused only if it differs and the oracle's closest decision is a close call; fewer than 1 % may.
    """
    requests = excused = 0
    for i in range(CALLS):
        rng = np.random.default_rng([RULES.index(rule), PROPOSALS.index(proposal), i])
        case = cases.random_case(rng, rule=rule, proposal=proposal, faults=i % 3 == 0)
        count, close = check(case, device)
        requests += count
        excused += close
    assert excused < 0.01 * requests


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
@pytest.mark.parametrize("law", cases.LAWS)
def test_named_laws_on_named_trees(law: str, rule: str, proposal: str, device: torch.device) -> None:
    target, draft, why = cases.LAWS[law]
    p, q = (torch.from_numpy(cases.logits_of(row)).float() for row in (target, draft))
    rng = np.random.default_rng(0)
    for name, (parents, _) in cases.TREES.items():
        batch, nodes = 8, len(parents)
        tokens = torch.zeros(batch, nodes, dtype=torch.int64)
        for b in range(batch):
            for node in range(nodes):
                children = [i for i in range(1, nodes) if parents[i] == node]
                if children:
                    tokens[b, children] = torch.tensor(
                        cases.draw_children(rng, np.array(draft), len(children), proposal)
                    )
        uniforms = torch.from_numpy(rng.random((batch, nodes + 2)).astype(np.float32)).clamp_(max=1 - 2**-24)
        uniforms[0] = 0.0
        uniforms[1] = 1 - 2**-24
        rows = torch.zeros(batch, nodes, dtype=torch.int32)
        options = {"rule": rule, "proposal": proposal, "target_rows": rows, "draft_rows": rows}
        arguments = (p[None], q[None], tokens, torch.tensor(parents), uniforms)
        check(cases.Case(arguments, options, f"{law} ({why}), tree {name}"), device)


# ---- laws

VOCAB = 5
FIRST_TREE = [-1, 0, 0, 0, 1, 1]
NEXT_TREE = [-1, 0, 0]
REQUESTS = {"recursive": 200_000, "traversal": 50_000}
REQUESTS_A_CALL = 1000
# Below this a law test fails. Eight laws at a fixed seed: a change of the random numbers alone fails one in 1,250 times.
SMALLEST_P = 1e-4
# A negative control must be at least this clear, with fewer requests.
CONTROL_REQUESTS = 20_000
CONTROL_P = 1e-9


@dataclass(frozen=True)
class Model:
    """A target and a draft over `VOCAB` tokens whose rows depend on all tokens so far, up to two of them.

    Row 0 follows no token, row 1 + a token a, row 6 + 5 a + b tokens a, b. Candidates and tests have their own
    temperature and filters.
    """

    target: torch.Tensor
    draft: torch.Tensor
    sampling: SamplingParams
    draft_sampling: SamplingParams

    @staticmethod
    def make(device: torch.device) -> Model:
        sampling = SamplingParams(temperature=0.8, top_k=4, top_p=0.97, min_p=0.02)
        draft_sampling = SamplingParams(temperature=1.3, top_k=4, top_p=0.98)
        rng = np.random.default_rng(7)
        pairs: list[list[np.ndarray[Any, Any]]] = []
        while len(pairs) < 1 + VOCAB + VOCAB**2:
            pair = [rng.normal(size=VOCAB) * 1.2 for _ in range(2)]
            p, q = law_of(pair[0], sampling), law_of(pair[1], draft_sampling)
            if 0.5 <= total_variation(p, q) < 0.6:
                pairs.append(pair)
        target, draft = (torch.tensor(np.stack(rows)).float().to(device) for rows in zip(*pairs, strict=True))
        return Model(target, draft, sampling, draft_sampling)

    def law(self) -> list[tuple[tuple[int, ...], float]]:
        """The law of three tokens that the target generates one at a time."""
        p = [law_of(row.cpu().double().numpy(), self.sampling) for row in self.target]
        return [
            ((a, b, c), float(p[0][a] * p[1 + a][b] * p[6 + 5 * a + b][c]))
            for a in range(VOCAB)
            for b in range(VOCAB)
            for c in range(VOCAB)
        ]


def law_of(logits: np.ndarray[Any, Any], sampling: SamplingParams) -> np.ndarray[Any, Any]:
    return reference.row_law(logits, **{name: getattr(sampling, name) for name in reference.RANGES})


def total_variation(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> float:
    return float(np.abs(p - q).sum() / 2)


def row_after(context: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The row that follows `token` (-1: any row) after a context that is itself given by its row."""
    token = token.clamp(min=0)
    return torch.where(context == 0, 1 + token, 6 + 5 * (context - 1) + token)


def generate(
    model: Model,
    rule: str,
    proposal: str,
    requests: int,
    *,
    sort_candidates: bool = False,
    reuse_coins: bool = False,
    other_proposal: str | None = None,
) -> Counter[tuple[int, ...]]:
    """The first three tokens of each request, by as many calls of draw_candidates, draw_uniforms and verify as it takes.

    The first call tests three candidates, two more under the first of them, and what a leaf's row draws. The next ones
    test two, which are virtual nodes where only one token is still wanted.

    Args:
        sort_candidates: a mistake: hand the candidates over in the order of q.
        reuse_coins: a mistake: each call has the first call's coins.
        other_proposal: a mistake: candidates drawn so, and not as `proposal` says.
    """
    device = model.target.device
    drawn_as = other_proposal or proposal

    def candidates(rows: torch.Tensor, k: int, seeds: torch.Tensor, step: int, node: int) -> torch.Tensor:
        nodes = torch.full_like(seeds, node)
        found = draw_candidates(
            model.draft[rows], k, seeds, step, proposal=drawn_as, sampling=model.draft_sampling, nodes=nodes
        )
        if sort_candidates:
            q = model.draft[rows].gather(1, found.clamp(min=0)).where(found >= 0, -torch.inf)
            found = found.gather(1, q.argsort(dim=1, descending=True, stable=True))
        return found

    def call(tokens: torch.Tensor, rows: torch.Tensor, tree: list[int], seeds: torch.Tensor, step: int) -> Verified:
        coins = draw_uniforms(seeds, 0 if reuse_coins else step, len(tree) + 2)
        result = verify(
            model.target, model.draft, tokens, torch.tensor(tree, device=device), coins, proposal=proposal, rule=rule,
            sampling=model.sampling, draft_sampling=model.draft_sampling, target_rows=rows,
            draft_rows=rows.clamp(min=0), max_depth=2,
        )  # fmt: skip
        assert not result.status.any()
        return result

    counts: Counter[tuple[int, ...]] = Counter()
    for start in range(0, requests, REQUESTS_A_CALL):
        seeds = torch.arange(start, min(start + REQUESTS_A_CALL, requests), device=device)
        root = torch.zeros_like(seeds)
        first = candidates(root, 3, seeds, 0, 0)
        below = row_after(root, first[:, 0])
        second = candidates(below, 2, seeds, 0, 1)
        tokens = torch.cat([root[:, None], first, second], 1)
        rows = torch.cat([root[:, None], row_after(root[:, None], first), row_after(below[:, None], second)], 1)
        result = call(tokens, rows.int(), FIRST_TREE, seeds, 0)
        emitted, length = result.tokens.clone(), result.length.long()
        step = 1
        while (length < 3).any():
            some = (length < 3).nonzero().flatten()
            have = length[some]
            context = row_after(root[some], emitted[some, 0])
            context = torch.where(have == 2, row_after(context, emitted[some, 1]), context)
            children = candidates(context, 2, seeds[some], step, 0)
            tokens = torch.cat([emitted[some].gather(1, have[:, None] - 1), children], 1)
            leaf_rows = torch.where(have[:, None] == 2, -1, row_after(context[:, None], children))
            rows = torch.cat([context[:, None], leaf_rows], 1)
            result = call(tokens, rows.int(), NEXT_TREE, seeds[some], step)
            for position in (0, 1):
                fits = (position < result.length) & (have + position < 3)
                emitted[some[fits], (have + position)[fits]] = result.tokens[fits, position]
            length[some] = have + result.length
            step += 1
        unique, repeats = emitted.cpu().unique(dim=0, return_counts=True)
        for row, count in zip(unique.tolist(), repeats.tolist(), strict=True):
            counts[tuple(row)] += count
    return counts


@pytest.fixture
def model(device: torch.device) -> Iterator[Model]:
    """The model; Python's cycle collector rests meanwhile.

    A thousand requests under way set it off again and again, which costs a third of the time; they form no cycles.
    """
    gc.disable()
    yield Model.make(device)
    gc.enable()


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_three_tokens_have_the_law_of_the_target(rule: str, proposal: str, model: Model, p_value: Any) -> None:
    """The joint law of three tokens: 200,000 requests a proposal under `recursive`, 50,000 under `traversal`.

    The second number is smaller to keep the suite short; what the two rules share is most of the code.
    """
    counts = generate(model, rule, proposal, REQUESTS[rule])
    assert p_value(model.law(), counts) > SMALLEST_P


@pytest.mark.parametrize("rule", RULES)
def test_control_candidates_sorted_by_q(rule: str, model: Model, p_value: Any) -> None:
    counts = generate(model, rule, "without_replacement", CONTROL_REQUESTS, sort_candidates=True)
    assert p_value(model.law(), counts) < CONTROL_P


@pytest.mark.parametrize("rule", RULES)
def test_control_coins_reused_by_position(rule: str, model: Model, p_value: Any) -> None:
    counts = generate(model, rule, "without_replacement", CONTROL_REQUESTS, reuse_coins=True)
    assert p_value(model.law(), counts) < CONTROL_P


def test_control_candidates_of_another_proposal(model: Model, p_value: Any) -> None:
    counts = generate(
        model, "recursive", "without_replacement", CONTROL_REQUESTS, other_proposal="point"
    )  # the paper's code tests the k most probable tokens as if they had been sampled
    assert p_value(model.law(), counts) < CONTROL_P


@pytest.mark.parametrize("stale", [False, True], ids=["sound", "stale-residual"])
def test_control_stale_residual(stale: bool, model: Model, device: torch.device, p_value: Any) -> None:
    """A hand-written rule for one node and two candidates; it is wrong if the second is still tested against p."""
    requests = 100_000
    p, q = law_of(model.target[0].cpu().numpy(), model.sampling), law_of(model.draft[0].cpu().numpy(), model.draft_sampling)
    counts: Counter[int] = Counter()
    for start in range(0, requests, 1000):
        seeds = torch.arange(start, start + 1000, device=device)
        drawn = draw_candidates(model.draft[:1].expand(1000, -1), 2, seeds, 0, sampling=model.draft_sampling)
        coins = draw_uniforms(seeds, 0, 4).cpu().numpy()
        for (x, y), (u, v, _, place) in zip(drawn.tolist(), coins.tolist(), strict=True):
            if u * q[x] < p[x]:
                counts[x] += 1
                continue
            residual = np.maximum(p - q, 0)
            residual /= residual.sum()
            rest = q.copy()
            rest[x] = 0
            rest /= rest.sum()
            tested = p if stale else residual
            if v * rest[y] < tested[y]:
                counts[y] += 1
                continue
            last = np.maximum(residual - rest, 0)
            counts[int(np.searchsorted(np.cumsum(last), place * last.sum(), side="right"))] += 1
    found = p_value(list(enumerate(p)), counts)
    assert found < CONTROL_P if stale else found > SMALLEST_P
