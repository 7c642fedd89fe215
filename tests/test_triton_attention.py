"""`tree_attention` in Triton, in the interpreter, against the float64 oracle and the bar of torch's own error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton_interpreter
from test_attention import DTYPES, check, make
from test_tree import random_parents

from mcsd_kernels import _attention_triton as attention_triton
from mcsd_kernels import reference, tree_attention
from mcsd_kernels._attention_triton import AttentionLaunch, attention_bytes, attention_flops, choose_attention_launch

triton_interpreter.install()

CPU = torch.device("cpu")
# Launches that make the loops of small problems long: (rows, keys, splits)
WHOLE, SPLIT = (16, 16, 1), (16, 16, 3)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a wrapper asks for starts as NaN."""

    def poisoning(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any, **options: Any) -> torch.Tensor:
            memory = empty(*arguments, **options)
            return memory.fill_(torch.nan) if memory.is_floating_point() else memory.fill_(99)

        return call

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))


def launched(rows: int, keys: int, splits: int) -> Callable[..., torch.Tensor]:
    """`tree_attention` with this launch in place of the table's."""

    def attention(*arguments: torch.Tensor, **options: Any) -> torch.Tensor:
        scale = options.get("scale") or arguments[0].shape[-1] ** -0.5
        rest = (options.get(name) for name in ("window", "softcap", "block_table", "sinks"))
        return attention_triton.tree_attention(
            *arguments, scale, *rest, launch=AttentionLaunch(rows, keys, 4, 2, 1, splits)
        )

    return attention


TABLE = functools.partial(tree_attention, backend="triton")


@pytest.mark.parametrize(
    ("parents", "prefix", "launch"),
    [
        pytest.param(torch.tensor([-1]), [7, 0], WHOLE, id="root-alone"),
        pytest.param(torch.tensor([-1]), [37], (16, 16, 2), id="root-alone-split"),
        pytest.param(torch.arange(-1, 7), [16, 0], WHOLE, id="chain-behind-a-whole-block"),
        pytest.param(torch.tensor([-1] + [0] * 12), [0, 21], SPLIT, id="star-and-a-request-of-empty-splits"),
        pytest.param(random_parents(31, 0), [5, 40], (64, 32, 1), id="one-short-of-a-word"),
        pytest.param(random_parents(32, 1), [1], SPLIT, id="a-word-behind-less-than-a-split"),
        pytest.param(random_parents(33, 2), [50, 3], (32, 16, 2), id="one-past-a-word"),
        pytest.param(random_parents(64, 3), [17], (64, 16, 1), id="two-words"),
        pytest.param(random_parents(65, 4), [33], (64, 16, 2), id="one-past-two-words"),
        pytest.param(random_parents(24, 5, padding=0.4, batch=3), [40, 0, 11], (32, 16, 2), id="ragged"),
    ],
)
def test_sizes(parents: torch.Tensor, prefix: list[int], launch: tuple[int, int, int]) -> None:
    check(make(parents, prefix, heads=2, kv_heads=1), CPU, launched(*launch))


def test_sizes_with_the_launch_of_the_table() -> None:
    check(make(random_parents(21, 5, padding=0.3, batch=2), [300, 9], slots=600, heads=4), CPU, TABLE)
    check(make(random_parents(9, 5), [700], slots=800, heads=2, kv_heads=1, dtype=torch.bfloat16), CPU, TABLE)


