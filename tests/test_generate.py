"""`mcsd.generate`: greedy text is that of transformers, sampled text has the law of the target; how requests end."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    T5Config,
)

import mcsd
from mcsd import Drafter, ModelDrafter, Proposal, State, Stats
from mcsd.attention import NAME
from mcsd.checking import require
from mcsd_kernels import SamplingParams, Status
from tests.cases import PROPOSALS, RULES
from tests.conftest import PValue
from tests.tiny import VOCAB, greedy, pad, perturbed, plain_logits, prompt, tiny

ARCHITECTURES = [
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "phi3",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "gptj",
    "falcon",
]
NEW = 24
PROMPTS = [prompt(17, 1), prompt(4, 2), prompt(9, 3)]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny()


@pytest.fixture(scope="module")
def draft(llama: PreTrainedModel) -> PreTrainedModel:
    return perturbed(llama)


def partial(stats: Stats) -> bool:
    """Some candidates were accepted and some were not."""
    return 0 < sum(stats.accepted_by_depth) < sum(stats.tested_by_depth)


def varied(text: torch.Tensor, new: int) -> bool:
    """The continuations hold many different tokens, so that a wrong one would show."""
    return all(row[-new:].unique().numel() >= 4 for row in text)


class Always(Drafter):
    """Proposes the same tokens every time, as a chain: a complete drafter in few lines."""

    def __init__(self, tokens: list[int]) -> None:
        self.chain = tokens

    def propose(self, state: State) -> Proposal:
        tokens = torch.tensor([[sequence[-1], *self.chain] for sequence in state.sequences], device=state.device)
        parents = torch.arange(-1, len(self.chain), device=state.device)
        return Proposal(tokens, parents, len(self.chain))


class Collect:
    """A streamer that keeps what it gets, and presses Ctrl-C after a number of calls."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.got: list[torch.Tensor] = []
        self.ended = 0
        self.interrupt_at = interrupt_at

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.got.append(value)
        if len(self.got) == self.interrupt_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


# Greedy: token for token


