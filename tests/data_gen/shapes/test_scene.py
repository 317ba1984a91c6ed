# SPDX-License-Identifier: Apache-2.0
"""Scenes and edits: examples never change, obey the rules of the world, and hold out what they say.

Golden digests pin examples and pixels for every machine and version.
"""

import hashlib
import json
from collections import Counter

import pytest

from data_gen.shapes.edits import KINDS, apply
from data_gen.shapes.examples import example
from data_gen.shapes.render import render
from data_gen.shapes.scene import (
    COLOURS,
    SHAPES,
    STYLES,
    TEXTURES,
    held_out_combination,
    held_out_object,
)
from data_gen.shapes.write import read_example

TRAINING = [example(i) for i in range(600)]
HELD_OUT = [example(i, 3, held_out=True) for i in range(300)]


def test_examples_and_pixels_are_the_same_for_ever():
    texts, pixels = hashlib.sha256(), hashlib.sha256()
    for made in (*TRAINING[:40], *HELD_OUT[:40]):
        texts.update(json.dumps(made.record()).encode())
        pixels.update(render(made.before).tobytes() + render(made.after).tobytes())
    assert texts.hexdigest()[:16] == "271b59427472374f"
    assert pixels.hexdigest()[:16] == "84ef18ce325dbdc5"


def test_seed_number_and_share_decide_an_example():
    assert example(5) == TRAINING[5]
    assert len({TRAINING[5], TRAINING[6], example(5, 1), example(5, 0, held_out=True)}) == 4


def test_every_two_attributes_of_a_held_out_combination_are_seen_together():
    free = {
        (colour, shape, texture)
        for colour in COLOURS
        for shape in SHAPES
        for texture in TEXTURES
        if not held_out_combination(colour, shape, texture)
    }
    assert len(free) == 168 - 21
    assert len({(c, s) for c, s, _ in free}) == 56
    assert len({(c, t) for c, _, t in free}) == 24
    assert len({(s, t) for _, s, t in free}) == 21


def test_training_never_sees_a_held_out_combination_and_held_out_scenes_nothing_else():
    for made in TRAINING:
        assert not any(map(held_out_object, (*made.before.objects, *made.after.objects)))
    for made in HELD_OUT:
        assert all(map(held_out_object, made.before.objects))


@pytest.mark.parametrize("examples", [TRAINING, HELD_OUT], ids=["training", "held out"])
def test_scenes_obey_the_rules(examples):
    for made in examples:
        for scene in (made.before, made.after):
            assert 1 <= len(scene.objects) <= 3
            assert len({o.colour for o in scene.objects}) == len(scene.objects)
            assert len({o.place for o in scene.objects}) == len(scene.objects)


def test_an_edit_changes_what_it_says_and_nothing_else():
    seen = Counter()
    for made in TRAINING:
        seen.update(change.kind for change in made.changes)
        for change in made.changes:
            alone = apply(made.before, [change])
            assert alone != made.before
            match change.kind:
                case "background":
                    assert alone == made.before._replace(background=change.value)
                case "restyle":
                    assert alone == made.before._replace(style=change.value)
                    assert "flat" in (change.value, made.before.style)
                case "add":
                    assert alone.objects[:-1] == made.before.objects
                case "remove":
                    assert set(alone.objects) < set(made.before.objects)
                case _:
                    pairs = zip(made.before.objects, alone.objects, strict=True)
                    fields = [sum(x != y for x, y in zip(a, b, strict=True)) for a, b in pairs]
                    assert sorted(fields) == [0] * (len(fields) - 1) + [1]
        assert made.after == apply(made.before, made.changes)
    assert set(seen) == set(KINDS)
    assert min(seen.values()) > 40
    assert {made.before.style for made in TRAINING} == set(STYLES)


def test_records_are_read_back():
    for made in (*TRAINING[:50], *HELD_OUT[:50]):
        assert read_example(json.loads(json.dumps(made.record()))) == made
