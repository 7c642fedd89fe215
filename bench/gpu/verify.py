"""`verify` timed: cold, in a graph, beside what users run in its place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch

from mcsd_kernels import Verified, reference, verify
from mcsd_kernels import _verify_triton as kernels

from . import agreement, floor, rivals, rows
from .device import Replay, host_microseconds, launches, rival_replay, rounds_for
from .inputs import Inputs
from .plan import FILTERED, NO_FILTERS, SAMPLING, SMOKE_CASES, Case, Sizes, Tree, verify_cases
from .units import Context, Unit

NODES_64_AT_ONE = 25.0  # microseconds
# Of FlashInfer's chains at least so many are looked at, and their mean may be so many standard errors off.
CHAINS, STANDARD_ERRORS = 1024, 5.0
# Tensors of [batch, vocab] fp32 that the textbook has at once.
TEXTBOOK_TENSORS = 8
OVER_FLOOR, OVER_UNFILTERED, SCRATCH_SHARE = 2.0, 2.0, 0.01


def units(sizes: Sizes) -> list[Unit]:
    """One unit a shape; a shape has a row without filters and one with."""
    cases = SMOKE_CASES if sizes.smoke else tuple(verify_cases())
    return [Unit("verify", case.unit, partial(measure, case), _warm(case)) for case in cases]


def _warm(case: Case) -> dict[Hashable, Callable[[Context], Any]]:
    few = case.batch * case.nodes < 2 * rivals.PROCESSORS
    found: dict[Hashable, Callable[[Context], Any]] = {}
    for name in (NO_FILTERS, FILTERED):
        found[case.vocab, case.rule, case.proposal, name] = partial(_compile, case, name)
        if "preparation" in case.rivals:
            found["preparation", case.vocab, few, name] = partial(_compile_preparations, case, name)
    if "compiled textbook" in case.rivals:
        found["textbook", case.unit] = partial(_compile_textbook, case)
    return found


def _compile(case: Case, filters: str, context: Context) -> None:
    """The case's own batch, on which the schedule depends; all requests have the rows of one."""
    made = case.batch, Tree(case.tree), case.vocab, case.rule, case.proposal, 1, context.device.device, (filters,)
    Inputs.make(*made, shared=True).call(filters)()


def _compile_preparations(case: Case, filters: str, context: Context) -> None:
    rows_there = min(case.batch * case.nodes, 4096)
    logits = torch.zeros(rows_there, case.vocab, dtype=torch.bfloat16, device=context.device.device)
    for name, prepare in rivals.preparations(filters, context.compiled).items():
        if "compiled" in name:
            prepare(logits)


def _compile_textbook(case: Case, context: Context) -> None:
    made = case.batch, Tree(case.tree), case.vocab, case.rule, case.proposal, 1, context.device.device, (NO_FILTERS,)
    context.compiled(rivals.textbook)(*_textbook_arguments(Inputs.make(*made), NO_FILTERS))


def targets(case: Case, filters: str, row: dict[str, Any]) -> dict[str, bool]:
    """Which targets this row has, and whether it meets them.

    Args:
        case: the shape.
        filters: a name in `plan.SAMPLING`.
        row: its figures.
    """
    median = row["microseconds"]["median"]
    found = {}
    if case.nodes == 64 and case.vocab == 128_256 and filters == NO_FILTERS and case.rule == "recursive":
        if case.batch == 1:
            found["<= 25 us"] = median <= NODES_64_AT_ONE
        elif case.batch in (64, 256):
            found["<= 2 x floor"] = row["over_floor"]["median"] <= OVER_FLOOR
    if row.get("over_unfiltered") is not None:
        found["<= 2 x unfiltered"] = row["over_unfiltered"]["median"] <= OVER_UNFILTERED
    prepared = [rival["microseconds"]["median"] for rival in row["rivals"].values() if rival["kind"] == "preparation"]
    if prepared:
        found["ahead of the preparation"] = median < min(prepared)
    found["scratch <= 1 % of the logits"] = row["scratch_bytes"] <= SCRATCH_SHARE * row["logits_bytes"]
    return found


def needed_bytes(case: Case, sizes: Sizes) -> int:
    """Device memory that a case takes: the logits of both sides, and what its rivals write, each graph apart."""
    logits = case.batch * case.nodes * case.vocab * 2
    textbooks = sum(kind.endswith("textbook") for kind in case.rivals)
    # without filters and with, and once more beside a graph
    textbook = 3 * textbooks * TEXTBOOK_TENSORS * case.batch * case.vocab * 4
    return 2 * logits + 16 * min(2 * logits, sizes.chunk_bytes) + textbook + (1 << 20)


@dataclass
class Contender:
    """What is timed, or why it is not."""

    kind: str
    replay: Replay | None = None
    error: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


