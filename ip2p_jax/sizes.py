# SPDX-License-Identifier: Apache-2.0
"""The sizes at which pictures are edited and generated."""

import math

from PIL import Image, ImageOps

MAX_OWN_PIXELS = 2**20  # of a picture edited at its own size
MAX_SIDE = 8192


def paper_size(width: int, height: int, resolution: int, multiple: int = 64) -> tuple[int, int]:
    """Width and height at which the authors' code edits a picture, multiples of `multiple`.

    The rounding, in float64 and in this order, is theirs (edit_cli.py). Raises ValueError if a side
    would be over four times `resolution`, or nothing.
    """
    factor = resolution / max(width, height)
    factor = math.ceil(min(width, height) * factor / multiple) * multiple / min(width, height)
    fitted = (
        math.floor(width * factor / multiple) * multiple,
        math.floor(height * factor / multiple) * multiple,
    )
    if max(fitted) > 4 * resolution:
        raise ValueError(
            f"a picture of {width}x{height} would be edited at {fitted[0]}x{fitted[1]}, "
            f"a side over 4 x {resolution}: crop it"
        )
    if min(fitted) == 0:
        raise ValueError(f"a picture of {width}x{height} is too narrow for {resolution}: crop it")
    return fitted


def own_size(width: int, height: int, multiple: int = 64) -> tuple[int, int]:
    """The picture's own size, rounded down to multiples of `multiple`.

    Raises ValueError if that is nothing, or over a megapixel.
    """
    fitted = (width // multiple * multiple, height // multiple * multiple)
    if min(fitted) == 0:
        raise ValueError(
            f"a picture of {width}x{height} has a side under {multiple}: give a resolution"
        )
    if fitted[0] * fitted[1] > MAX_OWN_PIXELS:
        raise ValueError(
            f"a picture of {width}x{height} is over one megapixel: give a resolution (512, say)"
        )
    return fitted


def edit_size(size: tuple[int, int], resolution: int | None, multiple: int) -> tuple[int, int]:
    """Width and height to edit at: `own_size` if resolution is None, else `paper_size`."""
    if resolution is None:
        return own_size(*size, multiple)
    return paper_size(*size, resolution, multiple)


def check_size(size: tuple[int, int], multiple: int) -> None:
    """Raises ValueError if pictures of this width and height cannot be made."""
    if not all(0 < side <= MAX_SIDE and side % multiple == 0 for side in size):
        raise ValueError(
            f"size: {size[0]}x{size[1]}, expected multiples of {multiple} px up to {MAX_SIDE}"
        )


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes and centre-crops (Lanczos) to `size`."""
    return image if size == image.size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
