"""Answers against the oracle and the torch backend; what must not change them; the host; graphs and the compiler."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import torch

from mcsd_kernels import (
    SamplingParams,
    Verified,
    ancestor_bits,
    draw_candidates,
    draw_uniforms,
    keep_path,
    node_depths,
    reference,
    row_cutoffs,
    tree_attention,
    tree_attention_mask,
    verify,
)

from . import agreement, inputs
from .device import host_microseconds, launches, profiled
from .plan import CHAIN, NODES_64, SMALL, Sizes, Tree
from .rows import ROOT
from .units import Context, Unit

Row = dict[str, Any]
# Four requests that differ in everything that a request may set.
PARAMETERS = {
    "temperature": [1.0, 0.7, 0.0, 1.3],
    "top_k": [0, 0, 0, 50],
    "top_p": [1.0, 1.0, 1.0, 0.9],
    "min_p": [0.0, 0.002, 0.0, 0.0],
}


def units(sizes: Sizes) -> list[Unit]:
    """What could be wrong everywhere comes first."""
    tree = Tree((2, 1) if sizes.smoke else SMALL)
    ends = sizes.every[:1] if sizes.smoke else (sizes.every[0], sizes.every[-1])
    found = []
    for vocab in sizes.vocabularies:
        found += [
            Unit("checks", f"oracle {rule} {proposal} vocab={vocab}", partial(oracle, rule, proposal, vocab, tree))
            for rule, proposal in sizes.every
        ]
        found.append(Unit("checks", f"rows vocab={vocab}", partial(row_operations, vocab)))
    found += [Unit("checks", "trees", tree_operations), Unit("checks", "loop", captured_loop)]
    for rule, proposal in ends if sizes.smoke else sizes.every:
        found += [
            Unit(
                "checks", f"invariant {rule} {proposal} vocab={vocab}", partial(invariant, rule, proposal, vocab, tree)
            )
            for vocab in sizes.invariance_vocabularies
        ]
    vocab = sizes.vocabularies[0]
    found += [
        Unit("checks", f"runtime {rule} {proposal}", partial(runtime, rule, proposal, vocab, tree))
        for rule, proposal in ends
    ]
    shapes = [tree] if sizes.smoke else [Tree(shape) for shape in (CHAIN, SMALL, NODES_64)]
    for rule, proposal in ends:
        found += [
            Unit("checks", f"host {rule} {proposal} {shape.branching}", partial(host, rule, proposal, vocab, shape))
            for shape in shapes
        ]
    for small, dtype in sizes.fuzz:
        found += [
            Unit("checks", f"fuzz {rule} {proposal} vocab={small}", partial(fuzz, rule, proposal, small, dtype))
            for rule, proposal in sizes.every
        ]
    return found


def verdict(name: str, faults: list[str], **more: Any) -> Row:
    return {"bench": "gpu-check", "check": name, "status": "failed" if faults else "ok", "faults": faults[:8], **more}


def sampling_of(device: torch.device, requests: Sequence[int]) -> SamplingParams:
    """The parameters of some of the requests, on the device."""
    return SamplingParams(
        **{name: torch.tensor(PARAMETERS[name], device=device)[list(requests)] for name in PARAMETERS}
    )


class Problem:
    """A few requests with candidates drawn by our sampler, and calls of `verify` on them in many forms."""

    def __init__(self, rule: str, proposal: str, vocab: int, tree: Tree, context: Context, seed: int) -> None:
        self.tree, self.device, self.proposal = tree, context.device.device, proposal
        batch = context.sizes.requests
        self.target, self.draft = inputs.logits((batch, len(tree.parents), vocab), self.device, seed)
        self.seeds = torch.arange(batch, device=self.device) + 10 * seed
        self.sampling = sampling_of(self.device, range(batch))
        self.options = {"rule": rule, "proposal": proposal, "max_depth": tree.depth}
        self.parents = torch.tensor(tree.parents, device=self.device).expand(batch, -1)
        self.redraw(0)

    def redraw(self, step: int) -> None:
        """Other candidates and coins."""
        self.tokens = inputs.draw_tree(self.draft, self.tree, self.seeds, step, self.proposal, self.sampling)
        self.uniforms = draw_uniforms(self.seeds, step, len(self.tree.parents) + 2, backend="triton")

    def arguments(self, requests: list[int] | None = None) -> tuple[Any, ...]:
        all_of_them = self.target, self.draft, self.tokens, self.parents, self.uniforms
        if requests is not None:
            all_of_them = tuple(x[requests] for x in all_of_them)  # type: ignore[assignment]
        return self.without_draft(all_of_them)

    def without_draft(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """`point` has no draft logits."""
        return (arguments[0], None, *arguments[2:]) if self.proposal == "point" else arguments

    def verify(self, arguments: tuple[Any, ...] | None = None, backend: str = "triton", **more: Any) -> Verified:
        options = {"sampling": self.sampling, **self.options, **more}
        return verify(*(arguments or self.arguments()), **options, backend=backend)


def oracle(rule: str, proposal: str, vocab: int, tree: Tree, context: Context) -> Iterator[Row]:
    """`verify` against the float64 oracle and the torch backend, its candidates against torch's."""
    problem = Problem(rule, proposal, vocab, tree, context, seed=vocab)
    calls = context.sizes.oracle_calls
    faults, close, redrawn, drawn = [], 0, 0, 0
    for step in range(calls):
        problem.redraw(step)
        found = problem.verify()
        options = {**problem.options, "sampling": problem.sampling}
        wrong, few = agreement.against_oracle(found, problem.arguments(), options)
        close += few
        faults += [f"call {step}, {line}" for line in wrong]
        try:
            differing = agreement.unlike(found, problem.verify(backend="torch"))
            if differing and few == 0 and not wrong:
                faults.append(f"call {step}: the torch backend differs for {differing} where the oracle does not")
            if step == 0:
                redrawn, drawn = _redrawn(problem)
                if redrawn > 0.05 * drawn + 1:
                    faults.append(f"{redrawn} of {drawn} candidates are not those of the torch backend")
        except Exception as error:
            if context.is_broken(error):
                raise
            faults.append(f"the torch backend: {type(error).__name__}: {error}"[:300])
    yield verdict(
        "oracle",
        faults,
        case={"rule": rule, "proposal": proposal, "vocab": vocab, "tree": list(tree.branching), "dtype": "bfloat16"},
        requests=calls * context.sizes.requests,
        close_calls=close,
        candidates={"drawn": drawn, "unlike_torch": redrawn},
    )


