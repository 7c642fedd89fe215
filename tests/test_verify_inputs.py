"""`verify` with rows that are no logits over one vocabulary, and with chosen siblings beside drawn ones."""

from __future__ import annotations

import os
from typing import Any

import cases
import elsewhere
import numpy as np
import pytest
import torch

from mcsd_kernels import (
    SamplingParams,
    Status,
    _rows_torch,
    draw_candidates,
    draw_uniforms,
    reference,
    row_cutoffs,
    verify,
)

# `test_triton_verify_inputs` runs some of these tests once more
BACKENDS = ["triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"]


def differing(case: cases.Case, device: str = "cpu") -> list[int]:
    """Requests that the backend, on a device, and the oracle answer differently, close decisions apart."""
    expected, margin = reference.verify(*case.arguments, **case.options, return_margin=True)
    there = case.to(device)
    got = verify(*there.arguments, **there.options)
    same = torch.ones(len(margin), dtype=torch.bool)
    for a, b in zip(expected, got, strict=True):
        same &= (a == b.cpu()).reshape(len(margin), -1).all(1)
    return [b for b in range(len(margin)) if not same[b] and margin[b] > cases.NEAR]


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", cases.PROPOSALS)
@pytest.mark.parametrize("extra", cases.EXTRAS)
def test_equals_the_oracle(extra: str, proposal: str, rule: str) -> None:
    for seed in range(12):
        rng = np.random.default_rng([seed, cases.EXTRAS.index(extra)])
        assert not differing(cases.extended(rng, {extra}, proposal=proposal, rule=rule)), seed


