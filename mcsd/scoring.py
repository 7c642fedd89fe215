"""A causal language model that scores token trees against its own cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .attention import TreeStep, takes_tree_attention, tree_attention_in
from .cache import Prefix, TreeCache
from .graphs import LARGEST, PADDING, ROOM, Graphs, Memory, Outputs, capturing, fingerprint, prefix_bucket, row_bucket
from .hidden import HiddenStates, why_not
from .placement import hidden_dtype, input_device, input_vocab, is_spread, output_shape, text_limit
from .trees import after_chain, chain_bits, chain_depths

LOG = logging.getLogger(__name__)
ATTENTION = ("auto", "tree", "dense")
PREFILL_CHUNK = 512
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
# their positions come from the 2-D attention mask, not from position_ids
_ALIBI = ("bloom", "mpt", "falcon")
_OWN_MASKS = {
    "gpt_neo": "has local attention layers that make their own masks",
    "doge": "computes its attention mask from the keys",
}


# model -> kind of scorer -> what its last one left for the next
_KEPT: WeakKeyDictionary[PreTrainedModel, dict[Any, tuple[TreeCache, Graphs, Graphs]]] = WeakKeyDictionary()
_TOLD: WeakSet[PreTrainedModel] = WeakSet()  # why nothing is captured


class UnsupportedModelError(ValueError):
    """The model cannot score token trees; the text says why."""


def refusal(model: object, attention: str = "auto") -> str | None:
    """Why this model cannot score token trees, or None; nothing is run, as it is by `mcsd.check`."""
    if not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            return f"{type(model).__name__} has an adapter outside the layers; one inside them, such as LoRA, is taken"
        return f"expected a Hugging Face model, got {type(model).__name__}"
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters.values()):
        return f"{type(model).__name__} has an adapter that begins to work at tokens in the text (aLoRA)"
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is an encoder-decoder; mcsd decodes decoder-only models"
    if not model.can_generate():
        return f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
    if model.dtype == torch.float64:
        return f"{type(model).__name__} is in float64, and logits are verified in float32 at most; call float() first"
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return (
            f"{type(model).__name__} trains with gradient checkpointing, which takes its cache away; call eval() first"
        )
    try:
        layers = _layers(config)
    except Exception as error:  # a configuration that no cache can be made for
        return f"no key-value cache can be made for {type(model).__name__}: {error}"
    odd = sorted({type(layer).__name__ for layer in layers if type(layer) not in _LAYERS})
    if odd:
        return f"{type(model).__name__} keeps recurrent or compressed state ({', '.join(odd)}), which has no tree form"
    if config.model_type in _OWN_MASKS:
        return f"{type(model).__name__} {_OWN_MASKS[config.model_type]}, which cannot describe a tree"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return f"{type(model).__name__} attends in chunks, which trees across a chunk's end would break"
    if attention != "dense" and takes_tree_attention(model):
        return None
    if attention == "tree":
        return f"{type(model).__name__} does not use transformers' AttentionInterface; try attention='dense'"
    if config.model_type in _ALIBI and (config.model_type != "falcon" or getattr(config, "alibi", False)):
        return f"{type(model).__name__} takes positions from its 2-D attention mask, which cannot describe a tree"
    if any(isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)) for layer in layers):
        return f"{type(model).__name__} has sliding windows, which a dense mask cannot describe; use attention='tree'"
    return None


class Scorer:
    """One model, its cache, and the two ways into it: whole prompts, and trees.

    Args:
        model: any decoder that `refusal` lets through.
        capacity: slots a request.
        attention: "tree", "dense" (4-D masks), or "auto": "tree" where the model takes it.
        reads_hidden: keep what the LM head reads, in `hidden`.
        batch: requests, if trees shall be scored by captured graphs (see `mcsd.graphs`); None: they shall not. Graphs
            and cache are kept for the model's next scorer of as many requests.
        report: gets the graphs' lines.
        leader: the target's scorer, if this one's is a draft.

    Attributes:
        begun: the first step is over. Nothing is captured before that: it reads a prompt, which comes but once.
        restarted: this generation has begun again, see `restart`.

    Raises:
        UnsupportedModelError: the model cannot score trees, or its hidden states cannot be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        attention: str = "auto",
        reads_hidden: bool = False,
        batch: int | None = None,
        report: Callable[[str], None] | None = None,
        leader: Scorer | None = None,
    ) -> None:
        reason = refusal(model, attention) or (why_not(model) if reads_hidden else None)
        if reason:
            raise UnsupportedModelError(reason)
        self.model, self._leader = model, leader
        self.begun = self.restarted = False
        config = model.config.get_text_config(decoder=True)
        self.tree = attention != "dense" and takes_tree_attention(model)
        windows = [getattr(layer, "sliding_window", None) for layer in _layers(config)]
        self.device, self.vocab = input_device(model), input_vocab(model)
        beside = leader is not None and leader.device != self.device
        if batch is not None and (beside or is_spread(model)):
            where = "lies beside the target's device" if beside else "lies on several devices"
            tell = report or (LOG.info if model in _TOLD else LOG.warning)
            tell(f"forwards run eagerly: {type(model).__name__} {where}")
            _TOLD.add(model)
            batch = None
        self.graphs: Graphs | None = None
        self.steps: Graphs | None = None  # of which this model is the target
        if batch is None:
            self.cache = TreeCache(windows, capacity)
        else:
            # padded rows have slots of their own
            self._kind = (batch, self.tree, reads_hidden, fingerprint(model))
            kept = _KEPT.get(model, {}).pop(self._kind, None)
            self.cache, self.graphs, self.steps = kept or (
                TreeCache(windows, capacity + PADDING),
                Graphs("forwards run eagerly"),
                Graphs("steps run part by part", shared=True),
            )
            self.cache.reset(capacity + PADDING)
            for graphs in (self.graphs, self.steps):
                graphs.begin(report, again=leader is not None and leader.restarted)
        self._own_cache = self.cache
        self.positions = text_limit(model)
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._states = HiddenStates(model) if reads_hidden else None
        self.hidden: torch.Tensor | None = None  # of the last prompt or tree
        self._unread: torch.Tensor | None = None  # the end of a prompt that the first tree brings along

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The model attends by tree inside this context, and its hidden states are read if that was asked for."""
        with tree_attention_in(self.model) if self.tree else nullcontext(), self._states or nullcontext():
            yield
        if self.graphs is not None and self.steps is not None:
            kept = self._own_cache, self.graphs, self.steps
            _KEPT[self.model] = {self._kind: kept}  # one at a time: a cache is large

    @property
    def ready(self) -> bool:
        """Whether forwards over trees depend on no number on the host, but for bounds, and may be captured."""
        begun = self.begun if self._leader is None else self._leader.begun
        # a step's graph has the caches of all that take part
        return begun and self.graphs is not None and (capturing() or self.cache is self._own_cache)

    @property
    def memory(self) -> Memory:
        """Which cache this is, and how often its memory has moved; with its own where it uses another's."""
        return tuple((cache.serial, cache.version) for cache in dict.fromkeys((self._own_cache, self.cache)))

    def restart(self) -> None:
        """Forget what was read. The prompts that come next are other ones, or the same texts as far as they go now."""
        self.cache.reset(self.cache.capacity)
        self.begun, self.restarted, self._unread = False, True, None

    def reserve(self, prefix: Prefix, nodes: int) -> None:
        """Make room in the cache for a captured step's trees of so many nodes."""
        self.cache.place(prefix, 0, nodes + PADDING, prefix_bucket(prefix.longest))

    def prefill(
        self, tokens: torch.Tensor, lengths: list[int], start: list[int] | None = None, *, join: bool = False
    ) -> None:
        """Put tokens into the cache, without scores.

        Args:
            tokens: `[batch, longest]` int64, each request's from column 0 on.
            lengths: how many of them count.
            start: how many tokens each request has in the cache already; None: none.
            join: the last chunk may wait for the forward of the first tree, which must follow. That needs requests of
                one length.
        """
        first = start or [0] * len(lengths)
        longest = max(lengths, default=0)
        join = join and longest > 0 and min(lengths) == longest and max(first) == min(first)
        hidden = []
        for at in range(0, longest, PREFILL_CHUNK):
            chunk = tokens[:, at : min(at + PREFILL_CHUNK, longest)]
            if join and at + PREFILL_CHUNK >= longest:
                self._unread = chunk.to(self.device)
                return
            bits = chain_bits(chunk.shape[1], self.device)
            # a prompt that is over stays at its end: what is written there is overwritten later
            before = [f + min(at, length) for f, length in zip(first, lengths, strict=True)]
            self.score(chunk, bits, None, before, last_only=True)
            if self.hidden is not None:
                hidden.append(self.hidden)
        if self._states is not None:
            self.hidden = torch.cat(hidden, 1) if hidden else self._no_hidden(len(lengths))

    def score(
        self,
        tokens: torch.Tensor,
        ancestors: torch.Tensor,
        depth: torch.Tensor | None,
        prefix: Prefix | list[int],
        *,
        offset: int = 0,
        last_only: bool = False,
    ) -> torch.Tensor:
        """One forward over nodes of a tree.

        Args:
            tokens: `[batch, rows]` int64, on any device; what is no token (a missing candidate) is read as any other.
            ancestors: `[batch or 1, rows, words]` int32.
            depth: `[rows]` or `[batch, rows]` int64, in tokens below the root; None: a chain.
            prefix: each request's slots before its tree.
            offset: the first row's node number.
            last_only: skip all but the last row's logits where the model can.

        Returns:
            `[batch, rows, vocab]` logits in the model's dtype, where the tokens are; with `last_only` the last row's,
            if not all.
        """
        if not isinstance(prefix, Prefix):
            prefix = Prefix.of(prefix, self.device)
        rows, home = tokens.shape[1], tokens.device
        wanted = 1 if last_only else rows
        if depth is None:
            depth = chain_depths(rows, self.device)
        if home != self.device:
            tokens, ancestors, depth = tokens.to(self.device), ancestors.to(self.device), depth.to(self.device)
            prefix = prefix._replace(lengths=prefix.lengths.to(self.device))
        if self._unread is not None:
            tokens, ancestors, depth, prefix = self._join(tokens, ancestors, depth, prefix)
        logits = self._forward(tokens, ancestors, depth, prefix, offset, wanted)
        return (logits if last_only or logits.shape[1] == rows else logits[:, -rows:]).to(home)

    def keep(self, prefix: Prefix, path: torch.Tensor, length: torch.Tensor) -> None:
        """Move the accepted nodes to the end of each request's prefix."""
        self.cache.keep(prefix, path, length)
        self.begun = True

    def _forward(
        self,
        tokens: torch.Tensor,
        ancestors: torch.Tensor,
        depth: torch.Tensor,
        prefix: Prefix,
        offset: int,
        wanted: int,
    ) -> torch.Tensor:
        rows = tokens.shape[1]
        outputs = None
        few = rows <= LARGEST and not (self.graphs is None or self.graphs.off)
        if self.ready and (few or capturing()) and (wanted == rows or rows <= 2):
            outputs = self._replay(tokens, ancestors, depth, prefix, offset, wanted)
        elif capturing():
            raise RuntimeError("a forward over a part of a text, whose place the host knows")
        if outputs is None:
            self.cache.place(prefix, offset, rows)
            same = prefix.longest if prefix.same else None
            near_the_end = prefix.longest + offset + rows > self.positions
            outputs = self._run(tokens, ancestors, depth, prefix.lengths, wanted, same, near_the_end)
        self.hidden = outputs.hidden
        return outputs.logits

    def _replay(
        self,
        tokens: torch.Tensor,
        ancestors: torch.Tensor,
        depth: torch.Tensor,
        prefix: Prefix,
        offset: int,
        wanted: int,
    ) -> Outputs | None:
        """The forward with rows and prefixes rounded up, so that one graph serves many steps; None: there is none."""
        assert self.graphs is not None
        if self.graphs.refuses(ROOM):
            return None
        batch, rows = tokens.shape
        depth = depth.expand(batch, rows)
        padded = rows
        if not capturing():  # whose tree is what it is
            padded = row_bucket(rows)
            words = 1 << (-(-(offset + padded) // 32) - 1).bit_length()
            more = (0, padded - rows)
            tokens, depth = F.pad(tokens, more), F.pad(depth, more)
            ancestors = F.pad(ancestors[..., :words], (0, max(words - ancestors.shape[-1], 0), *more))
        bound = prefix_bucket(prefix.longest)
        kept = padded if wanted == rows else wanted
        try:
            self.cache.place(prefix, offset, padded, bound)
        except torch.OutOfMemoryError as error:  # the forward by itself needs less
            self.graphs.refuse(ROOM, error)
            return None

        def forward(
            tokens: torch.Tensor, ancestors: torch.Tensor, depth: torch.Tensor, lengths: torch.Tensor
        ) -> Outputs:
            self.cache.aim(lengths, offset, padded)
            return self._run(tokens, ancestors, depth, lengths, kept, None, True)

        key = (batch, padded, offset, bound, kept)
        last = offset + padded - 1
        outputs: Outputs | None = self.graphs.run(
            key,
            self.memory,
            forward,
            (tokens, ancestors, depth, prefix.lengths),
            f"a forward: batch {batch}, rows {offset} to {last}, prefixes up to {bound}",
        )
        if outputs is None or rows == padded:
            return outputs
        hidden = None if outputs.hidden is None else outputs.hidden[:, :rows]
        return Outputs(outputs.logits[:, :rows], hidden)

    def _run(
        self,
        tokens: torch.Tensor,
        ancestors: torch.Tensor,
        depth: torch.Tensor,
        lengths: torch.Tensor,
        wanted: int,
        same: int | None,
        near_the_end: bool,
    ) -> Outputs:
        """Call the model; everything that depends on a number on the host comes as such."""
        positions = lengths.long()[:, None] + depth if same is None else depth + same
        if self.positions and near_the_end:
            positions = positions.clamp(max=self.positions - 1)  # nodes past the last position are never emitted
        step = TreeStep(ancestors, lengths, self.cache.before(lengths), same)
        options: dict[str, Any] = {"logits_to_keep": wanted} if wanted < tokens.shape[1] and self._last_only else {}
        if self.tree:
            mask = step.placeholder() if self.cache.may_skip else step.packed()
            options |= {"attention_mask": mask, "mcsd_tree": step}
        else:
            options |= {"attention_mask": self._additive(step)}
        output = self.model(
            input_ids=tokens.clamp(0, self.vocab - 1),
            position_ids=positions.expand(tokens.shape),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        self.cache.may_skip = step.windows == self.cache.windows
        # the last layer may lie elsewhere
        hidden = None if self._states is None or self._states.last is None else self._states.last.to(self.device)
        return Outputs(output.logits.to(self.device), hidden)

    def _join(
        self, tokens: torch.Tensor, ancestors: torch.Tensor, depth: torch.Tensor, prefix: Prefix
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Prefix]:
        """The unread end of the prompts and the tree after it, as one tree."""
        assert self._unread is not None
        chain, self._unread = self._unread, None
        count = chain.shape[1]
        whole = torch.cat([chain, tokens], 1)
        depth = torch.cat([chain_depths(count, self.device).expand(*depth.shape[:-1], count), depth + count], -1)
        return whole, after_chain(ancestors, count), depth, prefix.back(count)

    def _no_hidden(self, batch: int) -> torch.Tensor:
        """`[batch, 0, hidden]`: prompts of one token leave nothing to read."""
        shape = output_shape(self.model)
        assert shape is not None, "hidden states are what a head reads"
        return torch.empty(batch, 0, shape[1], dtype=hidden_dtype(self.model), device=self.device)

    def _additive(self, step: TreeStep) -> torch.Tensor:
        """A float mask, which eager attention and SDPA both take; eager adds a bool one as if it were 0 and 1."""
        mask = step.mask(self.cache.used)
        dtype = self.model.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask.expand(step.prefix_lengths.shape[0], -1, -1, -1)


def _layers(config: Any) -> list[Any]:
    """The layers of the cache that transformers would make, one for each layer of the model."""
    layers: list[Any] = DynamicCache(config=config).layers
    return layers
