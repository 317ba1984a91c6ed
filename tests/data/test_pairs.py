# SPDX-License-Identifier: Apache-2.0
"""Pairs survive their trip through ArrayRecord unchanged, and nothing here needs TensorFlow."""

import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from ip2p_jax.data.pairs import FOLDER, Pair, PairSource, deserialize, serialize
from tests.data.released import encode, identify, picture


def test_record_round_trip():
    before, after = encode(picture(1, 2)), encode(picture(3, 4), "PNG")
    pair = Pair(before, after, "färbe es blau", "", "ein Bild", "0000001", "123")
    assert deserialize(serialize(pair)) == pair


def test_prompts_hold_their_own_pairs_in_order(packed):
    source = PairSource(packed, "train")
    assert len(source.prompts) == 36
    assert len(source) == 144
    for i, records in enumerate(source.prompts):
        pairs = [source[record] for record in records]
        assert [pair.prompt for pair in pairs] == [f"{i:07d}"] * 4
        assert [pair.seed for pair in pairs] == [f"{1000 + 10 * i + j}" for j in range(4)]


def test_any_tfds_reader_opens_it(packed):
    data = tfds.builder_from_directory(packed / FOLDER).as_data_source("test")
    assert len(data) == 8
    assert identify(data[0]["input"]) == (38, 0)
    assert data[0]["instruction"] == b"invert 38"


def test_unknown_split_is_one_line(packed):
    with pytest.raises(ValueError, match="no split 'val', only train, validation, test"):
        PairSource(packed, "val")


def test_works_without_tensorflow(packed, tmp_path):
    code = f"""
import sys
from pathlib import Path
from data_gen.pack import pack
from ip2p_jax.config import Data
from ip2p_jax.data.loader import make_loader
from ip2p_jax.data.pairs import PairSource
from tests.data.released import Words
released = Path({str(packed.parent / "released")!r})
pack([released], Path({str(tmp_path / "again")!r}))
assert len(PairSource({str(tmp_path / "again")!r}, "train")) == 144
loader = make_loader(Data(path={str(packed)!r}, batch_size=4, resolution=16), Words())
assert next(loader).input.shape == (4, 16, 16, 3)
loader.close()
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
