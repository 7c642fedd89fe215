"""What a cycle of `generate` costs outside the model forwards, on a CPU: CPU time, one thread, SmolLM2-135M.

python bench/loop_overhead.py [--tokens 96]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import harness
import torch

import mcsd
from mcsd.bundled import DEFAULT_TARGET
from mcsd.draft_model import load_draft
from mcsd.models import load_target
from mcsd.stats import Stats

DRAFT = "smollm2-draft"  # a model, whose forwards can be told from the rest
PROMPT = "Explain in three sentences why the sky is blue."


class ForwardClock:
    """CPU time spent inside a model's forwards, by hooks (a wrapped `forward` would change what callers pass)."""

    def __init__(self, *models: Any) -> None:
        self.seconds = 0.0
        self._start = 0.0
        self._hooks = [model.register_forward_pre_hook(self._enter) for model in models]
        self._hooks += [model.register_forward_hook(self._leave) for model in models]

    def _enter(self, *_: Any) -> None:
        self._start = time.process_time()

    def _leave(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._start

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def main() -> None:
    """Print and record one row a tree shape and temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96)
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    target, tokenizer = load_target(dtype="float32")
    draft = load_draft(DRAFT, target)
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for branching in ((2,), (4,), (4, 2, 2), (1, 1, 1, 1)):
        for temperature in (1.0, 0.0):
            options: dict[str, Any] = {"branching": branching, "temperature": temperature}
            about = {
                "bench": "loop-overhead-cpu",
                "target": DEFAULT_TARGET,
                "draft": DRAFT,
                "dtype": "float32",
                "max_new_tokens": tokens,
                **options,
            }
            if harness.recorded("loop_overhead", [about]):
                print(f"{branching}, {temperature}: there is a row of this code and machine")
                continue

            def measure(count: int) -> tuple[float, float, Stats]:
                clock = ForwardClock(target, draft)
                start = time.process_time()
                stats = mcsd.generate(target, draft, **inputs, max_new_tokens=count, **options).stats  # noqa: B023
                total = time.process_time() - start
                clock.close()
                return (total - clock.seconds) * 1e3, clock.seconds * 1e3, stats

            measure(8)
            first = min(measure(1)[0] for _ in range(3))  # one cycle, and what is done once a generation
            outside, inside, stats = measure(tokens)
            further = (outside - first) / (stats.target_calls - 1)
            phases = {name: round(s / stats.target_calls * 1e3, 3) for name, s in stats.seconds.items()}
            harness.record(
                "loop_overhead",
                {
                    **about,
                    "milliseconds_outside_forwards_per_cycle": round(outside / stats.target_calls, 3),
                    "milliseconds_of_the_first_cycle": round(first, 3),
                    "milliseconds_of_a_further_cycle": round(further, 3),
                    "milliseconds_in_forwards_per_cycle": round(inside / stats.target_calls, 1),
                    "cycles": stats.target_calls,
                    "wall_milliseconds_per_cycle_by_phase": phases,
                    "wanted": "< 4, and < 2 for one level",
                },
            )


if __name__ == "__main__":
    main()
