# SPDX-License-Identifier: Apache-2.0
"""Small models as the tests of pair generation take them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from data_gen.candidates import CandidateMaker, Recipe
from ip2p_jax.evaluation.clip_scores import Clip
from ip2p_jax.models.attention import attend
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.unet import UNet
from ip2p_jax.placed import place
from ip2p_jax.weights.load import load


@pytest.fixture(scope="session")
def tiny_unet(tiny_sd: Path):
    """`unet(z, t, text, attend)`."""
    pretrained = load(str(tiny_sd))
    graph, _ = abstract(UNet, pretrained.config.unet)
    params = jax.tree.map(jnp.asarray, pretrained.params["unet"])

    def unet(z, t, text, attend=attend):
        return nnx.merge(graph, params)(z, t, text, attend)

    return unet


@pytest.fixture(scope="session")
def maker(tiny_sd: Path, tiny_clip: Path) -> CandidateMaker:
    """Candidates of 32 px in 3 steps, 2 a unit, on two devices."""
    two = jax.devices()[:2]
    model = place(load(str(tiny_sd)), devices=two)
    clip = Clip.from_pretrained(str(tiny_clip), devices=two)
    return CandidateMaker(model, clip, Recipe(steps=3, height=32, width=32), rows=2)
