"""`tree_attention` against the float64 oracle, judged by the error of torch's own attention in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_tree import random_parents

from mcsd_kernels import ancestor_bits, attention, reference, tree_attention
from mcsd_kernels.tree import dense_mask, unpack_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    parents: torch.Tensor,
    prefix: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    slots: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, ...]:
    """query, key, value, ancestors, prefix_lengths on the CPU; slots past each tree hold large finite garbage."""
    generator = torch.Generator().manual_seed(seed)
    batch, nodes = len(prefix), parents.shape[-1]
    slots = slots or max(prefix) + nodes

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = normal(batch, heads, nodes, dim)
    key, value = normal(batch, kv_heads, slots, dim), normal(batch, kv_heads, slots, dim)
    for b, length in enumerate(prefix):
        key[b, :, length + nodes :] = 50.0
        value[b, :, length + nodes :] = 1e4
    return query, key, value, ancestor_bits(parents), torch.tensor(prefix)


def visible(ancestors: torch.Tensor, prefix: list[int], slots: int, window: int | None) -> torch.Tensor:
    """`[batch, rows, slots]` bool, one slot after the other."""
    batch, rows = len(prefix), ancestors.shape[1]
    mask = torch.zeros(batch, rows, slots, dtype=torch.bool)
    words = ancestors.expand(batch, -1, -1).tolist()
    for b, length in enumerate(prefix):
        for i in range(rows):
            seen = [32 * k + j for k, word in enumerate(words[b][i]) for j in range(32) if word >> j & 1]
            own = length + len(seen) - 1
            places = [(s, s) for s in range(length)] + [(length + j, length + d) for d, j in enumerate(seen)]
            for slot, position in places:
                mask[b, i, slot] = window is None or own - position < window
    return mask


def torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in the tensors' own dtype with the softmax in float32, as `transformers` writes it."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~mask[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def check(
    arguments: tuple[torch.Tensor, ...],
    device: torch.device,
    attention: Callable[..., torch.Tensor] = tree_attention,
    **options: Any,
) -> None:
    """Compare with the oracle: no worse than twice torch's own error plus a rounding of the largest entry.

    Args:
        attention: what is checked, called as `tree_attention`.
    """
    query, key, value, ancestors, prefix = arguments
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    # copies that keep the strides
    there = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x) for x in arguments]
    found = attention(*there, **moved)
    assert found.shape == (*query.shape[:3], value.shape[3]) and found.dtype == query.dtype and found.device == device
    wanted = reference.tree_attention(*arguments, **options)
    table = options.pop("block_table", None)
    if table is not None:
        key, value = (cache[table.clamp(0, len(cache) - 1)].transpose(1, 2).flatten(2, 3) for cache in (key, value))
    mask = visible(ancestors, prefix.tolist(), key.shape[2], options.pop("window", None))
    own = (torch_attention(query, key, value, mask, **options).double() - wanted).abs().max()
    rounding = torch.finfo(query.dtype).eps * wanted.abs().max()
    error = (found.cpu().double() - wanted).abs().max()
    assert error <= 2 * own + rounding, f"error {error:.2e}, torch's own {own:.2e}, an ulp {rounding:.2e}"


SIZES = [
    pytest.param(torch.tensor([-1]), [7], id="root-alone"),
    pytest.param(torch.tensor([-1]), [0], id="root-alone-without-prefix"),
    pytest.param(torch.arange(-1, 7), [9, 0], id="chain"),
    pytest.param(torch.tensor([-1] + [0] * 12), [0, 21], id="star"),
    pytest.param(random_parents(31, 0), [5, 64], id="one-short-of-a-word"),
    pytest.param(random_parents(32, 1), [0, 1], id="a-word"),
    pytest.param(random_parents(33, 2), [130, 3], id="one-past-a-word"),
    pytest.param(random_parents(64, 3), [17, 0], id="two-words"),
    pytest.param(random_parents(65, 4), [0, 128], id="one-past-two-words"),
    pytest.param(random_parents(24, 5, padding=0.4, batch=3), [40, 0, 11], id="ragged-trees-and-prefixes"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parents", "prefix"), SIZES)
def test_sizes(parents: torch.Tensor, prefix: list[int], dtype: torch.dtype, device: torch.device) -> None:
    check(make(parents, prefix, dtype=dtype), device)


def test_1024_nodes(device: torch.device) -> None:
    check(make(random_parents(1024, 6), [33], heads=2, kv_heads=1, dtype=torch.bfloat16), device)


def test_some_rows_of_a_chain_of_1024(device: torch.device) -> None:
    query, key, value, ancestors, lengths = make(torch.arange(-1, 1023), [5], heads=2, kv_heads=1)
    rows = torch.tensor([0, 31, 32, 700, 1023])
    for window in (None, 40, 1027):
        check((query[:, :, rows], key, value, ancestors[:, rows], lengths), device, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_groups(group: int, dtype: torch.dtype, device: torch.device) -> None:
    check(make(random_parents(13, 7), [20, 6], heads=2 * group, kv_heads=2, dtype=dtype), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dimensions(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(make(random_parents(9, 8), [31, 2], dim=dim, dtype=dtype), device)


@pytest.mark.parametrize("prefix", [[0, 0], [1, 30], [70, 9]], ids=["none", "short", "longer-than-the-window"])
@pytest.mark.parametrize(
    "window",
    [
        pytest.param(1, id="itself-alone"),
        pytest.param(3, id="inside-the-tree"),
        pytest.param(8, id="as-deep-as-the-tree"),
        pytest.param(20, id="into-the-prefix"),
        pytest.param(1000, id="everything"),
    ],
)
def test_window(window: int, prefix: list[int], device: torch.device) -> None:
    # a chain of eight with branches: lower ids and depths disagree
    parents = torch.tensor([-1, 0, 0, 2, 1, 3, 5, 3, 6, 8, 9, 4])
    check(make(parents, prefix), device, window=window)
    check(make(random_parents(40, 9, padding=0.2, batch=2), prefix, dtype=torch.bfloat16), device, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scale": 0.7}, id="scale"),
        pytest.param({"softcap": 2.0}, id="softcap"),
        pytest.param({"softcap": 30.0, "scale": 1.5, "window": 6}, id="softcap-scale-window"),
        pytest.param({"sinks": torch.tensor([0.0, 3.0, -torch.inf, 40.0])}, id="sinks-none-and-overwhelming"),
        pytest.param({"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "window": 4}, id="sinks-window"),
        pytest.param({"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "softcap": 5.0}, id="sinks-softcap"),
    ],
)
def test_options(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    check(make(random_parents(35, 10), [12, 0, 33], dtype=dtype), device, **options)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 4.0}], ids=["plain", "window", "softcap"])
def test_block_table(block_size: int, options: dict[str, Any], device: torch.device) -> None:
    """Blocks in any order, shared by nobody; table entries past a request's end are garbage."""
    parents, prefix = random_parents(21, 11), [37, 0, 8]
    query, _, _, ancestors, lengths = make(parents, prefix, dtype=torch.float32)
    wide = -(-(max(prefix) + 21) // block_size)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(3 * wide + 2, generator=generator)
    table = order[: 3 * wide].reshape(3, wide).to(torch.int32)
    for b, length in enumerate(prefix):
        used = -(-(length + 21) // block_size)
        table[b, used:] = torch.tensor([-1, 10**6])[torch.arange(wide - used) % 2].int()
    key = torch.randn(3 * wide + 2, 2, block_size, 16, generator=generator)
    value = torch.randn(3 * wide + 2, 2, block_size, 16, generator=generator)
    check((query, key, value, ancestors, lengths), device, block_table=table, **options)


@pytest.mark.parametrize("layout", ["nodes-before-heads", "inside-something-wider"])
def test_strided_inputs(layout: str, device: torch.device) -> None:
    query, key, value, ancestors, lengths = make(random_parents(19, 12), [25, 4], dtype=torch.float32)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if layout == "nodes-before-heads":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        wide = torch.full((x.shape[0] + 1, x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 8), float("nan"))
        wide[1:, :-1, 1:-1, :-8] = x
        return wide[1:, :-1, 1:-1, :-8]

    check((strided(query), strided(key), strided(value), ancestors, lengths), device)


def test_one_level_of_a_tree(device: torch.device) -> None:
    """Rows may be some of the nodes: their bits say who they are, their number says nothing."""
    parents = random_parents(40, 13)
    query, key, value, ancestors, lengths = make(parents, [14, 0])
    rows = torch.tensor([39, 3, 17])
    check((query[:, :, rows], key, value, ancestors[:, rows], lengths), device)
    check((query[:, :, rows], key, value, ancestors[:, rows], lengths), device, window=2)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 3.0}], ids=["plain", "window", "softcap"])
