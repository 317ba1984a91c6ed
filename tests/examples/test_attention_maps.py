# SPDX-License-Identifier: Apache-2.0
"""Claims: words' maps are drawn beside the picture; errors are named."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import attention_maps  # noqa: E402

PROMPT = "a cat on a red mat"


@pytest.fixture(scope="module")
def made(tiny_sd, tmp_path_factory):
    """The drawn file, and what was drawn."""
    file = tmp_path_factory.mktemp("maps") / "maps.png"
    results = []
    with pytest.MonkeyPatch.context() as patch:
        make = attention_maps.make
        patch.setattr(attention_maps, "make", lambda *x: results.append(make(*x)) or results[0])
        options = ["--prompt", PROMPT, "--output", str(file), "--steps", "3", "--seed", "4"]
        assert attention_maps.main(["--model", str(tiny_sd), *options]) == 0
    return file, *results[0]


def test_maps_are_written_and_drawn(made):
    file, picture, words, maps = made
    written = np.load(file.with_suffix(".npz"))
    assert written["words"].tolist() == words == PROMPT.split()
    assert np.array_equal(written["maps"], maps)
    assert maps.shape == (6, 16, 16)
    assert (maps > 0).all()
    assert (maps.sum(0) < 1).all()  # start and end token and padding have the rest
    assert np.abs(maps[1] - maps[5]).max() > 1e-4
    assert np.asarray(picture).std() > 10
    with Image.open(file) as drawn:
        assert drawn.width > 4 * 200 and drawn.height > 2 * 200  # 1 + 6 in rows of 4
        assert np.asarray(drawn.convert("L")).std() > 10


def test_bad_input_is_named(tiny_sd, tiny_ip2p, tmp_path, capsys):
    good = {"--model": str(tiny_sd), "--prompt": "a", "--output": str(tmp_path / "x.png")}
    for option, value, words in (
        ("--prompt", " ", "--prompt: expected at least one word"),
        ("--output", "x.jpg", "--output: 'x.jpg', expected a .png file"),
        ("--steps", "0", "--steps: 0, expected 1 to 1000"),
        ("--sampler", "x", "--sampler: 'x', expected one of"),
        ("--resolution", "65", "size: 65x65, expected multiples of 16 px"),
        ("--model", str(tiny_ip2p), "this model is not text-to-image"),
    ):
        options = [x for pair in {**good, option: value}.items() for x in pair]
        assert attention_maps.main(options) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
