"""A model that transformers' tensor-parallel plan has split over two processes: the tokens of one process, on both."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_feature_drafter import feature_model
from tiny_folders import save_model
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

import mcsd
from mcsd.distill.product import quantise
from mcsd.draft_model import WEIGHTS_FILE, load_draft

ROOT = Path(__file__).parent.parent
EXAMPLE = str(ROOT / "examples" / "tensor_parallel.py")
PROMPT = torch.arange(5, 30)[None]

# What each of the processes does: the loop as it is on the model's own plan, whose head gathers, and then the example.
WORK = """
    import json, os, runpy, sys
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    import mcsd
    from mcsd.draft_model import load_draft

    example, target, draft, head, folder = sys.argv[1:]
    plan = DistributedConfig(tp_plan="auto")
    split = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, distributed_config=plan)
    small = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
    ids = torch.arange(5, 30)[None]
    found = {
        name: mcsd.generate(split, which, ids, branching=(3, 2), max_new_tokens=24, seed=3).sequences.tolist()
        for name, which in (("draft", small), ("ngram", "ngram"), ("head", load_draft(head, split)))
    }
    sys.argv = [example, target, draft]
    scope = runpy.run_path(example, run_name="__main__")
    found["example"] = scope["text"].tolist()
    found["columns"] = scope["logits"].shape[-1]
    with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
        json.dump(found, file)
"""


def test_two_processes_say_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="transformers loads no plan without it")
    if "tp_plan" not in {field.name for field in fields(DistributedConfig)}:
        pytest.skip("this transformers takes its plans in another way")
    target = str(save_model(tmp_path / "target", 0))  # 257 tokens: the two slices differ in size
    draft = str(save_model(tmp_path / "draft", 1, layers=1))
    head = save_head(tmp_path / "head", target)  # its embedding is the target's, which the plan splits
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(WORK))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), EXAMPLE, target, draft, head, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=150, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [found.pop("columns") for found in both] == [129, 128]
    assert both[0] == both[1] == alone(target, draft, head, monkeypatch)
    line = capsys.readouterr().out
    assert "process 0 of 1 has 257 of 257 columns" in line
    said = line.partition("columns, ")[2]
    for rank, columns in enumerate((129, 128)):
        assert f"process {rank} of 2 has {columns} of 257 columns, {said}" in done.stdout


def save_head(folder: Path, target: str) -> str:
    """A folder with a drafter that reads the target's hidden states."""
    model = feature_model(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), 200)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"drafter": "feature", **model.config.as_dict()}))
    save_file(quantise({**model.state_dict(), "draft_ids": model.draft_ids}), folder / WEIGHTS_FILE)
    return str(folder)


def alone(target: str, draft: str, head: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same in this process, on the whole model."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    whole, small = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (target, draft))
    found = {
        name: mcsd.generate(whole, which, PROMPT, branching=(3, 2), max_new_tokens=24, seed=3).sequences.tolist()
        for name, which in (("draft", small), ("ngram", "ngram"), ("head", load_draft(head, whole)))
    }
    monkeypatch.setattr(sys, "argv", [EXAMPLE, target, draft])
    return {**found, "example": runpy.run_path(EXAMPLE, run_name="__main__")["text"].tolist()}


def test_the_example_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(hidden_size=12, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments, found, wanted in (
        ([], True, "usage: torchrun"),
        ([str(tmp_path), "draft"], False, "accelerate: .*pip install accelerate"),
        ([str(tmp_path), "draft"], True, "TARGET: expected .* a multiple of the 2 processes, it has 3"),
    ):
        monkeypatch.setattr(sys, "argv", [EXAMPLE, *arguments])
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found or None)
        with pytest.raises(SystemExit, match=wanted):
            runpy.run_path(EXAMPLE, run_name="__main__")
