# SPDX-License-Identifier: Apache-2.0
"""What happens to a pair on the host: one window and flip for both pictures."""

import io
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ip2p_jax.config import Data
from ip2p_jax.data.buckets import Bucket
from ip2p_jax.data.pairs import Pair
from ip2p_jax.data.pictures import decode, size


class View(NamedTuple):
    """How both pictures of a pair are seen: resized to `width` x `height` px, cut to the sides of
    `bucket`, maybe flipped."""

    width: int
    height: int
    left: int
    top: int
    flip: bool
    bucket: Bucket


class Example(NamedTuple):
    """One pair as training sees it, before tokenization."""

    input: UInt8[np.ndarray, "h w 3"]
    output: UInt8[np.ndarray, "h w 3"]
    instruction: str


class Captioned(NamedTuple):
    """One picture as training sees it with its caption, before tokenization."""

    image: UInt8[np.ndarray, "h w 3"]
    caption: str


def draw_view(rng: np.random.Generator, cfg: Data, bucket: Bucket) -> View:
    """Draws size, corner of the window and flip for one pair."""
    lowest, highest = cfg.resize_min or cfg.resolution, cfg.resize_max or cfg.resolution
    side = int(rng.integers(lowest, highest + 1))
    width, height = (round(x * side / cfg.resolution) for x in bucket)
    left, top = rng.integers(0, (width - bucket.width + 1, height - bucket.height + 1))
    return View(width, height, int(left), int(top), bool(rng.random() < cfg.flip), bucket)


def draw_views(rng: np.random.Generator, cfg: Data, bucket: Bucket, count: int) -> list[View]:
    """Draws `count` views of one pair, each as `draw_view` does, but flips are spread evenly: how
    many are mirrored is within one of `count` times `cfg.flip`."""
    start = rng.random()
    flips = [(start + i / count) % 1 < cfg.flip for i in range(count)]
    return [draw_view(rng, cfg, bucket)._replace(flip=flip) for flip in flips]


def see(picture: bytes, view: View) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes, resizes (Lanczos, aspect not kept, as the authors), cuts and flips.

    Raises ValueError for a picture that does not decode.
    """
    image = decode(picture).resize((view.width, view.height), Image.Resampling.LANCZOS)
    box = (view.left, view.top, view.left + view.bucket.width, view.top + view.bucket.height)
    pixels = np.asarray(image.crop(box))
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels


def captions_of(pair: Any) -> tuple[str, str]:
    """Both captions of a pair, or of its latents; ValueError names a pair that lacks one, as all of
    some data do."""
    for name in ("input_caption", "output_caption"):
        if not getattr(pair, name).strip():
            raise ValueError(f"prompt {pair.prompt}, pair {pair.seed}: its {name} is empty")
    return pair.input_caption, pair.output_caption


def captioned(pair: Pair, rng: np.random.Generator, cfg: Data, bucket: Bucket) -> Captioned:
    """One of the pictures of a pair, either as often, with its own caption.

    Raises ValueError naming a pair that lacks a caption or does not decode.
    """
    which = int(rng.integers(2))
    caption, view = captions_of(pair)[which], draw_view(rng, cfg, bucket)
    try:
        return Captioned(see((pair.input, pair.output)[which], view), caption)
    except ValueError as error:
        raise ValueError(f"prompt {pair.prompt}, pair {pair.seed}: {error}") from None


def check_pair(pair: Pair) -> None:
    """Raises ValueError for a pair that no edit can be learnt from, whatever its pictures show."""
    if not pair.instruction.strip():
        raise ValueError("its instruction is empty")
    before, after = (size(io.BytesIO(picture)) for picture in (pair.input, pair.output))
    if before != after:
        raise ValueError(f"its pictures have two sizes, {before} and {after} px")


def example(pair: Pair, rng: np.random.Generator, cfg: Data, bucket: Bucket) -> Example:
    """Both pictures of a pair under one view.

    Raises ValueError naming a pair that does not decode, has no instruction, or has pictures of two
    sizes, which a view would not show alike.
    """
    view = draw_view(rng, cfg, bucket)
    try:
        check_pair(pair)
        before, after = (see(p, view) for p in (pair.input, pair.output))
    except ValueError as error:
        raise ValueError(f"prompt {pair.prompt}, pair {pair.seed}: {error}") from None
    return Example(before, after, pair.instruction)
