# SPDX-License-Identifier: Apache-2.0
"""The scorer: rendered pictures are wholly right; so are ones with blurred edges, noise, moves of
2 px and slightly wrong colours; and whatever is wrong in a picture is found, and only that."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_gen.shapes.edits import KINDS, Change, apply
from data_gen.shapes.examples import example
from data_gen.shapes.reader import see
from data_gen.shapes.render import Picture, render
from data_gen.shapes.scene import BACKGROUNDS, Object, Scene
from data_gen.shapes.score import read, score

CIRCLE = Object("circle", "red", "large", "striped", "left", 16.0, 32.0)
STAR = Object("star", "blue", "small", "plain", "right", 48.0, 32.0)
SCENE = Scene((CIRCLE, STAR), "white", "flat")


def examples(count: int, seed: int = 11):
    """Half of them held out."""
    return [example(i, seed, held_out=bool(i % 2)) for i in range(count)]


def perturbed(picture: Picture, seed: int) -> Picture:
    """As a small network paints: blur of 0.7 px, a move, other colours, noise of 6 grey levels."""
    rng = np.random.default_rng(seed)
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7))
    right, down = rng.integers(-2, 3, 2)
    x = np.pad(np.asarray(blurred, float), ((2, 2), (2, 2), (0, 0)), mode="edge")
    x = x[2 + down : 66 + down, 2 + right : 66 + right]
    x = x * rng.uniform(0.95, 1.05, (1, 1, 3)) + rng.uniform(-4, 4, (1, 1, 3))
    return (x + rng.normal(0, 6, x.shape)).clip(0, 255).astype(np.uint8)


def wrong(picture: Picture, scene: Scene) -> set[tuple[int, str]]:
    """The parts of a scene that are not right in a picture."""
    return {part for part, right in read(picture, scene).parts.items() if not right}


def check_rendered(count: int):
    for made in examples(count):
        judged = score(render(made.after), made.before, made.changes)
        assert judged.done and judged.held.complete, made
        assert judged.kept == 1
        assert judged.untouched in (1.0, None)
        assert read(render(made.before), made.before).complete, made.before
        undone = score(render(made.before), made.before, made.changes)
        assert not any(undone.carried_out), made
        assert undone.untouched in (1.0, None)


def test_rendered_pictures_are_wholly_right_and_unedited_ones_are_not_done():
    check_rendered(80)


@pytest.mark.slow
def test_rendered_pictures_are_wholly_right_1000():
    check_rendered(1000)


def check_perturbed(count: int):
    made = examples(count, seed=12)
    judged = [score(perturbed(render(e.after), i), e.before, e.changes) for i, e in enumerate(made)]
    assert np.mean([j.done and j.held.complete for j in judged]) >= 0.98
    unedited = [
        score(perturbed(render(e.before), i), e.before, e.changes) for i, e in enumerate(made)
    ]
    assert not any(any(j.carried_out) for j in unedited)


def test_perturbed_pictures_are_still_right():
    check_perturbed(60)


@pytest.mark.slow
def test_perturbed_pictures_are_still_right_500():
    check_perturbed(500)


CONTROLS = {
    "shape": CIRCLE._replace(shape="square"),
    "colour": CIRCLE._replace(colour="orange"),
    "size": CIRCLE._replace(size="small"),
    "texture": CIRCLE._replace(texture="dotted"),
    "place": CIRCLE._replace(x=34.0, y=12.0),
}


@pytest.mark.parametrize("part", CONTROLS)
@pytest.mark.parametrize("perturb", [False, True])
def test_one_wrong_attribute_is_found_and_no_other(part, perturb):
    picture = render(SCENE._replace(objects=(CONTROLS[part], STAR)))
    picture = perturbed(picture, 1) if perturb else picture
    assert wrong(picture, SCENE) == {(0, part)}


def test_wrong_backgrounds_and_styles_are_found():
    for background, style in itertools.product(BACKGROUNDS, ("flat", "outlined", "night")):
        scene = SCENE._replace(background=background, style=style)
        found = {(-1, "background")} if background != "white" else set()
        found |= {(-1, "style")} if style != "flat" else set()
        assert wrong(render(scene), SCENE) == found


def test_missing_and_surplus_objects_are_found():
    alone = SCENE._replace(objects=(CIRCLE,))
    lost = {(1, name) for name in ("shape", "colour", "size", "texture", "place")}
    assert wrong(render(alone), SCENE) == lost | {(-1, "count")}
    assert wrong(render(SCENE), alone) == {(-1, "count")}


def test_nothing_is_read_from_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for picture in (noise, np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 246, np.uint8)):
        assert not read(picture, SCENE).complete
    assert see(render(SCENE._replace(objects=()))).objects == ()


def test_swapped_colours_are_wrong():
    objects = CIRCLE._replace(colour="blue"), STAR._replace(colour="red")
    assert len(wrong(render(SCENE._replace(objects=objects)), SCENE)) >= 2


def test_an_edit_of_the_wrong_object_is_not_done():
    change = Change("recolour", "green", 0)
    other = apply(SCENE, [Change("recolour", "green", 1)])
    judged = score(render(other), SCENE, [change])
    assert judged.carried_out == (False,)
    assert judged.kept < 1
    assert judged.untouched is not None and judged.untouched < 0.98


def test_half_of_a_combined_edit_counts_as_half():
    changes = [Change("recolour", "green", 0), Change("background", "grey")]
    judged = score(render(apply(SCENE, changes[:1])), SCENE, changes)
    assert judged.carried_out == (True, False)
    assert not judged.done and judged.kept == 1


def test_harm_beside_the_edit_is_seen():
    change = Change("recolour", "green", 0)
    after = apply(SCENE, [change])
    harmed = after._replace(objects=(after.objects[0], STAR._replace(shape="heart")))
    judged = score(render(harmed), SCENE, [change])
    assert judged.done and judged.kept < 1
    assert judged.untouched is not None and 0.8 < judged.untouched < 1
    darker = (render(after) * 0.8).astype(np.uint8)
    assert (score(darker, SCENE, [change]).untouched or 0) < 0.1


def test_recoloured_is_not_removed():
    judged = score(
        render(apply(SCENE, [Change("recolour", "pink", 0)])), SCENE, [Change("remove", target=0)]
    )
    assert not judged.done


def test_every_kind_has_its_controls():
    """Another edit of the same kind, or of another, is not this one."""
    made = [e for e in examples(160) if len(e.changes) == 1]
    assert {e.changes[0].kind for e in made} == set(KINDS)
    for e, other in zip(made[:40], made[1:41], strict=True):
        if other.after != e.after:
            assert not score(render(other.after), e.before, e.changes).held.complete
