"""The tables and figures of the pages, from the rows in bench/results.

python bench/report.py            # write them; `make report` is the same
python bench/report.py --check    # write nothing; fail if a table or a figure is not what the rows say

In a page, what stands between `<!-- table: NAME -->` or `<!-- figure: NAME -->` and `<!-- end -->` is written here. A
table has the newest row of each case, of the machine that has the newest row of all. What has no rows is left out, with
a line on stderr, and so are rows that do not say all that the table says.

A figure's metadata hold a hash of what it was drawn from, so that the check needs no matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Row
from tables import TABLES, Table, calls, newest, of_one_machine, on_gpu, say, speeds

ROOT = harness.ROOT
PAGES = ("README.md", "docs/algorithm.md", "docs/results.md")
FIGURES = "docs/figures"

REGION = re.compile(r"<!-- (table|figure): (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
MARKER = re.compile(r"<!-- (table|figure): (\w+) -->")


@dataclass(frozen=True)
class Picture:
    """What a figure shows.

    Args:
        file: whose rows; None for a figure that needs none.
        select: what is drawn, from the rows; empty if there is nothing to draw.
        draw: the name of a function in bench/figures.py.
        text: what a reader sees who cannot see the picture.
    """

    file: str | None
    select: Callable[[list[Row]], Any]
    draw: str
    text: str


# ---- figures


def scaling(rows: list[Row]) -> list[Row]:
    """Points of verify_scaling."""
    rows = newest(rows, "branching", "vocab", "batch", "dtype")
    return [
        {
            **{name: row[name] for name in ("nodes", "branching", "vocab", "batch")},
            **row["milliseconds"],
            "floor": row["floor"]["milliseconds"],
        }
        for row in rows
    ]


def scaling_gpu(rows: list[Row]) -> list[Row]:
    """The same from bench/gpu, for one request and for 64."""
    return [
        {
            **{name: row[name] for name in ("nodes", "vocab", "batch")},
            "branching": row["tree"],
            **{name: row["microseconds"][name] / 1e3 for name in ("median", "p20", "p80")},
            "floor": row["floor"]["microseconds"] / 1e3,
        }
        for row in on_gpu(rows)
        if row["batch"] in (1, 64)
    ]


def speed(rows: list[Row]) -> list[Row]:
    """Bars of the speed against plain decoding."""
    names = ("dtype", "temperature", "branching", "over_plain", "over_plain_95", "tokens_per_call")
    return [{name: row[name] for name in names} for row in speeds(rows)]


def tuned(rows: list[Row]) -> Row:
    """The profile of the newest run of `mcsd tune`, as far as it is drawn."""
    if not rows:
        return {}
    row = rows[-1]
    names = ("tokens_per_call", "tokens_per_second", "plain_tokens_per_second", "curve", "shapes")
    settings = {name: row[name] for name in ("target", "draft", "dtype", "device", "temperature")}
    return {**row["chosen"], **{name: row[name] for name in names}, "settings": settings}


PICTURES = {
    "tree_mask": Picture(
        None,
        lambda _: {"branching": [3, 2], "prefix": 3, "node": 7},
        "tree_mask",
        "A token tree of ten nodes beside its attention mask: a node attends to the prefix, its ancestors and itself",
    ),
    "residual": Picture(
        None,
        lambda _: {
            "p": [0.27, 0.06, 0.22, 0.03, 0.16, 0.12, 0.09, 0.05],
            "q": [0.12, 0.24, 0.10, 0.16, 0.18, 0.06, 0.04, 0.10],
            "rejected": [1, 4],
        },
        "residual",
        "The residual is what of p stands above the curve βq, which every rejection lifts",
    ),
    "verify_scaling": Picture(
        "verify_scaling",
        scaling,
        "scaling",
        "Time of verify over vocabulary, for 5 to 256 nodes, one request and eight, with the floor of reading the rows",
    ),
    "verify_scaling_gpu": Picture(
        "verify_scaling_gpu", scaling, "scaling", "Time of verify on a GPU over vocabulary, with the floor"
    ),
    "verify_gpu": Picture(
        "gpu_verify",
        scaling_gpu,
        "scaling",
        "Time of verify on a GPU over vocabulary, for trees of several sizes, with the floor of reading the rows",
    ),
    "tokens_per_call": Picture(
        "shapes", calls, "tokens_per_call", "Tokens per target call by tree, proposal and rule, with 95 % intervals"
    ),
    "tune": Picture(
        "tune", tuned, "tune", "Tokens a second over the size of the tree, predicted and measured, with plain decoding"
    ),
    "speed": Picture(
        "end_to_end", speed, "speed", "Speed against plain decoding by tree; bars left of 1 are slower than plain"
    ),
}


def digest(data: Any) -> str:
    """What a figure's metadata say of its data."""
    return "rows " + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


