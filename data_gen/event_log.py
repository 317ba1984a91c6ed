# SPDX-License-Identifier: Apache-2.0
"""An append-only file of what has happened, one JSON object a line, from which all state is taken.

A line is one write, so a killed process leaves whole lines. The disk is asked to keep them once a
second and before whatever must not be done twice (`sync`): only a machine that loses power can
lose lines, those of a second.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ip2p_jax.storage import StorageError

Event = dict[str, Any]

SYNC = 1.0
"""Seconds between two calls of fsync."""

BLOCK = 1 << 16  # bytes looked at from the end at once, to find the last line


class EventLog:
    """The file, opened by one process at a time, whose last line is repaired if it is half."""

    def __init__(self, path: Path) -> None:
        """Opens or begins it. ValueError if another process has it open."""
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.fd)
            raise ValueError(f"{path}: another process is writing it") from None
        self.size = repair(self.fd)
        self.synced = time.monotonic()

    def append(self, event: Event) -> int:
        """Writes a line; returns where it begins. StorageError if the disk does not take it."""
        line = json.dumps(event, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        begin, rest = self.size, line
        try:
            while rest:  # once, but on a full disk: then the second write says so
                rest = rest[os.write(self.fd, rest) :]
        except OSError as error:
            os.ftruncate(self.fd, begin)
            raise StorageError(f"{self.path}: {error.strerror}") from error
        self.size += len(line)
        if time.monotonic() - self.synced > SYNC:
            self.sync()
        return begin

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        os.fdatasync(self.fd)
        self.synced = time.monotonic()

    def events(self) -> Iterator[tuple[int, Event]]:
        """All lines and where each begins. ValueError names one that is not what it should be."""
        begin = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield begin, read_event(line, f"{self.path}, line {number}")
                begin += len(line)

    def close(self) -> None:
        """Syncs, and lets others open the file."""
        self.sync()
        os.close(self.fd)


def read_event(line: bytes, where: str) -> Event:
    """Reads a line; ValueError says `where` it is."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise ValueError(f"{where}: damaged; what it said is done again without the line")
    return event


def repair(fd: int) -> int:
    """Cuts off what comes after the last whole line; returns the size of the rest in bytes.

    A last line that is whole but for its end gets it.
    """
    size = end = os.fstat(fd).st_size
    tail = b""
    while end and b"\n" not in tail:
        begin = max(0, end - BLOCK)
        tail = os.pread(fd, end - begin, begin) + tail
        end = begin
    last = tail[tail.rfind(b"\n") + 1 :]
    if last:
        try:
            whole = isinstance(json.loads(last), dict)
        except (ValueError, RecursionError):
            whole = False
        if whole:
            os.write(fd, b"\n")
            return size + 1
        size -= len(last)
        os.ftruncate(fd, size)
    return size
