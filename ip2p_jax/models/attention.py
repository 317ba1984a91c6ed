# SPDX-License-Identifier: Apache-2.0
"""Attention of the UNet and the VAE, and the hook through which it can be watched or replaced."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ip2p_jax.models.layers import Conv, GroupNorm, Linear


class Place(NamedTuple):
    """Where in the UNet an attention happens."""

    block: str  # as in the tensor names: "down_blocks.0.attentions.1.transformer_blocks.0"
    cross: bool  # on the text, else among the picture's own positions
    height: int
    width: int


Attend = Callable[
    [Place, Float[Array, "b n k d"], Float[Array, "b m k d"], Float[Array, "b m k d"]],
    Float[Array, "b n k d"],
]
"""The hook: `attend(place, q, k, v)`, called for every attention of the UNet, once a trace."""


def attend(
    place: Place | None,
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
) -> Float[Array, "b n k d"]:
    """softmax(q k^T / sqrt(d)) v, softmax in float32."""
    return jax.lax.platform_dependent(
        q, k, v, cpu=attend_by_head, default=jax.nn.dot_product_attention
    )


def attend_by_head(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]
) -> Float[Array, "b n k d"]:
    """The same one head after the other: on the CPU batched products are slow and caches small.

    Keys and values lie with positions in their rows, which makes the products of the gradient, too,
    those that XLA has fast loops for.
    """
    b, _, _, d = q.shape

    def one_head(qkv):
        q, k, v = qkv
        score = jnp.matmul(q, k, preferred_element_type=jnp.float32) * d**-0.5
        highest = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
        weight = jnp.exp(score - highest)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        return ((weight.astype(v.dtype) @ v.T) / total).astype(v.dtype)

    q = rearrange(q, "b n k d -> (b k) n d")
    k, v = (rearrange(x, "b m k d -> (b k) d m") for x in (k, v))
    return rearrange(jax.lax.map(one_head, (q, k, v)), "(b k) n d -> b n k d", b=b)


class Attention(nnx.Module):
    """Multi-head attention with diffusers' tensor names; no bias on q, k, v."""

    def __init__(self, width: int, context: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(c_in: int, *, bias: bool = False) -> Linear:
            return Linear(c_in, width, use_bias=bias, dtype=dtype, rngs=rngs)

        self.to_q = linear(width)
        self.to_k = linear(context)
        self.to_v = linear(context)
        self.to_out = nnx.List([linear(width, bias=True)])
        self.heads = heads

    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "b m e"],
        place: Place,
        attend: Attend,
    ) -> Float[Array, "b n c"]:
        q, k, v = (
            rearrange(y, "b n (k d) -> b n k d", k=self.heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](rearrange(attend(place, q, k, v), "b n k d -> b n (k d)"))


@jax.custom_vjp
def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The exact GELU, x times the normal distribution's integral (Hendrycks and Gimpel 2016).

    Its derivative is kept for the gradient: left to itself, XLA computes it again in each of the
    operations that need it, a tenth of a transformer's time on a TPU.
    """
    return gelu_forward(x)[0]


def gelu_forward(x: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """GELU and its derivative."""
    y = x.astype(jnp.float32)
    below = 0.5 + 0.5 * jax.lax.erf(y * 0.5**0.5)
    density = jnp.exp(-0.5 * y * y) / (2 * jnp.pi) ** 0.5
    return (y * below).astype(x.dtype), (below + y * density).astype(x.dtype)


gelu.defvjp(gelu_forward, lambda slope, upstream: (slope * upstream,))


class GEGLU(nnx.Module):
    """Gated linear unit with the exact (erf) GELU (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = Linear(width, 2 * inner, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n e"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """GEGLU and a projection back; the dropout between them is 0, and keeps the names' numbers."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        geglu = GEGLU(width, 4 * width, dtype=dtype, rngs=rngs)
        project = Linear(4 * width, width, dtype=dtype, rngs=rngs)
        self.net = nnx.List([geglu, nnx.Dropout(0.0), project])

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention on the text, feed-forward; each after a LayerNorm."""

    def __init__(self, width: int, context: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)

        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attn1 = Attention(width, width, heads, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(width, context, heads, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        text: Float[Array, "b m e"],
        place: Place,
        attend: Attend,
    ) -> Float[Array, "b n c"]:
        h = self.norm1(x)
        x = x + self.attn1(h, h, place, attend)
        x = x + self.attn2(self.norm2(x), text, place._replace(cross=True), attend)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """Transformer blocks over the positions of a feature map (diffusers' `Transformer2DModel`)."""

    def __init__(
        self,
        width: int,
        context: int,
        heads: int,
        *,
        layers: int,
        groups: int,
        linear_projection: bool,
        name: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.name = name
        self.norm = GroupNorm(width, groups, eps=1e-6, rngs=rngs)

        def project() -> nnx.Module:  # the same map; checkpoints differ in shape
            if linear_projection:
                return Linear(width, width, dtype=dtype, rngs=rngs)
            return Conv(width, width, 1, dtype=dtype, rngs=rngs)

        self.proj_in = project()
        self.transformer_blocks = nnx.List(
            TransformerBlock(width, context, heads, dtype=dtype, rngs=rngs) for _ in range(layers)
        )
        self.proj_out = project()

    def __call__(
        self, x: Float[Array, "b h w c"], text: Float[Array, "b m e"], attend: Attend
    ) -> Float[Array, "b h w c"]:
        _, height, width, _ = x.shape
        y = rearrange(self.proj_in(self.norm(x)), "b h w c -> b (h w) c")
        for i, block in enumerate(self.transformer_blocks):
            place = Place(f"{self.name}.transformer_blocks.{i}", False, height, width)
            y = block(y, text, place, attend)
        return x + self.proj_out(rearrange(y, "b (h w) c -> b h w c", h=height))
