# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: how much noise a latent carries at timestep t.

Three names for one quantity: the timestep `t` in 0..T-1 which the network is told, `alpha_bar`, the
share of variance that is signal, and `sigma = sqrt((1 - alpha_bar) / alpha_bar)`, the noise level
of `z = z0 + sigma * eps` in which the samplers work.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of T timesteps, what the network predicts, and how levels are interpolated.

    alpha_bar: decreasing in (0, 1), float64.
    prediction: what the network gives, "epsilon", or "v_prediction" for
      v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z0.
    interpolation: between two timesteps sigma is linear ("linear", diffusers) or log sigma is
      ("log", k-diffusion).
    """

    alpha_bar: Float[np.ndarray, "T"]
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    interpolation: Literal["log", "linear"] = "log"

    @property
    def zero_terminal(self) -> bool:
        """Whether nothing of the signal is left at the last timestep."""
        return bool(self.alpha_bar[-1] <= NOTHING)

    @property
    def sigmas(self) -> Float[np.ndarray, "T"]:
        """Noise level at every timestep, increasing, float64."""
        return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

    def sigma(self, t: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        """Noise level at t, fractional or not, clipped to 0..T-1; computed on the host, float64."""
        timesteps = np.arange(len(self.alpha_bar))
        if self.interpolation == "log":
            return np.exp(np.interp(t, timesteps, np.log(self.sigmas)))
        return np.interp(t, timesteps, self.sigmas)

    def t(self, sigma: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Timestep at a noise level, clipped to 0..T-1; float32, inside jit, inverse of `sigma`.

        A level of the table gives its integer exactly: the distance to the nearest level below is
        measured by a difference, which is then zero.
        """
        low = self.sigmas
        rise = np.diff(np.log(low) if self.interpolation == "log" else low, append=np.inf)
        low, rise = jnp.asarray(low, jnp.float32), jnp.asarray(rise, jnp.float32)
        sigma = jnp.clip(sigma, low[0], low[-1])
        i = jnp.searchsorted(low, sigma, side="right") - 1
        above = sigma - low[i]
        return i + (jnp.log1p(above / low[i]) if self.interpolation == "log" else above) / rise[i]


def scaled_linear(start: float, end: float, steps: int) -> Float[np.ndarray, "T"]:
    """Betas whose square roots are equally spaced (latent diffusion)."""
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def squared_cosine(steps: int, largest: float = 0.999) -> Float[np.ndarray, "T"]:
    """Betas for which alpha_bar is a squared cosine (Nichol and Dhariwal 2021, equation 17)."""
    t = np.arange(steps + 1) / steps
    alpha_bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], largest)


def from_diffusers(config: dict[str, Any]) -> Schedule:
    """The schedule that a diffusers folder's `scheduler_config.json` states, of whatever class.

    Raises ValueError, naming the key, where betas are missing or of a kind that is not built.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"scheduler_config.json: prediction_type is {prediction!r}, "
            "expected 'epsilon' or 'v_prediction'"
        )
    alpha_bar = np.cumprod(1 - betas(config))
    if config.get("rescale_betas_zero_snr"):
        if prediction != "v_prediction":
            raise ValueError(
                f"scheduler_config.json: prediction_type is {prediction!r}, expected "
                "'v_prediction' with rescale_betas_zero_snr: epsilon says nothing of pure noise"
            )
        alpha_bar = zero_terminal(alpha_bar)
    return Schedule(alpha_bar, prediction, interpolation="linear")


NOTHING = 2.0**-40
"""alpha_bar at the end of a schedule with zero terminal SNR: a millionth of the signal's amplitude,
which is nothing beside the noise, and sigma, 2^20, is a number still."""


def zero_terminal(alpha_bar: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """A schedule, scaled until its end has no signal (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.append(rescaled[:-1], NOTHING)


def betas(config: dict[str, Any]) -> Float[np.ndarray, "T"]:
    """The variances that a `scheduler_config.json` states, float64.

    diffusers' defaults differ by class and suit no released model, so the file must state them.
    """
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], np.float64)
    for key in ("beta_schedule", "beta_start", "beta_end"):
        if key not in config:
            raise ValueError(f"scheduler_config.json: {key} is missing")
    start, end = float(config["beta_start"]), float(config["beta_end"])
    steps = config.get("num_train_timesteps", 1000)
    match config["beta_schedule"]:
        case "scaled_linear":
            return scaled_linear(start, end, steps)
        case "linear":
            return np.linspace(start, end, steps)
        case "squaredcos_cap_v2":
            return squared_cosine(steps)
        case other:
            raise ValueError(
                f"scheduler_config.json: beta_schedule is {other!r}, "
                "expected 'scaled_linear', 'linear' or 'squaredcos_cap_v2'"
            )


STABLE_DIFFUSION = Schedule(np.cumprod(1 - scaled_linear(0.00085, 0.012, 1000)))
"""Stable Diffusion 1.x, with k-diffusion's interpolation: LDM files and our own runs."""
