# SPDX-License-Identifier: Apache-2.0
"""The measure of photo edits: truth passes, doing nothing and wrong edits fail."""

import sys
from pathlib import Path

import numpy as np
import pytest

from data_gen.edits import EDITS
from data_gen.photos import held_out_crops

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from photo_edits import MEASURED, SIX, mse, passes  # noqa: E402


@pytest.fixture(scope="module")
def pictures():
    crops = np.stack(held_out_crops(8))
    truths = {n: np.stack([e.function(x) for x in crops]) for n, e in EDITS.items()}
    return crops, truths


@pytest.mark.parametrize("name", MEASURED)
def test_truth_passes_and_nothing_else(pictures, name):
    crops, truths = pictures
    noisy = truths[name].astype(np.float32) + np.random.default_rng(0).normal(0, 4, crops.shape)
    noisy = noisy.clip(0, 255).astype(np.uint8)
    assert passes(truths[name], crops, truths, name).all()
    assert name not in SIX or passes(noisy, crops, truths, name).all()
    assert not passes(crops, crops, truths, name).any()
    for other in MEASURED:
        assert other == name or not passes(truths[other], crops, truths, name).any()


def test_mse_is_of_pixels_in_0_1():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert mse(black, white)[0] == 1.0
