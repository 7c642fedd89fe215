"""What `bench/report.py` draws; the data are its, the style is that of `mcsd.plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mcsd.plots import COLOURS, drawing, plot_profile
from mcsd.profile import Profile
from mcsd.trees import parents_of
from mcsd_kernels import ancestor_bits, tree_attention_mask
from mcsd_kernels.tree import unpack_bits

BLUE, VERMILION, GREEN, PURPLE, ORANGE, _ = COLOURS
GREY = "0.45"
LIGHT = "0.85"


def name_of(branching: list[int]) -> str:
    """A tree as its branching factors; a long chain at its end is counted."""
    if set(branching) == {1}:
        return f"chain of {len(branching)}"
    tail = 0
    while tail < len(branching) and branching[-1 - tail] == 1:
        tail += 1
    if tail < 4:
        return ",".join(map(str, branching))
    return ",".join([*map(str, branching[: len(branching) - tail]), f"1×{tail}"])


def tree_mask(data: Any, path: Path, about: str) -> None:
    """A tree, and beside it the attention mask that `tree_attention_mask` gives, one node's row marked in both."""
    parents = parents_of(data["branching"])
    nodes, prefix, marked = len(parents), data["prefix"], data["node"]
    tensor = torch.tensor(parents, dtype=torch.int32)
    mask = tree_attention_mask(tensor, torch.tensor([prefix]), prefix + nodes)[0, 0].tolist()
    seen = unpack_bits(ancestor_bits(tensor), nodes)[0, marked].tolist()
    depth, place = [0] * nodes, [0.0] * nodes
    for node in range(1, nodes):
        depth[node] = depth[parents[node]] + 1
    leaves = [node for node in range(nodes) if node not in parents]
    for position, leaf in enumerate(leaves):
        place[leaf] = position
    for node in reversed(range(nodes)):
        below = [place[child] for child in range(nodes) if parents[child] == node]
        place[node] = sum(below) / len(below) if below else place[node]
    with drawing(path, (7.2, 3.4), about, ncols=2) as (_, (left, right)):
        for node in range(1, nodes):
            both = seen[node] and seen[parents[node]]
            ends = [place[parents[node]], place[node]], [-depth[parents[node]], -depth[node]]
            left.plot(*ends, "-", color=VERMILION if both else GREY, linewidth=2.2 if both else 1, zorder=1)
        left.scatter(
            place,
            [-d for d in depth],
            s=330,
            c=[VERMILION if on else "white" for on in seen],
            edgecolors=[VERMILION if on else GREY for on in seen],
            linewidths=1.4,
            zorder=2,
        )
        for node in range(nodes):
            style = {"color": "white", "weight": "bold"} if seen[node] else {"color": "black"}
            left.text(place[node], -depth[node], str(node), ha="center", va="center", zorder=3, **style)
        left.set_title("node 0: the last token; the others: candidates")
        left.set_xlim(-0.6, len(leaves) - 0.4)
        left.set_ylim(-max(depth) - 0.4, 0.4)
        left.axis("off")
        for node in range(nodes):
            cells = [(slot, 1) for slot in range(prefix + nodes) if mask[node][slot]]
            right.broken_barh(cells, (node, 1), facecolor=VERMILION if node == marked else BLUE)
        for edge in range(prefix + nodes + 1):
            right.axvline(edge, color=LIGHT, linewidth=0.6)
        for edge in range(nodes + 1):
            right.axhline(edge, color=LIGHT, linewidth=0.6)
        right.axvline(prefix, color="black", linewidth=1.2)
        right.set_xlim(0, prefix + nodes)
        right.set_ylim(nodes, 0)
        right.set_aspect("equal")
        right.set_xticks(
            [slot + 0.5 for slot in range(prefix + nodes)], ["·"] * prefix + [str(n) for n in range(nodes)]
        )
        right.set_yticks([node + 0.5 for node in range(nodes)], [str(node) for node in range(nodes)])
        right.tick_params(length=0)
        right.spines[:].set_visible(False)
        right.set_title("the mask: row i, what node i attends to")
        right.set_xlabel("prefix (·), then the tree's nodes")


