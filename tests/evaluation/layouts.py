# SPDX-License-Identifier: Apache-2.0
"""Small evaluation sets, written as their publishers write them.

Where that is known from: MagicBrush's folder from the scripts in its repository
(edit_cli_single_multi_turn.py, evaluation/image_eval.py: images/{id}/{id}-input.png, outputs named
by turn, masks beside them, captions by file name), its columns and those of the Emu Edit test set
from the cards of osunlp/MagicBrush, facebook/emu_edit_test_set and
facebook/emu_edit_test_set_generations, the columns of the InstructPix2Pix mirrors from the cards of
timbrooks/instructpix2pix-clip-filtered and fusing/instructpix2pix-1000-samples. Pictures in parquet
are structs of bytes and path, as the `datasets` library writes them.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.released import encode, picture

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SESSIONS = {"242679": 1, "139": 3, "2153": 2}
"""Turns of the sessions below, in the order of the file."""


def png(session: int, state: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """The picture of a session after so many turns; sessions are numbered in their order."""
    return encode(picture(session, state, size), "PNG")


def caption(session: int, state: int) -> str:
    return f"scene {session} after {state}"


def write_magicbrush(folder: Path, *, described: bool = True) -> Path:
    """A split in MagicBrush's own layout."""
    sessions: dict[str, list[dict[str, str]]] = {}
    descriptions: dict[str, dict[str, str]] = {}
    for i, (name, turns) in enumerate(SESSIONS.items()):
        files = [f"{name}-input.png", *(f"{name}-output{k}.png" for k in range(1, turns + 1))]
        place = folder / "images" / name
        place.mkdir(parents=True)
        for k, file in enumerate(files):
            (place / file).write_bytes(png(i, k))
            descriptions.setdefault(name, {})[file] = caption(i, k)
        sessions[name] = []
        for k in range(1, turns + 1):
            mask = f"{name}-mask{k}.png"
            (place / mask).write_bytes(png(60 + i, k))
            turn = {"input": files[k - 1], "mask": mask, "output": files[k]}
            sessions[name].append(turn | {"instruction": f"edit {i} turn {k}"})
    (folder / "edit_sessions.json").write_text(json.dumps(sessions))
    turns = [turn for session in sessions.values() for turn in session]
    (folder / "edit_turns.json").write_text(json.dumps(turns))
    if described:
        (folder / "global_descriptions.json").write_text(json.dumps(descriptions))
    return folder


def image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def write_table(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    """A parquet file of row groups of `group` rows."""
    fields = {
        key: IMAGE if isinstance(x, dict) else pa.string() if isinstance(x, str) else pa.int32()
        for key, x in rows[0].items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), path, row_group_size=group)
    return path


def magicbrush_rows() -> list[dict[str, Any]]:
    return [
        {
            "img_id": name,
            "turn_index": k,
            "source_img": image(png(i, k - 1)),
            "mask_img": image(png(60 + i, k)),
            "instruction": f"edit {i} turn {k}",
            "target_img": image(png(i, k)),
        }
        for i, (name, turns) in enumerate(SESSIONS.items())
        for k in range(1, turns + 1)
    ]


def emu_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "instruction": f"edit {i}",
            "image": image(png(i, 0)),
            "task": "style" if i % 2 else "local",
            "split": "test",
            "idx": i,
            "hash": f"{i:08x}",
            "input_caption": caption(i, 0),
            "output_caption": caption(i, 1),
        }
        for i in range(count)
    ]


def mirror_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "original_prompt": caption(i, 0),
            "original_image": image(png(i, 0)),
            "edit_prompt": f"edit {i}",
            "edited_prompt": caption(i, 1),
            "edited_image": image(png(i, 1)),
        }
        for i in range(count)
    ]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """A JSONL file, and pictures a.png, b.png and c.png beside it."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for k, name in enumerate(("a.png", "b.png", "c.png")):
        (path.parent / name).write_bytes(png(7, k))
    return path
