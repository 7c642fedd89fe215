"""`draw_candidates` in torch: a row's law and its block masses once, then each draw on a few numbers.

Rows are taken together where that changes none of their bits: a row's candidates do not depend on the rows beside it.
"""

from __future__ import annotations

import numpy as np
import torch

from . import _rows_host as rows_host
from . import _rows_torch as rows_torch
from ._draw import Array, pick
from ._rows_torch import Sampling, host
from ._rules import MISSING
from .random import CANDIDATE_STREAM, uniform_lists
from .types import DRAW_BLOCK


def draw_candidates(
    draft_logits: torch.Tensor,
    k: int,
    seeds: torch.Tensor,
    step: int,
    step_tensor: torch.Tensor | None,
    proposal: str,
    numbers: list[float],
    tensors: list[torch.Tensor | None],
    nodes: torch.Tensor | None,
) -> torch.Tensor:
    """The operator behind `mcsd_kernels.draw_candidates`; arguments as there, already checked."""
    rows, vocab = draft_logits.shape
    sampling = Sampling.on_host(numbers, tensors, rows)
    wrong = sampling.out_of_range()
    todo = list(range(rows)) if wrong is False else np.flatnonzero(~np.asarray(wrong)).tolist()
    tokens = [[MISSING] * k] * rows
    draws = {"point": 0, "greedy": 1}.get(proposal, k)
    at = step if step_tensor is None else step_tensor
    numbers_drawn = uniform_lists(seeds, 0 if nodes is None else nodes, at, CANDIDATE_STREAM, 2 * draws)
    coins = [list(zip(row[0::2], row[1::2], strict=True)) for row in numbers_drawn]
    # with filters, and off the CPU, a long row's sums may depend on the rows beside it
    plain = sampling.plain is not None and draft_logits.is_cpu
    size = max(_PLAIN_ENTRIES // vocab, 1) if plain else rows_torch.chunk_rows(vocab)
    for start in range(0, len(todo), size):
        some = todo[start : start + size]
        adjacent = some[-1] - some[0] < len(some)  # no row between them was refused
        logits = draft_logits[some[0] : some[-1] + 1] if adjacent else draft_logits[some]
        for row, masses, blocks in zip(some, *_laws(logits, sampling.take(some)), strict=True):
            found = _most_probable(draft_logits[row], blocks, k - draws) if k > draws else []
            tokens[row] = found + _draws(masses, blocks, coins[row], found, proposal == "without_replacement")
    drawn = torch.from_numpy(np.array(tokens, np.int64).reshape(rows, k))
    return drawn if draft_logits.is_cpu else drawn.to(draft_logits.device)


# of float32, in a core's own cache beside the logits
_PLAIN_ENTRIES = 1 << 16


def _laws(logits: torch.Tensor, sampling: Sampling) -> tuple[list[list[float]], Array]:
    """The laws of some rows on the host: the masses of their blocks, and the blocks."""
    rows, vocab = logits.shape
    room = rows_torch.buffers(rows, vocab, logits.device).first(rows)
    if sampling.plain is not None and room.blocks_on_host is not None:
        return rows_host.plain_laws(logits, sampling.plain, room), room.blocks_on_host
    rows_torch.law(logits, sampling, room.weights, None)
    return room.blocks.sum(-1).tolist(), host(room.blocks)


def _draws(
    masses: list[float], blocks: Array, coins: list[tuple[float, float]], without: list[int], struck_out: bool
) -> list[int]:
    """Tokens by inverse CDF; without replacement a drawn token's weight is gone afterwards.

    Args:
        masses: the sums of the blocks; written where a token's weight goes, as are these.
        blocks: `[blocks, DRAW_BLOCK]` f32 weights.
        coins: a pair of uniform numbers for each draw.
        without: tokens whose weight goes before the first draw.
        struck_out: draw without replacement.
    """
    for certain in without if coins else ():
        if certain != MISSING:
            _strike_out(certain, masses, blocks)
    found: list[int] = []
    for u_block, u_place in coins:
        if struck_out and found and found[-1] != MISSING:
            _strike_out(found[-1], masses, blocks)
        token = pick(masses, blocks, u_block, u_place)
        found.append(MISSING if token is None else token)
    return found


def _strike_out(token: int, masses: list[float], blocks: Array) -> None:
    """Take a token's weight away; its block is summed afresh, so that nothing is left of one used up."""
    block = token // DRAW_BLOCK
    blocks[block, token % DRAW_BLOCK] = 0.0
    masses[block] = float(np.add.reduce(blocks[block]))


def _most_probable(logits: torch.Tensor, blocks: Array, count: int) -> list[int]:
    """The tokens of the largest logits that have mass, the lower id first among equals.

    Args:
        logits: `[vocab]`.
        blocks: `[blocks, DRAW_BLOCK]`, the row's law.
        count: how many.
    """
    vocab, law = logits.shape[0], blocks.reshape(-1)
    rest = logits.float()
    if _ONE_BY_ONE < count < vocab:
        top, index = (host(part) for part in rest.topk(count + 1))  # one more, to see a tie at the end
        # topk's order among equals is its own, so any tie takes the other way
        if (top[1:] < top[:-1]).all() and (law[index[:count]] > 0).all():
            found: list[int] = index[:count].tolist()
            return found
    values = np.array(host(rest))
    found = []
    for _ in range(min(count, vocab)):
        best = int(values.argmax())  # NaN wins, and has no mass
        if not (values[best] > -np.inf and law[best] > 0):
            break
        found.append(best)
        values[best] = -np.inf
    return found + [MISSING] * (count - len(found))


# up to so many, looking for the largest logit again and again is quicker than any sort
_ONE_BY_ONE = 16
