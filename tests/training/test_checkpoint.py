# SPDX-License-Identifier: Apache-2.0
"""Claims: a state comes back bit for bit on any mesh; a run goes on only as it was configured."""

import json

import jax
import numpy as np
import pytest

from ip2p_jax.config import Checkpoint, Config, Optim
from ip2p_jax.training import checkpoint, mesh
from ip2p_jax.training.optim import make_optimizer
from ip2p_jax.training.state import abstract_state, init_state
from ip2p_jax.training.tasks import given
from tests.training.tiny import grid, toy_params


def test_another_mesh_restores_the_same(tmp_path):
    tx = make_optimizer(Optim())
    start = given(toy_params())
    shapes = abstract_state(*start, tx)
    state = init_state(*start, tx, mesh.state_shardings(grid(1, 8), shapes))
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
            got, position = checkpoint.restore(manager, shapes, shardings)
        assert position == {"batch": 30}
        assert jax.tree.map(lambda x: x.sharding, got) == shardings
        jax.tree.map(np.testing.assert_array_equal, got, state)


def test_flatten():
    assert checkpoint.flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {
        "a.b": 1,
        "a.c.d": 2,
        "e": [3],
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.batch_size", 8), ("optim.lr", 1.0), ("data.path", "x"), ("seed", 1), ("dtype", "auto")],
)
def test_other_values_are_refused_by_name(tmp_path, key, value):
    checkpoint.check_config(str(tmp_path), Config(dtype="float32"), [], False)
    stored = (tmp_path / "config.json").read_text()
    cfg = Config(dtype="float32")
    *parts, last = key.split(".")
    setattr(getattr(cfg, parts[0]) if parts else cfg, last, value)
    with pytest.raises(ValueError, match=f"^config.{key}: .*--override={key} to go on"):
        checkpoint.check_config(str(tmp_path), cfg, ["optim.eps"], False)
    assert (tmp_path / "config.json").read_text() == stored
    checkpoint.check_config(str(tmp_path), cfg, [key], False)
    checkpoint.check_config(str(tmp_path), cfg, [], False)  # stored now


def test_what_computes_nothing_may_change(tmp_path):
    checkpoint.check_config(str(tmp_path), Config(), [], False)
    cfg = Config(steps=5)
    cfg.mesh.fsdp, cfg.log.every, cfg.checkpoint.keep = 2, 7, 9
    checkpoint.check_config(str(tmp_path), cfg, [], False)
    assert json.loads((tmp_path / "config.json").read_text())["log"]["every"] == 7


def test_nothing_to_be_true_to_before_the_first_checkpoint(tmp_path):
    """A first command with a mistake in it can be put right."""
    for seed in (1, 2):
        checkpoint.check_config(str(tmp_path), Config(seed=seed), [], True)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2
