# SPDX-License-Identifier: Apache-2.0
"""Claims: storage that fails stops no training and loses no checkpoint; saves are tried again with
growing waits; who cannot save the last state says so. The errors are those of a full disk, or of a
bucket's client."""

import contextlib
import json
import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ip2p_jax.config import Checkpoint, Config, Log, Mesh
from ip2p_jax.storage import StorageError
from ip2p_jax.training import checkpoint, logs, mesh, saving
from ip2p_jax.types import TrainState
from tests.storage_faults import bucket_error, full_disk
from tests.toy_runs import equal

CFG = Config(checkpoint=Checkpoint(keep=2), log=Log(every=2))


pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:")
"""Of writes that end after one beside them has failed; orbax no longer waits for them."""


def state(step: int) -> TrainState:
    w = {"w": jax.random.normal(jax.random.key(step), (64, 64))}
    return TrainState(jax.numpy.int32(step), w, w, ())


@pytest.fixture
def saver(tmp_path):
    """The saver of a run in `tmp_path`."""
    with checkpoint.open_manager(str(tmp_path), CFG.checkpoint) as manager:
        saver = saving.Saver(manager, CFG, lambda: {"batch": 0}, None)
        yield saver
        saver.close(print)


@pytest.fixture
def waits(monkeypatch):
    """Records the waits instead of spending them."""
    spent: list[float] = []
    monkeypatch.setattr(saving.time, "sleep", spent.append)
    return spent


def steps(folder: Path) -> list[int]:
    return [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


def there(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def test_saves_go_on_when_the_disk_has_room_again(saver, tmp_path):
    """Failed saves are followed by later ones after 2, 4, 8 steps, and the last good one stays."""
    told: list[str] = []
    saver.save(state(0), told.append)
    saver.settle(0, told.append)
    tried = []
    with full_disk():
        saver.save(state(1), told.append)
        for at in range(2, 20):
            saver.is_saving = lambda: False
            if saver.is_due(at, told.append):
                tried.append(at)
                saver.save(state(at), told.append)
        assert tried == [4, 9, 18] and there(tmp_path)[0] == "0"
        saver.settle(20, told.append)
        assert there(tmp_path) == ["0"]  # nor anything half-written
    said = [line for line in told if "could not be saved" in line]
    assert len(said) == 4 and said[0].startswith("WARNING: step 1 could not be saved (")
    loud = [line for line in told if "in a row" in line]
    assert (
        len(loud) == 2 and "3 saves have failed in a row" in loud[0] and "since step 0" in loud[0]
    )
    saver.save(state(30), told.append)
    saver.settle(30, told.append)
    assert (saver.saved, saver.failures) == (30, 0) and not saver.is_due(99, told.append)
    assert there(tmp_path) == ["0", "30"]


def test_a_save_that_fails_at_its_beginning_is_tried_again(saver, monkeypatch):
    """Though orbax then takes it to go on for ever; what was told is not told again in the end."""
    told: list[str] = []

    def fails(*_) -> None:
        raise OSError("no\nroom")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fails)
        patch.setattr(saver.manager, "is_saving_in_progress", lambda: True)
        saver.save(state(1), told.append)
        saver.begun.exception(30)
        assert not saver.is_due(2, told.append) and saver.is_due(4, told.append)
    assert told == ["WARNING: step 1 could not be saved (no room)"]
    saver.close(told.append)
    assert len(told) == 1
    saver.save(state(4), told.append)
    saver.settle(4, told.append)
    assert saver.saved == 4


@pytest.mark.parametrize("alone", [True, False])
def test_a_bucket_that_fails_is_a_failed_save(saver, monkeypatch, alone):
    """Also while what is left is removed. Control: an error that is none of storage is raised."""
    told: list[str] = []
    raised = bucket_error(monkeypatch)("Too many requests, 429")

    def fails(*_) -> None:
        raise raised

    if not alone:
        saver.submit = saving.at_once
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fails)
        patch.setattr(checkpoint, "clear", fails)
        saver.save(state(1), told.append)
        saver.settle(1, told.append)
        assert [line.partition(" (")[0] for line in told] == [
            "WARNING: step 1 could not be saved",
            "WARNING: what is left of step 1 could not be removed",
        ]
        assert all("(Too many requests, 429)" in line for line in told)
    saver.save(state(2), told.append)
    saver.settle(2, told.append)
    assert saver.saved == 2 and len(told) == 2
    raised = KeyError("a bug")
    monkeypatch.setattr(checkpoint, "save", fails)
    with pytest.raises(KeyError):
        saver.save(state(3), told.append)
        saver.settle(3, told.append)
    saver.writing = None


