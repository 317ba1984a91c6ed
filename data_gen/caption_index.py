# SPDX-License-Identifier: Apache-2.0
"""Many captions, of which only 25 bytes each are held: they are read again when they are needed.

Captions are JSON lines {"caption": ..., "url": ...}, as `data_gen.captions` writes them; the url
may be missing.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64

FIRST, SAME_CAPTION, SAME_URL = 0, 1, 2
"""Whether a line is the first with its caption and with its url, or which of them it repeats."""


def key_of(text: str) -> int:
    """64 bits that stand for a text; among a million texts two are alike once in 37 million."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def lines_of(files: Sequence[Path]) -> Iterator[tuple[bytes, Path, int]]:
    """The lines that are not empty, each with its file and its number there."""
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected captions as JSON lines")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield line, path, number


def read_caption(line: bytes, path: Path, number: int) -> tuple[str, str]:
    """The caption, stripped, and the url of a line. ValueError names the line and what is wrong."""
    try:
        values = json.loads(line)
        caption = values["caption"].strip()
        url = values.get("url") or ""
        (caption + url).encode()  # half characters cannot be written again
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        caption = url = None
    if not caption or not isinstance(url, str):
        raise ValueError(
            f'{path}, line {number}: expected {{"caption": a text, "url": a text or nothing}}'
        )
    return caption, url


@dataclass(frozen=True)
class CaptionIndex:
    """Keys of the captions of `files`, by position; `order` sorts the keys of FIRST lines."""

    files: tuple[Path, ...]
    keys: UInt64[np.ndarray, " n"]
    repeats: UInt8[np.ndarray, " n"]
    order: Int[np.ndarray, " first"]
    sorted_keys: UInt64[np.ndarray, " first"]

    @classmethod
    def open(cls, files: Sequence[Path]) -> "CaptionIndex":
        """Reads the files once. ValueError if they hold none, or something that is no caption."""
        captions, urls = array("Q"), array("Q")
        for place in lines_of(files):
            caption, url = read_caption(*place)
            captions.append(key_of(caption))
            urls.append(key_of(url) if url else 0)
        if not captions:
            raise ValueError(f"{', '.join(map(str, files))}: holds no caption")
        keys = np.frombuffer(captions, np.uint64)
        repeats = np.where(is_first(keys), FIRST, SAME_CAPTION).astype(np.uint8)
        with_url = np.flatnonzero((repeats == FIRST) & (np.frombuffer(urls, np.uint64) != 0))
        again = with_url[~is_first(np.frombuffer(urls, np.uint64)[with_url])]
        repeats[again] = SAME_URL
        first = np.flatnonzero(repeats == FIRST)
        order = first[np.argsort(keys[first])]
        return cls(tuple(files), keys, repeats, order, keys[order])

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: int) -> int | None:
        """The position of a FIRST caption by its key."""
        at = int(np.searchsorted(self.sorted_keys, np.uint64(key)))
        found = at < len(self.order) and int(self.sorted_keys[at]) == key
        return int(self.order[at]) if found else None

    def read(self, wanted: Bool[np.ndarray, " n"]) -> Iterator[tuple[int, str, str]]:
        """Position, caption and url of the lines that are `wanted` when they are come to.

        The array may be changed meanwhile. ValueError if the files are no longer those of `open`.
        """
        changed = ValueError(f"{', '.join(map(str, self.files))}: changed while it was read")
        for position, place in enumerate(lines_of(self.files)):
            if position >= len(self.keys):
                raise changed
            if wanted[position]:
                caption, url = read_caption(*place)
                if key_of(caption) != self.keys[position]:
                    raise changed
                yield position, caption, url


def is_first(keys: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether no earlier key is the same."""
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first
