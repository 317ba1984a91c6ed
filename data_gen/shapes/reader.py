# SPDX-License-Identifier: Apache-2.0
"""Reads a scene back from pixels, without knowing what was meant to be there; numpy alone.

1. The background and the light (day, night) are those whose picture most pixels are near to.
2. Every pixel belongs to the nearest of these lines: from the background to the colour of outlines,
   with shadows half-way, and for each colour from its light to its dark tone. Objects are connected
   pixels of one colour.
3. An object's shape, size and place are those of the silhouette that overlaps it best.
4. Its texture is how dark pixels are spread inside: nowhere, in lines, or neither.
5. Outlines and shadows are where the objects found would have them, or not.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from data_gen.shapes.render import (
    DARK,
    NIGHT,
    OUTLINE,
    OUTLINE_WIDTH,
    SHADOW_SHIFT,
    Picture,
    Plane,
    background,
    plain_colour,
    silhouette,
)
from data_gen.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES

Mask = Bool[np.ndarray, "64 64"]

NEAR = 60.0
"""A pixel this far (Euclid, RGB) from a background says nothing for it."""
LEAST_BACKGROUND = 0.1
"""Share of the picture that the background must explain, or it is unknown."""
LEAST_AREA, LEAST_CORE = 40, 6
"""px of an object, and of what is left of it when a rim of 1 px is taken off: less is a stain or
the blurred edge between two other colours."""
LEAST_OVERLAP = 0.65
"""Intersection over union with the best silhouette, or the shape is unknown."""
LEAST_SPREAD = 0.18
"""Standard deviation of darkness (0 light, 1 dark tone) inside an object that is not plain."""
LINES = 0.7
"""Share of that variance which lies between lines of pixels, or there are no stripes."""
INSIDE = 1.3
"""px from the edge, from where texture is read."""
FALLS = (0.25, 0.68)
"""On the line from background to outlines, shadows are between these places and outlines after."""
HALF = 0.5
"""Share of the places of outlines or shadows that must have them."""


class Seen(NamedTuple):
    """An object that was found; what could not be told is ""."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float


class Reading(NamedTuple):
    """What a picture shows."""

    objects: tuple[Seen, ...]
    background: str
    style: str


class Tones(NamedTuple):
    """How far (Euclid, RGB) each pixel is from what it may be."""

    rest: Plane
    """Distance to the line from the background to outlines; by night to the background."""
    fall: Plane
    """Place on that line: 0 background, 1 outline."""
    colours: Float[np.ndarray, "8 64 64"]
    """Distance to the line from light to dark."""
    darkness: Float[np.ndarray, "8 64 64"]
    """Place on that line: 0 light, 1 dark."""


def see(picture: Picture) -> Reading:
    """What a picture shows."""
    pixels = picture.astype(np.float64)
    name, night = read_background(pixels)
    tones = measure(pixels, name, night)
    masks = segment(tones)
    fits = [fit(mask) for _, mask in masks]
    objects = [_describe(tones, k, f) for (k, _), f in zip(masks, fits, strict=True)]
    style = "night" if night else read_style(tones, fits, [mask for _, mask in masks])
    return Reading(tuple(objects), name, style)


def read_background(pixels: Float[np.ndarray, "64 64 3"]) -> tuple[str, bool]:
    """Its name ("" if unknown), and whether it is night."""
    votes = {}
    for name in BACKGROUNDS:
        for night in (False, True):
            away = distance(pixels, background(name) * (plain_colour(NIGHT) if night else 1))
            near = NEAR * min(NIGHT) if night else NEAR
            votes[name, night] = (1 - away / near).clip(0).mean()
    (name, night), most = max(votes.items(), key=lambda vote: vote[1])
    return (name if most >= LEAST_BACKGROUND else ""), night


def distance(pixels: Float[np.ndarray, "64 64 3"], colours: Float[np.ndarray, "#h #w 3"]) -> Plane:
    """Euclidean distance in RGB."""
    return np.sqrt(((pixels - colours) ** 2).sum(-1))


