# SPDX-License-Identifier: Apache-2.0
"""Endless shuffled batches, the same global order for any number of hosts, workers and restarts."""

import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from ip2p_jax.config import Data
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.data.tokens import tokenize
from ip2p_jax.data.transforms import Example, example
from ip2p_jax.types import Batch


def check(cfg: Data, seed: int, host_count: int) -> None:
    """Refuses settings that cannot work; ValueError names the option."""
    highest, lowest = cfg.resize_max or cfg.resolution, cfg.resize_min or cfg.resolution
    if cfg.batch_size < 1 or cfg.batch_size % host_count:
        raise ValueError(
            f"data.batch_size={cfg.batch_size} must be a multiple of {host_count} hosts"
        )
    if not cfg.resolution <= lowest <= highest:
        raise ValueError(
            f"data.resize_min={lowest}, data.resize_max={highest}: must be at least "
            f"data.resolution={cfg.resolution}, and the first not above the second"
        )
    if not 0 <= cfg.flip <= 1:
        raise ValueError(f"data.flip={cfg.flip} must be a probability")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be between 0 and 2^32 - 1")


Stacked = tuple[np.ndarray, np.ndarray, list[str]]
"""Inputs, outputs and instructions of a batch. Tokens are made in the main thread: the tokenizer
is neither safe among threads nor needed in worker processes."""


def _draw(prompt: range, rng: np.random.Generator, *, source: PairSource, cfg: Data) -> Example:
    """One of the prompt's pairs at random, seen in a random way."""
    return example(source[int(rng.choice(prompt))], rng, cfg)


def _stack(examples: Sequence[Example]) -> Stacked:
    before, after, texts = zip(*examples, strict=True)
    return np.stack(before), np.stack(after), list(texts)


class Loader:
    """Iterator over this host's rows of each global batch (types.Batch, numpy).

    Global batch i depends on data, seed and batch size alone. The state is the number of batches
    taken, so a run goes on with other numbers of hosts and workers. `close` ends the workers.
    """

    def __init__(
        self, batches: grain.MapDataset[Stacked], cfg: Data, tokenizer: Any, start: int = 0
    ):
        self._batches, self._cfg, self._tokenizer = batches, cfg, tokenizer
        self._iterator: grain.DatasetIterator[Stacked] | None = None
        self.set_state({"batch": start})

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._begin()
        before, after, texts = next(self._iterator)
        self._next += 1
        return Batch(before, after, tokenize(self._tokenizer, texts))

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


def share(prompts: Sequence[range], fraction: float) -> list[range]:
    """A random share of the prompts, at least one, the same for every run and seed."""
    order = np.random.default_rng(0).permutation(len(prompts))
    chosen = order[: max(1, round(fraction * len(prompts)))]
    return [prompts[i] for i in np.sort(chosen)]


def make_loader(
    cfg: Data,
    tokenizer: Any,
    *,
    seed: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    start: int = 0,
) -> Loader:
    """Endless batches of batch_size / host_count rows, reshuffled every epoch, from batch `start`.

    One pair a prompt and epoch. All draws belong to the position in the global order, so 1, 2 and
    4 hosts see the same global batches. `tokenizer` is a transformers.CLIPTokenizer. Raises
    ValueError or FileNotFoundError for wrong options, a folder that is none, or damaged shards; a
    worker that dies raises RuntimeError.
    """
    check(cfg, seed, host_count)
    source = PairSource(cfg.path, cfg.split, check_hashes=cfg.check_hashes)
    prompts = share(source.prompts, cfg.fraction)
    batches = (
        grain.MapDataset.source(prompts)
        .seed(seed)
        .shuffle()
        .repeat(2**40 // len(prompts))  # longer than any run, and still a length
        .random_map(functools.partial(_draw, source=source, cfg=cfg))
        .batch(cfg.batch_size // host_count, batch_fn=_stack)
    )
    return Loader(batches[host_index::host_count], cfg, tokenizer, start)