# ---- pages


@dataclass(frozen=True)
class Report:
    """Everything that can be said with the rows of a folder.

    Args:
        tables: name -> Markdown, where there are rows.
        figures: name -> what is drawn, where there is something to draw.
    """

    tables: dict[str, Table]
    figures: dict[str, Any]

    @staticmethod
    def of(results: Path) -> Report:
        """From the rows of a folder; what is missing is said on stderr."""
        files = {file for file, _ in TABLES.values()}
        rows = {file: of_one_machine(harness.read(results / f"{file}.jsonl"), file) for file in sorted(files)}
        tables, figures = {}, {}
        for name, (file, make) in TABLES.items():
            table = make(rows[file])
            if table is None:
                say(f"table {name}: no rows in {file}.jsonl")
            else:
                tables[name] = table
        for name, picture in PICTURES.items():
            data = picture.select(rows[picture.file] if picture.file else [])
            if data:
                figures[name] = data
            else:
                say(f"figure {name}: no rows in {picture.file}.jsonl")
        return Report(tables, figures)

    def page(self, text: str, name: str) -> str:
        """A page with its regions filled.

        Args:
            text: of the page.
            name: its path under the root.

        Raises:
            ValueError: a marker without an end, or of no table or figure.
        """
        up = "../" * name.count("/")

        def fill(match: re.Match[str]) -> str:
            kind, what, _ = match.groups()
            if what not in (TABLES if kind == "table" else PICTURES):
                raise ValueError(f"{name}: expected a known {kind}, got {what}")
            found = self.tables if kind == "table" else self.figures
            opening = f"<!-- {kind}: {what} -->\n"
            if what not in found:
                return f"{opening}<!-- end -->"
            if kind == "table":
                inside = found[what].markdown(f"{up}bench/results/{TABLES[what][0]}.jsonl")
            else:
                inside = f"![{PICTURES[what].text}]({up}{FIGURES}/{what}.svg)"
            return f"{opening}\n{inside}\n\n<!-- end -->"

        filled, regions = REGION.subn(fill, text)
        if regions != len(MARKER.findall(text)):
            raise ValueError(f"{name}: expected `<!-- end -->` after every marker")
        return filled


def stale(report: Report, root: Path) -> list[str]:
    """What on the pages and among the figures is not what the rows say."""
    found = []
    for name in PAGES:
        text = (root / name).read_text()
        if report.page(text, name) != text:
            found.append(name)
    for name, data in report.figures.items():
        path = root / FIGURES / f"{name}.svg"
        if not path.exists() or digest(data) not in path.read_text():
            found.append(f"{FIGURES}/{name}.svg")
    return found


def write(report: Report, root: Path) -> None:
    """Draw the figures and fill the pages."""
    import figures  # needs matplotlib, which the check does not

    (root / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, data in report.figures.items():
        picture = PICTURES[name]
        getattr(figures, picture.draw)(data, root / FIGURES / f"{name}.svg", digest(data))
    shown = {marker for name in PAGES for marker in MARKER.findall((root / name).read_text())}
    there = [("table", name) for name in report.tables] + [("figure", name) for name in report.figures]
    for kind, name in there:
        if (kind, name) not in shown:
            say(f"{kind} {name}: could be shown, but no page has a place for it")
    for name in PAGES:
        path = root / name
        text = path.read_text()
        filled = report.page(text, name)
        if filled != text:
            path.write_text(filled)
            print(f"{name}: written")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; 1 if the check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the pages are not what the rows say")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="where the rows are")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the pages are")
    options = parser.parse_args(arguments)
    report = Report.of(options.results)
    if not options.check:
        write(report, options.root)
        return 0
    wrong = stale(report, options.root)
    for name in wrong:
        say(f"{name} is not what the rows say; run `make report`")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
