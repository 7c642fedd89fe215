"""Rows of logits as probability laws on the host, in NumPy: one at a time, or several as they would come out alone.

A pass over a row takes a few microseconds here, no longer than it takes to call torch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ._draw import Array
from ._kept import Kept
from ._rows_torch import LARGE, LARGEST, Room, host, padded, stable_law
from ._rules import Draw, Mass
from .types import DRAW_BLOCK, Status


class Law:
    """A row, where it lies, whose entries divided by `total` are probabilities.

    Args:
        row: `[vocab]` f32.
    """

    def __init__(self, row: Array) -> None:
        self.row, self.total = row, 1.0

    def at(self, tokens: list[int]) -> list[float]:
        """The probabilities of some tokens; a token below 0 has none."""
        entry, total = self.row.item, self.total
        return [entry(x) / total if x >= 0 else 0.0 for x in tokens]


class Space(Law):
    """Memory for a law, padded with zeros to whole draw blocks.

    Args:
        vocab: the row's entries.
    """

    def __init__(self, vocab: int) -> None:
        with torch.inference_mode(False):  # what is made inside inference mode could not be written outside it
            memory = torch.zeros(padded(vocab))  # aligned for vectors, as NumPy's is not
            self.tensor = memory[:vocab]
        super().__init__(self.tensor.numpy())
        self.blocks = memory.numpy().reshape(-1, min(len(memory), DRAW_BLOCK))
        self._masses = np.empty(len(self.blocks), np.float32)

    def masses(self) -> list[float]:
        """The sums of the blocks."""
        masses: list[float] = _sum_blocks(self.blocks, self._masses).tolist()
        return masses


class Columns(Space):
    """Memory for a law over some of the vocabulary's tokens; no other token has any probability.

    Args:
        ids: `[columns]` int64, each column's token, ascending.
    """

    def __init__(self, ids: Array) -> None:
        super().__init__(len(ids))
        self.ids = ids

    def at(self, tokens: list[int]) -> list[float]:
        """As for any law; `tokens` are the vocabulary's."""
        known, count = self.ids, len(self.ids)
        columns = [bisect_left(known, x) for x in tokens]
        return super().at([i if i < count and known.item(i) == x else -1 for i, x in zip(columns, tokens, strict=True)])


def _sum_blocks(blocks: Array, out: Array | None = None) -> Array:
    """`[..., blocks]`: as products with ones, in less than half a sum's time; the same bits wherever a block lies."""
    if _DOT is None:
        return np.add.reduce(blocks, -1, out=out)
    return _DOT(blocks, _ONES[: blocks.shape[-1]], out=out)


_DOT: Callable[..., Array] | None = getattr(np, "vecdot", None)  # of NumPy 2
_ONES = np.ones(DRAW_BLOCK, np.float32)


class Workspace:
    """Room for one node's p and q, and for weights made of them."""

    def __init__(self, vocab: int) -> None:
        self.p, self.q, self.weights = Space(vocab), Space(vocab), Space(vocab)


# A loop comes back with the target's vocabulary and the draft's in turn.
_kept = Kept(2)


def workspace(vocab: int) -> Workspace:
    """A workspace; the next call on this thread with this vocabulary gets the same memory."""
    found: Workspace | None = _kept.values.get(vocab)
    if found is None:
        found = Workspace(vocab)
        _kept.put(vocab, found)
    return found


def plain_law(logits: torch.Tensor | Array, scale: float, out: Space) -> Status | None:
    """The law of a row without filters: softmax(logits * scale), which need not be normalised.

    Args:
        logits: `[vocab]` f16, bf16 or f32, or float32 as an array; not written. What leaves float32's range becomes
            infinite or 0; the caller silences NumPy's warnings.
        scale: 1 / temperature.
        out: where the law goes, and its total.

    Returns:
        what is wrong with the row, or None.
    """
    # few passes instead of softmax's: the total says whether the largest logit had to be known first
    unit, exponential = _EXPONENTIAL
    exponents = _exponents(logits, scale * unit, out.tensor, out.row)
    if _is_shallow(exponents, unit):
        exponential(exponents, out.row)
        out.total = sum(out.masses())
        if _LEAST_TOTAL < out.total < _MOST_TOTAL:
            return None
    out.total = 1.0
    return stable_law(torch.from_numpy(logits) if isinstance(logits, np.ndarray) else logits, scale, out.tensor)


