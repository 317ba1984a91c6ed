# SPDX-License-Identifier: Apache-2.0
"""Reading pictures that may be anything: bounded, upright, RGB, or a ValueError of one line."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64 * 2**20
Stream = io.BytesIO | io.BufferedReader

# What Pillow's decoders are known to raise on damaged files.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is the lower one
_ORIENTATION = 0x0112


@contextlib.contextmanager
def _opened(stream: Stream) -> Iterator[Image.Image]:
    """Opens but does not decode; the size is checked from the header."""
    try:
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise ValueError(f"{width}x{height} px, at most {MAX_PIXELS} px in all are read")
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than {MAX_PIXELS} px, which is the most that is read") from None
    except UnidentifiedImageError:
        raise ValueError(f"not a picture ({', '.join(FORMATS)})") from None
    except _BROKEN as error:
        raise ValueError(str(error) or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: EXIF rotation obeyed, 16 bits scaled to 8, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.uint32) // 257).clip(0, 255).astype("uint8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    """Decodes an encoded picture to upright RGB; ValueError says in one line what is wrong."""
    with _opened(io.BytesIO(data)) as image:
        image.load()
        return to_rgb(image)


def size(stream: Stream) -> tuple[int, int]:
    """Upright width and height from a picture's header alone; ValueError as `decode`."""
    with _opened(stream) as image:
        early = image.format != "PNG" or "exif" in image.info  # else PNG would be decoded for it
        turned = early and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size
        return (height, width) if turned else (width, height)


def read(path: Path) -> Image.Image:
    """Reads a picture file to upright RGB; ValueError names the file and what is wrong."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a picture")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def plain(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """Makes sure a picture is plain upright RGB in JPEG or PNG: (encoded bytes, (width, height)).

    Bytes that already are that come back untouched, everything else as PNG, which loses nothing.
    """
    with _opened(io.BytesIO(data)) as image:
        image.load()
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        opaque = image.mode == "RGB" and not image.has_transparency_data
        if upright and opaque and image.format in ("JPEG", "PNG"):
            return data, image.size
        rgb = to_rgb(image)
    encoded = io.BytesIO()
    rgb.save(encoded, "PNG")
    return encoded.getvalue(), rgb.size
