"""`SamplingParams`, and the law of a row against the logits processors of `transformers`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mcsd_kernels import SamplingParams, Status, _rows_host, _rows_torch, reference
from mcsd_kernels._rules import Mass
from mcsd_kernels.sampling import RANGES, pack

FIELDS = ("temperature", "top_k", "top_p", "min_p")


# ---- validation


def test_the_defaults_filter_nothing() -> None:
    assert SamplingParams() == SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("temperature", 0, id="argmax"),
        pytest.param("temperature", 100.0, id="hot"),
        pytest.param("top_k", 10**6, id="more-than-any-vocabulary"),
        pytest.param("top_k", 3.0, id="whole-float"),
        pytest.param("top_p", 1e-9, id="almost-nothing"),
        pytest.param("top_p", 1, id="everything-as-int"),
        pytest.param("min_p", 1.0, id="the-largest-alone"),
        pytest.param("temperature", torch.tensor([1.0, -1.0]), id="a-tensor-is-not-read"),
    ],
)
def test_legal_values(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) is value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("temperature", -0.5, id="negative-temperature"),
        pytest.param("temperature", math.inf, id="infinite-temperature"),
        pytest.param("temperature", math.nan, id="nan-temperature"),
        pytest.param("temperature", "1", id="text"),
        pytest.param("temperature", None, id="none"),
        pytest.param("temperature", True, id="bool"),
        pytest.param("temperature", [1.0], id="list"),
        pytest.param("top_k", -1, id="negative-top-k"),
        pytest.param("top_k", 2.5, id="half-a-token"),
        pytest.param("top_p", 0.0, id="no-mass"),
        pytest.param("top_p", -0.1, id="negative-mass"),
        pytest.param("top_p", 1.1, id="more-than-all-mass"),
        pytest.param("top_p", math.nan, id="nan-top-p"),
        pytest.param("min_p", -0.1, id="negative-min-p"),
        pytest.param("min_p", 1.1, id="above-the-largest"),
    ],
)
def test_a_number_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got "):
        SamplingParams(**{field: value})


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="typical_p"):
        SamplingParams(typical_p=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(torch.ones(3), id="another-batch"),
        pytest.param(torch.ones(2, 1), id="two-axes"),
        pytest.param(torch.ones(2, dtype=torch.bool), id="bool"),
        pytest.param(torch.ones(2, dtype=torch.complex64), id="complex"),
        pytest.param(torch.ones(2, device="meta"), id="another-device"),
    ],
)
def test_a_wrong_tensor_is_named(field: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=rf"^sampling\.{field}: expected .*, got "):
        pack("sampling", SamplingParams(**{field: value}), 2, torch.device("cpu"))


# ---- laws


def processed(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The law that `transformers` samples from."""
    no_ids: Any = None
    scores = TemperatureLogitsWarper(temperature)(no_ids, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(no_ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(no_ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(no_ids, scores)
    return scores.softmax(-1)


def backend_law(logits: torch.Tensor, **parameters: float) -> tuple[torch.Tensor, list[Status] | None]:
    rows, vocab = logits.shape
    numbers, tensors = pack("sampling", SamplingParams(**parameters), rows, logits.device)
    out = torch.full((rows, vocab), math.nan, device=logits.device)
    status = _rows_torch.law(logits, _rows_torch.Sampling.on_host(numbers, tensors, rows), out, None)
    return out, status


@pytest.fixture(params=[(1.0, np.exp), (1.0 / math.log(2.0), np.exp2)], ids=["exp", "exp2"])
def exponential(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of those between which the processor decides; one of them without what NumPy 1 has not."""
    monkeypatch.setattr(_rows_host, "_EXPONENTIAL", request.param)
    if request.param[1] is np.exp:
        monkeypatch.setattr(_rows_host, "_DOT", None)


@pytest.mark.usefixtures("exponential")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 8200, 66_000], ids=lambda v: f"vocab-{v}")
def test_a_row_by_itself_without_filters(vocab: int, dtype: torch.dtype, threads: int) -> None:
    """Divided by its total it is the softmax; the logits are read only."""
    logits = (3 * torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)
    logits[1, 1:] -= 200.0  # below what float32's exponentials reach
    logits[2, :-1] = -math.inf
    logits[3] += 60.0
    before, set_threads = logits.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for temperature in (1.0, 0.4):
            found = _rows_host.Space(vocab)
            found.row.fill(math.nan)
            for row in logits:
                wanted = (row.double() / temperature).softmax(-1)
                for source in (row, row.float().numpy()):
                    with np.errstate(all="ignore"):
                        assert _rows_host.plain_law(source, 1 / temperature, found) is None
                    error = (found.tensor.double() / found.total - wanted).abs()
                    assert (error <= 4e-5 * wanted + 1e-30).all()  # logits / temperature reach 200 in float32
    finally:
        torch.set_num_threads(set_threads)
    assert torch.equal(logits, before)


@pytest.mark.usefixtures("exponential")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_beside_any_other(threads: int) -> None:
    set_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for vocab in (1, 2, 7, 15, 16, 17, 37, 100, 700, 1500, 9000, 30_001, 70_001):
            rows = 30 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) - 20
            together = _rows_torch.buffers(3, vocab, rows.device).first(3)
            with np.errstate(all="ignore"):
                masses = _rows_host.plain_laws(rows, 0.7, together)
            laws = together.weights.clone()
            for row in range(3):
                alone = _rows_torch.buffers(1, vocab, rows.device).first(1)
                with np.errstate(all="ignore"):
                    assert _rows_host.plain_laws(rows[row : row + 1], 0.7, alone) == [masses[row]]
                assert torch.equal(alone.weights[0], laws[row]), (vocab, row)
    finally:
        torch.set_num_threads(set_threads)


@pytest.mark.parametrize("columns", [False, True], ids=["all-tokens", "some-tokens"])
@pytest.mark.parametrize("w", [1.0, 1e-3, 1e-20])
@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0, 1e6])
def test_what_is_left_of_a_law(beta: float, w: float, columns: bool) -> None:
    """(p - beta / w q)_+ where neither is summed up to 1, and the factor between them may leave float32's range."""
    rng = np.random.default_rng(3)
    vocab, ids = 3000, np.sort(np.random.default_rng(4).permutation(3000)[:700])
    for p_total, q_total in ((1.0, 1.0), (7e3, 0.2), (9e19, 2e-4), (2e-4, 9e19)):
        p, q = _rows_host.Space(vocab), _rows_host.Columns(ids) if columns else _rows_host.Space(vocab)
        out = _rows_host.Space(vocab)
        out.row.fill(math.nan)
        law = rng.random(vocab) ** 9
        other = np.zeros(vocab)
        other[ids] = rng.random(len(ids)) * (rng.random(len(ids)) < 0.7) * w / max(beta, w)
        p.row[:], p.total = law / law.sum() * p_total, p_total
        q.row[:], q.total = (other[ids] if columns else other) * q_total, q_total
        with np.errstate(all="ignore"):
            unit = _rows_host.fill(p, q, Mass(w, beta, (5, 7)), out)
        wanted = np.maximum(law / law.sum() - beta / w * other, 0.0)
        wanted[[5, 7]] = 0.0
        assert np.abs(out.row / np.float64(unit) - wanted).max() < 1e-6
        assert out.masses() == pytest.approx([block.sum(dtype=np.float64) for block in out.blocks], rel=1e-6)


SETTINGS: list[Any] = [
    pytest.param({}, id="off"),
    pytest.param({"temperature": 0.3}, id="cold"),
    pytest.param({"temperature": 2.5}, id="hot"),
    pytest.param({"top_k": 1}, id="top-k-of-one"),
    pytest.param({"top_k": 7, "temperature": 0.6}, id="top-k-after-temperature"),
    pytest.param({"top_k": 10**6}, id="top-k-above-the-vocabulary"),
    pytest.param({"top_p": 0.9}, id="top-p"),
    pytest.param({"top_p": 0.9, "temperature": 1.8}, id="top-p-after-temperature"),
    pytest.param({"top_p": 1e-6}, id="top-p-of-almost-nothing"),
    pytest.param({"top_p": 0.999}, id="top-p-past-its-first-slice"),
    pytest.param({"min_p": 0.1}, id="min-p"),
    pytest.param({"min_p": 0.1, "temperature": 1.8}, id="min-p-after-temperature"),
    pytest.param({"min_p": 1.0}, id="min-p-of-one"),
    pytest.param({"top_k": 20, "top_p": 0.7}, id="top-p-of-what-top-k-left"),
    pytest.param({"top_p": 0.95, "min_p": 0.02}, id="top-p-and-min-p"),
    pytest.param({"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05}, id="all-four"),
]


@pytest.mark.parametrize("vocab", [1, 2, 5, 64, 65, 1500], ids=lambda v: f"vocab-{v}")
@pytest.mark.parametrize("parameters", SETTINGS)
def test_laws_of_transformers(parameters: dict[str, Any], vocab: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab, generator=generator) * torch.linspace(0.1, 6, 40)[:, None]
    # rows without ties: there the two agree on the tokens that stay
    logits = logits[[row.unique().numel() == vocab for row in logits]]
    assert len(logits) >= 30
    wanted = processed(logits.double(), **parameters)
    oracle = np.stack([reference.row_law(row, **parameters) for row in logits])
    np.testing.assert_allclose(oracle, wanted.numpy(), rtol=1e-12, atol=1e-15)
    found, status = backend_law(logits.to(device), **parameters)
    assert status is None
    # the smallest normal float32 is about 1e-38: below it, what is there may be flushed to zero
    assert not (found.cpu() > 0)[wanted == 0].any(), "a token stays that the filters take"
    assert (found.cpu() > 0)[wanted > 1e-37].all(), "a token is gone that the filters keep"
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_read_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    logits = (torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    found, _ = backend_law(logits.to(device), temperature=0.7)
    torch.testing.assert_close(found.cpu().double(), processed(logits.double(), 0.7), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("law", "parameters", "kept"),
    [
        pytest.param([0.3, 0.2, 0.3, 0.2], {"top_k": 1}, [0, 2], id="top-k"),
        pytest.param([0.3, 0.2, 0.3, 0.2], {"top_k": 3}, [0, 1, 2, 3], id="top-k-at-the-second-tie"),
        pytest.param([0.1, 0.2, 0.2, 0.5], {"top_p": 0.6}, [1, 2, 3], id="top-p"),
        pytest.param([0.1, 0.2, 0.2, 0.5], {"top_p": 0.4}, [3], id="top-p-above-the-ties"),
        pytest.param([0.25] * 4, {"top_p": 0.01}, [0, 1, 2, 3], id="top-p-all-tied"),
        pytest.param([0.1, 0.2, 0.2, 0.5], {"min_p": 0.3}, [1, 2, 3], id="min-p"),
    ],
)
def test_ties_with_the_cut_off_stay(
    law: list[float], parameters: dict[str, Any], kept: list[int], device: torch.device
) -> None:
    logits = torch.tensor([law]).log()
    assert np.flatnonzero(reference.row_law(logits[0], **parameters)).tolist() == kept
    found, _ = backend_law(logits.to(device), **parameters)
    assert found[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.5, "min_p": 0.9}], ids=["plain", "filters-no-effect"])
def test_temperature_zero_is_the_first_argmax(filters: dict[str, Any], device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [2.0, 2.0, 2.0, 2.0], [-torch.inf, -torch.inf, 0.0, -5.0]])
    wanted = torch.eye(4)[[1, 0, 2]]
    found, status = backend_law(logits.to(device), temperature=0.0, **filters)
    assert status is None and torch.equal(found.cpu(), wanted)
    for row, one_hot in zip(logits, wanted, strict=True):
        assert reference.row_law(row, temperature=0.0, **filters).tolist() == one_hot.tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.8, "min_p": 0.1}], ids=["plain", "filtered"])
def test_a_broken_row_is_named_and_has_no_mass(
    filters: dict[str, Any], temperature: float, device: torch.device
) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[0.0, 1, 2], [nan, 1, 2], [0, 1, nan], [0, inf, 2], [-inf, -inf, -inf], [-inf, 5, -inf]])
    found, status = backend_law(logits.to(device), temperature=temperature, **filters)
    bad = [Status.NAN_ROW] * 3 + [Status.EMPTY_ROW]
    assert status == [Status(0), *bad, Status(0)]
    assert not found[1:5].any() and not found.isnan().any()
    torch.testing.assert_close(found.sum(-1).cpu(), torch.tensor([1.0, 0, 0, 0, 0, 1]))


def test_extreme_logits(device: torch.device) -> None:
    """Neither overflow nor a shift may change a law."""
    logits = torch.tensor([[3e38, -3e38, 3e38], [65504.0, 65503.0, -65504.0], [-1e30, -1e30, -1e30]])
    found, status = backend_law(logits.to(device))
    wanted = torch.stack([torch.from_numpy(reference.row_law(row)) for row in logits])
    assert status is None
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-6, atol=1e-9)


def test_each_request_has_its_own_parameters(device: torch.device) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).to(device)
    values: dict[str, list[Any]] = {
        "temperature": [0.0, 0.5, 1.0, 2.0], "top_k": [0, 0, 5, 50],
        "top_p": [1.0, 0.8, 1.0, 0.5], "min_p": [0, 0.1, 0, 0],
    }  # fmt: skip
    tensors: Any = {name: torch.tensor(value, device=device) for name, value in values.items()}
    found, _ = backend_law(logits, **tensors)
    for b in range(4):
        alone, _ = backend_law(logits[b : b + 1], **{name: value[b] for name, value in values.items()})
        torch.testing.assert_close(found[b : b + 1], alone, rtol=1e-6, atol=0)
    assert set(values) == set(RANGES)
