# SPDX-License-Identifier: Apache-2.0
"""The device mesh ("data", "fsdp") and the one rule by which arrays are laid out on it.

Batches are split over both axes; large arrays of the state over "fsdp". Axis types are Auto: XLA's
partitioner inserts the communication.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Int

from ip2p_jax import config

SMALLEST = 2**14
"""Arrays with fewer elements are copied to every device: splitting costs more than it saves."""


def make_mesh(cfg: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Arranges devices (None: all of all processes); raises ValueError when `cfg` does not fit."""
    total = jax.device_count() if devices is None else len(devices)
    data = cfg.data if cfg.data != -1 else total // max(cfg.fsdp, 1)
    fsdp = cfg.fsdp if cfg.fsdp != -1 else total // max(data, 1)
    if data < 1 or fsdp < 1 or data * fsdp != total:
        raise ValueError(
            f"config.mesh.data={cfg.data} x config.mesh.fsdp={cfg.fsdp} != {total} devices"
        )
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axis_types, devices=devices)


def fsdp_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits an array along its largest axis that `fsdp` divides, the last of equal ones."""
    axes = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or int(np.prod(shape)) < SMALLEST or not axes:
        return PartitionSpec()
    _, axis = max(axes)
    return PartitionSpec(*["fsdp" if i == axis else None for i in range(len(shape))])


def state_shardings(mesh: jax.sharding.Mesh, abstract: Any) -> Any:
    """Returns the sharding of every leaf of `abstract` (anything with shapes)."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: NamedSharding(mesh, fsdp_spec(x.shape, fsdp)), abstract)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: frozen parameters, keys, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts an array that every host holds whole on devices, each of which gets its part only.

    Nothing is copied among hosts or compared, as jax.device_put does.
    """
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def put_whole(mesh: jax.sharding.Mesh, tree: Any, dtype: DTypeLike = jnp.float32) -> Any:
    """Puts all of every array on each device, numbers that are not integers as `dtype`."""

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        x = x.astype(dtype, copy=False) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return put(x, replicated(mesh))

    return jax.tree.map(place, tree)


def rows_in_place(mesh: jax.sharding.Mesh, rows: int, accumulate: int = 1) -> Int[np.ndarray, " b"]:
    """Returns which row of the global batch lies at each place of the batch on the devices.

    Each host reads consecutive rows, but a mesh may arrange the devices of hosts in any order.
    Raises ValueError for a batch that cannot be split over the devices, and there into `accumulate`
    micro-batches.
    """
    if rows % (mesh.size * accumulate):
        raise ValueError(
            f"config.data.batch_size is {rows}, expected a multiple of {mesh.size * accumulate}: "
            f"{mesh.size} devices x config.optim.accumulate={accumulate}"
        )
    return in_place([device.process_index for device in mesh.devices.flat], rows)


def in_place(hosts: list[int], rows: int) -> Int[np.ndarray, " b"]:
    """`rows_in_place` for devices of these hosts: those of host 0 hold the first rows, ..."""
    by_host = np.argsort(np.repeat(hosts, rows // len(hosts)), kind="stable")
    return np.argsort(by_host)


def put_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Puts this host's rows of a batch (numpy arrays) on its devices, as one global batch."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
