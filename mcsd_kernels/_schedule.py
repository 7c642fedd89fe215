"""How `verify` is launched on a GPU: a table, and a pure function that reads it."""

from __future__ import annotations

from dataclasses import dataclass

from .types import DRAW_BLOCK


@dataclass(frozen=True)
class Launch:
    """Launch choices of `verify`; none of them changes the answer.

    Args:
        tile_blocks: draw blocks that a program reads at once.
        num_warps: warps of a program that reads rows.
    """

    tile_blocks: int
    num_warps: int


# Longest vocabulary in draw blocks -> launch; the last entry serves all the longer ones. Not timed yet: the tile is the
# one with which no kernel spills registers.
_LAUNCHES = {1: Launch(tile_blocks=1, num_warps=4)}
_LONGER = Launch(tile_blocks=4, num_warps=8)


def choose_launch(vocab: int) -> Launch:
    """The launch for rows of `vocab` tokens."""
    blocks = -(-vocab // DRAW_BLOCK)
    return next((launch for most, launch in _LAUNCHES.items() if blocks <= most), _LONGER)
