# SPDX-License-Identifier: Apache-2.0
"""From a network's prediction to a denoiser, and from denoisers to a guided denoiser.

Samplers see only `denoise(z, sigma) -> z0`. Guidance is a function that returns another one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.types import Conditioning, Denoise

Network = Callable[
    [Float[Array, "b h w c_in"], Float[Array, "b"], Float[Array, "b n c"]],
    Float[Array, "b h w 4"],
]
"""`network(z, t, text)`: the noisy latent of unit variance with the image latent behind it along
the channels, float32 timesteps and CLIP states; the predicted epsilon or v."""

ConditionalDenoise = Callable[
    [Float[Array, "b h w 4"], Float[Array, ""], Conditioning], Float[Array, "b h w 4"]
]
"""`denoise(z, sigma, cond) -> z0`. `functools.partial(denoise, cond=cond)` is unguided."""


def denoiser(network: Network, schedule: Schedule) -> ConditionalDenoise:
    """Denoises with a network of the given schedule and prediction type.

    Only the noisy channels are scaled to unit variance (c_in = 1 / sqrt(sigma^2 + 1)). A
    text-to-image network is given an image latent of no channels.
    """
    to_z0 = v_to_z0 if schedule.prediction == "v_prediction" else epsilon_to_z0

    def denoise(
        z: Float[Array, "b h w 4"], sigma: Float[Array, ""], cond: Conditioning
    ) -> Float[Array, "b h w 4"]:
        scaled = jnp.concatenate([z / jnp.sqrt(sigma**2 + 1), cond.image], axis=-1)
        t = jnp.full(z.shape[:1], schedule.t(sigma))
        return to_z0(z, sigma, network(scaled, t, cond.text).astype(jnp.float32))

    return denoise


def one_batch(network: Network, by_row: NamedSharding | None = None) -> Network:
    """Gives the branches that `vmap` makes to the network as more rows of one batch.

    Left to itself, vmap would add a dimension to every operation inside; flat rows are faster on
    the CPU. The branches of a picture stay together, so a batch split over devices stays split. One
    that is not, having too few pictures, is split here, `by_row`: each branch on a device.
    """
    rows = jax.custom_batching.custom_vmap(network)

    @rows.def_vmap
    def rule(branches: int, batched: list[bool], *args):
        spread = [
            x if has_branches else jnp.broadcast_to(x[None], (branches, *x.shape))
            for x, has_branches in zip(args, batched, strict=True)
        ]
        flat = (rearrange(x, "branch b ... -> (b branch) ...") for x in spread)
        result = split(network, by_row)(*flat)
        return rearrange(result, "(b branch) ... -> branch b ...", branch=branches), True

    return rows


def split(network: Network, by_row: NamedSharding | None) -> Network:
    """Gives every device as many rows, where they do not lie so; some are repeated to that end."""
    devices = 1 if by_row is None else by_row.mesh.size

    def run(*args):
        n = len(args[0])
        if n % devices == 0:
            return network(*args)
        fill = np.arange(n + -n % devices) % n
        return network(*(jax.lax.with_sharding_constraint(x[fill], by_row) for x in args))[:n]

    return run


def epsilon_to_z0(
    z: Float[Array, "b h w c"], sigma: Float[Array, ""], eps: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Solves z = z0 + sigma eps for z0."""
    return z - sigma * eps


