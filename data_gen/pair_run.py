# SPDX-License-Identifier: Apache-2.0
"""The loop of pair generation: units of candidates through the devices, prompts to the folder."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from data_gen.candidates import CandidateMaker, Made, Unit
from data_gen.pair_filter import UNSAFE, Candidate, Thresholds, judge, keep_best
from data_gen.pair_folder import PairFolder, PairPixels
from data_gen.triplet_file import Triplet
from ip2p_jax.evaluation.clip_scores import ClipScores

Flagged = Callable[[Sequence[Image.Image]], list[bool]]
"""Whether each picture must not be kept."""


class Selection(NamedTuple):
    """How many candidates a prompt gets, and which of them are kept."""

    candidates: int = 100
    keep: int = 4
    stop_early: bool = False  # at the end of a unit, once `keep` have passed
    thresholds: Thresholds = Thresholds()


class Prompt:
    """A prompt in the making: its candidates so far, and the pictures of the best of them."""

    def __init__(self, selection: Selection, flagged: Flagged | None):
        self.selection, self.flagged = selection, flagged
        self.candidates: list[Candidate] = []
        self.pictures: dict[int, PairPixels] = {}

    def add(self, made: Made, first: int) -> None:
        """Takes in a unit, whose candidates are numbered from `first`; rows too many are left."""
        for i in range(min(len(made.p), self.selection.candidates - first)):
            scores = ClipScores(*(float(x[i]) for x in made.scores))
            rejected = judge(scores, self.selection.thresholds)
            if not rejected and self.flagged is not None:
                rejected = UNSAFE if any(self.flagged(pictures(made.pictures[i]))) else ""
            if not rejected:
                self.pictures[first + i] = made.pictures[i]
            p, scale = float(made.p[i]), float(made.scale[i])
            self.candidates.append(Candidate(first + i, p, scale, scores, rejected))
        self.pictures = {c.number: self.pictures[c.number] for c in self.best() if not c.rejected}

    def best(self) -> list[Candidate]:
        """All candidates, those that passed but are beaten marked as rejected."""
        return keep_best(self.candidates, self.selection.keep)

    @property
    def is_full(self) -> bool:
        """Whether no more candidates are wanted."""
        enough = self.selection.stop_early and len(self.pictures) >= self.selection.keep
        return enough or len(self.candidates) == self.selection.candidates


def pictures(pair: PairPixels) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in pair]


def make_pairs(
    folder: PairFolder,
    triplets: Sequence[Triplet],
    numbers: Iterable[int],
    maker: CandidateMaker,
    selection: Selection,
    flagged: Flagged | None = None,
) -> Iterator[list[Candidate]]:
    """Makes the prompts `numbers` and writes each when it is full; yields its candidates then.

    The devices compute one batch of units while the one before is judged and written. A prompt's
    units are taken in their order, so what is made ahead of an early stop changes nothing.
    """
    blocks = -(-selection.candidates // maker.rows)
    prompts: dict[int, Prompt] = {}
    full: set[int] = set()

    def units() -> Iterator[Unit]:
        for number in numbers:
            prompts[number] = Prompt(selection, flagged)
            for block in range(blocks):
                if number in full:
                    break
                yield Unit(number, block)

    computing: deque[tuple[list[Unit], Made]] = deque()
    ahead = units()
    while batch := [unit for _, unit in zip(range(maker.units), ahead, strict=False)]:
        computing.append((batch, maker(batch, [triplets[unit.prompt] for unit in batch])))
        if len(computing) > 1:
            yield from absorb(*computing.popleft(), prompts, full, folder, triplets, maker.rows)
    while computing:
        yield from absorb(*computing.popleft(), prompts, full, folder, triplets, maker.rows)


def absorb(
    units: Sequence[Unit],
    made: Made,
    prompts: dict[int, Prompt],
    full: set[int],
    folder: PairFolder,
    triplets: Sequence[Triplet],
    rows: int,
) -> Iterator[list[Candidate]]:
    """Judges a batch, and writes the prompts that are full then."""
    made = jax.tree.map(np.asarray, made)
    for i, unit in enumerate(units):
        if unit.prompt in full:
            continue
        prompt = prompts[unit.prompt]
        prompt.add(
            jax.tree.map(lambda x, i=i: x[i * rows : (i + 1) * rows], made), unit.block * rows
        )
        if prompt.is_full:
            folder.write(unit.prompt, triplets[unit.prompt], prompt.best(), prompt.pictures)
            full.add(unit.prompt)
            del prompts[unit.prompt]
            yield prompt.best()
