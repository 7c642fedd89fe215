"""`TreeCache` against a cache that is a list of lists, and prompts that are read in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mcsd
from mcsd.cache import TreeCache
from mcsd.scoring import PREFILL_CHUNK, Scorer
from mcsd.trees import TreeShape, chain_bits, columns
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
            for request, slots in enumerate(layer):
                for slot in range(CAPACITY):
                    found = stored.keys[request, :, slot], stored.values[request, :, slot]
                    wanted = slots.get(slot, (torch.zeros_like(found[0]), torch.zeros_like(found[1])))
                    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1]), (index, request, slot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_writes_and_moves_are_ragged(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    batch = 3
    cache, naive = TreeCache(len(shapes), CAPACITY), Naive(len(shapes), batch)

    def forward(first: list[int], count: int, longest: int | None = None) -> None:
        cache.place(first, count, longest)
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

    forward([0, 0, 0], 5)
    prefix = [5, 2, 4]
    for path, length in (
        ([[0, 2, 5, -1], [0, -1, -1, -1], [0, 1, 3, 6]], [3, 1, 4]),
        ([[0, 1, 2, 3], [0, 6, -1, -1], [0, 3, 5, -1]], [4, 2, 3]),  # a path that lies in order need not move
        ([[0, -1, -1, -1], [0, 1, -1, -1], [0, 2, 4, 6]], [1, 2, 4]),
    ):
        forward(prefix, 7, max(prefix))
        assert cache.get_seq_length() == max(prefix)
        cache.keep(torch.tensor(prefix), torch.tensor(path), torch.tensor(length))
        naive.keep(prefix, path, length)
        naive.check(cache)  # and nothing else has moved, not even what was rejected
        prefix = [p + n for p, n in zip(prefix, length, strict=True)]


def test_an_equal_start_takes_the_short_way() -> None:
    cache = TreeCache(1, CAPACITY)
    cache.place([3, 3], 4)
    assert cache.slots == 3
    cache.place([3, 2], 4)
    assert torch.equal(torch.as_tensor(cache.slots), torch.tensor([[3, 4, 5, 6], [2, 3, 4, 5]]))
    assert cache.used == 7 and cache.get_max_length() == CAPACITY


def test_layers_of_one_shape_share_one_allocation() -> None:
    cache = TreeCache(3, CAPACITY)
    cache.place([0, 0], 2)
    for layer, width in enumerate((4, 6, 4)):
        part = torch.ones(2, 1, 2, width)
        cache.update(part, part, layer)
    first, second, third = (cache.layers[i].keys.untyped_storage().data_ptr() for i in range(3))
    assert first == third != second


def test_more_nodes_than_slots_is_an_error() -> None:
    for first in ([CAPACITY - 2, CAPACITY - 2], [CAPACITY - 2, 0]):
        cache = TreeCache(1, CAPACITY)
        cache.place(first, 4)
        part = torch.ones(2, 1, 4, 4)
        with pytest.raises((RuntimeError, IndexError)):
            cache.update(part, part, 0)


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
    shape = TreeShape.of((3, 2, 2))
    texts = [prompt(11, 1), prompt(5, 2)]
    nodes = torch.tensor([prompt(shape.nodes, 3), prompt(shape.nodes, 4)])
    prefix = [11, 5]
    whole = Scorer(model, 60)
    parts = Scorer(model, 60)
    with torch.inference_mode(), whole.attending():
        for scorer in (whole, parts):
            scorer.prefill(columns(texts, scorer.device), prefix)
        at_once = whole.score(nodes, shape.ancestors, shape.depth, prefix)
        levels = [
            parts.score(nodes[:, a:b], shape.ancestors[:, a:b], shape.depth[a:b], prefix, offset=a)
            for a, b in zip(shape.levels, shape.levels[1:], strict=False)
        ]
    assert (torch.cat(levels, 1) - at_once).abs().max() < 1e-4


def test_missing_candidates_disturb_nobody() -> None:
    model = tiny()
    shape = TreeShape.of((2, 2))
    text = prompt(9, 1)
    tokens = torch.tensor([prompt(shape.nodes, 3)])
    missing = tokens.clone()
    missing[0, 1] = -1
    scorer = Scorer(model, 40)
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(torch.tensor([text]), [9])
        full = scorer.score(tokens, shape.ancestors, shape.depth, [9])
        holes = scorer.score(missing, shape.ancestors, shape.depth, [9])
    others = [0, 2, 5, 6]
    assert torch.allclose(full[0, others], holes[0, others], atol=1e-5)
