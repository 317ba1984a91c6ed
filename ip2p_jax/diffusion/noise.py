# SPDX-License-Identifier: Apache-2.0
"""Noise that belongs to a row: one key each, so that the rest of the batch does not matter."""

import jax
from jaxtyping import Array, Float, Key


def unit_noise(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    """Unit normal noise of `shape` for each key. The keys must not be used for anything else."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
