"""Counter-based random numbers (Philox 4x32-10): the same seed and step give the same numbers, whatever the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import _checks as check
from ._backend import choose
from ._kept import Kept
from ._library import operator

# The last word of the counter keeps the purposes of random numbers apart.
VERIFY_STREAM = 0
CANDIDATE_STREAM = 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

Array = np.ndarray[Any, Any]


def draw_uniforms(
    seeds: torch.Tensor, step: int | torch.Tensor, count: int, *, backend: str | None = None
) -> torch.Tensor:
    """Uniform numbers in [0, 1) that depend on (seed, step, column) alone.

    Number i is word i % 4 of Philox 4x32-10 with the seed as key and (i // 4, 0, step, 0) as counter, its upper 24
    bits over 2^24.

    Args:
        seeds: `[batch]` int64, one a request; all 64 bits count.
        step: number of the call, in [0, 2^32): an int, or a `[batch]` int64 or int32 tensor. A step must not be used
            twice with a seed: verification is lossless only if its coins are fresh.
        count: numbers a request.
        backend: "torch" or "triton"; None to choose by device.

    Returns:
        `[batch, count]` f32 on the device of `seeds`.

    Raises:
        ValueError: a wrong shape or dtype, an int `step` or `count` out of range, or a backend that cannot run here.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    check.tensor("seeds", seeds, (None,), (torch.int64,))
    count = check.whole("count", count, 0)
    number, tensor = check_step(step, seeds)
    chosen = choose(backend, seeds.device)
    return _OPERATOR(seeds, number, tensor, count, chosen)


def check_step(step: int | torch.Tensor, seeds: torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """Check `step`; returns it as an operator takes it: a number, and a tensor that wins over it."""
    if not isinstance(step, torch.Tensor):
        return check.whole("step", step, 0, _WORD), None
    check.tensor("step", step, tuple(seeds.shape) if step.dim() else (), check.INTEGERS)
    check.same_device("seeds", seeds, {"step": step})
    return 0, step


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> torch.Tensor:
    """Philox 4x32-10: four 32-bit words, along a last axis, from a counter of four and a key of two.

    Args:
        counter, key: int64 tensors of shapes that broadcast, each holding 32-bit words.
    """
    return torch.stack(torch.broadcast_tensors(*philox_rounds(*counter, *key)), -1)


def philox_rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """The four words of `philox`, of int64 tensors or of plain numbers: a few of those are faster than any array."""
    for _ in range(10):
        # a product of 32-bit words may wrap in int64; its two halves are right all the same
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (second >> 32 & _WORD) ^ c1 ^ k0, (first >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def philox_on_host(counter: Array, key: Array) -> Array:
    """`philox` for small arrays: both products of a round at once, since NumPy's time is calls and not numbers.

    Args:
        counter: `[4, ...]` uint64, 32-bit words.
        key: `[2, ...]` uint64, 32-bit words.

    Returns:
        `[4, ...]` uint64, 32-bit words.
    """
    rounds = np.arange(10, dtype=np.uint64).reshape(10, 1, *[1] * (key.ndim - 1))
    keys = key + rounds * _WEYL_COLUMN.reshape(2, *[1] * (key.ndim - 1)) & _WORD_U64
    multipliers = _MULTIPLIER_COLUMN.reshape(2, *[1] * (counter.ndim - 1))
    even, odd = counter[0::2], counter[1::2]
    for round_key in keys:
        product = even * multipliers
        even = (product >> _HALF)[::-1] ^ odd ^ round_key
        odd = (product & _WORD_U64)[::-1]
    words = np.empty((4, *even.shape[1:]), np.uint64)
    words[0::2], words[1::2] = even, odd
    return words


# Up to so many counters are sooner done one by one; after a forward, with cold caches, it would be twice as many.
_ONE_BY_ONE = 12
_MULTIPLIER_COLUMN, _WEYL_COLUMN = np.array(_MULTIPLIERS, np.uint64), np.array(_WEYL, np.uint64)
_WORD_U64, _HALF = np.uint64(_WORD), np.uint64(32)


def uniforms(
    seeds: torch.Tensor, node: int | torch.Tensor, step: int | torch.Tensor, stream: int, count: int
) -> torch.Tensor:
    """`[rows, count]` f32: the numbers of counter (i // 4, node, step, stream) under each row's seed.

    Args:
        seeds: `[rows]` int64.
        node, step: an int, or an integer tensor `[rows]`.
        stream: what the numbers are for.
        count: numbers a row.
    """
    rows, blocks = seeds.shape[0], -(-count // 4)
    if seeds.is_cpu and 0 < rows * blocks <= _ONE_BY_ONE:
        few = _one_by_one(seeds, node, step, stream, count)
        return torch.tensor(few, dtype=torch.float32, device=seeds.device)
    if seeds.is_cpu:
        counter = np.empty((4, rows, blocks), np.uint64)
        counter[0], counter[3] = np.arange(blocks), stream
        for lane, word in ((1, node), (2, step)):
            counter[lane] = word if isinstance(word, int) else (word.numpy().astype(np.int64) & _WORD).reshape(-1, 1)
        seed = seeds.numpy().view(np.uint64)[:, None]
        words = philox_on_host(counter, np.stack([seed & _WORD_U64, seed >> _HALF]))
        numbers_on_host = (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
        return torch.from_numpy(np.moveaxis(numbers_on_host, 0, 2).reshape(rows, blocks * 4)[:, :count])
    lanes = [torch.arange(blocks, device=seeds.device)]
    for word in (node, step, stream):
        at = torch.tensor([word], device=seeds.device) if isinstance(word, int) else word.long().reshape(-1, 1)
        lanes.append(at & _WORD)
    key = seeds.reshape(-1, 1)
    words_on_device = philox(lanes, [key & _WORD, key >> 32 & _WORD])
    numbers = words_on_device.expand(rows, blocks, 4).reshape(rows, blocks * 4)[:, :count]
    return (numbers >> 8).float().mul_(2.0**-24)


def uniform_lists(
    seeds: torch.Tensor, node: int | torch.Tensor, step: int | torch.Tensor, stream: int, count: int
) -> list[list[float]]:
    """`uniforms` on the host; not to be written. Where calls come step after step, some steps are drawn together."""
    rows = seeds.shape[0]
    if not seeds.is_cpu or isinstance(step, torch.Tensor) or not 0 < rows * count <= _DRAWN_AHEAD:
        return _lists(seeds, node, step, stream, count)
    key = tuple(seeds.tolist()), node if isinstance(node, int) else tuple(node.tolist()), stream, count
    first, drawn = _ahead.values.get(key, (step, []))
    if not first <= step < first + len(drawn):
        goes_on = drawn and step == first + len(drawn)
        steps = min(2 * len(drawn), _DRAWN_AHEAD // (rows * count)) if goes_on else 1
        first, drawn = step, _of_steps(seeds, node, step, steps, stream, count)
        _ahead.put(key, (first, drawn))
    numbers: list[list[float]] = drawn[step - first]
    return numbers


def _of_steps(
    seeds: torch.Tensor, node: int | torch.Tensor, step: int, steps: int, stream: int, count: int
) -> list[list[list[float]]]:
    """`uniform_lists` of some steps."""
    rows = seeds.shape[0]
    if steps == 1 or steps * rows * -(-count // 4) <= _ONE_BY_ONE:
        return [_lists(seeds, node, at, stream, count) for at in range(step, step + steps)]
    later = torch.arange(step, step + steps, device=seeds.device).repeat_interleave(rows)
    nodes = node if isinstance(node, int) else node.repeat(steps)
    numbers: list[list[float]] = uniforms(seeds.repeat(steps), nodes, later, stream, count).tolist()
    return [numbers[i : i + rows] for i in range(0, len(numbers), rows)]


def _lists(
    seeds: torch.Tensor, node: int | torch.Tensor, step: int | torch.Tensor, stream: int, count: int
) -> list[list[float]]:
    """`uniforms` as lists, on the shorter way where they are few or none."""
    if seeds.is_cpu and seeds.shape[0] * -(-count // 4) <= _ONE_BY_ONE:
        return _one_by_one(seeds, node, step, stream, count)
    found: list[list[float]] = uniforms(seeds, node, step, stream, count).tolist()
    return found


# the first step, and for each step from it on a list by row; a few calls for each level of a tree
_ahead = Kept(32)
_DRAWN_AHEAD = 1 << 10  # numbers


def _one_by_one(
    seeds: torch.Tensor, node: int | torch.Tensor, step: int | torch.Tensor, stream: int, count: int
) -> list[list[float]]:
    """`uniforms` of a few rows and counters, as lists."""
    nodes, steps = (
        [word] * len(seeds) if isinstance(word, int) else word.expand(len(seeds)).tolist() for word in (node, step)
    )
    found = []
    for seed, c1, c2 in zip(seeds.tolist(), nodes, steps, strict=True):
        rest = c1 & _WORD, c2 & _WORD, stream, seed & _WORD, seed >> 32 & _WORD
        words = [word for c0 in range(-(-count // 4)) for word in philox_rounds(c0, *rest)]
        found.append([(word >> 8) * 2.0**-24 for word in words[:count]])
    return found


def _draw_uniforms(
    seeds: torch.Tensor, step: int, step_tensor: torch.Tensor | None, count: int, backend: str
) -> torch.Tensor:
    if backend == "triton":
        from . import _random_triton  # only here may triton be imported

        return _random_triton.draw_uniforms(seeds, step, step_tensor, count)
    return uniforms(seeds, 0, step if step_tensor is None else step_tensor, VERIFY_STREAM, count).contiguous()


def _fake(seeds: torch.Tensor, step: int, step_tensor: torch.Tensor | None, count: int, backend: str) -> torch.Tensor:
    return seeds.new_empty(seeds.shape[0], count, dtype=torch.float32)


_OPERATOR = operator(
    "draw_uniforms(Tensor seeds, SymInt step, Tensor? step_tensor, SymInt count, str backend) -> Tensor",
    _draw_uniforms,
    _fake,
)
