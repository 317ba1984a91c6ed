# SPDX-License-Identifier: Apache-2.0
"""Trains an editor, or the autoencoder of a small one. The same command again resumes the run.

python -m ip2p_jax.train --config configs/X.py --workdir DIR [--config.optim.lr=3e-5 ...]
  --override=KEY  go on although KEY (e.g. optim.lr) differs from the stored one; repeatable
  --distributed   one of several hosts, as found around (TPU pods, Slurm, Open MPI, Kubernetes)
  --dry-run       print shapes, shardings and bytes a device, and leave
  --push=USER/NAME  publish the finished run on the hub, as a diffusers folder with a card
  --coordinator=ADDRESS:PORT --hosts=N --host=I   the same by hand; host 0 is at ADDRESS

DIR then holds config.json, base/ (what is frozen), checkpoints/, metrics.jsonl, TensorBoard events
and samples/. SIGTERM saves on all hosts and exits 0. Wrong input: one line and exit code 2. Exit
code 1: one line where too many steps in a row are not finite, too many records are broken or the
last step cannot be saved; the stacks of all threads where no step ends for config.watchdog seconds;
a traceback for any other fault.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices

from ip2p_jax import config
from ip2p_jax.cli import one_line_errors, set_up_jax
from ip2p_jax.data.loader import TooManyBroken
from ip2p_jax.jobs import join
from ip2p_jax.publish import check_push, open_repository, publish
from ip2p_jax.storage import StorageError
from ip2p_jax.training import logs
from ip2p_jax.training.opening import Ready, dry_run, set_up
from ip2p_jax.training.watchdog import Watchdog


def train(cfg: config.Config, workdir: str, run: Ready) -> bool:
    """Trains to the last step, or until SIGTERM; returns whether the last step is done."""
    current, saver = run.start, run.saver
    begin = int(current.step)
    shares: dict[Any, float | None] = {}  # of the devices' FLOPs, by the shapes of a batch
    dog = Watchdog(cfg.watchdog)
    with (
        contextlib.closing(dog),
        run.opened,
        logs.open_logs(workdir, begin, cfg, dog.beat, run.board) as log,
    ):
        with dog.patient():
            saver.save(current, log.say)  # step 0 of a new run
        for at in range(begin + 1, cfg.steps + 1):
            batch = log.next(run.batches)
            shapes = tuple(x.shape for x in batch)
            compiles = shapes not in shares  # for there was no batch of these shapes before
            with aside(log, dog) if compiles else contextlib.nullcontext():
                if compiles:
                    shares[shapes] = run.flops_share(batch)
                log.flops_share = shares[shapes]
                log.profile(at)
                current, metrics = run.advance(current, batch)
                log.add(at, metrics)
            dog.beat()
            stopping, done = run.stop(at), at == cfg.steps
            last = stopping or done
            due = last or at % cfg.checkpoint.every == 0
            if due or at % cfg.log.every == 0:
                log.flush(cfg.data.batch_size, run.broken)
                due = due or saver.is_due(at, log.say)
            if due and log.skipping and not last:  # what is wrong is not known yet
                saver.postpone(at)
                due = False
            if due:
                with aside(log, dog):
                    (saver.finish if last else saver.save)(current, log.say)
            if stopping and not done:  # without pictures: there may be little time left
                log.say(f"SIGTERM: saved step {at}")
                return False
            if run.validate and (done or at % cfg.log.validation_every == 0):
                with aside(log, dog):
                    log.tell_of(at, run.validate(current.ema))
            if run.draw and (done or at % cfg.log.samples_every == 0):
                with aside(log, dog):
                    log.grid(at, run.draw(current.ema))
        with dog.patient():
            run.finish(current.ema)
    return True


@contextlib.contextmanager
def aside(log: logs.Logs, dog: Watchdog) -> Iterator[None]:
    """For what is no step, or one that compiles: not timed, and waited for longer."""
    with log.paused(), dog.patient():
        yield


def leave_with_traceback(*error: Any) -> None:
    """Ends a host that failed."""
    traceback.print_exception(*error)
    leave(1)


def leave(code: int) -> None:
    """Ends the process; one that failed at once, without waiting for what the other hosts do."""
    if code and jax.process_count() > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done or stopped by SIGTERM, 1 the training failed, 2 wrong input."""
    command = config.parse(sys.argv[1:] if argv is None else argv)
    if command is None:
        print((__doc__ or "").split("\n", 2)[2])
        print("\n".join(["Options and their defaults:", *config.describe(config.Config())]))
        return 0
    set_up_jax()
    distributed = join(command.hosts, command.config.heartbeat)
    if distributed:
        sys.excepthook = leave_with_traceback
    if command.push:
        check_push(command.push, command.config)
    if command.dry_run:
        lines = list(dry_run(command.config))
        if logs.writes():
            print("\n".join(lines))
        return 0
    if command.push and logs.writes():
        open_repository(command.push)
    run = set_up(command.config, command.workdir, command.override, distributed)
    try:
        done = train(command.config, command.workdir, run)
    except FloatingPointError as error:
        print(f"error: {error}; the checkpoint before it is kept", file=sys.stderr)
        return 1
    except (StorageError, TooManyBroken) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # no fault of the input: it keeps its traceback
        raise RuntimeError("the training failed") from error
    if command.push and done:
        code = send(command) if logs.writes() else 0
        sync_global_devices("published")  # a host that left earlier would end the one that uploads
        return code
    return 0


def send(command: config.Command) -> int:
    """Publishes the finished run; 1 if the hub refuses it."""
    try:
        print(publish(command.workdir, command.push))
        return 0
    except OSError as error:
        print(f"error: {error}; the same command uploads it", file=sys.stderr)
        return 1


if __name__ == "__main__":
    leave(main())
