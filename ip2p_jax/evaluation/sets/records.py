# SPDX-License-Identifier: Apache-2.0
"""What every evaluation set is made of, whatever its layout.

A layout says how example i is found (a `Plan`): its texts, and where its pictures lie. Pictures are
read when an example is asked for.
"""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ip2p_jax.data.pictures import Stream

THREADS = 16  # they wait for disks


class Turn(NamedTuple):
    """One edit; None where the set does not say. `target` and `mask` are encoded pictures."""

    instruction: str
    input_caption: str | None = None
    output_caption: str | None = None
    target: bytes | None = None
    mask: bytes | None = None


class Example(NamedTuple):
    """An encoded picture, and what is done to it: the result of a turn is the next one's input."""

    name: str
    input: bytes
    turns: tuple[Turn, ...]


class Source(NamedTuple):
    """A picture where it lies; `where` is what errors call it."""

    where: str
    open: Callable[[], Stream]

    def read(self) -> bytes:
        with self.open() as stream:
            return stream.read()


class Step(NamedTuple):
    """A turn whose pictures are not read yet; `input` is the picture it would edit on its own."""

    name: str
    input: Source | None
    instruction: str
    input_caption: str | None = None
    output_caption: str | None = None
    target: Source | None = None
    mask: Source | None = None

    def read(self) -> Turn:
        target, mask = (x and x.read() for x in (self.target, self.mask))
        return Turn(self.instruction, self.input_caption, self.output_caption, target, mask)


class Plan(NamedTuple):
    """An example whose pictures are not read yet."""

    name: str
    input: Source
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class ExampleSet:
    """Random access to examples. `plan(i)` finds example i of the layout, for i in `indices`."""

    name: str
    plan: Callable[[int], Plan]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Example:
        plan = self.plan(self.indices[i])
        return Example(plan.name, plan.input.read(), tuple(step.read() for step in plan.steps))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def take(self, chosen: Sequence[int]) -> "ExampleSet":
        """The set of some of the examples, in the order given."""
        return ExampleSet(self.name, self.plan, [self.indices[i] for i in chosen])

    @functools.cached_property
    def plans(self) -> list[Plan]:
        """All plans, in order; their texts are read the first time."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self.plan, self.indices))

    @property
    def turns(self) -> int:
        """The most turns of any example."""
        return max(len(plan.steps) for plan in self.plans)

    @property
    def has_input_captions(self) -> bool:
        return all(step.input_caption for plan in self.plans for step in plan.steps)

    @property
    def has_output_captions(self) -> bool:
        return all(step.output_caption for plan in self.plans for step in plan.steps)

    @property
    def has_targets(self) -> bool:
        return all(step.target for plan in self.plans for step in plan.steps)


def from_sessions(name: str, sessions: Sequence[Plan], turns: str) -> ExampleSet:
    """The set of sessions ("multi"), or of all their turns on their own ("single").

    Raises ValueError if a turn has no picture to edit on its own.
    """
    plans = list(sessions)
    if turns == "single":
        plans = [alone(name, step) for plan in sessions for step in plan.steps]
    return ExampleSet(name, plans.__getitem__, range(len(plans)))


def alone(name: str, step: Step) -> Plan:
    """A turn as an example of its own."""
    if step.input is None:
        raise ValueError(
            f"{name}: {step.name} has no input of its own, as the turn before it has no target: "
            "only --turns multi can take it"
        )
    return Plan(step.name, step.input, (step,))


def file_source(path: Path) -> Source:
    """A picture in a file."""
    return Source(str(path), functools.partial(open_file, path))


def open_file(path: Path) -> Stream:
    """Opens a picture file; ValueError or FileNotFoundError name it."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a picture")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, expected a picture")
    return path.open("rb")


def bytes_source(where: str, read: Callable[[], bytes]) -> Source:
    """A picture that comes as bytes."""
    return Source(where, lambda: io.BytesIO(read()))


def caption(value: Any) -> str | None:
    """A caption, or None if it is no text or a blank one."""
    return value if isinstance(value, str) and value.strip() else None
