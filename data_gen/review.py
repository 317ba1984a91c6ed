# SPDX-License-Identifier: Apache-2.0
"""Triplets that a person looks at: what there is to look at, and what was decided.

Beside FILE.jsonl lie FILE.review.jsonl, a line for every decision as it was made, and
FILE.reviewed.jsonl: the triplets that were accepted, corrected or written, whole at any moment.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_gen.caption_index import key_of, lines_of, read_caption
from data_gen.event_log import EventLog
from data_gen.triplet_file import Triplet, read_triplet, scan, to_line
from data_gen.triplet_filter import Limits, fault
from ip2p_jax.cli import atomic_path

ACCEPTED, CORRECTED, REJECTED, WRITTEN = "accepted", "corrected", "rejected", "written"
KEPT = (ACCEPTED, CORRECTED, WRITTEN)

WRONG = {
    "edit_length": "the instruction is too short or too long",
    "output_length": "the edited caption is too short or too long",
    "unchanged": "the edited caption is the caption",
}


class Decision(NamedTuple):
    """What was decided on a triplet, and its texts as they are now."""

    what: str
    triplet: Triplet


class Review:
    """The triplets of a file that need not exist, then those to be written of captions, then those
    that were written of nothing.

    Places are numbers from 0 to `len(review)` - 1; those of a file are read when they are needed.
    """

    def __init__(self, file: Path, captions: Sequence[Path] = ()) -> None:
        """Raises ValueError or FileNotFoundError that names a wrong line, or a file in use."""
        self.file, self.begins = file, array("Q")
        if file.exists():
            self.begins = places(file)
        self.captions = [read_caption(*line) for line in lines_of(captions)]
        self.kept = file.with_suffix(".reviewed.jsonl")
        self.log = EventLog(file.with_suffix(".review.jsonl"))
        self.decisions: dict[str, Decision] = {}
        self.written: list[str] = []
        for _, event in self.log.events():
            self.take(event["of"], event["what"], Triplet(*event["triplet"]))

    def __len__(self) -> int:
        return len(self.begins) + len(self.captions) + len(self.written)

    def close(self) -> None:
        self.log.close()

    def original(self, place: int) -> tuple[str, Triplet]:
        """The key of a place, and its triplet before it was looked at."""
        at = place - len(self.begins)
        if at < 0:
            with self.file.open("rb") as file:
                file.seek(self.begins[place])
                triplet = read_triplet(file.readline().decode("utf-8-sig"))
        elif at < len(self.captions):
            caption, url = self.captions[at]
            triplet = Triplet(caption, "", "", url)
        else:
            key = self.written[at - len(self.captions)]
            return key, self.decisions[key].triplet
        return key_of_triplet(triplet), triplet

    def look(self, place: int) -> Decision:
        """A place as it is now; nothing is decided ("") at first."""
        key, triplet = self.original(place)
        return self.decisions.get(key, Decision("", triplet))

    def accept(self, place: int | None, input: str, edit: str, output: str) -> Decision:
        """Keeps the texts of a place as they are given, or new ones (None).

        Raises ValueError that says what is wrong with them.
        """
        caption, edit, output = texts = one_line(input, edit, output)
        for name, text in zip(("caption", "instruction", "edited caption"), texts, strict=True):
            if not text:
                raise ValueError(f"the {name} is empty")
        if reason := fault(caption, edit, output, Limits()):
            raise ValueError(WRONG[reason])
        triplet = Triplet(caption, edit, output)
        if place is None:
            return self.decide(key_of_triplet(triplet), WRITTEN, triplet)
        key, original = self.original(place)
        triplet = triplet._replace(url=original.url)
        if not original.edit or key in self.written:
            return self.decide(key, WRITTEN, triplet)
        same = texts == one_line(*original[:3])
        return self.decide(key, ACCEPTED if same else CORRECTED, triplet)

    def reject(self, place: int) -> Decision:
        """Leaves a place out."""
        key, original = self.original(place)
        return self.decide(key, REJECTED, original)

    def decide(self, key: str, what: str, triplet: Triplet) -> Decision:
        """Writes a decision down; it is on the disk when this returns."""
        self.log.append({"of": key, "what": what, "triplet": list(triplet)})
        self.log.sync()
        self.take(key, what, triplet)
        with atomic_path(self.kept) as part:
            kept = [x.triplet for x in self.decisions.values() if x.what in KEPT]
            part.write_text("".join(map(to_line, kept)), "utf-8")
        return self.decisions[key]

    def take(self, key: str, what: str, triplet: Triplet) -> None:
        """Takes a decision in; a later one on the same triplet stands in its place."""
        new = what == WRITTEN and key == key_of_triplet(triplet)  # else it has a place
        if new and key not in self.decisions:
            self.written.append(key)
        self.decisions[key] = Decision(what, triplet)

    def undecided(self, after: int) -> int | None:
        """The next place after one, or the first of all, on which nothing was decided."""
        places = [*range(after + 1, len(self)), *range(0, after + 1)]
        return next((place for place in places if not self.look(place).what), None)

    def counts(self) -> dict[str, int]:
        """How many were decided how."""
        found: dict[str, int] = dict.fromkeys((ACCEPTED, CORRECTED, REJECTED, WRITTEN), 0)
        for decision in self.decisions.values():
            found[decision.what] += 1
        return found


def key_of_triplet(triplet: Triplet) -> str:
    """What a triplet is known by: its texts."""
    return f"{key_of(chr(10).join(triplet[:3])):016x}"


def one_line(*texts: str) -> list[str]:
    """Texts with single spaces in them and none around."""
    return [" ".join(text.split()) for text in texts]


def places(file: Path) -> array:
    """Where the lines of a file of triplets begin. ValueError names one that is wrong."""
    for number, found in scan(file):
        if isinstance(found, str):
            raise ValueError(f"{file}, line {number}: {found}")
    begins, begin = array("Q"), 0
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                begins.append(begin)
            begin += len(line)
    return begins
