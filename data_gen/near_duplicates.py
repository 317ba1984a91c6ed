# SPDX-License-Identifier: Apache-2.0
"""Finds texts that are almost the same as an earlier one, among a million, in any language.

Two texts are as similar as their sets of four characters in a row (Jaccard). Candidates come from
MinHash signatures cut into bands (Broder 1997; Leskovec, Rajaraman, Ullman: Mining of Massive
Datasets, chapter 3); each candidate pair is then compared in full, so nothing is called similar
that is not. Of pairs at 0.8, three in a thousand are missed; the more similar, the fewer. Pairs at
0.3 are compared once in 500 times, so texts that share a phrase cost little. What the bands hold
lies on the disk, and is read band by band.
"""

import contextlib
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import IO

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

GRAM = 4  # characters
BANDS, ROWS = 32, 8
AT_ONCE = 4096  # texts whose bands are written together
REMEMBERED = 16384  # texts, while they are compared
COMPARED = 64
"""How many kept texts of a band's bucket, the latest ones, a text is compared with at most."""

_random = np.random.default_rng(0)
FACTORS = _random.integers(0, 2**63, (BANDS * ROWS, 1), np.uint64) * 2 + 1
TERMS = _random.integers(0, 2**63, (BANDS * ROWS, 1), np.uint64)
MIX = _random.integers(0, 2**63, (1, ROWS), np.uint64) * 2 + 1


def grams(text: str) -> UInt64[np.ndarray, " g"]:
    """The set of a text's runs of four letters or digits, in any case, spaces counted once."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() or unicodedata.combining(c) else " " for c in folded).split()
    padded = " " + " ".join(words) + " " * GRAM
    points = np.frombuffer(padded.encode("utf-32-le"), np.uint32).astype(np.uint64)
    count = len(points) - GRAM + 1
    runs = np.zeros(count, np.uint64)
    for i in range(GRAM):  # 21 bits a character
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + points[i : i + count]
    return np.unique(runs)


def similarity(a: UInt64[np.ndarray, " g"], b: UInt64[np.ndarray, " h"]) -> float:
    """The share of what two sets have in common in what they have together, 0 to 1."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def bands(text: str) -> UInt32[np.ndarray, " bands"]:
    """The keys of a text's bands; texts that share one are compared."""
    least = (FACTORS * grams(text)[None] + TERMS >> np.uint64(1)).min(axis=1)
    mixed = (least.reshape(BANDS, ROWS) * MIX).sum(axis=1, dtype=np.uint64)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def write_bands(texts: Iterable[str], files: Sequence[IO[bytes]]) -> int:
    """Writes the keys of each band of all texts into its file; returns how many texts there are."""
    texts, count = iter(texts), 0
    while some := list(islice(texts, AT_ONCE)):
        keys = np.stack([bands(text) for text in some])
        for file, band in zip(files, keys.T, strict=True):
            file.write(band.tobytes())
        count += len(some)
    return count


def shared_buckets(files: Sequence[IO[bytes]]) -> dict[int, list[int]]:
    """For every text that shares a bucket of a band, the numbers of its shared buckets."""
    buckets: defaultdict[int, list[int]] = defaultdict(list)
    number = 0
    for file in files:
        file.seek(0)
        band = np.frombuffer(file.read(), np.uint32)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=~band[order[:1]]))
        sizes = np.diff(starts, append=len(order))
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            for member in order[start : start + size].tolist():
                buckets[member].append(number)
            number += 1
    return buckets


def near_duplicates(
    texts: Iterable[str], text_of: Callable[[int], str], threshold: float
) -> Bool[np.ndarray, " n"]:
    """Which texts are at least as similar as `threshold` to an earlier one that is not such itself.

    texts: all of them, once; text_of: a text by its number, asked for those that may be similar.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(BANDS)]
        found: Bool[np.ndarray, " n"] = np.zeros(write_bands(texts, files), bool)
        buckets = shared_buckets(files)
    kept: defaultdict[int, list[int]] = defaultdict(list)
    grams_of = lru_cache(REMEMBERED)(lambda number: grams(text_of(number)))
    for number in sorted(buckets):
        earlier = {other for bucket in buckets[number] for other in kept[bucket][-COMPARED:]}
        found[number] = any(
            similarity(grams_of(number), grams_of(other)) >= threshold for other in sorted(earlier)
        )
        if not found[number]:
            for bucket in buckets[number]:
                kept[bucket].append(number)
    return found
