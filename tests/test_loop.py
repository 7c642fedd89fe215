"""What the loop hands to drafters and takes from them: hidden states, origins, nodes that are not scored."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import loop
import pytest
import tables
import torch
from transformers import PreTrainedModel

import mcsd
from bench.__main__ import BENCHMARKS
from mcsd import Drafter, ModelDrafter, Proposal, State
from mcsd.checking import require
from mcsd.scoring import Scorer, UnsupportedModelError
from mcsd.step import coins_of, step
from mcsd.trees import columns
from mcsd_kernels import SamplingParams, draw_uniforms
from tests.tape import Tape
from tests.tiny import VOCAB, greedy, pad, perturbed, plain_logits, prompt, tiny

PROMPTS = [prompt(17, 1), prompt(4, 2), prompt(9, 3)]
NEW = 12


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny()


class Forked(Drafter):
    """Two chains from the root: one continues as the model would, the other not."""

    def __init__(self, model: PreTrainedModel, **extra: Any) -> None:
        self.model, self.extra = copy.deepcopy(model), extra  # one that attends as usual during the generation

    def propose(self, state: State) -> Proposal:
        rows = []
        for sequence in state.sequences:
            text = list(sequence)
            for _ in range(2):
                text.append(int(plain_logits(self.model, text).argmax()))
            right = text[-2:]
            rows.append([sequence[-1], (right[0] + 1) % VOCAB, right[0], right[1]])
        return Proposal(torch.tensor(rows), torch.tensor([-1, 0, 0, 2], dtype=torch.int32), 2, **self.extra)


class Reads(Forked):
    """Compares the hidden states it is given with those of plain forwards."""

    reads_hidden = True

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def begin(self, state: State) -> None:
        assert state.hidden is not None
        longest = max(map(len, state.sequences))
        assert state.hidden.shape[:2] == (len(state.sequences), longest - 1)
        assert state.hidden.dtype == self.model.dtype
        for rows, sequence in zip(state.hidden, state.sequences, strict=True):
            for place in range(len(sequence) - 1):
                wanted = plain_logits(self.model, sequence[: place + 1])
                assert (self.head(rows[place]) - wanted).abs().max() < 2e-4
        self.seen = 0

    def propose(self, state: State) -> Proposal:
        self.tree = super().propose(state)
        return self.tree

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        assert state.hidden is not None and state.hidden.shape[:2] == self.tree.tokens.shape
        for request, sequence in enumerate(state.sequences):
            for node, way in enumerate(([], [1], [2], [2, 3])):
                text = sequence + self.tree.tokens[request, way].tolist()
                wanted = plain_logits(self.model, text)
                assert (self.head(state.hidden[request, node]) - wanted).abs().max() < 2e-4
                self.seen += 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "opt", "gptj"])
def test_hidden_states_are_what_the_head_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.scoring.PREFILL_CHUNK", 5)
    model = tiny(name, **({"word_embed_proj_dim": 16} if name == "opt" else {}))
    ids, mask = pad(PROMPTS)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    drafter = Reads(model)
    found = mcsd.generate(model, drafter, ids, mask, max_new_tokens=5, temperature=0.0)
    assert torch.equal(found.sequences, greedy(model, ids, mask, 5)) and drafter.seen >= 12
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    one = mcsd.generate(model, Reads(model), torch.tensor([[5]]), max_new_tokens=5, temperature=0.0)
    assert one.stats.tokens == 5


def test_hidden_states_of_captured_forwards(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape(monkeypatch)
    ids, mask = pad(PROMPTS)
    drafter = Reads(llama)
    assert mcsd.generate(llama, drafter, ids, mask, max_new_tokens=7, graphs=True).stats.tokens == 21
    assert drafter.seen >= 12 and tape.replayed >= 2


def test_hidden_states_are_only_read_on_demand(llama: PreTrainedModel) -> None:
    class Never(Forked):
        def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
            assert state.hidden is None

    ids, mask = pad(PROMPTS)
    mcsd.generate(llama, Never(llama), ids, mask, max_new_tokens=3)


def test_a_head_that_reads_something_else_is_refused() -> None:
    model = tiny()
    head = model.lm_head
    model.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2.0,), prepend=True)
    ids, mask = pad(PROMPTS)
    assert mcsd.generate(model, Forked(model), ids, mask, max_new_tokens=3).stats.tokens == 9
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does not read"):
        mcsd.generate(model, Reads(model), ids, mask, max_new_tokens=3)
    assert len(head._forward_pre_hooks) == 1


def test_candidates_are_counted_by_origin(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    for origin in (torch.tensor([0, 3, 1, 1], dtype=torch.int32), torch.tensor([[0, 3, 1, 1]] * 3, dtype=torch.int32)):
        drafter = Forked(llama, origin=origin)
        stats = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=9, temperature=0.0).stats
        assert stats.target_calls == 3 and stats.accepted_by_depth == [9, 9]
        assert stats.proposed_by_origin == {3: 9, 1: 18} and stats.accepted_by_origin == {1: 18}
        assert stats.as_dict()["accepted_by_origin"] == {1: 18}
    plain = mcsd.generate(llama, Forked(llama), ids, mask, max_new_tokens=9, temperature=0.0).stats
    assert plain.proposed_by_origin == {} and "accepted_by_origin" not in plain.as_dict()


def test_leaves_need_not_be_scored(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    rows: list[int] = []
    target = require("target", tiny(), "auto")
    target.register_forward_hook(lambda module, arguments, output: rows.append(output.logits.shape[1]))
    found = mcsd.generate(target, Forked(llama, scored=3), ids, mask, max_new_tokens=NEW, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, NEW))
    # root and node 2 are scored, node 3 is the last token of each step
    assert set(rows[1:]) == {3} and found.stats.target_calls == NEW // 2


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        pytest.param({"scored": 5}, "scored", id="more-scored-than-nodes"),
        pytest.param({"scored": 0}, "scored", id="an-unscored-root"),
        pytest.param({"origin": torch.zeros(3, dtype=torch.int32)}, "origin", id="origins-of-another-tree"),
        pytest.param({"point_nodes": torch.zeros(2, 4, dtype=torch.bool)}, "point_nodes", id="another-batch"),
    ],
)
def test_wrong_labels_are_named(extra: dict[str, Any], name: str, llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    with pytest.raises(ValueError, match=f"Proposal.{name}"):
        mcsd.generate(llama, Forked(llama, **extra), ids, mask, max_new_tokens=3)


@contextmanager
def after_two_steps(name: str) -> Iterator[tuple[Drafter, Scorer, State]]:
    """A drafter, a target and a batch that is under way."""
    model = tiny(name)
    scorer, drafter = Scorer(model, 100), ModelDrafter(perturbed(model), (3, 2))
    heads = [p[:-1] for p in PROMPTS]
    state = State(
        sequences=[list(p) for p in PROMPTS],
        active=[True] * len(PROMPTS),
        seeds=torch.arange(len(PROMPTS)),
        step=0,
        sampling=SamplingParams(),
        device=scorer.device,
        capacity=80,
        vocab=VOCAB,
    )
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(columns(heads, scorer.device), [len(head) for head in heads])
        drafter.begin(state)
        for _ in range(2):
            verified = step(drafter, scorer, state, "recursive").verified
            emitted = zip(state.sequences, verified.tokens.tolist(), verified.length.tolist(), strict=True)
            for sequence, tokens, length in emitted:
                sequence += tokens[:length]
            state.step += 1
            state.refresh()
        yield drafter, scorer, state
        drafter.end()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_step_is_one_graph(name: str) -> None:
    # nothing in it depends on what only the device knows: draft levels, score, verify and keep compile without a break
    with after_two_steps(name) as (drafter, scorer, state):
        wanted = step(drafter, scorer, state, "recursive")
    with after_two_steps(name) as (drafter, scorer, state):
        found = torch.compile(step, fullgraph=True, backend="eager")(drafter, scorer, state, "recursive")
    torch.compiler.reset()
    assert torch.equal(found[0].tokens, wanted[0].tokens) and torch.allclose(found[1], wanted[1], atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found[2], wanted[2], strict=True))


def test_every_step_has_its_own_coins() -> None:
    state = State(
        sequences=[[1], [2]],
        active=[True, True],
        seeds=torch.tensor([5, 2**40 + 7]),
        step=0,
        sampling=SamplingParams(),
        device=torch.device("cpu"),
        capacity=9,
        vocab=VOCAB,
    )
    trees = [Proposal(torch.zeros(2, n, dtype=torch.int64), torch.tensor([-1] + [0] * (n - 1)), 1) for n in (3, 40)]
    for state.step in [*range(150), 7]:  # trees of two sizes in turn, and a step back
        for tree in trees:
            wanted = draw_uniforms(state.seeds, state.step, tree.tokens.shape[1] + 2).roll(-2, 1)
            assert torch.equal(coins_of(state, tree), wanted)


def test_the_benchmark_of_the_loop_runs(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "bench" / "loop.py"
    root = str(script.parent.parent)
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    environment.pop("MCSD_BENCH_AGAIN", None)

    def run(*options: str) -> tuple[list[dict[str, Any]], str]:
        command = [sys.executable, str(script), "--smoke", *options]
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    rows, _ = run()
    assert rows == [json.loads(line) for line in (tmp_path / "loop_gpu.jsonl").read_text().splitlines()]
    assert [row["side"].split()[0] for row in rows] == ["transformers"] * 3 + ["mcsd"] * 10
    for row in rows[3:]:
        assert row["tokens_per_call"] >= 1.0 and row["microseconds_per_step"] > 0
        assert "microseconds_outside_forwards_per_step" in row and row["microseconds_of_a_one_token_forward"] > 0
    rows, said = run("--acceptance=0.6", "--acceptance=0.8", "--budget=0")
    assert not rows and "1 of 2 groups have rows" in said and "left out after 0 s: smoke, acceptance 0.8" in said


def test_the_benchmark_of_the_loop_tells_forwards_from_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tape in the place of graphs: what is replayed, twice in one turn, and whose forwards count."""
    monkeypatch.setattr(loop, "_CAPTURE", Tape(monkeypatch))
    monkeypatch.setattr("mcsd.graphs.capture", loop.ForwardClock.capture)
    monkeypatch.setattr(loop.ForwardClock, "timing", False)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("MCSD_BENCH_RECORD", "1")
    device = torch.device("cpu")
    cycle = loop.Cycle(loop.SHAPES["smoke"][-1], device)
    table = cycle.known(0.6)
    target, assistant = (
        loop.model_of(shape, follows, device, torch.float32)
        for shape, follows in (("smoke", cycle.follows), ("smoke-assistant", table))
    )
    group = {"target": "smoke", "acceptance": 0.6, "prompt": 12, "new_tokens": 12}
    assert loop.compare(group, target, assistant, table, cycle, 2, math.inf) == 0
    rows = {row["side"]: row for row in harness.read(tmp_path / "loop_gpu.jsonl")}
    for shape in loop.TREES:
        for name, forwards in (("controlled", 1), ("assistant", 4)):
            whole, parts = rows[f"mcsd {name} {shape}"], rows[f"mcsd {name} {shape}, forwards captured"]
            assert whole["replays"] == whole["steps"] - 1
            assert parts["replays"] == forwards * whole["replays"]
            inside = parts["microseconds_in_forwards_per_step"]
            assert whole["microseconds_in_forwards_per_step"] == inside and "microseconds_in_replay_per_step" in whole
            outside = whole["microseconds_outside_forwards_per_step"]
            assert outside == pytest.approx(whole["microseconds_per_step"] - inside, abs=0.2)
            forward = whole["microseconds_of_a_target_forward"]
            assert whole["outside_over_target_forward"] == pytest.approx(outside / forward, abs=1e-3)
    assert rows[loop.ONE_TOKEN]["replays"] == 11 and rows["mcsd controlled (4, 2, 2), eager"]["replays"] == 0