@pytest.mark.parametrize("kind", ["itself", "perturbed", "ngram"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_transformers_greedy(name: str, kind: str) -> None:
    model = tiny(name)
    drafter: Any = {"itself": model, "perturbed": perturbed(model), "ngram": "ngram"}[kind]
    for prompts in (PROMPTS[:1], PROMPTS):
        ids, mask = pad(prompts)
        wanted = greedy(model, ids, mask, NEW)
        assert varied(wanted, NEW)
        found = mcsd.generate(model, drafter, ids, mask, max_new_tokens=NEW, temperature=0.0)
        assert found.sequences.dtype == torch.int64
        assert torch.equal(found.sequences, wanted)
        assert found.stats.tokens == NEW * len(prompts) and found.stats.status == [0] * len(prompts)
        if kind == "perturbed" and len(prompts) > 1:
            assert partial(found.stats)
        if kind == "itself":
            assert found.stats.tokens_per_call > 3.0 and found.stats.acceptance_by_depth[0] == 1.0


@pytest.mark.parametrize(("name", "size"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
def test_trees_may_reach_past_the_last_position(name: str, size: str) -> None:
    """The text ends where the model does; what the last trees propose beyond has no position to be embedded at."""
    model = tiny(name, **{size: 24})
    ids, mask = pad([prompt(10, 1), prompt(4, 2)])
    found = mcsd.generate(
        model, perturbed(model), ids, mask, max_new_tokens=14, temperature=0.0, branching=(2, 2, 2, 2)
    )
    assert torch.equal(found.sequences, greedy(model, ids, mask, 14))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_with_logits_processors(name: str) -> None:
    model = tiny(name)
    drafter = perturbed(model)
    for prompts in (PROMPTS[:1], PROMPTS):
        ids, mask = pad(prompts)
        plain = greedy(model, ids, mask, NEW)
        processors = [
            RepetitionPenaltyLogitsProcessor(1.3),
            NoRepeatNGramLogitsProcessor(2),
            SuppressTokensLogitsProcessor(sorted(set(plain[0, -5:].tolist())), device="cpu"),
        ]
        wanted = greedy(model, ids, mask, NEW, processors)
        assert not torch.equal(wanted, plain)
        options: Any = {"temperature": 0.0, "branching": (3, 2, 1), "logits_processor": processors}
        found = mcsd.generate(model, drafter, ids, mask, max_new_tokens=NEW, **options)
        assert torch.equal(found.sequences, wanted)
    assert partial(found.stats)


def test_greedy_with_a_minimum_length(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    end = int(greedy(llama, ids, mask, NEW)[0, ids.shape[1] + 3])
    processor = MinNewTokensLengthLogitsProcessor(ids.shape[1], 10, end, device="cpu")
    early = greedy(llama, ids, mask, NEW, eos_token_id=end)
    wanted = greedy(llama, ids, mask, NEW, [processor], eos_token_id=end)
    assert not torch.equal(wanted, early)
    found = mcsd.generate(
        llama,
        draft,
        ids,
        mask,
        max_new_tokens=NEW,
        temperature=0.0,
        logits_processor=processor,
        eos_token_id=end,
        pad_token_id=0,
    )
    assert torch.equal(found.sequences, wanted)


@pytest.mark.parametrize(
    "branching",
    [
        pytest.param((1,), id="one-candidate"),
        pytest.param((1, 1, 1, 1, 1, 1, 1), id="deep-chain"),
        pytest.param((40,), id="wide-star"),
        pytest.param((4, 2, 2), id="default"),
        pytest.param((2, 1, 3, 1), id="waist"),
        pytest.param((97,), id="the-whole-vocabulary"),
        pytest.param((5, 4, 3), id="more-than-64-nodes"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_greedy_whatever_the_tree(
    branching: tuple[int, ...], rule: str, proposal: str, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(
        llama, draft, ids, mask, max_new_tokens=14, temperature=0.0, branching=branching, proposal=proposal, rule=rule
    )
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 14))
    assert len(found.stats.accepted_by_depth) == len(branching)
    assert branching == (97,) or partial(found.stats)


@pytest.mark.parametrize("attention", ["tree", "dense"])
@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_greedy_by_both_kinds_of_attention(attention: str, own: str, draft: PreTrainedModel) -> None:
    model = tiny()
    model.set_attn_implementation(own)
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(model, draft, ids, mask, max_new_tokens=NEW, temperature=0.0, attention=attention)
    assert torch.equal(found.sequences, greedy(model, ids, mask, NEW))
    assert model.config._attn_implementation == own


def test_greedy_with_lookup_on_a_repetitive_prompt(llama: PreTrainedModel) -> None:
    # the text of a greedy loop repeats itself once the penalty for repetition is below 1
    words = prompt(5, 4)
    ids, mask = pad([words * 4, words * 2])
    processor = RepetitionPenaltyLogitsProcessor(0.2)
    wanted = greedy(llama, ids, mask, 40, [processor])
    for rule in RULES:
        found = mcsd.generate(
            llama, "ngram", ids, mask, max_new_tokens=40, temperature=0.0, rule=rule, logits_processor=[processor]
        )
        assert torch.equal(found.sequences, wanted)
        assert partial(found.stats) and found.stats.tokens_per_call > 1.2


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_padding_on_the_right_is_as_good_as_none(kind: str, llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    drafter: Any = draft if kind == "model" else "ngram"
    ids, mask = pad(PROMPTS, "right")
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=NEW, temperature=0.0)
    assert torch.equal(found.sequences[:, : ids.shape[1]], ids)
    for row, alone in zip(found.sequences, PROMPTS, strict=True):
        one, ones = pad([alone])
        assert torch.equal(row[ids.shape[1] :], greedy(llama, one, ones, NEW)[0, len(alone) :])


def test_padding_in_the_middle_does_not_count(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    row = PROMPTS[0]
    holes = torch.tensor([[*row[:5], 0, 0, *row[5:], 0]])
    mask = torch.tensor([[1] * 5 + [0] * 2 + [1] * (len(row) - 5) + [0]])
    one, ones = pad([row])
    found = mcsd.generate(llama, draft, holes, mask, max_new_tokens=9, temperature=0.0)
    assert torch.equal(found.sequences[0, -9:], greedy(llama, one, ones, 9)[0, -9:])


def test_the_padding_token_makes_a_missing_mask(draft: PreTrainedModel) -> None:
    model = tiny()
    ids, mask = pad(PROMPTS)
    wanted = greedy(model, ids, mask, 9)
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0}
    model.generation_config.pad_token_id = 0
    assert torch.equal(mcsd.generate(model, draft, ids, **options).sequences, wanted)
    model.generation_config.pad_token_id = None
    everything = mcsd.generate(model, draft, ids, **options).sequences
    assert torch.equal(everything, mcsd.generate(model, draft, ids, torch.ones_like(ids), **options).sequences)
    # a padding token that also ends texts may be meant: it stays
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 0
    assert torch.equal(mcsd.generate(model, draft, ids, eos_token_id=[], **options).sequences, everything)


def test_prompts_of_a_single_token(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    for prompts in ([[5]], [[5], [9]], [[5], prompt(6)]):
        ids, mask = pad(prompts)
        found = mcsd.generate(llama, draft, ids, mask, max_new_tokens=9, temperature=0.0)
        assert torch.equal(found.sequences, greedy(llama, ids, mask, 9))


def test_integers_of_32_bits_are_taken(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(llama, draft, ids.int(), mask, max_new_tokens=5, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 5))


class SeesPlainLogits(LogitsProcessor):
    """Fails unless the logits of every node are those of a plain forward over its own context."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy.deepcopy(model)
        self.rows = 0
        self.error = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        blank = int((input_ids[0] != 0).int().argmax())  # padding on the left
        text = input_ids[:, blank:]
        plain = self.model(text, attention_mask=torch.ones_like(text), use_cache=False).logits[:, -1]
        self.error = max(self.error, float((plain - scores).abs().max()))
        self.rows += len(text)
        return scores


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_oss", "gptj"])
def test_target_logits_of_every_node_at_every_step(name: str) -> None:
    model = tiny(name)
    ids, mask = pad(PROMPTS)
    witness = SeesPlainLogits(model)
    found = mcsd.generate(model, perturbed(model), ids, mask, max_new_tokens=15, logits_processor=witness, seed=7)
    assert partial(found.stats)
    assert witness.rows > 15 * len(PROMPTS) and witness.error < 1e-4


# Sampling: the law

FEW = 5
STEPS = 4
START = [1, 3]


@pytest.fixture(scope="module")
def few() -> PreTrainedModel:
    """A model over five tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny("llama", 3, 1.2, vocab_size=FEW, intermediate_size=16, max_position_embeddings=32, **sizes)


def kept(row: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """A row's law in float64, written as the definition says it."""
    law = torch.softmax(row.double() / temperature, -1)
    if top_k:
        law = torch.where(row >= row.sort().values[-top_k], law, 0.0)
        law = law / law.sum()
    above = torch.stack([law[law > mass].sum() for mass in law])
    law = torch.where(above < top_p, law, 0.0)
    return law / law.sum()


def exact(
    model: PreTrainedModel,
    start: list[int],
    *,
    processor: LogitsProcessor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> dict[tuple[int, ...], float]:
    """The law of the next `STEPS` tokens, by plain forwards over all contexts."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(STEPS):
        texts = torch.tensor([start + list(tokens) for tokens in law])
        with torch.inference_mode():
            logits = model(texts, attention_mask=torch.ones_like(texts), use_cache=False).logits[:, -1].float()
            if processor is not None:
                logits = processor(texts, logits)
        rows = [kept(row, temperature, top_k, top_p).tolist() for row in logits]
        law = {
            (*tokens, v): mass * row[v]
            for (tokens, mass), row in zip(law.items(), rows, strict=True)
            for v in range(FEW)
            if row[v] > 0
        }
    return law


def law_is(found: list[tuple[int, ...]], law: dict[tuple[int, ...], float], p_value: PValue) -> float:
    """The smallest p of three chi-square tests: the first two tokens, the last two, all of them together."""
    worst = 1.0
    for cut in (slice(0, 2), slice(2, 4), slice(0, 4)):
        wanted: dict[Any, float] = {}
        for tokens, mass in law.items():
            wanted[tokens[cut]] = wanted.get(tokens[cut], 0.0) + mass
        counts: dict[Any, int] = {}
        for tokens in found:
            counts[tokens[cut]] = counts.get(tokens[cut], 0) + 1
        worst = min(worst, p_value(wanted.items(), counts))
    return worst


def sample(
    model: PreTrainedModel, drafter: Any, start: list[int], *, calls: int = 5, batch: int = 2000, **options: Any
) -> tuple[list[tuple[int, ...]], Stats]:
    ids = torch.tensor([start] * batch)
    found: list[tuple[int, ...]] = []
    for call in range(calls):
        generation = mcsd.generate(
            model, drafter, ids, torch.ones_like(ids), max_new_tokens=STEPS, seed=call * batch + 12345, **options
        )
        found += map(tuple, generation.sequences[:, len(start) :].tolist())
    return found, generation.stats


P = 1e-3  # with 10,000 texts a total variation of 0.03 in two tokens is seen nine times in ten, or better


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_sampled_text_has_the_targets_law(proposal: str, rule: str, few: PreTrainedModel, p_value: PValue) -> None:
    found, stats = sample(few, perturbed(few, 0.7), START, branching=(2, 2), proposal=proposal, rule=rule)
    assert partial(stats) and 0.2 < stats.acceptance_by_depth[0] < 0.98
    assert law_is(found, exact(few, START), p_value) > P


@pytest.mark.parametrize(
    ("filters", "proposal", "rule"),
    [
        pytest.param({"temperature": 0.6}, "without_replacement", "recursive", id="cold"),
        pytest.param({"temperature": 1.7, "top_p": 0.85}, "without_replacement", "traversal", id="nucleus"),
        pytest.param({"temperature": 1.3, "top_k": 3}, "greedy", "recursive", id="top-k"),
    ],
)
def test_sampled_text_has_the_law_of_the_filters(
    filters: dict[str, Any], proposal: str, rule: str, few: PreTrainedModel, p_value: PValue
) -> None:
    found, stats = sample(
        few, perturbed(few, 0.7), START, calls=4, branching=(3, 1), proposal=proposal, rule=rule, **filters
    )
    assert partial(stats)
    assert law_is(found, exact(few, START, **filters), p_value) > P


def test_sampled_text_has_the_law_of_the_processed_logits(few: PreTrainedModel, p_value: PValue) -> None:
    processor = NoRepeatNGramLogitsProcessor(2)
    start = [1, 3, 2, 1]
    found, stats = sample(
        few, perturbed(few, 0.7), start, calls=3, batch=1000, branching=(2, 2), logits_processor=processor
    )
    assert partial(stats)
    assert law_is(found, exact(few, start, processor=processor), p_value) > P


def test_looked_up_text_has_the_targets_law(few: PreTrainedModel, p_value: PValue) -> None:
    start = [1, 3, 2, 1, 3, 4, 1, 3]
    found, stats = sample(few, "ngram", start, calls=4)
    assert partial(stats)
    assert law_is(found, exact(few, start), p_value) > P


class Sorts(ModelDrafter):
    """Hands its candidates over sorted by probability instead of in draw order, which is not lossless."""

    def propose(self, state: State) -> Proposal:
        proposal = super().propose(state)
        assert proposal.draft_logits is not None
        masses = proposal.draft_logits.gather(1, proposal.tokens[:, 1:])
        proposal.tokens[:, 1:] = proposal.tokens[:, 1:].gather(1, masses.argsort(1, descending=True))
        return proposal


def test_a_law_test_sees_a_bias(few: PreTrainedModel, p_value: PValue) -> None:
    found, _ = sample(few, Sorts(perturbed(few, 0.7), (3,)), START, calls=3)
    assert law_is(found, exact(few, START), p_value) < P


# Seeds: what a request's text depends on


def continuation(
    model: PreTrainedModel, drafter: Any, prompts: list[list[int]], seeds: list[int], **options: Any
) -> torch.Tensor:
    ids, mask = pad(prompts)
    generation = mcsd.generate(model, drafter, ids, mask, max_new_tokens=NEW, seed=seeds, eos_token_id=[], **options)
    return generation.sequences[:, ids.shape[1] :]


def test_the_same_seed_gives_the_same_text(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    first = continuation(llama, draft, PROMPTS, [3, 4, 5])
    assert torch.equal(first, continuation(llama, draft, PROMPTS, [3, 4, 5]))
    other = continuation(llama, draft, PROMPTS, [3, 40, 5])
    assert torch.equal(first[[0, 2]], other[[0, 2]]) and not torch.equal(first[1], other[1])


def test_a_number_as_seed_counts_on_over_the_batch(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(llama, draft, ids, mask, max_new_tokens=NEW, seed=11).sequences
    assert torch.equal(found[:, ids.shape[1] :], continuation(llama, draft, PROMPTS, [11, 12, 13]))


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, -(2**63)])
def test_any_64_bits_are_a_seed(seed: int, llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS[:1])
    assert mcsd.generate(llama, draft, ids, mask, max_new_tokens=3, seed=seed).stats.tokens == 3


@pytest.mark.parametrize("kind", ["model", "ngram"])
@pytest.mark.parametrize("rule", RULES)
def test_a_text_does_not_depend_on_its_neighbours(
    rule: str, kind: str, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    drafter: Any = draft if kind == "model" else "ngram"
    # Matrix products round differently in a batch. That flips a draw whose random number lies within rounding of the
    # border of two tokens, perhaps once in some hundred texts of this length; not with these seeds.
    for start in range(10, 40, 10):
        seeds = [start, start + 1, start + 2]
        together = continuation(llama, drafter, PROMPTS, seeds, rule=rule)
        for request, alone in enumerate(PROMPTS):
            one = continuation(llama, drafter, [alone], seeds[request : request + 1], rule=rule)
            assert torch.equal(one[0], together[request])


@pytest.mark.parametrize(
    ("proposal", "rule"), [("without_replacement", "recursive"), ("greedy", "traversal"), ("point", "recursive")]
)
def test_each_request_may_have_sampling_parameters_of_its_own(
    proposal: str, rule: str, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    parameters = {
        "temperature": [0.0, 0.7, 1.4],
        "top_k": [0, 5, 20],
        "top_p": [0.9, 1.0, 0.8],
        "min_p": [0.0, 0.05, 0.0],
    }
    options: dict[str, Any] = {"proposal": proposal, "rule": rule}
    tensors = {name: torch.tensor(values) for name, values in parameters.items()}
    together = continuation(llama, draft, PROMPTS, [1, 2, 3], **options, **tensors)
    for request, alone in enumerate(PROMPTS):
        numbers = {name: values[request] for name, values in parameters.items()}
        one = continuation(llama, draft, [alone], [request + 1], **options, **numbers)
        assert torch.equal(one[0], together[request])
    ids, mask = pad(PROMPTS)
    assert torch.equal(together[0], greedy(llama, ids, mask, NEW)[0, ids.shape[1] :])


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(torch.tensor([3, 4, 5]), id="tensor"),
        pytest.param(torch.tensor([3, 4, 5], dtype=torch.int32), id="tensor-of-32-bits"),
        pytest.param(np.array([3, 4, 5]), id="array"),
        pytest.param([np.int64(3), torch.tensor(4), 5], id="all-kinds"),
        pytest.param(np.int64(3), id="numpys-number"),
        pytest.param(torch.tensor(3), id="tensor-without-axes"),
    ],
)
def test_seeds_of_every_kind(seed: Any, llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(llama, draft, ids, mask, max_new_tokens=5, seed=seed).sequences
    assert torch.equal(found, mcsd.generate(llama, draft, ids, mask, max_new_tokens=5, seed=3).sequences)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor], ids=lambda kind: kind.__name__)
def test_numbers_of_every_kind(kind: Any, llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    plain = {"temperature": 0.5, "top_p": 0.75, "min_p": 0.0625}  # exact in 16 bits
    wanted = mcsd.generate(llama, draft, ids, mask, max_new_tokens=6, top_k=9, **plain).sequences
    floats = {np.int64: np.float64, np.int32: np.float32, np.uint8: np.float16}.get(kind, kind)
    given = {name: floats(value) for name, value in plain.items()}
    found = mcsd.generate(llama, draft, ids, mask, max_new_tokens=kind(6), top_k=kind(9), **given)
    assert torch.equal(found.sequences, wanted)


def test_sampling_params_keep_python_numbers() -> None:
    found = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(7), top_p=np.float16(0.5), min_p=np.int8(0))
    assert found == SamplingParams(0.5, 7, 0.5, 0)
    assert [type(value) for value in vars(found).values()] == [float, int, float, int]


# Ends


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["itself", "perturbed"])
def test_eos_anywhere_in_an_accepted_path(kind: str, rule: str, llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS[:1])
    text = greedy(llama, ids, mask, NEW)[0, ids.shape[1] :].tolist()
    drafter = llama if kind == "itself" else draft
    ends = set()
    for token in text[:12]:
        found = mcsd.generate(
            llama,
            drafter,
            ids,
            mask,
            max_new_tokens=NEW,
            temperature=0.0,
            branching=(1, 1, 1, 1, 1),
            rule=rule,
            eos_token_id=token,
        )
        said = found.sequences[0, ids.shape[1] :].tolist()
        assert said == text[: text.index(token) + 1]
        assert found.stats.tokens == len(said)
        ends.add(len(said) % 6)
    assert len(ends) >= 4, "the ends should fall on several places of a path"


@pytest.mark.parametrize("length", [6, 60, 150])
@pytest.mark.parametrize("place", range(6))
def test_eos_of_one_request_while_others_go_on(
    place: int, length: int, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    # longer than the cache has room to spare, so that a wrong count of what is cached shows
    ids, mask = pad([prompt(length, 1), prompt(length, 2), prompt(length // 2, 3)])
    free = greedy(llama, ids, mask, NEW)
    ends = [int(free[0, length + place]), int(free[1, length + 3 * place])]
    wanted = greedy(llama, ids, mask, NEW, eos_token_id=ends)
    for drafter in (llama, draft, "ngram"):
        found = mcsd.generate(
            llama, drafter, ids, mask, max_new_tokens=NEW, temperature=0.0, eos_token_id=ends, pad_token_id=0
        )
        assert torch.equal(found.sequences, wanted)


@pytest.mark.parametrize("length", [7, 60, 150])
@pytest.mark.parametrize("new", [1, 2, 3, 5, 17])
def test_the_number_of_new_tokens_is_exact(
    new: int, length: int, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    ids, mask = pad([prompt(length, 1), prompt(length // 3, 2), prompt(length, 3)])
    wanted = greedy(llama, ids, mask, new)
    for drafter in (llama, draft, "ngram", Always([5, 6, 7, 8])):
        streamer = Collect()
        one = mcsd.generate(llama, drafter, ids[:1], mask[:1], max_new_tokens=new, temperature=0.0, streamer=streamer)
        assert torch.equal(one.sequences, wanted[:1]) and len(streamer.got) == new + 1
        found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=new, temperature=0.0)
        assert torch.equal(found.sequences, wanted)
        assert found.stats.tokens == 3 * new


def test_special_tokens_come_from_the_generation_configuration(draft: PreTrainedModel) -> None:
    model = tiny()
    ids, mask = pad(PROMPTS)
    end = int(greedy(model, ids, mask, NEW)[0, ids.shape[1] + 4])
    model.generation_config.eos_token_id = [end, 3]
    model.generation_config.pad_token_id = 1
    text = mcsd.generate(model, draft, ids, mask, max_new_tokens=NEW, temperature=0.0).sequences
    row = text[0, ids.shape[1] :].tolist()
    assert row[row.index(end) + 1 :] == [1] * (len(row) - row.index(end) - 1)
    model.generation_config.pad_token_id = None
    text = mcsd.generate(model, draft, ids, mask, max_new_tokens=NEW, temperature=0.0).sequences
    row = text[0, ids.shape[1] :].tolist()
    assert set(row[row.index(end) :]) == {end}
    # the model's own sampling settings are not asked
    model.generation_config.temperature, model.generation_config.do_sample = 5.0, True
    again = mcsd.generate(model, draft, ids, mask, max_new_tokens=NEW, temperature=0.0).sequences
    assert torch.equal(again, text)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda ids: torch.tensor(ids), id="tensor"),
        pytest.param(lambda ids: np.array(ids), id="array"),
        pytest.param(set, id="set"),
        pytest.param(tuple, id="tuple"),
        pytest.param(lambda ids: [np.int64(ids[0]), torch.tensor(ids[1])], id="all-kinds"),
    ],
)
def test_special_tokens_of_every_kind(kind: Any, llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    free = greedy(llama, ids, mask, NEW)
    ends = [int(free[0, ids.shape[1] + 3]), int(free[1, ids.shape[1] + 9])]
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.0}
    wanted = mcsd.generate(llama, draft, ids, mask, eos_token_id=ends, pad_token_id=7, **options).sequences
    assert (wanted[0, -1], wanted.shape) == (7, free.shape)
    for pad_id in (np.int64(7), torch.tensor(7), torch.tensor([7])):
        found = mcsd.generate(llama, draft, ids, mask, eos_token_id=kind(ends), pad_token_id=pad_id, **options)
        assert torch.equal(found.sequences, wanted)
    for one in (np.int64(ends[0]), torch.tensor(ends[0]), torch.tensor(ends[:1])):
        found = mcsd.generate(llama, draft, ids, mask, eos_token_id=one, pad_token_id=7, **options)
        assert torch.equal(found.sequences[0], wanted[0])


def test_a_negative_number_stands_for_none(draft: PreTrainedModel) -> None:
    model, ends = tiny(), tiny()
    ids, mask = pad(PROMPTS)
    ends.generation_config.eos_token_id = ends.generation_config.pad_token_id = -1
    for target, options in ((ends, {}), (model, {"eos_token_id": -1, "pad_token_id": -100})):
        found = mcsd.generate(target, draft, ids, mask, max_new_tokens=9, temperature=0.0, **options)
        assert torch.equal(found.sequences, greedy(model, ids, mask, 9))


class EndsWith(StoppingCriteria):
    def __init__(self, token: int, shape: tuple[int, ...] = (1,)) -> None:
        self.token, self.seen = token, []
        self.shape = shape

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert input_ids.shape[0] == 1 and input_ids.dtype == torch.int64
        self.seen.append(input_ids[0].tolist())
        return (input_ids[:, -1] == self.token).reshape(self.shape)


def test_stopping_criteria(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS[:1])
    width = ids.shape[1]
    text = greedy(llama, ids, mask, NEW)[0].tolist()

    def stops(criteria: Any) -> list[int]:
        found = mcsd.generate(
            llama, llama, ids, mask, max_new_tokens=NEW, temperature=0.0, stopping_criteria=criteria
        ).sequences
        row: list[int] = found[0].tolist()
        assert row == text[: len(row)]
        return row

    assert len(stops(MaxLengthCriteria(width + 6))) == width + 6
    assert len(stops([MaxLengthCriteria(width + 9), MaxLengthCriteria(width + 3)])) == width + 3
    assert len(stops(MaxTimeCriteria(0.0, initial_timestamp=0.0))) == width + 1
    own = EndsWith(text[width + 2])
    row = stops([own])
    assert row[-1] == own.token and own.token not in row[width:-1]
    assert own.seen == [text[:length] for length in range(width + 1, len(row) + 1)], "asked once after every token"


def test_stopping_criteria_end_one_request_of_a_batch(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    free = greedy(llama, ids, mask, NEW)
    token = int(free[1, ids.shape[1] + 5])
    wanted = greedy(llama, ids, mask, NEW, eos_token_id=token)
    found = mcsd.generate(
        llama,
        draft,
        ids,
        mask,
        max_new_tokens=NEW,
        temperature=0.0,
        stopping_criteria=EndsWith(token),
        pad_token_id=0,
    )
    assert torch.equal(found.sequences, wanted)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and a few of two."""
    letters = [chr(33 + i) for i in range(VOCAB - 5)]
    words = ["<unk>", "ab", "bc", "cd", "de", *letters]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("place", [1, 4, 7])
def test_stop_strings(
    place: int, tokenizer: PreTrainedTokenizerFast, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    ids, mask = pad(PROMPTS[:1])
    width = ids.shape[1]
    text = greedy(llama, ids, mask, NEW)[0].tolist()
    stop = "".join(tokenizer.convert_ids_to_tokens(text[width + place - 1 : width + place + 1]))
    wanted = greedy(llama, ids, mask, NEW, stop_strings=stop, tokenizer=tokenizer)
    assert width < wanted.shape[1] <= width + place + 1
    for drafter in (llama, draft):
        for strings in (stop, [stop, "no such text"]):
            found = mcsd.generate(
                llama,
                drafter,
                ids,
                mask,
                max_new_tokens=NEW,
                temperature=0.0,
                stop_strings=strings,
                tokenizer=tokenizer,
            )
            assert torch.equal(found.sequences, wanted)


# Streams and interruptions


def test_a_streamer_gets_the_prompt_then_every_token_then_the_end(
    llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    ids, mask = pad(PROMPTS[:1])
    streamer = Collect()
    found = mcsd.generate(llama, draft, ids, mask, max_new_tokens=NEW, streamer=streamer)
    assert torch.equal(streamer.got[0], ids)
    assert all(value.shape == (1,) and value.dtype == torch.int64 for value in streamer.got[1:])
    assert torch.equal(torch.cat(streamer.got[1:]), found.sequences[0, ids.shape[1] :])
    assert streamer.ended == 1


def untouched(model: PreTrainedModel) -> tuple[Any, ...]:
    """What of a model must be the same before and after."""
    return (
        model.config.to_dict(),
        model.config._attn_implementation,
        model.generation_config.to_dict(),
        model.training,
        {name: (id(value), value._version) for name, value in model.state_dict(keep_vars=True).items()},
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [module.forward.__qualname__ for module in model.modules()],
        sorted(vars(model)),
    )


def test_models_are_left_as_they_were_found() -> None:
    for name, own in (("llama", "sdpa"), ("gemma3_text", "eager"), ("gpt_oss", "eager"), ("gptj", "eager")):
        target = tiny(name)
        target.set_attn_implementation(own)
        drafter = perturbed(target)
        ids, mask = pad(PROMPTS)
        before = untouched(target), untouched(drafter)
        mcsd.generate(target, drafter, ids, mask, max_new_tokens=5)
        mcsd.generate(target, target, ids, mask, max_new_tokens=5)
        mcsd.check(target)
        assert (untouched(target), untouched(drafter)) == before
        assert target.config._attn_implementation == own
        assert all(
            getattr(module.config, "_attn_implementation", own) == own
            for module in target.modules()
            if hasattr(module, "config")
        )


def test_arguments_are_left_as_they_were_given(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    again = ids.clone(), mask.clone()
    temperature = torch.tensor([0.5, 1.0, 0.0])
    mcsd.generate(llama, draft, ids, mask, max_new_tokens=5, temperature=temperature)
    assert torch.equal(ids, again[0]) and torch.equal(mask, again[1])
    assert temperature.tolist() == [0.5, 1.0, 0.0]


class Breaks(ModelDrafter):
    """Fails in one of its methods, at its third tree."""

    def __init__(self, model: PreTrainedModel, error: BaseException, where: str) -> None:
        super().__init__(model)
        self.error, self.where, self.trees = error, where, 0

    def begin(self, state: State) -> None:
        super().begin(state)
        if self.where == "begin":
            raise self.error

    def propose(self, state: State) -> Proposal:
        self.trees += 1
        if self.where == "propose" and self.trees == 3:
            raise self.error
        return super().propose(state)

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        if self.where == "keep" and self.trees == 3:
            raise self.error
        super().keep(state, path, length)


@pytest.mark.parametrize(
    "where",
    ["prompt", "begin", "propose", "keep", "callback", "streamer", "first-token", "criterion", "processor"],
)
def test_an_interruption_returns_what_there_is(where: str, llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS[:1])
    width = ids.shape[1]
    text = greedy(llama, ids, mask, NEW)[0].tolist()
    drafter: Any = Breaks(draft, KeyboardInterrupt(), where) if where in ("begin", "propose", "keep") else draft
    streamer = Collect({"prompt": 1, "first-token": 2, "streamer": 7}.get(where))

    def callback(stats: Stats) -> None:
        if where == "callback" and stats.target_calls == 2:
            raise KeyboardInterrupt

    def criterion(input_ids: torch.Tensor, scores: Any) -> bool:
        if where == "criterion" and input_ids.shape[1] == width + 4:
            raise KeyboardInterrupt
        return False

    def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if where == "processor" and input_ids.shape[1] > width + 6:
            raise KeyboardInterrupt
        return scores

    before = untouched(llama), untouched(draft)
    try:
        found = mcsd.generate(
            llama,
            drafter,
            ids,
            mask,
            max_new_tokens=NEW,
            temperature=0.0,
            proposal=None,
            streamer=streamer,
            callback=callback,
            stopping_criteria=[criterion],
            logits_processor=[processor],
        )
    except KeyboardInterrupt:  # it would end the whole test session
        pytest.fail("the interruption was passed on")
    assert found.stats.interrupted
    row = found.sequences[0].tolist()
    assert row == text[: len(row)] and width <= len(row) < len(text)
    assert (len(row) == width) == (where in ("prompt", "begin"))
    assert streamer.ended == 1 and torch.cat([ids[0], *streamer.got[1:]]).tolist() == row
    assert found.stats.tokens == len(row) - width
    assert (untouched(llama), untouched(draft)) == before


def test_an_interruption_of_a_batch(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    width = ids.shape[1]
    wanted = greedy(llama, ids, mask, NEW)
    drafter = Breaks(draft, KeyboardInterrupt(), "propose")
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=NEW, temperature=0.0, pad_token_id=VOCAB - 1)
    lengths = []
    for row, text in zip(found.sequences.tolist(), wanted.tolist(), strict=True):
        same = next((i for i, (a, b) in enumerate(zip(row, text, strict=False)) if a != b), len(row))
        assert set(row[same:]) <= {VOCAB - 1}
        lengths.append(same - width)
    assert min(lengths) >= 2, "two steps were done"
    assert sum(lengths) == found.stats.tokens and found.stats.interrupted


@pytest.mark.parametrize("where", ["begin", "propose", "keep", "callback", "streamer"])
def test_an_error_leaves_the_models_as_they_were(where: str, llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS[:1])
    error = RuntimeError("no more")
    drafter: Any = Breaks(draft, error, where) if where in ("begin", "propose", "keep") else draft

    class Fails(Collect):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if where == "streamer" and len(self.got) == 5:
                raise error

    def callback(stats: Stats) -> None:
        if where == "callback":
            raise error

    before = untouched(llama), untouched(draft)
    with pytest.raises(RuntimeError, match="no more"):
        mcsd.generate(llama, drafter, ids, mask, max_new_tokens=NEW, streamer=Fails(), callback=callback)
    assert (untouched(llama), untouched(draft)) == before
    assert mcsd.generate(llama, draft, ids, mask, max_new_tokens=3).stats.tokens == 3


def test_the_callback_sees_the_running_counts(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    seen: list[tuple[int, int]] = []
    found = mcsd.generate(
        llama,
        draft,
        ids,
        mask,
        max_new_tokens=9,
        callback=lambda stats: seen.append((stats.target_calls, stats.tokens)),
    )
    assert [calls for calls, _ in seen] == list(range(1, found.stats.target_calls + 1))
    assert seen[-1][1] == found.stats.tokens == 27
    assert all(a < b for (_, a), (_, b) in itertools.pairwise(seen))


def test_progress_goes_to_stderr(
    llama: PreTrainedModel, draft: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, mask = pad(PROMPTS[:1])
    mcsd.generate(llama, draft, ids, mask, max_new_tokens=5, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "5/5" in captured.err
    mcsd.generate(llama, draft, ids, mask, max_new_tokens=5)
    assert capsys.readouterr() == ("", "")


# Broken numbers


@pytest.mark.parametrize(
    ("value", "status"),
    [
        pytest.param(float("nan"), Status.NAN_ROW, id="nan"),
        pytest.param(float("inf"), Status.NAN_ROW, id="infinity"),
        pytest.param(float("-inf"), Status.EMPTY_ROW, id="nothing-finite"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_broken_logits_end_their_request_alone(
    rule: str, temperature: float, value: float, status: Status, draft: PreTrainedModel
) -> None:
    ids, mask = pad(PROMPTS)
    width, blank = ids.shape[1], 96
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "temperature": temperature,
        "pad_token_id": blank,
        "rule": rule,
        "proposal": "without_replacement",
    }
    clean = mcsd.generate(tiny(), draft, ids, mask, **options)
    model = require("target", tiny(), "auto")
    calls = []

    def breaks(module: torch.nn.Module, args: Any, output: Any) -> None:
        calls.append(0)
        if len(calls) == 4:  # the prompt's forward and two trees were sound
            output.logits[1] = value

    model.register_forward_hook(breaks)
    sound: list[int] = []
    found = mcsd.generate(model, draft, ids, mask, callback=lambda stats: sound.append(stats.request_calls), **options)
    assert found.stats.status == [0, int(status), 0]
    assert sound[:4] == [3, 6, 9, 11], "the request was over after its third tree"
    assert torch.equal(found.sequences[[0, 2]], clean.sequences[[0, 2]])
    row = found.sequences[1, width:].tolist()
    said = clean.sequences[1, width:].tolist()
    same = next(i for i, (a, b) in enumerate(zip(row, said, strict=True)) if a != b)
    assert 2 <= same < NEW
    assert row[same + 1 :] == [blank] * (len(row) - same - 1), "at most a placeholder after what was sound"


# Compiled models


def test_a_model_in_the_wrapper_of_torch_compile_runs_compiled() -> None:
    models_ = [tiny(num_hidden_layers=1), perturbed(tiny(num_hidden_layers=1))]
    ids, mask = pad(PROMPTS[:1])
    wanted = greedy(models_[0], ids, mask, 3)
    ran: dict[str, int] = {}

    def backend(name: str) -> Any:
        def compiled(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            def run(*arguments: Any) -> Any:
                ran[name] = ran.get(name, 0) + 1
                return graph.forward(*arguments)

            return run

        return compiled

    names = ("target", "draft")
    torch.compiler.reset()  # what other tests have compiled counts towards torch's limit
    try:
        target, draft = (torch.compile(m, backend=backend(n)) for m, n in zip(models_, names, strict=True))
        target(ids), draft(ids)  # torch leaves marks of its own
        before = [untouched(model) for model in models_]
        ran.clear()
        found = mcsd.generate(target, draft, ids, mask, max_new_tokens=3, temperature=0.0, branching=(2,))
    finally:
        torch.compiler.reset()
    assert torch.equal(found.sequences, wanted) and set(ran) == set(names)
    assert [untouched(model) for model in models_] == before
    assert mcsd.check(target).ok


# Callers' mistakes

IDS, MASK = pad([PROMPTS[0]])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids", id="empty-prompt"),
        pytest.param({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "input_ids", id="empty-batch"),
        pytest.param({"input_ids": IDS[0]}, "input_ids", id="one-axis"),
        pytest.param({"input_ids": IDS.tolist()}, "input_ids", id="a-list"),
        pytest.param({"input_ids": IDS.float()}, "input_ids", id="float-ids"),
        pytest.param({"input_ids": IDS.bool()}, "input_ids", id="bool-ids"),
        pytest.param({"input_ids": torch.tensor([[3, VOCAB]])}, "input_ids", id="id-past-the-vocabulary"),
        pytest.param({"input_ids": torch.tensor([[3, -1]])}, "input_ids", id="negative-id"),
        pytest.param(
            {"input_ids": torch.tensor([[3, 4], [5, 6]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
            "row 1 is all padding",
            id="all-padding",
        ),
        pytest.param({"attention_mask": MASK[:, 1:]}, "attention_mask", id="mask-of-another-shape"),
        pytest.param({"attention_mask": MASK.tolist()}, "attention_mask", id="mask-a-list"),
        pytest.param({"input_ids": torch.full((1, 300), 3)}, "max_new_tokens|input_ids", id="longer-than-positions"),
        pytest.param({"max_new_tokens": 250}, "max_new_tokens", id="past-the-positions"),
        pytest.param({"max_new_tokens": 0}, "max_new_tokens", id="no-new-tokens"),
        pytest.param({"max_new_tokens": -1}, "max_new_tokens", id="negative-new-tokens"),
        pytest.param({"max_new_tokens": True}, "max_new_tokens", id="true-new-tokens"),
        pytest.param({"max_new_tokens": 2.0}, "max_new_tokens", id="float-new-tokens"),
        pytest.param({"max_new_tokens": None}, "max_new_tokens", id="no-limit"),
        pytest.param({"proposal": "sampled"}, "proposal", id="unknown-proposal"),
        pytest.param({"rule": "best"}, "rule", id="unknown-rule"),
        pytest.param({"attention": "flash"}, "attention", id="unknown-attention"),
        pytest.param({"branching": ()}, "branching", id="no-branching"),
        pytest.param({"branching": (2, 0)}, "branching", id="no-children"),
        pytest.param({"branching": (2, -1)}, "branching", id="negative-children"),
        pytest.param({"branching": (2, 1.5)}, "branching", id="children-in-part"),
        pytest.param({"branching": (True,)}, "branching", id="true-children"),
        pytest.param({"branching": (32, 32)}, "branching", id="too-many-nodes"),
        pytest.param({"branching": 4}, "branching", id="branching-a-number"),
        pytest.param({"branching": "42"}, "branching", id="branching-a-text"),
        pytest.param({"temperature": -0.5}, "temperature", id="negative-temperature"),
        pytest.param({"temperature": float("nan")}, "temperature", id="nan-temperature"),
        pytest.param({"temperature": "hot"}, "temperature", id="temperature-a-text"),
        pytest.param({"temperature": torch.ones(2)}, "temperature", id="temperatures-of-another-batch"),
        pytest.param({"top_p": 0.0}, "top_p", id="top-p-zero"),
        pytest.param({"top_k": -1}, "top_k", id="negative-top-k"),
        pytest.param({"min_p": 1.5}, "min_p", id="min-p-above-one"),
        pytest.param({"seed": [1, 2]}, "seed", id="seeds-of-another-batch"),
        pytest.param({"seed": None}, "seed", id="no-seed"),
        pytest.param({"seed": 0.5}, "seed", id="seed-in-part"),
        pytest.param({"seed": True}, "seed", id="seed-true"),
        pytest.param({"seed": "1"}, "seed", id="seed-a-text"),
        pytest.param({"seed": {1}}, "seed", id="seeds-without-order"),
        pytest.param({"seed": torch.tensor([1, 2])}, "seed", id="seeds-of-another-batch-in-a-tensor"),
        pytest.param({"seed": torch.tensor([1.0])}, "seed", id="float-seeds-in-a-tensor"),
        pytest.param({"seed": torch.tensor([True])}, "seed", id="true-in-a-tensor-of-seeds"),
        pytest.param({"max_new_tokens": np.float32(2.0)}, "max_new_tokens", id="numpys-float-new-tokens"),
        pytest.param({"temperature": np.bool_(True)}, "temperature", id="numpys-true-temperature"),
        pytest.param({"temperature": np.array([0.5, 0.5])}, "temperature", id="temperatures-in-an-array"),
        pytest.param({"top_k": torch.tensor([True])}, "top_k", id="top-k-a-tensor-of-true"),
        *(
            pytest.param({name: value}, rf"^{name}: expected a whole number in ", id=f"{name[:3]}-{case}")
            for name in ("eos_token_id", "pad_token_id")
            for case, value in {
                "a-text": "</s>",
                "bytes": b"ab",
                "true": True,
                "a-float": 2.0,
                "a-dict": {3: 3},
                "none-in-a-list": [None],
                "numpys-float": np.float32(2),
                "a-tensor-of-floats": torch.tensor([2.0]),
                "a-tensor-of-true": torch.tensor([True]),
                "a-tensor-of-two-axes": torch.tensor([[2]]),
            }.items()
        ),
        pytest.param({"pad_token_id": [3, 4]}, "pad_token_id", id="pad-several"),
        pytest.param({"pad_token_id": []}, "pad_token_id", id="pad-an-empty-list"),
        *(
            pytest.param({name: value}, rf"^{name}: expected .*, got {got}", id=f"{name}-{got}")
            for name, kind in (("logits_processor", LogitsProcessor), ("stopping_criteria", StoppingCriteria))
            for value, got in ((5, "5"), ("ab", "'ab'"), ([None], "None"), ([print, 0.5], "0.5"), (kind, "<class"))
        ),
        pytest.param({"callback": 5}, "^callback: expected a function or None, got 5", id="callback-a-number"),
        pytest.param({"observer": []}, "^observer: expected a function or None, got list", id="observer-a-list"),
        pytest.param({"streamer": print}, "^streamer: .*put and end.*, got builtin", id="streamer-a-function"),
        pytest.param({"streamer": Collect}, "^streamer: .*put and end.*, got <class", id="streamer-a-class"),
        pytest.param(
            {"stop_strings": ".", "tokenizer": "gpt2"}, "^tokenizer: expected .*, got 'gpt2'", id="tokenizer-a-name"
        ),
        pytest.param({"stop_strings": "."}, "stop_strings|tokenizer", id="stop-strings-without-tokenizer"),
        pytest.param({"stop_strings": 5}, "^stop_strings", id="stop-strings-a-number"),
        pytest.param({"stop_strings": ["a", 5]}, "^stop_strings", id="stop-strings-with-a-number"),
        pytest.param({"stop_strings": ""}, "^stop_strings", id="stop-string-empty"),
        pytest.param({"stop_strings": {"a": 1}}, "^stop_strings", id="stop-strings-a-dict"),
        pytest.param({"draft": "2-gram"}, "draft", id="unknown-drafter"),
        pytest.param({"draft": None}, "draft", id="no-drafter"),
        pytest.param({"draft": ModelDrafter}, "draft", id="a-class-as-drafter"),
        pytest.param({"draft": "ngram", "proposal": "greedy"}, "proposal", id="proposal-against-the-drafters"),
        pytest.param({"draft": Always([3]), "proposal": "greedy"}, "proposal", id="proposal-against-a-drafters"),
        pytest.param({"target": "llama"}, "target", id="target-a-name"),
        pytest.param({"draft": torch.nn.Linear(3, 3)}, "^draft: .*, got Linear$", id="a-module-as-drafter"),
    ],
)
def test_mistakes_are_named(
    options: dict[str, Any],
    name: str,
    llama: PreTrainedModel,
    draft: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mcsd.decode.Scorer", lambda *_: pytest.fail("a model was about to run"))
    arguments: dict[str, Any] = {
        "target": llama,
        "draft": draft,
        "input_ids": IDS,
        "attention_mask": None if "input_ids" in options else MASK,
        "max_new_tokens": 3,
        **options,
    }
    before = untouched(llama)
    with pytest.raises(ValueError, match=name):
        mcsd.generate(**arguments)
    assert untouched(llama) == before


@pytest.mark.parametrize(
    ("result", "got"),
    [
        pytest.param(lambda scores: scores[0], r"\[97\]", id="one-axis"),
        pytest.param(lambda scores: scores[:, :-1], r"\[1, 96\]", id="a-token-less"),
        pytest.param(lambda scores: scores.sum(), r"\[\]", id="a-number"),
        pytest.param(lambda scores: None, "None", id="nothing"),
        pytest.param(lambda scores: scores.numpy(), "ndarray", id="an-array"),
    ],
)
def test_a_logits_processor_must_return_what_it_got(
    result: Any, got: str, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    before = untouched(llama), untouched(draft)
    with pytest.raises(ValueError, match=rf"^logits_processor: expected logits \[1, 97\] back, got {got}$"):
        mcsd.generate(llama, draft, IDS, MASK, logits_processor=lambda ids, scores: result(scores))
    assert (untouched(llama), untouched(draft)) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_logits_processor_may_compute_in_another_dtype(
    dtype: torch.dtype, llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    options: Any = {"max_new_tokens": 12, "temperature": 0.0}
    found = mcsd.generate(llama, draft, IDS, MASK, logits_processor=lambda ids, scores: scores.to(dtype), **options)
    rounded = mcsd.generate(
        llama, draft, IDS, MASK, logits_processor=lambda ids, scores: scores.to(dtype).float(), **options
    )
    assert torch.equal(found.sequences, rounded.sequences)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_compiled_module_that_is_no_model_is_refused(role: str, llama: PreTrainedModel) -> None:
    models_: dict[str, Any] = {"target": llama, "draft": llama, role: torch.compile(torch.nn.Linear(3, 3))}
    with pytest.raises(ValueError, match=rf"^{role}: .*, got OptimizedModule$"):
        mcsd.generate(**models_, input_ids=IDS, attention_mask=MASK)


def test_unknown_arguments_are_errors(llama: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="do_sample"):
        mcsd.generate(llama, "ngram", IDS, MASK, do_sample=False)  # type: ignore[call-arg]


def test_a_streamer_wants_a_batch_of_one(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS[:2])
    streamer = Collect()
    with pytest.raises(ValueError, match="streamer"):
        mcsd.generate(llama, "ngram", ids, mask, streamer=streamer)
    assert not streamer.got


def test_another_vocabulary_is_refused(llama: PreTrainedModel) -> None:
    other = tiny(vocab_size=96)
    for draft in (other, ModelDrafter(other, (2,))):
        with pytest.raises(ValueError, match=r"^draft.*97.*96.*shared_vocab=96"):
            mcsd.generate(llama, draft, IDS, MASK, max_new_tokens=3)


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        pytest.param("t5", "encoder-decoder", id="encoder-decoder"),
        pytest.param("mamba", "recurrent", id="recurrent"),
        pytest.param("lfm2", "recurrent", id="partly-recurrent"),
        pytest.param("bloom", "positions", id="bloom"),
        pytest.param("mpt", "positions", id="mpt"),
        pytest.param("falcon_alibi", "positions", id="falcon-with-alibi"),
        pytest.param("headless", "head", id="no-language-model-head"),
        pytest.param("bert", "head|decoder", id="masked-language-model"),
        pytest.param("double", "float64", id="float64"),
    ],
)
def test_models_without_trees_are_refused_with_the_reason(
    name: str, why: str, role: str, llama: PreTrainedModel
) -> None:
    small = {"vocab_size": VOCAB, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    other: Any
    if name == "t5":
        other = AutoModelForSeq2SeqLM.from_config(T5Config(**small))
    elif name == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        other = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=VOCAB, **sizes))
    elif name == "headless":
        other = tiny().model
    elif name == "double":
        other = tiny().double()
    else:
        other = tiny(name)
    models_ = {"target": llama, "draft": llama, role: other}
    before = untouched(llama)
    with pytest.raises(mcsd.UnsupportedModelError, match=why) as caught:
        mcsd.generate(**models_, input_ids=IDS, attention_mask=MASK, max_new_tokens=3)
    assert type(other).__name__ in str(caught.value)
    assert untouched(llama) == before


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_training_with_gradient_checkpointing_is_refused(role: str, llama: PreTrainedModel) -> None:
    """transformers then takes the cache away, and every token would be scored without what comes before it."""
    other = tiny().float()
    other.gradient_checkpointing_enable()
    models_ = {"target": llama, "draft": llama, role: other}
    options: Any = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 3, "temperature": 0.0}
    wanted = mcsd.generate(**models_, **options).sequences
    other.train()
    with pytest.raises(mcsd.UnsupportedModelError, match=r"gradient checkpointing.* eval\(\)"):
        mcsd.generate(**models_, **options)
    assert "gradient checkpointing" in mcsd.check(other).reason
    assert torch.equal(mcsd.generate(**{**models_, role: other.eval()}, **options).sequences, wanted)


def test_sliding_windows_have_no_dense_form() -> None:
    with pytest.raises(mcsd.UnsupportedModelError, match="sliding"):
        mcsd.generate(tiny("mistral"), "ngram", IDS, MASK, max_new_tokens=3, attention="dense")
    with pytest.raises(mcsd.UnsupportedModelError, match="dense"):
        mcsd.generate(tiny("gptj"), "ngram", IDS, MASK, max_new_tokens=3, attention="tree")


@pytest.fixture(autouse=True)
def own_attention(llama: PreTrainedModel, draft: PreTrainedModel) -> Iterator[None]:
    """After every test the shared models attend as they did before it."""
    yield
    assert NAME not in (llama.config._attn_implementation, draft.config._attn_implementation)


def test_parameters_out_of_range_in_a_tensor_end_their_request_alone(
    llama: PreTrainedModel, draft: PreTrainedModel
) -> None:
    ids, mask = pad(PROMPTS)
    temperature = torch.tensor([0.0, -1.0, 0.0])
    found = mcsd.generate(
        llama, draft, ids, mask, max_new_tokens=NEW, temperature=temperature, proposal="without_replacement"
    )
    assert found.stats.status[1] & Status.BAD_SAMPLING and found.stats.status[0] == found.stats.status[2] == 0
    wanted = greedy(llama, ids, mask, NEW)
    assert torch.equal(found.sequences[[0, 2]], wanted[[0, 2]])
    assert found.stats.tokens <= 2 * NEW + 1


def test_sampling_params_are_those_of_the_kernels() -> None:
    # the defaults of the two signatures must not drift apart
    defaults = mcsd.generate.__kwdefaults__
    kernels = SamplingParams()
    assert all(defaults[name] == getattr(kernels, name) for name in ("temperature", "top_k", "top_p", "min_p"))


def test_one_step_by_hand(llama: PreTrainedModel) -> None:
    # no candidates at all is plain decoding
    found = mcsd.generate(llama, Always([]), IDS, MASK, max_new_tokens=4, temperature=0.0)
    text = IDS[0].tolist()
    for _ in range(4):
        text.append(int(plain_logits(llama, text).argmax()))
    assert found.sequences[0].tolist() == text
    assert found.stats.target_calls == 4 and found.stats.tokens_per_call == 1.0
