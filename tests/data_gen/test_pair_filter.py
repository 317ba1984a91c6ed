# SPDX-License-Identifier: Apache-2.0
"""Claim: candidates are filtered by the paper's thresholds, and the best few of them are kept."""

import math

import pytest

from data_gen.pair_filter import BEATEN, Candidate, Thresholds, judge, keep_best
from ip2p_jax.evaluation.clip_scores import ClipScores

GOOD = ClipScores(sim_0=0.3, sim_1=0.3, sim_dir=0.3, sim_image=0.8)


@pytest.mark.parametrize(
    ("score", "least", "name"),
    [
        ("sim_image", 0.7, "clip_sim_image"),
        ("sim_0", 0.2, "clip_sim_0"),
        ("sim_1", 0.2, "clip_sim_1"),
        ("sim_dir", 0.2, "clip_sim_dir"),
    ],
)
def test_each_threshold_rejects_under_it_and_not_at_it(score, least, name):
    assert judge(GOOD._replace(**{score: least}), Thresholds()) == ""
    assert judge(GOOD._replace(**{score: least - 1e-6}), Thresholds()) == name
    assert judge(GOOD._replace(**{score: math.nan}), Thresholds()) == name


def candidates(*directions: float, rejected: str = "") -> list[Candidate]:
    return [
        Candidate(i, 0.5, 7.5, GOOD._replace(sim_dir=d), rejected) for i, d in enumerate(directions)
    ]


def test_those_of_highest_directional_similarity_are_kept():
    judged = keep_best(candidates(0.2, 0.5, 0.4, 0.6, 0.3), keep=2)
    assert [c.number for c in judged if not c.rejected] == [1, 3]
    assert [c.rejected for c in judged if c.rejected] == [BEATEN] * 3


def test_of_equals_the_earlier_is_kept_and_the_rejected_stay_rejected():
    judged = keep_best(candidates(0.4, 0.4, 0.4), keep=1)
    assert [c.number for c in judged if not c.rejected] == [0]
    assert keep_best(candidates(0.9, rejected="clip_sim_0"), keep=1)[0].rejected == "clip_sim_0"


def test_rows_carry_the_released_names():
    row = candidates(0.3)[0].row()
    released = {"seed", "p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1"}
    assert released | {"clip_sim_dir", "clip_sim_image"} < row.keys()
    assert row["seed"] == "0" and row["rejected"] == ""
