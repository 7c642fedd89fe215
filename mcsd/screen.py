"""What a person sees: text as it is generated, the table at the end, a step's tree."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from .inspection import Node, Step
    from .pairs import Pair, Run
    from .profile import Profile
    from .stats import Stats

PHASES = ("prefill", "draft", "score", "verify", "keep", "other")
_REDRAW_SECONDS = 0.1
_NARROWEST = 3  # a character may take two columns
# what would move the cursor, ring, or rename the window; line ends and tabs stay
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def stderr() -> Console:
    """For everything that is not the result itself."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def stdout() -> Console:
    """For results that a person reads."""
    return Console(highlight=False, markup=False, emoji=False)


@contextmanager
def waiting(text: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line on a terminal while something is under way; it stands still but for what is said to be done."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield lambda done: None
        return
    with Live(Text(f"{text} ...", style="dim"), console=console, auto_refresh=False, transient=True) as live:
        drawn = time.perf_counter()

        def say(done: str) -> None:
            nonlocal drawn
            if time.perf_counter() - drawn > _REDRAW_SECONDS:
                live.update(Text(f"{text}: {done} ...", style="dim"), refresh=True)
                drawn = time.perf_counter()

        yield say


class Captures(logging.Handler):
    """What is said about captured graphs meanwhile, each line once, for when the screen is free; a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(logging.INFO)
        self._quiet = quiet
        self._log = logging.getLogger("mcsd.graphs")
        self._lines: dict[str, bool] = {}  # whether it has been told

    def __enter__(self) -> Captures:
        self._level = self._log.level
        self._log.addHandler(self)
        self._log.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self._log.removeHandler(self)
        self._log.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line down."""
        self._lines.setdefault(record.getMessage(), False)

    def tell(self) -> None:
        """Print what is new."""
        for line, told in self._lines.items():
            if not told and not self._quiet:
                stderr().print(line, style="dim", soft_wrap=True)
                self._lines[line] = True


class Progress:
    """Says what is being done: on a terminal a line with how much of it, else a line for each; a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = stderr()
        lively = self._console.is_terminal and not quiet
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if lively else None
        self._quiet, self._said = quiet, ""

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def report(self, what: str, done: int, of: int) -> None:
        """Say it."""
        if self._live:
            self._live.update(Text(f"{what}: {done} of {of} ...", style="dim"), refresh=True)
        elif not self._quiet and what != self._said:
            self._console.print(f"{what} ...", style="dim", markup=False, soft_wrap=True)
        self._said = what


class Detokenizer:
    """Turns tokens into text one at a time; a character in pieces is held back until it is whole.

    Args:
        decode: tokens to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        # what a token adds depends on the one before it: [start, shown) is decoded again with the new ones
        self._start = self._shown = 0

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._tokens.append(token)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text

    def rest(self) -> str:
        """What was held back."""
        text = self._new()
        self._start = self._shown = len(self._tokens)
        return text

    def _new(self) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        return self._decode(self._tokens[self._start :])[len(before) :]


class Stream:
    """Shows text while it is generated: as it comes on a pipe, above a line of progress on a terminal.

    A context manager, and a streamer for `mcsd.generate`.

    Args:
        decode: tokens to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.seconds = 0.0
        self._detokenizer = Detokenizer(decode)
        self._prompt_seen = False
        self._line, self._status = "", ""
        self._drawn = 0.0
        self._begin = time.perf_counter()
        self._console = stdout()
        self._on_terminal = sys.stdout.isatty()
        lively = self._on_terminal and os.environ.get("TERM") != "dumb"
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if lively else None

    def __enter__(self) -> Stream:
        if self._live:
            self._live.start()
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.update(Text(""))
            self._live.stop()
            self._console.print(Text(self._line))
        else:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def put(self, value: Any) -> None:
        """The prompt, which is not shown, and then every token."""
        start = time.perf_counter()
        if self._prompt_seen:
            for token in value.tolist():
                self._show(self._detokenizer.push(token))
        self._prompt_seen = True
        self.seconds += time.perf_counter() - start

    def end(self) -> None:
        """No more tokens."""
        start = time.perf_counter()
        self._show(self._detokenizer.rest())
        self._draw()
        self.seconds += time.perf_counter() - start

    def progress(self, stats: Stats) -> None:
        """Called after every step."""
        start = time.perf_counter()
        speed = stats.tokens / (start - self._begin)
        self._status = f"{stats.tokens} tokens · {stats.tokens_per_call:.2f} per target call · {speed:.1f} tokens/s"
        if start - self._drawn > _REDRAW_SECONDS:
            self._draw()
        self.seconds += time.perf_counter() - start

    def _show(self, text: str) -> None:
        if self._on_terminal:
            text = text.translate(_CONTROLS)
        if not self._live:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        # only the last line of the text is redrawn, so the text may be longer than the screen
        whole: list[str] = []
        *ended, self._line = (self._line + text).split("\n")
        for line in ended:
            whole += self._wrapped(line)
        *pieces, self._line = self._wrapped(self._line)
        whole += pieces
        if whole:
            self._live.update(self._region(), refresh=True)
            for line in whole:
                self._console.print(Text(line))

    def _wrapped(self, line: str) -> list[str]:
        """A line in pieces that fit the screen."""
        pieces = []
        width = max(self._console.width, _NARROWEST)
        while cell_len(line) >= width:
            first = chop_cells(line, width - 1)[0]
            cut = first.rfind(" ") + 1 or len(first)
            pieces.append(line[:cut])
            line = line[cut:]
        return [*pieces, line]

    def _region(self) -> Group:
        return Group(Text(self._line), Text(self._status, style="dim", no_wrap=True, overflow="ellipsis"))

    def _draw(self) -> None:
        if self._live:
            self._live.update(self._region(), refresh=True)
            self._drawn = time.perf_counter()


def header(pair: Pair, threads: int, tree: bool) -> list[str]:
    """What runs, in a few lines; `tree`: with the tree, and how it is drawn and verified."""
    where = f"{pair.device}, {threads} thread{'s' * (threads != 1)}" if pair.device.type == "cpu" else str(pair.device)
    lines = [
        f"target {pair.settings.target} · draft {pair.draft_name} · {pair.dtype} on {where}",
        (f"tree {pair.tree} · proposal {pair.drafter.proposal} · rule {pair.settings.chosen_rule} · " if tree else "")
        + f"temperature {pair.settings.temperature:g}",
    ]
    if pair.dtype != "float32" and pair.settings.temperature == 0:
        lines.append(f"{pair.dtype} does not promise the tokens of plain greedy decoding; --dtype float32 does")
    return lines


def summary(run: Run) -> Table:
    """One generation in numbers, with plain decoding beside it."""
    stats, plain = run.stats, run.plain
    table = Table(show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("mcsd", justify="right")
    if plain:
        table.add_column("plain decoding", justify="right")

    def row(name: str, value: str, beside: str = "") -> None:
        table.add_row(name, value, *([beside] if plain else []))

    count = str(len(plain.tokens)) if plain else ""
    row("tokens", str(stats.tokens), count)
    row("target calls", str(stats.target_calls), count)
    row("tokens per call", f"{stats.tokens_per_call:.2f}", "1.00")
    row("accepted by depth", "  ".join(f"{share:.0%}" for share in stats.acceptance_by_depth) or "-")
    row("seconds", f"{run.seconds:.2f}", f"{plain.seconds:.2f}" if plain else "")
    for phase in PHASES:
        if phase in stats.seconds:
            share = stats.seconds[phase] / run.seconds if run.seconds else 0.0
            row(f"  {phase}", f"{stats.seconds[phase]:.2f}  {share:4.0%}")
    row("tokens/s", f"{run.speed:.1f}", f"{run.plain_speed:.1f}" if run.plain_speed else "")
    if run.speedup:
        row("speed", f"{run.speedup:.2f} ×", "1.00 ×")
    return table


def complaints(run: Run) -> list[str]:
    """Why a text is shorter than it should be."""
    from mcsd_kernels import Status

    lines = ["interrupted"] if run.stats.interrupted else []
    met = Status(run.stats.status[0]) if run.stats.status else Status(0)
    if met:
        lines.append(f"not all could be verified: {', '.join(bit.name or '' for bit in Status if bit in met)}")
    return lines


def bench_table(rows: list[dict[str, Any]]) -> Table:
    """One line a prompt, and the total."""
    table = Table(show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("prompt", max_width=24)
    for name in ("tokens", "per call", "tokens/s", "plain tokens/s", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row["prompt"] is None:
            table.add_section()
        table.add_row(
            "all" if row["prompt"] is None else row["prompt"],
            str(row["tokens"]),
            f"{row['tokens_per_call']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['plain_tokens_per_second']:.1f}",
            f"{row['speedup']:.2f} ×",
        )
    return table


_MARKS = {"accepted": ("✓", "bold green"), "rejected": ("✗", "red"), "untested": ("·", "dim"), "missing": ("-", "dim")}
_SOURCES = {
    "bonus": "nothing was left to test, so it comes from p",
    "residual": "all candidates were rejected, so it comes from what they left of p",
    "placeholder": "the target's numbers are unusable",
}


def step_tree(step: Step, coins: bool = False) -> Tree:
    """One step's tree: every candidate with its probabilities and what became of it."""

    def label(node: Node) -> Text:
        mark, style = _MARKS[node.verdict]
        text = Text(f"{mark} {quoted(node.text)}" if node.token >= 0 else f"{mark} no candidate", style=style)
        text.append(f"  p {node.p:.3f}" + ("" if node.q is None else f"  q {node.q:.3f}"), style="dim")
        if coins:
            text.append(f"  u {node.coin:.3f}", style="dim")
        return text

    root = Tree(Text(f"step {step.number}  after {quoted(step.nodes[0].text)}", style="bold"))
    branches = {0: root}
    for node in step.nodes[1:]:
        if node.parent in branches:
            branches[node.id] = branches[node.parent].add(label(node))
    last = Text(f"→ {quoted(step.last.text)}", style="bold cyan")
    last.append(f"  p {step.last.p:.3f}  {_SOURCES[step.last.source]}", style="dim")
    branches[step.path[-1]].add(last)
    return root


def step_line(step: Step) -> Text:
    """One step in a line."""
    accepted, offered = len(step.path) - 1, sum(node.token >= 0 for node in step.nodes[1:])
    word = "token" if len(step.tokens) == 1 else "tokens"
    return Text(f"  {accepted} of {offered} candidates accepted, {len(step.tokens)} {word}: {quoted(step.text)}")


def diagnostics_table(summary: dict[str, Any]) -> Table:
    """What was overlapping, accepted and possible at each depth."""
    table = Table(show_edge=False, pad_edge=False, header_style="dim")
    for name in ("depth", "visits", "Σ min(p, q)", "accepted", "expected", "α* with", "α* without"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["by_depth"]:
        shares = [row[name] for name in ("overlap", "accepted", "expected", "optimum_with", "optimum_without")]
        table.add_row(str(row["depth"]), str(row["visits"]), *("-" if x is None else f"{x:.3f}" for x in shares))
    return table


def diagnostics_line(summary: dict[str, Any]) -> str:
    """The whole recording in a line."""
    calls = f"{summary['steps']} target call{'s' * (summary['steps'] != 1)}"
    return (
        f"{calls}, {summary['tokens_per_call']:.2f} tokens per call, MCSD's acceptance rate "
        f"{summary['mcsd_acceptance_rate']:.2f} (accepted candidates over target calls times the tree's depth); "
        "expected: of the recursive rule, given the candidates; α*: what no lossless rule exceeds, drawing with "
        "replacement and without"
    )


_SHORT = {"without_replacement": "without repl.", "with_replacement": "with repl."}


def profile_table(profile: Profile) -> Table:
    """The trees that were measured, the fastest first; * is made by hand."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("tree", "nodes", "proposal", "rule", "per call", "tokens/s", "predicted"):
        table.add_column(name, justify="left" if name in ("tree", "proposal", "rule") else "right", no_wrap=True)
    for row in sorted(profile.shapes, key=lambda row: -row["tokens_per_second"]):
        name = ",".join(map(str, row["branching"])) if row["branching"] else f"depth {row['depth']}"
        predicted = row["predicted_tokens_per_second"]
        table.add_row(
            name + ("*" if row["hand_made"] else ""),
            str(row["nodes"]),
            _SHORT.get(row["proposal"], row["proposal"]),
            row["rule"],
            f"{row['tokens_per_call']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            "" if predicted is None else f"{predicted:.1f}",
        )
    table.add_row("plain decoding", "1", "", "", "1.00", f"{profile.plain_tokens_per_second:.1f}", "")
    return table


def profile_line(profile: Profile) -> str:
    """What was chosen."""
    plain = profile.plain_tokens_per_second
    speed = f", {profile.tokens_per_second / plain:.2f} × plain decoding" if plain else ""
    return (
        f"chosen: {len(profile.parents) - 1} candidates, {profile.proposal}, {profile.rule}: "
        f"{profile.tokens_per_second:.1f} tokens/s{speed}"
    )


def quoted(text: str) -> str:
    """Text with its blanks and line ends visible."""
    return json.dumps(text, ensure_ascii=False).translate(_CONTROLS)


def doctor_table(facts: dict[str, Any]) -> Table:
    """What `mcsd doctor` found."""
    table = Table(show_header=False, show_edge=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(_words(value)))
    return table


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return "not installed" if value is None else str(value)
