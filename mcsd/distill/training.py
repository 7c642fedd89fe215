"""The training loop: the target's laws on text it wrote, seen through a part of the vocabulary at each step."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .files import write_whole
from .students import Student
from .text import Sample, read_text

CHECKPOINT = "checkpoint.pt"
DRAFT_IDS = "draft_ids.json"
LOG = "training.jsonl"
_HELD_OUT = 25  # one prompt in so many
_ASKED = 50_000  # positions that say which tokens are frequent
_BUCKET = 64  # texts that are sorted by length together


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        steps: of the optimiser.
        batch_tokens: positions a step, padding included.
        learning_rate: of everything but the head.
        head_learning_rate: of the head.
        levels: how often a feature drafter goes on from its own guess in training.
        deeper: weight of a level's loss against that of the level before.
        overlap: the share of the loss that is 1 - sum min(p, q) at the end of training; the rest is cross-entropy.
        frequent: columns of the output that take part in every step: the most frequent tokens.
        others: columns drawn at random from the rest at each step, weighted so that the loss is right on average.
        seed: of the order of the texts and of the columns.
        every: steps between two checkpoints, and between two lines of the log.
    """

    steps: int = 1000
    batch_tokens: int = 1536
    learning_rate: float = 1e-3
    head_learning_rate: float = 3e-4
    levels: int = 3
    deeper: float = 0.5
    overlap: float = 0.5
    frequent: int = 2560
    others: int = 1024
    seed: int = 0
    every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "levels", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap: expected a share in [0, 1], got {self.overlap}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a finite number > 0, got {self.learning_rate}")
        if not 0 <= self.head_learning_rate < math.inf:
            raise ValueError(f"head_learning_rate: expected a finite number >= 0, got {self.head_learning_rate}")


class Texts:
    """The stored texts of a folder, split by prompt; files that come later are found by `refresh`.

    Args:
        folder: of the files.
        only: their names; None: all that are there.
    """

    def __init__(self, folder: Path, only: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.files: list[str] = []
        self.train: list[Sample] = []
        self.held_out: list[Sample] = []
        self.refresh(only)

    @property
    def tokens(self) -> int:
        """Training tokens that the target wrote."""
        return sum(len(sample.tokens) - sample.written for sample in self.train)

    def refresh(self, only: Sequence[str] | None = None) -> None:
        """Read the files that are new.

        Raises:
            ValueError: there is no text, or one of `only` is gone.
        """
        names = sorted(path.name for path in self.folder.glob("*.safetensors")) if only is None else list(only)
        for name in names:
            if name in self.files:
                continue
            if not (self.folder / name).is_file():
                raise ValueError(f"{self.folder}: expected the file {name} that training began with, found none")
            for sample in read_text(self.folder / name):
                if len(sample.tokens) - sample.written >= 2:
                    (self.train if sample.group % _HELD_OUT else self.held_out).append(sample)
            self.files.append(name)
        if not self.train:
            raise ValueError(f"{self.folder}: expected text to train on, found none")


def choose_ids(texts: Texts, rows: int, target_head: torch.Tensor, choice: str) -> torch.Tensor:
    """The tokens of a reduced output vocabulary, `[rows]` int64 in ascending order.

    Args:
        texts: for "frequent".
        rows: how many; at least the size of the vocabulary: all.
        target_head: `[vocab, width]` f32.
        choice: "lowest" ids, which in a byte-pair vocabulary are the earliest merges, or those most "frequent": of the
            largest mean probability at up to 50,000 positions of the texts (ties: the lower id first), which says much
            more than a count about tokens that were written once or never.
    """
    vocab = len(target_head)
    if rows >= vocab:
        return torch.arange(vocab)
    if choice == "lowest":
        return torch.arange(rows)
    total = torch.zeros(vocab, device=target_head.device)
    every = math.ceil(texts.tokens / _ASKED)
    for sample in texts.train:
        hidden = sample.hidden[sample.written - 1 :: every].to(target_head)
        scale = sample.scale[sample.written - 1 :: every].to(target_head)
        total += (hidden @ target_head.T - scale[:, None]).exp().sum(0)
    return total.argsort(descending=True, stable=True)[:rows].sort().values.cpu()


def count_tokens(texts: Texts, vocab: int) -> torch.Tensor:
    """`[vocab]` f32: how often the target wrote each token."""
    written = torch.cat([sample.tokens[sample.written :] for sample in texts.train])
    return torch.bincount(written, minlength=vocab).float()


def load_weights(student: Student, run: Path) -> None:
    """Give a student the weights of another run's last checkpoint.

    Of the output head it takes the rows of the tokens that both have; the others keep their start.

    Raises:
        ValueError: there is no checkpoint, or it is of another shape.
    """
    if not (run / CHECKPOINT).is_file():
        raise ValueError(f"weights: expected {CHECKPOINT} in {run}, found none")
    body = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)["body"]
    own = student.body.state_dict()
    (head,) = (name for name, parameter in student.body.named_parameters() if parameter is student.head)
    ids = student.draft_ids.tolist()
    theirs = json.loads((run / DRAFT_IDS).read_text()) if (run / DRAFT_IDS).is_file() else ids
    shapes = {name: tensor.shape for name, tensor in own.items()}
    shapes[head] = torch.Size([len(theirs), *shapes[head][1:]])
    if {name: tensor.shape for name, tensor in body.items()} != shapes:
        raise ValueError(f"weights: the drafter in {run} has another shape; use its --kind and --layers")
    place = {token: row for row, token in enumerate(theirs)}
    rows = [row for row, token in enumerate(ids) if token in place]
    start = own[head].clone()
    start[rows] = body[head][[place[ids[row]] for row in rows]].to(start)
    student.body.load_state_dict({**body, head: start})


