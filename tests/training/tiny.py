# SPDX-License-Identifier: Apache-2.0
"""An editor of one level with random weights, and a state small enough to read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ip2p_jax.config import Objective
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.models.clip import CLIPText
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE
from ip2p_jax.training import mesh
from ip2p_jax.training.state import mean
from ip2p_jax.training.tasks.edit import edit_task
from ip2p_jax.training.tasks.task import Task, given
from ip2p_jax.types import Batch

KEY = jax.random.key(0)


VAE_SMALL = VAEConfig(channels=(16, 32), layers_per_block=1, norm_groups=8, sample_size=16)


def filled(network, cfg, seed: int) -> dict:
    """Random parameters of a network, made without compiling anything."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        values = rng.normal(size=x.shape) / max(np.prod(x.shape[:-1]), 1) ** 0.5
        return (values + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract(network, cfg)[1])


def tiny_task(cached: bool = False, dtype: Any = jnp.float32) -> Task:
    """Trains UNet and text tower; the VAE is frozen and random. Takes latents if `cached`."""
    unet = UNetConfig(
        channels=(32,),
        attention=(True,),
        heads=(2,),
        layers_per_block=1,
        context_dim=32,
        norm_groups=8,
    )
    text = TextConfig(vocab_size=1024, width=32, layers=1, heads=2, mlp_width=64)
    dims = ModelConfig(unet, VAE_SMALL, text).widened()
    trained = {"unet": filled(UNet, dims.unet, 0), "text": filled(CLIPText, dims.text, 1)}
    return edit_task(
        dims,
        given(trained),
        {"vae": filled(VAE, VAE_SMALL, 2)},
        np.full(77, 2, np.int32),
        schedule=STABLE_DIFFUSION,
        objective=Objective(drop_rate=0.05),
        sample_steps=2,
        dtype=dtype,
        cached=cached,
    )


def batch(rows: int = 8, seed: int = 0, size: int = 16) -> Batch:
    """Noise for pictures, random tokens."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (2, rows, size, size, 3), np.uint8)
    return Batch(pictures[0], pictures[1], rng.integers(0, 1024, (rows, 77), np.int32))


def grid(data: int, fsdp: int) -> jax.sharding.Mesh:
    """A mesh of as many of the fake devices as it needs."""
    axes = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axes, devices=devices)


def toy_params() -> dict:
    """One array that "fsdp" splits and one that it does not."""
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(128, 256)).astype(np.float32) / 16,
        "b": rng.normal(size=256).astype(np.float32),
    }


def toy_loss(params, frozen, batch, keys):
    """Scores a linear map of the first pixels; each row adds a number of its own."""
    x = batch.input.reshape(len(keys), -1)[:, :128].astype(jnp.float32) / 255
    own = jax.vmap(jax.random.normal)(keys)
    y = x @ params["w"] + params["b"][None] * frozen["gain"] + own[:, None]
    return jnp.mean(y**2), {"own": mean(jnp.mean(own))}


def put(devices: jax.sharding.Mesh, tree):
    return jax.device_put(tree, mesh.replicated(devices))
