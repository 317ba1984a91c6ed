# SPDX-License-Identifier: Apache-2.0
"""The loss is the paper's, dropout drops 5/5/5 %, and every row has randomness of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.objective import (
    diffusion_loss,
    draw_timesteps,
    drop_conditioning,
    offset,
    q_sample,
    sample_posterior,
    snr_weights,
)
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.types import Conditioning

ROWS = 20_000
V = dataclasses.replace(STABLE_DIFFUSION, prediction="v_prediction")


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def example(n, seed=0):
    rng = np.random.default_rng(seed)
    z0, image = (jnp.asarray(rng.normal(size=(n, 2, 2, 4)), jnp.float32) for _ in range(2))
    text = jnp.asarray(rng.normal(size=(n, 3, 5)), jnp.float32)
    return z0, Conditioning(text=text, image=image)


NULL = jnp.full((3, 5), 9.0)


def dropped(cond) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have the null text, and which the null image."""
    text, image = np.asarray(cond.text), np.asarray(cond.image)
    return (text == 9.0).all(axis=(1, 2)), (image == 0.0).all(axis=(1, 2, 3))


def test_drop_rates():
    """Text only, both, image only: 5 % each within four standard deviations."""
    cond = Conditioning(text=jnp.ones((ROWS, 3, 5)), image=jnp.ones((ROWS, 1, 1, 4)))
    text, image = dropped(drop_conditioning(keys(ROWS), cond, NULL))
    bound = 4 * np.sqrt(0.05 * 0.95 / ROWS)
    for share in (text & ~image, text & image, ~text & image):
        assert abs(share.mean() - 0.05) < bound
    assert abs((~text & ~image).mean() - 0.85) < 2 * bound


def test_dropout_is_decided_by_one_uniform_number():
    k = keys(2000)
    cond = Conditioning(text=jnp.ones((2000, 3, 5)), image=jnp.ones((2000, 1, 1, 4)))
    u = np.asarray(jax.vmap(jax.random.uniform)(k))
    text, image = dropped(drop_conditioning(k, cond, NULL, 0.2))
    np.testing.assert_array_equal(text, u < 0.4)
    np.testing.assert_array_equal(image, (u >= 0.2) & (u < 0.6))


def test_dropout_replaces_and_keeps_exactly():
    z0, cond = example(2000)
    kept = drop_conditioning(keys(2000), cond, NULL, 0.0)
    np.testing.assert_array_equal(kept.text, cond.text)
    np.testing.assert_array_equal(kept.image, cond.image)
    all_but_none = drop_conditioning(keys(2000), cond, NULL, 1 / 3)
    text, image = dropped(all_but_none)
    assert (text | image).all()
    np.testing.assert_array_equal(all_but_none.text[~text], cond.text[~text])
    np.testing.assert_array_equal(all_but_none.image[~image], cond.image[~image])


@pytest.mark.parametrize("rate", [-0.1, 0.34])
def test_impossible_drop_rate(rate):
    with pytest.raises(ValueError, match="expected 0 to 1/3"):
        drop_conditioning(keys(2), example(2)[1], NULL, rate)


@pytest.mark.parametrize("schedule", [STABLE_DIFFUSION, V], ids=lambda s: s.prediction)
def test_loss_is_the_mean_square_of_what_is_missing(schedule):
    """Noise and target are worked out from what the network was given."""
    z0, cond = example(8)
    seen = {}

    def network(x, t, text):
        seen.update(x=x, t=t, text=text)
        return 0.3 * x[..., :4]

    loss, rows = diffusion_loss(network, schedule, keys(8), z0, cond, NULL, 0.0)
    t = np.asarray(seen["t"]).astype(int)
    alpha_bar = schedule.alpha_bar[t][:, None, None, None]
    x_t = np.asarray(seen["x"][..., :4], np.float64)
    eps = (x_t - np.sqrt(alpha_bar) * z0) / np.sqrt(1 - alpha_bar)
    v = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * z0
    target = v if schedule is V else eps
    np.testing.assert_allclose(rows.loss, np.mean((0.3 * x_t - target) ** 2, (1, 2, 3)), rtol=2e-4)
    np.testing.assert_allclose(loss, np.mean(rows.loss), rtol=1e-6)
    np.testing.assert_array_equal(rows.t, t)
    np.testing.assert_array_equal(seen["x"][..., 4:], cond.image)
    assert seen["t"].dtype == loss.dtype == jnp.float32


