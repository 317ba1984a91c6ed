# SPDX-License-Identifier: Apache-2.0
"""Writes rendered pairs as parquet files, and triplets as JSON lines.

A row of the parquet files has the columns of the released data's parquet mirrors, which
`data_gen.pack` and `ip2p_jax.evaluate` read, and the scenes as JSON: `before`, `after`, `changes`.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_gen.contact_sheet import SHOWN, contact_sheet
from data_gen.shapes.edits import change_of
from data_gen.shapes.examples import MOST, Example, example
from data_gen.shapes.render import Picture, render
from data_gen.shapes.scene import from_record
from ip2p_jax.cli import atomic_path
from ip2p_jax.storage import json_lines, open_folder

ROWS = 1000
"""Pairs in a file; readers take a tenth of it at once."""
SCENES = ("before", "after", "changes")


def png(pixels: Picture) -> bytes:
    """The picture as it is, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def row(made: Example) -> dict[str, Any]:
    """One pair with its texts and scenes."""
    record = made.record()
    return {
        "original_prompt": made.input_caption,
        "original_image": {"bytes": png(render(made.before)), "path": None},
        "edit_prompt": made.instruction,
        "edited_prompt": made.output_caption,
        "edited_image": {"bytes": png(render(made.after)), "path": None},
    } | {name: json.dumps(record[name]) for name in SCENES}


def pair_files(folder: Path, count: int, held_out: bool) -> list[tuple[Path, range]]:
    """The files of `count` pairs, and which examples are in each."""
    parts = [range(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
    split = "test" if held_out else "train"
    names = [f"{split}-{i:05d}-of-{len(parts):05d}.parquet" for i in range(len(parts))]
    return [(folder / name, part) for name, part in zip(names, parts, strict=True)]


def write_pairs(
    output: Path, count: int, seed: int, held_out: bool, objects: int = MOST
) -> Iterator[int]:
    """Writes what is missing of `count` pairs; yields how many are there.

    Raises ValueError if the folder holds anything else.
    """
    drawn = {"seed": seed, "held_out": held_out, "objects": objects}
    settings = {"world": "shapes", "pairs": count, **drawn}
    folder = Path(open_folder(str(output), settings, "shapes"))
    for file, part in pair_files(folder, count, held_out):
        if not file.is_file():
            table = pa.Table.from_pylist([row(example(i, **drawn)) for i in part])
            with atomic_path(file) as temporary:
                pq.write_table(table, temporary, row_group_size=ROWS // 10)
        yield part.stop
    sheet = folder / "contact_sheet.png"
    if not sheet.is_file():
        with atomic_path(sheet) as temporary:
            temporary.write_bytes(
                draw_sheet([example(i, **drawn) for i in range(min(count, SHOWN))])
            )


def draw_sheet(examples: list[Example]) -> bytes:
    """A PNG of pairs with their instructions."""
    return contact_sheet(
        (enlarged(render(made.before)), enlarged(render(made.after)), made.instruction)
        for made in examples
    )


def enlarged(pixels: Picture) -> Image.Image:
    """Three times as large, pixel by pixel."""
    return Image.fromarray(pixels.repeat(3, axis=0).repeat(3, axis=1))


def write_triplets(
    output: Path, count: int, seed: int, held_out: bool, objects: int = MOST
) -> Iterator[int]:
    """Writes the triplets of `count` examples in one rename; yields how many are made."""
    with atomic_path(output) as temporary, temporary.open("wb") as file:
        for i in range(count):
            file.write(json_lines([example(i, seed, held_out, objects).record()]))
            yield i + 1


def read_example(record: dict[str, Any]) -> Example:
    """The inverse of `Example.record`: a line of the triplets."""
    return Example(
        from_record(record["before"]),
        from_record(record["after"]),
        tuple(change_of(change) for change in record["changes"]),
        record["edit"],
        record["input"],
        record["output"],
    )
