# SPDX-License-Identifier: Apache-2.0
"""What a run is watched by: samples and a loss, of examples that it is not trained on.

Both are of the EMA, and of the same examples and the same noise each time.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ip2p_jax import config
from ip2p_jax.data.loader import Loader
from ip2p_jax.data.manifest import load_manifest
from ip2p_jax.training import mesh
from ip2p_jax.training.state import Loss, row_keys
from ip2p_jax.training.tasks.task import Sample
from ip2p_jax.types import Params

SPLIT = "validation"


def held_out(data: config.Data, rows: int) -> config.Data:
    """`data`, with batches of `rows` of the validation split; of its own if that is empty."""
    there = any(shard.records for shard in load_manifest(Path(data.path)).get(SPLIT, ()))
    split = SPLIT if there else data.split
    return dataclasses.replace(
        data, split=split, fraction=1.0, mix="", batch_size=rows, workers=0, check_hashes=False
    )


def sampler(
    cfg: config.Config,
    sample: Sample,
    frozen: Params,
    load: Callable[..., Loader],
    devices: jax.sharding.Mesh,
) -> Callable[[Params], list[np.ndarray]]:
    """Returns `draw(ema)`: the first picture of each held-out example, what is made of the example,
    and its other pictures, as uint8. Latents are no pictures."""
    with contextlib.closing(load(held_out(cfg.data, cfg.log.samples), seed=cfg.seed)) as batches:
        fixed = next(batches)
    batch = mesh.put_whole(devices, fixed)
    sample = jax.jit(sample, out_shardings=mesh.replicated(devices))

    def draw(ema: Params) -> list[np.ndarray]:
        pictures = [x for x in fixed if x.dtype == np.uint8]
        return [*pictures[:1], np.asarray(sample(ema, frozen, batch)), *pictures[1:]]

    return draw


def validator(
    cfg: config.Config,
    loss: Loss,
    frozen: Params,
    load: Callable[..., Loader],
    devices: jax.sharding.Mesh,
) -> Callable[[Params], dict[str, float]]:
    """Returns `validate(ema)`: the loss, and what else the loss logs, each named validation_*.

    Over `cfg.log.validation_batches` micro-batches, whose rows all hosts share. Raises ValueError
    for a data folder without a validation split.
    """
    count, rows = cfg.log.validation_batches, cfg.data.batch_size // cfg.optim.accumulate
    data = held_out(cfg.data, rows)
    if data.split != SPLIT:
        raise ValueError(
            f"config.log.validation_every is {cfg.log.validation_every}: {cfg.data.path} has no "
            "validation pairs"
        )
    hosts = {"host_index": jax.process_index(), "host_count": jax.process_count()}
    with contextlib.closing(load(data, seed=cfg.seed, **hosts)) as batches:
        fixed = [next(batches) for _ in range(count)]
    places = jnp.asarray(mesh.rows_in_place(devices, rows))

    def measure(ema: Params, frozen: Params, batch: Any, i: Any) -> dict[str, Any]:
        keys = row_keys(jax.random.fold_in(jax.random.key(0), i), places)
        value, metrics = loss(ema, frozen, batch, keys)
        return {"loss": jnp.stack([value, jnp.ones(())]), **metrics}

    measured = jax.jit(measure, out_shardings=mesh.replicated(devices))

    def validate(ema: Params) -> dict[str, float]:
        each = [
            jax.device_get(measured(ema, frozen, mesh.put_batch(devices, batch), i))
            for i, batch in enumerate(fixed)
        ]
        totals = {name: np.sum([metrics[name] for metrics in each], axis=0) for name in each[0]}
        return {f"validation_{name}": float(v / w) for name, (v, w) in totals.items() if w > 0}

    return validate
