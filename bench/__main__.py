"""Every benchmark that this machine can run, each in a process of its own; `make bench` is `python bench`.

python bench --list                      # what would run, and about how long
python bench                             # all of it, rows to $OUT or bench/results
python bench verify end_to_end           # only these
python bench --skip shapes --skip acceptance
python bench --smoke                     # every one at a tiny size, rows to a temporary folder

Started again, it goes on with what has no row yet of this code and machine (`--again` measures that too). A benchmark
that fails leaves the others alone; the exit status is then 1. Afterwards `make report` makes tables and figures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Of shapes, which has more to measure than a day holds and goes on where it stopped
MINUTES = 30.0


@dataclass(frozen=True)
class Benchmark:
    """One process.

    Args:
        command: after the interpreter; "OUT" and "MINUTES" stand for the folder of the rows and the time of `shapes`.
        smoke: the same at a tiny size; None if there is no such.
        minutes: about how long, on two cores; on a GPU machine for those that need one.
        threads: of torch; None: all.
        gpu: whether it needs one.
    """

    command: str
    smoke: str | None
    minutes: float
    threads: int | None = 1
    gpu: bool = False


END_TO_END = (
    "bench/end_to_end.py --prompts 24 --tokens 48 --branching 2 --branching 3 --branching 4 --branching 1,1"
    " --branching 1,1,1 --branching 4,2,2 --branching 8,1 --dtype"
)
END_TO_END_SMOKE = "bench/end_to_end.py --prompts 2 --tokens 4 --branching 2 --dtype"
ATTENTION = "bench/attention.py --device cpu --dtype float32 --rounds"
BENCHMARKS = {
    "verify": Benchmark(
        "-m pytest bench/test_verify.py --benchmark-only -p no:cacheprovider",
        "-m pytest bench/test_verify.py --benchmark-only -p no:cacheprovider -k test_chain_of_four[32000",
        3,
    ),
    "verify_scaling": Benchmark(
        "bench/verify_scaling.py",
        "bench/verify_scaling.py --vocab 32000 --nodes 5 --batch 1 --rounds 2 --cold-mib 8",
        10,
    ),
    "loop_overhead": Benchmark("bench/loop_overhead.py", "bench/loop_overhead.py --tokens 4", 4),
    "end_to_end": Benchmark(f"{END_TO_END} bfloat16", f"{END_TO_END_SMOKE} bfloat16", 9, None),
    "end_to_end_float32": Benchmark(f"{END_TO_END} float32", f"{END_TO_END_SMOKE} float32", 8, None),
    "acceptance": Benchmark(
        "bench/acceptance.py --limit 24 --draft smollm2-feature --draft smollm2-draft",
        "bench/acceptance.py --limit 2 --tokens 4 --branching 2",
        15,
        None,
    ),
    "attention": Benchmark(
        f"{ATTENTION} 20 --model Qwen3-0.6B --nodes 1 --nodes 16 --nodes 64 --prefix 512 --prefix 4096 --batch 1",
        f"{ATTENTION} 2 --model Qwen3-0.6B --nodes 1 --prefix 512 --batch 1",
        2,
    ),
    "shapes": Benchmark(
        "bench/shapes.py --output OUT/shapes.jsonl --minutes MINUTES",
        "bench/shapes.py --output OUT/shapes.jsonl --minutes 0.05 --prompts 2 --tokens 4",
        MINUTES,
        None,
    ),
    "tune": Benchmark(
        "bench/tune.py",
        "bench/tune.py -- --prompts 1 --max-new-tokens 8 --nodes 3 --depth 1 --width 2",
        15,
        None,
    ),
    "gpu": Benchmark(
        "-m bench.gpu all --budget checks=150 --budget laws=45 --budget sanitizer=55 --budget verify=190"
        " --budget candidates=70",
        "-m bench.gpu all --smoke",
        10,
        None,
        gpu=True,
    ),
    "attention_gpu": Benchmark("bench/attention.py --budget 360", None, 8, None, gpu=True),
    "loop_gpu": Benchmark("bench/loop.py --budget 270", "bench/loop.py --smoke", 7, None, gpu=True),
    "verify_scaling_gpu": Benchmark("bench/verify_scaling.py --device cuda --batch 1", None, 2, None, gpu=True),
}


def have_gpu() -> bool:
    """Whether torch sees a GPU, asked in a process of its own, so that this one holds no device."""
    ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True).returncode == 0


def chosen(names: Sequence[str], skipped: Sequence[str], gpu: bool) -> dict[str, Benchmark]:
    """What would run, in order.

    Args:
        names: only these; empty for all.
        skipped: not these.
        gpu: whether there is one.
    """
    return {
        name: benchmark
        for name, benchmark in BENCHMARKS.items()
        if name not in skipped and (name in names or not names) and (gpu or not benchmark.gpu)
    }


def command_of(benchmark: Benchmark, out: Path, minutes: float, smoke: bool) -> list[str]:
    """The command line of its process."""
    words = ((benchmark.smoke or "") if smoke else benchmark.command).split()
    return [sys.executable, *(word.replace("OUT", str(out)).replace("MINUTES", f"{minutes:g}") for word in words)]


def listing(benchmarks: dict[str, Benchmark], minutes: float) -> str:
    """Names, minutes and commands."""
    lines, total = [], 0.0
    for name, benchmark in benchmarks.items():
        takes = minutes if name == "shapes" else benchmark.minutes
        total += takes
        lines.append(f"{name:20} {takes:4.0f} min  python {benchmark.command.replace('MINUTES', f'{minutes:g}')}")
    return "\n".join([*lines, f"{'all':20} {total:4.0f} min, on a quiet machine of two cores"])


def run(name: str, benchmark: Benchmark, out: Path, options: argparse.Namespace) -> bool:
    """One benchmark; whether it went well."""
    environment = {**os.environ, "OUT": str(out), "MCSD_BENCH_RECORD": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment.pop("OMP_NUM_THREADS", None)
    if benchmark.threads:
        environment["OMP_NUM_THREADS"] = str(benchmark.threads)
    if options.again:
        environment["MCSD_BENCH_AGAIN"] = "1"
    start = time.monotonic()
    print(f"\n== {name}", flush=True)
    command = command_of(benchmark, out, options.minutes, options.smoke)
    well = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode == 0
    print(f"== {name}: {'done' if well else 'FAILED'}, {(time.monotonic() - start) / 60:.1f} min", flush=True)
    return well


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or list; 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(
        prog="python bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--skip", action="append", default=[], choices=tuple(BENCHMARKS))
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time for shapes, which goes on where it stopped"
    )
    parser.add_argument("--again", action="store_true", help="measure what has a row of this code and machine, too")
    parser.add_argument("--list", action="store_true", help="print what would run, and about how long")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, rows to a temporary folder")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"expected names of {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    benchmarks = chosen(options.names, options.skip, have_gpu())
    missing = [name for name in options.names if name not in benchmarks and name not in options.skip]
    if missing:
        parser.error(f"expected a GPU for {', '.join(missing)}")
    if options.list:
        print(listing(benchmarks, options.minutes))
        return 0
    out = Path(tempfile.mkdtemp(prefix="mcsd-bench-") if options.smoke else os.environ.get("OUT") or RESULTS).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"rows go to {out}")
    if options.smoke:
        benchmarks = {name: benchmark for name, benchmark in benchmarks.items() if benchmark.smoke}
    results = {name: run(name, benchmark, out, options) for name, benchmark in benchmarks.items()}
    print(f"\nrows in {out}; {sum(results.values())} of {len(results)} benchmarks done")
    failed = [name for name, well in results.items() if not well]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