def test_a_row_that_sees_nothing_is_zero(options: dict[str, Any], device: torch.device) -> None:
    query, key, value, ancestors, _ = make(random_parents(6, 14), [0, 0])
    ancestors = ancestors.clone()
    ancestors[:, 4] = 0
    there = [x.to(device) for x in (query, key, value, ancestors, torch.tensor([0, 0]))]
    found = tree_attention(*there, **options)
    assert (found[:, :, 4] == 0).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 3.0}], ids=["plain", "window", "softcap"])
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_nan_past_the_tree_does_not_leak(paged: bool, options: dict[str, Any], device: torch.device) -> None:
    """A cache is allocated, not cleared: slots that no row sees may hold anything."""
    prefix = [5, 40, 0]
    query, key, value, ancestors, lengths = make(random_parents(9, 15), prefix, slots=96)
    wanted = reference.tree_attention(query, key, value, ancestors, lengths, **options)
    for b, length in enumerate(prefix):
        key[b, :, length + 9 :] = float("nan")
        value[b, :, length + 9 :] = float("nan")
    if paged:
        key, value = (x.unflatten(2, (6, 16)).transpose(1, 2).flatten(0, 1) for x in (key, value))
        options = options | {"block_table": torch.arange(18, device=device).reshape(3, 6)}
    found = tree_attention(*(x.to(device) for x in (query, key, value, ancestors, lengths)), **options)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=1e-5)


