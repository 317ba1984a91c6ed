# SPDX-License-Identifier: Apache-2.0
"""CLIP's text and vision towers (Radford et al. 2021), with transformers' tensor names."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ip2p_jax.models.layers import LECUN, Embed, Linear
from ip2p_jax.models.presets import CLIPConfig, DINOConfig, TextConfig, VisionConfig

TowerConfig = TextConfig | VisionConfig | DINOConfig
"""What the towers share: width, layers, heads, mlp_width, activation."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, pixels in [0, 1]: the vision tower takes (x - MEAN) / STD."""


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """OpenAI CLIP's approximation of the GELU: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU, as in OpenCLIP and SD 2's text tower."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def unit(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Rows of length 1; a row of zeros stays."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class Embeddings(nnx.Module):
    """Token plus position."""

    def __init__(self, cfg: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.token_embedding = Embed(cfg.vocab_size, cfg.width, dtype=dtype, rngs=rngs)
        self.position_embedding = Embed(cfg.positions, cfg.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        positions = self.position_embedding(jnp.arange(tokens.shape[1]))
        return self.token_embedding(tokens) + positions[None]


class SelfAttention(nnx.Module):
    """Multi-head self-attention; `causal`: a position sees none after it."""

    def __init__(self, cfg: TowerConfig, *, causal: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear() -> Linear:
            return Linear(cfg.width, cfg.width, dtype=dtype, rngs=rngs)

        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear() for _ in range(4))
        self.heads = cfg.heads
        self.causal = causal

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        q, k, v = (
            rearrange(project(x), "b n (k d) -> b n k d", k=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(y, "b n k d -> b n (k d)"))


class MLP(nnx.Module):
    """Two linear layers with the tower's activation between them."""

    def __init__(self, cfg: TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = Linear(cfg.width, cfg.mlp_width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(cfg.mlp_width, cfg.width, dtype=dtype, rngs=rngs)
        self.activation = ACTIVATIONS[cfg.activation]

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(
        self,
        cfg: TowerConfig,
        *,
        causal: bool,
        eps: float = 1e-5,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.layer_norm1 = nnx.LayerNorm(cfg.width, epsilon=eps, dtype=dtype, rngs=rngs)
        self.self_attn = SelfAttention(cfg, causal=causal, dtype=dtype, rngs=rngs)
        self.layer_norm2 = nnx.LayerNorm(cfg.width, epsilon=eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(cfg, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers; `eps` of their norms."""

    def __init__(
        self,
        cfg: TowerConfig,
        *,
        causal: bool,
        eps: float = 1e-5,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List(
            EncoderLayer(cfg, causal=causal, eps=eps, dtype=dtype, rngs=rngs)
            for _ in range(cfg.layers)
        )

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPText(nnx.Module):
    """Text tower; no attention mask but the causal one, as Stable Diffusion uses it."""

    def __init__(self, cfg: TextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.embeddings = Embeddings(cfg, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(cfg, causal=True, dtype=dtype, rngs=rngs)
        self.final_layer_norm = nnx.LayerNorm(cfg.width, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        """The last hidden state after the final LayerNorm."""
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))


class PatchEmbeddings(nnx.Module):
    """A learned vector in front of the linearly embedded patches, plus position."""

    def __init__(
        self,
        cfg: VisionConfig | DINOConfig,
        *,
        use_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        patch = (cfg.patch_size, cfg.patch_size)
        positions = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.class_embedding = nnx.Param(jnp.zeros(cfg.width))
        self.patch_embedding = nnx.Conv(
            3,
            cfg.width,
            patch,
            patch,
            padding="VALID",
            use_bias=use_bias,
            kernel_init=LECUN,
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = Embed(positions, cfg.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b n c"]:
        patches = rearrange(self.patch_embedding(x), "b h w c -> b (h w) c")
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype), patches[:, :1].shape
        )
        positions = self.position_embedding(jnp.arange(patches.shape[1] + 1))
        return jnp.concatenate([first, patches], axis=1) + positions[None]


class CLIPVision(nnx.Module):
    """Vision tower (ViT) with its projection into the space shared with text."""

    def __init__(self, cfg: VisionConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(cfg.width, epsilon=1e-5, dtype=dtype, rngs=rngs)

        self.embeddings = PatchEmbeddings(cfg, dtype=dtype, rngs=rngs)
        self.pre_layrnorm = norm()  # spelled as in the checkpoints
        self.encoder = Encoder(cfg, causal=False, dtype=dtype, rngs=rngs)
        self.post_layernorm = norm()
        self.visual_projection = Linear(
            cfg.width, cfg.projection_dim, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.image_size = cfg.image_size

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Image embeddings, not normalised, of normalised pixels (b, image_size, image_size, 3)."""
        x = self.encoder(self.pre_layrnorm(self.embeddings(x)))
        return self.visual_projection(self.post_layernorm(x[:, 0]))


def highest_token(tokens: Int[Array, "b n"], end: int) -> Int[Array, " b"]:
    """Where the highest token id is: CLIP's own end token, whatever `end` says."""
    return jnp.argmax(tokens, axis=1)


def first_end_token(tokens: Int[Array, "b n"], end: int) -> Int[Array, " b"]:
    """Where the first end token is; CLIP pads with it."""
    return jnp.argmax(tokens == end, axis=1)


class CLIP(nnx.Module):
    """Both towers with their projections into one space (transformers' `CLIPModel`)."""

    def __init__(self, cfg: CLIPConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.text_model = CLIPText(cfg.text, dtype=dtype, rngs=rngs)
        self.text_projection = Linear(
            cfg.text.width, cfg.vision.projection_dim, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.vision_model = CLIPVision(cfg.vision, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))  # for training alone
        self.end = cfg.text.eos_token_id
        # Configurations from before 2023 say 2, which is no end token.
        self.pool = highest_token if self.end == 2 else first_end_token

    def embed_texts(self, tokens: Int[Array, "b n"]) -> Float[Array, "b e"]:
        """Text embeddings, not normalised: the state at the end token, projected."""
        at = self.pool(tokens, self.end)
        pooled = jnp.take_along_axis(self.text_model(tokens), at[:, None, None], axis=1)
        return self.text_projection(pooled[:, 0])

    def embed_images(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Image embeddings, as `CLIPVision` gives them."""
        return self.vision_model(x)
