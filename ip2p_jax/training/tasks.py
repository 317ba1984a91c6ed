# SPDX-License-Identifier: Apache-2.0
"""What a run trains: its parameters, its loss, and what stays frozen.

Two tasks share one loop: `edit_task`, InstructPix2Pix, and `vae_task`, the autoencoder that small
models need. Which one is decided when the task is built, never in the step.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, UInt8

from ip2p_jax.diffusion.grids import grid
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.objective import Losses, diffusion_loss, sample_posterior
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.guided import EditBatch, TextBatch, edit, seed_keys
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.models.vae import VAE
from ip2p_jax.networks import Networks, networks, to_pixels, to_uint8
from ip2p_jax.training import mesh
from ip2p_jax.training.state import Loss, Metrics, Start, mean
from ip2p_jax.types import Batch, Conditioning, Params

Sample = Callable[[Params, Params, Batch], UInt8[Array, "b h w 3"]]
"""`sample(ema, frozen, batch)`: what the model makes of a batch."""


class Task(NamedTuple):
    """What is trained, from what `start`; `frozen` goes to `loss` and `sample` as an argument."""

    config: ModelConfig
    start: Start
    frozen: Params
    loss: Loss
    sample: Sample


def given(params: Params) -> Start:
    """Starts from these parameters, on the host. Only shapes will do if they are not to be made."""
    return Start(params, lambda shardings: jax.tree.map(mesh.put, params, shardings))


def scratch(key: Key[Array, ""], **parts: tuple[Callable[..., nnx.Module], Any]) -> Start:
    """Starts from random parameters of each part, given as (network, its dimensions)."""

    def init() -> Params:
        keys = jax.random.split(key, len(parts))
        return {
            name: random_params(network, cfg, part_key)
            for part_key, (name, (network, cfg)) in zip(keys, parts.items(), strict=True)
        }

    shapes = {name: abstract(*part)[1] for name, part in parts.items()}
    return Start(shapes, lambda shardings: jax.jit(init, out_shardings=shardings)())


def random_params(network: Callable[..., nnx.Module], cfg: Any, key: Key[Array, ""]) -> Params:
    """Parameters of a new network. Counting keys under a trace would cost seconds."""
    rngs, count = nnx.Rngs(key), itertools.count()

    def fresh() -> Key[Array, ""]:
        return jax.random.fold_in(key, next(count))

    rngs.params = fresh  # pyright: ignore[reportAttributeAccessIssue]
    return nnx.to_pure_dict(nnx.state(network(cfg, rngs=rngs)))


def vae_task(config: ModelConfig, *, kl_weight: float, dtype: Any, key: Key[Array, ""]) -> Task:
    """Trains the VAE from scratch on both pictures of each pair.

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
        vae = nnx.merge(graphdef, params["vae"])
        posterior = vae.encode(x)
        d = vae.decode(sample_posterior(keys, *posterior)) - x
        edges = jnp.mean(jnp.abs(jnp.diff(d, axis=1))) + jnp.mean(jnp.abs(jnp.diff(d, axis=2)))
        kl = 0.5 * (posterior.mean**2 + jnp.exp(posterior.log_var) - 1.0 - posterior.log_var)
        kl_per_value = jnp.sum(kl) / x.size
        value = jnp.mean(jnp.abs(d)) + edges + kl_weight * kl_per_value
        logs = {"mse": mean(jnp.mean(d**2)), "kl": mean(jnp.mean(kl))}
        return value, logs

    def sample(ema: Params, frozen: Params, batch: Batch) -> UInt8[Array, "b h w 3"]:
        vae = nnx.merge(graphdef, ema["vae"])
        return to_uint8(vae.decode(vae.encode(to_pixels(batch.input)).mean))

    return Task(config, scratch(key, vae=(VAE, config.vae)), {}, loss, sample)


def latent_std(config: ModelConfig, vae: Params, batches: list[Batch]) -> float:
    """Standard deviation of the latents of `batches`, whose inverse is the VAE's scaling factor."""
    graphdef, _ = abstract(VAE, config.vae)
    encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(to_pixels(x)).mean)
    latents = [encode(vae, x) for batch in batches for x in (batch.input, batch.output)]
    return float(jnp.std(jnp.concatenate(latents)))


