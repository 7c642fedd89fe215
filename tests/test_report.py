"""The pages' tables and figures against the rows, and what makes them: `bench/report.py`, `python bench`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import drawn_trees
import harness
import numpy as np
import pytest
import report
import tables
import torch
import verify_scaling

from bench import __main__ as runner

ROOT = Path(__file__).parent.parent

MACHINE = {"cpu": "A CPU", "cores": 2, "threads": 1, "torch": "2.13.0"}


def write_rows(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{file}.jsonl").write_text("".join(json.dumps({"machine": MACHINE, **row}) + "\n" for row in rows))


def verify_row(case: str, milliseconds: float, date: str = "2026-01-01", **more: Any) -> dict[str, Any]:
    return {
        "case": case,
        "overlap": 0.617,
        "milliseconds": {"median": milliseconds},
        "rival": "log-sum-exp of all rows",
        "rival_milliseconds": {"median": 1.2345},
        "rival_over_verify": {"median": 3.26},
        "in_loops_of_their_own": {"rival_over_verify": 4.85},
        "date": date,
        "commit": "abc",
        **more,
    }


def speed_row(branching: list[int], over: float) -> dict[str, Any]:
    return {
        "target": "T",
        "draft": "D",
        "clock": "wall",
        "dtype": "bfloat16",
        "branching": branching,
        "rule": "recursive",
        "proposal": "default",
        "temperature": 1.0,
        "prompts": 24,
        "max_new_tokens": 48,
        "tokens_per_call": 1.482,
        "tokens_per_second": 24.6,
        "plain_tokens_per_second": 20.5,
        "over_plain": over,
        "over_plain_95": [over - 0.05, over + 0.05],
        "date": "2026-01-01",
    }


def scaling_row(branching: list[int], nodes: int, vocab: int, batch: int) -> dict[str, Any]:
    return {
        "nodes": nodes,
        "branching": branching,
        "vocab": vocab,
        "batch": batch,
        "dtype": "float32",
        "milliseconds": {"median": vocab / 1e5, "p20": vocab / 2e5, "p80": vocab / 5e4},
        "over_floor": {"median": 6.04},
        "floor": {"milliseconds": vocab / 6e5},
        "date": "2026-01-01",
    }


def shape_row(prompt: int, proposal: str, branching: list[int], emitted: int, calls: int) -> dict[str, Any]:
    run = {"tokens": 48, "dtype": "bfloat16", "device": "cpu", "rule": "recursive", "temperature": 1.0}
    return {"prompt": prompt, "proposal": proposal, "branching": branching, "emitted": emitted, "calls": calls, **run}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with rows of a table and of a figure."""
    folder = tmp_path / "results"
    write_rows(folder, "verify_cpu", [verify_row("chain", 0.3812)])
    write_rows(folder, "end_to_end", [speed_row([4, 2, 2], 0.83), speed_row([2], 1.2)])
    return folder


