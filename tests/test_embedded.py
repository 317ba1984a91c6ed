# SPDX-License-Identifier: Apache-2.0
"""The embedded model is small, complete, float16, and edits with nothing but the package."""

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from data_gen.photos import PHOTOS, held_out_crops
from examples.photo_edits import SIX, measure
from ip2p_jax.editor import Editor
from ip2p_jax.weights.hub import ASSETS, embedded
from ip2p_jax.weights.load import load

FOLDER = ASSETS / "photos"


@pytest.fixture(scope="module")
def photos():
    return load("photos")


def test_files_are_small_and_float16():
    assert "photos" in embedded()
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 12 * 2**20
    tensors = list(FOLDER.rglob("*.safetensors"))
    assert len(tensors) == 3
    for file in tensors:
        with safe_open(file, "np") as opened:
            names = list(opened.keys())
            assert {opened.get_slice(name).get_dtype() for name in names} == {"F16"}


def test_text_tower_and_vocabulary(photos):
    assert len(photos.tokenizer) <= 1024
    assert photos.config.text.positions == 77
    assert 2 <= photos.config.text.layers <= 4


def test_edits_at_its_own_size(photos):
    """Another instruction gives another picture, another seed another one again."""
    [crop] = held_out_crops(1)
    image = Image.fromarray(crop)
    a, b, c = Editor(photos, rows=4)(
        [image] * 3,
        ["invert the colours", "mirror it", "mirror it"],
        seed=[0, 0, 1],
        steps=4,
        sampler="ddim",
    )
    assert a.size == (64, 64)
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() > 2
    assert np.abs(np.asarray(b).astype(int) - np.asarray(c)).mean() > 1


@pytest.mark.slow
@pytest.mark.heavy
def test_edits_are_nearest_to_the_truth(photos):
    """On held-out crops and wordings: at least five of six edits pass in 80 % of the crops, and a
    wrong instruction passes in less than 20 %."""
    scores, _ = measure(
        Editor(photos, rows=64),
        50,
        steps=15,
        sampler="dpmpp_2m",
        text_guidance=2.0,
        image_guidance=1.2,
    )
    assert sum(scores[name].passed >= 0.8 for name in SIX) >= 5
    assert max(score.wrong_passed for score in scores.values()) < 0.2


def test_card_names_the_photographs():
    card = (FOLDER / "README.md").read_text()
    for photo in PHOTOS.values():
        assert photo.file.split(".")[0].replace("_", " ") in card
    assert "chelsea" in card
    assert "held out" in card
