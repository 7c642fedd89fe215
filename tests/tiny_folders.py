"""Tiny models with a tokenizer, saved as a user would have them on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def save_tokenizer(folder: Path, *, swapped: bool = False, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; `swapped`: two tokens have each other's ids."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    if swapped:
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    inner = Tokenizer(BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", chat_template=template)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(
    folder: Path, seed: int, *, layers: int = 2, eos: int | None = None, vocab: int = 257, positions: int = 256
) -> Path:
    """A random Llama, with logits far from uniform, beside the tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=None, eos_token_id=eos,
        pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5)
        # text of printable characters, which a person reading a failure can make out
        model.lm_head.weight[:65].mul_(0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
