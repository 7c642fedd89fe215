"""The command line: `mcsd generate`, `inspect`, `tune`, `plot`, `doctor` and `bench`."""

from __future__ import annotations

import inspect as python_inspect
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .settings import Settings

if TYPE_CHECKING:
    from .batch import Prompt, Share
    from .inspection import Step
    from .pairs import Pair, Run
    from .profile import Profile
    from .screen import Captures

FAILED, WRONG, INTERRUPTED = 1, 2, 130
BATCH_SIZE = 8

# Of several kinds, since what a draft gets right depends on the text.
BENCH_PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate into French: The train to the coast leaves at nine every morning.",
    "List five things to pack for a week in the mountains.",
    "Tell a short story about a lighthouse keeper who finds a letter.",
    "Summarise what a compiler does, for someone who has never programmed.",
    "What is 17 times 24? Show the steps.",
    "Write a polite email that asks for a deadline to be moved by two days.",
)

app = typer.Typer(
    name="mcsd",
    help="Lossless multi-candidate speculative decoding. Set MCSD_DEBUG=1 to see where an error comes from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"mcsd {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and nothing else.")]


def main() -> None:
    """Run the command line."""
    _mend_streams()
    app()


def _mend_streams() -> None:
    """Text that an encoding lacks becomes "?", and what has been closed takes anything, so that no work is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  stays open
        elif isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Settings`, after its own, and hand them over as `settings`."""
    hints = get_type_hints(Settings, include_extras=True)
    own = [
        parameter
        for name, parameter in python_inspect.signature(command, eval_str=True).parameters.items()
        if name != "settings"
    ]
    shared = [
        python_inspect.Parameter(
            field.name, python_inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Settings)
    ]

    @wraps(command)
    def with_settings(**options: Any) -> None:
        with _errors():
            settings = Settings(**{field.name: options.pop(field.name) for field in fields(Settings)})
            command(settings=settings, **options)

    parameters = [parameter.replace(kind=python_inspect.Parameter.KEYWORD_ONLY) for parameter in own] + shared
    with_settings.__signature__ = python_inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_settings


@contextmanager
def _errors() -> Iterator[None]:
    """A mistake becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("MCSD_DEBUG"):
            raise
        typer.echo(f"mcsd: error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        raise typer.Exit(WRONG) from None


@app.command()
@_with_settings
def generate(
    settings: Settings,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue or to answer.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run transformers' plain decoding beside it and compare the speed.")
    ] = False,
    batch_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='Prompts, one a line; in a .jsonl file objects with "prompt" and "id". Writes one JSON line for each.',
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Where --batch-file writes; prompts that are in there already are skipped. "
            "Under torchrun each process does its share.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts of --batch-file to decode together. No text depends on it in float32; in bfloat16 it may.",
            show_default=f"{BATCH_SIZE} or as many as fit in memory, 1 with --compare",
        ),
    ] = None,
    graphs: Annotated[
        bool | None,
        typer.Option(
            "--graphs/--no-graphs", help="Capture steps as CUDA graphs and replay them.", show_default="on CUDA"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Generate text: it streams, and a table at the end says what was accepted and how fast it was."""
    if (prompt is None) == (batch_file is None):
        raise ValueError("prompt: expected either PROMPT or --batch-file")
    if batch_file is None and output is not None:
        raise ValueError("output: only --batch-file writes to a file; redirect stdout instead")
    if batch_file is None and batch_size is not None:
        raise ValueError("batch_size: only --batch-file has several prompts to decode together")
    if compare and batch_size is not None and batch_size > 1:
        raise ValueError(f"batch_size: expected 1 beside --compare, which takes prompts in turn, got {batch_size}")
    if prompt is not None:
        _check_prompt(prompt, settings)
    from .batch import Share, check_output, read_prompts
    from .screen import Captures

    prompts = read_prompts(batch_file) if batch_file else []
    share = Share.of_environment() if prompts else Share()
    check_output(output, batch_file, share)
    if share.count > 1:
        settings = _on_own_device(settings, share.local)
        as_json = as_json or share.rank > 0  # one process talks
    pair = _load(settings, quiet=as_json, graphs=graphs)
    with Captures(quiet=share.rank > 0) as captures:
        if prompts:
            _batch(pair, prompts, output, batch_size, compare, share, captures, quiet=as_json)
        elif as_json:
            if compare:
                pair.warm_up(pair.encode(prompt or ""))
            run = pair.run(prompt or "")
            if compare:
                pair.compare(run)
            captures.tell()
            _print_json({**run.as_dict(), "settings": pair.describe(), "threads": _threads()})
            _leave(run)
        else:
            _interactive(pair, prompt or "", compare, captures)


def _check_prompt(prompt: str, settings: Settings) -> None:
    """Refuse before any model is loaded what has nothing to answer; text taken as it is depends on the tokenizer."""
    if settings.chat is not False and not prompt.strip():
        raise ValueError(f"prompt: expected some text, got {prompt!r}; --raw takes it as it is")


def _interactive(pair: Pair, prompt: str, compare: bool, captures: Captures) -> None:
    from .screen import Stream, complaints, stderr, summary, waiting

    console = stderr()
    if compare:
        with waiting("warming up"):
            pair.warm_up(pair.encode(prompt))
    with Stream(pair.decode) as stream:
        run = pair.run(prompt, watcher=stream)
    if compare:
        with waiting("plain decoding"):
            pair.compare(run)
    captures.tell()
    console.print()
    console.print(summary(run))
    if run.plain and pair.settings.temperature == 0:
        same = run.plain.tokens == run.tokens
        console.print("the tokens are those of plain decoding" if same else _difference(run), style="dim")
    elif run.plain:
        console.print("another text than plain decoding drew, from the same law", style="dim")
    if run.plain:
        console.print("one run of each, which other work disturbs; `mcsd bench` takes several prompts", style="dim")
    for line in complaints(run):
        console.print(line, style="yellow")
    _leave(run)


def _difference(run: Run) -> str:
    plain = run.plain.tokens if run.plain else []
    same = next((i for i, (a, b) in enumerate(zip(run.tokens, plain, strict=False)) if a != b), len(run.tokens))
    return f"the first {same} of {len(run.tokens)} tokens are those of plain decoding"


def _on_own_device(settings: Settings, local: int) -> Settings:
    """One GPU a process, where the device was left open."""
    import torch

    if settings.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return settings
    return replace(settings, device=f"cuda:{local % torch.cuda.device_count()}")


def _batch(
    pair: Pair,
    prompts: list[Prompt],
    output: Path | None,
    batch_size: int | None,
    compare: bool,
    share: Share,
    captures: Captures,
    quiet: bool,
) -> None:
    from .batch import Results
    from .pairs import TooManyTogether
    from .screen import complaints, stderr, waiting

    console = stderr()
    tokens = calls = 0
    seconds = plain_seconds = 0.0
    # the number of the GPU is not what a result depends on
    described = pair.describe() | {"device": pair.device.type, "seed": pair.settings.seed}
    with Results(output, prompts, described, share) as results:
        todo = results.todo
        done = sum(prompt.id in results.done for prompt in prompts)
        if not quiet and done:
            console.print(f"{done} of {len(prompts)} prompts are in {output} already", style="dim", markup=False)
        if compare and todo:
            with waiting("warming up", quiet):
                pair.warm_up(pair.encode(BENCH_PROMPTS[0]))
        size, first = batch_size or (1 if compare else BATCH_SIZE), 0
        while first < len(todo):
            some = todo[first : first + size]
            refused = {prompt.id: reason for prompt in some if (reason := _refusal(pair, prompt))}
            last = first + len(some)
            numbers = f"prompt {last}" if len(some) == 1 else f"prompts {first + 1} to {last}"
            with waiting(f"{numbers} of {len(todo)}", quiet) as say:
                try:
                    runs = _together(pair, [prompt for prompt in some if prompt.id not in refused], say)
                except TooManyTogether:
                    if batch_size:
                        raise
                    size = len(some) // 2
                    continue
                if compare:
                    for run in runs.values():
                        pair.compare(run)
            captures.tell()
            under_way = [prompt.id for prompt in some if prompt.id in runs and runs[prompt.id].stats.interrupted]
            for prompt in some:
                if prompt.id in refused:
                    results.write(prompt, {"prompt": prompt.text, "error": refused[prompt.id]})
                    _tell(f"id {prompt.id!r}: {refused[prompt.id]}")
                elif prompt.id not in under_way:
                    run = runs[prompt.id]
                    results.write(prompt, run.as_dict())
                    for line in complaints(run):
                        _tell(f"id {prompt.id!r}: {line}")
                    tokens, calls = tokens + run.stats.tokens, calls + run.stats.target_calls
                    seconds += run.seconds / run.batch_size
                    plain_seconds += run.plain.seconds if run.plain else 0.0
            if under_way:
                if not quiet:
                    _tell(f"interrupted at id {under_way[0]!r}; what was finished is written")
                raise typer.Exit(INTERRUPTED)
            first = last
        whole = results.finish()
    if not quiet and share.count > 1:
        said = f"{output} is complete" if whole else "the other processes have prompts left"
        console.print(said, style="dim", markup=False)
    if not quiet and todo:
        # plain decoding was of as many tokens
        beside = f" · {plain_seconds / max(seconds, 1e-9):.2f} × plain decoding" if plain_seconds else ""
        console.print(
            f"{len(todo)} prompt{'s' * (len(todo) != 1)} · {tokens} tokens · "
            f"{tokens / max(calls, 1):.2f} tokens per target call · {tokens / max(seconds, 1e-9):.1f} tokens/s"
            f"{f', up to {size} prompts together' if size > 1 else ''}{beside}",
            style="dim",
            soft_wrap=True,
        )
    # not before all is done: torchrun ends the others when one process fails
    if whole and (failed := [prompt.id for prompt in prompts if prompt.id in results.failed]):
        _tell(f"{len(failed)} of {len(prompts)} prompts failed, id {failed[0]!r} the first; their rows say why")
        raise typer.Exit(FAILED)


def _together(pair: Pair, prompts: list[Prompt], say: Callable[[str], None]) -> dict[str | int, Run]:
    """Runs by the id of their prompt, whose place in the file gives its seed."""
    if not prompts:
        return {}
    texts, seeds = [prompt.text for prompt in prompts], [pair.settings.seed + prompt.index for prompt in prompts]
    runs = pair.run_together(texts, seeds, lambda stats: say(f"{stats.tokens} tokens"))
    return {prompt.id: run for prompt, run in zip(prompts, runs, strict=True)}


def _refusal(pair: Pair, prompt: Prompt) -> str | None:
    """Why this one prompt of a file cannot be continued, whatever becomes of the others."""
    try:
        ids = pair.encode(prompt.text)
    except ValueError as error:
        return " ".join(str(error).split())
    from .placement import input_vocab, text_limit

    length, vocab = ids.shape[1], input_vocab(pair.target)
    if (largest := int(ids.max())) >= vocab:
        return f"prompt: token {largest} is none of the model's {vocab}"
    positions = text_limit(pair.target)
    new = pair.settings.max_new_tokens
    if new < positions < length + new:
        return f"prompt: {length} tokens and {new} new ones do not fit the model's {positions} positions"
    return None


def _tell(line: str) -> None:
    """A line on stderr that a person should see."""
    from .screen import stderr

    stderr().print(line, style="yellow", markup=False, soft_wrap=True)


@app.command()
@_with_settings
def inspect(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="The text to continue or to answer.")],
    steps: Annotated[int, typer.Option(min=1, help="How many target calls to show.")] = 1,
    coins: Annotated[bool, typer.Option("--coins", help="Show the uniform number of each test.")] = False,
    record: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write the diagnostics of each step as a JSON line, for `mcsd plot`."),
    ] = None,
    trees: Annotated[bool, typer.Option("--trees/--no-trees", help="Draw the trees, or the table alone.")] = True,
    as_json: AsJson = False,
) -> None:
    """Draw the trees of the first steps, and a table by depth of how good drafting and verification were.

    The trees show every candidate, what both models think of it, and what became of it. The table compares the overlap
    of the two laws, what was accepted, and the most that any lossless rule could accept of as many candidates.
    """
    _check_prompt(prompt, settings)
    if record is not None:
        from .batch import check_place

        check_place("record", record, "profile's", settings.profile)
    pair = _load(settings, quiet=as_json)
    from .diagnostics import Recorder
    from .inspection import inspect_steps

    with Recorder(pair.drafter.proposal, record, {"prompt": prompt, **pair.describe()}) as recorder:
        recorded, stats = inspect_steps(
            pair.target,
            pair.drafter,
            pair.encode(prompt),
            lambda tokens: pair.decode(tokens, special=True),
            steps=steps,
            rule=settings.chosen_rule,
            recorder=recorder,
            seed=settings.seed,
            max_new_tokens=settings.max_new_tokens,
            **pair.sampling(),
        )
    if as_json:
        shown = [step.as_dict() for step in recorded]
        settings_row = pair.describe()
        _print_json({"prompt": prompt, "settings": settings_row, "steps": shown, "diagnostics": recorder.summary()})
    elif recorded:
        _show_steps(recorded, recorder.summary(), trees, coins)
    if stats.interrupted:
        raise KeyboardInterrupt


