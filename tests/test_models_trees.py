"""`mcsd.check` and the architectures: a model is scored right, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PegasusConfig,
    PreTrainedModel,
    T5Config,
)

import mcsd
from mcsd.attention import TreeStep, tree_attention_in
from mcsd.cache import Prefix, TreeCache
from mcsd.scoring import Scorer, UnsupportedModelError
from mcsd.trees import StaticTree, chain_bits, check_branching, columns, parents_of
from mcsd_kernels import ancestor_bits
from tests.cases import TREES
from tests.tiny import CONFIGS, VOCAB, greedy, pad, perturbed, plain_logits, prompt, tiny

REFUSED = {
    "bloom": "positions",
    "mpt": "positions",
    "falcon_alibi": "positions",
    "mamba": "recurrent",
    "lfm2": "recurrent",
    "gpt_neo": "",
    "doge": "",
    "llama4_text": "",
}
SCORED = [name for name in CONFIGS if name not in REFUSED]
DENSE = {"gptj", "codegen", "falcon", "xglm"}


@pytest.mark.parametrize("name", SCORED)
def test_architectures_that_score_trees(name: str) -> None:
    model = tiny(name)
    verdict = mcsd.check(model)
    assert verdict and verdict.ok and verdict.reason == ""
    assert verdict.attention == ("dense" if name in DENSE else "tree")
    assert 0 <= verdict.error < 1e-4 and verdict.error <= verdict.tolerance < 0.01
    ids, mask = pad([prompt(19, 1), prompt(7, 2)])
    found = mcsd.generate(model, perturbed(model), ids, mask, max_new_tokens=20, temperature=0.0)
    assert torch.equal(found.sequences, greedy(model, ids, mask, 20))


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_are_refused(name: str) -> None:
    model = tiny(name)
    verdict = mcsd.check(model)
    assert not verdict and not verdict.ok
    assert type(model).__name__ in verdict.reason and REFUSED[name] in verdict.reason
    ids, mask = pad([prompt(19, 1)])
    with pytest.raises(mcsd.UnsupportedModelError, match=type(model).__name__):
        mcsd.generate(model, "ngram", ids, mask, max_new_tokens=20, temperature=0.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("gpt_neo", {"window_size": 64}, id="local-attention"),
        pytest.param("llama4_text", {"attention_chunk_size": 64}, id="chunks"),
        pytest.param("mistral", {"sliding_window": 64}, id="sliding-window"),
    ],
)
def test_what_only_long_texts_show(name: str, options: dict[str, Any]) -> None:
    model = tiny(name, **options)
    ids, mask = pad([prompt(80, 1)])
    if mcsd.check(model):
        found = mcsd.generate(model, perturbed(model), ids, mask, max_new_tokens=20, temperature=0.0)
        assert torch.equal(found.sequences, greedy(model, ids, mask, 20))
    else:
        with pytest.raises(mcsd.UnsupportedModelError):
            mcsd.generate(model, "ngram", ids, mask, max_new_tokens=20)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *[(name, "tree") for name in ("llama", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "gpt_oss")],
        *[(name, "dense") for name in ("llama", "gpt2", "opt", "gptj")],
    ],
)
@pytest.mark.parametrize("tree", TREES)
def test_every_node_has_the_logits_of_its_path(tree: str, name: str, attention: str) -> None:
    model = tiny(name)
    parents = torch.tensor([TREES[tree][0]] * 3)
    nodes = parents.shape[1]
    texts = [prompt(13, 1), prompt(1, 2), prompt(8, 3)]
    tokens = torch.tensor([prompt(nodes, 4), prompt(nodes, 5), prompt(nodes, 6)])
    bits = ancestor_bits(parents)
    paths = [[j for j in range(nodes) if int(bits[0, i, 0]) >> j & 1] for i in range(nodes)]
    depth = torch.tensor([len(path) - 1 for path in paths])
    prefix = [len(text) for text in texts]
    scorer = Scorer(model, max(prefix) + nodes, attention)
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(columns(texts, scorer.device), prefix)
        found = scorer.score(tokens, bits, depth, prefix)
    for request, text in enumerate(texts):
        for node, path in enumerate(paths):
            if node and parents[request, node] < 0:
                continue  # padding
            plain = plain_logits(model, [*text, *tokens[request, path].tolist()])
            assert (found[request, node] - plain).abs().max() < 1e-4, (request, node)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gptj"])
def test_short_formats_pass_the_check(name: str, dtype: torch.dtype) -> None:
    verdict = mcsd.check(tiny(name).to(dtype))
    assert verdict, verdict.reason


class Forgets(TreeStep):
    """A tree in which every node sees every other."""

    def mask(self, total: int) -> torch.Tensor:
        return torch.ones_like(super().mask(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["mask", "positions", "cache"])
def test_the_check_sees_a_fault(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().to(dtype)
    assert mcsd.check(model)
    if fault == "mask":
        monkeypatch.setattr("mcsd.scoring.TreeStep", Forgets)
    if fault == "positions":
        forward = Scorer.score

        def score(self: Scorer, tokens: Any, ancestors: Any, depth: Any, prefix: Any, **options: Any) -> torch.Tensor:
            return forward(self, tokens, ancestors, torch.arange(tokens.shape[1]), prefix, **options)

        monkeypatch.setattr(Scorer, "score", score)
    if fault == "cache":
        place = TreeCache.place
        monkeypatch.setattr(
            TreeCache,
            "place",
            lambda self, prefix, offset, count: place(self, prefix.back(1), offset, count),
        )
    verdict = mcsd.check(model)
    assert not verdict and verdict.error > verdict.tolerance and "differ" in verdict.reason


def test_the_check_sees_broken_weights() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    assert not mcsd.check(model)


def test_the_check_says_that_a_model_is_in_training_mode() -> None:
    """Dropout is what differs then, not the model."""
    model = tiny("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3).train()
    verdict = mcsd.check(model)
    assert not verdict and "call eval() first" in verdict.reason
    assert mcsd.check(model.eval()) and mcsd.check(tiny().train()), "without dropout it is none of our business"


def test_the_check_is_repeatable_and_leaves_the_model_alone() -> None:
    model = tiny()
    state = torch.random.get_rng_state()
    first = mcsd.check(model, seed=3, prefix=20, nodes=33)
    assert first and first == mcsd.check(model, seed=3, prefix=20, nodes=33)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.config._attn_implementation == "sdpa" and not model.training
    verdicts = [mcsd.check(model, prefix=1, nodes=1), mcsd.check(model, prefix=1), mcsd.check(model, nodes=70)]
    assert all(verdicts)


def test_the_check_takes_either_way() -> None:
    assert mcsd.check(tiny(), attention="tree").attention == "tree"
    assert mcsd.check(tiny(), attention="dense").attention == "dense"
    assert not mcsd.check(tiny("gptj"), attention="tree")
    assert not mcsd.check(tiny("mistral"), attention="dense")
    with pytest.raises(ValueError, match="attention"):
        mcsd.check(tiny(), attention="flash")


def test_the_check_refuses_what_is_no_decoder() -> None:
    small = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=VOCAB, **small))
    assert "encoder-decoder" in mcsd.check(encoder_decoder).reason
    assert "head" in mcsd.check(tiny().model).reason


def test_the_attention_of_a_model_comes_back() -> None:
    model = tiny()
    for own in ("sdpa", "eager"):
        model.set_attn_implementation(own)
        with pytest.raises(KeyError), tree_attention_in(model), tree_attention_in(model):
            assert model.config._attn_implementation == "mcsd_tree"
            raise KeyError
        assert model.config._attn_implementation == own


def test_the_attention_of_every_part_of_a_model_comes_back() -> None:
    text = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    own = {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=96)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=own)

    def names() -> dict[str, str]:
        parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
        found = {name: part.config._attn_implementation for name, part in parts.items()}
        return found | {f"config.{part}": getattr(model.config, part)._attn_implementation for part in own if part}

    before = names()
    assert set(before.values()) == {"sdpa", "eager"}
    with tree_attention_in(model):
        assert "mcsd_tree" in names().values()
    assert names() == before


def test_tree_attention_wants_a_tree() -> None:
    model = tiny()
    ids = torch.tensor([prompt(5)])
    with torch.inference_mode(), tree_attention_in(model), pytest.raises(RuntimeError, match="tree"):
        model(ids)


def test_the_packed_mask_alone_is_enough() -> None:
    model: PreTrainedModel = tiny()
    shape = StaticTree.of(parents_of((2, 2)))
    nodes, text = torch.tensor([prompt(shape.nodes, 1)]), prompt(9, 2)
    scorer = Scorer(model, 30)
    with torch.inference_mode(), scorer.attending():
        scorer.prefill(torch.tensor([text]), [9])
        wanted = scorer.score(nodes, shape.node_ancestors, shape.node_depth, [9])
        step = TreeStep(shape.node_ancestors, torch.tensor([9], dtype=torch.int32))
        scorer.cache.place(Prefix.of([9], scorer.device), 0, shape.nodes)
        found = model(
            nodes,
            position_ids=9 + shape.node_depth[None],
            past_key_values=scorer.cache,
            attention_mask=step.packed(),
        ).logits
    assert torch.allclose(found, wanted, atol=1e-6)


# Shapes of trees


@pytest.mark.parametrize("branching", [(1,), (3,), (4, 2, 2), (1, 1, 1, 1), (2, 1, 3), (31,), (32,), (5, 4, 3)])
def test_shapes(branching: tuple[int, ...]) -> None:
    shape = StaticTree.of(parents_of(branching))
    parents = shape.parents.tolist()
    widths = [1]
    for k in branching:
        widths.append(widths[-1] * k)
    assert shape.nodes == len(parents) == sum(widths) == check_branching_nodes(branching)
    assert shape.inner.tolist() == list(range(sum(widths[:-1])))
    assert list(shape.levels) == [sum(widths[:d]) for d in range(len(widths))]
    assert shape.depth == len(branching)
    assert parents[0] == -1 and all(0 <= p < i for i, p in enumerate(parents) if i)
    for node, parent in enumerate(parents[1:], 1):
        depth = int(shape.node_depth[node])
        assert depth == shape.node_depth[parent] + 1 and sum(widths[:depth]) <= node < sum(widths[: depth + 1])
        assert parents.count(node) in (0, branching[depth] if node < len(shape.inner) else 0)
    assert torch.equal(shape.node_ancestors, ancestor_bits(shape.parents))


def check_branching_nodes(branching: tuple[int, ...]) -> int:
    nodes = width = 1
    for k in check_branching(branching):
        width *= k
        nodes += width
    return nodes


def test_the_largest_tree() -> None:
    assert check_branching((1023,)) == (1023,)
    assert check_branching([1] * 1023) == (1,) * 1023
    for branching in ((1024,), (1,) * 1024, (32, 31)):
        with pytest.raises(ValueError, match="1024"):
            check_branching(branching)


def test_a_chain_sees_what_came_before() -> None:
    bits = chain_bits(40)
    seen = [[bool(int(bits[0, i, j // 32]) >> (j % 32) & 1) for j in range(40)] for i in range(40)]
    assert seen == [[j <= i for j in range(40)] for i in range(40)]


def longrope(original: int, name: str = "phi3") -> PreTrainedModel:
    """A model that reads a text longer than `original` with other frequencies."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0]}
    rope["original_max_position_embeddings"] = original
    return tiny(name, original_max_position_embeddings=original, max_position_embeddings=256, rope_parameters=rope)


