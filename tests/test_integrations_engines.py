"""The adapters for vLLM, SGLang, FlashInfer, EAGLE and Medusa, driven with the tensors that those engines have at hand.

Where an engine's own tests of this step are public, their inputs and the outcomes they ask for are here, written anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import cases
import elsewhere
import numpy as np
import pytest
import torch
from conftest import PValue
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from mcsd.integrations import _trees, eagle, flashinfer, sglang, vllm
from mcsd_kernels import SamplingParams, draw_candidates, verify

VOCAB = 5
TRIALS = 1500
# What is probable by chance once in a thousand times; every seed here is fixed.
CHANCE = 1e-3

P, Q = (torch.tensor(cases.LAWS["overlap"][side]) for side in (0, 1))
# the target's and the draft's law after each depth; they do not look at the tokens
TARGET = torch.stack([P, P.flip(0), P.roll(2)])
DRAFT = torch.stack([Q, Q.roll(1), Q.flip(0)])


def law_of_two() -> list[tuple[tuple[int, int], float]]:
    return [((v, w), float(TARGET[0, v] * TARGET[1, w])) for v in range(VOCAB) for w in range(VOCAB)]


def first_two(tokens: torch.Tensor, seed: int = 0) -> dict[tuple[int, int], int]:
    """How often each pair of first tokens was seen; where a call emitted one, the target continues."""
    rng = np.random.default_rng(seed)
    law: NDArray[np.float64] = TARGET[1].double().numpy()
    counts: dict[tuple[int, int], int] = {}
    for row in tokens.tolist():
        second = row[1] if len(row) > 1 and row[1] >= 0 else int(rng.choice(VOCAB, p=law / law.sum()))
        counts[row[0], second] = counts.get((row[0], second), 0) + 1
    return counts


def drawn(depth: int, count: int, k: int = 1, seed: int = 0, proposal: str = "without_replacement") -> torch.Tensor:
    """`[count, k]` candidates for the token at a depth."""
    rows = DRAFT[depth].log().expand(count, VOCAB)
    node = torch.full((count,), depth)
    return draw_candidates(rows, k, torch.arange(count) + 1000 * seed, 0, proposal=proposal, nodes=node)


def one_hot(tokens: list[int], vocab: int = 100) -> torch.Tensor:
    """Logits whose argmax these are, as certain as in the engines' tests."""
    logits = torch.full((len(tokens), vocab), -100.0)
    logits[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.int64)] = 100.0
    return logits


# vLLM


def metadata(
    temperature: list[float] | None = None, generators: dict[int, torch.Generator] | None = None
) -> SimpleNamespace:
    """The fields of vLLM's SamplingMetadata that the sampler reads; all greedy without a temperature."""
    return SimpleNamespace(
        all_greedy=temperature is None,
        all_random=temperature is not None and min(temperature) > 0,
        temperature=None if temperature is None else torch.tensor(temperature),
        generators=generators or {},
    )


def v1(drafts: list[list[int]], logits: torch.Tensor, bonus: list[int], **options: Any) -> list[list[int]]:
    """V1's call for these drafts; `logits` holds a row for each of them."""
    lengths = [len(draft) for draft in drafts]
    tokens = torch.tensor([token for draft in drafts for token in draft], dtype=torch.int32)
    ends = torch.tensor(lengths).cumsum(0).int()
    given = {"draft_probs": None, "sampling_metadata": metadata(), **options}
    probs, sampling = given.pop("draft_probs"), given.pop("sampling_metadata")
    found = vllm.rejection_sample(
        tokens, lengths, max(lengths), ends, probs, logits, torch.tensor(bonus)[:, None].int(), sampling, **given
    )
    assert found.dtype == torch.int32
    rows: list[list[int]] = found.tolist()
    return rows


@pytest.mark.parametrize(
    ("drafts", "wanted", "bonus", "expected"),
    [
        pytest.param([[1, 2, 3]], [1, 2, 3], [4], [[1, 2, 3, 4]], id="perfect-match"),
        pytest.param([[1, 2, 3]], [1, 5, 3], [4], [[1, 5, -1, -1]], id="early-mismatch"),
        pytest.param([[1, 2], [3]], [1, 2, 3], [5, 4], [[1, 2, 5], [3, 4, -1]], id="two-lengths"),
        pytest.param([[1]], [1], [2], [[1, 2]], id="one-token"),
        pytest.param([[]], [], [5], [[5]], id="no-draft-at-all"),
        pytest.param(
            [[1, 2, 3], [4, 5, 6]], [1, 2, 7, 4, 8, 6], [6, 9], [[1, 2, 7, -1], [4, 8, -1, -1]], id="both-miss"
        ),
        pytest.param([[1]], [2], [3], [[2, -1]], id="first-mismatch"),
        pytest.param([[1, 2], [3, 4]], [1, 5, 3, 4], [6, 7], [[1, 5, -1], [3, 4, 7]], id="one-misses"),
        pytest.param([[1, 2], [], [3]], [1, 2, 3], [4, 5, 6], [[1, 2, 4], [5, -1, -1], [3, 6, -1]], id="undrafted"),
        pytest.param([[1], []], [7], [4, 5], [[7, -1], [5, -1]], id="undrafted-last"),
        pytest.param([[0, -1]], [0, 3], [4], [[0, 3, -1]], id="padding-among-the-drafts"),
    ],
)
def test_vllm_greedy_cases(drafts: list[list[int]], wanted: list[int], bonus: list[int], expected: Any) -> None:
    """The cases of vLLM's tests/v1/sample/test_rejection_sampler.py, and what they leave out."""
    assert v1(drafts, one_hot(wanted), bonus) == expected


