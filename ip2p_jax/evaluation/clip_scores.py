# SPDX-License-Identifier: Apache-2.0
"""CLIP's judgement of an edit: how well pictures fit captions, and changes fit changes.

clip = Clip.from_pretrained("openai/clip-vit-large-patch14")
scores = clip.scores(before, after, ["a street"], ["a street in snow"])
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, UInt8

from ip2p_jax.data.tokens import tokenize
from ip2p_jax.devices import put, shardings
from ip2p_jax.models.clip import CLIP, MEAN, STD, unit
from ip2p_jax.models.layers import abstract
from ip2p_jax.types import Params
from ip2p_jax.weights.clip import PretrainedClip, load_clip


class ClipScores(NamedTuple):
    """Cosine similarities in [-1, 1] of picture pairs and their captions (section 3.1.2)."""

    sim_0: Float[Any, " b"]  # first picture, first caption
    sim_1: Float[Any, " b"]  # second picture, second caption
    sim_dir: Float[Any, " b"]  # change of the picture, change of the caption
    sim_image: Float[Any, " b"]  # first picture, second picture


def clip_scores(
    image_0: Float[Array, "b e"],
    image_1: Float[Array, "b e"],
    text_0: Float[Array, "b e"],
    text_1: Float[Array, "b e"],
) -> ClipScores:
    """Scores of embeddings, which need not be normalised.

    Changes are differences of normalised embeddings (Gal et al. 2021, StyleGAN-NADA); nothing is
    like a change from a thing to itself: 0.
    """
    image_0, image_1, text_0, text_1 = map(unit, (image_0, image_1, text_0, text_1))
    return ClipScores(
        sim_0=dot(image_0, text_0),
        sim_1=dot(image_1, text_1),
        sim_dir=dot(unit(image_1 - image_0), unit(text_1 - text_0)),
        sim_image=dot(image_0, image_1),
    )


def dot(a: Float[Array, "b e"], b: Float[Array, "b e"]) -> Float[Array, " b"]:
    """Products of rows with rows."""
    return jnp.sum(a * b, axis=1)


def preprocess(x: Float[Array, "b h w 3"], size: int) -> Float[Array, "b size size 3"]:
    """What the vision tower takes of pixels in [0, 1], as the authors prepare them.

    Bicubic (a = -0.75, as torch's) to a square of `size`, neither antialiased nor cropped nor
    clipped.
    """
    x = jax.image.resize(x, (len(x), size, size, 3), "cubic-pytorch", antialias=False)
    return (x - jnp.array(MEAN)[None, None, None]) / jnp.array(STD)[None, None, None]


def embed_images(
    graphdef: Any, params: Params, pictures: UInt8[Array, "b h w 3"]
) -> Float32[Array, "b e"]:
    """Image embeddings, not normalised, of pictures of any size; to be called under jit."""
    return embed_pixels(graphdef, params, pictures.astype(jnp.float32) / 255.0)


def embed_pixels(
    graphdef: Any, params: Params, x: Float[Array, "b h w 3"]
) -> Float32[Array, "b e"]:
    """The same of pixels in [0, 1]."""
    with jax.default_matmul_precision("highest"):  # float32 is cut short on TPU and GPU else
        clip = nnx.merge(graphdef, params)
        return clip.embed_images(preprocess(x, clip.vision_model.image_size)).astype(jnp.float32)


def embed_texts(
    graphdef: Any, params: Params, tokens: Int32[Array, "b n"]
) -> Float32[Array, "b e"]:
    """Text embeddings, not normalised, of CLIP's tokens; to be called under jit."""
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graphdef, params).embed_texts(tokens).astype(jnp.float32)


class Clip:
    """A CLIP put on devices: `graphdef` and `params` for programs of others, and its own.

    `dtype` is the type of parameters and arithmetic (None: float32 everywhere, for scores are
    compared with thresholds). Batches are split over `devices` (None: all local ones; on the CPU
    one, for its devices share the same cores), always `rows` rows a device (None: 8; on the CPU 2,
    where more are no faster): a row's result is the same bit for bit whatever else is embedded, on
    any number of devices.
    """

    def __init__(
        self,
        pretrained: PretrainedClip,
        dtype: DTypeLike | None = None,
        devices: Sequence[Any] | None = None,
        rows: int | None = None,
    ):
        self.config = pretrained.config
        self.tokenizer = pretrained.tokenizer
        self.rows = rows or (2 if jax.default_backend() == "cpu" else 8)
        dtype = jnp.dtype(dtype or jnp.float32)
        self.by_row, replicated = shardings(devices)
        self.graphdef, _ = abstract(CLIP, self.config, dtype=dtype)
        self.params = put(pretrained.params, dtype, replicated)
        self.image_program, self.text_program = (
            jax.jit(functools.partial(f, self.graphdef), out_shardings=self.by_row)
            for f in (embed_images, embed_texts)
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike | None = None,
        devices: Sequence[Any] | None = None,
        *,
        revision: str | None = None,
    ) -> "Clip":
        """Opens `model`: a folder or hub id of transformers' CLIPModel, or a file in OpenAI's
        names; FileNotFoundError or ValueError in one line."""
        return cls(load_clip(model, revision), dtype, devices)

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "b n"]:
        """CLIP's tokens, cut and padded to the length of the text tower (77)."""
        return tokenize(self.tokenizer, texts, self.config.text.positions)

    def embed_images(self, pictures: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b e"]:
        """Image embeddings, not normalised, of pictures of one size."""
        return self.embed(self.image_program, pictures)

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "b e"]:
        """Text embeddings, not normalised; texts are cut at 77 tokens."""
        return self.embed(self.text_program, self.tokenize(texts))

    def embed(self, program: Callable, inputs: np.ndarray) -> Float32[np.ndarray, "b e"]:
        """Runs a program on batches of `rows` rows a device; rows are repeated to fill the last."""
        n, most = len(inputs), self.rows * self.by_row.mesh.size
        results = np.empty((n, self.config.vision.projection_dim), np.float32)
        for start in range(0, n, most):
            chunk = inputs[start : start + most]
            batch = jax.device_put(chunk[np.arange(most) % len(chunk)], self.by_row)
            results[start : start + most] = np.asarray(program(self.params, batch))[: len(chunk)]
        return results

    def scores(
        self,
        pictures_0: UInt8[np.ndarray, "b h w 3"],
        pictures_1: UInt8[np.ndarray, "b h2 w2 3"],
        captions_0: Sequence[str],
        captions_1: Sequence[str],
    ) -> ClipScores:
        """Scores of pictures before and after an edit, and of their captions; host arrays.

        Raises:
          ValueError: there are not as many of each.
        """
        counts = tuple(map(len, (pictures_0, pictures_1, captions_0, captions_1)))
        if len(set(counts)) != 1:
            raise ValueError(f"scores: {counts} pictures and captions, expected as many of each")
        embeddings = (
            *map(self.embed_images, (pictures_0, pictures_1)),
            *map(self.embed_texts, (captions_0, captions_1)),
        )
        return ClipScores(*map(np.asarray, jax.jit(clip_scores)(*embeddings)))
