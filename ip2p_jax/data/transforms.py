# SPDX-License-Identifier: Apache-2.0
"""What happens to a pair on the host: one window and flip for both pictures."""

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ip2p_jax.config import Data
from ip2p_jax.data.pairs import Pair


class View(NamedTuple):
    """How both pictures of a pair are seen: resized to `side` px square, cut, maybe flipped."""

    side: int
    left: int
    top: int
    flip: bool


class Example(NamedTuple):
    """One pair as training sees it, before tokenization."""

    input: UInt8[np.ndarray, "h w 3"]
    output: UInt8[np.ndarray, "h w 3"]
    instruction: str


def draw_view(rng: np.random.Generator, cfg: Data) -> View:
    """Draws side, corner of the window and flip for one pair."""
    lowest, highest = cfg.resize_min or cfg.resolution, cfg.resize_max or cfg.resolution
    side = int(rng.integers(lowest, highest + 1))
    left, top = rng.integers(0, side - cfg.resolution + 1, 2)
    return View(side, int(left), int(top), bool(rng.random() < cfg.flip))


def see(picture: bytes, view: View, resolution: int) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes, resizes to a square (Lanczos, aspect not kept, as the authors), cuts and flips."""
    with Image.open(io.BytesIO(picture)) as encoded:
        image = encoded.convert("RGB").resize((view.side, view.side), Image.Resampling.LANCZOS)
    box = (view.left, view.top, view.left + resolution, view.top + resolution)
    pixels = np.asarray(image.crop(box))
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels


def example(pair: Pair, rng: np.random.Generator, cfg: Data) -> Example:
    """Both pictures of a pair under one view; ValueError names a pair that does not decode."""
    view = draw_view(rng, cfg)
    try:
        before, after = (see(p, view, cfg.resolution) for p in (pair.input, pair.output))
    except OSError as error:
        raise ValueError(f"prompt {pair.prompt}, pair {pair.seed}: {error}") from None
    return Example(before, after, pair.instruction)
