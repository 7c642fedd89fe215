"""`tree_attention` against what else can run a tree: SDPA with a dense mask, FlexAttention, and Hugging Face's way.

python bench/attention.py                     on a GPU; rows go to ${OUT:-bench/results}/attention_gpu.jsonl
python bench/attention.py --tune              times other launches of our kernel, for its table
python bench/attention.py --device cpu        the torch backend, to attention_cpu.jsonl
TRITON_INTERPRET=1 python bench/attention.py --smoke    every line of this file that needs no GPU, at tiny sizes

One call is one layer's attention. Masks, which all layers share, are made before the clock starts. Every contender is
compared with float64 first and one that is wrong is not timed. On a GPU a call is a replayed CUDA graph with nothing of
its inputs in the L2 cache; contenders take turns; a row holds medians and 20/80 percentiles, the bytes and operations
that no implementation can avoid, and the time that the measured copy bandwidth and matrix product allow for them.

Cases with targets come first, `--budget` bounds the time, and a case that has a row of this code and machine is left
out (`MCSD_BENCH_AGAIN=1` measures it again), be it one that says what went wrong. The last lines on stderr say which
targets are met.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402

from mcsd_kernels import ancestor_bits, tree_attention  # noqa: E402
from mcsd_kernels.tree import dense_mask, unpack_bits  # noqa: E402

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One call: the heads are a model's, the tree is drawn at random, every request has the same prefix."""

    model: str
    q_heads: int
    kv_heads: int
    head_dim: int
    nodes: int
    prefix: int
    batch: int

    @property
    def wanted(self) -> dict[str, tuple[str, float]]:
        """Targets, set for 64 nodes on an H200: name -> a field of the row, and the least that it should be."""
        if self.nodes != 64 or self.batch != 1:
            return {}
        long = {">= 2 x the best rival": ("over_best_rival", 2.0), ">= 60 % of the roofline": ("roofline_share", 0.6)}
        return {4096: {">= 1.3 x the best rival": ("over_best_rival", 1.3)}, 32_768: long}.get(self.prefix, {})

    def __str__(self) -> str:
        return f"{self.model}, {self.nodes} nodes, prefix {self.prefix}, batch {self.batch}"


MODELS = {"Llama-3-8B": (32, 8, 128), "Qwen3-0.6B": (16, 8, 128)}
GRID = {"nodes": (1, 16, 64, 256), "prefix": (512, 4096, 32_768), "batch": (1, 8)}
SMOKE = [Case("smoke", 4, 2, 16, nodes, prefix, batch) for nodes, prefix, batch in ((1, 20, 1), (9, 40, 2))]


