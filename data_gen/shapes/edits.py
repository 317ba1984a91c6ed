# SPDX-License-Identifier: Apache-2.0
"""Edits: what they change in a scene, and how they are asked for.

The true edited scene is known: `apply(scene, changes)`.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_gen.shapes import words
from data_gen.shapes.instructions import WORDINGS
from data_gen.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    Object,
    Scene,
    held_out_object,
    pick,
)
from data_gen.shapes.words import Voice

ATTRIBUTES = {"recolour": "colour", "reshape": "shape", "resize": "size", "retexture": "texture"}
"""Kinds of edits that change one attribute of one object."""
VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "texture": TEXTURES}
KINDS = (*ATTRIBUTES, "background", "add", "remove", "restyle")


class Change(NamedTuple):
    """One change. `target` is the object's place in the scene before all changes, or -1."""

    kind: str
    value: str = ""
    target: int = -1
    added: Object | None = None

    def record(self) -> dict[str, Any]:
        """As JSON says it."""
        return self._asdict() | {"added": self.added and self.added._asdict()}


def change_of(values: Mapping[str, Any]) -> Change:
    """The inverse of `Change.record`."""
    added = values["added"] and Object(**values["added"])
    return Change(values["kind"], values["value"], values["target"], added)


def apply(scene: Scene, changes: Sequence[Change]) -> Scene:
    """The scene after all changes. Objects keep their order; added ones come last."""
    objects = list(scene.objects)
    removed = {change.target for change in changes if change.kind == "remove"}
    for change in changes:
        match change.kind:
            case "background":
                scene = scene._replace(background=change.value)
            case "restyle":
                scene = scene._replace(style=change.value)
            case "recolour" | "reshape" | "resize" | "retexture":
                attribute = {ATTRIBUTES[change.kind]: change.value}
                objects[change.target] = objects[change.target]._replace(**attribute)
    kept = [o for i, o in enumerate(objects) if i not in removed]
    added = [change.added for change in changes if change.added]
    return scene._replace(objects=(*kept, *added))


def draw_changes(
    rng: random.Random, scene: Scene, spare: Object | None, kinds: Sequence[str], held_out: bool
) -> tuple[Change, ...]:
    """One change of each kind, which touch different things.

    `spare` is an object for which there is room. Unless `held_out`, no object becomes one that
    training never sees.
    """
    changes: list[Change] = []
    everyone = list(range(len(scene.objects)))
    gone = pick(rng, everyone) if "remove" in kinds else -1
    for kind in kinds:
        now = apply(scene, [change for change in changes if change.kind in ATTRIBUTES])
        if kind == "add":
            changes.append(Change(kind, added=spare))
        elif kind == "remove":
            changes.append(Change(kind, target=gone))
        elif kind in ATTRIBUTES:
            target = pick(rng, [i for i in everyone if i != gone])
            used = {o.colour for o in (*now.objects, *([spare] if spare else []))}
            value = _other_value(rng, kind, now.objects[target], used, held_out)
            changes.append(Change(kind, value, target))
        else:
            changes.append(Change(kind, _other_whole(rng, kind, scene)))
    return tuple(changes)


def _other_value(rng: random.Random, kind: str, o: Object, used: set[str], held_out: bool) -> str:
    attribute = ATTRIBUTES[kind]
    others = [value for value in VALUES[attribute] if value != getattr(o, attribute)]
    if kind == "recolour":
        others = [colour for colour in others if colour not in used]
    if not held_out:
        others = [v for v in others if not held_out_object(o._replace(**{attribute: v}))]
    return pick(rng, others)


def _other_whole(rng: random.Random, kind: str, scene: Scene) -> str:
    if kind == "background":
        return pick(rng, [name for name in BACKGROUNDS if name != scene.background])
    return pick(rng, STYLES[1:]) if scene.style == "flat" else "flat"


def instruct(
    rng: random.Random, scene: Scene, changes: Sequence[Change], voice: Voice, held_out: bool
) -> str:
    """Asks for one change or two of a scene, in a random wording; with held-out wordings only, or
    with none of them."""
    clauses, named = [], -1
    for change in changes:
        key, values = _wanted(rng, scene, change, voice)
        wording = _wording(rng, key, held_out)
        target = scene.objects[change.target] if change.target >= 0 else None
        if target:
            it = "it" if change.target == named else refer(rng, scene, target, voice)
            values |= {"it": it, "bare": it.removeprefix("the ")}
            named = change.target
        clauses.append(wording.format(**values))
    if len(clauses) == 1:
        return clauses[0]
    return _wording(rng, "joined", held_out).format(*clauses)


def _wording(rng: random.Random, key: str, held_out: bool) -> str:
    return pick(rng, WORDINGS[key].held_out if held_out else WORDINGS[key].training)


def _wanted(
    rng: random.Random, scene: Scene, change: Change, voice: Voice
) -> tuple[str, dict[str, str]]:
    """Which wordings a change has, and the words that go into them."""
    value = change.value
    match change.kind:
        case "add" if change.added:
            return "add", {"value": words.describe(change.added, voice)}
        case "resize":
            return "smaller" if value == "small" else "larger", {}
        case "retexture" if value == "plain":
            before = scene.objects[change.target].texture
            return "plain", {"values": pick(rng, words.NOUNS[before])}
        case "retexture":
            values = pick(rng, words.NOUNS[value])
            return "pattern", {"value": pick(rng, words.ADJECTIVES[value]), "values": values}
        case "restyle" if value == "flat":
            return f"not {scene.style}", {}
        case "restyle":
            return value, {}
    return change.kind, {"value": value}


def refer(rng: random.Random, scene: Scene, o: Object, voice: Voice) -> str:
    """Words that mean this object of the scene and no other."""
    options = [f"the {o.colour} {o.shape}", f"the {o.colour} shape"]
    weights = [3.0, 0.5]
    if sum(other.shape == o.shape for other in scene.objects) == 1:
        options.append(f"the {o.shape}")
        weights.append(2.0)
    if len(scene.objects) > 1:
        options.append(f"the {o.shape} {words.place(o, voice)}")
        weights.append(1.0)
    return pick(rng, options, weights)
