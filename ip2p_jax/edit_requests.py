# SPDX-License-Identifier: Apache-2.0
"""What the edit command is asked to do: requests, checked before any model is opened."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.editor import check_number, check_seed, check_text


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
    seed: int = 0
    negative: str = ""
    resolution: int | str | None = None


def check_output(x: Any) -> str | None:
    return None if isinstance(x, str) and Path(x).suffix.lower() == ".png" else "a .png file"


def check_steps(x: Any) -> str | None:
    return None if type(x) is int and 1 <= x <= 1000 else "1 to 1000"


def check_sampler(x: Any) -> str | None:
    return None if x in list(SAMPLERS) else f"one of {', '.join(SAMPLERS)}"


def check_resolution(x: Any) -> str | None:
    usable = x in (None, "own") or type(x) is int and 1 <= x <= 8192
    return None if usable else "pixels (1 to 8192) or 'own'"


CHECKS: dict[str, Callable[[Any], str | None]] = {
    "input": check_text,
    "instruction": check_text,
    "output": check_output,
    "steps": check_steps,
    "sampler": check_sampler,
    "text_guidance": check_number,
    "image_guidance": check_number,
    "seed": check_seed,
    "negative": check_text,
    "resolution": check_resolution,
}
"""What a field of a request has to be: None if a value is that, else the words for it."""

REQUIRED = ("input", "instruction", "output")
OPTIONS = tuple(name for name in CHECKS if name not in REQUIRED)


def make_request(values: dict[str, Any]) -> Request:
    """Makes a request of a value for each field. Raises ValueError that names a wrong one."""
    for name, check in CHECKS.items():
        if wanted := check(values[name]):
            raise ValueError(f"{name}: {values[name]!r}, expected {wanted}")
    scales = ("text_guidance", "image_guidance")
    floats: dict[str, Any] = {name: float(values[name]) for name in scales}
    return Request(**values | floats)


def outputs_of(inputs: Sequence[str], output: str) -> list[str]:
    """Where the edits of `inputs` go: to the file `output`, or into the folder `output`."""
    path = Path(output)
    if path.is_dir() or output.endswith("/") or not path.suffix:
        return [str(path / f"{Path(x).stem}.png") for x in inputs]
    if len(inputs) > 1:
        raise ValueError(f"--output: {output}, expected a folder for several pictures")
    return [output]


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


def check_outputs(requests: Sequence[Request]) -> None:
    """Makes sure that every output can be written, so that none fails after hours of work."""
    inputs = {Path(r.input).resolve() for r in requests}
    uses = Counter(Path(r.output).resolve() for r in requests)
    for request in requests:
        path = Path(request.output).resolve()
        if path in inputs:
            raise ValueError(f"output {request.output}: is an input too")
        if uses[path] > 1:
            raise ValueError(f"output {request.output}: is named twice")
        if path.is_dir():
            raise ValueError(f"output {request.output}: is a folder")
    for folder in {path.parent for path in uses}:
        there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise ValueError(
                f"output folder {folder}: no file can be made in {there} ({error.strerror})"
            ) from None
