"""The drafters that ship with this package, and the loading of draft models in general."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .bundled import BUNDLED_DRAFTS
from .drafters.feature import FeatureConfig, FeatureDrafter, FeatureModel
from .drafters.model import ModelDrafter
from .overlapping import Overlapping
from .placement import floating_weight, input_device

DATA = Path(__file__).parent / "data"
WEIGHTS_FILE = "draft_int8.safetensors"


class SubVocabularyHead(nn.Module):
    """An output head with a row for some token ids only; every other id gets the logit -inf, so it is never drafted.

    While `reduced` is set, the logits have a column for each of those ids and no others.

    Args:
        hidden_size: width of the hidden states.
        rows: number of ids that have a row.
        vocab_size: width of the logits.
    """

    weight: nn.Parameter
    sub_vocab: torch.Tensor

    def __init__(self, hidden_size: int, rows: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.reduced = False
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        self.register_buffer("sub_vocab", torch.empty(rows, dtype=torch.int64))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the full vocabulary, or over `sub_vocab` while `reduced` is set.

        Args:
            hidden: `[..., hidden_size]`.

        Returns:
            `[..., vocab_size]`, of the dtype of `hidden`; column `sub_vocab[r]` is `hidden @ weight[r]`. Reduced:
            `[..., rows]`, column r is `hidden @ weight[r]`.
        """
        known = nn.functional.linear(hidden, self.weight)
        if self.reduced:
            return known
        logits = known.new_full((*known.shape[:-1], self.vocab_size), float("-inf"))
        return logits.index_copy_(-1, self.sub_vocab, known)


_REDUCED = Overlapping()  # heads


class SubVocabularyDraft(LlamaForCausalLM):
    """A small Llama that reads the target's input embedding and predicts the ids of a sub-vocabulary.

    Only the head differs from `LlamaForCausalLM`, so caches, attention functions and `logits_to_keep` work as there.

    Args:
        config: the small Llama's; `tie_word_embeddings` must be False.
        rows: size of the sub-vocabulary.
    """

    _tied_weights_keys = None

    def __init__(self, config: LlamaConfig, rows: int) -> None:
        super().__init__(config)
        self.lm_head = SubVocabularyHead(config.hidden_size, rows, config.vocab_size)

    @property
    def sub_vocab(self) -> torch.Tensor:
        """`[rows]` int64, ascending: the ids that have a row in the head."""
        ids: torch.Tensor = self.lm_head.sub_vocab
        return ids

    @contextmanager
    def reduced(self) -> Iterator[None]:
        """Inside this context the logits have one column for each id of `sub_vocab`."""
        with _REDUCED.lock:
            _REDUCED.enter(self.lm_head, False)
            self.lm_head.reduced = True
        try:
            yield
        finally:
            with _REDUCED.lock:
                last, _ = _REDUCED.leave(self.lm_head)
                self.lm_head.reduced = not last

    @classmethod
    def from_folder(cls, folder: Path, embedding: torch.Tensor) -> SubVocabularyDraft:
        """Load a folder with `config.json` and int8 weights, on the device and in the dtype of `embedding`.

        Args:
            folder: holds `config.json` and `draft_int8.safetensors` (see `dequantise`; "head" is the head's matrix,
                "sub_vocab" the token id of each of its rows).
            embedding: `[vocab, hidden]`, the target's input embedding. It is shared, not copied.

        Returns:
            The model in evaluation mode, without gradients.

        Raises:
            ValueError: the embedding does not have the shape that the draft was trained with.
        """
        config = LlamaConfig.from_pretrained(folder, tie_word_embeddings=False)
        expected = (config.vocab_size, config.hidden_size)
        if tuple(embedding.shape) != expected:
            raise ValueError(
                f"target: expected an input embedding of shape {expected} for the draft in {folder}, "
                f"got {tuple(embedding.shape)}"
            )
        stored = load_file(folder / WEIGHTS_FILE)
        sub_vocab = stored.pop("sub_vocab").long()
        weights = dequantise(stored, embedding.dtype)
        state = {"lm_head.weight": weights.pop("head"), "lm_head.sub_vocab": sub_vocab}
        state |= {f"model.{name}": weight for name, weight in weights.items()}
        state = {name: tensor.to(embedding.device) for name, tensor in state.items()}
        state["model.embed_tokens.weight"] = embedding.detach()
        # Nothing is initialised only to be overwritten; the rotary table is the one tensor that no file holds.
        with torch.device("meta"):
            draft = cls(config, rows=len(sub_vocab))
        draft.load_state_dict(state, strict=True, assign=True)
        draft.model.rotary_emb = LlamaRotaryEmbedding(config).to(embedding.device)
        return draft.eval().requires_grad_(False)


