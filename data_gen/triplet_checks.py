# SPDX-License-Identifier: Apache-2.0
"""Checks triplets that were written by hand, before a language model is taught with them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_gen.caption_text import folded
from data_gen.near_duplicates import bands, grams, similarity
from data_gen.triplet_file import END, MIDDLE, PROMPT_END, Triplet, scan
from data_gen.triplet_filter import Limits, fault

NEAR = 0.8
"""Similarity of two captions from which on they are said to overlap."""

CAPTION = (2, 500)
"""The least and the greatest length of a caption in characters, as of one after an edit."""


class Finding(NamedTuple):
    """What is odd about a line. A `wrong` one is not to be taught."""

    where: str
    what: str
    wrong: bool

    def __str__(self) -> str:
        return f"{'error' if self.wrong else 'warning'}: {self.where}: {self.what}"


class Checked(NamedTuple):
    """A triplet and where it is."""

    triplet: Triplet
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


def check(files: Sequence[Path], limits: Limits) -> tuple[list[Checked], list[Finding]]:
    """The triplets that can be used, of several files, and what was found, in order of lines.

    Malformed lines, lengths, edits that change nothing and repetitions are wrong; a caption that
    is the same as an earlier one, or nearly, is worth a warning. Raises FileNotFoundError or
    ValueError for a file that is not there or is not a text.
    """
    good: list[Checked] = []
    findings: list[Finding] = []
    seen: dict[tuple[str, ...], Checked] = {}
    for file in files:
        for line, found in scan(file):
            what = found if isinstance(found, str) else mistake(found, limits)
            if isinstance(found, Triplet) and not what:
                one = Checked(found, file, line)
                first = seen.setdefault(tuple(map(folded, found[:3])), one)
                if first is one:
                    good.append(one)
                    continue
                what = f"says the same as {first}"
            findings.append(Finding(f"{file}, line {line}", what, wrong=True))
    return good, findings + [
        Finding(str(one), f"its caption is nearly that of {other}", wrong=False)
        for one, other in overlaps(good)
    ]


def mistake(triplet: Triplet, limits: Limits) -> str:
    """What is wrong with a triplet by itself, or ""."""
    bounds = {"input": CAPTION, **limits._asdict()}
    for name, (least, most) in bounds.items():
        length = len(getattr(triplet, name))
        if not least <= length <= most:
            return f'"{name}" has {length} characters, expected {least} to {most}'
    if fault(triplet.input, triplet.edit, triplet.output, limits):
        return '"output" says the same as "input"'
    for mark in (PROMPT_END, MIDDLE, END):
        if any(mark in text for text in triplet[:3]):
            return f"holds {mark!r}, by which the old format tells texts apart"
    return ""


def overlaps(triplets: Sequence[Checked]) -> Iterator[tuple[Checked, Checked]]:
    """Triplets whose caption is nearly that of one before them, and the first such one."""
    known: dict[tuple[int, int], list[int]] = {}  # by band, as near duplicates share one
    sets = [grams(one.triplet.input) for one in triplets]
    for i, one in enumerate(triplets):
        keys = list(enumerate(bands(one.triplet.input).tolist()))
        for j in sorted({j for key in keys for j in known.get(key, ())}):
            if similarity(sets[i], sets[j]) >= NEAR:
                yield one, triplets[j]
                break
        for key in keys:
            known.setdefault(key, []).append(i)
