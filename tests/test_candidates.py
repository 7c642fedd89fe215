"""`draw_candidates`: the law of what it draws, and what it must not depend on."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import cases
import numpy as np
import pytest
import torch

from mcsd_kernels import SamplingParams, draw_candidates, reference
from mcsd_kernels.random import CANDIDATE_STREAM

PROPOSALS = cases.PROPOSALS
DRAWN = ("without_replacement", "with_replacement", "greedy")
TRIALS = 100_000
ROWS_A_CALL = 1000
# Below this the test fails: 13 laws at a fixed seed, so one false alarm in about 770 changes of the random numbers.
SMALLEST_P = 1e-4

Q = [0.35, 0.3, 0.2, 0.1, 0.05]
FILTERED = SamplingParams(temperature=0.8, top_k=4, top_p=0.97, min_p=0.05)


def drawn(
    law: list[float], k: int, proposal: str, sampling: SamplingParams, device: torch.device, trials: int = TRIALS
) -> Counter[tuple[int, ...]]:
    """How often each ordered tuple comes in `trials` rows that differ in seed, node and step."""
    logits = torch.from_numpy(cases.logits_of(law)).float().to(device).expand(ROWS_A_CALL, -1)
    seeds = torch.arange(ROWS_A_CALL, device=device)
    found: Counter[tuple[int, ...]] = Counter()
    for call in range(trials // ROWS_A_CALL):
        nodes = (seeds + call) % 7
        tokens = draw_candidates(logits, k, seeds + 500 * call, call, proposal=proposal, sampling=sampling, nodes=nodes)
        unique, counts = tokens.cpu().unique(dim=0, return_counts=True)
        for row, count in zip(unique.tolist(), counts.tolist(), strict=True):
            found[tuple(row)] += count
    return found


@pytest.mark.parametrize("proposal", DRAWN)
@pytest.mark.parametrize(
    ("law", "k", "sampling"),
    [
        pytest.param(Q, 3, SamplingParams(), id="plain"),
        pytest.param(Q, 2, FILTERED, id="temperature-and-filters"),
        pytest.param([0.6, 0.0, 0.4, 0.0], 3, SamplingParams(), id="fewer-tokens-with-mass-than-candidates"),
        pytest.param([0.25] * 4, 2, SamplingParams(), id="uniform"),
    ],
)
def test_law(
    law: list[float], k: int, sampling: SamplingParams, proposal: str, device: torch.device, p_value: Any
) -> None:
    parameters = {name: getattr(sampling, name) for name in reference.RANGES}
    q = reference.row_law(torch.from_numpy(cases.logits_of(law)).float(), **parameters)
    counts = drawn(law, k, proposal, sampling, device)
    assert p_value(reference.candidate_law(q, k, proposal), counts) > SMALLEST_P


def test_the_law_test_sees_a_small_bias(device: torch.device, p_value: Any) -> None:
    """Two probabilities that are off by 0.03: a total variation of 0.03 in the first draw."""
    counts = drawn([0.38, 0.27, 0.2, 0.1, 0.05], 3, "without_replacement", SamplingParams(), device, 20_000)
    assert p_value(reference.candidate_law(np.array(Q), 3, "without_replacement"), counts) < 1e-9


def test_rows_are_independent(device: torch.device, p_value: Any) -> None:
    """Neighbouring seeds, nodes and steps share nothing: pairs of draws follow the product law."""
    logits = torch.from_numpy(cases.logits_of(Q)).float().to(device).expand(ROWS_A_CALL, -1)
    seeds = torch.arange(ROWS_A_CALL, device=device)
    ones = torch.ones_like(seeds)
    product = [((a, b), Q[a] * Q[b]) for a in range(5) for b in range(5)]
    for other_seeds, other_step, other_nodes in ((seeds + 10**6, 3, ones), (seeds, 4, ones), (seeds, 3, 2 * ones)):
        pairs: Counter[tuple[int, int]] = Counter()
        for call in range(10):
            shift = 10**7 * call
            first = draw_candidates(logits, 1, seeds + shift, 3, nodes=ones)
            second = draw_candidates(logits, 1, other_seeds + shift, other_step, nodes=other_nodes)
            pairs.update(zip(first[:, 0].tolist(), second[:, 0].tolist(), strict=True))
        assert p_value(product, pairs) > SMALLEST_P


# ---- exactly what the contract's numbers say


def oracle_draws(q: np.ndarray[Any, Any], k: int, seed: int, step: int, node: int, proposal: str) -> list[int]:
    """The candidates by the numbers of the candidates' stream, two for each draw: the block and the place."""
    key = (seed % 2**32, (seed >> 32) % 2**32)

    def number(i: int) -> float:
        words = reference.philox_4x32_10((i // 4, node, step, CANDIDATE_STREAM), key)
        return (words[i % 4] >> 8) * 2.0**-24

    left, found = q.copy(), []
    if proposal in ("point", "greedy"):
        most = [int(x) for x in np.argsort(-q, kind="stable")[: k if proposal == "point" else k - 1] if q[x] > 0]
        found = most + [-1] * ((k if proposal == "point" else k - 1) - len(most))
        left[most] = 0.0
    for draw in range(k - len(found)):
        if left.sum() == 0:
            found.append(-1)
            continue
        token = reference.block_draw(left, number(2 * draw), number(2 * draw + 1))
        found.append(token)
        if proposal == "without_replacement":
            left[token] = 0.0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 100, 1023, 1024, 1025, 5000], ids=lambda v: f"vocab-{v}")
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_equals_the_oracle(proposal: str, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(12, vocab, generator=generator) * 3).to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, (12,), generator=generator)
    steps = torch.randint(0, 1000, (12,), generator=generator)
    nodes = torch.randint(0, 50, (12,), generator=generator).int()
    values: dict[str, Any] = {
        "temperature": torch.linspace(0.0, 2.0, 12), "top_k": torch.arange(12) * 3, "top_p": 0.98, "min_p": 1e-4
    }  # fmt: skip
    there = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    found = draw_candidates(
        logits.to(device), 5, seeds.to(device), steps.to(device), proposal=proposal,
        sampling=SamplingParams(**there), nodes=nodes.to(device),
    )  # fmt: skip
    assert found.dtype == torch.int64 and found.shape == (12, 5) and found.device == device
    for row in range(12):
        q = reference.row_law(
            logits[row], float(values["temperature"][row]), int(values["top_k"][row]), values["top_p"], values["min_p"]
        )
        wanted = oracle_draws(q, 5, int(seeds[row]), int(steps[row]), int(nodes[row]), proposal)
        assert found[row].tolist() == wanted, f"row {row}"


