"""compute-sanitizer on a small case: memcheck and racecheck find nothing, and find what was planted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from .plan import Sizes
from .rows import ROOT
from .units import Context, Unit

TOOLS = ("memcheck", "racecheck")
SECONDS = 120
PLANTED = "planted"


def units(sizes: Sizes) -> list[Unit]:
    """Each tool on each rule, and on a kernel with the fault that it looks for."""
    return [
        Unit("sanitizer", f"{tool} {case}", partial(check, tool, case))
        for case in ("recursive", "traversal", PLANTED)
        for tool in TOOLS
    ]


def executable() -> str | None:
    """The tool's path, or None."""
    found = shutil.which("compute-sanitizer")
    if found is None and os.path.exists("/usr/local/cuda/bin/compute-sanitizer"):
        found = "/usr/local/cuda/bin/compute-sanitizer"
    return found


def errors_in(report: str) -> int | None:
    """How many errors the tool counted; None if it did not come to its end."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", report)
    return int(found[-1]) if found else None


def check(tool: str, case: str, context: Context) -> Iterator[dict[str, Any]]:
    """The row of one run."""
    row: dict[str, Any] = {"bench": "gpu-sanitizer", "case": {"tool": tool, "case": case}}
    path = executable()
    if path is None:
        yield {**row, "status": "skipped", "error": "compute-sanitizer is not there"}
        return
    # without its cache, torch gives every tensor memory of its own, and a step beyond one is seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # libraries ask the driver what it may refuse
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [path, "--tool", tool, *options, sys.executable, "-m", "bench.gpu.sanitized", tool, case]
    command += ["--smoke"] if context.sizes.smoke else []
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        yield {**row, "status": "error", "error": f"not done in {SECONDS} s"}
        return
    errors = errors_in(run.stdout)
    finished = "sanitized case done" in run.stdout
    if errors is None or not (finished or case == PLANTED):
        yield {**row, "status": "error", "error": f"exit {run.returncode}", "report": run.stdout[-2000:]}
        return
    sound = errors > 0 if case == PLANTED else errors == 0
    yield {
        **row,
        "status": "ok" if sound else "failed",
        "errors": errors,
        "wanted": "> 0" if case == PLANTED else "0",
        "report": "" if sound else run.stdout[:3000],
    }
