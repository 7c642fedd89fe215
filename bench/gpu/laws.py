"""The law of what is emitted: short texts by repeated calls, a million of them, against their exact probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from mcsd_kernels import SamplingParams, draw_candidates, draw_uniforms, reference, verify

from .plan import RULES, Sizes, Tree
from .units import Context, Unit

# Seeds are fixed, so a law either fails or does not; this is how often a right one would have.
SMALLEST_P = 1e-4
CONTROL_P = 1e-6
FILTERED = {"temperature": 0.8, "top_k": 8, "top_p": 0.9}

# name -> (proposal, the mistake)
CONTROLS = {
    "candidates sorted by their probability": ("without_replacement", {"order": "sorted"}),
    "coins that depend on the position alone": ("without_replacement", {"fixed_coins": True}),
    "drawn with replacement, verified as without": ("with_replacement", {"verified_as": "without_replacement"}),
    "the most probable, verified as drawn": ("point", {"verified_as": "without_replacement"}),
}


def units(sizes: Sizes) -> list[Unit]:
    """The laws, some of them with filters, and the mistakes that must show."""
    found = [Unit("laws", f"law {rule} {proposal}", partial(law, rule, proposal, {})) for rule, proposal in sizes.every]
    found += [
        Unit("laws", f"control {rule}: {name}", partial(control, rule, name))
        for rule in (("recursive",) if sizes.smoke else RULES)
        for name in (list(CONTROLS)[:1] if sizes.smoke else CONTROLS)
    ]
    found += [
        Unit("laws", f"law {rule} {proposal} filtered", partial(law, rule, proposal, FILTERED))
        for rule, proposal in (sizes.every[:1] if sizes.smoke else sizes.every)
    ]
    return found


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """p-value and total variation of counts against a law.

    Outcomes of fewer than 5 expected counts, where the chi-square law is a poor approximation, become one cell. An
    outcome that the law excludes has p = 0.

    Args:
        counts: how often each outcome was seen.
        expected: their probabilities.
    """
    counts, expected = counts.double().cpu(), expected.double().cpu()
    trials = counts.sum()
    variation = float((counts / trials - expected).abs().sum() / 2)
    if bool(((expected == 0) & (counts > 0)).any()):
        return 0.0, variation
    wanted = expected * trials
    rare = wanted < 5
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, wanted)]
    kept = cells[1] > 0
    statistic = ((cells[0] - cells[1])[kept] ** 2 / cells[1][kept]).sum()
    freedom = torch.tensor(max(int(kept.sum()) - 1, 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)), variation


def tables(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits `[vocab, vocab]` of target and draft: row t is the law of what follows token t."""
    random = torch.Generator().manual_seed(1)
    target = torch.randn(sizes.law_vocab, sizes.law_vocab, generator=random)
    return target, target + torch.randn(sizes.law_vocab, sizes.law_vocab, generator=random)


def expected_law(target: torch.Tensor, length: int, numbers: dict[str, float]) -> torch.Tensor:
    """Probabilities of the texts of `length` tokens that follow token 0, flattened."""
    step = torch.stack([torch.from_numpy(reference.row_law(row, **numbers)) for row in target])  # type: ignore[arg-type]
    law = step[0]
    for _ in range(length - 1):
        law = law[..., None] * step
    return law.flatten()


