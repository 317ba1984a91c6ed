# SPDX-License-Identifier: Apache-2.0
"""A disk that is full, by the limit on the size of a process's files: the errors are real ones.
And the error of a bucket's client, by a stand-in."""

import contextlib
import resource
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

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


def bucket_error(patch: pytest.MonkeyPatch) -> type[Exception]:
    """The class that gcsfs raises for status 429 or 503: no OSError; its module is imported."""
    error = type("HttpError", (Exception,), {})
    patch.setitem(sys.modules, "gcsfs.retry", SimpleNamespace(HttpError=error))
    return error


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """For this process, while the block lasts."""
    fill(0)
    try:
        yield
    finally:
        empty(0)