def test_1024_nodes() -> None:
    arguments = make(random_parents(1024, 6), [33], heads=1, kv_heads=1, dtype=torch.bfloat16)
    check(arguments, CPU, launched(256, 32, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups(group: int, dtype: torch.dtype) -> None:
    arguments = make(random_parents(7, 7), [20, 6], heads=2 * group, kv_heads=2, dtype=dtype)
    check(arguments, CPU, launched(16, 32, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dimensions(dim: int, dtype: torch.dtype) -> None:
    check(make(random_parents(9, 8), [31], dim=dim, heads=2, kv_heads=1, dtype=dtype), CPU, launched(32, 16, 2))


# a chain of eight with branches: ids and depths disagree
BRANCHED = torch.tensor([-1, 0, 0, 2, 1, 3, 5, 3, 6, 8, 9, 4])


@pytest.mark.parametrize("prefix", [[0, 30], [70]], ids=["short", "longer-than-the-window"])
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
def test_window(window: int, prefix: list[int]) -> None:
    check(make(BRANCHED, prefix, heads=2, kv_heads=1), CPU, launched(16, 16, 2), window=window)


def test_a_window_that_ends_in_another_word() -> None:
    """A chain across words, and trees in which the rows of a block are of any depth."""
    chain = make(torch.arange(-1, 69), [9], heads=1, kv_heads=1)
    for window in (2, 33, 60):
        check(chain, CPU, launched(32, 16, 1), window=window)
    trees = make(random_parents(40, 9, padding=0.2, batch=2), [12, 0], heads=2, kv_heads=1, dtype=torch.bfloat16)
    check(trees, CPU, launched(64, 16, 2), window=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("launch", [(64, 16, 1), (64, 16, 3)], ids=["whole", "split"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scale": 0.7}, id="scale"),
        pytest.param({"softcap": 2.0}, id="softcap"),
        pytest.param({"softcap": 30.0, "scale": 1.5, "window": 6}, id="softcap-scale-window"),
        pytest.param({"sinks": torch.tensor([40.0, -torch.inf])}, id="sinks-none-and-overwhelming"),
        pytest.param({"sinks": torch.tensor([0.5, -1.0]), "window": 4}, id="sinks-window"),
        pytest.param({"sinks": torch.tensor([3.0, -1.0]), "softcap": 5.0}, id="sinks-softcap"),
    ],
)
def test_options(options: dict[str, Any], launch: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make(random_parents(29, 10), [33], heads=2, kv_heads=1, dtype=dtype), CPU, launched(*launch), **options)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    arguments = make(random_parents(9, 10), [12], heads=2, kv_heads=1)
    check(arguments, CPU, TABLE, scale=scale)
    check(arguments, CPU, TABLE, scale=scale, softcap=1.5)


def paged(block_size: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Blocks in any order; table entries past a request's end are garbage, in and outside the cache."""
    parents, prefix = random_parents(21, 11), [37, 8]
    query, _, _, ancestors, lengths = make(parents, prefix, heads=2, kv_heads=1)
    wide = -(-(max(prefix) + 21) // block_size)
    generator = torch.Generator().manual_seed(3)
    table = torch.randperm(2 * wide + 2, generator=generator)[: 2 * wide].reshape(2, wide).int()
    used = -(-(8 + 21) // block_size)
    table[1, used:] = torch.tensor([-1, 10**6])[torch.arange(wide - used) % 2].int()
    key, value = (torch.randn(2 * wide + 2, 1, block_size, 16, generator=generator) for _ in range(2))
    return (query, key, value, ancestors, lengths), table


@pytest.mark.parametrize(
    ("block_size", "options"),
    [
        pytest.param(1, {}, id="a-slot-a-block"),
        pytest.param(5, {}, id="no-multiple-of-anything"),
        pytest.param(24, {"window": 5}, id="window"),
        pytest.param(64, {"softcap": 4.0}, id="softcap"),
    ],
)
def test_block_table(block_size: int, options: dict[str, Any]) -> None:
    arguments, table = paged(block_size)
    check(arguments, CPU, launched(64, 16, 2), block_table=table, **options)


def test_a_strided_block_table_of_int64() -> None:
    arguments, table = paged(16)
    strided = torch.full((table.shape[1], 6), 10**9)[:, ::3].t().copy_(table)
    check(arguments, CPU, launched(64, 16, 1), block_table=strided)


@pytest.mark.parametrize("layout", ["nodes-before-heads", "inside-something-wider", "dim-not-contiguous"])
def test_strided_inputs(layout: str) -> None:
    query, key, value, ancestors, lengths = make(random_parents(19, 12), [25, 4], heads=4, kv_heads=2)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if layout == "nodes-before-heads":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "dim-not-contiguous":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        wide = torch.full((x.shape[0] + 1, x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 8), float("nan"))
        wide[1:, :-1, 1:-1, :-8] = x
        return wide[1:, :-1, 1:-1, :-8]

    bits = ancestors.repeat(2, 1, 1).transpose(1, 2).contiguous().transpose(1, 2)
    spaced = torch.stack([lengths, lengths + 99], 1)[:, 0]
    check((strided(query), strided(key), strided(value), bits, spaced), CPU, launched(32, 16, 1))


def test_the_result_lies_in_memory_as_the_query_does() -> None:
    """A model's query is `[batch, nodes, heads, dim]` in memory, and so is what it wants back."""
    query, *rest = make(random_parents(9, 12), [5], heads=4)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert tree_attention(query, *rest, backend="triton").stride() == query.stride()
    wide = torch.cat([query, query], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, 1:5]
    assert tree_attention(wide, *rest, backend="triton").transpose(1, 2).is_contiguous()


def test_values_narrower_than_keys() -> None:
    query, key, value, ancestors, lengths = make(random_parents(12, 21), [9, 0])
    wanted = reference.tree_attention(query, key, value, ancestors, lengths)[..., :5]
    for launch in (WHOLE, SPLIT):
        found = launched(*launch)(query, key, value[..., :5], ancestors, lengths)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


def test_offsets_past_two_to_the_31() -> None:
    """Caches whose strides of a slot, a head and a block reach that far; only the pages that are written to exist."""
    arguments = make(random_parents(5, 13), [14], heads=2, kv_heads=2, dtype=torch.float16)
    query, key, value, ancestors, lengths = arguments
    key_storage = torch.empty(18 * 2**27 + 64, dtype=torch.float16)
    value_storage = torch.empty(2**31 + 512, dtype=torch.float16)
    far_key = key_storage.as_strided(key.shape, (0, 32, 2**27, 1)).copy_(key)
    far_value = value_storage.as_strided(value.shape, (0, 2**31 + 16, 16, 1)).copy_(value)
    found = launched(16, 16, 1)(query, far_key, far_value, ancestors, lengths)
    assert torch.equal(found, launched(16, 16, 1)(*arguments))
    # 19 blocks of one slot, 2^27 entries apart
    pages = key_storage.as_strided((19, 2, 1, 16), (2**27, 32, 16, 1))
    table = torch.arange(19)[None]
    values = value.transpose(1, 2).reshape(19, 2, 1, 16)
    found = launched(16, 16, 1)(query, pages, values, ancestors, lengths, block_table=table)
    torch.testing.assert_close(found, launched(16, 16, 1)(*arguments), rtol=0, atol=1e-3)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 3.0}], ids=["plain", "window", "softcap"])
def test_one_level_and_rows_that_see_nothing(options: dict[str, Any], splits: int) -> None:
    """Rows may be some of the nodes; one without bits or prefix is zero, and never NaN."""
    parents = random_parents(40, 13)
    query, key, value, ancestors, lengths = make(parents, [14, 0], heads=2, kv_heads=1)
    rows = torch.tensor([39, 3, 17])
    arguments = query[:, :, rows], key, value, ancestors[:, rows].clone(), lengths
    arguments[3][:, 1] = 0
    check(arguments, CPU, launched(16, 16, splits), **options)
    found = launched(16, 16, splits)(*arguments, **options)
    assert (found[1, :, 1] == 0).all() and found.isfinite().all()
    sunk = launched(16, 16, splits)(*arguments, **options, sinks=torch.tensor([1.0, -torch.inf]))
    assert (sunk[1, :, 1] == 0).all() and sunk.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"window": 3}], ids=["plain", "window"])
@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "paged"])
def test_nan_where_nobody_looks_does_not_leak(is_paged: bool, options: dict[str, Any]) -> None:
    """A cache is allocated, not cleared; and where the rows are a level, the deeper nodes are not there yet."""
    prefix = [5, 40, 0]
    query, key, value, ancestors, lengths = make(random_parents(9, 15), prefix, slots=64, heads=2, kv_heads=1)
    arguments = query[:, :, :5], key, value, ancestors[:, :5], lengths
    wanted = reference.tree_attention(*arguments, **options)
    for b, length in enumerate(prefix):
        key[b, :, length + 5 :] = float("nan")
        value[b, :, length + 5 :] = float("nan")
    if is_paged:
        key, value = (x.unflatten(2, (4, 16)).transpose(1, 2).flatten(0, 1) for x in (key, value))
        options = options | {"block_table": torch.arange(12).reshape(3, 4)}
    for launch in ((16, 16, 1), (16, 16, 2)):
        found = launched(*launch)(query[:, :, :5], key, value, ancestors[:, :5], lengths, **options)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2])
