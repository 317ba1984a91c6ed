# SPDX-License-Identifier: Apache-2.0
"""Claims: maps of one size are recorded, of conditional rows, and average as maps should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_gen.attention_maps import (
    attention_map,
    draw_maps,
    map_size,
    mean_maps,
    record_cross_attention,
)
from ip2p_jax.models.attention import Place, attend
from ip2p_jax.models.presets import SD15, TINY


def test_maps_are_recorded_where_they_fit():
    """Two pictures, 2x3 positions, 5 tokens; a layer of another size or kind does not count."""
    q = jax.random.normal(jax.random.key(0), (4, 6, 2, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 4, 5, 2, 8))

    @jax.jit
    def record(q, k, v):
        store = jax.new_ref(jnp.zeros((2, 2, 3, 5)))
        hook = record_cross_attention(store)
        outs = [
            hook(Place("a", True, 2, 3), q, k, v),
            hook(Place("b", True, 2, 3), 2 * q, k, v),
            hook(Place("c", True, 3, 2), 3 * q, k, v),
            hook(Place("d", False, 2, 3), q, q, q),
        ]
        return store[...], outs

    total, outs = record(q, k, v)
    maps = [attention_map(x[1::2], k[1::2]).mean(1).reshape(2, 2, 3, 5) for x in (q, 2 * q)]
    assert np.allclose(total, maps[0] + maps[1], atol=1e-6)
    assert np.allclose(mean_maps(total), (maps[0] + maps[1]) / 2, atol=1e-6)
    assert not np.allclose(total, 2 * maps[0], atol=1e-3)  # control
    assert np.array_equal(outs[0], attend(Place("a", True, 2, 3), q, k, v))


def test_a_map_is_a_softmax():
    q = jax.random.normal(jax.random.key(0), (1, 6, 2, 16))
    k = jax.random.normal(jax.random.key(1), (1, 5, 2, 16))
    score = np.einsum("nkd,mkd->knm", q[0], k[0], dtype=np.float64) / 4
    want = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    assert np.allclose(attention_map(q, k)[0], want, atol=1e-6)


def test_the_size_of_maps():
    assert map_size(SD15.unet, 64, 64) == (16, 16)
    assert map_size(SD15.unet, 32, 32) == (16, 16)
    assert map_size(SD15.unet, 64, 48) == (16, 12)
    assert map_size(SD15.unet, 64, 64, most=100) == (8, 8)
    assert map_size(TINY.unet, 16, 16) == (16, 16)
    assert map_size(TINY.unet, 16, 16, most=16) == (4, 4)
    with pytest.raises(ValueError, match="no attention of latents of 256x256 is on 256 positions"):
        map_size(SD15.unet, 256, 256)


def test_maps_lie_over_the_picture():
    picture = Image.new("RGB", (64, 32), "white")
    maps = np.zeros((5, 4, 8), np.float32)
    maps[:, 1, 2] = 1
    figure = draw_maps(picture, ["a", "b", "c", "d", "e"], maps)
    axes = figure.axes
    assert [ax.get_title() for ax in axes] == ["", "a", "b", "c", "d", "e", "", ""]
    assert [len(ax.images) for ax in axes] == [1, 2, 2, 2, 2, 2, 0, 0]
    assert axes[1].images[1].get_extent() == axes[0].images[0].get_extent()