def _redrawn(problem: Problem) -> tuple[int, int]:
    """How many candidates the torch backend draws otherwise, of how many."""
    again = inputs.draw_tree(
        problem.draft, problem.tree, problem.seeds, 0, problem.proposal, problem.sampling, backend="torch"
    )
    return int((again != problem.tokens)[:, 1:].sum()), again[:, 1:].numel()


def row_operations(vocab: int, context: Context) -> Iterator[Row]:
    """`row_cutoffs` against the oracle, `draw_uniforms` against torch's bits."""
    device = context.device.device
    logits = inputs.logits((context.sizes.requests, vocab), device, seed=1)[0]
    sampling = sampling_of(device, range(len(logits)))
    found, faults = row_cutoffs(logits, sampling, backend="triton"), []
    for i in range(len(logits)):
        numbers = {name: values[i] for name, values in PARAMETERS.items()}
        numbers["top_k"] = int(numbers["top_k"])
        wanted = reference.row_cutoff(logits[i], **numbers)  # type: ignore[arg-type]
        if not agreement.keep_the_same(logits[i], float(found[i]), wanted):
            faults.append(f"row_cutoffs, row {i}: got {float(found[i])}, expected {wanted}")
    seeds = torch.tensor([0, -1, 2**63 - 1, 7], device=device)
    for step in (0, 2**32 - 1, torch.tensor([0, 1, 2**31, 5], device=device)):
        one, other = (draw_uniforms(seeds, step, 131, backend=backend) for backend in ("triton", "torch"))
        if not torch.equal(one, other):
            faults.append(f"draw_uniforms, step {step}: other bits than torch's")
    yield verdict("rows", faults, case={"vocab": vocab, "dtype": "bfloat16"})


