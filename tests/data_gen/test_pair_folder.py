# SPDX-License-Identifier: Apache-2.0
"""Claim: a prompt's folder is whole or made anew, in the released layout; settings are held to."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_gen.pair_filter import BEATEN, Candidate
from data_gen.pair_folder import PairFolder
from data_gen.sources import Folder
from data_gen.triplet_file import Triplet
from ip2p_jax.evaluation.clip_scores import ClipScores

SETTINGS = {"seed": 0, "steps": 20}
TRIPLET = Triplet("a cat", "make it a dog", "a dog")
SCORES = ClipScores(0.3, 0.3, 0.3, 0.8)
CANDIDATES = [Candidate(0, 0.5, 8.0, SCORES, BEATEN), Candidate(1, 0.4, 9.0, SCORES)]
PICTURES = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)


@pytest.fixture
def folder(tmp_path):
    folder = PairFolder.open(str(tmp_path / "pairs"), SETTINGS)
    folder.write(0, TRIPLET, CANDIDATES, {1: PICTURES})
    folder.write(1, TRIPLET, CANDIDATES[:1], {})
    return folder


def test_the_layout_is_the_released_one(folder):
    names = sorted(x.name for x in (folder.path / "0000000").iterdir())
    assert names == ["1_0.jpg", "1_1.jpg", "metadata.jsonl", "prompt.json"]
    assert [row["rejected"] for row in folder.rows(0)] == [BEATEN, ""]
    folder.finish({0: ["1"]})
    assert json.loads((folder.path / "seeds.json").read_text()) == [["0000000", ["1"]]]
    [(pairs, refused)] = Folder.open(Path(folder.path)).read(0, 1)
    assert not refused and pairs[0].instruction == "make it a dog"


def test_pictures_are_jpegs_without_subsampling(folder):
    before, after = folder.pictures(0, "1")
    assert before.format == "JPEG" and after.size == (8, 8)
    smooth = np.linspace(0, 255, 8 * 8 * 3).astype(np.uint8).reshape(8, 8, 3)
    folder.write(2, TRIPLET, CANDIDATES, {1: np.stack([smooth, smooth])})
    back = np.asarray(folder.pictures(2, "1")[0]).astype(int)
    assert np.abs(back - smooth).max() <= 3


def test_a_prompt_without_metadata_is_made_anew(folder):
    assert folder.is_done(0, TRIPLET) and not folder.is_done(2, TRIPLET)
    (folder.path / "0000000" / "metadata.jsonl").unlink()
    (folder.path / "0000000" / "9_0.jpg").write_bytes(b"half")
    assert not folder.is_done(0, TRIPLET)
    folder.write(0, TRIPLET, CANDIDATES, {1: PICTURES})
    assert folder.is_done(0, TRIPLET)
    assert not (folder.path / "0000000" / "9_0.jpg").exists()


def test_other_settings_and_other_texts_are_refused(folder):
    path = str(folder.path)
    assert PairFolder.open(path, SETTINGS) == folder
    with pytest.raises(ValueError, match="was made with steps 20, this command says 30"):
        PairFolder.open(path, {**SETTINGS, "steps": 30})
    with pytest.raises(ValueError, match="was made of 'a cat', the triplets now say 'a cow'"):
        folder.is_done(0, TRIPLET._replace(input="a cow"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    with pytest.raises(ValueError, match="not a folder of pairs"):
        PairFolder.open(str(tmp_path), SETTINGS)
