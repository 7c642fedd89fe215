"""Every example of an adapter runs, and says what it claims."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from tiny_folders import save_model

EXAMPLES = Path(__file__).parent.parent / "examples" / "integrations"

# name -> what it prints, whether it takes two models
SAYS: dict[str, tuple[str, bool]] = {
    "eagle_paths.py": ("path 1 accepted 2", False),
    "flashinfer_chain.py": ("tokens [[2, 0, -1]]", False),
    "sglang_trees.py": ("accepted nodes [0", False),
    "transformers_assisted.py": ("The lighthouse keeper", True),
    "transformers_generate.py": ("tokens per target call", True),
    "vllm_chains.py": ("V2 [[", False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(save_model(folder / "target", 0)), str(save_model(folder / "draft", 1, layers=1))]


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_it_runs(
    name: str, models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says, takes_models = SAYS[name]
    monkeypatch.setattr(sys, "argv", [name, *(models if takes_models else [])])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert says in capsys.readouterr().out