def tree_operations(context: Context) -> Iterator[Row]:
    """What is done with trees besides verifying them, against the oracle; attention to bfloat16's precision."""
    device, faults = context.device.device, []
    random = torch.Generator().manual_seed(0)
    nodes, slots = (9, 64) if context.sizes.smoke else (300, 4096)
    parents = torch.tensor([[-1, *(int(torch.randint(i, (), generator=random)) for i in range(1, nodes))]] * 2)
    prefix = torch.tensor([slots - nodes, 7])
    query = torch.randn(2, 8, nodes, 64, generator=random).bfloat16()
    key, value = (torch.randn(2, 2, slots, 64, generator=random).bfloat16() for _ in range(2))
    ancestors = reference.ancestor_bits(parents)
    path = torch.arange(nodes).mul(2).clamp(max=nodes - 1).unique().repeat(2, 1)
    length = torch.tensor([path.shape[1], 3])

    found = ancestor_bits(parents.to(device), backend="triton").cpu()
    depths = node_depths(ancestors.to(device), backend="triton").cpu()
    mask = tree_attention_mask(parents.to(device), prefix.to(device), slots, backend="triton").cpu()
    same = {
        "ancestor_bits": (found, ancestors),
        "node_depths": (depths, node_depths(ancestors, backend="torch")),
        "tree_attention_mask": (mask, reference.tree_attention_mask(parents, prefix, slots)),
    }
    moved = key.to(device, copy=True), value.to(device, copy=True)
    keep_path(*moved, prefix.to(device), path.to(device), length.to(device), backend="triton")
    kept = reference.keep_path(key, value, prefix, path, length)
    same |= {f"keep_path, cache {i}": (moved[i].cpu(), kept[i]) for i in range(2)}
    faults += [f"{name}: other than the oracle's" for name, (one, other) in same.items() if not torch.equal(one, other)]
    for window in (None, 16):
        inputs_there = (x.to(device) for x in (query, key, value, ancestors, prefix))
        attended = tree_attention(*inputs_there, window=window, backend="triton").cpu().double()
        wanted = reference.tree_attention(query, key, value, ancestors, prefix, window=window)
        error = float((attended - wanted).abs().max() / wanted.abs().max())
        if not error < 2**-6:
            faults.append(f"tree_attention, window {window}: off by {error:.1e} of the largest entry")
    yield verdict("trees", faults, case={"nodes": nodes, "slots": slots, "dtype": "bfloat16"})


def captured_loop(context: Context) -> Iterator[Row]:
    """`generate` with its steps captured and replayed, against the same without graphs: sampled text, other texts."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        import mcsd
    except ImportError as error:
        yield {"bench": "gpu-check", "check": "loop", "status": "skipped", "error": str(error)}
        return
    config = LlamaConfig(
        vocab_size=499,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    target = LlamaForCausalLM(config).eval().requires_grad_(False)
    target.lm_head.weight *= 20.0
    draft = LlamaForCausalLM(config).eval().requires_grad_(False)
    noise = {name: 0.01 * torch.randn_like(weight) for name, weight in target.state_dict().items()}
    draft.load_state_dict({name: weight + noise[name] for name, weight in target.state_dict().items()})
    models = [model.to(context.device.device) for model in (target, draft)]
    faults, differing, told, steps, accepted = [], [], [], 0, 0
    told_by = logging.getLogger("mcsd.graphs")
    before, listener = told_by.level, logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    told_by.addHandler(listener)
    told_by.setLevel(logging.INFO)
    try:
        for seed, (rule, (kind, shape)) in enumerate(product(("recursive", "traversal"), LOOPS)):
            drafter = models[1] if kind == "model" else _drafter(kind, models[0], shape)
            for temperature in (1.0, torch.tensor([0.7, 0.0, 1.2], device=context.device.device)):
                random = torch.Generator().manual_seed(seed)
                ids = torch.randint(499, (3, 9), generator=random).to(context.device.device)
                mask = (torch.arange(9) >= torch.tensor([[0], [4], [7]])).long().to(ids.device)
                options = {"branching": shape, "temperature": temperature, "rule": rule, "seed": seed}
                tokens = 8 if context.sizes.smoke else 64
                texts = [
                    mcsd.generate(models[0], drafter, ids, mask, max_new_tokens=tokens, graphs=graphs, **options)
                    for graphs in (True, False)
                ]
                steps, accepted = steps + texts[0].stats.target_calls, accepted + sum(texts[0].stats.accepted_by_depth)
                if not torch.equal(texts[0].sequences, texts[1].sequences):
                    differing.append(f"{kind}, {rule}, {shape}, {temperature}: another text than without graphs")
    finally:
        told_by.removeHandler(listener)
        told_by.setLevel(before)
    # padded rows may be multiplied by other kernels, whose rounding may turn one draw
    faults += differing if len(differing) > 1 or context.sizes.smoke else []
    if not context.sizes.smoke:
        faults += [line for line in told if not line.startswith("captured")]
        if not any(line.startswith("captured a step") for line in told):
            faults.append("no step was captured")
        faults += _failing_capture(context.device.device)
    yield verdict("loop", faults, steps=steps, accepted=accepted, captures=len(told))


LOOPS = (
    *(("model", shape) for shape in ((2,), (3, 2), (1, 1, 1))),
    *((kind, (3, 2)) for kind in ("feature", "heads", "early exit")),
)


def _drafter(kind: str, target: Any, shape: tuple[int, ...]) -> Any:
    """One that reads hidden states, with random weights, or the target's own first layer."""
    from mcsd.drafters import EarlyExitDrafter, FeatureDrafter, HeadsDrafter, MedusaHeads
    from mcsd.drafters.feature import FeatureConfig, FeatureModel

    if kind == "early exit":
        return EarlyExitDrafter(target, 1, shape)
    if kind == "heads":
        return HeadsDrafter(MedusaHeads.of(target, len(shape)), shape, "without_replacement")
    embedding = target.get_input_embeddings().weight
    model = FeatureModel(FeatureConfig(*embedding.shape, 512, 4, 2, 64, embedding.shape[0]), embedding)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, parameter.shape[-1] ** -0.5)
    return FeatureDrafter(model.eval().requires_grad_(False), shape)


