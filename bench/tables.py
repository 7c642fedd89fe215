"""The tables of the pages: which rows they take, and how their cells read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
from harness import Row

# One tree for each number of nodes; the figure has the others
TABLE_TREES = ((2, 1), (4, 3), (3, 4, 4), (3, 4, 4, 4))
SPEED_FIELDS = ("target", "draft", "over_plain_95")
PROPOSALS = ("without_replacement", "with_replacement", "greedy", "point")


@dataclass(frozen=True)
class Table:
    """Cells in Markdown, and the rows that they came from."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    rows: Sequence[Row]
    note: str = ""

    def markdown(self, source: str) -> str:
        """The table, and under it what its numbers depend on."""
        head, *body = (f"| {' | '.join(line)} |" for line in (self.head, *self.body))
        table = "\n".join([head, "|" + "---|" * len(self.head), *body])
        return f"{table}\n\n{self.note}{' ' if self.note else ''}{origin(self.rows)} ([rows]({source}))."


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr)


def machine_of(row: Row) -> str:
    """The processor that a row was measured on."""
    machine = row.get("machine", {})
    names = (machine.get("gpu"), machine.get("device"), row.get("device"), machine.get("cpu"))
    return str(next((name for name in names if name and name not in ("cpu", "cuda")), None))


def newest(rows: Iterable[Row], *names: str) -> list[Row]:
    """The newest row of each case, in the order in which the cases were first measured.

    Args:
        rows: in the order of the file; of two of one day, the later line is the newer one.
        names: the fields that tell cases apart; a row without one of them has None there.
    """
    found: dict[str, Row] = {}
    for row in rows:
        case = json.dumps([row.get(name) for name in names])
        if case not in found or str(row.get("date", "")) >= str(found[case].get("date", "")):
            found[case] = row
    return list(found.values())


def of_one_machine(rows: list[Row], file: str) -> list[Row]:
    """The rows of the machine that has the newest one."""
    if not rows:
        return []
    last = max(enumerate(rows), key=lambda pair: (str(pair[1].get("date", "")), pair[0]))[1]
    kept = [row for row in rows if machine_of(row) == machine_of(last)]
    if len(kept) < len(rows):
        say(f"{file}: {len(rows) - len(kept)} rows of other machines than {machine_of(last)} left out")
    return kept


def complete(rows: list[Row], *names: str) -> list[Row]:
    """The rows that have all these fields."""
    return [row for row in rows if all(row.get(field) is not None for field in names)]


def say_left_out(name: str, rows: list[Row], kept: list[Row]) -> None:
    """How many rows do not say what the table says."""
    if len(kept) < len(rows):
        say(f"{name}: {len(rows) - len(kept)} rows left out that do not say all that the table says")


def origin(rows: Sequence[Row]) -> str:
    """Machine, threads, versions, dates and commits of rows, as far as they say."""

    def values(name: str) -> str:
        found = {str(value) for row in rows for where in (row, row.get("machine", {})) if (value := where.get(name))}
        return " and ".join(sorted(found))

    threads = values("threads")
    parts = [
        " and ".join(dict.fromkeys(map(machine_of, rows))),
        f"{threads} thread{'s' if threads != '1' else ''}" if threads else "",
        *(f"{name} {values(name)}" for name in ("torch", "transformers", "triton") if values(name)),
        values("date"),
        f"commit {values('commit')}" if values("commit") else "",
    ]
    return ", ".join(part for part in parts if part)


def tree(branching: Sequence[int]) -> str:
    """A tree's name: the chain of 4, or its branching factors."""
    if all(width == 1 for width in branching):
        return f"chain of {len(branching)}"
    return f"({', '.join(map(str, branching))}{',' if len(branching) == 1 else ''})"


def times(ratio: float) -> str:
    """A ratio, to a tenth, or to a hundredth where it is near 1."""
    return f"{ratio:.2f} ×" if 0.8 < ratio < 1.25 else f"{ratio:.1f} ×"


def between(low: float, high: float) -> str:
    """An interval."""
    return f"{low:.2f} to {high:.2f}"


# ---- tables


def verify_cpu(rows: list[Row]) -> Table | None:
    """`verify` and its rivals."""
    rows = newest(rows, "case")
    if not rows:
        return None
    names = {
        "transformers _speculative_sampling": "transformers `_speculative_sampling`",
        "softmax + textbook rejection": "softmax of every node, textbook rejection",
        "log-sum-exp of all rows": "only the log-sum-exp of all rows",
    }
    overlap = sum(row["overlap"] for row in rows) / len(rows)
    body = [
        [
            row["case"],
            f"{row['milliseconds']['median']:.2f} ms",
            f"{row['rival_milliseconds']['median']:.2f} ms, {names.get(row['rival'], row['rival'])}",
            f"{row['rival_over_verify']['median']:.1f} ×",
            f"{row['in_loops_of_their_own']['rival_over_verify']:.1f} ×",
        ]
        for row in rows
    ]
    head = [f"from raw logits, overlap {overlap:.2f}", "`verify`", "rival", "taking turns", "each in loops of its own"]
    return Table(head, body, rows, "CPU time, float32, medians.")


