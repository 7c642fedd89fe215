"""`ancestor_bits`, `tree_attention_mask` and `keep_path` against the oracle."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch

from mcsd_kernels import ancestor_bits, keep_path, node_depths, reference, tree_attention_mask


def random_parents(nodes: int, seed: int, padding: float = 0.0, batch: int | None = None) -> torch.Tensor:
    """Trees whose parents are any earlier node that is not padding; `[nodes]`, or `[batch, nodes]`."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(batch or 1):
        row, real = [-1], [0]
        for i in range(1, nodes):
            if rng.random() < padding:
                row.append(-1)
            else:
                row.append(int(rng.choice(real)))
                real.append(i)
        rows.append(row)
    return torch.tensor(rows if batch else rows[0])


TREES = [
    *(pytest.param(torch.tensor(parents), id=name) for name, (parents, _) in cases.TREES.items()),
    pytest.param(random_parents(31, 0), id="one-short-of-a-word"),
    pytest.param(random_parents(32, 1), id="a-word-sign-bit-used"),
    pytest.param(random_parents(33, 2), id="one-past-a-word"),
    pytest.param(random_parents(64, 3), id="two-words"),
    pytest.param(random_parents(65, 4), id="one-past-two-words"),
    pytest.param(torch.arange(-1, 32), id="chain-across-a-word"),
    pytest.param(torch.tensor([-1] + [0] * 64), id="star-across-words"),
    pytest.param(random_parents(40, 5, padding=0.4, batch=3), id="ragged-batch"),
    pytest.param(torch.full((2, 5), -1), id="nothing-but-padding"),
    pytest.param(torch.arange(-1, 1023), id="chain-of-1024-deepest-possible"),
    pytest.param(random_parents(1024, 6), id="1024-nodes"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("parents", TREES)
def test_ancestor_bits(parents: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    found = ancestor_bits(parents.to(device, dtype))
    assert found.dtype == torch.int32 and found.device == device and found.is_contiguous()
    assert found.shape[0] == (parents.shape[0] if parents.dim() == 2 else 1)
    assert torch.equal(found.cpu(), reference.ancestor_bits(parents))


@pytest.mark.parametrize("parents", TREES)
def test_node_depths(parents: torch.Tensor, device: torch.device) -> None:
    ancestors = reference.ancestor_bits(parents)
    found = node_depths(ancestors.to(device))
    assert found.dtype == torch.int64 and found.shape == ancestors.shape[:2]
    assert found.tolist() == [[depth(row, i) for i in range(len(row))] for row in parents.expand(found.shape).tolist()]


def depth(parents: list[int], node: int) -> int:
    steps = 0
    while parents[node] >= 0:
        node, steps = parents[node], steps + 1
    return steps


def test_depths_of_some_rows(device: torch.device) -> None:
    ancestors = reference.ancestor_bits(torch.arange(-1, 70))[:, [40, 0, 69]]
    ancestors[0, 1] = 0
    assert node_depths(ancestors.to(device)).tolist() == [[40, -1, 69]]


@pytest.mark.parametrize(
    ("parents", "same_as"),
    [
        pytest.param([-1, 2, 0, 1], [-1, -1, 0, 1], id="parent-after-its-child"),
        pytest.param([-1, 1, 1], [-1, -1, 1], id="its-own-parent"),
        pytest.param([-1, 9, 0], [-1, -1, 0], id="no-such-node"),
        pytest.param([-1, -5, 0], [-1, -1, 0], id="below-minus-one"),
        pytest.param([0, 0, 1], [-1, 0, 1], id="a-root-with-a-parent"),
        pytest.param([2, 0, 1], [-1, 0, 1], id="a-ring"),
    ],
)
def test_a_parent_out_of_order_counts_as_none(parents: list[int], same_as: list[int], device: torch.device) -> None:
    found = ancestor_bits(torch.tensor(parents, device=device))
    assert torch.equal(found.cpu(), reference.ancestor_bits(torch.tensor(same_as)))


def test_ancestor_bits_of_strided_parents(device: torch.device) -> None:
    parents = random_parents(35, 7, padding=0.2, batch=4)
    strided = torch.full((35, 8), 99, device=device)[:, ::2].t()
    strided.copy_(parents)
    assert torch.equal(ancestor_bits(strided).cpu(), reference.ancestor_bits(parents))


def test_an_empty_batch_of_trees(device: torch.device) -> None:
    empty = torch.zeros(0, 33, dtype=torch.int64, device=device)
    assert ancestor_bits(empty).shape == (0, 33, 2)
    prefix = torch.zeros(0, dtype=torch.int64, device=device)
    assert tree_attention_mask(empty, prefix, 40).shape == (0, 1, 33, 40)


@pytest.mark.parametrize(
    ("prefix", "total"),
    [
        pytest.param([0, 0, 0], 40, id="no-prefix-exact-fit"),
        pytest.param([5, 0, 17], 57, id="ragged-exact-fit"),
        pytest.param([5, 0, 17], 100, id="ragged-slots-to-spare"),
        pytest.param([39, 2, 60], 45, id="trees-cut-off-by-the-end"),
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
def test_mask(parents: torch.Tensor, prefix: list[int], total: int, device: torch.device) -> None:
    lengths = torch.tensor(prefix, dtype=torch.int32)
    found = tree_attention_mask(parents.to(device), lengths.to(device), total)
    wanted = reference.tree_attention_mask(parents, lengths, total)
    assert found.dtype == torch.bool and found.shape == wanted.shape
    assert torch.equal(found.cpu(), wanted)


def filled_cache(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every entry differs from its neighbours, and NaN and both zeros are among them: a move must be bitwise."""
    flat = torch.arange(int(np.prod(shape)), dtype=torch.float64) * 0.37 - 50
    flat[3::11] = float("nan")
    flat[5::13] = -0.0
    return flat.reshape(shape).to(dtype)


def bits_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    kind = torch.int32 if first.dtype == torch.float32 else torch.int16
    return torch.equal(first.contiguous().view(kind).cpu(), second.contiguous().view(kind).cpu())


PATHS = [
    pytest.param([[0, -1, -1], [0, -1, -1]], [1, 1], id="nothing-accepted"),
    pytest.param([[0, 1, 2], [0, 1, 2]], [3, 3], id="already-in-place"),
    pytest.param([[0, 2, 5], [0, 3, 4]], [3, 3], id="all-move"),
    pytest.param([[0, 2, 3], [0, 2, 4]], [3, 3], id="a-source-is-the-next-target"),
    pytest.param([[0, 3, 1], [0, 2, 1]], [3, 3], id="no-path-of-a-tree-a-source-was-a-target-before"),
    pytest.param([[0, 1, 5], [0, 4, -1]], [3, 2], id="ragged"),
    pytest.param([[0, 4, 5], [0, 2, 3]], [2, 1], id="entries-after-the-length-are-not-read"),
    pytest.param([[0, 4, 5], [0, 2, 3]], [0, 0], id="length-zero"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("path", "length"), PATHS)
def test_keep_path(path: list[list[int]], length: list[int], dtype: torch.dtype, device: torch.device) -> None:
    key, value = filled_cache((2, 3, 20, 8), dtype).to(device), filled_cache((2, 3, 20, 8), dtype).neg().to(device)
    prefix = torch.tensor([4, 14])  # the second tree ends with the cache
    wanted = reference.keep_path(key.cpu(), value.cpu(), prefix, torch.tensor(path), torch.tensor(length))
    arguments = (prefix.to(device), torch.tensor(path, device=device), torch.tensor(length, device=device))
    assert keep_path(key, value, *(x.int() for x in arguments)) is None
    assert bits_equal(key, wanted[0]) and bits_equal(value, wanted[1])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("slots-before-heads", id="slots-before-heads"),
        pytest.param("inside-something-wider", id="inside-something-wider"),
        pytest.param("dim-not-contiguous", id="dim-not-contiguous"),
        pytest.param("layers-folded", id="layers-folded-into-the-heads"),
        pytest.param("narrower-values", id="values-narrower-than-keys"),
    ],
)
def test_keep_path_in_a_strided_cache(layout: str, device: torch.device) -> None:
    batch, heads, slots, dim = 3, 4, 24, 16
    shapes = {
        "slots-before-heads": ((batch, slots, heads, dim), lambda x: x.transpose(1, 2)),
        "inside-something-wider": ((batch + 1, heads + 1, slots + 3, dim + 5), lambda x: x[1:, 1:, 2:-1, 3:-2]),
        "dim-not-contiguous": ((batch, heads, dim, slots), lambda x: x.transpose(2, 3)),
        # layers, each [batch, kv_heads, slots, head_dim], in one storage: [batch, layers * kv_heads, ...] by strides
        "layers-folded": ((batch, 2, heads // 2, slots, dim), lambda x: x.flatten(1, 2)),
        "narrower-values": ((batch, heads, slots, dim), lambda x: x),
    }
    shape, view = shapes[layout]
    stores = [filled_cache(shape).to(device), filled_cache(shape).neg().to(device)]
    key, value = (view(store) for store in stores)
    if layout == "narrower-values":
        value = value[..., :7]
    assert key.data_ptr() and key.shape[:3] == (batch, heads, slots)
    prefix = torch.tensor([0, 5, 18], device=device)
    path = torch.tensor([[0, 3, 4, -1], [0, 2, 3, 5], [0, 1, 5, -1]], device=device)
    length = torch.tensor([3, 4, 3], device=device)
    wanted_stores = [store.clone() for store in stores]
    wanted = [view(store) for store in wanted_stores]
    if layout == "narrower-values":
        wanted[1] = wanted[1][..., :7]
    for copy, kept in zip(wanted, reference.keep_path(key, value, prefix, path, length), strict=True):
        copy.copy_(kept)
    keep_path(key, value, prefix, path, length)
    for store, wanted_store in zip(stores, wanted_stores, strict=True):
        assert bits_equal(store, wanted_store), "what lies outside the views has moved, or the wrong slots have"


def test_keep_path_of_random_trees(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        batch, nodes = int(rng.integers(1, 5)), int(rng.integers(1, 40))
        prefix = torch.from_numpy(rng.integers(0, 30, batch))
        key = filled_cache((batch, 2, 70, 4))
        length = torch.from_numpy(rng.integers(1, nodes + 1, batch))
        path = torch.full((batch, nodes), -1)
        for b in range(batch):
            chosen = np.sort(rng.choice(np.arange(1, nodes), size=int(length[b]) - 1, replace=False))
            path[b, : int(length[b])] = torch.tensor([0, *chosen])
        wanted, _ = reference.keep_path(key, key, prefix, path, length)
        moved = key.to(device)
        keep_path(moved, key.to(device).clone(), *(x.to(device) for x in (prefix, path, length)))
        assert bits_equal(moved, wanted)


def test_keep_path_where_values_are_a_part_of_the_keys(device: torch.device) -> None:
    """More moves than are done one by one."""
    latent = filled_cache((4, 2, 40, 8)).to(device)
    prefix, length = torch.tensor([3, 0, 9, 20], device=device), torch.full((4,), 8, device=device)
    path = (torch.arange(8) * 2).repeat(4, 1).to(device)
    wanted, _ = reference.keep_path(latent, latent, prefix, path, length)
    keep_path(latent, latent[..., :5], prefix, path, length)
    assert bits_equal(latent, wanted)


@pytest.mark.parametrize("moves", [3, 12], ids=["few", "many"])
def test_keep_path_leaves_out_slots_that_are_not_there(moves: int, device: torch.device) -> None:
    cache = filled_cache((3, 2, 30, 4)).to(device)
    path = torch.arange(moves + 1).mul(2).repeat(3, 1).to(device)
    length = torch.full((3,), moves + 1, device=device)
    prefix = torch.tensor([1, -2, 30 - moves], device=device)
    wanted = cache.clone()
    for request, start in enumerate(prefix.tolist()):
        for step in range(moves + 1):
            if start + step >= 0 and start + 2 * step < 30:
                wanted[request, :, start + step] = cache[request, :, start + 2 * step]
    keep_path(cache, cache.clone(), prefix, path, length)
    assert bits_equal(cache, wanted)


def test_keep_path_of_an_empty_batch(device: torch.device) -> None:
    cache = torch.zeros(0, 2, 8, 4, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    keep_path(cache, cache.clone(), none, none.reshape(0, 3), none)


GOOD: dict[str, dict[str, Any]] = {
    "ancestor_bits": {"parents": torch.tensor([-1, 0])},
    "node_depths": {"ancestors": torch.zeros(1, 2, 1, dtype=torch.int32)},
    "tree_attention_mask": {"parents": torch.tensor([[-1, 0]]), "prefix_lengths": torch.tensor([3]), "total": 9},
    "keep_path": {
        "key": torch.zeros(1, 2, 9, 4),
        "value": torch.zeros(1, 2, 9, 4),
        "prefix_lengths": torch.tensor([3]),
        "path": torch.tensor([[0, 1]]),
        "length": torch.tensor([1]),
    },
}
FUNCTIONS = {f.__name__: f for f in (ancestor_bits, node_depths, tree_attention_mask, keep_path)}


@pytest.mark.parametrize(
    ("function", "argument", "value"),
    [
        pytest.param("ancestor_bits", "parents", [-1, 0], id="parents-as-a-list"),
        pytest.param("ancestor_bits", "parents", torch.zeros(1, 1, 2, dtype=torch.int64), id="three-axes"),
        pytest.param("ancestor_bits", "parents", torch.zeros(0, dtype=torch.int64), id="no-nodes"),
        pytest.param("ancestor_bits", "parents", torch.zeros(2), id="float-parents"),
        pytest.param("node_depths", "ancestors", torch.zeros(2, 1, dtype=torch.int32), id="bits-without-batch"),
        pytest.param("node_depths", "ancestors", torch.zeros(1, 2, 1, dtype=torch.int64), id="long-bits"),
        pytest.param("tree_attention_mask", "prefix_lengths", torch.tensor([3, 3]), id="another-batch"),
        pytest.param("tree_attention_mask", "prefix_lengths", torch.tensor([3.0]), id="float-lengths"),
        pytest.param("tree_attention_mask", "prefix_lengths", torch.tensor([3], device="meta"), id="another-device"),
        pytest.param("tree_attention_mask", "total", 1, id="fewer-slots-than-nodes"),
        pytest.param("tree_attention_mask", "total", 9.0, id="float-total"),
        pytest.param("keep_path", "key", torch.zeros(2, 9, 4), id="key-without-heads"),
        pytest.param("keep_path", "key", torch.zeros(1, 2, 9, 4, dtype=torch.int64), id="integer-key"),
        pytest.param("keep_path", "value", torch.zeros(1, 2, 8, 4), id="fewer-value-slots"),
        pytest.param("keep_path", "prefix_lengths", torch.tensor([3, 4]), id="lengths-of-another-batch"),
        pytest.param("keep_path", "path", torch.tensor([0, 1]), id="path-without-batch"),
        pytest.param("keep_path", "path", torch.tensor([[0.0, 1.0]]), id="float-path"),
        pytest.param("keep_path", "length", torch.tensor([[1]]), id="length-with-two-axes"),
        pytest.param("keep_path", "length", torch.tensor([1], device="meta"), id="length-elsewhere"),
        *(pytest.param(function, "backend", "numpy", id=f"{function}-no-such-backend") for function in GOOD),
    ],
)
def test_a_mistake_is_named(function: str, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        FUNCTIONS[function](**(GOOD[function] | {argument: value}))
