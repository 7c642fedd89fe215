"""Plain decoding, the other side of every comparison."""

from __future__ import annotations

import torch

from mcsd.plain import plain_decoding
from tests.tiny import greedy, prompt, tiny

SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_as_many_tokens_as_were_asked_for_and_nothing_else_is_changed() -> None:
    model = tiny()
    ids = torch.tensor([prompt(5)])
    model.generation_config.repetition_penalty = 5.0
    own = model.generation_config
    state = torch.random.get_rng_state()
    first, again, other = (plain_decoding(model, ids, 12, SAMPLING, seed) for seed in (3, 3, -(2**63)))
    assert first.shape == other.shape == (1, 17) and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    own.eos_token_id = int(first[0, 5])  # it would end the text at once
    assert torch.equal(plain_decoding(model, ids, 12, SAMPLING, 3), first)
    assert model.generation_config is own


def test_temperature_0_is_greedy() -> None:
    model = tiny()
    ids = torch.tensor([prompt(5)])
    found = plain_decoding(model, ids, 7, SAMPLING | {"temperature": 0.0}, 1)
    assert torch.equal(found, greedy(model, ids, torch.ones_like(ids), 7))
