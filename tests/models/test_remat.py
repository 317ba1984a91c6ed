# SPDX-License-Identifier: Apache-2.0
"""Claims: what the backward pass computes again changes no gradient, and saves memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import UNetConfig
from ip2p_jax.models.unet import REMAT, UNet
from ip2p_jax.tpu.options import APART
from tests.training.tiny import filled

CFG = UNetConfig(
    channels=(16, 16),
    attention=(False, True),
    heads=(2, 2),
    layers_per_block=1,
    context_dim=16,
    norm_groups=8,
)
PARAMS, ROWS = filled(UNet, CFG, 0), 8


@pytest.fixture(scope="module")
def gradients() -> dict:
    """By name of the policy: the gradient, and the bytes of what is in between."""
    graphdef, _ = abstract(UNet, CFG)
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(ROWS, 32, 32, CFG.in_channels)), jnp.float32)
    t, text = jnp.full(ROWS, 500.0), jnp.asarray(rng.normal(size=(ROWS, 7, 16)), jnp.float32)
    found = {}
    for name, remat in REMAT.items():

        def loss(params, remat=remat):
            return jnp.mean(nnx.merge(graphdef, params)(z, t, text, remat=remat) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(PARAMS).compile(compiler_options=APART)
        memory = compiled.memory_analysis()
        assert memory is not None
        found[name] = compiled(PARAMS), memory.temp_size_in_bytes
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "full"])
def test_gradients_are_the_same(gradients, name):
    got, want = (jax.tree.leaves(gradients[x][0]) for x in (name, "none"))
    largest = max(np.abs(x).max() for x in want)
    assert max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) < 1e-6 * largest
    assert largest > 1e-3


@pytest.mark.slow
def test_memory(gradients):
    """Bytes between input and gradient."""
    none, blocks, full = (gradients[name][1] for name in ("none", "blocks", "full"))
    assert blocks < 0.8 * none and full < 0.9 * blocks
