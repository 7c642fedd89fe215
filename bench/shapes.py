"""Tokens per target call by tree shape, proposal, rule and temperature, on held-out prompts, with confidence intervals.

python bench/shapes.py --minutes 60          # measure, a batch after the other, going on where the last run stopped
python bench/shapes.py --table               # the table from the rows, with intervals by bootstrap over prompts

Rows go to bench/results/shapes.jsonl, one a prompt and setting. Batches of prompts are the outer loop, so that a run
that is cut short has fewer prompts and not fewer settings. At temperature 0 a sampled draft has a single candidate, so
there the table has "point" alone, and one rule, since both accept the same.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from prompts_heldout import INSTRUCTIONS, TRANSLATIONS

import mcsd
from mcsd.bundled import DEFAULT_DRAFT, DEFAULT_TARGET
from mcsd.drafters import Proposal, State
from mcsd.models import default_pair
from mcsd_kernels import Verified

CHAIN = (1, 1, 1, 1)
SHAPES = ((4, 2, 2), (4, 2, 2, 1), (4, 2, 2, 1, 1), CHAIN)
PROPOSALS = ("without_replacement", "with_replacement", "greedy", "point")
RULES = ("recursive", "traversal")
TEMPERATURES = (1.0, 0.7, 0.0)
# instructions and translations in turn, so that a run cut short has both kinds
PROMPTS = tuple(
    prompt
    for _, prompt in sorted(
        [(n / len(INSTRUCTIONS), prompt) for n, prompt in enumerate(INSTRUCTIONS)]
        + [(n / len(TRANSLATIONS), prompt) for n, prompt in enumerate(TRANSLATIONS)]
    )
)
ROWS = harness.RESULTS / "shapes.jsonl"


def settings_of(temperatures: list[float]) -> list[tuple[tuple[int, ...], str, str, float]]:
    """Every setting of the table.

    Three of the proposals draw a single child in the same way, so the chain has one of them, and "point".
    """
    every = product(SHAPES, PROPOSALS, RULES, temperatures)
    wanted = [row for row in every if row[3] > 0 or row[1:3] == ("point", "recursive")]
    return [row for row in wanted if row[0] != CHAIN or row[1] in ("without_replacement", "point")]


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=10, help="the table has the rows of one such number")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once")
    parser.add_argument("--temperature", type=float, action="append")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop before a batch after this time")
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="print the table from the rows there are")
    options = parser.parse_args()
    if options.table:
        print(table(harness.read(options.output)))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Add the rows that are missing."""
    start = time.monotonic()
    target, draft, tokenizer = default_pair(options.dtype)
    target = target.to(options.device)
    run = {"tokens": options.tokens, "dtype": options.dtype, "device": options.device}
    about = {"target": DEFAULT_TARGET, "draft": DEFAULT_DRAFT, "date": time.strftime("%Y-%m-%d")}
    about |= {"commit": harness.commit(), "machine": harness.machine()}
    done = {key_of(row) for row in harness.read(options.output)}
    options.output.parent.mkdir(exist_ok=True)
    numbers = range(min(options.prompts, len(PROMPTS)))
    with options.output.open("a+") as out:
        out.seek(max(0, out.tell() - 1))
        if out.read(1) not in ("", "\n"):  # the last run was cut off in a line
            out.write("\n")
        for first in numbers[:: options.batch]:
            block = numbers[first : first + options.batch]
            for shape, proposal, rule, temperature in settings_of(options.temperature or list(TEMPERATURES)):
                if time.monotonic() - start > 60 * options.minutes:
                    return
                setting: dict[str, Any] = {"branching": list(shape), "proposal": proposal}
                setting |= {"rule": rule, "temperature": temperature, **run}
                left = [number for number in block if key_of({"prompt": number, **setting}) not in done]
                if not left:
                    continue
                counts = [Counts() for _ in left]
                mcsd.generate(
                    target,
                    draft,
                    **chats(tokenizer, [PROMPTS[number] for number in left]).to(options.device),
                    branching=shape,
                    proposal=proposal,
                    rule=rule,
                    temperature=temperature,
                    max_new_tokens=options.tokens,
                    seed=left,
                    observer=partial(observe, counts),
                )
                for number, count in zip(left, counts, strict=True):
                    row = {"bench": "shapes", "prompt": number, **setting, **asdict(count)}
                    out.write(json.dumps({**row, **about}) + "\n")
                out.flush()
            print(f"prompt {block[-1] + 1} of {len(numbers)}", flush=True)


@dataclass
class Counts:
    """What one request's calls gave; the last one is not cut at the end of the text.

    Args:
        emitted: tokens that `verify` returned.
        calls: target calls.
        by_depth: entry d: calls that accepted d nodes below the root.
    """

    emitted: int = 0
    calls: int = 0
    by_depth: list[int] = field(default_factory=list)


def observe(counts: list[Counts], state: State, tree: Proposal, logits: torch.Tensor, verified: Verified) -> None:
    """Count one step of a batch."""
    for count, active, length in zip(counts, state.active, verified.length.tolist(), strict=True):
        if active:
            count.emitted += length
            count.calls += 1
            count.by_depth += [0] * (length - len(count.by_depth))
            count.by_depth[length - 1] += 1


def chats(tokenizer: Any, prompts: list[str]) -> Any:
    """The prompts as user turns, tokenized and padded on the left."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a row another one."""
    names = ("prompt", "proposal", "rule", "temperature", "tokens", "dtype", "device")
    return (tuple(row["branching"]), *(row[name] for name in names))


def table(rows: list[dict[str, Any]], samples: int = 2000) -> str:
    """Markdown: tokens per call with 95 % intervals over prompts, and the ratio to the chain of the same depth."""
    found: dict[tuple[Any, ...], dict[int, tuple[int, int]]] = {}
    for row in rows:
        key = (row["temperature"], row["proposal"], row["rule"], tuple(row["branching"]))
        found.setdefault(key, {})[row["prompt"]] = (row["emitted"], row["calls"])
    lines = [
        "| T | proposal | rule | tree | prompts | tokens per call | 95 % | over the chain of 4 | 95 % |",
        "|" + "---|" * 9,
    ]
    for key in sorted(found, key=lambda k: (-k[0], PROPOSALS.index(k[1]), RULES.index(k[2]), SHAPES.index(k[3]))):
        prompts = sorted(found[key])
        counts = np.array([found[key][prompt] for prompt in prompts], float)
        mean, low, high = harness.interval(counts, None, samples)
        chain = found.get((key[0], key[1] if key[1] == "point" else "without_replacement", key[2], CHAIN), {})
        shared = [prompt for prompt in prompts if prompt in chain]
        against = "| | |"
        if shared and len(key[3]) == 4 and key[3] != CHAIN:
            own = np.array([found[key][prompt] for prompt in shared], float)
            ratio = harness.interval(own, np.array([chain[prompt] for prompt in shared], float), samples)
            against = f"| {ratio[0]:.3f} | {ratio[1]:.3f} to {ratio[2]:.3f} |"
        name = f"| {key[0]:g} | {key[1]} | {key[2]} | {','.join(map(str, key[3]))} |"
        lines.append(f"{name} {len(prompts)} | {mean:.3f} | {low:.3f} to {high:.3f} {against}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
