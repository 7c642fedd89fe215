"""`verify` in Triton with rows that are no logits over one vocabulary, and with chosen siblings: as in torch."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import triton_interpreter
from test_verify_inputs import EXTRAS, NEAR, extended

from mcsd_kernels import _verify_triton, reference, verify
from mcsd_kernels._schedule import Launch

triton_interpreter.install()


@pytest.mark.parametrize("schedule", ["walk", "split"])
@pytest.mark.parametrize("proposal", cases.PROPOSALS)
@pytest.mark.parametrize("rule", cases.RULES)
def test_triton_answers_as_torch_does(monkeypatch: pytest.MonkeyPatch, rule: str, proposal: str, schedule: str) -> None:
    """Each extra alone, then some at once; decisions that float32 may take either way apart."""
    rng = np.random.default_rng([cases.RULES.index(rule), cases.PROPOSALS.index(proposal), schedule == "split"])
    monkeypatch.setattr(_verify_triton, "choose_launch", lambda *_: Launch(schedule, 1, 4, 2, int(rng.integers(0, 5))))
    mixed = [set(rng.choice(EXTRAS, 3, replace=False)) for _ in range(2)]
    for extras in [*({extra} for extra in EXTRAS), *mixed]:
        if "probabilities" in extras:
            extras.discard("bitmask")
        nodes, vocab = int(rng.integers(2, 8)), int(rng.choice([2, 5, 17, 64]))
        case = extended(rng, extras, rule=rule, proposal=proposal, nodes=nodes, vocab=vocab, batch=2)
        wanted = verify(*case.arguments, **case.options, backend="torch")
        got = verify(*case.arguments, **case.options, backend="triton")
        _, margin = reference.verify(*case.arguments, **case.options, return_margin=True)
        for request in np.flatnonzero(np.asarray(margin) > NEAR):
            for part, expected in zip(got, wanted, strict=True):
                assert part[request].equal(expected[request]), (extras, case.note)