def verify_scaling(rows: list[Row]) -> Table | None:
    """Milliseconds and times the floor, a column a vocabulary."""
    rows = newest(rows, "branching", "vocab", "batch", "dtype")
    rows = [row for row in rows if tuple(row["branching"]) in TABLE_TREES]
    if not rows:
        return None
    vocabularies = sorted({row["vocab"] for row in rows})
    cells = {(tuple(row["branching"]), row["batch"], row["vocab"]): row for row in rows}
    body = []
    for batch in sorted({row["batch"] for row in rows}):
        for branching in TABLE_TREES:
            line = [cells.get((branching, batch, vocab)) for vocab in vocabularies]
            if any(line):
                texts = [
                    f"{row['milliseconds']['median']:.2f} ms, {row['over_floor']['median']:.1f} ×" if row else "–"
                    for row in line
                ]
                nodes = next(row["nodes"] for row in line if row)
                body.append([str(batch), f"{nodes}, {tree(branching)}", *texts])
    note = "Time of a call with nothing in the caches, and times the floor: the accepted path's rows, read once."
    return Table(["requests", "nodes", *(f"{vocab:,} tokens" for vocab in vocabularies)], body, rows, note)


def end_to_end(rows: list[Row]) -> Table | None:
    """Against plain decoding, the best tree first."""
    say_left_out("end_to_end", rows, complete(rows, *SPEED_FIELDS))
    rows = speeds(rows)
    if not rows:
        return None
    body = [
        [
            tree(row["branching"]),
            row["dtype"],
            f"{row['temperature']:g}",
            f"{row['prompts']} × {row['max_new_tokens']}",
            f"{row['tokens_per_call']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['plain_tokens_per_second']:.1f}",
            f"{row['over_plain']:.2f} ×, {between(*row['over_plain_95'])}",
        ]
        for row in rows
    ]
    head = [
        "tree",
        "format",
        "T",
        "prompts × tokens",
        "tokens per call",
        "tokens a second",
        "plain",
        "over plain, 95 %",
    ]
    pairs = " and ".join(dict.fromkeys(f"{row['target']} with {row['draft']}" for row in rows))
    return Table(head, body, rows, f"{pairs}; transformers' `generate` is the plain side.")


def speeds(rows: list[Row]) -> list[Row]:
    """The rows of end_to_end that say all that is needed, a format and temperature after the other, the best first."""
    rows = complete(rows, *SPEED_FIELDS)
    keys = ("target", "draft", "dtype", "temperature", "rule", "proposal", "clock", "branching")
    rows = newest(rows, *keys)
    return sorted(rows, key=lambda row: (row["dtype"], -row["temperature"], -row["over_plain"]))


def acceptance(rows: list[Row]) -> Table | None:
    """Overlap by depth, and tokens per call."""
    rows = newest(rows, "target", "draft", "prompts", "temperature", "dtype", "proposal")
    if not rows:
        return None
    shapes = list(dict.fromkeys(shape for row in rows for shape in row.get("tokens_per_call", {})))

    def mean(value: Row | None) -> str:
        return f"{value['mean']:.2f} ± {value['half_width_95']:.2f}" if value else "–"

    body = [
        [
            row["draft"],
            f"{row['temperature']:g}",
            f"{row['count']} of {row['prompts']}",
            ", ".join(map(mean, row.get("overlap_by_depth", []))) or "–",
            *(mean(row.get("tokens_per_call", {}).get(shape)) for shape in shapes),
        ]
        for row in rows
    ]
    names = [tree([int(width) for width in shape.split(",")]) for shape in shapes]
    head = ["draft", "T", "prompts", "overlap after 0, 1, 2 guesses", *names]
    return Table(head, body, rows, "Overlap Σ min(p, q), and tokens per target call by tree; ± is 95 % over prompts.")


