"""The command line: `python -m mcsd.distill --target NAME --output FOLDER`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..batch import read_prompts
from ..bundled import DEFAULT_TARGET
from ..models import load_target
from ..pairs import resolve_device
from .files import read_json, same_settings, write_whole
from .product import save_product
from .students import FeatureStudent, LayersStudent, new_feature_student, new_layers_student
from .text import Prompter, check_longest, write_text
from .training import DRAFT_IDS, Settings, Texts, Trainer, choose_ids, load_weights, overlap_on

_DEFAULTS = Settings()


class Kind(str, Enum):
    """What is trained."""

    feature = "feature"
    layers = "layers"


class Start(str, Enum):
    """Where the layers of a "layers" drafter come from."""

    target = "target"
    fresh = "fresh"


class Rows(str, Enum):
    """Which tokens a reduced output head has."""

    lowest = "lowest"
    frequent = "frequent"


class Stage(str, Enum):
    """What a call does."""

    all = "all"
    text = "text"
    train = "train"
    product = "product"


def distill(
    output: Annotated[Path, typer.Option(help="Folder of the run: text/, checkpoint, log, and the drafter.")],
    target: Annotated[str, typer.Option(help="A local folder, a name on the model hub, or the bundled one.")] = (
        DEFAULT_TARGET
    ),
    kind: Annotated[Kind, typer.Option(help="A layer on the target's hidden states, or a small model.")] = Kind.feature,
    stage: Annotated[Stage, typer.Option(help="One stage alone; each continues what is there.")] = Stage.all,
    tokens: Annotated[int, typer.Option(min=1, help="Positions of text to be written.")] = 1_000_000,
    text_batch: Annotated[int, typer.Option(min=1, help="Texts written at once.")] = 64,
    longest: Annotated[int, typer.Option(min=1, help="Tokens written of each text.")] = 256,
    prompts: Annotated[
        Path | None, typer.Option(help='User turns, a line each or .jsonl with "prompt", instead of the built-in ones.')
    ] = None,
    draft_vocab: Annotated[int, typer.Option(min=1, help="Tokens of the drafter's output head.")] = 16_384,
    draft_tokens: Annotated[Rows, typer.Option(help="The lowest ids, or the most frequent in the text.")] = Rows.lowest,
    layers: Annotated[int, typer.Option(min=1, help='Of a "layers" drafter.')] = 2,
    start: Annotated[Start, typer.Option(help='Of a "layers" drafter.')] = Start.target,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Feed-forward width of new layers.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A run whose last checkpoint a new run starts from.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = _DEFAULTS.steps,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Positions a step.")] = _DEFAULTS.batch_tokens,
    learning_rate: Annotated[float, typer.Option()] = _DEFAULTS.learning_rate,
    head_learning_rate: Annotated[float, typer.Option()] = _DEFAULTS.head_learning_rate,
    levels: Annotated[int, typer.Option(min=1, help="Guesses in a row, in training.")] = _DEFAULTS.levels,
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Final share of the overlap loss.")] = _DEFAULTS.overlap,
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = _DEFAULTS.every,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the target while it writes.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
) -> None:
    """Train a small drafter for a target on text that the target writes itself.

    Stopped at any point, the same command goes on where it was. The drafter is OUTPUT/drafter, a folder that
    `mcsd.draft_model.load_draft` and `--draft` take.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        levels=levels if kind is Kind.feature else 1,
        overlap=overlap,
        seed=seed,
        every=every,
    )
    requests = [prompt.text for prompt in read_prompts(prompts)] if prompts is not None else []
    place = resolve_device(device)
    model, tokenizer = load_target(target, dtype=dtype, device=place)
    text = output / "text"
    if stage in (Stage.all, Stage.text):
        prompter = _prompter(model, tokenizer, requests)
        check_longest(model, prompter, longest)
        same_settings(
            text,
            "settings.json",
            {
                "target": target,
                "batch": text_batch,
                "longest": longest,
                "prompts": str(prompts),
                "prompts_sha256": hashlib.sha256(json.dumps(requests).encode()).hexdigest(),
                "seed": seed,
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            later=("prompts_sha256", "dtype"),
        )
        with tqdm(total=tokens, unit="tok", desc="text") as bar:
            write_text(
                model,
                prompter,
                text,
                tokens=tokens,
                batch=text_batch,
                longest=longest,
                seed=seed,
                progress=bar.update,
            )
    if stage is Stage.text:
        return
    texts = Texts(text)
    vocab = model.get_input_embeddings().weight.shape[0]
    same_settings(
        output,
        "drafter.json",
        {
            "target": target,
            "kind": kind.value,
            "draft_vocab": min(draft_vocab, vocab),
            "draft_tokens": draft_tokens.value,
            "layers": layers if kind is Kind.layers else None,
            "start": start.value if kind is Kind.layers else None,
            "intermediate": intermediate,
            "weights": str(weights) if weights is not None else None,
        },
    )
    head = model.get_output_embeddings().weight.detach().float()
    ids = _kept(output / DRAFT_IDS, lambda: choose_ids(texts, draft_vocab, head, draft_tokens.value).tolist())
    draft_ids = torch.tensor(ids, device=place)
    student: FeatureStudent | LayersStudent
    if kind is Kind.feature:
        student = new_feature_student(model, draft_ids, texts.train, intermediate=intermediate, seed=seed)
    else:
        fresh = start is Start.fresh
        student = new_layers_student(
            model, draft_ids, texts.train, layers=layers, fresh=fresh, intermediate=intermediate, seed=seed
        )
    if weights is not None:
        load_weights(student, weights)
    trainer = Trainer(student, head, texts, settings, output)
    if stage is not Stage.product:
        with tqdm(total=steps, initial=trainer.step, unit="step", desc="train") as bar:

            def show(row: dict[str, Any]) -> None:
                bar.update()
                if "held_out_overlap" in row:
                    bar.set_postfix(overlap=row["held_out_overlap"])

            trainer.run(show)
    quality = overlap_on(student, head, trainer.texts.held_out, settings.levels)
    about = {
        "target": target,
        "steps": trainer.step,
        "training_tokens": trainer.texts.tokens,
        "visits": trainer.visits,
        "held_out_overlap": [round(value, 4) for value in quality],
    }
    path = save_product(student, output / "drafter", output, about)
    print(json.dumps({"drafter": str(path.parent), "bytes": path.stat().st_size, **about}))


def _prompter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[str]) -> Prompter:
    eos = model.generation_config.eos_token_id
    ends = [eos] if isinstance(eos, int) else list(eos or [])
    return Prompter(tokenizer, model.get_input_embeddings().weight.shape[0], ends, requests)


def _kept(path: Path, make: Callable[[], list[int]]) -> list[int]:
    """A list that is made once and then read from a file."""
    if not path.exists():
        numbers = json.dumps(make())
        write_whole(path, lambda partial: partial.write_text(numbers))
    kept: list[int] = read_json(path)
    return kept


def main() -> None:
    """Run the command line; a wrong argument is one line on stderr, unless MCSD_DEBUG is set."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(distill)
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("MCSD_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
