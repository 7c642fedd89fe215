"""`verify`'s Triton kernels compiled for GPUs that are not there: no spills, shared memory within bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
pytest.importorskip("triton")

from triton_compile import SHARED_LIMITS, TARGETS, compile_only, fake, resources

from mcsd_kernels import _verify_triton as kernels
from mcsd_kernels import verify
from mcsd_kernels._schedule import Launch


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compilation cache of this run's own, so that every kernel is really compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def call(
    rule: str,
    proposal: str,
    *,
    vocab: int = 131_072,
    dtype: torch.dtype = torch.bfloat16,
    filters: bool = True,
    rows: bool = False,
    launch: Launch | None = None,
) -> None:
    """One call of the wrapper.

    Args:
        rows: logits by row index, int32 tokens, a tree for each request, tensors as sampling parameters.
    """
    batch, nodes = 4, 16
    shape = (batch * nodes, vocab) if rows else (batch, nodes, vocab)
    index = fake(batch, nodes, dtype=torch.int32) if rows else None
    draft = None if proposal == "point" else fake(*shape, dtype=dtype)
    numbers = [0.8, 50.0, 0.9, 0.01] if filters else [0.8, 0.0, 1.0, 0.0]
    tensors = [fake(batch) if rows else None] * 4
    kernels.verify(
        fake(*shape, dtype=dtype), draft, fake(batch, nodes, dtype=torch.int32 if rows else torch.int64),
        fake(*([batch] if rows else []), nodes, dtype=torch.int32), fake(batch, nodes + 2), index,
        None if draft is None else index, numbers, tensors, numbers, tensors, proposal, rule, nodes - 1, launch=launch,
    )  # fmt: skip


def assert_fits(target: str, compiled: list[object], count: int) -> None:
    assert len(compiled) == count
    for need in map(resources, compiled):
        assert need.spills == 0, need
        assert need.shared <= SHARED_LIMITS[target], need


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("proposal", ["without_replacement", "greedy"])
def test_compiles_without_spills(proposal: str, rule: str, target: str) -> None:
    with compile_only(target) as compiled:
        call(rule, proposal)
    assert_fits(target, compiled, 2)


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize(
    ("proposal", "options"),
    [
        pytest.param("point", {"filters": False}, id="point-without-draft-or-filters"),
        pytest.param("with_replacement", {"filters": False, "vocab": 5}, id="one-small-block"),
        pytest.param(
            "without_replacement",
            {"rows": True, "vocab": 151_669, "dtype": torch.float32},
            id="odd-vocabulary-f32-rows",
        ),
    ],
)
def test_other_calls_compile(proposal: str, options: dict[str, object], rule: str) -> None:
    with compile_only("sm_90") as compiled:
        call(rule, proposal, **options)
    assert_fits("sm_90", compiled, 2)


def test_control_a_launch_that_spills() -> None:
    with compile_only("sm_90") as compiled:
        call("recursive", "point", launch=Launch(tile_blocks=16, num_warps=4))
    assert max(resources(kernel).spills for kernel in compiled) > 0


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
