# SPDX-License-Identifier: Apache-2.0
"""The folder of pairs in the released layout, written prompt by prompt.

    settings.json     how all of it was made; another command with other settings is refused
    0000007/          one folder a prompt, numbered by its line
        prompt.json   its texts
        17_0.jpg      the pictures of kept candidate 17, before and after
        17_1.jpg
        metadata.jsonl  one row a candidate, rejected ones too; written last, so it says "whole"
    seeds.json        [[folder, [seed, ...]], ...] of prompts with kept pairs; written at the end

A prompt is whole or is made anew, on local disks and in buckets alike, where no folder can be
renamed.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from data_gen.pair_filter import Candidate
from data_gen.triplet_file import Triplet
from ip2p_jax.storage import json_lines, open_folder, retried, write_whole

KIND = "pairs"
"""What the folder is of, in words."""

PairPixels = UInt8[np.ndarray, "2 h w 3"]


def jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Quality 100 without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


@dataclass(frozen=True)
class PairFolder:
    """A folder of pairs at `path`, local or in a bucket."""

    path: epath.Path

    @classmethod
    def open(cls, path: str, settings: dict[str, Any]) -> "PairFolder":
        """Opens a folder, or begins one. ValueError names the settings in which they differ."""
        return cls(open_folder(path, settings, KIND))

    def prompt_folder(self, number: int) -> epath.Path:
        return self.path / f"{number:07d}"

    def is_done(self, number: int, triplet: Triplet) -> bool:
        """Whether a prompt is whole. ValueError if it was made of other texts."""
        folder = self.prompt_folder(number)
        if not (folder / "metadata.jsonl").exists():
            return False
        there = json.loads((folder / "prompt.json").read_text())
        if there != triplet.prompt():
            raise ValueError(
                f"{folder} was made of {there['input']!r}, the triplets now say "
                f"{triplet.input!r}: lines may be added at the end, not changed"
            )
        return True

    def write(
        self,
        number: int,
        triplet: Triplet,
        candidates: Sequence[Candidate],
        kept: dict[int, PairPixels],
    ) -> None:
        """Writes a prompt: all rows, and the pictures of the kept candidates by their number."""
        folder = self.prompt_folder(number)

        def write() -> None:
            if folder.exists():  # what a killed process left
                folder.rmtree()
            folder.mkdir(parents=True)
            (folder / "prompt.json").write_text(json.dumps(triplet.prompt()))
            for candidate, pair in kept.items():
                for i, pixels in enumerate(pair):
                    (folder / f"{candidate}_{i}.jpg").write_bytes(jpeg(pixels))
            write_whole(folder / "metadata.jsonl", json_lines([c.row() for c in candidates]))

        retried(write, str(folder))

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The rows of a whole prompt's metadata."""
        lines = (self.prompt_folder(number) / "metadata.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def pictures(self, number: int, seed: str) -> tuple[Image.Image, Image.Image]:
        """The pictures of a kept candidate."""
        files = [self.prompt_folder(number) / f"{seed}_{i}.jpg" for i in (0, 1)]
        before, after = (Image.open(io.BytesIO(file.read_bytes())) for file in files)
        return before, after

    def finish(self, kept: Mapping[int, Sequence[str]]) -> None:
        """Writes seeds.json: the seeds of the kept pairs of each prompt that has any."""
        listed = [[f"{number:07d}", list(seeds)] for number, seeds in sorted(kept.items())]
        file = self.path / "seeds.json"
        retried(lambda: write_whole(file, json.dumps(listed).encode()), str(file))
