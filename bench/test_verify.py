"""CPU time of `verify` against what is in use today, on one thread. `MCSD_BENCH_RECORD=1` keeps the rows.

The targets (`wanted`) are reported, not asserted: a timed test that fails on a busy machine says nothing.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import drawn_trees
import harness
import pytest
import rivals
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """All contenders run on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(
    benchmark: Any, name: str, inputs: drawn_trees.Inputs, rival: str, call: Callable[[], Any], rounds: int, wanted: str
) -> None:
    """Time both in turn, record the row, and give pytest-benchmark its own run of ours."""
    if harness.recorded("verify_cpu", [{"case": name}]):
        pytest.skip("there is a row of this code and machine")
    tokens = harness.check(inputs)
    contenders = {"verify": harness.ours(inputs), rival: call}
    times, warm = harness.interleave(contenders, rounds), harness.alone(contenders, rounds)
    ratio = harness.spread([b / a for a, b in zip(times["verify"], times[rival], strict=True)])
    loops = [b / a for a, b in zip(warm["verify"], warm[rival], strict=True)]
    row = {
        "bench": "verify-cpu",
        "case": name,
        "overlap": round(inputs.overlap, 3),
        "tokens": round(tokens, 2),
        "milliseconds": harness.spread(times["verify"]),
        "rival": rival,
        "rival_milliseconds": harness.spread(times[rival]),
        "rival_over_verify": ratio,
        "in_loops_of_their_own": {
            "milliseconds": round(statistics.median(warm["verify"]), 4),
            "rival_milliseconds": round(statistics.median(warm[rival]), 4),
            "rival_over_verify": round(statistics.median(loops), 3),
            "loops": len(loops),
        },
        "wanted": wanted,
    }
    benchmark.extra_info.update(row)
    harness.record("verify_cpu", row)
    benchmark.pedantic(harness.ours(inputs), rounds=20, warmup_rounds=3)


@pytest.mark.parametrize(("vocab", "wanted"), [(32_000, ">= 5"), (131_072, ">= 4")])
def test_chain_of_four(benchmark: Any, vocab: int, wanted: str) -> None:
    """One chain from raw logits, against transformers' assisted decoding."""
    inputs = drawn_trees.make((1, 1, 1, 1), vocab)
    drawn = itertools.cycle(inputs.drawn)
    call = lambda: rivals.transformers_chain(inputs.target, inputs.draft, next(drawn)[0])  # noqa: E731
    compare(benchmark, f"chain of 4, {vocab}", inputs, "transformers _speculative_sampling", call, 200, wanted)


@pytest.mark.parametrize(("branching", "rounds", "wanted"), [((4, 2, 2), 60, ">= 5"), ((4, 4, 4, 4), 15, ">= 50")])
def test_tree(benchmark: Any, branching: tuple[int, ...], rounds: int, wanted: str) -> None:
    """One sampled tree, against softmax of every node and textbook recursive rejection."""
    inputs = drawn_trees.make(branching, 32_000)
    parents = inputs.parents.tolist()
    drawn = itertools.cycle(inputs.drawn)
    call = lambda: rivals.textbook_tree(inputs.target, inputs.draft, next(drawn)[0], parents)  # noqa: E731
    compare(benchmark, f"tree {branching}, 32000", inputs, "softmax + textbook rejection", call, rounds, wanted)


@pytest.mark.parametrize("vocab", [32_000, 131_072])
def test_batch_of_eight_chains(benchmark: Any, vocab: int) -> None:
    """Eight chains, against the log-sum-exp of all their target rows, which is a floor and no verifier."""
    inputs = drawn_trees.make((1, 1, 1, 1), vocab, batch=8)
    call = lambda: rivals.log_sum_exp(inputs.target)  # noqa: E731
    compare(benchmark, f"8 chains of 4, {vocab}", inputs, "log-sum-exp of all rows", call, 60, ">= 0.4")
