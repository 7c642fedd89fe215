"""Every example runs, and says what it claims."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from tiny_folders import save_model

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_model(folder / "target", 0)), str(save_model(folder / "draft", 1, layers=1))


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "custom_drafter.py",
        "generate_text.py",
        "tensor_parallel.py",  # in test_tensor_parallel.py
        "verify_a_tree.py",
    }


def test_verify_a_tree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("verify_a_tree.py", monkeypatch=monkeypatch)
    assert "accepted nodes" in capsys.readouterr().out


def test_generate_text(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("generate_text.py", *models, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert out.startswith("The lighthouse keeper") and "tokens per target call" in out


def test_custom_drafter(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("custom_drafter.py", models[0], monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert out.startswith("1, 2, 3,") and "tokens per target call" in out
