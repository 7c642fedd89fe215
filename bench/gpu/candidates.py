"""`draw_candidates`, `row_cutoffs` and `draw_uniforms` timed: cold, in a graph, beside what is in use today."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mcsd_kernels import SamplingParams, draw_candidates, draw_uniforms, row_cutoffs

from . import agreement, floor, inputs, rivals, rows
from .device import launches, rival_replay, rounds_for
from .plan import FILTERED, SAMPLING, SMOKE_ROW_CASES, RowCase, Sizes, row_cases
from .units import Context, Unit


def units(sizes: Sizes) -> list[Unit]:
    """One unit a shape."""
    cases = SMOKE_ROW_CASES if sizes.smoke else tuple(row_cases())
    return [
        Unit(
            "candidates",
            case.unit,
            partial(measure, case),
            {(case.operation, case.vocab, case.filters, case.proposal): partial(_compile, case)},
        )
        for case in cases
    ]


def _compile(case: RowCase, context: Context) -> None:
    few = replace(case, rows=2)
    logits = inputs.logits((few.rows, few.vocab), context.device.device, seed=0)[1]
    OPERATIONS[few.operation](few, context, logits)[0].call()


def measure(case: RowCase, context: Context) -> Iterator[dict[str, Any]]:
    """The row of a case."""
    row: dict[str, Any] = {"bench": f"gpu-{case.operation.replace('_', '-')}", "case": _as_row(case)}
    device = context.device
    logits = inputs.logits((case.rows, case.vocab), device.device, seed=0)[1]
    if case.rows > 1:
        rivals.any_number_of_rows(logits)
    ours, theirs, byte_count = OPERATIONS[case.operation](case, context, logits)
    wrong = ours.check()
    if wrong:
        yield {**row, "status": "refused", "error": wrong}
        return
    replays, graphs, failed = {case.operation: device.captured(ours.call)}, {}, {}
    for name, call in theirs.items():
        try:
            replays[name], graphs[name] = rival_replay(device, call)
        except Exception as problem:
            if context.is_broken(problem):
                raise
            failed[name] = f"{type(problem).__name__}: {problem}"[:300]
    rounds, every = rounds_for(device, replays, ours.load, [case.operation])
    found = device.times(replays, ours.load, rounds, every)
    times = found.pop(case.operation)
    at_least = floor.microseconds(byte_count, context.bandwidth)
    ours_median, medians = rows.percentile(times, 0.5), [rows.percentile(values, 0.5) for values in found.values()]
    yield {
        **row,
        "status": "ok",
        "microseconds": rows.spread(times),
        "rounds": rounds,
        "floor": {"microseconds": round(at_least, 3), "of": "every row once"},
        "over_floor": rows.spread([time / at_least for time in times]),
        "rivals": {
            name: {
                "graph": graphs[name],
                "microseconds": rows.spread(values),
                "rounds": len(values),
                "over_ours": rows.spread([b / a for a, b in zip(times[:: every.get(name, 1)], values, strict=True)]),
            }
            for name, values in found.items()
        },
        "rivals_without_times": failed,
        "launches": launches(ours.call),
        "scratch_bytes": device.scratch_bytes(ours.call),
        "empty_graph_microseconds": round(context.empty_graph, 3),
        "copy_gigabytes_a_second": round(context.bandwidth / 1e9, 1),
        "targets": {"ahead of its rivals": ours_median < min(medians)} if medians else {},
    }


def _as_row(case: RowCase) -> dict[str, Any]:
    shape: dict[str, Any] = {"operation": case.operation, "rows": case.rows}
    if case.operation != "draw_uniforms":
        shape |= {"vocab": case.vocab, "filters": case.filters, "dtype": "bfloat16"}
    if case.operation == "draw_candidates":
        shape |= {"k": case.k, "proposal": case.proposal}
    return shape


class Ours:
    """Our side of a row.

    Args:
        call: what is timed.
        check: what is wrong with its answer, or None.
        step: changed between replays, so that each draws other numbers.
    """

    def __init__(
        self, call: Callable[[], torch.Tensor], check: Callable[[], str | None], step: torch.Tensor | None = None
    ) -> None:
        self.call, self.check, self.step = call, check, step

    def load(self, i: int) -> None:
        """Before replay i."""
        if self.step is not None:
            self.step.fill_(i)


Sides = tuple[Ours, dict[str, Callable[[], Any]], int]


def _draw_candidates(case: RowCase, context: Context, logits: torch.Tensor) -> Sides:
    from mcsd_kernels._candidates_triton import draw_candidates_bytes

    seeds = torch.arange(case.rows, device=logits.device)
    step = torch.zeros((), dtype=torch.int64, device=logits.device)
    sampling = SamplingParams(**SAMPLING[case.filters])

    def call(backend: str = "triton") -> torch.Tensor:
        return draw_candidates(logits, case.k, seeds, step, proposal=case.proposal, sampling=sampling, backend=backend)

    def check() -> str | None:
        found, wanted = call(), call("torch")
        differing = int((found != wanted).any(1).sum())
        # float32 sums in two orders: a number next to a threshold falls on either side
        return None if differing <= 0.02 * case.rows + 1 else f"{differing} of {case.rows} rows are not torch's"

    k, replacement = case.k, case.proposal == "with_replacement"
    theirs: dict[str, Callable[[], Any]] = {}
    if case.proposal in ("point", "greedy"):
        theirs["torch.topk"] = lambda: rivals.most_probable(logits, k)
    elif case.filters == FILTERED:
        compiled = context.compiled(rivals.gumbel_top_k_of_few)
        theirs["top-k, Gumbel top-k of the k"] = lambda: rivals.gumbel_top_k_of_few(logits, k)
        theirs["compiled top-k, Gumbel top-k of the k"] = lambda: compiled(logits, k)
    else:
        theirs["softmax, torch.multinomial"] = lambda: rivals.multinomial(logits, k, replacement)
        if not replacement:
            compiled = context.compiled(rivals.gumbel_top_k)
            theirs["Gumbel top-k"] = lambda: rivals.gumbel_top_k(logits, k)
            theirs["compiled Gumbel top-k"] = lambda: compiled(logits, k)
    byte_count = draw_candidates_bytes(case.rows, case.vocab, logits.element_size(), k)
    return Ours(call, check, step), theirs, byte_count


def _row_cutoffs(case: RowCase, context: Context, logits: torch.Tensor) -> Sides:
    from mcsd_kernels import reference
    from mcsd_kernels._cutoffs_triton import row_cutoffs_bytes

    sampling = SamplingParams(**SAMPLING[case.filters])

    def call() -> torch.Tensor:
        return row_cutoffs(logits, sampling, backend="triton")

    def check() -> str | None:
        found = call()
        for i in sorted({0, case.rows - 1}):
            wanted = reference.row_cutoff(logits[i], **SAMPLING[case.filters])  # type: ignore[arg-type]
            if not agreement.keep_the_same(logits[i], float(found[i]), wanted):
                return f"row {i}: got {float(found[i])}, expected {wanted}"
        return None

    compiled = context.compiled(rivals.cutoffs)
    theirs = {
        "torch": lambda: rivals.cutoffs(logits, case.filters),
        "compiled torch": lambda: compiled(logits, case.filters),
    }
    return Ours(call, check), theirs, row_cutoffs_bytes(case.rows, case.vocab, logits.element_size())


def _draw_uniforms(case: RowCase, context: Context, logits: torch.Tensor) -> Sides:
    from mcsd_kernels._random_triton import draw_uniforms_bytes

    seeds = torch.arange(case.rows, device=logits.device)
    step = torch.zeros((), dtype=torch.int64, device=logits.device)
    count = 66

    def check() -> str | None:
        found, wanted = (draw_uniforms(seeds, step, count, backend=backend) for backend in ("triton", "torch"))
        return None if torch.equal(found, wanted) else "the numbers are not torch's"

    ours = Ours(lambda: draw_uniforms(seeds, step, count, backend="triton"), check, step)
    theirs = {"torch.rand": lambda: torch.rand(case.rows, count, device=logits.device)}
    return ours, theirs, draw_uniforms_bytes(case.rows, count)


OPERATIONS: dict[str, Callable[[RowCase, Context, torch.Tensor], Sides]] = {
    "draw_candidates": _draw_candidates,
    "row_cutoffs": _row_cutoffs,
    "draw_uniforms": _draw_uniforms,
}
