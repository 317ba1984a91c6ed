# SPDX-License-Identifier: Apache-2.0
"""Whatever a picture file holds becomes upright RGB, or one line that says why not."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from ip2p_jax.data import pictures
from tests.data.released import encode, picture

X = picture(50, 1)


def save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    return save(Image.fromarray(np.rot90(X).copy()), "JPEG", quality=100, subsampling=0, exif=exif)


def huge() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "want", "tolerance"),
    [
        (encode(X, "PNG"), X, 0),
        (encode(X, "WEBP", lossless=True), X, 0),
        (rotated(), X, 8),
        (save(Image.fromarray(X).convert("CMYK"), "JPEG", quality=100), X, 12),
        (encode(X[..., 2], "PNG"), X[..., [2, 2, 2]], 0),
        (encode(X[..., 2].astype(np.uint16) * 257, "PNG"), X[..., [2, 2, 2]], 0),
        (encode(np.dstack([X, np.full(X.shape[:2], 255, np.uint8)]), "PNG"), X, 0),
        (encode(np.dstack([X, np.zeros(X.shape[:2], np.uint8)]), "PNG"), np.full_like(X, 255), 0),
    ],
    ids=["png", "webp", "exif", "cmyk", "grey", "16-bit", "opaque", "transparent"],
)
def test_becomes_upright_rgb(data, want, tolerance):
    image = pictures.decode(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - want).max() <= tolerance
    plain, size = pictures.plain(data)
    assert size == image.size == (40, 32)
    with Image.open(io.BytesIO(plain)) as stored:
        assert stored.mode == "RGB"
        assert np.array_equal(np.asarray(stored), np.asarray(image))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_plain_pictures_keep_their_bytes(format):
    data = encode(X, format)
    assert pictures.plain(data)[0] == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        encode(X)[:-200],
        encode(X, "PNG")[:-40],
        encode(X)[:2],
        encode(X, "GIF"),
        huge(),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "two bytes", "gif", "huge"],
)
def test_broken_pictures_are_one_line(data, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"a\.jpg") as error:
        pictures.read(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 1
    with pytest.raises(ValueError):
        pictures.plain(data)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pictures.read(tmp_path / "nowhere.png")
