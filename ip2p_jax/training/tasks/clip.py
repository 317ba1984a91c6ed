# SPDX-License-Identifier: Apache-2.0
"""Trains CLIP (Radford et al. 2021), which the filter of pairs and the evaluation of edits need."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from ip2p_jax.evaluation.clip_scores import preprocess
from ip2p_jax.models.clip import CLIP, unit
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import CLIPConfig
from ip2p_jax.training.state import Metrics, mean
from ip2p_jax.training.tasks.task import Task, scratch
from ip2p_jax.types import CaptionedBatch, Params

HIGHEST = 100.0
"""Bound of the factor of similarities (section 2.5)."""


def clip_task(config: CLIPConfig, *, dtype: Any, key: Key[Array, ""]) -> Task:
    """Trains both towers and the temperature from scratch. Its samples are what it finds: for each
    caption the picture of the batch that fits it best."""
    graphdef, _ = abstract(CLIP, config, dtype=dtype)

    def embed(params: Params, batch: CaptionedBatch) -> tuple[Any, Any]:
        clip = nnx.merge(graphdef, params["clip"])
        x = preprocess(batch.image.astype(jnp.float32) / 255.0, config.vision.image_size)
        images, texts = clip.embed_images(x), clip.embed_texts(batch.tokens)
        return unit(images.astype(jnp.float32)), unit(texts.astype(jnp.float32))

    def loss(
        params: Params, frozen: Params, batch: CaptionedBatch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        scale = temperature(params["clip"]["logit_scale"])
        value, accuracy = contrast(*embed(params, batch), scale)
        return value, {"accuracy": mean(accuracy), "scale": mean(scale)}

    def sample(ema: Params, frozen: Params, batch: CaptionedBatch) -> UInt8[Array, "b h w 3"]:
        images, texts = embed(ema, batch)
        return batch.image[jnp.argmax(texts @ images.T, axis=1)]

    return Task(config, scratch(key, clip=(CLIP, config)), {}, loss, sample)


def temperature(logit_scale: Float[Array, ""]) -> Float[Array, ""]:
    """The factor of similarities, learned as a logarithm. At its bound the gradient ends, and
    weight decay leads back."""
    return jnp.exp(jnp.minimum(logit_scale, math.log(HIGHEST)))


def contrast(
    images: Float[Array, "b e"], texts: Float[Array, "b e"], scale: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric cross-entropy over a batch of unit embeddings (figure 3), and how often the own
    partner is the nearest.

    The batch is that of all devices and hosts: XLA gathers what the rows of each lack.
    """
    logits = scale * images @ texts.T
    own = jnp.diagonal(logits)
    losses = [jax.nn.logsumexp(logits, axis=axis) - own for axis in (0, 1)]
    nearest = [own >= jnp.max(logits, axis=axis) for axis in (0, 1)]
    return jnp.mean(jnp.stack(losses)), jnp.mean(jnp.stack(nearest))
