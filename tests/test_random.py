"""`draw_uniforms`: Philox against its published vectors and against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mcsd_kernels import draw_uniforms, reference
from mcsd_kernels.random import (
    CANDIDATE_STREAM,
    VERIFY_STREAM,
    philox,
    philox_on_host,
    philox_rounds,
    uniform_lists,
    uniforms,
)

ONES = 0xFFFFFFFF

# Random123's published answers for philox4x32 with 10 rounds: counter, key, words
KNOWN = [
    pytest.param([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], id="all-zero"),
    pytest.param(
        [ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD], id="all-ones-every-product-wraps"
    ),
    pytest.param(
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        id="digits-of-pi",
    ),
]

SEEDS = {
    "zero": 0,
    "one": 1,
    "negative": -1,
    "just-below-the-high-half": 2**32 - 1,
    "in-the-high-half-alone": 2**32,
    "both-halves": 5 * 2**32 + 7,
    "smallest": -(2**63),
    "largest": 2**63 - 1,
}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], words: list[int], device: torch.device) -> None:
    # the wanted words stand at position 1, so that a broadcast of position 0 would show
    lanes = [torch.tensor([3, word], device=device) for word in counter]
    keys = [torch.tensor([9, word], device=device) for word in key]
    assert philox(lanes, keys)[1].tolist() == words
    on_host = philox_on_host(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64)[:, None])
    assert on_host[:, 0].tolist() == words
    assert list(philox_rounds(*counter, *key)) == words
    assert list(reference.philox_4x32_10(counter, key)) == words


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(0, id="none"),
        pytest.param(1, id="a-part-of-a-block"),
        pytest.param(4, id="one-block"),
        pytest.param(5, id="one-past-a-block"),
        pytest.param(67, id="many-blocks"),
    ],
)
@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32 - 1], ids=["first", "second", "sign-bit", "last"])
def test_equals_the_oracle(step: int, count: int, device: torch.device) -> None:
    seeds = torch.tensor(list(SEEDS.values()), device=device)
    found = draw_uniforms(seeds, step, count)
    assert found.dtype == torch.float32 and found.device == device and found.is_contiguous()
    assert torch.equal(found, reference.draw_uniforms(seeds, step, count))


def test_every_seed_has_numbers_of_its_own(device: torch.device) -> None:
    seeds = torch.tensor(list(SEEDS.values()), device=device)
    assert draw_uniforms(seeds, 0, 4).unique(dim=0).shape[0] == len(SEEDS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_step_for_each_request(dtype: torch.dtype, device: torch.device) -> None:
    seeds = torch.tensor([3, 3, -4, 3], device=device)
    steps = torch.tensor([0, 7, 7, 0], dtype=dtype, device=device)
    found = draw_uniforms(seeds, steps, 6)
    for b in range(4):
        assert torch.equal(found[b : b + 1], reference.draw_uniforms(seeds[b : b + 1], int(steps[b]), 6))


def test_a_step_tensor_without_axes_is_for_all(device: torch.device) -> None:
    seeds = torch.tensor([3, 4], device=device)
    assert torch.equal(draw_uniforms(seeds, torch.tensor(5, device=device), 6), draw_uniforms(seeds, 5, 6))


def test_neither_the_batch_nor_the_count_matters(device: torch.device) -> None:
    seeds = torch.arange(-20, 20, device=device)
    whole = draw_uniforms(seeds, 3, 11)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(draw_uniforms(seeds[order], 3, 11), whole[order])
    assert torch.equal(draw_uniforms(seeds[5:6], 3, 11), whole[5:6])
    assert torch.equal(draw_uniforms(seeds[::2], 3, 11), whole[::2])
    assert torch.equal(draw_uniforms(seeds, 3, 7), whole[:, :7])


@pytest.mark.parametrize("count", [1, 4, 15, 16, 17])
def test_a_few_numbers_are_those_of_many(count: int, device: torch.device) -> None:
    """A row alone and few rows, with numbers and tensors as nodes and steps, against the same rows among others."""
    seeds = torch.tensor(list(SEEDS.values()), device=device)
    nodes, steps = torch.arange(8, device=device).int(), torch.arange(8, device=device) + ONES - 7
    whole = uniforms(seeds, nodes, steps, CANDIDATE_STREAM, count)
    same_step = uniforms(seeds, 3, ONES, VERIFY_STREAM, count)
    for rows in (slice(0, 1), slice(6, 8), slice(2, 6)):
        found = uniforms(seeds[rows], nodes[rows], steps[rows], CANDIDATE_STREAM, count)
        assert found.dtype == torch.float32 and torch.equal(found, whole[rows])
        assert torch.equal(uniforms(seeds[rows], 3, ONES, VERIFY_STREAM, count), same_step[rows])
        assert torch.equal(uniforms(seeds[rows], 3, steps[-1], VERIFY_STREAM, count), same_step[rows])


def test_numbers_on_the_host_do_not_depend_on_the_steps_before(device: torch.device) -> None:
    """They may be drawn for several steps together, whatever order the steps come in, to the last one."""
    seeds, nodes = torch.tensor([7, -3, 7], device=device), torch.tensor([0, 1, 2], device=device)
    order = [*range(45), 3, 4, 60, 59, 61, 62, 0, *range(ONES - 3, ONES + 1)]
    for step in order:
        for place, stream, count in ((nodes, CANDIDATE_STREAM, 9), (5, VERIFY_STREAM, 9), (5, VERIFY_STREAM, 400)):
            wanted = uniforms(seeds, place, step, stream, count)
            assert uniform_lists(seeds, place, step, stream, count) == wanted.tolist(), (step, stream, count)
        assert uniform_lists(seeds + step, 5, step, VERIFY_STREAM, 2) == uniforms(seeds + step, 5, step, 0, 2).tolist()


def test_the_default_device_does_not_matter(device: torch.device) -> None:
    seeds = torch.tensor([7, -3], device=device)
    wanted = draw_uniforms(seeds, 3, 5)
    with torch.device("meta"):
        assert torch.equal(draw_uniforms(seeds, 3, 5), wanted)
        for step in range(20):
            assert len(uniform_lists(seeds, 0, step, CANDIDATE_STREAM, 9)) == 2


def test_an_empty_batch(device: torch.device) -> None:
    assert draw_uniforms(torch.zeros(0, dtype=torch.int64, device=device), 0, 5).shape == (0, 5)


def test_the_numbers_are_uniform(device: torch.device, p_value: Any) -> None:
    found = draw_uniforms(torch.arange(500, device=device), 2, 200).cpu()
    assert found.min() >= 0 and found.max() < 1
    cells = (found.flatten() * 64).long().bincount(minlength=64).tolist()
    assert p_value([(i, 1 / 64) for i in range(64)], dict(enumerate(cells))) > 1e-4
    # neighbouring columns and neighbouring steps, as pairs
    later = draw_uniforms(torch.arange(500), 3, 200)
    for first, second in ((found[:, ::2], found[:, 1::2]), (found, later)):
        pairs = ((first * 8).long() * 8 + (second * 8).long()).flatten().bincount(minlength=64).tolist()
        assert p_value([(i, 1 / 64) for i in range(64)], dict(enumerate(pairs))) > 1e-4


def test_the_two_streams_share_no_numbers(device: torch.device) -> None:
    seeds, zero = torch.arange(30, device=device), torch.zeros((), dtype=torch.int64, device=device)
    verify = uniforms(seeds, zero, zero, VERIFY_STREAM, 8)
    candidates = uniforms(seeds, zero, zero, CANDIDATE_STREAM, 8)
    assert not (verify == candidates).any()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        pytest.param("seeds", torch.zeros(2, dtype=torch.int32), id="int32-seeds-lose-half-of-the-key"),
        pytest.param("seeds", torch.zeros(2, 2, dtype=torch.int64), id="seeds-with-two-axes"),
        pytest.param("seeds", [1, 2], id="seeds-as-a-list"),
        pytest.param("step", -1, id="negative-step"),
        pytest.param("step", 2**32, id="step-past-a-word"),
        pytest.param("step", 1.0, id="float-step"),
        pytest.param("step", True, id="bool-step"),
        pytest.param("step", torch.zeros(3, dtype=torch.int64), id="steps-of-another-batch"),
        pytest.param("step", torch.zeros(2), id="float-steps"),
        pytest.param("step", torch.tensor(1.5), id="float-step-without-axes"),
        pytest.param("step", torch.zeros(2, dtype=torch.int64, device="meta"), id="steps-on-another-device"),
        pytest.param("count", -1, id="negative-count"),
        pytest.param("count", 2.0, id="float-count"),
    ],
)
def test_a_mistake_is_named(argument: str, value: Any) -> None:
    arguments: dict[str, Any] = {"seeds": torch.zeros(2, dtype=torch.int64), "step": 0, "count": 3}
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        draw_uniforms(**(arguments | {argument: value}))
