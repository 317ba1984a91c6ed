# SPDX-License-Identifier: Apache-2.0
"""Evaluation sets in parquet files, one row a turn, as the `datasets` library writes them.

Pictures are encoded bytes, or structs with a field `bytes`. Files of a split are called
`SPLIT-00000-of-00003...parquet`, or lie in a folder called like it.
"""

import functools
import itertools
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_jax.evaluation.sets.records import (
    ExampleSet,
    Plan,
    Source,
    Step,
    bytes_source,
    caption,
    from_sessions,
)

NAMES = {
    "input": ("original_image", "input_image", "source_img", "source_image", "image"),
    "instruction": ("edit_prompt", "instruction", "edit"),
    "target": ("edited_image", "target_img", "target_image", "output_image"),
    "input_caption": ("original_prompt", "input_caption", "source_global_caption"),
    "output_caption": ("edited_prompt", "output_caption", "target_global_caption"),
    "mask": ("mask_img",),
}
"""What columns are called, the first that is there; only the first two fields have to be."""

PICTURES = ("input", "target", "mask")
MAGICBRUSH = ("img_id", "turn_index")
"""Columns of osunlp/MagicBrush beside source_img, mask_img, instruction and target_img."""

EMU_EDIT = ("task", "idx")
"""Columns of facebook/emu_edit_test_set beside image, instruction, input_caption, output_caption,
split and hash. Its mirror with results has them as edited_image: no ground truth, not read."""


class Row(NamedTuple):
    """Where a turn is: file, row group, row of the file; and what its text columns say."""

    file: Path
    group: int
    number: int
    values: dict[str, Any]


class Spool:
    """Pictures of parquet files, for random access without holding them in memory.

    A row group can only be read as a whole: the first time, its pictures go to an unnamed temporary
    file (in TMPDIR), which is gone when the process is. Used by many threads.
    """

    def __init__(self, columns: list[str]):
        self._columns = columns
        self._file = tempfile.TemporaryFile()
        self._places: dict[tuple[Path, int, str], tuple[int, int]] = {}
        self._groups: set[tuple[Path, int]] = set()
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)

    def read(self, row: Row, column: str) -> bytes:
        """The encoded picture of a cell; ValueError if there is none."""
        with self._lock:
            if (row.file, row.group) not in self._groups:
                try:
                    self._load(row.file, row.group)
                except pa.ArrowException as error:
                    raise ValueError(f"{row.file}: row group {row.group}: {error}") from None
        offset, length = self._places[row.file, row.number, column]
        if not length:
            raise ValueError(f"{where(row, column)}: holds no encoded picture")
        return os.pread(self._file.fileno(), length, offset)

    def _load(self, file: Path, group: int) -> None:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        number = sum(parquet.metadata.row_group(g).num_rows for g in range(group))
        batches = parquet.iter_batches(16, row_groups=[group], columns=self._columns)
        for cells in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
            for column, cell in cells.items():
                data = cell.get("bytes") if isinstance(cell, dict) else cell
                data = data if isinstance(data, bytes) else b""
                self._places[file, number, column] = (self._file.tell(), len(data))
                self._file.write(data)
            number += 1
        self._file.flush()
        self._groups.add((file, group))


def where(row: Row, column: str) -> str:
    return f"{row.file}, row {row.number}, {column}"


def parquet_files(path: Path, split: str) -> list[Path]:
    """The files of a split; one file is taken whole. ValueError lists what there is instead."""
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.parquet"))
    chosen = [
        file
        for file in files
        if file.stem.partition("-")[0] == split or split in file.relative_to(path).parts[:-1]
    ]
    if not chosen:
        found = ", ".join(dict.fromkeys(file.stem.partition("-")[0] for file in files))
        raise ValueError(
            f"{path}: no parquet files of split {split!r} ({split}-*.parquet, or a folder {split})"
            + (f", found {found}" if found else "")
        )
    return chosen


def read_schema(file: Path) -> list[str]:
    """The columns of a parquet file; ValueError names the file if it is none."""
    try:
        return pq.ParquetFile(file).schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({error})") from None


