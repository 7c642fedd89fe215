"""JSON rows: what is in each of them, where they go, which are there already."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"

Row = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Row:
    """Median and 20/80 percentiles."""
    return {name: round(percentile(values, share), 3) for name, share in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}


def path_of(folder: Path, part: str) -> Path:
    return folder / f"gpu_{part}.jsonl"


def read(path: Path) -> Iterator[Row]:
    """The rows of a file; a line that a kill has cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row


def append(folder: Path, part: str, rows: Sequence[Row]) -> None:
    """Add rows in one write, so that those of several workers do not mix."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, part)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        text = "\n" + text
    with open(path, "ab", buffering=0) as out:
        out.write(text.encode())


def done(folders: Sequence[Path], part: str, origin: Row, *, since: str = "", errors_since: str = "") -> set[str]:
    """The units that have a row of this origin.

    Args:
        folders: where to look.
        part: whose rows.
        origin: see `origin`; the device, the versions and the kernels must be the same.
        since: a date; older rows do not count.
        errors_since: a date; older rows that report an error do not count.
    """
    units = set()
    for folder in folders:
        for row in read(path_of(folder, part)):
            same = all(row.get(name) == origin[name] for name in ("device", "kernels", "torch", "triton", "smoke"))
            error = row.get("status") in ("error", "refused", "failed")
            if same and str(row.get("date")) >= (max(since, errors_since) if error else since):
                units.add(str(row.get("unit")))
    return units


def kernels_hash() -> str:
    """Twelve digits that change with the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "mcsd_kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of the checkout (or `$COMMIT`, where there is only a copy of it), "+" behind it if files differ."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("COMMIT")
    return head + ("+" if _output("git", "status", "--porcelain", "--", "mcsd_kernels", "bench/gpu") else "")


def origin(device_name: str, smoke: bool) -> Row:
    """What a row's figures depend on besides its case."""
    import torch
    import triton

    driver = None if smoke else _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": device_name,
        "driver": driver.splitlines()[0] if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "kernels": kernels_hash(),
        "commit": commit(),
        "smoke": smoke,
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
