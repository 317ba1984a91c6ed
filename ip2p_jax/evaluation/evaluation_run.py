# SPDX-License-Identifier: Apache-2.0
"""What an evaluation still has to do, and the doing of it: units through a sweep, to a folder."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ip2p_jax.evaluation.evaluation_folder import EvaluationFolder, Line
from ip2p_jax.evaluation.sweep import NOT_FINITE, Batch, Point, Result, Sweep, cut
from ip2p_jax.storage import retried

FEW, MOST_SKIPPED = 20, 0.05
"""Examples that cannot be read are skipped and counted, up to so many or so large a part."""

READERS = 32
"""Threads that look at files of units: a bucket answers slowly, but many at once."""


class Plan(NamedTuple):
    """What is wanted: examples in the order of the run, points, and results to look at."""

    order: Sequence[int]
    points: Sequence[Point]
    rows: int  # examples of a unit
    pictures: int  # of so many of the first examples results are kept

    @property
    def units(self) -> list[list[int]]:
        """Indices of the examples of each unit."""
        return cut(self.order, self.rows)

    def unit(self, number: int) -> list[int]:
        """Indices of the examples of one."""
        return list(self.order[number * self.rows : (number + 1) * self.rows])


def missing_points(folder: EvaluationFolder, plan: Plan, unit: int) -> list[Point]:
    """Points at which an example of a unit, or a picture of it, is missing."""
    lines, indices = folder.lines(unit), plan.unit(unit)
    done, skipped = folder.done(lines), skipped_examples(lines)
    shown = set(plan.order[: plan.pictures]) & set(indices) - skipped
    return [
        point
        for point in plan.points
        if any((point, index) not in done for index in indices)
        or any(not folder.picture(index, 1, point).exists() for index in shown)
    ]


def skipped_examples(lines: Iterable[Line]) -> set[int]:
    """Indices of those that could not be read."""
    return {line["index"] for line in lines if line["kind"] == "skipped"}


def unreadable_before(folder: EvaluationFolder, plan: Plan) -> dict[int, str]:
    """Why examples could not be read, of those that earlier commands skipped."""
    with ThreadPoolExecutor(READERS) as pool:
        lines = [x for unit in pool.map(folder.lines, range(len(plan.units))) for x in unit]
    skipped = [x for x in lines if x["kind"] == "skipped" and x["reason"] != NOT_FINITE]
    return {x["index"]: x["reason"] for x in skipped if x["index"] in plan.order}


def missing(folder: EvaluationFolder, plan: Plan, numbers: Sequence[int]) -> dict[int, list[Point]]:
    """Those of the units `numbers` that are not whole, and at which points."""

    def look(unit: int) -> list[Point]:
        return retried(lambda: missing_points(folder, plan, unit), "reading")

    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(look, numbers)
        return {unit: points for unit, points in zip(numbers, found, strict=True) if points}


def run(
    sweep: Sweep, folder: EvaluationFolder, plan: Plan, todo: dict[int, list[Point]]
) -> Iterator[int]:
    """Does what is missing; yields how many edits have been written, time and again.

    While the devices compute one result, the one before is written and the next pictures are read.
    """
    computing: deque[Result] = deque()
    unreadable = unreadable_before(folder, plan)
    check_skipped(unreadable, sweep.examples.name, len(plan.order))
    for batch in ahead(sweep, plan, list(todo)):
        unreadable |= batch.reasons
        check_skipped(unreadable, sweep.examples.name, len(plan.order))
        wanted = {point for unit in batch.units for point in todo[unit]}
        points = [sweep.everywhere(point) for point in plan.points if point in wanted]
        for result in sweep.results(batch, points):
            computing.append(result)
            if len(computing) > 1:
                yield absorb(sweep, folder, plan, todo, computing.popleft())
    while computing:
        yield absorb(sweep, folder, plan, todo, computing.popleft())


def check_skipped(unreadable: dict[int, str], name: str, count: int) -> None:
    """Raises ValueError if too many examples cannot be read: then something else is wrong."""
    if len(unreadable) > max(FEW, MOST_SKIPPED * count):
        reason = next(iter(unreadable.values()))
        raise ValueError(
            f"{name}: {len(unreadable)} of {count} examples cannot be read, which is over "
            f"{MOST_SKIPPED:.0%}; the first: {reason}"
        )


def ahead(sweep: Sweep, plan: Plan, numbers: Sequence[int]) -> Iterator[Batch]:
    """Batches of one unit a device, the next one being read meanwhile."""
    units, most = plan.units, sweep.model.devices
    groups = [numbers[i : i + most] for i in range(0, len(numbers), most)]
    with ThreadPoolExecutor(1) as pool:
        loading = deque()
        for group in groups:
            loading.append(pool.submit(sweep.load, group, [units[n] for n in group]))
            if len(loading) > 1:
                yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()


def absorb(
    sweep: Sweep,
    folder: EvaluationFolder,
    plan: Plan,
    todo: dict[int, list[Point]],
    result: Result,
) -> int:
    """Writes what is wanted of a result; returns how many examples that are.

    Pictures come first, that of turn 1 as the last of an example: it and the lines say "done".
    """
    point, batch = Point(*map(float, result.scales[0])), result.batch
    shown = set(plan.order[: plan.pictures]) - set(batch.reasons)
    some = any(index in shown for _, _, index in sweep.places(batch))
    for number, edited in reversed(list(enumerate(result.turns if some else [], 1))):
        pictures = np.asarray(edited.pictures)
        for row, unit, index in sweep.places(batch):
            has_turn = number <= len(batch.examples[index].turns)
            if point in todo[unit] and index in shown and has_turn:
                folder.write_picture(folder.picture(index, number, point), pictures[row])
    lines: dict[int, list[Line]] = {}
    for unit, line in sweep.lines(result):
        if point in todo[unit]:
            lines.setdefault(unit, []).append(line)
    for unit, of_unit in lines.items():
        made = folder.done(of_unit)
        others = [line for line in folder.lines(unit) if not folder.done([line]) <= made]
        folder.write_lines(unit, [*others, *of_unit])
    return sum(len(plan.unit(unit)) for unit in lines)
