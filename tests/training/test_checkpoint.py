# SPDX-License-Identifier: Apache-2.0
"""Claims: a state comes back bit for bit on any mesh; a run goes on only as it was configured."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ip2p_jax.config import Checkpoint, Config, Data, Optim
from ip2p_jax.data.manifest import Shard, save_manifest
from ip2p_jax.training import checkpoint, mesh
from ip2p_jax.training.optim import make_optimizer
from ip2p_jax.training.state import abstract_state, init_state
from ip2p_jax.training.tasks.task import given
from tests.training.tiny import grid, toy_params


def test_another_mesh_restores_the_same(tmp_path):
    tx = make_optimizer(Optim())
    start = given(toy_params())
    shapes = abstract_state(start, tx)
    state = init_state(start, tx, mesh.state_shardings(grid(1, 8), shapes))
    state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    with checkpoint.open_manager(str(tmp_path), Checkpoint(keep=2)) as manager:
        for step in (1, 2, 3):
            state = state._replace(step=state.step * 0 + step)
            checkpoint.save(manager, state, {"batch": 10 * step}, Config())
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [2, 3]
    for devices in (grid(1, 1), grid(4, 2)):
        with checkpoint.open_manager(str(tmp_path), Checkpoint(keep=2)) as manager:
            shardings = mesh.state_shardings(devices, shapes)
            got, position = checkpoint.restore(manager, 3, shapes, shardings)
        assert position == {"batch": 30}
        assert jax.tree.map(lambda x: x.sharding, got) == shardings
        jax.tree.map(np.testing.assert_array_equal, got, state)


def data_folder(path: Path, sha256: str) -> str:
    """What is looked at of a data folder: its manifest."""
    path.mkdir()
    save_manifest(path, {"train": [Shard("pairs-0", 4, 100, sha256, [4])]})
    return str(path)


@pytest.fixture
def cfg(tmp_path) -> Config:
    return Config(data=Data(path=data_folder(tmp_path / "data", "a")), dtype="float32")


@pytest.fixture
def go_on(tmp_path, cfg):
    """The check of a run that was stored with `cfg`, then of what it would store."""
    checkpoint.store_config(str(tmp_path), cfg)
    return lambda *override: checkpoint.check_config(str(tmp_path), cfg, [*override], False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.batch_size", 8), ("optim.lr", 1.0), ("data.split", "x"), ("seed", 1), ("dtype", "x")],
)
def test_other_values_are_refused_by_name(tmp_path, cfg, go_on, key, value):
    go_on()
    *parts, last = key.split(".")
    setattr(getattr(cfg, parts[0]) if parts else cfg, last, value)
    with pytest.raises(ValueError, match=f"^config.{key}: .*--override={key} to go on"):
        go_on("optim.eps")
    go_on(key)
    checkpoint.store_config(str(tmp_path), cfg)
    go_on()


def test_unknown_keys_are_refused(go_on):
    for key in ("optim.speed", "optim", "config.optim.lr", ""):
        with pytest.raises(ValueError, match=f"^--override={key}: there is no config.{key}, see"):
            go_on("optim.lr", key)


def test_what_computes_nothing_may_change(cfg, go_on):
    cfg.steps, cfg.mesh.fsdp, cfg.log.every, cfg.checkpoint.keep = 5, 2, 7, 9
    cfg.data.workers, cfg.data.threads, cfg.data.check_hashes = 3, 4, True
    go_on()


def test_data_may_move_but_not_change(tmp_path, cfg, go_on):
    cfg.data.path = data_folder(tmp_path / "moved", "a")
    go_on()
    cfg.data.path = data_folder(tmp_path / "other", "b")
    with pytest.raises(ValueError, match="^config.data.path: .* has other pairs, .*data.path to"):
        go_on()
    go_on("data.path")


def test_keys_younger_than_the_run(tmp_path, cfg):
    """They had their default, which the command may leave; another value is refused."""
    stored = checkpoint.record(cfg)
    del stored["optim"]["warmup"], stored["data"]["contents"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    checkpoint.check_config(str(tmp_path), cfg, [], False)
    cfg.optim.warmup = 7
    with pytest.raises(ValueError, match="^config.optim.warmup: .* has 0, this command 7;"):
        checkpoint.check_config(str(tmp_path), cfg, [], False)


def test_nothing_to_be_true_to_before_the_first_checkpoint(tmp_path, cfg, go_on):
    """A first command with a mistake in it can be put right."""
    cfg.seed = 2
    checkpoint.check_config(str(tmp_path), cfg, [], True)
    with pytest.raises(ValueError, match="there is no config.sed"):
        checkpoint.check_config(str(tmp_path), cfg, ["sed"], True)
