# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of parquet, JSON lines, CSV, TSV and text files one after the other, so that a
file may be larger than the memory. All but parquet may be compressed (.gz, .bz2, .zst)."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_jax.weights.hub import HUB_ID, download

CAPTIONS = ("TEXT", "text", "caption", "Caption", "prompt", "sentence", "input")
URLS = ("URL", "url", "image_url")
"""What columns are called, the first that is there; those of LAION-Aesthetics before all."""

COMPRESSED = (".gz", ".bz2", ".zst")
KINDS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
LONGEST_FIELD = 1 << 20
"""Characters of a field of a CSV file: a quotation mark that is never closed ends there."""

HEAD = 1000
"""Lines of a JSON file that say what it holds: each may leave out what it has not."""

Row = tuple[Any, Any] | None
"""What the columns of a row hold, the caption's and the url's; None for a row that is broken."""


class Columns(NamedTuple):
    """The columns that are asked for, None where the usual names are to be tried; without a
    `header` those of a CSV or TSV file are called 1, 2, ..."""

    caption: str | None = None
    url: str | None = None
    header: bool = True


def kind(path: Path) -> str:
    """The ending that says what a file is, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def find_files(inputs: Sequence[str], pattern: str, revision: str | None) -> list[Path]:
    """The files of paths, folders and hub data sets, in order.

    pattern: which files of a folder or of a data set, e.g. "train*.parquet". Raises ValueError or
    FileNotFoundError that names what is not there or is of no known kind.
    """
    files = []
    for name in inputs:
        path = Path(name).expanduser()
        if not path.exists():
            if not HUB_ID.fullmatch(name) or kind(path) in KINDS:
                raise FileNotFoundError(
                    f"{name}: no such file or folder, and not a hub data set (owner/name)"
                )
            path = download(name, revision, [pattern, f"*/{pattern}"], "dataset")
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob(pattern) if kind(file) in KINDS)
            if not found:
                raise ValueError(f"{name}: holds no file called {pattern}; name others by --files")
        for file in found:
            if kind(file) not in KINDS:
                raise ValueError(f"{file}: expected a name that ends in {', '.join(KINDS)}")
        files += found
    return files


def rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a file. Raises ValueError that names it if it cannot be read, or its columns."""
    read = {".parquet": parquet_rows, ".csv": table_rows, ".tsv": table_rows, ".txt": text_rows}
    try:
        yield from read.get(kind(path), json_rows)(path, columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable ({error})") from None


def choose(path: Path, names: Sequence[str], columns: Columns) -> tuple[str, str | None]:
    """The columns to read of those that there are; ValueError lists them."""
    caption = columns.caption or next((name for name in CAPTIONS if name in names), None)
    url = columns.url or next((name for name in URLS if name in names), None)
    wrong = [name for name in (columns.caption, columns.url) if name and name not in names]
    if wrong or caption is None:
        asked = f"no column {wrong[0]}" if wrong else "no column that is known to hold captions"
        raise ValueError(f"{path}: {asked}; choose by --column and --url-column of {list(names)}")
    return caption, url


def parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        wanted = choose(path, file.schema_arrow.names, columns)
        names = [name for name in wanted if name]
        for batch in file.iter_batches(4096, columns=names, use_threads=False):
            cells = [batch[name].to_pylist() for name in names]
            yield from zip(*cells, *[[None] * len(batch)] * (2 - len(cells)), strict=True)


def open_text(path: Path) -> io.TextIOWrapper:
    """Opens a file that may be compressed; what is no UTF-8 becomes a replacement character."""
    stream = pa.input_stream(path, compression="detect")
    return io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="\n")


def text_rows(path: Path, columns: Columns) -> Iterator[Row]:
    with open_text(path) as lines:
        yield from ((line, None) for line in lines if line.strip())


def json_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Rows of JSON lines; the url of each is under the first of the usual names that it has."""
    with open_text(path) as lines:
        parsed = (json_row(line) for line in lines if line.strip())
        head = list(itertools.islice(parsed, HEAD))
        whole = [values for values in head if values is not None]
        if not whole:
            raise ValueError(f"{path}: expected JSON lines, one object each")
        caption, _ = choose(path, list(dict.fromkeys(itertools.chain(*whole))), columns)
        urls = (columns.url,) if columns.url else URLS
        for values in itertools.chain(head, parsed):
            if values is None:
                yield None
            else:
                url = next((name for name in urls if name in values), None)
                yield values.get(caption), values[url] if url else None


def json_row(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def table_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a CSV or TSV file; those with another number of cells than the first are broken."""
    with open_text(path) as lines:
        table = tab_cells(lines) if kind(path) == ".tsv" else comma_cells(lines)
        first = next(table, None) or []
        names = first if columns.header else [str(i + 1) for i in range(len(first))]
        wanted = choose(path, names, columns)
        places = [names.index(name) if name else None for name in wanted]
        for cells in table if columns.header else itertools.chain([first], table):
            if cells is None or len(cells) != len(names):
                yield None
            else:
                caption, url = (None if i is None else cells[i] for i in places)
                yield caption, url


def tab_cells(lines: Iterable[str]) -> Iterator[list[str]]:
    """Cells between tabs; a quotation mark is a character like any other."""
    return (line.rstrip("\r\n").split("\t") for line in lines if line.strip())


def comma_cells(lines: Iterable[str]) -> Iterator[list[str] | None]:
    """Cells between commas, some in quotation marks; None for what csv does not take."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(lines)
    while True:
        try:
            if cells := next(reader):
                yield cells
        except csv.Error:
            yield None
        except StopIteration:
            return
