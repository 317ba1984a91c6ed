# SPDX-License-Identifier: Apache-2.0
"""Photometric edits with known truth, and the sentences that ask for them.

Every edit is a pure function of a uint8 picture of any size. `held_out` are wordings for
evaluation: new sentences, made only of words that the training wordings use.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFilter

Pixels = UInt8[np.ndarray, "h w 3"]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], np.float32)


class Edit(NamedTuple):
    """An exact edit, how its result is described, and how people ask for it."""

    function: Callable[[Pixels], Pixels]
    caption: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]


def _uint8(x: Float32[np.ndarray, "h w 3"]) -> Pixels:
    return np.rint(x.clip(0, 255)).astype(np.uint8)


def black_and_white(x: Pixels) -> Pixels:
    """Luma (ITU-R BT.601) in all three channels."""
    return _uint8(np.repeat((x @ LUMA)[..., None], 3, axis=-1))


def sepia(x: Pixels) -> Pixels:
    """The usual sepia matrix."""
    return _uint8(x @ SEPIA.T)


def invert(x: Pixels) -> Pixels:
    """The negative."""
    return 255 - x


def brighter(x: Pixels) -> Pixels:
    """Gamma 0.55."""
    return _uint8(255 * (x / np.float32(255)) ** np.float32(0.55))


def darker(x: Pixels) -> Pixels:
    """Gamma 1.8."""
    return _uint8(255 * (x / np.float32(255)) ** np.float32(1.8))


def _tint(x: Pixels, channel: int) -> Pixels:
    light = np.zeros(3, np.float32)
    light[channel] = 255
    return _uint8(0.65 * x.astype(np.float32) + 0.35 * light[None, None])


def red_tint(x: Pixels) -> Pixels:
    """65 % picture, 35 % red."""
    return _tint(x, 0)


def green_tint(x: Pixels) -> Pixels:
    """65 % picture, 35 % green."""
    return _tint(x, 1)


def blue_tint(x: Pixels) -> Pixels:
    """65 % picture, 35 % blue."""
    return _tint(x, 2)


def blur(x: Pixels) -> Pixels:
    """Gaussian blur with a standard deviation of 1/32 of the width."""
    return np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(x.shape[1] / 32)))


def mirror(x: Pixels) -> Pixels:
    """Left and right swapped."""
    return np.ascontiguousarray(x[:, ::-1])


def _colour_wordings(colour: str) -> tuple[str, ...]:
    return (
        f"give it a {colour} tint",
        f"add a {colour} tint",
        f"tint it {colour}",
        f"make it more {colour}",
        f"turn it {colour}",
        f"make the picture {colour}",
        f"put a {colour} filter over it",
        f"add a {colour} filter to the photo",
        f"let it look {colour}",
        f"tint the picture with {colour}",
        f"make everything look {colour}",
        f"bathe the scene in {colour} light",
        f"light it with a {colour} lamp",
        f"the photo should have a {colour} tint",
    )


def _colour_held_out(colour: str) -> tuple[str, ...]:
    return (
        f"give the photo a {colour} tint",
        f"put a {colour} tint over the picture",
        f"make the photo more {colour}",
        f"add {colour} light to the scene",
        f"tint everything {colour}",
    )


EDITS = {
    "black_and_white": Edit(
        black_and_white,
        "in black and white",
        (
            "make it black and white",
            "turn it black and white",
            "convert the picture to black and white",
            "make it a black and white photo",
            "remove the colours",
            "take all the colour out of it",
            "make it monochrome",
            "turn the photo into monochrome",
            "make the picture grey",
            "convert it to greyscale",
            "turn this into a greyscale picture",
            "it should be in black and white",
            "show it without colour",
            "let it look like an old black and white film",
            "drain the colour from the scene",
        ),
        (
            "turn the picture into a black and white photo",
            "convert this photo to greyscale",
            "remove all the colour from the picture",
            "make the photo monochrome",
            "show the scene in black and white",
        ),
    ),
    "sepia": Edit(
        sepia,
        "in sepia",
        (
            "turn it sepia",
            "make it sepia",
            "give it a sepia tone",
            "apply a sepia filter",
            "convert the picture to sepia",
            "make it look like an old sepia photo",
            "tone the photo in sepia",
            "add a sepia effect",
            "put a sepia filter over it",
            "make it an antique brown photo",
            "give the picture an antique sepia look",
            "make it look antique",
            "turn this into a sepia print",
            "let it look like an antique print",
        ),
        (
            "turn the photo sepia",
            "give the photo a sepia look",
            "make the picture an old sepia print",
            "apply a sepia tone to it",
            "convert this to an antique sepia photo",
        ),
    ),
    "invert": Edit(
        invert,
        "as a negative",
        (
            "invert the colours",
            "invert it",
            "invert the whole picture",
            "make it a negative",
            "turn it into a negative",
            "invert all the colours in the photo",
            "show the negative of it",
            "make a photo negative",
            "reverse the colours",
            "replace each colour by its opposite",
            "turn every colour into its opposite",
            "apply an invert effect",
            "make it look like a film negative",
            "give it inverted colours",
            "show it with inverted colours",
        ),
        (
            "invert the photo",
            "turn the photo into a film negative",
            "make the colours inverted",
            "reverse all the colours in the picture",
            "show the photo with inverted colours",
        ),
    ),
    "brighter": Edit(
        brighter,
        "much brighter",
        (
            "make it brighter",
            "brighten it",
            "brighten the picture",
            "make the photo much brighter",
            "turn up the brightness",
            "increase the brightness",
            "raise the exposure",
            "increase the exposure of the photo",
            "lighten it",
            "lighten the picture a lot",
            "it should be brighter",
            "let it look brighter",
            "make the whole scene lighter",
            "expose it longer so it is brighter",
        ),
        (
            "make the picture much brighter",
            "brighten the whole photo",
            "raise the brightness of the picture",
            "lighten the scene",
            "turn up the exposure",
        ),
    ),
    "darker": Edit(
        darker,
        "much darker",
        (
            "make it darker",
            "darken it",
            "darken the picture",
            "make the photo much darker",
            "turn down the brightness",
            "decrease the brightness",
            "lower the exposure",
            "decrease the exposure of the photo",
            "dim it",
            "dim the picture a lot",
            "it should be darker",
            "let it look darker",
            "make the whole scene dimmer",
            "expose it shorter so it is darker",
        ),
        (
            "make the picture much darker",
            "darken the whole photo",
            "lower the brightness of the picture",
            "dim the scene",
            "turn down the exposure",
        ),
    ),
    "red_tint": Edit(red_tint, "with a red tint", _colour_wordings("red"), _colour_held_out("red")),
    "green_tint": Edit(
        green_tint, "with a green tint", _colour_wordings("green"), _colour_held_out("green")
    ),
    "blue_tint": Edit(
        blue_tint, "with a blue tint", _colour_wordings("blue"), _colour_held_out("blue")
    ),
    "blur": Edit(
        blur,
        "blurred",
        (
            "blur it",
            "make it blurry",
            "blur the picture",
            "make the photo blurred",
            "add a blur",
            "put it out of focus",
            "make it look out of focus",
            "apply a strong blur to the photo",
            "soften it",
            "soften the whole picture",
            "make everything soft and blurry",
            "defocus it",
            "turn it into a blurry photo",
            "let it look soft and unsharp",
            "make it unsharp",
        ),
        (
            "blur the whole photo",
            "make the picture blurry",
            "apply a blur to it",
            "put the picture out of focus",
            "make the photo soft and unsharp",
        ),
    ),
    "mirror": Edit(
        mirror,
        "mirrored",
        (
            "mirror it",
            "mirror the picture",
            "flip it",
            "flip it horizontally",
            "flip the photo from left to right",
            "swap left and right",
            "make it a mirror image",
            "show it in a mirror",
            "turn it into its mirror image",
            "reflect it horizontally",
            "reflect the picture in a mirror",
            "let it face the other way",
            "make it mirrored",
            "exchange the left and the right side",
        ),
        (
            "mirror the photo horizontally",
            "flip the picture horizontally",
            "show its mirror image",
            "flip the left and the right side",
            "reflect the photo from left to right",
        ),
    ),
}
