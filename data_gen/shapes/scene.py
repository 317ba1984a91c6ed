# SPDX-License-Identifier: Apache-2.0
"""What a picture of the shapes world shows: one to three objects before a background, in a style.

Everything random comes from `random.Random.random`, whose sequence Python promises to keep.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

SIDE = 64  # px

COLOURS = {
    "red": (215, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (35, 150, 55),
    "cyan": (0, 185, 195),
    "blue": (35, 75, 215),
    "purple": (125, 40, 165),
    "pink": (245, 95, 180),
}
BACKGROUNDS = {  # colours of the first and last line; what is between is a gradient
    "white": ((246, 246, 246), (246, 246, 246)),
    "grey": ((164, 164, 164), (164, 164, 164)),
    "beige": ((236, 214, 172), (236, 214, 172)),
    "mint": ((178, 236, 196), (178, 236, 196)),
    "sky": ((146, 198, 250), (214, 234, 254)),
    "sunset": ((190, 168, 232), (255, 204, 160)),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross")
SIZES = {"large": 14.0, "small": 10.0}  # half of an object's width, px
TEXTURES = ("plain", "striped", "dotted")
STYLES = ("flat", "outlined", "shadowed", "night")

PLACES = {"centre": (32, 32), "left": (16, 32), "right": (48, 32), "top": (32, 16),
          "bottom": (32, 48)}  # fmt: skip
LAYOUTS: dict[int, list[dict[str, tuple[int, int]]]] = {
    1: [{name: place} for name, place in PLACES.items()],
    2: [{name: PLACES[name] for name in pair} for pair in (("left", "right"), ("top", "bottom"))],
    3: [
        {"left": (16, 18), "right": (48, 18), "bottom": (32, 46)},
        {"left": (16, 46), "right": (48, 46), "top": (32, 18)},
    ],
}
"""Where objects stand, by their number: the centre of each, px."""

JITTER = 1.0
"""Objects stand up to so many px from there, in halves of a px; one alone up to three times that
in the direction in which its place says nothing."""


class Object(NamedTuple):
    """One object; x to the right and y down are the px of its centre."""

    shape: str
    colour: str
    size: str
    texture: str
    place: str
    x: float
    y: float


class Scene(NamedTuple):
    """A picture in words. No two objects have the same colour or the same place."""

    objects: tuple[Object, ...]
    background: str
    style: str

    def record(self) -> dict[str, Any]:
        """As JSON says it."""
        return self._asdict() | {"objects": [o._asdict() for o in self.objects]}


def from_record(values: Mapping[str, Any]) -> Scene:
    """The inverse of `Scene.record`."""
    objects = tuple(Object(**o) for o in values["objects"])
    return Scene(objects, values["background"], values["style"])


def held_out_combination(colour: str, shape: str, texture: str) -> bool:
    """Whether training never sees an object like this: 21 of 168.

    Every two of the three attributes are seen together, so the third is new with them only.
    """
    numbers = list(COLOURS).index(colour), SHAPES.index(shape), TEXTURES.index(texture)
    return (numbers[0] + 2 * numbers[1] + 3 * numbers[2]) % 8 == 0


def held_out_object(o: Object) -> bool:
    """Whether training never sees an object like this, wherever it stands."""
    return held_out_combination(o.colour, o.shape, o.texture)


def pick(rng: random.Random, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """One of the options, each as likely as its weight says."""
    shares = weights or [1.0] * len(options)
    left = rng.random() * sum(shares)
    for option, share in zip(options, shares, strict=True):
        left -= share
        if left < 0:
            return option
    return options[-1]


def shuffled(rng: random.Random, options: Sequence[T]) -> list[T]:
    """All options in random order."""
    return sorted(options, key=lambda _: rng.random())


def draw_scene(rng: random.Random, count: int, held_out: bool) -> Scene:
    """A random scene of 1 to 3 objects, all of combinations that are held out, or all of others."""
    layout = pick(rng, LAYOUTS[count], [4.0, 1.0, 1.0, 1.0, 1.0] if count == 1 else None)
    objects: list[Object] = []
    for place in shuffled(rng, list(layout)):
        used = [o.colour for o in objects]
        colours = [colour for colour in COLOURS if colour not in used]
        x, y = _jittered(rng, place, layout[place], count == 1)
        objects.append(_draw_object(rng, colours, place, x, y, held_out))
    background = pick(rng, list(BACKGROUNDS))
    return Scene(tuple(objects), background, pick(rng, STYLES, [11.0, 3.0, 3.0, 3.0]))


def _jittered(
    rng: random.Random, place: str, centre: tuple[int, int], alone: bool
) -> tuple[float, float]:
    free_x = alone and place in ("centre", "top", "bottom")
    free_y = alone and place in ("centre", "left", "right")
    moves = [_offset(rng, 3 * JITTER if free else JITTER) for free in (free_x, free_y)]
    return centre[0] + moves[0], centre[1] + moves[1]


def _offset(rng: random.Random, most: float) -> float:
    steps = int(2 * most)
    return pick(rng, range(-steps, steps + 1)) / 2


def _draw_object(
    rng: random.Random, colours: list[str], place: str, x: float, y: float, held_out: bool
) -> Object:
    while True:
        o = Object(
            shape=pick(rng, SHAPES),
            colour=pick(rng, colours),
            size=pick(rng, list(SIZES), [3.0, 2.0]),
            texture=pick(rng, TEXTURES, [1.0, 1.0, 1.0] if held_out else [2.0, 1.0, 1.0]),
            place=place,
            x=x,
            y=y,
        )
        if held_out_object(o) == held_out:
            return o
