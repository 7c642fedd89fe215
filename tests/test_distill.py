"""`python -m mcsd.distill` on tiny targets: what it stores, that it learns and resumes, what its product drafts."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from conftest import PValue
from test_feature_drafter import feature_model, plain_law
from tiny_folders import save_model

import mcsd
from mcsd.distill.__main__ import Kind, Rows, Stage, Start, distill, main
from mcsd.distill.files import same_settings
from mcsd.distill.product import quantise, save_product
from mcsd.distill.prompts import user_turn
from mcsd.distill.students import FeatureStudent, new_feature_student, new_layers_student
from mcsd.distill.text import Prompter, Sample, check_longest, read_text, write_text
from mcsd.distill.training import CHECKPOINT, DRAFT_IDS, Settings, Texts, Trainer, choose_ids, load_weights, overlap_on
from mcsd.draft_model import SubVocabularyDraft, dequantise, load_draft
from mcsd.drafters.feature import FeatureDrafter
from mcsd.models import load_target

SETTINGS = Settings(steps=12, batch_tokens=300, levels=3, every=5, frequent=40, others=16, learning_rate=3e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target on disk and some of its text."""
    path = tmp_path_factory.mktemp("distill")
    save_model(path / "target", 0, vocab=257, positions=1024)
    target, tokenizer = load_target(str(path / "target"), dtype="float32")
    write_text(target, Prompter(tokenizer, 257), path / "text", tokens=2500, batch=12, longest=40, user_longest=10)
    return path


@pytest.fixture(scope="module")
def target(folder: Path) -> torch.nn.Module:
    return load_target(str(folder / "target"), dtype="float32")[0]


def trainer(
    folder: Path, target: torch.nn.Module, run: Path, settings: Settings = SETTINGS, rows: int = 128
) -> Trainer:
    run.mkdir(exist_ok=True)
    texts = Texts(folder / "text")
    student = new_feature_student(target, torch.arange(rows), texts.train)
    return Trainer(student, target.get_output_embeddings().weight.detach(), texts, settings, run)


def samples(folder: Path, text: str = "text") -> list[Sample]:
    return [sample for path in sorted((folder / text).iterdir()) for sample in read_text(path)]


def test_stored_states_are_those_of_a_plain_forward(folder: Path, target: torch.nn.Module) -> None:
    stored = samples(folder)
    assert {sample.written for sample in stored} > {1}, "both prompts and texts that the target began are there"
    for sample in stored[:: len(stored) // 8]:
        with torch.no_grad():
            hidden = target.model(sample.tokens[None]).last_hidden_state[0]
            scale = target.lm_head(hidden).logsumexp(-1)
        torch.testing.assert_close(sample.hidden.float(), hidden, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(sample.scale, scale, atol=1e-4, rtol=1e-4)


def test_text_has_the_targets_law(target: torch.nn.Module, tmp_path: Path, p_value: PValue) -> None:
    class Same(Prompter):
        def stream(self, seed: int):  # type: ignore[no-untyped-def]
            return replace(super().stream(0), temperature=0.7)

    write_text(target, Same(None, 257), tmp_path, tokens=1500, batch=1500, longest=1)
    texts = list(read_text(tmp_path / "text-00000.safetensors"))
    law = (target(torch.tensor([[0]])).logits[0, -1] / 0.7).softmax(-1)
    counts = Counter(int(sample.tokens[1]) for sample in texts)
    assert sum(counts.values()) == 1500
    assert p_value(((token, float(p)) for token, p in enumerate(law.double() / law.double().sum())), counts) > 1e-4


def test_text_is_resumed_and_repeatable(folder: Path, target: torch.nn.Module, tmp_path: Path) -> None:
    tokenizer = load_target(str(folder / "target"))[1]
    first = sorted((folder / "text").iterdir())
    (tmp_path / first[0].name).write_bytes(first[0].read_bytes())
    write_text(target, Prompter(tokenizer, 257), tmp_path, tokens=2500, batch=12, longest=40, user_longest=10)
    again = sorted(tmp_path.iterdir())
    assert [path.name for path in again] == [path.name for path in first]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again, first, strict=True))


