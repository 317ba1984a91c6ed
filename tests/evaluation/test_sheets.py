# SPDX-License-Identifier: Apache-2.0
"""Claims: words stay within their width and lines; pictures keep their shape."""

import numpy as np
import pytest
from PIL import Image

from ip2p_jax.evaluation.sheets import SIZE, fitted, font, picture_table, wrapped, write

TEXTS = (
    "make it winter",
    "swap the coffee for a cup of green tea and put it on a table made of dark oak",
    "a" * 300,
    "ein Schloß in den Wölken, ça va, привет мир",
    "W " * 200,
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("width", "lines"), [(170, 3), (60, 8), (20, 1)])
def test_words_stay_in_their_place(text, width, lines):
    broken = wrapped(text, width, lines)
    assert 1 <= len(broken) <= lines
    assert all(font().getlength(line) <= width for line in broken)
    whole = "".join(broken).replace(" ", "") == text.replace(" ", "")
    assert whole or broken[-1].endswith("…")


def test_words_are_not_broken_where_they_need_not_be():
    assert wrapped("make it  winter\nnow", 1000, 3) == ["make it winter now"]
    assert wrapped("make it winter", 75, 3) == ["make it", "winter"]
    assert wrapped("make it winter", 75, 1) == ["make it…"]
    assert wrapped("", 75, 3) == wrapped("make", 75, 0) == []


@pytest.mark.parametrize(
    ("size", "want"), [((512, 512), (64, 64)), ((30, 60), (32, 64)), ((1000, 1), (64, 1))]
)
def test_pictures_keep_their_shape(size, want):
    for mode in ("RGB", "L", "RGBA"):
        got = fitted(Image.new(mode, size), 64)
        assert (got.size, got.mode) == (want, "RGB")


def test_lines_are_written_one_below_the_other():
    sheet = Image.new("RGB", (100, 100), "white")
    write(sheet, (10, 10), ["one", "two"])
    rows = np.nonzero(np.asarray(sheet.convert("L")).min(axis=1) < 128)[0]
    assert rows.min() >= 10 and rows.max() < 10 + 2.7 * SIZE
    assert (np.diff(rows) > 1).sum() == 1  # a gap between them


def test_a_table_of_nothing():
    assert picture_table([], ["input"]).width > 100
