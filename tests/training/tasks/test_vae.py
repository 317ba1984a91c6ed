# SPDX-License-Identifier: Apache-2.0
"""Claim: a VAE's scale is measured over both pictures of all pairs, on any number of devices."""

import jax
import numpy as np
import pytest
from flax import nnx

from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.models.vae import VAE
from ip2p_jax.networks import to_pixels
from ip2p_jax.training import mesh
from ip2p_jax.training.tasks.vae import latent_std
from tests.training import tiny


@pytest.mark.parametrize("devices", [1, 8])
def test_latent_std_is_numpys(devices):
    batches = [tiny.batch(8, seed=i) for i in range(3)]
    batches[1] = batches[1]._replace(output=np.zeros_like(batches[1].output))  # unlike the others
    params, on = tiny.filled(VAE, tiny.VAE_SMALL, 2), tiny.grid(devices, 1)
    placed = (mesh.put_batch(on, batch) for batch in batches)
    got = latent_std(ModelConfig(vae=tiny.VAE_SMALL), tiny.put(on, params), placed, 3)
    graphdef, _ = abstract(VAE, tiny.VAE_SMALL)
    encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(to_pixels(x)).mean)
    pictures = [x for batch in batches for x in (batch.input, batch.output)]
    latents = [np.asarray(encode(params, x)) for x in pictures]
    assert got == pytest.approx(np.std(latents), rel=1e-5)
    assert got != pytest.approx(np.std(latents[::2]), rel=1e-3)  # control: inputs alone
