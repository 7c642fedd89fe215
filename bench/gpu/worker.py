"""Does the units of some parts that have no rows yet, and appends their rows. Started by `__main__`."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from . import rows
from .plan import GPU, SMOKE, Sizes

# Lines on standard output: where it runs, which unit is begun, that it is done, and that something is compiled.
ORIGIN, BEGIN, END, COMPILED = "= ", "> ", "< ", "+ "
BROKEN = 75  # exit status: the device is of no more use to this process, whose unit has a row that says so


def units_of(part: str, sizes: Sizes) -> list[Any]:
    """The units of a part, in order."""
    from . import candidates, checks, laws, sanitizer, verify

    parts = {"checks": checks, "laws": laws, "sanitizer": sanitizer, "verify": verify, "candidates": candidates}
    return parts[part].units(sizes)


def run(options: argparse.Namespace) -> int:
    """Do the units; returns the exit status."""
    sizes = SMOKE if options.smoke else GPU
    if options.smoke:
        interpret()
    from .units import Context

    context, out = Context(sizes), Path(options.out)
    origin = rows.origin(context.device.name, options.smoke)
    print(f"{ORIGIN}{json.dumps(origin)}", flush=True)
    folders = [out] if options.smoke else [out, rows.RESULTS]
    left = {}
    for part in options.parts:
        done = rows.done(folders, part, origin, since=options.since, errors_since=options.errors_since)
        units = [unit for unit in units_of(part, sizes) if all(text in unit.name for text in options.only)]
        left[part] = [unit for unit in units if unit.name not in done]
    if options.warm != "no":
        warm([unit for units in left.values() for unit in units], context, options)
    if options.warm == "only":
        return 0
    for part, units in left.items():
        for unit in units[options.index :: options.workers]:
            if time.time() > options.deadline:
                return 0
            print(f"{BEGIN}{part}: {unit.name}", flush=True)
            start, broken = time.perf_counter(), False
            try:
                found = list(unit.run(context))
            except Exception as problem:
                broken = context.is_broken(problem)
                text = "".join(traceback.format_exception(problem))
                print(text, file=sys.stderr)
                found = [{"bench": f"gpu-{part}", "status": "error", "error": text[-2000:]}]
            seconds = round(time.perf_counter() - start, 2)
            more = {"unit": unit.name, "seconds": seconds, "date": rows.now(), **origin}
            rows.append(out, part, [row | more for row in found])
            print(f"{END}{', '.join(brief(row) for row in found)} ({seconds} s)", flush=True)
            if broken:
                return BROKEN
    return 0


def warm(units: list[Any], context: Any, options: argparse.Namespace) -> None:
    """Compile the kernels of the units, this worker's share of the groups; what fails here will say so in its row."""
    import torch._inductor.config

    # what is timed while others compile shall not be a choice for later
    torch._inductor.config.autotune_local_cache = False
    groups: dict[Hashable, list[Any]] = {}
    for unit in [unit for unit in units if unit.warm][: 1 if options.smoke else None]:
        for group, task in unit.warm.items():
            groups.setdefault(group, []).append(task)
    for tasks in list(groups.values())[options.index :: options.workers]:
        for task in tasks:
            if time.time() > options.deadline:
                return
            print(COMPILED, flush=True)
            try:
                task(context)
            except Exception as problem:
                print(f"compiling ahead: {type(problem).__name__}: {problem}"[:500], flush=True)
                if context.is_broken(problem):
                    return


def brief(row: rows.Row) -> str:
    """A row in a word or two."""
    if row.get("microseconds"):
        return f"{row['status']} {row['microseconds']['median']} us"
    return str(row["status"]) + (f" p={row['p']:.3g}" if "p" in row else "")


def interpret() -> None:
    """Triton's interpreter as the tests repair it, for results that are those of a GPU."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(rows.ROOT / "tests"))
    import triton_interpreter  # type: ignore[import-not-found]

    triton_interpreter.install()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a worker, which `__main__` sets."""
    made = argparse.ArgumentParser(prog="python -m bench.gpu.worker")
    made.add_argument("parts", nargs="+")
    made.add_argument("--out", required=True)
    made.add_argument("--deadline", type=float, required=True)
    made.add_argument("--index", type=int, default=0)
    made.add_argument("--workers", type=int, default=1)
    made.add_argument("--warm", choices=("no", "first", "only"), default="no")
    made.add_argument("--only", action="append", default=[])
    made.add_argument("--since", default="")
    made.add_argument("--errors-since", default="")
    made.add_argument("--smoke", action="store_true")
    return made.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(parse()))
