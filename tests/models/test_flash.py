# SPDX-License-Identifier: Apache-2.0
"""Claims: attention through JAX's TPU kernel, computed step by step on the CPU, is the plain one
with its gradient, rows split over four devices; it is used where it serves and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ip2p_jax.models import flash
from ip2p_jax.models.attention import Place, attend

SELF = Place("down_blocks.0.attentions.0.transformer_blocks.0", False, 32, 32)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))


def draws(rows: int, positions: int, heads: int, width: int):
    """Queries, keys, values, and what comes back to the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (rows, positions, heads, width)) for key in keys]


def results(how, q, k, v, upstream):
    """Output and gradients."""
    out, back = jax.vjp(jax.jit(lambda *qkv: how(SELF, *qkv)), q, k, v)
    return [out, *back(upstream)]


def error(got, want) -> float:
    return float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))


@pytest.mark.parametrize(("positions", "heads", "width"), [(1024, 2, 40), (1152, 1, 16)])
def test_the_kernel_is_plain_attention(mesh, positions, heads, width):
    """At the width of SD 1.5's heads, and at positions that take the smallest blocks. Another
    scale of the queries misses."""
    drawn = draws(4, positions, heads, width)
    kernel = flash.flash_attend(mesh, interpret=True)
    want = results(attend, *drawn)
    assert max(map(error, results(kernel, *drawn), want)) < 1e-5
    q, *rest = drawn
    assert min(map(error, results(kernel, 1.1 * q, *rest), want)) > 1e-2


def uses_kernel(mesh, place, rows=4, positions=1024, dtype=jnp.bfloat16) -> bool:
    x = jax.ShapeDtypeStruct((rows, positions, 2, 40), dtype)
    how = flash.flash_attend(mesh)
    return "pallas_call" in str(jax.make_jaxpr(lambda *qkv: how(place, *qkv))(x, x, x))


def test_where_the_kernel_serves(mesh):
    assert uses_kernel(mesh, SELF)
    assert not uses_kernel(mesh, SELF._replace(cross=True))
    assert not uses_kernel(mesh, None)  # the VAE's
    assert not uses_kernel(mesh, SELF, rows=6)  # two devices would have none
    assert not uses_kernel(mesh, SELF, positions=256)
    assert not uses_kernel(mesh, SELF, positions=1080)  # no block divides them
    assert not uses_kernel(mesh, SELF, dtype=jnp.float32)


def test_only_a_tpu_has_it(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert flash.attend_on(sharding) is attend
