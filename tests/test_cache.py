"""`TreeCache` against a cache that is a list of lists, and prompts that are read in chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mcsd
from mcsd.cache import BLOCK, Prefix, TreeCache
from mcsd.checking import require
from mcsd.scoring import PREFILL_CHUNK, Scorer
from mcsd.trees import StaticTree, chain_bits, columns, parents_of
from tests.tiny import greedy, pad, perturbed, plain_logits, prompt, tiny

CAPACITY = 24
# kv heads, key width, value width of each layer: two of one shape, and others of their own
SHAPES = {
    "alike": [(2, 4, 4), (2, 4, 4)],
    "differing": [(2, 4, 4), (1, 6, 6), (2, 4, 4)],
    "values-of-another-width": [(2, 6, 4), (2, 6, 4), (2, 4, 6)],
}


class Naive:
    """Slots as dictionaries, layer by layer: what was written where."""

    def __init__(self, layers: int, batch: int) -> None:
        self.slots: list[list[dict[int, Any]]] = [[{} for _ in range(batch)] for _ in range(layers)]

    def write(self, layer: int, first: list[int], key: torch.Tensor, value: torch.Tensor) -> None:
        for request, start in enumerate(first):
            for node in range(key.shape[2]):
                self.slots[layer][request][start + node] = key[request, :, node], value[request, :, node]

    def keep(self, prefix: list[int], path: list[list[int]], length: list[int]) -> None:
        for layer in self.slots:
            for request, slots in enumerate(layer):
                before = dict(slots)
                for place in range(length[request]):
                    slots[prefix[request] + place] = before[prefix[request] + path[request][place]]

    def check(self, cache: TreeCache) -> None:
        for index, layer in enumerate(self.slots):
            stored = cache.layers[index]
            keys, values = stored.store.keys[:, stored.row], stored.store.values[:, stored.row]
            assert keys.shape[2] == CAPACITY
            for request, slots in enumerate(layer):
                for slot in range(CAPACITY):
                    found = keys[request, :, slot], values[request, :, slot]
                    wanted = slots.get(slot, (torch.zeros_like(found[0]), torch.zeros_like(found[1])))
                    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1]), (index, request, slot)


def prefix_of(lengths: list[int]) -> Prefix:
    return Prefix.of(lengths, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_writes_and_moves_are_ragged(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    batch = 3
    cache, naive = TreeCache([None] * len(shapes), CAPACITY), Naive(len(shapes), batch)

    def forward(prefix: list[int], offset: int, count: int) -> None:
        cache.place(prefix_of(prefix), offset, count)
        first = [length + offset for length in prefix]
        for layer, (heads, key_width, value_width) in enumerate(shapes):
            key = torch.randn(batch, heads, count, key_width, generator=random).to(dtype)
            value = torch.randn(batch, heads, count, value_width, generator=random).to(dtype)
            keys, values = cache.update(key, value, layer)
            naive.write(layer, first, key, value)
            used = max(first) + count
            assert keys.shape == (batch, heads, used, key_width) and keys.dtype == dtype
            assert values.shape == (batch, heads, used, value_width)
            for request, start in enumerate(first):
                assert torch.equal(keys[request, :, start : start + count], key[request])
                assert torch.equal(values[request, :, start : start + count], value[request])
        naive.check(cache)

    forward([0, 0, 0], 0, 5)
    prefix = [5, 2, 4]
    for path, length in (
        ([[0, 2, 5, -1], [0, -1, -1, -1], [0, 1, 3, 6]], [3, 1, 4]),
        ([[0, 1, 2, 3], [0, 6, -1, -1], [0, 3, 5, -1]], [4, 2, 3]),  # a path that lies in order need not move
        ([[0, -1, -1, -1], [0, 1, -1, -1], [0, 2, 4, 6]], [1, 2, 4]),
    ):
        forward(prefix, 0, 3)
        forward(prefix, 3, 4)
        assert cache.get_seq_length() == max(prefix)
        cache.keep(prefix_of(prefix), torch.tensor(path), torch.tensor(length))
        naive.keep(prefix, path, length)
        naive.check(cache)  # and nothing else has moved, not even what was rejected
        prefix = [p + n for p, n in zip(prefix, length, strict=True)]


def test_an_equal_start_takes_the_short_way() -> None:
    cache = TreeCache([None], CAPACITY)
    part = torch.ones(2, 1, 4, 4)
    cache.place(prefix_of([3, 3]), 0, 4)
    cache.update(part, part, 0)
    store = cache.layers[0].store
    assert store.slots == 3
    cache.place(prefix_of([3, 2]), 0, 4)
    assert torch.equal(torch.as_tensor(store.slots), torch.tensor([[3, 4, 5, 6], [2, 3, 4, 5]]))
    assert cache.used == 7 and cache.get_max_length() == CAPACITY


def test_layers_of_one_shape_and_window_share_one_allocation() -> None:
    cache = TreeCache([None, None, None, 8], CAPACITY)
    cache.place(prefix_of([0, 0]), 0, 2)
    for layer, width in enumerate((4, 6, 4, 4)):
        part = torch.ones(2, 1, 2, width)
        cache.update(part, part, layer)
    first, second, third, fourth = (cache.layers[i].store.keys.untyped_storage().data_ptr() for i in range(4))
    assert first == third and len({first, second, fourth}) == 3


def test_more_nodes_than_slots_is_an_error() -> None:
    for first in ([CAPACITY - 2, CAPACITY - 2], [CAPACITY - 2, 0]):
        cache = TreeCache([None], CAPACITY)
        part = torch.ones(2, 1, 4, 4)
        with pytest.raises((RuntimeError, IndexError)):
            cache.place(prefix_of(first), 0, 4)
            cache.update(part, part, 0)


def test_room_grows_with_the_text_and_keeps_what_is_there() -> None:
    cache = TreeCache([None], 20_000)
    lengths, rooms = [0, 0], []
    while max(lengths) < 5_000:
        prefix = prefix_of(lengths)
        cache.place(prefix, 0, 100)
        part = torch.stack([torch.arange(n, n + 100.0) for n in lengths])[:, None, :, None].expand(2, 1, 100, 4)
        keys, values = cache.update(part, -part, 0)
        for request, length in enumerate(lengths):
            wanted = torch.arange(length + 100.0)[None, :, None].expand(1, -1, 4)
            assert torch.equal(keys[request, :, : length + 100], wanted)
            assert torch.equal(values[request, :, : length + 100], -wanted)
        store = cache.layers[0].store
        rooms.append(store.room)
        assert store.room <= 1.25 * (max(lengths) + 100) + BLOCK and store.room % BLOCK == 0
        lengths = [lengths[0] + 100, lengths[1] + 37]
    assert len(set(rooms)) < 18, "it grows by a share of itself, not at every step"


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[TreeCache]:
    """Those that generations make."""
    found: list[TreeCache] = []
    made = Scorer.__init__

    def remembers(self: Scorer, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        found.append(self.cache)

    monkeypatch.setattr(Scorer, "__init__", remembers)
    return found


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_windowed_layers_drop_what_is_behind_them(
    name: str, caches: list[TreeCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcsd.cache.BLOCK", 8)
    monkeypatch.setattr("mcsd.cache.REREAD", 1)
    monkeypatch.setattr("mcsd.scoring.PREFILL_CHUNK", 16)
    model = require("target", tiny(name), "auto")
    caches.clear()
    ids, mask = pad([prompt(70, 1), prompt(4, 2), prompt(33, 3)])
    found = mcsd.generate(model, perturbed(model), ids, mask, max_new_tokens=30, temperature=0.0)
    assert torch.equal(found.sequences, greedy(model, ids, mask, 30))
    for cache in caches:
        windowed = [layer.store for layer in cache.layers if layer.store.window is not None]
        full = [layer.store for layer in cache.layers if layer.store.window is None]
        assert windowed and all(min(store.skipped) > 8 and store.room <= 64 for store in windowed)
        assert all(store.skipped == [0, 0, 0] and store.room >= 100 for store in full)


def test_a_cache_that_is_used_again_begins_at_its_start(
    caches: list[TreeCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What windows had left behind of one text is no part of the next one."""
    monkeypatch.setattr("mcsd.cache.BLOCK", 8)
    monkeypatch.setattr("mcsd.cache.REREAD", 1)
    model = require("target", tiny("mistral"), "auto")
    caches.clear()
    ids, mask = pad([prompt(50, 1), prompt(33, 3)])
    mcsd.generate(model, "ngram", ids, mask, max_new_tokens=20, temperature=0.0)
    (cache,) = caches
    stores = [layer.store for layer in cache.layers]
    assert any(min(store.skipped) > 0 for store in stores)
    cache.reset(100)
    for store in stores:
        assert store.skipped == [0, 0] and not store.keys.any() and not store.values.any()
        assert store.skipped_on_device is None or not store.skipped_on_device.any()


