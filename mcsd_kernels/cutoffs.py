"""`row_cutoffs`: what a row's filters keep, as one number."""

from __future__ import annotations

import numpy as np
import torch

from . import _checks as check
from . import _rows_torch as rows_torch
from ._backend import choose
from ._library import operator
from .sampling import SamplingParams, pack


def row_cutoffs(logits: torch.Tensor, sampling: SamplingParams, *, backend: str | None = None) -> torch.Tensor:
    """Find the cut-off of each row: top-k, top-p and min-p keep exactly the logits >= it.

    For top-k and top-p it is the lowest logit kept; min-p's, which may be the larger, need not be a logit of the row.

    Args:
        logits: `[rows, vocab]` f16, bf16 or f32, last axis contiguous.
        sampling: temperature and filters; tensors are `[rows]`.
        backend: "torch" or "triton"; None to choose by device.

    Returns:
        `[rows]` f32, in the units of the logits (not divided by the temperature). -inf where nothing is filtered: no
        filter is on, the temperature is 0, the row holds NaN, +inf or no finite entry, or one of its tensor-valued
        sampling parameters is out of range.

    Raises:
        ValueError: an argument's type, shape, dtype, stride, device or option is wrong.
    """
    check.tensor("logits", logits, (None, None), check.FLOATS)
    rows, vocab = logits.shape
    if vocab == 0:
        raise ValueError("logits: expected a vocabulary of at least one token, got 0")
    check.contiguous_last_axis("logits", logits)
    numbers, tensors = pack("sampling", sampling, rows, logits.device)
    return _OPERATOR(logits, numbers, tensors, choose(backend, logits.device))


def _row_cutoffs(
    logits: torch.Tensor, numbers: list[float], tensors: list[torch.Tensor | None], backend: str
) -> torch.Tensor:
    if backend == "triton":
        from . import _cutoffs_triton  # only here may triton be imported

        return _cutoffs_triton.row_cutoffs(logits, numbers, tensors)
    rows = logits.shape[0]
    cut = np.full(rows, -np.inf, np.float32)
    sampling = rows_torch.Sampling.on_host(numbers, tensors, rows)
    if sampling.plain is None and rows:
        top = rows_torch.host(logits.amax(-1).float())
        todo = np.flatnonzero(~np.asarray(sampling.out_of_range()) & (sampling.temperature > 0) & np.isfinite(top))
        if todo.size:
            some = sampling.take(todo.tolist())
            with np.errstate(all="ignore"):  # as in `verify`
                scale = (1.0 / some.temperature).astype(np.float32)
                cut[todo] = rows_torch.cutoffs(rows_torch.take(logits, todo).float(), scale, some)
    return torch.from_numpy(cut).to(logits.device)


def _fake(logits: torch.Tensor, numbers: list[float], tensors: list[torch.Tensor | None], backend: str) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


_OPERATOR = operator(
    "row_cutoffs(Tensor logits, float[] sampling, Tensor?[] sampling_tensors, str backend) -> Tensor",
    _row_cutoffs,
    _fake,
)
