# SPDX-License-Identifier: Apache-2.0
"""CLIP's text tower (Radford et al. 2021), with transformers' tensor names."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ip2p_jax.models.presets import TextConfig


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """OpenAI CLIP's approximation of the GELU: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU, as in OpenCLIP and SD 2's text tower."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class Embeddings(nnx.Module):
    """Token plus position."""

    def __init__(self, cfg: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(cfg.vocab_size, cfg.width, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Embed(cfg.positions, cfg.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        positions = self.position_embedding(jnp.arange(tokens.shape[1]))
        return self.token_embedding(tokens) + positions[None]


class SelfAttention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, cfg: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear() -> nnx.Linear:
            return nnx.Linear(cfg.width, cfg.width, dtype=dtype, rngs=rngs)

        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear() for _ in range(4))
        self.heads = cfg.heads

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        q, k, v = (
            rearrange(project(x), "b n (k d) -> b n k d", k=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(y, "b n k d -> b n (k d)"))


class MLP(nnx.Module):
    """Two linear layers with the tower's activation between them."""

    def __init__(self, cfg: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(cfg.width, cfg.mlp_width, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(cfg.mlp_width, cfg.width, dtype=dtype, rngs=rngs)
        self.activation = ACTIVATIONS[cfg.activation]

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, cfg: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.layer_norm1 = nnx.LayerNorm(cfg.width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.self_attn = SelfAttention(cfg, dtype=dtype, rngs=rngs)
        self.layer_norm2 = nnx.LayerNorm(cfg.width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mlp = MLP(cfg, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, cfg: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.layers = nnx.List(EncoderLayer(cfg, dtype=dtype, rngs=rngs) for _ in range(cfg.layers))

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPText(nnx.Module):
    """Text tower; no attention mask but the causal one, as Stable Diffusion uses it."""

    def __init__(self, cfg: TextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.embeddings = Embeddings(cfg, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(cfg, dtype=dtype, rngs=rngs)
        self.final_layer_norm = nnx.LayerNorm(cfg.width, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        """The last hidden state after the final LayerNorm."""
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))
