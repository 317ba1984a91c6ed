# SPDX-License-Identifier: Apache-2.0
"""What metrics.jsonl of an evaluation holds: the settings of a point, and scores with their sense.

A line is one of
  {"kind": "example", SETTINGS..., "index": 12, "example": "0000012/341", SCORES...}
  {"kind": "skipped", SETTINGS..., "index": 13, "example": "0000013/77", "reason": "..."}
  {"kind": "point", SETTINGS..., "examples": 5000, SCORE: mean, SCORE_low: .., SCORE_high: .., ...}
and holds those scores only that apply. Where a score holds for some examples of a point only, the
point has SCORE_examples, too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
"""A line of metrics.jsonl."""


class Score(NamedTuple):
    """How a score is called, which direction is better, and how many decimals tell something."""

    title: str
    higher: bool
    meaning: str
    decimals: int = 3


SETTINGS = {
    "method": "method",
    "turn": "turn",
    "text_guidance": "text guidance",
    "image_guidance": "image guidance",
    "strength": "strength",
}
"""What makes a point, and how it is called; a method has image guidance or strength."""

TITLES = {"ip2p": "InstructPix2Pix", "sdedit": "SDEdit"}
"""What methods are called in figures."""

INPUT, TARGET = "the input and the result", "the target and the result"

SCORES = {
    "clip_direction": Score(
        "CLIP directional similarity",
        True,
        "cosine of the change of the picture and the change of the captions, in CLIP's space",
    ),
    "clip_text": Score("CLIP-T", True, "cosine of CLIP's embeddings of output caption and result"),
    "clip_image": Score(
        "CLIP image similarity", True, f"cosine of CLIP's embeddings of {INPUT}: what is kept"
    ),
    "l1_input": Score("L1 to input", False, f"mean absolute difference of {INPUT}, in [0, 1]", 4),
    "l2_input": Score("L2 to input", False, f"mean squared difference of {INPUT}, in [0, 1]", 4),
    "psnr_input": Score("PSNR to input", True, f"peak signal to noise of {INPUT}, dB", 2),
    "ssim_input": Score("SSIM to input", True, f"structural similarity of {INPUT}"),
    "lpips_input": Score("LPIPS to input", False, f"perceptual distance of {INPUT}"),
    "dino_input": Score("DINO to input", True, f"cosine of DINO's embeddings of {INPUT}"),
    "clip_target": Score("CLIP-I", True, f"cosine of CLIP's embeddings of {TARGET}"),
    "l1": Score("L1", False, f"mean absolute difference of {TARGET}, in [0, 1]", 4),
    "l2": Score("L2", False, f"mean squared difference of {TARGET}, in [0, 1]", 4),
    "psnr": Score("PSNR", True, f"peak signal to noise of {TARGET}, dB", 2),
    "ssim": Score("SSIM", True, f"structural similarity of {TARGET}"),
    "lpips": Score("LPIPS", False, f"perceptual distance of {TARGET}"),
    "dino": Score("DINO", True, f"cosine of DINO's embeddings of {TARGET}"),
}
"""Every score, in the order of tables; "input" is the picture that was edited."""


def setting(row: Row) -> tuple:
    """The settings of a line as what can be compared and sorted; a missing one sorts first."""
    return tuple((name in row, row.get(name, 0)) for name in SETTINGS)


def words(row: Row) -> str:
    """The settings of a line in words."""
    return ", ".join(f"{name} {row[name]}" for name in SETTINGS if name in row)


def aligned(values: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as the one that needs most, six digits at most."""
    decimals = max(len(f"{value:.6g}".partition(".")[2]) for value in values)
    return [f"{value:.{decimals}f}" for value in values]
