"""Ask the Triton backend for every decision in Triton's interpreter, then count what it emits, as long as it may.

python scripts/interpreted.py --minutes 90 [--state scripts/interpreted.json] [--restart]

A request takes a twentieth of a second. All decisions (`decisions.py`) are four minutes; a law by chi-square wants
thousands of requests for each rule and proposal: so this stops, and the next time adds to what was counted before. When
the kernels have changed, the decisions are asked for again, and so are the first requests of each pair: if the answers
are those of the kernels before, the counts are carried over, and the state says so; else they are kept as they are or,
with `--restart`, made anew. `scripts/lossless.py` reads both.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import decisions
import laws
import numpy as np
import torch

import mcsd_kernels
from mcsd_kernels import SamplingParams, Verified, draw_candidates, draw_uniforms, verify

ROOT = Path(__file__).resolve().parent.parent
STATE = Path(__file__).with_suffix(".json")
KERNELS = Path(mcsd_kernels.__file__).parent
RULES = ("recursive", "traversal")
PROPOSALS = ("without_replacement", "with_replacement", "greedy", "point")

# Two candidates, and one below the first of them. The leaves are virtual: they have no row of the target's, which the
# law of two tokens does not need, and the walk still goes down to one and, under "traversal", back from it.
VOCAB, TREE, VIRTUAL = 5, [-1, 0, 0, 1], [2, 3]
SAMPLING = SamplingParams(temperature=0.8)
DRAFT_SAMPLING = SamplingParams(temperature=1.3)
CHUNK = 25  # requests between two savings
REPLAYED = 200  # requests of each pair that changed kernels answer again
CONTROL = "candidates sorted by q"
CONTROL_REQUESTS = 1000

State = dict[str, Any]


@functools.cache
def kernel_digest() -> str:
    """Of the sources that verify and draw candidates in Triton, comments and spacing apart."""
    digest = hashlib.sha256()
    names = ("_candidates_triton", "_random_triton", "_rows_triton", "_sampling_triton", "_schedule", "_verify_triton")
    for path in (KERNELS / f"{name}.py" for name in names):
        digest.update(ast.dump(ast.parse(path.read_text())).encode())
    return digest.hexdigest()[:12]


def new_state() -> State:
    """Nothing counted yet."""
    import triton

    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, Triton {triton.__version__}"
    pairs = {f"{rule} {proposal}": _nothing() for rule in RULES for proposal in PROPOSALS}
    about = {"kernels": kernel_digest(), "versions": versions, "dates": []}
    return {**about, "decisions": {}, "pairs": pairs, "control": _nothing()}


def _nothing() -> State:
    return {"requests": 0, "differ": 0, "counts": {}, "first": []}


def law_of_two() -> dict[laws.Context, float]:
    """The target's own law of the next two tokens."""
    p = target_laws()
    return {(a, b): float(p[0][a] * p[1 + a][b]) for a in range(VOCAB) for b in range(VOCAB)}


@functools.cache
def target_laws() -> list[laws.Law]:
    """Row 0 follows no token, row 1 + a token a."""
    return [laws.law_of(row.double().numpy(), SAMPLING) for row in _logits()[0]]


@functools.cache
def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    return laws.logit_rows(1 + VOCAB, VOCAB, SAMPLING, DRAFT_SAMPLING)


def results(state: State) -> list[dict[str, Any]]:
    """A row for each that was counted, the negative control last: p of the law of one token, and of two."""
    law = law_of_two()
    rows = []
    for name, counted in [*state["pairs"].items(), (CONTROL, state["control"])]:
        counts = {tuple(map(int, text.split())): n for text, n in counted["counts"].items()}
        requests = counted["requests"]
        if not requests:
            continue
        p = [laws.chi_square(laws.marginal(n, law.items()).items(), laws.marginal(n, counts.items())) for n in (1, 2)]
        sees = [laws.smallest_seen(requests, VOCAB**n) for n in (1, 2)]
        rows.append({"name": name, "requests": requests, "differ": counted["differ"], "p": p, "sees": sees})
    return rows