def edit_task(
    config: ModelConfig,
    start: Start,
    frozen: Params,
    null_tokens: Int32[np.ndarray, "n"],
    *,
    schedule: Schedule,
    drop_rate: float,
    sample_steps: int,
    dtype: Any,
) -> Task:
    """Trains the UNet, and the text tower too unless `frozen` holds it, to edit by instruction.

    `null_tokens` are those of the empty text, `frozen` the parameters of the VAE at least.
    """
    nets = networks(config, dtype)
    if "text" in frozen:
        tower = jax.jit(lambda params, tokens: nnx.merge(nets.text, params)(tokens))
        null_text = tower(frozen["text"], null_tokens[None])[0]
        frozen = frozen | {"null_text": np.asarray(null_text, np.float32)}
        encode = frozen_text(nets.text)
    else:
        frozen = frozen | {"null_tokens": null_tokens}
        encode = trained_text(nets.text)
    scaling = config.vae.scaling_factor
    return Task(
        config,
        start,
        frozen,
        edit_loss(nets, encode, schedule, scaling, drop_rate),
        edit_sample(nets, config, schedule, sample_steps, null_tokens),
    )


Encode = Callable[[Params, Params, Any], tuple[Float[Array, "b n c"], Float[Array, "n c"]]]
"""`encode(params, frozen, tokens)`: text states of each row and of the empty text."""


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


def quartiles(losses: Losses, steps: int) -> Metrics:
    """Mean loss by quarter of the timesteps: loss_t1 the least noisy, loss_t4 the noisiest."""
    quarter = losses.t * 4 // steps
    return {
        f"loss_t{i + 1}": jnp.stack([jnp.sum(losses.loss * (quarter == i)), jnp.sum(quarter == i)])
        for i in range(4)
    }


def edit_loss(
    nets: Networks, encode: Encode, schedule: Schedule, scaling: float, drop_rate: float
) -> Loss:
    """InstructPix2Pix's objective (section 3.2).

    The target is a sample of the posterior times `scaling`, the condition its mean, not scaled.
    """

    def loss(
        params: Params, frozen: Params, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        vae, unet = nnx.merge(nets.vae, frozen["vae"]), nnx.merge(nets.unet, params["unet"])
        z_keys, loss_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
        z0 = sample_posterior(z_keys, *vae.encode(to_pixels(batch.output))) * scaling
        text, null_text = encode(params, frozen, batch.tokens)
        cond = Conditioning(text, vae.encode(to_pixels(batch.input)).mean)
        value, losses = diffusion_loss(unet, schedule, loss_keys, z0, cond, null_text, drop_rate)
        return value, quartiles(losses, len(schedule.alpha_bar))

    return loss


def edit_sample(
    nets: Networks,
    config: ModelConfig,
    schedule: Schedule,
    steps: int,
    null_tokens: Int32[np.ndarray, "n"],
) -> Sample:
    """Edits a batch with the paper's guidance (7.5, 1.5), one fixed noise a row."""
    name = "euler_ancestral"
    points = grid(name, steps, schedule)
    guided = functools.partial(edit, SAMPLERS[name], schedule, nets, config.vae.scaling_factor)

    def sample(ema: Params, frozen: Params, batch: Batch) -> UInt8[Array, "b h w 3"]:
        b, h, w, _ = batch.input.shape
        start, keys = seed_keys(jnp.arange(b, dtype=jnp.uint32))
        null = jnp.broadcast_to(null_tokens[None], batch.tokens.shape)
        rows, factor = jnp.ones(b), config.vae.factor
        noise = unit_noise(start, (h // factor, w // factor, config.vae.latent_channels))
        text = TextBatch(batch.tokens, null, 7.5 * rows, noise, keys)
        edits = EditBatch(text, batch.input, 1.5 * rows)
        return guided(frozen | ema, edits, points).images

    return sample
