# SPDX-License-Identifier: Apache-2.0
"""The latent UNet with cross-attention of Stable Diffusion (Rombach et al. 2022).

Attributes carry diffusers' tensor names, so a checkpoint is ported by one generic rule.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ip2p_jax.models.attention import Attend, SpatialTransformer, attend
from ip2p_jax.models.layers import (
    Conv,
    Downsample,
    GroupNorm,
    Linear,
    ResnetBlock,
    Upsample,
    timestep_embedding,
)
from ip2p_jax.models.presets import UNetConfig


class Remat(NamedTuple):
    """Which intermediate results the backward pass computes again, instead of their being kept: how
    a unit (a residual block with its transformer) is called, and how a level of units is."""

    unit: Callable[[Callable], Callable]
    level: Callable[[Callable], Callable]


def kept(function: Callable) -> Callable:
    """Calls a function as it is: all that its backward pass needs is kept."""
    return function


REMAT = {
    "none": Remat(kept, kept),
    "blocks": Remat(jax.checkpoint, kept),
    "full": Remat(jax.checkpoint, jax.checkpoint),
}
"""By name. blocks: of each unit of the down and up paths only the inputs are kept; it is computed
twice. full: of each level, the middle one too, only the inputs are kept, and those of its units
while its gradient is computed; units are computed three times. Gradients are the same, but for
rounding."""


class TimeEmbedding(nnx.Module):
    """Two-layer perceptron on the sinusoidal embedding."""

    def __init__(self, channels: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear_1 = Linear(channels, width, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b e"]:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class Block(nnx.Module):
    """One level of either half: residual blocks, each followed by a transformer, then a resampling.

    `c_ins` are the input channels of the residual blocks. In the upward half each residual block
    takes the newest skip connection beside its input.
    """

    def __init__(
        self,
        cfg: UNetConfig,
        level: int,
        c_ins: list[int],
        *,
        name: str,
        resample: Downsample | Upsample | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        width = cfg.channels[level]
        self.resnets = nnx.List(
            ResnetBlock(
                c_in,
                width,
                groups=cfg.norm_groups,
                eps=1e-5,
                time_dim=4 * cfg.channels[0],
                dtype=dtype,
                rngs=rngs,
            )
            for c_in in c_ins
        )
        transformers = [
            transformer(cfg, level, name=f"{name}.attentions.{i}", dtype=dtype, rngs=rngs)
            for i in range(len(c_ins) if cfg.attention[level] else 0)
        ]
        self.attentions = nnx.List(transformers) if transformers else None
        self.downsamplers = nnx.List([resample]) if isinstance(resample, Downsample) else None
        self.upsamplers = nnx.List([resample]) if isinstance(resample, Upsample) else None

    def unit(self, i: int, attend: Attend, remat: Remat) -> Callable:
        """The i-th residual block and its transformer, as a function of (x, time, text)."""

        def run(resnet, transformer, x, time, text):
            x = resnet(x, time)
            return x if transformer is None else transformer(x, text, attend)

        transformer = None if self.attentions is None else self.attentions[i]
        return functools.partial(remat.unit(run), self.resnets[i], transformer)

    def down(self, x, time, text, attend: Attend, remat: Remat) -> list:
        """Every intermediate result."""
        results = []
        for i in range(len(self.resnets)):
            x = self.unit(i, attend, remat)(x, time, text)
            results.append(x)
        if self.downsamplers is not None:
            results.append(self.downsamplers[0](x))
        return results

    def up(self, x, time, text, attend: Attend, remat: Remat, skips: list):
        """Takes its skip connections from the end of `skips`."""
        for i, skip in enumerate(reversed(skips)):
            x = self.unit(i, attend, remat)(jnp.concatenate([x, skip], axis=-1), time, text)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class MidBlock(nnx.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, cfg: UNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = cfg.channels[-1]
        self.resnets = nnx.List(
            ResnetBlock(
                width,
                width,
                groups=cfg.norm_groups,
                eps=1e-5,
                time_dim=4 * cfg.channels[0],
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(2)
        )
        self.attentions = nnx.List(
            [transformer(cfg, -1, name="mid_block.attentions.0", dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x, time, text, attend: Attend):
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, text, attend)
        return self.resnets[1](x, time)


def transformer(
    cfg: UNetConfig, level: int, *, name: str, dtype: DTypeLike, rngs: nnx.Rngs
) -> SpatialTransformer:
    return SpatialTransformer(
        cfg.channels[level],
        cfg.context_dim,
        cfg.heads[level],
        layers=cfg.transformer_layers,
        groups=cfg.norm_groups,
        linear_projection=cfg.linear_projection,
        name=name,
        dtype=dtype,
        rngs=rngs,
    )


class UNet(nnx.Module):
    """Predicts the noise (or v) in a latent, given the timestep and the text."""

    def __init__(self, cfg: UNetConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        channels, n, last = cfg.channels, cfg.layers_per_block, len(cfg.channels) - 1
        self.base_channels = channels[0]
        self.conv_in = Conv(cfg.in_channels, channels[0], dtype=dtype, rngs=rngs)
        self.time_embedding = TimeEmbedding(channels[0], 4 * channels[0], dtype=dtype, rngs=rngs)

        down, skips = [], [channels[0]]
        for i, width in enumerate(channels):
            c_ins = [skips[-1]] + [width] * (n - 1)
            resample = None
            if i < last:
                resample = Downsample(width, padding=(1, 1), dtype=dtype, rngs=rngs)
            name = f"down_blocks.{i}"
            down.append(Block(cfg, i, c_ins, name=name, resample=resample, dtype=dtype, rngs=rngs))
            skips += [width] * (n + (i < last))
        self.down_blocks = nnx.List(down)

        self.mid_block = MidBlock(cfg, dtype=dtype, rngs=rngs)

        up, below = [], channels[-1]
        for i, width in enumerate(reversed(channels)):
            c_ins = [c + skips.pop() for c in [below] + [width] * n]
            resample = Upsample(width, dtype=dtype, rngs=rngs) if i < last else None
            name = f"up_blocks.{i}"
            up.append(
                Block(cfg, last - i, c_ins, name=name, resample=resample, dtype=dtype, rngs=rngs)
            )
            below = width
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = GroupNorm(channels[0], cfg.norm_groups, eps=1e-5, rngs=rngs)
        self.conv_out = Conv(channels[0], cfg.out_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        z: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        text: Float[Array, "b n e"],
        attend: Attend = attend,
        remat: Remat = REMAT["none"],
    ) -> Float[Array, "b h w o"]:
        """`z` (scaled by c_in, the image latent beside it), `t` in 0..999, fractions allowed.

        Height and width must be multiples of 2^(levels - 1). The result is float32.
        """
        time = self.time_embedding(timestep_embedding(t, self.base_channels))
        x = self.conv_in(z)
        skips = [x]
        for block in self.down_blocks:
            down = remat.level(lambda block, *args: block.down(*args, attend, remat))
            skips += down(block, skips[-1], time, text)
        middle = remat.level(lambda block, *args: block(*args, attend))
        x = middle(self.mid_block, skips[-1], time, text)
        for block in self.up_blocks:
            n = len(block.resnets)
            up = remat.level(lambda block, skips, *args: block.up(*args, attend, remat, skips))
            x = up(block, skips[-n:], x, time, text)
            skips = skips[:-n]
        return self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)
