# SPDX-License-Identifier: Apache-2.0
"""What models and options of editing and generating have to be.

Each check of an option returns None if a value is that, else the words for it.
"""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np

from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.models.presets import ModelConfig

Check = Callable[[Any], str | None]


def text(x: Any) -> str | None:
    return None if isinstance(x, str) else "a text"


def number(x: Any) -> str | None:
    fits = isinstance(x, Real) and abs(float(x)) <= float(np.finfo(np.float32).max)
    return None if fits else "a finite number"


def share(x: Any) -> str | None:
    return None if isinstance(x, Real) and 0 <= float(x) <= 1 else "0 to 1"


def seed(x: Any) -> str | None:
    whole = isinstance(x, Integral) and 0 <= int(x) < 2**32
    return None if whole else "an integer from 0 to 2^32 - 1"


def steps(x: Any) -> str | None:
    return None if type(x) is int and 1 <= x <= 1000 else "1 to 1000"


def sampler(x: Any) -> str | None:
    return None if x in list(SAMPLERS) else f"one of {', '.join(SAMPLERS)}"


def interval(x: Any) -> str | None:
    levels = x is None or isinstance(x, (list, tuple)) and len(x) == 2 and not any(map(number, x))
    usable = x is None or levels and 0 <= x[0] < x[1]
    return None if usable else "two noise levels, 0 or more, the lower one first"


def check(name: str, value: Any, wanted: Check) -> None:
    """Raises ValueError that names the option if `value` is not what is wanted."""
    if words := wanted(value):
        raise ValueError(f"{name}: {value!r}, expected {words}")


def edits(config: ModelConfig) -> None:
    """Raises ValueError if a model of these dimensions does not edit pictures."""
    got, wanted = config.unet.in_channels, 2 * config.vae.latent_channels
    if got != wanted:
        raise ValueError(
            f"the UNet's conv_in.weight takes {got} channels, an editing model's {wanted}: this is "
            "no InstructPix2Pix model"
        )


def generates(config: ModelConfig) -> None:
    """Raises ValueError if a model of these dimensions does not make pictures of texts."""
    got, wanted = config.unet.in_channels, config.vae.latent_channels
    if got != wanted:
        raise ValueError(
            f"the UNet's conv_in.weight takes {got} channels, not the {wanted} of a latent: "
            "this model is not text-to-image"
        )


def per_picture(name: str, value: Any, n: int, wanted: Check) -> list:
    """`value` for each of n pictures: itself if it is one, else n of them; each one checked."""
    values = [value] * n if np.ndim(value) == 0 else list(value)
    if len(values) != n:
        raise ValueError(f"{name}: {len(values)} values for {n} pictures")
    for x in values:
        check(name, x, wanted)
    return values
