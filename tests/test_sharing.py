"""One model in several hands at once: drafters, nested generations, threads, autocast."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mcsd
from mcsd import ModelDrafter
from mcsd.cache import REREAD
from mcsd.draft_model import SubVocabularyDraft
from mcsd.drafters import Drafter, NgramDrafter, Proposal, State
from mcsd.drafters.early_exit import EarlyExitDrafter
from mcsd.drafters.merged import MergedDrafter
from mcsd.drafters.reading import read_all
from mcsd.drafters.topk import TopKDrafter
from mcsd.hidden import why_not
from tests.test_feature_drafter import feature_model
from tests.tiny import VOCAB, greedy, prompt, tiny

IDS = torch.tensor([prompt(10)])
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny(num_hidden_layers=3)


@pytest.fixture(scope="module")
def draft() -> PreTrainedModel:
    return tiny(seed=5)


def attends(*models: PreTrainedModel) -> list[Any]:
    return [model.config._attn_implementation for model in models]


def test_two_drafters_of_one_model_leave_it_as_it_was(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    before = attends(llama, draft)
    for drafters in (
        [ModelDrafter(draft, (2, 1)), TopKDrafter(draft, 2, 2, 4)],
        [TopKDrafter(draft, 2, 2, 4), ModelDrafter(draft, (2, 1))],
        [EarlyExitDrafter(llama, 1, (1,), "point"), EarlyExitDrafter(llama, 2, (2,))],
    ):
        found = mcsd.generate(llama, MergedDrafter(drafters), IDS, MASK, max_new_tokens=12, temperature=0.0)
        assert torch.equal(found.sequences, greedy(llama, IDS, MASK, 12))
        assert attends(llama, draft) == before


def test_drafters_end_in_the_reverse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    drafters = [mcsd.NgramDrafter() for _ in range(3)]
    for number, drafter in enumerate(drafters):
        monkeypatch.setattr(drafter, "end", partial(order.append, number))
    MergedDrafter(drafters).end()
    assert order == [2, 1, 0]


@pytest.mark.parametrize("kind", ["ngram", "draft", "draft and ngram", "hidden states"])
def test_one_model_in_two_threads(llama: PreTrainedModel, draft: PreTrainedModel, kind: str) -> None:
    wanted, before = greedy(llama, IDS, MASK, 40), attends(llama, draft)
    drafts: list[Any] = {
        "ngram": ["ngram", "ngram"],
        "draft": [draft, draft],
        "draft and ngram": [draft, "ngram"],
        "hidden states": [mcsd.FeatureDrafter(feature_model(llama)), "ngram"],
    }[kind]
    assert why_not(llama) is None  # once a model it is run by itself
    start = threading.Barrier(2)
    found: list[Any] = []

    def run(own: Any) -> None:
        start.wait()
        try:
            for _ in range(4):
                text = mcsd.generate(llama, own, IDS, MASK, max_new_tokens=40, temperature=0.0).sequences
                found.append(torch.equal(text, wanted))
        except Exception as error:  # an assertion in a thread would be lost
            found.append(error)

    threads = [threading.Thread(target=run, args=(own,)) for own in drafts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert attends(llama, draft) == before
    assert torch.equal(greedy(llama, IDS, MASK, 40), wanted)


def test_a_generation_inside_another_one(llama: PreTrainedModel) -> None:
    """With the same target and draft, whose head is reduced while it drafts."""
    base = tiny(seed=5)
    inner = SubVocabularyDraft(copy.deepcopy(base.config), 60).eval()
    inner.lm_head.sub_vocab.copy_(torch.randperm(VOCAB)[:60].sort().values)
    options: Any = {"input_ids": IDS, "attention_mask": MASK, "temperature": 0.0}

    def nested(stats: mcsd.Stats) -> None:
        mcsd.generate(llama, inner, max_new_tokens=3, **options)

    found = mcsd.generate(llama, inner, max_new_tokens=20, callback=nested, **options)
    assert torch.equal(found.sequences, greedy(llama, IDS, MASK, 20))
    assert inner(IDS).logits.shape[-1] == VOCAB


def test_a_model_that_mcsd_generates_with_says_so(llama: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match="While mcsd generates"):
        mcsd.generate(llama, "ngram", IDS, MASK, max_new_tokens=4, callback=lambda stats: llama(IDS))
    assert llama(IDS).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_autocast(family: str) -> None:
    model = tiny(family, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mcsd.generate(model, "ngram", IDS, MASK, max_new_tokens=8, temperature=0.0).sequences
        assert torch.equal(found, greedy(model, IDS, MASK, 8))
        verdict = mcsd.check(model)
    assert verdict and verdict.tolerance > mcsd.check(model).tolerance


def test_a_top_k_tree_of_another_vocabulary_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB} tokens, got 130"):
        mcsd.generate(llama, TopKDrafter(tiny(vocab_size=130), 2, 2, 4), IDS, MASK, max_new_tokens=4)


@pytest.mark.parametrize("new", [(1, 1), (200, 1), (1, 130, 64), (65, 0), (300, 300), (64, 1)])
def test_what_is_read_again_stays_in_the_cache(new: Sequence[int]) -> None:
    """However much one request has to read, another reads no more than REREAD tokens of its own again."""

    class Recorded:
        """A scorer whose logits are the tokens."""

        def __init__(self, cached: list[int]) -> None:
            self.cached = cached

        def score(self, tokens: torch.Tensor, ancestors: torch.Tensor, depths: None, start: list[int]) -> torch.Tensor:
            assert all(first <= read for first, read in zip(start, self.cached, strict=True)), "a gap"
            if max(new) - min(new) > REREAD:
                assert all(first >= read - REREAD for first, read in zip(start, self.cached, strict=True))
            assert all(first >= 0 for first in start)
            ends = zip(start, texts, self.cached, strict=True)
            self.cached = [max(read, min(first + tokens.shape[1], len(text))) for first, text, read in ends]
            return tokens[..., None].float()

    texts = [[1000 * b + i for i in range(400 + 7 * b + count)] for b, count in enumerate(new)]
    scorer = Recorded([400 + 7 * b for b in range(len(new))])
    state: Any = type("State", (), {"sequences": texts, "device": torch.device("cpu")})
    logits = read_all(scorer, state, list(scorer.cached))  # type: ignore[arg-type]
    assert logits.shape == (len(new), 1, 1)
    assert logits.flatten().tolist() == [float(text[-1]) for text in texts]
    assert scorer.cached == [len(text) for text in texts]


class Nothing(Drafter):
    """Proposes no token, and remembers nothing."""

    def propose(self, state: State) -> Proposal:
        return Proposal(state.tail[:, -1:], torch.full((1,), -1, dtype=torch.int32), 0)


def test_a_drafter_has_one_generation_at_a_time(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    drafter, nothing = ModelDrafter(draft, (2, 2)), Nothing()
    refused = "draft: expected a drafter that no other generation is in the middle of"

    def inside(stats: mcsd.Stats) -> None:
        with pytest.raises(ValueError, match=refused):
            mcsd.generate(llama, drafter, IDS, max_new_tokens=4)

    def fails(stats: mcsd.Stats) -> None:
        raise RuntimeError("stop")

    wanted = mcsd.generate(llama, drafter, IDS, max_new_tokens=12).sequences
    assert torch.equal(mcsd.generate(llama, drafter, IDS, max_new_tokens=12, callback=inside).sequences, wanted)
    with pytest.raises(RuntimeError, match="stop"):
        mcsd.generate(llama, drafter, IDS, max_new_tokens=12, callback=fails)
    assert torch.equal(mcsd.generate(llama, drafter, IDS, max_new_tokens=12).sequences, wanted)
    again = partial(mcsd.generate, llama, nothing, IDS, max_new_tokens=3)
    found = again(callback=lambda _: [again().sequences])
    assert torch.equal(found.sequences, again().sequences)


def test_nor_have_the_drafters_inside_it(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    inside, ngram = ModelDrafter(draft, (2, 2)), NgramDrafter()
    refused = "draft: expected a drafter that no other generation is in the middle of"
    pairs = [
        (inside, MergedDrafter([inside, NgramDrafter()])),
        (MergedDrafter([inside, ngram]), inside),
        (MergedDrafter([inside, ngram]), MergedDrafter([ModelDrafter(draft, (2, 2)), ngram])),
    ]
    for outer, nested in pairs:

        def generate(stats: mcsd.Stats, nested: Drafter = nested) -> None:
            with pytest.raises(ValueError, match=refused):
                mcsd.generate(llama, nested, IDS, max_new_tokens=4)

        mcsd.generate(llama, outer, IDS, max_new_tokens=6, callback=generate)
