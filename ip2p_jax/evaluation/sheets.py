# SPDX-License-Identifier: Apache-2.0
"""Pictures and words on one sheet: what all contact sheets are drawn with."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont

SIDE = 176
"""The longer side of a picture on a sheet, px."""

GAP, MARGIN, SIZE = 6, 14, 14
"""Between pictures, around a sheet, and of letters, px."""

INK, PAPER, EMPTY = "#222222", "#ffffff", "#f0f0f0"
LINE = 1.35  # of the size of letters


@functools.cache
def font(size: int = SIZE) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same letters on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """A picture in RGB whose longer side is `side` px."""
    scale = side / max(picture.size)
    width, height = (max(1, round(x * scale)) for x in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def wrapped(text: str, width: int, lines: int, size: int = SIZE) -> list[str]:
    """Breaks a text into at most `lines` lines of `width` px; what is cut ends in an ellipsis."""
    measure = font(size).getlength
    left, done = " ".join(text.split())[: 10 * lines * width // size], []
    while left and len(done) < lines:
        end = len(left)
        while end > 1 and measure(left[:end]) > width:
            end = max(left.rfind(" ", 0, end), 0) or end - 1
        done.append(left[:end].rstrip())
        left = left[end:].lstrip()
    while left and measure(done[-1] + "…") > width:
        done[-1] = done[-1][:-1]
    return [*done[:-1], done[-1].rstrip() + "…"] if left else done


def write(
    sheet: Image.Image,
    place: tuple[float | int, float | int],
    lines: Sequence[str],
    size: int = SIZE,
    anchor: str = "la",
) -> None:
    """Writes lines downwards from a place (x, y); `anchor` as Pillow has it, of each line."""
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        at = (place[0], place[1] + i * LINE * size)
        draw.text(at, line, fill=INK, font=font(size), anchor=anchor)


class Line(NamedTuple):
    """A line of a table of pictures; None where there is none."""

    label: str
    pictures: Sequence[Image.Image | None]


def picture_table(
    lines: Sequence[Line], titles: Sequence[str], side: int = SIDE, label: int = SIDE
) -> Image.Image:
    """Pictures in lines under titles, beside each line its label, `label` px wide.

    Raises ValueError for a line that has not as many pictures as there are titles.
    """
    for line in lines:
        if len(line.pictures) != len(titles):
            raise ValueError(f"{line.label}: {len(line.pictures)} pictures, not {len(titles)}")
    placed = [[p and fitted(p, side) for p in line.pictures] for line in lines]
    heights = [max((p.height for p in row if p), default=side) for row in placed]
    above = [wrapped(title, side, 2) for title in titles]
    head = round(LINE * SIZE * max(map(len, above), default=0))
    size = (label + len(titles) * (side + GAP) - GAP, head + sum(heights) + GAP * (len(lines) - 1))
    sheet = Image.new("RGB", size, PAPER)
    for j, words in enumerate(above):
        y = head - round(LINE * SIZE * len(words))
        write(sheet, (label + j * (side + GAP) + side / 2, y), words, anchor="ma")
    top = head
    for line, row, height in zip(lines, placed, heights, strict=True):
        most = max(1, int(height / (LINE * SIZE)))
        words = wrapped(line.label, label - MARGIN, most)
        write(sheet, (0, top + (height - LINE * SIZE * len(words)) / 2), words)
        for j, picture in enumerate(row):
            left = label + j * (side + GAP)
            if picture is None:
                sheet.paste(EMPTY, (left, top, left + side, top + height))
            else:
                down = top + (height - picture.height) // 2
                sheet.paste(picture, (left + (side - picture.width) // 2, down))
        top += height + GAP
    return sheet


def framed(picture: Image.Image, margin: int = MARGIN) -> Image.Image:
    """A sheet with paper around it."""
    size = (picture.width + 2 * margin, picture.height + 2 * margin)
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(picture, (margin, margin))
    return sheet
