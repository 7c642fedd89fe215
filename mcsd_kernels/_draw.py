"""A draw by inverse CDF in two steps, on the host: a block of weights, then the place in it."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np

from .types import DRAW_BLOCK

Array = np.ndarray[Any, Any]


def pick(masses: list[float], blocks: Array, u_block: float, u_place: float) -> int | None:
    """One token by inverse CDF in two steps: a block of weights, then the place in it; None where there is no mass.

    Args:
        masses: `[blocks]`, the sums of the blocks.
        blocks: `[blocks, DRAW_BLOCK]` weights.
        u_block, u_place: in [0, 1).
    """
    block = choose_block(masses, u_block)
    if block < 0:
        return None
    place = first_above(blocks[block], u_place)
    return block * DRAW_BLOCK + place if place >= 0 else None  # numbers that are no weights may sum up differently


def choose_block(masses: list[float], u: float) -> int:
    """`first_above` of a few numbers."""
    above = list(accumulate(masses))
    if not above[-1] > 0.0:
        return -1
    index = bisect_right(above, above[-1] * u)
    return index if index < len(masses) else max(i for i, mass in enumerate(masses) if mass > 0.0)  # infinite ones


def first_above(weights: Array, u: float) -> int:
    """The first index whose cumulative weight exceeds u times the total, never one of weight zero; -1 without mass."""
    above = weights.cumsum()
    total = above[-1]
    if not total > 0:
        return -1
    index = int(above.searchsorted(total * np.float32(u), "right"))
    if index < len(weights):
        return index
    return int(np.flatnonzero(weights > 0)[-1])  # u * total was rounded up to the total
