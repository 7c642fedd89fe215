"""A target and its drafter as the command line runs them: loading, generation, plain decoding beside it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from mcsd_kernels import SamplingParams, Verified

from .adaptive import AdaptiveDrafter
from .bundled import BUNDLED_DRAFTS, DEFAULT_TARGET
from .decode import Generation, drafter_for, generate
from .draft_model import load_draft
from .drafters import Drafter, LevelDrafter, NgramDrafter, Proposal, State
from .models import load_target
from .plain import plain_decoding
from .settings import DEFAULT_BRANCHING, NGRAM, OTHER_BRANCHING, Settings
from .stats import Stats
from .step import pack
from .trees import StaticTree


class Watcher(Protocol):
    """Someone who looks on while text is generated."""

    seconds: float
    """Time spent looking on, which is no time of decoding."""

    def put(self, value: torch.Tensor) -> None:
        """The prompt, `[1, length]`, then every token, `[1]`."""

    def end(self) -> None:
        """No more tokens."""

    def progress(self, stats: Stats) -> None:
        """Called after every step."""


@dataclass
class Plain:
    """Plain decoding of the same number of tokens by transformers' own `generate`."""

    tokens: list[int]
    text: str
    seconds: float


@dataclass
class Run:
    """One prompt's continuation and what it cost.

    Args:
        prompt: as it was given.
        seed: of this prompt.
        tokens: the continuation.
        text: the same, without special tokens.
        stats: of the generation. Where several prompts shared it, the prompt's own: a target call is one that it took
            part in; but `Stats.seconds` are of all.
        seconds: of the whole generation, without the time that the screen took.
        plain: plain decoding beside it, if asked for.
        batch_size: prompts that shared the generation. The speeds of its runs add up to that of the whole.
    """

    prompt: str
    seed: int
    tokens: list[int]
    text: str
    stats: Stats
    seconds: float
    plain: Plain | None = None
    batch_size: int = 1

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.stats.tokens / self.seconds if self.seconds else 0.0

    @property
    def plain_speed(self) -> float | None:
        """Tokens per second of plain decoding."""
        return len(self.plain.tokens) / self.plain.seconds if self.plain and self.plain.seconds else None

    @property
    def speedup(self) -> float | None:
        """Speed over that of plain decoding."""
        return self.speed / self.plain_speed if self.plain_speed else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        stats = self.stats.as_dict()
        del stats["tokens_per_second"]
        row: dict[str, Any] = {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "seed": self.seed,
            "seconds": round(self.seconds, 6),
            "tokens_per_second": round(self.speed, 3),
            "batch_size": self.batch_size,
            "stats": stats,
        }
        if self.plain:
            row["plain"] = {
                "text": self.plain.text,
                "tokens": self.plain.tokens,
                "seconds": round(self.plain.seconds, 6),
                "tokens_per_second": round(self.plain_speed or 0.0, 3),
            }
            row["speedup"] = round(self.speedup, 4) if self.speedup else None
        return row


class TooManyTogether(RuntimeError):
    """A batch does not fit in memory."""


class _Requests:
    """Takes down what became of each request of a batch; an observer and a callback of `generate`."""

    def __init__(self, count: int) -> None:
        self.active = [True] * count
        self.texts: list[list[int]] | None = None
        self._steps: list[tuple[list[bool], torch.Tensor]] = []

    def observe(self, state: State, tree: Proposal, logits: torch.Tensor, verified: Verified) -> None:
        """A step, which is read at the end: to read it now would wait for the device."""
        self._state, self.texts = state, state.sequences
        self._steps.append((list(state.active), pack(verified, tree)))

    def stepped(self) -> None:
        """The step is over."""
        self.active = list(self._state.active)

    def stats(self, shared: Stats) -> list[Stats]:
        """Each request's own, but for the seconds."""
        found = [Stats(seconds=shared.seconds, status=[bits]) for bits in shared.status]
        for active, packed in self._steps:
            for stats, was_active, (length, _, more, *_) in zip(found, active, packed.tolist(), strict=True):
                if was_active:
                    stats.target_calls += 1
                    stats.request_calls += 1
                    stats.count(length - 1, length - 1 + more)
        for stats, active_still in zip(found, self.active, strict=True):
            stats.interrupted = shared.interrupted and active_still
        return found


