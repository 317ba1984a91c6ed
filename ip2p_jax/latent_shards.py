# SPDX-License-Identifier: Apache-2.0
"""Makes the shards of a latent folder: pairs through the encoder of a VAE.

A shard is a unit of work: consecutive prompts of one split, written whole or not at all. The
encoder takes a fixed number of rows a device, so a shard has the same bytes on any number of
devices and hosts, and after a restart.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import nnx
from jaxtyping import UInt8

from ip2p_jax.cli import atomic_path
from ip2p_jax.config import Data
from ip2p_jax.data.buckets import Bucket, bucket_of_each
from ip2p_jax.data.latents import SHARDS, Latents, serialize
from ip2p_jax.data.manifest import Shard, measure
from ip2p_jax.data.pairs import SPLITS, Pair, PairSource
from ip2p_jax.data.transforms import View, check_pair, draw_views, see
from ip2p_jax.devices import put, shardings
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import VAEConfig
from ip2p_jax.models.vae import VAE
from ip2p_jax.networks import to_pixels
from ip2p_jax.storage import retried
from ip2p_jax.types import Params

READERS = 8
"""Threads that decode and resize pictures."""

UNREAD = Pair(b"", b"", "", "", "", "", "")
"""In place of a pair whose record is damaged."""


class Job(NamedTuple):
    """One shard: the prompts start..stop of a split."""

    split: str
    start: int
    stop: int
    path: Path

    @property
    def done(self) -> Path:
        """Written last; says that the shard is whole and what is in it."""
        return self.path.with_suffix(".json")


class Refused(NamedTuple):
    """A pair that is left out, and why."""

    prompt: str
    seed: str
    reason: str


class Row(NamedTuple):
    """One view of one pair: `pair` is its record in the source."""

    pair: int
    view: View


class Seen(NamedTuple):
    """A row that has been read: its pair and both pictures, or why there are none (then black)."""

    row: Row
    pair: Pair
    pictures: UInt8[np.ndarray, "2 h w 3"]
    reason: str = ""


class Recipe(NamedTuple):
    """Which views of a pair there are; `data` says how they are drawn."""

    data: Data
    views: int
    seed: int


def cut(counts: dict[str, int], size: int, folder: Path) -> list[Job]:
    """Cuts so many prompts of each split into shards of `size` prompts."""
    return [
        Job(split, i, min(i + size, n), folder / SHARDS / f"{split}-{i:09d}.array_record")
        for split, n in counts.items()
        for i in range(0, n, size)
    ]


class Encoder:
    """The encoder of a VAE on some devices, `rows` pairs on each at a time."""

    def __init__(
        self, cfg: VAEConfig, params: Params, *, dtype: Any, rows: int, devices: Sequence[Any]
    ):
        graphdef, _ = abstract(VAE, cfg, dtype=dtype)
        self.by_row, everywhere = shardings(devices)
        self.params = put(params, dtype, everywhere)
        self.most = rows * len(devices)
        precision = "highest" if dtype == jnp.float32 else "default"

        def encode(params: Params, pictures: Any) -> tuple[Any, ...]:
            vae, x = nnx.merge(graphdef, params), to_pixels(pictures)
            with jax.default_matmul_precision(precision):
                moments = vae.encode(x[:, 0]).mean, *vae.encode(x[:, 1])
            return tuple(m.astype(jnp.float16) for m in moments)

        self.encode = jax.jit(encode, out_shardings=self.by_row)

    def __call__(self, pictures: UInt8[np.ndarray, "b 2 h w 3"]) -> tuple[Any, ...]:
        """Mean of the pictures before, mean and log-variance of those after: float16, on the
        devices, still computing. Rows are repeated to fill the devices, and not dropped."""
        fill = np.arange(self.most) % len(pictures)
        return self.encode(self.params, jax.device_put(pictures[fill], self.by_row))


def rows_of(job: Job, source: PairSource, recipe: Recipe, of: Sequence[Bucket]) -> list[Row]:
    """All views of a shard, bucket by bucket; `of` are those of its prompts. The views of a pair
    depend on its place in the split."""
    split = list(SPLITS).index(job.split)
    rows = [
        Row(pair, view)
        for prompt, bucket in zip(source.prompts[job.start : job.stop], of, strict=True)
        for pair in prompt
        for view in draw_views(
            np.random.default_rng([recipe.seed, split, pair]), recipe.data, bucket, recipe.views
        )
    ]
    return sorted(rows, key=lambda row: row.view.bucket)


def read(source: PairSource, row: Row) -> Seen:
    """Reads one view of a pair; one that training would not use is given its reason."""
    pair = UNREAD
    try:
        pair = source[row.pair]
        check_pair(pair)
        pictures = np.stack([see(x, row.view) for x in (pair.input, pair.output)])
    except ValueError as error:
        width, height = row.view.bucket
        return Seen(row, pair, np.zeros((2, height, width, 3), np.uint8), str(error))
    return Seen(row, pair, pictures)


def encoded(
    rows: Sequence[Row], source: PairSource, encoder: Encoder
) -> Iterator[tuple[Seen, tuple[np.ndarray, ...]]]:
    """Every row with its moments; rows of one bucket are neighbours. While the devices compute a
    batch, the next one is read."""

    def begin(batch: Sequence[Row]) -> tuple[list[Seen], tuple[Any, ...]]:
        seen = list(pool.map(functools.partial(read, source), batch))
        return seen, encoder(np.stack([x.pictures for x in seen]))

    alike = (list(x) for _, x in itertools.groupby(rows, lambda row: row.view.bucket))
    batches = (x[i : i + encoder.most] for x in alike for i in range(0, len(x), encoder.most))
    with ThreadPoolExecutor(READERS) as pool:
        for seen, moments in one_ahead(map(begin, batches)):
            yield from zip(seen, zip(*map(np.asarray, moments), strict=True), strict=False)


def one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items; when one is asked for, the one after it has been begun."""
    waiting = next(items, None)
    for item in items:
        yield waiting
        waiting = item
    if waiting is not None:
        yield waiting