def test_a_model_that_drops_the_tree_keeps_whole_windows() -> None:
    # the packed mask has one prefix length for all layers, so no layer may begin elsewhere
    model = tiny("mistral")
    scorer = Scorer(model, 100)
    forward = model.forward
    model.forward = lambda **options: forward(**{k: v for k, v in options.items() if k != "mcsd_tree"})
    text = prompt(80, 1)
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(torch.tensor([text[:-1]]), [79])
        found = scorer.score(torch.tensor([text[-1:]]), chain_bits(1), None, [79])[0, 0]
    del model.forward
    assert not scorer.cache.may_skip
    assert (found - plain_logits(model, text)).abs().max() < 1e-4


def test_a_model_that_begins_to_drop_the_tree_is_refused() -> None:
    """Once every layer has taken the tree by keyword the mask says nothing, and must not be taken for a tree."""
    model = tiny()
    scorer, text = Scorer(model, 100), prompt(21, 1)
    wanted = plain_logits(model, text)
    forward = model.forward
    with torch.inference_mode(), scorer.attending():

        def score() -> torch.Tensor:
            scorer.prefill(torch.tensor([text[:-1]]), [20])
            return scorer.score(torch.tensor([text[-1:]]), chain_bits(1), None, [20])[0, 0]

        assert (score() - wanted).abs().max() < 1e-4
        model.forward = lambda **options: forward(**{k: v for k, v in options.items() if k != "mcsd_tree"})
        with pytest.raises(RuntimeError, match="no token tree"):
            score()
        scorer.cache.reset(100)  # another generation finds out again
        assert (score() - wanted).abs().max() < 1e-4
    del model.forward


