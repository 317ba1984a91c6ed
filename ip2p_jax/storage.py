# SPDX-License-Identifier: Apache-2.0
"""Work that is kept in a folder, on disks that fail for a while: shared ones, and buckets through
etils.epath."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from ip2p_jax.cli import atomic_path, check_writable

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds between the tries of `retried`: about a minute in all."""


OF_BUCKETS = (
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("google.api_core.exceptions", "GoogleAPIError"),
)
"""What clients of buckets raise that is no OSError: module and class."""


def transient() -> tuple[type[Exception], ...]:
    """What storage raises that fails for a while: to be called in an except clause.

    A class whose module nobody has imported is raised by nobody: nothing is imported for it.
    """
    named = (getattr(sys.modules.get(module), name, None) for module, name in OF_BUCKETS)
    return (OSError, *(x for x in named if isinstance(x, type) and issubclass(x, Exception)))


class StorageError(Exception):
    """Storage that failed at every try; what was not written is made again by the same command."""


def retried(action: Callable[[], T], what: str) -> T:
    """Does `action` until it raises none of `transient`, with longer and longer waits between.

    Raises StorageError that says `what` failed and why. A path that is not there, or is of the
    wrong kind, is no failure of the disk and is raised at once.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except transient() as error:
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


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SETTINGS = "settings.json"
"""Of a folder of work: what decides it."""


def check_folder(path: str, kind: str) -> None:
    """Raises ValueError where `open_folder` will fail whatever the settings, or no file can be made
    in the folder: to be called before anything is loaded."""
    if "://" not in path:
        check_writable(Path(path))
    check_kind(epath.Path(path), kind)


def check_kind(folder: epath.Path, kind: str) -> None:
    """Raises ValueError if there is something in a folder, and it is not of that `kind`."""
    file = folder / SETTINGS
    if file.exists() or not folder.exists():
        return
    part = f".{SETTINGS}."  # of a process that was killed, or of another host
    used = any(not x.name.startswith(part) for x in folder.iterdir())
    if used and not file.exists():  # else another host has begun it just now
        raise ValueError(f"{folder} is already there and not a folder of {kind} (no {SETTINGS})")


def open_folder(path: str, settings: dict[str, Any], kind: str) -> epath.Path:
    """Opens the folder of work that `settings` decides, or begins one, with its settings.json.

    Raises ValueError if the folder is not of that `kind`, or naming the settings that differ.
    """
    settings = json.loads(json.dumps(settings))
    folder = epath.Path(path)
    file = folder / SETTINGS
    check_kind(folder, kind)
    if not file.exists():
        retried(lambda: folder.mkdir(parents=True, exist_ok=True), str(path))
        retried(lambda: write_whole(file, json.dumps(settings, indent=1).encode()), str(file))
    there = json.loads(file.read_text())
    for name in sorted({*there, *settings}):
        if there.get(name) != settings.get(name):
            raise ValueError(
                f"{path} was made with {name} {there.get(name)!r}, this command says "
                f"{settings.get(name)!r}: give another --output, or the same {name}"
            )
    return folder