def test_a_turn_of_the_user_is_followed_by_the_template(folder: Path) -> None:
    tokenizer = load_target(str(folder / "target"))[1]
    prompter = Prompter(tokenizer, 257)
    begun = [sample for sample in samples(folder) if sample.written == len(prompter.head)]
    assert begun
    for sample in begun:
        text = tokenizer.decode(sample.tokens)
        # at most ten tokens of the user, then the template's text
        assert text.startswith("<") and re.match(r"(?s)<.{0,40}?>:", text), text


def test_training_reads_guesses_as_drafting_does(target: torch.nn.Module) -> None:
    model = feature_model(tiny.tiny())
    tokens = tiny.prompt(9)
    hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    for level, guess in enumerate(FeatureStudent(model).guesses(torch.tensor([tokens]), hidden, 4)):
        got = torch.nn.functional.linear(guess, model.head_rows)[0]
        for last in range(level, 9):
            wanted = plain_law(model, tokens[: last + 1], hidden[0, : last + 1], level)
            torch.testing.assert_close(got[last], wanted, atol=1e-4, rtol=1e-4)


def test_the_loss_through_a_part_of_the_vocabulary_is_right_on_average(
    folder: Path, target: torch.nn.Module, tmp_path: Path
) -> None:
    few = trainer(folder, target, tmp_path / "few", replace(SETTINGS, frequent=60, others=20))
    everything = trainer(folder, target, tmp_path / "all", replace(SETTINGS, others=1000))
    sample = few.texts.train[0]
    tokens, hidden, scale = sample.tokens[None], sample.hidden[None].float(), sample.scale[None]
    with torch.no_grad():
        guess = next(few.student.guesses(tokens, hidden, 1))
        exact = everything._loss(guess[0], hidden[0], scale[0], *everything._draw_columns(tokens))
        q = (guess[0] @ few.student.head.T).softmax(-1)
        p = target.lm_head(hidden[0]).softmax(-1)[:, :128]
        assert exact[1] == pytest.approx(float(1 - torch.minimum(p, q).sum(-1).mean()), abs=1e-3)
        assert exact[0] == pytest.approx(float(-(p * q.log()).sum(-1).mean()), abs=1e-3)
        estimates = []
        for few.step in range(200):
            estimates.append(torch.stack(few._loss(guess[0], hidden[0], scale[0], *few._draw_columns(tokens))))
    spread = torch.stack(estimates).std(0) / 200**0.5
    assert (torch.stack(estimates).mean(0) - torch.stack(exact)).abs().lt(5 * spread + 2e-3).all()


def test_a_resumed_run_ends_with_the_same_weights(folder: Path, target: torch.nn.Module, tmp_path: Path) -> None:
    whole = trainer(folder, target, tmp_path / "whole")
    whole.run()
    stopped = trainer(folder, target, tmp_path / "stopped")
    stopped.run(until=7)
    stopped = trainer(folder, target, tmp_path / "stopped")
    assert stopped.step == 7
    stopped.run()
    for name, weight in whole.student.body.state_dict().items():
        assert torch.equal(weight, stopped.student.body.state_dict()[name]), name
    log = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "training.jsonl").read_text().splitlines()]
    assert log == [5, 7, 10, 12]
    with pytest.raises(ValueError, match="steps"):
        trainer(folder, target, tmp_path / "stopped", replace(SETTINGS, steps=20))


def test_training_raises_the_overlap(folder: Path, target: torch.nn.Module, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=50, every=50, others=200)
    run = trainer(folder, target, tmp_path, settings, rows=257)
    head = target.get_output_embeddings().weight.detach()
    rows: list[dict[str, object]] = []
    before = overlap_on(run.student, head, run.texts.train[:20], 3)
    run.run(rows.append)
    after = overlap_on(run.student, head, run.texts.train[:20], 3)
    assert all(b > a + 0.01 for a, b in zip(before, after, strict=True)), (before, after)
    assert [row["step"] for row in rows] == list(range(1, 51))


