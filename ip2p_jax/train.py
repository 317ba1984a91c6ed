# SPDX-License-Identifier: Apache-2.0
"""Trains an editor, or the autoencoder of a small one. The same command again resumes the run.

python -m ip2p_jax.train --config configs/X.py --workdir DIR [--config.optim.lr=3e-5 ...]
  --override=KEY  go on although KEY (e.g. optim.lr) differs from the stored one; repeatable
  --distributed   one of several hosts: jax.distributed.initialize() before anything else

DIR then holds config.json, base/ (what is frozen), checkpoints/, metrics.jsonl, TensorBoard events
and samples/. SIGTERM saves and exits 0; a loss that is not finite ends the run with exit code 1, in
one line, as does any other fault of the training, with its traceback. Wrong input: exit code 2.
"""

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from ip2p_jax import config
from ip2p_jax.cli import cache_compilations, one_line_errors
from ip2p_jax.data.loader import make_loader
from ip2p_jax.jobs import find_hosts
from ip2p_jax.training import checkpoint, logs, mesh, optim, runs, state
from ip2p_jax.training.tasks import Sample
from ip2p_jax.types import Params, TrainState


def watch_sigterm(manager: ocp.CheckpointManager, distributed: bool) -> Callable[[int], bool]:
    """Returns `stop(step)`: whether to save and leave. All hosts agree on the step."""
    if distributed:  # jax listens for the signal itself and tells the other hosts
        return manager.reached_preemption
    event = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: event.set())
    return lambda step: event.is_set()


class Ready(NamedTuple):
    """A run whose input has all been read and checked: what the loop calls."""

    start: TrainState
    advance: Callable[[TrainState], tuple[TrainState, state.Metrics]]
    stop: Callable[[int], bool]
    save: Callable[[TrainState], None]
    draw: Callable[[Params], list[np.ndarray]] | None
    finish: Callable[[Params], None]
    opened: contextlib.ExitStack  # what to close in the end


def set_up(cfg: config.Config, workdir: str, override: list[str], distributed: bool) -> Ready:
    """Opens the run in `workdir` at its newest checkpoint, or begins it and saves step 0.

    Raises ValueError or OSError, in one line, for whatever is wrong with the input.
    """
    devices = mesh.make_mesh(cfg.mesh)
    rows = mesh.rows_in_place(devices, cfg.data.batch_size)
    with contextlib.ExitStack() as opened:
        manager = opened.enter_context(checkpoint.open_manager(workdir, cfg.checkpoint))
        stop = watch_sigterm(manager, distributed)
        fresh = manager.latest_step() is None
        checkpoint.check_config(workdir, cfg, override, fresh)
        task, tokenizer, finish = runs.prepare(cfg, workdir, fresh)
        hosts = {"host_index": jax.process_index(), "host_count": jax.process_count()}
        batches = make_loader(cfg.data, tokenizer, seed=cfg.seed, **hosts)
        opened.callback(batches.close)
        tx = optim.make_optimizer(cfg.optim)
        current, shardings, position = open_state(manager, task.start, tx, devices)
        batches.set_state(position)
        checkpoint.store_config(workdir, cfg)

        everywhere = mesh.replicated(devices)
        frozen = mesh.put_whole(devices, task.frozen, runs.compute_type(cfg))
        key = jax.jit(lambda: state.run_keys(cfg.seed)[1], out_shardings=everywhere)()
        step = state.make_step(task.loss, tx, cfg.optim.ema_decay, rows)
        step = state.jit_step(step, shardings, everywhere)
        placed = map(functools.partial(mesh.put_batch, devices), batches)

        def save(current: TrainState) -> None:
            checkpoint.save(manager, current, batches.get_state(), cfg)

        def end(ema: Params) -> None:
            manager.wait_until_finished()
            finish(ema, placed)

        if fresh:
            save(current)
        return Ready(
            start=current,
            advance=lambda current: step(current, frozen, next(placed), key),
            stop=stop,
            save=save,
            draw=sampler(cfg, task.sample, frozen, tokenizer, devices),
            finish=end,
            opened=opened.pop_all(),
        )


def open_state(
    manager: ocp.CheckpointManager,
    start: state.Start,
    tx: optax.GradientTransformation,
    devices: jax.sharding.Mesh,
) -> tuple[TrainState, Any, dict]:
    """Returns the state, its shardings and the loader's position: the newest saved, or the first.

    Shapes -> shardings -> arrays, so that nothing is ever whole on one device.
    """
    shapes = state.abstract_state(start, tx)
    shardings = mesh.state_shardings(devices, shapes)
    if manager.latest_step() is None:
        return state.init_state(start, tx, shardings), shardings, {"batch": 0}
    current, position = checkpoint.restore(manager, shapes, shardings)
    return current, shardings, position


def sampler(
    cfg: config.Config, sample: Sample, frozen: Params, tokenizer: Any, devices: jax.sharding.Mesh
) -> Callable[[Params], list[np.ndarray]] | None:
    """Returns `draw(ema)`: input, result and truth of the run's first pairs, as uint8.

    None, and nothing is built, if `cfg` asks for no grids.
    """
    if not cfg.log.samples_every:
        return None
    data = dataclasses.replace(cfg.data, batch_size=cfg.log.samples, workers=0, check_hashes=False)
    with contextlib.closing(make_loader(data, tokenizer, seed=cfg.seed)) as batches:
        fixed = next(batches)
    batch = mesh.put_whole(devices, fixed)
    sample = jax.jit(sample, out_shardings=mesh.replicated(devices))

    def draw(ema: Params) -> list[np.ndarray]:
        return [fixed.input, np.asarray(sample(ema, frozen, batch)), fixed.output]

    return draw


def train(cfg: config.Config, workdir: str, run: Ready) -> None:
    """Trains to the last step, or until SIGTERM."""
    current = run.start
    begin, stopping = int(current.step), False
    with run.opened, logs.open_logs(workdir, begin, cfg.steps) as log:
        for at in range(begin + 1, cfg.steps + 1):
            current, metrics = run.advance(current)
            log.add(at, metrics)
            stopping = run.stop(at)
            last = stopping or at == cfg.steps
            saving = last or at % cfg.checkpoint.every == 0
            if saving or at % cfg.log.every == 0:
                log.flush(cfg.data.batch_size)
            if saving:
                with log.paused():
                    run.save(current)
            if run.draw and (last or at % cfg.log.samples_every == 0):
                with log.paused():
                    log.grid(at, run.draw(current.ema))
            if stopping:
                log.say(f"SIGTERM: saved step {at}")
                return
        run.finish(current.ema)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done or stopped by SIGTERM, 1 the training failed, 2 wrong input."""
    command = config.parse(sys.argv[1:] if argv is None else argv)
    if command is None:
        print((__doc__ or "").split("\n", 2)[2])
        print("\n".join(["Options and their defaults:", *config.describe(config.Config())]))
        return 0
    cache_compilations()
    if command.distributed:
        find_hosts()
    run = set_up(*command)
    try:
        train(command.config, command.workdir, run)
    except FloatingPointError as error:
        print(f"error: {error}; the checkpoint before it is kept", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # no fault of the input: it keeps its traceback
        raise RuntimeError("the training failed") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
