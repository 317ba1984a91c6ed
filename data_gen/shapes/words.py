# SPDX-License-Identifier: Apache-2.0
"""How captions speak: every attribute of a scene that is not the default, in one of many voices.

Defaults are size large, texture plain, style flat, place centre. Both captions of an edit are
spoken in the same voice, so that they differ in what the edit changes only.
"""

import random
from typing import NamedTuple

from data_gen.shapes.scene import Object, Scene, pick

SMALL = ("small", "little", "tiny")
LARGE = ("large", "big")
ADJECTIVES = {"striped": ("striped",), "dotted": ("dotted", "spotted")}
NOUNS = {"striped": ("stripes",), "dotted": ("dots", "spots")}
PLACES = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on top", "in the upper part"),
    "bottom": ("at the bottom", "at the bottom", "in the lower part"),
}
BACKGROUNDS = ("on a {} background", "against a {} background", "in front of a {} background")
STYLES = {
    "outlined": ("with outlines", "with dark outlines", "drawn with outlines"),
    "shadowed": ("with shadows", "casting shadows", "with dark shadows"),
    "night": ("at night", "in the night", "in the dark"),
}
FRAMES = (
    "{objects} {background}{end}",
    "{objects} {background}{end}",
    "{start}{objects} {background}",
    "{background}, {objects}{end}",
    "a picture of {objects} {background}{end}",
    "a drawing of {objects} {background}{end}",
    "a picture {background} with {objects}{end}",
    "there is {objects} {background}{end}",
)


class Voice(NamedTuple):
    """How something is said: a number for every choice of words."""

    frame: int
    size: int
    texture: int
    place: int
    background: int
    style: int
    adjective: bool
    """"a striped circle", not "a circle with stripes"."""
    complete: bool
    """Says large and plain, too."""


def draw_voice(rng: random.Random) -> Voice:
    """A random voice."""
    frame = pick(rng, range(len(FRAMES)))
    size, texture, place, background, style = (pick(rng, range(12)) for _ in range(5))
    adjective, complete = rng.random() < 0.7, rng.random() < 0.2
    return Voice(frame, size, texture, place, background, style, adjective, complete)


def chosen(options: tuple[str, ...], number: int) -> str:
    """The option that a voice's number stands for."""
    return options[number % len(options)]


def with_article(words: str) -> str:
    """a circle, an orange circle."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place(o: Object, voice: Voice) -> str:
    """Where an object is; "" in the centre."""
    return chosen(PLACES[o.place], voice.place) if o.place in PLACES else ""


def describe(o: Object, voice: Voice) -> str:
    """An object with its article and all that is not the default: "a small striped red circle"."""
    large = chosen(LARGE, voice.size) if voice.complete else ""
    size = chosen(SMALL, voice.size) if o.size == "small" else large
    texture, ending = "plain" if voice.complete else "", ""
    if o.texture != "plain":
        if voice.adjective:
            texture = chosen(ADJECTIVES[o.texture], voice.texture)
        else:
            texture, ending = "", f"with {chosen(NOUNS[o.texture], voice.texture)}"
    words = " ".join(filter(None, (size, texture, o.colour, o.shape)))
    return " ".join(filter(None, (with_article(words), ending, place(o, voice))))


def listed(parts: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def caption(scene: Scene, voice: Voice) -> str:
    """What a picture shows, in one sentence."""
    style = chosen(STYLES[scene.style], voice.style) if scene.style in STYLES else ""
    return FRAMES[voice.frame].format(
        objects=listed([describe(o, voice) for o in scene.objects]),
        background=chosen(BACKGROUNDS, voice.background).format(scene.background),
        start=f"{style}, " if style else "",
        end=f", {style}" if style else "",
    )