def loop_overhead(rows: list[Row]) -> Table | None:
    """What a cycle costs outside the forwards."""
    whole = complete(rows, "target", "draft", "dtype")
    say_left_out("loop_overhead", rows, whole)
    rows = newest(whole, "draft", "dtype", "branching", "temperature")
    if not rows:
        return None

    def milliseconds(row: Row, name: str) -> str:
        value = row.get(f"milliseconds_{name}")
        return "–" if value is None else f"{value:.1f} ms"

    body = [
        [
            tree(row["branching"]),
            f"{row['temperature']:g}",
            milliseconds(row, "outside_forwards_per_cycle"),
            milliseconds(row, "of_the_first_cycle"),
            milliseconds(row, "of_a_further_cycle"),
            milliseconds(row, "in_forwards_per_cycle"),
            str(row["cycles"]),
        ]
        for row in rows
    ]
    pairs = " and ".join(dict.fromkeys(f"{row['target']} with {row['draft']} in {row['dtype']}" for row in rows))
    head = ["tree", "T", "outside the forwards, a cycle", "the first one", "a further one", "in forwards", "cycles"]
    note = f"CPU time; the first cycle includes what is done once a generation. {pairs}."
    return Table(head, body, rows, note)


def shapes(rows: list[Row]) -> Table | None:
    """Tokens per call, a column a tree."""
    points = calls(rows)
    if not points:
        return None
    trees = list(dict.fromkeys(tuple(point["branching"]) for point in points))
    lines: dict[tuple[float, str, str], dict[tuple[int, ...], Row]] = {}
    for point in points:
        line = lines.setdefault((point["temperature"], point["proposal"], point["rule"]), {})
        line[tuple(point["branching"])] = point

    def cell(point: Row | None) -> str:
        return f"{point['value']:.2f}, {between(point['low'], point['high'])}" if point else "–"

    body = [
        [f"{temperature:g}", proposal, rule, str(max(point["prompts"] for point in line.values()))]
        + [cell(line.get(branching)) for branching in trees]
        for (temperature, proposal, rule), line in lines.items()
    ]
    pairs = dict.fromkeys(f"{row['target']} with {row['draft']}, " for row in complete(rows, "target", "draft"))
    run = f"{' and '.join(pairs)}{rows[-1]['dtype']}, {rows[-1]['tokens']} tokens a prompt"
    note = f"Tokens per target call, 95 % by bootstrap over prompts; {run}."
    return Table(["T", "proposal", "rule", "prompts", *map(tree, trees)], body, rows, note)


def calls(rows: list[Row]) -> list[Row]:
    """Tokens per call of every setting of shapes, over the prompts that all settings of its temperature have."""
    if not rows:
        return []
    runs = ("tokens", "dtype", "device")
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in runs)]
    found: dict[tuple[Any, ...], dict[int, tuple[int, int]]] = {}
    for row in newest(rows, "prompt", "branching", "proposal", "rule", "temperature"):
        key = (row["temperature"], row["proposal"], row["rule"], tuple(row["branching"]))
        found.setdefault(key, {})[row["prompt"]] = (row["emitted"], row["calls"])
    points = []
    for key in sorted(found, key=lambda key: (-key[0], PROPOSALS.index(key[1]), key[2])):
        shared = set.intersection(*(set(prompts) for other, prompts in found.items() if other[0] == key[0]))
        if len(shared) < 2:
            continue
        value, low, high = harness.interval([found[key][prompt] for prompt in sorted(shared)])
        point = {"temperature": key[0], "proposal": key[1], "rule": key[2], "branching": list(key[3])}
        bounds = {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}
        points.append({**point, **bounds, "prompts": len(shared)})
    return points


def tune(rows: list[Row]) -> Table | None:
    """The trees that the newest run measured, the fastest first, and plain decoding."""
    if not rows:
        return None
    row = rows[-1]
    body = []
    for shape in sorted(row["shapes"], key=lambda shape: -shape["tokens_per_second"]):
        name = tree(shape["branching"]) if shape["branching"] else f"depth {shape['depth']}"
        predicted = shape["predicted_tokens_per_second"]
        body.append(
            [
                name + (", made by hand" if shape["hand_made"] else ""),
                str(shape["nodes"] - 1),
                f"{shape['proposal']}, {shape['rule']}",
                f"{shape['tokens_per_call']:.2f}",
                "–" if predicted is None else f"{predicted:.1f}",
                f"{shape['tokens_per_second']:.1f}",
                f"{shape['tokens_per_second'] / row['plain_tokens_per_second']:.2f} ×",
            ]
        )
    head = ["tree", "candidates", "proposal, rule", "tokens per call", "predicted", "tokens a second", "over plain"]
    pair = f"{row['target']} with {row['draft']} in {row['dtype']}, T = {row['temperature']:g}"
    run = f"{row['prompts']} prompts × {row['max_new_tokens']} tokens, in turns"
    note = f"{pair}, {run}; plain decoding {row['plain_tokens_per_second']:.1f} tokens a second."
    return Table(head, body, [row], note)


