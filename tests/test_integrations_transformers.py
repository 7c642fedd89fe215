"""Token trees inside transformers' `generate`, by object and by folder; our verification in its assisted decoding."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import PValue
from tiny import greedy, pad, perturbed, plain_logits, prompt, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import utils
from transformers.generation.logits_process import LogitNormalization, TypicalLogitsWarper

from mcsd.drafters import NgramDrafter
from mcsd.integrations import transformers as adapter
from mcsd.integrations.transformers import TreeDecoding, lossless_assisted_decoding, speculative_sampling
from mcsd_kernels import SamplingParams
from mcsd_kernels.reference import row_law

ROOT = Path(__file__).parent.parent
CHANCE = 1e-3
NEW = 14


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny()


@pytest.fixture(scope="module")
def draft(target: PreTrainedModel) -> PreTrainedModel:
    return perturbed(target, 0.3)


IDS, MASK = pad([prompt(7), prompt(4, 1), prompt(7, 2)])


class ForbidsTheLastToken(LogitsProcessor):
    """A processor of the user's own, which looks at the context."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, -1:], -math.inf)


def by_prompt(request: int, text: torch.Tensor) -> list[int]:
    """A constraint that differs from request to request and from place to place."""
    return list(range(10 * request + len(text) % 3, 97))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition-penalty": {"repetition_penalty": 1.7},
    "no-repeat-ngram": {"no_repeat_ngram_size": 2},
    "min-new-tokens": {"min_new_tokens": 9, "eos_token_id": [27, 14, 10]},
    "min-length": {"min_length": 12, "eos_token_id": [27, 14, 10]},
    "eos": {"eos_token_id": [27, 14, 10]},
    "bad-words": {"bad_words_ids": [[27], [10, 82]]},
    "suppressed": {"suppress_tokens": [27, 10], "begin_suppress_tokens": [40, 31]},
    "sequence-bias": {"sequence_bias": [[[27, 0], -20.0], [[12], 3.0]]},
    "forced-end": {"forced_eos_token_id": 5},
    "decay": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 27},
    "own-processor": {"logits_processor": LogitsProcessorList([ForbidsTheLastToken()])},
    "prefix-constraint": {"prefix_allowed_tokens_fn": by_prompt},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "prefix_allowed_tokens_fn": by_prompt},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("drafted_by", ["model", "ngram"])
