# SPDX-License-Identifier: Apache-2.0
"""What came of a run of pair generation: counts, and histograms of the scores."""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from data_gen.pair_filter import Thresholds, count_reasons

Row = dict[str, Any]


def summary(rows: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Counts: prompts, those with kept pairs, candidates, and candidates by what became of them."""
    every = [row for of_prompt in rows for row in of_prompt]
    return {
        "prompts": len(rows),
        "prompts_with_pairs": sum(any(not r["rejected"] for r in of) for of in rows),
        "candidates": len(every),
        **dict(sorted(count_reasons(every).items())),
    }


def histograms(rows: Sequence[Sequence[Row]], thresholds: Thresholds) -> bytes:
    """A PNG: each score of all and of kept candidates with its threshold, and p and the scale."""
    every = [row for of_prompt in rows for row in of_prompt]
    kept = [row for row in every if not row["rejected"]]
    panels = {
        "clip_sim_image": thresholds.image,
        "clip_sim_dir": thresholds.direction,
        "clip_sim_0": thresholds.caption,
        "clip_sim_1": thresholds.caption,
        "p2p_threshold": None,
        "cfg_scale": None,
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for ax, (name, threshold) in zip(axes.flat, panels.items(), strict=True):
        for label, some in (("all", every), ("kept", kept)):
            values = [row[name] for row in some if math.isfinite(row[name])]
            if values:
                ax.hist(values, bins=30, density=True, histtype="step", label=label)
        if threshold is not None:
            ax.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
        ax.set_xlabel(name)
        ax.set_ylabel("density")
    axes.flat[0].legend()
    figure.suptitle(f"{len(kept)} of {len(every)} candidates kept")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def as_json(counts: dict[str, Any]) -> bytes:
    return (json.dumps(counts, indent=1) + "\n").encode()
