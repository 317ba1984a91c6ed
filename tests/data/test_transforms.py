# SPDX-License-Identifier: Apache-2.0
"""Both pictures of a pair get one window and one flip."""

import numpy as np
import pytest
from PIL import Image

from ip2p_jax.config import Data
from ip2p_jax.data.buckets import Bucket
from ip2p_jax.data.pairs import Pair
from ip2p_jax.data.transforms import View, draw_view, example, see
from tests.data.released import encode, picture

CFG = Data(resolution=24, resize_min=26, resize_max=40)
SQUARE = Bucket(24, 24)
X = picture(40, 2)
PAIR = Pair(encode(X, "PNG"), encode(255 - X, "PNG"), "invert it", "", "", "0000000", "1")


def test_pictures_of_a_pair_share_window_and_flip():
    rng = np.random.default_rng(0)
    for _ in range(20):
        seen = example(PAIR, rng, CFG, SQUARE)
        assert seen.input.shape == (24, 24, 3)
        assert np.abs(255 - seen.input.astype(int) - seen.output).max() <= 1
    # Control: under two different draws the same comparison fails.
    one, two = (example(PAIR, rng, CFG, SQUARE) for _ in range(2))
    assert np.abs(255 - one.input.astype(int) - two.output).max() > 10


def test_views_cover_their_range():
    rng = np.random.default_rng(0)
    views = [draw_view(rng, CFG, SQUARE) for _ in range(3000)]
    assert all(view.width == view.height for view in views)
    assert {view.width for view in views} == set(range(26, 41))
    assert all(0 <= v.left <= v.width - 24 and 0 <= v.top <= v.height - 24 for v in views)
    assert {v.left for v in views if v.width == 28} == set(range(5))
    assert abs(np.mean([view.flip for view in views]) - 0.5) < 4 * 0.5 / 3000**0.5


def test_defaults_are_a_resize_without_crop():
    view = draw_view(np.random.default_rng(0), Data(resolution=24, flip=0.0), SQUARE)
    assert view == View(width=24, height=24, left=0, top=0, flip=False, bucket=SQUARE)
    want = Image.fromarray(X).resize((24, 24), Image.Resampling.LANCZOS)
    assert np.array_equal(see(PAIR.input, view), np.asarray(want))
    mirrored = see(PAIR.input, view._replace(flip=True))
    assert np.array_equal(mirrored, np.asarray(want)[:, ::-1])


def test_a_picture_that_does_not_decode_is_named():
    with pytest.raises(ValueError, match="prompt 0000000, pair 1"):
        example(PAIR._replace(output=PAIR.output[:-60]), np.random.default_rng(0), CFG, SQUARE)


def test_a_bucket_is_cut_from_what_is_enlarged_alike():
    wide, rng = Bucket(36, 20), np.random.default_rng(0)
    views = [draw_view(rng, Data(resolution=24, resize_max=30), wide) for _ in range(300)]
    assert {(v.width, v.height) for v in views} == {
        (round(36 * s / 24), round(20 * s / 24)) for s in range(24, 31)
    }
    assert all(v.left <= v.width - 36 and v.top <= v.height - 20 for v in views)
    assert {v.top for v in views if v.height == 25} == set(range(6))
    assert see(PAIR.input, views[0]).shape == (20, 36, 3)