@dataclass
class Inputs:
    """Tensors of one case. Node j of the tree lies in slot prefix + j."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    ancestors: torch.Tensor
    prefix_lengths: torch.Tensor
    mask: torch.Tensor  # [batch, 1, nodes, slots] bool

    @property
    def tree_pairs(self) -> int:
        """Pairs of a node and a node that it sees."""
        return int(unpack_bits(self.ancestors, self.ancestors.shape[1]).sum())


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Normal queries, keys and values, and a tree whose nodes hang on any earlier node."""
    generator = torch.Generator().manual_seed(0)
    parents = [-1] + [int(torch.randint(max(0, i - 12), i, (), generator=generator)) for i in range(1, case.nodes)]
    ancestors = ancestor_bits(torch.tensor(parents, device=device))
    prefix = torch.full((case.batch,), case.prefix, dtype=torch.int32, device=device)
    slots = case.prefix + case.nodes
    torch.manual_seed(0)

    def normal(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(case.batch, heads, rows, case.head_dim, dtype=dtype, device=device)

    # a model's query is [batch, nodes, heads, dim] in memory
    query = normal(case.q_heads, case.nodes).transpose(1, 2).contiguous().transpose(1, 2)
    mask = dense_mask(unpack_bits(ancestors, case.nodes), prefix.long(), slots)[:, None]
    return Inputs(query, normal(case.kv_heads, slots), normal(case.kv_heads, slots), ancestors, prefix, mask)


# ---- contenders


def ours(inputs: Inputs, backend: str) -> Call:
    """`mcsd_kernels.tree_attention`."""
    arguments = (inputs.query, inputs.key, inputs.value, inputs.ancestors, inputs.prefix_lengths)
    return lambda: tree_attention(*arguments, backend=backend)


def sdpa(inputs: Inputs) -> Call:
    """torch's fused attention with the dense mask, on a preallocated cache."""
    grouped = inputs.query.shape[1] != inputs.key.shape[1]
    arguments = (inputs.query, inputs.key, inputs.value, inputs.mask)
    return lambda: F.scaled_dot_product_attention(*arguments, enable_gqa=grouped)


def hugging_face(inputs: Inputs) -> Call:
    """As transformers' SDPA route does it: concatenate the cache, repeat its heads, attend with a 4-D mask."""
    nodes, group = inputs.query.shape[2], inputs.query.shape[1] // inputs.key.shape[1]
    old = [cache[:, :, :-nodes].contiguous() for cache in (inputs.key, inputs.value)]
    new = [cache[:, :, -nodes:].contiguous() for cache in (inputs.key, inputs.value)]

    def repeat(cache: torch.Tensor) -> torch.Tensor:
        batch, heads, slots, dim = cache.shape
        return cache[:, :, None].expand(batch, heads, group, slots, dim).reshape(batch, heads * group, slots, dim)

    def call() -> torch.Tensor:
        key, value = (torch.cat(pair, 2) for pair in zip(old, new, strict=True))
        return F.scaled_dot_product_attention(inputs.query, repeat(key), repeat(value), inputs.mask)

    return call


def flex(inputs: Inputs) -> Call:
    """FlexAttention with a block mask of the tree: compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, _, nodes, slots = inputs.mask.shape
    seen, prefix = inputs.mask[:, 0, :, -nodes:].contiguous(), slots - nodes

    def visible(b: Any, _: Any, node: Any, slot: Any) -> Any:
        return (slot < prefix) | seen[b, node, (slot - prefix).clamp(min=0)]

    device = inputs.query.device
    block_mask = create_block_mask(visible, batch, None, nodes, slots, device=str(device))
    torch._dynamo.reset()  # every case is compiled for its own shapes
    function = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    grouped = inputs.query.shape[1] != inputs.key.shape[1]
    return lambda: function(inputs.query, inputs.key, inputs.value, block_mask=block_mask, enable_gqa=grouped)


def contenders(inputs: Inputs, backend: str) -> dict[str, Callable[[], Call]]:
    """Name -> what prepares the call; ours first."""
    rivals: dict[str, Callable[[], Call]] = {
        "sdpa_dense_mask": lambda: sdpa(inputs),
        "hugging_face": lambda: hugging_face(inputs),
    }
    if backend == "triton":
        rivals["flex_attention"] = lambda: flex(inputs)
    return {"tree_attention": lambda: ours(inputs, backend), **rivals}


# ---- right first


def oracle(inputs: Inputs) -> torch.Tensor:
    """Attention in float64, one request and one key head at a time."""
    wanted = torch.empty(inputs.query.shape, dtype=torch.float64, device=inputs.query.device)
    kv_heads = inputs.key.shape[1]
    group = inputs.query.shape[1] // kv_heads
    for b, head in itertools.product(range(wanted.shape[0]), range(kv_heads)):
        query = inputs.query[b, head * group : (head + 1) * group].double() * inputs.query.shape[-1] ** -0.5
        scores = (query @ inputs.key[b, head].double().T).masked_fill(~inputs.mask[b], -torch.inf)
        wanted[b, head * group : (head + 1) * group] = scores.softmax(-1) @ inputs.value[b, head].double()
    return wanted


def fault(found: torch.Tensor, wanted: torch.Tensor, own: float) -> str | None:
    """Why this is not attention, if it is not: an error above twice torch's own and a rounding."""
    error = float((found.double() - wanted).abs().max())
    bar = 2 * own + torch.finfo(found.dtype).eps * float(wanted.abs().max())
    return None if error <= bar else f"wrong by {error:.2e}, allowed {bar:.2e}"


# ---- the clock


class Clock:
    """Times calls that take turns.

    Args:
        device: on a GPU a call is replayed as a CUDA graph with cold caches, see `bench.gpu.device`; on a CPU the
            process's time counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            from bench.gpu import device as there  # needs Triton, which a CPU may lack
            from bench.gpu.plan import GPU

            self._gpu = there.Gpu(GPU)

    def prepare(self, call: Call) -> Any:
        """Warm up and, on a GPU, capture: what `microseconds` takes."""
        if self.cuda:
            return self._gpu.captured(call)
        call()
        return call

    def microseconds(self, calls: dict[str, Any], rounds: int) -> dict[str, list[float]]:
        """What each call took, in every round."""
        if self.cuda:
            return self._gpu.times(calls, lambda i: None, rounds)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.process_time()
                call()
                times[name].append((time.process_time() - start) * 1e6)
        return times

    def limits(self, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
        """Measured: bytes a second of a copy, operations a second of a matrix product, time of an empty graph."""
        size, entries = (8192, 1 << 30) if self.cuda else (256, 1 << 20)
        source = torch.zeros(entries, dtype=torch.int8, device=device)
        target, left = torch.empty_like(source), torch.randn(size, size, device=device).to(dtype)
        one = torch.zeros((), device=device)

        def median(call: Call) -> float:
            return statistics.median(self.microseconds({"": self.prepare(call)}, 20)[""])

        return {
            "bytes_per_second": 2 * entries / median(lambda: target.copy_(source)) * 1e6,
            "flops_per_second": 2 * size**3 / median(lambda: left @ left) * 1e6,
            "empty_call_us": median(lambda: one.add_(1)),
        }


# ---- rows


def measure(case: Case, clock: Clock, limits: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Check and time one case.

    Raises:
        AssertionError: ours is wrong.
    """
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    from mcsd_kernels._attention_triton import attention_bytes, attention_flops

    inputs = make(case, device, dtype)
    wanted = oracle(inputs)
    own = float((sdpa(inputs)().double() - wanted).abs().max())
    calls, failed = {}, {}
    for name, prepare in contenders(inputs, options.backend).items():
        try:
            call = prepare()
            wrong = fault(call(), wanted, own)
            if wrong is None:
                calls[name] = clock.prepare(call)
        except Exception as error:  # a rival that cannot run is a result too
            if name == "tree_attention":
                raise
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        if wrong is not None:
            failed[name] = wrong
            if name == "tree_attention":
                raise AssertionError(f"tree_attention is {wrong}")
    del wanted
    times = clock.microseconds(calls, options.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    mine = medians.pop("tree_attention")
    shape = (case.batch, case.q_heads, case.kv_heads, case.nodes, case.prefix, case.head_dim)
    moved = attention_bytes(*shape, dtype.itemsize)
    flops = attention_flops(case.batch, case.q_heads, *shape[3:], inputs.tree_pairs)
    roofline = max(moved / limits["bytes_per_second"], flops / limits["flops_per_second"]) * 1e6
    best = min(medians, key=medians.__getitem__)
    row = {
        "microseconds": {name: harness.spread(values) for name, values in times.items()},
        "not_timed": failed,
        "best_rival": best,
        "over_best_rival": round(medians[best] / mine, 3),
        "bytes": moved,
        "flops": flops,
        "roofline_us": round(roofline, 2),
        "roofline_share": round(roofline / mine, 3),
    }
    return row | {"targets": targets(case, row) if clock.cuda else {}}


def targets(case: Case, row: dict[str, Any]) -> dict[str, bool]:
    """Which targets a case has, and whether its row meets them."""
    return {name: row[field] >= least for name, (field, least) in case.wanted.items()}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each target of the newest row of each case."""
    lines = {}
    for row in rows:
        for name, met in row.get("targets", {}).items():
            case = Case(**{field.name: row[field.name] for field in fields(Case)})
            lines[case, name] = f"{'met' if met else 'MISSED'}: {case}: {name}: {row[case.wanted[name][0]]}"
    return list(lines.values())


def tune(case: Case, clock: Clock, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The launches of one case that are right, the fastest first."""
    from mcsd_kernels import _attention_triton as triton_backend

    inputs = make(case, torch.device(options.device), getattr(torch, options.dtype))
    wanted = oracle(inputs)
    own = float((sdpa(inputs)().double() - wanted).abs().max())
    arguments = (inputs.query, inputs.key, inputs.value, inputs.ancestors, inputs.prefix_lengths)
    scale, rows = case.head_dim**-0.5, case.nodes * case.q_heads // case.kv_heads
    sizes = ((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3, 4))
    if options.smoke:
        sizes = ((16, 32), (16,), (4,), (2,), (1,))
    calls = {}
    programs = case.batch * case.kv_heads
    for block_rows, block_keys, warps, stages, resident in itertools.product(*sizes):
        if block_rows > max(16, 2 * rows) or block_rows < min(64, rows):
            continue
        slots = case.prefix + case.nodes
        splits = min(132 * resident // (-(-rows // block_rows) * programs), slots // (2 * block_keys))
        launch = triton_backend.AttentionLaunch(block_rows, block_keys, warps, stages, resident, max(splits, 1))

        def call(launch: Any = launch) -> torch.Tensor:
            return triton_backend.tree_attention(*arguments, scale, None, None, None, None, launch=launch)

        try:
            if fault(call(), wanted, own) is None:
                calls[launch] = clock.prepare(call)
        except Exception as error:  # too much shared memory, for instance
            print(f"{launch}: {type(error).__name__}", file=sys.stderr)
    times = clock.microseconds({str(i): call for i, call in enumerate(calls.values())}, max(options.rounds // 4, 2))
    ranked = sorted(zip(times.values(), calls, strict=True), key=lambda pair: statistics.median(pair[0]))
    for values, launch in ranked[:5]:
        yield {"launch": asdict(launch), "microseconds": harness.spread(values)}


def about(device: torch.device, dtype: str) -> dict[str, Any]:
    """What the figures depend on besides the case and what `harness` says of the machine."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "triton": version, "dtype": dtype}


def cases(options: argparse.Namespace) -> list[Case]:
    """The grid, or what the options leave of it; those with targets first."""
    if options.smoke:
        return SMOKE
    grid = {name: getattr(options, name) or values for name, values in GRID.items()}
    found = [
        Case(model, *MODELS[model], nodes, prefix, batch)
        for model in options.model or MODELS
        for nodes, prefix, batch in itertools.product(grid["nodes"], grid["prefix"], grid["batch"])
    ]
    return sorted(found, key=lambda case: not case.wanted)


def main() -> int:
    """Print and append one row a case; 1 if something went wrong in one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no case is begun")
    parser.add_argument("--tune", action="store_true", help="time launches of our kernel instead of rivals")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, rows to $OUT if that is set")
    parser.add_argument("--model", action="append", choices=tuple(MODELS))
    for name in GRID:
        parser.add_argument(f"--{name}", action="append", type=int)
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    if options.smoke:
        # as it comes, the interpreter computes nonsense in bf16
        options.device, options.rounds, options.dtype = "cpu", 2, "float32"
    options.backend = "triton" if options.smoke or options.device == "cuda" else "torch"
    if options.device == "cpu":
        torch.set_num_threads(1)
    os.environ["MCSD_BENCH_RECORD"] = "" if options.smoke and not os.environ.get("OUT") else "1"
    device = torch.device(options.device)
    here = about(device, options.dtype)
    file = "attention_cpu" if options.device == "cpu" and not options.smoke else "attention_gpu"
    name = "attention-launch" if options.tune else f"attention-{device.type}"
    every = {case: {"bench": name, **asdict(case), **here} for case in cases(options)}
    left = [case for case in every if not harness.recorded(file, [every[case]])]
    if len(left) < len(every):
        say(f"{len(every) - len(left)} of {len(every)} cases have a row of this code and machine")
    clock = Clock(device)
    limits = clock.limits(getattr(torch, options.dtype), device) if left else {}
    more = {"limits": {name: float(f"{value:.4g}") for name, value in limits.items()}}
    wrong = 0
    for number, case in enumerate(left):
        if time.monotonic() > deadline:
            say(f"left out after {options.budget:g} s: {'; '.join(map(str, left[number:]))}")
            break
        try:
            if not options.tune:
                harness.record(file, every[case] | measure(case, clock, limits, options) | more)
            if options.tune or options.smoke:
                for row in tune(case, clock, options):
                    harness.record(file, every[case] | {"bench": "attention-launch"} | row | more)
        except Exception as error:
            traceback.print_exc()
            wrong += 1
            harness.record(file, every[case] | {"error": f"{type(error).__name__}: {str(error)[:500]}"})
            if clock.cuda:
                torch.cuda.synchronize()  # raises where the device is of no more use to this process
    rows = [row for row in harness.read(harness.path_of(file)) if row.get("code") == harness.code()]
    for line in verdicts([row for row in rows if row.get("device") == here["device"]]):
        say(line)
    return 1 if wrong else 0


def say(text: str) -> None:
    """A line on stderr; stdout is for rows."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
