"""Random calls of `verify`, sound and broken: none may crash, hang, write to its inputs or disturb a neighbour.

python scripts/robustness.py [--calls 100000] [--start 0] [--json robustness.json] [--resume] [--tokens 20000]

Call i depends on the number i alone, so a range of numbers is a run that anybody can repeat: `--start 4711 --calls 1`.
With `--json` the summary is kept up to date in that file; `--resume` goes on where it ends. `--tokens` generates a long
text afterwards and watches the memory. The last line of output is the summary as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mcsd_kernels import SamplingParams, Status, Verified, draw_candidates, verify

PROPOSALS = ("without_replacement", "with_replacement", "greedy", "point")
RULES = ("recursive", "traversal")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("plain", "scaled", "equal", "ties", "masked", "one-hot", "huge", "tiny", "broken", "empty", "constant")


@dataclass
class Call:
    """One call, its arguments by name; `batched` names those with a row a request."""

    arguments: dict[str, Any]
    batched: set[str] = field(default_factory=set)

    def run(self) -> Verified:
        """The answer."""
        return verify(**self.arguments)

    def take(self, requests: list[int]) -> Call:
        """The same call for some of its requests, in this order; rows that several share stay where they are."""
        index = torch.tensor(requests)
        picked = {name: self.arguments[name][index] for name in self.batched}
        chosen = {**self.arguments, **picked}
        for side in ("sampling", "draft_sampling"):
            if chosen.get(side) is not None:
                chosen[side] = _taken(chosen[side], index)
        return Call(chosen, self.batched)


def _taken(sampling: SamplingParams, index: torch.Tensor) -> SamplingParams:
    values = {f.name: getattr(sampling, f.name) for f in fields(SamplingParams)}
    return SamplingParams(
        **{name: v[index] if isinstance(v, torch.Tensor) and v.dim() else v for name, v in values.items()}
    )


@np.errstate(all="ignore")
def random_call(seed: int) -> Call:
    """Call number `seed`: legal in shapes and types, anything in contents."""
    rng = np.random.default_rng([17, seed])
    pick = lambda options, p=None: options[int(rng.choice(len(options), p=p))]  # noqa: E731
    batch = int(rng.integers(1, 6))
    nodes = int(pick([1, 2, 3, 5, 8, 13, 24, 33, 65], [0.05, 0.1, 0.15, 0.2, 0.2, 0.15, 0.08, 0.05, 0.02]))
    # rows of 8,200 are taken one at a time
    vocab = int(pick([1, 2, 3, 5, 17, 64, 257, 1000, 1024, 1025, 3000, 8200]))
    proposal, rule = pick(PROPOSALS), pick(RULES)
    dtype = pick(DTYPES)
    sound = rng.random() < 0.5

    parents = _parents(rng, batch, nodes, sound)
    shared = bool((parents == parents[0]).all()) and rng.random() < 0.5
    inputs = pick(("logits", "probabilities"), [0.75, 0.25])
    draft_inputs = pick((None, "logits", "probabilities"), [0.6, 0.2, 0.2])
    columns = vocab
    arguments: dict[str, Any] = {"proposal": proposal, "rule": rule}
    batched = {"tokens", "uniforms"}
    if rng.random() < 0.2:
        ids = rng.permutation(vocab)[: int(rng.integers(1, vocab + 1))]
        if not sound:
            ids[rng.random(len(ids)) < 0.2] = pick([-1, vocab, vocab + 7, -(2**40)])
        arguments["draft_ids"] = torch.from_numpy(np.sort(ids) if rng.random() < 0.8 else ids)
        columns = len(ids)

    target = _rows(rng, (batch, nodes, vocab), dtype, inputs, sound)
    near = target if columns == vocab and rng.random() < 0.6 else None
    draft = _rows(rng, (batch, nodes, columns), dtype, draft_inputs or inputs, sound, near)
    for side, rows in (("target", target), ("draft", draft)):
        if rng.random() < 0.5:
            arguments[f"{side}_rows"], rows = _indirect(rng, rows, side, sound)
            batched.add(f"{side}_rows")
        else:
            rows = _strided(rng, rows)
            batched.add(f"{side}_logits")
        arguments[f"{side}_logits"] = rows
    if proposal == "point" and rng.random() < 0.5:
        arguments["draft_logits"] = None
        batched -= {"draft_logits", "draft_rows"}
        for name in ("draft_rows", "draft_ids"):
            arguments.pop(name, None)

    if inputs == "logits":
        arguments["sampling"] = _sampling(rng, batch, sound)
        if rng.random() < 0.2:
            words = -(-vocab // 32)
            mask = rng.integers(-(2**31), 2**31, (batch, nodes, words)).astype(np.int32)
            mask[rng.random((batch, nodes)) < pick([0.0, 0.5])] = pick([-1, 0])
            arguments["bitmask"] = torch.from_numpy(mask)
            batched.add("bitmask")
    else:
        arguments["inputs"] = inputs
    if draft_inputs is not None:
        arguments["draft_inputs"] = draft_inputs
    if (draft_inputs or inputs) == "logits" and rng.random() < 0.5:
        arguments["draft_sampling"] = _sampling(rng, batch, sound)
    if rng.random() < 0.25:
        shape = (nodes,) if rng.random() < 0.5 else (batch, nodes)
        arguments["point_nodes"] = torch.from_numpy(rng.random(shape) < pick([0.0, 0.3, 1.0]))
        if len(shape) == 2:
            batched.add("point_nodes")
    if rng.random() < 0.4:
        arguments["max_depth"] = int(rng.integers(0, nodes + 2))

    tokens = _tokens(rng, parents, draft, proposal, vocab, sound)
    if arguments.get("draft_ids") is not None:
        known = arguments["draft_ids"]
        tokens = torch.where((tokens >= 0) & (tokens < columns), known[tokens.clamp(0, columns - 1)], tokens)
    uniforms = torch.from_numpy(rng.random((batch, nodes + 2)).astype(np.float32)).clamp_(max=1 - 2**-24)
    if rng.random() < 0.2:
        uniforms[torch.from_numpy(rng.random(uniforms.shape) < 0.4)] = pick([0.0, 1 - 2**-24, 2**-24, 0.5])
    if not sound and rng.random() < 0.2:
        odd = torch.from_numpy(rng.random(uniforms.shape) < 0.05)
        uniforms[odd] = pick([-0.0, -0.1, 1.0, float("nan"), float("inf"), -float("inf")])
    integers = (torch.int32, torch.int64)
    arguments["tokens"] = tokens.to(pick(integers)) if int(tokens.abs().max()) < 2**31 else tokens
    arguments["uniforms"] = uniforms
    arguments["parents"] = torch.from_numpy(parents[0] if shared else parents).to(pick(integers))
    if not shared:
        batched.add("parents")
    return Call(arguments, batched)


def _parents(rng: np.random.Generator, batch: int, nodes: int, sound: bool) -> np.ndarray[Any, Any]:
    parents = np.full((batch, nodes), -1, dtype=np.int64)
    for b in range(batch):
        if b and rng.random() < 0.4:
            parents[b] = parents[0]
            continue
        spread, fill = rng.choice([0.0, 0.5, 1.0]), rng.choice([0.7, 1.0])
        real = [0]
        for i in range(1, nodes):
            if rng.random() <= fill:
                parents[b, i] = real[-1] if rng.random() > spread else real[int(rng.integers(len(real)))]
                real.append(i)
        if not sound and rng.random() < 0.2:
            wrong = rng.random(nodes) < 0.2
            parents[b, wrong] = rng.choice([-2, -1, 0, nodes - 1, nodes, 2**31 - 1, -(2**31)], int(wrong.sum()))
    return parents


def _rows(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    inputs: str,
    sound: bool,
    near: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits or probabilities; a family for each request, so that broken ones have sound neighbours."""
    values = rng.normal(size=shape).astype(np.float32) * 2
    if near is not None:
        values = near.float().numpy() + values * np.float32(rng.choice([0.0, 0.2]))
    for b in range(shape[0]):
        family = str(rng.choice(FAMILIES if not sound else FAMILIES[:7]))
        row = values[b]
        if family == "scaled":
            row *= np.float32(10.0 ** rng.uniform(-3, 3))
        elif family == "equal":
            row[:] = row[:1]
        elif family == "ties":
            row[:] = np.round(row)
        elif family == "masked":
            row[rng.random(row.shape) < 0.5] = -np.inf
            row[:, int(rng.integers(shape[2]))] = 0.0
        elif family == "one-hot":
            row[:] = -np.inf
            row[np.arange(shape[1]), rng.integers(shape[2], size=shape[1])] = 1.0
        elif family == "huge":
            row *= np.float32(1e37) if dtype is not torch.float16 else np.float32(1e4)
        elif family == "tiny":
            row *= np.float32(1e-42)
        elif family == "broken":
            row[rng.random(row.shape) < rng.choice([0.001, 0.3])] = rng.choice([np.nan, np.inf, -np.inf])
        elif family == "empty":
            row[rng.random(shape[1]) < 0.5] = rng.choice([-np.inf, np.nan, np.inf])
        elif family == "constant":
            row[:] = rng.choice([0.0, 1.0, -1.0, 1e30])
    rows = torch.from_numpy(values).to(dtype)
    if inputs == "probabilities":
        law = rows.float().softmax(-1)
        if sound or rng.random() < 0.5:
            rows = law.to(dtype)
    return rows


