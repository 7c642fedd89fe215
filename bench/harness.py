"""How the benchmarks measure: rivals in turn, one call each, and one JSON row a comparison.

Rows go to `$OUT`, or to bench/results, if `MCSD_BENCH_RECORD` is set; they are printed in any case. A row says the
commit, the machine, and `code`, a hash of the sources of both packages: a benchmark that is started again leaves out
what has a row of the same code, machine and case.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from mcsd_kernels import reference, verify

if TYPE_CHECKING:
    from drawn_trees import Inputs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mcsd_kernels", "mcsd")

Row = dict[str, Any]


def ours(inputs: Inputs) -> Callable[[], Any]:
    """A call of `verify` with the next candidates and uniform numbers."""
    drawn = itertools.cycle(inputs.drawn)

    def call() -> Any:
        tokens, uniforms = next(drawn)
        return verify(inputs.target, inputs.draft, tokens, inputs.parents, uniforms, max_depth=inputs.depth)

    return call


def check(inputs: Inputs, against_oracle: int = 4) -> float:
    """Refuse to time a wrong kernel; returns the mean number of tokens emitted.

    Args:
        inputs: of a benchmark.
        against_oracle: how many of its calls are compared with the float64 oracle.

    Raises:
        AssertionError: a clear decision differs.
    """
    lengths = []
    for number, (tokens, uniforms) in enumerate(inputs.drawn):
        call = (inputs.target, inputs.draft, tokens, inputs.parents, uniforms)
        got = verify(*call, max_depth=inputs.depth)
        lengths.append(got.length.float().mean())
        if number < against_oracle:
            expected, margin = reference.verify(*call, max_depth=inputs.depth, return_margin=True)
            clear = torch.as_tensor(margin).cpu() > 1e-5
            for ours_part, oracle_part in zip(got, expected, strict=True):
                same = torch.equal(ours_part.cpu()[clear], oracle_part.cpu()[clear])
                assert same, "verify disagrees with the oracle"
    return float(torch.stack(lengths).mean())


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


def alone(contenders: dict[str, Callable[[], Any]], rounds: int, loops: int = 7) -> dict[str, list[float]]:
    """As `interleave`, but each contender has loops to itself, in which its inputs and code are in the caches.

    The loops take turns: a loop may take less time than a slow moment of the machine. Returned is each loop's median.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(loops):
        for name, call in contenders.items():
            times[name].append(statistics.median(interleave({name: call}, rounds)[name]))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median and 20/80 percentiles."""
    cuts = statistics.quantiles(times, n=5)
    return {"median": round(statistics.median(times), 4), "p20": round(cuts[0], 4), "p80": round(cuts[3], 4)}


def interval(counts: Any, over: Any = None, samples: int = 2000) -> tuple[float, float, float]:
    """A ratio of sums over prompts, or its ratio to another side's on the same prompts, and its 95 % interval.

    Args:
        counts: `[prompts, 2]`, for instance tokens and calls: the ratio is of their sums.
        over: `[prompts, 2]` of the other side; None for the ratio itself.
        samples: of the bootstrap over prompts, at a fixed seed.
    """
    ours, theirs = np.asarray(counts, float), None if over is None else np.asarray(over, float)
    picks = np.random.default_rng(0).integers(0, len(ours), (samples, len(ours)))

    def ratio(some: Any) -> Any:
        rate = ours[some, 0].sum(-1) / ours[some, 1].sum(-1)
        return rate if theirs is None else rate / (theirs[some, 0].sum(-1) / theirs[some, 1].sum(-1))

    low, high = np.quantile(ratio(picks), [0.025, 0.975])
    return float(ratio(np.arange(len(ours)))), float(low), float(high)


def machine() -> Row:
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


@cache
def commit() -> str | None:
    """The checkout's commit, "+" behind it if sources differ from it; None where there is no checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, cwd=ROOT)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if named := os.environ.get("COMMIT"):  # of a copy without its history
        return named
    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--", *PACKAGES, "bench/*.py") else "")


@cache
def code() -> str:
    """Twelve digits that change with the sources of the packages."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def read(path: Path) -> list[Row]:
    """The rows of a file, which is left as it is; a line that is cut short or being written is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def path_of(file: str) -> Path:
    """Where the rows of a benchmark go."""
    return Path(os.environ.get("OUT") or RESULTS) / f"{file}.jsonl"


def recorded(file: str, cases: Sequence[Row]) -> bool:
    """Whether each case has a row of this code and machine, so that a benchmark started again may leave it out.

    Never, unless rows are kept, or where `MCSD_BENCH_AGAIN` is set.
    """
    if not os.environ.get("MCSD_BENCH_RECORD") or os.environ.get("MCSD_BENCH_AGAIN"):
        return False
    here = {"code": code(), "machine": machine()}
    rows = read(path_of(file))
    wanted = json.loads(json.dumps([{**case, **here} for case in cases]))  # as it reads in a row: lists, not tuples
    return all(any(all(row.get(name) == value for name, value in case.items()) for row in rows) for case in wanted)


def record(file: str, row: Row) -> None:
    """Append one row to the benchmark's file, if `MCSD_BENCH_RECORD` asks for it; print it in any case."""
    row = {**row, "date": time.strftime("%Y-%m-%d"), "commit": commit(), "code": code(), "machine": machine()}
    print(json.dumps(row), flush=True)
    if os.environ.get("MCSD_BENCH_RECORD"):
        path = path_of(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as out:
            out.write(json.dumps(row) + "\n")
