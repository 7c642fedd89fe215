"""Models as people load them: on another device, on several, offloaded, quantised, with adapters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from elsewhere import COUNTS, moved, opaque_kernels
from tiny import greedy, pad, perturbed, prompt, tiny
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mcsd
from mcsd import graphs
from mcsd.draft_model import SubVocabularyDraft, load_draft
from mcsd.drafters import EarlyExitDrafter, HeadsDrafter, MedusaHeads, Proposal, TopKDrafter
from mcsd.integrations.transformers import TreeDecoding
from mcsd.placement import input_device, input_vocab, is_spread, output_shape
from mcsd.scoring import Scorer, UnsupportedModelError
from mcsd.tune import tune

IDS, MASK = pad([prompt(9), prompt(14, 1)])
KINDS = ("llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "qwen3_moe")
FIRST, SECOND = (f"{elsewhere.NAME}:{index}" for index in range(2))


def there(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """On the first device."""
    return [tensor.to(FIRST) for tensor in tensors]


def spread(model: PreTrainedModel, *devices: str) -> PreTrainedModel:
    """In place: the first half of the layers on the first device, the others and the head on the second.

    As accelerate does it: whatever comes to a part is sent to its device first, but for the cache.
    """

    def sent(value: Any, device: str) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(sent(one, device) for one in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    body = model.get_decoder()
    layers = list(body.layers)
    head = [model.get_output_embeddings(), body.norm]
    before = [*layers[: len(layers) // 2], body.embed_tokens, body.rotary_emb]
    for parts, device in ((before, devices[0]), ([*layers[len(layers) // 2 :], *head], devices[1])):
        for part in parts:
            moved(part, device)
            part.register_forward_pre_hook(
                lambda part, args, kwargs, device=device: (
                    sent(args, device),
                    {name: sent(value, device) for name, value in kwargs.items()},
                ),
                with_kwargs=True,
            )
    return model


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("llama", "traversal"),
        *(
            (kind, "recursive")
            for kind in ("llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "qwen3_moe")
        ),
    ],
)
def test_generation_on_another_device(kind: str, rule: str) -> None:
    def generate(target: PreTrainedModel, draft: PreTrainedModel, inputs: Any, new: int) -> mcsd.Generation:
        return mcsd.generate(target, draft, *inputs, branching=(3, 2), max_new_tokens=new, rule=rule)

    target = tiny(kind)
    target.set_experts_implementation("eager")  # the one that runs here
    draft = perturbed(target)
    wanted = generate(target, draft, (IDS, MASK), 40)
    moved(target, FIRST), moved(draft, FIRST)
    inputs = there((IDS, MASK))
    crossed = []
    with opaque_kernels():
        for new in (8, 40):
            COUNTS.clear()
            found = generate(target, draft, inputs, new)
            crossed.append((COUNTS["to host"] - found.stats.target_calls, COUNTS["waits"]))
    assert found.stats.target_calls > 8 and torch.equal(found.sequences.cpu(), wanted.sequences)
    own = hasattr(target.config, "num_experts_per_tok")  # transformers' experts wait for themselves
    assert crossed[0][: 2 - own] == crossed[1][: 2 - own]  # one copy to the host a step, and nothing else that waits
    # torch's backend reads numbers of each row, and says the same
    assert torch.equal(generate(target, draft, inputs, 40).sequences.cpu(), wanted.sequences)


@pytest.mark.parametrize(
    ("kind", "places", "lengths"),
    [
        ("llama", (0, 1, 0), (20, 9)),
        ("llama", (0, 1, 1), (20, 20)),  # of one length: the end of the prompts waits for the first tree
        ("llama", (1, 0, 1), (20, 9)),
        ("mistral", (0, 1, 1), (1000, 990)),  # longer than a chunk: caches grow, and windows move
        ("gemma3_text", (0, 1, 0), (1000, 990)),
    ],
)
def test_models_on_two_devices(kind: str, places: tuple[int, int, int], lengths: tuple[int, int]) -> None:
    options: dict[str, Any] = {"branching": (3, 2), "max_new_tokens": 20, "seed": 5}
    texts = pad([prompt(lengths[0]), prompt(lengths[1], 1)])
    sizes: dict[str, Any] = {"num_hidden_layers": 4, "max_position_embeddings": 1100}
    if kind == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    wanted = mcsd.generate(tiny(kind, **sizes), perturbed(tiny(kind, **sizes)), *texts, **options)
    first, second, beside = (f"{elsewhere.NAME}:{place}" for place in places)
    target, draft = spread(tiny(kind, **sizes), first, second), moved(perturbed(tiny(kind, **sizes)), beside)
    assert is_spread(target) and input_device(target) == torch.device(first)
    with opaque_kernels():
        found = mcsd.generate(target, draft, *there(texts), **options)
    assert torch.equal(found.sequences.cpu(), wanted.sequences)
    assert found.stats.accepted_by_depth == wanted.stats.accepted_by_depth


def medusa(target: PreTrainedModel, device: str | None) -> Any:
    """Heads that copy the target's."""
    return HeadsDrafter(MedusaHeads.of(target, 2), (3, 2))


