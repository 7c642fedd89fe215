"""What `verify` returns: the result tuple, its status bits, and the constants both backends and the oracle share."""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple

import torch

# A draw looks first for a block of this many consecutive token ids, then for a place inside that block.
DRAW_BLOCK = 1024

# A temperature between 0 and this counts as this: 1 / temperature has to fit float32.
LEAST_TEMPERATURE = 1 / 3e38

# The token of a request that could not be verified: a valid id, so that nobody indexes with -1 by accident.
PLACEHOLDER = 0


class Status(IntFlag):
    """Why a request was not verified as usual; 0 means that nothing was wrong.

    With any bit but `BAD_TOKEN` the last token emitted is a placeholder, 0, and no draw: leave it out.
    """

    NAN_ROW = 1
    """A visited row holds a NaN or +inf, or as a law a sum that is none: the walk stops there."""
    EMPTY_ROW = 2
    """A visited row has no finite entry: the walk stops there."""
    BAD_TOKEN = 4
    """A node's token is below -1 or not below the vocabulary's size: the node is skipped."""
    BAD_TREE = 8
    """The parents, or a row index, do not describe a tree over the rows: nothing is accepted."""
    BAD_UNIFORM = 16
    """A uniform number is NaN or outside [0, 1): nothing is accepted."""
    BAD_SAMPLING = 32
    """A sampling parameter given as a tensor is out of range: nothing is accepted."""


class Verified(NamedTuple):
    """The verdict on a batch of token trees, on the device of the logits.

    Args:
        path: `[batch, max_depth + 1]` int32, the accepted node ids from the root on (`path[:, 0]` is 0), -1 after the
            end. An accepted virtual node has no row to go on from and is not in it.
        length: `[batch]` int32, how many tokens are emitted, which is also how many entries of `path` are valid.
        tokens: `[batch, max_depth + 1]` int64, the accepted tokens and then the drawn one (with some bits of `status` a
            placeholder, see `Status`), -1 after the end.
        status: `[batch]` int32, 0 or `Status` bits.
    """

    path: torch.Tensor
    length: torch.Tensor
    tokens: torch.Tensor
    status: torch.Tensor
