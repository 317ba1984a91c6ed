# SPDX-License-Identifier: Apache-2.0
"""What is written once all units of an evaluation are there: metrics, table, curve and sheets."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ip2p_jax.evaluation import figures, report
from ip2p_jax.evaluation.evaluation_folder import EvaluationFolder, Line
from ip2p_jax.evaluation.evaluation_run import READERS, Plan, skipped_examples
from ip2p_jax.evaluation.sweep import Point, Sweep
from ip2p_jax.storage import json_lines

CURVE = ("clip_direction", "clip_image")
"""x and y of the trade-off curve."""


def all_lines(folder: EvaluationFolder, plan: Plan) -> list[Line]:
    """The lines of the plan's examples at every point, also those of earlier commands."""
    with ThreadPoolExecutor(READERS) as pool:
        units = list(pool.map(folder.lines, range(len(plan.units))))
    wanted = set(plan.order)
    return sorted(
        (line for unit in units for line in unit if line["index"] in wanted),
        key=lambda line: (folder.point(line), line["turn"], line["index"]),
    )


def unfinished(folder: EvaluationFolder, plan: Plan, lines: Sequence[Line]) -> dict[Point, int]:
    """The points that an earlier command left before all of the examples were done, and of how
    many it has lines."""
    done: dict[Point, set[int]] = {}
    for line in lines:
        done.setdefault(folder.point(line), set()).add(line["index"])
    return {point: len(x) for point, x in done.items() if x != set(plan.order)}


def unfinished_words(sweep: Sweep, plan: Plan, half: dict[Point, int]) -> list[str]:
    """What is said of points that are left out."""
    if not half:
        return []
    named = "; ".join(f"{sweep.words(point)}: {n}" for point, n in half.items())
    return [f"Left out, for not all of the {len(plan.order)} examples are done there: {named}.", ""]


def skipped_words(lines: Sequence[Line]) -> list[str]:
    """What is said of examples that could not be evaluated."""
    skipped = [line for line in lines if line["kind"] == "skipped"]
    if not skipped:
        return []
    count, first = len({line["index"] for line in skipped}), skipped[0]
    name, reason = first["example"], first["reason"]
    return [f"Skipped at some point: {count} examples, the first {name}: {reason}.", ""]


def summarise(sweep: Sweep, folder: EvaluationFolder, plan: Plan) -> str:
    """Writes all there is to be said of the evaluation; returns the table of its points."""
    lines = all_lines(folder, plan)
    half = unfinished(folder, plan, lines)
    lines = [line for line in lines if folder.point(line) not in half]
    points = report.points([line for line in lines if line["kind"] == "example"])
    folder.write("metrics.jsonl", json_lines([*lines, *points]))
    notes = [*skipped_words(lines), *unfinished_words(sweep, plan, half)]
    table = "\n".join([report.table(points), *notes])
    folder.write("table.md", table.encode())
    if any(all(name in point for name in CURVE) for point in points):
        folder.write("curve.png", report.curve({sweep.method.name: points}, *CURVE))
    skipped = skipped_examples(lines)
    if shown := [i for i in plan.order[: plan.pictures] if i not in skipped]:
        folder.write("samples.png", png(samples(sweep, folder, plan, shown)))
        several = len({p.text_guidance for p in plan.points}) > 1
        if several and sweep.method.axis == "image_guidance":
            folder.write("guidance.png", png(guidance(sweep, folder, plan, shown[0])))
    return table


def samples(
    sweep: Sweep, folder: EvaluationFolder, plan: Plan, shown: Sequence[int]
) -> Image.Image:
    """Examples downwards: input, result at each point, target."""
    rows = []
    for index in shown:
        given, *targets = sweep.pictures(sweep.examples[index])
        results = [read(folder, index, point) for point in plan.points]
        turn = sweep.examples[index].turns[0]
        target = [] if turn.target is None else [targets[0]]
        rows.append((turn.instruction, [given, *results, *target]))
    most = max(len(pictures) for _, pictures in rows)
    rows = [(text, [*pictures, *[None] * (most - len(pictures))]) for text, pictures in rows]
    titles = ["input", *(sweep.words(point) for point in plan.points), "target"]
    return figures.sample_grid(rows, titles[:most])


def guidance(sweep: Sweep, folder: EvaluationFolder, plan: Plan, index: int) -> Image.Image:
    """An example at all points: s_T downwards (figure 4)."""
    example = sweep.examples[index]
    results = {
        (point.text_guidance, point.other): read(folder, index, point) for point in plan.points
    }
    given = next(sweep.pictures(example))
    return figures.guidance_grid(results, given, example.turns[0].instruction)


def read(folder: EvaluationFolder, index: int, point: Point) -> UInt8[np.ndarray, "h w 3"]:
    """The kept result of the first turn."""
    return np.asarray(Image.open(io.BytesIO(folder.picture(index, 1, point).read_bytes())))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
