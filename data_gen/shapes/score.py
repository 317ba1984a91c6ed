# SPDX-License-Identifier: Apache-2.0
"""Says which parts of a caption or an instruction a picture carries out, from its pixels alone.

What a picture shows is read without knowing what was meant (`data_gen.shapes.reader`), then
compared. Blurred edges, noise of a few grey levels, slightly wrong colours and moves of 2 px pass;
the tolerances are the reader's, and the constants here.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from data_gen.shapes.edits import ATTRIBUTES, Change, apply
from data_gen.shapes.reader import Mask, Reading, Seen, around, grown, see
from data_gen.shapes.render import Picture, render
from data_gen.shapes.scene import SIDE, Object, Scene

MOVED = 6.0
"""px in x or y that an object of an edited picture may be away from its place."""
ASIDE = 4.0
"""px from the picture's middle, from where the left is left."""
GONE = 10.0
"""px in x and y around a removed object within which nothing may stand."""
SAME = 20.0
"""Grey levels, in the mean of 3x3 pixels and in any channel, up to which a pixel is unchanged."""
PLACED = 5
"""How much more than other attributes the place counts in deciding which object is which."""
LEAST_LEFT = 0.05
"""Share of the picture that an edit has to leave alone, or nothing is said about it."""

SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
ALL = ("shape", "colour", "size", "texture", "place")

Part = tuple[int, str]
"""An attribute of an object by its number, or of the whole picture (-1)."""


class Held(NamedTuple):
    """Which parts of a scene a picture shows."""

    parts: dict[Part, bool]
    """(-1, background, style or count: no object too many or too few), and for each object
    (number, shape, colour, size, texture or place)."""

    @property
    def complete(self) -> bool:
        """Every part is right."""
        return all(self.parts.values())


class EditScore(NamedTuple):
    """How well an edit was made."""

    carried_out: tuple[bool, ...]
    """For each change, in order."""
    kept: float
    """Share of all other parts of the true edited scene that are right."""
    untouched: float | None
    """Share of unchanged pixels where the edit changes nothing; None if it changes everything."""
    held: Held
    """What the picture shows of the true edited scene."""

    @property
    def done(self) -> bool:
        """The whole instruction was carried out."""
        return all(self.carried_out)


def read(picture: Picture, scene: Scene) -> Held:
    """Which parts of a caption's scene a picture shows.

    Objects may stand anywhere where the words for their places hold; what stands in the centre has
    no such word.
    """
    return compare(see(picture), scene, exact=0)


def score(picture: Picture, before: Scene, changes: Sequence[Change]) -> EditScore:
    """Compares an edited picture with the true edit of `before`.

    An object that was there is the one within 6 px of its place; one that is added stands where
    the words say.
    """
    after, seen = apply(before, changes), see(picture)
    added = sum(change.kind == "add" for change in changes)
    held = compare(seen, after, exact=len(after.objects) - added)
    wanted = [concerned(change, changes, len(after.objects)) for change in changes]
    carried_out = tuple(
        all(held.parts[part] for part in parts) and is_gone(change, before, seen)
        for change, parts in zip(changes, wanted, strict=True)
    )
    kept = [right for part, right in held.parts.items() if part not in set().union(*wanted)]
    return EditScore(carried_out, float(np.mean(kept)), unchanged(picture, before, after), held)


def concerned(change: Change, changes: Sequence[Change], count: int) -> set[Part]:
    """The parts of the edited scene, of `count` objects, that a change decides."""
    match change.kind:
        case "background":
            return {(-1, "background")}
        case "restyle":
            return {(-1, "style")}
        case "remove":
            return set()
        case "add":
            return {(count - 1, name) for name in ALL}
    number = number_after(change.target, changes)
    return {(number, ATTRIBUTES[change.kind]), (number, "place")}


def number_after(target: int, changes: Sequence[Change]) -> int:
    """The number that an object which is not removed has after all changes."""
    return target - sum(x.kind == "remove" and x.target < target for x in changes)


def is_gone(change: Change, before: Scene, seen: Reading) -> bool:
    """Whether nothing stands where an object was removed; True for other changes."""
    if change.kind != "remove":
        return True
    return not any(_within(o, before.objects[change.target], GONE) for o in seen.objects)


def compare(seen: Reading, scene: Scene, exact: int) -> Held:
    """Which parts of a scene are seen; the first `exact` objects have to be at their places."""
    return matched(seen, scene, exact)[0]


def matched(seen: Reading, scene: Scene, exact: int) -> tuple[Held, list[Seen | None]]:
    """The same, and which object seen is which of the scene's, None where there is none.

    Every object of the scene is matched with another one seen, so that most is right.
    """
    options = [*seen.objects, *[None] * len(scene.objects)]
    tables = [
        [_same(there, o, i < exact) for there in options] for i, o in enumerate(scene.objects)
    ]
    best = max(
        itertools.permutations(range(len(options)), len(scene.objects)),
        key=lambda chosen: sum(
            sum(table[j].values()) + PLACED * (i < exact and table[j]["place"])
            for i, (table, j) in enumerate(zip(tables, chosen, strict=True))
        ),
    )
    parts = {
        (-1, "background"): seen.background == scene.background,
        (-1, "style"): seen.style == scene.style,
        (-1, "count"): len(seen.objects) == len(scene.objects),
    }
    for i, j in enumerate(best):
        parts |= {(i, name): right for name, right in tables[i][j].items()}
    return Held(parts), [options[j] for j in best]


def _same(there: Seen | None, o: Object, exact: bool) -> dict[str, bool]:
    if there is None:
        return dict.fromkeys(ALL, False)
    return {
        "shape": there.shape == o.shape,
        "colour": there.colour == o.colour,
        "size": there.size == o.size,
        "texture": there.texture == o.texture,
        "place": _within(there, o, MOVED) if exact else _place_holds(there, o),
    }


def _within(there: Seen, o: Object, limit: float) -> bool:
    return max(abs(there.x - o.x), abs(there.y - o.y)) <= limit


def _place_holds(there: Seen, o: Object) -> bool:
    if o.place not in SIDES:
        return True
    across, down = SIDES[o.place]
    return across * (there.x - SIDE / 2) + down * (there.y - SIDE / 2) >= ASIDE


def unchanged(picture: Picture, before: Scene, after: Scene) -> float | None:
    """Share of unchanged pixels among those more than 2 px from what the true edit changes."""
    first, second = (render(scene).astype(np.float64) for scene in (before, after))
    left = ~grown(grown(np.any(first != second, axis=-1)))
    if left.mean() < LEAST_LEFT:
        return None
    return alike(picture, first, left)


def alike(picture: Picture, other: Float[np.ndarray, "64 64 3"], area: Mask) -> float:
    """Share of the area's pixels that are alike in both pictures."""
    differences = picture.astype(np.float64) - other
    means = np.stack([around(differences[:, :, i]).mean(0) for i in range(3)])
    return float(np.mean(np.abs(means).max(0)[area] <= SAME))
