"""`verify` in Triton, interpreted: both schedules against the oracle token for token, laws, and what may not matter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import cases
import numpy as np
import pytest
import torch
import triton_interpreter
from cases import PROPOSALS, RULES
from scipy.spatial import cKDTree
from scipy.stats import qmc
from torch._subclasses.fake_tensor import FakeTensorMode

from mcsd_kernels import SamplingParams, Status, Verified, draw_candidates, reference, verify
from mcsd_kernels import _verify_triton as kernels
from mcsd_kernels._schedule import SCHEDULES, Launch, choose_launch
from mcsd_kernels.random import CANDIDATE_STREAM
from mcsd_kernels.random import uniforms as philox_uniforms

triton_interpreter.install()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp(-inf - x) and the like

EVERY = [pytest.param(rule, proposal, id=f"{rule}-{proposal}") for rule in RULES for proposal in PROPOSALS]
# For each rule, proposal and schedule, of one request or three: 1,120 requests in all.
CALLS = 46
# A float32 decision may differ from the float64 one where the latter is closer than this to its threshold.
CLOSE_CALL = 1e-5


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the launch of the calls that follow."""

    def use(schedule: str, *, waves: int = 3, tile_blocks: int = 1, chunk_blocks: int = 2) -> None:
        launch = Launch(schedule, tile_blocks, 4, chunk_blocks, waves)
        monkeypatch.setattr(kernels, "choose_launch", lambda *call: launch)

    return use


def differences(found: Verified, wanted: Verified) -> list[int]:
    """The requests whose path, length, tokens or status differ."""
    same = torch.stack([(a == b).reshape(len(wanted.length), -1).all(1) for a, b in zip(found, wanted, strict=True)])
    return (~same.all(0)).nonzero().flatten().tolist()


def check(case: cases.Case) -> tuple[Verified, int]:
    """Compare one call with the oracle; returns its result and how many requests differ, by a close call."""
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
    return found, len(wrong)


