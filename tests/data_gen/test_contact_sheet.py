# SPDX-License-Identifier: Apache-2.0
"""Claims: a contact sheet shows pairs side by side in their shape, with words under them."""

import io

import numpy as np
from PIL import Image

from data_gen.contact_sheet import GAP, SHOWN, TEXT, TILE, contact_sheet


def open_sheet(count: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    before, after = (Image.new("RGB", size, colour) for colour in ("red", "blue"))
    sheet = contact_sheet((before, after, "make it blue " * 30) for _ in range(count))
    return np.asarray(Image.open(io.BytesIO(sheet)))


def test_pairs_and_words():
    sheet = open_sheet(5)
    assert sheet.shape == (2 * (TILE + TEXT), 4 * (2 * TILE + GAP), 3)
    for top, left in ((0, 0), (0, 2 * TILE + GAP), (TILE + TEXT, 0)):
        assert (sheet[top : top + TILE, left : left + TILE] == [255, 0, 0]).all()
        assert (sheet[top : top + TILE, left + TILE : left + 2 * TILE] == [0, 0, 255]).all()
        words = sheet[top + TILE : top + TILE + TEXT, left : left + 2 * TILE]
        assert words.min() < 100 and (words > 250).mean() > 0.5
    assert (sheet[TILE + TEXT :, 2 * TILE + GAP :] == 255).all()  # there is no sixth


def test_shape_and_number():
    """A wide picture is not stretched; what is too much is left out."""
    sheet = open_sheet(SHOWN + 4, (64, 32))
    assert sheet.shape[0] == 8 * (TILE + TEXT)
    red = (sheet[:TILE, :TILE] == [255, 0, 0]).all(axis=-1)
    assert red[: TILE // 2].all() and not red[TILE // 2 :].any()
    assert (open_sheet(0) == 255).all()
