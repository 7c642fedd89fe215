"""How a drafter that is a model of its own keeps up with the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..cache import REREAD
from ..scoring import Scorer
from ..trees import chain_bits, columns
from .base import State


def scorer_of(model: PreTrainedModel, attention: str, state: State, nodes: int) -> Scorer:
    """A scorer for one generation, with captured forwards where the target's are captured.

    Args:
        model: the draft.
        attention: "auto", "tree" or "dense".
        state: the batch.
        nodes: slots for a tree.
    """
    graphs = None if state.scorer is None else state.scorer.graphs
    batch = None if graphs is None else len(state.sequences)
    report = None if graphs is None else graphs.report
    return Scorer(model, state.capacity + nodes, attention, batch=batch, report=report, leader=state.scorer)


def read_all(scorer: Scorer, state: State, cached: Sequence[int]) -> torch.Tensor:
    """Read what was committed and is not cached, the root last; what a tree left in the cache is overwritten.

    Args:
        scorer: of the draft.
        state: the batch.
        cached: how many of each request's tokens the cache holds, fewer than there are if the request is active.

    Returns:
        `[batch, 1, columns]` logits after each request's root.
    """
    lengths = [len(sequence) for sequence in state.sequences]
    cached = list(cached)
    while True:
        left = [length - read for length, read in zip(lengths, cached, strict=True)]
        width = max(left)
        # A request with less that is new reads some of its text again, to no effect, and so stays within its room. What
        # lies further back may have left the cache.
        if width - min(left) > REREAD:
            width = REREAD
        ends = [min(read + width, length) for length, read in zip(lengths, cached, strict=True)]
        start = [max(end - width, 0) for end in ends]
        rows = [s[first:end] for s, first, end in zip(state.sequences, start, ends, strict=True)]
        tokens = columns(rows, state.device)
        logits = scorer.score(tokens, chain_bits(tokens.shape[1], state.device), None, start)
        cached = ends
        if ends == lengths:
            break
    last = torch.tensor([n - first - 1 for n, first in zip(lengths, start, strict=True)], device=state.device)
    return logits[torch.arange(len(lengths), device=state.device), last][:, None]