def load_feature_model(folder: Path, embedding: torch.Tensor) -> FeatureModel:
    """Load a folder with `config.json` and int8 weights, on the device and in the dtype of `embedding`.

    Args:
        folder: holds `config.json` (the fields of `FeatureConfig`) and `draft_int8.safetensors` (see `dequantise`;
            "draft_ids" is the token id of each row of the head, where they are not the lowest ids).
        embedding: `[vocab, hidden]`, the target's input embedding. It is shared, not copied.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ValueError: the embedding does not have the shape that the drafter was trained with.
    """
    values = json.loads((folder / "config.json").read_text())
    config = FeatureConfig(**{field.name: values[field.name] for field in fields(FeatureConfig)})
    expected = (config.vocab_size, config.hidden_size)
    if tuple(embedding.shape) != expected:
        raise ValueError(
            f"target: expected an input embedding of shape {expected} for the drafter in {folder}, "
            f"got {tuple(embedding.shape)}"
        )
    stored = load_file(folder / WEIGHTS_FILE)
    ids = stored.pop("draft_ids", None)
    weights = {name: weight.to(embedding.device) for name, weight in dequantise(stored, embedding.dtype).items()}
    model = FeatureModel(config, embedding)
    model.load_state_dict(weights, strict=True, assign=True)
    model.pack_head(stored["head_rows"], stored["head_rows.scale"])
    if ids is not None:
        model.draft_ids.copy_(ids)
    return model.eval().requires_grad_(False)


def dequantise(stored: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Widen int8 matrices; other tensors are only cast.

    `W[r, c] = int8[r, c] * scale[r]`, multiplied in float32 (exact) and rounded once to `dtype`.

    Args:
        stored: matrices `NAME` (int8, `[rows, columns]`) each with `NAME.scale` (float16, `[rows, 1]`), and vectors.
        dtype: of the result.

    Returns:
        The tensors by name, without the scales.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            weights[name] = (tensor.float() * stored[f"{name}.scale"].float()).to(dtype)
        elif not name.endswith(".scale"):
            weights[name] = tensor.to(dtype)
    return weights


def load_draft(
    name_or_path: str | Path,
    target: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel | FeatureDrafter | ModelDrafter:
    """Load a draft for a target, on the target's device, ready for decoding (evaluation mode, no gradients).

    Args:
        name_or_path: one of `BUNDLED_DRAFTS`, a folder that `python -m mcsd.distill` made, or any causal language
            model, as a local folder or a name on the model hub.
        target: the model whose tokens will be drafted.
        dtype: of the draft; None: the target's, with which a draft of ours shares the target's embedding (it copies
            and casts it otherwise).
        tokenizer: the target's. A model must then have the same one beside it, and its embedding may be padded to
            another size. None: as many tokens as the target has are enough.

    Returns:
        A model whose logits are as wide as the target's; a `ModelDrafter`, which takes the tree that `mcsd.generate` is
        told, around a model for which they are not; or a drafter that reads the target's hidden states.

    Raises:
        ValueError: the draft does not fit the target's vocabulary, tokenizer or embedding, or shares an embedding that
            is quantised or offloaded.
    """
    dtype = dtype or target.dtype
    folder = DATA / name_or_path if name_or_path in BUNDLED_DRAFTS else Path(name_or_path)
    if (folder / WEIGHTS_FILE).is_file():
        embedding = floating_weight("target", target.get_input_embeddings(), "a draft that shares them")
        if hasattr(embedding, "full_tensor"):  # split over ranks by a tensor-parallel plan
            embedding = embedding.full_tensor()
        embedding = embedding.to(dtype)
        if json.loads((folder / "config.json").read_text()).get("drafter") == "feature":
            return FeatureDrafter(load_feature_model(folder, embedding))
        return SubVocabularyDraft.from_folder(folder, embedding)
    draft = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    draft = draft.to(input_device(target)).eval().requires_grad_(False)
    widths = [model.config.get_text_config().vocab_size for model in (draft, target)]
    if tokenizer is not None:
        _check_tokenizers(tokenizer, name_or_path)
        if widths[0] != widths[1]:
            return ModelDrafter(draft, None, shared_vocab=min(widths))
    elif widths[0] != widths[1]:
        raise ValueError(
            f"draft: expected the target's vocabulary of {widths[1]}, {name_or_path} has {widths[0]}; if they share a "
            f"tokenizer and only padding differs, load_draft(..., tokenizer=tokenizer) takes it"
        )
    return draft


def _check_tokenizers(tokenizer: PreTrainedTokenizerBase, draft: str | Path) -> None:
    """Refuse a draft model whose token ids mean something else.

    Raises:
        ValueError: the vocabularies differ.
    """
    try:
        other = AutoTokenizer.from_pretrained(draft)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"draft: {draft} has no tokenizer to compare with the target's ({reason}); "
            "put the target's beside it if they share one"
        ) from error
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    if mine == theirs:
        return
    differing = sorted(
        (token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)),
        key=lambda token: (mine.get(token, len(mine)), token),
    )
    example = differing[0]
    raise ValueError(
        f"draft: expected the target's tokenizer, {draft} has another: {len(differing)} tokens differ, "
        f"{example!r} is {mine.get(example, 'missing')} in the target and {theirs.get(example, 'missing')} in the draft"
    )