def to_line(
    pixels: Float[np.ndarray, "64 64 3"],
    start: Float[np.ndarray, "#h #w 3"],
    end: Float[np.ndarray, "#h #w 3"],
) -> tuple[Plane, Plane]:
    """Distance to the line between two colours, and the place on it: 0 start, 1 end."""
    way = end - start
    place = ((pixels - start) * way).sum(-1) / (way * way).sum(-1)
    return distance(pixels, start + way * place.clip(0, 1)[:, :, None]), place


def measure(pixels: Float[np.ndarray, "64 64 3"], name: str, night: bool) -> Tones:
    """Compares every pixel with all that it may be; where the background is unknown, with white."""
    light = plain_colour(NIGHT) if night else plain_colour((1.0, 1.0, 1.0))
    behind = background(name or "white") * light
    tones = [plain_colour(colour) * light for colour in COLOURS.values()]
    lines = [to_line(pixels, tone, tone * DARK) for tone in tones]
    rest, fall = to_line(pixels, behind, plain_colour(OUTLINE))
    if night:
        rest, fall = distance(pixels, behind), np.zeros((SIDE, SIDE))
    colours, darkness = (np.stack(planes) for planes in zip(*lines, strict=True))
    return Tones(rest, fall, colours, darkness)


def around(values: np.ndarray) -> np.ndarray:
    """Every pixel and its eight neighbours, in the first of three dimensions; 0 past the edges."""
    padded = np.zeros((SIDE + 2, SIDE + 2), values.dtype)
    padded[1:-1, 1:-1] = values
    return np.stack([padded[i : i + SIDE, j : j + SIDE] for i, j in np.ndindex(3, 3)])


def grown(mask: Mask) -> Mask:
    """With all pixels that touch it."""
    return np.any(around(mask), axis=0)


def segment(tones: Tones) -> list[tuple[int, Mask]]:
    """The objects: which colour, and which pixels."""
    likely = np.stack([around(away).mean(0) for away in tones.colours]).argmin(0)
    nearest = np.where(tones.rest < tones.colours.min(0), -1, likely)
    labels = connected(nearest)
    parts = []
    for label, area in zip(*np.unique(labels, return_counts=True), strict=True):
        mask = labels == label
        core = ~grown(~mask)
        if label and area >= LEAST_AREA and core.sum() >= LEAST_CORE:
            parts.append((int(nearest[mask][0]), mask))
    taken = np.sum([mask for _, mask in parts], axis=0) if parts else 0
    return [(k, _to_edge(tones, k, mask, taken - mask > 0)) for k, mask in parts]


def connected(colours: Int[np.ndarray, "64 64"]) -> Int[np.ndarray, "64 64"]:
    """A number for each part of one colour that hangs together, also by corners; 0 where the colour
    is -1."""
    labels = np.where(colours < 0, 0, np.arange(1, SIDE * SIDE + 1).reshape(SIDE, SIDE))
    same = (colours >= 0) & (around(colours + 1) == colours[None] + 1)
    while True:
        spread = np.where(same, around(labels), 0).max(0)
        if (spread == labels).all():
            return labels
        labels = spread


def _to_edge(tones: Tones, colour: int, mask: Mask, others: Mask) -> Mask:
    """With its edge: pixels nearby that are more like it than like what is around it."""
    near = grown(grown(mask)) & ~others
    return mask | (near & (tones.colours[colour] < tones.rest))


