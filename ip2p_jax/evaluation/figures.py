# SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation: curves (figures 8 and 10), and sheets of pictures (figure 4)."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from ip2p_jax.evaluation import sheets
from ip2p_jax.evaluation.bootstrap import LEVEL
from ip2p_jax.evaluation.columns import SCORES, SETTINGS, Row, aligned
from ip2p_jax.evaluation.trade_off import Curve, curves

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MARKERS = "osD^vP"
"""Okabe and Ito's colours, which the colour-blind can tell apart; markers help where they end."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "lines.markersize": 6.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "svg.hashsalt": "ip2p_jax",  # the same file again
}
DPI = 150  # 1080 px wide

Picture = UInt8[np.ndarray, "_ _ 3"]  # each of its own size


def trade_off(runs: Mapping[str, Sequence[Row]], x: str, y: str) -> Figure:
    """One score over another, a line a run, from the points of runs by name.

    Crosses are bootstrap intervals, numbers the value of what was swept. Raises ValueError naming
    a run that has not both scores.
    """
    lines = curves(runs, x, y)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        for i, line in enumerate(lines):
            draw_curve(ax, line, (x, y), i)
        ax.margins(0.09)
        ax.set_xlabel(f"{SCORES[x].title} {'→' if SCORES[x].higher else '←'}")
        ax.set_ylabel(f"{SCORES[y].title} {'→' if SCORES[y].higher else '←'}")
        swept = " or ".join(dict.fromkeys(SETTINGS[line.swept] for line in lines))
        ax.set_title(
            f"numbers: {swept}  ·  crosses: {LEVEL:.0%} intervals  ·  arrows: better",
            loc="left",
            fontsize=9,
            color="#777777",
        )
        ax.legend(loc="best", fontsize=10)
    return figure


def draw_curve(ax: Axes, line: Curve, scores: tuple[str, str], number: int) -> None:
    """Draws a line through points, a cross of its two intervals and its value at each.

    Values are written above every other line and below the rest, where lines are near.
    """
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    x, y = map(line.values, scores)
    ends = [
        abs(np.stack([line.values(f"{score}_{end}") for end in ("low", "high")]) - mean[None])
        for score, mean in zip(scores, (x, y), strict=True)
    ]
    ax.errorbar(x, y, ends[1], ends[0], "none", ecolor=colour, elinewidth=1, alpha=0.45)
    ax.plot(x, y, color=colour, marker=marker, markeredgecolor="white", label=line.name)
    side = -1 if number % 2 else 1
    values = aligned(line.values(line.swept).tolist())
    for at_x, at_y, value in zip(x, y, values, strict=True):
        text = ax.annotate(
            value,
            (at_x, at_y),
            xytext=(5 * side, 4 * side),
            textcoords="offset points",
            horizontalalignment="left" if side > 0 else "right",
            verticalalignment="bottom" if side > 0 else "top",
            fontsize=8.5,
            color=colour,
            zorder=1.5,  # behind every line and point
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def render(figure: Figure, kind: str) -> bytes:
    """A figure as "png", "svg" or "pdf"; the same bytes for the same figure."""
    buffer = io.BytesIO()
    metadata = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def guidance_grid(
    pictures: Mapping[tuple[float, float], Picture], input: Picture, instruction: str
) -> Image.Image:
    """Results by text guidance (downwards) and image guidance (across), the input beside them.

    pictures: by (s_T, s_I); what is missing stays empty. Figure 4.
    """
    down, across = (sorted({key[i] for key in pictures}) for i in (0, 1))
    images = {key: Image.fromarray(picture) for key, picture in pictures.items()}
    rows = [
        sheets.Line(f"text guidance {value}", [images.get((t, i)) for i in across])
        for t, value in zip(down, aligned(down), strict=True)
    ]
    titles = [f"image guidance {value}" for value in aligned(across)]
    results = sheets.picture_table(rows, titles, label=90)
    given = sheets.picture_table([sheets.Line("", [Image.fromarray(input)])], ["input"], label=0)
    words = sheets.wrapped(f"“{instruction}”", sheets.SIDE, 8)
    under = given.height + sheets.GAP
    height = under + round(sheets.LINE * sheets.SIZE * len(words))
    left = given.width + sheets.MARGIN
    size = (left + results.width, max(results.height, height))
    sheet = Image.new("RGB", size, sheets.PAPER)
    sheet.paste(given, (0, 0))
    sheets.write(sheet, (0, under), words)
    sheet.paste(results, (left, 0))
    return sheets.framed(sheet)


def sample_grid(
    rows: Sequence[tuple[str, Sequence[Picture | None]]], titles: Sequence[str]
) -> Image.Image:
    """Examples downwards: each an instruction and its pictures, such as input, results, target.

    None leaves a place empty. Raises ValueError for an example with another number of pictures
    than there are titles.
    """
    lines = [
        sheets.Line(f"“{label}”", [None if p is None else Image.fromarray(p) for p in pictures])
        for label, pictures in rows
    ]
    return sheets.framed(sheets.picture_table(lines, titles))
