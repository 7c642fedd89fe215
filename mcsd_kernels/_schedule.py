"""How the kernels over rows are launched: tables, and pure functions that read them.

Attention has a table of its own, beside its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .types import DRAW_BLOCK

SCHEDULES = ("walk", "split")


@dataclass(frozen=True)
class RowLaunch:
    """A kernel that reads whole rows, one program a row; no choice changes a result.

    Args:
        tile_blocks: draw blocks that a program reads at once.
        num_warps: warps of a program.
    """

    tile_blocks: int
    num_warps: int


@dataclass(frozen=True)
class Launch:
    """Launch choices of `verify`; none of them changes the answer.

    Args:
        schedule: "walk", one program a request visits the rows on its own way; or "split", the rows of all nodes are
            measured and swept in parallel first, and the walk that follows reads what they left.
        tile_blocks, num_warps: as in `RowLaunch`.
        chunk_blocks: split: draw blocks of a row that one program reads.
        waves: split: launches of sweeps at most; what would take more is left to the walk, which sweeps by itself.
    """

    schedule: str
    tile_blocks: int
    num_warps: int
    chunk_blocks: int
    waves: int


# Nothing here is timed yet. The tiles are those with which no kernel spills registers.
# Longest vocabulary in draw blocks -> launch; the last entry serves all the longer ones.
_ROWS = {1: RowLaunch(tile_blocks=1, num_warps=4)}
_LONGER = RowLaunch(tile_blocks=2, num_warps=8)

# Rows of fewer draw blocks are read faster than a second kernel is launched.
_FEWEST_SPLIT_BLOCKS = 8
# With a program for every other processor, a walk keeps the memory busy.
_FULL = 0.5
_CHUNK_BLOCKS = 8
_WAVES = 6
# Of a device that does not say: an H200's.
_PROCESSORS = 132


def choose_row_launch(vocab: int) -> RowLaunch:
    """The launch for rows of `vocab` tokens."""
    blocks = -(-vocab // DRAW_BLOCK)
    return next((launch for most, launch in _ROWS.items() if blocks <= most), _LONGER)


def choose_launch(batch: int, nodes: int, vocab: int, device: torch.device) -> Launch:
    """The launch of `verify`: split while few requests leave processors idle, and there are rows to split."""
    idle = batch < _FULL * processors(device)
    split = idle and vocab > _FEWEST_SPLIT_BLOCKS * DRAW_BLOCK
    waves = min(_WAVES, max(nodes - 1, 0))
    row = choose_row_launch(vocab)
    return Launch("split" if split else "walk", row.tile_blocks, row.num_warps, _CHUNK_BLOCKS, waves)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; of a device that is not there, an H200's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def every_register() -> dict[str, int]:
    """A launch option: NVIDIA's assembler may use every register.

    Else it spills some for the sake of more resident programs than there are.
    """
    return {"maxnreg": 255} if torch.version.hip is None else {}
