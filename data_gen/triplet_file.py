# SPDX-License-Identifier: Apache-2.0
"""Triplets of texts as JSON lines: a caption, an instruction, and the caption after the edit.

Two spellings are read: {"input", "edit", "output"} (the released file) and {"caption", "edit",
"output"} with an optional "url" (generated files).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Triplet(NamedTuple):
    """Texts of one edit; `url` is the picture the caption came from, or ""."""

    input: str
    edit: str
    output: str
    url: str = ""

    def prompt(self) -> dict[str, str]:
        """What prompt.json says of it."""
        texts = self._asdict()
        return texts if self.url else {key: texts[key] for key in ("input", "edit", "output")}


def read_triplets(path: Path) -> list[Triplet]:
    """Reads a file; a triplet's place in the list is its number everywhere else.

    Raises ValueError or FileNotFoundError that names the file, the line and what was expected.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected triplets as JSON lines")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text in UTF-8") from None
    triplets = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                triplets.append(read_triplet(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not triplets:
        raise ValueError(f"{path}: holds no triplet")
    return triplets


def read_triplet(line: str) -> Triplet:
    """Reads one line. Raises ValueError that says what is wrong in it."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    first = "input" if "input" in values else "caption"
    texts = [text(values, key) for key in (first, "edit", "output")]
    url = values.get("url") or ""
    return Triplet(*texts, url=url if isinstance(url, str) else "")


def text(values: dict[str, Any], key: str) -> str:
    """A text that is there and not empty."""
    if key not in values:
        wanted = '"input" (or "caption")' if key == "caption" else f'"{key}"'
        raise ValueError(f"no {wanted}; expected input, edit and output")
    if not isinstance(values[key], str) or not values[key].strip():
        raise ValueError(f'"{key}" is {values[key]!r}, expected a text that is not empty')
    return values[key]
