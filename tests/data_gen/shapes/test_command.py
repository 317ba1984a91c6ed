# SPDX-License-Identifier: Apache-2.0
"""The command: pairs that pack and evaluation read, triplets that pair generation reads, the same
bytes when killed and resumed, and one line for wrong options."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_gen.pack import pack
from data_gen.shapes import write
from data_gen.shapes.__main__ import main
from data_gen.shapes.examples import example
from data_gen.shapes.render import render
from data_gen.triplet_file import read_triplets
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.evaluation.examples import open_examples


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(write, "ROWS", 20)


def make(folder, *options):
    assert main(["--output", str(folder), "--pairs", "50", *options]) == 0
    return folder


def test_pairs_hold_pictures_texts_and_scenes(tmp_path):
    files = sorted(make(tmp_path / "pairs", "--seed", "4").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [file.name for file in files][0] == "train-00000-of-00003.parquet"
    assert len(rows) == 50
    for i, row in enumerate(rows):
        made = example(i, 4)
        for name, scene in (("original_image", made.before), ("edited_image", made.after)):
            pixels = np.asarray(Image.open(io.BytesIO(row[name]["bytes"])))
            assert (pixels == render(scene)).all()
        scenes = {name: json.loads(row[name]) for name in write.SCENES}
        texts = {"input": row["original_prompt"], "edit": row["edit_prompt"]}
        assert write.read_example(texts | {"output": row["edited_prompt"]} | scenes) == made


def test_packs_and_evaluates(tmp_path):
    folder = make(tmp_path / "pairs", "--held-out")
    assert pack([folder], tmp_path / "packed").startswith("50 pairs")
    texts = {example(i, 0, held_out=True).instruction for i in range(50)}
    assert {pair.instruction for pair in PairSource(tmp_path / "packed", "train")} <= texts
    assert len(open_examples(folder, split="test")) == 50


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(tmp_path):
    whole = make(tmp_path / "whole")
    killed = make(tmp_path / "killed")
    before = {file.name: file.stat().st_mtime_ns for file in killed.iterdir()}
    (killed / "train-00001-of-00003.parquet").unlink()
    (killed / "contact_sheet.png").unlink()
    make(killed)
    for file in whole.iterdir():
        assert (killed / file.name).read_bytes() == file.read_bytes()
    assert (killed / "train-00000-of-00003.parquet").stat().st_mtime_ns == before[
        "train-00000-of-00003.parquet"
    ]


def test_triplets_are_read_by_pair_generation(tmp_path):
    file = tmp_path / "triplets.jsonl"
    assert main(["--output", str(file), "--triplets", "30"]) == 0
    triplets = read_triplets(file)
    assert [t.edit for t in triplets] == [example(i).instruction for i in range(30)]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert write.read_example(lines[7]) == example(7)


def test_few_objects_before_and_after(tmp_path):
    file = tmp_path / "triplets.jsonl"
    assert main(["--output", str(file), "--triplets", "60", "--objects", "1"]) == 0
    made = [write.read_example(json.loads(line)) for line in file.read_text().splitlines()]
    assert {len(scene.objects) for x in made for scene in (x.before, x.after)} == {1}
    free = [example(i) for i in range(60)]
    fit = [len(x.before.objects) == len(x.after.objects) == 1 for x in free]
    assert 5 < sum(fit) < 55
    assert all(
        (one == any_number) == fits for one, any_number, fits in zip(made, free, fit, strict=True)
    )


def test_wrong_options_are_one_line(tmp_path, capsys):
    folder = make(tmp_path / "pairs")
    capsys.readouterr()
    for options in (
        ["--pairs", "0"],
        ["--pairs", "60"],
        ["--pairs", "50", "--seed", "1"],
        ["--pairs", "50", "--objects", "1"],
        ["--pairs", "50", "--objects", "0"],
        ["--pairs", "50", "--objects", "4"],
        ["--triplets", "5"],
        ["--pairs", "5", "--triplets", "5"],
        [],
    ):
        assert main(["--output", str(folder), *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1