@pytest.mark.parametrize("rule", cases.RULES)
def test_equals_the_oracle_with_everything_at_once(rule: str) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        assert not differing(
            cases.extended(rng, {"draft-probabilities", "bitmask", "draft-ids", "point-nodes"}, rule=rule)
        )
        assert not differing(cases.extended(rng, {"probabilities", "draft-ids", "point-nodes"}, rule=rule)), seed


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", cases.PROPOSALS)
@pytest.mark.parametrize("extra", cases.EXTRAS)
def test_equals_the_oracle_on_long_rows(extra: str, proposal: str, rule: str) -> None:
    options: dict[str, Any] = {"rule": rule, "proposal": proposal, "vocab": 9000, "batch": 2, "nodes": 6}
    for seed in range(4):
        rng = np.random.default_rng([seed, cases.EXTRAS.index(extra)])
        assert not differing(cases.extended(rng, {extra}, **options)), seed


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", cases.PROPOSALS)
@pytest.mark.parametrize("extra", [None, *cases.EXTRAS])
def test_equals_the_oracle_on_another_device(extra: str | None, proposal: str, rule: str) -> None:
    """Long rows are NumPy's on a CPU alone."""
    extras = {extra} if extra else set()
    for vocab in (300, 9000):
        rng = np.random.default_rng(vocab)
        case = cases.extended(rng, extras, rule=rule, proposal=proposal, vocab=vocab, batch=3, nodes=6)
        assert not differing(case, f"{elsewhere.NAME}:0"), vocab


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", cases.PROPOSALS)
@pytest.mark.parametrize("highest", [8192, 8196], ids=["all-tokens", "some-no-token"])
def test_a_draft_vocabulary_in_order(highest: int, proposal: str, rule: str) -> None:
    """Ids that ascend; a few may lie past the vocabulary's end, and some candidates are no ids."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(np.append(np.sort(rng.choice(8192, 500, replace=False)), np.arange(8192, highest)))
    parents = torch.tensor([-1, 0, 0, 0, 1, 1, 4])
    for seed in range(12):
        target, draft = (torch.from_numpy(2 * rng.standard_normal((3, 7, n))).float() for n in (8192, len(ids)))
        target[..., ids[ids < 8192]] += 6
        tokens = ids[torch.from_numpy(rng.integers(0, 500, (3, 7)))].clamp(max=8191)
        tokens[torch.from_numpy(rng.random((3, 7)) < 0.1)] = 77
        case = cases.Case(
            (target, draft, tokens, parents, draw_uniforms(torch.arange(3), seed, 9)),
            {"proposal": proposal, "rule": rule, "draft_ids": ids},
            "",
        )
        assert not differing(case), seed


def test_ids_that_change_are_looked_at_again() -> None:
    ids, others = torch.tensor([2, 3, 7]), torch.tensor([4, 1])
    for _ in range(2):
        assert _rows_torch.span(ids) == (2, 7, True)
    ids[0] = 5
    assert _rows_torch.span(ids) == (3, 7, False)
    ids.numpy()[:] = [1, 2, 3]  # a write that torch does not see
    assert _rows_torch.span(ids) == (1, 3, True)
    ids.data = torch.tensor([9, 8])
    assert _rows_torch.span(ids) == (8, 9, False)
    assert _rows_torch.span(others) == (1, 4, False)
    with torch.inference_mode():
        made_there = torch.tensor([0, 6])
        assert _rows_torch.span(made_there) == (0, 6, True)
        made_there[1] = 0
        assert _rows_torch.span(made_there) == (0, 0, False)
    del others
    assert _rows_torch.span(torch.tensor([9])) == (9, 9, True)


def test_probabilities_decide_as_their_logits_do() -> None:
    rng = np.random.default_rng(3)
    logits, draft = torch.randn(64, 5, 40), torch.randn(64, 5, 40)
    tokens, parents = torch.from_numpy(rng.integers(0, 40, (64, 5))), torch.tensor([-1, 0, 0, 1, 1])
    uniforms = draw_uniforms(torch.arange(64), 0, 7)
    laws = [torch.softmax(x.double(), -1).float() for x in (logits, draft)]
    by_logits = verify(logits, draft, tokens, parents, uniforms)
    by_laws = verify(*laws, tokens, parents, uniforms, inputs="probabilities")
    mixed = verify(logits, laws[1], tokens, parents, uniforms, draft_inputs="probabilities")
    same = (by_logits.tokens == by_laws.tokens).all(1) & (by_logits.tokens == mixed.tokens).all(1)
    assert same.float().mean() > 0.98  # the rest hangs on the last bit of a row


@pytest.mark.parametrize("vocab", [40, 9000], ids=["short-rows", "long-rows"])
def test_a_broken_law_ends_its_own_request(vocab: int) -> None:
    target = torch.softmax(torch.randn(4, 2, vocab), -1)
    draft = torch.zeros(4, 2, vocab)
    draft[:, :, 3] = 1.0
    target[:, 0, 3] = 0.0  # the candidate is rejected, so that the whole row is read
    target[1, 0, 7] = torch.nan
    target[2] = 0.0
    tokens = torch.tensor([[0, 3]]).expand(4, 2)
    out = verify(target, draft, tokens, torch.tensor([-1, 0]), torch.full((4, 4), 0.5), inputs="probabilities")
    assert out.status.tolist() == [0, Status.NAN_ROW, Status.EMPTY_ROW, 0]
    assert out.length.tolist() == [1, 1, 1, 1]
    assert out.tokens[1, 0] == out.tokens[2, 0] == 0


@pytest.mark.parametrize("vocab", [40, 9000], ids=["short-rows", "long-rows"])
def test_a_broken_law_of_a_leaf_is_found_by_the_draw(vocab: int) -> None:
    target = torch.softmax(torch.randn(3, 1, vocab), -1)
    target[0, 0, vocab - 1] = torch.nan
    target[1] = 0.0
    tokens, uniforms = torch.zeros(3, 1).long(), torch.full((3, 3), 0.5)
    call = (target, None, tokens, torch.tensor([-1]), uniforms)
    out = verify(*call, proposal="point", inputs="probabilities")
    assert out.status.tolist() == [Status.NAN_ROW, Status.EMPTY_ROW, 0]
    assert reference.verify(*call, proposal="point", inputs="probabilities").status.tolist() == out.status.tolist()


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", ["without_replacement", "greedy", "point"])
@pytest.mark.parametrize("vocab", [40, 9000], ids=["short-rows", "long-rows"])
def test_a_leaf_without_a_law_ends_its_request_as_the_oracle_says(vocab: int, proposal: str, rule: str) -> None:
    case = cases.leaves_without_law(vocab, proposal, rule)
    out = verify(*case.arguments, **case.options)
    wanted = reference.verify(*case.arguments, **case.options)
    assert all(torch.equal(mine, its) for mine, its in zip(out, wanted, strict=True)), (out, wanted)
    assert out.status.tolist() == [Status.NAN_ROW, Status.EMPTY_ROW, Status.NAN_ROW, 0]
    assert out.length.tolist() == [2 if rule == "recursive" else 1] * 3 + [2]


@pytest.mark.parametrize("vocab", [40, 9000], ids=["short-rows", "long-rows"])
def test_a_column_of_no_token_is_not_read(vocab: int) -> None:
    target = torch.softmax(torch.randn(2, 2, vocab), -1)
    draft = torch.full((2, 2, 3), 0.5)
    draft[:, :, 2] = torch.nan
    ids = torch.tensor([0, 1, vocab])
    tokens, uniforms = torch.tensor([[0, 1]] * 2), torch.full((2, 4), 0.99)
    out = verify(target, draft, tokens, torch.tensor([-1, 0]), uniforms, inputs="probabilities", draft_ids=ids)
    draft[:, :, 2] = 0.0
    known = verify(target, draft, tokens, torch.tensor([-1, 0]), uniforms, inputs="probabilities", draft_ids=ids)
    assert out.status.tolist() == [0, 0]
    assert torch.equal(out.tokens, known.tokens) and torch.equal(out.path, known.path)


def test_a_mask_that_allows_nothing_is_an_empty_row() -> None:
    mask = torch.zeros(2, 1, 2, dtype=torch.int32)
    mask[1, 0, 0] = 1 << 5
    out = verify(
        torch.zeros(2, 1, 40), None, torch.zeros(2, 1).long(), torch.tensor([-1]), torch.full((2, 3), 0.9),
        proposal="point", bitmask=mask,
    )  # fmt: skip
    assert out.status.tolist() == [Status.EMPTY_ROW, 0]
    assert out.tokens.tolist() == [[0], [5]]


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", ["without_replacement", "greedy"])
def test_law_of_a_mixed_tree_under_a_mask_from_a_smaller_vocabulary(proposal: str, rule: str) -> None:
    """Two drawn children and a chosen one, a draft over three of six tokens, a grammar that forbids one token."""
    count, vocab = 10_000, 6
    p = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.1, 0.05]).log()
    q, ids = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([3, 0, 5])
    allowed = torch.tensor([True, True, True, False, True, True])
    seeds = torch.arange(count)
    drawn = ids[draw_candidates(q.expand(count, -1), 2, seeds, 0, proposal=proposal)]
    tokens = torch.cat([torch.zeros(count, 1).long(), drawn, torch.full((count, 1), 4)], 1)
    out = verify(
        p.expand(count, 4, vocab),
        q.expand(count, 4, 3),
        tokens,
        torch.tensor([-1, 0, 0, 0]),
        draw_uniforms(seeds, 0, 6),
        proposal=proposal,
        rule=rule,
        point_nodes=torch.tensor([False, False, False, True]),
        bitmask=cases.words_of(allowed.expand(count, 4, vocab)),
        draft_ids=ids,
    )
    law = torch.softmax(p.masked_fill(~allowed, -torch.inf), 0)
    seen = torch.bincount(out.tokens[:, 0], minlength=vocab) / count
    assert not seen[3]
    # about five standard errors of the largest share
    assert (seen - law).abs().max() < 5 * (0.25 / count) ** 0.5
    assert (out.length > 1).float().mean() > 0.4


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("proposal", ["without_replacement", "with_replacement", "greedy"])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.7, top_k=4)], ids=["plain", "top-k"])
def test_law_where_a_column_is_no_token(sampling: SamplingParams, proposal: str, rule: str) -> None:
    """What is drawn from such a column is a missing candidate, and the law is the target's all the same."""
    count = 20_000
    p = torch.tensor([0.5, 0.3, 0.2])
    q, ids = torch.tensor([0.3, 0.35, 0.2, 0.1, 0.05]).log(), torch.tensor([2, -1, 0, 7, 1])
    seeds, parents = torch.arange(count), torch.tensor([-1, 0, 0, 0, 1, 1])
    to_token = torch.where((ids >= 0) & (ids < 3), ids, -1)
    tokens = torch.zeros(count, 6).long()
    for node, children in ((0, slice(1, 4)), (1, slice(4, 6))):
        options = {"proposal": proposal, "sampling": sampling, "nodes": torch.full((count,), node)}
        columns = draw_candidates(q.expand(count, -1), 3 - node, seeds, 0, **options)
        tokens[:, children] = torch.where(columns >= 0, to_token[columns], -1)
    out = verify(
        p.log().expand(count, 6, 3), q.expand(count, 6, 5), tokens, parents, draw_uniforms(seeds, 0, 8),
        proposal=proposal, rule=rule, draft_sampling=sampling, draft_ids=ids,
    )  # fmt: skip
    assert not out.status.any()
    first = torch.bincount(out.tokens[:, 0], minlength=3) / count
    assert (first - p).abs().max() < 5 * (0.25 / count) ** 0.5
    second = torch.bincount(out.tokens[out.length > 1, 1], minlength=3)
    assert (second / second.sum() - p).abs().max() < 5 * (0.25 / second.sum()) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", cases.RULES)
