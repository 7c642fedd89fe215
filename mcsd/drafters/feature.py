"""A drafter that reads the target's last hidden states: one decoder layer and a head over some of the tokens."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from mcsd_kernels import SamplingParams, tree_attention

from ..cache import Prefix, TreeCache
from ..graphs import capturing, fingerprint, prefix_bucket
from ..trees import LARGEST_TREE, chain_bits, columns
from .base import Captures, Proposal, State
from .levels import LevelDrafter
from .stopping import Stopping

_BRANCHING = (4, 2, 2)
_FEW_ROWS = 8  # up to which int8 rows are read faster than the head's own


@dataclass(frozen=True)
class FeatureConfig:
    """Shape of a `FeatureModel`.

    Args:
        vocab_size: of the target.
        hidden_size: of the target; the draft's own width too.
        intermediate_size: of the draft's feed-forward block.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head, even.
        draft_vocab: rows of the output head.
        rope_theta: base of the rotary angles.
        norm_eps: of the norms.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    draft_vocab: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def as_dict(self) -> dict[str, int | float]:
        """Plain numbers, for JSON."""
        return asdict(self)


class FeatureModel(nn.Module):
    """Guesses what the target's head will read after a token, from the token and what the head read before it.

    Pair t is token t and the target's last hidden state after token t - 1 (zero for the first token). The layer's
    output `g` after pair t stands for the hidden state after token t: the head turns it into the law of token t + 1,
    and the next pair takes it where the target has not been yet.

    `z = fc([norm(embedding(x)), norm(h)])`, one pre-norm decoder layer with rotary positions over `z`, then
    `head(norm(g))` over the draft's tokens.

    Args:
        config: the shape.
        embedding: `[vocab_size, hidden_size]`, the target's input embedding, shared and frozen.

    Source: Li et al., arXiv 2401.15077 (EAGLE) and arXiv 2503.01840 (EAGLE-3, training on its own guesses).
    """

    draft_ids: torch.Tensor
    embedding: torch.Tensor
    inverse: torch.Tensor
    packed: tuple[torch.Tensor, torch.Tensor] | None = None
    """The head's rows as int8 `[draft_vocab, width]` and their scales `[draft_vocab]`, see `pack_head`."""

    def __init__(self, config: FeatureConfig, embedding: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        width, heads, kv = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
        factory: dict[str, Any] = {"dtype": embedding.dtype, "device": embedding.device}
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        steps = torch.arange(0, config.head_dim, 2, device=embedding.device, dtype=torch.float32)
        self.register_buffer("inverse", config.rope_theta ** (-steps / config.head_dim), persistent=False)
        self.register_buffer("draft_ids", torch.arange(config.draft_vocab, device=embedding.device), persistent=False)
        self.embed_norm = nn.Parameter(torch.ones(width, **factory))
        self.hidden_norm = nn.Parameter(torch.ones(width, **factory))
        self.fc = nn.Linear(2 * width, width, bias=False, **factory)
        self.attention_norm = nn.Parameter(torch.ones(width, **factory))
        self.qkv = nn.Linear(width, heads + 2 * kv, bias=False, **factory)
        self.output = nn.Linear(heads, width, bias=False, **factory)
        self.feed_norm = nn.Parameter(torch.ones(width, **factory))
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False, **factory)
        self.down = nn.Linear(config.intermediate_size, width, bias=False, **factory)
        self.head_norm = nn.Parameter(torch.ones(width, **factory))
        self.head_rows = nn.Parameter(torch.empty(config.draft_vocab, width, **factory))

    def mix(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`z`, `[..., width]`, of tokens `[...]` int64 and the hidden states before them `[..., width]`."""
        embedded = self._norm(F.embedding(tokens, self.embedding), self.embed_norm)
        return self.fc(torch.cat([embedded, self._norm(hidden, self.hidden_norm)], -1))

    def project(self, z: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, `[batch, heads, rows, head_dim]`, of `z` `[batch, rows, width]`.

        Args:
            z: from `mix`.
            positions: `[batch or 1, rows]`, each token's place in its text.
        """
        config = self.config
        batch, rows = z.shape[:2]
        mixed = self.qkv(self._norm(z, self.attention_norm)).view(batch, rows, -1, config.head_dim)
        angles = positions[..., None, None] * self.inverse
        cosine, sine = angles.cos().to(z.dtype), angles.sin().to(z.dtype)
        turned, value = mixed.split([config.heads + config.kv_heads, config.kv_heads], 2)
        first, second = turned.chunk(2, -1)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
        query, key = turned.split([config.heads, config.kv_heads], 2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def finish(self, z: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output `g`, `[batch, rows, width]`.

        Args:
            z: from `mix`.
            attended: `[batch, heads, rows, head_dim]`.
        """
        z = z + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self._norm(z, self.feed_norm)).chunk(2, -1)
        return z + self.down(F.silu(gate) * up)

    def features(self, g: torch.Tensor) -> torch.Tensor:
        """What the head reads."""
        return self._norm(g, self.head_norm)

    def logits(self, g: torch.Tensor) -> torch.Tensor:
        """`[..., draft_vocab]`; column c is token `draft_ids[c]`."""
        features = self.features(g)
        rows = features.numel() // features.shape[-1]
        if self.packed is None or rows > _FEW_ROWS:
            return F.linear(features, self.head_rows)
        flat = torch.ops.aten._weight_int8pack_mm(features.reshape(rows, -1).bfloat16(), *self.packed)
        return flat.view(*features.shape[:-1], -1).to(features.dtype)

    def pack_head(self, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Read the head as int8 where that is faster: a few rows on a CPU, half the time at one row.

        The product is computed in bfloat16, in float32 models too: whatever a draft's logits are, its candidates are
        drawn from them and tested against them.

        Args:
            rows: `[draft_vocab, width]` int8.
            scales: `[draft_vocab, 1]`; the head's rows are their products.
        """
        dtype, device = self.head_rows.dtype, self.head_rows.device
        known = dtype in (torch.bfloat16, torch.float32) and hasattr(torch.ops.aten, "_weight_int8pack_mm")
        if device.type == "cpu" and known:
            # a copy, because torch aligns its own memory: four rows at an address in a mapped file crash the product
            self.packed = rows.clone(memory_format=torch.contiguous_format), scales.flatten().bfloat16()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.norm_eps)


_Seen = tuple[torch.Tensor, torch.Tensor]  # keys and values
# model -> requests and what a graph has of it -> the memory that graphs point to, between two generations
_KEPT: WeakKeyDictionary[FeatureModel, dict[tuple[int, int], TreeCache]] = WeakKeyDictionary()


class FeatureDrafter(LevelDrafter):
    """Draws the children of every node from a `FeatureModel` that follows the target's hidden states.

    The model keeps keys and values of true pairs. When the target has spoken, the accepted tokens are read again with
    their true hidden states, in one forward with the new root; guesses only live inside a tree.

    Args:
        model: trained by `python -m mcsd.distill`; `mcsd.draft_model.load_draft` returns it inside a drafter.
        branching: children of a node at depth 0, 1, ...; None: what `mcsd.generate` is told.
        proposal, parents, sampling, stopping: see `LevelDrafter`.

    Raises:
        ValueError: `branching` is not a list of whole numbers >= 1, or `parents` is no tree.
    """

    reads_hidden = True

    def __init__(
        self,
        model: FeatureModel,
        branching: Sequence[int] | None = None,
        proposal: str = "without_replacement",
        *,
        parents: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        given = _BRANCHING if branching is None else branching
        super().__init__(given, proposal, parents=parents, sampling=sampling, stopping=stopping)
        self.model = model
        self._own_branching = branching is not None
        self._kind: tuple[int, int] | None = None  # if steps are captured
        self._forget()

    def with_branching(self, branching: Sequence[int], proposal: str) -> FeatureDrafter:
        """A drafter with the same model and this tree; itself, if a tree was given to it."""
        if self._own_branching or self.branching is None:
            return self
        return FeatureDrafter(self.model, branching, proposal, sampling=self.sampling, stopping=self.stopping)

    def begin(self, state: State) -> None:
        """Read the prompts, all but the root.

        Raises:
            ValueError: the target has another vocabulary or width than the model was trained for.
        """
        config, hidden, batch = self.model.config, state.hidden, len(state.sequences)
        assert hidden is not None, "reads_hidden is set"
        if (state.vocab, hidden.shape[2]) != (config.vocab_size, config.hidden_size):
            raise ValueError(
                f"target: expected a vocabulary of {config.vocab_size} and hidden states of {config.hidden_size} "
                f"for this drafter, got {state.vocab} and {hidden.shape[2]}"
            )
        super().begin(state)
        self._knows(self.model.draft_ids)
        self._cache = TreeCache([None], 0)
        if state.scorer is not None and state.scorer.graphs is not None:
            self._kind = batch, fingerprint(self.model)
            self._cache = _KEPT.get(self.model, {}).pop(self._kind, self._cache)
        self._alone_in_tree = chain_bits(1, state.device)  # held, as graphs point to it
        # a request with few new tokens is padded to the one with most
        self._cache.reset(state.capacity + LARGEST_TREE)
        # row t of `before` is the hidden state that token t is paired with
        before = F.pad(hidden, (0, 0, 1, 0))
        prompts = [sequence[:-1] for sequence in state.sequences]
        self._read_up_to = [len(prompt) for prompt in prompts]
        self._hidden = before[torch.arange(batch, device=state.device), state.prefix.lengths.long()][:, None]
        if max(self._read_up_to):
            self._write(columns(prompts, state.device), before[:, :-1], Prefix.of([0] * batch, state.device))

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """Take the true hidden states after the accepted nodes; `propose` reads them with the tokens that follow."""
        assert state.hidden is not None, "reads_hidden is set"
        accepted = path.clamp(0, state.hidden.shape[1] - 1).long()
        self._hidden = state.hidden.gather(1, accepted[..., None].expand(-1, -1, state.hidden.shape[2]))
        self._read_up_to = [len(sequence) for sequence in state.sequences]
        if self._kind is not None and self.alone:
            self._accepted, self._count = self._tokens.gather(1, accepted), length.long()

    def propose(self, state: State) -> Proposal:
        """See `LevelDrafter`."""
        proposal = super().propose(state)
        self._tokens = proposal.tokens
        return proposal

    def captures(self, state: State) -> Captures | None:
        """Unless what it does depends on more than the text: see `Drafter`."""
        if not self._steps_alike() or self._kind is None:
            return None
        self._cache.place(state.prefix, 0, 2 * len(self.parents), prefix_bucket(state.prefix.longest))
        memory = (self._cache.serial, self._cache.version)
        return Captures(len(self.parents), (self.parents, id(self.sampling), self._ids_key), (memory,))

    def carried(self) -> tuple[torch.Tensor, ...]:
        """The accepted nodes' true hidden states and tokens, and how many of them there are."""
        return self._hidden, self._accepted, self._count

    def carry(self, state: State, tensors: tuple[torch.Tensor, ...]) -> None:
        """See `carried`."""
        self._hidden, self._accepted, self._count = tensors
        self._read_up_to = [len(sequence) for sequence in state.sequences]

    def forgetful(self) -> FeatureDrafter:
        """See `Drafter`; captured steps stay with the target and shall not keep this model alive."""
        other = super().forgetful()
        other.model = cast(FeatureModel, weakref.proxy(self.model))
        other._cache = cast(TreeCache, weakref.proxy(self._cache))
        return other

    def end(self) -> None:
        """Free the memory, unless graphs point to it."""
        super().end()
        if self._kind is not None:
            _KEPT[self.model] = {self._kind: self._cache}
        self._forget()

    def _forget(self) -> None:
        self._kind, self._cache = None, TreeCache([None], 0)
        self._hidden = self._guess = self._tokens = self._accepted = self._count = torch.empty(0)

    def _level(self, state: State, level: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward of the model; a node's hidden state is the guess at its parent."""
        if level == 0:
            guess = self._read(state)
        else:
            tree = self._plan.tree
            first, after = tree.levels[level], tree.levels[level + 1]
            written = self._write(tokens, self._guess[:, tree.above[level]], state.prefix, first, level)
            guess = self._attend(*written, tree.ancestors[:, first:after], state.prefix)
        self._guess = guess
        return self.model.logits(guess), guess

    def _read(self, state: State) -> torch.Tensor:
        """Read the tokens that came since, the root last; returns the guess after the root, `[batch, 1, width]`."""
        if capturing():
            return self._read_on_device(state)
        # a request that is over has nothing new: its root is read again, to no effect
        read = [min(r, len(s) - 1) for r, s in zip(self._read_up_to, state.sequences, strict=True)]
        new = [sequence[r:] for r, sequence in zip(read, state.sequences, strict=True)]
        tokens = columns(new, state.device)
        written = self._write(tokens, self._hidden[:, : tokens.shape[1]], Prefix.of(read, state.device))
        last = torch.tensor([len(tokens) - 1 for tokens in new], device=state.device) if tokens.shape[1] > 1 else None
        return self._after(*written, last, state)

    def _read_on_device(self, state: State) -> torch.Tensor:
        """The same where nobody knows on the host how many there are: always as many rows."""
        at = torch.arange(self._accepted.shape[1], device=state.device)
        last = self._count - 1
        tokens = torch.where(at == last[:, None], state.tail[:, -1:], self._accepted.roll(-1, 1))
        # of a request that is over the count says nothing
        first = Prefix((state.prefix.lengths - last).clamp(min=0).int(), state.prefix.on_host)
        return self._after(*self._write(tokens, self._hidden, first), last, state)

    def _after(
        self, z: torch.Tensor, query: torch.Tensor, seen: _Seen, last: torch.Tensor | None, state: State
    ) -> torch.Tensor:
        """The guess after each request's last row: nothing asks for the layer's output before it."""
        if last is not None:
            each = torch.arange(len(last), device=state.device)
            z, query = z[each, last][:, None], query[each, :, last][:, :, None]
        return self._attend(z, query, seen, self._alone_in_tree, state.prefix)

    def _write(
        self, tokens: torch.Tensor, before: torch.Tensor, prefix: Prefix, offset: int = 0, depth: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, _Seen]:
        """Store the keys and values of pairs; returns `z`, the queries, and the keys and values in use.

        Args:
            tokens: `[batch, rows]` int64; a missing candidate, -1, is read as 0.
            before: `[batch, rows, width]`, the hidden states they are paired with.
            prefix: slots before the tree.
            offset: the first row's number in the tree.
            depth: of all rows, in tokens below the root; None: the rows are a chain.
        """
        rows, lengths = tokens.shape[1], prefix.lengths.long()[:, None]
        depths = torch.arange(offset, offset + rows, device=tokens.device) if depth is None else depth
        z = self.model.mix(tokens.clamp(min=0), before.to(self.model.fc.weight.dtype))
        query, key, value = self.model.project(z, lengths + depths)
        if capturing():
            self._cache.place(prefix, offset, rows, prefix_bucket(prefix.longest))
            self._cache.aim(prefix.lengths, offset, rows)
        else:
            self._cache.place(prefix, offset, rows)
        return z, query, self._cache.layers[0].update(key, value)

    def _attend(
        self, z: torch.Tensor, query: torch.Tensor, seen: _Seen, ancestors: torch.Tensor, prefix: Prefix
    ) -> torch.Tensor:
        """`g` after inner nodes of the tree, the last of those that were written."""
        return self.model.finish(z, tree_attention(query, *seen, ancestors, prefix.lengths))