def measure(case: Case, context: Context) -> Iterator[dict[str, Any]]:
    """The two rows of a case; all their contenders take turns."""
    device, sizes = context.device, context.sizes
    free, needed = device.free_bytes(), needed_bytes(case, sizes)
    if needed > 0.95 * free:
        why = f"needs {needed >> 20} MiB of device memory, {free >> 20} are free"
        yield {"bench": "gpu-verify", "status": "skipped", "case": case.as_row(), "error": why}
        return
    filters = (NO_FILTERS, FILTERED)
    inputs = Inputs.make(
        case.batch, Tree(case.tree), case.vocab, case.rule, case.proposal, sizes.sets, device.device, filters
    )
    wrong = {name: _wrong(inputs, name, sizes) for name in filters}
    contenders: dict[str, dict[str, Contender]] = {}
    for name in filters:
        call = inputs.call(name)
        ours = device.captured(call)
        inputs.load(1)
        ours.run()
        if not agreement.same(ours.result, call()):
            wrong[name].append("a replayed graph gives another answer than a call")
        if not wrong[name]:
            contenders[name] = {"verify": Contender("ours", ours), **_rivals(context, case, inputs, name)}
    replays = {
        f"{name}/{who}": contender.replay
        for name, group in contenders.items()
        for who, contender in group.items()
        if contender.replay is not None
    }
    rounds, every = rounds_for(device, replays, inputs.load, [f"{name}/verify" for name in contenders])
    found = device.times(replays, inputs.load, rounds, every)
    for name in filters:
        row = {
            "bench": "gpu-verify",
            "case": case.as_row() | {"filters": name, "overlap": round(inputs.overlap, 3)},
        }
        if wrong[name]:
            yield {**row, "status": "refused", "error": "; ".join(wrong[name])[:2000]}
            continue
        row |= _figures(context, case, inputs, name, contenders[name], found, every) | {"rounds": rounds}
        if name == FILTERED and not wrong[NO_FILTERS]:
            pairs = zip(found[f"{FILTERED}/verify"], found[f"{NO_FILTERS}/verify"], strict=True)
            row["over_unfiltered"] = rows.spread([a / b for a, b in pairs])
        yield {**row, "status": "ok", "targets": targets(case, name, row)}


