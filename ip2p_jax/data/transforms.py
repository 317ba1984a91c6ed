# SPDX-License-Identifier: Apache-2.0
"""What happens to a pair on the host: one window and flip for both pictures, and CLIP tokens."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from ip2p_jax.config import Data
from ip2p_jax.data.pairs import Pair
from ip2p_jax.types import Batch


class View(NamedTuple):
    """How both pictures of a pair are seen: resized to `side` px square, cut, maybe flipped."""

    side: int
    left: int
    top: int
    flip: bool


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


def tokenize(tokenizer: Any, texts: list[str]) -> Int32[np.ndarray, "b n"]:
    """CLIP tokens, cut and padded to the tokenizer's full length (77) with its own pad token."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")
    return tokens.input_ids.astype(np.int32)


def example(pair: Pair, rng: np.random.Generator, cfg: Data) -> tuple[Any, Any, str]:
    """One training example: input and output of (resolution, resolution, 3), instruction.

    Raises ValueError naming the pair if a picture does not decode.
    """
    view = draw_view(rng, cfg)
    try:
        before, after = (see(p, view, cfg.resolution) for p in (pair.input, pair.output))
    except OSError as error:
        raise ValueError(f"prompt {pair.prompt}, pair {pair.seed}: {error}") from None
    return before, after, pair.instruction


def stack(examples: Sequence[tuple[Any, Any, str]], tokenizer: Any) -> Batch:
    """Examples to a batch; the texts become tokens here."""
    before, after, texts = zip(*examples, strict=True)
    return Batch(np.stack(before), np.stack(after), tokenize(tokenizer, list(texts)))
