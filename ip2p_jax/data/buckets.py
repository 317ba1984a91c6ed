# SPDX-License-Identifier: Apache-2.0
"""Resolution buckets: the few sizes that pictures are cut to, each by a program of its own.

A prompt belongs to the bucket nearest in shape to its first picture (NovelAI 2022, "aspect ratio
bucketing"); all rows of a batch are of one bucket.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ip2p_jax.config import Data


class Bucket(NamedTuple):
    """Sides in px."""

    width: int
    height: int


def buckets(cfg: Data) -> list[Bucket]:
    """Those of `cfg`, or its one square. ValueError, one line that names config.data.buckets."""
    if not cfg.buckets:
        return [Bucket(cfg.resolution, cfg.resolution)]
    found = []
    for part in cfg.buckets.split(","):
        width, _, height = part.partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise ValueError(f"config.data.buckets={cfg.buckets}: {part!r} is no WIDTHxHEIGHT")
        found.append(Bucket(int(width), int(height)))
    if len(set(found)) < len(found):
        raise ValueError(f"config.data.buckets={cfg.buckets}: one is named twice")
    return found


def nearest(of: Sequence[Bucket], size: Sequence[int]) -> Bucket:
    """The bucket for pictures of `size` (width, height): the nearest in shape, and of several the
    largest that has no more pixels than they have, or else the smallest."""

    def misfit(bucket: Bucket) -> float:
        return abs(math.log(bucket.width * size[1] / (bucket.height * size[0])))

    least = min(misfit(bucket) for bucket in of)
    alike = sorted((b for b in of if misfit(b) < least + 1e-9), key=lambda b: b.width * b.height)
    fitting = [b for b in alike if b.width * b.height <= size[0] * size[1]]
    return fitting[-1] if fitting else alike[0]


def bucket_of_each(
    folder: str, pictures: Sequence[Sequence[int]], prompts: int, cfg: Data
) -> list[Bucket]:
    """The bucket of each prompt, given the sizes of their first pictures.

    Raises ValueError for a folder that does not say how large they are, where that matters.
    """
    of = buckets(cfg)
    if len(of) == 1:
        return of * prompts
    if len(pictures) != prompts:
        raise ValueError(
            f"config.data.buckets: {folder} does not say how large its pictures are; make it anew"
        )
    return [nearest(of, size) for size in pictures]
