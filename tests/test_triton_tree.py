"""`ancestor_bits`, `node_depths`, `tree_attention_mask` and `keep_path` in Triton, in the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter
from test_tree import PATHS, bits_equal, filled_cache, random_parents

from mcsd_kernels import _tree_triton as tree_triton
from mcsd_kernels import ancestor_bits, keep_path, node_depths, reference, tree_attention_mask

triton_interpreter.install()

TREES = [
    pytest.param(torch.tensor([-1]), id="root-alone"),
    pytest.param(torch.arange(-1, 7), id="chain"),
    pytest.param(torch.tensor([-1] + [0] * 64), id="star-across-words"),
    pytest.param(random_parents(31, 0), id="one-short-of-a-word"),
    pytest.param(random_parents(32, 1), id="a-word-sign-bit-used"),
    pytest.param(random_parents(33, 2), id="one-past-a-word"),
    pytest.param(random_parents(64, 3), id="two-words"),
    pytest.param(torch.arange(-1, 199), id="chain-across-words-and-blocks"),
    pytest.param(random_parents(40, 5, padding=0.4, batch=3), id="ragged-batch"),
    pytest.param(torch.full((2, 5), -1), id="nothing-but-padding"),
    pytest.param(random_parents(1024, 6), id="1024-nodes"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a wrapper asks for starts as garbage."""
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: new(*args, **options).fill_(99))


@pytest.mark.parametrize("parents", TREES)
def test_ancestor_bits_and_depths(parents: torch.Tensor) -> None:
    wanted = reference.ancestor_bits(parents)
    for dtype in (torch.int32, torch.int64):
        found = ancestor_bits(parents.to(dtype), backend="triton")
        assert found.dtype == torch.int32 and torch.equal(found, wanted)
    assert torch.equal(node_depths(wanted, backend="triton"), node_depths(wanted, backend="torch"))


def test_a_parent_out_of_order_counts_as_none() -> None:
    broken = torch.tensor([[-1, 2, 0, 1], [2, 0, 1, 9], [0, 0, -5, 3]])
    same_as = torch.tensor([[-1, -1, 0, 1], [-1, 0, 1, -1], [-1, 0, -1, -1]])
    assert torch.equal(ancestor_bits(broken, backend="triton"), reference.ancestor_bits(same_as))


def test_strided_and_empty_inputs() -> None:
    parents = random_parents(35, 7, padding=0.2, batch=4)
    strided = torch.full((35, 8), 99)[:, ::2].t()
    strided.copy_(parents)
    bits = ancestor_bits(strided, backend="triton")
    assert torch.equal(bits, reference.ancestor_bits(parents))
    some = bits.transpose(1, 2).contiguous().transpose(1, 2)[:, [3, 30]]
    assert torch.equal(node_depths(some, backend="triton"), node_depths(some, backend="torch"))
    empty = torch.zeros(0, 33, dtype=torch.int64)
    assert ancestor_bits(empty, backend="triton").shape == (0, 33, 2)
    assert node_depths(torch.zeros(0, 33, 2, dtype=torch.int32), backend="triton").shape == (0, 33)
    assert tree_attention_mask(empty, empty[:, 0], 40, backend="triton").shape == (0, 1, 33, 40)


