# SPDX-License-Identifier: Apache-2.0
"""Pictures and files for tests of the edit command."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS).resize((70, 50), Image.Resampling.BICUBIC)
ONE = ("--input", "in.png", "--instruction", "x", "--output", "out.png")


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Everything under a folder, hidden files too."""
    return {x: x.read_bytes() if x.is_file() else None for x in folder.rglob("*")}


def write_requests(path: Path, *requests: dict) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in requests), "utf-8")
    return path


def huge() -> bytes:
    """A PNG whose header announces 30000x30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
