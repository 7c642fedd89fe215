"""Plain decoding by transformers itself: what speculation is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import GenerationConfig, PreTrainedModel


def plain_decoding(
    target: PreTrainedModel, ids: torch.Tensor, count: int, sampling: Mapping[str, float], seed: int
) -> torch.Tensor:
    """Decode exactly `count` tokens, one a forward; torch's own random numbers go on as if nothing had been drawn.

    Args:
        target: the model. Its generation configuration is out of the way meanwhile: its end-of-sequence token and
            penalties would fill what is left open here.
        ids: `[1, length]` int64.
        count: tokens.
        sampling: temperature, top_k, top_p and min_p.
        seed: of the draws, if there are any.

    Returns:
        `[1, length + count]` int64.
    """
    sampled = sampling["temperature"] > 0
    filters = {**sampling, "min_p": sampling["min_p"] or None} if sampled else {}
    own = target.generation_config
    pad = 0 if own.pad_token_id is None else own.pad_token_id
    config = GenerationConfig(do_sample=sampled, max_new_tokens=count, pad_token_id=pad, **filters)
    target.generation_config = config
    try:
        with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            if sampled:
                torch.manual_seed(seed % 2**64)
            sequences: torch.Tensor = target.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
    finally:
        target.generation_config = own
    return sequences
