# SPDX-License-Identifier: Apache-2.0
"""Claims: what is planned for a device is what it then holds, byte for byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip2p_jax.config import Config, Data, Optim
from ip2p_jax.training import mesh
from ip2p_jax.training.optim import make_optimizer
from ip2p_jax.training.plan import per_device, plan
from ip2p_jax.training.state import abstract_state, init_state
from ip2p_jax.training.tasks.task import given
from tests.training.tiny import grid, toy_params

FROZEN = {"table": np.zeros((256, 128), np.float32), "tokens": np.zeros(77, np.int32)}


def held(tree) -> int:
    """Bytes on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (8, 1), (2, 4)])
def test_bytes_are_those_of_the_arrays(data, fsdp):
    devices, start, tx = grid(data, fsdp), given(toy_params()), make_optimizer(Optim())
    shapes = abstract_state(start, tx)
    shardings = mesh.state_shardings(devices, shapes)
    state = init_state(start, tx, shardings)
    for part in ("params", "ema", "opt_state"):
        planned = per_device(getattr(shapes, part), getattr(shardings, part))
        assert planned == held(getattr(state, part)), part
    whole = mesh.put_whole(devices, FROZEN, jnp.bfloat16)
    cfg = Config(data=Data(batch_size=64), optim=Optim(accumulate=2))
    bfloat16 = jnp.dtype(jnp.bfloat16)
    lines = list(plan(cfg, shapes, shardings, FROZEN, bfloat16, devices))
    text = "\n".join(lines)
    assert f"8 devices (cpu): data {data}, fsdp {fsdp}; 1 hosts" in text
    assert "10000 steps of 64 rows, cut into 2 micro-batches: 4 rows a device at once" in text
    assert f"{128 * 256 + 256:,} parameters are trained" in text
    assert f"  w  float32[128, 256]  {shardings.params['w'].spec}" in text
    total = held(state.params) * 2 + held(state.ema) + held(state.opt_state) + held(whole)
    assert lines[-1].startswith(f"in all:      {total / 2**30:9.3f} GiB")
