# SPDX-License-Identifier: Apache-2.0
"""Claims: intervals cover the true mean as often as they say, and are scipy's; memory is small."""

import tracemalloc

import numpy as np
import pytest
import scipy.stats

from ip2p_jax.evaluation.bootstrap import interval

SETS, N = 1000, 250
"""Synthetic data sets, and values in each."""

DRAWS = {  # by the true mean
    "normal": (0.2, lambda rng: rng.normal(0.2, 0.1, (N, SETS))),
    "skewed": (1.0, lambda rng: rng.exponential(1.0, (N, SETS))),
    "two values": (0.3, lambda rng: (rng.random((N, SETS)) < 0.3).astype(np.float64)),
}


def covered(name: str, level: float) -> float:
    """How many of the data sets have the true mean in their interval."""
    mean, draw = DRAWS[name]
    low, high = interval(draw(np.random.default_rng(7)), level)
    return float(np.mean((low <= mean) & (mean <= high)))


@pytest.mark.parametrize("name", DRAWS)
def test_coverage(name):
    """Within three binomial deviations: 0.95 of 1000 is known to 0.021."""
    assert abs(covered(name, 0.95) - 0.95) < 3 * (0.95 * 0.05 / SETS) ** 0.5


def test_control_coverage_at_another_level():
    """An interval of half the probability covers half: the test above sees the difference."""
    assert abs(covered("normal", 0.5) - 0.5) < 3 * (0.5 * 0.5 / SETS) ** 0.5


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_equals_scipy(level):
    """Within what two of scipy's own differ by for other seeds, at several scores at once."""
    values = np.random.default_rng(0).gamma(2.0, size=(300, 4)) * [1.0, 2.0, -1.0, 10.0]

    def theirs(seed: int) -> np.ndarray:
        result = scipy.stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=20_000,
            confidence_level=level,
            method="percentile",
            batch=500,
            random_state=seed,
        )
        return np.array(result.confidence_interval)

    deviation = values.std(axis=0) / 300**0.5
    tolerance = {0.5: 0.03, 0.95: 0.06, 0.99: 0.1}[level]  # 4 deviations of the quantiles
    ours = np.array(interval(values, level, resamples=20_000))
    assert (abs(ours - theirs(1)) < tolerance * deviation).all()
    assert (abs(ours - interval(values, 0.9)) > tolerance * deviation).all()  # control


def test_repeats_and_joins():
    """The same bits again; the same numbers alone and beside other scores; any shape."""
    values = np.random.default_rng(0).normal(size=(50, 3))
    low, high = interval(values)
    assert low.shape == high.shape == (3,) and (low < values.mean(axis=0)).all()
    again = interval(values)
    np.testing.assert_array_equal(again, (low, high))
    np.testing.assert_allclose(interval(values[:, 1]), (low[1], high[1]), rtol=1e-12)
    np.testing.assert_array_equal(np.shape(interval(values.reshape(25, 3, 2))), (2, 3, 2))
    assert (interval(values, seed=1)[0] != low).all()


def test_wider_level_wider_interval_and_constants():
    values = np.random.default_rng(0).normal(size=100)
    widths = [float(np.diff(interval(values, level))[0]) for level in (0.5, 0.9, 0.99)]
    assert 0 < widths[0] < widths[1] < widths[2]
    np.testing.assert_allclose(interval(np.full(10, 0.25)), 0.25, rtol=1e-12)
    assert interval(np.array([3.0])) == (3.0, 3.0)


def test_memory_of_a_large_evaluation():
    """5000 examples of 20 scores: 2 MB, where all resamples at once would take 1.6 GB."""
    values = np.random.default_rng(0).normal(size=(5000, 20))
    tracemalloc.start()
    interval(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize(
    ("values", "level", "resamples", "line"),
    [
        (np.zeros((0, 2)), 0.95, 10, r"values: \(0, 2\), expected finite numbers"),
        (np.array([1.0, np.nan]), 0.95, 10, r"values: \(2,\), expected finite numbers"),
        (np.array([1.0, np.inf]), 0.95, 10, r"values: \(2,\), expected finite numbers"),
        (np.zeros(3), 95.0, 10, "level 95.0, resamples 10: expected 0 to 1"),
        (np.zeros(3), 0.95, 0, "level 0.95, resamples 0: expected"),
    ],
)
def test_bad_input(values, level, resamples, line):
    with pytest.raises(ValueError, match=line):
        interval(values, level, resamples)