def test_the_batch_does_not_matter(device: torch.device) -> None:
    """The numbers of a request may change in the last digits with its batch, and no more."""
    query, key, value, ancestors, lengths = make(random_parents(12, 16, padding=0.2, batch=4), [9, 0, 30, 2])
    arguments = [x.to(device) for x in (query, key, value, ancestors, lengths)]
    whole = tree_attention(*arguments)
    for b in range(4):
        alone = tree_attention(*(x[b : b + 1] for x in arguments))
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=0, atol=1e-6)


def test_values_narrower_than_keys(device: torch.device) -> None:
    query, key, value, ancestors, lengths = make(random_parents(12, 21), [9, 0])
    value = value[..., :5]
    wanted = reference.tree_attention(query, key, torch.nn.functional.pad(value, (0, 11)), ancestors, lengths)[..., :5]
    for options in ({}, {"softcap": 1e6}):
        found = tree_attention(*(x.to(device) for x in (query, key, value, ancestors, lengths)), **options)
        assert found.shape == (2, 4, 12, 5)
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=1e-5)


def test_the_mask_of_the_host_is_the_mask_of_the_device() -> None:
    """The torch backend builds its mask in NumPy on the CPU and by torch operators elsewhere."""
    ancestors = ancestor_bits(random_parents(40, 9, padding=0.2, batch=3))
    prefix = torch.tensor([70, 0, 9])
    for nodes, slots in ((64, 134), (40, 110), (64, 75)):
        bits = unpack_bits(ancestors, nodes)
        for window in (None, 1, 4, 30, 1000):
            wanted = dense_mask(bits, prefix, slots)
            if window is not None:
                wanted &= attention._inside_window(bits, prefix, slots, window)
            found = attention._host_mask(ancestors.numpy(), prefix.tolist(), nodes, slots, window)
            assert torch.equal(torch.from_numpy(found), wanted[..., : found.shape[2]])
            assert not wanted[..., found.shape[2] :].any()


