# SPDX-License-Identifier: Apache-2.0
"""Search for the guidance scales that change most where enough of the picture is kept.

Maximises directional similarity subject to a floor on image similarity, by a compass search
(Kolda, Lewis and Torczon 2003) from the usual scales, with a fixed budget of evaluations: once for
a whole set, or for each example. An example keeps its noise, so what is found holds for its seed.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ip2p_jax.evaluation.bootstrap import interval
from ip2p_jax.evaluation.evaluation_folder import EvaluationFolder, Line
from ip2p_jax.evaluation.evaluation_run import Plan, ahead, missing, run
from ip2p_jax.evaluation.sweep import Batch, Point, Scales, Sweep

DEFAULT = Point(7.5, 1.5)
STEPS = (2.5, 0.25)  # of s_T and s_I at first; halved when no direction is better
DIRECTIONS = ((1, 0), (0, -1), (-1, 0), (0, 1), (1, 1), (-1, -1))
"""To more change first; to what keeps more, where too little is kept, each is turned round. Where
the floor stops each scale alone, both together still get on."""

BOUNDS = ((1.0, 15.0), (1.0, 3.0))
MOST = 40
"""Points a search can be asked for: then steps may have become too small to tell points apart."""


class Judged(NamedTuple):
    """What a point came to: CLIP's directional similarity, and its image similarity."""

    direction: float
    image: float

    def better(self, other: "Judged", floor: float) -> bool:
        """More change among what keeps enough; else nearer to keeping enough."""
        if self.image >= floor and other.image >= floor:
            return self.direction > other.direction
        return self.image > other.image


Search = Generator[Point, Judged, None]


def compass(floor: float) -> Search:
    """Yields the point to be judged next, no point twice; at least MOST of them."""
    steps, seen = np.array(STEPS), {DEFAULT}
    best, value = DEFAULT, (yield DEFAULT)
    while True:
        improved, sign = False, 1 if value.image >= floor else -1
        for direction in DIRECTIONS:
            point = move(best, sign * steps * direction)
            if point in seen:
                continue
            seen.add(point)
            judged = yield point
            if judged.better(value, floor):
                best, value, improved = point, judged, True
                break
        if not improved:
            steps = steps / 2


def move(point: Point, by: Float[np.ndarray, "2"]) -> Point:
    """A point a step aside, within the bounds, in hundredths and smaller parts where needed."""
    moved = np.clip(np.array(point) + by, *np.transpose(BOUNDS))
    return Point(*(round(float(x), 6) for x in moved))


def resume(history: Sequence[tuple[Point, Judged]], floor: float) -> tuple[Search, Point]:
    """A search that has been told this much, and the point it wants judged next."""
    search = compass(floor)
    wanted = next(search)
    for point, judged in history:
        if point != wanted:
            raise ValueError(f"found {tuple(point)} where the search had {tuple(wanted)}")
        wanted = search.send(judged)
    return search, wanted


def judged(lines: Iterable[Line]) -> Judged:
    """The mean of lines of one point; ValueError if there are none."""
    pairs = [(line["clip_direction"], line["clip_image"]) for line in lines]
    if not pairs:
        raise ValueError("no example could be read, so there is nothing to search by")
    return Judged(*(float(x) for x in np.mean(pairs, axis=0)))


def best(history: Sequence[tuple[Point, Judged]], floor: float) -> tuple[Point, Judged]:
    """The best of what has been judged; of equals the first, and so the usual scales."""
    found = history[0]
    for entry in history[1:]:
        if entry[1].better(found[1], floor):
            found = entry
    return found


def search_set(
    sweep: Sweep, folder: EvaluationFolder, plan: Plan, floor: float, budget: int
) -> Iterator[int]:
    """Judges `budget` points by all examples, one after the other; yields edits as they are."""
    history: list[tuple[Point, Judged]] = []
    for _ in range(budget):
        _, point = resume(history, floor)
        now = plan._replace(points=[point])
        numbers = range(len(plan.units))
        yield from run(sweep, folder, now, missing(folder, now, numbers))
        lines = [line for line in every_line(folder, plan) if folder.point(line) == point]
        history.append((point, judged(lines)))


def search_examples(
    sweep: Sweep, folder: EvaluationFolder, plan: Plan, floor: float, budget: int
) -> Iterator[int]:
    """Judges `budget` points for each example on its own; yields edits as they are made."""
    there = {n: folder.lines(n) for n in range(len(plan.units))}
    todo = {n: x for n, x in there.items() if any(due(x, i, budget) for i in plan.unit(n))}
    for batch in ahead(sweep, plan, list(todo)):
        yield from search_batch(sweep, folder, batch, todo, floor, budget)


def due(lines: Sequence[Line], index: int, budget: int) -> bool:
    """Whether an example has to be judged once more: one that was skipped is left alone."""
    of_example = [line for line in lines if line["index"] == index]
    return len(of_example) < budget and all(line["kind"] != "skipped" for line in of_example)


