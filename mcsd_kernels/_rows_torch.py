"""Rows of logits as probability laws, on any device torch runs on: statistics, cut-offs, residual masses, draws.

Vocabulary-wide work is torch on the rows' own device, into buffers kept between calls; what is left of a row is a few
numbers, which live in NumPy on the host. A chunk holds so few rows that its buffers stay in the cache. Rows that a CPU
takes one by one are in `_rows_host`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ._draw import Array, choose_block, first_above, pick
from ._kept import Kept
from ._rules import Draw, Mass
from .types import DRAW_BLOCK, LEAST_TEMPERATURE, Status

# A row this long keeps a core busy by itself; shorter ones are taken together, up to so many float32 entries, and rows:
# what many requests at once leave for Python's garbage collector to look through takes longer than they do.
_LONG_ROW = 1 << 13
_CHUNK_ENTRIES, _CHUNK_ROWS = 1 << 18, 1 << 9
_FIRST_TOP_P_SLICE = 64

_NONE = np.zeros(0)


class Sampling:
    """`SamplingParams` as four float64 arrays, one entry a request.

    Args:
        temperature, top_k, top_p, min_p: `[count]`.
        plain: 1 / temperature if that is one number and no request filters, else None: the common case, which needs
            none of the arrays.
        greedy: the temperature is 0 for all.
    """

    def __init__(
        self,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        plain: float | None = None,
        greedy: bool = False,
    ) -> None:
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.plain, self.greedy = plain, greedy

    def take(self, index: list[int]) -> Sampling:
        """The parameters of some requests."""
        if self.plain is not None:
            return self
        return Sampling(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index])

    @staticmethod
    def on_host(numbers: list[float], tensors: list[torch.Tensor | None], count: int) -> Sampling:
        """The four parameters of `count` requests; a tensor wins over the number in its place."""
        temperature, top_k, top_p, min_p = numbers
        if temperature > 0 and top_k == 0 and top_p == 1 and min_p == 0 and tensors == [None] * 4:
            return Sampling(_NONE, _NONE, _NONE, _NONE, 1.0 / max(temperature, LEAST_TEMPERATURE))
        t, k, p, m = (
            np.broadcast_to(np.float64(number) if tensor is None else host(tensor.double()), (count,))
            for number, tensor in zip(numbers, tensors, strict=True)
        )
        t = np.where(t > 0, np.maximum(t, LEAST_TEMPERATURE), t)
        return Sampling(t, k, p, m, greedy=temperature == 0 and tensors[0] is None)

    def on_arrays(self, index: list[int]) -> Sampling:
        """`take`, with its arrays even where one number says it all."""
        if self.plain is None:
            return self.take(index)
        one = np.ones(len(index))
        return Sampling(one / self.plain, 0 * one, one, 0 * one)

    def out_of_range(self) -> Array | bool:
        """`[count]` bool: requests with a parameter outside its range, NaN included."""
        if self.plain is not None:
            return False
        return ~(
            (self.temperature >= 0)
            & np.isfinite(self.temperature)
            & (self.top_k >= 0)
            & (np.floor(self.top_k) == self.top_k)
            & (self.top_p > 0)
            & (self.top_p <= 1)
            & (self.min_p >= 0)
            & (self.min_p <= 1)
        )


def host(tensor: torch.Tensor) -> Array:
    """`tensor` as a NumPy array: a view on the CPU, a copy from any other device."""
    if tensor.requires_grad or not tensor.is_cpu:
        return tensor.numpy(force=True)
    try:
        return tensor.numpy()
    except RuntimeError:  # its sign, or its being zero, is not in its memory
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).numpy()


def chunk_rows(vocab: int) -> int:
    """How many requests to take together; a few rows stay in the cache from one pass to the next."""
    return 1 if vocab >= _LONG_ROW else min(_CHUNK_ENTRIES // padded(vocab), _CHUNK_ROWS)


def padded(vocab: int) -> int:
    """A vocabulary of less than one draw block is a block by itself."""
    return vocab if vocab < DRAW_BLOCK else -(-vocab // DRAW_BLOCK) * DRAW_BLOCK


def draw_blocks(weights: torch.Tensor) -> torch.Tensor:
    """`[rows, padded vocab]` as `[rows, blocks, DRAW_BLOCK or less]`, a view."""
    return weights.view(weights.shape[0], -1, min(weights.shape[1], DRAW_BLOCK))


class Room(NamedTuple):
    """Views of the first rows of `Buffers`.

    Args:
        weights: `[rows, vocab]`, without their padding.
        blocks: `[rows, blocks, DRAW_BLOCK or less]`, the weights with it.
        weights_on_host, blocks_on_host: the same memory for NumPy, None off the CPU.
    """

    weights: torch.Tensor
    blocks: torch.Tensor
    weights_on_host: Array | None
    blocks_on_host: Array | None


class Buffers:
    """Room for the p, q and weights of a few rows, and views of it, kept between calls.

    Args:
        rows, vocab, device: the room; the weights are padded with zeros to whole draw blocks.
    """

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self.p = torch.zeros(rows, vocab, dtype=torch.float32, device=device)
        self.q = torch.zeros_like(self.p)
        self.weights = torch.zeros(rows, padded(vocab), dtype=torch.float32, device=device)
        self.blocks = draw_blocks(self.weights)
        self._vocab = vocab
        self._first: dict[int, Room] = {}

    def first(self, rows: int) -> Room:
        """Views of the first so many rows, kept."""
        if rows not in self._first:
            if len(self._first) == _MOST_VIEWS:
                self._first.clear()
            with torch.inference_mode(False):
                weights, blocks = self.weights[:rows, : self._vocab], self.blocks[:rows]
                on_host = (weights.numpy(), blocks.numpy()) if weights.is_cpu else (None, None)
                self._first[rows] = Room(weights, blocks, *on_host)
        return self._first[rows]


# A loop comes back with the target's vocabulary and the draft's in turn, and with the rows of its tree's levels.
_kept, _MOST_VIEWS = Kept(4), 64


def buffers(rows: int, vocab: int, device: torch.device) -> Buffers:
    """Buffers of at least so many rows; the next call on this thread with this vocabulary gets the same memory."""
    key = vocab, device
    found: Buffers | None = _kept.values.get(key)
    if found is None or found.p.shape[0] < rows:
        with torch.inference_mode(False):  # what is made inside inference mode could not be written outside it
            found = Buffers(rows, vocab, device)
        _kept.put(key, found)
    return found


def law(logits: torch.Tensor, sampling: Sampling, buffer: torch.Tensor, slots: list[int] | None) -> list[Status] | None:
    """Write the law of each row of logits into the buffer.

    Args:
        logits: `[rows, vocab]` f16, bf16 or f32; not written.
        sampling: of the rows.
        buffer: `[slots, vocab]` f32.
        slots: where the rows go; None: into the first ones, in order.

    Returns:
        what is wrong with each row (such a row has no mass in the buffer), or None if all are sound.
    """
    rows, vocab = logits.shape
    device = logits.device
    if slots is None:
        out = buffer if buffer.shape[0] == rows else buffer[:rows]
    elif rows == 1:
        out = buffer[slots[0] : slots[0] + 1]
    else:
        out = torch.empty(rows, vocab, dtype=torch.float32, device=device)
    if sampling.plain is not None:
        torch.softmax(_scaled(logits, sampling.plain, out), -1, out=out)
        for row in _nan_rows(out):  # scaled, it may have left float32's range
            stable_law(logits[row], sampling.plain, out[row])
        status = _broken(out, logits)
    else:
        status = _general_law(logits, sampling, out)
    if slots is not None and rows > 1:
        buffer.index_copy_(0, torch.tensor(slots, device=device), out)
    return status


def _scaled(logits: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    """logits * scale in float32: in `out`, or the logits themselves if nothing has to be done to them."""
    source = logits if logits.dtype == torch.float32 else out.copy_(logits)
    return source if scale == 1.0 else torch.mul(source, scale, out=out)


def stable_law(logits: torch.Tensor, scale: float, row: torch.Tensor) -> Status | None:
    """The law of any row without filters: no product leaves float32's range after the subtraction."""
    source = _scaled(logits, 1.0, row)
    source = torch.sub(source, source.max(), out=row).mul_(scale)
    if row.is_cpu:
        # float32 below its normal numbers takes many times as long, here and in whatever reads the law
        torch.threshold_(source, _NEXT_TO_NOTHING, -torch.inf)
    torch.softmax(source, 0, out=row)
    broken = bool(row[0].isnan())
    return Status(int(_diagnose(logits[None], np.zeros(1, np.int64))[0])) if broken else None