def test_a_draft_row_is_asked_for_only_where_there_are_candidates(rule: str, backend: str) -> None:
    target, draft = torch.zeros(5, 7), torch.zeros(2, 7)
    parents = torch.tensor([-1, 0, 0, 1, 2])
    tokens = torch.tensor([[0, 3, 4, -1, 5], [0, 3, 4, -1, 5], [0, 3, 4, 2, 5], [0, 3, 4, -1, 9]])
    target_rows = torch.arange(5).repeat(4, 1)
    target_rows[0, 2] = -1  # virtual: nothing below it counts
    draft_rows = torch.tensor([[0, -1, 99, -7, 99], [0, -1, 1, -7, 99], [0, -1, 1, -7, 99], [0, -1, 99, -7, 99]])
    out = verify(
        target, draft, tokens, parents, torch.full((4, 7), 0.5), rule=rule, target_rows=target_rows,
        draft_rows=draft_rows, backend=backend,
    )  # fmt: skip
    assert out.status.tolist() == [0, 0, Status.BAD_TREE, Status.BAD_TOKEN]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_tree_has_no_wrong_tokens(backend: str) -> None:
    target = torch.zeros(3, 7)
    tokens, rows = torch.tensor([[0, 9, 1]] * 3), torch.tensor([[0, 1, 2], [0, 9, 2], [0, 1, 2]])
    parents = torch.tensor([[-1, 0, 0], [-1, 0, 0], [-1, 5, 0]])
    call = (target, None, tokens, parents, torch.full((3, 5), 0.5))
    options = {"proposal": "point", "target_rows": rows}
    wanted = [Status.BAD_TOKEN, Status.BAD_TREE, Status.BAD_TREE]
    assert verify(*call, **options, backend=backend).status.tolist() == wanted
    assert reference.verify(*call, **options).status.tolist() == wanted


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parent", [2**32, 2**32 - 1, -(2**32), 2**31, -(2**40) - 1])
def test_a_parent_of_64_bits_is_not_cut_to_32(parent: int, backend: str) -> None:
    call = (torch.zeros(1, 3, 7), None, torch.tensor([[0, 3, 4]]), torch.tensor([-1, parent, 0]), torch.zeros(1, 5))
    out = verify(*call, proposal="point", backend=backend)
    assert out.status.tolist() == [Status.BAD_TREE] and out.length.tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_top_k_that_is_no_whole_number_is_out_of_range(backend: str) -> None:
    logits = torch.randn(4, 1, 9)
    top_k = torch.tensor([2.0, 1.5, 0.0, torch.inf])
    call = (logits, None, torch.zeros(4, 1).long(), torch.tensor([-1]), torch.full((4, 3), 0.5))
    out = verify(*call, proposal="point", sampling=SamplingParams(top_k=top_k), backend=backend)
    assert out.status.tolist() == [0, Status.BAD_SAMPLING, 0, 0]


