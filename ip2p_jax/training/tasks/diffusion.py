# SPDX-License-Identifier: Apache-2.0
"""What the tasks of diffusion share: the text tower, frozen or trained, and draws of samples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from ip2p_jax import config
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.objective import Losses, diffusion_loss
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.guided import TextBatch, seed_keys
from ip2p_jax.models.attention import Attend, attend
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.models.unet import REMAT
from ip2p_jax.training.state import Metrics
from ip2p_jax.types import Conditioning, Params

TEXT_GUIDANCE, IMAGE_GUIDANCE = 7.5, 1.5
"""Of the samples that a run shows: the paper's."""

Encode = Callable[[Params, Params, Any], tuple[Float[Array, "b n c"], Float[Array, "n c"]]]
"""`encode(params, frozen, tokens)`: text states of each row and of the empty text."""


def text_encoder(
    text: Any, frozen: Params, null_tokens: Int32[np.ndarray, "n"]
) -> tuple[Encode, Params]:
    """How texts are encoded, and `frozen` with what that needs; the tower is trained unless
    `frozen` holds it. `null_tokens` are those of the empty text."""
    if "text" not in frozen:
        return trained_text(text), frozen | {"null_tokens": null_tokens}
    tower = jax.jit(lambda params, tokens: nnx.merge(text, params)(tokens))
    null_text = tower(frozen["text"], null_tokens[None])[0]
    return frozen_text(text), frozen | {"null_text": np.asarray(null_text, np.float32)}


def frozen_text(text: Any) -> Encode:
    """The tower is in `frozen`, where the encoding of the empty text is kept beside it."""

    def encode(params: Params, frozen: Params, tokens: Any):
        states = nnx.merge(text, frozen["text"])(tokens)
        return states.astype(jnp.float32), frozen["null_text"]

    return encode


def trained_text(text: Any) -> Encode:
    """The tower is in `params`, so the empty text is encoded anew at each step."""

    def encode(params: Params, frozen: Params, tokens: Any):
        tower = nnx.merge(text, params["text"])
        null = tower(frozen["null_tokens"][None])[0]
        return tower(tokens).astype(jnp.float32), null.astype(jnp.float32)

    return encode


Score = Callable[
    [Any, Key[Array, " b"], Float[Array, "b h w z"], Conditioning, Float[Array, "n c"]],
    tuple[Float[Array, ""], Metrics],
]
"""`score(unet, keys, z0, cond, null_text)`: the loss of predictions, and what to log."""


def score_of(
    schedule: Schedule, objective: config.Objective, remat: str, attend: Attend = attend
) -> Score:
    """What the UNet is trained for, at which cost in memory, and how it attends.

    Raises ValueError where the last timestep, which has no signal, would have no weight.
    """
    if schedule.zero_terminal and objective.min_snr_gamma:
        raise ValueError(
            f"config.objective.min_snr_gamma is {objective.min_snr_gamma}, expected 0: with zero "
            "terminal SNR the last timestep would have no weight"
        )

    def score(unet: Any, keys, z0, cond, null_text) -> tuple[Float[Array, ""], Metrics]:
        network = functools.partial(unet, attend=attend, remat=REMAT[remat])
        value, losses = diffusion_loss(
            network,
            schedule,
            keys,
            z0,
            cond,
            null_text,
            objective.drop_rate,
            timestep_shift=objective.timestep_shift,
            min_snr_gamma=objective.min_snr_gamma,
            offset_noise=objective.offset_noise,
        )
        return value, quartiles(losses, len(schedule.alpha_bar))

    return score


def sampler_of(schedule: Schedule) -> str:
    """The sampler of a run's samples: the paper's, or the one that begins at pure noise."""
    return "ddim" if schedule.zero_terminal else "euler_ancestral"


def quartiles(losses: Losses, steps: int) -> Metrics:
    """Mean loss by quarter of the timesteps: loss_t1 the least noisy, loss_t4 the noisiest."""
    quarter = losses.t * 4 // steps
    return {
        f"loss_t{i + 1}": jnp.stack([jnp.sum(losses.loss * (quarter == i)), jnp.sum(quarter == i)])
        for i in range(4)
    }


def sample_texts(
    config: ModelConfig,
    tokens: Int32[Array, "b n"],
    null_tokens: Int32[np.ndarray, "n"],
    size: tuple[int, int],
) -> TextBatch:
    """Texts to be sampled as pictures of `size` (height, width), from one fixed noise a row."""
    b, factor = len(tokens), config.vae.factor
    start, keys = seed_keys(jnp.arange(b, dtype=jnp.uint32))
    null = jnp.broadcast_to(null_tokens[None], tokens.shape)
    noise = unit_noise(start, (size[0] // factor, size[1] // factor, config.vae.latent_channels))
    return TextBatch(tokens, null, jnp.full(b, TEXT_GUIDANCE), noise, keys)
