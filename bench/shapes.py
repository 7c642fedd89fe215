"""Tokens per target call by tree shape, proposal, rule and temperature, on held-out prompts, with confidence intervals.

python bench/shapes.py --minutes 60          # measure, a prompt after the other, going on where the last run stopped
python bench/shapes.py --table               # the table from the rows, with intervals by bootstrap over prompts

Rows go to bench/results/shapes.jsonl, one a prompt and setting. Prompts are the outer loop, so that a run that is cut
short has fewer prompts and not fewer settings. At temperature 0 a sampled draft has a single candidate, so there the
table has "point" alone, and one rule, since both accept the same.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import harness
import numpy as np
from prompts_heldout import INSTRUCTIONS, TRANSLATIONS

import mcsd
from mcsd.models import default_pair

SHAPES = ((4, 2, 2), (4, 2, 2, 1), (4, 2, 2, 1, 1), (1, 1, 1, 1))
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
    """Every setting of the table."""
    every = product(SHAPES, PROPOSALS, RULES, temperatures)
    return [row for row in every if row[3] > 0 or row[1:3] == ("point", "recursive")]


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, action="append")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop before a prompt after this time")
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="print the table from the rows there are")
    options = parser.parse_args()
    if options.table:
        print(table(rows_of(options.output)))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Add the rows that are missing."""
    start = time.monotonic()
    target, draft, tokenizer = default_pair(options.dtype)
    target = target.to(options.device)
    run = {"tokens": options.tokens, "dtype": options.dtype, "device": options.device}
    done = {key_of(row) for row in rows_of(options.output)}
    options.output.parent.mkdir(exist_ok=True)
    with options.output.open("a") as out:
        for number, prompt in enumerate(PROMPTS[: options.prompts]):
            chat = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(options.device)
            for shape, proposal, rule, temperature in settings_of(options.temperature or list(TEMPERATURES)):
                if time.monotonic() - start > 60 * options.minutes:
                    return
                row: dict[str, Any] = {"prompt": number, "branching": list(shape), "proposal": proposal}
                row |= {"rule": rule, "temperature": temperature, **run}
                if key_of(row) in done:
                    continue
                stats = mcsd.generate(
                    target,
                    draft,
                    **inputs,
                    branching=shape,
                    proposal=proposal,
                    rule=rule,
                    temperature=temperature,
                    max_new_tokens=options.tokens,
                    seed=number,
                ).stats
                row |= {"emitted": stats.tokens, "calls": stats.request_calls}
                row |= {"accepted_by_depth": stats.accepted_by_depth, "tested_by_depth": stats.tested_by_depth}
                out.write(json.dumps({"bench": "shapes", **row, "machine": harness.machine()}) + "\n")
                out.flush()
            print(f"prompt {number + 1} of {options.prompts}", flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    whole, _, torn = path.read_text().rpartition("\n")
    if torn:
        path.write_text(whole + "\n" if whole else "")
    return [json.loads(line) for line in whole.splitlines()]


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
        mean, low, high = interval(counts, None, samples)
        chain = found.get((*key[:3], (1, 1, 1, 1)), {})
        shared = [prompt for prompt in prompts if prompt in chain]
        against = "| | |"
        if shared and len(key[3]) == 4 and key[3] != (1, 1, 1, 1):
            own = np.array([found[key][prompt] for prompt in shared], float)
            ratio = interval(own, np.array([chain[prompt] for prompt in shared], float), samples)
            against = f"| {ratio[0]:.3f} | {ratio[1]:.3f} to {ratio[2]:.3f} |"
        name = f"| {key[0]:g} | {key[1]} | {key[2]} | {','.join(map(str, key[3]))} |"
        lines.append(f"{name} {len(prompts)} | {mean:.3f} | {low:.3f} to {high:.3f} {against}")
    return "\n".join(lines)


def interval(counts: Any, over: Any, samples: int) -> tuple[float, float, float]:
    """Tokens per call, or its ratio to another setting's on the same prompts, with its bootstrap interval."""
    random = np.random.default_rng(0)
    picks = random.integers(0, len(counts), (samples, len(counts)))

    def value(some: Any) -> Any:
        rate = counts[some, 0].sum(-1) / counts[some, 1].sum(-1)
        return rate if over is None else rate / (over[some, 0].sum(-1) / over[some, 1].sum(-1))

    low, high = np.quantile(value(picks), [0.025, 0.975])
    return float(value(np.arange(len(counts)))), float(low), float(high)


if __name__ == "__main__":
    main()
