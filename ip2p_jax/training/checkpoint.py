# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, its stored configuration, and the rules for going on with it.

DIR/checkpoints/STEP holds the items `train` (the state without its EMA), `ema` (the parameters
that editing needs, restorable alone), `data` (the loader's position) and `config`. A step appears
under its name when it is complete, so a killed save leaves nothing that would be read.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ip2p_jax import config
from ip2p_jax.training import logs
from ip2p_jax.types import TrainState

FREE = ("steps", "mesh.", "checkpoint.", "log.")
"""Keys a run may change when it goes on: none of them changes what a step computes."""


def open_manager(workdir: str, cfg: config.Checkpoint) -> ocp.CheckpointManager:
    """Opens DIR/checkpoints; saving goes on in the background while training does."""
    options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, create=True)
    names = ("train", "ema", "data", "config")
    return ocp.CheckpointManager(directory(workdir), item_names=names, options=options)


def directory(workdir: str) -> epath.Path:
    """DIR/checkpoints, absolute, as orbax wants it."""
    path = epath.Path(workdir)
    return (path if "://" in workdir else epath.Path(Path(workdir).absolute())) / "checkpoints"


def save(
    manager: ocp.CheckpointManager, state: TrainState, position: dict, cfg: config.Config
) -> None:
    """Saves `state` under its step; `position` is the loader's, as JSON."""
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            train=ocp.args.StandardSave(state._replace(ema=())),
            ema=ocp.args.StandardSave(state.ema),
            data=ocp.args.JsonSave(position),
            config=ocp.args.JsonSave(dataclasses.asdict(cfg)),
        ),
    )


def restore(
    manager: ocp.CheckpointManager, abstract: TrainState, shardings: Any
) -> tuple[TrainState, dict]:
    """Returns the state and the loader's position at the newest step.

    `abstract` gives shapes and types; another mesh than the one that saved is fine.
    """
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    restored = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(
            train=ocp.args.StandardRestore(target._replace(ema=())),
            ema=ocp.args.StandardRestore(target.ema),
            data=ocp.args.JsonRestore(),
        ),
    )
    return restored["train"]._replace(ema=restored["ema"]), restored["data"]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def check_config(workdir: str, cfg: config.Config, override: list[str], fresh: bool) -> None:
    """Compares `cfg` with the run's stored configuration, unless it is `fresh`, then stores `cfg`.

    Raises ValueError naming the first key that differs, unless it is in `override` or free to
    change (`FREE`). A fresh run has no checkpoint yet, so there is nothing to be true to.
    """
    path = epath.Path(workdir) / "config.json"
    new = json.loads(json.dumps(dataclasses.asdict(cfg)))
    if path.exists() and not fresh:
        stored, wanted = flatten(json.loads(path.read_text())), flatten(new)
        for name in sorted(stored.keys() | wanted.keys()):
            was, now = stored.get(name), wanted.get(name)
            if was != now and name not in override and not name.startswith(FREE):
                raise ValueError(
                    f"config.{name}: the run in {workdir} has {was!r}, this command {now!r}; "
                    f"add --override={name} to go on with the new value"
                )
    logs.write_json(path, new)
