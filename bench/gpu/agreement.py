"""Whether an answer is the oracle's."""

from __future__ import annotations

from typing import Any

import torch

from mcsd_kernels import Verified, reference

# A float32 decision may differ from the float64 one where the latter is closer than this to its threshold.
CLOSE_CALL = 1e-5

Arguments = tuple[Any, ...]


def same(found: Verified, wanted: Verified) -> bool:
    """Whether two results are equal in every bit."""
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(found, wanted, strict=True))


def unlike(found: Verified, wanted: Verified) -> list[int]:
    """The requests whose path, length, tokens or status differ."""
    count = len(wanted.length)
    equal = [(a.cpu() == b.cpu()).reshape(count, -1).all(1) for a, b in zip(found, wanted, strict=True)]
    return (~torch.stack(equal).all(0)).nonzero().flatten().tolist()


def against_oracle(found: Verified, arguments: Arguments, options: dict[str, Any]) -> tuple[list[str], int]:
    """Compare `verify`'s answer with the oracle's for the same arguments.

    Returns:
        what is wrong, one line a request; and how many requests differ by a close call, which is not wrong.
    """
    wanted = reference.verify(*arguments, **options)
    differing = unlike(found, wanted)
    if not differing:
        return [], 0
    _, margins = reference.verify(*arguments, **options, return_margin=True)
    wrong = []
    for b in differing:
        if margins[b] >= CLOSE_CALL:
            got, want = ([field[b].tolist() for field in result] for result in (found, wanted))
            wrong.append(f"request {b}: got {got}, expected {want}, margin {float(margins[b]):.2e}")
    return wrong, len(differing) - len(wrong)


def keep_the_same(logits: torch.Tensor, cutoff: float, other: float) -> bool:
    """Whether two cut-offs keep the same logits; min-p's need not be one of them."""
    return bool(torch.equal(logits.float() >= cutoff, logits.float() >= other))
