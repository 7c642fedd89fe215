"""What the tests share: the device they run on, and the p-value of a law."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable

import numpy as np
import pytest
import torch
from scipy import stats

PValue = Callable[[Iterable[tuple[Hashable, float]], dict[Hashable, int]], float]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests put their tensors: an accelerator if there is one, and the CPU under Triton's interpreter."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    return torch.device(accelerator.type, 0)


@pytest.fixture(scope="session")
def p_value() -> PValue:
    """Pearson's chi-square of counts against a law; an outcome that the law excludes has p = 0."""
    return chi_square


def chi_square(law: Iterable[tuple[Hashable, float]], counts: dict[Hashable, int]) -> float:
    """The probability of counts at least this far from the law.

    Outcomes of fewer than 5 expected counts, where the chi-square law is a poor approximation, become one cell.

    Args:
        law: (outcome, probability) pairs.
        counts: outcome -> how often it was seen.
    """
    expected = {outcome: probability for outcome, probability in law if probability > 0}
    if not set(counts) <= set(expected):
        return 0.0
    trials = sum(counts.values())
    outcomes = list(expected)
    wanted = np.array([expected[outcome] for outcome in outcomes]) * trials
    assert abs(wanted.sum() - trials) < 1e-6 * trials, "the law does not sum to 1"
    found = np.array([counts.get(outcome, 0) for outcome in outcomes], dtype=float)
    rare = wanted < 5
    cells = np.array([*wanted[~rare], wanted[rare].sum()]), np.array([*found[~rare], found[rare].sum()])
    kept = cells[0] > 0
    statistic = float(((cells[1] - cells[0])[kept] ** 2 / cells[0][kept]).sum())
    return float(stats.chi2.sf(statistic, max(int(kept.sum()) - 1, 1)))
