"""`verify` over rows whose vocabulary is split across the ranks of a process group.

Every rank runs the same scalar programs (`_rules`) on the same numbers: what a rule asks for is summed on each rank
over its own columns, the sums are gathered, and added up in the order of the ranks. So ranks exchange a few numbers a
node, and for the final draw one number a block of tokens, never a row; and all of them come to the same answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from . import _rows_torch as rows_torch
from ._draw import Array, first_above
from ._rows_torch import Sampling, host
from ._verify_torch import Batch, Side, Together, Walk, mass_of, run, sound, unless_broken
from .types import DRAW_BLOCK, Status


class Ranks:
    """The process group, and the columns of the vocabulary that this rank holds.

    Args:
        group: a process group whose backend takes tensors on `device`.
        device: where the logits are.
        columns: how many columns this rank holds; ranks hold consecutive columns in their order.
        agreed: numbers that must be the same on every rank.

    Raises:
        ValueError: they are not; on every rank, so that none is left waiting.
    """

    def __init__(self, group: Any, device: torch.device, columns: int, agreed: dict[str, float]) -> None:
        self.group, self.device = group, device
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("group: expected a process group that this process belongs to")
        found = self.gather(np.array([columns, *agreed.values()], np.float64))
        for column, name in enumerate(agreed, 1):
            if len(set(found[:, column].tolist())) > 1:
                raise ValueError(
                    f"{name}: expected the same on every rank of the group, got {found[:, column].tolist()}"
                )
        widths = [int(width) for width in found[:, 0]]
        self.first, self.columns, self.vocab = sum(widths[: self.rank]), columns, sum(widths)

    def gather(self, numbers: Array) -> Array:
        """`[ranks, ...]` float64: what every rank gave, of one shape."""
        mine = torch.from_numpy(np.ascontiguousarray(numbers, np.float64)).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return host(torch.stack(parts))

    def sum(self, numbers: Array) -> Array:
        """The sum over the ranks, in their order."""
        total: Array = self.gather(numbers).sum(0)
        return total

    def own(self, tokens: list[int]) -> list[int]:
        """This rank's column of each token, -1 for other ranks' tokens and missing ones."""
        return [x - self.first if self.first <= x < self.first + self.columns else -1 for x in tokens]


class _Apart(Together):
    """Answers the rules of several requests from this rank's columns and the other ranks' sums."""

    def __init__(self, batch: Batch, walks: list[Walk], ranks: Ranks) -> None:
        self.batch, self.walks, self.ranks = batch, walks, ranks
        device = batch.target.values.device
        self.p = torch.zeros(len(walks), ranks.columns, dtype=torch.float32, device=device)
        self.q = torch.zeros_like(self.p)
        # the weights begin where a block of the whole vocabulary does, so that every rank means the same by a block
        self.lead = ranks.first % DRAW_BLOCK
        self.first_block = ranks.first // DRAW_BLOCK
        blocks = max(-(-(self.lead + ranks.columns) // DRAW_BLOCK), 1)
        self.weights = torch.zeros(len(walks), blocks * DRAW_BLOCK, dtype=torch.float32, device=device)

    def _rows(self, asking: list[Walk]) -> list[Any]:
        broken = self._laws(asking, self.p, self.batch.target)
        if self.batch.draft is not None:
            inner = [walk for walk in asking if walk.wants.tokens and walk not in broken]
            # every rank has come to the same `inner`
            if inner:
                broken |= self._laws(inner, self.q, self.batch.draft)
        slots = [walk.slot for walk in asking]
        own = [self.ranks.own(walk.wants.tokens) for walk in asking]
        found = []
        for buffer in (self.p, self.q) if self.batch.draft is not None else (self.p,):
            values = rows_torch.read(buffer, slots, own)
            found.append(np.array([value for row in values for value in row]))
        p, q = (sides := self.ranks.sum(np.stack(found)))[0], sides[-1]
        answers: list[Any] = []
        start = 0
        for walk in asking:
            end = start + len(walk.wants.tokens)
            both = p[start:end].tolist(), q[start:end].tolist()
            answers.append(broken.get(walk) or (both if sound(*both) else Status.NAN_ROW))
            start = end
        return answers

    def _laws(self, asking: list[Walk], buffer: torch.Tensor, side: Side) -> dict[Walk, Status]:
        """Write this rank's part of the laws into the buffer; answered with what is wrong with a row."""
        values = side.take([walk.request for walk in asking], [walk.wants.node for walk in asking]).float()
        slots = torch.tensor([walk.slot for walk in asking], device=values.device)
        if side.sampling is None:
            buffer[slots] = values
            return {}
        if side.bitmask is not None:
            at = torch.tensor([(walk.request, walk.wants.node) for walk in asking], device=values.device)
            first, last = self.ranks.first // 32, -(-(self.ranks.first + self.ranks.columns) // 32)
            words = side.bitmask[at[:, 0], at[:, 1], first:last]
            shifted = torch.nn.functional.pad(values, (self.ranks.first - first * 32, 0))
            values = rows_torch.masked(shifted, words)[:, self.ranks.first - first * 32 :]
        sampling = side.sampling.on_arrays([walk.request for walk in asking])
        greedy = sampling.temperature == 0
        scale = np.divide(1.0, sampling.temperature, where=~greedy, out=np.ones(len(asking)))

        statistics = np.full((len(asking), 3), -np.inf)  # NaN or +inf, largest, minus the token of the largest
        if self.ranks.columns:
            largest = values.amax(-1)
            statistics[:, 0] = host((largest.isnan() | (largest == torch.inf)).double())
            statistics[:, 1] = host(torch.where(largest.isnan(), -torch.inf, largest.double()))
            statistics[:, 2] = -(self.ranks.first + host(rows_torch.first_argmax(values, largest)))
        gathered = self.ranks.gather(statistics)
        is_nan, top = (gathered[:, :, 0] > 0).any(0), gathered[:, :, 1].max(0)
        argmax = -np.where(gathered[:, :, 1] == top, gathered[:, :, 2], -np.inf).max(0)
        status = np.where(is_nan, int(Status.NAN_ROW), np.where(top == -np.inf, int(Status.EMPTY_ROW), 0))
        sound = status == 0
        top = np.where(sound, top, 0.0)

        keys = _keys(values)
        floor = self._cutoffs(values, keys, top, scale, sampling, sound)
        weights = ((values - _column(top, values)) * _column(scale, values)).exp_()
        weights.masked_fill_(keys < torch.from_numpy(floor).to(values.device)[:, None], 0.0)
        for row in np.flatnonzero(greedy):
            weights[row] = 0.0
            if 0 <= (own := int(argmax[row]) - self.ranks.first if sound[row] else -1) < self.ranks.columns:
                weights[row, own] = 1.0
        weights[torch.from_numpy(~sound).to(values.device)] = 0.0
        total = self.ranks.sum(host(weights.sum(-1, dtype=torch.float64)))
        buffer[slots] = weights * _column(np.divide(1.0, total, where=total > 0, out=np.zeros(len(asking))), values)
        return {walk: Status(bits) for walk, bits in zip(asking, status.tolist(), strict=True) if bits}

    def _cutoffs(
        self, values: torch.Tensor, keys: torch.Tensor, top: Array, scale: Array, sampling: Sampling, sound: Array
    ) -> Array:
        """`[rows]` int64: the smallest key that the filters keep, as in `rows_torch.cutoffs`."""
        vocab, rows = self.ranks.vocab, len(top)
        floor = np.full(rows, _LOWEST)
        on = sound & (sampling.temperature != 0)
        limit = np.where(on & (sampling.top_k > 0) & (sampling.top_k < vocab), sampling.top_k, np.inf)
        if np.isfinite(limit).any():
            ones = torch.ones_like(values, dtype=torch.float64)
            floor = np.where(np.isfinite(limit), self._search(keys, ones, floor, limit), floor)
        if (on & (sampling.top_p < 1)).any():
            mass = ((values - _column(top, values)) * _column(scale, values)).exp_().double()
            mass.masked_fill_(keys < torch.from_numpy(floor).to(values.device)[:, None], 0.0).nan_to_num_(0.0)
            wanted = sampling.top_p * self.ranks.sum(host(mass.sum(-1)))
            floor = np.where(on & (sampling.top_p < 1), self._search(keys, mass, floor, wanted), floor)
        if (on & (sampling.min_p > 0)).any():
            cut = top + np.log(np.where(sampling.min_p > 0, sampling.min_p, 1.0)) / scale
            low = host(_keys(torch.from_numpy(cut.astype(np.float32))))
            floor = np.where(on & (sampling.min_p > 0), np.maximum(floor, low), floor)
        return floor

    def _search(self, keys: torch.Tensor, mass: torch.Tensor, low: Array, limit: Array) -> Array:
        """`[rows]` int64: the smallest key with less than `limit` of the mass on larger keys, over all ranks."""
        low, high = low.copy(), np.full(len(low), _HIGHEST)
        while (low < high).any():
            middle = (low + high) // 2
            above = keys > torch.from_numpy(middle).to(keys.device)[:, None]
            enough = self.ranks.sum(host((mass * above).sum(-1))) < limit
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        return low

    def _fill(self, asking: list[Walk]) -> Array:
        """Put (w p - beta q)_+ / w of this rank's columns into the weights; answered with the masses of its blocks."""
        wants = [walk.wants._replace(without=tuple(self.ranks.own(walk.wants.without))) for walk in asking]
        wants = [want._replace(without=tuple(x for x in want.without if x >= 0)) for want in wants]
        slots = [walk.slot for walk in asking]
        inner = self.weights[:, self.lead : self.lead + self.ranks.columns]
        rows_torch.fill_rows(self.p, self.q, slots, wants, inner[: len(asking)])
        blocks: Array = host(rows_torch.draw_blocks(self.weights[: len(asking)]).sum(-1)).astype(np.float64)
        return blocks

    def _mass(self, asking: list[Walk]) -> list[float | Status]:
        total = self.ranks.sum(self._fill(asking).sum(1)).tolist()
        return [mass_of(mass, walk.wants) for mass, walk in zip(total, asking, strict=True)]

    def _draw(self, asking: list[Walk]) -> list[Any]:
        masses = np.zeros((len(asking), -(-self.ranks.vocab // DRAW_BLOCK)))
        own = self._fill(asking)
        here = masses[:, self.first_block : self.first_block + own.shape[1]]  # of a rank without columns, nothing
        here[:] = own[:, : here.shape[1]]
        masses = self.ranks.sum(masses).astype(np.float32)
        chosen = [first_above(row, walk.tree.uniforms[-2]) for row, walk in zip(masses, asking, strict=True)]

        # the block may be shared by several ranks: theirs are the shares of its mass, in order
        inside: list[Array] = []
        for row, block in enumerate(chosen):
            at = block - self.first_block
            overlaps = block >= 0 and 0 <= at < own.shape[1]
            inside.append(host(rows_torch.draw_blocks(self.weights)[row, at]) if overlaps else np.zeros(1, np.float32))
        shares = self.ranks.gather(np.array([weights.sum(dtype=np.float64) for weights in inside]))
        places = np.full(len(asking), -1.0)
        for row, (block, weights) in enumerate(zip(chosen, inside, strict=True)):
            share = shares[:, row]
            place = _own_place(share, weights, self.ranks.rank, asking[row].tree.uniforms[-1])
            if block >= 0 and place is not None:
                places[row] = block * DRAW_BLOCK + place
        found = self.ranks.gather(places).max(0).astype(int).tolist()
        tokens = [None if block < 0 or token < 0 else token for block, token in zip(chosen, found, strict=True)]
        return tokens if self.batch.computed else unless_broken(tokens, masses, asking)


def _own_place(shares: Array, weights: Array, rank: int, u: float) -> int | None:
    """The place in a block that u picks, if it is among this rank's weights.

    Args:
        shares: `[ranks]`, each rank's part of the block's mass.
        weights: this rank's weights, zero outside its part.
        rank: this rank.
        u: in [0, 1).
    """
    owner = first_above(shares, u)
    if owner != rank:
        return None
    left = u * float(shares.sum()) - float(shares[:rank].sum())
    return first_above(weights.astype(np.float64), min(max(left / float(shares[rank]), 0.0), _BELOW_ONE))


_BELOW_ONE = 1.0 - 2.0**-24
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def _keys(values: torch.Tensor) -> torch.Tensor:
    """int64 keys in the order of the float32 values; both zeros are one."""
    bits = (values + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, -(2**31) - bits - 1, bits)


def _column(numbers: Array, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(numbers, np.float32)).to(like.device)[:, None]


@torch.no_grad()
def verify(
    group: Any,
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    uniforms: torch.Tensor,
    *others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mcsd_kernels.verify` on one rank; arguments as the operator's, but the rows' columns are this rank's alone."""
    *_, bitmask, _ = others
    # what is no number would differ from itself; it has its status, for its own request
    coins = uniforms.double().nan_to_num()
    checksum = float(host(tokens.double().sum() + parents.double().sum() + coins.sum()))
    agreed = {"tokens.shape[0]": tokens.shape[0], "tokens.shape[1]": tokens.shape[1]}
    ranks = Ranks(
        group, target_logits.device, target_logits.shape[-1], agreed | {"tokens, parents, uniforms": checksum}
    )
    if bitmask is not None and bitmask.shape[-1] != -(-ranks.vocab // 32):
        raise ValueError(f"bitmask: expected {-(-ranks.vocab // 32)} words for all ranks, got {bitmask.shape[-1]}")
    with np.errstate(all="ignore"):  # as in `verify` by itself
        return run(
            target_logits,
            draft_logits,
            tokens,
            parents,
            uniforms,
            *others,
            vocab=ranks.vocab,
            answers=lambda batch, walks: _Apart(batch, walks, ranks),
        )
