# SPDX-License-Identifier: Apache-2.0
"""Samplers reproduce Gaussian data, converge at their order, and treat keys and traces rightly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip2p_jax.diffusion.grids import CLASSES, Grid, grid
from ip2p_jax.diffusion.samplers import (
    SAMPLERS,
    ancestral_step,
    extrapolation,
)
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION

STD = 0.5


def exact(z, sigma):
    """The denoiser of Gaussian data with standard deviation 0.5."""
    return z * STD**2 / (STD**2 + sigma**2)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def normal(shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_after_is_applied_to_every_latent_at_its_level(sampler):
    """`after` puts the level in the latent's place: that is denoised next, or the result."""
    levels, seen = grid(sampler, 4, STABLE_DIFFUSION), []

    def denoise(z, sigma):
        seen.append((z, sigma))
        return z / 2

    def after(z, sigma):
        return jnp.full_like(z, sigma)

    noise = normal((1, 2, 2, 4))
    with jax.disable_jit():
        z = SAMPLERS[sampler](denoise, noise, levels, keys(1), after)
    assert np.allclose(seen[0][0], levels.start * noise)
    assert len(seen) >= 4
    assert all((z == sigma).all() for z, sigma in seen[1:])
    assert np.allclose(z, levels.end * levels.sigmas[-1])


def test_names_are_those_of_the_grids():
    assert list(SAMPLERS) == list(CLASSES)


def run(sampler, denoise, noise, levels, keys):
    return jax.jit(SAMPLERS[sampler], static_argnums=0)(denoise, noise, levels, keys)