def texts(
    context: Context,
    rule: str,
    proposal: str,
    numbers: dict[str, float],
    seeds: torch.Tensor,
    *,
    order: str = "drawn",
    fixed_coins: bool = False,
    verified_as: str | None = None,
) -> torch.Tensor:
    """`[requests, law_length]` tokens after token 0, by as many calls as it takes.

    Args:
        context: where.
        rule, proposal: of the calls.
        numbers: sampling parameters, of target and draft.
        seeds: one a request.
        order: a mistake: "sorted" hands the candidates over by their probability.
        fixed_coins: a mistake: every call uses the first one's uniform numbers.
        verified_as: a mistake: the proposal that `verify` is told.
    """
    device, sizes = context.device.device, context.sizes
    target, draft = (table.to(device) for table in tables(sizes))
    tree, sampling = Tree(sizes.law_tree), SamplingParams(**numbers)
    count, nodes, length = len(seeds), len(tree.parents), sizes.law_length
    parents = torch.tensor(tree.parents, device=device)
    text = torch.full((count, length), -1, dtype=torch.int64, device=device)
    filled = torch.zeros(count, dtype=torch.int64, device=device)
    last = torch.zeros(count, dtype=torch.int64, device=device)
    for step in range(length):
        tokens = torch.zeros(count, nodes, dtype=torch.int64, device=device)
        tokens[:, 0] = last
        for node, children in tree.children().items():
            rows = draft[tokens[:, node].clamp(min=0)]
            drawn = draw_candidates(
                rows, len(children), seeds, step, proposal=proposal, sampling=sampling,
                nodes=torch.full_like(seeds, node), backend="triton",
            )  # fmt: skip
            if order == "sorted":
                probability = torch.where(drawn >= 0, rows.gather(1, drawn.clamp(min=0)), float("-inf"))
                drawn = drawn.gather(1, probability.argsort(1, descending=True))
            # nothing hangs below a candidate that is missing
            tokens[:, children[0] : children[-1] + 1] = torch.where(tokens[:, node, None] >= 0, drawn, -1)
        # a node's rows are those of its token
        picked = tokens.clamp(min=0).int()
        result = verify(
            target, None if (verified_as or proposal) == "point" else draft, tokens, parents,
            draw_uniforms(seeds, 0 if fixed_coins else step, nodes + 2, backend="triton"),
            proposal=verified_as or proposal, rule=rule, sampling=sampling, target_rows=picked,
            draft_rows=None if (verified_as or proposal) == "point" else picked, max_depth=tree.depth, backend="triton",
        )  # fmt: skip
        assert not bool(result.status.any()), f"status {result.status.unique().tolist()}"
        for i in range(tree.depth + 1):
            there = (i < result.length) & (filled < length)
            place = filled.clamp(max=length - 1)[:, None]
            value = torch.where(there, result.tokens[:, i], text.gather(1, place)[:, 0])
            text.scatter_(1, place, value[:, None])
            filled += there
        last = result.tokens.gather(1, result.length[:, None].long() - 1)[:, 0]
    return text


def tested(
    context: Context, rule: str, proposal: str, numbers: dict[str, float], **mistakes: Any
) -> tuple[float, float, int]:
    """p-value, total variation and number of texts."""
    sizes = context.sizes
    outcomes = sizes.law_vocab**sizes.law_length
    counts = torch.zeros(outcomes, dtype=torch.int64)
    for start in range(0, sizes.law_requests, sizes.law_chunk):
        seeds = torch.arange(start, min(start + sizes.law_chunk, sizes.law_requests), device=context.device.device)
        text = texts(context, rule, proposal, numbers, seeds, **mistakes)
        number = text[:, 0]
        for i in range(1, sizes.law_length):
            number = number * sizes.law_vocab + text[:, i]
        counts += torch.bincount(number, minlength=outcomes).cpu()
    return *chi_square(counts, expected_law(tables(sizes)[0], sizes.law_length, numbers)), int(counts.sum())


def law(rule: str, proposal: str, numbers: dict[str, float], context: Context) -> Iterator[dict[str, Any]]:
    """The texts have the target's law."""
    p, variation, count = tested(context, rule, proposal, numbers)
    yield {
        "bench": "gpu-law",
        "status": "ok" if p > SMALLEST_P else "failed",
        "case": {"rule": rule, "proposal": proposal, "vocab": context.sizes.law_vocab, "sampling": numbers},
        "texts": count,
        "p": p,
        "total_variation": round(variation, 6),
        "wanted": f"p > {SMALLEST_P:g}",
    }


def control(rule: str, name: str, context: Context) -> Iterator[dict[str, Any]]:
    """A mistake shows, so the laws above could have failed."""
    proposal, mistakes = CONTROLS[name]
    p, variation, count = tested(context, rule, proposal, {}, **mistakes)  # type: ignore[arg-type]
    shows = p < CONTROL_P or context.sizes.smoke  # a smoke run has too few texts to see anything
    yield {
        "bench": "gpu-law-control",
        "status": "ok" if shows else "failed",
        "case": {"rule": rule, "proposal": proposal, "vocab": context.sizes.law_vocab, "mistake": name},
        "texts": count,
        "p": p,
        "total_variation": round(variation, 6),
        "wanted": f"p < {CONTROL_P:g}",
    }
