"""`verify` in Triton, interpreted: against the oracle token for token, laws by chi-square, and what may not matter."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
import triton_interpreter
from cases import PROPOSALS, RULES
from conftest import PValue
from torch._subclasses.fake_tensor import FakeTensorMode

from mcsd_kernels import SamplingParams, Status, Verified, draw_candidates, draw_uniforms, reference, verify
from mcsd_kernels import _verify_triton as kernels
from mcsd_kernels._schedule import Launch

triton_interpreter.install()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp(-inf - x) and the like

EVERY = [pytest.param(rule, proposal, id=f"{rule}-{proposal}") for rule in RULES for proposal in PROPOSALS]
CALLS = 125
# A float32 decision may differ from the float64 one where the latter is closer than this to its threshold.
CLOSE_CALL = 1e-5


def differences(found: Verified, wanted: Verified) -> list[int]:
    """The requests whose path, length, tokens or status differ."""
    same = torch.stack([(a == b).reshape(len(wanted.length), -1).all(1) for a, b in zip(found, wanted, strict=True)])
    return (~same.all(0)).nonzero().flatten().tolist()


def check(case: cases.Case) -> tuple[int, int]:
    """Compare one call with the oracle; returns how many requests it has and how many differ by a close call."""
    found = verify(*case.arguments, **case.options, backend="triton")
    wanted = reference.verify(*case.arguments, **case.options)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    wrong = differences(found, wanted)
    if wrong:
        _, margins = reference.verify(*case.arguments, **case.options, return_margin=True)
        for b in wrong:
            got, want = ([field[b].tolist() for field in result] for result in (found, wanted))
            assert margins[b] < CLOSE_CALL, f"request {b}: got {got}, expected {want}; {case.note}"
    return len(wanted.length), len(wrong)


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_equals_the_oracle(rule: str, proposal: str) -> None:
    """1,000 random calls in all, a third of them with a fault; mostly small, for the interpreter counts operations."""
    requests = excused = 0
    for i in range(CALLS):
        rng = np.random.default_rng([3, RULES.index(rule), PROPOSALS.index(proposal), i])
        case = cases.random_case(
            rng,
            rule=rule,
            proposal=proposal,
            batch=1 if i % 5 else 3,
            nodes=int(rng.integers(1, 8)) if i % 4 else 13,
            vocab=None if i % 8 == 0 else int(rng.choice([1, 2, 3, 5, 17, 64])),
            faults=i % 3 == 0,
        )
        count, close = check(case)
        requests += count
        excused += close
    assert excused < 0.02 * requests


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
@pytest.mark.parametrize("law", ["almost-equal", "disjoint", "narrow-draft", "confident-draft"])
def test_named_laws(law: str, rule: str, proposal: str) -> None:
    """Laws whose residuals vanish or whose draft runs out, on one star."""
    target, draft, why = cases.LAWS[law]
    p, q = (torch.from_numpy(cases.logits_of(row)).float() for row in (target, draft))
    rng = np.random.default_rng(0)
    batch, parents = 4, torch.tensor([-1, 0, 0, 0])
    tokens = torch.zeros(batch, 4, dtype=torch.int64)
    for b in range(batch):
        tokens[b, 1:] = torch.tensor(cases.draw_children(rng, np.array(draft), 3, proposal))
    uniforms = torch.from_numpy(rng.random((batch, 6)).astype(np.float32)).clamp_(max=1 - 2**-24)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-24
    rows = torch.zeros(batch, 4, dtype=torch.int32)
    options = {"rule": rule, "proposal": proposal, "target_rows": rows, "draft_rows": rows}
    check(cases.Case((p[None], q[None], tokens, parents, uniforms), options, f"{law} ({why})"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab", [1024, 1025, 5000, 131_072])
def test_long_rows(vocab: int, rule: str) -> None:
    """Rows of one block, of a block and a token, of several tiles, and of the size that models have; with filters."""
    for proposal in ("without_replacement", "greedy") if vocab < 100_000 else ("without_replacement",):
        rng = np.random.default_rng([vocab, RULES.index(rule)])
        case = cases.random_case(
            rng, rule=rule, proposal=proposal, batch=1, nodes=3, vocab=vocab, family="near", dtype=torch.bfloat16
        )
        case.options["sampling"] = SamplingParams(temperature=0.8, top_k=200, top_p=0.9, min_p=0.001)
        check(case)


# ---- what may not matter


def some_case(seed: int, rule: str, proposal: str, **options: object) -> cases.Case:
    """Four requests over three draw blocks, with tensors as sampling parameters."""
    rng = np.random.default_rng(seed)
    case = cases.random_case(
        rng, rule=rule, proposal=proposal, batch=4, nodes=6, vocab=2500, family="near", filters=False, **options
    )
    case.options.pop("target_rows", None), case.options.pop("draft_rows", None)
    target, draft = (torch.from_numpy(rng.normal(size=(4, 6, 2500))).bfloat16() for _ in range(2))
    case.options["sampling"] = SamplingParams(temperature=torch.tensor([1.0, 0.7, 0.0, 1.3]))
    tokens, parents, uniforms = case.arguments[2:]
    parents = parents.expand(4, 6) if parents.dim() == 1 else parents
    case.options["max_depth"] = 5
    return cases.Case(
        (target, None if proposal == "point" else draft, tokens, parents, uniforms), case.options, case.note
    )


def of_requests(case: cases.Case, index: list[int]) -> Verified:
    sampling = SamplingParams(temperature=case.options["sampling"].temperature[index])
    arguments = [None if x is None else x[index] for x in case.arguments]
    return verify(*arguments, **{**case.options, "sampling": sampling}, backend="triton")


def assert_equal(found: Verified, wanted: Verified) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_the_batch_does_not_matter(rule: str, proposal: str) -> None:
    case = some_case(1, rule, proposal)
    whole = of_requests(case, [0, 1, 2, 3])
    order = [2, 0, 3, 1]
    assert_equal(of_requests(case, order), Verified(*(field[order] for field in whole)))
    assert_equal(of_requests(case, [3]), Verified(*(field[3:] for field in whole)))


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_padding_strides_and_neighbours_do_not_matter(rule: str, proposal: str) -> None:
    """Nodes of padding at the end, rows inside wider ones, NaN in all that lies around."""
    case = some_case(2, rule, proposal)
    plain = verify(*case.arguments, **case.options, backend="triton")
    target, draft, tokens, parents, uniforms = case.arguments

    def widened(logits: torch.Tensor | None) -> torch.Tensor | None:
        if logits is None:
            return None
        wide = torch.full((5, 9, 2503), float("nan"), dtype=logits.dtype)
        wide[:4, :6, 1:2501] = logits
        return wide[:4, :8, 1:2501]

    padding = torch.full((4, 2), -1, dtype=parents.dtype)
    coins = torch.cat([uniforms[:, :6], torch.zeros(4, 2), uniforms[:, 6:]], 1)
    more_tokens, more_parents = torch.cat([tokens, 0 * tokens[:, :2]], 1), torch.cat([parents, padding], 1)
    arguments = widened(target), widened(draft), more_tokens, more_parents, coins
    assert_equal(verify(*arguments, **case.options, backend="triton"), plain)


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_the_launch_does_not_matter(rule: str, proposal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masses are sums of whole numbers: even their last bits are the same."""
    case = some_case(3, rule, proposal)
    results = []
    for tile_blocks in (1, 4):
        monkeypatch.setattr(kernels, "choose_launch", lambda vocab, tiles=tile_blocks: Launch(tiles, 4))
        results.append(verify(*case.arguments, **case.options, backend="triton"))
    assert_equal(*results)


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_row_ends_its_own_request_alone(rule: str) -> None:
    case = some_case(4, rule, "without_replacement")
    whole = of_requests(case, [0, 1, 2, 3])
    case.arguments[0][1, 0, 7] = float("nan")
    broken = of_requests(case, [0, 1, 2, 3])
    others = [0, 2, 3]
    assert_equal(Verified(*(x[others] for x in broken)), Verified(*(x[others] for x in whole)))
    assert broken.status[1] == Status.NAN_ROW and broken.tokens[1, 0] == 0 and broken.length[1] == 1