def test_nan_that_is_looked_at_reaches_the_output(splits: int) -> None:
    query, key, value, ancestors, lengths = make(random_parents(5, 15), [30], heads=2, kv_heads=1)
    query[0, 1, 2, 0] = torch.nan
    found = launched(16, 16, splits)(query, key, value, ancestors, lengths)
    assert found[0, 1, 2].isnan().all() and found.isnan().sum() == 16


def test_a_prefix_that_does_not_fit_reads_nothing_outside() -> None:
    """Lengths are only known on the device: a wrong one gives a wrong answer, and touches no other memory."""
    query, key, value, ancestors, _ = make(random_parents(5, 15), [11], heads=2, kv_heads=1)
    for length in (-3, 13, 16, 10**6):
        launched(16, 16, 2)(query, key, value, ancestors, torch.tensor([length]))


def test_nothing_depends_on_the_schedule_of_the_programs() -> None:
    arguments = make(random_parents(9, 16), [40, 3], heads=2, kv_heads=1)
    wanted = launched(16, 16, 3)(*arguments)
    with triton_interpreter.interleave(1, fine=True):
        assert torch.equal(launched(16, 16, 3)(*arguments), wanted)


def test_an_empty_batch() -> None:
    arguments = [x[:0] for x in make(random_parents(5, 0, batch=2), [3, 3])]
    assert tree_attention(*arguments, backend="triton").shape == (0, 4, 5, 16)