def test_the_first_tree_may_bring_the_prompt_along() -> None:
    model = tiny()
    shape = StaticTree.of(parents_of((3, 2, 2)))
    for length, chunk in ((45, 512), (45, 20), (40, 20), (1, 20)):
        texts = [prompt(length, 1), prompt(length, 2)]
        nodes = torch.tensor([prompt(shape.nodes, 3), prompt(shape.nodes, 4)])
        apart, joined = Scorer(model, 80), Scorer(model, 80)
        calls: list[int] = []
        hook = model.register_forward_hook(lambda module, args, output, calls=calls: calls.append(0))
        with torch.inference_mode(), apart.attending(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("mcsd.scoring.PREFILL_CHUNK", chunk)
            counts = []
            found = []
            for scorer, join in ((apart, False), (joined, True)):
                calls.clear()
                scorer.prefill(columns(texts, scorer.device), [length] * 2, join=join)
                found.append(scorer.score(nodes, shape.node_ancestors, shape.node_depth, [length] * 2))
                counts.append(len(calls))
                # and a second tree, after a path of the first was kept
                path = torch.tensor([[0, 2, 6, 13], [0, 3, -1, -1]])
                scorer.keep(prefix_of([length] * 2), path, torch.tensor([4, 2]))
                found.append(scorer.score(nodes, shape.node_ancestors, shape.node_depth, [length + 4, length + 2]))
        hook.remove()
        assert counts[1] == counts[0] - 1
        assert (found[0] - found[2]).abs().max() < 1e-4 and (found[1] - found[3]).abs().max() < 1e-4


def test_prompts_of_different_lengths_are_read_at_once() -> None:
    scorer = Scorer(tiny(), 40)
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(torch.tensor([prompt(9, 1), prompt(9, 2)]), [9, 7], join=True)
    assert scorer.cache.layers[0].is_initialized


# Prompts in chunks


def next_logits(model: PreTrainedModel, prompts: list[list[int]], attention: str = "auto") -> torch.Tensor:
    """`[batch, vocab]`: the prompts but for their last tokens read as a prompt, these scored as trees."""
    scorer = Scorer(model, max(map(len, prompts)) + 4, attention)
    heads = [p[:-1] for p in prompts]
    lengths = [len(head) for head in heads]
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(columns(heads, scorer.device), lengths)
        last = torch.tensor([[p[-1]] for p in prompts])
        return scorer.score(last, chain_bits(1), None, lengths)[:, 0].float()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_oss", "gptj"])
@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunks_do_not_change_the_logits(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.scoring.PREFILL_CHUNK", chunk)
    model = tiny(name)
    # 9 and 8 tokens are read beforehand: on the edge of a chunk and past it, and one prompt has nothing to read
    prompts = [prompt(29, 1), prompt(9, 2), prompt(8, 3), prompt(1, 4)]
    found = next_logits(model, prompts)
    for row, text in zip(found, prompts, strict=True):
        assert (row - plain_logits(model, text)).abs().max() < 1e-4


def test_a_prompt_longer_than_a_chunk() -> None:
    model = tiny(max_position_embeddings=1500)
    lengths = [PREFILL_CHUNK * 2 + 60, PREFILL_CHUNK + 1, PREFILL_CHUNK, 40]
    prompts = [prompt(length, length) for length in lengths]
    found = next_logits(model, prompts)
    for row, text in zip(found, prompts, strict=True):
        assert (row - plain_logits(model, text)).abs().max() < 2e-4
    ids, mask = pad(prompts[1:])
    text = mcsd.generate(model, perturbed(model), ids, mask, max_new_tokens=8, temperature=0.0).sequences
    assert torch.equal(text, greedy(model, ids, mask, 8))


def test_more_is_read_after_what_is_there() -> None:
    model = tiny()
    scorer = Scorer(model, 40)
    texts = [prompt(20, 1), prompt(14, 2)]
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(torch.tensor([t[:8] for t in texts]), [8, 3])
        rest = [texts[0][8:], texts[1][3:]]
        scorer.prefill(columns([r[:-1] for r in rest], scorer.device), [len(r) - 1 for r in rest], [8, 3])
        last = torch.tensor([[t[-1]] for t in texts])
        found = scorer.score(last, chain_bits(1), None, [19, 13])[:, 0]
    for row, text in zip(found, texts, strict=True):
        assert (row - plain_logits(model, text)).abs().max() < 1e-4


def test_a_tree_may_be_scored_in_parts() -> None:
    model = tiny()
    shape = StaticTree.of(parents_of((3, 2, 2)))
    texts = [prompt(11, 1), prompt(5, 2)]
    nodes = torch.tensor([prompt(shape.nodes, 3), prompt(shape.nodes, 4)])
    prefix = [11, 5]
    whole = Scorer(model, 60)
    parts = Scorer(model, 60)
    with torch.inference_mode(), whole.attending():
        for scorer in (whole, parts):
            scorer.prefill(columns(texts, scorer.device), prefix)
        at_once = whole.score(nodes, shape.node_ancestors, shape.node_depth, prefix)
        levels = [
            parts.score(nodes[:, a:b], shape.node_ancestors[:, a:b], shape.node_depth[a:b], prefix, offset=a)
            for a, b in pairwise((0, 1, 4, 10, 22))
        ]
    assert (torch.cat(levels, 1) - at_once).abs().max() < 1e-4


def test_missing_candidates_disturb_nobody() -> None:
    model = tiny()
    shape = StaticTree.of(parents_of((2, 2)))
    text = prompt(9, 1)
    tokens = torch.tensor([prompt(shape.nodes, 3)])
    missing = tokens.clone()
    missing[0, 1] = -1
    scorer = Scorer(model, 40)
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(torch.tensor([text]), [9])
        full = scorer.score(tokens, shape.node_ancestors, shape.node_depth, [9])
        holes = scorer.score(missing, shape.node_ancestors, shape.node_depth, [9])
    others = [0, 2, 5, 6]
    assert torch.allclose(full[0, others], holes[0, others], atol=1e-5)


def test_a_cache_without_memory_to_grow_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.cache.BLOCK", 8)
    scorer = Scorer(tiny("mistral"), 80)

    def score(tokens: int, prefix: int) -> None:
        scorer.score(torch.zeros(1, tokens, dtype=torch.int64), chain_bits(tokens), None, [prefix])

    with torch.inference_mode(), scorer.attending():
        score(10, 0)
        stores = list(scorer.cache._stores.values())
        before = [(store.room, store.skipped, store.version, store.keys.shape) for store in stores]
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_zeros", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
            with pytest.raises(torch.OutOfMemoryError):
                score(30, 10)
        assert before == [(store.room, store.skipped, store.version, store.keys.shape) for store in stores]
        score(30, 10)
