# SPDX-License-Identifier: Apache-2.0
"""Ends a process that makes no progress: no hang is silent.

The clock is the standard library's faulthandler, a thread that needs no lock of Python: it also
fires while the interpreter is stuck in a collective or in a library.
"""

import contextlib
import faulthandler
from collections.abc import Iterator

STDERR = 2  # whatever stands in for it in Python: the clock knows only files
PATIENCE = 1800
"""Seconds that compilation, a save, a grid of samples or the end of a run may take at least."""


class Watchdog:
    """Prints the stacks of all threads and exits with code 1 if `beat` does not come in time."""

    def __init__(self, seconds: int):
        """Waits so many seconds for each beat; for ever if 0."""
        self.seconds = seconds

    def arm(self, seconds: int) -> None:
        if self.seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)

    def beat(self) -> None:
        """A step has ended; the next is awaited."""
        self.arm(self.seconds)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Waits longer for what is no step."""
        self.arm(max(self.seconds, PATIENCE))
        yield
        self.beat()

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
