# SPDX-License-Identifier: Apache-2.0
"""What the edit command is asked to do: requests, checked before any model is opened."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ip2p_jax import checks
from ip2p_jax.jobs import SAMPLING
from ip2p_jax.sizes import MAX_SIDE


@dataclass(frozen=True)
class Request:
    """One edit. `resolution`: pixels by the paper's rule, "own" (kept), or None (the model's)."""

    input: str
    instruction: str
    output: str
    steps: int = 100
    sampler: str = "euler_ancestral"
    text_guidance: float = 7.5
    image_guidance: float = 1.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    negative: str = ""
    resolution: int | str | None = None


def check_resolution(x: Any) -> str | None:
    usable = x in (None, "own") or type(x) is int and 1 <= x <= MAX_SIDE
    return None if usable else f"pixels (1 to {MAX_SIDE}) or 'own'"


CHECKS: dict[str, checks.Check] = {
    "input": checks.text,
    "instruction": checks.text,
    **SAMPLING,
    "image_guidance": checks.number,
    "resolution": check_resolution,
}
"""What a field of a request has to be: None if a value is that, else the words for it."""

REQUIRED = ("input", "instruction", "output")
OPTIONS = tuple(name for name in CHECKS if name not in REQUIRED)


def make_request(values: dict[str, Any]) -> Request:
    """Makes a request of a value for each field. Raises ValueError that names a wrong one."""
    for name, wanted in CHECKS.items():
        checks.check(name, values[name], wanted)
    scales = ("text_guidance", "image_guidance", "guidance_rescale")
    floats: dict[str, Any] = {name: float(values[name]) for name in scales}
    if interval := values["guidance_interval"]:
        floats["guidance_interval"] = tuple(map(float, interval))
    return Request(**values | floats)


def read_requests(path: Path, options: dict) -> list[Request]:
    """Reads a requests file; `options` hold where a line has no value of its own."""
    if not path.is_file():
        raise ValueError(f"--requests: {path}: no such file")
    requests = []
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"--requests: {path}: not a text in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(read_request(line, options))
            except (ValueError, OverflowError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not requests:
        raise ValueError(f"--requests: {path}: holds no request")
    return requests


def read_request(line: str, options: dict) -> Request:
    """Reads a line of a requests file. Raises ValueError that says what is wrong in it."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object")
    for name in REQUIRED:
        if name not in entry:
            raise ValueError(f"{name} is missing")
    for name in entry:
        if name not in CHECKS:
            raise ValueError(f"{name!r} is not known, expected one of {', '.join(CHECKS)}")
    return make_request(options | entry)
