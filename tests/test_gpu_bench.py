"""`bench/gpu.sh` without a GPU: a smoke run of all of it, and its pure parts."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from conftest import PValue
from torch._subclasses.fake_tensor import FakeTensorMode

import mcsd_kernels
from bench.gpu import __main__ as gpu
from bench.gpu import agreement, device, floor, inputs, laws, plan, rivals, rows, sanitizer, summary, units, verify
from mcsd.integrations.flashinfer import chain_speculative_sampling
from mcsd_kernels import SamplingParams, Verified, _verify_triton, draw_candidates, draw_uniforms, reference

ROOT = Path(__file__).parents[1]


def test_smoke(tmp_path: Path) -> None:
    """Every part runs in the interpreter, and nothing is written beside the temporary folder."""
    before = sorted((ROOT / "bench" / "results").iterdir())
    environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path), "OUT": str(tmp_path / "not-here")}
    run = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "all", "--smoke"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MISSED" in run.stdout  # the summary's verdicts; an interpreter meets no target
    (folder,) = tmp_path.glob("bench-gpu-*")
    for part in gpu.PARTS:
        found = list(rows.read(rows.path_of(folder, part)))
        assert found and all(row["smoke"] and len(row["kernels"]) == 12 for row in found), part
        assert {row["status"] for row in found} <= {"ok", "skipped"}, part
    timed = [row for row in rows.read(rows.path_of(folder, "verify")) if row["status"] == "ok"]
    assert {len(row["launches"]) for row in timed} == {2}
    assert all(row["scratch_bytes"] > 0 and row["scratch_bytes"] % 512 == 0 for row in timed)
    assert all(row["traffic_bytes"] > 0 for row in timed)
    assert not any(row["rivals_without_times"] for row in timed)
    assert {"textbook", "compiled textbook", "torch softmax"} <= set(timed[0]["rivals"])
    assert sorted((ROOT / "bench" / "results").iterdir()) == before and not (tmp_path / "not-here").exists()


# ---- rows


def test_percentiles() -> None:
    assert rows.percentile([3.0], 0.2) == 3.0
    assert rows.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert rows.spread(list(range(11))) == {"median": 5, "p20": 2, "p80": 8}
    assert rows.percentile([0.0, 1.0], 0.2) == pytest.approx(0.2)


ORIGIN = {"device": "a", "driver": "1", "kernels": "b", "torch": "c", "triton": "d", "commit": "e", "smoke": False}


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    """Rows of other kernels do not count, nor errors that are tried again, nor a line that a kill has cut short."""

    def add(unit: str, date: str = "2026-01-02", **more: Any) -> None:
        rows.append(tmp_path, "verify", [ORIGIN | {"unit": unit, "status": "ok", "date": date} | more])

    add("first")
    add("of other kernels", kernels="x")
    with open(rows.path_of(tmp_path, "verify"), "a") as file:
        file.write('{"unit": "cut sho')
    add("wrong", status="error")
    add("old", "2026-01-01")
    folders = [tmp_path / "none", tmp_path]
    assert rows.done(folders, "verify", ORIGIN) == {"first", "wrong", "old"}
    assert rows.done(folders, "verify", ORIGIN, since="2026-01-02") == {"first", "wrong"}
    assert rows.done(folders, "verify", ORIGIN, errors_since="2026-01-03") == {"first", "old"}
    assert rows.done(folders, "checks", ORIGIN) == set()


# ---- what is measured


def test_trees_and_cases() -> None:
    assert [len(plan.Tree(tree).parents) for tree in plan.TREES] == [5, 29, 61, 64, 256]
    assert plan.Tree((2, 1)).parents == [-1, 0, 0, 1, 2] and plan.Tree((2, 1)).children() == {0: [1, 2], 1: [3], 2: [4]}
    cases = list(plan.verify_cases())
    assert len({case.unit for case in cases}) == len(cases)
    assert [(case.batch, case.nodes, case.vocab) for case in cases[:3]] == [(b, 64, 128_256) for b in (1, 64, 256)]
    matrix = {(case.batch, case.tree, case.vocab) for case in cases if case.rivals == ("preparation", "textbook")}
    assert matrix == {(b, tree, v) for b in plan.BATCHES for tree in plan.TREES for v in plan.VOCABULARIES}
    compiled = [case for case in cases if "compiled textbook" in case.rivals]
    assert len(compiled) == 9 and {case.vocab for case in compiled} == {128_256}
    names = [case.unit for case in plan.row_cases()]
    assert len(set(names)) == len(names)


def test_visited_rows() -> None:
    """A leaf has no draft row, nor has a node at the depth that the caller allows."""
    parents = plan.Tree((2, 1)).parents
    path = torch.tensor([[0, 2, 4], [0, 1, -1], [0, -1, -1]])
    length = torch.tensor([3, 2, 1])
    assert floor.visited_rows(path, length, parents, 2) == (6, 5)
    assert floor.visited_rows(path, length, parents, 1) == (6, 3)
    assert floor.microseconds(8e6, 4e12) == pytest.approx(2.0)
    assert floor.verify_bytes(3, 2, 1000, 2, batch=1, nodes=5) == 5 * 2000 + 5 * 12 + 7 * 4 + 8


@pytest.mark.parametrize(
    ("rule", "proposal", "waves", "swept"),
    [
        pytest.param("recursive", "without_replacement", 6, 6, id="every-candidate"),
        pytest.param("recursive", "without_replacement", 1, 3, id="first-candidates"),
        pytest.param("traversal", "without_replacement", 2, 5, id="waves-from-the-root"),
        pytest.param("recursive", "greedy", 1, 3, id="the-drawn-child-of-each-node"),
        pytest.param("traversal", "greedy", 1, 2, id="not-below-a-most-probable-one"),
        pytest.param("recursive", "point", 0, 0, id="none"),
    ],
)
def test_sweeps(rule: str, proposal: str, waves: int, swept: int) -> None:
    """A root of two children, which have two each."""
    assert floor.sweeps([-1, 0, 0, 1, 1, 2, 2], rule, proposal, waves) == swept


def test_traffic() -> None:
    """Of each kernel that is launched; under "walk" the rows on the way, under "split" all rows and their sweeps."""
    case, width, rows_there = plan.Case(2, (2, 1), 40), 3, 2 * (5 + 3)
    logits = torch.zeros(2, 5, 40, dtype=torch.bfloat16)
    made = inputs.Inputs(logits, logits, plan.Tree(case.tree), case.rule, case.proposal, {}, torch.zeros(5))
    small = _verify_triton.prepare_bytes(2, 5, width)
    walk = _verify_triton.walk_bytes(7, 2, width, 40, 2)
    assert verify._traffic_bytes(case, made, ["_prepare_kernel", "_walk_kernel"], 7) == small + walk
    split = [
        "_prepare_kernel",
        "_statistics_kernel",
        "_records_kernel",
        "_sweep_kernel",
        "_sweep_kernel",
        "_walk_kernel",
    ]
    assert verify._traffic_bytes(case, made, split, 7) == small + sum(
        (
            _verify_triton.statistics_bytes(rows_there, 40, 2),
            _verify_triton.records_bytes(rows_there, 40),
            _verify_triton.sweep_bytes(2 * 4, 40, 2),
            _verify_triton.walk_bytes(0, 2, width, 40, 2),
        )
    )


@pytest.mark.parametrize("proposal", ["without_replacement", "point"])
@pytest.mark.parametrize("vocab", [32_000, 128_256])
@pytest.mark.parametrize("tree", [plan.CHAIN, plan.SMALL, plan.NODES_64, plan.NODES_256], ids=str)
def test_scratch(tree: tuple[int, ...], vocab: int, proposal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `verify` allocates and does not return is at most 1 % of its logits; tensors without data, no launch."""
    monkeypatch.setattr(triton.KernelInterface, "__getitem__", lambda kernel, grid: lambda **arguments: None)
    shape, nodes = plan.Tree(tree), len(plan.Tree(tree).parents)
    numbers: tuple[Any, ...] = ([1.0, 50.0, 0.9, 0.0], [None] * 4)
    for batch in (1, 64, 256):
        with FakeTensorMode():
            target = torch.empty(batch, nodes, vocab, dtype=torch.bfloat16)
            draft = None if proposal == "point" else torch.empty_like(target)
            tokens, parents = torch.zeros(batch, nodes, dtype=torch.int64), torch.zeros(nodes, dtype=torch.int32)
            arguments = (target, draft, tokens, parents, torch.empty(batch, nodes + 2), None, None, *numbers, *numbers)
            found = device.Cpu(plan.SMOKE).scratch_bytes(
                lambda given=arguments: _verify_triton.verify(*given, proposal, "recursive", shape.depth)  # type: ignore[misc]
            )
        logits = target.numel() * 2 * (1 if draft is None else 2)
        assert 0 < found <= verify.SCRATCH_SHARE * logits, f"batch {batch}: {found} of {logits} bytes"