def test_vllm_greedy_and_random_requests_share_a_batch() -> None:
    """A greedy request's draft probabilities decide nothing, nor does a softmax with ties elsewhere."""
    drafts, logits = [[1, 2], [1, 2], [3]], one_hot([1, 9, 1, 2, 3])
    logits[0] = torch.linspace(0, 1, 100).roll(2)  # argmax 1, and anything but certain
    probs = torch.full((5, 100), 0.01)
    found = v1(drafts, logits, [5, 6, 7], draft_probs=probs, sampling_metadata=metadata([0.0, 1.0, 0.0]))
    assert found == [[1, 9, -1], [1, 2, 6], [3, 7, -1]]


def test_vllm_a_temperature_below_zero_is_greedy() -> None:
    flat = torch.zeros(40, 50)
    flat[:, 7] = 0.1  # the argmax by a hair
    drafts = [[7]] * 40
    found = v1(drafts, flat, [3] * 40, sampling_metadata=metadata([-1.0, 0.0] * 20))
    assert found == [[7, 3]] * 40


@pytest.mark.parametrize("with_probs", [True, False], ids=["drawn", "chosen"])
@pytest.mark.parametrize("rule", cases.RULES)
def test_vllm_law(rule: str, with_probs: bool, p_value: PValue) -> None:
    """Drafts of one and two tokens, the bonus token drawn by the caller; chi-square of two tokens, p > 1e-3."""
    torch.manual_seed(4)
    lengths = [1 + b % 2 for b in range(TRIALS)]
    depth = [d for n in lengths for d in range(n)]
    drafts = torch.cat([drawn(0, TRIALS), drawn(1, TRIALS)], 1)
    tokens = torch.cat([drafts[b, :n] for b, n in enumerate(lengths)])
    if not with_probs:
        tokens = torch.tensor([2, 1])[depth]
    bonus = draw_candidates(TARGET[lengths].log(), 1, torch.arange(TRIALS), 1)
    found = vllm.rejection_sample(
        tokens.int(),
        lengths,
        2,
        torch.tensor(lengths).cumsum(0).int(),
        DRAFT[depth] if with_probs else None,
        TARGET[depth].log(),
        bonus.int(),
        metadata([1.0] * TRIALS),
        rule=rule,
    )
    assert p_value(law_of_two(), first_two(found)) > CHANCE
    longest = max((row >= 0).sum() for row in found)
    assert longest == 3


def test_vllm_seeded_requests_repeat_themselves_whatever_the_batch() -> None:
    def run(order: list[int], lengths: list[int], seeded: list[int]) -> dict[int, list[int]]:
        generators = {i: torch.Generator().manual_seed(100 + b) for i, b in enumerate(order) if b in seeded}
        random = torch.Generator().manual_seed(3)
        logits, probs = torch.randn(8, 4, 50, generator=random), torch.rand(8, 4, 50, generator=random)
        drafts = torch.randint(50, (8, 4), generator=random).tolist()
        rows = [(b, i) for b in order for i in range(lengths[b])]
        b, i = (torch.tensor(x) for x in zip(*rows, strict=True))
        q = probs / probs.sum(-1, keepdim=True)
        bonus = [1] * len(order)
        given = {"draft_probs": q[b, i], "sampling_metadata": metadata([1.0] * len(order), generators)}
        found = v1([drafts[b][: lengths[b]] for b in order], logits[b, i], bonus, **given)
        return {b: [t for t in row if t >= 0] for b, row in zip(order, found, strict=True)}

    lengths = [3, 4, 1, 2, 4, 3, 2, 1]
    whole = run(list(range(8)), lengths, [0, 2, 3, 6])
    alone = run([6, 3, 0, 2], lengths, [0, 2, 3, 6])
    assert all(whole[b] == alone[b] for b in (0, 2, 3, 6))
    others = [run(list(range(8)), lengths, [0]) for _ in range(4)]
    assert len({str(o) for o in others}) > 1 and len({str(o[0]) for o in others}) == 1


def test_vllm_refuses_what_is_not_lossless() -> None:
    with pytest.raises(ValueError, match="synthetic_mode"):
        v1([[1]], one_hot([1]), [2], synthetic_mode=True)
    with pytest.raises(ValueError, match="synthetic_conditional_rates"):
        vllm.rejection_sample_v2(*v2_tensors([[1]], one_hot([1, 2])[None]).values(), torch.ones(1))


def test_vllm_a_broken_row_stays_with_its_request() -> None:
    logits = one_hot([1, 2, 3])
    logits[1] = float("nan")
    found = v1([[1, 0], [3]], logits, [5, 6], sampling_metadata=metadata([1.0, 1.0]))
    assert found[1] == [3, 6, -1] and found[0][0] == 1 and found[0][2] == -1


