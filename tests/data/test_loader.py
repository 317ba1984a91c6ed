# SPDX-License-Identifier: Apache-2.0
"""The order of examples is a function of data, seed and batch size, and of nothing else."""

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from ip2p_jax.config import Data
from ip2p_jax.data.loader import CAPTIONS, make_loader
from ip2p_jax.types import CaptionedBatch
from tests.data.released import Words, identify


def loader(packed, *, seed=7, host=0, hosts=1, start=0, **options):
    settings = {"batch_size": 12, "resolution": 16, "resize_max": 20, "threads": 0} | options
    cfg = Data(path=str(packed), **settings)
    return make_loader(cfg, Words(), seed=seed, host_index=host, host_count=hosts, start=start)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def equal(one, two):
    return len(one) == len(two) and all(
        np.array_equal(x, y)
        for a, b in zip(one, two, strict=True)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def straight(packed):
    """30 batches of 12: ten epochs."""
    return take(loader(packed), 30)


def test_batches_match_their_texts(straight):
    for batch in straight:
        assert batch.input.shape == batch.output.shape == (12, 16, 16, 3)
        assert batch.input.dtype == np.uint8
        assert batch.tokens.shape == (12, 4)
        prompts = [identify(x)[0] for x in batch.input]
        assert batch.tokens[:, 0].tolist() == prompts


class Captions(Words):
    """Its token is the prompt's number, and 1000 more in the caption of an output."""

    def __call__(self, texts, **options):
        kinds = {"scene": 0, "negative": 1000}
        words = [text.split() for text in texts]
        return super().__call__([f"x {kinds[kind] + int(n)}" for kind, n in words], **options)


def test_pictures_with_their_own_captions(packed):
    """Either of a pair's as often. Red is twice the prompt's number, inverted in outputs."""
    cfg = Data(path=str(packed), batch_size=12, resolution=16, threads=0)
    batches = take(make_loader(cfg, Captions(), CAPTIONS, seed=7), 30)
    outputs = 0
    for batch in batches:
        assert type(batch) is CaptionedBatch and batch.image.shape == (12, 16, 16, 3)
        red = batch.image[..., 0].reshape(12, -1).mean(1)
        outputs += (inverted := red > 127).sum()
        prompts = np.where(inverted, 255 - red, red) / 2
        said = batch.tokens[:, 0].astype(int)
        np.testing.assert_array_equal(np.round(prompts), said % 1000)
        np.testing.assert_array_equal(inverted, said >= 1000)
    assert abs(outputs - 180) < 4 * 360**0.5 / 2


def test_every_epoch_has_each_prompt_once_in_a_new_order(straight):
    order = np.concatenate([batch.tokens[:, 0] for batch in straight]).reshape(10, 36)
    assert (np.sort(order) == np.arange(36)[None]).all()
    assert len({tuple(epoch) for epoch in order.tolist()}) == 10


def test_a_fraction_of_the_prompts(packed):
    """Always the same ones, and those of a smaller fraction among those of a larger one."""

    def prompts(fraction, seed=7):
        batches = take(loader(packed, fraction=fraction, seed=seed), 6)
        return set(np.concatenate([batch.tokens[:, 0] for batch in batches]).tolist())

    third, quarter = prompts(1 / 3), prompts(1 / 4)
    assert len(third) == 12 and len(quarter) == 9 and quarter < third
    assert prompts(1 / 3, seed=8) == third != set(range(12))
    assert len(prompts(0.001)) == 1 and len(prompts(1.0)) == 36


def test_one_pair_of_a_prompt_is_drawn_at_random(packed):
    batches = take(loader(packed, batch_size=144), 8)
    pairs = Counter(identify(x)[1] for batch in batches for x in batch.input)
    assert sorted(pairs) == [0, 1, 2, 3]
    assert chisquare(list(pairs.values())).pvalue > 1e-3


def test_flip_is_drawn_per_pair_not_per_batch(straight):
    # Blue rises to the right unless the picture is flipped.
    flips = [[x[8, -1, 2] < x[8, 0, 2] for x in batch.input.astype(int)] for batch in straight]
    assert all(0 < np.mean(batch) < 1 for batch in flips)
    assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / 360**0.5


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_the_same_global_batches(packed, straight, hosts):
    parts = [take(loader(packed, host=h, hosts=hosts), 6) for h in range(hosts)]
    joined = [
        type(rows[0])(*map(np.concatenate, zip(*rows, strict=True)))
        for rows in zip(*parts, strict=True)
    ]
    assert equal(joined, straight[:6])


def test_seed_changes_order_and_draws(packed, straight):
    assert not equal(take(loader(packed, seed=8), 2), straight[:2])


def test_resumes_exactly(packed, straight):
    first = loader(packed, threads=2)
    assert equal(take(first, 5), straight[:5])
    state = first.get_state()
    assert state == {"batch": 5}
    take(first, 3)
    first.set_state(state)
    assert equal(take(first, 4), straight[5:9])
    first.close()
    assert equal(take(loader(packed, start=5), 4), straight[5:9])


def test_resumes_with_another_host_count(packed, straight):
    halves = [loader(packed, host=h, hosts=2) for h in (0, 1)]
    for half in halves:
        half.set_state({"batch": 4})
    rows = [next(half) for half in halves]
    assert equal([type(rows[0])(*map(np.concatenate, zip(*rows, strict=True)))], straight[4:5])


def test_worker_processes_change_nothing_and_a_dead_one_is_an_error(packed, straight):
    with_workers = loader(packed, workers=2, threads=1)
    assert equal(take(with_workers, 5), straight[:5])
    assert with_workers.get_state() == {"batch": 5}
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="Worker process was terminated"):
        take(with_workers, 1000)
    assert time.monotonic() - start < 60
    with_workers.set_state({"batch": 5})
    assert equal(take(with_workers, 2), straight[5:7])
    with_workers.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "hosts": 4}, "config.data.batch_size is 10, expected a multiple of 4"),
        ({"split": "val"}, "no split 'val'"),
    ],
)
def test_wrong_options_are_one_line(packed, options, message):
    with pytest.raises(ValueError, match=message) as error:
        loader(packed, **options)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest"):
        loader(tmp_path)
