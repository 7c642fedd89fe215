"""`verify` in Triton with rows that are no logits over one vocabulary, and with chosen siblings: as in torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import cases
import numpy as np
import pytest
import torch
import triton_interpreter
from cases import EXTRAS, NEAR, extended
from test_verify_inputs import (  # noqa: F401 - here they run with the other backend
    test_a_draft_row_is_asked_for_only_where_there_are_candidates,
    test_a_parent_of_64_bits_is_not_cut_to_32,
    test_a_top_k_that_is_no_whole_number_is_out_of_range,
    test_the_lowest_temperatures,
    test_what_is_no_tree_has_no_wrong_tokens,
)

from mcsd_kernels import Status, _verify_triton, reference, verify
from mcsd_kernels._schedule import Launch

triton_interpreter.install()


def launch_by(monkeypatch: pytest.MonkeyPatch, schedule: str, waves: Callable[[], int] = lambda: 1) -> None:
    """Every call by this schedule, in small tiles."""
    monkeypatch.setattr(_verify_triton, "choose_launch", lambda *_: Launch(schedule, 1, 4, 2, waves()))


@pytest.mark.parametrize("schedule", ["walk", "split"])
@pytest.mark.parametrize("proposal", cases.PROPOSALS)
@pytest.mark.parametrize("rule", cases.RULES)
def test_triton_answers_as_torch_does(monkeypatch: pytest.MonkeyPatch, rule: str, proposal: str, schedule: str) -> None:
    """Each extra alone, then some at once; decisions that float32 may take either way apart."""
    rng = np.random.default_rng([cases.RULES.index(rule), cases.PROPOSALS.index(proposal), schedule == "split"])
    launch_by(monkeypatch, schedule, lambda: int(rng.integers(0, 5)))
    mixed = [set(rng.choice(EXTRAS, 3, replace=False)) for _ in range(2)]
    for extras in [*({extra} for extra in EXTRAS), *mixed]:
        if "probabilities" in extras:
            extras.discard("bitmask")
        nodes, vocab = int(rng.integers(2, 8)), int(rng.choice([2, 5, 17, 64]))
        compare(extended(rng, extras, rule=rule, proposal=proposal, nodes=nodes, vocab=vocab, batch=2))


@pytest.mark.parametrize("vocab", [1023, 1025, 2500])
@pytest.mark.parametrize("extra", EXTRAS)
def test_rows_of_several_draw_blocks(monkeypatch: pytest.MonkeyPatch, extra: str, vocab: int) -> None:
    rng = np.random.default_rng([EXTRAS.index(extra), vocab])
    for schedule in ("walk", "split"):
        launch_by(monkeypatch, schedule)
        compare(extended(rng, {extra}, nodes=4, vocab=vocab, batch=1))


def compare(case: cases.Case) -> None:
    """Both backends answer alike where the oracle's decisions are not close."""
    wanted = verify(*case.arguments, **case.options, backend="torch")
    got = verify(*case.arguments, **case.options, backend="triton")
    _, margin = reference.verify(*case.arguments, **case.options, return_margin=True)
    for request in np.flatnonzero(np.asarray(margin) > NEAR):
        for part, expected in zip(got, wanted, strict=True):
            assert part[request].equal(expected[request]), case.note


@pytest.mark.parametrize("schedule", ["walk", "split"])
@pytest.mark.parametrize("rule", cases.RULES)
def test_columns_of_one_token_add_up(monkeypatch: pytest.MonkeyPatch, rule: str, schedule: str) -> None:
    launch_by(monkeypatch, schedule)
    rng = np.random.default_rng(1)
    for ids in ([3, 3, 0, 1, 3], [0, 0, 0, 0, 0], [5, 9, -1, 2, 2], [7, -7, 8, 99, -1]):
        for draft_inputs in ("logits", "probabilities"):
            target = torch.from_numpy(rng.normal(size=(2, 4, 8)).astype(np.float32))
            draft = torch.from_numpy(rng.normal(size=(2, 4, 5)).astype(np.float32))
            draft = draft if draft_inputs == "logits" else draft.softmax(-1)
            tokens = torch.from_numpy(rng.choice([0, 2, 3, 5], size=(2, 4)))
            uniforms = torch.from_numpy(rng.random((2, 6)).astype(np.float32))
            options = {"proposal": "with_replacement", "rule": rule, "draft_inputs": draft_inputs}
            options["draft_ids"] = torch.tensor(ids)
            parents = torch.tensor([-1, 0, 0, 1])
            compare(cases.Case((target, draft, tokens, parents, uniforms), options, f"ids {ids}, {draft_inputs}"))


