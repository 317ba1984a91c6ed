# SPDX-License-Identifier: Apache-2.0
"""Trains the autoencoder that small models need."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from ip2p_jax.diffusion.objective import sample_posterior
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.models.vae import ENCODER, VAE
from ip2p_jax.networks import to_pixels, to_uint8
from ip2p_jax.training.state import Metrics, mean
from ip2p_jax.training.tasks.task import Task, given, scratch
from ip2p_jax.types import Batch, Params


def vae_task(
    config: ModelConfig,
    pretrained: Params | None = None,
    *,
    kl_weight: float,
    dtype: Any,
    key: Key[Array, ""],
) -> Task:
    """Trains the VAE from scratch on both pictures of each pair; or, where one is given, its
    decoder for its latents as they are (as the ft-EMA and ft-MSE decoders of SD were trained on).

    Loss per picture: sums over its values of |difference| and of |difference of neighbours|, plus
    `kl_weight` times KL(q(z | x) || N(0, 1)) (Rombach et al. 2022, appendix G, without adversary
    and perceptual term; the term on neighbours (Mathieu et al. 2016, section 3.2) keeps edges
    sharp), divided by the number of values.
    """

    graphdef, _ = abstract(VAE, config.vae, dtype=dtype)

    def loss(
        params: Params, frozen: Params, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        x = to_pixels(jnp.stack([batch.input, batch.output], axis=1))
        x = rearrange(x, "b pair h w c -> (b pair) h w c")
        keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys).reshape(-1)
        vae = nnx.merge(graphdef, params["vae"] | frozen)
        posterior = vae.encode(x)
        d = vae.decode(sample_posterior(keys, *posterior)) - x
        edges = jnp.mean(jnp.abs(jnp.diff(d, axis=1))) + jnp.mean(jnp.abs(jnp.diff(d, axis=2)))
        kl = 0.5 * (posterior.mean**2 + jnp.exp(posterior.log_var) - 1.0 - posterior.log_var)
        kl_per_value = jnp.sum(kl) / x.size
        value = jnp.mean(jnp.abs(d)) + edges + kl_weight * kl_per_value
        logs = {"mse": mean(jnp.mean(d**2)), "kl": mean(jnp.mean(kl))}
        return value, logs

    def sample(ema: Params, frozen: Params, batch: Batch) -> UInt8[Array, "b h w 3"]:
        vae = nnx.merge(graphdef, ema["vae"] | frozen)
        return to_uint8(vae.decode(vae.encode(to_pixels(batch.input)).mean))

    if pretrained is None:
        return Task(config, scratch(key, vae=(VAE, config.vae)), {}, loss, sample)
    frozen = {name: pretrained[name] for name in ENCODER}
    trained = {name: x for name, x in pretrained.items() if name not in ENCODER}
    return Task(config, given({"vae": trained}), frozen, loss, sample)


def latent_std(config: ModelConfig, vae: Params, batches: Iterator[Batch], count: int) -> float:
    """Standard deviation of the latents of `count` batches, whose inverse is the VAE's scaling
    factor.

    Batch after batch: each moves two numbers between devices, and nothing waits in a queue.
    """
    graphdef, _ = abstract(VAE, config.vae)

    @jax.jit
    def moments(params: Params, batch: Batch) -> Float[Array, "2"]:
        encode = nnx.merge(graphdef, params).encode
        z = jnp.stack([encode(to_pixels(x)).mean for x in (batch.input, batch.output)])
        return jnp.stack([jnp.mean(z), jnp.mean(z**2)])

    measured = [np.asarray(moments(vae, next(batches)), np.float64) for _ in range(count)]
    mean, square = np.mean(measured, axis=0)
    return float(np.sqrt(square - mean**2))