def _failing_capture(device: torch.device) -> list[str]:
    """What is wrong after a function that reads on the host was refused, and after a capture that failed."""
    from mcsd import graphs

    counter = iter(range(9))

    def reads() -> int:
        return int(torch.ones(3, device=device).sum())

    def reads_when_captured() -> torch.Tensor:
        some = torch.ones(3, device=device)
        return some * some.sum().item() if next(counter) == 2 else some

    faults, stream = [], torch.cuda.current_stream(device)
    for function in (reads, reads_when_captured):
        try:
            graphs.capture(function, device)
            faults.append(f"{function.__name__} was captured")
        except Exception as error:
            if function is reads and "waits for the device" not in str(error):
                faults.append(f"reads: {error}")
        if torch.cuda.current_stream(device) != stream:
            faults.append(f"{function.__name__} leaves another stream")
        try:
            if float(torch.randn(9, device=device).square().sum()) <= 0.0:
                faults.append(f"{function.__name__} leaves a device that does not compute")
        except RuntimeError as error:
            faults.append(f"{function.__name__} leaves a generator that draws no numbers: {error}")
    return faults


# ---- what must not matter


def invariant(rule: str, proposal: str, vocab: int, tree: Tree, context: Context) -> Iterator[Row]:
    """Bitwise the same answer, whatever lies around a request and however the call is launched."""
    device = context.device.device
    problem = Problem(rule, proposal, vocab, tree, context, seed=3)
    whole = problem.verify()
    faults: list[str] = []

    def expect(name: str, found: Verified, requests: list[int] | None = None) -> None:
        wanted = whole if requests is None else Verified(*(values[requests] for values in whole))
        if not agreement.same(found, wanted):
            faults.append(name)

    everyone = range(context.sizes.requests)
    for name, requests in (("reversed", [*everyone][::-1]), ("the last alone", [everyone[-1]])):
        found = problem.verify(problem.arguments(requests), sampling=sampling_of(device, requests))
        expect(f"batch: {name}", found, requests)
    expect("run twice", problem.verify())
    expect("padding and wider rows, NaN around them", problem.verify(_padded(problem)))
    expect("batch and node axes swapped in memory", problem.verify(_swapped(problem)))
    arguments, rows = _indirect(problem)
    expect("rows picked by an index", problem.verify(arguments, **rows))
    others = [b for b in everyone if b != 1]
    spoiled = problem.arguments()[0].clone()
    spoiled[1] = float("nan")
    found = problem.verify((spoiled, *problem.arguments()[1:]))
    expect("a neighbour of NaN", Verified(*(values[others] for values in found)), others)
    names = []
    for name, forced in forced_launches():
        names.append(name)
        with forced:
            expect(f"launch: {name}", problem.verify())
    yield verdict(
        "invariant",
        faults,
        case={"rule": rule, "proposal": proposal, "vocab": vocab, "tree": list(tree.branching), "dtype": "bfloat16"},
        launches=names,
    )


