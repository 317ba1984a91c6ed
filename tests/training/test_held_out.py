# SPDX-License-Identifier: Apache-2.0
"""Claims: samples and the validation loss are of pairs that are not trained on, always the same,
with the same noise, on any mesh."""

import functools
import shutil

import numpy as np
import pytest

from ip2p_jax.config import Config, Data, Log, Optim
from ip2p_jax.data.loader import make_loader
from ip2p_jax.data.manifest import load_manifest, save_manifest
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.training.held_out import held_out, sampler, validator
from tests.oracles import small_tokenizer
from tests.training.tiny import grid, put, toy_loss, toy_params

FROZEN = {"gain": np.float32(2.0)}


@pytest.fixture(scope="module")
def load():
    return functools.partial(make_loader, tokenizer=small_tokenizer())


@pytest.fixture
def cfg(packed) -> Config:
    return Config(
        data=Data(path=str(packed), batch_size=16, resolution=16, threads=1),
        optim=Optim(accumulate=2),
        log=Log(validation_batches=3, samples=4),
    )


def test_validation_loss(cfg, load):
    """The mean over the first micro-batches of the validation split, on 1 and 8 devices."""
    results = []
    for devices in (grid(1, 1), grid(2, 4)):
        validate = validator(cfg, toy_loss, put(devices, FROZEN), load, devices)
        params = put(devices, toy_params())
        results.append(validate(params))
        assert validate(params) == results[-1]
        assert validate({**params, "b": params["b"] + 1}) != results[-1]
    assert set(results[0]) == {"validation_loss", "validation_own"}
    own = results[0].pop("validation_own")
    assert abs(own) < 0.8 and own != 0  # of 24 rows, each with noise of its own
    assert results[1]["validation_loss"] == pytest.approx(results[0]["validation_loss"], rel=1e-5)


def test_pictures_are_held_out(cfg, load, packed):
    """Those of the validation split, which no training pair shares."""
    data = held_out(cfg.data, 8)
    assert (data.split, data.batch_size) == ("validation", 8)
    sources = [PairSource(packed, split) for split in ("train", "validation")]
    trained, watched = ({source[i].input for i in range(len(source))} for source in sources)
    assert not trained & watched
    devices = grid(1, 1)
    draw = sampler(cfg, lambda ema, frozen, batch: batch.input // 2, {}, load, devices)
    before, made, after = draw({})
    assert before.shape == (4, 16, 16, 3) and (made == before // 2).all()
    with_seed = load(held_out(cfg.data, 4), seed=cfg.seed)
    np.testing.assert_array_equal(after, next(with_seed).output)
    with_seed.close()


def test_without_a_validation_split(cfg, load, packed, tmp_path):
    """Samples are of training pairs then; a validation loss is refused."""
    folder = shutil.copytree(packed, tmp_path / "packed")
    manifest = load_manifest(folder)
    for shard in manifest.pop("validation"):
        (folder / shard.file).unlink()
    save_manifest(folder, manifest)
    cfg.data.path, cfg.log.validation_every = str(folder), 10
    assert held_out(cfg.data, 8).split == "train"
    with pytest.raises(ValueError, match="config.log.validation_every is 10: .* no validation"):
        validator(cfg, toy_loss, {}, load, grid(1, 1))
