"""Tiny random models of many architectures, and small helpers to run them in the tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel
from transformers.utils import logging

VOCAB = 97
POSITIONS = 256
WINDOW = 6

_SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    **_SPECIAL,
}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "tie_word_embeddings": False,
    **_SPECIAL,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOWED = {**_COMMON, "head_dim": 8, "sliding_window": WINDOW}

# model type -> configuration; windows are shorter than any text here, so that they matter
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},
    "mistral": _WINDOWED,
    "gemma2": {**_WINDOWED, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_WINDOWED, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": _GPT,
    "phi3": _COMMON,
    "olmo2": _COMMON,
    "mixtral": {**_COMMON, **_EXPERTS},
    "qwen3_moe": {**_COMMON, **_EXPERTS, "head_dim": 8},
    "afmoe": {**_WINDOWED, **_EXPERTS, "num_dense_layers": 1, "global_attn_every_n_layers": 2, "num_shared_experts": 1},
    "gpt_oss": {**_WINDOWED, **_EXPERTS},
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "gpt_neox": _COMMON,
    "stablelm": _COMMON,
    "nemotron": _COMMON,
    "granite": _COMMON,
    "cohere": _COMMON,
    "starcoder2": _COMMON,
    "phi": _COMMON,
    "smollm3": _COMMON,
    "exaone4": _COMMON,
    "glm4": {**_COMMON, "head_dim": 8},
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "falcon": _COMMON,
    "falcon_alibi": {**_COMMON, "alibi": True},
    "bloom": {**_GPT, "hidden_size": 32},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, **_SPECIAL},
    "xglm": {
        **_COMMON,
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 4,
        "scale_embedding": False,
        "pad_token_id": 1,
    },
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        **_SPECIAL,
    },
    "doge": _COMMON,
    "llama4_text": {
        **_COMMON,
        **_EXPERTS,
        "head_dim": 8,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 48,
        "num_hidden_layers": 4,
    },
    "mamba": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **_SPECIAL},
    "lfm2": {**_COMMON, "layer_types": ["conv", "full_attention"]},
}


def tiny(name: str = "llama", seed: int = 0, gain: float = 2.0, **overrides: Any) -> PreTrainedModel:
    """A random model whose next token depends on all of its context.

    Fresh models are initialised so flat that they repeat one token; here every matrix has entries of standard
    deviation gain / sqrt(columns), so that logits spread over several units.

    Args:
        name: a key of `CONFIGS`.
        seed: of the weights.
        gain: scale of the weights.
        overrides: of the configuration.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.for_model(name.removesuffix("_alibi"), **{**CONFIGS[name], **overrides})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if "attn_logit_softcapping" in CONFIGS[name]:  # transformers 5.17 leaves it out with SDPA
            model.set_attn_implementation("eager")
    finally:
        logging.set_verbosity(level)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, token, None)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() > 1:
                embeds = "embed" in path or "wte" in path or "wpe" in path
                parameter.copy_(noise if embeds else gain * noise * parameter.shape[-1] ** -0.5)
            elif "sinks" in path:
                parameter.copy_(noise)
            elif "bias" in path:
                parameter.copy_(0.1 * noise)
    return model


def perturbed(model: PreTrainedModel, amount: float = 0.1, seed: int = 1) -> PreTrainedModel:
    """A copy with noise on every matrix, in units of its standard deviation: a drafter that is right now and then."""
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.add_(amount * parameter.std() * torch.randn(parameter.shape, generator=random))
    return other


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Random token ids, none of them 0 or 1, which the tests pad with."""
    return torch.randint(2, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pad(prompts: Sequence[Sequence[int]], side: str = "left", token: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, `[batch, longest]`."""
    longest = max(map(len, prompts))
    ids, masks = [], []
    for row in prompts:
        blank = longest - len(row)
        left, right = (blank, 0) if side == "left" else (0, blank)
        ids.append([token] * left + list(row) + [token] * right)
        masks.append([0] * left + [1] * len(row) + [0] * right)
    return torch.tensor(ids), torch.tensor(masks)


def greedy(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    new: int,
    processors: Sequence[Any] = (),
    **options: Any,
) -> torch.Tensor:
    """What transformers' own greedy `generate` says, `[batch, length]`."""
    text: torch.Tensor = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        logits_processor=LogitsProcessorList(processors),
        pad_token_id=0,
        **options,
    )
    return text


def plain_logits(model: PreTrainedModel, text: Sequence[int]) -> torch.Tensor:
    """`[vocab]` f32: the logits after a text, without a cache."""
    ids = torch.tensor([list(text)])
    with torch.inference_mode():
        logits: torch.Tensor = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].float()
    return logits