def recognise(path: Path, split: str) -> str:
    """The layout of parquet files by their columns: magicbrush, emu_edit or parquet."""
    names = set(read_schema(parquet_files(path, split)[0]))
    if names.issuperset(MAGICBRUSH):
        return "magicbrush"
    return "emu_edit" if names.issuperset(EMU_EDIT) else "parquet"


def find_columns(file: Path, layout: str) -> dict[str, str]:
    """Which column each field is; ValueError names what is missing."""
    names = read_schema(file)
    known = {key: next((x for x in columns if x in names), None) for key, columns in NAMES.items()}
    if layout == "emu_edit":
        del known["target"]
    needed = {"magicbrush": MAGICBRUSH, "emu_edit": EMU_EDIT}.get(layout, ())
    missing = [" or ".join(NAMES[key]) for key in ("input", "instruction") if not known[key]]
    missing += [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"{file}: no column {missing[0]}, found {', '.join(names)}")
    return {key: name for key, name in known.items() if name} | {name: name for name in needed}


def read_rows(file: Path, columns: dict[str, str]) -> Iterator[Row]:
    """The texts of a file, row by row."""
    texts = {key: name for key, name in columns.items() if key not in PICTURES}
    parquet = pq.ParquetFile(file)
    number = itertools.count()
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=list(texts.values()))
        for cells in table.to_pylist():
            yield Row(file, group, next(number), {key: cells[x] for key, x in texts.items()})


def open_tables(path: Path, split: str, layout: str, turns: str) -> ExampleSet:
    """Reads the texts of a split. ValueError names the file and what is wrong with it."""
    files = parquet_files(path, split)
    columns = find_columns(files[0], layout)
    for file in files[1:]:
        if missing := set(columns.values()) - set(read_schema(file)):
            raise ValueError(f"{file}: no column {min(missing)}, which {files[0].name} has")
    spool = Spool([name for key, name in columns.items() if key in PICTURES])
    rows = [row for file in files for row in read_rows(file, columns)]
    if not rows:
        raise ValueError(f"{path}: holds no rows of split {split}")
    steps = [plan_row(spool, columns, layout, row) for row in rows]
    if layout == "magicbrush" and turns == "multi":
        plans = plan_sessions(path, rows, steps)
    else:
        plans = [Plan(step.name, step.input, (step,)) for step in steps if step.input]
    return from_sessions(str(path), plans, turns)


def plan_row(spool: Spool, columns: dict[str, str], layout: str, row: Row) -> Step:
    names = {
        "magicbrush": "{img_id}-output{turn_index}",
        "emu_edit": "{task}/{idx}",
        "parquet": f"{row.file.stem}:{row.number}",
    }
    instruction = row.values["instruction"]
    return Step(
        names[layout].format_map(row.values),
        cell(spool, row, columns.get("input")),
        instruction if isinstance(instruction, str) else "",
        caption(row.values.get("input_caption")),
        caption(row.values.get("output_caption")),
        cell(spool, row, columns.get("target")),
        cell(spool, row, columns.get("mask")),
    )


def cell(spool: Spool, row: Row, column: str | None) -> Source | None:
    if column is None:
        return None
    return bytes_source(where(row, column), functools.partial(spool.read, row, column))


def plan_sessions(path: Path, rows: list[Row], steps: list[Step]) -> list[Plan]:
    """Turns of one picture by their number, which has to go from 1 on."""
    sessions: dict[str, list[tuple[int, Step]]] = {}
    for row, step in zip(rows, steps, strict=True):
        turn = row.values["turn_index"], step
        sessions.setdefault(str(row.values["img_id"]), []).append(turn)
    plans = []
    for name, turns in sessions.items():
        numbers, ordered = zip(*sorted(turns, key=lambda turn: turn[0]), strict=True)
        if numbers != tuple(range(1, len(turns) + 1)):
            raise ValueError(
                f"{path}: session {name} has turns {', '.join(map(str, numbers))}, expected "
                "1, 2, ...: --turns single can take it"
            )
        plans.append(Plan(name, ordered[0].input, ordered))
    return plans
