# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept whole on disk, so that a second start neither traces nor compiles them.

JAX's own persistent cache saves the compiling alone: a program has to be traced and lowered to be
looked up there, which takes seconds for SD 1.5. Here it is looked up by what it is made of: this
library's source, the versions below it, the machine, and what the caller names.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from ip2p_jax.cli import atomic_path


class Program:
    """A jitted function, compiled once for each kind of arguments and kept for other processes.

    `identity` says what `function` computes: functions of this library and values that pickle to
    the same bytes in every process; None if that cannot be said. Then, with several hosts, and
    where JAX's compilation cache is off, beside which they are kept, programs live as long as the
    process.
    """

    def __init__(self, function: Callable, identity: Any = None, **options: Any):
        self.jitted = jax.jit(function, **options)
        self.identity = None if identity is None else pickle.dumps(identity)
        self.compiled: dict[Any, jax.stages.Compiled] = {}

    def __call__(self, *args: Any) -> Any:
        return self.compile(*args)(*args)

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """The program for these arguments, arrays or their ShapeDtypeStructs: one that was kept,
        or a new one, which then is."""
        kind = kind_of(args)
        if kind not in self.compiled:
            path = self.path(kind)
            program = None if path is None else read(path, devices_of(args))
            if program is None:
                program = self.make(args, path)
            self.compiled[kind] = program
        return self.compiled[kind]

    def make(self, args: Any, path: Path | None) -> jax.stages.Compiled:
        """Compiles a new program, and keeps it at `path`."""
        lowered = self.jitted.lower(*args)
        if path is None:
            return lowered.compile()
        with compiled_anew():
            program = lowered.compile()
        keep(path, program)
        return program

    def path(self, kind: Any) -> Path | None:
        """Where the program for arguments of this kind is kept, if anywhere."""
        folder = jax.config.values["jax_compilation_cache_dir"]
        here = folder and "://" not in folder and jax.process_count() == 1
        if not here or self.identity is None:
            return None
        name = hashlib.sha256(self.identity)
        for part in (repr(kind), surroundings(), *settings()):
            name.update(part.encode())
        return Path(folder) / f"ip2p-{name.hexdigest()}.program"


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Past JAX's cache: on the CPU, a program that came from there is serialized without its
    functions, and fails when it is run."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def kind_of(args: Any) -> Any:
    """What of the arguments a compiled program depends on."""
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((x.shape, str(x.dtype), repr(x.sharding)) for x in leaves)


def devices_of(args: Any) -> list[Any]:
    """The devices that the arguments lie on, in the order of their mesh."""
    sharding = jax.tree.leaves(args)[0].sharding
    mesh: Any = getattr(sharding, "mesh", None)
    return list(sharding.device_set if mesh is None else mesh.devices.flat)


@functools.cache
def surroundings() -> str:
    """A digest of what a program depends on and no caller names: source, versions, machine."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    versions = [version(name) for name in ("jax", "jaxlib", "flax")]
    devices = [(device.platform, device.device_kind) for device in jax.devices()]
    runtime = jax.devices()[0].client.platform_version
    digest.update(repr((versions, devices, runtime, processor())).encode())
    return digest.hexdigest()


def processor() -> str:
    """What the host's processor can do: programs for the CPU use all of it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text().splitlines()
    return repr(sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))}))


def settings() -> list[str]:
    """The options of JAX and XLA; those of the cache itself decide nothing."""
    jaxs = [f"{k}={v}" for k, v in sorted(jax.config.values.items()) if "cache" not in k]
    return [*jaxs, *(f"{k}={os.environ.get(k)}" for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))]


def keep(path: Path, program: jax.stages.Compiled) -> None:
    """Writes a program behind its digest; a disk that cannot take it costs the next start its
    seconds, no more."""
    payload = pickle.dumps(serialize(program))
    try:
        with atomic_path(path) as part:
            part.write_bytes(hashlib.sha256(payload).digest() + payload)
    except OSError:
        return


def read(path: Path, devices: Sequence[Any]) -> jax.stages.Compiled | None:
    """Reads a program for these devices; None if there is none, or none that is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    return deserialize_and_load(*pickle.loads(payload), execution_devices=devices)
