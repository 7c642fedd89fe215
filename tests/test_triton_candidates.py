"""`draw_uniforms` and `draw_candidates` in Triton: the same numbers and tokens as in torch, and the law."""

from __future__ import annotations

from collections import Counter
from typing import Any

import cases
import pytest
import torch
import triton_interpreter

from mcsd_kernels import SamplingParams, draw_candidates, draw_uniforms, reference
from mcsd_kernels._candidates_triton import draw_candidates_bytes
from mcsd_kernels._random_triton import draw_uniforms_bytes

triton_interpreter.install()

PROPOSALS = cases.PROPOSALS
# Below this the law test fails: one false alarm in 10^4 changes of the random numbers.
SMALLEST_P = 1e-4
PLAIN = SamplingParams()
FIXED = SamplingParams(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01)


def mixed(rows: int) -> SamplingParams:
    """Every row its own parameters: temperature 0, each filter alone, all of them, and one out of range."""
    return SamplingParams(
        temperature=torch.tensor([0.5, 1.0, 0.0, 2.0, 0.7, -1.0])[:rows],
        top_k=torch.tensor([1, 0, 5, 50, 7, 0])[:rows],
        top_p=torch.tensor([1.0, 0.9, 0.95, 1.0, 0.8, 1.0])[:rows],
        min_p=torch.tensor([0.0, 0.0, 0.01, 0.0, 0.1, 0.0])[:rows],
    )


def fuzzed(rows: int, vocab: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def both(logits: torch.Tensor, k: int, proposal: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the two backends, torch's first."""
    seeds = torch.arange(len(logits)) * 123_456_789_123 - 5
    arguments: dict[str, Any] = {"step": 7, "nodes": torch.arange(len(logits), dtype=torch.int32)} | options
    found = [
        draw_candidates(logits, k, seeds, proposal=proposal, backend=backend, **arguments)
        for backend in ("torch", "triton")
    ]
    assert found[1].dtype == torch.int64 and found[1].shape == (len(logits), k)
    return found[0], found[1]


@pytest.mark.parametrize("count", [0, 1, 4, 7, 130])
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(0, id="zero"),
        pytest.param(2**32 - 1, id="the-largest"),
        pytest.param(torch.tensor([0, 1, 2**31, 2**32 - 1]), id="a-row"),
        pytest.param(torch.tensor(5, dtype=torch.int32), id="scalar-tensor"),
    ],
)
def test_uniforms_are_the_same_bits(step: int | torch.Tensor, count: int) -> None:
    for seeds in (torch.tensor([0, -1, 2**63 - 1, -(2**63)]), torch.arange(8)[::2]):
        found = draw_uniforms(seeds, step, count, backend="triton")
        assert torch.equal(found, draw_uniforms(seeds, step, count, backend="torch"))


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize(
    ("vocab", "dtype", "sampling"),
    [
        pytest.param(1, torch.float32, PLAIN, id="one-token"),
        pytest.param(5, torch.bfloat16, PLAIN, id="fewer-tokens-than-lanes"),
        pytest.param(1023, torch.float16, FIXED, id="one-short-of-a-block"),
        pytest.param(1024, torch.float32, PLAIN, id="a-block"),
        pytest.param(1025, torch.bfloat16, mixed(6), id="one-past-a-block"),
        pytest.param(4096, torch.float32, PLAIN, id="several-blocks"),
    ],
)
def test_equals_torch(vocab: int, dtype: torch.dtype, sampling: SamplingParams, proposal: str) -> None:
    rows = 6 if isinstance(sampling.temperature, torch.Tensor) else 3
    wanted, found = both(fuzzed(rows, vocab, vocab).to(dtype), 4, proposal, sampling=sampling)
    assert found.tolist() == wanted.tolist()


