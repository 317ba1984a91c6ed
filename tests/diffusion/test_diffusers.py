# SPDX-License-Identifier: Apache-2.0
"""Every sampler ends at the latent at which diffusers' own scheduler class ends.

A small fixed network of (z, t), written in torch and in JAX, stands in for the UNet.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ip2p_jax.diffusion import grids
from ip2p_jax.diffusion.denoise import denoiser
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.diffusion.schedule import from_diffusers
from ip2p_jax.types import Conditioning
from ip2p_jax.weights import load

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
]

TOLERANCE = 1e-4
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}

rng = np.random.default_rng(0)
NOISE = rng.normal(size=(2, 8, 6, 4)).astype(np.float32)
MIX = (0.4 * rng.normal(size=(4, 4))).astype(np.float32)
TIME = rng.normal(size=(6, 4)).astype(np.float32)
FREQUENCY = np.float32(10) ** -np.arange(6, dtype=np.float32)
KEYS = jax.random.split(jax.random.key(0), 2)


def jax_network(z, t, text):
    del text
    phase = t[:, None] * FREQUENCY[None]
    return jnp.tanh(z @ MIX + (jnp.cos(phase) @ TIME)[:, None, None])


def torch_network(z, t):
    phase = torch.as_tensor(t, dtype=torch.float32) * torch.from_numpy(FREQUENCY)
    return torch.tanh(z @ torch.from_numpy(MIX) + torch.cos(phase) @ torch.from_numpy(TIME))


def theirs(scheduler, steps, monkeypatch):
    """Runs diffusers' loop, with our noise in the place of its own."""
    drawn = iter(range(steps))

    def recorded(*args, **kwargs):
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, next(drawn))
        return torch.from_numpy(np.array(unit_noise(keys, NOISE.shape[1:])))

    ancestral = "diffusers.schedulers.scheduling_euler_ancestral_discrete"
    monkeypatch.setattr(f"{ancestral}.randn_tensor", recorded)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = torch_network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x).prev_sample
    return x.numpy()


def ours(sampler, steps, config, change=lambda grid: grid):
    schedule = from_diffusers(config)
    cond = Conditioning(text=jnp.zeros((2, 1, 1)), image=jnp.zeros((2, 8, 6, 0)))

    @jax.jit
    def run(noise, grid, keys):
        denoise = denoiser(jax_network, schedule)
        return SAMPLERS[sampler](lambda z, sigma: denoise(z, sigma, cond), noise, grid, keys)

    grid = change(grids.grid(sampler, steps, schedule, config))
    return np.asarray(run(jnp.asarray(NOISE), grid, KEYS))


