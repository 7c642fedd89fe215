"""Batch files under attack: kills, full disks, other people's files, prompts that cannot be done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_folders import save_model
from typer.testing import CliRunner, Result

import mcsd
from mcsd import batch, pairs, screen
from mcsd.cli import app
from mcsd.drafters import NgramDrafter
from mcsd.profile import Ladder, Profile

# One process of several, with rows that take several writes to get to the disk, and no model.
WORKER = """
    import os, resource, sys, time
    from pathlib import Path
    from mcsd.batch import Prompt, Results, Share

    if "LIMIT" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)
    prompts = [Prompt(n, f"text {n}", n) for n in range(40)]
    with Results(Path(sys.argv[1]), prompts, {"a": 1}, Share.of_environment()) as results:
        for prompt in results.todo:
            time.sleep(0.002)
            results.write(prompt, {"prompt": prompt.text, "text": f"{prompt.id} " * 40_000})
        results.finish()
"""


def start(path: Path, rank: int, count: int, **environment: str) -> subprocess.Popen[bytes]:
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(path)],
        env={**os.environ, **ranks, **environment}, stderr=subprocess.PIPE,
    )  # fmt: skip


def done(worker: subprocess.Popen[bytes]) -> None:
    """Wait for a process that must end well."""
    _, complaint = worker.communicate(timeout=60)
    assert worker.returncode == 0, complaint


def check_whole(path: Path) -> None:
    """Every prompt once, each row whole, and nothing left beside the file."""
    assert list(path.parent.iterdir()) == [path]
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert sorted(row["id"] for row in rows) == list(range(40))
    for row in rows:
        assert (row["prompt"], row["text"]) == (f"text {row['id']}", f"{row['id']} " * 40_000)


def test_nothing_is_lost_or_doubled_by_kills(tmp_path: Path) -> None:
    """Rounds of one to three processes, each ended at a random moment in a random way, and then one that may finish."""
    path, rng = tmp_path / "results.jsonl", random.Random(0)
    for _ in range(6):
        count = rng.randint(1, 3)
        workers = [start(path, rank, count) for rank in range(count)]
        before = held(path)
        deadline = time.monotonic() + 30
        while held(path) <= before and any(w.poll() is None for w in workers) and time.monotonic() < deadline:
            time.sleep(0.001)
        for worker in workers:
            time.sleep(rng.random() * 0.02)
            worker.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        for worker in workers:
            worker.communicate(timeout=60)
    assert held(path) > 0
    done(start(path, 0, 1))
    check_whole(path)


def test_a_copy_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    left = path.with_name("results.jsonl.whole-1")
    left.write_text('{"id": 0')
    done(start(path, 0, 1))
    check_whole(path)


def held(path: Path) -> int:
    """Bytes in the file and its parts."""
    sizes = 0
    for file in path.parent.glob(f"{path.name}*"):
        try:
            sizes += file.stat().st_size
        except FileNotFoundError:  # put together just now
            continue
    return sizes


@pytest.mark.parametrize(
    ("limit", "count"), [(1_000_000, 1), (1_000_000, 2), (3_000_000, 2)], ids=["one", "part", "whole"]
)
def test_a_full_disk_loses_nothing(tmp_path: Path, limit: int, count: int) -> None:
    """No file may grow past a limit: one process's, a part, or only the whole that is put together at the end."""
    path = tmp_path / "results.jsonl"
    for rank in range(count):
        worker = start(path, rank, count, LIMIT=str(limit))
        _, complaint = worker.communicate(timeout=60)
        full = limit < 3_000_000 or rank == count - 1
        assert worker.returncode == int(full), complaint
        assert not full or b"File too large" in complaint
    assert not list(tmp_path.glob("*.whole-*"))
    done(start(path, 0, 1))
    check_whole(path)


def test_a_killed_finish_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.with_name("results.jsonl.whole-2").write_bytes(b'{"id": 0, "pro')
    workers = [start(path, rank, 2) for rank in range(2)]
    for worker in workers:
        done(worker)
    check_whole(path)


def test_a_link_to_the_results_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "results.jsonl").symlink_to(tmp_path / "disk" / "results.jsonl")
    (tmp_path / "disk" / "results.jsonl").touch()
    for rank in range(2):
        with batch.Results(tmp_path / "results.jsonl", PROMPTS, {}, batch.Share(rank, 2)) as results:
            results.write(results.todo[0], {"prompt": results.todo[0].text})
            results.finish()
    assert (tmp_path / "results.jsonl").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["results.jsonl"]
    assert len((tmp_path / "disk" / "results.jsonl").read_text().splitlines()) == 2


