# SPDX-License-Identifier: Apache-2.0
"""The schedule has Stable Diffusion's numbers, and timesteps and noise levels are inverses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION, from_diffusers

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_golden_numbers():
    alpha_bar, sigmas = STABLE_DIFFUSION.alpha_bar, STABLE_DIFFUSION.sigmas
    assert alpha_bar.dtype == np.float64 and alpha_bar.shape == (1000,)
    np.testing.assert_allclose(alpha_bar[[0, -1]], [0.99915, 0.00466010], rtol=1e-6)
    np.testing.assert_allclose(sigmas[[0, -1]], [0.0291672, 14.6146412], rtol=2e-6)


@pytest.mark.parametrize("interpolation", ["log", "linear"])
def test_table_entries_invert_exactly(interpolation):
    """An integer timestep of a grid reaches the network as that integer."""
    schedule = dataclasses.replace(STABLE_DIFFUSION, interpolation=interpolation)
    t = np.arange(1000.0)
    sigma = schedule.sigma(t).astype(np.float32)
    np.testing.assert_array_equal(sigma, schedule.sigmas.astype(np.float32))
    np.testing.assert_array_equal(jax.jit(schedule.t)(sigma), t)
    np.testing.assert_array_equal(jax.jit(jax.vmap(schedule.t))(sigma), t)


@pytest.mark.parametrize("interpolation", ["log", "linear"])
def test_fractional_timesteps_invert(interpolation):
    schedule = dataclasses.replace(STABLE_DIFFUSION, interpolation=interpolation)
    t = np.linspace(999, 0, 777)
    np.testing.assert_allclose(
        schedule.t(jnp.asarray(schedule.sigma(t), jnp.float32)), t, rtol=1e-7, atol=5e-5
    )


def test_interpolations_differ_by_what_they_should():
    """On k-diffusion's 100 levels by 8.5e-5 at most, relatively."""
    linear = dataclasses.replace(STABLE_DIFFUSION, interpolation="linear")
    t = np.linspace(999, 0, 100)
    difference = np.abs(linear.sigma(t) / STABLE_DIFFUSION.sigma(t) - 1)
    assert abs(difference.max() - 8.51e-5) < 1e-7
    half = np.array([500.5])
    low, high = STABLE_DIFFUSION.sigmas[500:502]
    np.testing.assert_allclose(STABLE_DIFFUSION.sigma(half), np.sqrt(low * high), rtol=1e-12)
    np.testing.assert_allclose(linear.sigma(half), (low + high) / 2, rtol=1e-12)


def test_levels_outside_the_table_are_clipped():
    assert STABLE_DIFFUSION.t(jnp.float32(0.0)) == 0.0
    assert STABLE_DIFFUSION.t(jnp.float32(100.0)) == 999.0


@pytest.mark.parity
def test_zero_terminal_snr():
    """diffusers has the same numbers, in float32. sigma and t are inverses up to the end."""
    keys = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule = from_diffusers(SD | keys)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    want = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0).numpy()
    assert want[-1] == 0 and 0 < schedule.alpha_bar[-1] < 1e-12
    np.testing.assert_allclose(schedule.alpha_bar[:-1], want[:-1], rtol=1e-4, atol=1e-8)
    assert schedule.zero_terminal and not STABLE_DIFFUSION.zero_terminal
    assert np.abs(schedule.alpha_bar - STABLE_DIFFUSION.alpha_bar).max() > 1e-3  # control
    t = np.arange(1000.0)
    np.testing.assert_array_equal(jax.jit(schedule.t)(schedule.sigma(t).astype(np.float32)), t)


def test_diffusers_file():
    schedule = from_diffusers({"_class_name": "PNDMScheduler", **SD})
    assert (schedule.prediction, schedule.interpolation) == ("epsilon", "linear")
    np.testing.assert_array_equal(schedule.alpha_bar, STABLE_DIFFUSION.alpha_bar)
    assert from_diffusers({**SD, "prediction_type": "v_prediction"}).prediction == "v_prediction"
    assert len(from_diffusers({**SD, "num_train_timesteps": 100}).alpha_bar) == 100
    given = from_diffusers({"trained_betas": [0.1, 0.2]})
    np.testing.assert_allclose(given.alpha_bar, [0.9, 0.72])


@pytest.mark.parametrize(
    "config, named",
    [
        ({**SD, "prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({**SD, "rescale_betas_zero_snr": True}, "prediction_type is 'epsilon', expected 'v_p"),
        ({**SD, "beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "beta_schedule is missing"),
        ({"beta_schedule": "linear", "beta_start": 0.1}, "beta_end is missing"),
    ],
)
def test_what_is_not_built_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match=f"scheduler_config.json: {named}"):
        from_diffusers(config)
