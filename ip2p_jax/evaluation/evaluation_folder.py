# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation, in which the same command goes on.

settings.json    how all of it was made; another command with other settings is refused
units/000007.jsonl   the lines of a few examples at the points done so far
pictures/ 12_1_7.5_1.2.png   results to look at: example, turn, guidance scales
metrics.jsonl    the lines of all examples, then of all points; written at the end, as are
table.md, curve.png, samples.png, guidance.png
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from ip2p_jax.evaluation.sweep import Point
from ip2p_jax.storage import json_lines, open_folder, retried, write_whole

Line = dict[str, Any]

KIND = "an evaluation"
"""What the folder is of, in words."""


@dataclass(frozen=True)
class EvaluationFolder:
    """A folder at `path`, local or in a bucket; `axis` is what a point has beside s_T."""

    path: epath.Path
    axis: str

    @classmethod
    def open(cls, path: str, settings: dict[str, Any], axis: str) -> "EvaluationFolder":
        """Opens a folder, or begins one. ValueError names the settings in which they differ."""
        return cls(open_folder(path, settings, KIND), axis)

    def unit(self, number: int) -> epath.Path:
        return self.path / "units" / f"{number:06d}.jsonl"

    def lines(self, unit: int) -> list[Line]:
        """What is there of a unit."""
        file = self.unit(unit)
        text = retried(lambda: file.read_text() if file.exists() else "", str(file))
        return [json.loads(line) for line in text.splitlines()]

    def write_lines(self, unit: int, lines: Sequence[Line]) -> None:
        """Writes all lines of a unit, whole or not at all."""
        file = self.unit(unit)

        def write() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json_lines(lines))

        retried(write, str(file))

    def picture(self, index: int, turn: int, point: Point) -> epath.Path:
        """Where the result of an example at a point is shown."""
        return (
            self.path / "pictures" / f"{index}_{turn}_{point.text_guidance:g}_{point.other:g}.png"
        )

    def write_picture(self, file: epath.Path, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes a PNG, whole or not at all."""
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")

        def write() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, encoded.getvalue())

        retried(write, str(file))

    def point(self, line: Line) -> Point:
        """The point of a line."""
        return Point(line["text_guidance"], line[self.axis])

    def done(self, lines: Iterable[Line]) -> set[tuple[Point, int]]:
        """Which examples have been edited, or skipped, at which points."""
        return {(self.point(line), line["index"]) for line in lines}

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of the whole evaluation."""
        file = self.path / name
        retried(lambda: write_whole(file, data), str(file))
