# SPDX-License-Identifier: Apache-2.0
"""Curves of one score over another, and what lies between two of them.

A curve goes through the points of one method of one run in order of what was swept: image
guidance, text guidance, or strength (figures 8 and 10).
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ip2p_jax.evaluation.columns import SETTINGS, TITLES, Row


class Curve(NamedTuple):
    """Points in order of the setting that was swept."""

    name: str
    swept: str
    points: list[Row]

    def values(self, score: str) -> Float[np.ndarray, " n"]:
        return np.array([point[score] for point in self.points], np.float64)

    def range(self, score: str) -> str:
        values = self.values(score)
        return f"{values.min():.3f} to {values.max():.3f}"


class Comparison(NamedTuple):
    """By how much one curve is above another where both have the same x, from `low` to `high`."""

    low: float
    high: float
    mean: float
    least: float
    most: float


def curves(runs: Mapping[str, Sequence[Row]], x: str, y: str) -> list[Curve]:
    """The curves of runs by name, each called by its run and by what it differs in from the others.

    Raises ValueError naming a run that has not both scores.
    """
    found = []
    for run, points in runs.items():
        usable = [point for point in points if x in point and y in point]
        if not usable:
            raise ValueError(f"{run}: no point has both {x} and {y}")
        for curve in split(usable):
            both = len(runs) > 1 and curve.name  # what all have in common says nothing
            found.append(curve._replace(name=f"{run}, {curve.name}" if both else curve.name or run))
    return found


def split(points: Sequence[Row]) -> list[Curve]:
    """The curves of a run, called by the settings in which they differ."""
    apart = ["method", "turn", "text_guidance"]
    if all(len(members) == 1 for members in group(points, apart)):
        apart.remove("text_guidance")  # then that is what was swept
    differing = [name for name in apart if differ(points, name)]
    found = []
    for members in group(points, apart):
        swept = axis(members[0])
        if differ(members, "text_guidance") and not differ(members, swept):
            swept = "text_guidance"
        name = ", ".join(word(members[0], name) for name in differing)
        found.append(Curve(name, swept, sorted(members, key=lambda point: point[swept])))
    return found


def word(point: Row, name: str) -> str:
    """A setting as it stands in a legend."""
    if name == "method":
        return TITLES.get(point[name]) or point[name]
    return f"{SETTINGS[name]} {point[name]:g}"


def axis(point: Row) -> str:
    """What a method has beside text guidance."""
    return "strength" if "strength" in point else "image_guidance"


def differ(points: Sequence[Row], name: str) -> bool:
    return len({point.get(name) for point in points}) > 1


def group(points: Sequence[Row], names: Sequence[str]) -> list[list[Row]]:
    """Points that agree in some settings, in order of these."""
    key = operator.itemgetter(*names)
    return [list(members) for _, members in itertools.groupby(sorted(points, key=key), key)]


def compare(a: Curve, b: Curve, x: str, y: str) -> Comparison | None:
    """How far `a` is above `b` in y at equal x; None if they have no x in common.

    Between points both are straight lines, in order of x, and at equal x the mean of their y, so
    mean, least and most are exact.
    """
    (ax, ay), (bx, by) = (by_x(curve.values(x), curve.values(y)) for curve in (a, b))
    low, high = max(ax[0], bx[0]), min(ax[-1], bx[-1])
    if low > high:
        return None
    knots = np.unique(np.clip(np.concatenate([ax, bx]), low, high))
    gap = np.interp(knots, ax, ay) - np.interp(knots, bx, by)
    mean = np.trapezoid(gap, knots) / (high - low) if high > low else gap[0]
    return Comparison(*map(float, (low, high, mean, gap.min(), gap.max())))


def by_x(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Each x once, in order, with the mean of its y."""
    places, which = np.unique(x, return_inverse=True)
    return places, np.bincount(which, y) / np.bincount(which)
