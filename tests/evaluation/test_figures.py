# SPDX-License-Identifier: Apache-2.0
"""Claims: figures hold the data, the intervals, the names and the values they should; sheets hold
every picture at its place."""

import io
import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ip2p_jax.evaluation import report
from ip2p_jax.evaluation.figures import COLOURS, guidance_grid, render, sample_grid, trade_off
from ip2p_jax.evaluation.sheets import SIDE
from tests.evaluation.rows import ours, point, sdedit

RUNS = {"all data": ours(), "a tenth": ours(-0.1), "SDEdit": sdedit()}


def draw(runs: Any = RUNS, x: str = "clip_direction", y: str = "clip_image") -> tuple[Figure, Any]:
    figure = trade_off(runs, x, y)
    (axes,) = figure.axes
    return figure, axes


def test_lines_go_through_the_points():
    """In order of the guidance, each in a colour and a marker of its own, named in the legend."""
    _, axes = draw({name: rows[::-1] for name, rows in RUNS.items()})
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == list(RUNS)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(RUNS)
    for line, rows in zip(lines, RUNS.values(), strict=True):
        want = [[row["clip_direction"], row["clip_image"]] for row in rows]
        np.testing.assert_array_equal(line.get_xydata(), want)
    assert [line.get_color() for line in lines] == list(COLOURS[:3])
    assert len({line.get_marker() for line in lines}) == 3


def test_crosses_are_intervals():
    _, axes = draw({"a": ours()})
    across, down = sorted(axes.collections, key=lambda c: np.ptp(c.get_segments()[0][:, 1]))
    for i, row in enumerate(ours()):
        x, y = row["clip_direction"], row["clip_image"]
        np.testing.assert_allclose(across.get_segments()[i], [[x - 0.01, y], [x + 0.01, y]])
        np.testing.assert_allclose(down.get_segments()[i], [[x, y - 0.02], [x, y + 0.02]])


def test_points_carry_their_values():
    _, axes = draw()
    want = ["1.0", "1.4", "2.2"] * 2 + ["0.3", "0.6", "0.9"]
    assert [text.get_text() for text in axes.texts] == want
    places = [row["clip_direction"] for rows in RUNS.values() for row in rows]
    np.testing.assert_array_equal([text.xy[0] for text in axes.texts], places)
    assert axes.get_title("left").startswith("numbers: image guidance or strength  ·  crosses: 95%")
    assert all(text.get_zorder() < axes.lines[0].get_zorder() for text in axes.texts)


def test_axes_say_what_is_better():
    _, axes = draw()
    assert axes.get_xlabel() == "CLIP directional similarity →"
    assert axes.get_ylabel() == "CLIP image similarity →"
    rows = [point("ip2p", s, s / 5, 0.5, l1=s / 9, l1_low=0.0, l1_high=0.5) for s in (1.0, 2.0)]
    assert draw({"a": rows}, y="l1")[1].get_ylabel() == "L1 ←"


def test_everything_is_inside_the_figure():
    """No value, name or label is cut, also with long names and a single point."""
    for runs in (RUNS, {"a" * 40: ours(), "b" * 40: sdedit()}, {"a": ours()[:1]}):
        figure, axes = draw(runs)
        render(figure, "png")
        width, height = figure.canvas.get_width_height()
        parts = [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.get_legend()]
        for box in (part.get_window_extent() for part in [*parts, axes.title]):
            assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height


def test_many_runs():
    """More runs than colours: colour and marker together still tell them apart."""
    _, axes = draw({f"run {i}": ours(-i / 100) for i in range(20)})
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == 20


def test_png_of_readme_width():
    png = report.curve(RUNS)
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG" and picture.size == (1080, 720)
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in COLOURS[:3]:  # of every run something is to be seen
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels.astype(int) - [wanted]).max(axis=1) < 8).sum() > 300
    assert (pixels.min(axis=1) > 250).mean() > 0.7
    assert report.curve(RUNS) == png
    with pytest.raises(ValueError, match="SDEdit: no point has both clip_text and clip_image"):
        report.curve({"SDEdit": sdedit()}, x="clip_text")