def v2_tensors(
    drafts: list[list[int]],
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None = None,
    temperature: float = 0.0,
    state: list[int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    pos: int = 7,
) -> dict[str, Any]:
    """Model runner V2's arguments: a root and its drafts for each request, their states in the persistent batch.

    Args:
        drafts: of each request.
        logits: `[requests, longest + 1, vocab]`.
        draft_logits: `[requests, longest, vocab]`.
        temperature: of all.
        state: None: in order.
        steps: None: the longest draft.
        seed: of request 0; the others count on.
        pos: of every root.
    """
    state = list(range(len(drafts))) if state is None else state
    slots, steps = max(state) + 2, steps or max(map(len, drafts))
    lengths = torch.tensor([len(draft) + 1 for draft in drafts])
    local = [i for n in lengths.tolist() for i in range(n)]
    request = torch.arange(len(drafts)).repeat_interleave(lengths)
    kept = None
    if draft_logits is not None:
        kept = torch.full((slots, steps, draft_logits.shape[-1]), float("nan"))
        kept[torch.tensor(state), : draft_logits.shape[1]] = draft_logits
    temperatures, seeds = torch.full((slots,), float("nan")), torch.zeros(slots, dtype=torch.int64)
    temperatures[state], seeds[state] = temperature, torch.arange(len(drafts)) + seed
    mapping = torch.tensor(state, dtype=torch.int32)
    return {
        "target_logits": logits[request, torch.tensor(local)],
        "draft_logits": kept,
        "draft_sampled": torch.tensor([t for draft in drafts for t in (99, *draft)]),
        "cu_num_logits": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "pos": torch.tensor(local) + pos,
        "idx_mapping": mapping,
        "expanded_idx_mapping": mapping.repeat_interleave(lengths),
        "expanded_local_pos": torch.tensor(local, dtype=torch.int32),
        "temperature": temperatures,
        "seed": seeds,
        "num_speculative_steps": steps,
    }


@pytest.mark.parametrize("block", [False, True], ids=["tokens", "blocks"])
def test_vllm_v2_greedy(block: bool) -> None:
    logits = torch.stack([one_hot([1, 2, 3]), one_hot([4, 0, 0]), one_hot([6, 7, 8])])
    tensors = v2_tensors([[1, 2], [], [9]], logits, torch.zeros(3, 2, 100), state=[4, 0, 2])
    sampled, count = vllm.rejection_sample_v2(**tensors, use_block_verification=block)
    assert sampled.dtype == torch.int64 and count.dtype == torch.int32
    assert sampled.tolist() == [[1, 2, 3], [4, -1, -1], [6, -1, -1]] and count.tolist() == [3, 1, 1]


@pytest.mark.parametrize("block", [False, True], ids=["tokens", "blocks"])
@pytest.mark.parametrize("with_logits", [True, False], ids=["drawn", "chosen"])
def test_vllm_v2_law(with_logits: bool, block: bool, p_value: PValue) -> None:
    """Ragged chains from scattered request states, the target's rows padded beyond the draft's vocabulary."""
    tokens = (
        torch.cat([drawn(0, TRIALS), drawn(1, TRIALS)], 1) if with_logits else torch.tensor([[2, 1]]).expand(TRIALS, 2)
    )
    drafts = [row[: b % 3] for b, row in enumerate(tokens.tolist())]
    rows = torch.nn.functional.pad(TARGET.log(), (0, 3), value=float("nan") if with_logits else -float("inf"))
    state = np.random.default_rng(0).permutation(TRIALS).tolist()
    tensors = v2_tensors(
        drafts,
        rows.expand(TRIALS, 3, VOCAB + 3),
        DRAFT[:2].log().expand(TRIALS, 2, VOCAB) if with_logits else None,
        temperature=0.7,  # has been applied
        state=state,
        steps=3,
    )
    sampled, count = vllm.rejection_sample_v2(**tensors, use_block_verification=block)
    assert ((sampled >= 0).sum(1) == count).all() and sampled.shape == (TRIALS, 4)
    assert p_value(law_of_two(), first_two(sampled)) > CHANCE


def test_vllm_v2_temperatures_are_those_of_the_states() -> None:
    flat = torch.zeros(40, 2, 50)
    flat[:, :, 7] = 0.1
    state = np.random.default_rng(0).permutation(40).tolist()
    tensors = v2_tensors([[7]] * 40, flat, state=state, temperature=1.0)
    greedy = torch.arange(40) % 2 == 0  # of the requests
    tensors["temperature"][torch.tensor(state)[greedy]] = 0.0
    sampled, _ = vllm.rejection_sample_v2(**tensors)
    assert (sampled[greedy] == 7).all() and (sampled[~greedy, 0] != 7).sum() > 10


def test_vllm_v2_numbers_depend_on_seed_and_position_alone() -> None:
    logits, q = torch.randn(4, 3, 50), torch.randn(4, 2, 50)
    drafts = [[1, 2]] * 4

    def run(order: list[int], **options: Any) -> dict[int, list[int]]:
        tensors = v2_tensors([drafts[b] for b in order], logits[order], q[order], temperature=1.0, **options)
        tensors["seed"][: len(order)] = torch.tensor(order)
        found, _ = vllm.rejection_sample_v2(**tensors)
        return {b: row for b, row in zip(order, found.tolist(), strict=True)}

    whole, some = run([0, 1, 2, 3]), run([3, 1])
    assert whole[3] == some[3] and whole[1] == some[1]
    assert len({str(run([0, 1, 2, 3], pos=pos)) for pos in range(5)}) == 5


# SGLang

SGLANG_CANDIDATES = [[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]]
SGLANG_NEXT_TOKEN = [[1, 2, -1, 4, 5, -1], [4, 2, 3, -1, 5, -1]]
SGLANG_NEXT_SIBLING = [[-1, 3, -1, -1, -1, -1], [-1, -1, -1, -1, 1, -1]]


def sglang_tensors() -> dict[str, torch.Tensor]:
    """Two trees of six nodes over twenty tokens, with almost certain rows."""
    logits = torch.ones(2, 6, 20)
    for request, node, token in ((0, 0, 3), (0, 3, 4), (0, 4, 5), (1, 0, 11), (1, 4, 12)):
        logits[request, node, token] = 10.0
    logits[(logits.amax(-1) < 10)[..., None].expand_as(logits) & (torch.arange(20) == 18)] = 10.0
    return {
        "predicts": torch.full((12,), -1, dtype=torch.int32),
        "accept_index": torch.full((2, 4), -1, dtype=torch.int32),
        "accept_token_num": torch.zeros(2, dtype=torch.int32),
        "candidates": torch.tensor(SGLANG_CANDIDATES),
        "retrieve_index": torch.arange(12).view(2, 6),
        "retrieve_next_token": torch.tensor(SGLANG_NEXT_TOKEN),
        "retrieve_next_sibling": torch.tensor(SGLANG_NEXT_SIBLING),
        "uniform_samples": torch.rand(2, 6),
        "uniform_samples_for_final_sampling": torch.rand(2),
        "target_probs": (logits / 0.01).softmax(-1),
        "draft_probs": torch.zeros(2, 6, 20),
    }


def test_sglang_tree_case() -> None:
    """The lossless case of sgl-kernel/tests/speculative/test_speculative_sampling.py; the arguments by position."""
    tensors = sglang_tensors()
    sglang.tree_speculative_sampling_target_only(*tensors.values(), 1.0, 1.0, True)
    assert tensors["predicts"].tolist() == [3, -1, -1, 4, 5, 18, 11, -1, -1, -1, 12, 18]
    assert tensors["accept_index"].tolist() == [[0, 3, 4, 5], [6, 10, 11, -1]]
    assert tensors["accept_token_num"].tolist() == [3, 2]
    assert not tensors["draft_probs"].any()


@pytest.mark.parametrize("name", ["threshold_single", "threshold_acc"])
def test_sglang_refuses_thresholds(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        sglang.tree_speculative_sampling_target_only(**sglang_tensors(), **{name: 0.0})


# root: 3, then 1; 3: 2. The list says what comes first, not the number.
LINKED = ([3, -1, -1, 2], [-1, -1, -1, 1])


@pytest.mark.parametrize("proposal", ["point", "without_replacement"])
@pytest.mark.parametrize("rule", cases.RULES)
def test_sglang_tree_law(rule: str, proposal: str, p_value: PValue) -> None:
    """Two candidates and a child of the first, in an order of nodes that is not the order of drawing."""
    tokens = sglang_tree_tokens(proposal)
    found = run_sglang_tree(tokens, proposal, rule)
    assert p_value(law_of_two(), first_two(found)) > CHANCE


def test_control_sglang_siblings_in_the_wrong_order(p_value: PValue) -> None:
    """The law test sees it if the order of drawing is lost."""
    tokens = sglang_tree_tokens("without_replacement", 5000)
    tokens[:, 1:4] = tokens[:, [3, 2, 1]]
    assert p_value(law_of_two(), first_two(run_sglang_tree(tokens, "without_replacement", "recursive"))) < 1e-6


def sglang_tree_tokens(proposal: str, trials: int = TRIALS) -> torch.Tensor:
    """`[trials, 4]`: node 3 drawn before node 1, node 2 the child of 3."""
    if proposal == "point":
        return torch.tensor([[0, 2, 1, 4]]).expand(trials, 4)
    two, child = drawn(0, trials, 2), drawn(1, trials)
    return torch.cat([torch.zeros(trials, 1, dtype=torch.int64), two[:, 1:], child, two[:, :1]], 1)


def run_sglang_tree(tokens: torch.Tensor, proposal: str, rule: str) -> torch.Tensor:
    """`[trials, 3]` tokens, -1 after the end, read from what SGLang would read."""
    random, trials = torch.Generator().manual_seed(1), len(tokens)
    predicts = torch.full((trials * 4,), -7, dtype=torch.int32)
    index = torch.full((trials, 3), -1, dtype=torch.int32)
    count = torch.zeros(trials, dtype=torch.int32)
    retrieve = torch.randperm(trials * 4, generator=random).view(trials, 4)
    depth = torch.tensor([0, 1, 2, 1])
    sglang.tree_speculative_sampling_target_only(
        predicts,
        index,
        count,
        tokens,
        retrieve,
        *(torch.tensor(links).expand(trials, 4) for links in LINKED),
        torch.rand(trials, 4, generator=random),
        torch.rand(trials, generator=random),
        TARGET[depth].expand(trials, 4, VOCAB).contiguous(),
        DRAFT[depth].expand(trials, 4, VOCAB).contiguous(),
        proposal=proposal,
        rule=rule,
    )
    assert (index[:, 0] == retrieve[:, 0]).all() and ((index >= 0).sum(1) == count + 1).all()
    assert (predicts == -7).sum() == trials * 4 - (count + 1).sum()
    return torch.where(index >= 0, predicts[index.clamp(min=0).long()], -1)


@pytest.mark.parametrize("seeded", [False, True], ids=["uniforms", "seeds"])
@pytest.mark.parametrize("rows", [2, 3], ids=["a-row-a-draft", "a-row-a-node"])
def test_sglang_chain_law(rows: int, seeded: bool, p_value: PValue) -> None:
    random = torch.Generator().manual_seed(2)
    tokens = torch.cat([torch.zeros(TRIALS, 1, dtype=torch.int64), drawn(0, TRIALS), drawn(1, TRIALS)], 1)
    predicts = torch.zeros(TRIALS * 3, dtype=torch.int32)
    index, count = torch.full((TRIALS, 3), -1, dtype=torch.int32), torch.zeros(TRIALS, dtype=torch.int32)
    sglang.chain_speculative_sampling(
        predicts,
        index,
        count,
        tokens,
        torch.arange(TRIALS * 3).view(TRIALS, 3),
        None,
        None,
        None if seeded else torch.rand(TRIALS, 3, generator=random),
        None if seeded else torch.rand(TRIALS, generator=random),
        TARGET.expand(TRIALS, 3, VOCAB).contiguous(),
        DRAFT[:rows].expand(TRIALS, rows, VOCAB).contiguous(),
        1.0,
        1.0,
        True,
        torch.arange(TRIALS)[:, None] if seeded else None,
        torch.arange(3).expand(TRIALS, 3) + 11 if seeded else None,
    )
    found = torch.where(index >= 0, predicts[index.clamp(min=0).long()], -1)
    assert p_value(law_of_two(), first_two(found)) > CHANCE
    assert count.max() == 2 and count.min() == 0


@pytest.mark.parametrize("kind", ["tree", "chain"])
def test_sglang_requests_have_rows_and_numbers_of_their_own(kind: str) -> None:
    """Every request with laws, candidates and coins of its own, against `verify` with the documented layout."""
    random, batch, nodes = torch.Generator().manual_seed(5), 300, 3
    p, q = (torch.rand(batch, nodes, VOCAB, generator=random) for _ in range(2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    tokens = torch.randint(VOCAB, (batch, nodes), generator=random)
    coins, final = torch.rand(batch, nodes, generator=random), torch.rand(batch, generator=random)
    predicts = torch.full((batch * nodes,), -7, dtype=torch.int32)
    index = torch.full((batch, nodes), -5, dtype=torch.int32)
    count = torch.zeros(batch, dtype=torch.int32)
    outputs = predicts, index, count, tokens, torch.arange(batch * nodes).view(batch, nodes)
    if kind == "tree":
        links = (torch.tensor([1, 2, -1]).expand(batch, nodes), torch.full((batch, nodes), -1))
        options: dict[str, Any] = {"proposal": "with_replacement"}
        sglang.tree_speculative_sampling_target_only(*outputs, *links, coins, final, p, q, **options)
        wanted_coins = torch.cat([coins, coins[:, :1], final[:, None]], 1)
    else:
        sglang.chain_speculative_sampling(*outputs, None, None, coins, final, p, q)
        wanted_coins = torch.cat([torch.zeros(batch, 1), coins, final[:, None]], 1)
    wanted = verify(
        p, q, tokens, torch.tensor([-1, 0, 1]), wanted_coins, proposal="with_replacement", inputs="probabilities"
    )
    assert torch.equal(count + 1, wanted.length) and count.bincount().min() > 20
    kept = torch.arange(nodes) < wanted.length[:, None]
    assert (index[~kept] == -5).all(), "what lies behind the accepted nodes stays as it is"
    assert torch.equal(predicts[index[kept].long()].long(), wanted.tokens[kept])


def test_sglang_chain_wants_numbers() -> None:
    tensors = sglang_tensors() | {"uniform_samples": None}
    with pytest.raises(ValueError, match="uniform_samples"):
        sglang.chain_speculative_sampling(**tensors)
    with pytest.raises(ValueError, match="positions"):
        sglang.chain_speculative_sampling(**tensors, sampling_seed=torch.zeros(2, dtype=torch.int64))


# FlashInfer


def probabilities(*shape: int, seed: int) -> torch.Tensor:
    rows = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return rows / rows.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"draft_probs": torch.rand(2, 9)}, "draft_probs"),
        ({"draft_token_ids": torch.zeros(2, 4).long()}, "draft_token_ids"),
        ({"target_probs": torch.rand(2, 3, 9)}, "target_probs"),
        ({"target_probs": torch.rand(2, 4, 8)}, "target_probs"),
        ({"seed": torch.arange(3)}, r"seed: expected shape \[1\] or \[2\], got \[3\]"),
        ({"seed": 1, "offset": torch.arange(3)}, "offset"),
    ],
)
def test_flashinfer_names_what_is_wrong(changed: dict[str, Any], why: str) -> None:
    right = {"draft_probs": torch.rand(2, 3, 9), "draft_token_ids": torch.zeros(2, 3).long()}
    right["target_probs"] = torch.rand(2, 4, 9)
    flashinfer.chain_speculative_sampling(**right)
    with pytest.raises(ValueError, match=why):
        flashinfer.chain_speculative_sampling(**{**right, **changed})