def residual(data: Any, path: Path, about: str) -> None:
    """What is left of p after each rejection of candidates drawn without replacement: what stands above βq."""
    p, q = np.array(data["p"]), np.array(data["q"])
    tokens = np.arange(len(p))
    beta, mass, left = 0.0, 1.0, 1.0
    with drawing(path, (7.2, 2.7), about, ncols=3, sharey=True) as (_, panels):
        for rejections, axes in enumerate(panels):
            if rejections:
                token = data["rejected"][rejections - 1]
                beta += mass / left
                mass, left = float(np.maximum(p - beta * q, 0).sum()), left - q[token]
                assert p[token] <= beta * q[token], "a token is rejected only where its residual is then zero"
            covered = np.minimum(p, beta * q)
            axes.bar(tokens, covered, color=LIGHT, width=0.8, label="p, below βq")
            axes.bar(tokens, p - covered, bottom=covered, color=BLUE, width=0.8, label="residual (p − βq)₊")
            if rejections:
                axes.step(
                    np.arange(len(p) + 1) - 0.5, [*beta * q, beta * q[-1]], where="post", color=VERMILION, label="βq"
                )
                gone = data["rejected"][:rejections]
                axes.plot(gone, [0.012] * len(gone), "x", color="black", label="rejected")
            title = ("before the first test", "after one rejection", "after two")[rejections]
            axes.set_title(f"{title}\nβ = {beta:.2f}, S = {mass:.2f}")
            axes.set_xticks(tokens, list("abcdefgh")[: len(p)])
            axes.tick_params(axis="x", length=0)
        panels[0].set_ylim(0, 1.15 * float(max(p.max(), 0.36)))
        panels[0].set_ylabel("probability")
        panels[1].set_xlabel("token")
        panels[-1].legend(loc="upper right", fontsize=7)


def scaling(points: Any, path: Path, about: str) -> None:
    """Time over vocabulary: a column a number of nodes, a row a batch, a colour a tree; the floors are dashed."""
    sizes, batches = (sorted({point[name] for point in points}) for name in ("nodes", "batch"))
    grid = {"nrows": len(batches), "ncols": len(sizes), "sharex": True, "sharey": "row", "squeeze": False}
    with drawing(path, (2.1 * len(sizes) + 0.9, 2.1 * len(batches) + 0.8), about, **grid) as (figure, panels):
        for down, batch in enumerate(batches):
            for across, nodes in enumerate(sizes):
                axes = panels[down][across]
                here = [point for point in points if (point["nodes"], point["batch"]) == (nodes, batch)]
                trees = list(dict.fromkeys(tuple(point["branching"]) for point in here))
                for branching, colour, marker in zip(trees, COLOURS, "osv^Dx", strict=False):
                    line = sorted(
                        (point for point in here if tuple(point["branching"]) == branching),
                        key=lambda point: point["vocab"],
                    )
                    x = [point["vocab"] for point in line]
                    y, low, high, floor = (
                        [point[name] for point in line] for name in ("median", "p20", "p80", "floor")
                    )
                    axes.plot(x, y, color=colour, marker=marker, markersize=4, label=name_of(list(branching)))
                    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                    axes.plot(x, floor, "--", color=colour, linewidth=1)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                ticks = sorted({point["vocab"] for point in points})
                axes.set_xticks(ticks, [f"{vocab / 1000:.0f}k" for vocab in ticks])
                axes.yaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
                axes.grid(axis="y", color=LIGHT, linewidth=0.6)
                if down == 0:
                    axes.set_title(f"{nodes} nodes")
                    axes.legend(fontsize=7, loc="upper left", handlelength=1.2)
                if across == 0:
                    tops = [point["p80"] for point in points if point["batch"] == batch]
                    axes.set_ylim(top=max(tops) * 4)  # room for the legend
                    axes.set_ylabel(f"{batch} request{'s' if batch > 1 else ''}: milliseconds")
        lines = "solid: verify, median and 20 to 80 %; dashed: the floor, reading the visited rows once"
        figure.supxlabel(f"vocabulary ({lines})", fontsize=9)