def _padded(problem: Problem) -> tuple[Any, ...]:
    target, draft, tokens, parents, uniforms = (
        problem.target, problem.draft, problem.tokens, problem.parents, problem.uniforms,
    )  # fmt: skip
    batch, nodes, vocab = target.shape

    def widened(logits: torch.Tensor) -> torch.Tensor:
        wide = torch.full((batch + 1, nodes + 3, vocab + 3), float("nan"), dtype=logits.dtype, device=logits.device)
        wide[:batch, :nodes, 1 : vocab + 1] = logits
        return wide[:batch, : nodes + 2, 1 : vocab + 1]

    more = torch.full_like(parents[:, :2], -1)
    coins = torch.cat([uniforms[:, :nodes], torch.zeros_like(uniforms[:, :2]), uniforms[:, nodes:]], 1)
    return problem.without_draft(
        (
            widened(target),
            widened(draft),
            torch.cat([tokens, tokens[:, :2] * 0], 1),
            torch.cat([parents, more], 1),
            coins,
        )
    )


def _swapped(problem: Problem) -> tuple[Any, ...]:
    target, draft = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (problem.target, problem.draft))
    return problem.without_draft((target, draft, problem.tokens, problem.parents, problem.uniforms))


def _indirect(problem: Problem) -> tuple[tuple[Any, ...], Row]:
    batch, nodes, vocab = problem.target.shape
    order = torch.randperm(batch * nodes, generator=torch.Generator().manual_seed(0)).to(problem.device)
    stores = []
    for logits in (problem.target, problem.draft):
        store = torch.full((batch * nodes + 2, vocab), float("nan"), dtype=logits.dtype, device=logits.device)
        store[order + 1] = logits.reshape(-1, vocab)
        stores.append(store)
    rows = {"target_rows": (order + 1).reshape(batch, nodes).int()}
    if problem.proposal != "point":
        rows["draft_rows"] = rows["target_rows"]
    return problem.without_draft((*stores, problem.tokens, problem.parents, problem.uniforms)), rows