def test_what_is_saved_is_the_state_as_it_was(saver, monkeypatch):
    """Though it is donated to the next step before a byte is written; on 8 devices, too."""
    ready, save = threading.Event(), checkpoint.save

    def slowly(*args) -> None:
        assert ready.wait(30)
        save(*args)

    monkeypatch.setattr(checkpoint, "save", slowly)
    split = NamedSharding(mesh.make_mesh(Mesh(data=1, fsdp=8)), PartitionSpec("fsdp"))
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for step, place in ((0, jax.devices()[0]), (1, split)):
        want = jax.device_get(state(step))
        current = state(step)._replace(params=jax.device_put(want.params, place))
        saver.save(current, print)
        for _ in range(3):
            before, current = current, current._replace(params=advance(current.params))
        assert before.params["w"].is_deleted()  # control: memory is given away
        assert not np.array_equal(current.params["w"], want.params["w"])
        ready.set()
        saver.settle(step, print)
        ready.clear()
        shardings = jax.tree.map(lambda x: x.sharding, current)
        got, position = checkpoint.restore(saver.manager, step, current, shardings)
        assert equal(got, want) and position == {"batch": 0}
        assert got.params["w"].sharding == current.params["w"].sharding


def test_the_last_state_is_tried_for_a_minute(saver, tmp_path, waits):
    told: list[str] = []
    saver.finish(state(1), told.append)
    assert not waits and not told
    with full_disk(), pytest.raises(StorageError, match="step 2 could not be saved in 7 tries"):
        saver.finish(state(2), told.append)
    assert waits == list(saving.WAITS) and there(tmp_path) == ["1"]
    assert len([line for line in told if "could not be saved" in line]) == 7
    saver.finish(state(2), told.append)
    assert there(tmp_path) == ["1", "2"]


def test_logs_are_kept_until_the_disk_has_room(tmp_path, capsys):
    """No line is lost and none is half there; nor does anybody wait for TensorBoard's file."""
    values = {"loss": 1.0, "grad_norm": 1.0, "param_norm": 1.0, "skipped": 0.0}
    with contextlib.ExitStack() as disk, logs.open_logs(str(tmp_path), 0, Config()) as log:
        for step in range(1, 100):
            if step == 20:
                disk.enter_context(full_disk())
            if step == 90:
                assert len(log.unwritten) > 30
                text = (tmp_path / "metrics.jsonl").read_text()
                assert text.endswith("}\n") and text.count("\n") + len(log.unwritten) == 89
                disk.close()
            log.add(step, {name: jax.numpy.array([x, 1.0]) for name, x in values.items()})
            log.flush(1)
            if step in (50, 95):
                log.grid(step, [np.zeros((64, 64, 3), np.uint8)[None]])
    assert steps(tmp_path) == list(range(1, 100))
    assert (tmp_path / "samples/00000095.png").exists()


def test_logs_are_kept_until_a_bucket_answers_again(tmp_path, monkeypatch):
    """Also if TensorBoard's file cannot be ended. Control: an error that is none of storage."""
    raised = bucket_error(monkeypatch)("Too many requests, 429")

    def fails(*_) -> None:
        raise raised

    with logs.open_logs(str(tmp_path), 0, Config()) as log:
        log.tell_of(1, {"loss": 1.0})
        assert log.events
        with monkeypatch.context() as patch:
            patch.setattr(logs, "append", fails)
            patch.setattr(log.events, "close", fails)
            log.tell_of(2, {"loss": 1.0})
            assert steps(tmp_path) == [1]
            raised = KeyError("a bug")
            with pytest.raises(KeyError):
                log.tell_of(3, {"loss": 1.0})
        log.tell_of(4, {"loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
