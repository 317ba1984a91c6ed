# SPDX-License-Identifier: Apache-2.0
"""Opens a run: reads and checks all of its input, and puts it on devices."""

import contextlib
import functools
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ip2p_jax import config
from ip2p_jax.cli import check_writable
from ip2p_jax.training import (
    checkpoint,
    events,
    held_out,
    logs,
    mesh,
    optim,
    plan,
    runs,
    saving,
    state,
    utilisation,
)
from ip2p_jax.types import Params, TrainState


def watch_sigterm(distributed: bool) -> Callable[[int], bool]:
    """Returns `stop(step)`: whether to save and leave. All hosts agree on the step."""
    if distributed:  # jax listens for the signal itself and tells the other hosts
        return multihost_utils.reached_preemption_sync_point
    event = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: event.set())
    return lambda step: event.is_set()


class Ready(NamedTuple):
    """A run whose input has all been read and checked: what the loop calls."""

    start: TrainState
    batches: Iterator[Any]
    advance: Callable[[TrainState, Any], tuple[TrainState, state.Metrics]]
    stop: Callable[[int], bool]
    saver: saving.Saver
    broken: Sequence[str]  # why records were replaced; grows
    draw: Callable[[Params], list[np.ndarray]] | None
    validate: Callable[[Params], dict[str, float]] | None
    flops_share: Callable[[Any], float | None]  # of the devices' a second, given a batch
    board: Any  # of wandb, if asked for
    finish: Callable[[Params], None]
    opened: contextlib.ExitStack  # what to close in the end


def set_up(cfg: config.Config, workdir: str, override: list[str], distributed: bool) -> Ready:
    """Opens the run in `workdir` at its newest checkpoint that is whole, or begins it.

    Raises ValueError or OSError, in one line, for whatever is wrong with the input.
    """
    if "://" not in workdir:
        check_writable(Path(workdir))
    devices = mesh.make_mesh(cfg.mesh)
    rows = mesh.rows_in_place(devices, cfg.data.batch_size, cfg.optim.accumulate)
    with contextlib.ExitStack() as opened:
        stop = watch_sigterm(distributed)
        fresh = checkpoint.is_fresh(workdir)
        checkpoint.check_config(workdir, cfg, override, fresh)
        task, load, finish = runs.prepare(cfg, workdir, fresh, devices)
        hosts = {"host_index": jax.process_index(), "host_count": jax.process_count()}
        batches = load(cfg.data, seed=cfg.seed, **hosts)
        opened.callback(batches.close)
        tx = optim.make_optimizer(cfg.optim)
        newest = None if fresh else checkpoint.newest(workdir, logs.warn)
        manager = opened.enter_context(checkpoint.open_manager(workdir, cfg.checkpoint))
        current, shardings, position = open_state(manager, newest, task.start, tx, devices)
        batches.set_state(position)
        board = None
        if cfg.log.wandb and logs.writes():
            board = events.open_board(cfg.log.wandb, workdir, config.flatten(cfg))
        saver = saving.Saver(manager, cfg, batches.get_state, newest)
        opened.callback(saver.close, logs.warn)
        checkpoint.store_config(workdir, cfg)

        everywhere = mesh.replicated(devices)
        frozen = mesh.put_whole(devices, task.frozen, runs.compute_type(cfg))
        key = jax.jit(lambda: state.run_keys(cfg.seed)[1], out_shardings=everywhere)()
        step = state.make_step(task.loss, tx, cfg.optim, rows, devices)
        step = state.jit_step(step, shardings, everywhere, cfg.remat)
        placed = map(functools.partial(mesh.put_batch, devices), batches)

        return Ready(
            start=current,
            batches=placed,
            advance=lambda current, batch: step(current, frozen, batch, key),
            stop=stop,
            saver=saver,
            broken=batches.broken,
            draw=(
                held_out.sampler(cfg, task.sample, frozen, load, devices)
                if cfg.log.samples_every
                else None
            ),
            validate=(
                held_out.validator(cfg, task.loss, frozen, load, devices)
                if cfg.log.validation_every
                else None
            ),
            flops_share=functools.partial(
                utilisation.share, cfg, task.loss, task.start.shapes, frozen, devices
            ),
            board=board,
            finish=lambda ema: finish(ema, placed),
            opened=opened.pop_all(),
        )


def open_state(
    manager: ocp.CheckpointManager,
    step: int | None,
    start: state.Start,
    tx: optax.GradientTransformation,
    devices: jax.sharding.Mesh,
) -> tuple[TrainState, Any, dict]:
    """Returns the state, its shardings and the loader's position: of a saved step, or the first.

    Shapes -> shardings -> arrays, so that nothing is ever whole on one device.
    """
    shapes = state.abstract_state(start, tx)
    shardings = mesh.state_shardings(devices, shapes)
    if step is None:
        return state.init_state(start, tx, shardings), shardings, {"batch": 0}
    current, position = checkpoint.restore(manager, step, shapes, shardings)
    return current, shardings, position


def dry_run(cfg: config.Config) -> Iterator[str]:
    """Opens what a new run of `cfg` would read, and yields what it would hold; leaves nothing."""
    devices = mesh.make_mesh(cfg.mesh)
    mesh.rows_in_place(devices, cfg.data.batch_size, cfg.optim.accumulate)
    with tempfile.TemporaryDirectory() as scratch:
        task, load, _ = runs.prepare(cfg, scratch, True, devices)
        load(cfg.data, seed=cfg.seed).close()
        shapes = state.abstract_state(task.start, optim.make_optimizer(cfg.optim))
        shardings = mesh.state_shardings(devices, shapes)
        frozen_type = runs.compute_type(cfg)
        yield from plan.plan(cfg, shapes, shardings, task.frozen, frozen_type, devices)
