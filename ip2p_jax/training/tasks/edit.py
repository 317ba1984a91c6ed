# SPDX-License-Identifier: Apache-2.0
"""Trains InstructPix2Pix: a UNet that edits pictures by instruction."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, UInt8

from ip2p_jax.config import Objective
from ip2p_jax.diffusion.grids import grid
from ip2p_jax.diffusion.objective import sample_posterior
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.guided import Encoded, edit_encoded, encode_text
from ip2p_jax.models.attention import Attend, attend
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.models.vae import Posterior
from ip2p_jax.networks import Networks, networks, to_pixels, to_uint8
from ip2p_jax.training.state import Loss, Metrics, Start
from ip2p_jax.training.tasks.diffusion import (
    IMAGE_GUIDANCE,
    Encode,
    Score,
    sample_texts,
    sampler_of,
    score_of,
    text_encoder,
)
from ip2p_jax.training.tasks.task import Sample, Task
from ip2p_jax.types import Batch, Conditioning, LatentBatch, Params


def edit_task(
    config: ModelConfig,
    start: Start,
    frozen: Params,
    null_tokens: Int32[np.ndarray, "n"],
    *,
    schedule: Schedule,
    objective: Objective,
    sample_steps: int,
    dtype: Any,
    remat: str = "none",
    cached: bool = False,
    attend: Attend = attend,
) -> Task:
    """Trains the UNet, and the text tower too unless `frozen` holds it, to edit by instruction.

    `null_tokens` are those of the empty text, `frozen` the parameters of the VAE at least. Batches
    are types.LatentBatch if the latents are `cached`, else types.Batch.
    """
    nets = networks(config, dtype, attend)
    encode, frozen = text_encoder(nets.text, frozen, null_tokens)
    moments = moments_of_latents if cached else moments_of_pictures(nets.vae)
    score = score_of(schedule, objective, remat, attend)
    loss = edit_loss(nets, moments, encode, config.vae.scaling_factor, score)
    sample = edit_sample(nets, moments, config, schedule, sample_steps, null_tokens)
    return Task(config, start, frozen, loss, between_decoded(nets, sample) if cached else sample)


Moments = Callable[[Params, Any], tuple[Float[Array, "b h w z"], Posterior]]
"""`moments(frozen, batch)`: the mean of the input's posterior, and the output's posterior."""


def moments_of_pictures(vae: Any) -> Moments:
    """The encoder is part of the step."""

    def moments(frozen: Params, batch: Batch):
        encode = nnx.merge(vae, frozen["vae"]).encode
        return encode(to_pixels(batch.input)).mean, encode(to_pixels(batch.output))

    return moments


def moments_of_latents(frozen: Params, batch: LatentBatch):
    """The encoder has run before, and is not part of the step."""
    mean, output, log_var = (x.astype(jnp.float32) for x in batch[:3])
    return mean, Posterior(output, log_var)


def edit_loss(
    nets: Networks, moments: Moments, encode: Encode, scaling: float, score: Score
) -> Loss:
    """InstructPix2Pix's objective (section 3.2).

    The target is a sample of the posterior times `scaling`, the condition its mean, not scaled.
    """

    def loss(
        params: Params, frozen: Params, batch: Batch | LatentBatch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        unet = nnx.merge(nets.unet, params["unet"])
        z_keys, loss_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
        image, posterior = moments(frozen, batch)
        z0 = sample_posterior(z_keys, *posterior) * scaling
        text, null_text = encode(params, frozen, batch.tokens)
        cond = Conditioning(text, image)
        return score(unet, loss_keys, z0, cond, null_text)

    return loss


def edit_sample(
    nets: Networks,
    moments: Moments,
    config: ModelConfig,
    schedule: Schedule,
    steps: int,
    null_tokens: Int32[np.ndarray, "n"],
) -> Sample:
    """Edits a batch with the paper's guidance (7.5, 1.5), one fixed noise a row."""
    name = sampler_of(schedule)
    points, factor = grid(name, steps, schedule), config.vae.factor
    guided = functools.partial(
        edit_encoded, SAMPLERS[name], schedule, nets, config.vae.scaling_factor
    )

    def sample(ema: Params, frozen: Params, batch: Batch | LatentBatch) -> UInt8[Array, "b h w 3"]:
        params = frozen | ema
        image, _ = moments(frozen, batch)
        b, h, w, _ = image.shape
        text = sample_texts(config, batch.tokens, null_tokens, (h * factor, w * factor))
        cond, null_text = encode_text(nets, params, text)
        encoded = Encoded(cond._replace(image=image), null_text)
        return guided(params, encoded, text, jnp.full(b, IMAGE_GUIDANCE), points).images

    return sample


def between_decoded(nets: Networks, sample: Sample) -> Sample:
    """What is made of latents, between what the VAE makes of the input's and of the output's."""

    def row(ema: Params, frozen: Params, batch: LatentBatch) -> UInt8[Array, "b h w 3"]:
        vae = nnx.merge(nets.vae, frozen["vae"])
        before, after = (to_uint8(vae.decode(z)) for z in (batch.input, batch.output))
        return jnp.concatenate([before, sample(ema, frozen, batch), after], axis=2)

    return row
