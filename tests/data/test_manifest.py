# SPDX-License-Identifier: Apache-2.0
"""The check at start-up names a truncated, missing, doubled, unknown or altered shard."""

import json
import shutil

import pytest

from ip2p_jax.data.manifest import verify
from ip2p_jax.data.pairs import FOLDER, PairSource

SHARD = "pairs-train.array_record-00001-of-00003"


@pytest.fixture
def data(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "data")


def test_an_untouched_folder_passes(data):
    assert [len(shards) for shards in verify(data, hashes=True).values()] == [3, 1, 1]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-5000])


def empty(file):
    file.write_bytes(b"")


def grow(file):
    file.write_bytes(file.read_bytes() + b"x")


def remove(file):
    file.unlink()


def copy_over(file):
    shutil.copy(file.with_name(SHARD.replace("00001-", "00002-")), file)


@pytest.mark.parametrize("fault", [truncate, empty, grow, remove, copy_over])
def test_damage_names_the_shard(data, fault):
    fault(data / FOLDER / SHARD)
    with pytest.raises(ValueError, match=SHARD):
        verify(data)


def test_a_doubled_shard_is_named(data):
    twin = SHARD + ".copy"
    shutil.copy(data / FOLDER / SHARD, data / FOLDER / twin)
    with pytest.raises(ValueError, match=rf"{twin} is not in the manifest"):
        verify(data)


def test_a_shard_listed_twice_is_named(data):
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"].append(manifest["splits"]["train"][1])
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"{SHARD} is listed twice"):
        verify(data)


def test_hashes_find_what_lengths_cannot(data):
    file = data / FOLDER / SHARD
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    verify(data)
    with pytest.raises(ValueError, match=rf"{SHARD} has another content"):
        verify(data, hashes=True)
    source = PairSource(data, "train")  # without hashes: an error when the record is read
    with pytest.raises(ValueError, match=rf"{data}: record \d+ is damaged"):
        [source[i] for i in range(len(source))]


def test_wrong_folders_are_one_line(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json, not a data folder"):
        verify(tmp_path)
    (data / "manifest.json").write_text('{"splits": [')
    with pytest.raises(ValueError, match="is damaged"):
        verify(data)
