"""The attention and tree kernels compile for GPUs that are not there, at every launch of the table."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import attention
import harness
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction
from triton_compile import TARGETS_HERE, assert_as_committed, compile_only, fake, resources

from mcsd_kernels import _attention_triton, _tree_triton


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
# Every tile of the table, at the heads of models that take it, and what models ask for beside it.
CALLS: dict[str, Callable[[], None]] = {
    "attention, Llama 3, 64 nodes": lambda: _attention(64, LLAMA, 128, 4160),
    "attention, Llama 3, 16 nodes": lambda: _attention(16, LLAMA, 128, 4160),
    "attention, Llama 3, 1 node": lambda: _attention(1, LLAMA, 128, 4160),
    "attention, Llama 3.2 1B, 64 nodes": lambda: _attention(64, LLAMA, 64, 4160),
    "attention, Llama 3.2 1B, 16 nodes": lambda: _attention(16, LLAMA, 64, 4160),
    "attention, Llama 3.2 1B, 5 nodes": lambda: _attention(5, LLAMA, 64, 4160),
    "attention, Mistral, 16 nodes, window": lambda: _attention(16, LLAMA, 128, 8208, window=4096),
    "attention, Mistral, 8 nodes, window": lambda: _attention(8, LLAMA, 128, 8208, window=4096),
    "attention, Mistral, 1 node, window": lambda: _attention(1, LLAMA, 128, 8208, window=4096),
    "attention, Qwen 3, 16 nodes, pages": lambda: _attention(16, QWEN, 128, 4160, dtype=torch.float16, page=16),
    "attention, Qwen 2.5 7B, 29 nodes": lambda: _attention(29, (28, 4), 128, 4160),
    "attention, Qwen 2.5 14B, 29 nodes": lambda: _attention(29, (40, 8), 128, 4160),
    "attention, Gemma 2, window, softcap": lambda: _attention(64, (16, 8), 256, 4160, window=4096, softcap=50.0),
    "attention, Gemma 3 1B, 1 node": lambda: _attention(1, (4, 1), 256, 4160),
    "attention, Gemma 3 1B, 1 node, window": lambda: _attention(1, (4, 1), 256, 4160, window=512),
    "attention, GPT-OSS, window, sinks": lambda: _attention(64, (64, 8), 64, 4160, window=128, sinks=True),
    "attention, GPT-OSS, 8 nodes, window, sinks": lambda: _attention(8, (64, 8), 64, 4160, window=128, sinks=True),
    "attention, GPT-OSS, 4 nodes, window, sinks": lambda: _attention(4, (64, 8), 64, 4160, window=128, sinks=True),
    "attention, GPT-OSS, 1 node, window, sinks": lambda: _attention(1, (64, 8), 64, 4160, window=128, sinks=True),
    "attention, float32": lambda: _attention(16, PHI, 64, 512, dtype=torch.float32),
    "attention, float32, window, softcap": lambda: _attention(
        16, PHI, 64, 512, dtype=torch.float32, window=256, softcap=30.0
    ),
    "attention, float32, heads of 128": lambda: _attention(16, LLAMA, 128, 512, dtype=torch.float32),
    "attention, float32, heads of 128, window": lambda: _attention(
        16, LLAMA, 128, 512, dtype=torch.float32, window=256
    ),
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


@pytest.mark.parametrize("target", TARGETS_HERE)
@pytest.mark.parametrize("call", CALLS)
def test_resources(target: str, call: str) -> None:
    with compile_only(target) as compiled:
        CALLS[call]()
    assert_as_committed(target, call, {found.name: found for found in map(resources, compiled)}.values())


def test_every_tile_of_the_table_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = set()
    choose = _attention_triton.choose_attention_launch

    def record(head_dim: int, itemsize: int, *shape: int, masked: bool, **options: Any) -> Any:
        launch = choose(head_dim, itemsize, *shape, masked=masked, **options)
        widest = min(dim for size, dim in _attention_triton._LAUNCHES if size == itemsize and head_dim <= dim)
        chosen.add((itemsize, widest, launch.block_rows, masked))
        return launch

    monkeypatch.setattr(_attention_triton, "choose_attention_launch", record)
    monkeypatch.setattr(JITFunction, "warmup", lambda *_, **__: [])
    with compile_only("sm_90"):
        for call in CALLS.values():
            call()
    # where 64 rows spill on sm_80, no masked call has them
    wanted = {
        (size, dim, launch.block_rows, masked)
        for (size, dim), launches in _attention_triton._LAUNCHES.items()
        for launch in launches
        for masked in (False, True)
        if not (masked and dim > 64 and launch.block_rows == 64)
    }
    assert chosen == wanted


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


def test_the_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    """Every line of bench/attention.py that needs no GPU, at tiny sizes; its rows say what was compared."""
    script = Path(__file__).parents[1] / "bench" / "attention.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OUT": str(tmp_path)}
    environment.pop("MCSD_BENCH_AGAIN", None)

    def run(*options: str) -> tuple[list[dict[str, Any]], str]:
        command = [sys.executable, "-W", "ignore", str(script), "--smoke", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    rows, _ = run()
    compared = [row for row in rows if row["bench"].startswith("attention-c")]
    assert len(compared) == 2 and len(rows) > 2
    for row in compared:
        assert set(row["microseconds"]) == {"tree_attention", "sdpa_dense_mask", "hugging_face", "flex_attention"}
        assert not row["not_timed"] and row["bytes"] > 0 and row["flops"] > 0 and row["roofline_us"] > 0
    written = tmp_path / "attention_gpu.jsonl"
    assert harness.read(written) == rows
    written.write_text(json.dumps(rows[0]) + "\n")
    rows, said = run("--budget", "0")
    assert not rows and "1 of 2 cases have a row" in said and "after 0 s: smoke, 9 nodes, prefix 40, batch 2" in said


def test_the_benchmark_keeps_what_its_graphs_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has bare addresses: tensors that a call alone holds must outlive it."""
    made: list[Any] = []
    monkeypatch.setattr(torch, "cuda", MagicMock(**{"current_device.return_value": 0}))
    clock = attention.Clock(torch.device("cuda"))
    tensor = torch.ones(3)

    def call(read: torch.Tensor) -> torch.Tensor:
        made[:] = [weakref.ref(output := -read)]
        return output

    replay, read = clock.prepare(partial(call, tensor)), weakref.ref(tensor)
    del tensor
    assert read() is not None and made[0]() is not None
    replay.run()
    torch.cuda.CUDAGraph().replay.assert_called_once_with()  # type: ignore[attr-defined]
    del replay
    assert read() is None


def test_the_benchmark_says_which_targets_are_met() -> None:
    cases = attention.cases(argparse.Namespace(smoke=False, model=None, nodes=None, prefix=None, batch=None))
    aimed = [case for case in cases if case.wanted]
    assert len(cases) == 48 and aimed == cases[:4] and {case.prefix for case in aimed} == {4096, 32_768}
    case = aimed[1]
    row = {"over_best_rival": 2.1, "roofline_share": 0.58}
    found = attention.targets(case, row)
    assert found == {">= 2 x the best rival": True, ">= 60 % of the roofline": False}
    assert attention.targets(cases[-1], row) == {}
    assert attention.verdicts([vars(case) | row | {"targets": found}, {"error": "some"}]) == [
        "met: Llama-3-8B, 64 nodes, prefix 32768, batch 1: >= 2 x the best rival: 2.1",
        "MISSED: Llama-3-8B, 64 nodes, prefix 32768, batch 1: >= 60 % of the roofline: 0.58",
    ]