@pytest.mark.parametrize("schedule", ["walk", "split"])
@pytest.mark.parametrize("vocab", [40, 1100])
def test_a_broken_law_ends_its_own_request(monkeypatch: pytest.MonkeyPatch, vocab: int, schedule: str) -> None:
    launch_by(monkeypatch, schedule)
    target = torch.softmax(torch.randn(4, 2, vocab, generator=torch.Generator().manual_seed(0)), -1)
    draft = torch.zeros(4, 2, vocab)
    draft[:, :, 3] = 1.0
    target[:, 0, 3] = 0.0  # the candidate is rejected, so that the whole row is read
    target[1, 0, 7] = torch.nan
    target[2] = 0.0
    tokens, parents = torch.tensor([[0, 3]]).expand(4, 2), torch.tensor([-1, 0])
    out = verify(target, draft, tokens, parents, torch.full((4, 4), 0.5), inputs="probabilities", backend="triton")
    assert out.status.tolist() == [0, Status.NAN_ROW, Status.EMPTY_ROW, 0]
    assert out.length.tolist() == [1, 1, 1, 1]
    leaf = target[:3, :1].clone()
    leaf[0, 0, vocab - 1], leaf[1], leaf[2] = torch.nan, 0.0, 1 / vocab
    call = (leaf, None, tokens[:3, :1], parents[:1], torch.full((3, 3), 0.5))
    out = verify(*call, proposal="point", inputs="probabilities", backend="triton")
    assert out.status.tolist() == [Status.NAN_ROW, Status.EMPTY_ROW, 0]


@pytest.mark.parametrize("schedule", ["walk", "split"])
@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", ["without_replacement", "greedy", "point"])
def test_a_leaf_without_a_law_ends_its_request_as_the_oracle_says(
    monkeypatch: pytest.MonkeyPatch, proposal: str, rule: str, schedule: str
) -> None:
    launch_by(monkeypatch, schedule)
    case = cases.leaves_without_law(40, proposal, rule)
    out = verify(*case.arguments, **case.options, backend="triton")
    wanted = reference.verify(*case.arguments, **case.options)
    assert all(torch.equal(mine, its) for mine, its in zip(out, wanted, strict=True)), (out, wanted)


def test_the_interpreter_as_it_comes() -> None:
    """These tests repair and sharpen Triton's interpreter; a user has it as it is."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", _AS_IT_COMES], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["12"]


_AS_IT_COMES = """
import numpy as np
import torch
from mcsd_kernels import SamplingParams, draw_candidates, draw_uniforms, verify

np.seterr(all="ignore")
target, draft = (2 * torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(n)) for n in range(2))
parents, seeds = torch.tensor([-1, 0, 0, 1]), torch.arange(2)
tokens, equal = torch.zeros(2, 4, dtype=torch.long), 0
for proposal, dtype in (
    ("without_replacement", torch.float32), ("with_replacement", torch.bfloat16), ("greedy", torch.float32),
    ("without_replacement", torch.bfloat16), ("greedy", torch.bfloat16), ("point", torch.bfloat16),
):
    sampling = SamplingParams() if dtype is torch.float32 else SamplingParams(0.8, 20, 0.95)
    rows = target.to(dtype), draft.to(dtype)
    uniforms = draw_uniforms(seeds, 1, 6, backend="triton")
    for node, width in ((0, 2), (1, 1)):
        if proposal != "point":
            drawn = [
                draw_candidates(
                    rows[1][:, node], width, seeds, 1, proposal=proposal, sampling=sampling, backend=backend
                )
                for backend in ("torch", "triton")
            ]
            assert torch.equal(*drawn)
            tokens[:, 2 * node + 1 : 2 * node + 1 + width] = drawn[0]
        else:
            tokens[:, 1:] = torch.tensor([3, 7, 5])
    for rule in ("recursive", "traversal"):
        both = [
            verify(*rows, tokens, parents, uniforms, proposal=proposal, rule=rule, sampling=sampling, backend=backend)
            for backend in ("torch", "triton")
        ]
        assert all(map(torch.equal, *both)), (proposal, rule, dtype, both)
        equal += 1
print(equal)
"""
