# SPDX-License-Identifier: Apache-2.0
"""Claims: eight devices compute what one does, however the state is split over them; gradients are
summed over devices in the type that networks compute in."""

import collections
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ip2p_jax.config import Mesh, Optim
from ip2p_jax.training import mesh
from ip2p_jax.training.optim import make_optimizer
from ip2p_jax.training.state import abstract_state, init_state, jit_step, make_step
from tests.training.tiny import KEY, batch, grid, tiny_task


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((3, 3, 64, 128), 8, (None, None, None, "fsdp")),
        ((3, 3, 128, 64), 8, (None, None, "fsdp", None)),
        ((256, 256), 8, (None, "fsdp")),
        ((1024, 36), 8, ("fsdp", None)),
        ((16, 16), 8, ()),  # small
        ((1001, 333), 8, ()),  # no axis is divisible
        ((256, 256), 1, ()),
        ((), 8, ()),
    ],
)
def test_rule(shape, fsdp, spec):
    assert mesh.fsdp_spec(shape, fsdp) == PartitionSpec(*spec)


def test_mesh_takes_what_the_other_axis_leaves():
    assert mesh.make_mesh(Mesh()).shape == {"data": 1, "fsdp": 8}
    assert mesh.make_mesh(Mesh(data=-1, fsdp=2)).shape == {"data": 4, "fsdp": 2}
    for cfg in (Mesh(3, -1), Mesh(8, 2), Mesh(1, 1), Mesh(0, -1), Mesh(-1, 16)):
        with pytest.raises(ValueError, match=r"config.mesh.data=.* != 8 devices"):
            mesh.make_mesh(cfg)


def test_rows_follow_their_hosts():
    """Host 0 reads the first rows of a batch, wherever in the mesh its devices are."""
    np.testing.assert_array_equal(mesh.in_place([0, 0, 1, 1], 8), np.arange(8))
    np.testing.assert_array_equal(mesh.in_place([1, 0, 1, 0], 8), [4, 5, 0, 1, 6, 7, 2, 3])
    np.testing.assert_array_equal(mesh.rows_in_place(grid(2, 4), 16), np.arange(16))
    for rows, accumulate, line in ((12, 1, "of 8: 8 devices"), (24, 2, "of 16: 8 .*late=2")):
        with pytest.raises(ValueError, match=f"batch_size is {rows}, expected a multiple {line}"):
            mesh.rows_in_place(grid(2, 4), rows, accumulate)


def test_what_is_put_on_devices():
    """Each device gets its part of an array, or all of it; frozen parameters in another type."""
    x = np.arange(2**15, dtype=np.float32).reshape(128, 256)
    devices = grid(2, 4)
    split = mesh.put(x, mesh.state_shardings(devices, x))
    assert {part.data.shape for part in split.addressable_shards} == {(128, 64)}
    np.testing.assert_array_equal(split, x)
    whole = mesh.put_whole(devices, {"x": x, "tokens": np.arange(3)}, jnp.bfloat16)
    assert whole["x"].dtype == jnp.bfloat16 and whole["tokens"].dtype == jnp.int32
    assert {part.data.shape for part in whole["x"].addressable_shards} == {(128, 256)}
    assert len(whole["x"].addressable_shards) == 8


def run(task, devices, steps: int = 2):
    """Losses, EMA, and the sharding of every parameter, after some steps.

    A large eps: else a gradient of almost 0 decides by its last bits where a parameter goes.
    """
    optim = Optim(lr=1e-2, eps=1e-2, accumulate=1)
    tx = make_optimizer(optim)
    shardings = mesh.state_shardings(devices, abstract_state(task.start, tx))
    step = make_step(task.loss, tx, optim, mesh.rows_in_place(devices, 8), devices)
    step = jit_step(step, shardings, mesh.replicated(devices))
    state = init_state(task.start, tx, shardings)
    frozen, losses = mesh.put_whole(devices, task.frozen), []
    key = jax.device_put(KEY, mesh.replicated(devices))
    for i in range(steps):
        state, metrics = step(state, frozen, mesh.put_batch(devices, batch(seed=i)), key)
        losses.append(float(metrics["loss"][0]))
    kept = jax.tree.map(lambda x, want: x.sharding == want, state.params, shardings.params)
    assert all(jax.tree.leaves(kept))
    split = [x.sharding.spec for x in jax.tree.leaves(state.params)]
    return np.array(losses), jax.device_get(state.ema), split


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def alone(task):
    return run(task, grid(1, 1))


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "fsdp"), [(2, 4), pytest.param(8, 1, marks=SLOW), pytest.param(1, 8, marks=SLOW)]
)
def test_devices_agree(task, alone, data, fsdp):
    losses, ema, _ = alone
    got, got_ema, split = run(task, grid(data, fsdp))
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got_ema, ema)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ema, task.start.shapes)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert any("fsdp" in spec for spec in split) == (fsdp > 1)
    # control: had the devices other draws, the loss would be another
    assert abs(losses[0] - losses[1]) > 1e-3


def summed(task, frozen_type, folder) -> dict[str, int]:
    """How many values of each type XLA's partitioner has the devices sum, in a step of the task.

    Read before the passes of the CPU, which sums nothing of 16 bits.
    """
    devices, optim = grid(1, 8), Optim(accumulate=1)
    tx = make_optimizer(optim)
    shapes = abstract_state(task.start, tx)
    shardings = mesh.state_shardings(devices, shapes)
    step = make_step(task.loss, tx, optim, np.arange(8), devices)
    step: Any = jit_step(step, shardings, mesh.replicated(devices))
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    frozen = mesh.put_whole(devices, task.frozen, frozen_type)
    key = jax.device_put(KEY, mesh.replicated(devices))
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    step.lower(shapes, frozen, mesh.put_batch(devices, batch()), key).compile(options)
    (program,) = folder.glob("*jit_step*after_spmd-partitioning*")
    counts = collections.Counter()
    for result in re.findall(r" = (\S.*?) (?:all-reduce|reduce-scatter)\(", program.read_text()):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            counts[dtype] += math.prod(int(x) for x in shape.split(",") if x)
    return counts


@pytest.mark.slow
def test_gradients_are_summed_in_the_type_of_the_networks(tmp_path):
    """bfloat16 halves what devices send each other; gradients of norms, which compute in float32,
    are the rest."""
    half = summed(tiny_task(dtype=jnp.bfloat16), jnp.bfloat16, tmp_path / "half")
    assert half["bf16"] > 50 * half["f32"] > 0
    single = summed(tiny_task(), jnp.float32, tmp_path / "single")
    assert single["bf16"] == 0 and single["f32"] > half["bf16"]  # control