def test_a_batch_of_none() -> None:
    found = verify(
        torch.zeros(0, 2, 5), None, torch.zeros(0, 2, dtype=torch.int64), torch.tensor([-1, 0]), torch.zeros(0, 4),
        proposal="point", backend="triton",
    )  # fmt: skip
    assert [tuple(x.shape) for x in found] == [(0, 2), (0,), (0, 2), (0,)]


# ---- through torch


def test_fake_tensors_see_shapes_alone() -> None:
    with FakeTensorMode():
        found = verify(
            torch.empty(3, 4, 9), torch.empty(3, 4, 9), torch.empty(3, 4, dtype=torch.int64),
            torch.empty(4, dtype=torch.int64), torch.empty(3, 6), backend="triton",
        )  # fmt: skip
    assert [tuple(x.shape) for x in found] == [(3, 4), (3,), (3, 4), (3,)]


def test_compiles_into_one_graph() -> None:
    case = some_case(5, "recursive", "without_replacement")
    target, draft, tokens, parents, uniforms = case.arguments

    def doubled(logits: torch.Tensor) -> torch.Tensor:
        return verify(2 * logits, draft, tokens, parents, uniforms, backend="triton").tokens + 1

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert compiled(target).equal(doubled(target))


# ---- laws

REQUESTS = 200
SMALLEST_P = 1e-4
CONTROL_P = 1e-6
TREE = [-1, 0, 0]


