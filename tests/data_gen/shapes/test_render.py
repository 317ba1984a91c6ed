# SPDX-License-Identifier: Apache-2.0
"""Pictures: silhouettes agree with Pillow's polygons and ellipses at 16 times the size, colours are
the named ones, and every attribute that changes, changes pixels."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_gen.shapes import render as drawn
from data_gen.shapes.render import CORNERS, covered, distance, render
from data_gen.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, STYLES, Object, Scene

FINE = 16


def make(**changed) -> Object:
    return Object("circle", "red", "large", "plain", "left", 17.0, 30.5)._replace(**changed)


def by_pillow(o: Object) -> np.ndarray:
    """The covered share of every pixel, drawn large and made small."""
    large = Image.new("L", (64 * FINE, 64 * FINE))
    radius, (x, y) = SIZES[o.size] * FINE, (o.x * FINE - 0.5, o.y * FINE - 0.5)
    draw = ImageDraw.Draw(large)
    if o.shape == "circle":
        around = [x - 0.95 * radius, y - 0.95 * radius, x + 0.95 * radius, y + 0.95 * radius]
        draw.ellipse(around, 255)
    else:
        draw.polygon([(x + radius * a, y + radius * b) for a, b in CORNERS[o.shape]], 255)
    return np.asarray(large.reduce(FINE)) / 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", ["circle", *CORNERS])
def test_silhouettes_agree_with_pillow(shape, size):
    o = make(shape=shape, size=size)
    ours, theirs = covered(distance(o)), by_pillow(o)
    assert abs(ours.sum() - theirs.sum()) < 0.03 * theirs.sum()
    assert np.abs(ours - theirs).max() < 0.35  # at corners; coverage by distance is exact on edges
    wrong = by_pillow(o._replace(shape="circle" if shape != "circle" else "square"))
    assert np.abs(ours - wrong).max() > 0.9


def test_area_of_a_heart():
    scale = SIZES["large"] / 0.603553  # the half circles' outermost points are half its width away
    area = scale**2 * (0.5 + math.pi / 8)
    assert covered(distance(make(shape="heart"))).sum() == pytest.approx(area, rel=0.01)
    width = np.flatnonzero((covered(distance(make(shape="heart"))) > 0.5).any(0))
    assert abs(len(width) - 2 * SIZES["large"]) <= 1


def test_colours_are_the_named_ones():
    for colour, rgb in COLOURS.items():
        for name, (first, last) in BACKGROUNDS.items():
            picture = render(Scene((make(colour=colour),), name, "flat"))
            assert tuple(picture[30, 17]) == rgb
            assert tuple(picture[0, 60]) == first
            assert tuple(picture[63, 60]) == last
            night = render(Scene((make(colour=colour),), name, "night"))
            assert np.abs(night[30, 17] - np.array(rgb) * drawn.NIGHT).max() <= 0.5


def test_every_attribute_changes_pixels():
    scene = Scene((make(),), "white", "flat")
    others = [scene._replace(style=style) for style in STYLES[1:]]
    others += [scene._replace(background=name) for name in list(BACKGROUNDS)[1:]]
    changes = [{"size": "small"}, {"texture": "striped"}, {"texture": "dotted"}]
    changes += [{"shape": shape} for shape in SHAPES[1:]] + [{"colour": "blue"}, {"x": 18.0}]
    others += [scene._replace(objects=(make(**change),)) for change in changes]
    pictures = [render(each) for each in (scene, *others)]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert (np.abs(one.astype(int) - other).max(-1) > 40).sum() > 15


def test_objects_keep_apart():
    objects = make(x=17.0), make(x=47.0, colour="blue", place="right")
    for shape in SHAPES:
        both = [covered(distance(o._replace(shape=shape))) for o in objects]
        assert not (both[0] * both[1]).any()
