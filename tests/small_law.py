"""The law of a few tokens of a model over few tokens, and how far generated texts are from it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from laws import chi_square
from transformers import PreTrainedModel

import mcsd
from mcsd import Stats
from tests.tiny import tiny

VOCAB = 5
STEPS = 3
START = [1, 3, 2, 1, 3]
P = 1e-3  # the biased drafters of these tests are 0.1 and more off in total variation
Text = tuple[int, ...]


@lru_cache
def few(seed: int = 3) -> PreTrainedModel:
    """A model over five tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny("llama", seed, 1.2, vocab_size=VOCAB, intermediate_size=16, max_position_embeddings=64, **sizes)


@lru_cache
def exact(seed: int = 3) -> dict[Text, float]:
    """The law of the next `STEPS` tokens after `START` at temperature 1, by plain forwards over all contexts."""
    law: dict[Text, float] = {(): 1.0}
    for _ in range(STEPS):
        texts = torch.tensor([START + list(tokens) for tokens in law])
        with torch.inference_mode():
            logits = few(seed)(texts, attention_mask=torch.ones_like(texts), use_cache=False).logits[:, -1]
        rows = torch.softmax(logits.double(), -1).tolist()
        law = {
            (*text, v): mass * row[v] for (text, mass), row in zip(law.items(), rows, strict=True) for v in range(VOCAB)
        }
    return law


def sample(drafter: Any, count: int = 1200, **options: Any) -> tuple[list[Text], Stats]:
    """Continuations of `START`, one a seed."""
    ids = torch.tensor([START] * count)
    found = mcsd.generate(few(), drafter, ids, torch.ones_like(ids), max_new_tokens=STEPS, **{"seed": 12345, **options})
    return list(map(tuple, found.sequences[:, len(START) :].tolist())), found.stats


def p_of(found: list[Text]) -> float:
    """The smaller p of two chi-square tests: the first two tokens, and all of them together."""
    worst = 1.0
    for cut in (2, STEPS):
        wanted: dict[Text, float] = {}
        counts: dict[Text, int] = {}
        for text, mass in exact().items():
            wanted[text[:cut]] = wanted.get(text[:cut], 0.0) + mass
        for text in found:
            counts[text[:cut]] = counts.get(text[:cut], 0) + 1
        worst = min(worst, chi_square(wanted.items(), counts))
    return worst