def _hard_rows() -> torch.Tensor:
    """Ties across a block edge, a one-hot row, a run of -inf, rows that are NaN, +inf and empty, one of two tokens."""
    logits = fuzzed(8, 1100, 1)
    logits[7, 2:] = -torch.inf
    logits[0] = 1.0
    logits[0, 1020:1030] = 2.0
    logits[1] = -torch.inf
    logits[1, 1024] = 3.0
    logits[2, :1050] = -torch.inf
    logits[3, 1099] = torch.nan
    logits[4, 0] = torch.inf
    logits[5] = -torch.inf
    return logits


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_hard_rows(temperature: float, proposal: str) -> None:
    wanted, found = both(_hard_rows(), 3, proposal, sampling=SamplingParams(temperature=temperature))
    assert found.tolist() == wanted.tolist()
    assert (found[3:6] == -1).all() and (found[6, 0] >= 0)


@pytest.mark.parametrize("proposal", ["without_replacement", "greedy"])
@pytest.mark.parametrize("vocab", [20, 2050], ids=["a-block", "several-blocks"])
def test_what_a_confident_row_leaves_is_drawn_from(vocab: int, proposal: str) -> None:
    """All but e**-gap is one token's: what is left is too light for the units of a law."""
    gaps = torch.tensor([12.0, 39.0, 41.0, 55.0]).repeat(3)[:, None]
    logits = fuzzed(len(gaps), vocab, 3) - gaps
    logits[:, 7] = 0.0
    logits[::2, vocab - 1] = 3 - gaps[::2, 0] / 2
    torch_tokens, triton_tokens = both(logits, 4, proposal)
    assert torch.equal(torch_tokens, triton_tokens)
    assert (torch_tokens >= 0).all()


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_strided_rows_steps_and_nodes(proposal: str) -> None:
    rows, steps = fuzzed(3, 60, 3), torch.tensor([[4, 9], [5, 9], [2**32 - 1, 9]])
    wide = torch.full((6, 90), torch.nan, dtype=torch.float32)
    wide[::2, 7:67] = rows
    options = {"step": steps[:, 0], "nodes": torch.tensor([[1, 2], [3, 4], [5, 6]])[:, 1], "sampling": FIXED}
    contiguous, _ = both(rows, 4, proposal, **options)
    wanted, found = both(wide[::2, 7:67], 4, proposal, **options)
    assert found.tolist() == wanted.tolist() == contiguous.tolist()


def test_more_candidates_than_a_store_block() -> None:
    wanted, found = both(fuzzed(1, 140, 5), 130, "point")
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_any_schedule_gives_the_same_tokens(seed: int) -> None:
    logits = fuzzed(4, 40, 6)
    with triton_interpreter.interleave(seed, fine=True):
        wanted, found = both(logits, 3, "without_replacement")
    assert found.tolist() == wanted.tolist()


def test_a_vocabulary_of_131072() -> None:
    logits = (fuzzed(2, 131_072, 0) * 2).bfloat16()
    logits[1, :131_071] = -torch.inf
    wanted, found = both(logits, 3, "without_replacement", sampling=SamplingParams(top_p=0.9))
    assert found.tolist() == wanted.tolist() and found[1].tolist() == [131_071, -1, -1]


def test_law(p_value: Any) -> None:
    """Two draws without replacement from five tokens, filtered, against the exact law."""
    sampling = {"temperature": 0.8, "min_p": 0.12}
    logits = torch.from_numpy(cases.logits_of([0.35, 0.3, 0.2, 0.1, 0.05])).float()
    trials = 150
    found = draw_candidates(
        logits.expand(trials, -1), 2, torch.arange(trials), 1, sampling=SamplingParams(**sampling), backend="triton"
    )
    counts = Counter(tuple(row) for row in found.tolist())
    q = reference.row_law(logits, **sampling)
    assert p_value(reference.candidate_law(q, 2, "without_replacement"), counts) > SMALLEST_P


def test_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert draw_candidates(torch.zeros(0, 6), 2, none, 0, backend="triton").shape == (0, 2)
    assert draw_uniforms(none, 0, 3, backend="triton").shape == (0, 3)


def test_bytes() -> None:
    """Of 2 rows: 3 logits of 2 bytes, a seed of 8 and 4 tokens of 8; a seed and 5 numbers of 4."""
    assert draw_candidates_bytes(2, 3, 2, 4) == 2 * (6 + 8 + 32)
    assert draw_uniforms_bytes(2, 5) == 2 * (8 + 20)