def test_a_run_can_start_from_the_weights_of_another(folder: Path, target: torch.nn.Module, tmp_path: Path) -> None:
    first = trainer(folder, target, tmp_path / "first")
    first.run(until=3)
    second = trainer(folder, target, tmp_path / "second").student
    load_weights(second, tmp_path / "first")
    for name, weight in first.student.body.state_dict().items():
        assert torch.equal(weight, second.body.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"weights: expected checkpoint\.pt"):
        load_weights(second, tmp_path / "second")
    with pytest.raises(ValueError, match="another shape"):
        load_weights(trainer(folder, target, tmp_path / "third", rows=100).student, tmp_path / "first")
    # with the tokens of its rows, another choice of tokens can start from it, too
    ids = first.student.draft_ids.tolist()
    (tmp_path / "first" / DRAFT_IDS).write_text(json.dumps(ids))
    other = trainer(folder, target, tmp_path / "third", rows=100).student
    start = other.head.clone()
    load_weights(other, tmp_path / "first")
    for row, token in enumerate(other.draft_ids.tolist()):
        wanted = first.student.head[ids.index(token)] if token in ids else start[row]
        assert torch.equal(other.head[row], wanted), (row, token)


@pytest.mark.parametrize("kind", list(Kind))
def test_the_command_makes_a_drafter_that_is_lossless(folder: Path, tmp_path: Path, kind: Kind) -> None:
    options = {
        "output": tmp_path,
        "target": str(folder / "target"),
        "kind": kind,
        "tokens": 900,
        "text_batch": 12,
        "longest": 40,
        "draft_vocab": 100,
        "draft_tokens": Rows.frequent,
        "layers": 1,
        "steps": 6,
        "every": 3,
        "batch_tokens": 200,
    }
    distill(**options)
    first = (tmp_path / "drafter" / "draft_int8.safetensors").read_bytes()
    distill(**options)  # everything is there: the same product again
    assert (tmp_path / "drafter" / "draft_int8.safetensors").read_bytes() == first
    with pytest.raises(ValueError, match="draft_vocab"):
        distill(**{**options, "draft_vocab": 90, "stage": Stage.train})

    target, tokenizer = load_target(str(folder / "target"), dtype="float32")
    draft = load_draft(tmp_path / "drafter", target)
    assert isinstance(draft, FeatureDrafter if kind is Kind.feature else SubVocabularyDraft)
    ids = torch.tensor([tokenizer.encode("a line")])
    greedy = draft if kind is Kind.layers else draft.with_branching((2, 2), "point")
    text = mcsd.generate(target, greedy, ids, branching=(2, 2), max_new_tokens=20, temperature=0).sequences
    assert torch.equal(text, tiny.greedy(target, ids, torch.ones_like(ids), 20))


def test_a_trained_drafter_keeps_the_law(folder: Path, tmp_path: Path, p_value: PValue) -> None:
    small = tiny.tiny(vocab_size=6, gain=1.5)
    write_text(small, Prompter(None, 6), tmp_path / "text", tokens=600, batch=8, longest=30)
    texts = Texts(tmp_path / "text")
    student = new_feature_student(small, torch.tensor([0, 2, 3, 5]), texts.train)
    head = small.get_output_embeddings().weight.detach()
    Trainer(student, head, texts, replace(SETTINGS, steps=10, levels=2), tmp_path).run()
    save_product(student, tmp_path / "drafter")
    drafter = load_draft(tmp_path / "drafter", small)
    prompt = torch.tensor([[1, 4, 2]])
    with torch.inference_mode():
        first = small(prompt).logits[0, -1].softmax(-1)
        rows = [small(torch.tensor([[1, 4, 2, a]])).logits[0, -1].softmax(-1) for a in range(6)]
    law = [((a, b), float(first[a] * rows[a][b])) for a in range(6) for b in range(6)]
    drafter = drafter.with_branching((2, 1), "without_replacement")
    text = mcsd.generate(small, drafter, prompt.expand(1500, -1), max_new_tokens=2, seed=3).sequences[:, 3:]
    assert p_value(law, Counter(map(tuple, text.tolist()))) > 1e-4


