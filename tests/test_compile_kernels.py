"""Every kernel over rows compiles for GPUs that are not there, in the resources that were committed.

A new version of Triton may allocate registers differently. After looking at the difference, write the table anew:

    UPDATE_KERNEL_RESOURCES=1 python -m pytest tests/test_compile_*.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_compile import TABLE, TARGETS_HERE, assert_as_committed, compile_only, fake, resources, unordered_releases

from mcsd_kernels import _candidates_triton, _cutoffs_triton, _random_triton

NONE: list[torch.Tensor | None] = [None] * 4
FILTERS = [0.7, 50.0, 0.9, 0.1]
PLAIN = [1.0, 0.0, 1.0, 0.0]


def _uniforms(*, per_row: bool) -> None:
    seeds = fake(6, dtype=torch.int64)
    _random_triton.draw_uniforms(seeds, 3, fake(6, dtype=torch.int64) if per_row else None, 12)


def _cutoffs(vocab: int, dtype: torch.dtype, *, per_row: bool = False) -> None:
    tensors = [fake(6), fake(6, dtype=torch.int64), fake(6), fake(6, dtype=torch.float64)] if per_row else NONE
    _cutoffs_triton.row_cutoffs(fake(6, vocab, dtype=dtype), FILTERS, tensors)


def _candidates(vocab: int, dtype: torch.dtype, proposal: str, numbers: list[float]) -> None:
    seeds, nodes = fake(6, dtype=torch.int64), fake(6, dtype=torch.int32)
    logits = fake(6, vocab, dtype=dtype)
    _candidates_triton.draw_candidates(logits, 4, seeds, 3, None, proposal, numbers, NONE, nodes)


# The configurations that ship: the vocabularies of Llama 3 and Qwen 3 (not a multiple of 16), in bf16 and f32.
CALLS: dict[str, Callable[[], None]] = {
    "uniforms": lambda: _uniforms(per_row=False),
    "cutoffs": lambda: _cutoffs(128_256, torch.bfloat16),
    "candidates, without replacement, filters": lambda: _candidates(
        128_256, torch.bfloat16, "without_replacement", FILTERS
    ),
    "uniforms, a step a row": lambda: _uniforms(per_row=True),
    "cutoffs, f32, odd, a row its own": lambda: _cutoffs(151_669, torch.float32, per_row=True),
    "candidates, without replacement": lambda: _candidates(128_256, torch.bfloat16, "without_replacement", PLAIN),
    "candidates, with replacement": lambda: _candidates(151_669, torch.float32, "with_replacement", PLAIN),
    "candidates, greedy": lambda: _candidates(128_256, torch.float16, "greedy", PLAIN),
    "candidates, point": lambda: _candidates(128_256, torch.bfloat16, "point", PLAIN),
}


@pytest.mark.parametrize("target", TARGETS_HERE)
@pytest.mark.parametrize("call", CALLS)
def test_resources(target: str, call: str) -> None:
    with compile_only(target) as compiled:
        CALLS[call]()
    assert len(compiled) == 1, "one launch a call"
    assert_as_committed(target, call, [resources(compiled[0])])


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    total = tl.zeros([SIZE], tl.float32)
    for i in range(ROUNDS):
        total += x * tl.sum(total + x * i, 0)
    tl.store(y_ptr + index, total)


@pytest.mark.parametrize(("target", "size"), [("sm_90", 1 << 13), ("gfx942", 1 << 15)])
def test_a_spill_is_seen(target: str, size: int) -> None:
    with compile_only(target) as compiled:
        _spilling_kernel[(1,)](fake(size), fake(size), ROUNDS=3, SIZE=size, num_warps=1, enable_fp_fusion=False)
    assert resources(compiled[0]).spills > 0


@triton.jit
def _released_too_early_kernel(x_ptr, y_ptr, flag_ptr, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y_ptr + index, tl.load(x_ptr + index) * 2)
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, 1, sem="release")


@pytest.mark.parametrize("barrier", [True, False])
def test_a_release_before_the_stores_of_other_warps_is_seen(barrier: bool) -> None:
    with compile_only("sm_90") as compiled:
        _released_too_early_kernel[(1,)](
            fake(1024), fake(1024), fake(1, dtype=torch.int32), BARRIER=barrier, SIZE=1024, enable_fp_fusion=False
        )  # fmt: skip
    # from 3.9 on the compiler inserts the barrier itself
    inserts = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    assert bool(unordered_releases(compiled[0])) == (not barrier and not inserts)


def test_rows_are_loaded_16_bytes_at_a_time() -> None:
    with compile_only("sm_90") as compiled:
        _candidates(128_256, torch.bfloat16, "without_replacement", PLAIN)
    assert "ld.global.v4" in compiled[0].asm["ptx"]


# Triton's version, target, call: a spill that enters the table has to be written down here, too.
SPILLS = {
    # An older Triton; the tiles are chosen for 3.9, with which nothing spills.
    ("3.6.0", "sm_90", "attention, float32, heads of 256"),
    ("3.6.0", "sm_90", "attention, float32, heads of 256, window, softcap"),
    ("3.6.0", "sm_90", "verify, walk, traversal, without replacement, bitmask, draft vocabulary, chosen siblings"),
}


def test_what_spills() -> None:
    table = json.loads(TABLE.read_text())
    spilled = {
        (version, target, call)
        for version, targets in table.items()
        for target, calls in targets.items()
        for call, kernels in calls.items()
        if any("spilled" in entry for entry in kernels.values())
    }
    assert spilled == SPILLS
