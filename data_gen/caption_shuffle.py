# SPDX-License-Identifier: Apache-2.0
"""Puts many captions in random order and drops repetitions, on disk: only one part of 256 is in
memory at once.

Twice the captions are spread over 256 files: by a hash of their url, so that equal urls meet in
one file, then by a hash of what they say and of the seed. Read file by file, and sorted within
each by the whole hash, they are in an order that is random, that the seed alone decides, and in
which captions that say the same are neighbours. The first N of it are a sample of N.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from data_gen.caption_text import Bounds, clean, folded, useless
from ip2p_jax.cli import atomic_path

FILES = 256
CHUNK = 50_000
"""Items between two notes of how far the work is."""

EXAMPLES = 5
"""Captions that are kept to show what was left out, of each reason."""


class Item(NamedTuple):
    """A caption and its url or "", and why it is left out, or ""."""

    caption: str
    url: str
    reason: str = ""


@dataclass
class Progress:
    """How far the spreading of files is: whole files, items of the next; bytes of each result."""

    files: int = 0
    items: int = 0
    sizes: list[int] = field(default_factory=lambda: [0] * FILES)
    kept: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, item: Item) -> None:
        """Counts an item that has a reason."""
        self.left_out[item.reason] = self.left_out.get(item.reason, 0) + 1
        examples = self.examples.setdefault(item.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(writable(item.caption[:200]))


def hash_of(text: str, key: bytes = b"") -> int:
    """64 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


def order_of(caption: str, seed: int) -> int:
    """Where a caption is in the order of a seed; the same for captions that say the same."""
    return hash_of(folded(caption), seed.to_bytes(8, "big"))


def cleaned(rows: Iterator[tuple[Any, Any] | None], bounds: Bounds) -> Iterator[Item]:
    """What becomes of rows as they are read."""
    for row in rows:
        if row is None:
            yield Item("", "", "broken row")
        elif not isinstance(row[0], str | None):
            yield Item(repr(row[0]), "", "not a text")
        else:
            caption = clean(row[0] or "")
            url = writable(row[1].strip()) if isinstance(row[1], str) else ""
            reason = useless(caption, bounds)
            yield Item(row[0] or "" if reason else caption, url, reason)


def writable(text: str) -> str:
    """A text as far as UTF-8 can hold it."""
    return text.encode(errors="ignore").decode()


def to_line(item: Item) -> str:
    """A caption as it is written: JSON, without a url that it has not."""
    values = {"caption": item.caption} | ({"url": item.url} if item.url else {})
    return json.dumps(values, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> Iterator[Item]:
    """What `to_line` wrote."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            values = json.loads(line)
            yield Item(values["caption"], values.get("url", ""))


def one_of_a_url(path: Path) -> Iterator[Item]:
    """The items of a file of the first spreading, those left out that repeat a url."""
    seen = set()
    for item in read_lines(path):
        yield item._replace(reason="same url") if item.url in seen else item
        if item.url:
            seen.add(item.url)


def parts(folder: Path) -> list[Path]:
    """The files that `spread` writes."""
    return [folder / f"{i:03d}.jsonl" for i in range(FILES)]


def spread(
    sources: Sequence[Path],
    items: Callable[[Path], Iterator[Item]],
    place: Callable[[Item], int],
    folder: Path,
    tick: Callable[[Progress], None],
) -> Progress:
    """Spreads the items of files over those of a folder; goes on where it was stopped.

    place: 64 bits, of which the first eight are the file. tick: is called now and then.
    """
    progress = open_progress(folder)
    held = Held(folder, progress)
    for source in sources[progress.files :]:
        for item in itertools.islice(items(source), progress.items, None):
            progress.items += 1
            if item.reason:
                progress.leave_out(item)
            else:
                progress.kept += 1
                held.lines[place(item) >> 56].append(to_line(item))
            held.count += 1
            if held.count == CHUNK:
                held.write()
                tick(progress)
        progress.files, progress.items = progress.files + 1, 0
    held.write()
    return progress


class Held:
    """Lines that are still to be appended to the files of a folder, and how many items there were
    since they last were."""

    def __init__(self, folder: Path, progress: Progress):
        self.folder, self.progress = folder, progress
        self.files = parts(folder)
        self.begin()

    def begin(self) -> None:
        self.lines: list[list[str]] = [[] for _ in self.files]
        self.count = 0

    def write(self) -> None:
        """Appends them, then notes how far the work is."""
        for i, lines in enumerate(self.lines):
            if lines:
                self.progress.sizes[i] += append(self.files[i], "".join(lines).encode())
        with atomic_path(self.folder / "progress.json") as part:
            part.write_text(json.dumps(asdict(self.progress)))
        self.begin()


def append(path: Path, data: bytes) -> int:
    with path.open("ab") as file:
        return file.write(data)


def open_progress(folder: Path) -> Progress:
    """How far a folder is; what was written after that is cut off. A folder that lacks something,
    as after a loss of power, begins anew."""
    files = parts(folder)
    try:
        progress = Progress(**json.loads((folder / "progress.json").read_text()))
    except (FileNotFoundError, ValueError):
        progress = None
    if progress and all(size_of(f) >= s for f, s in zip(files, progress.sizes, strict=True)):
        for file, size in zip(files, progress.sizes, strict=True):
            if size_of(file) > size:
                os.truncate(file, size)
        return progress
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        file.touch()
    return Progress()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def in_order(folder: Path, seed: int) -> Iterator[Item]:
    """The items of the second spreading in the order of a seed; those left out that say the same
    as one before them."""
    for file in parts(folder):
        found = [(order_of(item.caption, seed), item) for item in read_lines(file)]
        found.sort(key=lambda pair: pair[0])
        for _, alike in itertools.groupby(found, key=lambda pair: pair[0]):
            seen = set()
            for _, item in alike:
                same = folded(item.caption)
                yield item._replace(reason="same caption") if same in seen else item
                seen.add(same)
