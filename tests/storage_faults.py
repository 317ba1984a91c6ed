# SPDX-License-Identifier: Apache-2.0
"""A disk that is full, by the limit on the size of a process's files: the errors are real ones."""

import contextlib
import resource
from collections.abc import Iterator

BYTES = 4096
"""What a file may have when the disk is "full": logs fit, parameters do not."""


def fill(pid: int) -> None:
    """From now on the process gets EFBIG for files larger than BYTES."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (BYTES, hard))


def empty(pid: int) -> None:
    """Ends what `fill` began."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """For this process, while the block lasts."""
    fill(0)
    try:
        yield
    finally:
        empty(0)