@pytest.mark.parametrize("kind", cases.CONFIDENT_KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("proposal", ["without_replacement", "greedy"])
@pytest.mark.parametrize("rule", RULES)
def test_what_a_confident_draft_leaves_is_a_law(
    rule: str, proposal: str, schedule: str, kind: str, scheduled: Callable[..., None]
) -> None:
    """1 - q is of no use where q is nearly 1, and so is a sum in units of what a law sums up to."""
    scheduled(schedule)
    for gap in (12, 39, 41, 60):
        case, first = cases.confident_draft(gap, rule, proposal, kind)
        assert check(case)[0].tokens[:, 0].tolist() == first, gap
    case, _ = cases.confident_draft(63, rule, proposal, kind)
    case.arguments[4][:, 2] = 0.0  # as lucky as can be, but from as good as nothing
    assert check(case)[0].length.tolist() == [1, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_equals_the_oracle(rule: str, proposal: str, schedule: str, scheduled: Callable[..., None]) -> None:
    """Random calls, a third of them with a fault; mostly small, for the interpreter counts operations."""
    requests = excused = 0
    for i in range(CALLS):
        rng = np.random.default_rng([SCHEDULES.index(schedule), RULES.index(rule), PROPOSALS.index(proposal), i])
        scheduled(schedule, waves=i % 4)
        case = cases.random_case(
            rng,
            rule=rule,
            proposal=proposal,
            batch=1 if i % 4 else 3,
            nodes=int(rng.integers(1, 7)) if i % 9 else 13,
            vocab=None if i % 11 == 0 else int(rng.choice([1, 2, 3, 5, 17, 64])),
            filters=i % 3 == 1,
            faults=i % 3 == 0,
        )
        found, close = check(case)
        requests += len(found.length)
        excused += close
    assert excused <= 0.02 * requests


@pytest.mark.parametrize(("rule", "proposal"), EVERY)
@pytest.mark.parametrize("law", ["almost-equal", "disjoint", "narrow-draft", "confident-draft"])
def test_named_laws(law: str, rule: str, proposal: str, scheduled: Callable[..., None]) -> None:
    """Laws whose residuals vanish or whose draft runs out, on one star; the schedules agree on every bit."""
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
    case = cases.Case((p[None], q[None], tokens, parents, uniforms), options, f"{law} ({why})")
    scheduled("walk")
    walk, _ = check(case)
    scheduled("split")
    assert_equal(verify(*case.arguments, **case.options, backend="triton"), walk)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab", [1024, 1025, 4096, 131_072])
def test_long_rows(vocab: int, rule: str, scheduled: Callable[..., None]) -> None:
    """Rows of one block, of a block and a token, of several tiles, and of the size that models have; with filters."""
    for proposal in ("without_replacement", "greedy") if vocab < 100_000 else ("without_replacement",):
        rng = np.random.default_rng([vocab, RULES.index(rule)])
        case = cases.random_case(
            rng, rule=rule, proposal=proposal, batch=1, nodes=3, vocab=vocab, family="near", dtype=torch.bfloat16
        )
        case.options["sampling"] = SamplingParams(temperature=0.8, top_k=200, top_p=0.9, min_p=0.001)
        scheduled("split" if proposal == "greedy" else "walk", tile_blocks=16 if vocab > 100_000 else 2)
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
    parents = parents.expand(4, 6).clone()
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
def test_the_schedule_does_not_matter(rule: str, proposal: str, scheduled: Callable[..., None]) -> None:
    """Masses are sums of whole numbers and scalars one program: even the last bits are the same."""
    case = some_case(3, rule, proposal)
    case.arguments[3][:, 1:] = torch.tensor([0, 0, 1, 1, 2])
    case.arguments[2][:, 1:] = torch.from_numpy(np.random.default_rng(3).permutation(2500)[:5])
    case.arguments[4][1] = 1 - 2**-24  # everything is rejected
    scheduled("walk", tile_blocks=4)
    wanted = of_requests(case, [0, 1])
    for waves, chunk_blocks in ((1, 2), (9, 3)):
        scheduled("split", waves=waves, tile_blocks=1 + waves % 2, chunk_blocks=chunk_blocks)
        assert_equal(of_requests(case, [0, 1]), wanted)


def test_sweeps_are_made_in_waves_and_read(scheduled: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sweeps a walk of schedule "split" would find nothing: they are not there for show."""
    case = some_case(3, "traversal", "without_replacement")
    case.arguments[4].fill_(1 - 2**-24)
    scheduled("split", waves=9)
    wanted = verify(*case.arguments, **case.options, backend="triton")

    class Nothing:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda **arguments: arguments["masses_ptr"].zero_()

    monkeypatch.setattr(kernels, "_sweep_kernel", Nothing())
    found = verify(*case.arguments, **case.options, backend="triton")
    assert any(not a.equal(b) for a, b in zip(found, wanted, strict=True))


def test_the_choice_of_a_launch() -> None:
    device = torch.device("cpu")
    assert choose_launch(1, 64, 131_072, device).schedule == "split"
    assert choose_launch(512, 64, 131_072, device).schedule == "walk"
    assert choose_launch(1, 64, 1000, device).schedule == "walk"
    assert choose_launch(1, 1, 131_072, device).waves == 0


def test_bytes_of_a_small_call() -> None:
    """Two requests of three nodes, width 3, five bf16 logits a row, int64 tokens and parents."""
    small, answer = 3 * 16 + 5 * 4, 3 * 12 + 8
    assert kernels.prepare_bytes(2, 3, 3) == 2 * (small + 9 * 3 * 4 + answer)
    assert kernels.columns_bytes(5, 3) == 3 * 8 + 7 * 4 + 2 * 3 * 4
    assert kernels.statistics_bytes(4, 5, 2) == 4 * (10 + 8)
    assert kernels.records_bytes(4, 5) == 4 * (8 + 64)
    assert kernels.sweep_bytes(2, 5, 2) == 2 * (20 + 8)
    assert kernels.walk_bytes(4, 2, 3, 5, 2) == 40 + 2 * answer
    assert kernels.verify_bytes(4, 2, 3, 3, 5, 2) == 40 + 2 * (small + answer)


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_row_ends_its_own_request_alone(rule: str) -> None:
    case = some_case(4, rule, "without_replacement")
    whole = of_requests(case, [0, 1, 2, 3])
    case.arguments[0][1, 0, 7] = float("nan")
    broken = of_requests(case, [0, 1, 2, 3])
    others = [0, 2, 3]
    assert_equal(Verified(*(x[others] for x in broken)), Verified(*(x[others] for x in whole)))
    assert broken.status[1] == Status.NAN_ROW and broken.tokens[1, 0] == 0 and broken.length[1] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("rule", "proposal"), EVERY)
def test_the_rows_of_a_refused_leaf_are_not_read(
    rule: str, proposal: str, schedule: str, scheduled: Callable[..., None]
) -> None:
    scheduled(schedule)
    for kind in cases.LEAVES:
        call = cases.refused_leaf(kind)
        found = verify(**call, rule=rule, proposal=proposal, backend="triton")
        assert not differences(found, reference.verify(**call, rule=rule, proposal=proposal)), kind
        assert found.status.tolist() == [0, 0] and found.tokens[0, 0] == found.tokens[1, 0]


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

# A fixed net of points in the unit cube in place of random numbers: two for the draws of the candidates (seeds are
# chosen whose own numbers are nearest), two for their coins, one for the last token. Of the right law this net sees
# LAW_ERROR at most, of one that is wrong by a total variation of 0.02 more; as many random numbers would see 0.1.
POINTS = 128
NET = 109
LAW_ERROR = 0.0127
TREE = [-1, 0, 0]
TARGET, DRAFT, _ = cases.LAWS["overlap"]


@cache
def net() -> np.ndarray:
    return qmc.Sobol(5, seed=NET).random(POINTS)


@cache
def candidates_of(proposal: str) -> torch.Tensor:
    """`[POINTS, 2]`: drawn by Triton's `draw_candidates`."""
    pool, zero = torch.arange(1 << 16), torch.zeros((), dtype=torch.int64)
    places = philox_uniforms(pool, zero, zero, CANDIDATE_STREAM, 4).numpy()[:, [1, 3]]
    seeds = pool[torch.from_numpy(cKDTree(places).query(net()[:, :2])[1])]
    q = torch.tensor(cases.logits_of(DRAFT)).float()
    return draw_candidates(q.expand(POINTS, -1), 2, seeds, 0, proposal=proposal, backend="triton")


def law_error(
    rule: str, proposal: str, *, law: list[float] = TARGET, backend: str = "triton", sort_candidates: bool = False
) -> float:
    """Total variation between TARGET and the law of the first token.

    Args:
        law: the target's in fact.
        sort_candidates: a mistake: hand them over in the order of q.
    """
    p, q = (torch.tensor(cases.logits_of(row)).float() for row in (law, DRAFT))
    candidates = candidates_of(proposal)
    if sort_candidates:
        candidates = candidates.gather(1, q[candidates].argsort(1, descending=True))
    uniforms = torch.zeros(POINTS, len(TREE) + 2)
    uniforms[:, [1, 2, 4]] = torch.from_numpy(net()[:, 2:]).float().clamp(max=1 - 2**-24)
    # leaves that are virtual have no row to walk into, which is all a law of one token needs
    target_rows = torch.tensor([0, -1, -1], dtype=torch.int32).expand(POINTS, -1)
    result = verify(
        p[None], q[None], torch.cat([torch.zeros(POINTS, 1, dtype=torch.int64), candidates], 1), torch.tensor(TREE),
        uniforms, proposal=proposal, rule=rule, target_rows=target_rows, draft_rows=target_rows.clamp(min=0),
        backend=backend,
    )  # fmt: skip
    assert not result.status.any()
    frequencies = np.bincount(result.tokens[:, 0], minlength=len(TARGET)) / POINTS
    return float(np.abs(frequencies - TARGET).sum() / 2)


@pytest.mark.parametrize(
    ("rule", "proposal"),
    [
        ("recursive", "without_replacement"),
        ("recursive", "greedy"),
        ("traversal", "with_replacement"),
        ("traversal", "point"),
    ],
)
def test_the_next_token_has_the_law_of_the_target(rule: str, proposal: str) -> None:
    assert law_error(rule, proposal) <= LAW_ERROR


def test_control_candidates_sorted_by_q() -> None:
    assert law_error("recursive", "without_replacement", sort_candidates=True) > 10 * LAW_ERROR


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_control_a_law_that_is_wrong_by_two_percent(proposal: str) -> None:
    """Of 20 ways to move the mass at least 19 are seen; in torch, which gives the same tokens and is faster here."""
    seen = 0
    for i, j in itertools.permutations(range(len(TARGET)), 2):
        law = list(TARGET)
        law[i], law[j] = law[i] + 0.02, law[j] - 0.02
        seen += law_error("recursive", proposal, law=law, backend="torch") > LAW_ERROR
    assert seen >= 19