def constant(x, t, text):
    """A prediction whose error is large at every timestep."""
    return jnp.full_like(x[..., :4], 2.0)


@pytest.mark.parity
@pytest.mark.parametrize("schedule", [STABLE_DIFFUSION, V], ids=lambda s: s.prediction)
def test_min_snr(schedule):
    """diffusers' signal-to-noise ratio, its weights as the paper has them; on z0 they are
    min(snr, gamma)."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(scheduler, torch.arange(1000)).numpy().astype(np.float64)
    want = np.minimum(snr, 5.0) / (snr + 1 if schedule is V else snr)
    np.testing.assert_allclose(snr_weights(schedule, 5.0), want, rtol=1e-4)
    np.testing.assert_array_equal(snr_weights(schedule, 0.0), np.ones(1000))
    # an error d of the output is one of d^2 / snr, or d^2 / (snr + 1), in z0
    to_z0 = 1 / (snr + 1) if schedule is V else 1 / snr
    np.testing.assert_allclose(want / to_z0, np.minimum(snr, 5.0), rtol=1e-6)

    z0, cond = example(64)
    plain, rows = diffusion_loss(constant, schedule, keys(64), z0, cond, NULL)
    loss, same = diffusion_loss(constant, schedule, keys(64), z0, cond, NULL, min_snr_gamma=5.0)
    np.testing.assert_array_equal(same.loss, rows.loss)
    np.testing.assert_allclose(loss, np.mean(want[np.asarray(rows.t)] * rows.loss), rtol=1e-4)
    assert abs(loss / plain - 1) > 0.05  # control


def test_offset_noise():
    """Of mean 0; a channel's variance is 1 + s^2, that of its mean s^2 + 1 / positions; the network
    has to predict all of it."""
    strength, n = 0.5, 4000
    noise = np.asarray(offset(keys(n), (4, 4, 3), strength))
    means = noise.mean(axis=(1, 2))
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1.25) < 0.03
    assert abs(means.var() - (0.25 + 1 / 16)) < 0.02
    assert abs(np.corrcoef(means.T) - np.eye(3)).max() < 0.05  # each channel has its own
    within = noise - means[:, None, None]
    assert abs(within.var() - 15 / 16) < 0.01
    np.testing.assert_array_equal(offset(keys(5), (4, 4, 3), 0.0), unit_noise(keys(5), (4, 4, 3)))

    z0, cond = jnp.zeros((8, 4, 4, 4)), Conditioning(jnp.ones((8, 3, 5)), jnp.zeros((8, 4, 4, 0)))
    scale = jnp.asarray(np.sqrt(1 - STABLE_DIFFUSION.alpha_bar), jnp.float32)

    def knows(x, t, text):
        return x / scale[t.astype(int)][:, None, None, None]

    for s in (0.0, strength):
        loss, _ = diffusion_loss(knows, STABLE_DIFFUSION, keys(8), z0, cond, NULL, offset_noise=s)
        assert loss < 1e-9


def test_timesteps_and_noise_are_distributed_as_they_should():
    z0, cond = (
        jnp.zeros((ROWS, 1, 1, 4)),
        Conditioning(text=jnp.ones((ROWS, 1, 1)), image=jnp.zeros((ROWS, 1, 1, 0))),
    )
    loss, rows = diffusion_loss(
        lambda x, t, text: jnp.zeros_like(x), STABLE_DIFFUSION, keys(ROWS), z0, cond, NULL[:1, :1]
    )
    assert abs(loss - 1) < 0.02  # the mean of eps^2
    t = np.asarray(rows.t)
    assert t.min() == 0 and t.max() == 999
    counts = np.histogram(t, bins=10, range=(0, 1000))[0]
    assert np.all(np.abs(counts - ROWS / 10) < 4 * np.sqrt(ROWS * 0.09))
    assert abs(np.corrcoef(t, rows.loss)[0, 1]) < 0.03  # noise does not know the timestep


def test_timestep_shift():
    """Timesteps have the distribution P(t < x) = x / (shift - (shift - 1) x), the inverse of Esser
    et al.'s map (2024, equation 23): within four standard deviations, and not that of another
    shift. The loss is of these timesteps."""

    def below(shift: float, x: float) -> float:
        return x / (shift - (shift - 1) * x)

    for shift in (0.5, 1.0, 3.0):
        t = np.asarray(draw_timesteps(keys(ROWS), 1000, shift))
        assert t.dtype == np.int32 and t.min() >= 0 and t.max() <= 999
        for x in (0.1, 0.25, 0.5, 0.75, 0.9):
            share, found = below(shift, x), (t < 1000 * x).mean()
            assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / ROWS)
            wrong = below(shift * 1.3, x)
            assert abs(found - wrong) > 4 * np.sqrt(wrong * (1 - wrong) / ROWS)
    z0, cond = example(8)
    _, rows = diffusion_loss(
        lambda x, t, text: x[..., :4], V, keys(8), z0, cond, NULL, timestep_shift=3.0
    )
    t_keys = jax.vmap(lambda key: jax.random.split(key, 3)[1])(keys(8))
    np.testing.assert_array_equal(rows.t, draw_timesteps(t_keys, 1000, 3.0))


def test_noise_timestep_and_dropout_have_keys_of_their_own():
    """Among the rows whose text is dropped, timesteps are uniform still."""
    z0 = jnp.zeros((ROWS, 1, 1, 4))
    cond = Conditioning(text=jnp.ones((ROWS, 1, 1)), image=jnp.ones((ROWS, 1, 1, 4)))
    seen = {}

    def network(x, t, text):
        seen.update(text=text, noise=x[..., 0], t=t)
        return x[..., :4]

    diffusion_loss(network, STABLE_DIFFUSION, keys(ROWS), z0, cond, NULL[:1, :1], 1 / 3)
    gone = np.asarray(seen["text"])[:, 0, 0] == 9.0
    assert 0.6 < gone.mean() < 0.73
    assert abs(np.corrcoef(gone, seen["t"])[0, 1]) < 0.03
    assert abs(np.corrcoef(gone, np.asarray(seen["noise"]).ravel())[0, 1]) < 0.03


def test_a_row_does_not_depend_on_its_neighbours():
    z0, cond = example(8)

    def network(x, t, text):
        return (x[..., :4] + x[..., 4:]) * jnp.mean(text, axis=(1, 2))[:, None, None, None]

    def rows(pick):
        some = Conditioning(*(x[pick] for x in cond))
        return diffusion_loss(network, V, keys(8)[pick], z0[pick], some, NULL, 0.2)[1]

    pick = jnp.asarray([5, 1, 5, 5, 7, 0, 2, 2])
    some, every = rows(pick), rows(jnp.arange(8))
    np.testing.assert_allclose(some.loss, every.loss[pick], rtol=1e-6)
    np.testing.assert_array_equal(some.t, every.t[pick])


def test_half_precision_prediction_is_scored_in_float32():
    z0, cond = example(8)
    loss, rows = diffusion_loss(
        lambda x, t, text: x[..., :4].astype(jnp.bfloat16), V, keys(8), z0, cond, NULL
    )
    assert loss.dtype == rows.loss.dtype == jnp.float32


def test_q_sample_ends():
    z0, eps = jnp.ones((2, 1, 1, 4)), jnp.full((2, 1, 1, 4), 2.0)
    noisy, target = q_sample(STABLE_DIFFUSION, z0, eps, jnp.asarray([0, 999]))
    expected = [np.sqrt(a) + 2 * np.sqrt(1 - a) for a in (0.99915, 0.0046600985)]
    np.testing.assert_allclose(noisy[:, 0, 0, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(target, eps)


def test_posterior_sample():
    mean = jnp.full((2, 64, 64, 4), 3.0)
    log_var = jnp.full((2, 64, 64, 4), 2 * np.log(0.5))
    z = np.asarray(sample_posterior(keys(2), mean, log_var))
    assert abs(z.mean() - 3) < 0.02 and abs(z.std() - 0.5) < 0.02
    assert abs(np.corrcoef(z[0].ravel(), z[1].ravel())[0, 1]) < 0.05