def test_a_head_that_is_too_long_is_named_or_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(torch.tensor([-1]), [3], dim=512)
    with pytest.raises(ValueError, match=r'^backend: expected "torch" for head dimensions above 256, got "triton"'):
        tree_attention(*arguments, backend="triton")
    monkeypatch.setattr("mcsd_kernels.attention.choose", lambda backend, device: backend or "triton")
    check(arguments, CPU)


def test_the_launch_is_a_function_of_shapes() -> None:
    """More rows than a block make more programs, and splits fill the device once and no more."""
    for itemsize in (2, 4):
        for head_dim in (16, 64, 80, 128, 256):
            for rows in (1, 16, 17, 64, 100, 4096):
                for heads in (1, 8, 64, 1024):
                    for slots in (1, 500, 4096, 32_768, 10**6):
                        launch = choose_attention_launch(head_dim, itemsize, rows, slots, heads, 132)
                        programs = -(-rows // launch.block_rows) * heads
                        assert launch.splits == 1 or programs * launch.splits <= 132 * launch.resident
                        assert launch.splits * 256 <= max(slots, 256)
                        assert launch.splits * triton.next_power_of_2(head_dim) <= 1 << 14
    assert choose_attention_launch(128, 2, 64 * 4, 4160, 8, 132).splits > 4
    assert choose_attention_launch(128, 2, 64 * 4, 4160, 8, 132, amd=True).num_stages == 2


def test_what_a_call_must_move_and_multiply() -> None:
    """Counted by hand: 2 requests, 4 query heads, 2 key heads, 3 nodes behind 5 slots, 8 wide, bf16."""
    keys = values = 2 * 2 * (5 + 3) * 8 * 2
    queries = outputs = 2 * 4 * 3 * 8 * 2
    bits, lengths = 3 * 4, 2 * 4
    floor = keys + values + queries + outputs + bits + lengths
    assert attention_bytes(2, 4, 2, 3, 5, 8, 2) == floor
    parts = sums = 2 * 4 * 3 * 2 * 4
    assert attention_bytes(2, 4, 2, 3, 5, 8, 2, splits=2) == floor + 2 * (parts * 8 + sums)
    # a root and two children: they see 1 + 2 + 2 nodes; each pair costs 8 + 8 multiplications and as many additions
    assert attention_flops(2, 4, 3, 5, 8, tree_pairs=5) == 2 * 4 * (3 * 5 + 5) * 2 * (8 + 8)
