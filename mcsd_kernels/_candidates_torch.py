"""`draw_candidates` in torch: a row's law and its block masses once, then each draw on a few numbers.

Long rows are taken one at a time, short ones together; which it is depends on the vocabulary alone, so that a row's
candidates do not depend on the rows beside it.
"""

from __future__ import annotations

import numpy as np
import torch

from . import _rows_torch as rows_torch
from ._rows_torch import Array, Sampling, host, pick
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
    size = rows_torch.chunk_rows(vocab)
    if size == 1:
        room = rows_torch.buffers(1, vocab, draft_logits.device)
        for row in todo:
            masses, blocks = _law_alone(draft_logits, row, sampling.take([row]), room)
            tokens[row] = _draw(draft_logits[row], masses, blocks, k, coins[row], proposal)
    else:
        for start in range(0, len(todo), size):
            some = todo[start : start + size]
            laws = _laws(rows_torch.take(draft_logits, np.array(some)), sampling.take(some))
            for row, masses, blocks in zip(some, *laws, strict=True):
                tokens[row] = _draw(draft_logits[row], masses, blocks, k, coins[row], proposal)
    return torch.from_numpy(np.array(tokens, np.int64).reshape(rows, k)).to(draft_logits.device)


def _law_alone(
    logits: torch.Tensor, row: int, sampling: Sampling, room: rows_torch.Buffers
) -> tuple[list[float], Array]:
    """One row's law on the host: the masses of its blocks, and the blocks."""
    if sampling.plain is None or rows_torch.plain_law(logits[row], sampling.plain, room.first_weights):
        rows_torch.law(logits[row : row + 1], sampling, room.first_weights.row[None], None)
    return room.sum_blocks(), host(room.first_blocks)


def _laws(logits: torch.Tensor, sampling: Sampling) -> tuple[list[list[float]], Array]:
    """The same for several rows."""
    rows, vocab = logits.shape
    room = rows_torch.buffers(rows, vocab, logits.device)
    weights, blocks = room.weights[:rows], room.blocks[:rows]
    rows_torch.law(logits, sampling, weights[:, :vocab], None)
    return blocks.sum(-1).tolist(), host(blocks)


def _draw(
    logits: torch.Tensor, masses: list[float], blocks: Array, k: int, coins: list[tuple[float, float]], proposal: str
) -> list[int]:
    """The k candidates of a row; its law is written."""
    found = _most_probable(logits, blocks, k - len(coins)) if k > len(coins) else []
    if coins:
        for token in found:
            if token >= 0:
                _strike_out(token, masses, blocks)
        found += _draws(masses, blocks, coins, proposal == "without_replacement")
    return found


def _draws(masses: list[float], blocks: Array, coins: list[tuple[float, float]], struck_out: bool) -> list[int]:
    """Tokens by inverse CDF; without replacement a drawn token's weight is gone afterwards.

    Args:
        masses: the sums of the blocks; written if `struck_out`, as are these.
        blocks: `[blocks, DRAW_BLOCK]` f32 weights.
        coins: a pair of uniform numbers for each draw.
        struck_out: draw without replacement.
    """
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
    masses[block] = float(blocks[block].sum())


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