@pytest.mark.parametrize(
    ("prefix", "total"),
    [
        pytest.param([0, 0, 0], 40, id="no-prefix-exact-fit"),
        pytest.param([5, 0, 17], 100, id="ragged-slots-to-spare"),
        pytest.param([39, 2, 60], 45, id="trees-cut-off-by-the-end"),
        pytest.param([1020, 0, 1100], 1140, id="a-tree-across-blocks"),
    ],
)
@pytest.mark.parametrize(
    "parents",
    [
        pytest.param(random_parents(40, 5, padding=0.3, batch=3), id="ragged"),
        pytest.param(random_parents(33, 8), id="shared"),
        pytest.param(torch.tensor([-1]), id="root-alone"),
    ],
)
def test_mask(parents: torch.Tensor, prefix: list[int], total: int) -> None:
    lengths = torch.tensor([prefix, [7] * 3], dtype=torch.int32).t()[:, 0]
    found = tree_attention_mask(parents, lengths, total, backend="triton")
    wanted = reference.tree_attention_mask(parents, lengths, total)
    assert found.dtype == torch.bool and torch.equal(found.view(torch.int8), wanted.view(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("path", "length"), PATHS)
def test_keep_path(path: list[list[int]], length: list[int], dtype: torch.dtype) -> None:
    key, value = filled_cache((2, 3, 20, 8), dtype), filled_cache((2, 3, 20, 8), dtype).neg()
    prefix = torch.tensor([4, 14])  # the second tree ends with the cache
    wanted = reference.keep_path(key, value, prefix, torch.tensor(path), torch.tensor(length))
    keep_path(key, value, prefix.int(), torch.tensor(path).int(), torch.tensor(length).int(), backend="triton")
    assert bits_equal(key, wanted[0]) and bits_equal(value, wanted[1])


def test_keep_path_longer_than_a_round() -> None:
    """A path of more moves than a program holds at once, each target the source of an earlier move."""
    rng = np.random.default_rng(0)
    for length in (16, 17, 40):
        chosen = np.sort(rng.choice(np.arange(1, 60), size=length - 1, replace=False))
        path = torch.tensor([[0, *chosen.tolist()] + [-1] * (44 - length)])
        key, value = filled_cache((1, 2, 70, 4)), filled_cache((1, 2, 70, 4)).neg()
        prefix, count = torch.tensor([9]), torch.tensor([length])
        wanted = reference.keep_path(key, value, prefix, path, count)
        keep_path(key, value, prefix, path, count, backend="triton")
        assert bits_equal(key, wanted[0]) and bits_equal(value, wanted[1])


@pytest.mark.parametrize(
    "layout", ["slots-before-heads", "inside-something-wider", "layers-folded", "odd-and-narrower"]
)
def test_keep_path_moves_nothing_else(layout: str) -> None:
    batch, heads, slots, dim = 2, 4, 24, 12
    shapes: dict[str, Any] = {
        "slots-before-heads": ((batch, slots, heads, dim), lambda x: x.transpose(1, 2)),
        "inside-something-wider": ((batch + 1, heads + 1, slots + 3, dim + 5), lambda x: x[1:, 1:, 2:-1, 3:-2]),
        "layers-folded": ((batch, 2, heads // 2, slots, dim), lambda x: x.flatten(1, 2)),
        "odd-and-narrower": ((batch, heads, dim, slots), lambda x: x.transpose(2, 3)),
    }
    shape, view = shapes[layout]
    stores = [filled_cache(shape), filled_cache(shape).neg()]
    wanted_stores = [store.clone() for store in stores]

    def views(stores: list[torch.Tensor]) -> list[torch.Tensor]:
        key, value = (view(store) for store in stores)
        return [key, value[..., :7] if layout == "odd-and-narrower" else value]

    prefix, length = torch.tensor([0, 18]), torch.tensor([4, 3])
    path = torch.tensor([[0, 2, 3, 5], [0, 1, 5, -1]]).t().contiguous().t()
    for copy, kept in zip(views(wanted_stores), reference.keep_path(*views(stores), prefix, path, length), strict=True):
        copy.copy_(kept)
    keep_path(*views(stores), prefix, path, length, backend="triton")
    for store, wanted_store in zip(stores, wanted_stores, strict=True):
        assert bits_equal(store, wanted_store), "what lies outside the views has moved, or the wrong slots have"


def test_keep_path_writes_nothing_outside_of_the_cache() -> None:
    """Lengths and paths are only known on the device: wrong ones touch no other memory."""
    store = filled_cache((1, 1, 12, 4))
    for prefix, path, length in ((9, [0, 2, 5], 3), (-3, [0, 2, 5], 3), (10**9, [0, 2, 3], 3), (0, [0, 1, 2], 99)):
        cache = store.clone()
        keep_path(cache, cache.clone(), torch.tensor([prefix]), torch.tensor([path]), torch.tensor([length]),
                  backend="triton")  # fmt: skip


def test_keep_path_past_two_to_the_31() -> None:
    """Only the pages that are written to exist."""
    storage = torch.empty(20 * 2**27 + 16, dtype=torch.float16)
    far, near = storage.as_strided((1, 2, 20, 4), (0, 4, 2**27, 1)), filled_cache((1, 2, 20, 4), torch.float16)
    far.copy_(near)
    arguments = torch.tensor([12]), torch.tensor([[0, 3, 7]]), torch.tensor([3])
    wanted, _ = reference.keep_path(near, near, *arguments)
    keep_path(far, near.clone(), *arguments, backend="triton")
    assert bits_equal(far, wanted)


def test_nothing_to_keep() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    cache = torch.zeros(0, 2, 8, 4)
    keep_path(cache, cache.clone(), none, none.reshape(0, 3), none, backend="triton")


def test_what_a_call_must_move() -> None:
    """Counted by hand: 2 trees of 33 nodes, so 2 words a node, int64 parents."""
    assert tree_triton.ancestor_bits_bytes(2, 33) == 2 * 33 * 8 + 2 * 33 * 2 * 4
    bits, mask = 2 * 33 * 2 * 4, 2 * 33 * 100
    assert tree_triton.tree_attention_mask_bytes(2, 33, 100) == 2 * 33 * 8 + 2 * bits + 2 * 8 + mask
    # 3 entries of 5 heads of keys 8 wide and values 4 wide in bf16, read and written
    assert tree_triton.keep_path_bytes(3, 5, 8, 4, 2) == 2 * (3 * 5 * 8 * 2 + 3 * 5 * 4 * 2)
