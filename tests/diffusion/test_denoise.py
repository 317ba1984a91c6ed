# SPDX-License-Identifier: Apache-2.0
"""Denoisers scale and condition the network rightly, and guidance is the paper's equation 3."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ip2p_jax.diffusion import grids
from ip2p_jax.diffusion.denoise import (
    denoiser,
    guide_edit,
    guide_text,
    limited,
    one_batch,
    rescaled,
)
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.types import Conditioning

B, H, W, N, C = 3, 4, 2, 5, 6
rng = np.random.default_rng(0)
Z, IMAGE = (jnp.asarray(rng.normal(size=(B, H, W, 4)), jnp.float32) for _ in range(2))
TEXT, NULL = (jnp.asarray(rng.normal(size=(B, N, C)), jnp.float32) for _ in range(2))
COND = Conditioning(text=TEXT, image=IMAGE)
SIGMA = jnp.float32(STABLE_DIFFUSION.sigmas[600])
MIX = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
SCHEDULES = {
    prediction: dataclasses.replace(STABLE_DIFFUSION, prediction=prediction)
    for prediction in ("epsilon", "v_prediction")
}


def network(z, t, text):
    """Depends on everything it is given, and not linearly."""
    told = jnp.mean(text, axis=(1, 2))[:, None, None, None] + t[:, None, None, None] / 1000
    return jnp.tanh(z @ MIX[: z.shape[-1]] + 3 * told)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_exact_prediction_gives_the_clean_latent(prediction):
    """Also: only the noisy channels are scaled, and the network is told the integer timestep."""
    schedule = SCHEDULES[prediction]
    z0, eps = Z, jnp.asarray(rng.normal(size=Z.shape), jnp.float32)
    alpha_bar = schedule.alpha_bar[600]

    def oracle(x, t, text):
        x_t = np.sqrt(alpha_bar) * z0 + np.sqrt(1 - alpha_bar) * eps
        close(x[..., :4], x_t)
        np.testing.assert_array_equal(x[..., 4:], IMAGE)
        np.testing.assert_array_equal(t, np.full(B, 600, np.float32))
        np.testing.assert_array_equal(text, TEXT)
        v = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * z0
        return v if prediction == "v_prediction" else eps

    close(denoiser(oracle, schedule)(z0 + SIGMA * eps, SIGMA, COND), z0)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_integer_timesteps_of_a_grid_reach_the_network_exactly(sampler):
    seen = []

    def recording(z, t, text):
        seen.append(float(t[0]))
        return z[..., :4]

    denoise = denoiser(recording, STABLE_DIFFUSION)
    for sigma in grids.grid(sampler, 10, STABLE_DIFFUSION).sigmas[:-1]:
        denoise(Z, jnp.asarray(sigma), COND)
    t = {
        "ddim": np.arange(901, 0, -100),
        "dpmpp_2m": np.round(np.linspace(0, 999, 11))[:0:-1],
    }
    assert seen == list(t[sampler])


def test_half_precision_networks_are_sampled_in_float32():
    def half(z, t, text):
        return network(z, t, text).astype(jnp.bfloat16)

    assert denoiser(half, STABLE_DIFFUSION)(Z, SIGMA, COND).dtype == jnp.float32


def raw(text, image):
    """The network's output on one branch."""
    x = jnp.concatenate([Z / jnp.sqrt(SIGMA**2 + 1), image], axis=-1)
    return network(x, jnp.full(B, 600.0), text)


@pytest.mark.parametrize("prediction", SCHEDULES)
@pytest.mark.parametrize(
    "s_t, s_i", [([7.5, 7.5, 7.5], [1.5, 1.5, 1.5]), ([5.0, -1.0, 0.0], [0.7, 0.0, -2.0])]
)
def test_edit_guidance_is_equation_3_on_the_networks_output(prediction, s_t, s_i):
    s_t, s_i = jnp.asarray(s_t), jnp.asarray(s_i)
    none = raw(NULL, jnp.zeros_like(IMAGE))
    image, both = raw(NULL, IMAGE), raw(TEXT, IMAGE)
    expected = none + s_i[:, None, None, None] * (image - none)
    expected = expected + s_t[:, None, None, None] * (both - image)
    denoise = denoiser(network, SCHEDULES[prediction])
    guided = guide_edit(denoise, COND, NULL, s_t, s_i)(Z, SIGMA)
    plain = denoiser(lambda z, t, text: expected, SCHEDULES[prediction])(Z, SIGMA, COND)
    close(guided, plain)
    changed = guide_edit(denoise, COND, NULL, s_t, s_i + 0.1)(Z, SIGMA)
    assert np.max(np.abs(changed - plain)) > 1e-2


def test_guidance_at_one_is_conditional_and_at_zero_unconditional():
    denoise = denoiser(network, STABLE_DIFFUSION)
    one, zero = jnp.ones(B), jnp.zeros(B)
    unconditional = Conditioning(text=NULL, image=jnp.zeros_like(IMAGE))
    image_only = Conditioning(text=NULL, image=IMAGE)
    close(guide_edit(denoise, COND, NULL, one, one)(Z, SIGMA), denoise(Z, SIGMA, COND))
    close(guide_edit(denoise, COND, NULL, zero, zero)(Z, SIGMA), denoise(Z, SIGMA, unconditional))
    close(guide_edit(denoise, COND, NULL, zero, one)(Z, SIGMA), denoise(Z, SIGMA, image_only))


