# SPDX-License-Identifier: Apache-2.0
"""Claims: users' errors are one line and code 2, bugs are not; files are written whole or not."""

import contextlib
import os
import platform
import subprocess
import sys

import jax
import pytest

from ip2p_jax import cli
from ip2p_jax.cli import (
    Parser,
    alone,
    atomic_path,
    one_line_errors,
    set_up_jax,
    this_machine,
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a.png: is\n  broken\n"), "error: a.png: is broken\n"),
        (FileNotFoundError(2, "No such file", "b"), "error: [Errno 2] No such file: 'b'\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_one_line_errors(capsys, error, line):
    @one_line_errors
    def main():
        raise error

    assert main() == 2
    assert capsys.readouterr() == ("", line)


def test_other_ends(capsys):
    """Results are exit codes, nothing is 0; bugs keep their traceback."""
    assert one_line_errors(lambda code: code)(1) == 1
    assert one_line_errors(lambda: None)() == 0
    with pytest.raises(TypeError):
        one_line_errors(lambda: len(3))()  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")


def test_parser_errors_are_value_errors():
    parser = Parser(prog="x")
    parser.add_argument("--steps", type=int)
    for argv in (["--steps", "many"], ["--unknown"], ["--steps"]):
        with pytest.raises(ValueError, match=argv[0]):
            parser.parse_args(argv)


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    with atomic_path(path) as part:
        part.write_text("whole")
        assert part.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), atomic_path(path) as part:
        part.write_text("hal")
        raise OSError("disk full")
    with pytest.raises(KeyboardInterrupt), atomic_path(path):
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """Only of the same file, and only of processes of this machine that are no more."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path, here = tmp_path / "a[1].png", this_machine()
    stale = tmp_path / f".a[1].png.{here}.{dead.pid}.part"
    kept = [
        tmp_path / f".{name}.part"
        for name in (
            f"a[1].png.{here}.{os.getppid()}",
            f"b.png.{here}.{dead.pid}",
            f"a[1].png.0123456789ab.{dead.pid}",
            "a[1].png.mine",
        )
    ]
    for part in (stale, *kept):
        part.write_text("half")
    with atomic_path(path) as part:
        part.write_text("whole")
    assert not stale.exists()
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])


def test_hosts_with_one_disk_do_not_meet(tmp_path, monkeypatch):
    """Two processes of one id write the same file at once, one on each host, as do two of the same
    host's name: the file is that of the last one, and whole."""
    path, names = tmp_path / "a.png", ["one", "one", "two"]
    boots = iter(["first", "second", "second"])
    with contextlib.ExitStack() as hosts:
        for name in names:
            monkeypatch.setattr(cli.socket, "gethostname", lambda name=name: name)
            monkeypatch.setattr(cli.Path, "read_text", lambda path: next(boots))
            this_machine.cache_clear()
            part = hosts.enter_context(atomic_path(path))
            assert not part.exists()
            part.write_bytes(name.encode() * 1000)
        assert len(list(tmp_path.iterdir())) == 3
    this_machine.cache_clear()
    assert path.read_bytes() == b"one" * 1000 and list(tmp_path.iterdir()) == [path]


def test_one_process_at_a_time(tmp_path):
    """Another is refused while the first is in, also a killed one lets it in; errors pass."""
    with alone(tmp_path):
        with pytest.raises(ValueError, match="^/.*: another process is writing there"):
            with alone(tmp_path):
                pass
        with alone(tmp_path.parent):
            pass
    with pytest.raises(KeyError), alone(tmp_path):
        raise KeyError
    hold = "import sys, time, ip2p_jax.cli as c, pathlib as p\nwith c.alone(p.Path(sys.argv[1])):"
    command = [sys.executable, "-c", f"{hold}\n print(flush=True)\n time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(ValueError), alone(tmp_path):
            pass
        other.kill()
    with alone(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_compiled_programs_are_kept(tmp_path, monkeypatch):
    """In the user's cache folder, unless the environment names another."""
    before = jax.config.jax_compilation_cache_dir
    try:
        set_up_jax()
        assert jax.config.jax_compilation_cache_dir == before  # the tests' own
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        set_up_jax()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ip2p_jax" / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other libraries have no such setting"
)
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_used_again(kept):
    """64 MB, asked for again and again, are 16,384 pages of 4 KiB only the first time; the control
    gets new pages every time."""
    code = f"""
import resource
from ip2p_jax.cli import keep_freed_memory
if {kept}:
    keep_freed_memory()
one = b"1"
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    one * 2**26
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, last = map(int, done.stdout.split())
    assert (last < 100) is kept, done.stdout