def _sampling(rng: np.random.Generator, batch: int, sound: bool) -> SamplingParams:
    ordinary: dict[str, list[Any]] = {
        "temperature": [1.0, 0.0, 0.7, 1.5, 1e-8, 1e-30, 1e8, 1e30, 3e38],
        "top_k": [0, 1, 2, 50, 10**6, 2**31],
        "top_p": [1.0, 0.9, 0.5, 1e-9, 1 - 1e-7],
        "min_p": [0.0, 0.1, 1.0, 1e-12],
    }
    broken: dict[str, list[Any]] = {
        "temperature": [-1.0, np.nan, np.inf, -np.inf],
        "top_k": [-1, -(2**31)],
        "top_p": [0.0, -1.0, 2.0, np.nan],
        "min_p": [-1.0, 1.5, np.nan],
    }
    values: dict[str, Any] = {}
    for name, options in ordinary.items():
        how = rng.random()
        if how < 0.5:
            values[name] = options[0]
        elif how < 0.75:
            values[name] = options[int(rng.integers(len(options)))]
        else:
            among = options + (broken[name] if not sound and rng.random() < 0.3 else [])
            numbers = [among[int(rng.integers(len(among)))] for _ in range(batch)]
            kinds = [torch.int64, torch.float64] if name == "top_k" else [torch.float32, torch.float64, torch.float16]
            values[name] = torch.tensor(numbers, dtype=kinds[int(rng.integers(len(kinds)))])
    return SamplingParams(**values)


