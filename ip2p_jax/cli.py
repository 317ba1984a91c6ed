# SPDX-License-Identifier: Apache-2.0
"""What the entry points share: one line per user error, and files that appear whole or not at all."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turns errors in the user's input into one line on stderr and exit code 2.

    `ValueError` and `OSError` are what the library raises for bad input; anything else is our bug
    and keeps its traceback.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split())
            print(f"error: {line}", file=sys.stderr)
            return 2

    return run


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to `path` when the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        if part.is_file():
            part.unlink()
