# SPDX-License-Identifier: Apache-2.0
"""What every shard of a data folder must contain, checked before anything is read from it.

ArrayRecord opens a truncated file as an empty one, without an error: so lengths are written down.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader

MANIFEST = "manifest.json"


class Shard(NamedTuple):
    """One ArrayRecord file. `file` is relative to the data folder, `sizes` are records a prompt,
    `pictures` the width and height in px of each prompt's first (older folders say nothing)."""

    file: str
    records: int
    bytes: int
    sha256: str
    sizes: list[int]
    pictures: Sequence[Sequence[int]] = ()


Manifest = dict[str, list[Shard]]
"""The shards of each split, in order."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(path: Path, sizes: list[int], pictures: Sequence[Sequence[int]] = ()) -> Shard:
    """Describes a shard file just written, that holds prompts of `sizes` records."""
    return Shard(path.name, sum(sizes), path.stat().st_size, sha256(path), sizes, pictures)


def as_json(manifest: Manifest, **more: Any) -> str:
    """What `manifest.json` holds, and `more` beside it."""
    splits = {split: [shard._asdict() for shard in shards] for split, shards in manifest.items()}
    return json.dumps({"splits": splits, **more})


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` into a data folder."""
    (folder / MANIFEST).write_text(as_json(manifest))


def load_manifest(folder: Path) -> Manifest:
    """Reads `manifest.json`; ValueError or FileNotFoundError name the folder or file."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {MANIFEST}, not a data folder (python -m data_gen.pack makes one)"
        )
    try:
        splits = json.loads(path.read_text())["splits"]
        return {split: [Shard(**shard) for shard in shards] for split, shards in splits.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); make the data anew") from None


def _records(path: Path) -> int:
    """How many records a shard has; 0 if it is so damaged that this cannot be told."""
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError):
        return 0
    return count


def _fault(path: Path, shard: Shard, hashes: bool) -> str | None:
    """What is wrong with a shard file, if anything."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != shard.bytes:
        kind = "truncated" if size < shard.bytes else "another file"
        return f"has {size} bytes, the manifest says {shard.bytes} ({kind})"
    if (records := _records(path)) != shard.records:
        return f"has {records} records, the manifest says {shard.records}"
    if hashes and sha256(path) != shard.sha256:
        return "has another content than the manifest says (sha256)"
    return None


def _listed_twice(shards: Iterable[Shard]) -> str | None:
    seen = set()
    for shard in shards:
        if shard.file in seen:
            return shard.file
        seen.add(shard.file)
    return None


def verify(folder: Path, *, hashes: bool = False) -> Manifest:
    """Checks every shard's presence, size and record count, with `hashes` its content too.

    Raises ValueError or FileNotFoundError naming the first shard that is missing, truncated,
    doubled or unknown.
    """
    manifest = load_manifest(folder)
    shards = [shard for split in manifest.values() for shard in split]
    if twice := _listed_twice(shards):
        raise ValueError(f"{folder / MANIFEST}: shard {twice} is listed twice")
    for shard in shards:
        if fault := _fault(folder / shard.file, shard, hashes):
            raise ValueError(f"shard {folder / shard.file} {fault}; make the data anew")
    known = {shard.file for shard in shards}
    for path in sorted(folder.rglob("*.array_record*")):
        if (file := path.relative_to(folder).as_posix()) not in known:
            raise ValueError(f"shard {folder / file} is not in the manifest (doubled?): remove it")
    return manifest


def prompts_of(folder: Path, manifest: Manifest, split: str) -> list[range]:
    """The records of each prompt of a split; ValueError names the splits that `folder` has."""
    if split not in manifest:
        raise ValueError(f"{folder}: no split {split!r}, only {', '.join(manifest)}")
    sizes = [size for shard in manifest[split] for size in shard.sizes]
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def pictures_of(manifest: Manifest, split: str) -> list[Sequence[int]]:
    """Width and height of each prompt's first picture, where all shards of a split say that."""
    shards = manifest[split]
    known = all(len(shard.pictures) == len(shard.sizes) for shard in shards)
    return [size for shard in shards for size in shard.pictures] if known else []
