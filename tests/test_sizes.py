# SPDX-License-Identifier: Apache-2.0
"""Claims: the size of an edit is the authors', to the last rounding; what cannot be is one line."""

import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from ip2p_jax.sizes import edit_size, fit, own_size, paper_size


@pytest.mark.parametrize(
    ("size", "resolution", "want"),
    [
        ((512, 512), 512, (512, 512)),
        ((640, 480), 512, (512, 384)),
        ((1920, 1080), 512, (512, 320)),
        ((300, 700), 512, (256, 576)),
        ((98, 98), 512, (448, 448)),  # the rounding of floats is part of it
        ((640, 480), 256, (256, 192)),
        ((1, 1), 512, (512, 512)),
    ],
)
def test_the_papers_rule(size, resolution, want):
    assert paper_size(*size, resolution) == want
    assert edit_size(size, resolution, 64) == want


def authors(width: int, height: int, resolution: int) -> tuple[int, int]:
    """As in the code that the authors released, floor division and all."""
    factor = resolution / max(width, height)
    factor = math.ceil(min(width, height) * factor / 64) * 64 / min(width, height)
    return int((width * factor) // 64) * 64, int((height * factor) // 64) * 64


def test_every_size_up_to_a_thousand():
    """Equal to the authors' code on a grid of sizes; multiples of 64; refused only over 4 x."""
    refused = 0
    for width in range(1, 1000, 7):
        for height in range(1, 1000, 11):
            want = authors(width, height, 512)
            if max(want) > 2048 or min(want) == 0:
                refused += 1
                with pytest.raises(ValueError, match="crop it"):
                    paper_size(width, height, 512)
            else:
                assert paper_size(width, height, 512) == want
                assert want[0] % 64 == want[1] % 64 == 0
    assert 0 < refused < 0.2 * 143 * 91


def test_long_pictures_are_refused():
    assert paper_size(64, 2048, 512) == (64, 2048)
    with pytest.raises(ValueError, match=r"2000x20 .* 6400x64, a side over 4 x 512: crop it"):
        paper_size(2000, 20, 512)


def test_other_networks_have_their_own_multiple():
    assert paper_size(71, 53, 64, 16) == (64, 48)
    assert edit_size((71, 53), 64, 16) == (64, 48)
    assert edit_size((71, 53), None, 16) == (64, 48)


def test_own_size_is_rounded_down():
    assert own_size(700, 300) == (640, 256)
    assert edit_size((700, 300), None, 64) == (640, 256)
    assert own_size(1024, 1024) == (1024, 1024)
    assert own_size(1087, 1023) == (1024, 960)


@pytest.mark.parametrize("size", [(63, 500), (500, 63), (1088, 1024), (8000, 6000)])
def test_own_size_that_cannot_be_names_the_way_out(size):
    with pytest.raises(ValueError, match="{}x{} .*resolution".format(*size)) as error:
        own_size(*size)
    assert "\n" not in str(error.value)


def test_fit_is_a_centred_lanczos_crop():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    image = Image.fromarray(pixels)
    assert fit(image, image.size) is image
    got = fit(image, (64, 48))
    assert got.size == (64, 48)
    assert got.tobytes() == ImageOps.fit(image, (64, 48), Image.Resampling.LANCZOS).tobytes()
    assert got.tobytes() != image.resize((64, 48), Image.Resampling.LANCZOS).tobytes()
