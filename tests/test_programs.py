# SPDX-License-Identifier: Apache-2.0
"""Claims: a kept program is run by another process that neither traces nor compiles it, with the
same result bit for bit, also where JAX's own cache had it already; whatever decides what a program
computes makes another one; a damaged file, or a disk that takes none, costs time and no more."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip2p_jax import programs
from ip2p_jax.programs import Program

SCRIPT = """
import sys, jax, jax.numpy as jnp, numpy as np
from ip2p_jax.cli import set_up_jax
from ip2p_jax.programs import Program
set_up_jax()

def wave(x, n):
    print("traced")
    return jax.lax.fori_loop(0, n, lambda i, y: jnp.exp(jnp.sin(y) @ y.T / 9) @ y + i, x)

x = jnp.arange(12.0).reshape(3, 4) / 12
call = jax.jit(wave) if "jax" in sys.argv else Program(wave, "wave")
print(np.asarray(call(x, jnp.int32(3))).tobytes().hex())
"""


def apart(cache: Path, *arguments: str) -> list[str]:
    """What a process of its own prints."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.program"))


def test_another_process_neither_traces_nor_compiles(tmp_path):
    """JAX's cache holds the program first: what comes from there must not be what is kept."""
    *_, first = apart(tmp_path, "jax")
    assert list(tmp_path.glob("jit_wave-*-cache")) and not kept(tmp_path)
    assert apart(tmp_path) == ["traced", first]
    assert apart(tmp_path) == [first]
    [path] = kept(tmp_path)
    path.write_bytes(b"no program")
    assert apart(tmp_path) == ["traced", first]
    assert apart(tmp_path) == [first]


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """A cache of this test's own."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def double(x):
    return 2 * x


def test_what_decides_makes_another_program(folder, monkeypatch):
    x = np.ones((2, 3), np.float32)
    on_device = jax.device_put(x)

    def count(*args, identity="double", **options) -> int:
        Program(double, identity, **options).compile(*args)
        return len(kept(folder))

    assert count(on_device) == count(on_device) == 1
    assert count(jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=on_device.sharding)) == 1
    assert count(on_device[:1]) == 2
    assert count(on_device.astype(jnp.int32)) == 3
    assert count((on_device,)) == 4
    assert count(on_device, identity="twice") == 5
    assert count(jax.device_put(x, jax.devices()[1])) == 6
    with jax.default_matmul_precision("highest"):
        assert count(on_device) == 7
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
    assert count(on_device) == 8
    monkeypatch.setattr(programs, "surroundings", lambda: "another machine")
    assert count(on_device) == 9


def test_a_program_serves_all_arguments_of_its_kind(folder):
    program = Program(double, "double")
    for x in (jnp.ones(3), jnp.zeros(3)):
        np.testing.assert_array_equal(program(x), 2 * x)
    assert len(program.compiled) == len(kept(folder)) == 1


def test_damaged_files_are_not_run(folder):
    """A flipped bit wherever it is, a truncated file, an empty one: another is made."""
    x = jnp.ones(3)
    Program(double, "double")(x)
    [path] = kept(folder)
    whole = path.read_bytes()
    places = np.linspace(0, len(whole) - 1, 20, dtype=int)
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places]
    devices = list(x.devices())
    for content in (*flipped, whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        assert programs.read(path, devices) is None
    np.testing.assert_array_equal(Program(double, "double")(x), 2 * x)
    assert path.read_bytes() != b"" and programs.read(path, devices) is not None


def test_where_nothing_can_be_kept(folder, tmp_path):
    """Without an identity, without a cache, and on a disk that takes no file."""
    x = jnp.ones(3)
    np.testing.assert_array_equal(Program(double)(x), 2 * x)
    jax.config.update("jax_compilation_cache_dir", None)
    np.testing.assert_array_equal(Program(double, "double")(x), 2 * x)
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "folder")
    jax.config.update("jax_compilation_cache_dir", below)
    np.testing.assert_array_equal(Program(double, "double")(x), 2 * x)
    assert not kept(folder)


def test_the_processor_is_part_of_it():
    assert "flags" in programs.processor() or sys.platform != "linux"
    assert programs.surroundings() == programs.surroundings()
