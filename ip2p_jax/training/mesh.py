# SPDX-License-Identifier: Apache-2.0
"""The device mesh ("data", "fsdp") and the one rule by which arrays are laid out on it.

Batches are split over both axes; large arrays of the state over "fsdp". Axis types are Auto: XLA's
partitioner inserts the communication.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ip2p_jax import config

SMALLEST = 2**14
"""Arrays with fewer elements are copied to every device: splitting costs more than it saves."""


def make_mesh(cfg: config.Mesh) -> jax.sharding.Mesh:
    """Arranges all devices of all processes; raises ValueError when `cfg` does not fit them."""
    total = jax.device_count()
    data = cfg.data if cfg.data != -1 else total // max(cfg.fsdp, 1)
    fsdp = cfg.fsdp if cfg.fsdp != -1 else total // max(data, 1)
    if data < 1 or fsdp < 1 or data * fsdp != total:
        raise ValueError(
            f"config.mesh.data={cfg.data} x config.mesh.fsdp={cfg.fsdp} != {total} devices"
        )
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


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


def put_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Puts this host's rows of a batch (numpy arrays) on its devices, as one global batch."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
