# SPDX-License-Identifier: Apache-2.0
"""TPU chips, and slices of them as libtpu describes them to a machine that has none."""

import contextlib
import functools
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """What one chip can do."""

    peak: float  # dense products of bfloat16, FLOP/s, as the maker states it
    memory: int  # bytes of HBM that the compiler gives a program
    bandwidth: float  # of HBM, bytes/s
    clock: float  # Hz
    cores: int  # of a chip, as names of slices count (v4-32 is 16 chips)
    kinds: tuple[str, ...]  # jax's names


CHIPS = {
    "v4": Chip(275e12, int(30.75 * 2**30), 1.2e12, 1.05e9, 2, ("TPU v4",)),
    "v5e": Chip(197e12, int(15.75 * 2**30), 819e9, 1.5e9, 1, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, int(95.74 * 2**30), 2765e9, 1.75e9, 2, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, int(31.25 * 2**30), 1638e9, 1.75e9, 1, ("TPU v6 lite", "TPU v6e")),
}
"""By the name that slices begin with."""

CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES = {"v4": CUBES, "v5p": CUBES, "v5e": SQUARES, "v6e": SQUARES}
"""How the chips of a slice are arranged that is named by their number."""

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""Keeps libtpu from looking for a TPU around it, and from telling that there is none."""


class Topology(NamedTuple):
    """A slice: its chips are devices that programs can be compiled for, and nothing else."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def use_cpu() -> None:
    """Has jax compute on the CPU, and libtpu look for no chip; to be called before either starts
    to."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def shape_of(name: str) -> tuple[str, str]:
    """ "v4-32" or "v4:2x2x4" -> ("v4", "2x2x4"); ValueError, one line, that says what is known."""
    match = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    if match is None or match[1] not in CHIPS:
        raise ValueError(
            f"--topology {name!r}, expected {', '.join(CHIPS)} and -N, as in v4-32, or :AxBxC, as "
            "in v4:2x2x4"
        )
    kind, count, shape = match.groups()
    if shape:
        if len(shape.split("x")) != (3 if SHAPES[kind] is CUBES else 2):
            raise ValueError(f"--topology {name!r}, expected a shape like {kind}:{SHAPES[kind][3]}")
        return kind, shape
    cores = CHIPS[kind].cores
    known = {cores * chips_of(shape): shape for shape in SHAPES[kind]}
    if int(count) not in known:
        names = ", ".join(f"{kind}-{n}" for n in known)
        raise ValueError(f"--topology {name!r}, expected one of {names}, or {kind}:AxB...")
    return kind, known[int(count)]


def chips_of(shape: str) -> int:
    """ "2x2x4" -> 16."""
    return math.prod(int(side) for side in shape.split("x"))


@functools.cache
def topology(name: str) -> Topology:
    """The slice of this name, described once a process: two descriptions give unequal devices.

    Raises ValueError for a name that is not known, or where libtpu is not installed.
    """
    kind, shape = shape_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('libtpu is not installed: pip install "ip2p_jax[tpu]"')
    sides = [int(side) for side in shape.split("x")]
    whole = all(side % (4 if len(sides) == 3 else 16) == 0 for side in sides)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{kind}:{shape}",
            chips_per_host_bounds=(1, 1, 1) if math.prod(sides) == 1 else (2, 2, 1),
            num_slices=1,
            wrap=(whole, whole, whole and len(sides) == 3),
            **options,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology {name!r}: {str(error).splitlines()[0]}") from None
    return Topology(name, CHIPS[kind], tuple(described.devices))


def chip_of(device: Any) -> Chip | None:
    """The chip that a device is; None if it is none of `CHIPS`."""
    with contextlib.suppress(AttributeError):
        for chip in CHIPS.values():
            if device.device_kind in chip.kinds:
                return chip
    return None
