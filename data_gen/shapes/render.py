# SPDX-License-Identifier: Apache-2.0
"""Draws scenes with numpy: only sums, products, quotients and roots in float64, which every machine
rounds alike, so the same scene has the same bytes everywhere.

Edges are antialiased by signed distance: a pixel is covered by 0.5 - distance of its centre (px).
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from data_gen.shapes.scene import BACKGROUNDS, COLOURS, SIDE, SIZES, Object, Scene

Plane = Float[np.ndarray, "h w"]
Colours = Float[np.ndarray, "#h #w 3"]
Corner = tuple[float | int, float | int]
Picture = UInt8[np.ndarray, "64 64 3"]

DARK = 0.42
"""Stripes and dots have the object's colour times this."""
PERIOD = 8.0
"""Of stripes and dots, px."""
DOT = 0.3
"""Radius of a dot in periods."""
OUTLINE_WIDTH, OUTLINE = 2.0, (24.0, 24.0, 28.0)
"""Outlines lie around objects, 2 px wide."""
SHADOW_SHIFT, SHADOW = 3, 0.55
"""Shadows lie 3 px to the right and below, where the background is darkened by this factor."""
NIGHT = (0.48, 0.52, 0.74)
"""Night is everything times this."""

STAR = ((0, -1), (0.29, -0.4), (0.951, -0.309), (0.47, 0.153), (0.588, 0.809), (0, 0.5),
        (-0.588, 0.809), (-0.47, 0.153), (-0.951, -0.309), (-0.29, -0.4))  # fmt: skip
CROSS = ((-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36), (0.36, 1),
         (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36))  # fmt: skip
CORNERS = {
    "square": ((-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)),
    "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
    "diamond": ((0, -1), (0.84, 0), (0, 1), (-0.84, 0)),
    "star": STAR,
    "cross": CROSS,
}
"""Of a polygon with half its width 1; y goes down."""


def to_polygon(x: Plane, y: Plane, corners: tuple[Corner, ...]) -> Plane:
    """Signed distance to a polygon, negative inside."""
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clip(0, 1)
        dx, dy = px - ex * along, py - ey * along
        nearest = np.minimum(nearest, dx * dx + dy * dy)
        side = ex * py - ey * px
        inside ^= np.where(py >= 0, (y < by) & (side > 0), (y >= by) & (side < 0))
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def to_heart(x: Plane, y: Plane) -> Plane:
    """Signed distance to a heart of half width 1: a square on its corner and two half circles."""
    scale = 1 / 0.603553  # of the heart over a square with the diagonal 1, its corner at the origin
    u, v = np.abs(x) / scale, (0.92 - y) / scale
    du, dv = u - 0.25, v - 0.75
    lobe = np.sqrt(du * du + dv * dv) - np.sqrt(2) / 4
    top = u * u + (v - 1) * (v - 1)
    half = np.maximum(u + v, 0) / 2
    edge = np.sqrt(np.minimum(top, (u - half) * (u - half) + (v - half) * (v - half)))
    return scale * np.where(u + v > 1, lobe, np.where(u > v, edge, -edge))


@functools.lru_cache(maxsize=256)
def silhouette(shape: str, radius: float, x: float, y: float) -> Plane:
    """Signed distance (px) to a shape at (SIDE + x, SIDE + y) on a canvas of twice the side."""
    places = np.arange(2 * SIDE) + 0.5 - SIDE
    dx, dy = np.meshgrid((places - x) / radius, (places - y) / radius)
    if shape == "circle":
        return radius * (np.sqrt(dx * dx + dy * dy) - 0.95)
    if shape == "heart":
        return radius * to_heart(dx, dy)
    return radius * to_polygon(dx, dy, CORNERS[shape])


def distance(o: Object, shift: int = 0) -> Plane:
    """Signed distance (px) of every pixel to an object that is moved by `shift` both ways."""
    column, row = int(o.x // 1), int(o.y // 1)
    whole = silhouette(o.shape, SIZES[o.size], o.x - column, o.y - row)
    top, left = SIDE - row - shift, SIDE - column - shift
    return whole[top : top + SIDE, left : left + SIDE]


def covered(distances: Plane) -> Plane:
    """How much of a pixel lies within an edge."""
    return (0.5 - distances).clip(0, 1)


def darkness(o: Object) -> Plane:
    """How much of every pixel is stripe or dot: 0 to 1."""
    centres = np.arange(SIDE) + 0.5
    dx = (centres - o.x + PERIOD / 2) % PERIOD - PERIOD / 2
    dy = (centres - o.y + PERIOD / 2) % PERIOD - PERIOD / 2
    if o.texture == "striped":
        return np.broadcast_to(covered(np.abs(dy)[:, None] - PERIOD / 4), (SIDE, SIDE))
    return covered(np.sqrt((dx * dx)[None] + (dy * dy)[:, None]) - DOT * PERIOD)


@functools.cache
def background(name: str) -> Colours:
    """A background alone, by day."""
    first, last = np.array(BACKGROUNDS[name], float)
    share = (np.arange(SIDE) / (SIDE - 1))[:, None, None]
    lines = first[None, None] * (1 - share) + last[None, None] * share
    return np.broadcast_to(lines, (SIDE, SIDE, 3))


def mix(below: Colours, above: Colours, share: Plane) -> Colours:
    """Paints `above` over `below` where `share` is 1."""
    return below + (above - below) * share[:, :, None]


def plain_colour(rgb: Sequence[float | int]) -> Float[np.ndarray, "1 1 3"]:
    """A colour that covers a picture."""
    return np.array(rgb, float)[None, None]


def render(scene: Scene) -> Picture:
    """The picture of a scene, 64 px."""
    picture = background(scene.background)
    if scene.style == "shadowed":
        shaded = [covered(distance(o, SHADOW_SHIFT)) for o in scene.objects]
        picture = picture * (1 - (1 - SHADOW) * np.max(shaded, axis=0))[:, :, None]
    for o in scene.objects:
        edge = distance(o)
        if scene.style == "outlined":
            picture = mix(picture, plain_colour(OUTLINE), covered(edge - OUTLINE_WIDTH))
        colour = plain_colour(COLOURS[o.colour])
        if o.texture != "plain":
            colour = colour * (1 - (1 - DARK) * darkness(o))[:, :, None]
        picture = mix(picture, colour, covered(edge))
    if scene.style == "night":
        picture = picture * plain_colour(NIGHT)
    return np.rint(picture).astype(np.uint8)