def test_the_benchmark_of_the_loop_says_which_targets_are_met() -> None:
    row = {"target": "llama-3-8b", "acceptance": 0.6, "side": "mcsd assistant (4, 2, 2)", "over_greedy": 2.3}
    row |= {"over_assisted": 1.4, "microseconds_outside_forwards_per_step": 140.0, "outside_over_target_forward": 0.035}
    row |= {"microseconds_in_replay_per_step": 5000.0}
    found = loop.targets(row)
    assert list(found.values()) == [False, True, True, False]
    assert list(loop.targets(row | {"acceptance": 0.8}).values()) == [False, True]
    assert loop.targets(row | {"target": "smoke"}) == {}
    lines = loop.verdicts([row | {"targets": found}, {"side": "of an older row"}])
    assert lines[0].startswith(
        "MISSED: llama-3-8b, acceptance 0.6, mcsd assistant (4, 2, 2): <= 3 % of a target forward"
    )
    assert lines[1].startswith("met: ") and lines[1].endswith(": 140.0") and len(lines) == 4


def test_the_table_of_the_loop_takes_rows_without_a_step() -> None:
    row = {"target": "llama-3-8b", "acceptance": 0.6, "side": "s", "tokens_per_second": 99.6, "over_greedy": 2.3}
    full = {"microseconds_outside_forwards_per_step": 140.4, "outside_over_target_forward": 0.0312}
    table = tables.loop_gpu([row | {"over_assisted": 1.4} | full, row | {"side": "t", "over_assisted": None}])
    assert table is not None and len(table.head) == 7
    assert [line[3:] for line in table.body] == [
        ["100", "2.3 ×", "1.4 ×", "140 us, 3.1%"],
        ["100", "2.3 ×", "–", "–"],
    ]