def v_to_z0(
    z: Float[Array, "b h w c"], sigma: Float[Array, ""], v: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Solves v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z0 (Salimans and Ho 2022) for z0."""
    return z / (sigma**2 + 1) - v * sigma / jnp.sqrt(sigma**2 + 1)


Rescale = Callable[
    [Float[Array, "b h w c"], Float[Array, ""], Float[Array, "b h w c"], Float[Array, "b h w c"]],
    Float[Array, "b h w c"],
]
"""`rescale(z, sigma, guided, conditional)`: what the guided z0 becomes, by the conditional one."""


def as_guided(z, sigma, guided, conditional):
    """Leaves the guided z0 as it is."""
    return guided


def rescaled(schedule: Schedule, share: Float[Array, "b"]) -> Rescale:
    """Gives the guided output of the network back the spread of the conditional one (Lin et al.
    2024, section 3.4): o = share o_g std(o_c) / std(o_g) + (1 - share) o_g, a share per example.

    The output is (z - z0) / sigma for epsilon, and for v a multiple of z / (sigma^2 + 1) - z0: in
    terms of z0, its difference from z, or from z / (sigma^2 + 1), is scaled. Share 0 changes
    nothing, to the last bit.
    """

    def rescale(z, sigma, guided, conditional):
        origin = z / (sigma**2 + 1) if schedule.prediction == "v_prediction" else z
        wanted, got = (jnp.std(x - origin, axis=(1, 2, 3)) for x in (conditional, guided))
        change = share * (1 - wanted / jnp.maximum(got, 1e-12))
        return guided + change[:, None, None, None] * (origin - guided)

    return rescale


def guide_edit(
    denoise: ConditionalDenoise,
    cond: Conditioning,
    null_text: Float[Array, "b n c"],
    text_scale: Float[Array, "b"],
    image_scale: Float[Array, "b"],
    rescale: Rescale = as_guided,
) -> Denoise:
    """Classifier-free guidance by image and text (section 3.2.1, equation 3).

    eps = e(0, 0) + s_I (e(I, 0) - e(0, 0)) + s_T (e(I, T) - e(I, 0)), one s_I and s_T per example.
    It is applied to z0 instead: the weights add up to one, and z0 is an affine function of eps, and
    of v, at a given z and sigma. The null image is zero; `null_text` may be a negative text. Any
    scale is legal: image scales below 1, zero and negative ones extrapolate like the rest. What is
    `rescaled` takes the branch of image and text for the conditional one.
    """
    no_image = jnp.zeros_like(cond.image)
    branches = Conditioning(
        text=jnp.stack([null_text, null_text, cond.text]),
        image=jnp.stack([no_image, cond.image, cond.image]),
    )
    s_t, s_i = (scale[:, None, None, None] for scale in (text_scale, image_scale))

    def guided(z: Float[Array, "b h w c"], sigma: Float[Array, ""]) -> Float[Array, "b h w c"]:
        none, image, both = jax.vmap(denoise, in_axes=(None, None, 0))(z, sigma, branches)
        return rescale(z, sigma, none + s_i * (image - none) + s_t * (both - image), both)

    return guided


def limited(guided: Denoise, conditional: Denoise, interval: Float[Array, "2"] | None) -> Denoise:
    """Guidance at noise levels in (low, high] alone (Kynkäänniemi et al. 2024, equation 5).

    Elsewhere only the conditional branch is computed, a third of the work of an edit. None: guided
    at all levels.
    """
    if interval is None:
        return guided
    low, high = interval

    def denoise(z: Float[Array, "b h w c"], sigma: Float[Array, ""]) -> Float[Array, "b h w c"]:
        return jax.lax.cond((low < sigma) & (sigma <= high), guided, conditional, z, sigma)

    return denoise


def guide_text(
    denoise: ConditionalDenoise,
    cond: Conditioning,
    null_text: Float[Array, "b n c"],
    text_scale: Float[Array, "b"],
    rescale: Rescale = as_guided,
) -> Denoise:
    """Classifier-free guidance by text alone (Ho and Salimans 2022); the image stays as it is."""
    branches = Conditioning(
        text=jnp.stack([null_text, cond.text]), image=jnp.stack([cond.image, cond.image])
    )
    s_t = text_scale[:, None, None, None]

    def guided(z: Float[Array, "b h w c"], sigma: Float[Array, ""]) -> Float[Array, "b h w c"]:
        none, text = jax.vmap(denoise, in_axes=(None, None, 0))(z, sigma, branches)
        return rescale(z, sigma, none + s_t * (text - none), text)

    return guided
