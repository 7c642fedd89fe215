"""Tokens a second of `mcsd.generate` beside transformers' own `generate`, on the bundled pair.

python bench/end_to_end.py --dtype bfloat16 --branching 4 --branching 6,1 --temperature 1.0 --tokens 64 --prompts 24

Both sides decode every prompt in turn, same model, dtype and threads, and both are timed from the prompt to the last
token by the wall clock. Sampled texts differ from side to side, so the figure is tokens a second over all prompts; its
95 % interval is by bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import harness
import torch
from prompts import PROMPTS

import mcsd
from mcsd.bundled import DEFAULT_DRAFT, DEFAULT_TARGET
from mcsd.models import default_pair


def main() -> None:
    """Print and record one row a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--branching", action="append")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many")
    parser.add_argument("--rule", default="recursive")
    parser.add_argument("--proposal", default=None)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    shapes = [tuple(int(k) for k in shape.split(",")) for shape in options.branching or ["4"]]
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    about: dict[str, Any] = {
        "bench": "end-to-end-cpu",
        "clock": options.clock,
        "target": DEFAULT_TARGET,
        "draft": DEFAULT_DRAFT,
        "dtype": options.dtype,
        "rule": options.rule,
        "proposal": options.proposal or "default",
        "temperature": options.temperature,
        "prompts": len(PROMPTS[: options.prompts]),
        "max_new_tokens": options.tokens,
    }
    if harness.recorded("end_to_end", [{**about, "branching": shape} for shape in shapes]):
        print("there are rows of this code and machine")
        return

    target, draft, tokenizer = default_pair(options.dtype)
    inputs = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for prompt in PROMPTS[: options.prompts]
    ]

    def plain(prompt: Any, seed: int) -> tuple[int, int]:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        settings = sampling if options.temperature else {"do_sample": False}
        out = target.generate(**prompt, max_new_tokens=options.tokens, pad_token_id=0, **settings)
        count = out.shape[1] - prompt["input_ids"].shape[1]
        return count, count

    def speculative(shape: tuple[int, ...]) -> Any:
        def run(prompt: Any, seed: int) -> tuple[int, int]:
            stats = mcsd.generate(
                target,
                draft,
                **prompt,
                branching=shape,
                max_new_tokens=options.tokens,
                temperature=options.temperature,
                seed=seed,
                rule=options.rule,
                proposal=options.proposal,
            ).stats
            return stats.tokens, stats.target_calls

        return run

    sides = {"plain": plain, **{str(shape): speculative(shape) for shape in shapes}}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {name: [] for name in sides}
    calls: dict[str, list[int]] = {name: [] for name in sides}
    for run in sides.values():
        run(inputs[0], 0)
    for number, prompt in enumerate(inputs):
        for name, run in sides.items():
            start = clock()
            emitted, forwards = run(prompt, number)
            seconds[name].append(clock() - start)
            tokens[name].append(emitted)
            calls[name].append(forwards)

    def speeds(name: str) -> list[tuple[int, float]]:
        return list(zip(tokens[name], seconds[name], strict=True))

    for shape in shapes:
        name = str(shape)
        over, *bounds = harness.interval(speeds(name), speeds("plain"))
        ratios = [n / s * t / m for (n, s), (m, t) in zip(speeds(name), speeds("plain"), strict=True)]
        harness.record(
            "end_to_end",
            {
                **about,
                "branching": shape,
                "tokens_per_call": round(sum(tokens[name]) / sum(calls[name]), 3),
                "tokens_per_second": round(sum(tokens[name]) / sum(seconds[name]), 2),
                "plain_tokens_per_second": round(sum(tokens["plain"]) / sum(seconds["plain"]), 2),
                "over_plain": round(over, 3),
                "over_plain_95": [round(bound, 3) for bound in bounds],
                "over_plain_by_prompt": harness.spread(ratios) if len(ratios) > 1 else None,
                "wanted": ">= 1.3",
            },
        )


if __name__ == "__main__":
    main()
