# SPDX-License-Identifier: Apache-2.0
"""Trains an editor, or the autoencoder of a small one. The same command again resumes the run.

python -m ip2p_jax.train --config configs/X.py --workdir DIR [--config.optim.lr=3e-5 ...]
  --override=KEY  go on although KEY (e.g. optim.lr) differs from the stored one; repeatable
  --distributed   one of several hosts: jax.distributed.initialize() before anything else

DIR then holds config.json, base/ (what is frozen), checkpoints/, metrics.jsonl, TensorBoard events
and samples/. SIGTERM saves and exits 0; a loss that is not finite ends the run with exit code 1.
"""

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from ip2p_jax import config
from ip2p_jax.cli import cache_compilations, one_line_errors
from ip2p_jax.data.loader import make_loader
from ip2p_jax.training import checkpoint, logs, mesh, optim, runs, state
from ip2p_jax.types import Params


def watch_sigterm(manager: ocp.CheckpointManager, distributed: bool) -> Callable[[int], bool]:
    """Returns `stop(step)`: whether to save and leave. All hosts agree on the step."""
    if distributed:  # jax listens for the signal itself and tells the other hosts
        return manager.reached_preemption
    event = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: event.set())
    return lambda step: event.is_set()


def train(cfg: config.Config, workdir: str, override: list[str], distributed: bool) -> None:
    """Runs `cfg` in `workdir` from its newest checkpoint, or from the start, to its last step."""
    devices = mesh.make_mesh(cfg.mesh)
    if cfg.data.batch_size % devices.size:
        raise ValueError(
            f"config.data.batch_size is {cfg.data.batch_size}, expected a multiple of the "
            f"{devices.size} devices"
        )
    everywhere = mesh.replicated(devices)
    with checkpoint.open_manager(workdir, cfg.checkpoint) as manager:
        stop = watch_sigterm(manager, distributed)
        fresh = manager.latest_step() is None
        checkpoint.check_config(workdir, cfg, override, fresh)

        # What is trained: shapes -> shardings -> arrays.
        task, tokenizer, finish = runs.prepare(cfg, workdir, fresh)
        tx = optim.make_optimizer(cfg.optim)
        shapes = state.abstract_state(*task.start, tx)
        shardings = mesh.state_shardings(devices, shapes)
        frozen = jax.device_put(task.frozen, everywhere)
        key = jax.jit(lambda: state.run_keys(cfg.seed)[1], out_shardings=everywhere)()
        step = state.make_step(task.loss, tx, cfg.optim.ema_decay)
        step = state.jit_step(step, shardings, everywhere)

        # Go on from the newest checkpoint, or begin and save step 0.
        if fresh:
            current, position = state.init_state(*task.start, tx, shardings), {"batch": 0}
        else:
            current, position = checkpoint.restore(manager, shapes, shardings)
        batches = make_loader(
            cfg.data,
            tokenizer,
            seed=cfg.seed,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            start=position["batch"],
        )
        if fresh:
            checkpoint.save(manager, current, batches.get_state(), cfg)
        draw = sampler(cfg, task, frozen, tokenizer, everywhere)

        begin, stopping = int(current.step), False
        with logs.open_logs(workdir, begin, cfg.steps) as log:
            for at in range(begin + 1, cfg.steps + 1):
                batch = mesh.put_batch(devices, next(batches))
                current, metrics = step(current, frozen, batch, key)
                log.add(at, metrics)
                stopping = stop(at)
                last = stopping or at == cfg.steps
                saving = last or at % cfg.checkpoint.every == 0
                if saving or at % cfg.log.every == 0:
                    log.flush(cfg.data.batch_size)
                if saving:
                    checkpoint.save(manager, current, batches.get_state(), cfg)
                if cfg.log.samples_every and (last or at % cfg.log.samples_every == 0):
                    log.grid(at, draw(current.ema))
                if stopping:
                    log.say(f"SIGTERM: saved step {at}")
                    break
        manager.wait_until_finished()
        if not stopping:
            finish(current.ema, batches)


def sampler(cfg, task, frozen, tokenizer, everywhere) -> Callable[[Params], list[np.ndarray]]:
    """Returns `draw(ema)`: input, result and truth of the run's first pairs, as uint8."""
    data = dataclasses.replace(cfg.data, batch_size=cfg.log.samples, workers=0, check_hashes=False)
    fixed = next(make_loader(data, tokenizer, seed=cfg.seed, host_index=0, host_count=1, start=0))
    batch = jax.device_put(fixed, everywhere)
    sample = jax.jit(task.sample, out_shardings=everywhere)

    def draw(ema: Params) -> list[np.ndarray]:
        result = logs.to_uint8(np.asarray(sample(ema, frozen, batch)))
        return [fixed.input, result, fixed.output]

    return draw


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done or stopped by SIGTERM, 1 the loss is not finite, 2 wrong input."""
    command = config.parse(sys.argv[1:] if argv is None else argv)
    if command is None:
        print((__doc__ or "").split("\n", 2)[2])
        print("\n".join(["Options and their defaults:", *config.describe(config.Config())]))
        return 0
    cache_compilations()
    if command.distributed:
        jax.distributed.initialize()
    try:
        train(*command)
    except FloatingPointError as error:
        print(f"error: {error}; the checkpoint before it is kept", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
