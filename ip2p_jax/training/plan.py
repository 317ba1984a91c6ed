# SPDX-License-Identifier: Apache-2.0
"""What a run would hold on its devices: shapes, shardings and bytes, before anything is there."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

from ip2p_jax import config
from ip2p_jax.types import Params, TrainState


def plan(
    cfg: config.Config,
    abstract: TrainState,
    shardings: TrainState,
    frozen: Params,
    frozen_type: Any,
    devices: jax.sharding.Mesh,
) -> Iterator[str]:
    """Yields the lines of --dry-run.

    `abstract` and `shardings` are of the state, `frozen` is what every device holds whole, its
    numbers that are not integers as `frozen_type`.
    """
    kind = devices.devices.flat[0].device_kind
    yield f"{devices.size} devices ({kind}): data {devices.shape['data']}, fsdp " + (
        f"{devices.shape['fsdp']}; {jax.process_count()} hosts"
    )
    rows = cfg.data.batch_size
    yield (
        f"{cfg.steps} steps of {rows} rows, cut into {cfg.optim.accumulate} micro-batches: "
        f"{rows // cfg.optim.accumulate // devices.size} rows a device at once"
    )
    yield "parameters that are trained:"
    shapes, layouts = (paths(tree) for tree in (abstract.params, shardings.params))
    for name, x in shapes.items():
        yield f"  {name}  {x.dtype}{list(x.shape)}  {layouts[name].spec}"
    yield f"{sum(math.prod(x.shape) for x in shapes.values()):,} parameters are trained"
    parts = {
        "parameters": per_device(abstract.params, shardings.params),
        "EMA": per_device(abstract.ema, shardings.ema),
        "optimizer": per_device(abstract.opt_state, shardings.opt_state),
        "frozen": sum(
            x.size * (4 if x.dtype.kind in "iu" else frozen_type.itemsize)
            for x in jax.tree.leaves(frozen)
        ),
    }
    parts["gradients"] = parts["parameters"]
    for name, size in parts.items():
        yield f"{name + ':':12} {size / 2**30:9.3f} GiB a device"
    yield f"{'in all:':12} {sum(parts.values()) / 2**30:9.3f} GiB a device, and activations"


def paths(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(getattr(k, "key", k)) for k in path): x for path, x in leaves}


def per_device(abstract: Any, shardings: Any) -> int:
    """Bytes that one device holds."""

    def size(x: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, abstract, shardings)))
