# SPDX-License-Identifier: Apache-2.0
"""DINO's vision transformer (Caron et al. 2021) of CLIP's blocks, and its view of pictures."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from ip2p_jax.models.clip import Encoder, PatchEmbeddings
from ip2p_jax.models.presets import DINOConfig
from ip2p_jax.types import Params

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet, pixels in [0, 1]: the network takes (x - MEAN) / STD."""


class DINO(nnx.Module):
    """The backbone, without DINO's projection head."""

    def __init__(self, cfg: DINOConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        eps = cfg.norm_eps
        self.embeddings = PatchEmbeddings(cfg, use_bias=True, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(cfg, causal=False, eps=eps, dtype=dtype, rngs=rngs)
        self.layernorm = nnx.LayerNorm(cfg.width, epsilon=eps, dtype=dtype, rngs=rngs)
        self.image_size = cfg.image_size

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """The class token after the last norm, of normalised pixels (b, image_size, image_size,
        3)."""
        return self.layernorm(self.encoder(self.embeddings(x))[:, 0])


def preprocess(pictures: UInt8[Array, "b h w 3"], size: int) -> Float[Array, "b size size 3"]:
    """What the network takes of pictures, as MagicBrush's evaluation prepares them.

    The shorter side goes to 8/7 of `size` (256 for 224), then the centre is cut out. Resized as
    Pillow does it: bicubic (a = -0.5), antialiased, in width before height, each to whole numbers,
    halves up.
    """
    b, h, w, _ = pictures.shape
    short = size * 256 // 224
    height, width = (short * side // min(h, w) for side in (h, w))
    x = pictures.astype(jnp.float32)
    for shape in ((b, h, width, 3), (b, height, width, 3)):
        x = jnp.clip(jnp.floor(jax.image.resize(x, shape, "cubic") + 0.5), 0.0, 255.0)
    top, left = (round((side - size) / 2) for side in (height, width))
    x = x[:, top : top + size, left : left + size] / 255.0
    return (x - jnp.array(MEAN)[None, None, None]) / jnp.array(STD)[None, None, None]


def embed_pictures(
    graphdef: Any, params: Params, pictures: UInt8[Array, "b h w 3"]
) -> Float32[Array, "b e"]:
    """Embeddings, not normalised, of pictures of any size; to be called under jit."""
    with jax.default_matmul_precision("highest"):  # float32 is cut short on TPU and GPU else
        dino = nnx.merge(graphdef, params)
        return dino(preprocess(pictures, dino.image_size)).astype(jnp.float32)
