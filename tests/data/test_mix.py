# SPDX-License-Identifier: Apache-2.0
"""Claims: data sets that are mixed take turns by their weights, in an order that neither hosts nor
restarts change; each of them is gone through by itself."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_gen.pack import pack
from ip2p_jax.config import Config, Data, check, folders
from ip2p_jax.data.loader import make_loader
from ip2p_jax.training import checkpoint
from tests.data.released import Words, write_released

FIRST = 36  # prompts of the first data set; those of the second have no numbers below
WEIGHT = 0.5


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """20 prompts, 18 of them in train, numbered from 100."""
    folder = tmp_path_factory.mktemp("second")
    pack([write_released(folder / "released", 20, pairs=1, first=100)], folder / "packed")
    return folder / "packed"


def order(first: Path, second: Path, *, host=0, hosts=1, start=0, batches=24, weight=WEIGHT):
    """Prompts of this host's rows: a batch a row."""
    mix = f"{second}:{weight}"
    cfg = Data(path=str(first), mix=mix, batch_size=12, resolution=16, threads=0)
    loader = make_loader(cfg, Words(), seed=5, host_index=host, host_count=hosts, start=start)
    return np.stack([batch.tokens[:, 0] for batch in itertools.islice(loader, batches)])


@pytest.fixture(scope="module")
def straight(packed, second):
    return order(packed, second)


def test_shares_are_the_weights(packed, second, straight):
    """Of every 12 rows 8 are of the first, which weighs twice as much."""
    assert ((straight < FIRST).sum(1) == 8).all()
    third = order(packed, second, batches=50, weight=0.3)
    assert abs((third < FIRST).mean() - 1 / 1.3) < 0.01


def test_each_is_gone_through_by_itself(straight):
    """Every epoch of each has all of its prompts, once, in a new order."""
    rows = straight.reshape(-1)
    for members, size in ((rows[rows < FIRST], 36), (rows[rows >= FIRST], 18)):
        epochs = members[: len(members) // size * size].reshape(-1, size)
        assert len(epochs) >= 5
        assert all(Counter(epoch.tolist()) == Counter(set(members)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_the_same_order(packed, second, straight, hosts):
    parts = [order(packed, second, host=h, hosts=hosts, batches=6) for h in range(hosts)]
    assert np.array_equal(np.concatenate(parts, axis=1), straight[:6])


def test_the_position_is_one_number(packed, second, straight):
    assert np.array_equal(order(packed, second, start=7, batches=4), straight[7:11])
    assert not np.array_equal(order(packed, second, start=8, batches=4), straight[7:11])


@pytest.mark.parametrize("mix", ["b", "b:", ":1", "b:0", "b:-1", "b:inf", "a:1", "b:1,b:2", "b:x"])
def test_wrong_mixtures_are_one_line(mix):
    cfg = Config(data=Data(path="a", mix=mix))
    with pytest.raises(ValueError, match=r"^config.data.mix: .*expected FOLDER:WEIGHT") as error:
        check(cfg)
    assert "\n" not in str(error.value)


def test_what_a_run_stores_of_its_data(packed, second):
    """A digest of each: another second data set is noticed."""
    assert folders(Data(path="a", mix="b:2,c:0.5")) == {"a": 1, "b": 2, "c": 0.5}

    def contents(path, mix) -> str:
        cfg = Config(data=Data(path=str(path), mix=mix))
        return checkpoint.record(cfg)["data"]["contents"]

    both = contents(packed, f"{second}:1").split()
    assert both == [contents(packed, ""), contents(second, "")]
    assert len(set(both)) == 2
