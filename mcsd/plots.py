"""Pictures of what was measured: the curve of a profile, and diagnostics by depth; needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from .batch import check_place
from .profile import Profile

FORMATS = (".svg", ".png", ".pdf")

# Okabe and Ito's colours, which the colour-blind can tell apart: blue, vermilion, green, purple, orange, sky blue
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# An opaque ground is legible on a dark page too; text stays text and names do not change, so a picture drawn twice is
# the same twice.
_STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.facecolor": "white",
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "mcsd",
}
# What the formats would say about the time of drawing
_UNDATED: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


def check_picture(path: str | PathLike[str]) -> Path:
    """The path of a picture that can be drawn here.

    Raises:
        ValueError: its ending is that of no known format, or its folder does not exist.
        ImportError: matplotlib is not installed.
    """
    picture = Path(path)
    if picture.suffix.lower() not in FORMATS:
        raise ValueError(f"picture: expected a name that ends in {', '.join(FORMATS)}, got {picture}")
    check_place("picture", picture)
    _pyplot()
    return picture


def have_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    try:
        _pyplot()
    except ImportError:
        return False
    return True


def plot_file(source: str | PathLike[str], picture: str | PathLike[str]) -> Path:
    """Draw a profile of `mcsd tune`, or the diagnostics of `mcsd inspect --record`; which it is, the file says.

    Args:
        source: the file.
        picture: where to draw; the ending says the format.

    Raises:
        ValueError: the file holds neither, or nothing can be drawn there.
        ImportError: matplotlib is not installed.
    """
    try:
        with Path(source).open(encoding="utf-8") as lines:
            first = lines.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"plot: cannot read {source}: {error}") from None
    path = check_picture(picture)
    try:
        row = json.loads(first)
        recorded = isinstance(row, dict) and "mcsd_diagnostics" in row
    except ValueError:
        recorded = False
    if recorded:
        from .diagnostics import read_rows, summarise

        plot_diagnostics(summarise(read_rows(source)), path)
    else:
        profile = Profile.load(source)
        try:
            plot_profile(profile, path)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"plot: {source} is no whole profile of mcsd tune: {error!r}") from None
    return path


def plot_profile(profile: Profile, picture: str | PathLike[str], about: str | None = None) -> None:
    """Tokens a second over the size of the tree, predicted and measured.

    Args:
        profile: of `mcsd tune`.
        picture: where to draw.
        about: what an SVG's metadata say of it.
    """
    with drawing(picture, about=about) as (_, axes):
        _draw_profile(axes, profile)


def _draw_profile(axes: Any, profile: Profile) -> None:
    sizes = [row["nodes"] for row in profile.curve]
    axes.plot(sizes, [row["predicted_tokens_per_second"] for row in profile.curve], "-", label="predicted, best tree")
    measured = [row for row in profile.curve if row.get("tokens_per_second")]
    if measured:
        axes.errorbar(
            [row["nodes"] for row in measured],
            [row["tokens_per_second"] for row in measured],
            yerr=[_error(row) for row in measured],
            fmt="o",
            label="measured, best tree",
        )
    by_hand = [row for row in profile.shapes if row["hand_made"]]
    if by_hand:
        axes.plot(
            [row["nodes"] for row in by_hand],
            [row["tokens_per_second"] for row in by_hand],
            "x",
            label="measured, made by hand",
        )
        for row in by_hand:
            name = ",".join(map(str, row["branching"] or ()))
            place = (row["nodes"], row["tokens_per_second"])
            axes.annotate(name, place, fontsize=7, xytext=(4, -8), textcoords="offset points")
    chosen = (len(profile.parents), profile.tokens_per_second)
    axes.plot(*chosen, "*", markersize=14, label=f"chosen: {profile.proposal}, {profile.rule}")
    axes.axhline(profile.plain_tokens_per_second, color="0.5", linestyle="--", label="plain decoding")
    axes.set_xlabel("nodes of the tree, root included")
    axes.set_ylabel("tokens a second")
    axes.set_ylim(bottom=0)
    settings = profile.settings
    if settings:
        axes.set_title(
            f"{_short(settings.get('target'))} with {_short(settings.get('draft'))}, {settings.get('dtype')} on "
            f"{settings.get('device')}, temperature {settings.get('temperature')}",
            fontsize=9,
        )
    axes.legend()


def plot_diagnostics(summary: dict[str, Any], picture: str | PathLike[str]) -> None:
    """Overlap, acceptance and the best possible acceptance, by depth.

    Args:
        summary: of `diagnostics.summarise`.
        picture: where to draw.
    """
    with drawing(picture) as (_, axes):
        _draw_diagnostics(axes, summary)


def _draw_diagnostics(axes: Any, summary: dict[str, Any]) -> None:
    lines: Sequence[tuple[str, str, str]] = (
        ("optimum_without", "best possible, without replacement", "^--"),
        ("optimum_with", "best possible, with replacement", "v--"),
        ("accepted", "accepted", "o-"),
        ("expected", "recursive rule, expected", "s:"),
        ("overlap", "overlap Σ min(p, q)", "x-"),
    )
    for name, label, style in lines:
        points = [(row["depth"], row[name]) for row in summary["by_depth"] if row[name] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xticks([row["depth"] for row in summary["by_depth"]])
    axes.set_ylim(0, 1)
    axes.set_xlabel("depth of the node")
    axes.set_ylabel("probability")
    axes.set_title(
        f"{summary['steps']} steps, {summary['tokens_per_call']:.2f} tokens per target call, "
        f"MCSD's acceptance rate {summary['mcsd_acceptance_rate']:.2f}",
        fontsize=9,
    )
    axes.legend()


@contextmanager
def drawing(
    picture: str | PathLike[str], size: tuple[float, float] = (7, 4.2), about: str | None = None, **layout: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, in this project's style, saved at the end: the same bytes whenever it is drawn.

    Args:
        picture: where to draw; the ending says the format.
        size: in inches.
        about: what an SVG's metadata say of it.
        layout: for matplotlib's `subplots`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    colours = plt.cycler(color=COLOURS)
    with plt.rc_context({**_STYLE, "axes.prop_cycle": colours}):
        figure, axes = plt.subplots(figsize=size, layout="constrained", **layout)
        try:
            yield figure, axes
            ending = Path(picture).suffix.lower()
            described = {"Description": about} if about and ending == ".svg" else {}
            figure.savefig(picture, metadata={**_UNDATED.get(ending, {}), **described})
        finally:
            plt.close(figure)


def _error(row: dict[str, Any]) -> float:
    error = row.get("error")
    return float(error) if error is not None and error == error else 0.0


def _short(name: Any) -> str:
    return str(name).rstrip("/").rpartition("/")[2]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'mcsd[plots]'") from None
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot
