# SPDX-License-Identifier: Apache-2.0
"""How instructions speak: the wordings of every edit, and those that no training ever sees.

{it} is the object, {value} what it becomes. Held-out wordings are new sentences of known words.
"""

from typing import NamedTuple


class Wordings(NamedTuple):
    """Sentences for one edit."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


RECOLOUR = Wordings(
    training=(
        "make {it} {value}",
        "turn {it} {value}",
        "paint {it} {value}",
        "colour {it} {value}",
        "change {it} to {value}",
        "make the colour of {it} {value}",
        "change the colour of {it} to {value}",
        "give {it} the colour {value}",
        "let {it} be {value}",
        "{it} should be {value}",
        "I want {it} in {value}",
        "I want {it} to be {value}",
    ),
    held_out=(
        "turn the colour of {it} to {value}",
        "let the colour of {it} be {value}",
        "paint {it} in {value}",
        "{it} should turn {value}",
    ),
)
RESHAPE = Wordings(
    training=(
        "turn {it} into a {value}",
        "make {it} a {value}",
        "change {it} into a {value}",
        "change {it} to a {value}",
        "make a {value} out of {it}",
        "replace {it} with a {value}",
        "swap {it} for a {value}",
        "let {it} be a {value}",
        "{it} should be a {value}",
        "I want {it} to be a {value}",
        "give {it} the shape of a {value}",
        "let {it} have the shape of a {value}",
    ),
    held_out=(
        "make {it} into a {value}",
        "change the shape of {it} to a {value}",
        "{it} should have the shape of a {value}",
        "swap {it} with a {value}",
    ),
)
SMALLER = Wordings(
    training=(
        "make {it} small",
        "make {it} smaller",
        "shrink {it}",
        "make {it} little",
        "make {it} tiny",
        "reduce the size of {it}",
        "let {it} shrink",
        "let {it} be smaller",
        "{it} should be small",
        "{it} should be smaller",
        "I want {it} to be small",
        "change the size of {it} to small",
    ),
    held_out=(
        "let {it} be small",
        "I want {it} smaller",
        "{it} should shrink",
        "make the size of {it} small",
    ),
)
LARGER = Wordings(
    training=(
        "make {it} large",
        "make {it} larger",
        "make {it} big",
        "make {it} bigger",
        "enlarge {it}",
        "increase the size of {it}",
        "let {it} grow",
        "let {it} be bigger",
        "{it} should be large",
        "{it} should be bigger",
        "I want {it} to be large",
        "change the size of {it} to large",
    ),
    held_out=(
        "let {it} be large",
        "I want {it} bigger",
        "{it} should grow",
        "make the size of {it} large",
    ),
)
PATTERN = Wordings(  # {value} is striped, {values} stripes
    training=(
        "make {it} {value}",
        "turn {it} {value}",
        "add {values} to {it}",
        "put {values} on {it}",
        "give {it} {values}",
        "cover {it} with {values}",
        "paint {values} on {it}",
        "draw {values} on {it}",
        "let {it} have {values}",
        "{it} should be {value}",
        "{it} should have {values}",
        "I want {it} with {values}",
    ),
    held_out=(
        "let {it} be {value}",
        "cover {it} in {values}",
        "I want {values} on {it}",
        "I want {it} to have {values}",
    ),
)
PLAIN = Wordings(  # {value} is plain, {values} what is there before
    training=(
        "make {it} plain",
        "turn {it} plain",
        "remove the {values} from {it}",
        "take the {values} off {it}",
        "paint {it} plain",
        "let {it} be plain",
        "{it} should be plain",
        "{it} should have no {values}",
        "I want {it} without {values}",
        "delete the {values} on {it}",
        "make {it} plain without {values}",
        "paint over the {values} of {it}",
    ),
    held_out=(
        "I want {it} to be plain",
        "delete the {values} from {it}",
        "I want no {values} on {it}",
        "remove the {values} of {it}",
    ),
)
BACKGROUND = Wordings(
    training=(
        "make the background {value}",
        "turn the background {value}",
        "paint the background {value}",
        "change the background to {value}",
        "make it a {value} background",
        "use a {value} background",
        "give it a {value} background",
        "put it on a {value} background",
        "let the background be {value}",
        "the background should be {value}",
        "I want a {value} background",
        "replace the background with {value}",
    ),
    held_out=(
        "turn the background to {value}",
        "change to a {value} background",
        "the background should turn {value}",
        "swap the background for {value}",
    ),
)
ADD = Wordings(  # {value} is "a small red circle on the left"
    training=(
        "add {value}",
        "put {value}",
        "draw {value}",
        "place {value}",
        "paint {value}",
        "insert {value}",
        "add {value} to the picture",
        "put {value} in the picture",
        "there should be {value}",
        "I want {value}",
        "let there be {value}",
        "the picture should have {value}",
    ),
    held_out=(
        "I want {value} in the picture",
        "place {value} in the picture",
        "draw {value} in the picture",
        "let the picture have {value}",
    ),
)
REMOVE = Wordings(
    training=(
        "remove {it}",
        "delete {it}",
        "erase {it}",
        "take {it} away",
        "take out {it}",
        "get rid of {it}",
        "remove {it} from the picture",
        "take {it} out of the picture",
        "let {it} vanish",
        "{it} should vanish",
        "I want no {bare}",
        "the picture without {it}",
    ),
    held_out=(
        "erase {it} from the picture",
        "I want the picture without {it}",
        "take away {it}",
        "make {it} vanish",
    ),
)
RESTYLE = {
    "outlined": Wordings(
        training=(
            "add outlines",
            "outline everything",
            "draw outlines",
            "draw dark outlines",
            "draw outlines around everything",
            "give everything an outline",
            "put outlines around everything",
            "make it outlined",
            "let everything have dark outlines",
            "everything should have outlines",
            "I want dark outlines",
            "add dark outlines to the picture",
        ),
        held_out=(
            "add outlines to everything",
            "put dark outlines around everything",
            "the picture should have outlines",
            "I want everything outlined",
        ),
    ),
    "shadowed": Wordings(
        training=(
            "add shadows",
            "let everything cast a shadow",
            "draw shadows",
            "draw dark shadows",
            "draw shadows behind everything",
            "give everything a shadow",
            "put shadows behind everything",
            "make it cast shadows",
            "let there be shadows",
            "everything should have a shadow",
            "I want dark shadows",
            "add dark shadows to the picture",
        ),
        held_out=(
            "add shadows to everything",
            "put dark shadows behind everything",
            "the picture should have shadows",
            "I want everything to cast a shadow",
        ),
    ),
    "night": Wordings(
        training=(
            "make it night",
            "turn it into night",
            "make it dark",
            "turn off the light",
            "change the time to night",
            "let it be night",
            "it should be night",
            "show it at night",
            "show it in the dark",
            "make it look like night",
            "I want it at night",
            "turn the day into night",
        ),
        held_out=(
            "let it be dark",
            "show the picture at night",
            "I want it to be night",
            "it should look like night",
        ),
    ),
}
UNSTYLE = {
    "outlined": Wordings(
        training=(
            "remove the outlines",
            "delete the outlines",
            "erase the outlines",
            "take the outlines away",
            "get rid of the outlines",
            "remove the dark outlines",
            "draw it without outlines",
            "show it without outlines",
            "make it without outlines",
            "there should be no outlines",
            "I want no outlines",
            "remove all outlines from the picture",
        ),
        held_out=(
            "take away the outlines",
            "I want it without outlines",
            "delete all outlines",
            "erase the outlines from the picture",
        ),
    ),
    "shadowed": Wordings(
        training=(
            "remove the shadows",
            "delete the shadows",
            "erase the shadows",
            "take the shadows away",
            "get rid of the shadows",
            "remove the dark shadows",
            "draw it without shadows",
            "show it without shadows",
            "make it without shadows",
            "there should be no shadows",
            "I want no shadows",
            "remove all shadows from the picture",
        ),
        held_out=(
            "take away the shadows",
            "I want it without shadows",
            "delete all shadows",
            "erase the shadows from the picture",
        ),
    ),
    "night": Wordings(
        training=(
            "make it day",
            "turn it into day",
            "make it bright",
            "turn on the light",
            "change the time to day",
            "let it be day",
            "it should be day",
            "show it by day",
            "show it in the light",
            "make it look like day",
            "I want it by day",
            "turn the night into day",
        ),
        held_out=(
            "let it be bright",
            "show the picture by day",
            "I want it to be day",
            "it should look like day",
        ),
    ),
}
JOINED = Wordings(
    training=("{} and {}", "{}, then {}", "{} and also {}", "first {}, then {}"),
    held_out=("{} and then {}", "{}, then also {}"),
)

WORDINGS = {
    "recolour": RECOLOUR,
    "reshape": RESHAPE,
    "smaller": SMALLER,
    "larger": LARGER,
    "pattern": PATTERN,
    "plain": PLAIN,
    "background": BACKGROUND,
    "add": ADD,
    "remove": REMOVE,
    **RESTYLE,
    **{f"not {style}": wordings for style, wordings in UNSTYLE.items()},
    "joined": JOINED,
}
"""All wordings by what they ask for."""
