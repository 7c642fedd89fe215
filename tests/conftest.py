"""What the tests share: the device they run on, and the p-value of a law."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable

import pytest
import torch
from laws import chi_square

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
