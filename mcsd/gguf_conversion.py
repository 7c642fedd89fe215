"""Conversion of a Llama model from a GGUF file to a folder that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast

# GGUF's names of the tensors of a layer -> those of transformers' Llama
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_CONTROL_TOKEN = 3


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a Llama GGUF file as config, float32 weights and tokenizer that transformers' `from_pretrained` reads.

    The file is parsed once, and neither accelerate nor a second copy of the model is needed.

    Args:
        path: a GGUF file of architecture "llama" with a byte-level BPE vocabulary and tied embeddings.
        folder: an existing folder that receives the files.
    """
    reader = GGUFReader(path)
    config = _llama_config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name.startswith("blk."):
            _, layer, kind, _ = tensor.name.split(".")
            if kind in heads:
                weight = _unpermute(weight, heads[kind])
            weights[f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"] = np.ascontiguousarray(weight)
        else:
            name = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm"}[tensor.name]
            weights[f"model.{name}.weight"] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k `[heads * head_dim, hidden]`: interleaved pairs -> halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _field(reader: Any, name: str) -> Any:
    """One metadata value of a GGUF file."""
    return reader.fields[name].contents()


def _llama_config(reader: Any) -> LlamaConfig:
    """The configuration that a GGUF file of architecture "llama" describes."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=_field(reader, "llama.rope.dimension_count"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def _tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file with pre-tokenizer "smollm": single digits, then byte-level BPE."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == GGUF_CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")] for role, name in names.items()},
    )