def test_scratch_is_counted_at_its_height() -> None:
    """Two temporaries, never both there; a view and an operation in place take nothing; what is returned is none."""
    given = torch.ones(300)

    def call() -> torch.Tensor:
        first = given + 1  # 1,200 bytes, rounded to 1,536
        first.mul_(2).view(3, 100)
        kept = first[:10].clone()  # 40, rounded to 512
        del first
        return kept + torch.cat([given, given])[:10]  # 2,400, rounded to 2,560

    assert device.Cpu(plan.SMOKE).scratch_bytes(call) == 512 + 2560


def test_targets_and_summary(tmp_path: Path) -> None:
    case = plan.Case(1, plan.NODES_64, 128_256)
    row: dict[str, Any] = {
        "microseconds": {"median": 24.0, "p20": 23.0, "p80": 25.0},
        "over_floor": {"median": 3.0},
        "over_unfiltered": None,
        "rivals": {
            "softmax": {"kind": "preparation", "microseconds": {"median": 23.5}},
            "textbook": {"kind": "textbook", "microseconds": {"median": 9.0}},
        },
        "scratch_bytes": 11,
        "logits_bytes": 1000,
    }
    found = verify.targets(case, plan.NO_FILTERS, row)
    assert found == {"<= 25 us": True, "ahead of the preparation": False, "scratch <= 1 % of the logits": False}
    large = plan.Case(64, plan.NODES_64, 128_256)
    found = verify.targets(large, plan.NO_FILTERS, row | {"over_floor": {"median": 2.0}})
    assert found["<= 2 x floor"] and "<= 25 us" not in found
    filtered = row | {"over_unfiltered": {"median": 2.1}}
    assert not verify.targets(case, plan.FILTERED, filtered)["<= 2 x unfiltered"]

    shown = {
        **ORIGIN, **row, "date": "2026-01-01", "status": "ok", "bench": "gpu-verify",
        "case": case.as_row() | {"filters": "none"}, "floor": {"microseconds": 8.0}, "launches": ["one"],
        "targets": verify.targets(case, plan.NO_FILTERS, row), "unit": "u",
    }  # fmt: skip
    rows.append(tmp_path, "verify", [shown | {"date": "2025-12-31", "status": "error"}, shown])
    rows.append(
        tmp_path, "checks", [{**ORIGIN, "unit": "c", "status": "failed", "faults": ["off by one"], "date": "x"}]
    )
    text = summary.text([tmp_path])
    assert "failed: c: off by one" in text and "verify: 1 ok" in text
    assert [line.split()[-1] for line in text.splitlines()[-3:]] == ["met", "MISSED", "MISSED"]
    assert summary.failures([tmp_path], ["checks", "verify"]) == 1
    assert "no rows" in summary.text([tmp_path / "none"])


