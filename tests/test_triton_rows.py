"""The device functions of `_rows_triton`, `row_cutoffs` in Triton, and the interpreter's own repairs and checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter

from mcsd_kernels import SamplingParams, Status, reference, row_cutoffs
from mcsd_kernels._cutoffs_triton import row_cutoffs_bytes
from mcsd_kernels._rows_triton import (
    DRAW_BLOCK,
    blocks_of,
    draw,
    find_law,
    law,
    law_masses,
    load_logits,
    load_masses,
    store_masses,
    strike_out,
    total_of,
)

triton_interpreter.install()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fuzzed(rows: int, vocab: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


# ---- the interpreter


@triton.jit
def _beyond_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y_ptr + index, tl.load(x_ptr + index))


def test_an_access_out_of_bounds_is_an_error() -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out-of-bounds load"):
        _beyond_kernel[(1,)](torch.zeros(15), torch.zeros(16), SIZE=16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out-of-bounds store"):
        _beyond_kernel[(1,)](torch.zeros(16), torch.zeros(15), SIZE=16)


@triton.jit
def _bfloat16_kernel(x_ptr, y_ptr, sum_ptr, count, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    y = x * 2 + 0.5
    for _ in range(count):
        y = y * x
    both = (x > 0) and (index > 3)
    tl.store(y_ptr + index, tl.where(both, y, x))
    tl.store(sum_ptr, tl.sum(x, 0))


def test_bfloat16_range_and_bool_operators() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y, total = torch.full((64,), torch.nan).bfloat16(), torch.zeros(1).bfloat16()
    _bfloat16_kernel[(1,)](x, y, total, 2, SIZE=64)
    wanted = (x * 2 + 0.5) * x * x
    assert torch.equal(y, torch.where((x > 0) & (torch.arange(64) > 3), wanted, x))
    assert torch.equal(total[0], x.float().sum().bfloat16())


@triton.jit
def _last_one_sums_kernel(count_ptr, parts_ptr, out_ptr, ORDERED: tl.constexpr, SIZE: tl.constexpr):
    me, index = tl.program_id(0), tl.arange(0, SIZE)
    if not ORDERED:
        before = tl.atomic_add(count_ptr, 1)
    tl.store(parts_ptr + me, me + 1)
    if ORDERED:
        before = tl.atomic_add(count_ptr, 1)
    if before == SIZE - 1:
        tl.store(out_ptr, tl.sum(tl.load(parts_ptr + index), 0))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_race_between_programs_shows(ordered: bool) -> None:
    """The last program to arrive sums the parts: right only if each stores its part before it arrives."""
    wrong = 0
    for seed in range(8):
        count, parts, out = (torch.zeros(size, dtype=torch.int32) for size in (1, 4, 1))
        with triton_interpreter.interleave(seed, fine=True):
            _last_one_sums_kernel[(4,)](count, parts, out, ORDERED=ordered, SIZE=4)
        wrong += int(out) != 10
    assert (wrong == 0) == ordered


@triton.jit
def _waits_for_ever_kernel(count_ptr):
    tl.atomic_add(count_ptr, 1)
    while tl.atomic_add(count_ptr, 0) < 3:
        pass


def test_a_hang_is_an_error() -> None:
    with (
        pytest.raises(triton.runtime.errors.InterpreterError, match="deadlock"),
        triton_interpreter.interleave(0, max_switches=500),
    ):
        _waits_for_ever_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


# ---- a row's law


@triton.jit
def _law_kernel(
    logits_ptr, scale, top_p, law_ptr, masses_ptr, status_ptr, statistics_ptr,
    FILTERS: tl.constexpr, VOCAB: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    zero = tl.full([], 0.0, tl.float32)
    settings = (zero + scale, zero, zero + top_p, tl.full([], float("-inf"), tl.float64))
    pointers, plain = (logits_ptr, logits_ptr), (None, None, None)
    numbers, bits = find_law(pointers, plain, settings, statistics_ptr, FILTERS, False, VOCAB, TILE, BLOCKS)
    tl.store(status_ptr, bits)
    if bits == 0:
        index = tl.arange(0, BLOCKS)
        masses = law_masses((pointers, plain, numbers), statistics_ptr, VOCAB, BLOCKS)
        tl.store(masses_ptr + index, masses, mask=index < tl.cdiv(VOCAB, DRAW_BLOCK))
        for block in range(tl.cdiv(VOCAB, DRAW_BLOCK)):
            ids = block * DRAW_BLOCK + tl.arange(0, DRAW_BLOCK)
            found = law(numbers, load_logits(pointers, plain, ids, True, VOCAB), ids)
            tl.store(law_ptr + ids, found, mask=ids < VOCAB)


def law_of(
    logits: torch.Tensor, scale: float = 1.0, top_p: float = 1.0, tile: int = 2
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(law, block masses, status) of a row."""
    vocab = logits.shape[0]
    blocks = blocks_of(vocab)
    found, statistics = torch.full((vocab,), torch.nan), torch.full((2, blocks), torch.nan)
    masses, status = torch.full((blocks,), -1), torch.full((1,), -1, dtype=torch.int32)
    _law_kernel[(1,)](
        logits, scale, top_p, found, masses, status, statistics,
        FILTERS=top_p < 1, VOCAB=vocab, BLOCKS=triton.next_power_of_2(blocks), TILE=tile,
    )  # fmt: skip
    return found, masses / 2.0**60, int(status)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1024, 3000])