def test_what_another_process_wrote_until_the_lock_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = tmp_path / "results.jsonl", batch._lock

    def late(file: Any) -> bool:
        with path.open("a") as other:
            other.write('{"id": "one", "prompt": "Hello", "settings": {}}\n')
        return lock(file)

    monkeypatch.setattr(batch, "_lock", late)
    with batch.Results(path, PROMPTS, {}) as results:
        assert [prompt.id for prompt in results.todo] == ["two"]


def test_files_of_similar_names_are_left_alone(tmp_path: Path) -> None:
    others = [
        tmp_path / f"results.jsonl.{name}" for name in ("part-1.bak", "whole-2024-backup", "whole-2024-7", "part-x1")
    ]
    for other in others:
        other.write_text("mine")
    with batch.Results(tmp_path / "results.jsonl", PROMPTS, {}) as results:
        for prompt in results.todo:
            results.write(prompt, {"prompt": prompt.text})
        assert results.finish()
    assert all(other.read_text() == "mine" for other in others)


PROMPTS = [batch.Prompt("one", "Hello", 0), batch.Prompt("two", "Goodbye", 1)]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"id": "one", "prompt": "Hello"}', id="one-prompt-without-a-line-end"),
        pytest.param('{"id": [1], "prompt": "Hello", "settings": {}}\n', id="id-is-a-list"),
        pytest.param('{"id": "one", "prompt": "Hello", "settings": 5}\n', id="settings-are-a-number"),
        pytest.param('{"id": "one", "prompt": null, "settings": {}}\n', id="prompt-is-null"),
        pytest.param("\n", id="blank-line"),
    ],
)
def test_other_people_s_files_are_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "theirs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="no result of this program; choose another --output"):
        batch.Results(path, PROMPTS, {})
    assert path.read_text() == text


def test_places_that_are_no_place_for_results(tmp_path: Path) -> None:
    prompts, link = tmp_path / "prompts.jsonl", tmp_path / "link.jsonl"
    prompts.write_text('{"prompt": "Hello"}')
    link.symlink_to(prompts)
    for path in (prompts, link):
        with pytest.raises(ValueError, match="output: expected another file than the prompts', got "):
            batch.check_output(path, prompts)
    with pytest.raises(ValueError, match=r"output: expected a file in a folder that exists, .*nowhere does not"):
        batch.check_output(tmp_path / "nowhere" / "results.jsonl", prompts)
    with pytest.raises(ValueError, match="output: expected a file that can be read and continued, got /dev/full"):
        batch.check_output(Path("/dev/full"), prompts)
    batch.check_output(tmp_path / "results.jsonl", prompts)
    assert prompts.read_text() == '{"prompt": "Hello"}'


def test_prompts_from_any_editor(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffwörld\r\n\r\n same \r\n same \r\n  \r\nlast".encode())
    assert [(p.id, p.text, p.index) for p in batch.read_prompts(path)] == [
        (1, "wörld", 0), (3, " same ", 1), (4, " same ", 2), (6, "last", 3),
    ]  # fmt: skip
    path.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(ValueError, match=r"prompts.txt, line 2: expected UTF-8, got the byte 0xef"):
        batch.read_prompts(path)
    path.with_suffix(".json").write_text('[{"prompt": "a"}]')
    with pytest.raises(ValueError, match=r"prompts.json: expected text, or JSON lines in a file that ends in .jsonl"):
        batch.read_prompts(path.with_suffix(".json"))


def test_one_of_several_processes_has_a_rank() -> None:
    """WORLD_SIZE alone, which a cluster may set, must not make one process do half of the work in silence."""
    assert batch.Share.of_environment({"WORLD_SIZE": "1"}) == batch.Share()
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE: expected numbers as torchrun sets them, got '' and '2'"):
        batch.Share.of_environment({"WORLD_SIZE": "2"})


# ---- the command


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "target", 0)


