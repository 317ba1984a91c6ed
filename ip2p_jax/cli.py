# SPDX-License-Identifier: Apache-2.0
"""What the entry points share: errors of one line, whole files, compiled programs kept."""

import argparse
import contextlib
import ctypes
import fcntl
import functools
import glob
import hashlib
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ValueError`s, so that they take one line too."""

    def error(self, message: str):
        raise ValueError(message)


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
            line = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {line}", file=sys.stderr)
            return 2

    return run


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to `path` if the block ends well.

    No other process has this path, on this host or on others with the same disk. What killed
    processes of this host left of the same file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name}.{this_machine()}."
    for part in path.parent.glob(f"{glob.escape(name)}*.part"):
        pid = part.suffixes[-2].removeprefix(".")
        if pid.isdecimal() and not is_running(int(pid)):
            part.unlink(missing_ok=True)
    part = path.with_name(f"{name}{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raises ValueError where no file can be made in a folder, or in what there is of its path: to
    be called before hours of work."""
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"output folder {folder}: no file can be made in {there} ({error.strerror})"
        ) from None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes of this machine out of a folder's `alone`; ValueError if one is in."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is writing there") from None
    finally:
        os.close(fd)


@functools.cache
def this_machine() -> str:
    """Tells this machine, or container, from others: a process id means something in it alone."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux says more than a name, which many may have
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(repr(known).encode()).hexdigest()[:12]


def is_running(pid: int) -> bool:
    """Whether there is a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def set_up_jax() -> None:
    """For commands that compute: keeps compiled programs, and memory that was freed.

    Programs lie in ~/.cache/ip2p_jax, or where JAX_COMPILATION_CACHE_DIR says; small ones too, for
    a dozen of them costs as much as a large one.
    """
    import jax  # a second and 130 MB, which commands that only read and write texts do without

    keep_freed_memory()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "ip2p_jax" / "programs"))


def keep_freed_memory() -> None:
    """Lets the process use again what it has freed, in place of giving it back to the system.

    XLA's programs for the CPU ask for hundreds of megabytes at every call, and each new page costs
    microseconds: a tenth of a call of SD 1.5's UNet. glibc alone has these settings (mallopt(3)).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for name, bound in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(name, bound)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Bytes from which on freed memory at the heap's end, or a single block, is given back."""
