"""The drafters that can be trained, each with its training forward and its start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from ..drafters.feature import FeatureConfig, FeatureModel
from .text import Sample

_RIDGE_TOKENS = 60_000


class Student(Protocol):
    """What the training loop needs of a drafter."""

    draft_ids: torch.Tensor

    @property
    def body(self) -> nn.Module:
        """Everything that is trained."""

    @property
    def head(self) -> nn.Parameter:
        """`[draft_vocab, width]`, the rows of the output head."""

    def guesses(self, tokens: torch.Tensor, hidden: torch.Tensor, levels: int) -> Iterator[torch.Tensor]:
        """For each level of drafting, what the head reads after every token, `[batch, length, width]`.

        Args:
            tokens: `[batch, length]` int64.
            hidden: `[batch, length, width]` f32, the target's.
            levels: how often the drafter goes on from its own guess; a row t of level l is only a guess if t >= l.
        """


class FeatureStudent:
    """A `FeatureModel`, unrolled over its own guesses.

    At level l a pair takes the guess of level l - 1 in place of the target's hidden state. As inside a token tree, it
    attends to true pairs up to l tokens back, then to one pair of each level before its own, then to itself.

    Args:
        model: to be trained.
    """

    def __init__(self, model: FeatureModel) -> None:
        self.model = model
        self.draft_ids = model.draft_ids

    @property
    def body(self) -> nn.Module:
        """The model."""
        return self.model

    @property
    def head(self) -> nn.Parameter:
        """The rows of its head."""
        return self.model.head_rows

    def guesses(self, tokens: torch.Tensor, hidden: torch.Tensor, levels: int) -> Iterator[torch.Tensor]:
        """See `Student`."""
        model = self.model
        places = torch.arange(tokens.shape[1], device=tokens.device)
        before = _one_later(hidden)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for level in range(levels):
            z = model.mix(tokens, before)
            query, key, value = model.project(z, places[None])
            keys.append(key)
            values.append(value)
            if level == 0:
                attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            else:
                attended = _attend_to_levels(query, keys, values, places)
            g = model.finish(z, attended)
            yield model.features(g)
            before = _one_later(g)


def _one_later(rows: torch.Tensor) -> torch.Tensor:
    """`[batch, length, width]` with row t - 1 in row t, and zero in row 0."""
    return F.pad(rows, (0, 0, 1, 0))[:, :-1]


def _attend_to_levels(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], places: torch.Tensor
) -> torch.Tensor:
    """Attention of the last level's pairs, `[batch, heads, length, head_dim]`.

    Args:
        query: `[batch, heads, length, head_dim]`.
        keys, values: of each level, `[batch, kv_heads, length, head_dim]`.
        places: `[length]`, 0, 1, ...
    """
    batch, heads, length, width = query.shape
    level = len(keys) - 1
    grouped = query.unflatten(1, (keys[0].shape[1], -1))  # [batch, kv_heads, group, length, head_dim]
    scores = [
        (grouped @ keys[0].transpose(-1, -2)[:, :, None]).masked_fill(places > places[:, None] - level, -torch.inf)
    ]
    for deeper in range(1, level + 1):
        score = (grouped * keys[deeper].roll(level - deeper, 2)[:, :, None]).sum(-1, keepdim=True)
        scores.append(score.masked_fill((places < level - deeper)[:, None], -torch.inf))
    weights = (torch.cat(scores, -1) * width**-0.5).softmax(-1)
    attended = weights[..., :length] @ values[0][:, :, None]
    for deeper in range(1, level + 1):
        column = length + deeper - 1
        attended = attended + weights[..., column : column + 1] * values[deeper].roll(level - deeper, 2)[:, :, None]
    return attended.reshape(batch, heads, length, width)


class LayersStudent:
    """A small Llama over the target's embedding, with a head over some of the tokens.

    Args:
        model: without a head of its own.
        embedding: `[vocab, width]`, the target's, frozen.
        head: `[draft_vocab, width]`.
        draft_ids: `[draft_vocab]` int64.
    """

    def __init__(self, model: LlamaModel, embedding: torch.Tensor, head: torch.Tensor, draft_ids: torch.Tensor) -> None:
        self.embedding, self.draft_ids = embedding, draft_ids
        self.config: LlamaConfig = model.config
        self._parts = nn.ModuleDict({"model": model})
        self._parts.register_parameter("head", nn.Parameter(head))

    @property
    def body(self) -> nn.Module:
        """Layers and head."""
        return self._parts

    @property
    def head(self) -> nn.Parameter:
        """The rows of the head."""
        return self._parts.get_parameter("head")

    def guesses(self, tokens: torch.Tensor, hidden: torch.Tensor, levels: int) -> Iterator[torch.Tensor]:
        """See `Student`; the model reads tokens only, so that all levels are one."""
        embedded = F.embedding(tokens, self.embedding)
        yield self._parts["model"](inputs_embeds=embedded, use_cache=False).last_hidden_state


def new_feature_student(
    target: PreTrainedModel,
    draft_ids: torch.Tensor,
    samples: Sequence[Sample],
    *,
    intermediate: int | None = None,
    seed: int = 0,
) -> FeatureStudent:
    """A feature drafter that starts as the best linear guess of the next hidden state.

    The mixing matrix is the ridge regression from (embedding, hidden state) to the next hidden state; the head is the
    target's. The layer computes what a Llama's last layer does (for another target: something random) but adds next to
    nothing at first.

    Args:
        target: whose embedding is shared.
        draft_ids: `[draft_vocab]` int64.
        samples: text for the regression.
        intermediate: width of the feed-forward block; None: the target's, or 8/3 of its width.
        seed: of the layer's random start.
    """
    config = target.config.get_text_config(decoder=True)
    embedding = target.get_input_embeddings().weight.detach().float()
    width = embedding.shape[1]
    heads = getattr(config, "num_attention_heads", None) or max(width // 64, 1)
    head_dim = getattr(config, "head_dim", None) or width // heads
    rope: Any = getattr(config, "rope_parameters", None) or {}
    shape = FeatureConfig(
        vocab_size=embedding.shape[0],
        hidden_size=width,
        intermediate_size=intermediate or getattr(config, "intermediate_size", None) or -(-8 * width // 3),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        draft_vocab=len(draft_ids),
        rope_theta=float(rope.get("rope_theta") or 10_000.0),
        norm_eps=float(getattr(config, "rms_norm_eps", None) or 1e-5),
    )
    model = FeatureModel(shape, embedding)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.draft_ids.copy_(draft_ids)
        for matrix in (model.qkv.weight, model.gate_up.weight):
            matrix.copy_(torch.randn(matrix.shape, generator=random) * width**-0.5)
        _take_last_layer(model, target)
        for matrix in (model.output.weight, model.down.weight):
            matrix.copy_(torch.randn(matrix.shape, generator=random) * 0.002)
        model.head_rows.copy_(target.get_output_embeddings().weight.detach()[draft_ids])
        pairs = _pairs(samples, embedding)
        unit = _unit(target, pairs)
        model.fc.weight.copy_(_ridge([(_mixed(model, before), after / unit) for before, after in pairs]))
        model.head_norm.copy_(_best_scale(model, pairs))
    return FeatureStudent(model)


def _take_last_layer(model: FeatureModel, target: PreTrainedModel) -> None:
    """Start the layer's inner projections and norms as those of the last layer of a Llama of the same shape."""
    config = target.config.get_text_config(decoder=True)
    if config.model_type != "llama" or config.intermediate_size != model.config.intermediate_size:
        return
    layer = target.get_decoder().layers[-1]
    attention, feed = layer.self_attn, layer.mlp
    model.qkv.weight.copy_(torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]))
    model.gate_up.weight.copy_(torch.cat([feed.gate_proj.weight, feed.up_proj.weight]))
    model.attention_norm.copy_(layer.input_layernorm.weight)
    model.feed_norm.copy_(layer.post_attention_layernorm.weight)