def generate(target: Path, prompts: Path, output: Path, *more: str) -> Result:
    options = ["--target", str(target), "--draft", "ngram", "--dtype", "float32", "--device", "cpu", "--raw"]
    options += ["--max-new-tokens", "4", "--batch-file", str(prompts), "--output", str(output), *more]
    return CliRunner().invoke(app, ["generate", *options])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_prompt_that_cannot_be_done_stops_no_other(target: Path, tmp_path: Path) -> None:
    """It has a row that says why, and the exit code says that there are such rows, now and when all is done."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    texts = ["x" * 255, "Hello", "", "\ud800", "Hello"]
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    result = generate(target, prompts, output)
    assert result.exit_code == 1, result.output
    rows = rows_of(output)
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5]
    assert ["error" in row for row in rows] == [True, False, True, True, False]
    assert rows[0]["error"] == "prompt: 255 tokens and 4 new ones do not fit the model's 256 positions"
    assert "expected at least one token" in rows[2]["error"]
    assert [row["prompt"] for row in rows] == texts
    assert "text" not in rows[3] and len(rows[1]["tokens"]) == 4
    for line in (f"id 1: {rows[0]['error']}", "3 of 5 prompts failed, id 1 the first; their rows say why"):
        assert line in result.stderr
    kept = output.read_bytes()
    again = generate(target, prompts, output)
    assert again.exit_code == 1 and "3 of 5 prompts failed" in again.stderr
    assert output.read_bytes() == kept


def test_settings_that_fit_no_prompt_write_no_rows(target: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("Hello")
    for options in (["--max-new-tokens", "256"], ["--top-p", "2"]):
        result = generate(target, prompts, output, *options)
        assert result.exit_code == 2 and "expected" in result.stderr
        assert output.read_bytes() == b""


def test_another_seed_is_refused(target: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("Hello\nGoodbye")
    assert generate(target, prompts, output, "--seed", "5").exit_code == 0
    assert [row["seed"] for row in rows_of(output)] == [5, 6]
    result = generate(target, prompts, output)
    assert result.exit_code == 2 and "written with seed = 5, now it is 0" in result.stderr


def test_mistakes_are_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello")
    result = generate(Path("./nowhere"), prompts, prompts)
    assert result.exit_code == 2 and "output: expected another file than the prompts'" in result.stderr


# ---- several prompts together


ENDS = 126  # a token that random texts of the model below meet sooner or later


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "ending", 0, eos=ENDS)


@pytest.fixture
def ragged(tmp_path: Path) -> Path:
    """Prompts of many lengths, of which two cannot be done."""
    path = tmp_path / "prompts.jsonl"
    texts = [f"{'to be or not ' * (n % 4)}prompt {n}" for n in range(11)]
    texts[2], texts[5] = "", "x" * 250
    path.write_text("\n".join(json.dumps({"id": f"p{n}", "prompt": text}) for n, text in enumerate(texts)))
    return path


def alike(path: Path) -> list[dict[str, Any]]:
    """Rows without what depends on the company."""
    rows = rows_of(path)
    for row in rows:
        if "error" not in row:
            del row["seconds"], row["tokens_per_second"], row["batch_size"], row["stats"]["seconds"]
    return rows


@pytest.mark.parametrize("options", ["ngram", "model", "greedy", "adaptive"])
def test_no_row_depends_on_the_batch_size(
    options: str, ending: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts and statistics are a prompt's own, on one process and on two, taken up anywhere."""
    ladder = Ladder((-1, 0, 1, 0, 1, 3, 2), (1.0, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1), (2, 4, 7), (1.0, 1.2, 1.5))
    Profile((-1, 0, 0, 1), "without_replacement", ladder=ladder).save(tmp_path / "profile.json")
    draft = ["--draft", str(save_model(tmp_path / "draft", 1, layers=1))]
    more = ["--max-new-tokens", "32", "--seed", "3"] + {
        "ngram": [],
        "model": [*draft, "--top-k", "100"],
        "greedy": [*draft, "--temperature", "0", "--branching", "2,2"],
        "adaptive": [*draft, "--profile", str(tmp_path / "profile.json"), "--adaptive"],
    }[options]
    one = tmp_path / "one.jsonl"
    assert generate(ending, ragged, one, *more, "--batch-size", "1").exit_code == 1
    whole = alike(one)
    assert [row["id"] for row in whole if "error" in row] == ["p2", "p5"]
    assert len({len(row["tokens"]) for row in whole if "tokens" in row}) > 1
    for size in ("3", "100"):
        output = tmp_path / f"{size}.jsonl"
        assert generate(ending, ragged, output, *more, "--batch-size", size).exit_code == 1
        assert alike(output) == whole, size
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3] + lines[4:7]))  # other batches than before
    assert generate(ending, ragged, output, *more, "--batch-size", "3").exit_code == 1
    assert alike(output) == whole
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert generate(ending, ragged, tmp_path / "two.jsonl", *more, "--batch-size", "2").exit_code == int(rank)
    assert alike(tmp_path / "two.jsonl") == whole


