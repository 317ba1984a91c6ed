# SPDX-License-Identifier: Apache-2.0
"""Claims: the contrastive loss and its gradient are transformers', over the rows of all devices;
the factor of similarities ends at 100; samples are the pictures that captions find."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from transformers import CLIPModel

from ip2p_jax.evaluation.clip_scores import MEAN, STD
from ip2p_jax.training import mesh
from ip2p_jax.training.state import row_keys
from ip2p_jax.training.tasks.clip import clip_task, contrast, temperature
from ip2p_jax.types import CaptionedBatch
from ip2p_jax.weights.clip import load_clip
from tests.training import tiny

ROWS = 16
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return load_clip(str(tiny_clip))


@pytest.fixture(scope="module")
def batch(clip) -> CaptionedBatch:
    """Noise for pictures, and texts that end at different places."""
    rng = np.random.default_rng(0)
    texts = [" ".join(["red"] * n) for n in range(1, ROWS + 1)]
    tokens = np.array(clip.tokenizer(texts, padding="max_length", max_length=77).input_ids)
    size = clip.config.vision.image_size
    pictures = rng.integers(0, 256, (ROWS, size, size, 3), np.uint8)
    return CaptionedBatch(pictures, tokens.astype(np.int32))


def theirs(folder, batch: CaptionedBatch) -> tuple[Any, Any]:
    """transformers' module, and what it makes of a batch."""
    module: Any = CLIPModel.from_pretrained(folder)
    x = (batch.image / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return module, module(
        input_ids=torch.tensor(batch.tokens, dtype=torch.long),
        pixel_values=rearrange(torch.tensor(x), "b h w c -> b c h w"),
        return_loss=True,
    )


def their_loss(folder, batch: CaptionedBatch) -> tuple[float, float, np.ndarray]:
    """Their loss, and its derivatives by the temperature and by one projection."""
    module, made = theirs(folder, batch)
    made.loss.backward()
    by_projection = module.text_projection.weight.grad.numpy()
    return made.loss.item(), module.logit_scale.grad.item(), by_projection


def our_loss(clip, batch: CaptionedBatch, devices: int) -> tuple[float, float, np.ndarray]:
    """The same of ours, its rows split over this many devices."""
    task = clip_task(clip.config, dtype=jnp.float32, key=tiny.KEY)
    on = tiny.grid(devices, 1)
    params = {"clip": tiny.put(on, clip.params)}
    keys = tiny.put(on, row_keys(tiny.KEY, np.arange(len(batch.image))))
    compute = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), grads = compute(params, {}, mesh.put_batch(on, batch), keys)
    by_scale = float(grads["clip"]["logit_scale"])
    return float(loss), by_scale, np.asarray(grads["clip"]["text_projection"]["weight"])


@pytest.mark.parity
def test_loss_is_transformers(clip, batch, tiny_clip):
    """On one device and on eight; not that of each device's own rows, nor of other texts."""
    loss, by_scale, by_projection = their_loss(tiny_clip, batch)
    for devices in (1, 8):
        got = our_loss(clip, batch, devices)
        assert abs(got[0] - loss) < TOLERANCE * loss
        assert abs(got[1] - by_scale) < 1e-4 * abs(by_scale)
        assert np.abs(got[2] - by_projection).max() < 1e-4 * np.abs(by_projection).max()
    shares = [CaptionedBatch(*(x[i::8] for x in batch)) for i in range(8)]
    own = np.mean([their_loss(tiny_clip, share)[0] for share in shares])
    assert abs(own - loss) > 0.1 * loss
    other = batch._replace(tokens=batch.tokens[::-1].copy())
    assert abs(their_loss(tiny_clip, other)[0] - loss) > 1e-3 * loss


def test_closed_forms():
    """Partners that are alike, all others at right angles: log(1 + (b - 1) / e^scale)."""
    rows, scale = np.eye(4, dtype=np.float32), jnp.float32(3.0)
    loss, accuracy = contrast(jnp.asarray(rows), jnp.asarray(rows), scale)
    assert float(loss) == pytest.approx(math.log(1 + 3 * math.exp(-3)), rel=1e-5)
    assert float(accuracy) == 1.0
    swapped = rows[[1, 0, 2, 3]]
    loss, accuracy = contrast(jnp.asarray(rows), jnp.asarray(swapped), scale)
    wrong = math.log(3 + math.exp(3))
    right = math.log(1 + 3 * math.exp(-3))
    assert float(loss) == pytest.approx((wrong + right) / 2, rel=1e-5)
    assert float(accuracy) == 0.5


def test_temperature_ends_at_100():
    slope = jax.grad(temperature)
    assert float(temperature(jnp.float32(2.0))) == pytest.approx(math.exp(2), rel=1e-6)
    assert float(slope(jnp.float32(2.0))) == pytest.approx(math.exp(2), rel=1e-6)
    for beyond in (4.7, 50.0):
        assert float(temperature(jnp.float32(beyond))) == pytest.approx(100, rel=1e-5)
        assert float(slope(jnp.float32(beyond))) == 0


def test_samples_are_what_captions_find(clip, batch, tiny_clip):
    """By transformers' scores."""
    _, made = theirs(tiny_clip, batch)
    nearest = made.logits_per_text.argmax(dim=1).numpy()
    task = clip_task(clip.config, dtype=jnp.float32, key=tiny.KEY)
    found = np.asarray(jax.jit(task.sample)({"clip": clip.params}, {}, batch))
    np.testing.assert_array_equal(found, batch.image[nearest])
    assert (nearest != np.arange(ROWS)).any()  # control: random towers do not find their own