@pytest.mark.parametrize("vocab", [20, 8300], ids=["short-rows", "long-rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype, vocab: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, vocab, generator=random)
    temperature = torch.tensor([0.0, 0.8])
    seeds, parents = torch.arange(2), torch.tensor([-1, 0])

    def both() -> tuple[torch.Tensor, ...]:
        drawn = draw_candidates(logits[:, 0], 1, seeds, 0, sampling=SamplingParams(temperature))
        tokens = torch.cat([torch.zeros_like(drawn), drawn], 1)
        uniforms = draw_uniforms(seeds, 0, 4)
        return drawn, *verify(logits, logits, tokens, parents, uniforms, sampling=SamplingParams(temperature))

    wanted = both()
    torch.set_default_dtype(dtype)
    try:
        found = both()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("vocab", [20, 8300], ids=["short-rows", "long-rows"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}], ids=["plain", "filters"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-310, 5e-324])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_temperatures(
    backend: str, temperature: float, filters: dict[str, Any], as_tensor: bool, vocab: int
) -> None:
    logits = torch.randn(2, 2, vocab, generator=torch.Generator().manual_seed(0))
    value = torch.full((2,), temperature, dtype=torch.float64) if as_tensor else temperature
    sampling = SamplingParams(value, **filters)
    drawn = draw_candidates(logits[:, 0], 1, torch.arange(2), 0, sampling=sampling, backend=backend)
    assert torch.equal(drawn[:, 0], logits[:, 0].argmax(-1))
    tokens = torch.cat([torch.zeros_like(drawn), drawn], 1)
    found = verify(
        logits, logits, tokens, torch.tensor([-1, 0]), torch.full((2, 4), 0.9),
        sampling=sampling, backend=backend,
    )  # fmt: skip
    assert torch.equal(found.tokens, logits.argmax(-1)) and not found.status.any()
    assert torch.isfinite(row_cutoffs(logits[:, 0], sampling, backend=backend)).all() or not filters


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-inputs": ({"inputs": "probs"}, "inputs: expected one of 'logits', 'probabilities', got 'probs'"),
    "unknown-draft-inputs": ({"draft_inputs": 1}, "draft_inputs: expected one of"),
    "filters-on-probabilities": (
        {"inputs": "probabilities", "sampling": SamplingParams(top_k=3)},
        'sampling: expected the default with inputs="probabilities"',
    ),
    "a-tensor-of-temperatures-on-probabilities": (
        {"inputs": "probabilities", "sampling": SamplingParams(temperature=torch.ones(2))},
        'sampling: expected the default with inputs="probabilities"',
    ),
    "temperature-of-draft-probabilities": (
        {"draft_inputs": "probabilities", "draft_sampling": SamplingParams(temperature=0.5)},
        'draft_sampling: expected the default with draft_inputs="probabilities"',
    ),
    "mask-on-probabilities": (
        {"inputs": "probabilities", "bitmask": torch.zeros(2, 3, 1, dtype=torch.int32)},
        'bitmask: expected the default with inputs="probabilities", got Tensor',
    ),
    "mask-of-other-width": (
        {"bitmask": torch.zeros(2, 3, 2, dtype=torch.int32)},
        r"bitmask: expected shape \[2, 3, 1\], got \[2, 3, 2\]",
    ),
    "mask-of-other-dtype": ({"bitmask": torch.zeros(2, 3, 1)}, "bitmask: expected dtype int32, got float32"),
    "point-nodes-no-bools": ({"point_nodes": torch.zeros(3)}, "point_nodes: expected dtype bool, got float32"),
    "point-nodes-of-other-shape": (
        {"point_nodes": torch.zeros(3, 3, dtype=torch.bool)},
        r"point_nodes: expected shape \[2, 3\], got \[3, 3\]",
    ),
    "ids-for-other-columns": (
        {"draft_ids": torch.arange(4)},
        r"draft_logits: expected shape \[2, 3, 4\], got \[2, 3, 8\]",
    ),
    "ids-of-other-dtype": ({"draft_ids": torch.zeros(8)}, "draft_ids: expected dtype int64, got float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    options, message = BAD[case]
    rows = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=message):
        verify(rows, rows, torch.zeros(2, 3).long(), torch.tensor([-1, 0, 0]), torch.zeros(2, 5), **options)


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("vocab", [300, 9000])
def test_nothing_is_left_of_the_call_before(vocab: int, rule: str) -> None:
    """A law that is not summed up to 1, and then, in the same memory, one that is."""
    logits = torch.randn(1, 2, vocab, generator=torch.Generator().manual_seed(0)) + 5.0
    best = logits[0].argmax(-1)
    call: dict[str, Any] = {"tokens": torch.tensor([[0, int(best[0])]]), "parents": torch.tensor([-1, 0])}
    call |= {"uniforms": torch.full((1, 4), 0.5), "rule": rule, "proposal": "point"}
    for sampling in (SamplingParams(), SamplingParams(0.0), SamplingParams(), SamplingParams(1.0, top_k=1)):
        found = verify(logits, None, **call, sampling=sampling)
        if sampling != SamplingParams():
            assert found.length.item() == 2 and found.tokens.tolist() == [best.tolist()]


def test_no_request_reads_what_a_broken_one_left_behind() -> None:
    """Rooms are kept between calls, and a leaf at which a neighbour subtracts q has no q of its own."""
    even = torch.full((2, 2, 5), 0.2)
    broken = even.clone()
    broken[1, 0, 1:] = torch.nan
    tokens, uniforms = torch.tensor([[0, 1], [0, 1]]), torch.full((2, 4), 0.5)
    verify(even, broken, tokens, torch.tensor([-1, 0]), uniforms, proposal="with_replacement", inputs="probabilities")

    target = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1]).expand(2, 2, 5).contiguous()  # request 0 rejects its candidate
    parents = torch.tensor([[-1, 0], [-1, -1]])  # request 1 has none
    out = verify(target, even, tokens, parents, uniforms, proposal="with_replacement", inputs="probabilities")
    assert out.status.tolist() == [0, 0] and out.length.tolist() == [1, 1]
    assert out.tokens[1].tolist() == [2, -1], "0.5 of the target's own law"


def test_numbers_that_are_no_probabilities_emit_no_missing_token() -> None:
    rows = torch.randn(256, 1, 40, generator=torch.Generator().manual_seed(1)) * 6e37
    tokens, uniforms = torch.zeros(256, 1, dtype=torch.long), draw_uniforms(torch.arange(256), 0, 3)
    out = verify(rows, None, tokens, torch.tensor([-1]), uniforms, proposal="point", inputs="probabilities")
    assert bool((out.tokens >= 0).all()) and bool((out.tokens < 40).all())
