# SPDX-License-Identifier: Apache-2.0
"""The three networks of a model as graph definitions, and pixels as they go in and come out.

`nnx.merge(networks.unet, params["unet"])` inside a jitted function is the UNet.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from ip2p_jax.models.attention import Attend, attend
from ip2p_jax.models.clip import CLIPText
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE


class Networks(NamedTuple):
    """The graph definitions of the three networks, without parameters."""

    unet: Any
    vae: Any
    text: Any
    attend: Attend
    """How the UNet is to attend."""
    by_row: NamedSharding | None
    """How the UNet's rows lie on several devices; None: as they come."""


def networks(
    config: ModelConfig,
    dtype: DTypeLike,
    attend: Attend = attend,
    by_row: NamedSharding | None = None,
) -> Networks:
    """The networks of a model, computing in `dtype`."""
    unet, _ = abstract(UNet, config.unet, dtype=dtype)
    vae, _ = abstract(VAE, config.vae, dtype=dtype)
    text, _ = abstract(CLIPText, config.text, dtype=dtype)
    return Networks(unet, vae, text, attend, by_row)


def to_pixels(x: UInt8[Array, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
    """float32 pixels in [-1, 1] from 0..255."""
    return x.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: Float[Array, "*b h w 3"]) -> UInt8[Array, "*b h w 3"]:
    """0..255 from pixels in [-1, 1], clipped and rounded."""
    return jnp.round(jnp.clip(x / 2.0 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
