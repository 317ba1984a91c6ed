# SPDX-License-Identifier: Apache-2.0
"""What came of a run of pair generation: counts, and histograms of the scores.

Prompts are taken in one after the other, for all rows of a large run are tens of gigabytes.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from data_gen.pair_filter import Thresholds, count_reasons

Row = dict[str, Any]

COSINES = np.linspace(-1, 1, 81)
EDGES = {
    "clip_sim_image": COSINES,
    "clip_sim_dir": COSINES,
    "clip_sim_0": COSINES,
    "clip_sim_1": COSINES,
    "p2p_threshold": np.linspace(0, 1, 41),
    "cfg_scale": np.linspace(0, 30, 61),
}
"""Of the bins of each number of a row; what is outside counts in the first or last one."""


class Tally:
    """Counts what became of candidates, and how their numbers are spread."""

    def __init__(self) -> None:
        self.prompts = self.candidates = 0
        self.kept: dict[int, list[str]] = {}  # seeds of the kept pairs, by prompt
        self.reasons: Counter[str] = Counter()
        self.bins = {
            name: {label: np.zeros(len(edges) - 1, np.int64) for label in ("all", "kept")}
            for name, edges in EDGES.items()
        }

    def add(self, number: int, rows: Sequence[Row]) -> None:
        """Takes in the candidates of a prompt."""
        kept = [row for row in rows if not row["rejected"]]
        self.prompts, self.candidates = self.prompts + 1, self.candidates + len(rows)
        self.reasons += count_reasons(rows)
        if kept:
            self.kept[number] = [row["seed"] for row in kept]
        for name, edges in EDGES.items():
            for label, some in (("all", rows), ("kept", kept)):
                values = [row[name] for row in some if math.isfinite(row[name])]
                inside = np.clip(values, edges[0], edges[-1])
                self.bins[name][label] += np.histogram(inside, edges)[0]

    def summary(self) -> dict[str, Any]:
        """Prompts, those with kept pairs, candidates, and these by what became of them."""
        return {
            "prompts": self.prompts,
            "prompts_with_pairs": len(self.kept),
            "candidates": self.candidates,
            **dict(sorted(self.reasons.items())),
        }


def histograms(tally: Tally, thresholds: Thresholds) -> bytes:
    """A PNG: each score of all and of kept candidates with its threshold, and p and the scale."""
    limits = {
        "clip_sim_image": thresholds.image,
        "clip_sim_dir": thresholds.direction,
        "clip_sim_0": thresholds.caption,
        "clip_sim_1": thresholds.caption,
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for ax, (name, edges) in zip(axes.flat, EDGES.items(), strict=True):
        for label, counts in tally.bins[name].items():
            if counts.any():
                ax.stairs(counts / (counts.sum() * np.diff(edges)), edges, label=label)
        used = np.flatnonzero(tally.bins[name]["all"])
        if len(used):
            ax.set_xlim(edges[max(0, used[0] - 1)], edges[min(len(edges) - 1, used[-1] + 2)])
        if name in limits:
            ax.axvline(limits[name], color="black", linestyle="--", linewidth=1, label="threshold")
        ax.set_xlabel(name)
        ax.set_ylabel("density")
    axes.flat[0].legend()
    figure.suptitle(f"{tally.reasons['kept']} of {tally.candidates} candidates kept")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def as_json(counts: dict[str, Any]) -> bytes:
    return (json.dumps(counts, indent=1) + "\n").encode()
