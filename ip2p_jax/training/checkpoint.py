# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, its stored configuration, and the rules for going on with it.

DIR/checkpoints/STEP holds the items `train` (the state without its EMA), `ema` (the parameters
that editing needs, restorable alone), `data` (the loader's position) and `config`. A step appears
under its name when it is complete, so a killed save leaves nothing that would be read.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ip2p_jax import config
from ip2p_jax.data.manifest import load_manifest
from ip2p_jax.training import logs
from ip2p_jax.types import TrainState

CONFIG = "config.json"
FREE = (
    *("steps", "mesh.", "checkpoint.", "log."),
    *("data.path", "data.workers", "data.threads", "data.check_hashes"),
)
"""Keys a run may change when it goes on: none of them changes what a step computes. Data may move,
as long as its contents stay."""


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


def as_json(cfg: config.Config) -> dict:
    """The tree as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def record(cfg: config.Config) -> dict:
    """What DIR/config.json holds: `cfg`, and a digest of its data, which may move.

    Raises ValueError or FileNotFoundError if `cfg.data.path` is no data folder.
    """
    tree, shards = as_json(cfg), load_manifest(Path(cfg.data.path))
    tree["data"]["contents"] = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    return tree


def check_config(workdir: str, cfg: config.Config, override: list[str], fresh: bool) -> None:
    """Compares `cfg` with what the run has stored, unless it is `fresh`: then there is no
    checkpoint to be true to.

    A key that the run has not stored is younger than the run, which so far had its default. Raises
    ValueError naming the first key that differs, unless it is in `override` or free to change
    (`FREE`), or a key in `override` that does not exist.
    """
    path, wanted = epath.Path(workdir) / CONFIG, config.flatten(record(cfg))
    stored = wanted
    if path.exists() and not fresh:
        defaults = config.flatten(as_json(config.Config()))
        stored = wanted | defaults | config.flatten(json.loads(path.read_text()))
    for key in override:
        if key not in stored:
            raise ValueError(f"--override={key}: there is no config.{key}, see --help")
    for name in sorted(stored):
        if stored[name] == wanted.get(name) or name.startswith(FREE):
            continue
        key, was, now = name, repr(stored[name]), repr(wanted.get(name))
        if name == "data.contents":
            key, was, now = "data.path", "other pairs", f"those in {cfg.data.path}"
        if key not in override:
            raise ValueError(
                f"config.{key}: the run in {workdir} has {was}, this command {now}; "
                f"add --override={key} to go on with the new value"
            )


def store_config(workdir: str, cfg: config.Config) -> None:
    """Writes DIR/config.json, with which the next command will be compared."""
    logs.write_json(epath.Path(workdir) / CONFIG, record(cfg))