def error(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


CASES = [
    ("ddim", 10, SD),
    ("ddim", 10, {**SD, "steps_offset": 0}),
    ("ddim", 10, {**SD, "set_alpha_to_one": True}),
    ("ddim", 7, {"clip_sample": False}),
    ("ddim", 600, SD),  # the last step begins at t = 1 and ends at t = 0
    ("ddim", 20, {**SD, "timestep_spacing": "trailing"}),
    ("ddim", 10, {**SD, "prediction_type": "v_prediction"}),
    ("euler", 10, {}),
    ("euler", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("euler", 7, {"timestep_spacing": "trailing"}),
    ("euler", 10, {"final_sigmas_type": "sigma_min", "interpolation_type": "linear"}),
    ("euler", 10, {"prediction_type": "v_prediction", "set_alpha_to_one": False}),
    ("euler", 10, {"beta_schedule": "linear"}),
    ("euler", 10, {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}),
    ("ddim", 10, {**SD, "beta_schedule": "squaredcos_cap_v2"}),
    ("dpmpp_2m", 10, {"beta_schedule": "squaredcos_cap_v2"}),
    ("euler", 10, {"trained_betas": np.linspace(1e-4, 2e-2, 1000).tolist()}),
    ("heun", 2, {}),
    ("heun", 11, {}),
    ("heun", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("heun", 10, {"prediction_type": "v_prediction"}),
    ("euler_ancestral", 10, {}),
    ("euler_ancestral", 33, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("euler_ancestral", 7, {"timestep_spacing": "trailing"}),
    ("euler_ancestral", 10, {"prediction_type": "v_prediction"}),
    ("dpmpp_2m", 1, {}),
    ("dpmpp_2m", 10, {}),
    ("dpmpp_2m", 30, {}),
    ("dpmpp_2m", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("dpmpp_2m", 7, {"timestep_spacing": "trailing"}),
    ("dpmpp_2m", 10, {"final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", 20, {"final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", 10, {"prediction_type": "v_prediction"}),
    ("dpmpp_2m", 10, {"num_train_timesteps": 500, "euler_at_final": True}),
]


def both(sampler, keys):
    """A file that carries `keys`, and diffusers' scheduler, given those of them that it has."""
    build = getattr(diffusers, grids.CLASSES[sampler])
    has = build().config
    scheduler = build(**{key: value for key, value in {**BETAS, **keys}.items() if key in has})
    return {"_class_name": grids.CLASSES[sampler], **BETAS, **keys}, scheduler


@pytest.mark.parametrize("sampler, steps, keys", CASES)
def test_final_latents(sampler, steps, keys, monkeypatch):
    config, scheduler = both(sampler, keys)
    assert error(ours(sampler, steps, config), theirs(scheduler, steps, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("steps", [5, 50])
def test_zero_terminal_snr(steps, monkeypatch):
    """What a run's or an export's scheduler_config.json says, as diffusers opens it."""
    config = load.ZERO_TERMINAL_SNR
    expected = theirs(diffusers.DDIMScheduler.from_config(config), steps, monkeypatch)
    assert error(ours("ddim", steps, config), expected) < TOLERANCE
    other = {**config, "rescale_betas_zero_snr": False}
    assert error(ours("ddim", steps, other), expected) > 10 * TOLERANCE  # control


@pytest.mark.parametrize("sampler", grids.CLASSES)
def test_file_of_another_class_gives_betas_and_prediction_only(sampler, monkeypatch):
    keys = {"timestep_spacing": "trailing", "clip_sample": True, "prediction_type": "v_prediction"}
    config = {"_class_name": "PNDMScheduler", **BETAS, **keys}
    _, scheduler = both(sampler, {**SD, "prediction_type": "v_prediction"})
    assert error(ours(sampler, 10, config), theirs(scheduler, 10, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("sampler", grids.CLASSES)
def test_control_step_offset_dropped(sampler, monkeypatch):
    config, scheduler = both(sampler, {**SD, "timestep_spacing": "leading"})
    expected = theirs(scheduler, 10, monkeypatch)
    assert error(ours(sampler, 10, config), expected) < TOLERANCE
    assert error(ours(sampler, 10, {**config, "steps_offset": 0}), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("sampler", grids.CLASSES)
def test_control_start_scaled_wrongly(sampler, monkeypatch):
    """sigma_0 in the place of sqrt(sigma_0^2 + 1), or the other way round."""
    config, scheduler = both(sampler, SD)

    def swap(grid):
        sigma = grid.sigmas[0]
        return grid._replace(start=sigma if grid.start > sigma else np.hypot(sigma, 1))

    expected = theirs(scheduler, 10, monkeypatch)
    assert error(ours(sampler, 10, config, swap), expected) > 5 * TOLERANCE


def test_control_last_step_of_wrong_order(monkeypatch):
    """14 and 15 steps to the lowest level end with a step of first and of second order."""
    for steps in (14, 15):
        config, scheduler = both("dpmpp_2m", {"final_sigmas_type": "sigma_min"})
        expected = theirs(scheduler, steps, monkeypatch)
        assert error(ours("dpmpp_2m", steps, config), expected) < TOLERANCE
    config, scheduler = both("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True})
    other = theirs(scheduler, 15, monkeypatch)
    assert error(other, expected) > TOLERANCE
