"""`draw_candidates` in torch: a row's law and its block masses once, then each draw on a few numbers.

Long rows are taken one at a time, short ones together; which it is depends on the vocabulary alone, so that a row's
candidates do not depend on the rows beside it.
"""

from __future__ import annotations

import numpy as np
import torch

from . import _rows_torch as rows_torch
from ._rows_torch import Array, Sampling, first_above, host
from ._rules import MISSING
from .random import CANDIDATE_STREAM, uniforms
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
    sound = np.broadcast_to(~np.asarray(sampling.out_of_range(), dtype=bool), (rows,))
    tokens = np.full((rows, k), MISSING, np.int64)
    draws = {"point": 0, "greedy": 1}.get(proposal, k)
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    node = zero if nodes is None else nodes.long()
    at = zero + step if step_tensor is None else step_tensor.long()
    coins = host(uniforms(seeds, node, at, CANDIDATE_STREAM, 2 * draws)).reshape(rows, draws, 2)
    todo = np.flatnonzero(sound)
    size = rows_torch.chunk_rows(vocab)
    for start in range(0, len(todo), size):
        some = todo[start : start + size]
        logits = draft_logits[some[0] : some[0] + 1] if size == 1 else rows_torch.take(draft_logits, some)
        tokens[some] = _draw(logits, k, coins[some].tolist(), proposal, sampling.take(some.tolist()))
    return torch.from_numpy(tokens).to(draft_logits.device)


def _draw(logits: torch.Tensor, k: int, coins: list[list[list[float]]], proposal: str, sampling: Sampling) -> Array:
    """`[rows, k]` tokens of a chunk."""
    rows, vocab = logits.shape
    room = rows_torch.buffers(rows, vocab, logits.device)
    law = room.p if len(room.p) == rows else room.p[:rows]
    rows_torch.law(logits, sampling, law, None)
    certain = k - len(coins[0]) if rows else 0
    tokens = np.full((rows, k), MISSING, np.int64)
    if certain:
        tokens[:, :certain] = _most_probable(logits, law, certain)
    if not coins or not coins[0]:
        return tokens
    weights = room.weights[:rows]
    weights[:, :vocab].copy_(law)
    # the same memory on the CPU, a copy from elsewhere; either way nothing goes back
    inside = host(rows_torch.draw_blocks(weights))
    for row, pairs in enumerate(coins):
        for token in tokens[row, :certain].tolist():
            if token >= 0:
                inside[row].reshape(-1)[token] = 0.0
        tokens[row, certain:] = _draws(inside[row], pairs, proposal == "without_replacement")
    return tokens


def _draws(blocks: Array, coins: list[list[float]], struck_out: bool) -> list[int]:
    """Tokens by inverse CDF, block and then place; without replacement a drawn token's weight is gone afterwards.

    Args:
        blocks: `[blocks, DRAW_BLOCK]` f32 weights, written if `struck_out`.
        coins: a pair of uniform numbers for each draw.
        struck_out: draw without replacement.
    """
    masses = blocks.sum(1)
    found = []
    for u_block, u_place in coins:
        block = first_above(masses, u_block)
        if block < 0:
            found.append(MISSING)
            continue
        place = first_above(blocks[block], u_place)
        found.append(block * DRAW_BLOCK + place)
        if struck_out:
            blocks[block, place] = 0.0
            masses[block] = blocks[block].sum()  # summed afresh, so that nothing is left of a block used up
    return found


def _most_probable(logits: torch.Tensor, law: torch.Tensor, count: int) -> Array:
    """`[rows, count]`: the tokens of the largest logits that have mass, the lower id first among equals."""
    if count < logits.shape[-1]:
        top, index = logits.topk(count + 1, -1)  # one more, to see a tie across the end
        values = host(top.float())
        # topk's order among equals is its own, so any tie takes the slow way
        if (values[:, 1:] < values[:, :-1]).all() and bool((law.gather(-1, index[:, :count]) > 0).all()):
            return host(index[:, :count])
    found = np.full((law.shape[0], count), MISSING, np.int64)
    rest = torch.where(law > 0, logits.float(), -torch.inf)
    every = torch.arange(law.shape[0], device=law.device)
    for column in range(count):
        top = rest.amax(-1)
        best = rows_torch.first_argmax(rest, top)
        found[:, column] = np.where(host(top) > -np.inf, host(best), MISSING)
        rest[every, best] = -torch.inf
    return found
