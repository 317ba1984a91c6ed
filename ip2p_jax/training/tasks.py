# SPDX-License-Identifier: Apache-2.0
"""What a run trains: its parameters, its loss, and what stays frozen.

Two tasks share one loop: `edit_task`, InstructPix2Pix, and `vae_task`, the autoencoder that small
models need. Which one is decided when the task is built, never in the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, UInt8

from ip2p_jax.diffusion.denoise import denoiser, guide_edit, one_batch
from ip2p_jax.diffusion.grids import grid
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.objective import Losses, diffusion_loss, sample_posterior
from ip2p_jax.diffusion.samplers import sample_euler_ancestral
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.models.clip import CLIPText
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE
from ip2p_jax.training.state import Loss, Metrics, mean
from ip2p_jax.types import Batch, Conditioning, Params

Sample = Callable[[Params, Params, Batch], Float[Array, "b h w c"]]
"""`sample(ema, frozen, batch)`: what the model makes of a batch, pixels in [-1, 1]."""


class Start(NamedTuple):
    """`init(*args)` gives the trained parameters by part, "unet", "text" or "vae"."""

    init: Callable[..., Params]
    args: tuple


class Task(NamedTuple):
    """What is trained, from what `start`; `frozen` goes to `loss` and `sample` as an argument."""

    config: ModelConfig
    start: Start
    frozen: Params
    loss: Loss
    sample: Sample


def pixels(x: UInt8[Array, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
    """uint8 in 0..255 to float32 in [-1, 1]."""
    return x.astype(jnp.float32) / 127.5 - 1.0


def given(params: Params) -> Start:
    """Starts from these parameters."""
    return Start(lambda params: params, (params,))


def scratch(key: Key[Array, ""], **parts: tuple[Callable[..., nnx.Module], Any]) -> Start:
    """Starts from random parameters of each part, given as (network, its dimensions)."""

    def init(key: Key[Array, ""]) -> Params:
        params = {}
        for part_key, (name, (network, cfg)) in zip(
            jax.random.split(key, len(parts)), parts.items(), strict=True
        ):
            module = network(cfg, rngs=nnx.Rngs(part_key))
            params[name] = nnx.to_pure_dict(nnx.state(module))
        return params

    return Start(init, (key,))


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
        x = pixels(jnp.stack([batch.input, batch.output], axis=1))
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

    def sample(ema: Params, frozen: Params, batch: Batch) -> Float[Array, "b h w c"]:
        vae = nnx.merge(graphdef, ema["vae"])
        return vae.decode(vae.encode(pixels(batch.input)).mean)

    return Task(config, scratch(key, vae=(VAE, config.vae)), {}, loss, sample)


def latent_std(config: ModelConfig, vae: Params, batches: list[Batch]) -> float:
    """Standard deviation of the latents of `batches`, whose inverse is the VAE's scaling factor."""
    graphdef, _ = abstract(VAE, config.vae)
    encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(pixels(x)).mean)
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
    nets = graphs(config, dtype)
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
        edit_sample(nets, encode, schedule, scaling, sample_steps),
    )


class Graphs(NamedTuple):
    """The networks of an editor without their parameters."""

    unet: Any
    vae: Any
    text: Any


def graphs(config: ModelConfig, dtype: Any) -> Graphs:
    """The structure of the three networks, computing in `dtype`."""

    def graph(network: type[nnx.Module], cfg: Any) -> Any:
        return abstract(network, cfg, dtype=dtype)[0]

    return Graphs(graph(UNet, config.unet), graph(VAE, config.vae), graph(CLIPText, config.text))


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
    nets: Graphs, encode: Encode, schedule: Schedule, scaling: float, drop_rate: float
) -> Loss:
    """InstructPix2Pix's objective (section 3.2).

    The target is a sample of the posterior times `scaling`, the condition its mean, not scaled.
    """

    def loss(
        params: Params, frozen: Params, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        vae, unet = nnx.merge(nets.vae, frozen["vae"]), nnx.merge(nets.unet, params["unet"])
        z_keys, loss_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
        z0 = sample_posterior(z_keys, *vae.encode(pixels(batch.output))) * scaling
        text, null_text = encode(params, frozen, batch.tokens)
        cond = Conditioning(text, vae.encode(pixels(batch.input)).mean)
        value, losses = diffusion_loss(unet, schedule, loss_keys, z0, cond, null_text, drop_rate)
        return value, quartiles(losses, len(schedule.alpha_bar))

    return loss


def edit_sample(
    nets: Graphs, encode: Encode, schedule: Schedule, scaling: float, steps: int
) -> Sample:
    """Edits a batch with the paper's guidance (7.5, 1.5), one fixed noise a row."""
    levels = grid("euler_ancestral", steps, schedule)

    def sample(ema: Params, frozen: Params, batch: Batch) -> Float[Array, "b h w c"]:
        def network(z, t, text):
            return nnx.merge(nets.unet, ema["unet"])(z, t, text)

        vae = nnx.merge(nets.vae, frozen["vae"])
        text, null_text = encode(ema, frozen, batch.tokens)
        cond = Conditioning(text, vae.encode(pixels(batch.input)).mean)
        null = jnp.broadcast_to(null_text[None], text.shape)
        rows = jnp.ones(len(text))
        denoise = guide_edit(
            denoiser(one_batch(network), schedule), cond, null, 7.5 * rows, 1.5 * rows
        )
        keys = jax.vmap(jax.random.key)(jnp.arange(len(text)))
        start, steps = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
        noise = unit_noise(start, cond.image.shape[1:])
        return vae.decode(sample_euler_ancestral(denoise, noise, levels, steps) / scaling)

    return sample