@pytest.fixture
def more_rows(rows: Path) -> Path:
    """The same with rows of every figure that a CPU has."""
    points = [scaling_row([2, 1], 5, vocab, batch) for vocab in (32_000, 65_536) for batch in (1, 8)]
    write_rows(rows, "verify_scaling", [*points, scaling_row([1, 1, 1, 1], 5, 32_000, 1)])
    counts = [shape_row(n, name, [2, 2], 30 + n, 20) for n in range(4) for name in ("greedy", "point")]
    write_rows(rows, "shapes", counts)
    return rows


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A root with pages that have places for a table and two figures."""
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    region = "<!-- {}: {} -->\nold\n<!-- end -->"
    readme = ["before", region.format("table", "verify_cpu"), "between", region.format("figure", "speed"), "after\n"]
    (root / "README.md").write_text("\n".join(readme))
    (root / "docs" / "algorithm.md").write_text(region.format("figure", "residual"))
    (root / "docs" / "results.md").write_text("no places\n")
    return root


# ---- this repository's pages


def test_pages_say_what_the_rows_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_every_marker_of_the_pages_is_known() -> None:
    for page in report.PAGES:
        for kind, name in report.MARKER.findall((ROOT / page).read_text()):
            assert name in (report.TABLES if kind == "table" else report.PICTURES)


# ---- which rows


@pytest.mark.parametrize(
    ("dates", "newest"),
    [
        pytest.param(("2026-01-01", "2026-01-02"), 1, id="a-later-day"),
        pytest.param(("2026-01-02", "2026-01-01"), 0, id="a-later-day-that-stands-first"),
        pytest.param(("2026-01-01", "2026-01-01"), 1, id="a-later-line-of-one-day"),
        pytest.param((None, None), 1, id="no-dates"),
    ],
)
def test_newest_row_of_a_case(dates: tuple[str | None, ...], newest: int) -> None:
    other = {"case": "b", "tree": [2], "line": 9}
    rows = [{"case": "a", "tree": [2], "line": line} | ({"date": d} if d else {}) for line, d in enumerate(dates)]
    assert [row["line"] for row in tables.newest([*rows, other], "case", "tree")] == [newest, 9]


def test_cases_differ_by_all_their_names() -> None:
    rows = [{"tree": [2], "T": 1.0}, {"tree": [2], "T": 0.0}, {"tree": [2]}]
    assert len(tables.newest(rows, "tree", "T")) == 3
    assert tables.newest(rows, "tree") == rows[-1:]


def test_a_table_is_of_the_machine_of_the_newest_row(capsys: pytest.CaptureFixture[str]) -> None:
    here, there = ({"machine": {"cpu": name}} for name in ("here", "there"))
    rows = [{"date": "2026-01-02", **here}, {"date": "2026-01-01", **there}, {"date": "2026-01-01", **here}]
    assert tables.of_one_machine(rows, "some") == [rows[0], rows[2]]
    assert "some: 1 rows of other machines than here left out" in capsys.readouterr().err
    assert tables.of_one_machine([], "some") == []


def test_a_gpu_is_the_machine_of_what_ran_on_it() -> None:
    assert tables.machine_of({"device": "cpu", "machine": {"cpu": "A CPU"}}) == "A CPU"
    assert tables.machine_of({"device": "A GPU", "machine": {"cpu": "A CPU"}}) == "A GPU"
    assert tables.machine_of({"machine": {"cpu": "A CPU", "gpu": "A GPU"}}) == "A GPU"
    assert tables.machine_of({"machine": {"device": "A GPU"}}) == "A GPU"


def test_a_line_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    text = '{"a": 1}\n{"a": 2}\n[3]\n{"a": '
    path.write_text(text)
    assert harness.read(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == text
    assert harness.read(tmp_path / "none.jsonl") == []


def test_rows_that_do_not_say_what_the_table_says_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    old = {name: value for name, value in speed_row([2], 1.9).items() if name != "draft"}
    table = tables.end_to_end([{"machine": MACHINE, **row} for row in (old, speed_row([3], 1.1))])
    assert table is not None
    assert [line[0] for line in table.body] == ["(3,)"]
    assert "1 rows left out" in capsys.readouterr().err
    assert tables.end_to_end([{"machine": MACHINE, **old}]) is None


def test_settings_of_shapes_are_compared_on_the_prompts_that_all_have() -> None:
    rows = [shape_row(n, "greedy", [2, 2], 10 * n, 10) for n in (1, 2, 3)]
    rows += [shape_row(n, "point", [2, 2], 10, 10) for n in (2, 3, 4)]
    found = {point["proposal"]: point for point in tables.calls(rows)}
    assert found["greedy"]["value"] == 2.5
    assert found["greedy"]["low"] == 2.0 and found["greedy"]["high"] == 3.0
    assert {name: point["prompts"] for name, point in found.items()} == {"greedy": 2, "point": 2}
    assert tables.calls(rows[:1]) == [] and tables.calls([]) == []


# ---- how numbers read


def test_a_table_reads_as_its_rows() -> None:
    table = tables.verify_cpu([{"machine": MACHINE, **verify_row("8 chains", 0.3812)}])
    assert table is not None
    lines = table.markdown("rows.jsonl").splitlines()
    assert lines[0] == (
        "| from raw logits, overlap 0.62 | `verify` | rival | taking turns | each in loops of its own |"
    )
    assert lines[1] == "|---|---|---|---|---|"
    assert lines[2] == "| 8 chains | 0.38 ms | 1.23 ms, only the log-sum-exp of all rows | 3.3 × | 4.8 × |"
    about = "CPU time, float32, medians. A CPU, 1 thread, torch 2.13.0, 2026-01-01, commit abc ([rows](rows.jsonl))."
    assert lines[3:] == ["", about]


def test_a_caption_names_every_commit_and_day() -> None:
    rows = [{"machine": MACHINE, "date": day, "commit": commit} for day, commit in (("d2", "b"), ("d1", "a"))]
    assert tables.origin(rows) == "A CPU, 1 thread, torch 2.13.0, d1 and d2, commit a and b"


@pytest.mark.parametrize(
    ("branching", "name"),
    [((1, 1, 1, 1), "chain of 4"), ((4,), "(4,)"), ((4, 2, 2), "(4, 2, 2)"), ((4, 1, 1), "(4, 1, 1)")],
)
def test_names_of_trees(branching: tuple[int, ...], name: str) -> None:
    assert tables.tree(branching) == name


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.602, "0.6 ×"), (0.956, "0.96 ×"), (1.04, "1.04 ×"), (3.26, "3.3 ×"), (58.92, "58.9 ×")]
)
def test_ratios_near_one_have_a_digit_more(ratio: float, text: str) -> None:
    assert tables.times(ratio) == text


def test_missing_cells_of_the_scaling_are_dashes() -> None:
    rows = [scaling_row([2, 1], 5, 32_000, 1), scaling_row([2, 1], 5, 65_536, 8), scaling_row([9], 10, 32_000, 1)]
    table = tables.verify_scaling([{"machine": MACHINE, **row} for row in rows])
    assert table is not None
    assert list(table.head) == ["requests", "nodes", "32,000 tokens", "65,536 tokens"]
    assert table.body == [["1", "5, (2, 1)", "0.32 ms, 6.0 ×", "–"], ["8", "5, (2, 1)", "–", "0.66 ms, 6.0 ×"]]


def test_a_gpu_table_has_the_default_rule_without_filters() -> None:
    case = {"tree": [3, 4, 4], "nodes": 64, "vocab": 128_256, "batch": 1, "rule": "recursive", "dtype": "bfloat16"}
    case |= {"proposal": "without_replacement", "filters": "none"}
    times = {"median": 21.0, "p20": 20.0, "p80": 22.0}
    row = {"status": "ok", "case": case, "microseconds": times, "over_floor": {"median": 4.2}, "device": "A GPU"}
    row |= {"floor": {"microseconds": 5.0}, "rivals": {"a": {"microseconds": {"median": 84.0}}}}
    others = [{**row, "case": {**case, "filters": "top-k 50"}}, {**row, "smoke": True}, {**row, "status": "refused"}]
    table = tables.gpu_verify([*others, row])
    assert table is not None
    assert table.body == [["64, (3, 4, 4)", "128,256", "1", "21.0 us", "4.2 ×", "84.0 us, a", "4.0 ×"]]
    assert tables.gpu_verify(others) is None
    (point,) = report.scaling_gpu([*others, row])
    assert (point["median"], point["floor"], point["branching"]) == (0.021, 0.005, [3, 4, 4])


def test_attention_has_a_roofline_on_a_gpu_alone() -> None:
    row = {"model": "M", "dtype": "float32", "nodes": 16, "prefix": 4096, "batch": 1, "best_rival": "sdpa_dense_mask"}
    row |= {"microseconds": {"tree_attention": {"median": 1500.4}, "sdpa_dense_mask": {"median": 1650.0}}}
    row |= {"over_best_rival": 1.0997, "roofline_share": 0.415}
    cells = ["M, float32", "16", "4,096", "1", "1,500 us", "1,650 us, sdpa dense mask", "1.10 ×"]
    for bench, more in (("attention-cpu", []), ("attention-cuda", ["42%"])):
        table = tables.attention([{"bench": bench, **row}, {"bench": "attention-launch"}])
        assert table is not None
        assert table.body == [cells + more]
        assert len(table.head) == len(cells + more)


def test_drafts_without_some_figures_have_dashes() -> None:
    mean = {"mean": 1.4622, "half_width_95": 0.0512}
    row = {"draft": "D", "prompts": "p", "count": 80, "temperature": 1.0, "tokens_per_call": {"4,2": mean, "1,1": mean}}
    table = tables.acceptance([row, {**row, "temperature": 0.0, "tokens_per_call": {"4,2": mean}}])
    assert table is not None
    assert list(table.head)[-2:] == ["(4, 2)", "chain of 2"]
    assert table.body[0][1:] == ["1", "80 of p", "–", "1.46 ± 0.05", "1.46 ± 0.05"]
    assert table.body[1][-1] == "–"


def test_interval_is_of_the_ratio_of_sums() -> None:
    counts = np.array([(n * n, 50 - n) for n in range(1, 41)])
    value, low, high = harness.interval(counts)
    assert value == counts[:, 0].sum() / counts[:, 1].sum()
    assert low < value < high
    assert harness.interval(counts) == (value, low, high)
    assert harness.interval(counts, counts) == (1.0, 1.0, 1.0)
    assert harness.interval(counts, counts[::-1])[1] < 1 < harness.interval(counts, counts[::-1])[2]


# ---- pages


def test_regions_are_filled_and_nothing_else(rows: Path, pages: Path) -> None:
    assert report.main(["--results", str(rows), "--root", str(pages)]) == 0
    text = (pages / "README.md").read_text()
    assert text.startswith("before\n<!-- table: verify_cpu -->\n\n| from raw logits")
    assert "| chain | 0.38 ms |" in text and "old" not in text
    assert "\n\n<!-- end -->\nbetween\n<!-- figure: speed -->\n\n![Speed against" in text
    assert text.endswith("](docs/figures/speed.svg)\n\n<!-- end -->\nafter\n")
    assert "](../docs/figures/residual.svg)" in (pages / "docs" / "algorithm.md").read_text()
    assert report.main(["--results", str(rows), "--root", str(pages), "--check"]) == 0
    before = {path: path.read_bytes() for path in pages.rglob("*.*")}
    report.main(["--results", str(rows), "--root", str(pages)])
    assert {path: path.read_bytes() for path in pages.rglob("*.*")} == before


def test_the_check_sees_a_changed_number_a_new_row_and_a_missing_figure(rows: Path, pages: Path) -> None:
    arguments = ["--results", str(rows), "--root", str(pages)]
    assert report.main([*arguments, "--check"]) == 1
    report.main(arguments)
    readme = pages / "README.md"
    good = readme.read_text()
    readme.write_text(good.replace("0.38 ms", "0.37 ms"))
    assert report.main([*arguments, "--check"]) == 1
    readme.write_text(good.replace("between", "other words"))
    assert report.main([*arguments, "--check"]) == 0
    write_rows(rows, "end_to_end", [speed_row([2], 1.3)])
    assert report.main([*arguments, "--check"]) == 1  # the figure is of other rows now
    report.main(arguments)
    assert report.main([*arguments, "--check"]) == 0
    (pages / "docs" / "figures" / "tree_mask.svg").unlink()
    assert report.main([*arguments, "--check"]) == 1


def test_what_has_no_rows_is_left_out(tmp_path: Path, pages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--results", str(tmp_path / "nowhere"), "--root", str(pages)]
    assert report.main([*arguments, "--check"]) == 1  # a table that no row backs
    assert report.main(arguments) == 0
    assert (pages / "README.md").read_text() == (
        "before\n<!-- table: verify_cpu -->\n<!-- end -->\nbetween\n<!-- figure: speed -->\n<!-- end -->\nafter\n"
    )
    error = capsys.readouterr().err
    assert "table verify_cpu: no rows in verify_cpu.jsonl" in error
    assert "figure speed: no rows in end_to_end.jsonl" in error
    assert sorted(path.name for path in (pages / "docs" / "figures").iterdir()) == ["residual.svg", "tree_mask.svg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nothing -->\n<!-- end -->", "expected a known table, got nothing"),
        ("<!-- figure: verify_cpu -->\n<!-- end -->", "expected a known figure, got verify_cpu"),
        ("<!-- table: verify_cpu -->\n", "expected `<!-- end -->`"),
        ("<!-- table: verify_cpu -->\n<!-- table: verify_cpu -->\n<!-- end -->", "expected `<!-- end -->`"),
    ],
    ids=["unknown-table", "table-as-figure", "no-end", "one-end-for-two"],
)
def test_a_marker_that_cannot_be_filled_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        report.Report({}, {}).page(text, "README.md")


# ---- figures


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    import figures

    return figures


def test_figures_are_the_same_twice(more_rows: Path, tmp_path: Path, figures: ModuleType) -> None:
    found = report.Report.of(more_rows).figures
    assert set(found) == {"tree_mask", "residual", "verify_scaling", "tokens_per_call", "speed"}
    for name, data in found.items():
        draw = getattr(figures, report.PICTURES[name].draw)
        for turn in ("1", "2"):
            draw(data, tmp_path / f"{name}{turn}.svg", report.digest(data))
        text = (tmp_path / f"{name}1.svg").read_text()
        assert text == (tmp_path / f"{name}2.svg").read_text(), name
        assert report.digest(data) in text and "dc:date" not in text
        assert 4_000 < len(text) < 120_000


def test_a_tree_that_does_not_help_looks_it(rows: Path, tmp_path: Path, figures: ModuleType) -> None:
    bars = report.Report.of(rows).figures["speed"]
    assert [bar["over_plain"] for bar in bars] == [1.2, 0.83]
    figures.speed(bars, tmp_path / "both.svg", "")
    figures.speed(bars[:1], tmp_path / "helps.svg", "")
    assert "<pattern" in (tmp_path / "both.svg").read_text()
    assert "<pattern" not in (tmp_path / "helps.svg").read_text()


def test_long_chains_in_a_name_are_counted(figures: ModuleType) -> None:
    names = [figures.name_of(tree) for tree in ([51, 1, 1, 1, 1], [1, 1, 1, 1], [4, 2, 2, 1], [3, 4])]
    assert names == ["51,1×4", "chain of 4", "4,2,2,1", "3,4"]


# ---- measuring


def test_the_floor_is_the_visited_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = verify_scaling.Cpu(cold_bytes=1 << 16)
    about = {"branching": (2, 1), "vocab": 300, "batch": 2, "nodes": 5}
    monkeypatch.setattr(clock, "measure", lambda inputs, rounds: ([2.0] * rounds, [1e9] * rounds, 1.0))
    row = verify_scaling.measure(about, clock, verify_scaling.CALLS)
    least = row["floor"]
    inputs = drawn_trees.make((2, 1), 300, 2, verify_scaling.CALLS)
    emitted = [
        int(visited) for number in range(len(inputs.drawn)) for visited in verify_scaling.visited(inputs, number)
    ]
    target, draft = sum(emitted[::2]) / len(inputs.drawn), sum(emitted[1::2]) / len(inputs.drawn)
    assert (least["target_rows"], least["draft_rows"]) == (target, draft)
    assert 2 <= target <= 6 and draft <= target
    small = 2 * (5 * 12 + 7 * 4 + 8)
    assert least["bytes"] == round((target + draft) * 300 * 4 + small)
    assert row["over_floor"]["median"] == pytest.approx(2.0 / (least["bytes"] / 1e6), rel=0.5)
    assert row["tokens"] == pytest.approx(target / 2, abs=0.01)


def test_a_call_is_timed_beside_the_pass_that_is_its_floor() -> None:
    inputs = drawn_trees.make((2, 1), 300, 1, verify_scaling.CALLS)
    times, rates, warm = verify_scaling.Cpu(cold_bytes=1 << 22).measure(inputs, 4)
    assert len(times) == len(rates) == 4
    assert min(times) > 0 and min(rates) > 0 and warm is not None and warm > 0


def test_calls_of_a_graph_get_the_inputs_of_their_round() -> None:
    """The GPU's clock, with the CPU in its place: what is timed in round i has the results of round i's inputs."""
    from bench.gpu import device, plan

    class Recording(device.Cpu):
        def times(self, contenders: Any, load: Any, rounds: int) -> dict[str, list[float]]:
            for turn in range(rounds):
                load(turn)
                contenders["verify"].run()
                seen.append(contenders["verify"].result.tokens.clone())
            return {"verify": [1000.0] * rounds}

    seen: list[torch.Tensor] = []
    clock = verify_scaling.Gpu.__new__(verify_scaling.Gpu)
    clock._gpu, clock.bandwidth = Recording(plan.SMOKE), 5.0
    inputs = drawn_trees.make((2, 1), 300, 1, verify_scaling.CALLS)
    assert clock.measure(inputs, 3) == ([1.0] * 3, [5.0] * 3, None)
    call = harness.ours(inputs)
    wanted = [call().tokens for _ in range(verify_scaling.WARMUP + 3)][verify_scaling.WARMUP :]
    assert [tokens.tolist() for tokens in seen] == [tokens.tolist() for tokens in wanted]


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = drawn_trees.make((2,), 50, 1, 4)
    assert 1 <= harness.check(inputs) <= 2
    right = harness.verify

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        return found._replace(tokens=found.tokens + 1)

    monkeypatch.setattr(harness, "verify", wrong)
    with pytest.raises(AssertionError, match="disagrees with the oracle"):
        harness.check(inputs)


def test_rows_say_where_they_come_from_and_are_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MCSD_BENCH_RECORD", raising=False)
    monkeypatch.delenv("MCSD_BENCH_AGAIN", raising=False)
    monkeypatch.setenv("OUT", str(tmp_path / "rows"))
    case = {"case": "a", "branching": (4, 2)}
    harness.record("some", {**case, "milliseconds": 1.0})
    assert not (tmp_path / "rows").exists(), "rows are kept on demand only"
    monkeypatch.setenv("MCSD_BENCH_RECORD", "1")
    assert not harness.recorded("some", [case])
    harness.record("some", {**case, "milliseconds": 1.0})
    (row,) = harness.read(tmp_path / "rows" / "some.jsonl")
    assert row["machine"] == harness.machine() and row["code"] == harness.code() and row["date"] and "commit" in row
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == row
    assert harness.recorded("some", [case])
    assert not harness.recorded("some", [case, {"case": "b"}])
    monkeypatch.setattr(harness, "code", lambda: "changed")
    assert not harness.recorded("some", [case])
    monkeypatch.undo()
    monkeypatch.setenv("OUT", str(tmp_path / "rows"))
    monkeypatch.setenv("MCSD_BENCH_RECORD", "1")
    monkeypatch.setenv("MCSD_BENCH_AGAIN", "1")
    assert not harness.recorded("some", [case])


# ---- all of them


def test_the_list_says_what_would_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "have_gpu", lambda: False)
    assert runner.main(["--list", "--skip", "acceptance", "--minutes", "7"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"verify", "verify_scaling", "loop_overhead", "end_to_end", "attention", "shapes", "all"} < set(lines)
    assert "acceptance" not in lines and "gpu" not in lines
    assert "7 min" in lines["shapes"] and "--minutes 7" in lines["shapes"]
    total = sum(int(line.split()[1]) for name, line in lines.items() if name != "all")
    assert int(lines["all"].split()[1]) == total


def test_a_gpu_adds_its_benchmarks() -> None:
    without, with_one = (set(runner.chosen([], [], gpu)) for gpu in (False, True))
    assert with_one - without == {"gpu", "attention_gpu", "loop_gpu", "verify_scaling_gpu"}
    assert list(runner.chosen(["shapes", "verify"], ["shapes"], False)) == ["verify"]


def test_names_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "have_gpu", lambda: False)
    for name, message in (("nothing", "got nothing"), ("loop_gpu", "expected a GPU for loop_gpu")):
        with pytest.raises(SystemExit):
            runner.main([name, "--list"])
        assert message in capsys.readouterr().err


def test_every_command_is_there() -> None:
    for name, benchmark in runner.BENCHMARKS.items():
        for command in filter(None, (benchmark.command, benchmark.smoke)):
            files = [word for word in command.split() if word.endswith(".py")] or ["bench/gpu/__main__.py"]
            assert all((ROOT / file).exists() for file in files), name


def test_a_benchmark_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "open(os.environ['OUT'] + '/ran', 'a').write(os.environ.get('OMP_NUM_THREADS', 'all') + ' ')"
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "works.py").write_text(f"import os, bench.gpu\n{said}")
    one, every = (runner.Benchmark(str(tmp_path / "works.py"), None, 1, threads) for threads in (1, None))
    fails = runner.Benchmark(str(tmp_path / "fails.py"), None, 1)
    monkeypatch.setattr(runner, "BENCHMARKS", {"one": one, "fails": fails, "every": every})
    monkeypatch.setattr(runner, "have_gpu", lambda: False)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert runner.main([]) == 1
    assert (tmp_path / "ran").read_text() == "1 all "
    out = capfd.readouterr()
    assert "fails: FAILED" in out.out and "2 of 3 benchmarks done" in out.out and "failed: fails" in out.err


def test_the_folder_of_the_rows_and_the_minutes_reach_shapes() -> None:
    command = runner.command_of(runner.BENCHMARKS["shapes"], Path("/rows"), 2.5, smoke=False)
    assert command[1:] == ["bench/shapes.py", "--output", "/rows/shapes.jsonl", "--minutes", "2.5"]
