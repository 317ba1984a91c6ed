# SPDX-License-Identifier: Apache-2.0
"""Claim: storage that fails for a while is tried again with growing waits, and then reported."""

import os
import sys

import pytest
from etils import epath

from ip2p_jax import storage
from tests.storage_faults import bucket_error


@pytest.fixture
def waits(monkeypatch):
    """Records the waits instead of spending them."""
    spent: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", spent.append)
    return spent


def failing(times: int, error: Exception | None = None):
    """An action that raises an error so many times, then returns "done"."""
    left = [times]

    def action():
        if left[0]:
            left[0] -= 1
            raise error or OSError(5, "Input/output error")
        return "done"

    return action


def test_a_passing_failure_is_waited_out(waits):
    assert storage.retried(failing(3), "x") == "done"
    assert waits == [1.0, 2.0, 4.0]


def test_a_lasting_failure_is_reported_with_its_name(waits):
    with pytest.raises(storage.StorageError, match=r"pairs/7: failed 7 times .*Input/output"):
        storage.retried(failing(7), "pairs/7")
    assert waits == list(storage.WAITS)


def test_a_bucket_that_fails_is_tried_again(waits, monkeypatch):
    """Then reported. Controls: other exceptions, and the same one when its module is not there."""
    error = bucket_error(monkeypatch)("Too many requests, 429")
    assert storage.retried(failing(2, error), "x") == "done"
    assert waits == [1.0, 2.0]
    with pytest.raises(storage.StorageError, match=r"pairs/7: failed 7 times \(Too many requests"):
        storage.retried(failing(7, error), "pairs/7")
    waits.clear()
    with pytest.raises(KeyError):
        storage.retried(failing(1, KeyError("x")), "x")
    del sys.modules["gcsfs.retry"]
    with pytest.raises(type(error)):
        storage.retried(failing(1, error), "x")
    assert not waits


def test_classes_of_clients_are_those_that_are_imported(monkeypatch):
    for module, _ in storage.OF_BUCKETS:
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert storage.transient() == (OSError,)
    assert not {module for module, _ in storage.OF_BUCKETS} & set(sys.modules)
    aiohttp = pytest.importorskip("aiohttp")
    assert storage.transient() == (OSError, aiohttp.ClientError)


def test_a_missing_file_is_no_failure_of_the_disk(waits, tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.retried((tmp_path / "none").read_bytes, "x")
    assert not waits


def test_files_are_written_whole(tmp_path):
    path = epath.Path(tmp_path / "deep" / "file")
    storage.write_whole(path, b"content")
    assert path.read_bytes() == b"content"
    assert [x.name for x in (tmp_path / "deep").iterdir()] == ["file"]


def test_a_folder_that_was_hardly_begun_is_begun(tmp_path):
    """By a process that was killed in its first write; not one with files of others."""
    (tmp_path / ".settings.json.1234.part").write_bytes(b"{")
    assert storage.open_folder(str(tmp_path), {"seed": 1}, "a test") == tmp_path
    with pytest.raises(ValueError, match="was made with seed 1, this command says 2"):
        storage.open_folder(str(tmp_path), {"seed": 2}, "a test")
    (tmp_path / "settings.json").rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match="not a folder of a test"):
        storage.open_folder(str(tmp_path), {"seed": 1}, "a test")


@pytest.mark.parametrize("action", ["another file", "another folder", "below a file"])
def test_outputs_that_cannot_be_are_found_early(tmp_path, action):
    """A folder that is there and ours, or is not there yet, is let pass, and left as it is."""
    for fine in (tmp_path / "new" / "deep", tmp_path):
        storage.check_folder(str(fine), "a test")
    storage.open_folder(str(tmp_path), {"seed": 1}, "a test")
    storage.check_folder(str(tmp_path), "a test")
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    (folder / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    wrong, words = {
        "another file": (file, f"^output folder {file}: no file can be made in {file}"),
        "another folder": (folder, f"^{folder} is already there and not a folder of a test"),
        "below a file": (file / "x", f"^output folder {file}/x: no file can be made in {file} "),
    }[action]
    with pytest.raises(ValueError, match=words):
        storage.check_folder(str(wrong), "a test")
    assert sorted(tmp_path.rglob("*")) == before


def test_another_host_begins_the_folder_meanwhile(tmp_path, monkeypatch):
    """Between our two looks: then its settings count."""
    file, looks = epath.Path(tmp_path) / "settings.json", []

    def exists(path) -> bool:
        if path == file and not looks:
            looks.append(path)
            storage.write_whole(file, b'{"seed": 1}')
            return False
        return os.path.exists(path)

    monkeypatch.setattr(type(file), "exists", exists)
    assert storage.open_folder(str(tmp_path), {"seed": 1}, "a test") == file.parent
    looks.clear()
    file.unlink()
    with pytest.raises(ValueError, match="was made with seed 1, this command says 2"):
        storage.open_folder(str(tmp_path), {"seed": 2}, "a test")
