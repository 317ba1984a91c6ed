# SPDX-License-Identifier: Apache-2.0
"""Endless shuffled batches, the same global order for any number of hosts, workers and restarts."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from ip2p_jax.config import Data, folders
from ip2p_jax.data.buckets import Bucket, bucket_of_each, buckets
from ip2p_jax.data.latents import LatentSource, cached, cached_output
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.data.tokens import tokenize
from ip2p_jax.data.transforms import captioned, example
from ip2p_jax.types import Batch, CaptionedBatch, CaptionedLatentBatch, LatentBatch


class Kind(NamedTuple):
    """What a batch consists of: `see` takes arrays and, last, a text from a record of `source`, cut
    to the sides of a bucket; `batch` is made of the stacked arrays and the tokens."""

    source: Callable[..., Any]
    see: Callable[[Any, np.random.Generator, Data, Bucket], tuple]
    batch: Callable[..., Any]


PAIRS = Kind(PairSource, example, Batch)
CAPTIONS = Kind(PairSource, captioned, CaptionedBatch)
LATENTS = Kind(LatentSource, cached, LatentBatch)
CAPTIONED_LATENTS = Kind(LatentSource, cached_output, CaptionedLatentBatch)

TRIES = 16
"""Records in a row that may be broken."""

FEW = 16
"""Records that may be broken whatever their share."""


class TooManyBroken(Exception):
    """More records than `config.data.broken` allows cannot be used."""


class Drawn(NamedTuple):
    """What `Kind.see` made of a record, and why the ones drawn before it could not be used."""

    example: tuple
    broken: list[str]


Stacked = tuple[list[np.ndarray], list[str], list[str]]
"""Arrays and texts of a batch, and why records were replaced. Tokens are made in the main thread:
the tokenizer is neither safe among threads nor needed in worker processes."""


def _draw(
    prompt: range,
    rng: np.random.Generator,
    *,
    source: Any,
    prompts: Sequence[range],
    kind: Kind,
    cfg: Data,
    bucket: Bucket,
) -> Drawn:
    """One of the prompt's records at random, seen in a random way.

    One that is broken is replaced by what the same generator draws next, from any of the `prompts`:
    so by the same after a restart, and on any host.
    """
    broken = []
    for _ in range(TRIES):
        try:
            return Drawn(kind.see(source[int(rng.choice(prompt))], rng, cfg, bucket), broken)
        except ValueError as error:
            broken.append(str(error))
            prompt = prompts[int(rng.integers(len(prompts)))]
    raise TooManyBroken(f"{TRIES} records in a row cannot be used: {broken[-1]}")


def _stack(examples: Sequence[Drawn]) -> Stacked:
    *arrays, texts = zip(*(drawn.example for drawn in examples), strict=True)
    broken = [why for drawn in examples for why in drawn.broken]
    return [np.stack(x) for x in arrays], list(texts), broken


class Loader:
    """Iterator over this host's rows of each global batch (what `kind` makes of numpy arrays).

    Global batch i depends on data, seed and batch size alone. The state is the number of batches
    taken, so a run goes on with other numbers of hosts and workers. `close` ends the workers.
    """

    def __init__(
        self,
        batches: grain.MapDataset[Stacked],
        kind: Kind,
        cfg: Data,
        tokenizer: Any,
        start: int = 0,
    ):
        self._batches, self._kind, self._cfg, self._tokenizer = batches, kind, cfg, tokenizer
        self._iterator: grain.DatasetIterator[Stacked] | None = None
        self._rows = 0
        self.broken: list[str] = []  # why records were replaced, in the order of the batches
        self.set_state({"batch": start})

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._begin()
        arrays, texts, broken = next(self._iterator)
        self._next += 1
        self.broken.extend(broken)
        self._rows += len(texts)
        if len(self.broken) > FEW + self._cfg.broken * self._rows:
            raise TooManyBroken(
                f"{len(self.broken)} of {self._rows + len(self.broken)} records cannot be used, "
                f"more than config.data.broken={self._cfg.broken} of them: {self.broken[-1]}"
            )
        return self._kind.batch(*arrays, tokenize(self._tokenizer, texts))

    def _begin(self) -> grain.DatasetIterator[Stacked]:
        threads, workers = self._cfg.threads, self._cfg.workers
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        rest = self._batches[self._next :].to_iter_dataset(read)
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads its own flags before it starts workers
            rest = rest.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return iter(rest)

    def get_state(self) -> dict[str, int]:
        """The position, JSON-able: {"batch": index of the next global batch}."""
        return {"batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position that `get_state` gave."""
        self.close()
        self._next = state["batch"]

    def close(self) -> None:
        """Ends reading threads and processes; iterating again starts them anew."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def share(prompts: Sequence[Any], fraction: float) -> list[Any]:
    """A random share of the prompts, at least one, the same for every run and seed."""
    order = np.random.default_rng(0).permutation(len(prompts))
    chosen = order[: max(1, round(fraction * len(prompts)))]
    return [prompts[i] for i in np.sort(chosen)]


class Opened(NamedTuple):
    """A data set, the prompts of it that are used, by bucket, and how often it takes its turn."""

    source: Any
    prompts: dict[Bucket, list[range]]
    weight: float

    def weight_of(self, bucket: Bucket) -> float:
        """The part of `weight` that falls to a bucket."""
        return self.weight * len(self.prompts[bucket]) / sum(map(len, self.prompts.values()))


def open_set(folder: str, weight: float, cfg: Data, kind: Kind) -> Opened:
    """Opens a data set."""
    source = kind.source(folder, cfg.split, check_hashes=cfg.check_hashes)
    each = bucket_of_each(folder, source.pictures, len(source.prompts), cfg)
    prompts: dict[Bucket, list[range]] = {bucket: [] for bucket in buckets(cfg)}
    for prompt, bucket in share(list(zip(source.prompts, each, strict=True)), cfg.fraction):
        prompts[bucket].append(prompt)
    return Opened(source, prompts, weight)


def endless(opened: Opened, bucket: Bucket, cfg: Data, kind: Kind, seed: int) -> grain.MapDataset:
    """One pair a prompt and epoch of one data set and bucket, each epoch in a new order."""
    prompts = opened.prompts[bucket]
    draw = functools.partial(
        _draw, source=opened.source, prompts=prompts, kind=kind, cfg=cfg, bucket=bucket
    )
    return (
        grain.MapDataset.source(prompts)
        .seed(seed)
        .shuffle()
        .repeat(2**40 // len(prompts))  # longer than any run, and still a length
        .random_map(draw)
    )


def mixed(sets: Sequence[tuple[grain.MapDataset, float]]) -> tuple[grain.MapDataset, float]:
    """Data sets that take turns by their weights, and the sum of these."""
    datasets, weights = zip(*sets, strict=True)
    return grain.MapDataset.mix(datasets, weights), sum(weights)


def make_loader(
    cfg: Data,
    tokenizer: Any,
    kind: Kind = PAIRS,
    *,
    seed: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    start: int = 0,
) -> Loader:
    """Endless batches of batch_size / host_count rows, reshuffled every epoch, from batch `start`.

    Data sets take turns by their weights, row by row; buckets by their prompts, batch by batch. All
    draws belong to the position in the global order, so 1, 2 and 4 hosts see the same global
    batches. `tokenizer` is a transformers.CLIPTokenizer.
    Raises ValueError or FileNotFoundError for a batch that hosts cannot share, a folder that is
    none, or damaged shards; a worker that dies raises RuntimeError.
    """
    if cfg.batch_size % host_count:
        raise ValueError(
            f"config.data.batch_size is {cfg.batch_size}, expected a multiple of {host_count} hosts"
        )
    of, seeds, rows = buckets(cfg), itertools.count(seed), cfg.batch_size // host_count
    opened = [open_set(path, weight, cfg, kind) for path, weight in folders(cfg).items()]
    batches = []
    for bucket in of:
        sets = [
            (endless(x, bucket, cfg, kind, next(seeds) % 2**32), x.weight_of(bucket))
            for x in opened
            if x.prompts[bucket]
        ]
        if sets:
            examples, weight = mixed(sets)
            mine = examples.batch(rows, batch_fn=_stack)[host_index::host_count]
            batches.append((mine, weight))
    return Loader(mixed(batches)[0], kind, cfg, tokenizer, start)
