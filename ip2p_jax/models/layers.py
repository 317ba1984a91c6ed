# SPDX-License-Identifier: Apache-2.0
"""Layers shared by the networks. Statistics of norms are float32 whatever the compute type."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ip2p_jax.types import Params


def abstract(
    network: Callable[..., nnx.Module], cfg: Any, *, dtype: DTypeLike = jnp.float32
) -> tuple[Any, Params]:
    """Returns (graphdef, parameters as ShapeDtypeStructs) of `network(cfg)`; allocates nothing.

    `nnx.merge(graphdef, params)` is then the network, inside or outside of jit.
    """
    graphdef, params = traced(network, cfg, jnp.dtype(dtype))
    return graphdef, jax.tree.map(lambda x: x, params)


@functools.lru_cache(64)
def traced(network: Callable[..., nnx.Module], cfg: Any, dtype: Any) -> tuple[Any, Params]:
    """As `abstract`, which takes most of a second for SD 1.5's UNet."""

    def build() -> nnx.Module:
        rngs = nnx.Rngs(0)
        rngs.params = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        return network(cfg, dtype=dtype, rngs=rngs)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, nnx.to_pure_dict(state)


def unless_abstract(init: Callable[..., Any]) -> Callable[..., Any]:
    """`init`, and zeros where there is no key: where only shapes are wanted, tracing random numbers
    takes longer than all else."""

    def values(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        return jnp.zeros(shape, dtype) if key is None else init(key, shape, dtype)

    return values


LECUN = unless_abstract(nnx.initializers.lecun_normal())
LECUN_ROWS = unless_abstract(nnx.initializers.lecun_normal(in_axis=1, out_axis=0))
EMBED = unless_abstract(nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))
Embed = functools.partial(nnx.Embed, embedding_init=EMBED)
"""Flax's layer with its own initial values, but for `abstract`."""


class Linear(nnx.Module):
    """x W^T + b. W is (out, in) as in torch's files, so that opening one turns no matrix round:
    a quarter of the time of a first edit with SD 1.5 on the CPU went into that."""

    def __init__(
        self, c_in: int, c_out: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.weight = nnx.Param(LECUN_ROWS(rngs.params(), (c_out, c_in)))
        self.bias = nnx.Param(jnp.zeros(c_out)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        weight = self.weight[...].astype(self.dtype)
        y = jax.lax.dot_general(x.astype(self.dtype), weight, (((x.ndim - 1,), (1,)), ((), ())))
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(self.dtype), tuple(range(x.ndim - 1)))


class Conv(nnx.Module):
    """Convolution, NHWC x HWIO, with symmetric padding unless `padding` says otherwise."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(LECUN(rngs.params(), (size, size, c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))
        self.stride = stride
        self.padding = padding or (size // 2, size // 2)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if kernel.shape[:2] == (1, 1):
            y = x @ kernel[0, 0]
        elif x.shape[1] * x.shape[2] <= 64 and self.stride == 1:
            y = jax.lax.platform_dependent(x, kernel, cpu=convolve_patches, default=self.convolve)
        else:
            y = self.convolve(x, kernel)
        return y + self.bias[...].astype(self.dtype)[None, None, None]

    def convolve(
        self, x: Float[Array, "b h w c"], kernel: Float[Array, "i j c o"]
    ) -> Float[Array, "b h2 w2 o"]:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=(self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def convolve_patches(
    x: Float[Array, "b h w c"], kernel: Float[Array, "i j c o"]
) -> Float[Array, "b h w o"]:
    """A convolution without stride as a product of patches: faster on the CPU at few positions."""
    _, h, w, _ = x.shape
    rows, columns = kernel.shape[:2]
    padding = [(0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)]
    padded = jnp.pad(x, padding)
    patches = [padded[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018) over all positions of `groups` groups of channels."""

    def __init__(self, channels: int, groups: int, *, eps: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw c"]:
        y = rearrange(x, "b ... c -> b (...) c").astype(jnp.float32)
        y = y - self.group_mean(y)
        scale = jax.lax.rsqrt(self.group_mean(y * y) + self.eps) * self.scale[...][None, None]
        return (y * scale + self.bias[...][None, None]).astype(x.dtype).reshape(x.shape)

    def group_mean(self, y: Float[Array, "b n c"]) -> Float[Array, "b 1 c"]:
        """Mean of each channel's group, first over positions: channels stay in the lanes."""
        mean = rearrange(jnp.mean(y, axis=1), "b (g i) -> b g i", g=self.groups)
        mean = jnp.broadcast_to(jnp.mean(mean, axis=2, keepdims=True), mean.shape)
        return rearrange(mean, "b g i -> b 1 (g i)")


def timestep_embedding(
    t: Float[Array, " b"], channels: int, max_period: float = 10000.0
) -> Float[Array, "b c"]:
    """Sinusoidal embedding of a (fractional) timestep, cosines first."""
    half = channels // 2
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class ResnetBlock(nnx.Module):
    """Pre-activation residual block; `time_dim=None` leaves out the time embedding (VAE)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        groups: int,
        eps: float,
        time_dim: int | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(c_in, groups, eps=eps, rngs=rngs)
        self.conv1 = Conv(c_in, c_out, dtype=dtype, rngs=rngs)
        if time_dim is not None:
            self.time_emb_proj = Linear(time_dim, c_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(c_out, groups, eps=eps, rngs=rngs)
        self.conv2 = Conv(c_out, c_out, dtype=dtype, rngs=rngs)
        self.conv_shortcut = Conv(c_in, c_out, 1, dtype=dtype, rngs=rngs) if c_in != c_out else None

    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w c2"]:
        h = self.conv1(nnx.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(nnx.silu(time))[:, None, None]
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Stride-2 convolution; the VAE's encoder pads (0, 1), the UNet (1, 1)."""

    def __init__(
        self, channels: int, *, padding: tuple[int, int], dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.conv = Conv(channels, channels, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(rearrange(x, "b h i w j c -> b (h i) (w j) c"))
