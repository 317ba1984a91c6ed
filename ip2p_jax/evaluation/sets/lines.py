# SPDX-License-Identifier: Apache-2.0
"""Evaluation sets as JSON lines; `ip2p_jax.evaluation.examples` says what a line holds."""

import json
from pathlib import Path
from typing import Any

from ip2p_jax.evaluation.sets.records import (
    ExampleSet,
    Plan,
    Source,
    Step,
    caption,
    file_source,
    from_sessions,
)

TURN = ("instruction", "target", "input_caption", "output_caption", "mask")
EXAMPLE = ("input", "name")


def open_lines(path: Path, turns: str) -> ExampleSet:
    """Reads a file; paths are relative to it. ValueError names the line and what was expected."""
    if not path.is_file():
        raise ValueError(f"{path}: a folder, expected a file of JSON lines")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text in UTF-8") from None
    plans = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                plans.append(plan_line(path.parent, number, line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not plans:
        raise ValueError(f"{path}: holds no example")
    return from_sessions(str(path), plans, turns)


def plan_line(folder: Path, number: int, line: str) -> Plan:
    """One line. Raises ValueError that says what is wrong in it."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object")
    session = "turns" in entry
    check_keys(entry, (*EXAMPLE, "turns") if session else EXAMPLE + TURN)
    name = text(entry, "name") or str(number)
    listed = entry["turns"] if session else [{k: x for k, x in entry.items() if k in TURN}]
    if not isinstance(listed, list) or not listed:
        raise ValueError("turns: expected a list of objects")
    given = before = picture(folder, entry, "input")
    if given is None:
        raise ValueError("input is missing, expected the path of a picture")
    steps = []
    for k, turn in enumerate(listed, 1):
        steps.append(plan_turn(folder, f"{name}/{k}" if session else name, before, turn))
        before = steps[-1].target
    return Plan(name, given, tuple(steps))


def plan_turn(folder: Path, name: str, given: Source | None, turn: Any) -> Step:
    if not isinstance(turn, dict):
        raise ValueError("turns: expected a list of objects")
    check_keys(turn, TURN)
    instruction = text(turn, "instruction")
    if instruction is None:
        raise ValueError("instruction is missing")
    first, last = (caption(text(turn, key)) for key in ("input_caption", "output_caption"))
    target, mask = (picture(folder, turn, key) for key in ("target", "mask"))
    return Step(name, given, instruction, first, last, target, mask)


def check_keys(entry: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in entry:
        if key not in known:
            raise ValueError(f"{key!r} is not known, expected one of {', '.join(known)}")


def text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key}: {value!r}, expected a text")
    return value


def picture(folder: Path, entry: dict[str, Any], key: str) -> Source | None:
    path = text(entry, key)
    return None if path is None else file_source(folder / path)
