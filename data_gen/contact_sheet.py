# SPDX-License-Identifier: Apache-2.0
"""Pairs to look at, on one sheet."""

import io
import itertools
import textwrap
from collections.abc import Iterable

from PIL import Image, ImageDraw

COLUMNS, LINES = 4, 8
SHOWN = COLUMNS * LINES
"""Pairs on a sheet."""

TILE, TEXT = 192, 44  # px


def contact_sheet(pairs: Iterable[tuple[Image.Image, Image.Image, str]]) -> bytes:
    """A PNG of up to `SHOWN` pairs: before, after, and the instruction under them."""
    shown = list(itertools.islice(pairs, SHOWN))
    lines = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (2 * TILE + 8), max(lines, 1) * (TILE + TEXT)), "white")
    write = ImageDraw.Draw(sheet)
    for i, (before, after, instruction) in enumerate(shown):
        left, top = i % COLUMNS * (2 * TILE + 8), i // COLUMNS * (TILE + TEXT)
        for j, image in enumerate((before, after)):
            tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left + j * TILE, top))
        words = "\n".join(textwrap.wrap(instruction, 2 * TILE // 7)[:3])
        write.multiline_text((left + 2, top + TILE + 2), words, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