def top_k(target: PreTrainedModel, device: str | None) -> Any:
    """A tree of the most probable tokens."""
    return TopKDrafter(draft_on(perturbed(tiny()), device), depth=2, beam=2, budget=4)


def a_part_of_the_vocabulary(target: PreTrainedModel, device: str | None) -> Any:
    """A draft that knows 60 tokens."""
    draft = SubVocabularyDraft(copy.deepcopy(tiny().config), 60).eval()
    torch.nn.init.normal_(draft.lm_head.weight, generator=torch.Generator().manual_seed(1))
    draft.lm_head.sub_vocab.copy_(torch.arange(60) + 5)
    return draft_on(draft, device)


def draft_on(draft: PreTrainedModel, device: str | None) -> PreTrainedModel:
    """The draft there."""
    return draft if device is None else moved(draft, device)


@pytest.mark.parametrize("make", [medusa, top_k, a_part_of_the_vocabulary])
def test_drafters_of_a_target_on_two_devices(make: Callable[[PreTrainedModel, str | None], Any]) -> None:
    plain, target = tiny(num_hidden_layers=4), spread(tiny(num_hidden_layers=4), FIRST, SECOND)
    torch.manual_seed(0)
    wanted = mcsd.generate(plain, make(plain, None), IDS, MASK, max_new_tokens=30)
    torch.manual_seed(0)
    with opaque_kernels():
        found = mcsd.generate(target, make(target, SECOND), *there((IDS, MASK)), max_new_tokens=30)
    assert torch.equal(found.sequences.cpu(), wanted.sequences)
    assert found.stats.accepted_by_depth == wanted.stats.accepted_by_depth


def test_each_device_has_memory_for_its_own_layers() -> None:
    scorer = Scorer(spread(tiny(num_hidden_layers=6), FIRST, SECOND), 2000)
    with opaque_kernels(), torch.inference_mode(), scorer.attending():
        scorer.prefill(torch.tensor([prompt(1200)], device=FIRST), [1200])
    stores = list(scorer.cache._stores.values())
    assert [str(store.keys.device) for store in stores] == [FIRST, SECOND]
    assert [store.keys.shape[1] for store in stores] == [3, 3]


@pytest.mark.parametrize(
    ("places", "reason"),
    [((0, 1, 0), "LlamaForCausalLM lies on several devices"), ((0, 0, 1), "lies beside the target's device")],
)
def test_what_is_on_several_devices_is_not_captured(
    places: tuple[int, int, int], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, beside = (f"{elsewhere.NAME}:{place}" for place in places)
    target, draft = spread(tiny(), first, second), moved(perturbed(tiny()), beside)
    with opaque_kernels(), caplog.at_level(logging.INFO):
        for level in ("WARNING", "INFO"):  # said aloud once
            mcsd.generate(target, draft, *there((IDS, MASK)), max_new_tokens=6, graphs=True)
            (said,) = [line for line in caplog.records if reason in line.getMessage()]
            assert said.levelname == level and said.getMessage().startswith("forwards run eagerly")
            caplog.clear()


def test_an_early_exit_needs_the_models_own_forward(tmp_path: Path) -> None:
    target = offloaded(tmp_path, {"model.layers.1": "disk"})
    with pytest.raises(UnsupportedModelError, match=r"early exit.*forward"):
        EarlyExitDrafter(target, 1)


def offloaded(folder: Path, places: dict[str, str]) -> PreTrainedModel:
    """A small Llama of which some parts are on the disk until they are needed."""
    pytest.importorskip("accelerate", reason="transformers offloads by it")
    tiny(num_hidden_layers=3, tie_word_embeddings=False).save_pretrained(folder)
    parts = (
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(3)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, device_map={part: "cpu" for part in parts} | places, offload_folder=folder / "offloaded"
    ).eval()
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, token, None)
    return model


