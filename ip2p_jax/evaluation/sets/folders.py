# SPDX-License-Identifier: Apache-2.0
"""Evaluation sets in folders: packed data, the released layout, and MagicBrush's."""

import functools
import json
from pathlib import Path
from typing import Any

from ip2p_jax.data import released
from ip2p_jax.data.pairs import PairSource, split_range
from ip2p_jax.evaluation.sets.records import (
    ExampleSet,
    Plan,
    Source,
    Step,
    bytes_source,
    caption,
    file_source,
    from_sessions,
)

SESSIONS = "edit_sessions.json"
DESCRIPTIONS = "global_descriptions.json"


def open_pairs(path: Path, split: str) -> ExampleSet:
    """A packed data folder; of each prompt the first pair. Raises as `PairSource` does."""
    source = PairSource(path, split)
    plan = functools.partial(plan_pair, path, source)
    return ExampleSet(str(path), plan, [records[0] for records in source.prompts])


def plan_pair(path: Path, source: PairSource, record: int) -> Plan:
    pair = source[record]
    name = f"{pair.prompt}/{pair.seed}"
    before, after = (
        bytes_source(
            f"{path}: {name} {field}", functools.partial(read_field, source, record, field)
        )
        for field in ("input", "output")
    )
    captions = caption(pair.input_caption), caption(pair.output_caption)
    return Plan(name, before, (Step(name, before, pair.instruction, *captions, after),))


def read_field(source: PairSource, record: int, field: str) -> bytes:
    return getattr(source[record], field)


def open_released(path: Path, split: str) -> ExampleSet:
    """The released layout (ip2p_jax.data.released), split by position; of each prompt one seed.

    It is the first that seeds.json lists. Raises ValueError or FileNotFoundError.
    """
    prompts = list(released.read_seeds(path).items())
    try:
        indices = split_range(len(prompts), split)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not indices:
        raise ValueError(f"{path}: none of its {len(prompts)} prompts belongs to split {split}")
    return ExampleSet(str(path), functools.partial(plan_released, path, prompts), indices)


def plan_released(path: Path, prompts: list[tuple[str, list[str]]], i: int) -> Plan:
    prompt, seeds = prompts[i]
    folder = path / prompt
    file = folder / "prompt.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there, expected the texts of a prompt")
    if not seeds:
        raise ValueError(f"{path / released.SEEDS}: prompt {prompt} has no seeds")
    try:
        texts = released.read_texts(folder)
    except ValueError as error:
        raise ValueError(f"{file}: expected a JSON object of texts ({error})") from None
    name = f"{prompt}/{seeds[0]}"
    before, after = map(file_source, released.pictures(folder, seeds[0]))
    captions = caption(texts.input_caption), caption(texts.output_caption)
    return Plan(name, before, (Step(name, before, texts.instruction, *captions, after),))


def open_magicbrush(path: Path, split: str, turns: str) -> ExampleSet:
    """MagicBrush's own folder: dev, test or train, or the folder that holds these.

        edit_sessions.json         {id: [{"input", "mask", "output": file names, "instruction"}]}
        global_descriptions.json   {id: {file name: caption}}; captions are None without it
        images/{id}/               {id}-input.png, {id}-mask1.png, {id}-output1.png, ...

    Single turns start from the true output of the turn before, as the authors' do. Raises
    ValueError or FileNotFoundError that names the file.
    """
    folder = path if (path / SESSIONS).is_file() else path / split
    if not (folder / SESSIONS).is_file():
        found = ", ".join(sorted(x.parent.name for x in path.glob(f"*/{SESSIONS}")))
        raise FileNotFoundError(
            f"{folder / SESSIONS} is not there, expected the sessions of MagicBrush"
            + (f"; {path} has split {found}" if found else "")
        )
    sessions = read_object(folder / SESSIONS)
    described = (folder / DESCRIPTIONS).is_file()
    captions = read_object(folder / DESCRIPTIONS) if described else {}
    plans = [plan_session(folder, session, turns, captions) for session, turns in sessions.items()]
    if not plans:
        raise ValueError(f"{folder / SESSIONS}: holds no session")
    return from_sessions(str(folder), plans, turns)


def plan_session(folder: Path, session: str, turns: Any, captions: dict[str, Any]) -> Plan:
    """The turns of a session. Raises ValueError that names it."""
    known = captions.get(session)
    texts = known if isinstance(known, dict) else {}
    needed = ("input", "output")
    steps = []
    for number, turn in enumerate(turns if isinstance(turns, list) else [], 1):
        if not isinstance(turn, dict):
            raise ValueError(f"{folder / SESSIONS}: turn {number} of {session} is no object")
        before, after, mask = (
            session_picture(folder, session, turn, key) if key in needed or key in turn else None
            for key in ("input", "output", "mask")
        )
        first, last = (caption(texts.get(turn[key])) for key in needed)
        instruction = released.text(turn.get("instruction"))
        name = f"{session}-output{number}"
        steps.append(Step(name, before, instruction, first, last, after, mask))
    if not steps:
        raise ValueError(f"{folder / SESSIONS}: session {session} is no list of turns")
    assert steps[0].input
    return Plan(session, steps[0].input, tuple(steps))


def session_picture(folder: Path, session: str, turn: dict[str, Any], key: str) -> Source:
    file = turn.get(key)
    for part in (session, file):
        if not isinstance(part, str) or Path(part).name != part:
            raise ValueError(
                f"{folder / SESSIONS}: session {session}: {key} is {part!r}, expected a file name"
            )
    return file_source(folder / "images" / session / str(file))


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError names the file."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
