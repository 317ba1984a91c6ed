# SPDX-License-Identifier: Apache-2.0
"""The training objective: noise a latent, drop conditions, and score the network's prediction.

Everything random comes from one key per row of the global batch, so that a row does not depend on
the devices and hosts it is computed on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ip2p_jax.diffusion.denoise import Network
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.types import Conditioning


class Losses(NamedTuple):
    """What each row lost, and at which timestep."""

    loss: Float[Array, "b"]
    t: Int[Array, "b"]


def diffusion_loss(
    network: Network,
    schedule: Schedule,
    keys: Key[Array, "b"],
    z0: Float[Array, "b h w 4"],
    cond: Conditioning,
    null_text: Float[Array, "n c"],
    drop_rate: float = 0.05,
    *,
    timestep_shift: float = 1.0,
    min_snr_gamma: float = 0.0,
    offset_noise: float = 0.0,
) -> tuple[Float[Array, ""], Losses]:
    """Mean squared error of the predicted epsilon (or v) at random timesteps (equation 2).

    z0 is the scaled latent of the target picture; `null_text` is the encoding of the empty string.
    Each row's key is split once, for noise, timestep and dropout. `timestep_shift` draws noisy
    timesteps more often (`draw_timesteps`; 1: all alike), `min_snr_gamma` weighs timesteps
    (`snr_weights`; 0: all alike), `offset_noise` adds noise that is the same all over a channel
    (`offset`; 0: none). Returns the mean in float32, and the rows behind it, not weighted.
    """
    noise_keys, t_keys, drop_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    cond = drop_conditioning(drop_keys, cond, null_text, drop_rate)
    t = draw_timesteps(t_keys, len(schedule.alpha_bar), timestep_shift)
    eps = offset(noise_keys, z0.shape[1:], offset_noise)
    noisy, target = q_sample(schedule, z0, eps, t)
    predicted = network(
        jnp.concatenate([noisy, cond.image], axis=-1), t.astype(jnp.float32), cond.text
    )
    loss = jnp.mean(jnp.square(predicted.astype(jnp.float32) - target), axis=(1, 2, 3))
    weights = jnp.asarray(snr_weights(schedule, min_snr_gamma), jnp.float32)
    return jnp.mean(weights[t] * loss), Losses(loss, t)


def draw_timesteps(keys: Key[Array, "b"], total: int, shift: float) -> Int[Array, "b"]:
    """Timesteps 0 .. total - 1, uniform if `shift` is 1, else more often noisy ones (if above 1).

    A uniform u becomes shift u / (1 + (shift - 1) u) of all timesteps (Esser et al. 2024, section
    5.3.2): half of what is drawn lies above shift / (1 + shift). What a text decides in a picture
    as a whole, like where things are, is learned from noisy timesteps.
    """
    if shift == 1:
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, total))(keys)
    u = jax.vmap(jax.random.uniform)(keys)
    share = shift * u / (1 + (shift - 1) * u)
    return jnp.minimum((share * total).astype(jnp.int32), total - 1)


def snr_weights(schedule: Schedule, gamma: float) -> Float[np.ndarray, "T"]:
    """Min-SNR weights by timestep, float64 (Hang et al. 2023, section 3.4); ones where gamma is 0.

    A loss on z0 is weighed by min(snr, gamma), snr = alpha_bar / (1 - alpha_bar), so one on epsilon
    by min(snr, gamma) / snr, and one on v by min(snr, gamma) / (snr + 1). gamma = 5 in the paper.
    """
    if not gamma:
        return np.ones_like(schedule.alpha_bar)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    scale = snr + 1 if schedule.prediction == "v_prediction" else snr
    return np.minimum(snr, gamma) / scale


def offset(
    keys: Key[Array, "b"], shape: tuple[int, ...], strength: float
) -> Float[Array, "b h w c"]:
    """Unit noise plus `strength` times a unit normal number for each channel of each row.

    Offset noise (N. Guttenberg, "Diffusion with offset noise", 2023): means of channels, which
    plain noise hardly touches, are learned too. Where there is any, each key is split in two.
    """
    if not strength:
        return unit_noise(keys, shape)
    keys, channel_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
    return unit_noise(keys, shape) + strength * unit_noise(channel_keys, (1, 1, shape[-1]))


def q_sample(
    schedule: Schedule,
    z0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    t: Int[Array, "b"],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """The latent noised to timestep t, with unit variance, and what the network has to predict."""
    signal = jnp.asarray(np.sqrt(schedule.alpha_bar), jnp.float32)[t][:, None, None, None]
    noise = jnp.asarray(np.sqrt(1 - schedule.alpha_bar), jnp.float32)[t][:, None, None, None]
    target = signal * eps - noise * z0 if schedule.prediction == "v_prediction" else eps
    return signal * z0 + noise * eps, target


def drop_conditioning(
    keys: Key[Array, "b"],
    cond: Conditioning,
    null_text: Float[Array, "n c"],
    rate: float = 0.05,
) -> Conditioning:
    """Drops text only, both, and image only, each with probability `rate` (section 3.2.1).

    One uniform number a row decides: below 2 rate the text goes, from rate to 3 rate the image. A
    dropped text is `null_text`, a dropped image is zero. Raises ValueError unless 0 <= rate <= 1/3.
    """
    if not 0 <= rate <= 1 / 3:
        raise ValueError(f"conditioning dropout: rate {rate}, expected 0 to 1/3")
    u = jax.vmap(jax.random.uniform)(keys)
    drop_text, drop_image = u < 2 * rate, (rate <= u) & (u < 3 * rate)
    return Conditioning(
        text=jnp.where(drop_text[:, None, None], null_text[None], cond.text),
        image=jnp.where(drop_image[:, None, None, None], 0.0, cond.image),
    )


def sample_posterior(
    keys: Key[Array, "b"], mean: Float[Array, "b h w c"], log_var: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """A sample of the VAE's posterior, not scaled: what a training target is made of.

    The condition is the mean. The keys must not be used for anything else.
    """
    return mean + jnp.exp(log_var / 2) * unit_noise(keys, mean.shape[1:])