def test_layers_start_from_the_target_or_fresh(tmp_path: Path) -> None:
    target = tiny.tiny()
    write_text(target, Prompter(None, tiny.VOCAB), tmp_path, tokens=1500, batch=12, longest=40)
    texts = Texts(tmp_path)
    head = target.get_output_embeddings().weight.detach()
    quality = {}
    for fresh, layers in ((False, 2), (False, 1), (True, 2)):
        student = new_layers_student(target, torch.arange(tiny.VOCAB), texts.train, layers=layers, fresh=fresh)
        quality[fresh, layers] = overlap_on(student, head, texts.train[:10], 1)[0]
    # both layers of a target of two are the target itself
    assert quality[False, 2] > 0.97
    assert 0.9 > quality[False, 1] > quality[True, 2] + 0.02


def test_int8_matrices_are_within_half_a_step() -> None:
    weights = {"matrix": torch.randn(5, 40) * torch.tensor([[1e-3], [1], [30], [0], [1]]), "vector": torch.randn(7)}
    stored = quantise(weights | {"ids": torch.arange(3)})
    assert (stored["matrix"].dtype, stored["vector"].dtype, stored["ids"].dtype) == (
        torch.int8,
        torch.bfloat16,
        torch.int32,
    )
    back = dequantise(stored, torch.float32)
    # the scale itself is rounded to 11 bits, which moves the largest entries by up to 1/16 of a step
    step = weights["matrix"].abs().amax(1, keepdim=True) / 127
    assert ((back["matrix"] - weights["matrix"]).abs() <= 0.57 * step + 1e-6).all()


def test_choose_ids(folder: Path, target: torch.nn.Module) -> None:
    texts = Texts(folder / "text")
    head = target.get_output_embeddings().weight.detach()
    assert torch.equal(choose_ids(texts, 300, head, "lowest"), torch.arange(257))
    assert torch.equal(choose_ids(texts, 7, head, "lowest"), torch.arange(7))
    chosen = choose_ids(texts, 7, head, "frequent")
    hidden = torch.cat([s.hidden[s.written - 1 :] for s in texts.train]).float()
    often = (hidden @ head.T).softmax(-1).mean(0)
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.allclose(often[chosen].sort().values, often.topk(7).values.sort().values, rtol=1e-3)


def test_user_turns_are_filled_in_and_differ() -> None:
    turns = [user_turn(seed) for seed in range(400)]
    assert turns == [user_turn(seed) for seed in range(400)]
    assert not any(re.search(r"[{}]", turn) for turn in turns)
    assert len(set(turns)) > 300