def test_chi_square() -> None:
    half = torch.tensor([0.5, 0.5])
    assert laws.chi_square(torch.tensor([50, 50]), half) == (pytest.approx(1.0), 0.0)
    p, variation = laws.chi_square(torch.tensor([60, 40]), half)
    assert p == pytest.approx(0.0455, abs=1e-4) and variation == pytest.approx(0.1)
    assert laws.chi_square(torch.tensor([60, 40]), torch.tensor([1.0, 0.0]))[0] == 0.0
    # the two rare outcomes are one cell of 4 where 4 are expected
    assert laws.chi_square(torch.tensor([96, 4, 0]), torch.tensor([0.96, 0.02, 0.02]))[0] == pytest.approx(1.0)


def test_expected_law_of_texts() -> None:
    target, _ = laws.tables(plan.SMOKE)
    law = laws.expected_law(target, 2, {}).reshape(4, 4)
    step = torch.softmax(target.double(), -1)
    assert torch.allclose(law, step[0][:, None] * step) and float(law.sum()) == pytest.approx(1.0)


# ---- rivals


def test_textbook_is_the_recursive_rule(p_value: PValue) -> None:
    """Not weakened, and not wrong either: the oracle's paths, and the target's law."""
    batch, vocab, tree = 4000, 7, plan.Tree((3, 2))
    target, draft = torch.randn(2, 1, len(tree.parents), vocab, generator=torch.Generator().manual_seed(0)).unbind()
    target, draft = (x.expand(batch, -1, -1) for x in (target, draft))
    seeds, tokens = torch.arange(batch), torch.zeros(batch, len(tree.parents), dtype=torch.int64)
    for node, children in tree.children().items():
        nodes = torch.full_like(seeds, node)
        drawn = draw_candidates(draft[:, node], len(children), seeds, 0, nodes=nodes, backend="torch")
        tokens[:, children] = drawn
    uniforms = draw_uniforms(seeds, 0, len(tree.parents) + 2, backend="torch")
    children = rivals.first_children(tree, torch.device("cpu"))
    path, length, last = rivals.textbook(target, draft, tokens, children, uniforms, tree.branching, plan.NO_FILTERS)
    some = slice(0, 100)
    oracle = reference.verify(
        target[some], draft[some], tokens[some], torch.tensor(tree.parents), uniforms[some], max_depth=2
    )
    assert float((path[some] == oracle.path).all(1).float().mean()) > 0.98
    assert path.shape == (batch, 3) and bool((length == (path >= 0).sum(1)).all())
    first = torch.where(length > 1, tokens.gather(1, path[:, 1:2].clamp(min=0))[:, 0], last)
    counts = dict(zip(*(x.tolist() for x in first.unique(return_counts=True)), strict=True))
    assert p_value(enumerate(reference.row_law(target[0, 0])), counts) > 1e-4