class Pair:
    """A target, its tokenizer and a drafter, with the settings of a run.

    Args:
        settings: what was asked for.
        graphs: as for `mcsd.generate`.

    Raises:
        ValueError: something does not exist or does not fit.
    """

    def __init__(self, settings: Settings, graphs: bool | None = None) -> None:
        self.settings, self.graphs = settings, graphs
        self.device = resolve_device(settings.device)
        SamplingParams(**self.sampling())  # refuses what is out of range before anything is loaded
        with quiet_transformers(), loading("target", settings.target):
            self.target, self.tokenizer = load_target(settings.target, dtype=settings.dtype, device=self.device)
        self.draft_name = settings.chosen_draft
        draft: PreTrainedModel | Drafter | str = NGRAM
        if self.draft_name != NGRAM:
            with quiet_transformers(), loading("draft", self.draft_name):
                draft = load_draft(self.draft_name, self.target, tokenizer=self.tokenizer)
        slow = self.device.type == "cpu" and self.draft_name in BUNDLED_DRAFTS
        branching = settings.factors or (DEFAULT_BRANCHING if slow else OTHER_BRANCHING)
        proposal = settings.proposal.value if settings.proposal else None
        if settings.tuned is not None and isinstance(draft, str):
            raise ValueError(f"profile: expected a draft model beside it, got draft = {self.draft_name}")
        parents = settings.tuned.parents if settings.tuned else None
        self.drafter: Drafter
        if settings.adaptive and settings.tuned:
            assert not isinstance(draft, str), "refused above"
            greedy = "point" if settings.temperature == 0 else None
            self.drafter = AdaptiveDrafter(draft, settings.tuned, proposal=proposal or greedy)
        else:
            self.drafter = drafter_for(self.target, draft, branching, proposal, "auto", settings.temperature, parents)
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if settings.chat and not has_template:
            raise ValueError(f"chat: {settings.target} has no chat template; use --raw")
        self.chat = has_template if settings.chat is None else settings.chat

    @property
    def dtype(self) -> str:
        """Name of the target's dtype."""
        return str(self.target.dtype).removeprefix("torch.")

    @property
    def tree(self) -> str:
        """The shape of the trees, in words."""
        if isinstance(self.drafter, (LevelDrafter, AdaptiveDrafter)):
            shape = StaticTree.of(self.drafter.parents)
            name = ",".join(map(str, self.drafter.branching or ())) or "of the profile"
            most = "at most " if isinstance(self.drafter, AdaptiveDrafter) else ""
            return f"{name} ({most}{shape.nodes - 1} candidates, depth {shape.depth})"
        if isinstance(self.drafter, NgramDrafter):
            return f"up to {self.drafter.nodes - 1} candidates, depth {self.drafter.depth}"
        return "the drafter's own"

    def describe(self) -> dict[str, Any]:
        """What a result depends on besides the prompt and the seed, for JSON."""
        settings = self.settings
        branching = getattr(self.drafter, "branching", None)
        if isinstance(self.drafter, NgramDrafter):
            branching = (self.drafter.continuations,)
        return {
            "target": settings.target,
            "draft": self.draft_name,
            "dtype": self.dtype,
            "device": str(self.device),
            "branching": list(branching or ()) or None,
            "parents": list(settings.tuned.parents) if settings.tuned else None,
            "adaptive": isinstance(self.drafter, AdaptiveDrafter),
            "ladder": self.drafter.ladder.digest if isinstance(self.drafter, AdaptiveDrafter) else None,
            "proposal": self.drafter.proposal,
            "rule": settings.chosen_rule,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "max_new_tokens": settings.max_new_tokens,
            "chat": self.chat,
        }

    def encode(self, prompt: str) -> torch.Tensor:
        """`[1, length]` int64 on the target's device.

        Raises:
            ValueError: no token comes of it, it is no Unicode, or there is nothing to answer.
        """
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes of another encoding
            raise ValueError(f"prompt: expected text in Unicode, got {prompt!r}")
        if self.chat:
            if not prompt.strip():
                raise ValueError(f"prompt: expected some text, got {prompt!r}")
            messages = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        if not ids:
            raise ValueError(f"prompt: expected at least one token, got {prompt!r}")
        return torch.tensor([ids], device=self.device)

    def decode(self, tokens: list[int], special: bool = False) -> str:
        """Text of tokens; `special`: with the special ones."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text

    def sampling(self) -> dict[str, Any]:
        """Temperature and filters, as `generate` takes them."""
        settings = self.settings
        return {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "min_p")}

    def run(self, prompt: str, *, seed: int | None = None, watcher: Watcher | None = None) -> Run:
        """Continue a prompt; interrupted from the keyboard, the result holds what there is.

        Args:
            prompt: text.
            seed: None: the settings'.
            watcher: sees text and progress.
        """
        ids = self.encode(prompt)
        seed = self.settings.seed if seed is None else seed
        watched = watcher.seconds if watcher else 0.0
        callback: Callable[[Stats], None] | None = watcher.progress if watcher else None
        start = time.perf_counter()
        generation = self._generate(ids, torch.ones_like(ids), seed=seed, streamer=watcher, callback=callback)
        tokens = generation.sequences[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - start
        stats = generation.stats
        if watcher:
            watched = watcher.seconds - watched
            seconds -= watched
            stats.seconds["other"] = max(stats.seconds.get("other", 0.0) - watched, 0.0)
        return Run(prompt, seed, tokens, self.decode(tokens), stats, seconds)

    def run_together(
        self, prompts: Sequence[str], seeds: Sequence[int], callback: Callable[[Stats], None] | None = None
    ) -> list[Run]:
        """Continue prompts in one generation; interrupted, the runs that were under way hold what there is.

        Args:
            prompts: texts.
            seeds: one each.
            callback: called with the running `Stats` of all after every step.

        Raises:
            ValueError: as `encode`.
            TooManyTogether: they do not fit in memory together.
        """
        rows = [self.encode(prompt)[0] for prompt in prompts]
        ids, mask = (pad_sequence(some, batch_first=True) for some in (rows, [torch.ones_like(row) for row in rows]))
        requests = _Requests(len(rows))

        def stepped(stats: Stats) -> None:
            requests.stepped()
            if callback is not None:
                callback(stats)

        start = time.perf_counter()
        try:
            shared = self._generate(ids, mask, seed=seeds, callback=stepped, observer=requests.observe).stats
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
            if len(rows) == 1 or not out_of_memory:
                raise
            raise TooManyTogether(
                f"batch_size: {len(rows)} prompts do not fit in memory together, ask for fewer ({_first_line(error)})"
            ) from error
        seconds = time.perf_counter() - start
        texts = requests.texts or [row.tolist() for row in rows]
        runs = []
        for prompt, seed, row, text, stats in zip(prompts, seeds, rows, texts, requests.stats(shared), strict=True):
            tokens = text[len(row) :]
            stats.tokens = len(tokens)
            runs.append(Run(prompt, seed, tokens, self.decode(tokens), stats, seconds, batch_size=len(rows)))
        return runs

    def compare(self, run: Run) -> None:
        """Put plain decoding of as many tokens beside a run, unless the user wants to leave."""
        if run.stats.interrupted:
            return
        try:
            run.plain = self.plain(self.encode(run.prompt), len(run.tokens), run.seed)
        except KeyboardInterrupt:
            run.stats.interrupted = True

    def plain(self, ids: torch.Tensor, count: int, seed: int = 0) -> Plain:
        """Decode exactly `count` tokens with transformers' own `generate`, under the same sampling settings."""
        with quiet_transformers():
            start = time.perf_counter()
            sequences = plain_decoding(self.target, ids, count, self.sampling(), seed)
            tokens = sequences[0, ids.shape[1] :].tolist()
            seconds = time.perf_counter() - start
        return Plain(tokens, self.decode(tokens), seconds)

    def warm_up(self, ids: torch.Tensor, tokens: int = 4) -> None:
        """A few tokens of both kinds of decoding, so that neither is charged for what only happens once."""
        tokens = min(tokens, self.settings.max_new_tokens)
        generation = self._generate(ids, torch.ones_like(ids), max_new_tokens=tokens)
        if generation.stats.interrupted:
            raise KeyboardInterrupt
        self.plain(ids, tokens)

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Generation:
        options = {"max_new_tokens": self.settings.max_new_tokens, **self.sampling(), **options}
        rule = self.settings.chosen_rule
        return generate(self.target, self.drafter, ids, mask, rule=rule, graphs=self.graphs, **options)


def resolve_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # RuntimeError: a name that torch does not know, or no such device; AssertionError: a build without CUDA or XPU;
    # ImportError: a kind of device that a package of its own would bring ("hpu")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device: expected one that this machine has, got {name!r} ({_first_line(error)})") from None
    return device


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside this context."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading(role: str, name: str) -> Iterator[None]:
    """Say which model an error is about."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).expanduser().is_dir():
        raise ValueError(f"{role}: expected a model's folder, {name} does not exist")
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        known = (DEFAULT_TARGET,) if role == "target" else (*BUNDLED_DRAFTS, NGRAM)
        where = f"no such folder, no name known here ({', '.join(known)}), and not to be had from the model hub: "
        if name in known or os.path.isdir(name):
            where = ""
        raise ValueError(f"{role}: cannot load {name}: {where}{_first_line(error)}") from error
    except ValueError as error:
        if re.match(r"[a-z_]+: ", str(error)):  # one of ours, which names its argument
            raise
        raise ValueError(f"{role}: cannot load {name}: {_first_line(error)}") from error
    except (RuntimeError, ImportError):  # what is missing on this machine, in words of its own
        raise
    except Exception as error:  # a configuration may fail in any way
        raise ValueError(f"{role}: cannot load {name}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
