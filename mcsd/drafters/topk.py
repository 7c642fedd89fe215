"""The most probable tree under a draft model: its shape is another one for every request and step."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from mcsd_kernels import _checks as check
from mcsd_kernels import ancestor_bits

from ..checking import compiled, unwrapped
from ..trees import LARGEST_TREE, columns
from .base import Drafter, Proposal, State
from .reading import read_all, scorer_of
from .stopping import Stopping, check_hook, going_on


class TopKDrafter(Drafter):
    """Proposes the paths that a draft model finds most probable, as deterministic children ("point").

    Level by level the `beam` nodes of the largest path probability are read, and each offers its `beam` most probable
    children; of all nodes on offer the `budget` most probable ones become the tree. A child is never more probable than
    its parent, so what is kept is a tree. The draft's probabilities are those at temperature 1 without filters.

    Args:
        model: a causal language model with the target's vocabulary.
        depth: levels, each a forward of the model.
        beam: nodes of a level that are read, and children that each of them offers.
        budget: candidates in the tree, the root not counted; fixed, so that shapes do not change from step to step.
        attention: "auto", "tree" or "dense", as in `mcsd.generate`.
        stopping: which nodes get children, see `Stopping`.

    Raises:
        ValueError: a number is out of range.

    Source: Li et al., arXiv 2406.16858 (EAGLE-2: expansion and reranking).
    """

    proposal = "point"

    def __init__(
        self,
        model: PreTrainedModel,
        depth: int = 5,
        beam: int = 8,
        budget: int = 32,
        attention: str = "auto",
        stopping: Stopping | None = None,
    ) -> None:
        depth, beam, budget = (
            check.whole("depth", depth, 1),
            check.whole("beam", beam, 1),
            check.whole("budget", budget, 1),
        )
        on_offer = beam + (depth - 1) * beam * beam
        if not budget <= min(on_offer, LARGEST_TREE - 1):
            raise ValueError(
                f"budget: expected at most {min(on_offer, LARGEST_TREE - 1)} candidates "
                f"(depth {depth} and beam {beam} offer {on_offer}), got {budget}"
            )
        self.model, self._given, self.attention = unwrapped(model), model, attention
        self.stopping = check_hook(stopping)
        self.depth, self.beam, self.budget = depth, beam, budget
        self._contexts = ExitStack()

    def begin(self, state: State) -> None:
        """Read the prompts, all but what `propose` will read anyway.

        Raises:
            ValueError: another vocabulary than the target's.
        """
        own = self.model.config.get_text_config(decoder=True).vocab_size
        if own != state.vocab:
            raise ValueError(f"model: expected the target's vocabulary of {state.vocab} tokens, got {own}")
        self._scorer = scorer_of(self.model, self.attention, state, 1 + (self.depth - 1) * self.beam)
        self._contexts.enter_context(self._scorer.attending())
        self._contexts.enter_context(compiled(self._given))
        prompts = [sequence[:-1] for sequence in state.sequences]
        self._cached = [len(prompt) for prompt in prompts]
        self._scorer.prefill(columns(prompts, state.device), self._cached)

    def propose(self, state: State) -> Proposal:
        """Grow and rerank; every request's tree has `budget` candidates, those of no probability as token -1."""
        device = state.device
        batch = len(state.sequences)
        request = torch.arange(batch, device=device)[:, None]
        beam = min(self.beam, state.vocab)
        logits = read_all(self._scorer, state, self._cached)
        self._cached = [len(sequence) for sequence in state.sequences]
        # of the nodes on offer so far: token, parent among them (0 is the root), log-probability of the path
        tokens = state.tail[:, -1:]
        parents = torch.full((batch, 1), -1, dtype=torch.int64, device=device)
        scores = torch.zeros(batch, 1, device=device)
        # of the nodes that are read: number among those on offer, and parent among those read
        read = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        up = torch.full((batch, 1), -1, dtype=torch.int32, device=device)
        level = 0  # where the level's nodes begin among those read
        for depth in range(self.depth):
            nodes = read[:, level:]
            if depth:
                logits = self._read_level(state, tokens.gather(1, nodes), up, depth, level)
            going = going_on(self.stopping, depth, logits, None, tokens.gather(1, nodes))
            best = torch.log_softmax(logits.float(), -1).topk(beam, -1)
            offered = best.values + scores.gather(1, nodes)[..., None]
            offered = offered.masked_fill(~going[..., None], float("-inf"))
            children = best.indices.masked_fill(offered.isneginf(), -1)
            first = tokens.shape[1]
            tokens = torch.cat([tokens, children.flatten(1)], 1)
            parents = torch.cat([parents, nodes.repeat_interleave(beam, 1)], 1)
            scores = torch.cat([scores, offered.flatten(1)], 1)
            if depth + 1 < self.depth:
                chosen = offered.flatten(1).topk(beam, 1).indices
                up = torch.cat([up, (level + chosen // beam).int()], 1)
                level, read = read.shape[1], torch.cat([read, first + chosen], 1)
        # stable: a child as probable as its parent stays behind it
        kept = scores[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, : self.budget] + 1
        kept = torch.nn.functional.pad(kept.sort(1).values, (1, 0))
        number = torch.zeros_like(tokens)
        number[request, kept] = torch.arange(kept.shape[1], device=device).expand(batch, -1)
        up_kept = parents.gather(1, kept)
        final = number.gather(1, up_kept.clamp(min=0))
        final[:, 0] = -1
        return Proposal(tokens.gather(1, kept), final.int(), self.depth)

    def end(self) -> None:
        """Give the model its own attention back, and the cache's memory free."""
        self._contexts.close()
        if hasattr(self, "_scorer"):
            del self._scorer

    def _read_level(self, state: State, tokens: torch.Tensor, up: torch.Tensor, depth: int, first: int) -> torch.Tensor:
        """`[batch, beam, vocab]` logits of the newest nodes; `up` is the tree of all nodes read so far."""
        ancestors = ancestor_bits(up)[:, first:].contiguous()
        depths = torch.full((tokens.shape[1],), depth, device=tokens.device)
        return self._scorer.score(tokens, ancestors, depths, state.prefix, offset=first)