def test_flashinfer_without_drafts() -> None:
    target = torch.rand(3, 1, 9).softmax(-1)
    tokens, *counts = flashinfer.chain_speculative_sampling(torch.rand(3, 0, 9), torch.zeros(3, 0).long(), target)
    assert tokens.shape == (3, 1) and (tokens >= 0).all()
    assert [count.tolist() for count in counts] == [[0, 0, 0]] * 2


def test_flashinfer_docstring_example() -> None:
    """The first draft is almost sure to stay, the second cannot, and what replaces it is certain."""
    q = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
    p = torch.tensor([[[0.0, 0.1, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    tokens, accepted, emitted = flashinfer.chain_speculative_sampling(q, torch.tensor([[2, 1]], dtype=torch.int32), p)
    assert tokens.tolist() == [[2, 0, -1]] and tokens.dtype == torch.int32
    assert accepted.tolist() == emitted.tolist() == [1]


@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("vocab", [111, 3200])
@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("certain", [False, True], ids=["spread", "one-hot"])
def test_flashinfer_outputs(batch: int, vocab: int, drafts: int, certain: bool) -> None:
    """The properties that FlashInfer's tests/utils/test_sampling.py asks for, on the same kinds of input."""
    torch.manual_seed(0)
    q = probabilities(batch, drafts, vocab, seed=1)
    ids = torch.randint(vocab, (batch, drafts))
    p = probabilities(batch, drafts + 1, vocab, seed=2)
    wanted = torch.cat([ids, torch.randint(vocab, (batch, 1))], 1)
    if certain:
        p = torch.zeros(batch, drafts + 1, vocab).scatter_(2, wanted[..., None], 1.0)
    for _ in range(3):
        accepted, emitted = (torch.full((batch,), 10, dtype=torch.int32) for _ in range(2))
        tokens, *counts = flashinfer.chain_speculative_sampling(q, ids, p, accepted, emitted)
        assert counts[0] is accepted and counts[1] is emitted  # added to in place
        assert ((emitted - 10) + 1 == (tokens >= 0).sum(1)).all() and (accepted >= emitted).all()
        if certain:
            assert torch.equal(tokens.long(), wanted) and (accepted == 10 + drafts).all()
        else:
            assert tokens.shape == (batch, drafts + 1) and (tokens < vocab).all()
            place = torch.arange(drafts + 1)
            kept = place < (emitted - 10)[:, None]
            assert (tokens[:, :-1][kept[:, :-1]] == ids[kept[:, :-1]]).all()
            assert (tokens[place > (emitted - 10)[:, None]] == -1).all()


@pytest.mark.parametrize("numbers", ["generator", "seed", "seeds"])
@pytest.mark.parametrize("rule", cases.RULES)
def test_flashinfer_law(rule: str, numbers: str, p_value: PValue) -> None:
    options: dict[str, Any] = {
        "generator": {"generator": torch.Generator().manual_seed(9)},
        "seed": {"seed": 9, "offset": 3},
        "seeds": {"seed": torch.arange(TRIALS) + 5, "offset": torch.tensor([4])},
    }[numbers]
    ids = torch.cat([drawn(0, TRIALS), drawn(1, TRIALS)], 1)
    q, p = DRAFT[:2].expand(TRIALS, 2, VOCAB).contiguous(), TARGET.expand(TRIALS, 3, VOCAB)
    tokens, accepted, _ = flashinfer.chain_speculative_sampling(q, ids, p, rule=rule, **options)
    assert p_value(law_of_two(), first_two(tokens)) > CHANCE
    if rule == "recursive":  # each draft by itself passes with the overlap of its two laws, less what is tossed no more
        overlap = torch.minimum(TARGET[:2], DRAFT[:2]).sum(1)
        assert abs(float(accepted.float().mean()) - float(overlap.sum())) < 0.06
    again = flashinfer.chain_speculative_sampling(q, ids, p, rule=rule, **options)[0]
    assert torch.equal(again, tokens) == (numbers != "generator")


def test_flashinfer_requests_have_rows_of_their_own() -> None:
    q, p = probabilities(40, 3, 6, seed=1), probabilities(40, 4, 6, seed=2)
    ids = torch.randint(6, (40, 3), generator=torch.Generator().manual_seed(3))
    seeds = torch.arange(40) * 7

    def run(some: slice, offset: int) -> list[list[int]]:
        options = {"seed": seeds[some], "offset": offset}
        found: list[list[int]] = flashinfer.chain_speculative_sampling(q[some], ids[some], p[some], **options)[
            0
        ].tolist()
        return found

    whole = run(slice(None), 3)
    assert [run(slice(b, b + 1), 3)[0] for b in range(40)] == whole
    assert run(slice(None), 4) != whole, "the offset changes the numbers"


def test_flashinfer_seeds_of_two_calls_share_no_request() -> None:
    first, second = (flashinfer._coins(3, 4, None, seed, 0, torch.device("cpu")) for seed in (1, 2))
    assert not (first[:, None] == second).all(-1).any()


# EAGLE and Medusa

PATHS = torch.tensor([[0, 1, 3, 5], [0, 1, 4, -1], [0, 2, -1, -1]])  # as EAGLE's retrieve_indices
TREE_TOKENS = torch.tensor([[9, 1, 2, 3, 4, 0]])


def path_shaped(tree_logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What EAGLE's tree_decoding and Medusa's generate_candidates make of a tree."""
    return tree_logits[0, PATHS], torch.nn.functional.pad(tokens[0], (0, 1), value=-1)[PATHS]


@pytest.mark.parametrize(
    ("argmax", "best", "accepted", "token"),
    [
        pytest.param([1, 3, 0, 0, 0, 7], 0, 3, 7, id="to-a-leaf"),
        pytest.param([1, 4, 0, 0, 8, 0], 1, 2, 8, id="a-shorter-path"),
        pytest.param([2, 0, 6, 0, 0, 0], 2, 1, 6, id="the-second-child"),
        pytest.param([1, 7, 0, 0, 0, 0], 0, 1, 7, id="no-further"),
        pytest.param([5, 0, 0, 0, 0, 0], 0, 0, 5, id="nothing"),
    ],
)
def test_eagle_greedy(argmax: list[int], best: int, accepted: int, token: int) -> None:
    tree_logits = one_hot(argmax, 10)[None]
    found = eagle.evaluate_tree(tree_logits, TREE_TOKENS, PATHS)
    assert [int(x) for x in found] == [best, accepted, token]
    assert [int(x) for x in eagle.evaluate_posterior(*path_shaped(tree_logits, TREE_TOKENS))] == [best, accepted, token]


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("shape", ["nodes", "paths"])
def test_eagle_law(shape: str, rule: str, p_value: PValue) -> None:
    random = torch.Generator().manual_seed(3)
    tokens, depth = torch.tensor([[0, 1, 2, 3, 4, 0]]), torch.tensor([0, 1, 1, 2, 2, 3])
    tree_logits = torch.cat([TARGET, TARGET[:1]])[depth].log()[None] * 0.5
    emitted = []
    for _ in range(500):
        options: dict[str, Any] = {"sampling": SamplingParams(temperature=0.5), "rule": rule}
        if shape == "nodes":
            numbers = torch.rand(8, generator=random)
            found = eagle.evaluate_tree(tree_logits, tokens, PATHS, uniforms=numbers, **options)
        else:
            numbers = torch.rand(14, generator=random)
            found = eagle.evaluate_posterior(*path_shaped(tree_logits, tokens), uniforms=numbers, **options)
        path = tokens[0, PATHS[found.best_candidate, 1 : 1 + int(found.accept_length)]]
        emitted.append([*path.tolist(), int(found.token), -1][:2])
    assert p_value(law_of_two(), first_two(torch.tensor(emitted))) > CHANCE


def test_eagle_paths_that_have_parted_share_nothing() -> None:
    """The second path's last token is also the first one's, behind another token."""
    paths = torch.tensor([[9, 1, 5], [9, 2, 5]])
    logits = torch.stack([one_hot([2, 0, 0], 10), one_hot([2, 5, 6], 10)])
    assert [int(x) for x in eagle.evaluate_posterior(logits, paths)] == [1, 2, 6]


def test_eagle_nodes_in_any_order() -> None:
    """A tree whose children have lower numbers than their parents says the same."""
    tree_logits = torch.randn(1, 6, 10)
    # old number at each new place; siblings keep their order, which says who is tested first
    order = torch.tensor([0, 5, 3, 4, 1, 2])
    place = order.argsort()
    moved = torch.where(PATHS >= 0, place[PATHS.clamp(min=0)], -1)
    numbers = torch.rand(8)
    there = torch.cat([numbers[:6][order], numbers[6:]])
    for temperature in (0.0, 2.0):
        options = {"sampling": SamplingParams(temperature=temperature)}
        a = eagle.evaluate_tree(tree_logits, TREE_TOKENS, PATHS, uniforms=numbers, **options)
        b = eagle.evaluate_tree(tree_logits[:, order], TREE_TOKENS[:, order], moved, uniforms=there, **options)
        assert [int(x) for x in a] == [int(x) for x in b]


# Trees


@pytest.mark.parametrize("seed", range(20))
def test_linked_lists_become_trees(seed: int) -> None:
    """Random trees in random node orders, a stray node among them now and then."""
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 40))
    name = np.concatenate([[0], 1 + rng.permutation(nodes - 1)])
    parents = [-1, *(int(rng.integers(-1 if rng.random() < 0.1 else 0, i)) for i in range(1, nodes))]
    stray = [i > 0 and parents[i] < 0 for i in range(nodes)]
    for i in range(1, nodes):
        stray[i] = stray[i] or stray[parents[i]]
    children = [[j for j in rng.permutation(nodes) if parents[j] == i and j > 0] for i in range(nodes)]
    first, sibling = torch.full((2, 1, nodes), -1, dtype=torch.int64)
    for i, own in enumerate(children):
        for left, right in zip([None, *own], [*own, None], strict=True):
            if left is None:
                first[0, name[i]] = -1 if right is None else int(name[right])
            elif right is not None:
                sibling[0, name[left]] = int(name[right])
    tree = _trees.linked(first, sibling)
    node, above = tree.node[0].tolist(), tree.parents[0].tolist()
    assert sorted(node) == list(range(nodes)) and node[0] == 0 and above[0] == -1
    found: dict[int, list[int]] = {}
    for place, parent in enumerate(above):
        assert parent < place
        if parent >= 0:
            found.setdefault(node[parent], []).append(node[place])
    wanted = {int(name[i]): [int(name[j]) for j in own] for i, own in enumerate(children) if own and not stray[i]}
    assert found == wanted


@pytest.mark.parametrize("nodes", range(1, 35))
def test_the_longest_lists_become_trees(nodes: int) -> None:
    """A chain and a star, whose pointers have to be followed as far as there are nodes; numbers run backwards."""
    name = torch.tensor([0, *range(nodes - 1, 0, -1)])
    along = torch.full((1, nodes), -1)
    along[0, name[:-1]] = name[1:]
    chain = _trees.linked(along, torch.full((1, nodes), -1))
    assert chain.node[0].tolist() == name.tolist() and chain.parents[0].tolist() == list(range(-1, nodes - 1))
    first = torch.full((1, nodes), -1)
    first[0, 0] = name[1] if nodes > 1 else -1
    beside = torch.where(torch.arange(nodes) > 0, along, -1)
    star = _trees.linked(first, beside)
    assert star.node[0].tolist() == name.tolist() and star.parents[0].tolist() == [-1] + [0] * (nodes - 1)


# No copies of what is as large as the vocabulary, and no look at the device's memory.


def calls() -> dict[str, tuple[ModuleType, Callable[..., Any], dict[str, Any]]]:
    """Each adapter with inputs large enough to tell a row from the rest."""
    vocab = 4000
    p, q, five = torch.rand(2, 6, vocab), torch.rand(2, 6, vocab), torch.rand(2, 5, vocab)
    tree = sglang_tensors() | {"target_probs": p, "draft_probs": q}
    ids = torch.arange(5)
    flat = {
        "draft_token_ids": ids,
        "num_draft_tokens": [2, 3],
        "max_spec_len": 3,
        "cu_num_draft_tokens": torch.tensor([2, 5]),
        "draft_probs": q[0, :5],
        "target_logits": p[0, :5],
        "bonus_token_ids": torch.tensor([[1], [2]]),
        "sampling_metadata": metadata([1.0, 0.0]),
    }
    chains = {"draft_probs": five, "draft_token_ids": ids.expand(2, 5), "target_probs": p}
    nodes = {"tree_logits": p[:1], "draft_tokens": TREE_TOKENS, "retrieve_indices": PATHS}
    paths = {"logits": p[0, PATHS.clamp(min=0)], "candidates": PATHS}
    return {
        "vllm": (vllm, vllm.rejection_sample, flat),
        "vllm-v2": (vllm, vllm.rejection_sample_v2, v2_tensors([[1, 2], [3]], p[:, :3], q[:, :2], 1.0)),
        "sglang": (
            sglang,
            sglang.tree_speculative_sampling_target_only,
            {**tree, "proposal": "with_replacement"},
        ),
        "sglang-chain": (sglang, sglang.chain_speculative_sampling, tree),
        "flashinfer": (flashinfer, flashinfer.chain_speculative_sampling, chains),
        "eagle": (eagle, eagle.evaluate_tree, nodes),
        "eagle-paths": (eagle, eagle.evaluate_posterior, paths),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_verify_gets_the_engines_own_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, arguments = calls()[name]
    seen: list[torch.Tensor] = []
    original = module.verify

    def watched(target: torch.Tensor, draft: torch.Tensor | None, *rest: Any, **options: Any) -> Any:
        seen.extend(rows for rows in (target, draft) if rows is not None)
        return original(target, draft, *rest, **options)

    monkeypatch.setattr(module, "verify", watched)
    function(**arguments)
    own = {x.untyped_storage().data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)}
    assert seen and all(rows.untyped_storage().data_ptr() in own for rows in seen)


@pytest.mark.parametrize("name", list(calls()))
def test_the_rule_is_the_one_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, arguments = calls()[name]
    asked: list[str] = []
    original = module.verify

    def watched(*rest: Any, **options: Any) -> Any:
        asked.append(options["rule"])
        return original(*rest, **options)

    monkeypatch.setattr(module, "verify", watched)
    for rule in cases.RULES:
        option = {"use_block_verification": rule == "traversal"} if name == "vllm-v2" else {"rule": rule}
        function(**arguments, **option)
    assert asked == list(cases.RULES)


@pytest.mark.parametrize("name", list(calls()))
def test_nothing_is_read_back(name: str) -> None:
    """Fake tensors have nothing to read: a look at the data would raise."""
    _, function, arguments = calls()[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if name == "vllm":
            arguments["sampling_metadata"].temperature = mode.from_tensor(arguments["sampling_metadata"].temperature)
        function(**{n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()})


@pytest.mark.parametrize("name", list(calls()))
def test_everything_stays_on_its_device(name: str) -> None:
    _, function, arguments = calls()[name]

    def there(value: Any) -> Any:
        return value.to(f"{elsewhere.NAME}:0") if isinstance(value, torch.Tensor) else value

    moved = {argument: there(value) for argument, value in arguments.items()}
    if name == "vllm":
        sampling = moved["sampling_metadata"] = copy.copy(arguments["sampling_metadata"])
        sampling.temperature = there(sampling.temperature)
    torch.manual_seed(3)
    wanted = function(**arguments)
    torch.manual_seed(3)
    elsewhere.COUNTS.clear()
    with elsewhere.opaque_kernels():
        found = function(**moved)
    assert not elsewhere.COUNTS["to host"] and not elsewhere.COUNTS["waits"]
    # some write to what they are given
    ours, theirs = ((*tree_leaves(result), *given.values()) for result, given in ((found, moved), (wanted, arguments)))
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(other, torch.Tensor):
            assert mine.device.type == elsewhere.NAME
            torch.testing.assert_close(mine.cpu(), other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "eagle",
            {"tree_logits": torch.zeros(2, 6, 9)},
            r"tree_logits: expected shape \[1, \d+, any\]",
        ),
        ("eagle", {"draft_tokens": torch.zeros(3, dtype=torch.int64)}, r"draft_tokens: expected shape \[1, any\]"),
        ("eagle", {"retrieve_indices": torch.zeros(4, dtype=torch.int64)}, "retrieve_indices: expected shape"),
        ("eagle", {"retrieve_indices": PATHS.int()}, "retrieve_indices: expected dtype int64"),
        ("eagle", {"retrieve_indices": PATHS[:0]}, "retrieve_indices: expected at least one path and one node"),
        ("eagle", {"uniforms": torch.zeros(1, 9)}, r"uniforms: expected shape \[\d+\], got \[1, 9\]"),
        ("eagle-paths", {"logits": torch.zeros(2, 3)}, "logits: expected shape"),
        ("eagle-paths", {"candidates": PATHS.float()}, "candidates: expected dtype int32 or int64"),
        ("eagle-paths", {"candidates": PATHS[:, :0]}, "candidates: expected at least a root"),
        ("vllm", {"num_draft_tokens": [2, 4], "max_spec_len": 4}, r"draft_token_ids: expected shape \[6\], got \[5\]"),
        ("vllm", {"num_draft_tokens": [1, 4]}, r"num_draft_tokens: expected numbers in \[0, max_spec_len = 3\]"),
        ("vllm", {"num_draft_tokens": [5]}, "num_draft_tokens: expected numbers"),
        ("vllm", {"cu_num_draft_tokens": torch.tensor([2, 5, 5])}, r"cu_num_draft_tokens: expected shape \[2\]"),
        ("vllm", {"bonus_token_ids": torch.tensor([1, 2])}, r"bonus_token_ids: expected shape \[2, 1\]"),
        ("vllm", {"draft_probs": torch.zeros(5, 7)}, r"draft_probs: expected shape \[5, 4000\]"),
        ("vllm-v2", {"draft_logits": torch.zeros(2, 4000)}, "draft_logits: expected shape"),
        ("vllm-v2", {"pos": torch.zeros(1, dtype=torch.int64)}, "pos: expected shape"),
        ("vllm-v2", {"cu_num_logits": torch.zeros(7, dtype=torch.int32)}, "cu_num_logits: expected shape"),
        ("vllm-v2", {"num_speculative_steps": 0}, "num_speculative_steps: expected a whole number >= 1"),
    ],
)
def test_wrong_shapes_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    _, function, arguments = calls()[name]
    function(**arguments)
    with pytest.raises(ValueError, match=message):
        function(**arguments | changes)


def test_eagle_places_that_are_no_node_end_a_path() -> None:
    _, function, arguments = calls()["eagle"]
    nodes, uniforms = TREE_TOKENS.shape[1], torch.rand(TREE_TOKENS.shape[1] + 2)
    wanted = function(**arguments, uniforms=uniforms)
    for outside in (nodes, 10**9, -7):
        paths = torch.where(PATHS < 0, outside, PATHS)
        assert function(**arguments | {"retrieve_indices": paths}, uniforms=uniforms) == wanted
