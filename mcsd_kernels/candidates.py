"""`draw_candidates`: a node's children, drawn exactly as `verify` assumes."""

from __future__ import annotations

import numpy as np
import torch

from . import _checks as check
from . import _rows_torch as rows_torch
from ._library import operator
from ._rows_torch import Array, Sampling, host
from .random import CANDIDATE_STREAM, check_step, uniforms
from .sampling import SamplingParams, pack
from .types import DRAW_BLOCK
from .verify import PROPOSALS

MISSING = -1


def draw_candidates(
    draft_logits: torch.Tensor,
    k: int,
    seeds: torch.Tensor,
    step: int | torch.Tensor,
    *,
    proposal: str = "without_replacement",
    sampling: SamplingParams = SamplingParams(),
    nodes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw k children for each row of draft logits, in draw order.

    Without replacement, each draw is from what the earlier ones left of the row's law: the law of Gumbel top-k, by
    inverse CDF, which needs two uniform numbers a draw where Gumbel noise needs one a token. "with_replacement" draws
    independently; "greedy" takes the k - 1 most probable tokens and then one draw from the rest; "point" takes the k
    most probable ones (ties: the lower id first).

    Args:
        draft_logits: `[rows, vocab]` f16, bf16 or f32, last axis contiguous.
        k: candidates a row, >= 1.
        seeds: `[rows]` int64, each row's request.
        step: number of the call, an int or a `[rows]` tensor; see `draw_uniforms`. The two functions never share
            random numbers.
        proposal: "without_replacement", "with_replacement", "greedy" or "point".
        sampling: temperature and filters of the draft; tensors are `[rows]`.
        nodes: `[rows]` int32 or int64, each row's node in its tree: rows of one request at one step must differ in it,
            or they get the same random numbers. None: 0 for every row.

    Returns:
        `[rows, k]` int64 in draw order. -1 where the row has too few tokens with mass, and for a whole row that holds
        NaN, +inf or no finite entry, or whose tensor-valued sampling parameters are out of range.

    Raises:
        ValueError: an argument's type, shape, dtype, stride, device or option is wrong.

    Source: Kool et al., "Stochastic beams and where to find them", ICML 2019 (the law of Gumbel top-k); Hu et al.,
    arXiv 2502.18779 ("greedy").
    """
    check.choice("proposal", proposal, PROPOSALS)
    check.tensor("draft_logits", draft_logits, (None, None), check.FLOATS)
    rows, vocab = draft_logits.shape
    if vocab == 0:
        raise ValueError("draft_logits: expected a vocabulary of at least one token, got 0")
    check.contiguous_last_axis("draft_logits", draft_logits)
    check.whole("k", k, 1)
    check.tensor("seeds", seeds, (rows,), (torch.int64,))
    step_tensor = check_step(step, seeds)
    if nodes is not None:
        check.tensor("nodes", nodes, (rows,), check.INTEGERS)
    check.same_device("draft_logits", draft_logits, {"seeds": seeds, "nodes": nodes})
    numbers, tensors = pack("sampling", sampling, rows, draft_logits.device)
    step_number = 0 if isinstance(step, torch.Tensor) else step
    drawn: torch.Tensor = _OPERATOR(draft_logits, k, seeds, step_number, step_tensor, proposal, numbers, tensors, nodes)
    return drawn


def _draw_candidates(
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
    rows, vocab = draft_logits.shape
    sampling = Sampling.on_host(numbers, tensors, rows)
    sound = np.broadcast_to(~np.asarray(sampling.out_of_range()), (rows,))
    tokens = np.full((rows, k), MISSING, np.int64)
    u = np.zeros((rows, 0), np.float32)
    draws = {"point": 0, "greedy": 1}.get(proposal, k)
    if draws:
        zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
        node = zero if nodes is None else nodes.long()
        at = zero + step if step_tensor is None else step_tensor.long()
        u = host(uniforms(seeds, node, at, CANDIDATE_STREAM, 2 * draws))
    todo = np.flatnonzero(sound)
    size = rows_torch.chunk_rows(vocab)
    for start in range(0, len(todo), size):
        some = todo[start : start + size]
        logits = rows_torch.take(draft_logits, some)
        room = rows_torch.buffers(len(some), vocab, logits.device)
        law, weights = room.p[: len(some)], room.weights[: len(some)]
        rows_torch.law(logits, sampling.take(some.tolist()), law, None)
        chosen = k - draws if proposal in ("point", "greedy") else 0
        tokens[some, :chosen] = _most_probable(logits, law, chosen)
        masses = _weigh(law, weights, tokens[some, :chosen])
        for draw in range(draws):
            found, masses = _draw_one(weights, masses, u[some, 2 * draw], u[some, 2 * draw + 1], proposal)
            tokens[some, chosen + draw] = found
    return torch.from_numpy(tokens).to(draft_logits.device)


def _most_probable(logits: torch.Tensor, law: torch.Tensor, count: int) -> Array:
    """`[rows, count]`: the tokens of the largest logits that have mass, the lower id first among equals."""
    rows = law.shape[0]
    found = np.full((rows, count), MISSING, np.int64)
    if not count:
        return found
    rest = torch.where(law > 0, logits.float(), -torch.inf)
    every = torch.arange(rows, device=law.device)
    for column in range(count):
        top = rest.amax(-1)
        best = rows_torch.first_argmax(rest, top)
        found[:, column] = np.where(host(top) > -np.inf, host(best), MISSING)
        rest[every, best] = -torch.inf
    return found


def _weigh(law: torch.Tensor, weights: torch.Tensor, without: Array) -> Array:
    """Copy the law without some tokens into the weights; returns the masses of their blocks."""
    rows, vocab = law.shape
    weights[:, :vocab].copy_(law)
    at, column = np.nonzero(without >= 0)
    if at.size:
        device = law.device
        weights[torch.from_numpy(at).to(device), torch.from_numpy(without[at, column]).to(device)] = 0.0
    return host(weights.view(rows, -1, DRAW_BLOCK).sum(-1)).copy()


def _draw_one(
    weights: torch.Tensor, masses: Array, u_block: Array, u_place: Array, proposal: str
) -> tuple[Array, Array]:
    """One draw a row; without replacement the token's weight is then gone and its block is summed afresh."""
    tokens = rows_torch.draw(weights, masses, u_block.tolist(), u_place.tolist())
    found = np.array([MISSING if token is None else token for token in tokens])
    drawn = found >= 0
    if proposal == "without_replacement" and drawn.any():
        at = np.flatnonzero(drawn)
        rows = torch.from_numpy(at).to(weights.device)
        weights[rows, torch.from_numpy(found[at]).to(weights.device)] = 0.0
        block = found[at] // DRAW_BLOCK
        blocks = weights.view(len(masses), -1, DRAW_BLOCK)
        masses[at, block] = host(blocks[rows, torch.from_numpy(block).to(weights.device)].sum(-1))
    return found, masses


def _fake(
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
    return draft_logits.new_empty(draft_logits.shape[0], k, dtype=torch.int64)


_OPERATOR = operator(
    "draw_candidates(Tensor draft_logits, SymInt k, Tensor seeds, SymInt step, Tensor? step_tensor, str proposal,"
    " float[] sampling, Tensor?[] sampling_tensors, Tensor? nodes) -> Tensor",
    _draw_candidates,
    _fake,
)
