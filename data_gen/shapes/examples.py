# SPDX-License-Identifier: Apache-2.0
"""Endless examples of edits, each decided by a seed and its number alone."""

import itertools
import random
from typing import Any, NamedTuple

from data_gen.shapes.edits import KINDS, Change, apply, draw_changes, instruct
from data_gen.shapes.scene import Object, Scene, draw_scene, pick
from data_gen.shapes.words import caption, draw_voice

COMBINED = 0.2
"""Share of edits that change two things."""
COUNTS = {1: 9.0, 2: 8.0, 3: 3.0}
"""Numbers of objects and how common they are."""
MOST = max(COUNTS)


class Example(NamedTuple):
    """An edit of a scene, with its texts."""

    before: Scene
    after: Scene
    changes: tuple[Change, ...]
    instruction: str
    input_caption: str
    output_caption: str

    def record(self) -> dict[str, Any]:
        """A triplet of texts, and the scenes, as JSON says it."""
        return {
            "input": self.input_caption,
            "edit": self.instruction,
            "output": self.output_caption,
            "before": self.before.record(),
            "after": self.after.record(),
            "changes": [change.record() for change in self.changes],
        }


def example(index: int, seed: int = 0, held_out: bool = False, objects: int = MOST) -> Example:
    """Example `index` of a seed, the same for ever, with at most so many objects, before and after.

    Without `held_out`, no object is of a held-out combination, before or after, and no wording is
    held out. With it, all objects before are of such combinations and all wordings are held out.
    """
    rng = random.Random(f"{seed} {index} {held_out}")
    drawn = (draw_example(rng, held_out) for _ in itertools.count())
    return next(x for x in drawn if max(len(x.before.objects), len(x.after.objects)) <= objects)


def draw_example(rng: random.Random, held_out: bool) -> Example:
    """A random example."""
    kinds = draw_kinds(rng)
    before, spare = draw_input(rng, kinds, held_out)
    changes = draw_changes(rng, before, spare, kinds, held_out)
    after = apply(before, changes)
    voice = draw_voice(rng)
    instruction = instruct(rng, before, changes, voice, held_out)
    return Example(
        before, after, changes, instruction, caption(before, voice), caption(after, voice)
    )


def draw_kinds(rng: random.Random) -> tuple[str, ...]:
    """One kind of edit, or two different ones."""
    if rng.random() >= COMBINED:
        return (pick(rng, KINDS),)
    return pick(rng, list(itertools.permutations(KINDS, 2)))


def draw_input(
    rng: random.Random, kinds: tuple[str, ...], held_out: bool
) -> tuple[Scene, Object | None]:
    """A scene in which there is something to remove, and an object for which there is room."""
    least = 1 + ("remove" in kinds) + ("add" in kinds)
    counts = [count for count in COUNTS if count >= least]
    scene = draw_scene(rng, pick(rng, counts, [COUNTS[count] for count in counts]), held_out)
    if "add" not in kinds:
        return scene, None
    *objects, spare = scene.objects
    return scene._replace(objects=tuple(objects)), spare
