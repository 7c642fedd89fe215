"""Counter-based random numbers (Philox 4x32-10): the same seed and step give the same numbers, whatever the batch."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

from . import _checks as check
from ._backend import choose
from ._library import operator

# The last word of the counter keeps the purposes of random numbers apart.
VERIFY_STREAM = 0
CANDIDATE_STREAM = 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


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
    check.whole("count", count, 0)
    step_tensor = check_step(step, seeds)
    chosen = choose(backend, seeds.device)
    return _OPERATOR(seeds, 0 if step_tensor is not None else step, step_tensor, count, chosen)


def check_step(step: int | torch.Tensor, seeds: torch.Tensor) -> torch.Tensor | None:
    """Check `step`; returns it if it is a tensor."""
    if not isinstance(step, torch.Tensor):
        check.whole("step", step, 0, _WORD)
        return None
    check.tensor("step", step, tuple(seeds.shape) if step.dim() else (), check.INTEGERS)
    check.same_device("seeds", seeds, {"step": step})
    return step


Words = TypeVar("Words", torch.Tensor, "np.ndarray[Any, Any]")


def philox_words(counter: list[Words], key: list[Words]) -> list[Words]:
    """Philox 4x32-10: four 32-bit words from a counter of four and a key of two.

    Args:
        counter, key: int64 tensors or arrays of shapes that broadcast, each holding 32-bit words.

    Returns:
        the four words, int64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # a product of 32-bit words may wrap in int64; its two halves are right all the same
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (second >> 32 & _WORD) ^ c1 ^ k0, (first >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return [c0, c1, c2, c3]


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> torch.Tensor:
    """`philox_words` as one tensor, with an axis of the four words at the end."""
    return torch.stack(torch.broadcast_tensors(*philox_words(counter, key)), -1)


def uniforms(seeds: torch.Tensor, node: torch.Tensor, step: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """`[rows, count]` f32: the numbers of counter (i // 4, node, step, stream) under each row's seed.

    Args:
        seeds: `[rows]` int64.
        node, step: int64, `[rows]` or 0-dimensional.
        stream: what the numbers are for.
        count: numbers a row.
    """
    rows, blocks = seeds.shape[0], -(-count // 4)
    if seeds.is_cpu:  # NumPy: the arrays are small, and a torch call costs three times as much
        keys, nodes, steps = (np.atleast_1d(word.numpy())[:, None] for word in (seeds, node, step))
        counter = [np.arange(blocks), nodes & _WORD, steps & _WORD, np.array([stream])]
        words = np.empty((rows, blocks, 4), np.int64)
        for lane, word in enumerate(philox_words(counter, [keys & _WORD, keys >> 32 & _WORD])):
            words[:, :, lane] = word
        words >>= 8
        return torch.from_numpy((words.reshape(rows, blocks * 4)[:, :count] * np.float32(2.0**-24)).astype(np.float32))
    key = seeds.reshape(-1, 1)
    lanes = torch.arange(blocks, device=seeds.device)
    last = torch.tensor([stream], device=seeds.device)
    words_on_device = philox(
        [lanes, node.reshape(-1, 1) & _WORD, step.reshape(-1, 1) & _WORD, last], [key & _WORD, key >> 32 & _WORD]
    )
    numbers = words_on_device.expand(rows, blocks, 4).reshape(rows, blocks * 4)[:, :count]
    return (numbers >> 8).float().mul_(2.0**-24)


def _draw_uniforms(
    seeds: torch.Tensor, step: int, step_tensor: torch.Tensor | None, count: int, backend: str
) -> torch.Tensor:
    if backend == "triton":
        from . import _random_triton  # only here may triton be imported

        return _random_triton.draw_uniforms(seeds, step, step_tensor, count)
    if step_tensor is None:
        step_tensor = torch.full((), step, dtype=torch.int64, device=seeds.device)
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    return uniforms(seeds, zero, step_tensor.long(), VERIFY_STREAM, count).contiguous()


def _fake(seeds: torch.Tensor, step: int, step_tensor: torch.Tensor | None, count: int, backend: str) -> torch.Tensor:
    return seeds.new_empty(seeds.shape[0], count, dtype=torch.float32)


_OPERATOR = operator(
    "draw_uniforms(Tensor seeds, SymInt step, Tensor? step_tensor, SymInt count, str backend) -> Tensor",
    _draw_uniforms,
    _fake,
)
