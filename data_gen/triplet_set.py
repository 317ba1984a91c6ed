# SPDX-License-Identifier: Apache-2.0
"""The triplets of a run: accepted answers in the order of their captions, without near-duplicates.

They are a function of the captions and of what the server said, not of when it said it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int64

from data_gen import triplet_report
from data_gen.event_log import BLOCK, Event, EventLog, read_event
from data_gen.near_duplicates import near_duplicates
from data_gen.standing import Standing, counts
from data_gen.triplet_file import Triplet, to_line
from data_gen.triplet_report import Tally
from ip2p_jax.cli import atomic_path
from ip2p_jax.storage import write_whole


def event_at(answers: EventLog, begin: int) -> Event:
    """The line of the file that begins there."""
    line = b""
    while b"\n" not in line:
        line += os.pread(answers.fd, BLOCK if line else 2048, begin + len(line))
    return read_event(line[: line.index(b"\n")], f"{answers.path}, byte {begin}")


class Accepted:
    """The accepted answers, in the order of their captions; read when they are needed."""

    def __init__(self, answers: EventLog, standing: Standing) -> None:
        self.answers, self.standing = answers, standing
        self.begins: Int64[np.ndarray, " m"] = standing.accepted[standing.accepted >= 0]

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, number: int) -> Triplet:
        event = event_at(self.answers, int(self.begins[number]))
        judged = self.standing.judged(event)
        return Triplet(event["caption"], judged.edit, judged.output, event.get("url", ""))

    def text(self, number: int) -> str:
        """What is compared with other triplets."""
        return "\n".join(self[number][:3])

    def texts(self) -> Iterator[str]:
        return (self.text(number) for number in range(len(self)))


def write_set(
    folder: Path, answers: EventLog, standing: Standing, tally: Tally, threshold: float
) -> int:
    """Writes triplets.jsonl, and counts what goes into it and what does not; returns how many do.

    threshold: a triplet as similar as that to an earlier one is left out.
    """
    accepted = Accepted(answers, standing)
    same = near_duplicates(accepted.texts(), accepted.text, threshold)
    with atomic_path(folder / "triplets.jsonl") as part, part.open("w", encoding="utf-8") as file:
        for number in range(len(accepted)):
            triplet = accepted[number]
            if same[number]:
                tally.take_near_duplicate(triplet)
            else:
                file.write(to_line(triplet))
                tally.take_triplet(triplet)
    return len(accepted) - int(same.sum())


def write_report(folder: Path, standing: Standing, tally: Tally, settings: dict[str, Any]) -> None:
    """Writes report.md and its pictures."""
    for name, picture in triplet_report.pictures(tally).items():
        write_whole(epath.Path(folder / name), picture)
    text = triplet_report.markdown(tally, counts(standing), settings)
    write_whole(epath.Path(folder / "report.md"), text.encode())
