# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, its stored configuration, and the rules for going on with it.

DIR/checkpoints/STEP holds the items `train` (the state without its EMA), `ema` (the parameters
that editing needs, restorable alone), `data` (the loader's position) and `config`. A step appears
under its name when it is complete, its digests among it, so a killed save leaves nothing that would
be read. A step that no longer is what was written is set aside, to DIR/damaged.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ip2p_jax import config, digests
from ip2p_jax.data.manifest import load_manifest
from ip2p_jax.training import logs
from ip2p_jax.types import TrainState

CONFIG = "config.json"
ITEMS = ("train", "ema", "data", "config")
TEMPORARY = ".orbax-checkpoint-tmp"
"""What the name of a folder has in it while a step is being written."""

FREE = (
    *("steps", "mesh.", "checkpoint.", "log.", "watchdog", "heartbeat"),
    *("data.path", "data.workers", "data.threads", "data.check_hashes", "data.broken"),
    *("optim.max_skipped", "remat"),
)
"""Keys a run may change when it goes on: none of them changes what a step computes. Data may move,
as long as its contents stay."""


def open_manager(workdir: str, cfg: config.Checkpoint) -> ocp.CheckpointManager:
    """Opens DIR/checkpoints; saving goes on in the background while training does.

    What killed saves left is removed. Digests are written by process 0, when all hosts have written
    their part: they share the folder anyway, and only then is the whole of it known.
    """
    root = digests.directory(workdir)
    clear(root)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=cfg.keep,
        create=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: write_digests(root)),
    )
    return ocp.CheckpointManager(root, item_names=ITEMS, options=options)


def temporaries(root: epath.Path) -> list[epath.Path]:
    """Steps that are being written, or were when their process was killed.

    A bucket renames nothing: there a step has its name early, and a file that says it is complete.
    """

    def is_temporary(path: epath.Path) -> bool:
        unfinished = "://" in str(root) and not (path / "commit_success.txt").exists()
        return TEMPORARY in path.name or path.name.isdecimal() and unfinished

    return [path for path in root.iterdir() if is_temporary(path)] if root.is_dir() else []


def clear(root: epath.Path) -> None:
    """Removes steps that are not complete."""
    if logs.writes():
        for path in temporaries(root):
            path.rmtree(missing_ok=True)


def write_digests(root: epath.Path) -> None:
    """Writes the digests of the step that is about to be renamed: there is only one."""
    for path in temporaries(root):
        digests.write(path)


def is_fresh(workdir: str) -> bool:
    """Whether the run has no checkpoint yet; process 0 looks and tells the others, to whom a shared
    disk may show what it held seconds ago."""
    root = digests.directory(workdir)
    fresh = not (logs.writes() and root.is_dir() and ocp.utils.checkpoint_steps(root))
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(fresh)))


def newest(workdir: str, say: Callable[[str], None]) -> int:
    """Returns the newest step that is whole; process 0 finds it and tells the others.

    Newer ones are set aside, and `say` is told what is wrong with them. Raises ValueError where
    none is whole.
    """
    root = digests.directory(workdir)
    step, fault = -1, "no checkpoint is whole, see what process 0 says"
    if logs.writes():
        try:
            step, faults = digests.newest(root, ITEMS)
            for damaged, wrong in faults.items():
                set_aside(root, damaged)
                say(f"step {damaged} is damaged ({wrong}); it is now in {root.parent / 'damaged'}")
            if faults:
                say(f"going on from step {step}")
        except ValueError as error:
            fault = str(error)
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step < 0:
        raise ValueError(fault)
    return step


def set_aside(root: epath.Path, step: int) -> None:
    """Moves a step to DIR/damaged/STEP, in the place of an earlier one."""
    place = root.parent / "damaged" / str(step)
    if place.exists():
        place.rmtree()
    place.parent.mkdir(exist_ok=True)
    (root / str(step)).rename(place)


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
    manager: ocp.CheckpointManager, step: int, abstract: TrainState, shardings: Any
) -> tuple[TrainState, dict]:
    """Returns the state and the loader's position at a step.

    `abstract` gives shapes and types; another mesh than the one that saved is fine.
    """
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    restored = manager.restore(
        step,
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
    """What DIR/config.json holds: `cfg`, and digests of its data; that at `data.path` may move.

    Raises ValueError or FileNotFoundError if one of them is no data folder.
    """
    shards = [load_manifest(Path(folder)) for folder in config.folders(cfg.data)]
    contents = [hashlib.sha256(json.dumps(x).encode()).hexdigest() for x in shards]
    tree = as_json(cfg)
    tree["data"]["contents"] = " ".join(contents)
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
