"""Tables and verdicts from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import rows
from .rows import Row

PARTS = ("checks", "laws", "sanitizer", "verify", "candidates")
BAD = ("failed", "error", "refused")


def latest(folders: Sequence[Path], part: str, *, smoke: bool = False) -> list[Row]:
    """The rows of each unit's last run, in the order in which the units were first done."""
    runs: dict[str, list[Row]] = {}
    for folder in folders:
        for row in rows.read(rows.path_of(folder, part)):
            if bool(row.get("smoke")) != smoke:
                continue
            unit = str(row.get("unit"))
            if unit in runs and runs[unit][0].get("date") != row.get("date"):
                runs[unit].clear()
            runs.setdefault(unit, []).append(row)
    return [row for run in runs.values() for row in run]


def failures(folders: Sequence[Path], parts: Sequence[str], *, smoke: bool = False) -> int:
    """How many rows say that something is wrong."""
    return sum(row.get("status") in BAD for part in parts for row in latest(folders, part, smoke=smoke))


def text(folders: Sequence[Path], *, smoke: bool = False) -> str:
    """The tables of the parts that have rows."""
    found = {part: latest(folders, part, smoke=smoke) for part in PARTS}
    some = next((row for part in PARTS for row in found[part] if row.get("device")), None)
    if some is None:
        return f"no rows in {', '.join(map(str, folders))}"
    origins = {(row.get("device"), row.get("kernels")) for part in PARTS for row in found[part]}
    lines = [
        f"{some['device']}, driver {some.get('driver')}, torch {some.get('torch')}, triton {some.get('triton')},"
        f" kernels {some.get('kernels')}, commit {some.get('commit')}, {some.get('date')}"
    ]
    if len(origins) > 1:
        lines.append("these rows are of more than one device or state of the kernels")
    for part in PARTS:
        if found[part]:
            lines += ["", f"{part}: {_counts(found[part])}", *_TABLES[part](found[part])]
            lines += [f"  {row.get('status')}: {row.get('unit')}: {_why(row)}" for row in found[part] if _is_bad(row)]
    lines += ["", *verdicts(found["verify"], found["candidates"])]
    return "\n".join(lines)


def _is_bad(row: Row) -> bool:
    return row.get("status") in BAD


def _why(row: Row) -> str:
    why = row.get("error") or "; ".join(row.get("faults") or []) or row.get("report") or f"p={row.get('p')}"
    lines = str(why).strip().splitlines() or [""]
    return lines[-1][:300]


def _counts(some: list[Row]) -> str:
    states = [str(row.get("status")) for row in some]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> list[str]:
    """Columns as wide as their widest entry, numbers to the right."""
    cells = [[f"{x:.2f}" if isinstance(x, float) else "-" if x is None else str(x) for x in line] for line in body]
    widths = [max(len(line[i]) for line in [list(head), *cells]) for i in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in ([*zip(line, widths, strict=True)] for line in [list(head), *cells])
    ]


def _checks(some: list[Row]) -> list[str]:
    hosts = [row for row in some if row.get("bench") == "gpu-host" and row.get("status") == "ok"]
    close = sum(row.get("close_calls", 0) for row in some)
    requests = sum(row.get("requests", 0) for row in some)
    lines = [f"  {requests} requests against the oracle, {close} of them close calls"]
    if not hosts:
        return lines
    return lines + table(
        ["a call's cost to the host", "tree", "launches", "torch operators", "device activities", "us"],
        [
            [
                f"{row['case']['operation']} {row['case']['rule']} {row['case']['proposal']}",
                _tree(row["case"]),
                len(row["launches"]),
                len(row["torch_operators"]),
                len(row["device_activities"]),
                row["host_microseconds"],
            ]
            for row in hosts
        ],
    )


def _laws(some: list[Row]) -> list[str]:
    body = [
        [row["unit"], row["texts"], f"{row['p']:.3g}", f"{row['total_variation']:.5f}"] for row in some if "p" in row
    ]
    return table(["law or control", "texts", "p", "total variation"], body)


def _sanitizer(some: list[Row]) -> list[str]:
    return table(
        ["run", "status", "errors"], [[row["unit"], row["status"], row.get("errors", row.get("error"))] for row in some]
    )


def _tree(case: Row) -> str:
    return ",".join(map(str, case["tree"]))


def best_rival(row: Row, *kinds: str) -> tuple[str, float] | None:
    """The fastest rival of these kinds, by name, and its median."""
    medians = {
        name: float(rival["microseconds"]["median"])
        for name, rival in row.get("rivals", {}).items()
        if not kinds or rival["kind"] in kinds
    }
    name = min(medians, key=lambda name: medians[name], default=None)
    return None if name is None else (name, medians[name])


def _verify(some: list[Row]) -> list[str]:
    body = []
    for row in some:
        case = row.get("case", {})
        if row.get("status") != "ok":
            continue
        best = best_rival(row)
        us = row["microseconds"]
        body.append(
            [
                f"{case['rule']} {case['proposal']}",
                case["vocab"],
                _tree(case),
                case["batch"],
                "filters" if case["filters"] != "none" else "none",
                us["median"],
                f"{us['p20']:.1f}-{us['p80']:.1f}",
                row["floor"]["microseconds"],
                row["over_floor"]["median"],
                len(row["launches"]),
                best[1] if best else None,
                best[1] / us["median"] if best else None,
                best[0] if best else None,
                "; ".join(name for name, met in row["targets"].items() if not met) or None,
            ]
        )
    head = ["verify", "vocab", "tree", "batch", "filters", "us", "p20-p80", "floor us", "over floor", "launches"]
    lines = table([*head, "best rival us", "ahead", "best rival", "targets missed"], body)
    return lines + [f"  skipped: {row.get('unit')}: {_why(row)}" for row in some if row.get("status") == "skipped"]


def _candidates(some: list[Row]) -> list[str]:
    body = []
    for row in some:
        if row.get("status") == "ok":
            best, us = best_rival(row), row["microseconds"]
            body.append(
                [
                    row["unit"],
                    us["median"],
                    f"{us['p20']:.1f}-{us['p80']:.1f}",
                    row["floor"]["microseconds"],
                    row["over_floor"]["median"],
                    best[1] if best else None,
                    best[1] / us["median"] if best else None,
                    best[0] if best else None,
                ]
            )
    return table(["", "us", "p20-p80", "floor us", "over floor", "best rival us", "ahead", "best rival"], body)


def verdicts(*parts: list[Row]) -> list[str]:
    """How many rows meet each target, and the worst that does not."""
    met: dict[str, list[bool]] = {}
    for some in parts:
        for row in some:
            operation = str(row.get("bench", "")).removeprefix("gpu-")
            for name, verdict in row.get("targets", {}).items():
                met.setdefault(f"{operation}: {name}", []).append(bool(verdict))
    if not met:
        return []
    body = [[name, sum(found), len(found), "met" if all(found) else "MISSED"] for name, found in met.items()]
    return table(["target", "rows that meet it", "rows", ""], body)


_TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "checks": _checks,
    "laws": _laws,
    "sanitizer": _sanitizer,
    "verify": _verify,
    "candidates": _candidates,
}
