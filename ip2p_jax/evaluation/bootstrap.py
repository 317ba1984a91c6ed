# SPDX-License-Identifier: Apache-2.0
"""How sure a mean over examples is: percentile bootstrap (Efron and Tibshirani 1993, ch. 13)."""

from typing import Any

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
RESAMPLES = 2000


def interval(
    values: Float[np.ndarray, "n *scores"],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Float[Any, "*scores"], Float[Any, "*scores"]]:
    """The ends of the interval that holds the true mean over n with probability `level`.

    All scores are resampled together, and values of equal n in the same way every time. Takes
    `resamples` + n numbers a score of memory. Raises ValueError for no values and for values
    that are not finite.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level}, resamples {resamples}: expected 0 to 1, and 1 or more")
    n, *scores = values.shape
    if n == 0 or not np.isfinite(values).all():
        raise ValueError(f"values: {values.shape}, expected finite numbers, at least one")
    rng = np.random.default_rng(seed)
    flat = values.reshape(n, -1).astype(np.float64)
    means = np.empty((resamples, flat.shape[1]))
    for i in range(resamples):
        times = np.bincount(rng.integers(n, size=n), minlength=n) / n  # each value is drawn
        means[i] = np.einsum("n,ns->s", times, flat)  # no BLAS, whose bits go by its threads
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0).reshape(2, *scores)
    return low, high