def test_the_time_of_a_batch_is_counted_once(ending: Path, ragged: Path, tmp_path: Path) -> None:
    result = generate(ending, ragged, tmp_path / "results.jsonl", "--max-new-tokens", "24", "--batch-size", "4")
    rows = [row for row in rows_of(tmp_path / "results.jsonl") if "error" not in row]
    assert [row["batch_size"] for row in rows] == [3] * 3 + [3] * 3 + [3] * 3
    calls = [rows[first : first + 3] for first in (0, 3, 6)]
    for call in calls:
        (seconds,) = {row["seconds"] for row in call}
        speed = sum(row["tokens_per_second"] for row in call)
        assert speed == pytest.approx(sum(len(row["tokens"]) for row in call) / seconds, rel=1e-3)
    speed = sum(len(row["tokens"]) for row in rows) / sum(call[0]["seconds"] for call in calls)
    (line,) = (line for line in result.stderr.splitlines() if "tokens per target call" in line)
    assert float(line.split(" tokens/s, up to 4 prompts together")[0].split()[-1]) == pytest.approx(speed, abs=0.06)


def test_an_interrupted_batch_keeps_what_was_finished(
    ending: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was under way is done again, and at the end the rows are in the order of the prompts."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "results.jsonl"
    more = ["--max-new-tokens", "24"]
    generate(ending, ragged, whole, *more)
    propose, seen = NgramDrafter.propose, []

    def interrupted(self: NgramDrafter, state: mcsd.State) -> mcsd.Proposal:
        if state.active.count(False) == 2:
            seen.extend(state.active)
            raise KeyboardInterrupt
        return propose(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(NgramDrafter, "propose", interrupted)
        result = generate(ending, ragged, output, *more)
    able = [f"p{n}" for n in range(8) if n not in (2, 5)]
    left = [name for name, active in zip(able, seen, strict=True) if active]
    assert result.exit_code == 130
    assert f"interrupted at id {left[0]!r}; what was finished is written" in result.stderr
    kept = rows_of(output)
    assert [row["id"] for row in kept] == [f"p{n}" for n in range(8) if f"p{n}" not in left]
    assert kept[-1]["id"] > left[0], "the case in question"
    with monkeypatch.context() as patch:
        patch.setattr(NgramDrafter, "begin", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert generate(ending, ragged, output, *more).exit_code == 130, "before the first step"
    assert rows_of(output)[: len(kept)] == kept
    result = generate(ending, ragged, output, *more)
    assert result.exit_code == 1 and f"{len(kept)} of 11 prompts are in" in result.stderr
    assert alike(output) == alike(whole)


def test_a_token_that_the_model_lacks_fails_one_prompt(tmp_path: Path) -> None:
    """As where a tokenizer has more tokens than the model."""
    model = save_model(tmp_path / "model", 0, vocab=200)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("Hello\na blank\nagain")
    assert generate(model, prompts, output).exit_code == 1
    assert ["error" in row for row in rows_of(output)] == [False, True, False]
    assert " is none of the model's 200" in rows_of(output)[1]["error"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee more"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_says_so(
    error: RuntimeError, target: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pairs.generate

    def small(target: Any, draft: Any, ids: torch.Tensor, *more: Any, **options: Any) -> mcsd.Generation:
        if len(ids) > 2:
            raise error
        return real(target, draft, ids, *more, **options)

    monkeypatch.setattr(pairs, "generate", small)
    output = tmp_path / "results.jsonl"
    result = generate(target, ragged, output, "--batch-size", "3")  # the first batch is of two
    assert result.exit_code == 2 and len(rows_of(output)) == 3
    first = str(error).split("\n")[0]
    assert "batch_size: 2 prompts" not in result.stderr
    assert f"batch_size: 3 prompts do not fit in memory together, ask for fewer ({first})" in result.stderr
    assert generate(target, ragged, output).exit_code == 1  # where nobody asked for a size, a smaller one is taken
    assert len(rows_of(output)) == 11


def test_plain_decoding_is_compared_prompt_by_prompt(target: Path, ragged: Path, tmp_path: Path) -> None:
    result = generate(target, ragged, tmp_path / "results.jsonl", "--compare", "--batch-size", "2")
    assert result.exit_code == 2 and "batch_size: expected 1 beside --compare, which takes" in result.stderr


def test_a_terminal_shows_how_far_a_batch_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w+") as file:
        monkeypatch.setattr(screen, "stderr", lambda: Console(file=file, force_terminal=True, width=60))
        monkeypatch.setattr(screen, "_REDRAW_SECONDS", 0.0)
        with screen.waiting("prompts 1 to 8 of 40") as say:
            say("12 tokens")
        with screen.waiting("prompts 9 to 16 of 40", quiet=True) as say:
            say("12 tokens")
        shown = file.seek(0) or file.read()
    assert "prompts 1 to 8 of 40 ..." in shown and "prompts 1 to 8 of 40: 12 tokens ..." in shown
    assert "9 to" not in shown