_NEXT_TO_NOTHING = -85.0  # beside a largest logit of 0


def masked(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """`[rows, vocab]` f32: the logits, -inf where a token's bit is not set; token v has bit v % 32 of word v // 32."""
    bits = words[:, :, None] >> torch.arange(32, device=words.device, dtype=torch.int32) & 1
    return logits.float().masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def scatter(laws: torch.Tensor, ids: torch.Tensor, buffer: torch.Tensor, slots: list[int] | None) -> None:
    """Write laws over some tokens as laws over all of them.

    Args:
        laws: `[rows, columns]` f32.
        ids: `[columns]` int64, each column's token.
        buffer, slots: as in `law`.
    """
    if slots is None:
        buffer[: len(laws)].zero_().index_add_(1, ids, laws)
    else:
        rows = buffer.new_zeros(len(laws), buffer.shape[1]).index_add_(1, ids, laws)
        buffer.index_copy_(0, torch.tensor(slots, device=buffer.device), rows)


# ids and their `span`: the same ones come again and again
_last_span: tuple[torch.Tensor | None, tuple[int, int, bool]] = (None, (0, 0, True))


def span(ids: torch.Tensor) -> tuple[int, int, bool]:
    """The lowest of some ids `[columns]`, the highest, and whether each is larger than the one before."""
    global _last_span
    known, found = _last_span
    if known is not None and known.device == ids.device and torch.equal(known, ids):
        return found
    found = (0, 0, True)
    if len(ids):
        low, high = ids.aminmax()
        found = int(low), int(high), bool((ids[1:] > ids[:-1]).all())
    _last_span = ids.clone(), found
    return found


def _nan_rows(laws: torch.Tensor) -> Array:
    """The numbers of the rows that softmax has turned into NaN."""
    return np.flatnonzero(np.isnan(host(laws[:, 0])))


def _broken(laws: torch.Tensor, logits: torch.Tensor) -> list[Status] | None:
    """Find the rows that softmax has turned into NaN, and clear them so that they can spoil no sum."""
    index = _nan_rows(laws)
    if not index.size:
        return None
    status = np.zeros(len(laws), np.int64)
    status[index] = _diagnose(logits, index)
    laws[torch.from_numpy(index).to(laws.device)] = 0.0
    return [Status(bits) for bits in status.tolist()]


def _general_law(logits: torch.Tensor, sampling: Sampling, out: torch.Tensor) -> list[Status] | None:
    rows, vocab = logits.shape
    greedy = sampling.temperature == 0
    source = out.copy_(logits)
    scale = np.divide(1.0, sampling.temperature, where=~greedy, out=np.ones(rows)).astype(np.float32)
    limited = (sampling.top_k > 0) & (sampling.top_k < vocab)
    if ((limited | (sampling.top_p < 1) | (sampling.min_p > 0)) & ~greedy).any():
        source.masked_fill_(source < _column(cutoffs(source, scale, sampling), logits.device), -torch.inf)
    source.sub_(source.amax(-1, keepdim=True)).mul_(_column(scale, logits.device))
    torch.softmax(source, -1, out=out)
    if greedy.any():
        index = np.flatnonzero(greedy)
        _one_hot(logits, index, out)
    return _broken(out, logits)


def _one_hot(logits: torch.Tensor, index: Array, out: torch.Tensor) -> None:
    """Make the rows in `index` one-hot at their argmax; a row without one becomes NaN."""
    rows = take(logits, index).float()
    top = rows.amax(-1)
    where = torch.from_numpy(index).to(logits.device)
    out[where] = torch.where(torch.isfinite(top), 0.0, torch.nan).to(out.dtype)[:, None]
    position = first_argmax(rows, top)
    out[where, position] += 1.0


def first_argmax(rows: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """`[rows]` int64: the lowest index that holds the row's maximum `top`; NumPy's is vectorised, torch's is not."""
    if rows.device.type == "cpu":
        return torch.from_numpy(host(rows).argmax(-1))
    return (rows == top[:, None]).to(torch.uint8).argmax(-1)


def _diagnose(logits: torch.Tensor, index: Array) -> Array:
    """What is wrong with rows of which softmax makes NaN: EMPTY_ROW for -inf alone, else NAN_ROW.

    A row may hold NaN or +inf, or become infinite when it is scaled.
    """
    top = host(take(logits, index).float().amax(-1))
    return np.where(top == -np.inf, int(Status.EMPTY_ROW), int(Status.NAN_ROW))


def cutoffs(logits: torch.Tensor, scale: Array, sampling: Sampling) -> Array:
    """The lowest logit that each row's filters keep; -inf where nothing is filtered.

    Args:
        logits: `[rows, vocab]` f32.
        scale: `[rows]`, 1 / temperature.
        sampling: four `[rows]` arrays.

    Returns:
        `[rows]` f32, in the units of `logits`.
    """
    rows, vocab = logits.shape
    cut = np.full(rows, -np.inf, np.float32)
    limit = np.where((sampling.top_k > 0) & (sampling.top_k < vocab), sampling.top_k, vocab).astype(np.int64)
    some = np.flatnonzero(limit < vocab)
    if some.size:
        largest = host(take(logits, some).topk(int(limit[some].max()), -1).values)
        cut[some] = largest[np.arange(some.size), limit[some] - 1]
    some = np.flatnonzero(sampling.top_p < 1)
    if some.size:
        cut[some] = np.maximum(cut[some], _top_p(take(logits, some), scale[some], cut[some], sampling.top_p[some]))
    some = np.flatnonzero(sampling.min_p > 0)
    if some.size:
        top = host(take(logits, some).amax(-1))
        below = np.log(sampling.min_p[some]) / scale[some]
        cut[some] = np.maximum(cut[some], (top + below).astype(np.float32))
    return cut


def _top_p(logits: torch.Tensor, scale: Array, cut: Array, top_p: Array) -> Array:
    """The smallest logit with less than `top_p` of the kept mass strictly above it.

    Only the head of the row is sorted; the head grows until it holds `top_p` of the mass.
    """
    rows, vocab = logits.shape
    weights = (logits - logits.amax(-1, keepdim=True)).mul_(_column(scale, logits.device)).exp_()
    weights.masked_fill_(logits < _column(cut, logits.device), 0.0)
    wanted = top_p * host(weights.sum(-1, dtype=torch.float64))
    size = min(_FIRST_TOP_P_SLICE, vocab)
    while True:
        head, index = logits.topk(size, -1)
        above = np.cumsum(host(weights.gather(-1, index)), axis=-1, dtype=np.float64)
        if size == vocab or (above[:, -1] >= wanted).all():
            break
        size = min(size * 8, vocab)
    strictly_before = np.concatenate([np.zeros((rows, 1)), above[:, :-1]], axis=1)
    last = (strictly_before < wanted[:, None]).sum(-1) - 1
    return host(head)[np.arange(rows), np.maximum(last, 0)]


def take(rows: torch.Tensor, index: Array) -> torch.Tensor:
    """`rows[index]`, without a copy where that is every row in order."""
    if len(index) == rows.shape[0] and bool((index == np.arange(len(index))).all()):
        return rows
    return rows[torch.from_numpy(index).to(rows.device)]


def _column(values: Array, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)[:, None]


def read(buffer: torch.Tensor, slots: list[int], tokens: list[list[int]]) -> list[list[float]]:
    """`buffer[slot, token]` for each slot's tokens, on the host; a token below 0 reads as 0."""
    if buffer.is_cpu:
        rows = buffer.numpy()
        return [[rows.item(slot, x) if x >= 0 else 0.0 for x in some] for slot, some in zip(slots, tokens, strict=True)]
    at = [(slot, max(x, 0)) for slot, some in zip(slots, tokens, strict=True) for x in some]
    index = torch.tensor(at, dtype=torch.long, device=buffer.device).reshape(-1, 2)
    found = iter(buffer[index[:, 0], index[:, 1]].tolist())
    return [[next(found) for _ in some] for some in tokens]


LARGE, LARGEST = 1e30, 3e38


def fill_rows(
    p: torch.Tensor, q: torch.Tensor, slots: list[int], wants: list[Mass | Draw], weights: torch.Tensor
) -> None:
    """Write (p - beta / w q)_+, or q where w is 0, into the weights, with zeros at the tokens to leave out.

    Args:
        p, q: `[slots, vocab]` f32.
        slots: the row of p and q that each entry of `wants` is about.
        wants: w, beta and the tokens to leave out, a row each.
        weights: `[rows, vocab]` f32.
    """
    device = p.device
    index = np.array(slots)
    weights.copy_(take(p, index))
    beta_over_w = np.array([want.beta / (want.w or 1.0) for want in wants])
    # where nothing is subtracted, q may never have been loaded: its row is what an earlier request left there
    some = np.flatnonzero(beta_over_w)
    if some.size:
        part = take(weights, some)
        without_p = np.flatnonzero([want.w == 0.0 for want in (wants[row] for row in some)])
        if without_p.size:
            part[torch.from_numpy(without_p).to(device)] = 0.0
        factor, rows = beta_over_w[some], take(q, index[some])
        if factor.max() > LARGE:  # float32 has room for the product, though not for this factor
            rows = rows * _column(np.where(factor > LARGE, LARGE, 1.0), device)
            factor = np.where(factor > LARGE, np.minimum(factor / LARGE, LARGEST), factor)
        part.addcmul_(rows, _column(-factor, device)).clamp_(min=0.0)
        if some.size < len(wants):
            weights[torch.from_numpy(some).to(device)] = part
    pairs = [(row, token) for row, want in enumerate(wants) for token in want.without]
    if pairs:
        at = torch.tensor(pairs, device=device)
        weights[at[:, 0], at[:, 1]] = 0.0


def draw(weights: torch.Tensor, masses: Array, u_block: list[float], u_place: list[float]) -> list[int | None]:
    """One token from each row of non-negative weights, by inverse CDF in two steps.

    Args:
        weights: `[rows or more, padded vocab]` f32.
        masses: `[rows, blocks]`, the sums of its blocks.
        u_block, u_place: `[rows]` in [0, 1): they pick the block and the place in it.

    Returns:
        the tokens, each of positive weight; None for a row without mass.
    """
    blocks = draw_blocks(weights)
    if weights.is_cpu:
        return list(map(pick, masses.tolist(), blocks.numpy(), u_block, u_place))
    chosen = [choose_block(mass, u) for mass, u in zip(masses.tolist(), u_block, strict=True)]
    index = torch.tensor(chosen, device=weights.device).clamp(min=0)
    inside = host(blocks[torch.arange(len(chosen), device=weights.device), index])
    places = [first_above(row, v) for row, v in zip(inside, u_place, strict=True)]
    return [
        block * DRAW_BLOCK + place if min(block, place) >= 0 else None
        for block, place in zip(chosen, places, strict=True)
    ]
