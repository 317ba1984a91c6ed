# SPDX-License-Identifier: Apache-2.0
"""Triplets of texts as JSON lines: a caption, an instruction, and the caption after the edit.

Two spellings are read and written: {"input", "edit", "output"} (the released file, hand-written
ones) and {"caption", "edit", "output"} with an optional "url" (generated files). So is the format
with which completion models were fine-tuned: {"prompt": caption + PROMPT_END, "completion":
instruction + MIDDLE + edited caption + END}.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PROMPT_END, MIDDLE, END = "\n##\n", "\n%%\n", "\nEND"


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
    triplets = []
    for number, found in scan(path):
        if isinstance(found, str):
            raise ValueError(f"{path}, line {number}: {found}")
        triplets.append(found)
    if not triplets:
        raise ValueError(f"{path}: holds no triplet")
    return triplets


def scan(path: Path) -> Iterator[tuple[int, Triplet | str]]:
    """The number of every line that is not empty, from 1, and its triplet or what is wrong in it.

    Raises FileNotFoundError or ValueError that names a file which is not there or is not a text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected triplets as JSON lines")
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, read_or_why(line)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text in UTF-8") from None


def read_or_why(line: str) -> Triplet | str:
    """A line's triplet, or what is wrong in it."""
    try:
        return read_triplet(line)
    except RecursionError:
        return "not JSON (nested too deeply)"
    except ValueError as error:
        return str(error)


def read_triplet(line: str) -> Triplet:
    """Reads one line. Raises ValueError that says what is wrong in it."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    if "prompt" in values and "completion" in values:
        values = from_completion(text(values, "prompt"), text(values, "completion"))
    first = "input" if "input" in values else "caption"
    texts = [text(values, key) for key in (first, "edit", "output")]
    url = values.get("url") or ""
    return Triplet(*texts, url=url if isinstance(url, str) else "")


def from_completion(prompt: str, completion: str) -> dict[str, str]:
    """The texts of the old format. Raises ValueError that says what is wrong in them."""
    caption, edit_and_output = prompt.removesuffix(PROMPT_END), completion.removesuffix(END)
    if caption == prompt:
        raise ValueError(f'"prompt" is {prompt!r}, expected it to end in {PROMPT_END!r}')
    if edit_and_output == completion:
        raise ValueError(f'"completion" is {completion!r}, expected it to end in {END!r}')
    edit, *output = edit_and_output.removeprefix(" ").split(MIDDLE)
    if len(output) != 1:
        raise ValueError(f'"completion" is {completion!r}, expected {MIDDLE!r} in it, once')
    return {"input": caption, "edit": edit, "output": output[0]}


def to_line(triplet: Triplet) -> str:
    """The line of a triplet: as generated files spell it if it has a url, else as the released."""
    texts = triplet._asdict()
    if triplet.url:
        texts = {"caption": texts.pop("input"), **texts}
    else:
        del texts["url"]
    return json.dumps(texts, ensure_ascii=False) + "\n"


def to_old_line(triplet: Triplet) -> str:
    """The line of the old format, which has no place for the url."""
    completion = f"{triplet.edit}{MIDDLE}{triplet.output}{END}"
    values = {"prompt": triplet.input + PROMPT_END, "completion": completion}
    return json.dumps(values, ensure_ascii=False) + "\n"


def text(values: dict[str, Any], key: str) -> str:
    """A text that is there, not empty, and can be written again."""
    if key not in values:
        wanted = '"input" (or "caption")' if key == "caption" else f'"{key}"'
        raise ValueError(f"no {wanted}; expected input, edit and output")
    if not isinstance(values[key], str) or not values[key].strip():
        raise ValueError(f'"{key}" is {values[key]!r}, expected a text that is not empty')
    if any("\ud800" <= letter <= "\udfff" for letter in values[key]):
        raise ValueError(f'"{key}" is {values[key]!a}, which holds half a character')
    return values[key]