def ancestral_std(sigmas):
    """Standard deviation after ancestral sampling of the Gaussian data, worked out in float64."""
    variance = sigmas[0] ** 2
    for s, s_next in itertools.pairwise(sigmas):
        up = min(s_next, np.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
        down = np.sqrt(max(s_next**2 - up**2, 0))
        shrink = 1 + (1 - STD**2 / (STD**2 + s**2)) / s * (down - s)
        variance = shrink**2 * variance + up**2
    return np.sqrt(variance)


def test_ancestral_sampling_keeps_the_spread_of_the_data():
    """200 steps, equally spaced in log sigma: 0.4915, and more steps come nearer to 0.5."""
    schedule = STABLE_DIFFUSION.sigmas
    sigmas = np.append(np.geomspace(schedule[-1], schedule[0], 200), 0).astype(np.float32)
    levels = Grid(sigmas, sigmas[0], np.float32(1))
    z = run("euler_ancestral", exact, normal((1, 128, 128, 4)), levels, keys(1))
    assert abs(ancestral_std(sigmas.astype(np.float64)) - 0.4915) < 1e-4
    assert abs(np.std(z) - 0.4915) < 5e-3 and abs(np.mean(z)) < 8e-3


@pytest.mark.parametrize("steps, std", [(100, 0.4705), (200, 0.4828)])
def test_ancestral_sampling_on_its_grid(steps, std):
    levels = grid("euler_ancestral", steps, STABLE_DIFFUSION)
    z = run("euler_ancestral", exact, normal((1, 128, 128, 4)), levels, keys(1))
    assert abs(ancestral_std(levels.sigmas.astype(np.float64)) - std) < 1e-4
    assert abs(np.std(z) - std) < 5e-3


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpmpp_2m"])
def test_deterministic_samplers_keep_the_spread_of_the_data(sampler):
    levels = grid(sampler, 200, STABLE_DIFFUSION)
    noise = normal((1, 64, 64, 4))
    z = run(sampler, exact, noise, levels, keys(1))
    assert abs(np.std(z) / np.std(noise) - STD) < 0.01


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order):
    """On levels equally spaced in log sigma, against the ODE's solution."""
    noise = normal((1, 2, 2, 4))
    counts, errors = [20, 40, 80], []
    for n in counts:
        sigmas = np.geomspace(10, 0.1, n + 1).astype(np.float32)
        z = run(sampler, exact, noise, Grid(sigmas, sigmas[0], np.float32(1)), keys(1))
        solution = 10 * noise * np.sqrt((STD**2 + 0.1**2) / (STD**2 + 10**2))
        errors.append(np.max(np.abs(z - solution)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.2, (slope, errors)


@pytest.mark.parametrize("sigma, sigma_next", [(14.6, 14.2), (3.0, 0.5), (0.1, 0.029), (0.03, 0)])
def test_ancestral_step(sigma, sigma_next):
    down, up = ancestral_step(jnp.float32(sigma), jnp.float32(sigma_next))
    expected_up = min(sigma_next, np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    np.testing.assert_allclose(up, expected_up, rtol=1e-5)
    np.testing.assert_allclose(down, np.sqrt(sigma_next**2 - expected_up**2), rtol=1e-4)
    np.testing.assert_allclose(jnp.hypot(down, up), sigma_next, rtol=1e-6)


def test_extrapolation_orders():
    """The first step, the step to 0, and the last of fewer than 15 are of first order."""
    to_zero = extrapolation(jnp.asarray([8.0, 4.0, 1.0, 0.0]))
    np.testing.assert_allclose(to_zero, [0, 1, 0], rtol=1e-6)
    short = extrapolation(jnp.geomspace(8.0, 1.0, 15))
    long = extrapolation(jnp.geomspace(8.0, 1.0, 16))
    np.testing.assert_allclose(short, [0] + [0.5] * 12 + [0], rtol=1e-4)
    np.testing.assert_allclose(long, [0] + [0.5] * 14, rtol=1e-4)


@pytest.mark.parametrize("sampler", CLASSES)
def test_start_and_end_scale(sampler):
    """With a denoiser that knows nothing (z0 = 0), z keeps its direction down to the last level."""
    noise = normal((2, 2, 2, 4))
    sigmas = np.asarray([4.0, 2.0, 1.0], np.float32)
    levels = Grid(sigmas, np.float32(5), np.float32(3))
    if sampler == "euler_ancestral":
        levels = levels._replace(sigmas=np.asarray([4.0, 0.0], np.float32))
    z = run(sampler, lambda z, sigma: jnp.zeros_like(z), noise, levels, keys(2))
    expected = 15 * noise * levels.sigmas[-1] / levels.sigmas[0]
    np.testing.assert_allclose(z, expected, rtol=1e-6, atol=1e-6)


def test_a_picture_depends_on_its_own_noise_and_key_only():
    """Not on its neighbours or its place; equal keys share their noise, as pairs of pictures do."""
    levels = grid("euler_ancestral", 5, STABLE_DIFFUSION)
    noise, k = normal((3, 4, 4, 4)), keys(3)
    batch = run("euler_ancestral", exact, noise, levels, k)
    pick = jnp.asarray([2, 0, 2])
    np.testing.assert_array_equal(
        run("euler_ancestral", exact, noise[pick], levels, k[pick]), batch[pick]
    )
    same_start = run("euler_ancestral", exact, noise[pick], levels, k)
    assert np.max(np.abs(same_start[0] - same_start[2])) > 0.1


def test_every_step_draws_noise_of_its_own():
    def keep(z, sigma):
        return z  # so that z is moved by the noise alone

    sigmas = np.asarray([1e4, 1e2, 1.0, 0.0], np.float32)
    zero, one = jnp.zeros((1, 64, 64, 4)), np.float32(1)
    first, both = (
        np.ravel(run("euler_ancestral", keep, zero, Grid(levels, one, one), keys(1)))
        for levels in (sigmas[:2], sigmas)
    )
    assert abs(np.std(first) - 100) < 2
    assert abs(np.std(both - first) - 1) < 0.02
    assert abs(np.corrcoef(first, both - first)[0, 1]) < 0.05


@pytest.mark.parametrize("sampler", CLASSES)
def test_network_is_traced_once_whatever_the_steps(sampler):
    traces = []

    def counting(z, sigma):
        traces.append(1)
        return exact(z, sigma)

    sample = jax.jit(SAMPLERS[sampler], static_argnums=0)
    noise = normal((1, 2, 2, 4))
    for steps in (3, 12):
        traces.clear()
        levels = grid(sampler, steps, STABLE_DIFFUSION)
        sample(counting, noise, levels, keys(1))
        sample(counting, noise, levels._replace(start=np.float32(2)), keys(1, seed=3))
        assert len(traces) == 1


def test_deterministic_samplers_ignore_the_keys():
    levels = grid("euler", 5, STABLE_DIFFUSION)
    noise = normal((1, 2, 2, 4))
    a, b = (run("euler", exact, noise, levels, keys(1, seed)) for seed in (0, 1))
    np.testing.assert_array_equal(a, b)