@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_a_text_may_not_outgrow_its_rotary_frequencies(name: str) -> None:
    model, ids = longrope(64, name), torch.tensor([prompt(40)])
    found = mcsd.generate(model, perturbed(model), ids, max_new_tokens=24, temperature=0.0, branching=(2, 2, 2))
    assert torch.equal(found.sequences, greedy(model, ids, torch.ones_like(ids), 24))
    with pytest.raises(ValueError, match="40 tokens and 25 new ones to fit the model's 64 positions"):
        mcsd.generate(model, "ngram", ids, max_new_tokens=25)
    # a draft only guesses
    plain = tiny(name)
    found = mcsd.generate(plain, model, ids, max_new_tokens=40, temperature=0.0)
    assert torch.equal(found.sequences, greedy(plain, ids, torch.ones_like(ids), 40))


@pytest.mark.parametrize("config", [PegasusConfig, BertConfig], ids=["own-positions", "no-decoder"])
def test_a_model_that_reads_trees_otherwise_is_found_out(config: Any) -> None:
    sizes = {"d_model": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 64}
    sizes |= {"hidden_size": 32, "num_attention_heads": 4} if config is BertConfig else {"decoder_attention_heads": 4}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "decoder_ffn_dim": 48, "intermediate_size": 48}
    model = AutoModelForCausalLM.from_config(config(**sizes, **layers, dropout=0.0)).eval()
    random = torch.Generator().manual_seed(0)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:  # as in `tiny`
            scale = 1.0 if "embed" in path else 2 * parameter.shape[-1] ** -0.5
            torch.nn.init.normal_(parameter, 0.0, scale, generator=random)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id", "forced_eos_token_id"):
        setattr(model.generation_config, token, None)
    with pytest.raises(UnsupportedModelError, match="scores a tree differently from plain text"):
        mcsd.generate(model, "ngram", torch.tensor([prompt(9)]))
    assert not mcsd.check(model)
    plain, ids = tiny(), torch.tensor([prompt(9)])
    found = mcsd.generate(plain, model, ids, max_new_tokens=12, temperature=0.0)  # its guesses may be as they are
    assert torch.equal(found.sequences, greedy(plain, ids, torch.ones_like(ids), 12))
