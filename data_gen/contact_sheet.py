# SPDX-License-Identifier: Apache-2.0
"""Pairs to look at, on one sheet."""

import io
import itertools
from collections.abc import Iterable

from PIL import Image

from ip2p_jax.evaluation import sheets

COLUMNS, LINES = 4, 8
SHOWN = COLUMNS * LINES
"""Pairs on a sheet."""

TILE, TEXT, GAP = 192, 52, 8  # px
LETTERS = 12  # px
WORDS = 3  # lines


def contact_sheet(pairs: Iterable[tuple[Image.Image, Image.Image, str]]) -> bytes:
    """A PNG of up to `SHOWN` pairs: before, after, and the instruction under them."""
    shown = list(itertools.islice(pairs, SHOWN))
    lines = -(-len(shown) // COLUMNS)
    size = (COLUMNS * (2 * TILE + GAP), max(lines, 1) * (TILE + TEXT))
    sheet = Image.new("RGB", size, sheets.PAPER)
    for i, (before, after, instruction) in enumerate(shown):
        left, top = i % COLUMNS * (2 * TILE + GAP), i // COLUMNS * (TILE + TEXT)
        for j, image in enumerate((before, after)):
            sheet.paste(sheets.fitted(image, TILE), (left + j * TILE, top))
        words = sheets.wrapped(instruction, 2 * TILE - GAP, WORDS, LETTERS)
        sheets.write(sheet, (left + 2, top + TILE + 2), words, LETTERS)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
