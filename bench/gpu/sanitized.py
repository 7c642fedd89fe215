"""What runs under compute-sanitizer: a small call of every kernel, or a planted fault; see `sanitizer`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl

from . import worker
from .sanitizer import PLANTED


@triton.jit
def _beyond_kernel(
    numbers_ptr,  # [8] f32
    BLOCK: tl.constexpr,
):
    """Write far more numbers than there is room for: memory is given in pieces of 512 bytes."""
    i = tl.arange(0, BLOCK)
    tl.store(numbers_ptr + i, i.to(tl.float32))


# Triton guards what threads share, so the race is in CUDA C++, which torch compiles.
RACE = """
extern "C" __global__ void race(float* out) {
    __shared__ float shared[64];
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[63 - threadIdx.x];
}
"""


def plant(tool: str, device: torch.device) -> None:
    """Run the fault that `tool` looks for."""
    numbers = torch.zeros(8 if tool == "memcheck" else 64, device=device)
    if tool == "memcheck":
        _beyond_kernel[(1,)](numbers_ptr=numbers, BLOCK=1024)
    else:
        torch.cuda._compile_kernel(RACE, "race")((1, 1, 1), (64, 1, 1), [numbers])


def call_everything(rule: str, device: torch.device, vocab: int) -> None:
    """One small call of each operation, filters on; of `verify` two proposals, and both schedules.

    Args:
        rule: of `verify`.
        device: where.
        vocab: for the schedule "walk"; four times as many tokens are for "split".
    """
    from mcsd_kernels import (
        SamplingParams,
        ancestor_bits,
        draw_candidates,
        draw_uniforms,
        keep_path,
        node_depths,
        row_cutoffs,
        tree_attention,
        tree_attention_mask,
        verify,
    )

    parents = torch.tensor([-1, 0, 0, 0, 1, 1, 2, 4, -1, 0])
    batch, nodes = 2, len(parents)
    random = torch.Generator().manual_seed(0)
    seeds = torch.arange(batch).to(device)
    sampling = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    for proposal, size in (("without_replacement", vocab), ("without_replacement", 4 * vocab), ("greedy", 4 * vocab)):
        target, draft = (torch.randn(batch, nodes, size, generator=random).bfloat16().to(device) for _ in range(2))
        here: dict[str, Any] = {"proposal": proposal, "sampling": sampling, "backend": "triton"}
        drawn = draw_candidates(draft[:, 0], nodes, seeds, 0, **here)
        uniforms = draw_uniforms(seeds, 0, nodes + 2, backend="triton")
        result = verify(target, draft, drawn, parents.to(device), uniforms, rule=rule, **here)
        print(proposal, result.length.tolist())
    print(row_cutoffs(target[:, 0], sampling, backend="triton").tolist())

    prefix, slots = torch.tensor([3, 30], dtype=torch.int32, device=device), 300
    query = torch.randn(batch, 4, nodes, 64, generator=random).bfloat16().to(device)
    key, value = (torch.randn(batch, 2, slots, 64, generator=random).bfloat16().to(device) for _ in range(2))
    ancestors = ancestor_bits(parents.to(device), backend="triton")
    print(node_depths(ancestors, backend="triton").tolist())
    print(int(tree_attention_mask(parents.to(device), prefix, slots, backend="triton").sum()))
    for window in (None, 16):
        attended = tree_attention(query, key, value, ancestors, prefix, window=window, backend="triton")
        print(float(attended.float().abs().mean()))
    keep_path(key, value, prefix, result.path, result.length, backend="triton")


def main() -> None:
    tool, case = sys.argv[1:3]
    smoke = "--smoke" in sys.argv
    device = torch.device("cpu" if smoke else "cuda")
    if smoke:
        worker.interpret()
    if case != PLANTED:
        call_everything(case, device, 40 if smoke else 2500)
    elif not smoke:
        plant(tool, device)
    if not smoke:
        torch.cuda.synchronize()
    print("sanitized case done")


if __name__ == "__main__":
    main()