def count(state: State, proposal: str) -> None:
    """`CHUNK` more requests with both rules, and of the control while it wants some."""
    today = time.strftime("%Y-%m-%d")
    if today not in state["dates"]:
        state["dates"].append(today)
    target, draft = _logits()
    first = state["pairs"][f"{RULES[0]} {proposal}"]["requests"]
    seeds = torch.arange(first, first + CHUNK)
    tokens, same = drafted(draft, seeds, proposal)
    for rule in RULES:
        _add(state["pairs"][f"{rule} {proposal}"], target, draft, tokens, seeds, proposal, rule, same)
    if proposal == "without_replacement" and state["control"]["requests"] < CONTROL_REQUESTS:
        wrong = tokens.clone()
        wrong[:, 1:3] = tokens[:, 1:3].gather(1, draft[0][tokens[:, 1:3]].argsort(1, descending=True))
        below = tokens[:, 1] != wrong[:, 1]
        wrong[below, 3] = -1  # what was drawn below the other one
        _add(state["control"], target, draft, wrong, seeds, proposal, RULES[0], same)


def drafted(draft: torch.Tensor, seeds: torch.Tensor, proposal: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`[requests, nodes]` tokens that Triton drew, and for which requests the torch backend draws the same."""
    found = {}
    for backend in ("triton", "torch"):

        def candidates(rows: torch.Tensor, k: int, node: int, backend: str = backend) -> torch.Tensor:
            options: dict[str, Any] = {"proposal": proposal, "sampling": DRAFT_SAMPLING, "backend": backend}
            return draw_candidates(draft[rows], k, seeds, 0, nodes=torch.full_like(seeds, node), **options)

        siblings = candidates(torch.zeros_like(seeds), 2, 0)
        below = candidates(1 + siblings[:, 0].clamp(min=0), 1, 1)
        found[backend] = torch.cat([torch.zeros_like(seeds)[:, None], siblings, below], 1)
    return found["triton"], (found["triton"] == found["torch"]).all(1)


def _add(
    counted: State,
    target: torch.Tensor,
    draft: torch.Tensor,
    tokens: torch.Tensor,
    seeds: torch.Tensor,
    proposal: str,
    rule: str,
    same: torch.Tensor,
) -> None:
    rows = torch.zeros_like(tokens, dtype=torch.int32)
    rows[:, 1] = 1 + tokens[:, 1].clamp(min=0)
    target_rows = rows.clone()
    target_rows[:, VIRTUAL] = -1

    def run(backend: str) -> Verified:
        uniforms = draw_uniforms(seeds, 0, len(TREE) + 2, backend=backend)
        return verify(
            target, draft, tokens, torch.tensor(TREE), uniforms, proposal=proposal, rule=rule, sampling=SAMPLING,
            draft_sampling=DRAFT_SAMPLING, target_rows=target_rows, draft_rows=rows, max_depth=2, backend=backend,
        )  # fmt: skip

    got, twin = run("triton"), run("torch")
    for mine, other in zip(got, twin, strict=True):
        same = same & (mine == other).reshape(len(seeds), -1).all(1)
    counted["differ"] += int((~same).sum())
    counted["requests"] += len(seeds)
    p, first = target_laws(), counted.setdefault("first", [])
    for seed, text in zip(seeds.tolist(), got.tokens[:, :2].tolist(), strict=True):
        if text[1] < 0:  # the target goes on
            text[1] = int(np.random.default_rng([seed, RULES.index(rule)]).choice(VOCAB, p=p[1 + text[0]]))
        key = f"{text[0]} {text[1]}"
        counted["counts"][key] = counted["counts"].get(key, 0) + 1
        if len(first) < REPLAYED:
            first.append(key)


def carry_over(state: State) -> None:
    """Make counts of earlier kernels those of the kernels as they are, if these answer the first requests the same."""
    again = new_state()
    for proposal in PROPOSALS:
        while again["pairs"][f"{RULES[0]} {proposal}"]["requests"] < REPLAYED:
            count(again, proposal)
    if all(again["pairs"][name]["first"] == part.get("first") for name, part in state["pairs"].items()):
        requests = min(part["requests"] for part in state["pairs"].values())
        state["carried"] = [*state.get("carried", []), {"kernels": state["kernels"], "requests": requests}]
        state["kernels"] = kernel_digest()


def load(path: Path, restart: bool = False) -> State:
    """What was counted so far."""
    if restart or not path.exists():
        return new_state()
    state: State = json.loads(path.read_text())
    return state


def is_current(part: State | None) -> bool:
    """Whether counts or decisions are those of the kernels as they are."""
    return part is not None and part["kernels"] == kernel_digest()


def save(path: Path, state: State) -> None:
    """Write the state, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1) + "\n")
    part.replace(path)


