# SPDX-License-Identifier: Apache-2.0
"""Putting a model on devices: whole on each of them, batches split by row."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ip2p_jax.types import Params

THREADS = min(8, os.cpu_count() or 1)
"""That copy parameters: one alone waits for the pages of new memory, twice as long on 2 cores; more
than there are cores hold up what else is going on."""
ALIGNMENT = 64
"""Bytes, a multiple of which is the address of an array that XLA takes without a copy."""
TURNED = 8
"""Input channels of a convolution's kernel that are turned round at once."""


class Shardings(NamedTuple):
    """Over a mesh of one axis."""

    by_row: NamedSharding
    replicated: NamedSharding


def shardings(devices: Sequence[Any] | None = None) -> Shardings:
    """Over `devices`; None: all local ones, on the CPU only one, for they share the same cores."""
    if devices is None:
        devices = jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None]
    mesh = Mesh(np.asarray(devices), ("data",))
    return Shardings(
        NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    )


def put(params: Params, dtype: DTypeLike, sharding: NamedSharding) -> Params:
    """The parameters as arrays of `dtype` on the devices of `sharding`."""
    leaves, tree = jax.tree.flatten(params)
    with ThreadPoolExecutor(THREADS) as pool:
        arrays = pool.map(lambda x: jax.device_put(packed(x, dtype), sharding), leaves)
        return jax.tree.unflatten(tree, arrays)


def packed(x: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """A copy in C order that begins at a multiple of 64 bytes: XLA on the CPU takes it as it is.

    A convolution's kernel from a file (OIHW seen as HWIO) is turned round by a few input channels
    at a time, which is more than twice as fast as the whole at once.
    """
    dtype = np.dtype(dtype)
    room = np.empty(x.size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    y = room[start : start + x.size * dtype.itemsize].view(dtype).reshape(x.shape)
    channels = x.shape[-2] if x.ndim == 4 else 0
    for i in range(0, channels, TURNED):
        y[:, :, i : i + TURNED] = x[:, :, i : i + TURNED]
    if not channels:
        y[...] = x
    return y


def shapes(params: Params, dtype: DTypeLike, sharding: NamedSharding) -> Params:
    """What `put` gives, without the values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), params)
