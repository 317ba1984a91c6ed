# SPDX-License-Identifier: Apache-2.0
"""Claims: pictures go to the bucket nearest in shape; every batch is of one bucket, and the order
still depends on data, seed and batch size alone; wrong buckets are refused in one line."""

import itertools
import json

import numpy as np
import pytest

from data_gen.pack import pack
from ip2p_jax.config import Data
from ip2p_jax.data.buckets import Bucket, buckets, nearest
from ip2p_jax.data.loader import make_loader
from tests.data.released import Words, write_released

NAMED = "24x16,16x24,16x16"
SHAPES = [(48, 30), (30, 48), (40, 42), (64, 40)]  # 24x16, 16x24, 16x16, 24x16


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """40 prompts, 36 of them to train on, of four sizes in turn."""
    folder = tmp_path_factory.mktemp("data")
    pack([write_released(folder / "released", 40, 2, sizes=SHAPES)], folder / "packed")
    return folder / "packed"


def batches(packed, count, *, host=0, hosts=1, start=0, **options):
    settings = dict(batch_size=6, resolution=16, resize_max=20, threads=0, buckets=NAMED) | options
    cfg = Data(path=str(packed), **settings)
    loader = make_loader(cfg, Words(), seed=3, host_index=host, host_count=hosts, start=start)
    return list(itertools.islice(loader, count))


def test_the_nearest_shape_and_the_largest_that_fits():
    of = [Bucket(*x) for x in ((512, 512), (256, 256), (320, 192), (192, 320))]
    assert nearest(of, (1000, 1000)) == nearest(of, (500, 540)) == of[0]
    assert nearest(of, (400, 400)) == nearest(of, (100, 100)) == of[1]
    assert nearest(of, (1600, 900)) == of[2] and nearest(of, (900, 1600)) == of[3]
    # Between a square and 5:3 the geometric mean decides, and not the arithmetic.
    edge = 100 * (5 / 3) ** 0.5
    assert nearest(of, (round(edge * 10) - 2, 1000)) == of[0]
    assert nearest(of, (round(edge * 10) + 2, 1000)) == of[2]
    assert nearest(of[::-1], (1000, 1000)) == of[0]


def test_a_batch_is_of_one_bucket_and_a_prompt_of_the_nearest(packed):
    of = {(16, 24): {0, 3}, (24, 16): {1}, (16, 16): {2}}
    found = batches(packed, 24)
    assert {batch.input.shape[1:3] for batch in found} == set(of)
    for batch in found:
        assert batch.input.shape == batch.output.shape == (6, *batch.input.shape[1:3], 3)
        assert {int(x) % 4 for x in batch.tokens[:, 0]} <= of[batch.input.shape[1:3]]
    square = batches(packed, 24, buckets="")
    assert {batch.input.shape[1:3] for batch in square} == {(16, 16)}  # the control
    assert any(len({int(x) % 4 for x in batch.tokens[:, 0]}) > 1 for batch in square)


def test_buckets_take_turns_by_their_prompts(packed):
    """18 prompts are wide, 9 high, 9 square: in 48 batches of 6 each was seen 8 times."""
    seen = np.concatenate([batch.tokens[:, 0] for batch in batches(packed, 48)])
    assert (np.bincount(seen, minlength=36) == 8).all()


def test_hosts_and_restarts_see_the_same(packed):
    straight, later = batches(packed, 9), batches(packed, 4, start=5)
    hosts = [batches(packed, 9, host=i, hosts=2) for i in range(2)]
    for i, batch in enumerate(straight):
        halves = [np.concatenate(x) for x in zip(hosts[0][i], hosts[1][i], strict=True)]
        others = [halves, *([later[i - 5]] if i >= 5 else [])]
        for other in others:
            assert all(np.array_equal(x, y) for x, y in zip(batch, other, strict=True))
    assert not np.array_equal(straight[0].tokens, straight[5].tokens)


@pytest.mark.parametrize("named", ["24x16,", "24", "24x-16", "0x16", "24x16,24x16", "axb"])
def test_what_is_no_bucket_is_refused(named):
    with pytest.raises(ValueError, match="config.data.buckets=") as error:
        buckets(Data(buckets=named))
    assert "\n" not in str(error.value)


def test_folders_that_do_not_say_how_large_their_pictures_are(packed, tmp_path):
    """Those of before: refused, but for a single bucket."""
    (tmp_path / "old").mkdir()
    for entry in packed.iterdir():
        (tmp_path / "old" / entry.name).symlink_to(entry)
    manifest = json.loads((packed / "manifest.json").read_text())
    for shard in itertools.chain(*manifest["splits"].values()):
        del shard["pictures"]
    (tmp_path / "old/manifest.json").unlink()
    (tmp_path / "old/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="does not say how large its pictures are"):
        batches(tmp_path / "old", 1)
    (batch,) = batches(tmp_path / "old", 1, buckets="24x16")
    assert batch.input.shape == (6, 16, 24, 3)
