# SPDX-License-Identifier: Apache-2.0
"""Saves that go on in the background, and that are tried again when storage fails.

Training goes on meanwhile: a save that failed is followed by one of a later step, after 1, 2, 4 or
more lines of the log. What was written of it is removed, so that a full disk does not fill more.

A save of a thousand arrays begins with half a second of Python. Where a process trains alone, a
thread spends it, on the state in host memory; hosts that save together do so between two steps.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp

from ip2p_jax import config
from ip2p_jax.storage import WAITS, StorageError, transient
from ip2p_jax.training import checkpoint, logs
from ip2p_jax.types import TrainState

LOUD = 3
"""Saves that fail in a row before the warning says what is at stake."""

Say = Callable[[str], None]


def failures() -> tuple[type[Exception], ...]:
    """What a failed save raises: tensorstore has ValueError for whatever a file system refuses."""
    return (*transient(), ValueError, RuntimeError)


def at_once(call: Callable[..., None], *args: Any) -> Future[None]:
    """`call(*args)`, as an executor's `submit` has it done."""
    done: Future[None] = Future()
    try:
        done.set_result(call(*args))
    except failures() as error:
        done.set_exception(error)
    return done


def in_one_line(error: Exception) -> str:
    """What an error says, or as much as a line takes."""
    return " ".join(str(error).split())[:300]


class Saver:
    """Saves the states of a run under their steps. All hosts call the same methods in turn."""

    def __init__(
        self,
        manager: ocp.CheckpointManager,
        cfg: config.Config,
        position: Callable[[], dict],
        saved: int | None,
    ):
        self.manager, self.cfg, self.position = manager, cfg, position
        self.saved = saved  # newest step that is there
        self.writing: int | None = None  # step whose save has begun
        self.begun: Future[None] = at_once(
            lambda: None
        )  # what is done before orbax's threads go on
        self.alone = jax.process_count() == 1
        self.submit = ThreadPoolExecutor(1).submit if self.alone else at_once
        self.failures = 0  # in a row
        self.due: int | None = None  # step from which the next try, or one put off, is due

    def save(self, state: TrainState, say: Say) -> None:
        """Begins to save `state`, when the save before it has come to its end."""
        step = int(state.step)
        self.settle(step, say)
        if self.saved == step:
            return
        self.writing, self.due = step, None
        # Of whole arrays on the CPU this copies nothing; no step is given memory in use here.
        kept = jax.device_get(state) if self.alone else state
        position = self.position()
        self.begun = self.submit(checkpoint.save, self.manager, kept, position, self.cfg)

    def postpone(self, at: int) -> None:
        """Has a save that should be at this step take place with a later line of the log."""
        self.due = at

    def is_due(self, at: int, say: Say) -> bool:
        """Whether a save has failed and the next try is due at this step."""
        if not logs.total(self.writing is not None and self.is_saving()):
            self.settle(at, say)
        return self.due is not None and at >= self.due

    def is_saving(self) -> bool:
        """Whether the save that has begun goes on; never if its beginning failed."""
        if not self.begun.done():
            return True
        return self.begun.exception() is None and self.manager.is_saving_in_progress()

    def settle(self, at: int, say: Say) -> None:
        """Waits for the save that has begun, and sees how it went."""
        if self.writing is None:
            return
        error = self.wait()
        step, self.writing = self.writing, None
        if logs.total(error is not None):
            self.failed(step, error, at, say)
        else:
            self.saved, self.failures = step, 0

    def wait(self) -> Exception | None:
        """Waits for what has begun; returns what went wrong first."""
        wrong = None
        for end in (self.begun.result, self.manager.wait_until_finished):
            try:
                end()
            except failures() as error:
                wrong = wrong or error
        return wrong

    def failed(self, step: int, error: Exception | None, at: int, say: Say) -> None:
        """Decides when to try again, says so, and makes room."""
        self.failures += 1
        self.due = at + self.cfg.log.every * 2 ** min(self.failures - 1, 6)
        why = "on another host" if error is None else in_one_line(error)
        say(f"WARNING: step {step} could not be saved ({why})")
        if self.failures >= LOUD:
            say(
                f"WARNING: {self.failures} saves have failed in a row: all that was trained since "
                f"step {self.saved} would be lost if the run ended now. Training goes on"
            )
        try:
            checkpoint.clear(self.manager.directory)
            self.manager.reload()
        except transient() as error:
            say(f"WARNING: what is left of step {step} could not be removed ({error})")

    def finish(self, state: TrainState, say: Say) -> None:
        """Saves the last state and waits for it; tries for a minute.

        Raises StorageError if it cannot be written.
        """
        step = int(state.step)
        for wait in (*WAITS, None):
            self.save(state, say)
            self.settle(step, say)
            if self.saved == step:
                return
            if wait is not None:
                time.sleep(wait)
        tries = len(WAITS) + 1
        raise StorageError(
            f"step {step} could not be saved in {tries} tries; the newest there is {self.saved}"
        )

    def close(self, say: Say) -> None:
        """Waits for what this host still writes; what ends the run stays the error that is told."""
        if self.writing is not None and (error := self.wait()):
            say(f"WARNING: step {self.writing} could not be saved ({in_one_line(error)})")
