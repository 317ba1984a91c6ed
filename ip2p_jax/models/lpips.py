# SPDX-License-Identifier: Apache-2.0
"""LPIPS, the perceptual distance of Zhang et al. 2018 (version 0.1), on AlexNet or VGG16."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from ip2p_jax.models.layers import Conv, Linear
from ip2p_jax.types import Params

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""The backbones take (x - SHIFT) / SCALE of pixels x in [-1, 1]: ImageNet's mean and deviation."""


@dataclass(frozen=True)
class Stage:
    """Convolutions up to one feature map that is compared; each is followed by a ReLU."""

    channels: int
    convs: int = 1
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # window of the max pooling in front, of stride 2; 0: none


@dataclass(frozen=True)
class LPIPSConfig:
    """A backbone; its convolutions are those of torchvision's `features`."""

    name: str
    smallest: int  # pixels a side, for the last feature map to have one
    stages: tuple[Stage, ...]


ALEX = LPIPSConfig(
    "alex",
    31,
    (
        Stage(64, size=11, stride=4, padding=2),
        Stage(192, size=5, padding=2, pool=3),
        Stage(384, pool=3),
        Stage(256),
        Stage(256),
    ),
)
VGG = LPIPSConfig(
    "vgg",
    16,
    (Stage(64, 2), Stage(128, 2, pool=2), *(Stage(c, 3, pool=2) for c in (256, 512, 512))),
)


class Features(nnx.Module):
    """One stage of the backbone."""

    def __init__(self, c_in: int, cfg: Stage, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = (c_in, *(cfg.channels,) * cfg.convs)
        padding = (cfg.padding, cfg.padding)
        self.convs = nnx.List(
            Conv(i, o, cfg.size, stride=cfg.stride, padding=padding, dtype=dtype, rngs=rngs)
            for i, o in zip(widths, widths[1:], strict=False)
        )
        self.pool = cfg.pool

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        if self.pool:
            x = nnx.max_pool(x, (self.pool, self.pool), (2, 2))
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return x


class LPIPS(nnx.Module):
    """Distance of feature maps whose positions have length 1, weighted by channel (equation 1)."""

    def __init__(self, cfg: LPIPSConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        widths = (3, *(stage.channels for stage in cfg.stages))
        self.stages = nnx.List(
            Features(c, stage, dtype=dtype, rngs=rngs)
            for c, stage in zip(widths, cfg.stages, strict=False)
        )
        self.heads = nnx.List(
            Linear(c, 1, use_bias=False, dtype=dtype, rngs=rngs) for c in widths[1:]
        )
        self.smallest = cfg.smallest

    def __call__(
        self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        """Distances of pixels in [-1, 1]; 0 for the same ones.

        Raises:
          ValueError: pictures smaller than the backbone takes.
        """
        h, w = a.shape[1:3]
        if min(h, w) < self.smallest:
            least = f"{self.smallest} x {self.smallest}"
            raise ValueError(f"LPIPS of pictures of {w} x {h} pixels, expected at least {least}")
        shift, scale = (jnp.array(x)[None, None, None] for x in (SHIFT, SCALE))
        a, b = (a - shift) / scale, (b - shift) / scale  # never joined: rows stay on their devices
        distance = jnp.zeros(len(a))
        for stage, head in zip(self.stages, self.heads, strict=True):
            a, b = stage(a), stage(b)
            weighted = head((directions(a) - directions(b)) ** 2)
            distance += jnp.mean(jnp.mean(weighted, axis=(2, 3)), axis=1)
        return distance


def directions(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Features of length 1 at each position; where all are zero they stay."""
    return x / (jnp.linalg.norm(x, axis=3, keepdims=True) + 1e-10)


def lpips(
    graphdef: Any, params: Params, a: UInt8[Array, "b h w 3"], b: UInt8[Array, "b h w 3"]
) -> Float32[Array, " b"]:
    """Distances of pictures, about 0 .. 1, 0 for identical ones; to be called under jit.

    Raises:
      ValueError: pictures smaller than the backbone takes (AlexNet 31 pixels a side, VGG16 16).
    """
    with jax.default_matmul_precision("highest"):  # float32 is cut short on TPU and GPU else
        x, y = (pictures.astype(jnp.float32) / 127.5 - 1.0 for pictures in (a, b))
        return nnx.merge(graphdef, params)(x, y).astype(jnp.float32)
