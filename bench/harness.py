"""How the benchmarks measure: rivals in turn, one call each, and one JSON row a comparison."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of CPU time of every call; the contenders take turns, so that a slow moment hits them all.

    Process CPU time on one thread: what other programs on the machine do costs neither side.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.process_time()
            call()
            times[name].append((time.process_time() - start) * 1e3)
    return times


def alone(contenders: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """As `interleave`, but each contender has its loop to itself: its inputs and code are in the caches."""
    times: dict[str, list[float]] = {}
    for name, call in contenders.items():
        times |= interleave({name: call}, rounds, warmup)
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median and 20/80 percentiles."""
    cuts = statistics.quantiles(times, n=5)
    return {"median": round(statistics.median(times), 4), "p20": round(cuts[0], 4), "p80": round(cuts[3], 4)}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def record(file: str, row: dict[str, Any]) -> None:
    """Append one row to `results/<file>.jsonl`, if `MCSD_BENCH_RECORD` asks for it; print it in any case."""
    row = {**row, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    print(json.dumps(row))
    if os.environ.get("MCSD_BENCH_RECORD"):
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / f"{file}.jsonl", "a") as out:
            out.write(json.dumps(row) + "\n")
