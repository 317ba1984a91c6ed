# SPDX-License-Identifier: Apache-2.0
"""Writing to disks that fail for a while: shared file systems, and buckets through etils.epath."""

import time
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from ip2p_jax.cli import atomic_path

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds between the tries of `retried`: about a minute in all."""


class StorageError(Exception):
    """Storage that failed at every try; what was not written is made again by the same command."""


def retried(action: Callable[[], T], what: str) -> T:
    """Does `action` until it raises no OSError, with longer and longer waits between.

    Raises StorageError that says `what` failed and why. A path that is not there, or is of the
    wrong kind, is no failure of the disk and is raised at once.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            if wait is None:
                tries = len(WAITS) + 1
                raise StorageError(f"{what}: failed {tries} times ({error})") from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all. A bucket's objects are so by themselves."""
    if "://" in str(path):
        path.write_bytes(data)
        return
    with atomic_path(path) as part:
        part.write_bytes(data)