def _pairs(samples: Sequence[Sample], embedding: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each text (embedding of a token, hidden state before it) `[n, 2, width]`, and the one after, `[n, width]`."""
    pairs, count = [], 0
    for sample in samples:
        hidden = sample.hidden.float().to(embedding.device)
        embedded = F.embedding(sample.tokens[1:].to(embedding.device), embedding)
        pairs.append((torch.stack([embedded, hidden[:-1]], 1), hidden[1:]))
        count += len(embedded)
        if count >= _RIDGE_TOKENS:
            break
    return pairs


def _unit(target: PreTrainedModel, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """`[width]`: how large a hidden state's entries are: the weight of the target's last norm, or root mean squares.

    Divided by the former, hidden states are what a norm without weight returns. (With the latter, a few entries that
    are large everywhere weigh as much as all others, and training went astray on SmolLM2-135M.)
    """
    weight = getattr(getattr(target.get_decoder(), "norm", None), "weight", None)
    if isinstance(weight, torch.Tensor) and bool((weight.abs() > 1e-3).all()):
        return weight.detach().float()
    return torch.cat([after for _, after in pairs]).square().mean(0).sqrt().clamp(min=1e-4)


def _mixed(model: FeatureModel, before: torch.Tensor) -> torch.Tensor:
    """`[n, 2 width]`: what the mixing matrix reads, with norms that have no weight yet."""
    return F.rms_norm(before, (before.shape[-1],), None, model.config.norm_eps).flatten(1)


def _best_scale(model: FeatureModel, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """`[width]`: the weight of the last norm that brings the linear guesses closest to the hidden states."""
    product, square = torch.zeros_like(model.head_norm), torch.zeros_like(model.head_norm)
    for before, after in pairs:
        guess = F.rms_norm(model.fc(_mixed(model, before)), (len(product),), None, model.config.norm_eps)
        product += (guess * after).sum(0)
        square += (guess * guess).sum(0)
    return product / square.clamp(min=1e-6)


def _ridge(pairs: list[tuple[torch.Tensor, torch.Tensor]], penalty: float = 1e-3) -> torch.Tensor:
    """`[outputs, inputs]` of least squares, with `penalty` times the mean square of the inputs on the diagonal."""
    square = sum(x.T @ x for x, _ in pairs)
    cross = sum(x.T @ y for x, y in pairs)
    assert isinstance(square, torch.Tensor) and isinstance(cross, torch.Tensor)
    ridge = penalty * square.diagonal().mean() * torch.eye(len(square), device=square.device)
    return torch.linalg.solve(square + ridge, cross).T


def new_layers_student(
    target: PreTrainedModel,
    draft_ids: torch.Tensor,
    samples: Sequence[Sample],
    *,
    layers: int = 2,
    fresh: bool = False,
    intermediate: int | None = None,
    seed: int = 0,
) -> LayersStudent:
    """A small Llama that starts as the target's first layers, or fresh, read out through a linear map.

    The head is the target's, behind the ridge regression from the layers' output to the target's last hidden state.

    Args:
        target: whose embedding is shared; a Llama unless `fresh`.
        draft_ids: `[draft_vocab]` int64.
        samples: text for the regression.
        layers: how many.
        fresh: random layers instead of the target's.
        intermediate: width of the feed-forward block, if fresh; None: the target's, or 8/3 of its width.
        seed: of random layers.

    Raises:
        ValueError: the target is no Llama, or has fewer layers.
    """
    config = target.config.get_text_config(decoder=True)
    embedding = target.get_input_embeddings().weight.detach().float()
    width = embedding.shape[1]
    if not fresh and config.model_type != "llama":
        raise ValueError(f'start: expected "fresh" for a target that is no Llama, got "target" for {config.model_type}')
    if not fresh and layers > config.num_hidden_layers:
        raise ValueError(f"layers: expected at most the target's {config.num_hidden_layers}, got {layers}")
    if fresh:
        heads = getattr(config, "num_attention_heads", None) or max(width // 64, 1)
        own = LlamaConfig(
            vocab_size=embedding.shape[0],
            hidden_size=width,
            intermediate_size=intermediate or getattr(config, "intermediate_size", None) or -(-8 * width // 3),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            max_position_embeddings=getattr(config, "max_position_embeddings", None) or 8192,
        )
    else:
        own = LlamaConfig.from_dict({**config.to_dict(), "num_hidden_layers": layers})
    own.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaModel(own).float().to(embedding.device)
    if not fresh:
        kept = {n: t for n, t in target.get_decoder().state_dict().items() if n in model.state_dict()}
        model.load_state_dict(kept, strict=False)
    # the embedding is the target's and not this model's to train or to store
    model.embed_tokens = nn.Identity()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    head = target.get_output_embeddings().weight.detach().float()[draft_ids]
    student = LayersStudent(model, embedding, head.clone(), draft_ids)
    pairs, count = [], 0
    with torch.no_grad():
        for sample in samples:
            tokens = sample.tokens[None].to(embedding.device)
            (read,) = student.guesses(tokens, torch.empty(0), 1)
            pairs.append((read[0], sample.hidden.float().to(embedding.device)))
            count += len(sample.tokens)
            if count >= _RIDGE_TOKENS:
                break
        student.head.copy_(head @ _ridge(pairs))
    return student