def test_text_guidance():
    """Text-to-image: an image latent of no channels."""
    cond = Conditioning(text=TEXT, image=jnp.zeros((B, H, W, 0)))
    denoise = denoiser(network, STABLE_DIFFUSION)
    scale = jnp.asarray([7.5, 1.0, 0.0])
    none, text = denoise(Z, SIGMA, cond._replace(text=NULL)), denoise(Z, SIGMA, cond)
    guided = guide_text(denoise, cond, NULL, scale)(Z, SIGMA)
    close(guided, none + scale[:, None, None, None] * (text - none))
    close(guided[1], text[1])
    close(guided[2], none[2])


@pytest.mark.parity
@pytest.mark.parametrize("prediction", SCHEDULES)
def test_rescaled_guidance_is_diffusers(prediction):
    """On the network's outputs, by that of image and text; a share of 0 changes no bit."""
    schedule, share = SCHEDULES[prediction], jnp.asarray([0.7, 0.0, 1.0])
    s_t, s_i = jnp.asarray([7.5, 7.5, 3.0]), jnp.asarray([1.5, 1.5, 1.0])
    none, image, both = raw(NULL, jnp.zeros_like(IMAGE)), raw(NULL, IMAGE), raw(TEXT, IMAGE)
    guided = none + s_i[:, None, None, None] * (image - none)
    guided = guided + s_t[:, None, None, None] * (both - image)

    def theirs(conditional) -> jax.Array:
        def nchw(x):
            return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)

        rows = [
            rescale_noise_cfg(nchw(guided[i : i + 1]), nchw(conditional[i : i + 1]), float(phi))
            for i, phi in enumerate(share)
        ]
        output = jnp.asarray(torch.cat(rows).permute(0, 2, 3, 1).numpy())
        return denoiser(lambda z, t, text: output, schedule)(Z, SIGMA, COND)

    denoise = denoiser(network, schedule)
    ours = guide_edit(denoise, COND, NULL, s_t, s_i, rescaled(schedule, share))(Z, SIGMA)
    plain = guide_edit(denoise, COND, NULL, s_t, s_i)(Z, SIGMA)
    # diffusers' spread is that of n - 1 values, which leaves their ratio as it is
    close(ours, theirs(both))
    np.testing.assert_array_equal(ours[1], plain[1])
    for wrong in (theirs(image), plain):  # controls
        assert np.abs(ours - wrong)[np.array([0, 2])].max() > 1e-2

    cond = Conditioning(text=TEXT, image=jnp.zeros((B, H, W, 0)))
    text, null = (denoise(Z, SIGMA, cond._replace(text=x)) for x in (TEXT, NULL))
    scaled = rescaled(schedule, share)
    want = scaled(Z, SIGMA, null + s_t[:, None, None, None] * (text - null), text)
    close(guide_text(denoise, cond, NULL, s_t, scaled)(Z, SIGMA), want)


def test_guidance_is_limited_to_an_interval():
    """Above its lower level and up to its upper one; elsewhere only the conditional branch runs."""
    rows = []

    def counting(z, t, text):
        jax.debug.callback(lambda: rows.append(len(z)))
        return network(z, t, text)

    denoise = denoiser(one_batch(counting), STABLE_DIFFUSION)
    scales = jnp.asarray([7.5, 5.0, 10.0]), jnp.asarray([1.5, 1.0, 0.5])
    for guided, branches in (
        (guide_edit(denoise, COND, NULL, *scales), 3),
        (guide_text(denoise, COND, NULL, scales[0]), 2),
    ):
        partly = limited(guided, lambda z, s: denoise(z, s, COND), jnp.asarray([0.28, 5.42]))
        for sigma, inside in ((0.1, 0), (0.28, 0), (0.29, 1), (5.42, 1), (5.43, 0), (14.6, 0)):
            rows.clear()
            got = jax.block_until_ready(jax.jit(partly)(Z, jnp.float32(sigma)))
            jax.effects_barrier()
            assert rows == [branches * B if inside else B]
            everywhere, nowhere = (
                guided(Z, jnp.float32(sigma)),
                denoise(Z, jnp.float32(sigma), COND),
            )
            close(got, everywhere if inside else nowhere)
            assert np.abs(everywhere - nowhere).max() > 0.1  # control
    assert limited(guided, denoise, None) is guided


def test_branches_share_one_trace_of_the_network():
    traces = []

    def counting(z, t, text):
        traces.append(z.shape)
        return network(z, t, text)

    guided = guide_edit(denoiser(counting, STABLE_DIFFUSION), COND, NULL, jnp.ones(B), jnp.ones(B))
    jax.jit(guided)(Z, SIGMA)
    assert traces == [(B, H, W, 8)]


def test_an_example_does_not_depend_on_its_neighbours():
    denoise = denoiser(network, STABLE_DIFFUSION)
    s_t, s_i = jnp.asarray([7.5, 5.0, 10.0]), jnp.asarray([1.5, 1.0, 0.5])
    together = guide_edit(denoise, COND, NULL, s_t, s_i)(Z, SIGMA)
    alone = functools.partial(jax.tree.map, lambda x: x[1:2])
    single = guide_edit(denoise, alone(COND), NULL[1:2], s_t[1:2], s_i[1:2])(Z[1:2], SIGMA)
    close(single, together[1:2])