class TestRefusals:
    def test_logits_that_are_no_linear_map(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="matrix times its hidden states"):
            write_text(tiny.tiny("granite", logits_scaling=3.0), Prompter(None, tiny.VOCAB), tmp_path, tokens=10)

    def test_layers_of_a_target_that_is_no_llama(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="fresh"):
            new_layers_student(tiny.tiny("qwen2"), torch.arange(9), [])

    def test_more_layers_than_there_are(self, folder: Path, target: torch.nn.Module) -> None:
        with pytest.raises(ValueError, match="at most the target's 2, got 3"):
            new_layers_student(target, torch.arange(9), [], layers=3)

    def test_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected text"):
            Texts(tmp_path)

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
            Settings(steps=0)
        with pytest.raises(ValueError, match="overlap"):
            Settings(overlap=1.5)
        for rate in (-1.0, 0.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=r"^learning_rate: expected a finite number > 0"):
                Settings(learning_rate=rate)
        with pytest.raises(ValueError, match="head_learning_rate: expected a finite number >= 0"):
            Settings(head_learning_rate=-1.0)

    def test_a_device_that_is_not_there(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="device: expected one that this machine has, got 'foo'"):
            distill(output=tmp_path / "run", target=str(folder / "target"), device="foo")

    @pytest.mark.parametrize("requests", [["a line", "another line"], None], ids=["requests", "templates"])
    def test_texts_longer_than_the_positions(self, folder: Path, tmp_path: Path, requests: list[str] | None) -> None:
        run, prompts = tmp_path / "run", tmp_path / "prompts.txt"
        prompts.write_text("\n".join(requests or []))
        options = {"output": run, "target": str(folder / "target"), "stage": Stage.text, "tokens": 1, "text_batch": 2}
        with pytest.raises(ValueError, match=r"longest: expected at most .* target's 1024 positions, got 1024"):
            distill(**options, longest=1024, prompts=prompts if requests else None)
        assert not run.exists()
        if requests:
            target, tokenizer = load_target(str(folder / "target"))
            check_longest(target, Prompter(tokenizer, 257, requests=requests), 1024 - len("<another line>:"))

    def test_a_text_ends_with_the_positions(self, tmp_path: Path) -> None:
        target = tiny.tiny("gpt2", n_positions=24)
        with pytest.raises(ValueError, match=r"longest: expected at most 23, .* got 24"):
            write_text(target, Prompter(None, tiny.VOCAB), tmp_path, tokens=10, longest=24)

        class Longer(Prompter):
            """Starts with more tokens than were looked at."""

            def stream(self, seed: int):  # type: ignore[no-untyped-def]
                return replace(super().stream(seed), tokens=[1] * 5, written=5)

        write_text(target, Longer(None, tiny.VOCAB), tmp_path, tokens=10, batch=1, longest=23)
        assert [len(sample.tokens) for sample in samples(tmp_path, "")] == [24]

    def test_other_settings_in_one_folder(self, tmp_path: Path) -> None:
        same_settings(tmp_path, "a.json", {"batch": 4})
        same_settings(tmp_path, "a.json", {"batch": 4})
        with pytest.raises(ValueError, match="made with batch = 4, now it is 5"):
            same_settings(tmp_path, "a.json", {"batch": 5})
        (tmp_path / "b.json").write_text('{"batch": ')
        with pytest.raises(ValueError, match=r"b\.json: damaged"):
            same_settings(tmp_path, "b.json", {"batch": 4})

    def test_texts_of_another_dtype_or_of_other_prompts(self, folder: Path, tmp_path: Path) -> None:
        prompts, recorded = tmp_path / "prompts.txt", tmp_path / "text" / "settings.json"
        prompts.write_text("a line")
        options = {
            "output": tmp_path,
            "target": str(folder / "target"),
            "stage": Stage.text,
            "prompts": prompts,
            "tokens": 1,
            "text_batch": 2,
            "longest": 4,
        }
        distill(**options)
        before = json.loads(recorded.read_text())
        recorded.write_text(json.dumps({key: before[key] for key in before.keys() - {"dtype", "prompts_sha256"}}))
        distill(**options)  # a folder from before they were recorded
        assert json.loads(recorded.read_text()) == before
        with pytest.raises(ValueError, match="made with dtype = 'float32', now it is 'bfloat16'"):
            distill(**options, dtype="bfloat16")
        prompts.write_text("another line")
        with pytest.raises(ValueError, match="made with prompts_sha256 = "):
            distill(**options)

    def test_on_the_command_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("MCSD_DEBUG", raising=False)
        monkeypatch.setattr("sys.argv", ["distill", "--target", str(tmp_path / "none"), "--output", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
        assert not (tmp_path / CHECKPOINT).exists()
        assert Start.fresh.value == "fresh"
