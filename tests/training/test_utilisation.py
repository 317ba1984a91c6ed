# SPDX-License-Identifier: Apache-2.0
"""Claims: model FLOPs are those of the products of loss and gradient, by their closed form; what a
chip can do is known by its name, or the utilisation is not told."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ip2p_jax.config import Config, Data, Optim
from ip2p_jax.training import utilisation
from ip2p_jax.training.state import mean
from tests.training.tiny import grid

ROWS, WIDTH = 64, 256


def loss(params, frozen, batch, keys):
    """Two products, of which the first one's input needs no gradient."""
    y = jnp.tanh(batch["x"] @ params["a"]) @ params["b"]
    return jnp.mean(y * y), {"mean": mean(jnp.mean(y))}


@pytest.fixture
def shapes():
    square = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    return {"a": square, "b": square}, {"x": x}


def test_flops_are_the_closed_form(shapes):
    """2 products forward, 3 backward (none for x), each of 2 rows width^2."""
    params, batch = shapes
    closed = 5 * 2 * ROWS * WIDTH**2
    counted = utilisation.model_flops(loss, params, {}, batch, jnp.arange(ROWS))
    assert closed <= counted < 1.02 * closed


def test_recomputing_does_not_count(shapes):
    """The control: with rematerialisation the program has one product more."""
    params, batch = shapes
    counted = utilisation.model_flops(loss, params, {}, batch, jnp.arange(ROWS))
    again = utilisation.model_flops(jax.checkpoint(loss), params, {}, batch, jnp.arange(ROWS))
    assert again > 1.15 * counted


def test_share_of_the_chips(shapes):
    params, batch = shapes
    cfg = Config(data=Data(batch_size=2 * ROWS), optim=Optim(accumulate=2))
    devices = grid(1, 2)
    assert utilisation.share(cfg, loss, params, {}, devices, batch) is None
    chips = [SimpleNamespace(device_kind=kind) for kind in ("TPU v4", "TPU v6 lite")]
    assert utilisation.peak(chips) == 275e12 + 918e12
    assert utilisation.peak([*chips, SimpleNamespace(device_kind="cpu")]) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(utilisation.PEAK, devices.devices.flat[0].device_kind, 1e12)
        share = utilisation.share(cfg, loss, params, {}, devices, batch)
    assert share == pytest.approx(5 * 2 * WIDTH**2 / 2e12, rel=0.02)
