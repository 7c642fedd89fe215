"""The attention and tree kernels compile for GPUs that are not there, without spills, at the launches of the table.

A new version of Triton may allocate registers differently. After looking at the difference, write the table anew:

    python tests/test_compile_attention.py
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())

pytest.importorskip("triton")

import triton
from triton_compile import SHARED_LIMITS, TARGETS, Resources, compile_only, fake, resources

from mcsd_kernels import _attention_triton, _tree_triton

TABLE = Path(__file__).with_name("attention_resources.json")


def _attention(
    nodes: int,
    heads: tuple[int, int],
    dim: int,
    slots: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    softcap: float | None = None,
    page: int = 0,
    sinks: bool = False,
) -> None:
    query = fake(2, nodes, heads[0], dim, dtype=dtype).transpose(1, 2)
    shape = (99, heads[1], page, dim) if page else (2, heads[1], slots, dim)
    key, value = fake(*shape, dtype=dtype), fake(*shape, dtype=dtype)
    _attention_triton.tree_attention(
        query,
        key,
        value,
        fake(1, nodes, -(-nodes // 32), dtype=torch.int32),
        fake(2, dtype=torch.int32),
        dim**-0.5,
        window,
        softcap,
        fake(2, slots // page, dtype=torch.int32) if page else None,
        fake(heads[0], dtype=torch.bfloat16) if sinks else None,
    )


def _keep_path() -> None:
    key, value = (fake(2, 32, 8, 4160, 128, dtype=torch.bfloat16).flatten(1, 2) for _ in range(2))
    _tree_triton.keep_path(
        key, value, fake(2, dtype=torch.int32), fake(2, 5, dtype=torch.int32), fake(2, dtype=torch.int32)
    )


LLAMA, QWEN, PHI = (32, 8), (16, 8), (32, 32)
# Every tile of the table for 16-bit entries of head dimension 128 and 64, and what models ask for beside it.
CALLS: dict[str, Callable[[], None]] = {
    "attention, Llama 3, 64 nodes": lambda: _attention(64, LLAMA, 128, 4160),
    "attention, Llama 3, 1 node": lambda: _attention(1, LLAMA, 128, 4160),
    "attention, Mistral, 16 nodes, window": lambda: _attention(16, LLAMA, 128, 8208, window=4096),
    "attention, Qwen 3, 16 nodes, pages": lambda: _attention(16, QWEN, 128, 4160, dtype=torch.float16, page=16),
    "attention, Gemma 2, window, softcap": lambda: _attention(64, (16, 8), 256, 4160, window=4096, softcap=50.0),
    "attention, GPT-OSS, window, sinks": lambda: _attention(64, (64, 8), 64, 4160, window=128, sinks=True),
    "attention, float32": lambda: _attention(16, PHI, 64, 512, dtype=torch.float32),
    "attention, float32, heads of 128": lambda: _attention(16, LLAMA, 128, 512, dtype=torch.float32),
    "attention, float32, heads of 128, pages, sinks": lambda: _attention(
        64, LLAMA, 128, 512, dtype=torch.float32, page=16, sinks=True
    ),
    "attention, float32, heads of 256": lambda: _attention(16, (8, 4), 256, 512, dtype=torch.float32),
    "attention, float32, heads of 256, window, softcap": lambda: _attention(
        64, (16, 8), 256, 512, dtype=torch.float32, window=256, softcap=50.0
    ),
    # a single key-value head of a long text: as many parts as there ever are
    "attention, 2 nodes, heads of 64, long": lambda: _attention(2, (8, 1), 64, 131_072),
    "attention, 2 nodes, heads of 128, long": lambda: _attention(2, (12, 2), 128, 70_000),
    "attention, 4 nodes, heads of 256, long": lambda: _attention(4, (8, 1), 256, 70_000),
    "ancestor bits": lambda: _tree_triton.ancestor_bits(fake(3, 64, dtype=torch.int64)),
    "ancestor bits, 1024 nodes": lambda: _tree_triton.ancestor_bits(fake(1024, dtype=torch.int32)),
    "depths": lambda: _tree_triton.node_depths(fake(3, 64, 2, dtype=torch.int32)),
    "mask": lambda: _tree_triton.tree_attention_mask(fake(64, dtype=torch.int64), fake(3, dtype=torch.int32), 4160),
    "keep path": _keep_path,
}


ONCE_MORE = (
    "attention, Llama 3, 64 nodes",
    "attention, Mistral, 16 nodes, window",
    "attention, Gemma 2, window, softcap",
    "mask",
    "keep path",
)
# What the tests compile; the rest, which takes a minute, is compiled when the table is written.
COMPILED = [
    *(("sm_90", call) for call in CALLS),
    *((target, call) for target in ("sm_80", "sm_100") for call in CALLS if call in ONCE_MORE),
    *(("gfx942", call) for call in CALLS if not call.startswith("attention") or "1 node" in call),
]


def measured(target: str, call: str) -> list[Resources]:
    with compile_only(target) as compiled:
        CALLS[call]()
    return [resources(kernel) for kernel in compiled]


def entry(found: list[Resources]) -> str:
    return "; ".join(f"{one.registers} registers, {one.shared} bytes shared" for one in found)


def faults(target: str, found: list[Resources]) -> list[Resources]:
    """The kernels that spill or do not fit."""
    return [one for one in found if one.spills or one.shared > SHARED_LIMITS[target]]


def committed() -> dict[str, dict[str, str]]:
    """Target -> call -> entry, for the Triton at hand; empty where nobody has committed it."""
    return json.loads(TABLE.read_text()).get(triton.__version__, {}) if TABLE.exists() else {}


@pytest.mark.parametrize(("target", "call"), COMPILED)
def test_resources(target: str, call: str) -> None:
    found = measured(target, call)
    assert not faults(target, found)
    wanted = committed().get(target, {}).get(call)
    if wanted is None:
        pytest.skip(f"{TABLE.name} has no such entry for Triton {triton.__version__}: run python {Path(__file__).name}")
    assert entry(found) == wanted, f"changed; see the top of {Path(__file__).name}"


def compiled_call(target: str, call: str) -> Any:
    with compile_only(target) as compiled:
        CALLS[call]()
    return compiled[0]


@pytest.mark.parametrize("call", ["attention, Llama 3, 64 nodes", "attention, Mistral, 16 nodes, window"])
def test_the_prefix_is_read_ahead_16_bytes_at_a_time(call: str) -> None:
    """The loop over the prefix is pipelined: asynchronous copies of whole vectors, before the loop and in it."""
    ptx = compiled_call("sm_90", call).asm["ptx"]
    copies = re.findall(r"cp\.async\.\S+ \[.*?\], \[.*?\], (\w+)", ptx)
    assert copies and set(copies) == {"0x10"}


def test_a_path_is_read_before_any_thread_writes() -> None:
    """Between the last read of the caches and the first write every thread waits: a target may be a source."""
    ptx = compiled_call("sm_90", "keep path").asm["ptx"].splitlines()
    reads = [i for i, line in enumerate(ptx) if re.search(r"ld\.global\.v4", line)]
    writes = [i for i, line in enumerate(ptx) if re.search(r"st\.global\.v4", line)]
    waits = [i for i, line in enumerate(ptx) if re.search(r"bar\.sync", line)]
    assert reads and writes and any(max(reads) < wait < min(writes) for wait in waits)


def test_the_benchmark_runs_without_a_gpu() -> None:
    """Every line of bench/attention.py that needs no GPU, at tiny sizes; its rows say what was compared."""
    script = Path(__file__).parents[1] / "bench" / "attention.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    compared = [row for row in rows if row["bench"].startswith("attention-c")]
    assert len(compared) == 2 and len(rows) > 2
    for row in compared:
        assert set(row["microseconds"]) == {"tree_attention", "sdpa_dense_mask", "hugging_face", "flex_attention"}
        assert not row["not_timed"] and row["bytes"] > 0 and row["flops"] > 0 and row["roofline_us"] > 0


def write() -> None:
    """Compile every call for every target; nothing is written if a kernel spills or does not fit."""
    rows: dict[str, dict[str, str]] = {}
    for target, call in itertools.product(TARGETS, CALLS):
        found = measured(target, call)
        assert not faults(target, found), f"{target}, {call}: {found}"
        rows.setdefault(target, {})[call] = entry(found)
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    TABLE.write_text(json.dumps(tables | {triton.__version__: rows}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
