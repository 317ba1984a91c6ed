# SPDX-License-Identifier: Apache-2.0
"""Which candidates become training pairs (section 3.1.2): CLIP thresholds, then the best few."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ip2p_jax.evaluation.clip_scores import ClipScores

BEATEN = "not_among_best"
UNSAFE = "unsafe"


class Thresholds(NamedTuple):
    """The least cosine similarities; the paper's text says 0.75 for the pictures, its code 0.7."""

    caption: float = 0.2  # of each picture to its caption
    direction: float = 0.2  # of the change of the pictures to the change of the captions
    image: float = 0.7  # of the pictures to each other


class Candidate(NamedTuple):
    """One try at a pair: how it was made, how it scored, why it was left out ("" if it was not)."""

    number: int
    p: float
    scale: float
    scores: ClipScores
    rejected: str = ""

    def row(self) -> dict[str, Any]:
        """Its line of metadata.jsonl, in the released data's names."""
        return {
            "seed": str(self.number),
            "p2p_threshold": self.p,
            "cfg_scale": self.scale,
            "clip_sim_0": self.scores.sim_0,
            "clip_sim_1": self.scores.sim_1,
            "clip_sim_dir": self.scores.sim_dir,
            "clip_sim_image": self.scores.sim_image,
            "rejected": self.rejected,
        }


def judge(scores: ClipScores, thresholds: Thresholds) -> str:
    """Names the first score that is under its threshold, as in metadata.jsonl; "" if none is.

    What is not a number is under every threshold.
    """
    checks = {
        "clip_sim_image": scores.sim_image >= thresholds.image,
        "clip_sim_0": scores.sim_0 >= thresholds.caption,
        "clip_sim_1": scores.sim_1 >= thresholds.caption,
        "clip_sim_dir": scores.sim_dir >= thresholds.direction,
    }
    return next((name for name, passed in checks.items() if not passed), "")


def keep_best(candidates: Sequence[Candidate], keep: int) -> list[Candidate]:
    """Rejects all but the `keep` of highest directional similarity; the earlier of equals stays."""
    passed = [c for c in candidates if not c.rejected]
    best = sorted(passed, key=lambda c: (-float(c.scores.sim_dir), c.number))[:keep]
    numbers = {c.number for c in best}
    return [
        c if c.rejected or c.number in numbers else c._replace(rejected=BEATEN) for c in candidates
    ]


def count_reasons(rows: Sequence[dict[str, Any]]) -> Counter[str]:
    """How often each reason occurs in rows of metadata.jsonl; kept ones count as "kept"."""
    return Counter(row["rejected"] or "kept" for row in rows)