class Trainer:
    """Trains one student; a run that was stopped goes on from its last checkpoint to the same weights.

    Args:
        student: the drafter.
        target_head: `[vocab, width]` f32, frozen.
        texts: to train on. New files join at the next pass over the texts.
        settings: how.
        folder: of checkpoint and log; the checkpoint there, if any, is loaded.

    Raises:
        ValueError: the checkpoint there is of another run.
    """

    def __init__(
        self, student: Student, target_head: torch.Tensor, texts: Texts, settings: Settings, folder: Path
    ) -> None:
        self.student, self.target_head, self.texts, self.settings = student, target_head, texts, settings
        self.folder = folder
        self.step = self.visits = self.round = self.place = 0
        self.seconds = 0.0
        rest = [p for p in student.body.parameters() if p is not student.head]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": rest, "lr": settings.learning_rate, "base": settings.learning_rate},
                {"params": [student.head], "lr": settings.head_learning_rate, "base": settings.head_learning_rate},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.01,
        )
        self._plan: list[list[Sample]] = []
        self._losses: list[list[float]] = []
        if (folder / CHECKPOINT).exists():
            self._load()
        else:
            (folder / LOG).unlink(missing_ok=True)
            self._frequent = self._columns()

    def run(self, progress: Callable[[dict[str, Any]], None] = lambda row: None, until: int | None = None) -> None:
        """Train to the last step, or to step `until`."""
        settings = self.settings
        last = settings.steps if until is None else min(until, settings.steps)
        while self.step < last:
            start = time.perf_counter()
            losses = self._one_step(self._next_batch())
            self._losses.append(losses)
            self.step += 1
            self.seconds += time.perf_counter() - start
            row: dict[str, Any] = {"step": self.step, "loss": losses[0]}
            if self.step % settings.every == 0 or self.step == last:
                row |= self._summary()
                with (self.folder / LOG).open("a") as log:
                    log.write(json.dumps(row) + "\n")
                self._save()
            progress(row)

    def _summary(self) -> dict[str, Any]:
        losses = [[loss[level] for loss in self._losses if len(loss) > level] for level in range(self.settings.levels)]
        self._losses = []
        quality = overlap_on(self.student, self.target_head, self.texts.held_out[:16], self.settings.levels)
        return {
            "loss": [round(sum(level) / len(level), 4) for level in losses if level],
            "held_out_overlap": [round(value, 4) for value in quality],
            "visits": self.visits,
            "training_tokens": self.texts.tokens,
            "seconds": round(self.seconds, 1),
        }

    def _columns(self) -> torch.Tensor:
        """The columns of the most frequent tokens of the files that the run began with."""
        ids = self.student.draft_ids.cpu()
        counts = count_tokens(self.texts, int(self.target_head.shape[0]))[ids]
        return counts.argsort(descending=True, stable=True)[: self.settings.frequent]

    def _next_batch(self) -> list[Sample]:
        if self.place >= len(self._plan):
            if self._plan:
                self.round += 1
                self.texts.refresh()
            self.place = 0
            self._plan = self._batches()
        self.place += 1
        return self._plan[self.place - 1]

    def _batches(self) -> list[list[Sample]]:
        """All texts in an order that depends on the seed and the number of the pass: batches of similar lengths."""
        order = list(range(len(self.texts.train)))
        rng = random.Random(self.settings.seed * 100_003 + self.round)
        rng.shuffle(order)
        plan: list[list[Sample]] = []
        for start in range(0, len(order), _BUCKET):
            bucket = sorted((self.texts.train[i] for i in order[start : start + _BUCKET]), key=lambda s: len(s.tokens))
            batch: list[Sample] = []
            for sample in bucket:
                if batch and len(sample.tokens) * (len(batch) + 1) > self.settings.batch_tokens:
                    plan.append(batch)
                    batch = []
                batch.append(sample)
            plan.append(batch)
        rng.shuffle(plan)
        return plan

    def _one_step(self, batch: list[Sample]) -> list[float]:
        settings, student = self.settings, self.student
        done = self.step / settings.steps
        warm = min(1.0, (self.step + 1) / min(40, settings.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        share = settings.overlap * max(0.0, min(1.0, (done - 0.4) / 0.3))
        tokens, hidden, scale, counts = _together(batch, self.target_head.device)
        columns, weight = self._draw_columns(tokens)
        loss = torch.zeros((), device=hidden.device)
        losses: list[float] = []
        importance = 1.0
        for level, guess in enumerate(student.guesses(tokens, hidden, settings.levels)):
            rows = counts.clone()
            rows[:, :level] = False
            if not bool(rows.any()):
                break
            cross, distance = self._loss(guess[rows], hidden[rows], scale[rows], columns, weight)
            # 4 brings the gradient of the distance to the size of the cross-entropy's
            loss = loss + importance * ((1 - share) * cross + share * 4 * distance)
            losses.append(float(cross.detach()))
            importance *= settings.deeper
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.body.parameters(), 1.0)
        self.optimiser.step()
        self.visits += int(counts.sum())
        return losses

    def _draw_columns(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output columns of this step and the log of the weight of each.

        Those of the frequent tokens and of the batch's own weigh 1; the rest are a sample that stands for all others.
        """
        ids = self.student.draft_ids
        rest = torch.isin(ids, tokens.unique(), invert=True)
        rest[self._frequent.to(rest.device)] = False
        always = (~rest).nonzero()[:, 0]
        others = rest.nonzero()[:, 0]
        number = min(self.settings.others, len(others))
        rng = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        drawn = others[torch.randperm(len(others), generator=rng)[:number].to(others.device)]
        stands_for = math.log(len(others) / number) if number else 0.0
        weight = torch.zeros(len(always) + number, device=ids.device)
        weight[len(always) :] = stands_for
        return torch.cat([always, drawn]), weight

    def _loss(
        self,
        guess: torch.Tensor,
        hidden: torch.Tensor,
        scale: torch.Tensor,
        columns: torch.Tensor,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the draft's law q under the target's p, and 1 - sum min(p, q), each a mean over rows.

        Args:
            guess: `[rows, width]`, what the draft's head reads.
            hidden: `[rows, width]` f32, what the target's head read.
            scale: `[rows]`, the log-sum-exp of the target's logits.
            columns: of the draft's output.
            weight: the log of what each of them stands for.
        """
        with torch.no_grad():
            p = (hidden @ self.target_head[self.student.draft_ids[columns]].T - scale[:, None]).exp_()
            p_mass = p * weight.exp()
        logits = guess @ self.student.head[columns].T
        log_q = logits - (logits + weight).logsumexp(-1, keepdim=True)
        cross = -(p_mass * log_q).sum(-1).mean()
        overlap = (torch.minimum(p, log_q.exp()) * weight.exp()).sum(-1).mean()
        return cross, 1 - overlap

    def _save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "visits": self.visits,
            "round": self.round,
            "place": self.place,
            "seconds": self.seconds,
            "files": self.texts.files,
            "frequent": self._frequent,
            "body": self.student.body.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        write_whole(self.folder / CHECKPOINT, lambda partial: torch.save(state, partial))

    def _load(self) -> None:
        path = self.folder / CHECKPOINT
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in asdict(self.settings).items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"{path}: made with {name} = {state['settings'].get(name)!r}, now it is {value!r}; "
                    "remove it to begin again, or use the same settings to continue"
                )
        self.step, self.visits, self.seconds = state["step"], state["visits"], state["seconds"]
        self.round, self.place, self._frequent = state["round"], state["place"], state["frequent"]
        self.texts = Texts(self.texts.folder, state["files"])
        self.student.body.load_state_dict(state["body"])
        self.optimiser.load_state_dict(state["optimiser"])
        self._plan = self._batches()
        log = self.folder / LOG
        if log.exists():  # lines of steps that are about to be done again
            lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            write_whole(log, lambda partial: partial.write_text("".join(line + "\n" for line in lines)))


def _together(
    batch: Sequence[Sample], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, hidden states and scales of some texts, padded on the right, and which positions count.

    A position counts if the token after it is the target's own.
    """
    longest, width = max(len(sample.tokens) for sample in batch), batch[0].hidden.shape[1]
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    hidden = torch.zeros(len(batch), longest, width)
    scale = torch.zeros(len(batch), longest)
    counts = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, sample in enumerate(batch):
        length = len(sample.tokens)
        tokens[row, :length] = sample.tokens
        hidden[row, :length] = sample.hidden
        scale[row, :length] = sample.scale
        counts[row, sample.written - 1 : length] = True
    return tokens.to(device), hidden.to(device), scale.to(device), counts.to(device)


@torch.no_grad()
def overlap_on(student: Student, target_head: torch.Tensor, samples: Sequence[Sample], levels: int) -> list[float]:
    """Mean over positions of sum min(p, q) by level, at temperature 1 over the target's whole vocabulary."""
    ids = student.draft_ids
    totals, rows = [0.0] * levels, [0] * levels
    for sample in samples:
        tokens, hidden, scale, counts = _together([sample], target_head.device)
        for level, guess in enumerate(student.guesses(tokens, hidden, levels)):
            use = counts.clone()
            use[:, :level] = False
            q = (guess[use] @ student.head.T).softmax(-1)
            p = (hidden[use] @ target_head[ids].T - scale[use][:, None]).exp()
            totals[level] += float(torch.minimum(p, q).sum())
            rows[level] += len(q)
    return [total / count for total, count in zip(totals, rows, strict=True) if count]
