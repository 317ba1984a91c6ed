# SPDX-License-Identifier: Apache-2.0
"""Measures models in the shapes world, where it is known what is right.

  python -m data_gen.shapes.measure vae --model runs/shapes_vae --output measured/vae
  python -m data_gen.shapes.measure generate --model runs/shapes_sd --output measured/sd
  python -m data_gen.shapes.measure edit --model runs/shapes_edit --output measured/edit
  python -m data_gen.shapes.measure pairs --model runs/shapes_sd --clip runs/shapes_clip \\
      --output measured/pairs

vae: rendered scenes with one, two and three objects, encoded and decoded; how often every attribute
can still be read. generate: pictures of captions; how often every attribute is right. edit: edits
of rendered scenes, by kind; how often the instruction is carried out, and how much of the rest is
left alone. pairs: Prompt-to-Prompt pairs of captions at p = 0, 0.1 .. 0.9; how often the second
picture shows the edit, and how far it agrees with the first elsewhere.

Scenes and wordings are such as training has seen, unless --held-out is given. DIR holds rows.jsonl
(a line a picture), table.md with 95 % bootstrap intervals, and sheet.png. The same command again
goes on where it was stopped.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image
from rich.console import Console
from rich.markup import escape

from data_gen.candidates import CandidateMaker, Recipe, Unit
from data_gen.contact_sheet import contact_sheet
from data_gen.shapes.examples import COUNTS, Example, example
from data_gen.shapes.measure_tables import TABLES
from data_gen.shapes.pair_score import score_pair
from data_gen.shapes.render import Picture, render
from data_gen.shapes.scene import SIDE, Scene, draw_scene
from data_gen.shapes.score import Held, read, score
from data_gen.shapes.words import caption, draw_voice
from data_gen.shapes.write import enlarged
from data_gen.triplet_file import Triplet
from ip2p_jax import checks, jobs
from ip2p_jax.cli import atomic_path, one_line_errors, set_up_jax
from ip2p_jax.devices import put, shardings
from ip2p_jax.editor import Editor
from ip2p_jax.evaluation.clip_scores import Clip
from ip2p_jax.generator import Generator
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.vae import VAE
from ip2p_jax.networks import to_pixels, to_uint8
from ip2p_jax.placed import place
from ip2p_jax.storage import json_lines, open_folder
from ip2p_jax.types import Params
from ip2p_jax.weights.load import load_vae

Row = dict[str, Any]
"""What is written of one picture or pair."""
Shown = tuple[Image.Image, Image.Image, str]
"""Two pictures for the sheet, and their text."""
Measure = Callable[[range], Iterator[tuple[Row, Shown]]]
"""Makes and judges the examples with these numbers."""

P = tuple(i / 10 for i in range(10))
"""Shares of steps that share self-attention."""
DEFAULTS = {
    "steps": 20,
    "sampler": "euler_ancestral",
    "text_guidance": 7.5,
    "image_guidance": 1.5,
    "guidance_interval": None,
    "rows": 16,
    "clip": None,
}
TAKES = {
    "vae": ("rows",),
    "generate": ("steps", "sampler", "text_guidance", "guidance_interval", "rows"),
    "edit": ("steps", "sampler", "text_guidance", "image_guidance", "guidance_interval", "rows"),
    "pairs": ("steps", "sampler", "text_guidance", "clip"),
}
"""Which of these options have a meaning where."""
CHUNK = 64
"""Examples that are made and written together."""


class Captioned(NamedTuple):
    """A scene and what is said of it."""

    scene: Scene
    caption: str


def captioned(index: int, count: int, seed: int, held_out: bool) -> Captioned:
    """Scene `index` of a seed with `count` objects, the same for ever."""
    rng = random.Random(f"captioned {seed} {index} {count} {held_out}")
    scene = draw_scene(rng, count, held_out)
    return Captioned(scene, caption(scene, draw_voice(rng)))


def held_row(held: Held) -> Row:
    """Whether all is right, and how much of each attribute."""
    names = sorted({name for _, name in held.parts})
    shares = {
        name: float(np.mean([right for (_, n), right in held.parts.items() if n == name]))
        for name in names
    }
    return {"complete": held.complete, **shares}


def captions(args: argparse.Namespace, numbers: range) -> list[Captioned]:
    """Example i has i // --count + 1 objects."""
    return [
        captioned(i % args.count, list(COUNTS)[i // args.count], args.seed, args.held_out)
        for i in numbers
    ]


def caption_row(picture: Picture, wanted: Captioned) -> tuple[Row, Shown]:
    """What is right in a picture of a scene."""
    scene, words = wanted
    row = {"objects": len(scene.objects), "caption": words, **held_row(read(picture, scene))}
    return row, (enlarged(picture), enlarged(render(scene)), words)


def measure_vae(args: argparse.Namespace, console: Console) -> Measure:
    """Scenes encoded and decoded."""
    with console.status(escape(f"loading {args.model}")):
        through = open_vae(args.model)

    def made(numbers: range) -> Iterator[tuple[Row, Shown]]:
        wanted = captions(args, numbers)
        truth = np.stack([render(x.scene) for x in wanted])
        batches = [truth[i : i + args.rows] for i in range(0, len(truth), args.rows)]
        pictures = np.concatenate([np.asarray(through(x)) for x in batches])
        for x, first, second in zip(wanted, truth, pictures, strict=True):
            row, shown = caption_row(second, x)
            error = np.sqrt(np.mean((first.astype(np.float64) - second) ** 2))
            yield row | {"error": float(error)}, shown

    return made


def open_vae(model: str) -> Callable[[np.ndarray], jax.Array]:
    """Encodes (as the mean) and decodes uint8 pictures."""
    cfg, params = load_vae(model)
    graphdef, _ = abstract(VAE, cfg)
    params = put(params, np.float32, shardings().replicated)

    def through(params: Params, pictures: Any) -> Any:
        vae = nnx.merge(graphdef, params)
        with jax.default_matmul_precision("highest"):
            return to_uint8(vae.decode(vae.encode(to_pixels(pictures)).mean))

    program = jax.jit(through)
    return lambda pictures: program(params, pictures)


def measure_generate(args: argparse.Namespace, console: Console) -> Measure:
    """Pictures of captions."""
    generator: Generator = open_model(args, Generator, console)

    def made(numbers: range) -> Iterator[tuple[Row, Shown]]:
        wanted = captions(args, numbers)
        pictures = generator(
            [x.caption for x in wanted],
            steps=args.steps,
            sampler=args.sampler,
            text_guidance=args.text_guidance,
            guidance_interval=args.guidance_interval,
            seed=list(numbers),
            size=(SIDE, SIDE),
        )
        for x, picture in zip(wanted, pictures, strict=True):
            yield caption_row(np.asarray(picture), x)

    return made


def measure_edit(args: argparse.Namespace, console: Console) -> Measure:
    """Edits of rendered scenes."""
    editor: Editor = open_model(args, Editor, console)

    def made(numbers: range) -> Iterator[tuple[Row, Shown]]:
        wanted = [example(i, args.seed, args.held_out) for i in numbers]
        before = [Image.fromarray(render(x.before)) for x in wanted]
        edited = editor(
            before,
            [x.instruction for x in wanted],
            steps=args.steps,
            sampler=args.sampler,
            text_guidance=args.text_guidance,
            image_guidance=args.image_guidance,
            guidance_interval=args.guidance_interval,
            seed=list(numbers),
        )
        for x, first, second in zip(wanted, before, edited, strict=True):
            judged = score(np.asarray(second), x.before, x.changes)
            row = {"instruction": x.instruction, **kinds_row(x), "done": judged.done}
            row |= {"kept": judged.kept, "untouched": judged.untouched}
            yield row, (large(first), large(second), x.instruction)

    return made


def measure_pairs(args: argparse.Namespace, console: Console) -> Measure:
    """Pairs of pictures; example i has p = P[i // --count], and noise by i % --count."""
    model = open_model(args, lambda x, dtype: place(x, dtype=dtype), console)
    clip = Clip.from_pretrained(args.clip)
    scale = (args.text_guidance, args.text_guidance)
    makers = {
        p: CandidateMaker(
            model, clip, Recipe(args.steps, args.sampler, SIDE, SIDE, args.seed, (p, p), scale), 2
        )
        for p in P
    }

    def made(numbers: range) -> Iterator[tuple[Row, Shown]]:
        for i in numbers:
            p, index = P[i // args.count], i % args.count
            x = example(index, args.seed, args.held_out)
            triplet = Triplet(x.input_caption, x.instruction, x.output_caption)
            candidates = jax.device_get(makers[p]([Unit(index, 0)], [triplet]))
            first, second = candidates.pictures[0]
            judged = score_pair(first, second, x.before, x.changes)
            row = {"p": p, "instruction": x.instruction, **kinds_row(x), **judged._asdict()}
            row |= {name: float(value[0]) for name, value in candidates.scores._asdict().items()}
            yield row, (enlarged(first), enlarged(second), f"p = {p}: {x.instruction}")

    return made


MEASURES = {
    "vae": measure_vae,
    "generate": measure_generate,
    "edit": measure_edit,
    "pairs": measure_pairs,
}
PARTS = {"vae": len(COUNTS), "generate": len(COUNTS), "edit": 1, "pairs": len(P)}
"""How often --count examples are made."""


def kinds_row(x: Example) -> Row:
    """What is asked for: kinds of changes."""
    return {"kinds": [change.kind for change in x.changes]}


def large(picture: Image.Image) -> Image.Image:
    """Three times as large, pixel by pixel."""
    return enlarged(np.asarray(picture))


def open_model(args: argparse.Namespace, build: Callable[..., Any], console: Console) -> Any:
    """What `build` makes of the model."""
    with console.status(escape(f"loading {args.model}")):
        rows = {} if args.what == "pairs" else {"rows": args.rows}
        return build(jobs.load_model(args), dtype=jobs.DTYPES.get(args.dtype), **rows)


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = jobs.parser("data_gen.shapes.measure", __doc__)
    add = p.add_argument
    add("what", choices=MEASURES, help="what is measured")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the results")
    add("--clip", help="pairs: a CLIP, whose scores stand beside the others")
    add("--count", type=int, default=100, help="examples (of each p, of each number of objects)")
    add("--held-out", action="store_true", help="what training never sees: read it once")
    add("--steps", type=int, help=f"sampling steps ({DEFAULTS['steps']})")
    add("--sampler", help=f"as in ip2p_jax.edit ({DEFAULTS['sampler']})")
    add("--text-guidance", type=float, help=f"s_T ({DEFAULTS['text_guidance']})")
    add("--image-guidance", type=float, help=f"edit: s_I ({DEFAULTS['image_guidance']})")
    jobs.add_interval(p)
    add("--seed", type=int, default=1, help="of scenes, texts and noise; 0 trains (%(default)s)")
    add("--rows", type=int, help=f"pictures made at once, but for pairs ({DEFAULTS['rows']})")
    return p


def settle(args: argparse.Namespace) -> None:
    """Fills in what was not given; ValueError names an option and what was expected."""
    for name, default in DEFAULTS.items():
        if name not in TAKES[args.what] and getattr(args, name) is not None:
            takers = " and ".join(what for what, names in TAKES.items() if name in names)
            raise ValueError(f"--{name.replace('_', '-')}: expected for {takers} only")
        if name in TAKES[args.what] and getattr(args, name) is None:
            setattr(args, name, default)
    if args.what == "vae":
        for name in ("vae", "lora", "revision", "variant", "dtype"):
            if getattr(args, name):
                raise ValueError(f"--{name}: not expected for vae")
    if args.what == "pairs" and not args.clip:
        raise ValueError("--clip: expected for pairs")
    if args.count < 1 or (args.rows is not None and args.rows < 1):
        raise ValueError("--count, --rows: expected at least 1")
    sampling = ("steps", "sampler", "guidance_interval")
    for name, wanted in ((name, jobs.SAMPLING[name]) for name in sampling):
        if name in TAKES[args.what]:
            checks.check(name, getattr(args, name), wanted)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the results."""
    names = ("what", "model", "vae", "lora", "dtype", "clip", "count", "held_out", "steps")
    names += ("revision", "variant")
    names += ("sampler", "text_guidance", "image_guidance", "guidance_interval", "seed", "rows")
    return {name: getattr(args, name) for name in names}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is measured, 2 wrong input."""
    args = parser().parse_args(argv)
    settle(args)
    folder = Path(open_folder(str(args.output), settings_of(args), "shapes.measure"))
    total = args.count * PARTS[args.what]
    chunks = [range(i, min(i + CHUNK, total)) for i in range(0, total, CHUNK)]
    files = {folder / "rows" / f"{chunk.start:06d}.jsonl": chunk for chunk in chunks}
    due = {file: chunk for file, chunk in files.items() if not file.exists()}
    console = Console(stderr=True)
    if due:
        set_up_jax()
        made = MEASURES[args.what](args, console)
        counts = (work(made, file, chunk) for file, chunk in due.items())
        jobs.watch(args.what, counts, total, sum(map(len, due.values())), console)
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    report(folder, args.what, rows)
    print((folder / "table.md").read_text())
    return 0


def work(made: Measure, file: Path, chunk: range) -> int:
    """Measures a chunk of examples, and writes its rows; the first one's pictures, too."""
    rows, shown = zip(*made(chunk), strict=True)
    if chunk.start == 0:
        with atomic_path(file.parent.parent / "sheet.png") as part:
            part.write_bytes(contact_sheet(shown))
    with atomic_path(file) as part:
        part.write_bytes(json_lines(rows))
    return len(chunk)


def report(folder: Path, what: str, rows: Sequence[Row]) -> None:
    """Writes all rows, and the table."""
    with atomic_path(folder / "rows.jsonl") as part:
        part.write_bytes(json_lines(rows))
    with atomic_path(folder / "table.md") as part:
        part.write_text(TABLES[what](rows))


if __name__ == "__main__":
    sys.exit(main())
