# SPDX-License-Identifier: Apache-2.0
"""Lines of metrics.jsonl as an evaluation would write them, of invented scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np

GUIDANCE = (1.0, 1.4, 2.2)
STRENGTHS = (0.3, 0.6, 0.9)

Row = dict[str, Any]


def example(index: int, image_guidance: float = 1.2, turn: int = 1, **more: Any) -> Row:
    """An example of our method; settings and scores besides as given."""
    settings = {"method": "ip2p", "text_guidance": 7.5, "image_guidance": image_guidance}
    return {"kind": "example", **settings, "turn": turn, "index": index, "example": "a", **more}


def point(method: str, value: float, direction: float, image: float, **more: Any) -> Row:
    """A point of the trade-off curve; intervals of 0.01 and 0.02 to both sides."""
    axis = "strength" if method == "sdedit" else "image_guidance"
    row = {"kind": "point", "method": method, "turn": 1, "text_guidance": 7.5, axis: value}
    row["examples"] = 10
    for name, mean, half in (("clip_direction", direction, 0.01), ("clip_image", image, 0.02)):
        row |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
    return row | more


def ours(up: float = 0.0) -> list[Row]:
    """Three points on the line clip_image = 1 - clip_direction + up."""
    return [point("ip2p", s, d, 1 - d + up) for s, d in zip(GUIDANCE, (0.3, 0.2, 0.1), strict=True)]


def sdedit() -> list[Row]:
    """Three points on the line clip_image = 0.8 - clip_direction."""
    places = zip(STRENGTHS, (0.05, 0.15, 0.25), strict=True)
    return [point("sdedit", s, d, 0.8 - d) for s, d in places]


def draws(n: int, scores: Sequence[str], seed: int = 0, **settings: Any) -> list[Row]:
    """n examples with random scores."""
    values = np.random.default_rng(seed).random((n, len(scores)))
    return [
        example(i, **settings) | dict(zip(scores, map(float, row), strict=True))
        for i, row in enumerate(values)
    ]