class Fit(NamedTuple):
    """The silhouette that overlaps a mask best; `radius`, x and y in px."""

    shape: str
    radius: float
    x: float
    y: float
    overlap: float

    def distance(self, shift: int = 0) -> Plane:
        """Signed distance of every pixel to it, moved by `shift` both ways."""
        column, row = int(self.x // 1), int(self.y // 1)
        whole = silhouette(self.shape, self.radius, self.x - column, self.y - row)
        top, left = SIDE - row - shift, SIDE - column - shift
        return whole[top : top + SIDE, left : left + SIDE]


@functools.lru_cache(maxsize=1024)
def template(shape: str, radius: float, x: float, y: float) -> tuple[int, np.ndarray]:
    """Area (px) of a silhouette at (x, y) of a picture whose edges join, and its conjugate
    spectrum."""
    half = SIDE // 2
    whole = silhouette(shape, radius, x, y)[half : half + SIDE, half : half + SIDE] < 0
    return int(whole.sum()), np.fft.rfft2(np.roll(whole, (-half, -half), (0, 1))).conj()


@functools.cache
def unit_area(shape: str) -> float:
    """Area over the square of the radius."""
    return float((silhouette(shape, 24.0, 0.0, 0.0) < 0).sum()) / 24**2


def fit(mask: Mask) -> Fit:
    """The best of all shapes, at radii that give about the mask's area, at halves of a px."""
    area, spectrum = int(mask.sum()), np.fft.rfft2(mask)
    best = Fit("", 0.0, 0.0, 0.0, 0.0)
    for shape in SHAPES:
        middle = round(2 * (area / unit_area(shape)) ** 0.5) / 2
        for radius in (middle - 0.5, middle, middle + 0.5):
            for x, y in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
                whole, conjugate = template(shape, radius, x, y)
                common = np.fft.irfft2(spectrum * conjugate, (SIDE, SIDE))
                row, column = divmod(int(common.argmax()), SIDE)
                shared = float(common[row, column])
                overlap = shared / (area + whole - shared)
                if overlap > best.overlap:
                    best = Fit(shape, radius, column + x, row + y, overlap)
    return best


def _describe(tones: Tones, colour: int, fitted: Fit) -> Seen:
    limit = (SIZES["large"] * SIZES["small"]) ** 0.5
    known = fitted.overlap >= LEAST_OVERLAP
    texture = read_texture(tones.darkness[colour], fitted.distance() < -INSIDE)
    return Seen(
        shape=fitted.shape if known else "",
        colour=list(COLOURS)[colour],
        size="large" if fitted.radius > limit else "small",
        texture=texture,
        x=fitted.x,
        y=fitted.y,
    )


def read_texture(dark: Plane, inside: Mask) -> str:
    """plain, striped, dotted, or "" for lines that go down and for nothing to read from."""
    if not inside.any():
        return ""
    if dark[inside].std() < LEAST_SPREAD:
        return "plain"
    total = dark[inside].var()
    across, down = (_between_lines(dark, inside, axis) / total for axis in (1, 0))
    if across > LINES:
        return "striped"
    return "dotted" if down < LINES else ""


def _between_lines(dark: Plane, inside: Mask, axis: int) -> float:
    """Variance between the means of lines."""
    counts = inside.sum(axis)
    means = (dark * inside).sum(axis) / np.maximum(counts, 1)
    return float((counts * (means - dark[inside].mean()) ** 2).sum() / counts.sum())


def read_style(tones: Tones, fits: list[Fit], masks: list[Mask]) -> str:
    """flat, outlined or shadowed, by day."""
    objects = np.any(masks, axis=0) if masks else np.zeros((SIDE, SIDE), bool)
    low, high = FALLS
    darkest = around(np.where(objects, 0, tones.fall)).max(0)
    beside, above, shadowed = [], [], []  # dark stripes at the edges look like outlines above
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    for fitted in fits:
        away = fitted.distance()
        ring = (away > 0.3) & (away < OUTLINE_WIDTH - 0.4) & ~objects
        sideways = np.abs(columns - fitted.x) > np.abs(rows - fitted.y)
        beside += list(darkest[ring & sideways] > high)
        above += list(darkest[ring & ~sideways] > high)
        shade = (fitted.distance(SHADOW_SHIFT) < -0.5) & (away > 1) & ~objects
        shadowed += list((tones.fall[shade] > low) & (tones.fall[shade] < high))
    if min(np.mean(beside or [0]), np.mean(above or [0])) >= HALF:
        return "outlined"
    return "shadowed" if np.mean(shadowed or [0]) >= HALF else "flat"
