"""Diagnostics: the optimum against linear programming, acceptance against the verifier, and what is recorded."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import mcsd
from mcsd import Drafter, ModelDrafter, Proposal, State, diagnostics
from mcsd.diagnostics import (
    Recorder,
    acceptance_given,
    laws,
    mcsd_acceptance_rate,
    optimal_acceptance,
    overlap,
    read_rows,
    summarise,
    with_replacement_stages,
)
from mcsd.drafters.merged import MergedDrafter
from mcsd_kernels import SamplingParams, draw_uniforms, verify
from mcsd_kernels.reference import row_law
from tests.cases import PROPOSALS, RULES
from tests.small_law import few, sample
from tests.tiny import perturbed, prompt, tiny

Law = Any


def some_laws(seed: int, tokens: int, sharp: float = 0.5) -> tuple[Law, Law]:
    random = np.random.default_rng(seed)
    return random.dirichlet(np.full(tokens, sharp)), random.dirichlet(np.full(tokens, sharp))


def draws(q: Law, count: int, replacement: bool) -> dict[tuple[int, ...], float]:
    """Every outcome of `count` draws and its probability."""
    if replacement:
        return {
            found: float(np.prod([q[i] for i in found])) for found in itertools.product(range(len(q)), repeat=count)
        }
    law = {}
    for found in itertools.permutations(range(len(q)), count):
        mass, probability = 1.0, 1.0
        for token in found:
            probability *= q[token] / mass
            mass -= q[token]
        law[found] = float(probability)
    return law


def by_linear_program(p: Law, q: Law, count: int, replacement: bool) -> float:
    """The optimal transport itself: how much of each set of draws can be handed to which of its tokens."""
    sets: dict[frozenset[int], float] = {}
    for found, probability in draws(q, count, replacement).items():
        sets[frozenset(found)] = sets.get(frozenset(found), 0.0) + probability
    flows = [(some, token) for some in sets for token in some]
    rows = [[1.0 if flow[0] == some else 0.0 for flow in flows] for some in sets]
    rows += [[1.0 if flow[1] == token else 0.0 for flow in flows] for token in range(len(p))]
    answer = linprog(-np.ones(len(flows)), A_ub=rows, b_ub=[*sets.values(), *p])
    return float(-answer.fun)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_that_of_the_transport_problem(seed: int, count: int, replacement: bool) -> None:
    p, q = some_laws(seed, 4 + seed % 2)
    assert optimal_acceptance(p, q, count, replacement=replacement) == pytest.approx(
        by_linear_program(p, q, count, replacement), abs=1e-7
    )


def test_the_optimum_of_one_candidate_is_the_overlap() -> None:
    p, q = some_laws(7, 50)
    both = overlap(torch.tensor(p)[None], torch.tensor(q)[None]).item()
    for replacement in (True, False):
        assert optimal_acceptance(p, q, 1, replacement=replacement) == pytest.approx(both, abs=1e-12)


def test_the_optimum_with_every_token_drawn_is_certain() -> None:
    p, q = some_laws(8, 4)
    assert optimal_acceptance(p, q, 4, replacement=False) == pytest.approx(1.0, abs=1e-9)


def test_groups_of_small_tokens_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = some_laws(9, 3000, 0.02)
    q = (p + q) / 2
    exact = optimal_acceptance(p, q, 4, replacement=False)
    monkeypatch.setattr(diagnostics, "EXACT", 100)
    assert optimal_acceptance(p, q, 4, replacement=False) == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("proposal", ["without_replacement", "with_replacement"])
def test_no_rule_beats_the_optimum_and_the_recursive_one_comes_close(proposal: str) -> None:
    p, q = some_laws(3, 5)
    for count in (1, 2, 3):
        outcomes = draws(q, count, proposal == "with_replacement")
        got = sum(mass * acceptance_given(p, q, found, proposal) for found, mass in outcomes.items())
        best = optimal_acceptance(p, q, count, replacement=proposal == "with_replacement")
        assert 0.8 * best < got <= best + 1e-9


def test_stages_with_replacement_are_the_mean_over_the_draws() -> None:
    p, q = some_laws(4, 5)
    _, _, reached = with_replacement_stages(torch.tensor(p)[None], torch.tensor(q)[None], 4)
    for count in (1, 2, 3):
        outcomes = draws(q, count, replacement=True)
        missed = sum(mass * (1 - acceptance_given(p, q, found, "with_replacement")) for found, mass in outcomes.items())
        assert reached[0, count].item() == pytest.approx(missed, abs=1e-12)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_acceptance_given_the_candidates_is_what_verify_does(proposal: str) -> None:
    """4,000 coins for fixed candidates: within four standard errors."""
    trials = 4_000
    p, q = some_laws(11, 6, 1.0)
    candidates = [int(np.argsort(-q)[0]), 2 if np.argsort(-q)[0] != 2 else 3, int(np.argsort(-q)[-1])]
    if proposal == "greedy":
        candidates = [*np.argsort(-q)[:2].tolist(), int(np.argsort(-q)[4])]
    expected = acceptance_given(p, q, candidates, proposal)
    verified = verify(
        torch.tensor(np.log(p), dtype=torch.float32).expand(trials, 4, 6),
        None if proposal == "point" else torch.tensor(np.log(q), dtype=torch.float32).expand(trials, 4, 6),
        torch.tensor([[0, *candidates]]).expand(trials, 4).contiguous(),
        torch.tensor([-1, 0, 0, 0], dtype=torch.int32),
        draw_uniforms(torch.arange(trials), 0, 6),
        proposal=proposal,
        max_depth=1,
    )
    seen = float((verified.length > 1).float().mean())
    assert abs(seen - expected) < 4 * (expected * (1 - expected) / trials) ** 0.5 + 1e-9


@pytest.mark.parametrize("chosen", [(), (5,)], ids=["alone", "beside-a-chosen-one"])
def test_a_missing_draw_leaves_the_most_probable_tokens(chosen: tuple[int, ...]) -> None:
    p, q = some_laws(11, 6, 1.0)
    expected = p[[0, 2, *chosen]].sum()
    assert acceptance_given(p, q, [0, 2, -1], "greedy", chosen) == pytest.approx(expected, abs=1e-12)


class Chooses(Drafter):
    """Chooses two tokens, and one after the first of them."""

    def propose(self, state: State) -> Proposal:
        rows = [[s[-1], 1, 4, 2 + len(s) % 2] for s in state.sequences]
        return Proposal(torch.tensor(rows), torch.tensor([-1, 0, 0, 1], dtype=torch.int32), 2)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_expected_is_how_often_candidates_are_accepted(proposal: str) -> None:
    """3,000 requests, drawn and chosen candidates in one tree: each kind of node within four standard errors."""
    drafter = MergedDrafter([Chooses(), ModelDrafter(perturbed(few(), 0.7), (2,), proposal)])
    with Recorder(proposal) as recorder:
        sample(drafter, 3000, observer=recorder.observe)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for visit in itertools.chain.from_iterable(row["visits"] for row in recorder.rows):
        drawn, bounded = visit["overlap"] is not None, visit["optimum_with"] is not None
        assert (visit["optimum_without"] is not None) == bounded
        kind = "drawn" if bounded else "mixed" if drawn else "chosen"
        kinds.setdefault(f"{kind} at {visit['depth']}", []).append(visit)
    # at the root nothing is added where the chosen tokens were drawn
    wanted = {"chosen at 0", "chosen at 1"} if proposal == "point" else {"drawn at 0", "mixed at 0", "chosen at 1"}
    assert set(kinds) == wanted
    for kind, visits in kinds.items():
        expected = np.array([visit["expected"] for visit in visits])
        excess = sum(visit["accepted"] for visit in visits) - expected.sum()
        assert len(visits) > 100 and abs(excess) < 4 * (expected * (1 - expected)).sum() ** 0.5 + 1e-9, kind
    root = recorder.summary()["by_depth"][0]
    assert root["optimum_with"] is None, "a bound of some visits would stand beside what all of them accepted"
    assert (root["overlap"] is None) == (proposal == "point")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"temperature": 0.0, "top_k": 3}, id="greedy"),
        pytest.param({"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05}, id="all-filters"),
    ],
)
def test_laws_are_the_oracle_s(options: dict[str, Any]) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 3
    found = laws(logits, SamplingParams(**options))
    for row, law in zip(logits, found, strict=True):
        np.testing.assert_allclose(law.numpy(), row_law(row, **options), atol=1e-6)


def test_mcsd_s_own_rate_counts_depths_not_candidates() -> None:
    """Their code: accepted tokens over calls times max_draft_len; 12 calls of depth 3 that emitted 30 tokens."""
    assert mcsd_acceptance_rate(30, 12, 3) == pytest.approx(18 / 36)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_recording_agrees_with_the_statistics(proposal: str, rule: str, tmp_path: Path) -> None:
    target = tiny()
    drafter = ModelDrafter(perturbed(target, 0.3), (3, 2), proposal)
    ids = torch.tensor([prompt(6, seed) for seed in (1, 2)])
    path = tmp_path / "steps.jsonl"
    with Recorder(proposal, path) as recorder:
        stats = mcsd.generate(target, drafter, ids, max_new_tokens=21, rule=rule, observer=recorder.observe).stats
    summary = recorder.summary()
    assert summary["steps"] == stats.request_calls
    by_depth = summary["by_depth"]
    assert [row["visits"] for row in by_depth] == stats.tested_by_depth
    assert [row["accepted"] for row in by_depth] == pytest.approx(stats.acceptance_by_depth, abs=1e-4)
    for row in by_depth:
        assert 0 <= row["expected"] <= 1 + 1e-9
        if proposal == "point":
            assert row["overlap"] is None
        else:
            assert row["overlap"] <= row["optimum_with"] + 1e-6 <= 1 + 1e-5
    assert summarise(read_rows(path)) == summary
    whole = path.read_text()
    path.write_text(whole[:-30])  # killed while writing
    assert len(read_rows(path)) == len(recorder.rows) - 1


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match="line 1: expected a line of diagnostics"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        read_rows(path)
