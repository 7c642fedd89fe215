"""`Stats`: what is counted, and what is made of it."""

from __future__ import annotations

import json
import time

import pytest
import torch
from transformers import PreTrainedModel

import mcsd
from mcsd import Drafter, Proposal, State, Stats
from mcsd.checking import require
from mcsd.stats import device_time
from tests.tiny import greedy, pad, perturbed, prompt, tiny

PROMPTS = [prompt(17, 1), prompt(4, 2), prompt(9, 3)]
NEW = 20


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny()


def test_an_empty_run_divides_nothing_by_zero() -> None:
    stats = Stats()
    assert stats.tokens_per_call == 0.0 and stats.acceptance_by_depth == [] and stats.total_seconds == 0.0
    assert stats.as_dict()["tokens_per_second"] == 0.0


def test_counts_by_depth() -> None:
    stats = Stats()
    stats.count(0, 3)  # the first candidates were rejected
    stats.count(2, 3)
    stats.count(3, 3)  # everything was accepted: nothing was on offer below
    stats.count(0, 0)  # nothing was on offer at all
    stats.count(1, 1)
    assert stats.tested_by_depth == [4, 2, 2]
    assert stats.accepted_by_depth == [3, 2, 1]
    assert stats.acceptance_by_depth == [0.75, 1.0, 0.5]


def test_time_goes_to_its_phase_even_in_an_error() -> None:
    stats = Stats()
    for _ in range(2):
        with stats.phase("score"):
            time.sleep(0.005)
    with pytest.raises(KeyError), stats.phase("draft"):
        raise KeyError
    assert stats.seconds["score"] >= 0.01 and 0 <= stats.seconds["draft"] < stats.seconds["score"]
    assert stats.total_seconds == sum(stats.seconds.values())


def test_phases_wait_for_a_gpu_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    stats = Stats()
    for kind, wanted in (("cpu", 0), ("cuda:1", 2)):
        with device_time(torch.device(kind)):
            for name in ("draft", "score"):
                with stats.phase(name):
                    pass
        assert len(waited) == wanted
    with stats.phase("draft"):
        pass
    assert waited == [torch.device("cuda:1")] * 2


def test_a_run_counts_its_own_calls_and_tokens(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    calls: list[int] = []
    target = require("target", tiny(), "auto")
    target.register_forward_pre_hook(lambda module, args: calls.append(0))
    start = time.perf_counter()
    stats = mcsd.generate(target, perturbed(llama), ids, mask, max_new_tokens=NEW, seed=2).stats
    wall = time.perf_counter() - start
    assert len(calls) == stats.target_calls + 1, "and one for the prompts"
    assert stats.tokens == 3 * NEW and stats.status == [0, 0, 0] and not stats.interrupted
    assert stats.target_calls < stats.request_calls <= 3 * stats.target_calls
    assert stats.tokens_per_call == stats.tokens / stats.request_calls > 1.0
    assert set(stats.seconds) == {"prefill", "draft", "score", "verify", "keep", "other"}
    assert 0 < stats.total_seconds <= wall
    assert all(seconds >= 0 for seconds in stats.seconds.values())
    # accepted tokens and one drawn token a step, but for what was cut off at the end of a request
    produced = sum(stats.accepted_by_depth) + stats.request_calls
    assert stats.tokens <= produced <= stats.tokens + 3 * 3
    assert stats.tested_by_depth[0] == stats.request_calls
    assert all(a <= b for a, b in zip(stats.accepted_by_depth, stats.tested_by_depth, strict=True))
    assert stats.tested_by_depth[1:] == stats.accepted_by_depth[:-1], "the tree is full: what is accepted has children"


def test_requests_that_are_over_are_not_counted(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    free = greedy(llama, ids, mask, NEW)
    end = int(free[1, ids.shape[1] + 1])
    stats = mcsd.generate(llama, llama, ids, mask, max_new_tokens=NEW, temperature=0.0, eos_token_id=end).stats
    alone = [
        mcsd.generate(llama, llama, *pad([p]), max_new_tokens=NEW, temperature=0.0, eos_token_id=end).stats
        for p in PROMPTS
    ]
    assert stats.tokens == sum(one.tokens for one in alone) < 3 * NEW
    assert stats.request_calls == sum(one.request_calls for one in alone)
    assert stats.target_calls == max(one.target_calls for one in alone)
    assert stats.accepted_by_depth == [sum(one.accepted_by_depth[d] for one in alone) for d in range(3)]


class Wrong(Drafter):
    """Offers request 0 nothing, request 1 a missing candidate, and request 2 the one that will be rejected."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text

    def propose(self, state: State) -> Proposal:
        wrong = (int(self.text[2, state.step]) + 1) % state.vocab
        tokens = [[s[-1], child] for s, child in zip(state.sequences, (5, -1, wrong), strict=True)]
        return Proposal(torch.tensor(tokens), torch.tensor([[-1, -1], [-1, 0], [-1, 0]]), 1)


def test_only_what_was_on_offer_is_tested(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    wanted = greedy(llama, ids, mask, NEW)
    found = mcsd.generate(llama, Wrong(wanted[:, ids.shape[1] :]), ids, mask, max_new_tokens=NEW, temperature=0.0)
    assert torch.equal(found.sequences, wanted)
    assert found.stats.target_calls == NEW and found.stats.tokens_per_call == 1.0
    assert found.stats.tested_by_depth == [NEW] and found.stats.accepted_by_depth == [0]


def test_a_lookup_without_a_match_offers_nothing(llama: PreTrainedModel) -> None:
    stats = mcsd.generate(llama, "ngram", *pad([[5, 6, 7]]), max_new_tokens=1).stats
    assert sum(stats.tested_by_depth) == 0 and stats.tokens_per_call == 1.0


def test_plain_numbers_for_json(llama: PreTrainedModel) -> None:
    stats = mcsd.generate(llama, perturbed(llama), *pad(PROMPTS), max_new_tokens=NEW).stats
    row = json.loads(json.dumps(stats.as_dict()))
    assert row["tokens"] == stats.tokens and row["target_calls"] == stats.target_calls
    assert row["tokens_per_call"] == pytest.approx(stats.tokens_per_call, abs=1e-4)
    assert row["acceptance_by_depth"] == pytest.approx(stats.acceptance_by_depth, abs=1e-4)
    assert row["tokens_per_second"] == pytest.approx(stats.tokens / stats.total_seconds, rel=1e-2)
    assert row["interrupted"] is False and row["status"] == [0, 0, 0]
    assert set(row["seconds"]) == set(stats.seconds)


def test_a_generation_prints_its_text_and_not_its_counters(llama: PreTrainedModel) -> None:
    found = mcsd.generate(llama, "ngram", *pad(PROMPTS[:1]), max_new_tokens=2)
    assert "sequences" in repr(found) and "target_calls" not in repr(found)