@pytest.mark.parametrize(
    "places",
    [{"model.layers.1": "disk"}, {"model.embed_tokens": "disk", "lm_head": "disk"}],
    ids=["layers", "embedding"],
)
@pytest.mark.parametrize("attention", ["tree", "dense"])
def test_an_offloaded_model(tmp_path: Path, places: dict[str, str], attention: str) -> None:
    plain = tiny(num_hidden_layers=3, tie_word_embeddings=False)
    model = offloaded(tmp_path, places)
    assert input_device(model).type == "cpu" and is_spread(model)
    options: dict[str, Any] = {"max_new_tokens": 20, "attention": attention}
    wanted = mcsd.generate(plain, perturbed(plain), IDS, MASK, **options).sequences
    assert torch.equal(mcsd.generate(model, perturbed(plain), IDS, MASK, **options).sequences, wanted)
    wanted = mcsd.generate(plain, plain, IDS, MASK, **options).sequences
    assert torch.equal(mcsd.generate(plain, model, IDS, MASK, **options).sequences, wanted)
    assert mcsd.check(model, attention=attention)


def test_an_offloaded_embedding_cannot_be_shared(tmp_path: Path) -> None:
    target = offloaded(tmp_path, {"model.embed_tokens": "disk", "lm_head": "disk"})
    with pytest.raises(ValueError, match=r"target: expected a Embedding .* got torch.float32 on meta"):
        load_draft("smollm2-draft", target)
    with pytest.raises(ValueError, match=r"target: expected a Linear .* got torch.float32 on meta"):
        MedusaHeads.of(target, 1)


class Packed(nn.Linear):
    """A head whose weight is bytes in a column, as quantised ones keep it."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False)
        self.full = head.weight.detach()
        self.weight = nn.Parameter(torch.zeros(self.full.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """As if it were unpacked."""
        return nn.functional.linear(hidden, self.full)


def test_a_packed_head() -> None:
    plain = tiny(tie_word_embeddings=False)
    model = copy.deepcopy(plain)
    model.set_output_embeddings(Packed(model.get_output_embeddings()))
    assert output_shape(model) == output_shape(plain) and input_vocab(model) == input_vocab(plain)
    for target, draft in ((model, perturbed(plain)), (plain, model)):
        wanted = mcsd.generate(plain, plain if draft is model else draft, IDS, MASK, max_new_tokens=20)
        found = mcsd.generate(target, draft, IDS, MASK, max_new_tokens=20)
        assert torch.equal(found.sequences, wanted.sequences)
    heads = HeadsDrafter(MedusaHeads.of(plain, 2), (3, 2))
    wanted = mcsd.generate(plain, heads, IDS, MASK, max_new_tokens=20)
    assert torch.equal(mcsd.generate(model, heads, IDS, MASK, max_new_tokens=20).sequences, wanted.sequences)
    with pytest.raises(ValueError, match=r"target: expected a Packed with floating-point weights .* got torch.uint8"):
        MedusaHeads.of(model, 2)


def adapted(model: PreTrainedModel, **options: Any) -> Any:
    """PEFT's model around this one, with random adapters in its layers."""
    peft = pytest.importorskip("peft")
    given = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return peft.get_peft_model(model, peft.LoraConfig(**{**given, **options})).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task_type": "CAUSAL_LM"},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj", "lm_head"]},
    ],
    ids=["lora", "causal-lm", "embedding", "head"],
)
def test_adapters_inside_the_layers(options: dict[str, Any]) -> None:
    plain = tiny(tie_word_embeddings=False)
    model = adapted(copy.deepcopy(plain), **options)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    small = perturbed(plain)

    def generate(target: Any, draft: Any = small, temperature: float = 0.0) -> mcsd.Generation:
        return mcsd.generate(target, draft, IDS, MASK, temperature=temperature, max_new_tokens=20)

    found, before = generate(model).sequences, generate(plain).sequences
    assert torch.equal(found, generate(merged).sequences) and not torch.equal(found, before)
    with model.disable_adapter():
        assert torch.equal(generate(model).sequences, before)
    assert mcsd.check(model)
    as_draft = [generate(plain, draft, 1.0).stats.accepted_by_depth for draft in (model, merged)]
    assert as_draft[0] == as_draft[1]


def test_a_compiled_model_with_adapters() -> None:
    torch.compiler.reset()
    model = adapted(tiny())
    wanted = mcsd.generate(model, "ngram", IDS, MASK, max_new_tokens=4).sequences
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    found = mcsd.generate(torch.compile(model, backend=backend), "ngram", IDS, MASK, max_new_tokens=4).sequences
    torch.compiler.reset()
    assert calls and torch.equal(found, wanted)


class Louder(nn.Module):
    """A wrapper that does more than the model inside it, as X-LoRA's does."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> PreTrainedModel:
        """As PEFT's."""
        return self.model

    def forward(self, **options: Any) -> Any:
        """Twice the logits."""
        output = self.model(**options)
        output.logits = 2 * output.logits
        return output