def _wrong(inputs: Inputs, filters: str, sizes: Sizes) -> list[str]:
    """What is wrong with the kernel's answers at this shape."""
    tokens, uniforms = inputs.sets[filters][0]
    options = inputs.options(filters)
    result = verify(*inputs.arguments(tokens, uniforms), **options, backend="triton")  # type: ignore[arg-type]
    wrong = [f"status of request {b}: {int(result.status[b])}" for b in result.status.nonzero().flatten().tolist()[:4]]
    some = max(sizes.checked_requests - 1, 1)
    for b in sorted({(len(tokens) - 1) * i // some for i in range(sizes.checked_requests)}):
        one = slice(b, b + 1)
        lines, _ = agreement.against_oracle(
            Verified(*(values[one] for values in result)), inputs.arguments(tokens, uniforms, one), options
        )
        wrong += [f"at {b}: {line}" for line in lines]
    return wrong


def _floors(case: Case, inputs: Inputs, filters: str, bandwidth: float) -> tuple[list[float], dict[str, Any]]:
    """The floor of each set of inputs in microseconds, and what is behind it."""
    call, width, item = inputs.call(filters), inputs.tree.depth + 1, inputs.target.element_size()

    def microseconds(count: int) -> float:
        byte_count = kernels.verify_bytes(count, case.batch, case.nodes, width, case.vocab, item)
        return floor.microseconds(byte_count, bandwidth)

    floors, tokens, visited = [], [], []
    for i in range(len(inputs.sets[filters])):
        inputs.load(i)
        result = call()
        target, draft = floor.visited_rows(result.path, result.length, inputs.tree.parents, inputs.tree.depth)
        visited.append((target, 0 if case.proposal == "point" else draft))
        floors.append(microseconds(sum(visited[-1])))
        tokens.append(float(result.length.float().mean()))
    return floors, {
        "tokens": round(mean(tokens), 3),
        "floor": {
            "microseconds": round(mean(floors), 3),
            "of": "the accepted paths' rows" + (", a lower bound" if case.rule == "traversal" else ""),
            "target_rows": mean(target for target, _ in visited),
            "draft_rows": mean(draft for _, draft in visited),
            "every_row_microseconds": round(microseconds(_rows_to_measure(case)), 3),
        },
    }


def _rows_to_measure(case: Case) -> int:
    """Rows of all nodes, of the draft's side those with children."""
    inner = 0 if case.proposal == "point" else len(Tree(case.tree).children())
    return case.batch * (case.nodes + inner)


def _traffic_bytes(case: Case, inputs: Inputs, launched: list[str], visited: float) -> int | None:
    """What the launched kernels must move, each by itself; sweeps at most, and those of the walk left out.

    None where a kernel is not known here.

    Args:
        case, inputs: of the call.
        launched: names of kernels.
        visited: rows that its walk needs, both sides, where they are not measured before.
    """
    item, measured, width = inputs.target.element_size(), _rows_to_measure(case), inputs.tree.depth + 1
    split = "_statistics_kernel" in launched
    swept = floor.sweeps(inputs.tree.parents, case.rule, case.proposal, launched.count("_sweep_kernel"))
    moved = {
        "_prepare_kernel": kernels.prepare_bytes(case.batch, case.nodes, width),
        "_statistics_kernel": kernels.statistics_bytes(measured, case.vocab, item),
        "_records_kernel": kernels.records_bytes(measured, case.vocab),
        "_sweep_kernel": kernels.sweep_bytes(case.batch * swept, case.vocab, item),
        "_walk_kernel": kernels.walk_bytes(0 if split else round(visited), case.batch, width, case.vocab, item),
    }
    return sum(moved[name] for name in set(launched)) if moved.keys() >= set(launched) else None


def _figures(
    context: Context,
    case: Case,
    inputs: Inputs,
    filters: str,
    contenders: dict[str, Contender],
    found: dict[str, list[float]],
    every: dict[str, int],
) -> dict[str, Any]:
    """What a row says besides its case and its verdicts."""
    device, call = context.device, inputs.call(filters)
    times = found[f"{filters}/verify"]
    floors, behind = _floors(case, inputs, filters, context.bandwidth)
    sides, launched = 1 if case.proposal == "point" else 2, launches(call)

    def of_rival(name: str, contender: Contender) -> dict[str, Any]:
        theirs, n = found[f"{filters}/{name}"], every.get(f"{filters}/{name}", 1)
        return {
            "kind": contender.kind,
            "microseconds": rows.spread(theirs),
            "rounds": len(theirs),
            "over_verify": rows.spread([b / a for a, b in zip(times[::n], theirs, strict=True)]),
            **contender.more,
        }

    return {
        "microseconds": rows.spread(times),
        "over_floor": rows.spread([time / floors[i % len(floors)] for i, time in enumerate(times)]),
        **behind,
        "over_unfiltered": None,
        "rivals": {
            name: of_rival(name, contender)
            for name, contender in contenders.items()
            if name != "verify" and contender.replay is not None
        },
        "rivals_without_times": {name: made.error for name, made in contenders.items() if made.replay is None},
        "launches": launched,
        "traffic_bytes": _traffic_bytes(
            case, inputs, launched, behind["floor"]["target_rows"] + behind["floor"]["draft_rows"]
        ),
        "host_microseconds": round(host_microseconds(device, call), 1) if case.batch == 1 else None,
        "scratch_bytes": device.scratch_bytes(call),
        "logits_bytes": inputs.target.numel() * inputs.target.element_size() * sides,
        "cold_bytes": device.cold_bytes,
        "empty_graph_microseconds": round(context.empty_graph, 3),
        "copy_gigabytes_a_second": round(context.bandwidth / 1e9, 1),
    }


def _rivals(context: Context, case: Case, inputs: Inputs, filters: str) -> dict[str, Contender]:
    """The rivals of a case, each checked; one that fails says why in place of a time."""
    builders: dict[str, tuple[str, Callable[[], Contender]]] = {}
    if "preparation" in case.rivals:
        for name, prepare in rivals.preparations(filters, context.compiled).items():
            builders[name] = "preparation", partial(_preparation, context, inputs, filters, prepare)
        if set(case.tree) == {1} and filters == NO_FILTERS and rivals.flashinfer() is not None:
            builders["flashinfer chain"] = "chain", partial(_chain, context, inputs, True)
            builders["softmax and flashinfer chain"] = "chain", partial(_chain, context, inputs, False)
    if "textbook" in case.rivals:
        builders["textbook"] = "textbook", partial(_textbook, context, inputs, filters, rivals.textbook)
        if case.batch == 1 and filters == NO_FILTERS:
            builders["textbook, the host deciding"] = "textbook", partial(_published, inputs)
    if "compiled textbook" in case.rivals and filters == NO_FILTERS:  # top-k is not the compiler's to make faster
        compiled = context.compiled(rivals.textbook)
        builders["compiled textbook"] = "textbook", partial(_textbook, context, inputs, filters, compiled)
    made = {}
    for name, (kind, build) in builders.items():
        try:
            made[name] = build()
        except Exception as problem:
            if context.is_broken(problem):
                raise
            made[name] = Contender(kind, error=f"{type(problem).__name__}: {problem}"[:300])
    return made


def _preparation(
    context: Context, inputs: Inputs, filters: str, prepare: Callable[[torch.Tensor], torch.Tensor]
) -> Contender:
    """Of the target's rows alone, which is all that a target-only kernel reads; in parts where memory is short."""
    flat = inputs.target.flatten(0, 1)
    split = flat.tensor_split(-(-flat.numel() * 4 // context.sizes.chunk_bytes))

    def call() -> torch.Tensor:
        for part in split:
            laws = prepare(part)
        return laws

    law = prepare(split[0])[0].double().cpu().numpy()
    distance = float(np.abs(law - reference.row_law(flat[0], **SAMPLING[filters])).sum())  # type: ignore[arg-type]
    # bf16 logits tie at a cut-off, and a rival keeps k of them and no more
    if distance > (0.1 if filters == FILTERED else 1e-3):
        return Contender("preparation", error=f"not the law: off by {distance:.3f}")
    replay, graph = rival_replay(context.device, call)
    return Contender("preparation", replay, more={"graph": graph, "parts": len(split)})


def _textbook_arguments(inputs: Inputs, filters: str) -> tuple[Any, ...]:
    tokens, uniforms = inputs.held(filters)
    children = rivals.first_children(inputs.tree, tokens.device)
    return inputs.target, inputs.draft, tokens, children, uniforms, inputs.tree.branching, filters


def _textbook(context: Context, inputs: Inputs, filters: str, function: Callable[..., Any]) -> Contender:
    arguments, ours = _textbook_arguments(inputs, filters), inputs.call(filters)
    call, agreeing = partial(function, *arguments), []
    for i in range(len(inputs.sets[filters])):
        inputs.load(i)
        path, length, _ = call()
        wanted = ours()
        agreeing += ((path == wanted.path).all(1) & (length == wanted.length)).tolist()
    share = mean(agreeing)
    # its float32 residuals differ a little; more so where it cuts through ties
    if len(agreeing) - sum(agreeing) > 1 + (0.2 if filters == FILTERED else 0.05) * len(agreeing):
        return Contender("textbook", error=f"only {share:.2f} of its paths are ours")
    replay, graph = rival_replay(context.device, call)
    return Contender("textbook", replay, more={"graph": graph, "paths_as_ours": round(share, 3)})


def _published(inputs: Inputs) -> Contender:
    """Not in a graph, which it cannot be: the events are around all of it."""
    tokens, _ = inputs.held(NO_FILTERS)
    call = partial(rivals.published_walk, inputs.target, inputs.draft, tokens, inputs.tree)
    *accepted, last = call()
    node, children, drafted = 0, inputs.tree.children(), tokens[0].tolist()
    for token in accepted:
        child = next((child for child in children.get(node, []) if drafted[child] == token), None)
        if child is None:
            return Contender("textbook", error=f"its tokens {accepted} are no path of the tree")
        node = child
    if not 0 <= last < inputs.target.shape[-1]:
        return Contender("textbook", error=f"its last token is {last}")
    return Contender("textbook", Replay(call), more={"graph": False})


def _chain(context: Context, inputs: Inputs, prepared: bool) -> Contender:
    """Its random numbers are its own, so each answer is checked by itself, and the mean of what is emitted."""
    tokens, _ = inputs.held(NO_FILTERS)
    draft, target = rivals.softmax(inputs.draft[:, :-1]).contiguous(), rivals.softmax(inputs.target)
    seed, offset = (torch.zeros(1, dtype=torch.int64, device=tokens.device) for _ in range(2))
    call = partial(
        rivals.flashinfer_chain, inputs.target, draft, tokens, seed, offset, prepared=target if prepared else None
    )
    sets = len(inputs.sets[NO_FILTERS])
    rounds = -(-CHAINS // (len(tokens) * sets))
    emitted, wanted, variance = 0, 0.0, 0.0
    for i in range(sets):
        inputs.load(i)
        for _ in range(rounds):
            found = call()
            offset += 4 * inputs.target.shape[1]
            faults = rivals.chain_faults(found, draft, tokens, target)
            if faults:
                return Contender("chain", error="; ".join(faults))
            emitted += int(found[2].sum())
        moments = rivals.chain_acceptance(draft, tokens, target)
        wanted, variance = wanted + rounds * moments[0], variance + rounds * moments[1]
    count = rounds * sets * len(tokens)
    if abs(emitted - wanted) > STANDARD_ERRORS * variance**0.5 + 1:
        error = f"{emitted / count:.3f} drafts a chain are emitted, of {wanted / count:.3f} that the laws want"
        return Contender("chain", error=error)
    replay, graph = rival_replay(context.device, call)
    return Contender("chain", replay, more={"graph": graph, "drafts_emitted": round(emitted / count, 3)})