def forced_launches() -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Every schedule and tile that can be forced on `verify`, by name: what its launch table offers."""
    from mcsd_kernels import _schedule, _verify_triton

    offered = {field.name for field in dataclasses.fields(_schedule.Launch)}
    changes: list[tuple[str, Any]] = [("tile_blocks", blocks) for blocks in (1, 2)]
    changes += [("schedule", name) for name in getattr(_schedule, "SCHEDULES", ())]
    choose = _verify_triton.choose_launch
    for field, value in changes:
        if field in offered:

            def forced(*arguments: Any, change: Any = (field, value), **options: Any) -> Any:
                return dataclasses.replace(choose(*arguments, **options), **dict([change]))

            yield f"{field}={value}", _replaced(_verify_triton, "choose_launch", forced)


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


# ---- the host, graphs, the compiler


def runtime(rule: str, proposal: str, vocab: int, tree: Tree, context: Context) -> Iterator[Row]:
    """No wait for the device; a graph replayed with new data; one graph under `torch.compile`."""
    device = context.device
    problem = Problem(rule, proposal, vocab, tree, context, seed=5)
    step = torch.zeros((), dtype=torch.int64, device=device.device)
    numbers = SamplingParams(temperature=0.8, min_p=0.01)
    calls: dict[str, Callable[[], Any]] = {
        "verify": problem.verify,
        "verify, numbers as parameters": lambda: problem.verify(sampling=numbers),
        "draw_candidates": lambda: draw_candidates(
            problem.draft[:, 0], 3, problem.seeds, step, proposal=proposal, sampling=problem.sampling, backend="triton"
        ),
        "draw_uniforms": lambda: draw_uniforms(problem.seeds, step, 9, backend="triton"),
        "row_cutoffs": lambda: row_cutoffs(problem.target[:, 0], problem.sampling, backend="triton"),
    }
    faults = []
    for name, call in calls.items():
        replay = device.captured(call)
        device.synchronize()
        try:
            with device.forbid_synchronization():
                call()
        except RuntimeError as error:
            faults.append(f"{name} waits for the device: {error}"[:300])
        for i in (1,) if context.sizes.smoke else (1, 2):
            _renew(problem, i)
            step.fill_(i)
            replay.run()
            device.synchronize()
            found, wanted = ((x,) if isinstance(x, torch.Tensor) else x for x in (replay.result, call()))
            if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
                faults.append(f"{name}: replay {i} of the graph gives another answer")
    compiled = device.compiled(lambda logits: problem.verify((2 * logits, *problem.arguments()[1:])).tokens + 1)
    if not torch.equal(
        compiled(problem.target), problem.verify((2 * problem.target, *problem.arguments()[1:])).tokens + 1
    ):
        faults.append("verify under torch.compile gives another answer")
    yield verdict("runtime", faults, case={"rule": rule, "proposal": proposal, "vocab": vocab, "calls": list(calls)})


def _renew(problem: Problem, seed: int) -> None:
    """Other data in the same memory."""
    tokens, uniforms = problem.tokens, problem.uniforms
    target, draft = inputs.logits(tuple(problem.target.shape), problem.device, seed + 50)
    problem.target.copy_(target)
    problem.draft.copy_(draft)
    problem.redraw(seed)
    problem.tokens, problem.uniforms = tokens.copy_(problem.tokens), uniforms.copy_(problem.uniforms)


def host(rule: str, proposal: str, vocab: int, tree: Tree, context: Context) -> Iterator[Row]:
    """What a call costs the host: kernels launched, operators of torch, microseconds to issue it."""
    problem = Problem(rule, proposal, vocab, tree, context, seed=7)
    rows = problem.draft[:, 0]
    calls: dict[str, Callable[[], Any]] = {
        "verify": problem.verify,
        "draw_candidates": lambda: draw_candidates(rows, 4, problem.seeds, 0, proposal=proposal, backend="triton"),
        "draw_uniforms": lambda: draw_uniforms(problem.seeds, 0, 66, backend="triton"),
        "row_cutoffs": lambda: row_cutoffs(rows, SamplingParams(top_k=50), backend="triton"),
    }
    for name, call in calls.items():
        call()
        yield {
            "bench": "gpu-host",
            "status": "ok",
            "case": {
                "operation": name,
                "rule": rule,
                "proposal": proposal,
                "vocab": vocab,
                "tree": list(tree.branching),
            },
            "launches": launches(call),
            "host_microseconds": round(host_microseconds(context.device, call), 1),
            "scratch_bytes": context.device.scratch_bytes(call),
            **profiled(context.device, call),
        }


# ---- random calls


def fuzz(rule: str, proposal: str, vocab: int, dtype: str, context: Context) -> Iterator[Row]:
    """Random legal calls, a third with a fault, a third with other rows than logits, against the oracle."""
    cases = test_cases()
    faults, requests, close, calls = [], 0, 0, 0
    start = time.monotonic()
    while calls < context.sizes.fuzz_calls and time.monotonic() - start < context.sizes.fuzz_seconds:
        random = np.random.default_rng([11, vocab, calls])
        choices = {"rule": rule, "proposal": proposal, "vocab": vocab, "dtype": getattr(torch, dtype)}
        if calls % 3 == 2:  # probabilities, a bitmask, a draft vocabulary, chosen siblings
            case = cases.extended(random, {str(random.choice(cases.EXTRAS))}, **choices)
        else:
            case = cases.random_case(random, **choices, faults=calls % 3 == 0)
        there = case.to(context.device.device)
        found = verify(*there.arguments, **there.options, backend="triton")
        wrong, few = agreement.against_oracle(Verified(*(x.cpu() for x in found)), case.arguments, case.options)
        faults += [f"{line}; {case.note}"[:600] for line in wrong]
        calls, requests, close = calls + 1, requests + len(found.length), close + few
    if close > 0.05 * requests + 1:
        faults.append(f"{close} of {requests} requests are close calls")
    yield verdict(
        "fuzz",
        faults,
        case={"rule": rule, "proposal": proposal, "vocab": vocab, "dtype": dtype},
        calls=calls,
        requests=requests,
        close_calls=close,
    )


def test_cases() -> Any:
    """The module `tests/cases.py`; by its path, for others are called `tests` and `cases` too."""
    name = "mcsd_test_cases"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "cases.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
