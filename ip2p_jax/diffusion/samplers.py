# SPDX-License-Identifier: Apache-2.0
"""Samplers: from unit noise to a latent, as pure functions of a denoiser, a grid and keys.

Every sampler is `sample(denoise, noise, grid, keys) -> z`. `noise` is unit normal; `keys` has one
key per picture, folded with the number of the step, so that a picture does not depend on what else
is in its batch, and equal keys mean equal noise. Deterministic samplers ignore the keys. The
network is traced once, whatever the number of steps.

`after(z, sigma)` is what becomes of a latent that has reached the level sigma; by default it stays
as it is. (Heun's predictions pass through it, too.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ip2p_jax.diffusion.grids import Grid
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.types import Denoise

Sampler = Callable[
    [Denoise, Float[Array, "b h w c"], Grid, Key[Array, "b"]], Float[Array, "b h w c"]
]

After = Callable[[Float[Array, "b h w c"], Float[Array, ""]], Float[Array, "b h w c"]]


def unchanged(z: Float[Array, "b h w c"], sigma: Float[Array, ""]) -> Float[Array, "b h w c"]:
    return z


def sample_euler_ancestral(
    denoise: Denoise,
    noise: Float[Array, "b h w c"],
    grid: Grid,
    keys: Key[Array, "b"],
    after: After = unchanged,
) -> Float[Array, "b h w c"]:
    """Ancestral sampling with Euler steps (k-diffusion): step down further, and add noise back."""

    def step(z, xs):
        sigma, sigma_next, i = xs
        down, up = ancestral_step(sigma, sigma_next)
        slope = (z - denoise(z, sigma)) / sigma
        eps = unit_noise(jax.vmap(jax.random.fold_in, (0, None))(keys, i), z.shape[1:])
        return after(z + slope * (down - sigma) + up * eps, sigma_next), None

    steps = (grid.sigmas[:-1], grid.sigmas[1:], jnp.arange(len(grid.sigmas) - 1))
    z, _ = jax.lax.scan(step, grid.start * noise, steps)
    return grid.end * z


def sample_euler(
    denoise: Denoise,
    noise: Float[Array, "b h w c"],
    grid: Grid,
    keys: Key[Array, "b"],
    after: After = unchanged,
) -> Float[Array, "b h w c"]:
    """Euler's method on dz/dsigma = (z - z0) / sigma (Karras et al. 2022, equation 3).

    On its own grid this is DDIM (Song et al. 2021, equation 12) written in sigma space. A ratio of
    levels keeps its digits where a schedule with zero terminal SNR begins, at 2^20.
    """

    def step(z, xs):
        sigma, sigma_next = xs
        z0 = denoise(z, sigma)
        return after(z0 + (z - z0) * (sigma_next / sigma), sigma_next), None

    z, _ = jax.lax.scan(step, grid.start * noise, (grid.sigmas[:-1], grid.sigmas[1:]))
    return grid.end * z


def sample_heun(
    denoise: Denoise,
    noise: Float[Array, "b h w c"],
    grid: Grid,
    keys: Key[Array, "b"],
    after: After = unchanged,
) -> Float[Array, "b h w c"]:
    """Heun's method (Karras et al. 2022, algorithm 1); the last step, to sigma 0, is Euler's.

    A step is two iterations, so that the network is compiled once: an even one predicts with the
    slope at the step's beginning, an odd one starts over with the mean of both slopes.
    """

    def half_step(carry, xs):
        z_begin, slope_begin, z = carry
        sigma, sigma_next, change, correct = xs
        slope = (z - denoise(z, sigma)) / sigma
        slope = jnp.where(correct, (slope_begin + slope) / 2, slope)
        z_begin = jnp.where(correct, z_begin, z)
        z = after(z_begin + slope * change, sigma_next)
        return (z_begin, slope, z), None

    evaluated = jnp.repeat(jnp.asarray(grid.sigmas[:-1]), 2)[1:]
    reached = jnp.repeat(jnp.asarray(grid.sigmas[1:]), 2)[:-1]
    change = jnp.repeat(jnp.diff(grid.sigmas), 2)[:-1]
    correct = jnp.arange(len(change)) % 2 == 1
    z = grid.start * noise
    (_, _, z), _ = jax.lax.scan(half_step, (z, z, z), (evaluated, reached, change, correct))
    return grid.end * z


def sample_dpmpp_2m(
    denoise: Denoise,
    noise: Float[Array, "b h w c"],
    grid: Grid,
    keys: Key[Array, "b"],
    after: After = unchanged,
) -> Float[Array, "b h w c"]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): extrapolates z0 from the last two steps."""

    def step(carry, xs):
        z, z0_old = carry
        sigma, sigma_next, weight = xs
        z0 = denoise(z, sigma)
        target = z0 + weight * (z0 - z0_old)
        return (after(target + (z - target) * (sigma_next / sigma), sigma_next), z0), None

    z = grid.start * noise
    steps = (grid.sigmas[:-1], grid.sigmas[1:], extrapolation(jnp.asarray(grid.sigmas)))
    (z, _), _ = jax.lax.scan(step, (z, jnp.zeros_like(z)), steps)
    return grid.end * z


SAMPLERS: dict[str, Sampler] = {
    "euler_ancestral": sample_euler_ancestral,
    "euler": sample_euler,
    "heun": sample_heun,
    "ddim": sample_euler,
    "dpmpp_2m": sample_dpmpp_2m,
}
"""By the names that `grids.grid` takes."""


def ancestral_step(
    sigma: Float[Array, ""], sigma_next: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The level to step down to and the noise to add there, so that down^2 + up^2 = sigma_next^2.

    up^2 = sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2 is never above sigma_next^2, and leaves
    down = sigma_next^2 / sigma, without the cancellation of the difference.
    """
    ratio = sigma_next / sigma
    return sigma_next * ratio, sigma_next * jnp.sqrt(1 - ratio**2)


def extrapolation(sigmas: Float[Array, "m"]) -> Float[Array, "m-1"]:
    """DPM-Solver++'s weight 1 / (2 r) of z0 - z0_old, r = h_old / h, h = log(sigma / sigma_next).

    The first step is of first order, and so is the last if it ends at sigma 0 (h is infinite) or
    if there are fewer than 15 (as diffusers).
    """
    n = len(sigmas) - 1
    h = jnp.log(sigmas[:-1] / sigmas[1:])
    weight = jnp.concatenate([jnp.zeros(1), h[1:] / (2 * h[:-1])])
    last = jnp.arange(n) == n - 1
    return jnp.where(last & ((sigmas[-1] == 0) | (n < 15)), 0.0, weight)