def _show_steps(recorded: list[Step], summary: dict[str, Any], trees: bool, coins: bool) -> None:
    from .screen import diagnostics_line, diagnostics_table, stdout, step_line, step_tree

    console = stdout()
    for step in recorded if trees else ():
        console.print(step_tree(step, coins))
        console.print(step_line(step))
        console.print()
    if trees:
        console.print("✓ accepted  ✗ rejected  · never tested  → drawn at the end;  p target, q draft", style="dim")
        console.print()
    console.print(diagnostics_table(summary))
    console.print(diagnostics_line(summary), style="dim")


@app.command()
@_with_settings
def tune(
    settings: Settings,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Where to write the profile.")] = Path(
        "mcsd-profile.json"
    ),
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='Prompts of the kind you will have, one a line, or .jsonl objects with "prompt".',
            show_default="a few built-in ones",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="At most this many of them.")] = 16,
    nodes: Annotated[int, typer.Option(min=2, max=512, help="Of the largest tree considered, root included.")] = 32,
    depth: Annotated[int, typer.Option(min=1, max=32, help="Of the deepest.")] = 6,
    width: Annotated[int, typer.Option(min=1, max=64, help="Most children of a node.")] = 8,
    picture: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Draw tokens a second over tree size, as .svg, .png or .pdf.",
            show_default="beside the profile, if matplotlib is installed",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the tree with the most tokens a second for a pair on this machine, and write it as a profile.

    Measures which siblings are accepted at each depth and what forwards cost by tree size, searches all trees by
    dynamic programming, decodes with the best few, and takes the measured best. `mcsd generate --profile` uses it.
    Leave the machine alone meanwhile. --max-new-tokens is the length of each text, 64 to 128 being enough.
    """
    if settings.profile is not None or settings.branching is not None:
        raise ValueError("profile, branching: expected neither; tune chooses the tree")
    from .batch import check_output, read_prompts
    from .plots import check_picture, have_matplotlib, plot_profile

    check_output(output, prompt_file)
    if picture is not None:
        check_picture(picture)
    elif have_matplotlib():
        picture = output.with_suffix(".svg")
    if picture is not None and picture.resolve() == output.resolve():
        raise ValueError(f"output: expected another file than the picture's, got {output}")
    texts = [prompt.text for prompt in read_prompts(prompt_file)] if prompt_file else list(BENCH_PROMPTS)
    pair = _load(settings, quiet=as_json, tree=False)
    profile = _tuned(pair, texts[:prompts], nodes, depth, width, quiet=as_json)
    profile.save(output)
    if picture is not None:
        plot_profile(profile, picture)
    if as_json:
        from dataclasses import asdict

        _print_json(asdict(profile))
        return
    from .screen import profile_line, profile_table, stdout

    console = stdout()
    console.print(profile_table(profile))
    console.print(profile_line(profile))
    drawn = f", drawn in {picture}" if picture is not None else "; pip install 'mcsd[plots]' for a picture"
    said = f"written to {output}{drawn}; use it with --profile {output}"
    console.print(said, style="dim", soft_wrap=True, markup=False)


def _tuned(pair: Pair, texts: list[str], nodes: int, depth: int, width: int, quiet: bool) -> Profile:
    from .drafters import ModelDrafter
    from .screen import Progress
    from .tune import tune as search

    settings = pair.settings
    proposals = [settings.proposal.value] if settings.proposal else None
    draft: Any = pair.drafter
    if type(draft) is ModelDrafter and draft.shared_vocab is None:
        draft = draft.model
    with Progress(quiet) as progress:
        return search(
            pair.target,
            draft,
            [pair.encode(text) for text in texts],
            nodes=nodes,
            depth=depth,
            width=width,
            tokens=settings.max_new_tokens,
            proposals=proposals,
            seed=settings.seed,
            names={"target": settings.target, "draft": pair.draft_name},
            report=progress.report,
            **pair.sampling(),
        )


@app.command()
def plot(
    source: Annotated[Path, typer.Argument(help="A profile of `mcsd tune`, or a file of `mcsd inspect --record`.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", dir_okay=False, help="Ends in .svg, .png or .pdf.", show_default="SOURCE with .svg"
        ),
    ] = None,
) -> None:
    """Draw what was measured: tokens a second over tree size, or overlap and acceptance by depth."""
    with _errors():
        from .plots import plot_file
        from .screen import stderr

        drawn = plot_file(source, output or source.with_suffix(".svg"))
        stderr().print(f"drawn in {drawn}", style="dim", soft_wrap=True)


@app.command()
def doctor(
    target: Annotated[str | None, typer.Option(help="A model to load and to check.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="For that model.")] = "auto",
    device: Annotated[str, typer.Option(help="Where it would run.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what will run on this machine and why.

    Exit code 0 if it can, 1 if not, 2 where the options name a model, a dtype or a device that is not to be had.
    """
    with _errors():
        from .doctor import examine
        from .screen import doctor_table, stdout

        facts, problem = examine(target, dtype, device)
        if as_json:
            _print_json(facts)
        else:
            stdout().print(doctor_table(facts))
        raise typer.Exit(1 if problem else 0)


