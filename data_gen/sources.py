# SPDX-License-Identifier: Apache-2.0
"""Where pairs can be imported from: the released folder layout, and parquet mirrors of it.

A source lists its prompts (`ids`, `seeds`) and reads any range of them (`read`). What cannot be
used becomes a `Refusal`, never an exception.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_jax.data.pairs import Pair
from ip2p_jax.data.pictures import plain
from ip2p_jax.data.released import SEEDS, Texts, pictures, read_seeds, read_texts, text


class Refusal(NamedTuple):
    """A pair that is left out. `reason` is one of a few words, `detail` says more."""

    prompt: str
    seed: str
    reason: str
    detail: str


Read = tuple[list[Pair], list[Refusal]]


def make_pair(
    prompt: str, seed: str, texts: Texts, pictures: Sequence[bytes | None]
) -> Pair | Refusal:
    """Checks two encoded pictures and their instruction."""
    if not texts.instruction.strip():
        return Refusal(prompt, seed, "no instruction", "")
    checked = []
    for name, picture in zip(("input", "output"), pictures, strict=True):
        if picture is None:
            return Refusal(prompt, seed, "missing picture", name)
        try:
            checked.append(plain(picture))
        except ValueError as error:
            return Refusal(prompt, seed, "broken picture", f"{name}: {error}")
    (before, size), (after, other) = checked
    if size != other:
        return Refusal(prompt, seed, "unequal sizes", f"{size} and {other}")
    return Pair(before, after, *texts, prompt, seed)


def _sorted_out(results: list[Pair | Refusal]) -> Read:
    pairs = [result for result in results if isinstance(result, Pair)]
    return pairs, [result for result in results if isinstance(result, Refusal)]


@dataclass(frozen=True)
class Folder:
    """The released layout: seeds.json and one folder a prompt."""

    path: Path
    ids: list[str]
    seeds: list[list[str]]

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """Reads seeds.json; ValueError names it if it is missing or not what it should be."""
        if not (path / SEEDS).is_file():
            raise ValueError(f"{path}: no {SEEDS} and no parquet files, nothing to import")
        prompts = read_seeds(path)
        return cls(path, list(prompts), list(prompts.values()))

    def read(self, start: int, stop: int) -> Iterator[Read]:
        """Reads prompts start..stop in order."""
        for prompt, seeds in zip(self.ids[start:stop], self.seeds[start:stop], strict=True):
            texts = self._texts(self.path / prompt)
            if isinstance(texts, Texts):
                yield _sorted_out([self._pair(prompt, seed, texts) for seed in seeds])
            else:
                yield [], [Refusal(prompt, seed, *texts) for seed in seeds]

    def _texts(self, folder: Path) -> Texts | tuple[str, str]:
        if not folder.is_dir():
            return "missing folder", ""
        try:
            return read_texts(folder)
        except (OSError, ValueError) as error:
            return "no prompt.json", str(error)

    def _pair(self, prompt: str, seed: str, texts: Texts) -> Pair | Refusal:
        files = pictures(self.path / prompt, seed)
        found = [file.read_bytes() if file.is_file() else None for file in files]
        return make_pair(prompt, seed, texts, found)


KNOWN_COLUMNS = (
    {
        "input": "original_image",
        "output": "edited_image",
        "instruction": "edit_prompt",
        "input_caption": "original_prompt",
        "output_caption": "edited_prompt",
    },
    {"input": "original_image", "output": "edited_image", "instruction": "edit_prompt"},
    {"input": "input_image", "output": "edited_image", "instruction": "edit_prompt"},
    {"input": "source_img", "output": "target_img", "instruction": "instruction"},
)
_TEXTS = Texts._fields


def _columns(file: Path, names: Sequence[str], columns: dict[str, str] | None) -> dict[str, str]:
    """The given mapping or the first known one that fits; ValueError lists what the file has."""
    for known in (columns,) if columns else KNOWN_COLUMNS:
        if not set(known.values()) - set(names):
            return known
    wanted = (
        f"columns {', '.join(sorted(columns.values()))}" if columns else "a known set of columns"
    )
    raise ValueError(
        f"{file}: expected {wanted}, found {', '.join(names)}; "
        "map them with --columns input=...,output=...,instruction=..."
    )


def _bytes(cell: Any) -> bytes | None:
    """The encoded picture of a cell: bytes, or the struct that `datasets` writes."""
    cell = cell.get("bytes") if isinstance(cell, dict) else cell
    return cell if isinstance(cell, bytes) else None


class Row(NamedTuple):
    """Where a pair is: file, row group, row in the group, row in the file."""

    file: int
    group: int
    row: int
    number: int


@dataclass(frozen=True)
class Parquet:
    """Parquet files, one row a pair. Rows with the same instruction and captions are one prompt."""

    files: list[Path]
    columns: dict[str, str]
    ids: list[str]
    rows: list[list[Row]]
    texts: list[Texts]

    @classmethod
    def open(cls, files: list[Path], columns: dict[str, str] | None) -> "Parquet":
        """Reads the text columns; ValueError names the file that is none or lacks columns."""
        prompts: dict[Any, tuple[Texts, list[Row]]] = {}
        found = columns
        for index, file in enumerate(files):
            try:
                parquet = pq.ParquetFile(file)
                found = _columns(file, parquet.schema_arrow.names, found)
                for row, texts in _read_texts(parquet, index, found):
                    known = texts.input_caption and texts.output_caption
                    key = texts if known else row
                    prompts.setdefault(key, (texts, []))[1].append(row)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file}: not a readable parquet file ({error})") from None
        ids = [f"{i:07d}" for i in range(len(prompts))]
        texts, rows = [t for t, _ in prompts.values()], [r for _, r in prompts.values()]
        return cls(files, found or {}, ids, rows, texts)

    @functools.cached_property
    def seeds(self) -> list[list[str]]:
        """Pairs are named by file and row."""
        return [[f"{self.files[r.file].stem}:{r.number}" for r in rows] for rows in self.rows]

    def read(self, start: int, stop: int) -> Iterator[Read]:
        """Reads prompts start..stop in order; each row group they touch is read once."""
        wanted = sorted(itertools.chain.from_iterable(self.rows[start:stop]))
        pictures = dict(self._pictures(wanted))
        for i in range(start, stop):
            named = zip(self.rows[i], self.seeds[i], strict=True)
            yield _sorted_out(
                [make_pair(self.ids[i], seed, self.texts[i], pictures[row]) for row, seed in named]
            )

    def _pictures(self, rows: list[Row]) -> Iterator[tuple[Row, list[bytes | None]]]:
        names = [self.columns["input"], self.columns["output"]]
        for (file, group), members in itertools.groupby(rows, lambda row: (row.file, row.group)):
            members = list(members)
            table = pq.ParquetFile(self.files[file]).read_row_group(group, columns=names)
            table = table.take([row.row for row in members])
            cells = (table[name].to_pylist() for name in names)
            for row, *pair in zip(members, *cells, strict=True):
                yield row, [_bytes(cell) for cell in pair]


def _read_texts(
    parquet: pq.ParquetFile, file: int, columns: dict[str, str]
) -> Iterator[tuple[Row, Texts]]:
    number = 0
    present = [field for field in _TEXTS if field in columns]
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=[columns[field] for field in present])
        values = (table[columns[field]].to_pylist() for field in present)
        for row, texts in enumerate(zip(*values, strict=True)):
            named = dict(zip(present, map(text, texts), strict=True))
            yield Row(file, group, row, number), Texts(**named)
            number += 1


def open_source(inputs: list[Path], columns: dict[str, str] | None) -> Folder | Parquet:
    """One folder with seeds.json, one folder with parquet files inside, or parquet files."""
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there")
    if len(inputs) == 1 and inputs[0].is_dir():
        files = sorted(inputs[0].rglob("*.parquet"))
        if (inputs[0] / SEEDS).is_file() or not files:
            return Folder.open(inputs[0])
        return Parquet.open(files, columns)
    for path in inputs:
        if path.suffix != ".parquet":
            raise ValueError(f"{path}: expected one folder, or files that end in .parquet")
    return Parquet.open(inputs, columns)
