"""Text that the target writes itself, stored with the hidden states that its output head read."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..hidden import HiddenStates, why_not
from ..placement import text_limit
from .files import write_whole
from .prompts import user_turn

SHARD = "text-{:05d}.safetensors"
_TURNS = 1000  # of the templates, which say how long a start is
_MARK = "\u2063user\u2063"


@dataclass
class Stream:
    """One text in the making.

    Args:
        tokens: so far.
        written: how many of them, at the front, the target did not write.
        group: a hash of its prompt; texts of one prompt are all trained on or all held out.
        temperature: at which it is sampled.
        ends: tokens that end the turn being written.
        then: tokens that follow the user's turn, once; empty: the text ends with its turn.
    """

    tokens: list[int]
    written: int
    group: int
    temperature: float
    ends: frozenset[int]
    then: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    scale: list[torch.Tensor] = field(default_factory=list)


class Prompter:
    """The starts of the streams: half are requests from templates, half leave the user's turn to the target, too.

    A tokenizer without a chat template gives streams that start at its first special token, or at a random token.

    Args:
        tokenizer: of the target.
        vocab: size of the target's vocabulary.
        eos: the target's end-of-sequence tokens.
        requests: user turns to take instead of the templates'.
        cool: the share of streams sampled at temperature 0.7 instead of 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab: int,
        eos: Sequence[int] = (),
        requests: Sequence[str] = (),
        cool: float = 0.2,
    ) -> None:
        self.tokenizer, self.vocab, self.requests, self.cool = tokenizer, vocab, requests, cool
        self.eos = frozenset(eos)
        self.chat = tokenizer is not None and bool(tokenizer.chat_template)
        if self.chat:
            before, after = self._render(_MARK).split(_MARK)
            self.head, self.tail = self._encode(before), self._encode(after)

    def stream(self, seed: int) -> Stream:
        """The start of stream number `seed`."""
        temperature = 0.7 if seed // 2 * 61 % 100 < 100 * self.cool else 1.0
        if not self.chat:
            first = self.tokenizer.bos_token_id if self.tokenizer is not None else None
            start = [seed * 7919 % self.vocab if first is None else first]
            return Stream(start, 1, zlib.crc32(str(seed).encode()), temperature, self.eos)
        if seed % 2:
            # the first token after the user's text ends that text, whatever it is called
            ends = self.eos | {self.tail[0]}
            group = zlib.crc32(str(seed).encode())
            return Stream(list(self.head), len(self.head), group, temperature, ends, list(self.tail))
        text = self.requests[seed // 2 % len(self.requests)] if self.requests else user_turn(seed)
        tokens = self._encode(self._render(text))
        return Stream(tokens, len(tokens), zlib.crc32(text.encode()), temperature, self.eos | {self.tail[0]})

    @cached_property
    def longest_start(self) -> int:
        """Tokens of the longest start of a stream; of the templates' turns some are looked at."""
        if not self.chat:
            return 1
        texts = self.requests or [user_turn(seed) for seed in range(_TURNS)]
        return max(len(self._encode(self._render(text))) for text in texts)

    def _render(self, text: str) -> str:
        assert self.tokenizer is not None
        rendered: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return rendered

    def _encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def check_longest(target: PreTrainedModel, prompter: Prompter, longest: int) -> None:
    """Refuse texts that are longer than the target's positions.

    Raises:
        ValueError: a start with `longest` tokens behind it does not fit.
    """
    positions, start = text_limit(target), prompter.longest_start
    if positions and start + longest > positions:
        raise ValueError(
            f"longest: expected at most {max(positions - start, 0)}, which behind a start of {start} tokens fit the "
            f"target's {positions} positions, got {longest}"
        )


def write_text(
    target: PreTrainedModel,
    prompter: Prompter,
    folder: Path,
    *,
    tokens: int,
    batch: int = 64,
    longest: int = 256,
    user_longest: int = 120,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Let the target write, and store what it wrote, a file for each batch of streams.

    A file that is there already counts and is not written again; a batch's random numbers depend on its number alone.

    Args:
        target: the model; its logits must be a linear map of its last hidden states.
        prompter: where the streams start.
        folder: of the files.
        tokens: stop when at least so many positions are stored.
        batch: streams that are written together; those that end early are dropped from the batch.
        longest: tokens that a stream is written on for, see `check_longest`; fewer where positions end.
        user_longest: of a user's turn.
        seed: of the random numbers and of the streams.
        progress: called with the number of positions of each file.

    Returns:
        The number of positions stored.

    Raises:
        ValueError: the target's hidden states cannot be read, its logits are no linear map of them, or `longest` does
            not fit its positions.
    """
    if reason := why_not(target):
        raise ValueError(f"target: {reason}")
    _check_linear(target)
    check_longest(target, prompter, longest)
    folder.mkdir(parents=True, exist_ok=True)
    count = number = 0
    while count < tokens:
        path = folder / SHARD.format(number)
        if path.exists():
            stored = int(load_file(path)["lengths"].sum())
        else:
            first = (seed * 1_000_003 + number) * batch
            streams = [prompter.stream(first + i) for i in range(batch)]
            random = torch.Generator().manual_seed(first)
            content = _pack(_write(target, streams, longest, user_longest, random))
            write_whole(path, lambda partial, content=content: save_file(content, partial))  # type: ignore[misc]
            stored = int(content["lengths"].sum())
        if stored == 0:
            raise ValueError("target: its streams end with their first token; nothing can be learnt from them")
        count, number = count + stored, number + 1
        progress(stored)
    return count


@torch.inference_mode()
def _write(
    target: PreTrainedModel, streams: list[Stream], longest: int, user_longest: int, random: torch.Generator
) -> list[Stream]:
    """One batch, left-padded, from its prompts to the end of its last stream."""
    device = target.get_input_embeddings().weight.device
    width = max(len(stream.tokens) for stream in streams)
    ids = torch.tensor([[0] * (width - len(s.tokens)) + s.tokens for s in streams], device=device)
    pad = torch.tensor([width - len(s.tokens) for s in streams], device=device)
    cache = DynamicCache(config=target.config)
    limit = min(width + longest, text_limit(target) or width + longest)
    active, done = list(streams), list[Stream]()
    rows = torch.arange(len(streams), device=device)
    with HiddenStates(target) as states:
        for at in range(width, limit + 1):
            new = ids.shape[1]
            slots = torch.arange(at, device=device)
            mask = (slots >= pad[:, None]).long()
            positions = (slots[-new:] - pad[:, None]).clamp(min=0)
            options: dict[str, Any] = {"position_ids": positions} if _takes_positions(target) else {}
            target(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
            assert states.last is not None
            hidden = states.last
            if new > 1:
                for stream, row, blank in zip(active, hidden, pad.tolist(), strict=True):
                    _store(target, stream, row[blank:-1])
            chosen = _store_and_draw(target, active, hidden[:, -1], random)
            running = [
                _append(stream, token, user_longest) and at < limit
                for stream, token in zip(active, chosen, strict=True)
            ]
            done += [stream for stream, on in zip(active, running, strict=True) if not on]
            rows = torch.tensor([i for i, on in enumerate(running) if on], dtype=torch.long, device=device)
            active = [stream for stream, on in zip(active, running, strict=True) if on]
            if not active:
                break
            if len(rows) < len(running):
                cache.batch_select_indices(rows)
                pad = pad[rows]
            ids = torch.tensor([[stream.tokens[-1]] for stream in active], device=device)
    return done


def _append(stream: Stream, token: int, user_longest: int) -> bool:
    """Add a token, or one of those that must follow; returns whether the stream goes on."""
    if stream.pending:
        stream.tokens.append(stream.pending.pop(0))
        return True
    turn_ends = token in stream.ends
    if stream.then and (turn_ends or len(stream.tokens) - stream.written >= user_longest):
        stream.pending, stream.then = stream.then, []
        stream.tokens.append(stream.pending.pop(0))
        return True
    if turn_ends:
        return False
    stream.tokens.append(token)
    return True


def _store(target: PreTrainedModel, stream: Stream, hidden: torch.Tensor) -> None:
    """Keep the hidden states `[rows, width]` and the log-sum-exp of the logits they give."""
    if hidden.shape[0]:
        stream.hidden.append(hidden.to("cpu", torch.bfloat16))
        stream.scale.append(_logits(target, hidden).logsumexp(-1).cpu())


def _store_and_draw(
    target: PreTrainedModel, streams: list[Stream], hidden: torch.Tensor, random: torch.Generator
) -> list[int]:
    """Keep the last hidden state of each stream, and draw the token that follows it."""
    logits = _logits(target, hidden)
    scale = logits.logsumexp(-1, keepdim=True).cpu()
    kept = hidden.to("cpu", torch.bfloat16)
    for row, stream in enumerate(streams):
        stream.hidden.append(kept[row : row + 1])
        stream.scale.append(scale[row])
    warmth = torch.tensor([stream.temperature for stream in streams], device=logits.device)
    law = (logits / warmth[:, None]).softmax(-1).cpu()
    coin = torch.rand(len(streams), 1, generator=random)
    total = law.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(total, coin.double() * total[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=law.shape[1] - 1).tolist()


def _logits(target: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """`[rows, vocab]` f32."""
    head = target.get_output_embeddings()
    return torch.nn.functional.linear(hidden, head.weight).float()


def _takes_positions(target: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(target.forward).parameters


@torch.inference_mode()
def _check_linear(target: PreTrainedModel) -> None:
    """Refuse a target that does more to its logits than multiply hidden states by its head's matrix."""
    embedding = target.get_input_embeddings().weight
    ids = torch.arange(min(8, embedding.shape[0]), device=embedding.device)[None]
    with HiddenStates(target) as states:
        logits = target(ids, use_cache=False).logits[0].float()
        assert states.last is not None
        linear = _logits(target, states.last[0])
    if not torch.allclose(logits, linear, atol=1e-3 * float(linear.abs().max()), rtol=0):
        raise ValueError(
            f"target: the logits of {type(target).__name__} are not its head's matrix times its hidden states "
            "(a bias, a scale or a soft-cap); distillation does not support it"
        )


def _pack(streams: list[Stream]) -> dict[str, torch.Tensor]:
    """The streams' tensors end to end; a last token that was never read is left out."""
    kept = [stream for stream in streams if sum(map(len, stream.hidden)) > stream.written]
    lengths = [sum(map(len, stream.hidden)) for stream in kept]
    tokens = [token for stream, length in zip(kept, lengths, strict=True) for token in stream.tokens[:length]]
    hidden = [rows for stream in kept for rows in stream.hidden]
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "hidden": torch.cat(hidden) if hidden else torch.zeros(0, 1, dtype=torch.bfloat16),
        "scale": torch.cat([s for stream in kept for s in stream.scale]) if kept else torch.zeros(0),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "written": torch.tensor([stream.written for stream in kept], dtype=torch.int32),
        "group": torch.tensor([stream.group for stream in kept]),
    }


@dataclass(frozen=True)
class Sample:
    """One stored text.

    Args:
        tokens: `[length]` int64.
        hidden: `[length, width]` bf16, after each token.
        scale: `[length]` f32, the log-sum-exp of the target's logits after each token.
        written: how many tokens at the front are not the target's own.
        group: hash of its prompt.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    scale: torch.Tensor
    written: int
    group: int


def read_text(path: Path) -> Iterator[Sample]:
    """The texts of one file."""
    stored = load_file(path)
    start = 0
    for length, written, group in zip(
        *(stored[name].tolist() for name in ("lengths", "written", "group")), strict=True
    ):
        part = slice(start, start + length)
        start += length
        yield Sample(stored["tokens"][part].long(), stored["hidden"][part], stored["scale"][part], written, group)
