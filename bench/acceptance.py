"""How often drafts are accepted: overlap with the target by depth, and tokens per target call by tree.

python bench/acceptance.py --prompts question.jsonl --draft smollm2-feature --draft smollm2-draft

The target first writes a continuation of every prompt, the same for all drafts. Overlap is sum min(p, q) at each of
its positions, over the whole vocabulary; depth d means that the draft guessed the d tokens before by itself. Tokens
per call come from `mcsd.generate`. Intervals are 95 %, over prompts. `--prompts` takes MT-Bench's `question.jsonl` (the
first turn of each question), a .jsonl file with "prompt", or a text file; without it, the prompts of bench/prompts.py.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import harness
import torch
from prompts import PROMPTS
from transformers import PreTrainedModel

import mcsd
from mcsd.batch import read_prompts
from mcsd.bundled import DEFAULT_DRAFT, DEFAULT_TARGET
from mcsd.distill.students import FeatureStudent
from mcsd.draft_model import load_draft
from mcsd.drafters.feature import FeatureDrafter
from mcsd.models import load_target

_SHAPES = ("1", "2", "4", "4,2", "4,2,2", "1,1,1,1")


def main() -> None:
    """Print and record one row for each draft and temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=DEFAULT_TARGET)
    parser.add_argument("--draft", action="append")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", action="append", type=float)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--depths", type=int, default=3)
    parser.add_argument("--branching", action="append")
    parser.add_argument("--proposal", default=None)
    parser.add_argument("--rule", default="recursive")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--overlap-only", action="store_true")
    options = parser.parse_args()

    texts = load_prompts(options.prompts)[: options.limit]
    target, tokenizer = load_target(options.target, dtype=options.dtype)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    batches = [
        tokenizer(chats[i : i + options.batch], return_tensors="pt", padding=True, add_special_tokens=False)
        for i in range(0, len(chats), options.batch)
    ]
    drafts = {name: load_draft(name, target) for name in options.draft or [DEFAULT_DRAFT]}

    def about(name: str, temperature: float) -> dict[str, Any]:
        return {
            "bench": "acceptance",
            "target": options.target,
            "draft": name,
            "prompts": options.prompts.name if options.prompts else "bench/prompts.py",
            "count": len(texts),
            "max_new_tokens": options.tokens,
            "temperature": temperature,
            "dtype": options.dtype,
        }

    for temperature in options.temperature or [1.0]:
        missing = {
            name: draft
            for name, draft in drafts.items()
            if not harness.recorded("acceptance", [about(name, temperature)])
        }
        if not missing:
            print(f"temperature {temperature}: there are rows of this code and machine")
            continue
        written = [
            row for n, b in enumerate(batches) for row in continuations(target, b, options.tokens, temperature, n)
        ]
        for name, draft in missing.items():
            row = about(name, temperature)
            if temperature:
                overlap, top = overlaps(target, draft, written, options.depths, temperature)
                row["overlap_by_depth"] = [interval(values) for values in overlap]
                row["same_argmax_by_depth"] = [interval(values) for values in top]
            if not options.overlap_only:
                row |= {"proposal": options.proposal or "default", "rule": options.rule}
                row["tokens_per_call"] = {
                    shape: interval(tokens_per_call(target, draft, batches, shape, temperature, options))
                    for shape in options.branching or _SHAPES
                }
            harness.record("acceptance", row)


def load_prompts(path: Path | None) -> list[str]:
    """The prompts' texts."""
    if path is None:
        return list(PROMPTS)
    if path.suffix == ".jsonl":
        first = json.loads(path.read_text().split("\n", 1)[0])
        if "turns" in first:
            return [json.loads(line)["turns"][0] for line in path.read_text().splitlines() if line.strip()]
    return [prompt.text for prompt in read_prompts(path)]


