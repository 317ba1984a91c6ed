# SPDX-License-Identifier: Apache-2.0
"""A small data set in the released folder layout, whose pictures say which pair they are."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(prompt: int, pair: int, size: tuple[int, int] = (40, 32)) -> np.ndarray:
    """Red is the prompt, green the pair, blue rises to the right and downwards."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 2 * prompt, 60 * pair
    pixels[..., 2] = np.add.outer(2 * np.arange(height), 4 * np.arange(width)).clip(0, 255)
    return pixels


def identify(pixels: np.ndarray) -> tuple[int, int]:
    """(prompt, pair) of a picture made by `picture`, after JPEG and resizing."""
    red, green, _ = pixels.reshape(-1, 3).mean(0)
    return round(red / 2), round(green / 60)


def encode(pixels: np.ndarray, format: str = "JPEG", **options) -> bytes:
    """Encoded picture; JPEG of quality 100 without chroma subsampling."""
    jpeg = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **jpeg | options)
    return buffer.getvalue()


def write_released(
    folder: Path,
    prompts: int,
    pairs: int = 4,
    first: int = 0,
    sizes: Sequence[tuple[int, int]] = ((40, 32),),
) -> Path:
    """Writes `prompts` prompts, numbered from `first`; the output of a pair is the negative of its
    input. Prompts take the `sizes` in turn."""
    folder.mkdir(parents=True)
    listed = []
    for i in range(first, first + prompts):
        name, seeds = f"{i:07d}", [f"{1000 + 10 * i + j}" for j in range(pairs)]
        (folder / name).mkdir()
        texts = {"input": f"scene {i}", "edit": f"invert {i}", "output": f"negative {i}"}
        (folder / name / "prompt.json").write_text(json.dumps(texts))
        for j, seed in enumerate(seeds):
            x = picture(i, j, sizes[i % len(sizes)])
            (folder / name / f"{seed}_0.jpg").write_bytes(encode(x))
            (folder / name / f"{seed}_1.jpg").write_bytes(encode(255 - x))
        listed.append([name, seeds])
    (folder / "seeds.json").write_text(json.dumps(listed))
    return folder


class Words:
    """A tokenizer whose only token is the number in the instruction."""

    model_max_length = 4

    def __call__(self, texts, *, max_length, **options):
        class Encoding:
            input_ids = [[int(text.split()[1])] * max_length for text in texts]

        return Encoding