def test_law_is_as_exact_as_torch(vocab: int, dtype: torch.dtype) -> None:
    logits = fuzzed(1, vocab, vocab)[0].to(dtype)
    found, masses, status = law_of(logits, 1.25)
    exact = torch.softmax(logits.double() * 1.25, -1)
    torch_error = (torch.softmax(logits.float() * 1.25, -1).double() - exact).abs().max()
    ulp = np.spacing(exact.max().float().numpy())
    assert status == 0
    assert (found.double() - exact).abs().max() <= 2 * torch_error + ulp
    by_block = torch.nn.functional.pad(exact, (0, -vocab % 1024)).view(-1, 1024).sum(-1)
    torch.testing.assert_close(masses.double(), by_block, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("place", "value", "wanted"),
    [
        pytest.param(1500, np.nan, Status.NAN_ROW, id="nan"),
        pytest.param(0, np.inf, Status.NAN_ROW, id="plus-infinity"),
        pytest.param(slice(None), -np.inf, Status.EMPTY_ROW, id="all-minus-infinity"),
        pytest.param(slice(0, 2000), -np.inf, Status(0), id="a-block-of-minus-infinity"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["temperature-1", "temperature-0"])
def test_status(place: Any, value: float, wanted: Status, scale: float) -> None:
    logits = fuzzed(1, 2100, 1)[0]
    logits[place] = value
    assert law_of(logits, scale)[2] == wanted


def test_temperature_zero_is_one_hot_at_the_lowest_argmax() -> None:
    logits = fuzzed(1, 2100, 1)[0]
    logits[[1030, 1040, 2050]] = 50.0
    found, masses, _ = law_of(logits, 0.0, 0.5)
    assert found.nonzero().tolist() == [[1030]] and found[1030] == 1 and masses.tolist() == [0, 1, 0]


def test_the_tile_changes_no_bit() -> None:
    logits = fuzzed(1, 5000, 2)[0]
    one, other = law_of(logits, top_p=0.9, tile=1), law_of(logits, top_p=0.9, tile=8)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert (one[0] == 0).any() and float(one[0].double().sum()) == pytest.approx(1, abs=1e-6)


def test_a_block_without_a_weight_has_no_mass() -> None:
    """Its tokens are too improbable to count, so a draw that landed there would find nothing."""
    logits = torch.full((2048,), -45.0)
    logits[3] = 0.0
    found, masses, _ = law_of(logits)
    assert (found[1024:] > 0).all() and masses[1] == 0


# ---- residuals and draws


@triton.jit
def _residual_kernel(
    p_ptr, q_ptr, p_top, p_inverse, q_top, q_inverse, ratio, masses_ptr, without_ptr, count, uniforms_ptr, total_ptr,
    token_ptr, VOCAB: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    plain = (None, None, None)
    p = ((p_ptr, p_ptr), plain, (1.0, float("-inf"), p_top, p_inverse, -1))
    q = ((q_ptr, q_ptr), plain, (1.0, float("-inf"), q_top, q_inverse, -1))
    store_masses(p, q, ratio, masses_ptr, 0, tl.cdiv(VOCAB, DRAW_BLOCK), VOCAB, TILE)
    masses = load_masses(masses_ptr, VOCAB, BLOCKS)
    masses = strike_out(masses, p, q, ratio, without_ptr, count, VOCAB, BLOCKS)
    tl.store(total_ptr, total_of(masses))
    u_block, u_place = tl.load(uniforms_ptr), tl.load(uniforms_ptr + 1)
    tl.store(token_ptr, draw(masses, p, q, ratio, without_ptr, count, u_block, u_place, VOCAB))


@pytest.mark.parametrize(
    ("ratio", "without"),
    [
        pytest.param(0.0, [], id="p"),
        pytest.param(0.7, [], id="residual"),
        pytest.param(1.0, [3, 1024, 1030, -1, 1024], id="residual-without-tokens"),
        pytest.param(1e9, [], id="nothing-left"),
    ],
)
@pytest.mark.parametrize("coins", [(0.0, 0.0), (0.31, 0.77), (1 - 2**-24, 1 - 2**-24)], ids=str)
def test_residual_masses_and_draw(ratio: float, without: list[int], coins: tuple[float, float]) -> None:
    vocab = 2500
    p, q = fuzzed(2, vocab, 4)
    p[:5] = q[:5] = -torch.inf
    p[1500:] -= 1
    q[2499] = p[2499] = -torch.inf
    laws = [torch.softmax(row.double(), -1) for row in (p, q)]
    weights = (laws[0] - ratio * laws[1]).clamp(min=0)
    weights[[token for token in without if token >= 0]] = 0
    masses, total = torch.full((3,), -1), torch.full((1,), torch.nan, dtype=torch.float64)
    token = torch.full((1,), -9, dtype=torch.int32)
    statistics = [(float(row.max()), float(1 / (row - row.max()).double().exp().sum())) for row in (p, q)]
    _residual_kernel[(1,)](
        p, q, *statistics[0], *statistics[1], ratio, masses, torch.tensor(without or [0]), len(without),
        torch.tensor(coins), total, token, VOCAB=vocab, BLOCKS=4, TILE=2,
    )  # fmt: skip
    assert float(total) == pytest.approx(float(weights.sum()), rel=1e-5, abs=1e-12)
    if weights.sum() == 0:
        assert int(token) == -1
        return
    assert int(token) == reference.block_draw(weights, *coins) and weights[int(token)] > 0


# ---- cut-offs


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(1, torch.float32), (5, torch.bfloat16), (100, torch.float16), (1025, torch.bfloat16), (4096, torch.float32)],
    ids=str,
)
def test_row_cutoffs_equal_the_oracle(vocab: int, dtype: torch.dtype) -> None:
    """Every filter alone and together, over spread, narrow and half-empty rows: the same tokens stay."""
    values: dict[str, Any] = {
        "temperature": torch.tensor([0.5, 1.0, 1.0, 2.0, 0.7, 1.0, 0.0]),
        "top_k": torch.tensor([1, 0, 5, 50, 3000, 0, 9]),
        "top_p": torch.tensor([1.0, 0.9, 0.95, 0.5, 0.3, 1.0, 0.5]),
        "min_p": torch.tensor([0.0, 0.0, 0.01, 0.0, 0.3, 1e-3, 0.5]),
    }
    for spread in (1.0, 0.1, 5.0):
        logits = fuzzed(7, vocab, vocab) * spread
        logits[:, 1::3] = -torch.inf if spread == 5.0 else 0.25
        logits = logits.to(dtype)
        found = row_cutoffs(logits, SamplingParams(**values), backend="triton")
        for row in range(7):
            parameters = {name: tensor[row].item() for name, tensor in values.items()}
            wanted = reference.row_cutoff(logits[row], **parameters)
            finite = logits[row][logits[row] > -torch.inf].double()
            kept = finite >= found[row].double()
            assert torch.equal(kept, finite >= wanted), f"row {row}, spread {spread}"
        assert torch.equal(found, row_cutoffs(logits, SamplingParams(**values), backend="torch"))


def test_row_cutoffs_of_numbers_strided_broken_and_out_of_range() -> None:
    wide = torch.full((10, 300), torch.nan)
    wide[::2, 20:220] = fuzzed(5, 200, 8)
    logits = wide[::2, 20:220]
    logits[1, 5], logits[2, 7], logits[3] = torch.nan, torch.inf, -torch.inf
    found = row_cutoffs(logits, SamplingParams(0.9, 10, 0.8, 0.02), backend="triton")
    assert torch.equal(found, row_cutoffs(logits, SamplingParams(0.9, 10, 0.8, 0.02), backend="torch"))
    assert torch.isinf(found[1:4]).all() and torch.isfinite(found[[0, 4]]).all()
    wrong = SamplingParams(top_k=torch.tensor([3, 3, 3, 3, -1]))
    assert torch.isinf(row_cutoffs(logits, wrong, backend="triton")[1:]).all()


def test_row_cutoffs_bytes() -> None:
    """Two rows of three bf16 logits are 12 bytes; two float32 answers are 8."""
    assert row_cutoffs_bytes(2, 3, 2) == 20


def test_row_cutoffs_of_a_vocabulary_of_131072() -> None:
    logits = fuzzed(2, 131_072, 9)
    sampling = SamplingParams(top_k=torch.tensor([50, 0]), top_p=torch.tensor([1.0, 0.9]))
    found = row_cutoffs(logits, sampling, backend="triton")
    assert torch.equal(found, row_cutoffs(logits, sampling, backend="torch"))
