"""Time of one `verify` over vocabulary, tree and batch, beside the floor that the memory sets.

python bench/verify_scaling.py                   # on the CPU, one thread, to verify_scaling.jsonl
python bench/verify_scaling.py --device cuda     # the same cases on a GPU, to verify_scaling_gpu.jsonl
python bench/verify_scaling.py --vocab 32000 --nodes 17 --batch 1

The floor of a call is the time to read, once, the rows of its accepted path: the target's row at every node on it, the
draft's where that node has children, and the call's small inputs and outputs. On a CPU it is read at the rate at which
the same thread sums a buffer that no cache holds. That pass takes turns with the calls, so a slow moment of the machine
hits both, and a call finds neither its rows nor Python's own data in a cache; in a decoding loop the target's forward
leaves it so. A row has the time in a loop of its own too, where all of it may be in the caches. Times are the
process's CPU time. On a GPU a call is a replayed CUDA graph between two events, and the floor is that of bench/gpu: the
bytes over the bandwidth of a copy.

Logits are those of bench/drawn_trees.py (float32, overlap about 0.6). A case that does not fit into the memory is left
out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
from typing import Any

import drawn_trees
import harness
import torch
from gpu import floor

from mcsd.trees import parents_of
from mcsd_kernels import verify

VOCABULARIES = (32_000, 65_536, 131_072, 262_144)
# Nodes, the root included -> trees: one of some depth and width, a deep one, a wide one
TREES = {
    5: ((2, 1), (1, 1, 1, 1), (4,)),
    17: ((4, 3), (4, 1, 1, 1), (16,)),
    64: ((3, 4, 4), (9, 1, 1, 1, 1, 1, 1), (7, 8)),
    256: ((3, 4, 4, 4), (51, 1, 1, 1, 1), (15, 16)),
}
BATCHES = (1, 8)
CALLS, WARMUP = 8, 3
# Two copies of the logits, and what making them takes
MEMORY_FACTOR = 5


class Cpu:
    """One thread; a pass over a buffer before each call empties the caches and says what a byte costs.

    Args:
        cold_bytes: of that buffer; more than all caches hold.
    """

    name = "cpu"

    def __init__(self, cold_bytes: int) -> None:
        torch.set_num_threads(1)
        self.cold_bytes = cold_bytes
        self._cold = torch.ones(cold_bytes // 4)

    def measure(self, inputs: drawn_trees.Inputs, rounds: int) -> tuple[list[float], list[float], float | None]:
        """Milliseconds of each call, bytes a second of the pass before it, median in a loop of its own."""
        contenders = {"pass": self._cold.sum, "verify": harness.ours(inputs)}
        times = harness.interleave(contenders, rounds, WARMUP)
        rates = [self.cold_bytes / (time / 1e3) for time in times["pass"]]
        warm = harness.interleave({"verify": harness.ours(inputs)}, rounds, WARMUP)["verify"]
        return times["verify"], rates, statistics.median(warm)

    def free_bytes(self) -> int:
        """Memory that is left."""
        try:
            with open("/proc/meminfo") as lines:
                return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return sys.maxsize


class Gpu:
    """The clock of bench/gpu."""

    def __init__(self) -> None:
        sys.path.insert(0, str(harness.ROOT))
        from bench.gpu import device, plan

        self._gpu = device.Gpu(plan.GPU)
        self.name, self.cold_bytes = self._gpu.name, self._gpu.cold_bytes
        self.bandwidth = device.copy_bandwidth(self._gpu)

    def measure(self, inputs: drawn_trees.Inputs, rounds: int) -> tuple[list[float], list[float], float | None]:
        """As on a CPU; the bandwidth is that of a large copy, measured once, and no call is timed warm."""
        tokens, uniforms = (part.clone() for part in inputs.drawn[0])
        arguments = (inputs.target, inputs.draft, tokens, inputs.parents, uniforms)
        replay = self._gpu.captured(lambda: verify(*arguments, max_depth=inputs.depth))

        def load(turn: int) -> None:
            for held, drawn in zip((tokens, uniforms), inputs.drawn[(turn + WARMUP) % len(inputs.drawn)], strict=True):
                held.copy_(drawn)

        times = self._gpu.times({"verify": replay}, load, rounds)["verify"]
        return [time / 1e3 for time in times], [self.bandwidth] * rounds, None

    def free_bytes(self) -> int:
        """Memory that is left."""
        return self._gpu.free_bytes()


def measure(about: dict[str, Any], clock: Cpu | Gpu, rounds: int) -> dict[str, Any]:
    """The row of one case."""
    branching, vocab, batch = tuple(about["branching"]), about["vocab"], about["batch"]
    inputs = drawn_trees.make(branching, vocab, batch, CALLS)
    # a few rows say what the overlap is; the laws of all of them would be the largest tensors here
    some = dataclasses.replace(inputs, target=inputs.target[:1, :8], draft=inputs.draft[:1, :8])
    overlap = some.overlap
    if isinstance(clock, Gpu):
        moved = {name: getattr(inputs, name).cuda() for name in ("target", "draft", "parents")}
        drawn = [(tokens.cuda(), uniforms.cuda()) for tokens, uniforms in inputs.drawn]
        inputs = dataclasses.replace(inputs, drawn=drawn, **moved)
    tokens = harness.check(inputs, against_oracle=1)
    rows = [visited(inputs, number) for number in range(CALLS)]
    times, rates, warm = clock.measure(inputs, rounds)
    least = [
        floor.verify_bytes(*rows[(turn + WARMUP) % CALLS], vocab, inputs.target.element_size(), batch, about["nodes"])
        for turn in range(rounds)
    ]
    floors = [floor.microseconds(count, rate) / 1e3 for count, rate in zip(least, rates, strict=True)]
    return {
        **about,
        "overlap": round(overlap, 3),
        "tokens": round(tokens, 2),
        "rounds": rounds,
        "milliseconds": harness.spread(times),
        "over_floor": harness.spread([time / lowest for time, lowest in zip(times, floors, strict=True)]),
        "floor": {
            "milliseconds": round(statistics.median(floors), 5),
            "of": "the accepted paths' rows, read once",
            "target_rows": statistics.mean(target for target, _ in rows),
            "draft_rows": statistics.mean(draft for _, draft in rows),
            "bytes": round(statistics.mean(least)),
            "gigabytes_a_second": round(statistics.median(rates) / 1e9, 2),
        },
        "milliseconds_in_a_loop_of_its_own": None if warm is None else round(warm, 4),
        "cold_bytes": clock.cold_bytes,
    }


def visited(inputs: drawn_trees.Inputs, number: int) -> tuple[int, int]:
    """Target and draft rows that one of the calls needs, of all its requests."""
    tokens, uniforms = inputs.drawn[number]
    found = verify(inputs.target, inputs.draft, tokens, inputs.parents, uniforms, max_depth=inputs.depth)
    return floor.visited_rows(found.path, found.length, inputs.parents.tolist(), inputs.depth)


def main() -> None:
    """Print and record one row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--vocab", type=int, action="append")
    parser.add_argument("--nodes", type=int, action="append", choices=tuple(TREES))
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--cold-mib", type=int, default=512, help="CPU: the buffer that empties the caches")
    options = parser.parse_args()
    clock = Gpu() if options.device == "cuda" else Cpu(options.cold_mib << 20)
    file = "verify_scaling_gpu" if options.device == "cuda" else "verify_scaling"
    grid = itertools.product(options.nodes or TREES, options.vocab or VOCABULARIES, options.batch or BATCHES)
    for nodes, vocab, batch in grid:
        for branching in TREES[nodes]:
            assert len(parents_of(branching)) == nodes
            about = {"bench": f"verify-scaling-{options.device}", "device": clock.name, "nodes": nodes}
            about |= {"branching": branching, "vocab": vocab, "batch": batch, "dtype": "float32"}
            about |= {"rule": "recursive", "proposal": "without_replacement"}
            needed = MEMORY_FACTOR * 4 * math.prod((batch, nodes, vocab))
            if needed > clock.free_bytes():
                print(f"left out: {about} would take {needed >> 20} MiB", file=sys.stderr)
            elif harness.recorded(file, [about]):
                print(f"{branching}, {vocab}, batch {batch}: there is a row of this code and machine")
            else:
                harness.record(file, measure(about, clock, options.rounds))


if __name__ == "__main__":
    main()