def interval(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Ratio of sums over prompts, and the half-width of its 95 % interval (prompts are independent, positions not)."""
    top, bottom = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    ratio = top / bottom
    spread = sum((a - ratio * b) ** 2 for a, b in pairs)
    count = len(pairs)
    error = math.sqrt(spread * count / max(count - 1, 1)) / bottom
    return {"mean": round(ratio, 4), "half_width_95": round(1.96 * error, 4)}


@torch.inference_mode()
def continuations(
    target: PreTrainedModel, batch: Any, tokens: int, temperature: float, seed: int
) -> list[tuple[list[int], int]]:
    """For each prompt its tokens with what the target wrote, and the prompt's length."""
    torch.manual_seed(seed)
    law = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    text = target.generate(**batch, max_new_tokens=tokens, **(law or {"do_sample": False}))
    ends = target.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    width, rows = batch["input_ids"].shape[1], []
    for ids, mask in zip(text.tolist(), batch["attention_mask"].tolist(), strict=True):
        prompt = [token for token, keep in zip(ids, mask, strict=False) if keep]
        new = ids[width:]
        stop = next((i for i, token in enumerate(new) if token in ends), len(new))
        rows.append((prompt + new[:stop], len(prompt)))
    return rows


@torch.inference_mode()
def overlaps(
    target: PreTrainedModel, draft: Any, written: list[tuple[list[int], int]], depths: int, temperature: float
) -> tuple[list[list[tuple[float, float]]], list[list[tuple[float, float]]]]:
    """By depth and prompt: (sum, positions) of sum min(p, q), and of both laws having the same argmax."""
    found: tuple[list[list[tuple[float, float]]], ...] = ([[] for _ in range(depths)], [[] for _ in range(depths)])
    for tokens, start in written:
        ids = torch.tensor([tokens])
        hidden = target.get_decoder()(ids, use_cache=False).last_hidden_state
        after = slice(start - 1, len(tokens))
        p = (target.get_output_embeddings()(hidden[0, after]).float() / temperature).softmax(-1)
        for depth, logits in enumerate(draft_logits(draft, ids, hidden, depths, start - 1)):
            q = torch.zeros_like(p)
            q[:, draft_ids(draft)] = (logits.float() / temperature).softmax(-1)
            found[0][depth].append((float(torch.minimum(p, q).sum()), len(p)))
            found[1][depth].append((float((p.argmax(-1) == q.argmax(-1)).sum()), len(p)))
    return tuple([d for d in kind if d] for kind in found)  # type: ignore[return-value]


def draft_logits(draft: Any, ids: torch.Tensor, hidden: torch.Tensor, depths: int, first: int) -> list[torch.Tensor]:
    """`[length - first, columns]` for each depth; a model that reads tokens only guesses as well at every depth."""
    if isinstance(draft, FeatureDrafter):
        guesses = FeatureStudent(draft.model).guesses(ids, hidden, depths)
        return [torch.nn.functional.linear(guess[0, first:], draft.model.head_rows) for guess in guesses]
    return [draft(ids, use_cache=False).logits[0, first:, draft_ids(draft)]]


def draft_ids(draft: Any) -> torch.Tensor | slice:
    """The target's token of each column."""
    if isinstance(draft, FeatureDrafter):
        return draft.model.draft_ids
    return getattr(draft, "sub_vocab", slice(None))


def tokens_per_call(
    target: PreTrainedModel, draft: Any, batches: list[Any], shape: str, temperature: float, options: argparse.Namespace
) -> list[tuple[float, float]]:
    """For each prompt: tokens emitted, target calls."""
    counts: list[tuple[float, float]] = []
    for number, batch in enumerate(batches):
        emitted = [0] * len(batch["input_ids"])
        calls = [0] * len(emitted)

        def watch(
            state: Any, tree: Any, logits: Any, verified: Any, emitted: Any = emitted, calls: Any = calls
        ) -> None:
            for request, length in enumerate(verified.length.tolist()):
                if state.active[request]:
                    emitted[request] += length
                    calls[request] += 1

        mcsd.generate(
            target,
            draft,
            **batch,
            branching=tuple(int(k) for k in shape.split(",")),
            max_new_tokens=options.tokens,
            temperature=temperature,
            seed=1000 * number,
            proposal=options.proposal,
            rule=options.rule,
            observer=watch,
        )
        counts += list(zip(emitted, calls, strict=True))
    return counts


if __name__ == "__main__":
    main()
