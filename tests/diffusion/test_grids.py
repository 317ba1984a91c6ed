# SPDX-License-Identifier: Apache-2.0
"""Grids follow the formulas of k-diffusion, DDIM and DPM-Solver++, and refuse what they do not."""

import dataclasses

import numpy as np
import pytest

from ip2p_jax.diffusion.grids import CLASSES, grid, sampler_of
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION, from_diffusers
from ip2p_jax.weights.load import ZERO_TERMINAL_SNR

BETA = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA_BAR = np.cumprod(1 - BETA)
SIGMA = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-7)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_k_diffusion(sampler, steps):
    t = 999 * (1 - np.arange(steps) / max(steps - 1, 1))
    low, high = np.floor(t).astype(int), np.ceil(t).astype(int)
    log_sigma = (1 - (t - low)) * np.log(SIGMA[low]) + (t - low) * np.log(SIGMA[high])
    sigmas, start, end, _ = grid(sampler, steps, STABLE_DIFFUSION)
    close(sigmas, [*np.exp(log_sigma), 0])
    close([start, end], [14.614641229, 1])


def test_diffusers_interpolates_linearly():
    linear = dataclasses.replace(STABLE_DIFFUSION, interpolation="linear")
    t = np.linspace(999, 0, 30)
    close(grid("euler", 30, linear).sigmas[:-1], np.interp(t, np.arange(1000), SIGMA))


@pytest.mark.parametrize("steps", [1, 7, 20, 999])
def test_ddim(steps):
    ratio = 1000 // steps
    t = (steps - 1 - np.arange(steps)) * ratio + 1
    sigmas, start, end, _ = grid("ddim", steps, STABLE_DIFFUSION)
    close(sigmas, [*SIGMA[t], SIGMA[0]])
    close([start, end], [np.hypot(SIGMA[t[0]], 1), 1 / np.hypot(SIGMA[0], 1)])
    if steps > 1:
        close(sigmas[1:-1], SIGMA[t[:-1] - ratio])


@pytest.mark.parametrize("steps", [1, 10, 25])
def test_dpmpp_2m(steps):
    t = np.round(np.linspace(0, 999, steps + 1))[:0:-1].astype(int)
    sigmas, start, end, _ = grid("dpmpp_2m", steps, STABLE_DIFFUSION)
    close(sigmas, [*SIGMA[t], 0])
    close([start, end], [np.hypot(SIGMA[999], 1), 1])


@pytest.mark.parametrize("sampler", CLASSES)
def test_every_count_gives_a_decreasing_grid(sampler):
    for steps in range(1, 1000, 7):
        sigmas = grid(sampler, steps, STABLE_DIFFUSION).sigmas
        assert sigmas.shape == (steps + 1,) and sigmas.dtype == np.float32
        assert np.all(np.diff(sigmas[:-1]) < 0) and sigmas[-1] <= sigmas[-2]


def test_trailing_never_has_a_step_too_many():
    """np.arange(1000, 0, -1000 / 61) has 62 elements."""
    config = {"_class_name": CLASSES["euler"], "timestep_spacing": "trailing"}
    assert len(grid("euler", 61, STABLE_DIFFUSION, config).sigmas) == 62


def test_folder_class():
    for sampler, name in CLASSES.items():
        assert sampler_of({"_class_name": name}) == sampler
    assert sampler_of({"_class_name": "PNDMScheduler"}) is None
    assert sampler_of({}) is None and sampler_of(None) is None


def test_folder_of_another_class_leaves_the_defaults():
    config = {
        "_class_name": "PNDMScheduler",
        "timestep_spacing": "trailing",
        "steps_offset": 7,
        "set_alpha_to_one": True,
        "clip_sample": True,
        "use_karras_sigmas": True,
    }
    for sampler in CLASSES:
        ours, default = (grid(sampler, 9, STABLE_DIFFUSION, c) for c in (config, None))
        np.testing.assert_array_equal(ours.sigmas, default.sigmas)
        assert ours[1:] == default[1:]


@pytest.mark.parametrize(
    "sampler, keys",
    [
        ("ddim", {"clip_sample": True}),
        ("ddim", {}),  # clip_sample is the default of its class
        ("heun", {"clip_sample": True}),
        ("ddim", {"clip_sample": False, "thresholding": True}),
        ("ddim", {"clip_sample": False, "timestep_spacing": "linspace"}),
        ("dpmpp_2m", {"thresholding": True}),
        ("euler", {"use_karras_sigmas": True}),
        ("heun", {"use_exponential_sigmas": True}),
        ("dpmpp_2m", {"use_beta_sigmas": True}),
        ("euler", {"interpolation_type": "log_linear"}),
        ("euler", {"timestep_type": "continuous"}),
        ("euler", {"timestep_spacing": "quadratic"}),
        ("euler", {"final_sigmas_type": "one"}),
        ("dpmpp_2m", {"solver_order": 3}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ],
)
def test_what_is_not_built_is_refused_by_name(sampler, keys):
    named = next(reversed(keys), "clip_sample")
    with pytest.raises(ValueError, match=f"scheduler_config.json: {named} is "):
        grid(sampler, 10, STABLE_DIFFUSION, {"_class_name": CLASSES[sampler], **keys})


def test_unset_keys_are_not_refused():
    config = {"_class_name": CLASSES["euler"], "use_karras_sigmas": None, "clip_sample": False}
    assert len(grid("euler", 10, STABLE_DIFFUSION, config).sigmas) == 11


def test_unknown_sampler():
    names = "euler_ancestral, euler, heun, ddim, dpmpp_2m"
    with pytest.raises(ValueError, match=f"sampler: 'plms', expected one of {names}"):
        grid("plms", 10, STABLE_DIFFUSION)


@pytest.mark.parametrize(
    "sampler, steps, keys",
    [
        ("euler", 0, {}),
        ("euler", -3, {}),
        ("euler", 1001, {}),
        ("ddim", 1000, {"clip_sample": False, "steps_offset": 1}),  # t would begin at 1000
        ("dpmpp_2m", 1000, {}),  # two of its timesteps would be equal
        ("ddim", 7, {"clip_sample": False, "timestep_spacing": "trailing"}),
    ],
)
def test_impossible_steps(sampler, steps, keys):
    with pytest.raises(ValueError, match=f"steps: {steps}"):
        grid(sampler, steps, STABLE_DIFFUSION, {"_class_name": CLASSES[sampler], **keys})


@pytest.mark.parametrize("sampler", CLASSES)
def test_pure_noise_is_for_ddim_alone(sampler):
    """A model with zero terminal SNR, with its own file, with none, with one of another class."""
    schedule = from_diffusers(ZERO_TERMINAL_SNR)
    other = {**ZERO_TERMINAL_SNR, "_class_name": "EulerDiscreteScheduler"}
    for file in (ZERO_TERMINAL_SNR, None, other):
        if sampler == "ddim":
            points = grid(sampler, 50, schedule, file)
            assert points.sigmas[0] == 2**20 and points.start == 2**20
            close(points.sigmas[1:-1], schedule.sigmas[np.arange(979, 0, -20)])
        else:
            with pytest.raises(ValueError, match=f"'{sampler}' with .*expected 'ddim' with 'trai"):
                grid(sampler, 50, schedule, file)
    leading = {**ZERO_TERMINAL_SNR, "timestep_spacing": "leading"}
    with pytest.raises(ValueError, match="'leading', expected 'ddim' with 'trailing'"):
        grid("ddim", 50, schedule, leading)