@app.command()
@_with_settings
def bench(
    settings: Settings,
    prompts: Annotated[int, typer.Option(min=1, max=len(BENCH_PROMPTS), help="How many of the built-in prompts.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Tokens per call and speed over a few built-in prompts, against plain decoding; --json: a line for each prompt."""
    pair = _load(settings, quiet=as_json)
    from .screen import bench_table, stdout, waiting

    runs: list[Run] = []
    interrupted = False
    with waiting("warming up", as_json):
        pair.warm_up(pair.encode(BENCH_PROMPTS[0]))
    for number, prompt in enumerate(BENCH_PROMPTS[:prompts]):
        with waiting(f"prompt {number + 1} of {prompts}", as_json):
            run = pair.run(prompt, seed=settings.seed + number)
            pair.compare(run)
        if run.stats.interrupted or run.plain is None:
            interrupted = True
            break
        runs.append(run)
        if as_json:
            _print_json(_bench_row(prompt, [run]))
    if runs and as_json:
        _print_json({**_bench_row(None, runs), "settings": pair.describe(), "threads": _threads()})
    elif runs:
        rows = [_bench_row(run.prompt, [run]) for run in runs]
        stdout().print(bench_table([*rows, _bench_row(None, runs)]))
    if interrupted:
        raise KeyboardInterrupt


def _bench_row(prompt: str | None, runs: list[Run]) -> dict[str, Any]:
    tokens = sum(run.stats.tokens for run in runs)
    calls = sum(run.stats.target_calls for run in runs)
    speed = tokens / sum(run.seconds for run in runs)
    plain = tokens / sum(run.plain.seconds for run in runs if run.plain)
    return {
        "prompt": prompt,
        "tokens": tokens,
        "target_calls": calls,
        "tokens_per_call": round(tokens / calls, 4),
        "tokens_per_second": round(speed, 3),
        "plain_tokens_per_second": round(plain, 3),
        "speedup": round(speed / plain, 4),
    }


def _load(settings: Settings, quiet: bool, tree: bool = True, graphs: bool | None = None) -> Pair:
    """Load the models; says what runs unless `quiet`, and `tree` or not, see `header`."""
    from .screen import header, stderr, waiting

    with waiting(f"loading {settings.target}", quiet):
        from .pairs import Pair

        pair = Pair(settings, graphs)
    if not quiet:
        for line in header(pair, _threads(), tree):
            stderr().print(line, style="dim", soft_wrap=True)
        for difference in settings.tuned.differences(pair.describe()) if settings.tuned else ():
            stderr().print(f"the profile was measured with {difference}", style="yellow", soft_wrap=True)
    return pair


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _leave(run: Run) -> None:
    if run.stats.interrupted:
        raise typer.Exit(INTERRUPTED)