def tokens_per_call(points: Any, path: Path, about: str) -> None:
    """Tokens per target call with 95 % intervals: a panel a temperature, a place a tree, a colour a proposal."""
    temperatures = sorted({point["temperature"] for point in points}, reverse=True)
    trees = list(dict.fromkeys(tuple(point["branching"]) for point in points))
    proposals = list(dict.fromkeys(point["proposal"] for point in points))
    with drawing(
        path, (2.6 * len(temperatures) + 1.8, 3.6), about, ncols=len(temperatures), sharey=True, squeeze=False
    ) as (
        figure,
        panels,
    ):
        handles: dict[str, Any] = {}
        for temperature, axes in zip(temperatures, panels[0], strict=True):
            here = [point for point in points if point["temperature"] == temperature]
            kinds = list(dict.fromkeys((point["proposal"], point["rule"]) for point in here))
            for point in here:
                turn = kinds.index((point["proposal"], point["rule"])) - (len(kinds) - 1) / 2
                colour = COLOURS[proposals.index(point["proposal"]) % len(COLOURS)]
                recursive = point["rule"] == "recursive"
                label = f"{point['proposal'].replace('_', ' ')}, {point['rule']}"
                handles[label] = axes.errorbar(
                    trees.index(tuple(point["branching"])) + turn * 0.8 / max(len(kinds), 1),
                    point["value"],
                    [[point["value"] - point["low"]], [point["high"] - point["value"]]],
                    color=colour,
                    marker="o" if recursive else "s",
                    markerfacecolor=colour if recursive else "white",
                    markersize=4.5,
                    linestyle="",
                    elinewidth=1,
                )
            axes.set_xticks(
                range(len(trees)), [name_of(list(branching)) for branching in trees], rotation=30, ha="right"
            )
            axes.set_xlim(-0.6, len(trees) - 0.4)
            axes.set_title(f"temperature {temperature:g}, {here[0]['prompts']} prompts")
            axes.grid(axis="y", color=LIGHT, linewidth=0.6)
        panels[0][0].set_ylabel("tokens per target call")
        figure.legend(handles.values(), handles.keys(), loc="outside right center")


def tune(data: Any, path: Path, about: str) -> None:
    """The curve of `mcsd tune`, as the command draws it."""
    plot_profile(Profile(**data), path, about)


def speed(bars: Any, path: Path, about: str) -> None:
    """Speed over plain decoding as bars from 1: blue to the right where a tree helps, hatched to the left where not."""
    with drawing(path, (7.2, 0.8 + 0.3 * len(bars)), about) as (_, axes):
        reach = max(abs(bound - 1) for bar in bars for bound in (*bar["over_plain_95"], bar["over_plain"])) + 0.08
        axes.axvspan(1 - reach, 1, color="0.95", zorder=0)
        for place, bar in enumerate(bars):
            over, (low, high) = bar["over_plain"], bar["over_plain_95"]
            helps = over >= 1
            axes.barh(
                place,
                over - 1,
                left=1,
                height=0.62,
                color=BLUE if helps else "white",
                edgecolor=BLUE if helps else VERMILION,
                hatch=None if helps else "////",
            )
            axes.errorbar(over, place, xerr=[[over - low], [high - over]], color="black", elinewidth=1, capsize=2)
            axes.text(
                1.0 + reach + 0.02, place, f"{over:.2f} ×, {bar['tokens_per_call']:.2f} tokens per call", va="center"
            )
        axes.axvline(1, color="black", linewidth=1)
        names = [f"{name_of(bar['branching'])}   {bar['dtype']}, T = {bar['temperature']:g}" for bar in bars]
        axes.set_yticks(range(len(bars)), names)
        axes.set_xlim(1 - reach, 1 + reach)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("speed over plain decoding, 95 % over prompts; hatched: slower than plain decoding")