def test_autocast_does_not_matter(device: torch.device) -> None:
    case = make(random_parents(9, 0), [5, 8], dtype=torch.float32)
    for options in ({}, {"softcap": 5.0}):
        wanted = tree_attention(*case, **options)
        with torch.autocast("cpu", torch.bfloat16):
            found = tree_attention(*case, **options)
        assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("window", [None, 3])
def test_a_prefix_outside_the_slots_ends_with_them(window: int | None, device: torch.device) -> None:
    query, key, value, ancestors, _ = (x.to(device) for x in make(random_parents(6, 0), [4, 4], slots=12))
    found, wanted = (
        tree_attention(query, key, value, ancestors, torch.tensor(prefix, device=device), window=window)
        for prefix in ([-5, 99], [0, 12])
    )
    assert torch.equal(found, wanted) and torch.isfinite(found).all()


def test_an_empty_batch(device: torch.device) -> None:
    arguments = [x[:0].to(device) for x in make(random_parents(5, 0, batch=2), [3, 3])]
    assert tree_attention(*arguments).shape == (0, 4, 5, 16)


def test_neither_the_inputs_nor_the_cache_change(device: torch.device) -> None:
    arguments = [x.to(device) for x in make(random_parents(12, 17), [9, 0])]
    copies = [x.clone() for x in arguments]
    tree_attention(*arguments, window=3, softcap=2.0)
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, copies, strict=True))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        pytest.param("query", torch.zeros(4, 3, 16), id="query-without-batch"),
        pytest.param("query", torch.zeros(1, 4, 3, 16, dtype=torch.float64), id="double-query"),
        pytest.param("query", torch.zeros(1, 3, 3, 16), id="heads-not-a-multiple"),
        pytest.param("key", torch.zeros(1, 2, 9, 8), id="narrower-key"),
        pytest.param("key", torch.zeros(2, 2, 9, 16), id="key-of-another-batch"),
        pytest.param("key", torch.zeros(1, 2, 9, 16, dtype=torch.bfloat16), id="key-of-another-dtype"),
        pytest.param("value", torch.zeros(1, 2, 8, 16), id="fewer-value-slots"),
        pytest.param("ancestors", torch.zeros(1, 3, 1, dtype=torch.int64), id="long-bits"),
        pytest.param("ancestors", torch.zeros(3, 1, dtype=torch.int32), id="bits-without-batch"),
        pytest.param("ancestors", torch.zeros(1, 4, 1, dtype=torch.int32), id="bits-of-other-rows"),
        pytest.param("ancestors", torch.zeros(2, 3, 1, dtype=torch.int32), id="bits-of-another-batch"),
        pytest.param("prefix_lengths", torch.zeros(2, dtype=torch.int32), id="lengths-of-another-batch"),
        pytest.param("prefix_lengths", torch.zeros(1), id="float-lengths"),
        pytest.param("prefix_lengths", torch.zeros(1, dtype=torch.int32, device="meta"), id="lengths-elsewhere"),
        pytest.param("window", 0, id="empty-window"),
        pytest.param("window", 2.5, id="float-window"),
        pytest.param("scale", float("nan"), id="nan-scale"),
        pytest.param("scale", "1", id="text-scale"),
        pytest.param("softcap", 0.0, id="zero-softcap"),
        pytest.param("softcap", float("nan"), id="nan-softcap"),
        pytest.param("softcap", float("inf"), id="infinite-softcap-is-nan"),
        pytest.param("block_table", torch.zeros(2, 1, dtype=torch.int32), id="table-of-another-batch"),
        pytest.param("block_table", torch.zeros(1, 1), id="float-table"),
        pytest.param("sinks", torch.zeros(2), id="sinks-of-the-key-heads"),
        pytest.param("backend", "cuda", id="no-such-backend"),
        pytest.param("backend", "triton", id="triton-without-its-interpreter"),
    ],
)
def test_a_mistake_is_named(argument: str, value: Any) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 4, 3, 16),
        "key": torch.zeros(1, 2, 9, 16),
        "value": torch.zeros(1, 2, 9, 16),
        "ancestors": torch.zeros(1, 3, 1, dtype=torch.int32),
        "prefix_lengths": torch.zeros(1, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        tree_attention(**(arguments | {argument: value}))