def next_tokens(rule: str, proposal: str, *, sort_candidates: bool = False) -> dict[int, int]:
    """How often each token comes first; candidates drawn by `draw_candidates`.

    Args:
        sort_candidates: a mistake: hand them over in the order of q.
    """
    p, q = (torch.tensor(cases.logits_of(row)).float() for row in cases.LAWS["overlap"][:2])
    seeds = torch.arange(REQUESTS)
    candidates = draw_candidates(q.expand(REQUESTS, -1), 2, seeds, 0, proposal=proposal)
    if sort_candidates:
        candidates = candidates.gather(1, q[candidates].argsort(1, descending=True))
    # leaves that are virtual have no row to walk into, which is all a law of one token needs
    target_rows = torch.tensor([0, -1, -1], dtype=torch.int32).expand(REQUESTS, -1)
    result = verify(
        p[None], q[None], torch.cat([torch.zeros(REQUESTS, 1, dtype=torch.int64), candidates], 1), torch.tensor(TREE),
        draw_uniforms(seeds, 0, len(TREE) + 2), proposal=proposal, rule=rule, target_rows=target_rows,
        draft_rows=target_rows.clamp(min=0), backend="triton",
    )  # fmt: skip
    assert not result.status.any()
    return dict(zip(*(x.tolist() for x in result.tokens[:, 0].unique(return_counts=True)), strict=True))


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_the_next_token_has_the_law_of_the_target(rule: str, proposal: str, p_value: PValue) -> None:
    assert p_value(enumerate(cases.LAWS["overlap"][0]), next_tokens(rule, proposal)) > SMALLEST_P


@pytest.mark.parametrize("rule", RULES)
def test_control_candidates_sorted_by_q(rule: str, p_value: PValue) -> None:
    counts = next_tokens(rule, "without_replacement", sort_candidates=True)
    assert p_value(enumerate(cases.LAWS["overlap"][0]), counts) < CONTROL_P