def _tokens(
    rng: np.random.Generator,
    parents: np.ndarray[Any, Any],
    draft: torch.Tensor,
    proposal: str,
    vocab: int,
    sound: bool,
) -> torch.Tensor:
    """Mostly drawn as the proposal says, by the project's own sampler; otherwise anything."""
    batch, nodes, _ = draft.shape
    tokens = torch.from_numpy(rng.integers(0, vocab, (batch, nodes)))
    if sound or rng.random() < 0.5:
        for b, node in itertools.product(range(batch), range(min(nodes, 9))):
            below = np.flatnonzero((parents[b] == node) & (np.arange(nodes) > 0))
            if len(below):
                seeds = torch.tensor([int(rng.integers(2**40))])
                rows = draft[b, node][None].contiguous()
                drawn = draw_candidates(rows, len(below), seeds, 0, proposal=proposal)[0]
                tokens[b, below] = drawn
    if not sound:
        odd = rng.random((batch, nodes)) < rng.choice([0.0, 0.2])
        wild = np.array([-1, -2, vocab, vocab + 1, 2**31 - 1, -(2**31), 2**62, -(2**62)])
        tokens[torch.from_numpy(odd)] = torch.from_numpy(rng.choice(wild, int(odd.sum())))
    return tokens


def _indirect(
    rng: np.random.Generator, rows: torch.Tensor, side: str, sound: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, nodes, width = rows.shape
    order = torch.from_numpy(rng.permutation(batch * nodes + 2))
    store = torch.full((batch * nodes + 2, width + int(rng.integers(0, 4))), float("nan"), dtype=rows.dtype)
    store[order[: batch * nodes], :width] = rows.reshape(-1, width)
    index = order[: batch * nodes].reshape(batch, nodes).clone()
    if side == "target":
        virtual = torch.from_numpy(rng.random((batch, nodes)) < rng.choice([0.0, 0.3]))
        virtual[:, 0] &= not sound
        index[virtual] = -1
    if not sound and rng.random() < 0.2:
        wrong = torch.from_numpy(rng.random((batch, nodes)) < 0.1)
        index[wrong] = int(rng.choice([-2, batch * nodes + 2, 2**31 - 1, -(2**31)]))
    return index.to(torch.int32 if rng.random() < 0.5 else torch.int64), store[:, :width]


def _strided(rng: np.random.Generator, rows: torch.Tensor) -> torch.Tensor:
    layout = int(rng.integers(3))
    if layout == 1:
        wide = torch.full((rows.shape[0], rows.shape[1] + 1, rows.shape[2] + 3), float("nan"), dtype=rows.dtype)
        wide[:, :-1, :-3] = rows
        return wide[:, :-1, :-3]
    return rows.transpose(0, 1).contiguous().transpose(0, 1) if layout == 2 else rows.contiguous()


# ---- what must hold


def examine(seed: int) -> tuple[Verified, Call]:
    """Run call number `seed` and all that it is compared with.

    A request whose "probabilities" are none has no right answer, and may get another one in other company; it must
    neither crash nor disturb the requests beside it.

    Raises:
        AssertionError: something does not hold; anything else that `verify` raises.
    """
    call = random_call(seed)
    before = {name: value.clone() for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
    found = call.run()
    for name, value in before.items():
        assert _same(value, call.arguments[name]), f"{name} was written to"
    _well_formed(found, call)
    batch = len(found.length)
    rng = np.random.default_rng([18, seed])
    answered = [b for b in range(batch) if _has_laws(call, b)]
    chosen = answered[int(rng.integers(len(answered)))] if answered else None
    company = [int(b) for b in rng.permutation(batch)]
    for requests in ([chosen or 0], company):
        other = call.take(requests).run()
        if chosen is not None:
            _equal(found, chosen, other, requests.index(chosen), f"of {batch} as one of {len(requests)}")
    if chosen is not None:
        spoiled = call.take(list(range(batch)))
        for name in ("target_logits", "draft_logits", "uniforms"):
            if name in call.batched:
                copy = spoiled.arguments[name].clone()
                copy[torch.arange(batch) != chosen] = float("nan")
                spoiled.arguments[name] = copy
        _equal(found, chosen, spoiled.run(), chosen, "with spoiled neighbours")
    return found, call


def _has_laws(call: Call, request: int) -> bool:
    """Whether what is called probabilities for this request adds up to 1, as far as its type can tell."""
    kind = call.arguments.get("inputs", "logits")
    for side, inputs in (("target", kind), ("draft", call.arguments.get("draft_inputs") or kind)):
        rows = call.arguments[f"{side}_logits"]
        if rows is None or inputs == "logits":
            continue
        index = call.arguments.get(f"{side}_rows")
        if index is None:
            rows = rows[request]
        else:
            rows = rows[index[request][(index[request] >= 0) & (index[request] < len(rows))].long()]
        slack = {torch.float32: 1e-3}.get(rows.dtype, 0.05)
        if not ((rows >= 0).all() and ((rows.float().sum(-1) - 1).abs() < slack).all()):
            return False
    return True


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a != a, b != b)


def _equal(found: Verified, b: int, other: Verified, place: int, how: str) -> None:
    for name, x, y in zip(Verified._fields, found, other, strict=True):
        assert torch.equal(x[b], y[place]), f"request {b} {how}: {name} {x[b].tolist()} became {y[place].tolist()}"


def _well_formed(found: Verified, call: Call) -> None:
    """Shapes, types, and a path that is one."""
    tokens, parents = call.arguments["tokens"], call.arguments["parents"]
    batch, nodes = tokens.shape
    vocab = call.arguments["target_logits"].shape[-1]
    depth = call.arguments.get("max_depth", nodes - 1)
    kinds = (torch.int32, torch.int32, torch.int64, torch.int32)
    shapes = ((batch, depth + 1), (batch,), (batch, depth + 1), (batch,))
    assert tuple(x.dtype for x in found) == kinds and tuple(tuple(x.shape) for x in found) == shapes
    everything = int(sum(Status))
    for b in range(batch):
        length, status = int(found.length[b]), int(found.status[b])
        path, emitted = found.path[b].tolist(), found.tokens[b].tolist()
        assert 1 <= length <= depth + 1, f"length {length}"
        assert status & ~everything == 0, f"status {status}"
        assert all(x == -1 for x in path[length:] + emitted[length:]), "no -1 after the end"
        assert path[0] == 0 and all(0 <= x < vocab for x in emitted[:length]), f"path {path}, tokens {emitted}"
        above = (parents if parents.dim() == 1 else parents[b]).tolist()
        for t in range(1, length):
            assert above[path[t]] == path[t - 1], f"path {path} does not follow the parents"
            assert emitted[t - 1] == int(tokens[b, path[t]]), f"token {emitted[t - 1]} is not node {path[t]}'s"


class TimeLimit(Exception):
    """A call took too long."""


def _alarm(*_: Any) -> None:
    raise TimeLimit("hangs")


def calls(options: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Run a range of numbers; failures are printed, counted and do not stop the run."""
    signal.signal(signal.SIGALRM, _alarm)
    first, end = summary["next"], summary["start"] + options.calls
    began = shown = time.perf_counter()
    seen: Counter[str] = Counter(summary["seen"])
    for seed in range(first, end):
        start = time.perf_counter()
        signal.alarm(options.limit)
        try:
            found, call = examine(seed)
            status = int(np.bitwise_or.reduce(found.status.numpy())) if len(found.status) else 0
            seen[f"{call.arguments['proposal']} {call.arguments['rule']}"] += 1
            for name in ("inputs", "draft_inputs", "point_nodes", "bitmask", "draft_ids", "max_depth"):
                seen[name] += call.arguments.get(name) is not None
            for bit in Status:
                seen[bit.name or ""] += bool(status & bit)
            seen["requests"] += len(found.length)
            seen["tokens"] += int(found.length.sum())
        except KeyboardInterrupt:
            summary["interrupted"] = True
            break
        except Exception as error:
            summary["failures"].append({"seed": seed, "error": f"{type(error).__name__}: {error}"[:300]})
            print(f"\ncall {seed}: {traceback.format_exc(limit=-2)}", file=sys.stderr)
        finally:
            signal.alarm(0)
        now = time.perf_counter()
        summary["slowest_ms"] = max(summary["slowest_ms"], round((now - start) * 1e3, 1))
        summary["next"], summary["seen"] = seed + 1, dict(sorted(seen.items()))
        if now - shown > 2 or seed + 1 == end:
            shown, done = now, seed + 1 - first
            left = (now - began) / done * (end - seed - 1)
            text = f"\r{seed + 1 - summary['start']:,} calls, {len(summary['failures'])} failures, {left:.0f} s to go "
            print(text, end="\n" if seed + 1 == end else "", file=sys.stderr, flush=True)
            save(options, summary)


# ---- a long text


def long_text(tokens: int) -> dict[str, Any]:
    """Generate `tokens` tokens with a tiny model and its perturbed copy; how the memory grew after the first tenth."""
    import copy

    from transformers import LlamaConfig, LlamaForCausalLM

    import mcsd

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_key_value_heads=2, max_position_embeddings=tokens + 64, **sizes)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    target = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
        draft = copy.deepcopy(target)
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    memory: list[tuple[int, int]] = []

    def watch(stats: Any) -> None:
        if stats.tokens >= len(memory) * tokens // 20:
            memory.append((stats.tokens, resident()))
            print(f"\r{stats.tokens:,} tokens, {memory[-1][1] >> 20} MiB ", end="", file=sys.stderr, flush=True)

    start = time.perf_counter()
    generation = mcsd.generate(
        target, draft, torch.tensor([[1, 2, 3]]), branching=(2, 2), max_new_tokens=tokens, temperature=1.0,
        eos_token_id=[], callback=watch,
    )  # fmt: skip
    print(file=sys.stderr)
    settled = [bytes_ for n, bytes_ in memory if n >= tokens // 10]
    return {
        "tokens": int(generation.sequences.shape[1]) - 3,
        "status": generation.stats.status,
        "tokens_per_call": round(generation.stats.tokens_per_call, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "resident_mib": [round(bytes_ / 2**20, 1) for _, bytes_ in memory],
        "growth_mib": round((max(settled) - settled[0]) / 2**20, 1),
    }


# The text itself is a list of Python numbers, and allocators keep some slack; a cache that grew would show as more.
LARGEST_GROWTH_MIB = 32


def resident() -> int:
    """Bytes of this process in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the high-water mark
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save(options: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Keep the summary in its file."""
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


def main() -> int:
    """The exit status says whether everything held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--limit", type=int, default=60, help="seconds after which a call counts as hanging")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tokens", type=int, default=0, help="length of the text to generate; 20000 is the usual one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    summary: dict[str, Any] = {
        "start": options.start,
        "next": options.start,
        "failures": [],
        "slowest_ms": 0.0,
        "interrupted": False,
        "seen": {},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    if options.resume and options.json and options.json.exists():
        summary |= json.loads(options.json.read_text()) | {"interrupted": False}
    start = time.perf_counter()
    calls(options, summary)
    summary["seconds"] = round(summary.get("seconds", 0) + time.perf_counter() - start, 1)
    held = not summary["failures"]
    if options.tokens and not summary["interrupted"]:
        summary["long_text"] = long_text(options.tokens)
        grown, length = summary["long_text"]["growth_mib"], summary["long_text"]["tokens"]
        held = held and length == options.tokens and grown <= LARGEST_GROWTH_MIB
    save(options, summary)
    print(json.dumps(summary))
    return 0 if held and not summary["interrupted"] else 1


if __name__ == "__main__":
    sys.exit(main())
