# SPDX-License-Identifier: Apache-2.0
"""Measuring: a model that is always right has 100 %, one that does nothing carries out nothing; the
same rows when it was stopped; a real model goes all the way; one line for wrong options."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from data_gen.shapes import measure
from data_gen.shapes.examples import example
from data_gen.shapes.render import render
from data_gen.shapes.scene import held_out_object


class Right:
    """Knows all scenes by their texts."""

    def __init__(self, count: int, seed: int = 1, held_out: bool = False):
        asked = [(i, n) for n in (1, 2, 3) for i in range(count)]
        made = [measure.captioned(i, n, seed, held_out) for i, n in asked]
        self.scenes = {x.caption: x.scene for x in made}
        edits = [example(i, seed, held_out) for i in range(count)]
        self.edits = {(render(x.before).tobytes(), x.instruction): x.after for x in edits}

    def __call__(self, *args, **options):
        if len(args) == 1:
            return [Image.fromarray(render(self.scenes[x])) for x in args[0]]
        asked = zip([np.asarray(x).tobytes() for x in args[0]], args[1], strict=True)
        return [Image.fromarray(render(self.edits[x])) for x in asked]


class Idle:
    """Gives back what it got."""

    def __call__(self, images, instructions, **options):
        return images


def run(monkeypatch, folder, model, *options: str) -> list[dict]:
    monkeypatch.setattr(measure, "open_model", lambda *args: model)
    assert measure.main([*options, "--model", "any", "--output", str(folder)]) == 0
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def percents(folder, row: str) -> list[float]:
    """The numbers before intervals in a line of the table, after the count."""
    [line] = [
        x for x in (folder / "table.md").read_text().splitlines() if x.startswith(f"| {row} ")
    ]
    return [float(re.split(r" \(", cell)[0]) for cell in line.strip("| ").split(" | ")[2:]]


def test_generating_what_is_right(monkeypatch, tmp_path):
    options = ("generate", "--count", "8", "--held-out")
    rows = run(monkeypatch, tmp_path, Right(8, held_out=True), *options)
    assert [row["objects"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    assert all(row["complete"] for row in rows)
    assert percents(tmp_path, "3") == [100.0] * 9
    scenes = [measure.captioned(i, 2, 1, True).scene for i in range(8)]
    assert all(held_out_object(o) for scene in scenes for o in scene.objects)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000


def test_wrong_pictures_are_wrong(monkeypatch, tmp_path):
    """Each caption gets the picture of the one before."""
    right = Right(8)
    scenes = list(right.scenes.values())
    right.scenes = dict(zip(right.scenes, [scenes[-1], *scenes], strict=False))
    rows = run(monkeypatch, tmp_path, right, "generate", "--count", "8")
    assert not any(row["complete"] for row in rows)


def test_edits_that_are_right_and_none(monkeypatch, tmp_path):
    count = ("--count", "40")
    rows = run(monkeypatch, tmp_path / "right", Right(40), "edit", *count)
    assert all(row["done"] and row["kept"] == 1 and row["untouched"] in (1, None) for row in rows)
    assert percents(tmp_path / "right", "all") == [100.0] * 3
    rows = run(monkeypatch, tmp_path / "idle", Idle(), "edit", *count)
    assert not any(row["done"] for row in rows)
    done, kept, untouched = percents(tmp_path / "idle", "all")
    assert done == 0 and kept > 90 and untouched == 100


def test_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "CHUNK", 10)
    whole = run(monkeypatch, tmp_path, Right(8), "generate", "--count", "8")
    first = tmp_path / "rows/000000.jsonl"
    (tmp_path / "rows/000010.jsonl").unlink()
    before = first.stat().st_mtime_ns
    assert run(monkeypatch, tmp_path, Right(8), "generate", "--count", "8") == whole
    assert first.stat().st_mtime_ns == before


def test_a_vae_that_changes_nothing_and_one_that_blurs(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "open_vae", lambda model: lambda pictures: pictures)
    options = ["vae", "--model", "any", "--count", "6", "--rows", "4"]
    assert measure.main([*options, "--output", str(tmp_path / "same")]) == 0
    assert percents(tmp_path / "same", "2") == [100.0] * 9
    assert "error: 0.000 of 255" in (tmp_path / "same" / "table.md").read_text()

    def coarse(pictures):
        return np.repeat(np.repeat(pictures[:, ::8, ::8], 8, 1), 8, 2)

    monkeypatch.setattr(measure, "open_vae", lambda model: coarse)
    assert measure.main([*options, "--output", str(tmp_path / "coarse")]) == 0
    assert percents(tmp_path / "coarse", "2")[0] < 50


@pytest.mark.slow
def test_real_models(monkeypatch, tiny_sd, tiny_ip2p, tiny_clip, tmp_path):
    """Random weights: nothing is right, and every table is there."""
    monkeypatch.setattr(measure, "P", (0.0, 0.5))
    monkeypatch.setitem(measure.PARTS, "pairs", 2)
    for what, model in (
        ("vae", tiny_sd),
        ("generate", tiny_sd),
        ("edit", tiny_ip2p),
        ("pairs", tiny_sd),
    ):
        clip = ["--clip", str(tiny_clip)] if what == "pairs" else []
        steps = [] if what == "vae" else ["--steps", "2"]
        options = ["--model", str(model), "--count", "2", *steps, *clip]
        assert measure.main([what, *options, "--output", str(tmp_path / what)]) == 0
        rows = (tmp_path / what / "rows.jsonl").read_text().splitlines()
        assert len(rows) == 2 * measure.PARTS[what]
        held = [json.loads(row) for row in rows]
        assert not any(row.get("complete", row.get("done")) for row in held)
    assert len({row["sim_image"] for row in held}) == 4  # each p makes other pairs


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["edit", "--clip", "x"], "--clip: expected for pairs only"),
        (["pairs"], "--clip: expected for pairs"),
        (["edit", "--count", "0"], "--count, --rows: expected at least 1"),
        (["edit", "--steps", "0"], "steps"),
        (["generate", "--image-guidance", "1.2"], "--image-guidance: expected for edit only"),
        (
            ["pairs", "--clip", "x", "--rows", "4"],
            "--rows: expected for vae and generate and edit only",
        ),
        (["vae", "--steps", "5"], "--steps: expected for generate and edit and pairs only"),
        (["vae", "--dtype", "bfloat16"], "--dtype: not expected for vae"),
        (["vae", "--lora", "x"], "--lora: not expected for vae"),
    ],
)
def test_one_line_for_wrong_options(options, line, tmp_path, capsys):
    assert measure.main([*options, "--model", "m", "--output", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err


def test_another_model_needs_another_folder(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, Right(2), "generate", "--count", "2")
    again = ["generate", "--count", "2", "--model", "other", "--output", str(tmp_path)]
    assert measure.main(again) == 2
    assert "was made with model 'any'" in capsys.readouterr().err
