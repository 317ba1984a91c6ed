# SPDX-License-Identifier: Apache-2.0
"""Claims: runs fall into the right curves, rightly named; comparisons at equal x are exact."""

import numpy as np
import pytest

from ip2p_jax.evaluation.trade_off import Comparison, Curve, compare, curves
from tests.evaluation.rows import ours, point, sdedit

AXES = ("clip_direction", "clip_image")


def line(*places: tuple[float, float]) -> Curve:
    return Curve("a", "image_guidance", [point("ip2p", 1.0, x, y) for x, y in places])


def test_a_run_is_a_line_in_order_of_what_was_swept():
    (curve,) = curves({"mine": ours()[::-1]}, *AXES)
    assert (curve.name, curve.swept) == ("mine", "image_guidance")
    np.testing.assert_array_equal(curve.values("image_guidance"), [1.0, 1.4, 2.2])
    np.testing.assert_array_equal(curve.values("clip_direction"), [0.3, 0.2, 0.1])


def test_names_say_what_differs():
    """Methods, turns and text guidances are curves of their own; names say no more."""
    both = [*ours(), *sdedit()]

    def names(**runs) -> list[str]:
        return [curve.name for curve in curves(runs, *AXES)]

    assert names(a=both) == ["InstructPix2Pix", "SDEdit"]
    assert names(a=both, b=ours()) == ["a, InstructPix2Pix", "a, SDEdit", "b"]
    assert [c.swept for c in curves({"a": both}, *AXES)] == ["image_guidance", "strength"]
    turns = [*ours(), *(p | {"turn": 2} for p in ours())]
    assert names(a=turns) == ["turn 1", "turn 2"]
    scales = [*ours(), *(p | {"text_guidance": 10.0} for p in ours())]
    assert names(a=scales) == ["text guidance 7.5", "text guidance 10"]
    assert names(a=[p | {"method": "other"} for p in ours()]) == ["a"]


def test_text_guidance_swept():
    """At one image guidance the line goes along the text guidance."""
    points = [point("ip2p", 1.5, s / 50, 0.8, text_guidance=s) for s in (9.0, 5.0, 7.5)]
    (curve,) = curves({"a": points}, *AXES)
    assert curve.swept == "text_guidance"
    np.testing.assert_array_equal(curve.values("text_guidance"), [5.0, 7.5, 9.0])


def test_points_that_lack_a_score():
    few = [{k: x for k, x in ours()[0].items() if "direction" not in k}, *ours()[1:]]
    assert len(curves({"a": few}, *AXES)[0].points) == 2
    with pytest.raises(ValueError, match="b: no point has both clip_direction and clip_image"):
        curves({"a": ours(), "b": few[:1]}, *AXES)


def test_equal_x():
    """Two slanted lines: one is above the other by 0.2 wherever both are."""
    a, b = (curves({"": rows}, *AXES)[0] for rows in (ours(), sdedit()))
    got = compare(a, b, *AXES)
    assert got is not None
    np.testing.assert_allclose(got, (0.1, 0.25, 0.2, 0.2, 0.2), atol=1e-12)
    back = compare(b, a, *AXES)
    assert back is not None
    np.testing.assert_allclose(back, (0.1, 0.25, -0.2, -0.2, -0.2), atol=1e-12)


def test_equal_x_by_hand_and_by_a_fine_grid():
    """A bent line over a flat one: a triangle of height 1 over a range of 2 is 0.5 in the mean."""
    roof = line((3.0, 0.0), (2.0, 1.0), (1.0, 0.0))  # order of the points does not matter
    assert compare(roof, line((0.0, 0.0), (9.0, 0.0)), *AXES) == Comparison(1, 3, 0.5, 0, 1)
    rng = np.random.default_rng(0)
    a, b = (line(*rng.random((6, 2)).tolist()) for _ in range(2))
    got = compare(a, b, *AXES)
    assert got is not None
    fine = np.linspace(got.low, got.high, 100_001)
    gap = np.subtract(
        *(
            np.interp(fine, *np.array(sorted(zip(*map(c.values, AXES), strict=True))).T)
            for c in (a, b)
        )
    )
    np.testing.assert_allclose(
        [got.mean, got.least, got.most], [gap.mean(), gap.min(), gap.max()], atol=1e-4
    )


def test_hardly_any_x_in_common():
    a, b = line((0.0, 1.0), (1.0, 2.0)), line((2.0, 0.0), (3.0, 0.0))
    assert compare(a, b, *AXES) is None
    assert compare(a, line((1.0, 0.5), (3.0, 0.0)), *AXES) == Comparison(1, 1, 1.5, 1.5, 1.5)
    assert compare(line((0.5, 1.0)), a, *AXES) == Comparison(0.5, 0.5, -0.5, -0.5, -0.5)
    twice = line((0.5, 1.0), (0.5, 3.0))  # two points at one x count by their mean
    assert compare(twice, a, *AXES) == Comparison(0.5, 0.5, 0.5, 0.5, 0.5)
