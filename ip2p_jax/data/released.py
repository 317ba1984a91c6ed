# SPDX-License-Identifier: Apache-2.0
"""The released folder layout: one folder a prompt, and a list of them.

seeds.json        [[folder, [seed, ...]], ...]
0000007/prompt.json     {"input": caption, "edit": instruction, "output": caption}
0000007/17_0.jpg        the pictures of seed 17, before
0000007/17_1.jpg        and after
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

SEEDS = "seeds.json"


class Texts(NamedTuple):
    """What a prompt says; captions are "" where unknown."""

    instruction: str
    input_caption: str = ""
    output_caption: str = ""


def read_seeds(folder: Path) -> dict[str, list[str]]:
    """The seeds of each prompt, sorted by prompt; what is listed twice is joined.

    Raises FileNotFoundError or ValueError that names seeds.json.
    """
    file = folder / SEEDS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there, expected the list of prompts and seeds")
    try:
        listed = [
            (name, [str(seed) for seed in seeds]) for name, seeds in json.loads(file.read_text())
        ]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected [[folder, [seed, ...]], ...] ({error})") from None
    for name, seeds in listed:
        for part in (name, *seeds):
            if not isinstance(part, str) or Path(part).name != part:
                raise ValueError(f"{file}: {part!r} is not a plain name")
    prompts: dict[str, list[str]] = {}
    for name, seeds in sorted(listed):
        prompts[name] = list(dict.fromkeys([*prompts.get(name, []), *seeds]))
    return prompts


def read_texts(folder: Path) -> Texts:
    """The texts of a prompt's folder; OSError or ValueError say what is wrong with prompt.json."""
    prompt = json.loads((folder / "prompt.json").read_text())
    if not isinstance(prompt, dict):
        raise ValueError("not an object")
    before = prompt.get("input", prompt.get("caption"))
    return Texts(text(prompt.get("edit")), text(before), text(prompt.get("output")))


def pictures(folder: Path, seed: str) -> tuple[Path, Path]:
    """Where the pictures of a seed lie, before and after."""
    return folder / f"{seed}_0.jpg", folder / f"{seed}_1.jpg"


def text(value: Any) -> str:
    """The value if it is a text, else ""."""
    return value if isinstance(value, str) else ""
