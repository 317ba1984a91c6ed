# SPDX-License-Identifier: Apache-2.0
"""Says how well two pictures that were made of two captions show an edit.

Unlike an edit of a rendered scene, the first picture is made, too: objects are where they are found
in it, and what has to stay is what the first picture shows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_gen.shapes.edits import Change, apply
from data_gen.shapes.reader import Mask, Seen, see
from data_gen.shapes.render import Picture
from data_gen.shapes.scene import SIDE, Scene
from data_gen.shapes.score import LEAST_LEFT, Part, alike, concerned, matched, number_after

REACH = 20.0
"""px in x and y from an object's centre to the end of the largest, with its outline or shadow."""


class PairScore(NamedTuple):
    """What a pair of pictures shows."""

    first: bool
    """The first picture shows its caption."""
    done: bool
    """The second shows all that the edit changes."""
    second: bool
    """The second shows its caption."""
    agree: float | None
    """Share of pixels that are alike away from what the edit changes; None if it changes all."""


def score_pair(
    first: Picture, second: Picture, before: Scene, changes: Sequence[Change]
) -> PairScore:
    """Compares pictures with the captions' scenes, and with each other."""
    after = apply(before, changes)
    held_first, there = matched(see(first), before, exact=0)
    held_second, then = matched(see(second), after, exact=0)
    done = all(held_second.parts[part] for part in asked(changes, len(after.objects)))
    left = untouched(changes, there, then)
    known = left.mean() >= LEAST_LEFT
    agree = alike(second, first.astype(np.float64), left) if known else None
    return PairScore(held_first.complete, done, held_second.complete, agree)


def asked(changes: Sequence[Change], count: int) -> set[Part]:
    """The parts of the second picture, of `count` objects, that the changes decide."""
    parts = set().union(*(concerned(change, changes, count) for change in changes))
    return parts | {(-1, "count")} if any(x.kind in ("add", "remove") for x in changes) else parts


def untouched(
    changes: Sequence[Change], there: Sequence[Seen | None], then: Sequence[Seen | None]
) -> Mask:
    """Where nothing changes: away from objects that do, as they are found before and after."""
    if any(change.kind in ("background", "restyle") for change in changes):
        return np.zeros((SIDE, SIDE), bool)
    found: list[Seen | None] = [then[-1] for change in changes if change.kind == "add"]
    for change in changes:
        if change.target >= 0:
            found.append(there[change.target])
        if change.target >= 0 and change.kind != "remove":
            found.append(then[number_after(change.target, changes)])
    return ~np.any([near(o) for o in found], axis=0)


def near(o: Seen | None) -> Mask:
    """Where an object and all that belongs to it may be: nowhere if it was not found."""
    if o is None:
        return np.zeros((SIDE, SIDE), bool)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return (np.abs(x - o.x) <= REACH) & (np.abs(y - o.y) <= REACH)