def plain_laws(logits: torch.Tensor, scale: float, room: Room) -> list[list[float]]:
    """`plain_law` of several rows on the CPU; each comes out as it would by itself.

    Args:
        logits: `[rows, vocab]` f16, bf16 or f32; not written. As there, the caller silences NumPy's warnings.
        scale: 1 / temperature.
        room: of as many rows, on the CPU; its weights get the laws.

    Returns:
        the masses of each row's blocks; NaN for a row with something wrong, from which nothing can be drawn.
    """
    out, _, on_host, blocks = room
    assert on_host is not None and blocks is not None
    unit, exponential = _EXPONENTIAL
    source = host(logits) if logits.dtype == torch.float32 else logits
    source = _exponents(source, scale * unit, out, on_host)
    shallow = [_is_shallow(row, unit) for row in source]
    if all(shallow):
        exponential(source, on_host)
    else:  # the other rows are done below
        for row in range(len(shallow)):
            if shallow[row]:
                exponential(source[row], on_host[row])
    masses: list[list[float]] = _sum_blocks(blocks).tolist()
    for row, mass in enumerate(masses):
        stands = shallow[row] and _LEAST_TOTAL < sum(mass) < _MOST_TOTAL
        if not stands:
            stable_law(logits[row], scale, out[row])
            masses[row] = _sum_blocks(blocks[row]).tolist()
    return masses


def _exponents(logits: torch.Tensor | Array, scale: float, out: torch.Tensor, on_host: Array) -> Array:
    """logits * scale in float32: in `out`, or the logits themselves if nothing has to be done to them.

    Args:
        logits: as in `plain_law`.
        scale: 1 / temperature, and what an exponential wants.
        out, on_host: the same memory.
    """
    if isinstance(logits, np.ndarray):
        source = logits
    else:
        out.copy_(logits)
        source = on_host
    if scale != 1.0:
        source = np.multiply(source, np.float32(scale), out=on_host)
    return source


Exponential = Callable[[Array, Array], Any]


def _vectors_exp2() -> bool:
    """Whether NumPy has code for float32 powers of 2 that was made for this processor."""
    try:
        found = np.lib.introspect.opt_func_info(func_name="^exp2$", signature="float32")
    except AttributeError:  # NumPy 1
        return False
    return any(not kind["current"].startswith("baseline") for kind in found.get("exp2", {}).values())


# What logits are multiplied by, and which exponential then takes them into a second argument; an entry has the same
# bits wherever it lies. Powers of 2 take half the time of NumPy's exp if there is such code, several times as much if
# there is none. The factor rounds a logit once more, as any temperature but 1 does. On one thread they are sooner done
# with 131,072 entries than torch's exponential on two.
_EXPONENTIAL: tuple[float, Exponential] = (1.0 / math.log(2.0), np.exp2) if _vectors_exp2() else (1.0, np.exp)


def _is_shallow(row: Array, unit: float) -> bool:
    """Whether few exponentials are likely to vanish, which slows down what reads them, by a few of a row's entries."""
    return min(row[:: max(len(row) // _LOOKED_AT, 1)].tolist()) > _LOWEST_LOGIT * unit


_LOOKED_AT = 8
_LOWEST_LOGIT = -80.0
# Within these a row keeps what is 1e-34 of it and more, and factors between two rows stay within float32.
_LEAST_TOTAL, _MOST_TOTAL = 1e-4, 1e20


def greedy_law(logits: torch.Tensor, out: Space) -> Status | None:
    """The law of a row at temperature 0: one-hot at the argmax, the lowest index among equals.

    Args:
        logits: `[vocab]` f16, bf16 or f32; not written.
        out: where the law goes.

    Returns:
        what is wrong with the row, or None.
    """
    values = host(logits.float())
    best = int(values.argmax())  # NaN wins
    top = float(values[best])
    if not math.isfinite(top):
        return Status.EMPTY_ROW if top < 0.0 else Status.NAN_ROW
    out.total = 1.0
    out.row.fill(0.0)
    out.row[best] = 1.0
    return None


def fill(p: Law, q: Law, want: Mass | Draw, out: Space) -> float:
    """Write (p - beta / w q)_+, or q where w is 0, into `out`, with zeros at the tokens to leave out.

    Args:
        p, q: `p` over the whole vocabulary.
        want: w, beta and the tokens to leave out.
        out: for the weights.

    Returns:
        the number that the weights are to be divided by.
    """
    w, beta, without = want
    total = p.total if w != 0.0 else q.total
    weights = out.row
    if w == 0.0:
        if isinstance(q, Columns):
            weights.fill(0.0)
            weights[q.ids] = q.row
        else:
            np.copyto(weights, q.row)
    elif beta == 0.0:
        np.copyto(weights, p.row)
    else:
        share, row = beta / w * (total / q.total), q.row
        if share > LARGE:  # float32 has room for the product, though not for this factor
            share, row = min(share / LARGE, LARGEST), row * np.float32(LARGE)
        share = np.float32(share)
        if isinstance(q, Columns):
            np.copyto(weights, p.row)
            some = weights[q.ids]
            weights[q.ids] = some - np.minimum(some, row * share)
        else:
            # x - min(x, y) is (x - y)_+, in three passes as quick as a copy
            np.multiply(row, share, out=weights)
            np.minimum(p.row, weights, out=weights)
            np.subtract(p.row, weights, out=weights)
    for token in without:
        weights[token] = 0.0
    return total
