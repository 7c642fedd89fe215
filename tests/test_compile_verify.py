"""`verify`'s Triton kernels compiled for GPUs that are not there: no spills, and the resources that were committed."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
pytest.importorskip("triton")

from triton_compile import TARGETS_HERE, assert_as_committed, compile_only, fake, resources

from mcsd_kernels import _verify_triton as kernels
from mcsd_kernels import verify
from mcsd_kernels._schedule import Launch


def call(
    rule: str,
    proposal: str,
    *,
    batch: int = 4,
    vocab: int = 131_072,
    dtype: torch.dtype = torch.bfloat16,
    filters: bool = True,
    rows: bool = False,
    inputs: str = "logits",
    extras: bool = False,
    launch: Launch | None = None,
) -> None:
    """One call of the wrapper; the launch is the table's, which splits a batch of 4 and walks one of 256.

    Args:
        rows: logits by row index, int32 tokens, a tree for each request, tensors as sampling parameters.
        inputs: of both sides.
        extras: a bitmask, a draft vocabulary of its own, chosen siblings.
    """
    nodes = 16
    shape = (batch * nodes, vocab) if rows else (batch, nodes, vocab)
    index = fake(batch, nodes, dtype=torch.int32) if rows else None
    columns = 16_384 if extras else vocab
    draft = None if proposal == "point" else fake(*shape[:-1], columns, dtype=dtype)
    numbers = [0.8, 50.0, 0.9, 0.01] if filters else [0.8, 0.0, 1.0, 0.0]
    tensors = [fake(batch) if rows else None] * 4
    kernels.verify(
        fake(*shape, dtype=dtype), draft, fake(batch, nodes, dtype=torch.int32 if rows else torch.int64),
        fake(*([batch] if rows else []), nodes, dtype=torch.int32), fake(batch, nodes + 2), index,
        None if draft is None else index, numbers, tensors, numbers, tensors, proposal, rule, nodes - 1,
        inputs, inputs, fake(nodes, dtype=torch.bool) if extras else None,
        fake(batch, nodes, -(-vocab // 32), dtype=torch.int32) if extras else None,
        fake(columns, dtype=torch.int64) if extras else None, launch=launch,
    )  # fmt: skip


CALLS: dict[str, Callable[[], None]] = {
    "walk, traversal, greedy": lambda: call("traversal", "greedy", batch=256),
    "split, traversal, without replacement": lambda: call("traversal", "without_replacement"),
    "walk, recursive, without replacement, rows, f32, odd": lambda: call(
        "recursive", "without_replacement", batch=256, rows=True, vocab=151_669, dtype=torch.float32
    ),
    "walk, recursive, with replacement, 5 tokens": lambda: call("recursive", "with_replacement", vocab=5),
    "walk, traversal, point, no filter": lambda: call("traversal", "point", batch=256, filters=False),
    "split, recursive, without replacement, no filter": lambda: call("recursive", "without_replacement", filters=False),
    "split, traversal, greedy, rows": lambda: call("traversal", "greedy", rows=True),
    "walk, recursive, without replacement, probabilities": lambda: call(
        "recursive", "without_replacement", batch=256, filters=False, inputs="probabilities"
    ),
    "walk, traversal, without replacement, bitmask, draft vocabulary, chosen siblings": lambda: call(
        "traversal", "without_replacement", batch=256, extras=True
    ),
    "split, traversal, without replacement, bitmask, draft vocabulary, chosen siblings": lambda: call(
        "traversal", "without_replacement", extras=True
    ),
}


@pytest.mark.parametrize("target", TARGETS_HERE)
@pytest.mark.parametrize("name", CALLS)
def test_resources(target: str, name: str) -> None:
    with compile_only(target) as compiled:
        CALLS[name]()
    # one kernel for every wave: a launch with another number compiles nothing new
    assert_as_committed(target, f"verify, {name}", {found.name: found for found in map(resources, compiled)}.values())


def test_control_a_launch_that_spills() -> None:
    launch = Launch("walk", tile_blocks=16, num_warps=4, chunk_blocks=8, waves=0)
    with compile_only("sm_90") as compiled:
        call("recursive", "point", launch=launch)
    assert max(resources(kernel).spills for kernel in compiled) > 0


@pytest.mark.parametrize(("proposal", "waves"), [("without_replacement", 6), ("greedy", 1), ("point", 0)])
def test_a_launch_a_wave(proposal: str, waves: int) -> None:
    """Of one kernel, whatever the tree: "greedy" under `recursive` needs one wave, "point" none. Loads are wide."""
    with compile_only("sm_90") as compiled:
        call("recursive", proposal, filters=False)
    sweeps = [kernel for kernel in compiled if kernel.metadata.name == "_sweep_kernel"]
    assert len(sweeps) == waves
    assert all("ld.global.v4" in kernel.asm["ptx"] for kernel in sweeps)


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    logits = torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match="backend"):
        verify(
            logits,
            logits,
            torch.zeros(1, 2, dtype=torch.int64),
            torch.tensor([-1, 0]),
            torch.zeros(1, 4),
            backend="triton",
        )