def search_batch(
    sweep: Sweep,
    folder: EvaluationFolder,
    batch: Batch,
    begun: Mapping[int, Sequence[Line]],
    floor: float,
    budget: int,
) -> Iterator[int]:
    """Judges a batch until each of its examples has had its budget."""
    lines = {unit: list(begun[unit]) for unit in batch.units}

    def points() -> Iterator[Scales]:
        while places := [x for x in sweep.places(batch) if due(lines[x[1]], x[2], budget)]:
            scales = sweep.everywhere(DEFAULT)
            for row, unit, index in places:
                if index not in batch.reasons:
                    history = history_of(folder, lines[unit], index)
                    scales[row] = resume(history, floor)[1]
            yield scales

    for result in sweep.results(batch, points()):
        made: dict[int, list[Line]] = {}
        for unit, line in sweep.lines(result):
            if due(lines[unit], line["index"], budget):
                made.setdefault(unit, []).append(line)
        for unit, of_unit in made.items():
            lines[unit] += of_unit
            folder.write_lines(unit, lines[unit])
        yield sum(map(len, made.values()))


def history_of(
    folder: EvaluationFolder, lines: Sequence[Line], index: int
) -> list[tuple[Point, Judged]]:
    """What has been judged of an example, in order."""
    return [(folder.point(x), judged([x])) for x in lines if x["index"] == index]


class Found(NamedTuple):
    """What a search found for an example, beside what the usual scales do."""

    number: int  # of the example in its set
    example: str
    point: Point
    found: Judged
    default: Judged


def found_for_set(folder: EvaluationFolder, plan: Plan, floor: float, budget: int) -> list[Found]:
    """Every example at the one point that is best for all of them together."""
    lines = every_line(folder, plan)
    by_point: dict[Point, dict[int, Line]] = {}
    for line in lines:
        by_point.setdefault(folder.point(line), {})[line["index"]] = line
    history = [(point, judged(of_point.values())) for point, of_point in by_point.items()]
    point, _ = best(visited(history, floor, budget), floor)
    found, default = by_point[point], by_point[DEFAULT]
    return [
        Found(i, found[i]["example"], point, judged([found[i]]), judged([default[i]]))
        for i in sorted(found.keys() & default.keys())  # a result that is not finite has no line
    ]


def visited(
    history: Sequence[tuple[Point, Judged]], floor: float, budget: int
) -> list[tuple[Point, Judged]]:
    """Those points, in its order, that a search of this budget judges."""
    values, told = dict(history), []
    for _ in range(budget):
        _, point = resume(told, floor)
        told.append((point, values[point]))
    return told


def found_for_examples(
    folder: EvaluationFolder, plan: Plan, floor: float, budget: int
) -> list[Found]:
    """Every example at its own best point."""
    lines, found = every_line(folder, plan), []
    for index in sorted({line["index"] for line in lines}):
        history = history_of(folder, lines, index)[:budget]
        point, value = best(history, floor)
        name = next(line["example"] for line in lines if line["index"] == index)
        found.append(Found(index, name, point, value, history[0][1]))
    if not found:
        raise ValueError("no example could be read, so there is nothing to search by")
    return found


def every_line(folder: EvaluationFolder, plan: Plan) -> list[Line]:
    """The lines of the plan's examples, but for those that could not be read."""
    wanted = set(plan.order)
    lines = [line for n in range(len(plan.units)) for line in folder.lines(n)]
    return [line for line in lines if line["kind"] == "example" and line["index"] in wanted]


def rows(found: Sequence[Found], axis: str) -> list[dict]:
    """The lines of search.jsonl."""
    return [
        {
            "index": f.number,
            "example": f.example,
            "text_guidance": f.point.text_guidance,
            axis: f.point.other,
            **{f"clip_{name}": value for name, value in f.found._asdict().items()},
            **{f"clip_{name}_default": value for name, value in f.default._asdict().items()},
        }
        for f in found
    ]


def account(found: Sequence[Found], floor: float, budget: int) -> str:
    """search.md: what the search bought against the usual scales, in Markdown."""
    scales = np.array([f.point for f in found])
    middle = [f"{x:g}" for x in np.median(scales, axis=0)]
    values = np.array([[*f.default, *f.found] for f in found])
    values = np.column_stack([values, values[:, 2:] - values[:, :2]])
    low, high = interval(values)
    cells = [
        f"{mean:.3f} [{a:.3f}, {b:.3f}]"
        for mean, a, b in zip(values.mean(axis=0), low, high, strict=True)
    ]
    kept = [f"{np.mean(values[:, i] >= floor):.0%}" for i in (1, 3)]
    title = "found" if len(set(map(tuple, scales))) == 1 else "found, by example (medians)"
    return "\n".join(
        [
            f"Most directional similarity with an image similarity of at least {floor:g}, "
            f"{budget} evaluations, {len(found)} examples; means with 95 % bootstrap intervals.",
            "",
            "| scales | text guidance | image guidance | directional similarity "
            "| image similarity | examples above the floor |",
            "|---|---|---|---|---|---|",
            f"| usual | {DEFAULT[0]:g} | {DEFAULT[1]:g} | {cells[0]} | {cells[1]} | {kept[0]} |",
            f"| {title} | {middle[0]} | {middle[1]} | {cells[2]} | {cells[3]} | {kept[1]} |",
            f"| bought | | | {cells[4]} | {cells[5]} | |",
            "",
        ]
    )