def test_rivals_give_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's place is taken by functions of the same names, so that what calls them has run."""
    package = types.ModuleType("flashinfer.sampling")
    package.softmax = lambda logits: torch.softmax(logits, -1)  # type: ignore[attr-defined]
    package.top_k_renorm_probs = lambda p, k: p / p.sum(-1, keepdim=True)  # type: ignore[attr-defined]
    package.top_p_renorm_probs = lambda p, share: p  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", package)
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    for filters in (plan.NO_FILTERS, plan.FILTERED):
        wanted = [reference.row_law(row, **plan.SAMPLING[filters]) for row in logits]  # type: ignore[arg-type]
        for name, prepare in rivals.preparations(filters, lambda function: function).items():
            if "row_cutoffs" in name or (filters == plan.FILTERED and "flashinfer" in name):
                continue
            assert np.abs(prepare(logits).numpy() - np.array(wanted)).max() < 1e-6, name
    assert rivals.flashinfer() is package
    top_p = rivals.cutoffs(logits, "top-p 0.9")
    assert top_p.tolist() == [reference.row_cutoff(row, top_p=0.9) for row in logits]
    assert rivals.cutoffs(logits, "top-k 50").tolist() == logits.float().amin(1).tolist()


def _shifted(found: tuple[torch.Tensor, ...], *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tokens, passed, count = found
    return torch.where(tokens >= 0, (tokens + 1) % 40, -1), passed, count


def _one_less(found: tuple[torch.Tensor, ...], *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tokens, passed, count = found
    return tokens, passed, (count - 1).clamp(min=0)


def _never_accepting(
    found: tuple[torch.Tensor, ...], draft: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Right, but for its law: every chain ends before its first draft, at the residual's most probable token."""
    tokens, passed, count = found
    first = (target[:, 0] - draft[:, 0]).argmax(1, keepdim=True)
    return torch.cat([first, torch.full_like(tokens[:, 1:], -1)], 1), passed, torch.zeros_like(count)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        pytest.param(None, None, id="right"),
        pytest.param(_shifted, "not the drafted one", id="other-tokens"),
        pytest.param(_one_less, "-1 elsewhere", id="a-count-that-does-not-fit"),
        pytest.param(_never_accepting, "drafts a chain are emitted, of", id="a-law-of-its-own"),
    ],
)
def test_the_chain_is_checked(
    wrong: Callable[..., Any] | None, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's rule and output, by our function of the same signature; a wrong answer has no time."""
    package = types.ModuleType("flashinfer.sampling")

    def sampling(draft: torch.Tensor, tokens: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
        found = chain_speculative_sampling(draft, tokens, target, **options, backend="torch")
        return found if wrong is None else wrong(found, draft, target)

    package.chain_speculative_sampling = sampling  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", package)
    monkeypatch.setattr(inputs, "draw_candidates", with_torch(draw_candidates))
    monkeypatch.setattr(inputs, "draw_uniforms", with_torch(draw_uniforms))
    made = inputs.Inputs.make(
        8, plan.Tree((1, 1, 1)), 40, "recursive", "without_replacement", 4, torch.device("cpu"), (plan.NO_FILTERS,)
    )
    for prepared in (False, True):
        found = verify._chain(units.Context(plan.SMOKE), made, prepared)
        if error is None:
            assert found.replay is not None and 0.5 < found.more["drafts_emitted"] < 3, found.error
        else:
            assert found.replay is None and error in str(found.error)


def with_torch(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation with another backend than it is asked for."""
    return lambda *arguments, **options: operation(*arguments, **options | {"backend": "torch"})


@pytest.mark.parametrize("tree", plan.TREES, ids=str)
@pytest.mark.parametrize("filters", [plan.NO_FILTERS, plan.FILTERED])
def test_memory_of_the_textbook(tree: tuple[int, ...], filters: str) -> None:
    batch, vocab, nodes = 64, 128_256, len(plan.Tree(tree).parents)
    with FakeTensorMode():
        logits, tokens = (
            torch.empty(batch, nodes, vocab, dtype=torch.bfloat16), torch.zeros(batch, nodes, dtype=torch.int64),
        )  # fmt: skip
        arguments = logits, logits, tokens, tokens[0], torch.empty(batch, nodes + 2), tree, filters
        found = device.Cpu(plan.SMOKE).scratch_bytes(lambda: rivals.textbook(*arguments))
    assert found <= verify.TEXTBOOK_TENSORS * batch * vocab * 4


def test_rows_are_compiled_for_few_and_for_many() -> None:
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(1)
        return graph.forward

    compiled, most = torch.compile(rivals.softmax, dynamic=False, backend=backend), 2 * rivals.PROCESSORS
    for count, wanted in ((5, 1), (most - 1, 1), (most, 2), (5000, 2), (6, 2)):
        compiled(rivals.any_number_of_rows(torch.zeros(count, 3)))
        assert len(seen) == wanted, count


def test_textbook_is_one_graph() -> None:
    """What `torch.compile(fullgraph=True)` takes; what it makes of it needs no test of ours."""
    tree, graphs = plan.Tree((2,)), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(rivals.textbook, fullgraph=True, dynamic=False, backend=backend)
    target, draft = torch.randn(2, 3, 3, 9)
    tokens, uniforms = torch.tensor([[0, 1, 2]] * 3), torch.full((3, 5), 0.5)
    arguments = target, draft, tokens, rivals.first_children(tree, target.device), uniforms, (2,), plan.NO_FILTERS
    assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), rivals.textbook(*arguments), strict=True))
    assert len(graphs) == 1


def test_a_wrong_answer_is_noticed() -> None:
    target = torch.zeros(1, 2, 3)
    arguments = target, target, torch.tensor([[0, 1]]), torch.tensor([-1, 0]), torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    right = reference.verify(*arguments)
    assert agreement.against_oracle(right, arguments, {}) == ([], 0)
    wrong = Verified(right.path, right.length, right.tokens + 1, right.status)
    lines, close = agreement.against_oracle(wrong, arguments, {})
    assert len(lines) == 1 and close == 0


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at a row's own shape, with the torch backend in the kernel's place."""
    tree, here = plan.Tree((2, 1)), {"backend": "torch"}
    target, draft = inputs.logits((3, 5, 40), torch.device("cpu"), seed=0)
    seeds, options = torch.arange(3), SamplingParams()
    tokens = inputs.draw_tree(draft, tree, seeds, 0, "without_replacement", options, "torch")
    sets = {plan.NO_FILTERS: [(tokens, draw_uniforms(seeds, 0, 7, backend="torch"))]}
    parents = torch.tensor(tree.parents, dtype=torch.int32)
    made = inputs.Inputs(target, draft, tree, "recursive", "without_replacement", sets, parents)
    monkeypatch.setattr(verify, "verify", lambda *a, **k: mcsd_kernels.verify(*a, **k | here))
    assert verify._wrong(made, plan.NO_FILTERS, plan.GPU) == []

    def off_by_one(*arguments: Any, **more: Any) -> Verified:
        right = mcsd_kernels.verify(*arguments, **more | here)
        return right._replace(tokens=right.tokens + 1)

    monkeypatch.setattr(verify, "verify", off_by_one)
    assert [line[:5] for line in verify._wrong(made, plan.NO_FILTERS, plan.GPU)] == ["at 0:", "at 2:"]


# ---- the lines that only a GPU runs, on a stand-in for torch.cuda


class Cuda:
    """Counts what is done to it; runs everything at once."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.mode = "default"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                cuda.log.append("event")

            def elapsed_time(self, end: Event) -> float:
                return 0.25

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                cuda.log.append("wait")

        class CUDAGraph:
            def replay(self) -> None:
                cuda.log.append("replay")

        @contextlib.contextmanager
        def scope(_: Any, pool: Any = None) -> Iterator[None]:
            yield

        def set_mode(mode: str) -> None:
            self.mode = mode

        replaced = {
            "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "current_stream": Stream, "stream": scope,
            "graph": scope, "synchronize": lambda: self.log.append("wait"), "current_device": lambda: 0,
            "get_device_properties": lambda _: types.SimpleNamespace(name="a GPU", L2_cache_size=1 << 10),
            "empty_cache": lambda: None, "mem_get_info": lambda: (7, 9), "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 3100, "reset_peak_memory_stats": lambda: None,
            "set_sync_debug_mode": set_mode, "graph_pool_handle": lambda: (0, 1),
        }  # fmt: skip
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_the_gpu_side_of_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cuda.install(monkeypatch)
    context = units.Context(plan.Sizes(smoke=False, rounds=(2, 3), copy_bytes=1 << 12))
    gpu_device = context.device
    assert isinstance(gpu_device, device.Gpu) and gpu_device.name == "a GPU"
    assert gpu_device.cold_bytes == 256 << 20
    gpu_device.device, gpu_device.cold_bytes = torch.device("cpu"), 1 << 12
    calls: list[int] = []
    replay = gpu_device.captured(lambda: calls.append(1))
    assert len(calls) == 3
    loads: list[int] = []
    cuda.log.clear()
    assert gpu_device.times({"a": replay, "b": replay}, loads.append, 2) == {"a": [250.0] * 2, "b": [250.0] * 2}
    assert loads == [0, 1] and cuda.log == ["event", "replay", "event"] * 4 + ["wait"]
    assert context.bandwidth == pytest.approx(2 * (1 << 12) / 250e-6) and context.empty_graph == 250.0
    assert device.rounds_for(gpu_device, {"a": replay}, loads.append, ["a"]) == (3, {})
    assert gpu_device.free_bytes() == 7
    # 3,000 bytes more at the height, 512 and 1,024 of them for the two tensors that are returned
    assert gpu_device.scratch_bytes(lambda: (torch.zeros(2), torch.zeros(200))) == 3000 - 512 - 1024

    def waits() -> None:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError), gpu_device.forbid_synchronization():
        waits()
    assert cuda.mode == "default"
    assert [device.rival_replay(gpu_device, call)[1] for call in (waits, lambda: None)] == [False, True]
    assert device.profiled(gpu_device, lambda: torch.zeros(3) + 1)["torch_operators"][-1] == "aten::add"
    assert context.is_broken(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not context.is_broken(RuntimeError("CUDA error: operation not permitted when stream is capturing"))


def test_a_replay_keeps_what_its_call_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a graph would read memory that has been given back; in its place on the CPU it refuses."""
    Cuda().install(monkeypatch)
    for there in (device.Cpu(plan.SMOKE), device.Gpu(plan.GPU)):
        for capture in (there.captured, lambda call, there=there: device.rival_replay(there, call)[0]):

            def captured(capture: Callable[..., Any] = capture) -> tuple[device.Replay, weakref.ref[torch.Tensor]]:
                read = torch.ones(3)
                return capture(lambda: read + 1), weakref.ref(read)

            replay, read = captured()
            gc.collect()
            assert read() is not None
            replay.run()
            del replay
            gc.collect()
            assert read() is None
    graph = device._Again(lambda: None, None)
    with pytest.raises(AssertionError, match="given back"):
        graph.replay()


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes out, another capture has ended well by then, and the graph that failed stays."""
    Cuda().install(monkeypatch)
    captures: list[str] = []

    @contextlib.contextmanager
    def capturing(graph: Any, pool: Any = None) -> Iterator[None]:
        captures.append("begun")
        yield
        captures.append("ended")

    monkeypatch.setattr(torch.cuda, "graph", capturing)
    there, calls = device.Gpu(plan.GPU), iter(range(9))
    there.device = torch.device("cpu")

    def call() -> None:
        if next(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        there.captured(call)
    assert captures == ["begun", "begun", "ended"] and len(there._failed) == 1


def test_a_slow_rival_takes_part_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    there, clock = device.Cpu(plan.Sizes(smoke=False, rounds=(20, 100), round_seconds=0.8)), [0.0]
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])

    def taking(seconds: float) -> device.Replay:
        return device.Replay(lambda: clock.__setitem__(0, clock[0] + seconds))

    contenders = {"ours": taking(0.001), "fast": taking(0.001), "slow": taking(0.01), "slowest": taking(1.0)}
    rounds, every = device.rounds_for(there, contenders, lambda i: None, ["ours"])
    assert (rounds, every) == (100, {"fast": 1, "slow": 7, "slowest": 20})
    found = there.times(contenders, lambda i: None, rounds, every)
    assert {name: len(values) for name, values in found.items()} == {"ours": 100, "fast": 100, "slow": 15, "slowest": 5}
    assert device.rounds_for(there, {"ours": taking(1.0)}, lambda i: None, ["ours"]) == (20, {})
    assert device.rounds_for(there, {}, lambda i: None, []) == (20, {})


# ---- workers and tools


WORKER = """
import json, pathlib, sys, time
out = pathlib.Path(next(a for a in sys.argv if a.startswith("--out=")).removeprefix("--out="))
path = out / "gpu_checks.jsonl"
done = [json.loads(line)["unit"] for line in path.read_text().splitlines()] if path.exists() else []
print("= " + json.dumps({"device": "fake"}), flush=True)
for unit in ("crashes", "hangs", "works"):
    if unit in done:
        continue
    print("> checks: " + unit, flush=True)
    if unit == "crashes":
        sys.exit(3)
    if unit == "hangs":
        time.sleep(100)
    with open(path, "a") as file:
        file.write(json.dumps({"unit": unit, "status": "ok"}) + "\\n")
    print("< ok", flush=True)
"""


def test_a_unit_that_crashes_or_hangs_costs_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, str(script)])
    supervisor = gpu.Supervisor(gpu.parse(["checks", "--silence", "1"]), tmp_path)
    supervisor.run(["checks"], 60, 1)
    found = list(rows.read(rows.path_of(tmp_path, "checks")))
    assert [(row["unit"], row["status"]) for row in found] == [
        ("crashes", "error"), ("hangs", "error"), ("works", "ok"),
    ]  # fmt: skip
    assert [row.get("error") for row in found] == ["exit 3", "silent for 1 s", None]
    assert found[0]["device"] == "fake" and supervisor.crashes == 2
    assert "checks: works: ok" in capfd.readouterr().out


def test_a_part_out_of_time_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text('import time; print("> checks: long", flush=True); time.sleep(100)')
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, str(script)])
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    supervisor = gpu.Supervisor(gpu.parse(["checks"]), tmp_path)
    supervisor.run(["checks"], 1, 2)
    assert not list(tmp_path.glob("*.jsonl")) and supervisor.crashes == 0


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = gpu.parse(["verify", "laws", "--budget", "100", "--budget", "laws=20"])
    assert [gpu.budget(part, options) for part in options.parts] == [100.0, 20.0]
    assert gpu.parse(["all"]).parts == list(gpu.PARTS) and all(seconds < 600 for seconds, _ in gpu.PARTS.values())
    for wrong in (["verfy"], ["verify", "--budget", "laws:3"], ["verify", "--budget", "lws=3"]):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)
    assert isinstance(options, argparse.Namespace) and "expected" in capsys.readouterr().err


def test_sanitizer_reports() -> None:
    assert sanitizer.errors_in("========= ERROR SUMMARY: 0 errors") == 0
    assert sanitizer.errors_in("========= ERROR SUMMARY: 1 error") == 1
    assert sanitizer.errors_in("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)") == 2
    assert sanitizer.errors_in("killed") is None


def test_sanitizer_with_a_tool_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that runs a case and finds nothing, and one error where one was planted."""
    tool = tmp_path / "compute-sanitizer"
    planted = 'case "$*" in *planted*) echo "========= ERROR SUMMARY: 1 error"; exit 1;; esac'
    tool.write_text(f'#!/bin/sh\n{planted}\nshift 4\n"$@"\necho "========= ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    context = units.Context(plan.SMOKE)
    (clean,) = sanitizer.check("memcheck", "recursive", context)
    (planted,) = sanitizer.check("memcheck", sanitizer.PLANTED, context)
    assert (clean["status"], clean["errors"]) == ("ok", 0), json.dumps(clean)
    assert (planted["status"], planted["errors"]) == ("ok", 1), json.dumps(planted)
    monkeypatch.setattr(sanitizer, "executable", lambda: None)
    (absent,) = sanitizer.check("memcheck", "recursive", context)
    assert absent["status"] == "skipped"
