"""Tokens a second of `mcsd.generate` beside transformers' own `generate`, on the bundled pair.

python bench/end_to_end.py --dtype bfloat16 --branching 4 --branching 6,1 --temperature 1.0 --tokens 64 --prompts 24

Both sides decode every prompt in turn, same model, dtype and threads, and both are timed from the prompt to the last
token by the wall clock. Sampled texts differ from side to side, so the figure is tokens a second over all prompts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import harness
import torch
from prompts import PROMPTS

import mcsd
from mcsd.models import default_pair


def main() -> None:
    """Print and record one row a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--branching", action="append")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--rule", default="recursive")
    parser.add_argument("--proposal", default=None)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    shapes = [tuple(int(k) for k in shape.split(",")) for shape in options.branching or ["4"]]
    clock = time.perf_counter if options.clock == "wall" else time.process_time

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
    seconds, tokens, calls = ({name: 0.0 for name in sides} for _ in range(3))
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run(inputs[0], 0)
    for number, prompt in enumerate(inputs):
        speed = {}
        for name, run in sides.items():
            start = clock()
            emitted, forwards = run(prompt, number)
            elapsed = clock() - start
            seconds[name] += elapsed
            tokens[name] += emitted
            calls[name] += forwards
            speed[name] = emitted / elapsed
        for name in sides:
            ratios[name].append(speed[name] / speed["plain"])
    for name in list(sides)[1:]:
        harness.record(
            "end_to_end",
            {
                "bench": "end-to-end-cpu",
                "clock": options.clock,
                "dtype": options.dtype,
                "branching": name,
                "rule": options.rule,
                "proposal": options.proposal or "default",
                "temperature": options.temperature,
                "prompts": len(inputs),
                "max_new_tokens": options.tokens,
                "tokens_per_call": round(tokens[name] / calls[name], 3),
                "tokens_per_second": round(tokens[name] / seconds[name], 2),
                "plain_tokens_per_second": round(tokens["plain"] / seconds["plain"], 2),
                "over_plain": round(tokens[name] / seconds[name] * seconds["plain"] / tokens["plain"], 3),
                "over_plain_by_prompt": harness.spread(ratios[name]),
                "wanted": ">= 1.3",
            },
        )


if __name__ == "__main__":
    main()
