# SPDX-License-Identifier: Apache-2.0
"""The photograph pairs: true edits, honest wordings, nothing of the held-out photograph."""

import json
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_gen import photos
from data_gen.edits import EDITS
from data_gen.pack import pack

SCRIPT = Path(__file__).parents[2] / "examples" / "photo_pairs.py"
WORDINGS = [wording for edit in EDITS.values() for wording in edit.wordings]


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def made(main, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "pairs"
    assert main(["--output", str(folder), "--count", "402", "--seed", "5"]) == 0
    return folder


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_held_out_wordings_are_new_sentences_of_known_words(edit):
    assert len(edit.wordings) >= 12
    assert len(edit.held_out) >= 4
    assert not set(edit.held_out) & set(WORDINGS)
    known = {word for wording in edit.wordings for word in wording.split()}
    for sentence in edit.held_out:
        assert set(sentence.split()) <= known, sentence


def test_no_sentence_asks_for_two_edits():
    sentences = WORDINGS + [wording for edit in EDITS.values() for wording in edit.held_out]
    assert max(Counter(sentences).values()) == 1


def test_edits_are_what_they_say():
    x = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    results = {name: edit.function(x) for name, edit in EDITS.items()}
    assert all(y.shape == x.shape and y.dtype == np.uint8 for y in results.values())
    grey = results["black_and_white"]
    assert (grey[..., :1] == grey).all()
    assert grey[0, 0, 0] == round(float(x[0, 0] @ np.array([0.299, 0.587, 0.114])))
    assert (results["invert"].astype(int) + x == 255).all()
    assert (results["mirror"][:, ::-1] == x).all()
    assert (results["brighter"] >= x).all()
    assert (results["darker"] <= x).all()
    for channel, name in enumerate(("red_tint", "green_tint", "blue_tint")):
        gain = results[name].mean((0, 1)) - x.mean((0, 1))
        assert gain.argmax() == channel
    assert results["blur"].std() < 0.5 * x.std()
    sepia = results["sepia"].mean((0, 1))
    assert sepia[0] > sepia[1] > sepia[2]


def test_edits_differ_visibly_on_the_held_out_photograph():
    for x in photos.held_out_crops(5):
        seen = {"input": x} | {name: edit.function(x) for name, edit in EDITS.items()}
        names = list(seen)
        for i, one in enumerate(names):
            for other in names[:i]:
                error = np.mean((seen[one] / 255 - seen[other] / 255.0) ** 2)
                assert error > 2e-4, (one, other)


def test_layout_is_the_released_one(made):
    listed = json.loads((made / "seeds.json").read_text())
    assert listed == sorted(listed)
    assert sum(len(seeds) for _, seeds in listed) == 402
    assert {len(seeds) for _, seeds in listed[:-1]} == {4}
    captions = {f"a photograph of {photo.caption}" for photo in photos.PHOTOS.values()}
    used = Counter()
    for name, seeds in listed:
        prompt = json.loads((made / name / "prompt.json").read_text())
        edit = next(edit for edit in EDITS.values() if prompt["edit"] in edit.wordings)
        used[edit.caption] += 1
        assert prompt["input"] in captions
        assert prompt["output"] == f"{prompt['input']}, {edit.caption}"
        lines = (made / name / "metadata.jsonl").read_text().splitlines()
        assert [json.loads(line)["seed"] for line in lines] == seeds
        for seed in seeds:
            before, after = (Image.open(made / name / f"{seed}_{i}.jpg") for i in (0, 1))
            assert before.size == after.size == (64, 64)
            truth = edit.function(np.asarray(before))
            assert np.abs(truth.astype(int) - np.asarray(after)).mean() < 2  # JPEG, twice
    assert set(used) == {edit.caption for edit in EDITS.values()}


def test_packs(made, tmp_path):
    assert pack([made], tmp_path / "out").startswith("402 pairs of 101 prompts")


def test_same_seed_same_files(made, main, tmp_path, capsys):
    again = tmp_path / "again"
    main(["--output", str(again), "--count", "12", "--seed", "5"])
    for file in again.glob("0*/*"):
        assert file.read_bytes() == (made / file.relative_to(again)).read_bytes()
    main(["--output", str(tmp_path / "other"), "--count", "12", "--seed", "6"])
    assert (tmp_path / "other" / "seeds.json").read_text() != (again / "seeds.json").read_text()
    main(["--output", str(again), "--count", "12", "--seed", "5"])
    assert "already there" in capsys.readouterr().out


def test_the_held_out_photograph_is_never_opened_for_pairs(tmp_path, monkeypatch):
    opened, load = [], photos.load_photo
    monkeypatch.setattr(photos, "load_photo", lambda file: (opened.append(file), load(file))[1])
    list(photos.write_pairs(tmp_path / "pairs", 4))
    assert opened
    assert not any(photos.HELD_OUT in file for file in opened)
    assert len(photos.held_out_crops(3)) == 3
    assert opened[-1] == "chelsea.png"


def test_wrong_options_are_one_line(main, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "x"), "--count", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert main(["--output", str(tmp_path / "file"), "--count", "4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
