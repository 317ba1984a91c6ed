# SPDX-License-Identifier: Apache-2.0
"""Pairs of pictures that were made of two captions: rendered ones are wholly right and alike away
from the edit; what is not done, wrong from the start, or changed elsewhere is found."""

import numpy as np

from data_gen.shapes.edits import KINDS, Change, apply
from data_gen.shapes.examples import example
from data_gen.shapes.pair_score import score_pair
from data_gen.shapes.render import render
from data_gen.shapes.scene import Object, Scene

CIRCLE = Object("circle", "red", "small", "striped", "left", 16.0, 32.0)
STAR = Object("star", "blue", "small", "plain", "right", 48.0, 32.0)
SCENE = Scene((CIRCLE, STAR), "white", "flat")
RECOLOUR = (Change("recolour", "green", 0),)


def test_rendered_pairs_are_right_and_alike():
    seen = set()
    for i in range(80):
        made = example(i, 12)
        judged = score_pair(render(made.before), render(made.after), made.before, made.changes)
        assert judged.first and judged.done and judged.second, made
        assert judged.agree is None or judged.agree > 0.995, made
        seen |= {change.kind for change in made.changes}
        undone = score_pair(render(made.before), render(made.before), made.before, made.changes)
        assert not undone.done and undone.first and not undone.second
        assert undone.agree in (1.0, None)
    assert seen == set(KINDS)


def test_what_is_not_asked_for_is_seen_in_how_far_they_agree():
    moved = SCENE._replace(objects=(CIRCLE, STAR._replace(y=27.0)))
    judged = score_pair(render(SCENE), render(apply(moved, RECOLOUR)), SCENE, RECOLOUR)
    assert judged.first and judged.done and judged.second
    assert judged.agree is not None and 0.8 < judged.agree < 0.98
    dark = apply(SCENE, RECOLOUR)._replace(background="beige")
    judged = score_pair(render(SCENE), render(dark), SCENE, RECOLOUR)
    assert judged.done and not judged.second
    assert judged.agree is not None and judged.agree < 0.2


def test_a_first_picture_that_is_wrong():
    other = SCENE._replace(objects=(CIRCLE._replace(shape="square"), STAR))
    judged = score_pair(render(other), render(apply(other, RECOLOUR)), SCENE, RECOLOUR)
    assert not judged.first and judged.done and not judged.second and judged.agree == 1.0


def test_noise_is_neither():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    judged = score_pair(noise, noise[::-1].copy(), SCENE, RECOLOUR)
    assert not (judged.first or judged.done or judged.second)
