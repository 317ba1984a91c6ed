# SPDX-License-Identifier: Apache-2.0
"""Grids: the noise levels a sampler visits, and how its noise and its result are scaled.

All samplers work in sigma space, `z = z0 + sigma * eps`. What tells DDIM from Euler, or one
library's Euler from another's, is only the grid.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ip2p_jax.diffusion.schedule import Schedule

CLASSES = {
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
"""The samplers, and the diffusers class that each of them follows."""

DDIM_CLASS = {"timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True}
"""What `DDIMScheduler` assumes for keys that its file leaves out."""

DDIM_DEFAULT = {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1}
"""DDIM as Stable Diffusion uses it, where no file of that class says otherwise."""

ONLY = {
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}
"""Keys with one supported value; any other is refused, for it would change the picture."""

ONLY_DPMPP_2M = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "variance_type": None,
    "lambda_min_clipped": -math.inf,
}

ONLY_DPMPP_2M_TO_SIGMA_MIN = {"lower_order_final": True, "euler_at_final": False}
"""Without effect where the last step goes to sigma 0: it is of first order then."""


class Grid(NamedTuple):
    """m - 1 steps of a sampler, float32.

    sigmas: strictly decreasing noise levels at which the network is called, then where the last
      step ends (0, or the lowest level of the table).
    start: the sampler begins at `start * unit noise`.
    end: its result is `end * z`.
    guided: guidance acts at noise levels in (low, high]; None: at all of them.
    """

    sigmas: Float[Any, "m"]
    start: Float[Any, ""]
    end: Float[Any, ""]
    guided: Float[Any, "2"] | None = None


def sampler_of(scheduler_config: dict[str, Any] | None) -> str | None:
    """The sampler that a folder's own scheduler class corresponds to, or None."""
    name = (scheduler_config or {}).get("_class_name")
    return next((sampler for sampler, cls in CLASSES.items() if cls == name), None)


def grid(
    sampler: str,
    steps: int,
    schedule: Schedule,
    scheduler_config: dict[str, Any] | None = None,
) -> Grid:
    """The noise levels that `sampler` visits in `steps` steps.

    scheduler_config: a diffusers folder's `scheduler_config.json`. It is followed in every key if
      it is of the sampler's own class; else the sampler's defaults hold.

    Raises ValueError for an unknown sampler, for a number of steps that the grid cannot have, and,
    naming the key, for what the file asks for and is not built.
    """
    if sampler not in CLASSES:
        raise ValueError(f"sampler: {sampler!r}, expected one of {', '.join(CLASSES)}")
    total = len(schedule.alpha_bar)
    if not 1 <= steps <= total:
        raise ValueError(f"steps: {steps}, expected 1 to {total}")
    config = rules(sampler, scheduler_config, schedule.zero_terminal)
    spacing = config.get("timestep_spacing", "linspace")
    if schedule.zero_terminal and (sampler, spacing) != ("ddim", "trailing"):
        raise ValueError(
            f"sampler: {sampler!r} with timestep_spacing {spacing!r}, expected 'ddim' with "
            "'trailing': this model has rescale_betas_zero_snr, so it has to begin at pure noise"
        )
    t = timesteps(sampler, steps, spacing, config.get("steps_offset", 0), total)
    sigmas = schedule.sigma(t)
    last = last_sigma(sampler, t, schedule, config)
    # These two work on x = z / sqrt(sigma^2 + 1), which starts as the unit noise itself.
    variance_preserving = sampler in ("ddim", "dpmpp_2m")
    start = sigmas[0]
    if variance_preserving or spacing == "leading":
        start = math.hypot(sigmas[0], 1)
    end = 1 / math.hypot(last, 1) if variance_preserving else 1.0
    return Grid(np.append(sigmas, last).astype(np.float32), np.float32(start), np.float32(end))


def rules(
    sampler: str, scheduler_config: dict[str, Any] | None, zero_terminal: bool = False
) -> dict[str, Any]:
    """The keys a grid follows: the file's if it is of the sampler's class, else the defaults."""
    if scheduler_config is None or sampler_of(scheduler_config) != sampler:
        default = {"timestep_spacing": "trailing"} if zero_terminal else {}
        return DDIM_DEFAULT | default if sampler == "ddim" else {}
    config = (DDIM_CLASS if sampler == "ddim" else {}) | scheduler_config
    supported = ONLY | (ONLY_DPMPP_2M if sampler == "dpmpp_2m" else {})
    if sampler == "dpmpp_2m" and config.get("final_sigmas_type") == "sigma_min":
        supported |= ONLY_DPMPP_2M_TO_SIGMA_MIN
    for key, only in supported.items():
        if config.get(key) not in (None, only):
            raise ValueError(
                f"scheduler_config.json: {key} is {config[key]!r}, only {only!r} is supported"
            )
    return config


def timesteps(
    sampler: str, steps: int, spacing: str, offset: int, total: int
) -> Float[np.ndarray, "n"]:
    """The timesteps at which the network is called, from noisy to clean.

    `dpmpp_2m` takes linspace and leading grids of one more point and leaves out their last.
    """
    points = steps + (sampler == "dpmpp_2m")
    match spacing:
        case "linspace" if sampler == "ddim":
            # diffusers steps from t to t - 1000 // n and evaluates next at another t.
            raise ValueError(
                "scheduler_config.json: timestep_spacing is 'linspace', "
                "expected 'leading' or 'trailing' for DDIM"
            )
        case "linspace" if sampler == "dpmpp_2m":
            t = np.linspace(0, total - 1, points)[::-1].round()
        case "linspace":
            t = np.linspace(total - 1, 0, points)
        case "leading":
            t = np.arange(points)[::-1] * float(total // points) + offset
        case "trailing" if sampler == "ddim" and total % steps:
            raise ValueError(
                f"steps: {steps}, expected a divisor of {total} for DDIM with 'trailing' spacing"
            )
        case "trailing":
            t = np.arange(total, 0, -total / steps).round() - 1  # rounding may add an element
        case other:
            raise ValueError(
                f"scheduler_config.json: timestep_spacing is {other!r}, "
                "expected 'linspace', 'leading' or 'trailing'"
            )
    t = t[:steps]
    if t[0] > total - 1 or np.any(np.diff(t) >= 0):
        raise ValueError(f"steps: {steps} are too many for {sampler} on {total} timesteps")
    return t


def last_sigma(
    sampler: str, t: Float[np.ndarray, "n"], schedule: Schedule, config: dict[str, Any]
) -> float:
    """Where the last step ends: at no noise, or at a level of the table."""
    if sampler == "ddim":
        after = int(t[-1]) - len(schedule.alpha_bar) // len(t)
        if after < 0 and config["set_alpha_to_one"]:
            return 0.0
        return float(schedule.sigmas[max(after, 0)])
    if sampler in ("heun", "euler_ancestral"):
        return 0.0
    match config.get("final_sigmas_type", "zero"):
        case "zero":
            return 0.0
        case "sigma_min":
            return float(schedule.sigmas[0])
        case other:
            raise ValueError(
                f"scheduler_config.json: final_sigmas_type is {other!r}, "
                "expected 'zero' or 'sigma_min'"
            )