def hurry() -> None:
    """Make each type and each constant of a kernel once, and leave the checks to the tests: three times the speed."""
    import triton.language as tl
    import triton_interpreter  # type: ignore[import-not-found]
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    triton_interpreter._check_bounds = lambda: None
    triton_interpreter.install()
    np.seterr(all="ignore")  # kernels may divide by zero in lanes that they then discard
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    tensor_init, with_element, unwrap = tl.tensor.__init__, tl.block_type.with_element_ty, core._unwrap_if_constexpr
    check, cast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.cast
    numeric = {id(kind) for kind in (tl.int32, tl.int64, tl.uint32, tl.uint64, tl.float32, tl.float64)}
    constants: dict[Any, Any] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        if "_of_tensor" not in type.__dict__:
            tensor_init(self, handle, type)
            type._of_tensor = self.shape, self.numel, self.dtype
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = type._of_tensor

    def with_element_ty(self: Any, kind: Any) -> Any:
        made = self.__dict__.setdefault("_with_element", {})
        if id(kind) not in made:
            made[id(kind)] = kind, with_element(self, kind)  # kept with its key, whose id stays its own
        return made[id(kind)][1]

    def unwrapped(value: Any) -> Any:
        return value if type(value) is tl.tensor else unwrap(value)

    def operands(self: Any, left: Any, right: Any, *flags: Any, **named: Any) -> Any:
        """Both operands in one type and shape; nothing to do for two alike, and little for a number met before."""
        swapped = not isinstance(left, tl.tensor)
        tensor, other = (right, left) if swapped else (left, right)
        if not isinstance(tensor, tl.tensor) or id(tensor.dtype) not in numeric:
            return check(self, left, right, *flags, **named)
        if isinstance(other, tl.tensor):
            alike = left.type is right.type and len(flags) <= 3 and "div_or_mod" not in named
            return (left, right) if alike else check(self, left, right, *flags, **named)
        shape = tensor.handle.data.shape if tensor.type.is_block() else None
        key = id(tensor.dtype), shape, type(other), repr(other), swapped, flags, *named.items()
        if key not in constants:
            pair = check(self, left, right, *flags, **named)
            if pair[swapped] is not tensor:  # the tensor was converted, too
                return pair
            constants[key] = pair[not swapped]
        return (constants[key], tensor) if swapped else (tensor, constants[key])

    def cast_once(self: Any, value: Any, to: Any, rounding: Any = None) -> Any:
        return value if rounding is None and value.dtype is to else cast(self, value, to, rounding)

    tl.tensor.__init__, tl.block_type.with_element_ty, core._unwrap_if_constexpr = init, with_element_ty, unwrapped
    tl.block_type.to_ir = lambda self, builder: self
    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.cast = operands, cast_once


def main() -> int:
    """Count until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--restart", action="store_true", help="forget what was counted")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton decides when it is first imported
        return subprocess.call([sys.executable, *sys.argv], env={**os.environ, "TRITON_INTERPRET": "1"})
    sys.path.insert(0, str(ROOT / "tests"))
    hurry()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    state = load(options.state, options.restart)
    for rule, proposal in itertools.product(RULES, PROPOSALS):
        pair = f"{rule} {proposal}"
        if not is_current(state["decisions"].get(pair)) and time.monotonic() < end:
            state["decisions"][pair] = {"kernels": kernel_digest(), **decisions.row(rule, proposal, "triton")}
            save(options.state, state)
    if not is_current(state):
        carry_over(state)
        save(options.state, state)
    while is_current(state) and time.monotonic() < end:
        count(state, min(PROPOSALS, key=lambda name: state["pairs"][f"{RULES[0]} {name}"]["requests"]))
        save(options.state, state)
    for row in results(state):
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
