# SPDX-License-Identifier: Apache-2.0
"""Tables of what `data_gen.shapes.measure` has measured, in Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from data_gen.shapes.edits import KINDS
from ip2p_jax.evaluation.bootstrap import interval

Row = dict[str, Any]

ATTRIBUTES = ("background", "style", "count", "shape", "colour", "size", "texture", "place")


def share(values: Sequence[Any]) -> str:
    """The mean in percent and its 95 % interval."""
    held = np.array([x for x in values if x is not None], np.float64)
    if not len(held):
        return "-"
    low, high = interval(held)
    return f"{100 * held.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def percent(values: Sequence[Any]) -> str:
    """The mean alone, in percent."""
    held = [x for x in values if x is not None]
    return f"{100 * np.mean(held):.1f}" if held else "-"


def mean(values: Sequence[float]) -> str:
    """The mean alone."""
    return f"{np.mean(values):.3f}"


def table(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    cells = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in cells)


def of_captions(rows: Sequence[Row]) -> str:
    """By the number of objects: how often all is right, and each attribute."""
    lines = []
    for count in sorted({row["objects"] for row in rows}):
        some = [row for row in rows if row["objects"] == count]
        each = [percent([row[name] for row in some]) for name in ATTRIBUTES]
        lines.append([count, len(some), share([row["complete"] for row in some]), *each])
    return table(["objects", "pictures", "all right, %", *ATTRIBUTES], lines)


def of_reconstructions(rows: Sequence[Row]) -> str:
    """The same, and the error in grey levels."""
    error = mean([row["error"] for row in rows])
    return of_captions(rows) + f"\nRoot mean squared error: {error} of 255 grey levels.\n"


def of_edits(rows: Sequence[Row]) -> str:
    """By kind: how often the instruction is carried out, and how much of the rest is kept."""
    groups = {kind: [row for row in rows if row["kinds"] == [kind]] for kind in KINDS}
    groups["two at once"] = [row for row in rows if len(row["kinds"]) > 1]
    groups["all"] = list(rows)
    lines = []
    for name, some in groups.items():
        done, untouched = (share([row[x] for row in some]) for x in ("done", "untouched"))
        kept = percent([row["kept"] for row in some])
        lines.append([name, len(some), done, kept, untouched])
    columns = ["kind", "edits", "carried out, %", "other attributes kept, %", "area untouched, %"]
    return table(columns, lines)


def of_pairs(rows: Sequence[Row]) -> str:
    """By p: what is made of both captions, and how far both pictures agree."""
    lines = []
    for p in sorted({row["p"] for row in rows}):
        some = [row for row in rows if row["p"] == p]
        both = [row["first"] and row["second"] for row in some]
        shares = [share([row[name] for row in some]) for name in ("done", "agree")]
        scores = [mean([row[name] for row in some]) for name in ("sim_image", "sim_dir")]
        lines.append([p, len(some), *shares, percent(both), *scores])
    columns = ["p", "pairs", "edit shown, %", "alike elsewhere, %", "both captions right, %"]
    return table([*columns, "image similarity", "directional similarity"], lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "vae": of_reconstructions,
    "generate": of_captions,
    "edit": of_edits,
    "pairs": of_pairs,
}