def reason_of(seen: Seen, moments: tuple[np.ndarray, ...]) -> str:
    """Why a view cannot be kept, if it cannot."""
    finite = all(np.isfinite(x).all() for x in moments)
    return seen.reason or ("" if finite else "its latents are not finite in 16 bits")


def latents_of(pair: Pair, moments: tuple[np.ndarray, ...]) -> Latents:
    """The record of one view."""
    return Latents(
        *moments,
        instruction=pair.instruction,
        input_caption=pair.input_caption,
        output_caption=pair.output_caption,
        prompt=pair.prompt,
        seed=pair.seed,
    )


def make_shard(job: Job, source: PairSource, recipe: Recipe, encoder: Encoder) -> None:
    """Writes one shard: pairs with all of their views, or not at all.

    Raises StorageError if it cannot be written.
    """
    prompts = source.prompts[job.start : job.stop]
    of = bucket_of_each(recipe.data.path, source.pictures, len(source.prompts), recipe.data)
    of = of[job.start : job.stop]
    rows = rows_of(job, source, recipe, of)
    views: dict[int, list[bytes]] = {}
    refused: dict[int, Refused] = {}
    for seen, moments in encoded(rows, source, encoder):
        (number, _), pair = seen.row, seen.pair
        if reason := reason_of(seen, moments):
            refused[number] = Refused(pair.prompt, pair.seed, reason)
        views.setdefault(number, []).append(serialize(latents_of(pair, moments)))
    kept = {number: views[number] for number in sorted(views) if number not in refused}
    sizes = [sum(len(kept.get(number, ())) for number in prompt) for prompt in prompts]
    records = list(itertools.chain(*kept.values()))
    left_out = [refused[number] for number in sorted(refused)]
    write = functools.partial(write_shard, job, records, sizes, of, left_out)
    retried(write, str(job.path))


def write_shard(
    job: Job,
    records: list[bytes],
    sizes: list[int],
    of: Sequence[Bucket],
    refused: list[Refused],
) -> None:
    """Writes records, so many of each prompt, of these buckets, under a temporary name; then what
    is in the shard."""
    with atomic_path(job.path) as part:
        writer = ArrayRecordWriter(str(part), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    sides = [bucket for bucket, n in zip(of, sizes, strict=True) if n]
    shard = measure(job.path, [n for n in sizes if n], sides)
    if not records:
        job.path.unlink()
    with atomic_path(job.done) as part:
        part.write_text(json.dumps({"shard": shard._asdict(), "refused": refused}))


def is_done(job: Job) -> bool:
    """Whether a shard is whole."""
    return job.done.is_file()


def gather(jobs: Sequence[Job]) -> tuple[dict[str, list[Shard]], list[Refused]]:
    """What whole shards hold, empty ones left out, and which pairs are in none."""
    shards: dict[str, list[Shard]] = {}
    refused: list[Refused] = []
    for job in jobs:
        sidecar = json.loads(job.done.read_text())
        shard = Shard(**sidecar["shard"])
        refused += [Refused(*entry) for entry in sidecar["refused"]]
        if shard.records:
            shards.setdefault(job.split, []).append(shard._replace(file=f"{SHARDS}/{shard.file}"))
    return shards, refused