def test_point_and_greedy_take_the_lower_id_first(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]], device=device)
    seeds = torch.tensor([5, 6], device=device)
    assert draw_candidates(logits, 4, seeds, 0, proposal="point").tolist() == [[1, 2, 4, 3], [0, 1, 2, 3]]
    assert draw_candidates(logits, 4, seeds, 0, proposal="greedy")[:, :3].tolist() == [[1, 2, 4], [0, 1, 2]]


@pytest.mark.parametrize(
    ("proposal", "wanted"),
    [
        ("without_replacement", [2, -1, -1]),
        ("with_replacement", [2, 2, 2]),
        ("greedy", [2, -1, -1]),
        ("point", [2, -1, -1]),
    ],
)
def test_temperature_zero_leaves_one_token(proposal: str, wanted: list[int], device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 5.0]], device=device)
    seeds = torch.zeros(1, dtype=torch.int64, device=device)
    sampling = SamplingParams(temperature=0.0)
    assert draw_candidates(logits, 3, seeds, 0, proposal=proposal, sampling=sampling).tolist() == [wanted]


@pytest.mark.parametrize("proposal", ["without_replacement", "greedy", "point"])
def test_candidates_differ_and_have_mass(proposal: str, device: torch.device) -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(2)) * 5
    logits[:, ::3] = -torch.inf
    logits[0, 10:] = -torch.inf
    found = draw_candidates(logits.to(device), 60, torch.arange(40, device=device), 0, proposal=proposal).cpu()
    for row, tokens in enumerate(found.tolist()):
        there = [x for x in tokens if x >= 0]
        assert len(set(there)) == len(there) == (6 if row == 0 else 60)
        assert (logits[row, there] > -torch.inf).all()
        if proposal != "greedy":
            assert tokens == there + [-1] * (60 - len(there)), "the missing ones stand at the end"


