"""`draw_candidates`: a node's children, drawn exactly as `verify` assumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import _candidates_torch
from . import _checks as check
from ._backend import choose
from ._library import operator
from .random import check_step
from .sampling import SamplingParams, pack
from .verify import PROPOSALS


def draw_candidates(
    draft_logits: torch.Tensor,
    k: int,
    seeds: torch.Tensor,
    step: int | torch.Tensor,
    *,
    proposal: str = "without_replacement",
    sampling: SamplingParams = SamplingParams(),
    nodes: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Draw k children for each row of draft logits, in draw order.

    Without replacement, each draw is from what the earlier ones left of the row's law: the law of Gumbel top-k, by
    inverse CDF, which needs two uniform numbers a draw where Gumbel noise needs one a token. "with_replacement" draws
    independently; "greedy" takes the k - 1 most probable tokens and then one draw from the rest; "point" takes the k
    most probable ones (ties: the lower id first).

    Args:
        draft_logits: `[rows, vocab]` f16, bf16 or f32, last axis contiguous.
        k: candidates a row, >= 1.
        seeds: `[rows]` int64, each row's request.
        step: number of the call, an int or a `[rows]` tensor; see `draw_uniforms`. The two functions never share
            random numbers.
        proposal: "without_replacement", "with_replacement", "greedy" or "point".
        sampling: temperature and filters of the draft; tensors are `[rows]`.
        nodes: `[rows]` int32 or int64, each row's node in its tree: rows of one request at one step must differ in it,
            or they get the same random numbers. None: 0 for every row.
        backend: "torch" or "triton"; None to choose by device.

    Returns:
        `[rows, k]` int64 in draw order. -1 where the row has too few tokens with mass, and for a whole row that holds
        NaN, +inf or no finite entry, or whose tensor-valued sampling parameters are out of range.

    Raises:
        ValueError: an argument's type, shape, dtype, stride, device or option is wrong.

    Source: Kool et al., "Stochastic beams and where to find them", ICML 2019 (the law of Gumbel top-k); Hu et al.,
    arXiv 2502.18779 ("greedy").
    """
    check.choice("proposal", proposal, PROPOSALS)
    check.tensor("draft_logits", draft_logits, (None, None), check.FLOATS)
    rows, vocab = draft_logits.shape
    if vocab == 0:
        raise ValueError("draft_logits: expected a vocabulary of at least one token, got 0")
    check.contiguous_last_axis("draft_logits", draft_logits)
    k = check.whole("k", k, 1)
    check.tensor("seeds", seeds, (rows,), (torch.int64,))
    step_number, step_tensor = check_step(step, seeds)
    if nodes is not None:
        check.tensor("nodes", nodes, (rows,), check.INTEGERS)
    check.same_device("draft_logits", draft_logits, {"seeds": seeds, "nodes": nodes})
    numbers, tensors = pack("sampling", sampling, rows, draft_logits.device)
    chosen = choose(backend, draft_logits.device)
    return _OPERATOR(draft_logits, k, seeds, step_number, step_tensor, proposal, numbers, tensors, nodes, chosen)


def _draw_candidates(*arguments: Any) -> torch.Tensor:
    *rest, backend = arguments
    if backend == "triton":
        from . import _candidates_triton  # only here may triton be imported

        return _candidates_triton.draw_candidates(*rest)
    with np.errstate(all="ignore"):  # as in `verify`
        return _candidates_torch.draw_candidates(*rest)


def _fake(
    draft_logits: torch.Tensor,
    k: int,
    seeds: torch.Tensor,
    step: int,
    step_tensor: torch.Tensor | None,
    proposal: str,
    numbers: list[float],
    tensors: list[torch.Tensor | None],
    nodes: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    return draft_logits.new_empty(draft_logits.shape[0], k, dtype=torch.int64)


_OPERATOR = operator(
    "draw_candidates(Tensor draft_logits, SymInt k, Tensor seeds, SymInt step, Tensor? step_tensor, str proposal,"
    " float[] sampling, Tensor?[] sampling_tensors, Tensor? nodes, str backend) -> Tensor",
    _draw_candidates,
    _fake,
)
