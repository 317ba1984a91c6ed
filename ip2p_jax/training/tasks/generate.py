# SPDX-License-Identifier: Apache-2.0
"""Trains text-to-image Stable Diffusion (Rombach et al. 2022), which editing starts from."""

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
from ip2p_jax.guided import generate
from ip2p_jax.models.attention import Attend, attend
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.models.vae import Posterior
from ip2p_jax.networks import Networks, networks, to_pixels, to_uint8
from ip2p_jax.training.state import Loss, Metrics, Start
from ip2p_jax.training.tasks.diffusion import (
    Encode,
    Score,
    sample_texts,
    sampler_of,
    score_of,
    text_encoder,
)
from ip2p_jax.training.tasks.task import Sample, Task
from ip2p_jax.types import CaptionedBatch, CaptionedLatentBatch, Conditioning, Params

Captions = CaptionedBatch | CaptionedLatentBatch


def generate_task(
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
    """Trains the UNet, and the text tower too unless `frozen` holds it, to make pictures of texts.

    Arguments are those of `edit_task`; batches are types.CaptionedLatentBatch if the latents are
    `cached`, else types.CaptionedBatch.
    """
    nets = networks(config, dtype, attend)
    encode, frozen = text_encoder(nets.text, frozen, null_tokens)
    posterior = posterior_of_latents if cached else posterior_of_pictures(nets.vae)
    score = score_of(schedule, objective, remat, attend)
    loss = generate_loss(nets, posterior, encode, config.vae.scaling_factor, score)
    sample = generate_sample(nets, config, schedule, sample_steps, null_tokens)
    return Task(config, start, frozen, loss, beside_decoded(nets, sample) if cached else sample)


PosteriorOf = Callable[[Params, Any], Posterior]
"""`posterior(frozen, batch)`: what the VAE makes of the pictures."""


def posterior_of_pictures(vae: Any) -> PosteriorOf:
    """The encoder is part of the step."""
    return lambda frozen, batch: nnx.merge(vae, frozen["vae"]).encode(to_pixels(batch.image))


def posterior_of_latents(frozen: Params, batch: CaptionedLatentBatch) -> Posterior:
    """The encoder has run before, and is not part of the step."""
    return Posterior(batch.mean.astype(jnp.float32), batch.log_var.astype(jnp.float32))


def generate_loss(
    nets: Networks, posterior: PosteriorOf, encode: Encode, scaling: float, score: Score
) -> Loss:
    """Equation 3 of the paper on latent diffusion, with texts dropped for guidance without them.

    It is InstructPix2Pix's objective with an image of no channels: what drops the text there, alone
    or with the image, drops it here, so that twice the drop rate of the texts are empty (10 %).
    """

    def loss(
        params: Params, frozen: Params, batch: Captions, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        unet = nnx.merge(nets.unet, params["unet"])
        z_keys, loss_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
        z0 = sample_posterior(z_keys, *posterior(frozen, batch)) * scaling
        text, null_text = encode(params, frozen, batch.tokens)
        cond = Conditioning(text, jnp.zeros((*z0.shape[:-1], 0)))
        return score(unet, loss_keys, z0, cond, null_text)

    return loss


def generate_sample(
    nets: Networks,
    config: ModelConfig,
    schedule: Schedule,
    steps: int,
    null_tokens: Int32[np.ndarray, "n"],
) -> Sample:
    """Makes pictures of a batch's captions with guidance 7.5, one fixed noise a row."""
    name = sampler_of(schedule)
    points, factor = grid(name, steps, schedule), config.vae.factor
    guided = functools.partial(generate, SAMPLERS[name], schedule, nets, config.vae.scaling_factor)

    def sample(ema: Params, frozen: Params, batch: Captions) -> UInt8[Array, "b h w 3"]:
        _, h, w, _ = batch[0].shape
        scale = factor if isinstance(batch, CaptionedLatentBatch) else 1
        texts = sample_texts(config, batch.tokens, null_tokens, (h * scale, w * scale))
        return guided(frozen | ema, texts, points).images

    return sample


def beside_decoded(nets: Networks, sample: Sample) -> Sample:
    """What is made of captions, to the right of what the VAE makes of their pictures' latents."""

    def row(ema: Params, frozen: Params, batch: CaptionedLatentBatch) -> UInt8[Array, "b h w 3"]:
        decoded = to_uint8(nnx.merge(nets.vae, frozen["vae"]).decode(batch.mean))
        return jnp.concatenate([decoded, sample(ema, frozen, batch)], axis=2)

    return row
