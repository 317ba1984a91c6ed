# SPDX-License-Identifier: Apache-2.0
"""Claims: records of latents survive unchanged; what 16 bits lose is bounded; cached views are
spread as the views that training draws; latents of other settings are refused by name."""

import json

import numpy as np
import pytest
from scipy.stats import kstest

from ip2p_jax.config import Data
from ip2p_jax.data.buckets import Bucket
from ip2p_jax.data.latents import (
    Latents,
    LatentSource,
    MadeWith,
    check_encoder,
    check_settings,
    deserialize,
    made_with,
    serialize,
)
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.data.transforms import draw_view, draw_views

MADE = MadeWith(vae="abc", resolution=24, resize_min=26, resize_max=40, flip=0.5, views=4)
CFG = Data(resolution=24, resize_min=26, resize_max=40)
SQUARE = Bucket(24, 24)


def moments(shape=(3, 5, 4), seed=0):
    """Means and log-variances over the whole range that a VAE gives."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(2, *shape)) * 10
    return [x.astype(np.float16) for x in (*mean, rng.uniform(-30, 20, shape))]


def test_record_round_trip():
    latents = Latents(*moments(), "färbe es blau", "", "ein Bild", "0000001", "123")
    back = deserialize(serialize(latents))
    assert back[3:] == latents[3:]
    for x, y in zip(latents[:3], back[:3], strict=True):
        assert y.dtype == np.float16 and np.array_equal(x, y)


def test_what_16_bits_lose():
    """2^-11 of a mean; under half a percent of a standard deviation, less where it is not tiny.

    Control: bfloat16, in which the network computes, loses eight times as much."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    mean = rng.normal(size=100_000).astype(np.float32) * 10
    log_var = rng.uniform(-30, 20, 100_000).astype(np.float32)

    def lost(x, dtype):
        return np.abs(x.astype(dtype).astype(np.float32) - x)

    large = np.abs(mean) > 1e-4  # below, numbers of 16 bits have fewer digits
    worst = (lost(mean, np.float16) / np.abs(mean))[large].max()
    assert worst <= 2**-11
    assert (lost(mean, ml_dtypes.bfloat16) / np.abs(mean)).max() > 7 * worst
    assert np.expm1(lost(log_var, np.float16) / 2).max() < 0.004
    assert np.expm1(lost(log_var, np.float16) / 2)[np.abs(log_var) < 4].max() < 0.0005


def test_cached_views_are_spread_as_those_of_training():
    """Side and corner by Kolmogorov-Smirnov; flips are even within a pair."""
    many = [draw_views(np.random.default_rng([1, i]), CFG, SQUARE, 4) for i in range(2000)]
    assert all(sum(view.flip for view in views) == 2 for views in many)
    cached = [view for views in many for view in views]
    drawn = [draw_view(np.random.default_rng([2, i]), CFG, SQUARE) for i in range(8000)]

    def p(name, ours):
        rng = np.random.default_rng(0)  # ties are broken at random
        a, b = (np.array([getattr(v, name) for v in x]) for x in (ours, drawn))
        return kstest(a + rng.random(len(a)), b + rng.random(len(b))).pvalue

    for name in ("width", "left", "top"):
        assert p(name, cached) > 1e-3
        assert p(name, [v._replace(**{name: getattr(v, name) // 2}) for v in cached]) < 1e-9
    for share in (0.0, 0.3, 1.0):
        cfg = Data(resolution=24, flip=share)
        flips = [
            sum(v.flip for v in draw_views(np.random.default_rng([3, i]), cfg, SQUARE, 3))
            for i in range(2000)
        ]
        assert set(flips) <= {np.floor(3 * share), np.ceil(3 * share)}
        assert abs(np.mean(flips) - 3 * share) < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Data(), "config.data.resolution is 256, the latents in F were made with 24"),
        (Data(resolution=24), "config.data.resize_min is 24, the latents in F were made with 26"),
        (Data(resolution=24, resize_min=26), "config.data.resize_max is 24, "),
        (Data(resolution=24, resize_min=26, resize_max=40, flip=0.0), "config.data.flip is 0"),
    ],
)
def test_latents_of_other_settings_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message) as error:
        check_settings({"F": MADE}, cfg)
    assert "\n" not in str(error.value)


def test_the_right_latents_are_taken():
    check_settings({"F": MADE, "G": MADE}, CFG)
    check_encoder({"F": MADE, "G": MADE}, "abc")
    with pytest.raises(ValueError, match=r"config.data.mix: G holds no latents, other folders do"):
        check_settings({"F": MADE, "G": None}, CFG)
    with pytest.raises(ValueError, match=r"in G were made by the encoder abd, .* is abc"):
        check_encoder({"F": MADE, "G": MADE._replace(vae="abd")}, "abc")


def test_pictures_and_latents_are_told_apart(packed, tmp_path):
    assert made_with(packed) is None and made_with(tmp_path) is None
    with pytest.raises(ValueError, match="holds no latents"):
        LatentSource(packed, "train")
    (tmp_path / "manifest.json").write_text(
        json.dumps({"splits": {"train": []}, "latents": MADE._asdict()})
    )
    assert made_with(tmp_path) == MADE
    with pytest.raises(ValueError, match="holds no pictures"):
        PairSource(tmp_path, "train")
