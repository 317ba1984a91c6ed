# SPDX-License-Identifier: Apache-2.0
"""The records that travel through the library, and the names of array shapes.

Dims: `b` batch, `h w c` height, width, channels (NHWC everywhere), `n` tokens, `k` heads, `d` head
width. `x` pixels in [-1, 1], `z` latents, `eps` noise, `t` timestep in 0..999, `sigma` k-diffusion
noise level.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Int32, UInt8

Params = dict[Any, Any]
"""Nested plain dicts of arrays, keyed by attribute name (lists by integer)."""

Denoise = Callable[[Float[Array, "b h w c"], Float[Array, ""]], Float[Array, "b h w c"]]
"""`denoise(z, sigma) -> z0`, z in sigma space: z = z0 + sigma * eps."""


class Batch(NamedTuple):
    """Training pairs as they leave the data pipeline; host arrays until they are put on devices."""

    input: UInt8[Any, "b h w 3"]
    output: UInt8[Any, "b h w 3"]
    tokens: Int32[Any, "b n"]


class CaptionedBatch(NamedTuple):
    """Pictures with their captions, likewise."""

    image: UInt8[Any, "b h w 3"]
    tokens: Int32[Any, "b n"]


class LatentBatch(NamedTuple):
    """Pairs that a VAE has encoded before, likewise: mean of the input's posterior, mean and
    log-variance of the output's; not scaled, float16 on the host."""

    input: Float[Any, "b h w z"]
    output: Float[Any, "b h w z"]
    log_var: Float[Any, "b h w z"]
    tokens: Int32[Any, "b n"]


class CaptionedLatentBatch(NamedTuple):
    """Pictures that a VAE has encoded before, with their captions, likewise."""

    mean: Float[Any, "b h w z"]
    log_var: Float[Any, "b h w z"]
    tokens: Int32[Any, "b n"]


class Conditioning(NamedTuple):
    """What the UNet is conditioned on: CLIP states and the image latent (mean, unscaled)."""

    text: Float[Array, "b n c"]
    image: Float[Array, "b h w z"]


class TrainState(NamedTuple):
    """Everything a training step changes. `ema` mirrors `params`; `step` counts optimizer steps,
    those that were skipped too."""

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: Any
