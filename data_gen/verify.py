# SPDX-License-Identifier: Apache-2.0
"""The integrity of a packed data folder: hashes, counts, and every picture decoded once."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.progress import track

from data_gen.contact_sheet import SHOWN, contact_sheet
from ip2p_jax.cli import atomic_path
from ip2p_jax.data import manifest
from ip2p_jax.data.pairs import Pair, PairSource
from ip2p_jax.data.pictures import decode

SHEET = "contact_sheet.png"
THREADS = 8


class Verdict(NamedTuple):
    """Pairs by split, the range of sizes (px), and a line for each pair that is not right."""

    pairs: dict[str, int]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    faults: list[str]

    def __str__(self) -> str:
        counts = ", ".join(f"{split} {count}" for split, count in self.pairs.items())
        (w, h), (wide, high) = self.smallest, self.largest
        return f"{sum(self.pairs.values())} pairs ({counts}), {w}x{h} to {wide}x{high} px"


def fault_of(pair: Pair) -> tuple[str, tuple[int, int]]:
    """What is wrong with a pair ("" if nothing), and its size."""
    try:
        before, after = decode(pair.input), decode(pair.output)
    except ValueError as error:
        return f"broken picture ({error})", (0, 0)
    if before.size != after.size:
        return f"unequal sizes {before.size} and {after.size}", before.size
    if not pair.instruction.strip():
        return "no instruction", before.size
    return "", before.size


def verify(folder: Path) -> Verdict:
    """Reads all of a data folder.

    Raises ValueError or FileNotFoundError naming the first shard that is missing, truncated,
    doubled, unknown, or of another content than the manifest says.
    """
    splits = manifest.verify(folder, hashes=True)
    pairs, faults, sizes = {}, [], []
    with ThreadPoolExecutor(THREADS) as pool:
        for split in splits:
            source = PairSource(folder, split)
            pairs[split] = len(source)
            checked = pool.map(lambda i, source=source: fault_of(source[i]), range(len(source)))
            for i, (fault, size) in enumerate(track(checked, split, len(source))):
                if fault:
                    pair = source[i]
                    faults.append(f"{split} {i} (prompt {pair.prompt}, seed {pair.seed}): {fault}")
                else:
                    sizes.append(size)
    by_area = sorted(sizes, key=lambda size: size[0] * size[1]) or [(0, 0)]
    return Verdict(pairs, by_area[0], by_area[-1], faults)


def pictures(folder: Path) -> Iterator[tuple[Image.Image, Image.Image, str]]:
    """Pairs spread evenly over a data folder, to look at."""
    sources = [PairSource(folder, split) for split in manifest.load_manifest(folder)]
    places = [(source, i) for source in sources for i in range(len(source))]
    for source, i in itertools.islice(places, 0, None, max(1, len(places) // SHOWN)):
        pair = source[i]
        yield decode(pair.input), decode(pair.output), pair.instruction


def write_sheet(folder: Path) -> None:
    """Writes contact_sheet.png into a data folder."""
    with atomic_path(folder / SHEET) as part:
        part.write_bytes(contact_sheet(pictures(folder)))