def attention(rows: list[Row]) -> Table | None:
    """Tree attention and its best rival."""
    rows = [row for row in rows if str(row.get("bench", "")).startswith("attention-") and "best_rival" in row]
    keys = ("bench", "model", "dtype", "nodes", "prefix", "batch")
    rows = newest(rows, *keys)
    if not rows:
        return None
    # on a CPU the bandwidth in the rows is that of a cache
    roofline = all(row["bench"] == "attention-cuda" for row in rows)
    body = []
    for row in rows:
        own, best = row["microseconds"]["tree_attention"]["median"], row["best_rival"]
        body.append(
            [
                f"{row['model']}, {row['dtype']}",
                *(f"{row[name]:,}" for name in ("nodes", "prefix", "batch")),
                f"{own:,.0f} us",
                f"{row['microseconds'][best]['median']:,.0f} us, {best.replace('_', ' ')}",
                times(row["over_best_rival"]),
                *([f"{row['roofline_share']:.0%}"] if roofline else []),
            ]
        )
    head = ["heads of", "nodes", "prefix", "batch", "`tree_attention`", "best rival", "faster"]
    head += ["of the roofline"] if roofline else []
    return Table(head, body, rows, "One layer.")


def on_gpu(rows: list[Row]) -> list[Row]:
    """The rows of bench/gpu's `verify` without filters, by the default rule and proposal."""
    kept = []
    for row in rows:
        case = row.get("case", {})
        setting = (case.get("rule"), case.get("proposal"), case.get("filters"))
        if row.get("status") == "ok" and not row.get("smoke") and setting == ("recursive", PROPOSALS[0], "none"):
            kept.append({**case, **row})
    return newest(kept, "tree", "vocab", "batch", "dtype")


def gpu_verify(rows: list[Row]) -> Table | None:
    """`verify` on a GPU."""
    rows = on_gpu(rows)
    if not rows:
        return None
    body = []
    for row in rows:
        own = row["microseconds"]["median"]
        rivals = {name: rival["microseconds"]["median"] for name, rival in row.get("rivals", {}).items()}
        best = min(rivals, key=lambda name: rivals[name], default=None)
        body.append(
            [
                f"{row['nodes']}, {tree(row['tree'])}",
                f"{row['vocab']:,}",
                str(row["batch"]),
                f"{own:.1f} us",
                times(row["over_floor"]["median"]),
                f"{rivals[best]:.1f} us, {best}" if best else "–",
                times(rivals[best] / own) if best else "–",
            ]
        )
    head = ["nodes", "tokens", "requests", "`verify`", "over the floor", "best rival", "faster"]
    return Table(head, body, rows, "bfloat16, replayed CUDA graphs, nothing in the L2 cache.")


def loop_gpu(rows: list[Row]) -> Table | None:
    """The loop on a GPU, a line a side."""
    keys = ("target", "side", "acceptance", "prompt", "new_tokens", "dtype")
    rows = newest((row for row in rows if row.get("target") != "smoke"), *keys)
    if not rows:
        return None
    body = []
    for row in rows:
        outside, share = row.get("microseconds_outside_forwards_per_step"), row.get("outside_over_target_forward")
        body.append(
            [
                row["target"],
                f"{row['acceptance']:g}",
                row["side"],
                f"{row['tokens_per_second']:.0f}",
                *("–" if row[name] is None else times(row[name]) for name in ("over_greedy", "over_assisted")),
                ("–" if outside is None else f"{outside:,.0f} us") + ("" if share is None else f", {share:.1%}"),
            ]
        )
    head = ["target's shape", "acceptance", "side", "tokens a second", "over greedy", "over assisted"]
    head += ["a step's time outside the forwards"]
    return Table(head, body, rows, "Times outside the forwards beside that of one forward of the target over the tree.")


TABLES: dict[str, tuple[str, Callable[[list[Row]], Table | None]]] = {
    "verify_cpu": ("verify_cpu", verify_cpu),
    "verify_scaling": ("verify_scaling", verify_scaling),
    "verify_scaling_gpu": ("verify_scaling_gpu", verify_scaling),
    "end_to_end": ("end_to_end", end_to_end),
    "acceptance": ("acceptance", acceptance),
    "loop_overhead": ("loop_overhead", loop_overhead),
    "shapes": ("shapes", shapes),
    "tune": ("tune", tune),
    "attention_cpu": ("attention_cpu", attention),
    "attention_gpu": ("attention_gpu", attention),
    "verify_gpu": ("gpu_verify", gpu_verify),
    "loop_gpu": ("loop_gpu", loop_gpu),
}