def test_benchmarks_of_a_gpu_fit_the_time_for_which_one_is_lent() -> None:
    minutes = [one.minutes for one in BENCHMARKS.values() if one.gpu]
    assert max(minutes) <= 10 and sum(minutes) <= 28


def test_a_drafter_that_is_not_alone_reads_whatever_is_new() -> None:
    model = tiny()
    drafter = ModelDrafter(model, (3,))
    drafter.alone = False
    # the first text has no room left for as many tokens as the second has that are new
    texts, new = [prompt(60, 1), prompt(5, 2)], prompt(20, 3)
    state = State(
        sequences=[list(text) for text in texts],
        active=[False, True],
        seeds=torch.arange(2),
        step=0,
        sampling=SamplingParams(),
        device=torch.device("cpu"),
        capacity=60,
        vocab=VOCAB,
    )
    with torch.inference_mode():
        drafter.begin(state)
        drafter.propose(state)
        drafter.keep(state, torch.tensor([[0, -1], [0, -1]]), torch.tensor([1, 1]))
        state.sequences[1] += new
        state.refresh()
        rows = drafter.propose(state).draft_logits
        drafter.end()
    assert rows is not None
    for row, text in zip(rows, (texts[0], texts[1] + new), strict=True):
        assert (row - plain_logits(model, text)).abs().max() < 1e-4