def test_greedy_text_is_that_of_plain_generate(
    options: dict[str, Any], drafted_by: str, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """Prompts of two lengths, padded on the left, through everything that `generate` builds from these options."""
    options = dict(options)
    processors = options.pop("logits_processor", [])
    wanted = greedy(target, IDS, MASK, NEW, processors, **options)
    decoding = TreeDecoding(draft if drafted_by == "model" else "ngram", (3, 2))
    found = target.generate(
        IDS,
        attention_mask=MASK,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        custom_generate=decoding,
        logits_processor=LogitsProcessorList(processors),
        **options,
    )
    assert torch.equal(found, wanted)
    assert decoding.stats is not None and decoding.stats.tokens > 0


def test_lengths_and_outputs(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    decoding = TreeDecoding(draft, (2, 2))
    for options in ({"max_length": 13}, {"max_new_tokens": 6}, {"generation_config": config(max_new_tokens=6)}):
        assert target.generate(IDS, attention_mask=MASK, custom_generate=decoding, **options).shape == (3, 13)
    unmasked = target.generate(IDS[:1], custom_generate=decoding, max_new_tokens=6)
    assert torch.equal(unmasked, greedy(target, IDS[:1], MASK[:1], 6))
    named = target.generate(input_ids=IDS, attention_mask=MASK, custom_generate=decoding, max_new_tokens=6)
    output = target.generate(
        IDS, attention_mask=MASK, custom_generate=decoding, max_new_tokens=6, return_dict_in_generate=True
    )
    assert type(output) is utils.GenerateDecoderOnlyOutput and torch.equal(output.sequences, named)


def config(**options: Any) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(**options)


def test_a_caller_s_end_of_text(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Criteria of the user's own, `max_time`, and a shorter `MaxLengthCriteria`."""
    wanted = greedy(target, IDS, MASK, NEW)

    def stops(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([len(set(row.tolist()[7:])) >= 4 for row in ids])

    given: dict[str, Any] = {"attention_mask": MASK, "pad_token_id": 0, "custom_generate": TreeDecoding(draft, (3, 2))}
    found = target.generate(IDS, max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([stops]), **given)
    for row, plain in zip(found.tolist(), wanted.tolist(), strict=True):
        end = next(n for n in range(8, len(plain)) if len(set(plain[7:n])) >= 4)
        assert row[:end] == plain[:end] and set(row[end:]) <= {0}
    short = StoppingCriteriaList([MaxLengthCriteria(9)])
    assert torch.equal(target.generate(IDS, max_new_tokens=NEW, stopping_criteria=short, **given), wanted[:, :9])
    start = time.perf_counter()
    timed = target.generate(IDS, max_new_tokens=200, max_time=0.2, **given)
    assert timed.shape[1] < 207 and time.perf_counter() - start < 5


class Recorder:
    """A streamer."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended += 1


def test_the_streamer_is_bound_into_the_object(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    streamer = Recorder()
    found = target.generate(IDS[:1], custom_generate=TreeDecoding(draft, streamer=streamer), max_new_tokens=8)
    assert streamer.seen == found[0].tolist() and streamer.ended == 1
    with pytest.raises(ValueError, match="streamer"):
        target.generate(IDS, attention_mask=MASK, custom_generate=TreeDecoding(draft, streamer=streamer))


def letters() -> PreTrainedTokenizerFast:
    """One token a letter."""
    words = ["<unk>", *(chr(33 + i) for i in range(96))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_stop_strings_are_bound_into_the_object(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    wanted = greedy(target, IDS[:1], MASK[:1], NEW)[0].tolist()
    tokenizer = letters()
    stop = "".join(tokenizer.convert_ids_to_tokens(wanted[11:13]))
    decoding = TreeDecoding(draft, stop_strings=[stop], tokenizer=tokenizer)
    assert target.generate(IDS[:1], custom_generate=decoding, max_new_tokens=NEW)[0].tolist() == wanted[:13]


# What is sampled


@pytest.fixture(scope="module")
def small() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A pair over eight tokens, whose joint law can be written down."""
    model = tiny(vocab_size=8, gain=1.0)
    return model, perturbed(model, 0.5)


FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.3, "top_k": 0},
    "top-k": {"top_k": 4},
    "top-p-and-min-p": {"temperature": 1.5, "top_k": 0, "top_p": 0.9, "min_p": 0.05},
    "typical": {"top_k": 0, "typical_p": 0.9},
    "penalty-then-temperature": {"top_k": 0, "repetition_penalty": 1.5, "temperature": 1.2},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_sampled_text_has_the_law_of_plain_generate(
    filters: dict[str, Any], small: tuple[PreTrainedModel, PreTrainedModel], p_value: PValue
) -> None:
    """Chi-square of two tokens, p > 1e-3, against laws that transformers' own processors make of the plain logits."""
    model, draft = small
    text, trials = [3, 5, 1], 400
    torch.manual_seed(11)
    options = {"do_sample": True, "max_new_tokens": 2, "num_return_sequences": trials, **filters}
    found = model.generate(torch.tensor([text]), custom_generate=TreeDecoding(draft, (3, 2)), **options)
    made = model._get_logits_processor(config_of(model, options), len(text), torch.tensor([text]), None, None)

    def law(context: list[int]) -> list[float]:
        processed = made(torch.tensor([context]), plain_logits(model, context)[None])[0]
        return [float(p) for p in processed.double().softmax(-1)]

    joint = [((v, w), p * q) for v, p in enumerate(law(text)) if p > 0 for w, q in enumerate(law([*text, v]))]
    counts: dict[Any, int] = {}
    for row in found[:, 3:].tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert p_value(joint, counts) > CHANCE


def config_of(model: PreTrainedModel, options: dict[str, Any]) -> Any:
    made, _ = model._prepare_generation_config(None, **options)
    model._prepare_special_tokens(made)
    return made


def test_seeds(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """torch's generator decides where no seed is given, and nothing else does where one is."""

    def text(seed: int | None, state: int, rows: slice = slice(None)) -> torch.Tensor:
        transformers.set_seed(state)
        decoding = TreeDecoding(draft, (3, 2), seed=seed)
        options = {"do_sample": True, "max_new_tokens": 10, "pad_token_id": 0}
        found: torch.Tensor = target.generate(IDS[rows], attention_mask=MASK[rows], custom_generate=decoding, **options)
        return found

    assert torch.equal(text(None, 1), text(None, 1)) and not torch.equal(text(None, 1), text(None, 2))
    assert torch.equal(text(5, 1), text(5, 2)) and not torch.equal(text(5, 1), text(6, 1))
    assert torch.equal(text(5, 1)[:1], text(5, 3, slice(0, 1)))


T, K, NUCLEUS, M = TemperatureLogitsWarper(0.5), TopKLogitsWarper(7), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)
OTHER = TypicalLogitsWarper(0.9)


@pytest.mark.parametrize(
    ("processors", "kept", "taken"),
    [
        pytest.param([T, K, NUCLEUS, M], 0, "temperature top_k top_p min_p", id="all"),
        pytest.param([OTHER, T, NUCLEUS], 1, "temperature top_p", id="after-another"),
        pytest.param([T, K, OTHER], 3, "", id="before-another"),
        pytest.param([T, OTHER, K], 2, "top_k", id="around-another"),
        pytest.param([NUCLEUS, K], 1, "top_k", id="in-another-order"),
        pytest.param([T, T], 1, "temperature", id="twice"),
        pytest.param([T, K, LogitNormalization()], 0, "temperature top_k", id="renormalised"),
        pytest.param([TopPLogitsWarper(0.8, min_tokens_to_keep=3)], 1, "", id="keeps-three-anyway"),
        pytest.param([TopKLogitsWarper(2, min_tokens_to_keep=3)], 0, "top_k", id="keeps-three-of-two"),
        pytest.param([TopPLogitsWarper(0.8, filter_value=-5.0)], 1, "", id="strikes-nothing-out"),
        pytest.param([TopPLogitsWarper(0.0)], 1, "", id="nothing-left"),
        pytest.param([], 0, "", id="none"),
    ],
)
def test_the_processors_that_verify_applies_itself(processors: list[Any], kept: int, taken: str) -> None:
    """Split or whole, the law is the same."""
    rest, sampling = adapter._split(LogitsProcessorList(processors))
    assert len(rest) == kept and set(sampling) == set(taken.split())
    assert list(rest) == processors[:kept]
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    empty = torch.zeros(1, 0, dtype=torch.int64)
    whole = LogitsProcessorList(processors)(empty, logits).double().softmax(-1)[0]
    split = row_law(rest(empty, logits)[0], **sampling)
    assert torch.allclose(torch.from_numpy(split), whole, atol=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_beams", {"num_beams": 2}),
        ("output_scores", {"output_scores": True, "return_dict_in_generate": True}),
        ("output_logits", {"output_logits": True, "return_dict_in_generate": True}),
        ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
        ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
        ("guidance_scale", {"guidance_scale": 1.5}),
        ("encoder_repetition_penalty", {"encoder_repetition_penalty": 1.5}),
        ("encoder_no_repeat_ngram_size", {"encoder_no_repeat_ngram_size": 2}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
        ("assistant_ensemble_weight", {"assistant_ensemble_weight": 0.5}),
        ("cache_implementation", {"cache_implementation": "offloaded"}),
        ("position_ids", {"position_ids": torch.arange(7).expand(3, 7) + 3}),
        ("branching", {"custom_generate": TreeDecoding("ngram", (0,))}),
        ("draft", {"custom_generate": TreeDecoding("no such thing")}),
        (
            "watermarking_config",
            {
                "watermarking_config": transformers.SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=3),
                "do_sample": True,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_trees_do_not_have_is_refused_by_name(name: str, options: dict[str, Any], target: PreTrainedModel) -> None:
    options = {"custom_generate": TreeDecoding("ngram"), "pad_token_id": 0, **options}
    with pytest.raises(ValueError, match=name):
        target.generate(IDS, attention_mask=MASK, max_new_tokens=4, **options)


def test_a_cache_or_embeddings_brought_along_are_refused(target: PreTrainedModel) -> None:
    cache = target(IDS[:1, :4]).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        target.generate(IDS[:1], past_key_values=cache, max_new_tokens=4, custom_generate=TreeDecoding("ngram"))
    embeddings = target.get_input_embeddings()(IDS[:1])
    with pytest.raises(ValueError, match="inputs_embeds"):
        target.generate(inputs_embeds=embeddings, max_new_tokens=4, custom_generate=TreeDecoding("ngram"))


def test_what_the_model_would_be_given_besides_is_refused(target: PreTrainedModel) -> None:
    """`generate` lets a model's other inputs through; the loop would drop them."""
    options = config(max_length=20)
    with pytest.raises(ValueError, match="token_type_ids"):
        TreeDecoding("ngram")(target, IDS, [], [], options, attention_mask=MASK, token_type_ids=IDS)


def test_equal_prompts_cannot_be_told_apart_by_a_constraint(target: PreTrainedModel) -> None:
    options = {"prefix_allowed_tokens_fn": by_prompt, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
        target.generate(IDS[:1].repeat(2, 1), custom_generate=TreeDecoding("ngram"), **options)


# The folder


def test_the_folder_is_ready_to_be_published(
    target: PreTrainedModel, draft: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as its README says, loaded as transformers loads it, and given what `generate` is given."""
    front = (ROOT / "custom_generate" / "README.md").read_text().split("---")[1]
    assert "- custom_generate" in front and "license:" in front
    repository = tmp_path / "repository"
    (repository / "custom_generate").mkdir(parents=True)
    for name in ("generate.py", "requirements.txt"):
        (repository / "custom_generate" / name).write_text((ROOT / "custom_generate" / name).read_text())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    try:
        importlib.metadata.version("mcsd")
    except importlib.metadata.PackageNotFoundError:  # running from a bare checkout
        (repository / "custom_generate" / "requirements.txt").write_text("")
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK}
    load = {"custom_generate": str(repository), "trust_remote_code": True}
    found = target.generate(IDS, assistant_model=draft, branching=(3, 2), repetition_penalty=1.3, **options, **load)
    assert torch.equal(found, greedy(target, IDS, MASK, NEW, repetition_penalty=1.3))
    streamer = Recorder()
    alone = {**options, "attention_mask": MASK[:1]}
    found = target.generate(IDS[:1], streamer=streamer, eos_token_id=[27], **alone, **load)
    assert torch.equal(found, greedy(target, IDS[:1], MASK[:1], NEW, eos_token_id=[27]))
    assert streamer.seen == found[0].tolist()
    with pytest.raises(ValueError, match="num_beams"):
        target.generate(IDS, num_beams=2, **options, **load)


def test_the_folder_may_come_with_a_model(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """A model loaded together with the folder has our function as its `generate`: that must not call itself."""
    scope: dict[str, Any] = {}
    exec((ROOT / "custom_generate" / "generate.py").read_text(), scope)
    model = tiny()
    model.generate = lambda *arguments, **options: scope["generate"](model, *arguments, **options)
    found = model.generate(IDS, attention_mask=MASK, assistant_model=draft, max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(found, greedy(target, IDS, MASK, NEW))


# Assisted decoding


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_assisted_decoding_verifies_with_our_rules(
    rule: str, small: tuple[PreTrainedModel, PreTrainedModel], p_value: PValue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate(assistant_model=...)`: the law of two tokens, the replacement called, and taken back at the end."""
    model, draft = small
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    calls = 0
    original, inner = utils._speculative_sampling, adapter.speculative_sampling

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return inner(*arguments, **options)

    monkeypatch.setattr(adapter, "speculative_sampling", counted)
    torch.manual_seed(5)
    text = torch.tensor([[3, 5, 1]])
    counts: dict[Any, int] = {}
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 2, "attention_mask": torch.ones_like(text)}
    with lossless_assisted_decoding(rule):
        for _ in range(150):
            pair = tuple(model.generate(text, assistant_model=draft, pad_token_id=0, **options)[0, 3:].tolist())
            counts[pair] = counts.get(pair, 0) + 1
    assert calls >= 150 and utils._speculative_sampling is original
    first = plain_logits(model, text[0].tolist()).double().softmax(-1).tolist()
    joint = [
        ((v, w), p * q)
        for v, p in enumerate(first)
        for w, q in enumerate(plain_logits(model, [*text[0].tolist(), v]).double().softmax(-1).tolist())
    ]
    assert p_value(joint, counts) > CHANCE


def near_equal_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """p and q that agree but for one token, whose p is one rounding smaller: what is left of p is exactly 0."""
    q = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    p = q.clone()
    return p.repeat(1, 2, 1), q


def test_no_crash_where_transformers_divides_zero_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """p equal to q, and a coin that rounding puts above their ratio."""
    p, q = near_equal_rows()
    ids = torch.tensor([[7, 0]])
    monkeypatch.setattr(torch, "rand_like", lambda ratio: torch.full_like(ratio, 1.0 + 1e-6))
    done = [False] * (len(inspect.signature(utils._speculative_sampling).parameters) == 6)  # transformers up to 5.17
    with pytest.raises(RuntimeError, match="probability tensor"):
        utils._speculative_sampling(ids, q, 1, p, *done)
    rows = torch.full((1, 4), 1.0 - 2**-24)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: rows.to(device))
    with lossless_assisted_decoding():
        tokens, accepted = utils._speculative_sampling(ids, q, 1, p - 1e-7)
        ended, none_more = utils._speculative_sampling(ids, q, 1, p - 1e-7, True)
    assert tokens[0, 0] == 0 and accepted == 1 and tokens.shape == (1, 2)
    assert ended.tolist() == [[0]] and none_more == 0  # the candidates end the text: nothing follows them
    for scale in (1.0, 1.0 - 2**-23, 1.0 + 2**-23):  # a residual of the size of rounding, or none
        tokens, _ = speculative_sampling(ids, q, 1, (p.exp() * torch.tensor([scale, 1.0, 1.0])).log())
        assert 0 <= int(tokens[0, -1]) < 3


def test_the_replacement_is_taken_back_after_an_error_and_refuses_mixtures() -> None:
    original = utils._speculative_sampling
    with pytest.raises(ValueError, match="assistant_ensemble_weight"), lossless_assisted_decoding():
        utils._speculative_sampling(*(None,) * 4, assistant_ensemble_weight=0.5)
    assert utils._speculative_sampling is original
    with pytest.raises(ValueError, match="rule"), lossless_assisted_decoding("greedy"):
        pass
    assert utils._speculative_sampling is original


def test_assisted_decoding_takes_models_only(small: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, _ = small
    text = torch.tensor([[3, 5, 1]])
    refused = pytest.raises(ValueError, match="assistant_model: expected a model, got a NgramDrafter")
    with refused, lossless_assisted_decoding():
        model.generate(text, assistant_model=NgramDrafter(), pad_token_id=0, max_new_tokens=2)
    with pytest.raises(AttributeError, match="configure"), lossless_assisted_decoding():
        NgramDrafter().configure  # noqa: B018  another mistake stays what it is


def test_speculative_sampling_takes_filters_too(p_value: PValue) -> None:
    torch.manual_seed(2)
    logits, q = torch.randn(1, 2, 6), torch.randn(1, 1, 6)
    sampling = SamplingParams(top_k=3)
    counts: dict[Any, int] = {}
    law = q[0, 0].softmax(-1)
    for _ in range(700):
        x = torch.searchsorted(law.cumsum(0), torch.rand(())).clamp(max=5)
        tokens, _ = speculative_sampling(torch.stack([torch.tensor(1), x])[None], q.masked_fill(q < -99, 0), 1, logits)
        counts[int(tokens[0, 0])] = counts.get(int(tokens[0, 0]), 0) + 1
    assert p_value(list(enumerate(logits[0, 0].double().softmax(-1).tolist())), counts) > CHANCE
    kept = set(logits[0, 0].topk(3).indices.tolist())
    tokens, _ = speculative_sampling(torch.tensor([[1, 0]]), q, 1, logits, sampling=sampling)
    assert int(tokens[0, 0]) in kept


def test_the_engines_adapters_bring_no_transformers() -> None:
    """The package itself brings nothing; the adapters bring torch and what they need of `mcsd_kernels`."""
    code = """if True:
        import sys, mcsd.integrations
        assert "torch" not in sys.modules
        from mcsd.integrations import eagle, flashinfer, sglang, vllm
        assert "transformers" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
