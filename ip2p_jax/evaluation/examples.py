# SPDX-License-Identifier: Apache-2.0
"""Evaluation sets in their public layouts: `open_examples` reads them, `check` finds faults early.

    pairs       a data folder that data_gen.pack made
    released    the released InstructPix2Pix folder: seeds.json, {prompt}/prompt.json, ...
    magicbrush  MagicBrush's folder (edit_sessions.json, images/), or its parquet files
    emu_edit    the parquet files of the Emu Edit test set
    parquet     other parquet files, one pair a row: original_image, edit_prompt, edited_image, ...
    jsonl       anything else, one JSON object a line; paths are relative to the file:

{"input": "cat.png", "instruction": "make it a dog", "target": "dog.png",
 "input_caption": "a cat", "output_caption": "a dog", "mask": "mask.png", "name": "cat"}
{"input": "sea.png", "turns": [{"instruction": "add a boat"}, {"instruction": "make it night"}]}

Only input and instruction have to be there. Example names are the line's number where none is
given. In turns, the result of one is the input of the next; read as single turns, the target is.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ip2p_jax.data import pictures
from ip2p_jax.data.manifest import MANIFEST
from ip2p_jax.data.released import SEEDS
from ip2p_jax.evaluation.sets.folders import SESSIONS, open_magicbrush, open_pairs, open_released
from ip2p_jax.evaluation.sets.lines import open_lines
from ip2p_jax.evaluation.sets.records import THREADS, Example, ExampleSet, Plan, Source, Turn
from ip2p_jax.evaluation.sets.tables import open_tables
from ip2p_jax.evaluation.sets.tables import recognise as recognise_tables

__all__ = ["FITS", "LAYOUTS", "Example", "ExampleSet", "Turn", "check", "open_examples", "picture"]

LAYOUTS = ("pairs", "released", "magicbrush", "emu_edit", "parquet", "jsonl")
WITH_SESSIONS = ("magicbrush", "jsonl")
TURNS = ("single", "multi")
FITS = ("refuse", "crop", "stretch")
SAME_ASPECT = 0.01  # how far a target's aspect may be from its input's, of it: sides are rounded


def open_examples(
    path: str | Path, *, split: str = "test", layout: str | None = None, turns: str = "single"
) -> ExampleSet:
    """Opens an evaluation set, of a layout it recognises if none is named.

    `split` is what the set calls it; a file, and a folder that is one split, are taken whole.
    `turns` "single": every turn is an example that starts from the true picture before it;
    "multi": sessions. Raises ValueError or FileNotFoundError that names the file or option.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there, expected an evaluation set")
    for option, value, known in (("layout", layout, (None, *LAYOUTS)), ("turns", turns, TURNS)):
        if value not in known:
            raise ValueError(
                f"--{option}: {value!r}, expected one of {', '.join(filter(None, known))}"
            )
    layout = layout or recognise(path, split)
    match layout:
        case "pairs":
            examples = open_pairs(path, split)
        case "released":
            examples = open_released(path, split)
        case "jsonl":
            examples = open_lines(path, turns)
        case "magicbrush" if path.is_dir() and not has_tables(path):
            examples = open_magicbrush(path, split, turns)
        case _:
            examples = open_tables(path, split, layout, turns)
    if turns == "multi" and layout not in WITH_SESSIONS:
        raise ValueError(
            f"--turns multi: {path} is {layout}, expected one of {', '.join(WITH_SESSIONS)}"
        )
    return examples


def has_tables(folder: Path) -> bool:
    return any(folder.rglob("*.parquet"))


def recognise(path: Path, split: str) -> str:
    """The layout of what is at `path`; ValueError if it is none that is known."""
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".parquet":
        return recognise_tables(path, split)
    if (path / MANIFEST).is_file():
        return "pairs"
    if (path / SEEDS).is_file():
        return "released"
    if (path / SESSIONS).is_file() or any(path.glob(f"*/{SESSIONS}")):
        return "magicbrush"
    if path.is_dir() and has_tables(path):
        return recognise_tables(path, split)
    raise ValueError(
        f"{path}: no evaluation set that is known: expected a folder with {MANIFEST}, {SEEDS}, "
        f"{SESSIONS} or parquet files, or a file that ends in .jsonl or .parquet"
    )


def picture(data: bytes, side: int, fit: str, what: str) -> UInt8[np.ndarray, "side side 3"]:
    """Decodes a picture and resizes it to a square (Lanczos).

    One that is not square: `fit` "refuse" raises ValueError, "crop" takes the middle, "stretch"
    squeezes it as the authors' evaluation does. ValueError names the picture by `what`.
    """
    try:
        image = pictures.decode(data)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    check_square(image.size, fit, what)
    if fit == "crop":
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def check_square(size: tuple[int, int], fit: str, what: str) -> None:
    if fit == "refuse" and size[0] != size[1]:
        raise ValueError(
            f"{what}: {size[0]}x{size[1]} px is not square: give --fit crop or --fit stretch"
        )


def check(examples: ExampleSet, fit: str) -> None:
    """Looks at all examples, and at no more of their pictures than the headers.

    Raises ValueError or FileNotFoundError for the first that cannot be evaluated: a picture that
    is missing, unreadable or of the wrong shape (a target has to have its input's aspect, unless
    `fit` is "stretch"), no instruction, or a name that is there twice.
    """
    if fit not in FITS:
        raise ValueError(f"--fit: {fit!r}, expected one of {', '.join(FITS)}")
    names = set()
    for plan in examples.plans:
        if plan.name in names:
            raise ValueError(f"{examples.name}: two examples are called {plan.name!r}")
        names.add(plan.name)
        for step in plan.steps:
            if not step.instruction.strip():
                raise ValueError(f"{examples.name}: {step.name} has no instruction")
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(functools.partial(check_pictures, fit=fit), examples.plans):
            pass


def check_pictures(plan: Plan, fit: str) -> None:
    """Looks at the pictures of an example."""
    width, height = header(plan.input)
    check_square((width, height), fit, plan.input.where)
    for source in after(plan):
        w, h = header(source)
        if fit != "stretch" and abs(w * height - h * width) > SAME_ASPECT * width * h:
            raise ValueError(
                f"{source.where}: {w}x{h} px, but its input is {width}x{height}: expected the same "
                "aspect (--fit stretch takes any)"
            )


def after(plan: Plan) -> Iterator[Source]:
    """The targets and masks of an example."""
    for step in plan.steps:
        yield from (source for source in (step.target, step.mask) if source)


def header(source: Source) -> tuple[int, int]:
    """Width and height of a picture; ValueError or FileNotFoundError name it."""
    with source.open() as stream:
        try:
            return pictures.size(stream)
        except ValueError as error:
            raise ValueError(f"{source.where}: {error}") from None