def test_a_vocabulary_of_262144_in_bf16(device: torch.device) -> None:
    logits = (torch.randn(2, 262_144, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    logits[1, :262_143] = -torch.inf
    found = draw_candidates(logits.to(device), 3, torch.tensor([1, 2], device=device), 0)
    q = reference.row_law(logits[0])
    assert found.tolist() == [oracle_draws(q, 3, 1, 0, 0, "without_replacement"), [262_143, -1, -1]]


# ---- what the draw must not depend on


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_row_draws_the_same_wherever_it_stands(proposal: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(30, 1100, generator=generator) * 2).to(device)
    seeds, nodes = torch.arange(30, device=device), torch.arange(30, device=device) % 4
    steps = torch.arange(30, device=device) // 3
    sampling = SamplingParams(temperature=torch.linspace(0.5, 2, 30, device=device), top_p=0.95)

    def draw(index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        assert isinstance(sampling.temperature, torch.Tensor)
        some = SamplingParams(temperature=sampling.temperature[index], top_p=0.95)
        return draw_candidates(
            rows, 4, seeds[index], steps[index], proposal=proposal, sampling=some, nodes=nodes[index]
        )

    every = torch.arange(30, device=device)
    whole = draw(every, logits)
    order = torch.randperm(30, generator=generator).to(device)
    assert torch.equal(draw(order, logits[order]), whole[order]), "permuted"
    parts = [draw(every[i : i + 7], logits[i : i + 7]) for i in range(0, 30, 7)]
    assert torch.equal(torch.cat(parts), whole), "split"
    wide = torch.full((60, 1200), torch.nan, device=device)
    wide[::2, 50:1150] = logits
    assert torch.equal(draw(every, wide[::2, 50:1150]), whole), "strided"
    broken = logits.clone()
    broken[3] = torch.nan
    others = every != 3
    assert torch.equal(draw(every, broken)[others], whole[others]), "a NaN neighbour"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [700, 9000, 70_000])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_row_draws_the_same_beside_any_other(
    proposal: str, vocab: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Without filters, where rows are taken together: some far from zero, some of few tokens, some broken."""
    generator = torch.Generator().manual_seed(vocab)
    rows = torch.randn(10, vocab, generator=generator) * 2
    rows[1:6] += torch.tensor([-17.0, -60.0, 60.0, 30.0, -25.0])[:, None]
    rows[6] *= 15
    rows[7, 3:] = -torch.inf
    rows[8, 5] = torch.nan
    rows[9] = -torch.inf
    rows = rows.to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, (10,), generator=generator)

    def draw(index: list[int]) -> list[list[int]]:
        some = torch.tensor(index)
        found = draw_candidates(
            rows[some].to(device), 4, seeds[some].to(device), 5, proposal=proposal, nodes=some.to(device)
        )
        tokens: list[list[int]] = found.tolist()
        return tokens

    together = draw(list(range(10)))
    assert [draw([row])[0] for row in range(10)] == together
    assert draw([9, 6, 0, 8, 2]) == [together[row] for row in (9, 6, 0, 8, 2)]
    for row in range(8):
        q = reference.row_law(rows[row], 1.0)
        assert together[row] == oracle_draws(q, 4, int(seeds[row]), 5, row, proposal), f"row {row}"
    assert together[8:] == [[-1] * 4] * 2


def test_seed_step_and_node_all_count(device: torch.device) -> None:
    logits = torch.zeros(1, 1000, device=device)

    def draw(seed: int, step: int, node: int) -> tuple[int, ...]:
        seeds, nodes = torch.tensor([seed], device=device), torch.tensor([node], device=device)
        return tuple(draw_candidates(logits, 3, seeds, step, nodes=nodes)[0].tolist())

    calls = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1 + 2**32, 1, 1), (-1, 1, 1)]
    assert len({draw(*call) for call in calls}) == len(calls)
    assert draw(1, 1, 1) == draw(1, 1, 1)


def test_no_nodes_means_node_zero(device: torch.device) -> None:
    logits, seeds = torch.zeros(3, 500, device=device), torch.arange(3, device=device)
    zeros = torch.zeros(3, dtype=torch.int32, device=device)
    assert torch.equal(draw_candidates(logits, 2, seeds, 9), draw_candidates(logits, 2, seeds, 9, nodes=zeros))


# ---- broken rows and wrong calls


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.0), FILTERED], ids=str)
def test_a_broken_row_has_no_candidates(proposal: str, sampling: SamplingParams, device: torch.device) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[nan, 0, 1], [0, 1, nan], [0, inf, 1], [-inf, -inf, -inf], [1, 0, 0]], device=device)
    found = draw_candidates(logits, 2, torch.arange(5, device=device), 0, proposal=proposal, sampling=sampling)
    assert (found[:4] == -1).all() and found[4, 0] >= 0


@pytest.mark.parametrize(
    ("field", "values"),
    [
        pytest.param("temperature", [1.0, -1.0, torch.nan, torch.inf], id="temperature"),
        pytest.param("top_p", [1.0, 0.0, 1.5, torch.nan], id="top-p"),
        pytest.param("min_p", [0.0, -0.1, 1.1, torch.nan], id="min-p"),
        pytest.param("top_k", [0, -1, -5, -100], id="top-k"),
    ],
)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_tensor_out_of_range_leaves_its_row_empty(
    proposal: str, field: str, values: list[float], device: torch.device
) -> None:
    sampling: Any = SamplingParams(**{field: torch.tensor(values, device=device)})
    found = draw_candidates(
        torch.zeros(4, 6, device=device), 2, torch.arange(4, device=device), 0, proposal=proposal, sampling=sampling
    )
    assert (found[0] >= 0).all() and (found[1:] == -1).all()


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_no_rows(proposal: str, device: torch.device) -> None:
    seeds = torch.zeros(0, dtype=torch.int64, device=device)
    assert draw_candidates(torch.zeros(0, 6, device=device), 2, seeds, 0, proposal=proposal).shape == (0, 2)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_logits_are_not_written(proposal: str, device: torch.device) -> None:
    logits = torch.randn(5, 40, device=device)
    copy = logits.clone()
    draw_candidates(logits, 3, torch.arange(5, device=device), 0, proposal=proposal, sampling=FILTERED)
    assert torch.equal(logits, copy)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        pytest.param("draft_logits", torch.zeros(6), id="one-axis"),
        pytest.param("draft_logits", torch.zeros(1, 2, 6), id="three-axes"),
        pytest.param("draft_logits", torch.zeros(2, 6, dtype=torch.float64), id="double"),
        pytest.param("draft_logits", torch.zeros(2, 0), id="empty-vocabulary"),
        pytest.param("draft_logits", torch.zeros(6, 2).t(), id="strided-vocabulary"),
        pytest.param("draft_logits", [[0.0]], id="list"),
        pytest.param("k", 0, id="no-candidates"),
        pytest.param("k", 2.0, id="float-k"),
        pytest.param("k", True, id="bool-k"),
        pytest.param("seeds", torch.zeros(3, dtype=torch.int64), id="seeds-of-other-rows"),
        pytest.param("seeds", torch.zeros(2, dtype=torch.int32), id="short-seeds"),
        pytest.param("seeds", torch.zeros(2, dtype=torch.int64, device="meta"), id="seeds-elsewhere"),
        pytest.param("step", -1, id="negative-step"),
        pytest.param("step", torch.zeros(3, dtype=torch.int64), id="steps-of-other-rows"),
        pytest.param("proposal", "top_k", id="unknown-proposal"),
        pytest.param("nodes", torch.zeros(3, dtype=torch.int32), id="nodes-of-other-rows"),
        pytest.param("nodes", torch.zeros(2), id="float-nodes"),
        pytest.param("nodes", torch.zeros(2, dtype=torch.int32, device="meta"), id="nodes-elsewhere"),
        pytest.param("sampling", None, id="no-sampling"),
        pytest.param("sampling", {"temperature": 1.0}, id="sampling-as-a-dict"),
    ],
)
def test_a_mistake_is_named(argument: str, value: Any) -> None:
    arguments: dict[str, Any] = {
        "draft_logits": torch.zeros(2, 6), "k": 2, "seeds": torch.zeros(2, dtype=torch.int64), "step": 0
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        draw_candidates(**(arguments | {argument: value}))


def test_a_block_that_was_used_up_has_no_mass(device: torch.device) -> None:
    """What is left of a block after many tokens were struck out is what its other tokens weigh, not old rounding."""
    logits = torch.full((64, 2048), -torch.inf, device=device)
    ratios = torch.linspace(0.505, 0.56, 64, device=device)[:, None]  # more than half is left every time
    logits[:, :29] = torch.arange(29, device=device) * ratios.log()
    logits[:, 1024:1030] = math.log(1.8e-10)
    seeds = torch.arange(64, device=device)
    tokens = draw_candidates(logits, 30, seeds, 0, proposal="greedy")
    assert tokens[:, :29].tolist() == [list(range(29))] * 64
    assert ((tokens[:, 29] >= 1024) & (tokens[:, 29] < 1030)).all()
