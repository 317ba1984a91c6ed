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
    ("ddim", 37, SD),
    ("ddim", 10, {**SD, "steps_offset": 0}),
    ("ddim", 10, {**SD, "set_alpha_to_one": True}),
    ("ddim", 7, {"clip_sample": False}),
    ("ddim", 600, SD),  # the last step begins at t = 1 and ends at t = 0
    ("ddim", 20, {**SD, "timestep_spacing": "trailing"}),
    ("ddim", 10, {**SD, "prediction_type": "v_prediction"}),
    ("euler", 1, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("euler", 10, {}),
    ("euler", 50, {}),
    ("euler", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("euler", 7, {"timestep_spacing": "trailing"}),
    ("euler", 10, {"final_sigmas_type": "sigma_min", "interpolation_type": "linear"}),
    ("euler", 10, {"prediction_type": "v_prediction", "set_alpha_to_one": False}),
    ("euler", 10, {"beta_schedule": "linear"}),
    ("euler", 10, {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}),
    ("euler", 10, {"trained_betas": np.linspace(1e-4, 2e-2, 1000).tolist()}),
    ("heun", 2, {}),
    ("heun", 11, {}),
    ("heun", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("heun", 7, {"timestep_spacing": "trailing"}),
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


@pytest.mark.parametrize("sampler, steps, keys", CASES)
def test_final_latents(sampler, steps, keys, monkeypatch):
    config = {"_class_name": grids.CLASSES[sampler], **BETAS, **keys}
    scheduler = getattr(diffusers, grids.CLASSES[sampler])(**BETAS, **known(sampler, keys))
    e = error(ours(sampler, steps, config), theirs(scheduler, steps, monkeypatch))
    print(f"{sampler} {steps} {keys if 'trained_betas' not in keys else 'trained'}: {e:.1e}")
    assert e < TOLERANCE


def known(sampler, keys):
    """The keys that the class has; files carry others, left from the class they were made from."""
    config = getattr(diffusers, grids.CLASSES[sampler])().config
    return {key: value for key, value in keys.items() if key in config}


@pytest.mark.parametrize("sampler", grids.CLASSES)
def test_defaults_are_diffusers_with_stable_diffusion_keys(sampler, monkeypatch):
    """A file of another class gives betas and prediction type only."""
    config = {"_class_name": "PNDMScheduler", **BETAS, "timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, grids.CLASSES[sampler])(**BETAS, **known(sampler, SD))
    assert error(ours(sampler, 10, config), theirs(scheduler, 10, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("sampler", grids.CLASSES)
def test_control_step_offset_dropped(sampler, monkeypatch):
    keys = {**SD, "timestep_spacing": "leading"}
    config = {"_class_name": grids.CLASSES[sampler], **BETAS, **keys}
    scheduler = getattr(diffusers, grids.CLASSES[sampler])(**BETAS, **known(sampler, keys))
    expected = theirs(scheduler, 10, monkeypatch)
    assert error(ours(sampler, 10, config), expected) < TOLERANCE
    assert error(ours(sampler, 10, {**config, "steps_offset": 0}), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("sampler", grids.CLASSES)
def test_control_start_scaled_wrongly(sampler, monkeypatch):
    """sigma_0 in the place of sqrt(sigma_0^2 + 1), or the other way round."""
    keys = known(sampler, SD)
    config = {"_class_name": grids.CLASSES[sampler], **BETAS, **keys}
    scheduler = getattr(diffusers, grids.CLASSES[sampler])(**BETAS, **keys)

    def swap(grid):
        sigma = grid.sigmas[0]
        other = sigma if grid.start > sigma else np.hypot(sigma, 1)
        return grid._replace(start=np.float32(other))

    assert error(ours(sampler, 10, config, swap), theirs(scheduler, 10, monkeypatch)) > 5e-4
