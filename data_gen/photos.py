# SPDX-License-Identifier: Apache-2.0
"""Real pairs for small runs: crops of scikit-image's photographs, edited by exact functions.

Writes the folder layout of the released InstructPix2Pix data. `chelsea` is held out: it can be
loaded and cropped for evaluation, but no pair is ever made of it.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_gen.edits import EDITS

Pixels = UInt8[np.ndarray, "h w 3"]

PAIRS_PER_PROMPT = 4
HELD_OUT = "chelsea"


class Photo(NamedTuple):
    """One photograph inside scikit-image's wheel; `share` of the prompts are made of it."""

    file: str
    caption: str
    share: float
    licence: str


# Only colour pictures a camera took. The lower shares are those with little variety inside.
PHOTOS = {
    "astronaut": Photo("astronaut.png", "an astronaut in an orange suit", 0.32, "public domain"),
    "coffee": Photo("coffee.png", "a cup of coffee on a wooden table", 0.30, "CC0"),
    "rocket": Photo("rocket.jpg", "a rocket on its launch pad at dusk", 0.18, "public domain"),
    "tissue": Photo("ihc.png", "stained tissue under a microscope", 0.10, "public domain"),
    "retina": Photo("retina.jpg", "the retina of an eye", 0.05, "CC0"),
    "galaxies": Photo("hubble_deep_field.jpg", "galaxies in deep space", 0.05, "public domain"),
}


def load_photo(file: str) -> Image.Image:
    """Opens one of scikit-image's own pictures (never the network), at most 720 px a side."""
    try:
        from skimage.data import data_dir
    except ModuleNotFoundError:
        raise ValueError(
            "the photographs need scikit-image: pip install 'ip2p_jax[photos]'"
        ) from None
    photo = Image.open(Path(data_dir) / file).convert("RGB")
    photo.thumbnail((720, 720), Image.Resampling.LANCZOS)
    return photo


def crop(rng: np.random.Generator, photo: Image.Image, size: int) -> Pixels:
    """Draws a square window of any scale, up to the whole picture, resized to `size` (Lanczos).

    Windows with hardly anything in them (night sky) are drawn again: most edits leave them alike.
    """
    width, height = photo.size
    largest = min(width, height)
    smallest = min(1.25 * size, largest)
    pixels = np.zeros((size, size, 3), np.uint8)
    for _ in range(20):
        side = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(photo.resize((size, size), Image.Resampling.LANCZOS, box=box))
        if pixels.mean(-1).std() >= 16:
            break
    return pixels


def vary(rng: np.random.Generator, pixels: Pixels) -> Pixels:
    """Another light: exposure, white balance, saturation; half the time other hues, or mirrored."""
    x = (pixels / np.float32(255)) ** np.float32(math.exp(rng.uniform(-0.35, 0.35)))
    x = x[..., rng.permutation(3)] if rng.random() < 0.5 else x
    grey = x.mean(-1, keepdims=True)
    x = grey + (x - grey) * rng.uniform(0.7, 1.3)
    x = x * rng.uniform(0.85, 1.15, (1, 1, 3))
    x = x[:, ::-1] if rng.random() < 0.5 else x
    return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


def held_out_crops(count: int, size: int = 64, seed: int = 0) -> list[Pixels]:
    """Crops of the photograph that no training has seen, for evaluation."""
    photo = load_photo(f"{HELD_OUT}.png")
    rng = np.random.default_rng(seed)
    return [crop(rng, photo, size) for _ in range(count)]


def write_prompt(
    folder: Path,
    photo_name: str,
    photo: Image.Image,
    rng: np.random.Generator,
    pairs: int,
    size: int,
) -> list[str]:
    """Writes one prompt folder: one photograph, one edit, one wording, `pairs` crops.

    Returns the seeds, one a pair. JPEG of quality 100 without chroma subsampling.
    """
    edit = EDITS[list(EDITS)[rng.integers(len(EDITS))]]
    caption = f"a photograph of {PHOTOS[photo_name].caption}"
    wording = edit.wordings[rng.integers(len(edit.wordings))]
    prompt = {"input": caption, "edit": wording, "output": f"{caption}, {edit.caption}"}
    folder.mkdir()
    (folder / "prompt.json").write_text(json.dumps(prompt))
    seeds = [str(seed) for seed in rng.choice(10**9, pairs, replace=False)]
    for seed in seeds:
        before = vary(rng, crop(rng, photo, size))
        for i, pixels in enumerate((before, edit.function(before))):
            image = Image.fromarray(pixels)
            image.save(folder / f"{seed}_{i}.jpg", quality=100, subsampling=0)
    lines = [json.dumps({"seed": seed}) + "\n" for seed in seeds]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return seeds


def write_pairs(output: Path, count: int, size: int = 64, seed: int = 0) -> Iterator[int]:
    """Writes `count` pairs into `output`; yields the number of pairs after each prompt folder.

    Prompt i depends on (seed, i) only, so a larger count extends a smaller one.
    """
    names = list(PHOTOS)
    shares = np.array([PHOTOS[name].share for name in names])
    photos = {name: load_photo(PHOTOS[name].file) for name in names}
    listed: list[Any] = []
    output.mkdir(parents=True)
    for i, start in enumerate(range(0, count, PAIRS_PER_PROMPT)):
        rng = np.random.default_rng((seed, i))
        name = names[rng.choice(len(names), p=shares)]
        pairs = min(PAIRS_PER_PROMPT, count - start)
        folder = f"{i:07d}"
        seeds = write_prompt(output / folder, name, photos[name], rng, pairs, size)
        listed.append([folder, seeds])
        yield start + pairs
    (output / "seeds.json").write_text(json.dumps(listed))
