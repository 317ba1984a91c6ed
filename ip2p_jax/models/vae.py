# SPDX-License-Identifier: Apache-2.0
"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, section 3.1).

Attributes carry diffusers' tensor names. Latents here are not scaled: whoever feeds a UNet
multiplies by `scaling_factor`, whoever decodes divides by it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ip2p_jax.models.attention import attend
from ip2p_jax.models.layers import Conv, Downsample, GroupNorm, Linear, ResnetBlock, Upsample
from ip2p_jax.models.presets import VAEConfig

EPS = 1e-6  # of every GroupNorm in this network
ENCODER = ("encoder", "quant_conv")
"""The parts that latents depend on: another decoder may go with them."""


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z | x); its mode is its mean."""

    mean: Float[Array, "b h w z"]
    log_var: Float[Array, "b h w z"]


class SpatialAttention(nnx.Module):
    """Single-head self-attention among all positions."""

    def __init__(self, channels: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear() -> Linear:
            return Linear(channels, channels, dtype=dtype, rngs=rngs)

        self.group_norm = GroupNorm(channels, groups, eps=EPS, rngs=rngs)
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear()])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, 1, c)
        y = attend(None, self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y.reshape(b, h, w, c))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the latent's resolution."""

    def __init__(self, channels: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            ResnetBlock(channels, channels, groups=groups, eps=EPS, dtype=dtype, rngs=rngs)
            for _ in range(2)
        )
        self.attentions = nnx.List([SpatialAttention(channels, groups, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """Residual blocks at one resolution, then a resampling."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        layers: int,
        groups: int,
        *,
        resample: Downsample | Upsample | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(c, c_out, groups=groups, eps=EPS, dtype=dtype, rngs=rngs)
            for c in [c_in] + [c_out] * (layers - 1)
        )
        self.downsamplers = nnx.List([resample]) if isinstance(resample, Downsample) else None
        self.upsamplers = nnx.List([resample]) if isinstance(resample, Upsample) else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        for resnet in self.resnets:
            x = resnet(x)
        resample = self.downsamplers or self.upsamplers
        return x if resample is None else resample[0](x)


class Encoder(nnx.Module):
    """Pixels to the parameters of the posterior, before `quant_conv`."""

    def __init__(self, cfg: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels, last = cfg.channels, len(cfg.channels) - 1
        self.conv_in = Conv(3, channels[0], dtype=dtype, rngs=rngs)
        levels = []
        for i, width in enumerate(channels):
            resample = None
            if i < last:
                resample = Downsample(width, padding=(0, 1), dtype=dtype, rngs=rngs)
            levels.append(
                Level(
                    channels[max(i - 1, 0)],
                    width,
                    cfg.layers_per_block,
                    cfg.norm_groups,
                    resample=resample,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
        self.down_blocks = nnx.List(levels)
        self.mid_block = MidBlock(channels[-1], cfg.norm_groups, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(channels[-1], cfg.norm_groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv(channels[-1], 2 * cfg.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents, after `post_quant_conv`, to pixels."""

    def __init__(self, cfg: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels, last = cfg.channels[::-1], len(cfg.channels) - 1
        self.conv_in = Conv(cfg.latent_channels, channels[0], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(channels[0], cfg.norm_groups, dtype=dtype, rngs=rngs)
        levels = []
        for i, width in enumerate(channels):
            levels.append(
                Level(
                    channels[max(i - 1, 0)],
                    width,
                    cfg.layers_per_block + 1,
                    cfg.norm_groups,
                    resample=Upsample(width, dtype=dtype, rngs=rngs) if i < last else None,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
        self.up_blocks = nnx.List(levels)
        self.conv_norm_out = GroupNorm(channels[-1], cfg.norm_groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv(channels[-1], 3, dtype=dtype, rngs=rngs)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Encoder and decoder between pixels in [-1, 1] and latents 2^(levels - 1) times smaller."""

    def __init__(self, cfg: VAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        moments = 2 * cfg.latent_channels
        self.encoder = Encoder(cfg, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(cfg, dtype=dtype, rngs=rngs)
        self.quant_conv = Conv(moments, moments, 1, dtype=dtype, rngs=rngs)
        self.post_quant_conv = Conv(
            cfg.latent_channels, cfg.latent_channels, 1, dtype=dtype, rngs=rngs
        )

    def encode(self, x: Float[Array, "b h w 3"]) -> Posterior:
        """Posterior of pixels in [-1, 1], float32, not scaled."""
        moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
        mean, log_var = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_var, -30.0, 20.0))

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 3"]:
        """Pixels, about [-1, 1] and not clipped, float32, of unscaled latents."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