def test_adapters_that_are_not_the_whole_model() -> None:
    peft = pytest.importorskip("peft")
    learned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for model in (
        peft.get_peft_model(tiny(), learned).eval(),
        adapted(tiny(), task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
    ):
        with pytest.raises(UnsupportedModelError, match="target: PeftModelForCausalLM has an adapter outside"):
            mcsd.generate(model, "ngram", IDS, MASK)
        assert "outside the layers" in mcsd.check(model).reason
    # what the wrapper does beside the model inside it is found out by trying
    with pytest.raises(UnsupportedModelError, match="target: Louder says something else than the Llama"):
        mcsd.generate(Louder(tiny()), "ngram", IDS, MASK)
    noisy = adapted(tiny(), lora_dropout=0.5).train()
    with pytest.raises(UnsupportedModelError, match=r"PeftModel says something else than the Llama.* eval\(\)"):
        mcsd.generate(noisy, "ngram", IDS, MASK)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_what_is_captured_elsewhere_takes_nothing_from_the_host(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed = []

    def capture(function: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[Callable[[], None], Any]:
        before = COUNTS.copy()
        with graphs.Rehearsal(device):
            outputs = function()
        crossed.append(COUNTS - before)

        def replay() -> None:
            for old, new in zip(tensors_of(outputs), tensors_of(function()), strict=True):
                old.copy_(new)

        return replay, outputs

    target = tiny(kind)
    draft = perturbed(target)
    wanted = mcsd.generate(target, draft, IDS, MASK, max_new_tokens=30).sequences
    moved(target, FIRST), moved(draft, FIRST)
    monkeypatch.setattr(graphs, "capture", capture)
    lines: list[str] = []
    monkeypatch.setattr(graphs.LOG, "info", lines.append)
    with opaque_kernels():
        found = mcsd.generate(target, draft, *there((IDS, MASK)), max_new_tokens=30, graphs=True)
    assert torch.equal(found.sequences.cpu(), wanted)
    assert any("captured a step" in line for line in lines) and "step" in found.stats.seconds
    assert crossed and not any(crossed)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Those inside tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, tuple) else vars(value).values() if isinstance(value, Proposal) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_a_tree_is_tuned_elsewhere() -> None:
    target, draft = moved(tiny(), FIRST), moved(perturbed(tiny()), FIRST)
    with opaque_kernels():
        profile = tune(target, draft, there((IDS[:1], IDS[1:])), nodes=4, depth=2, width=2, tokens=8, hand_made=[(2,)])
    assert profile.parents[0] == -1


def test_peft_around_a_compiled_model() -> None:
    peft = pytest.importorskip("peft")
    inner = torch.compile(tiny(), backend="eager")
    learned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedModelError, match="target: PeftModelForCausalLM has an adapter outside"):
        mcsd.generate(peft.get_peft_model(inner, learned).eval(), "ngram", IDS, MASK)


def test_trees_do_not_take_what_peft_puts_before_a_text() -> None:
    peft = pytest.importorskip("peft")
    learned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny(), learned).eval()
    with pytest.raises(ValueError, match="PeftModelForCausalLM changes what the model reads"):
        model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, custom_generate=TreeDecoding())
    looks = adapted(tiny(), task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.raises(UnsupportedModelError, match="tokens in the text"):
        looks.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, custom_generate=TreeDecoding())
    plain = adapted(tiny(), task_type="CAUSAL_LM")
    wanted = plain.generate(input_ids=IDS[:1], attention_mask=MASK[:1], max_new_tokens=8, do_sample=False)
    trees = TreeDecoding(draft=perturbed(tiny()))
    options: Any = {"max_new_tokens": 8, "do_sample": False, "custom_generate": trees}
    assert torch.equal(plain.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **options), wanted)


def test_early_exit_shares_the_cache_of_a_model_with_adapters() -> None:
    model = adapted(tiny(num_hidden_layers=3))
    drafter = EarlyExitDrafter(model, 1, (2, 2))
    mcsd.generate(model, drafter, IDS, MASK, max_new_tokens=6)
    assert drafter._shared


def test_layers_that_have_not_run_keep_their_memory() -> None:
    """A prompt of one token: the first to write are the layers that draft, and so much that room has to be made."""
    target, ids = tiny(num_hidden_layers=3), torch.tensor([prompt(1)])
    found = mcsd.generate(target, EarlyExitDrafter(target, 1, (16, 16, 2)), ids, max_new_tokens=8, temperature=0.0)
    assert torch.equal(found.sequences, greedy(target, ids, torch.ones_like(ids), 8))


def test_an_offloaded_target_is_tuned(tmp_path: Path) -> None:
    target = offloaded(tmp_path, {"model.embed_tokens": "disk"})
    profile = tune(target, perturbed(tiny()), [IDS[:1]], nodes=4, depth=2, width=2, tokens=8, hand_made=[(2,)])
    assert profile.parents[0] == -1