@pytest.mark.parametrize(("kind", "begin"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_other_formats_are_the_same_file_again(kind, begin):
    first, second = (render(draw()[0], kind) for _ in range(2))
    assert first == second and first.startswith(begin)


def flat(value: int, height: int = 40, width: int = 60) -> np.ndarray:
    """A picture of one colour, which no other has."""
    return np.full((height, width, 3), [value, 255 - value, 77], np.uint8)


def box(sheet: Image.Image, value: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the picture of that colour."""
    y, x = np.nonzero((np.asarray(sheet) == flat(value, 1, 1)).all(axis=-1))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def test_guidance_grid():
    """s_T downwards and s_I across, upwards in value, all of one size; the input to the left."""
    keys = list(itertools.product((7.5, 3.0), (2.2, 1.0, 1.5)))
    values = {key: 10 * i for i, key in enumerate(keys)}
    pictures = {key: flat(value) for key, value in values.items()}
    sheet = guidance_grid(pictures, flat(200), "make it winter")
    boxes = {key: box(sheet, value) for key, value in values.items()}
    height = round(SIDE * 40 / 60)
    assert all((r - x, b - y) == (SIDE, height) for x, y, r, b in boxes.values())
    lefts = [{boxes[t, i][0] for t in (3.0, 7.5)} for i in (1.0, 1.5, 2.2)]
    tops = [{boxes[t, i][1] for i in (1.0, 1.5, 2.2)} for t in (3.0, 7.5)]
    assert all(len(places) == 1 for places in (*lefts, *tops))
    (left, *_), (top, *_) = (sorted(map(min, places)) for places in (lefts, tops))
    assert [*map(min, lefts)] == sorted(map(min, lefts)) and min(tops[0]) < min(tops[1])
    x, y, right, bottom = box(sheet, 200)
    assert right < left and y == top
    pixels = np.asarray(sheet.convert("L"))
    assert pixels[bottom:, x:right].min() < 100  # the instruction under it
    assert pixels[:y, left:].min() < 100  # titles above
    assert pixels[y:, right + 10 : left].min() < 100  # names beside the lines


def test_guidance_grid_with_a_hole():
    """A point that was not computed stays empty; the others stay where they are."""
    pictures = {(3.0, 1.0): flat(10), (7.5, 1.0): flat(20), (7.5, 2.0): flat(30)}
    sheet = guidance_grid(pictures, flat(200), "make it winter")
    hole = (box(sheet, 30)[0] + 5, box(sheet, 10)[1] + 5)
    assert sheet.getpixel(hole) == (240, 240, 240)


def test_sample_grid():
    """Examples of several shapes downwards, their pictures across; no target stays empty."""
    rows = [
        ("make it winter", [flat(0), flat(10), flat(20)]),
        ("a very long instruction " * 20, [flat(30, 60, 40), flat(40, 60, 40), None]),
    ]
    sheet = sample_grid(rows, ["input", "result", "target"])
    wide, tall = box(sheet, 0), box(sheet, 30)
    assert (wide[2] - wide[0], tall[3] - tall[1]) == (SIDE, SIDE)
    assert wide[3] < tall[1] and box(sheet, 10)[0] > wide[2] and box(sheet, 20)[1] == wide[1]
    assert sheet.getpixel((box(sheet, 20)[0] + 5, tall[1] + 5)) == (240, 240, 240)
    pixels = np.asarray(sheet.convert("L"))
    assert pixels[wide[1] : wide[3], : wide[0]].min() < 100  # the instruction, to the left
    assert pixels[:, wide[0] - 8 : wide[0]].min() == 255  # and not into the pictures
    with pytest.raises(ValueError, match="make it winter.*: 3 pictures, not 2"):
        sample_grid(rows, ["input", "result"])
