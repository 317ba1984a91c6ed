# SPDX-License-Identifier: Apache-2.0
"""What is written of an evaluation: the points of metrics.jsonl, table.md and curve.png."""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ip2p_jax.evaluation import figures
from ip2p_jax.evaluation.bootstrap import LEVEL, RESAMPLES, interval
from ip2p_jax.evaluation.columns import SCORES, SETTINGS, Row, setting, words

NEEDED = {
    "example": ("method", "turn", "text_guidance", "index"),
    "skipped": ("method", "turn", "text_guidance", "index"),
    "point": ("method", "turn", "text_guidance", "examples"),
}
"""What a line has to have, by its kind; besides, image_guidance or strength."""


def keys(score: str) -> tuple[str, ...]:
    """What a point has of a score."""
    return (score, f"{score}_low", f"{score}_high", f"{score}_examples")


NUMBERS = {"turn", "text_guidance", "image_guidance", "strength", "index", "examples"} | {
    key for score in SCORES for key in keys(score)
}


def points(example_rows: Sequence[Row]) -> list[Row]:
    """The "point" lines of "example" lines: the mean of every score and its 95 % interval.

    Independent of the order of the lines, which may be of any kind. A value that is missing or
    not finite (PSNR of equal pictures) is left out of its mean; `SCORE_examples` then tells how
    many are in it. Raises ValueError for an example that is twice at a point.
    """
    examples = [row for row in example_rows if row["kind"] == "example"]
    examples.sort(key=lambda row: (setting(row), row["index"]))
    found = []
    for _, group in itertools.groupby(examples, setting):
        rows = list(group)
        for a, b in itertools.pairwise(rows):
            if a["index"] == b["index"]:
                raise ValueError(f"example {a['index']} is twice at {words(a)}")
        of_settings = {name: rows[0][name] for name in SETTINGS if name in rows[0]}
        found.append({"kind": "point"} | of_settings | {"examples": len(rows)} | summary(rows))
    return found


def summary(rows: Sequence[Row]) -> Row:
    """Means and intervals over the examples of a point; scores that all have go together."""
    table = np.array([[row.get(name, math.nan) for name in SCORES] for row in rows], np.float64)
    held = np.isfinite(table)
    done: Row = {}
    for mask in np.unique(held.T, axis=0):
        of_mask = (held == mask[:, None]).all(axis=0)
        names = [name for name, member in zip(SCORES, of_mask, strict=True) if member]
        if mask.any():
            values = table[mask][:, of_mask]
            columns = (values.mean(axis=0), *interval(values))
            for name, mean, low, high in zip(names, *columns, strict=True):
                done |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
                if not mask.all():
                    done[f"{name}_examples"] = int(mask.sum())
    return {name: done[name] for score in SCORES for name in keys(score) if name in done}


def table(points: Sequence[Row]) -> str:
    """table.md: a row a point, means with intervals, and below it what each column is."""
    turns = any(point["turn"] != 1 for point in points)
    settings = [name for name in SETTINGS if any(name in point for point in points)]
    settings = [name for name in settings if name != "turn" or turns]
    scores = [name for name in SCORES if any(name in point for point in points)]
    titles = {
        name: f"{SCORES[name].title} {'↑' if SCORES[name].higher else '↓'}" for name in scores
    }
    head = [SETTINGS[name] for name in settings] + ["examples", *titles.values()]
    rows = [
        [cell(point.get(name)) for name in (*settings, "examples")]
        + [score_cell(point, name) for name in scores]
        for point in sorted(points, key=setting)
    ]
    caption = (
        f"Means over the examples of a point, in brackets their {LEVEL:.0%} bootstrap interval "
        f"(percentile, {RESAMPLES} resamples of the examples). ↑ higher is better, ↓ lower is "
        "better. What compares with the input says how much of it is kept: it is best where "
        "nothing was edited."
    )
    if any(key.endswith("_examples") for point in points for key in point):
        caption += " (n 99): the mean of these 99 examples only, others have no finite value."
    meanings = [f"- **{titles[name]}**: {SCORES[name].meaning}" for name in scores]
    return "\n".join([*markdown(head, rows), "", caption, "", *meanings, ""])


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table, in columns also where nobody renders it."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return [
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in (head, rule, *rows)
    ]


def cell(value: Any) -> str:
    """A setting or a count."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def score_cell(point: Row, name: str) -> str:
    """A mean and its interval, and over how many examples if not over all."""
    if name not in point:
        return ""
    shown = [f"{point[key]:.{SCORES[name].decimals}f}" for key in keys(name)[:3]]
    few = f" (n {point[f'{name}_examples']})" if f"{name}_examples" in point else ""
    return f"{shown[0]} [{shown[1]}, {shown[2]}]{few}"


def curve(
    runs: Mapping[str, Sequence[Row]], x: str = "clip_direction", y: str = "clip_image"
) -> bytes:
    """A PNG of y over x of runs by name (figure 8). ValueError names a run that lacks a score."""
    return figures.render(figures.trade_off(runs, x, y), "png")


def read_metrics(path: str | os.PathLike) -> list[Row]:
    """Reads the lines of an evaluation's metrics.jsonl.

    Raises FileNotFoundError, or ValueError that names the file and the line that is wrong in it.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if file.is_dir():
        raise ValueError(f"{path}: a folder, expected the metrics.jsonl of an evaluation")
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text in UTF-8") from None
    rows, points = [], set()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(read_row(line))
                check_once(rows[-1], points)
            except (ValueError, OverflowError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def read_row(line: str) -> Row:
    """Reads a line of metrics.jsonl. Raises ValueError that says what is wrong in it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    if row.get("kind") not in list(NEEDED):
        raise ValueError(f"kind is {row.get('kind')!r}, expected one of {', '.join(NEEDED)}")
    for name in NEEDED[row["kind"]]:
        if name not in row:
            raise ValueError(f"{name} is missing")
    if ("image_guidance" in row) == ("strength" in row):
        raise ValueError("expected either image_guidance or strength")
    check_values(row)
    return row


def check_values(row: Row) -> None:
    """Raises ValueError that names a value of a wrong type, one that is not finite, or none."""
    for name, value in row.items():
        if name == "method" and not isinstance(value, str):
            raise ValueError(f"{name}: {value!r}, expected a text")
        free = name in SCORES and row["kind"] == "example"
        number = type(value) in (int, float)
        if name in NUMBERS and not (number and (free or math.isfinite(float(value)))):
            raise ValueError(f"{name}: {value!r}, expected a {'' if free else 'finite '}number")
    if row["kind"] == "point":
        for name in SCORES:
            for key in keys(name)[:3]:
                if name in row and key not in row:
                    raise ValueError(f"{key} is missing")


def check_once(row: Row, points: set[tuple]) -> None:
    """Adds a point to those that were read. Raises ValueError if it is among them."""
    if row["kind"] == "point":
        if setting(row) in points:
            raise ValueError(f"a second point of {words(row)}")
        points.add(setting(row))
