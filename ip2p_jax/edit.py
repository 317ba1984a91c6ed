# SPDX-License-Identifier: Apache-2.0
"""Edits pictures by instruction.

  python -m ip2p_jax.edit --model photos --input cat.jpg --instruction "make it black and white" \\
      --output cat_bw.png
  python -m ip2p_jax.edit --model timbrooks/instruct-pix2pix --input a.jpg b.jpg \\
      --instruction "make it winter" --output winter/ --steps 20 --sampler dpmpp_2m
  python -m ip2p_jax.edit --model photos --requests edits.jsonl

A requests file has one JSON object a line: {"input": ..., "instruction": ..., "output": ...} and
any of steps, sampler, text_guidance, image_guidance, seed, negative, resolution. The same command
again does only what is missing.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import jax.numpy as jnp
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ip2p_jax.cli import Parser, atomic_path, cache_compilations, one_line_errors
from ip2p_jax.data import pictures
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.editor import Editor
from ip2p_jax.safety import SafetyChecker
from ip2p_jax.sizes import edit_size
from ip2p_jax.weights.load import load

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
METADATA = "ip2p_jax"  # the PNG's text chunk that holds the settings, as JSON


@dataclass(frozen=True)
class Request:
    """One edit. `resolution`: pixels by the paper's rule, "own" (kept), or None (the model's)."""

    input: str
    instruction: str
    output: str
    steps: int = 100
    sampler: str = "euler_ancestral"
    text_guidance: float = 7.5
    image_guidance: float = 1.5
    seed: int = 0
    negative: str = ""
    resolution: int | str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, float | int if field.type is float else field.type):
                raise ValueError(f"{field.name}: {value!r}, expected {field.type}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: {self.sampler!r}, expected one of {', '.join(SAMPLERS)}")
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps: {self.steps}, expected 1 to 1000")
        if self.resolution not in (None, "own") and not 1 <= int(self.resolution) <= 8192:
            raise ValueError(f"resolution: {self.resolution!r}, expected pixels or 'own'")
        if Path(self.output).suffix.lower() != ".png":
            raise ValueError(f"output: {self.output}, expected a .png file")


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m ip2p_jax.edit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model",
        required=True,
        help="a hub id, a diffusers folder, an LDM .safetensors or .ckpt, a run directory, "
        "or an embedded model (photos)",
    )
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument("--variant", help="variant of the weights' files, e.g. fp16")
    p.add_argument("--input", nargs="+", metavar="PATH", help="pictures to edit")
    p.add_argument("--instruction", help="what to change")
    p.add_argument("--output", help=".png file, or a folder for several pictures")
    p.add_argument("--requests", metavar="FILE.jsonl", help="many edits, one JSON object a line")
    p.add_argument("--steps", type=int, default=100, help="sampling steps (100)")
    p.add_argument("--sampler", default="euler_ancestral", help=", ".join(SAMPLERS))
    p.add_argument("--text-guidance", type=float, default=7.5, help="s_T, useful 5 to 10 (7.5)")
    p.add_argument("--image-guidance", type=float, default=1.5, help="s_I, useful 1 to 2.2 (1.5)")
    p.add_argument("--seed", type=int, default=0, help="another seed, another edit (0)")
    p.add_argument("--negative", default="", help="what the result should not be")
    p.add_argument(
        "--resolution",
        help="pixels of the longer side, or 'own' to keep the size (default: the model's)",
    )
    p.add_argument("--dtype", choices=DTYPES, help="float32 on CPU, else bfloat16")
    p.add_argument("--safety", action="store_true", help="black out what the model's checker flags")
    return p


def requests_of(args: argparse.Namespace) -> list[Request]:
    """The edits that the command line asks for. Raises ValueError for what cannot be one."""
    options = {
        name: getattr(args, name)
        for name in ("steps", "sampler", "text_guidance", "image_guidance", "seed", "negative")
    }
    options["resolution"] = "own" if args.resolution == "own" else pixels(args.resolution)
    if args.requests:
        if args.input or args.instruction or args.output:
            raise ValueError("--requests: leave out --input, --instruction and --output")
        requests = read_requests(Path(args.requests), options)
    else:
        for name in ("input", "instruction", "output"):
            if getattr(args, name) is None:
                raise ValueError(f"--{name} is required (or --requests)")
        one = len(args.input) == 1 and Path(args.output).suffix
        outputs = [args.output] if one else [output_in(args.output, x) for x in args.input]
        requests = [
            Request(x, args.instruction, y, **options)
            for x, y in zip(args.input, outputs, strict=True)
        ]
    outputs = [Path(r.output).resolve() for r in requests]
    inputs = {Path(r.input).resolve() for r in requests}
    for request, output in zip(requests, outputs, strict=True):
        if output in inputs or outputs.count(output) > 1:
            raise ValueError(f"output {request.output}: also an input, or named twice")
    return requests


def pixels(text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise ValueError(f"--resolution: {text!r}, expected pixels or 'own'")
    return None if text is None else int(text)


def output_in(folder: str, source: str) -> str:
    """Where the edit of `source` goes when the output is a folder."""
    if Path(folder).suffix:
        raise ValueError(f"--output: {folder}, expected a folder for several pictures")
    return str(Path(folder) / f"{Path(source).stem}.png")


def read_requests(path: Path, options: dict) -> list[Request]:
    """Reads a requests file; `options` hold where a line has no value of its own."""
    if not path.is_file():
        raise ValueError(f"--requests: {path} is not there")
    requests = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            requests.append(Request(**{**options, **json.loads(line)}))
        except (ValueError, TypeError) as error:
            message = str(error).replace("Request.__init__() ", "")
            raise ValueError(f"{path}, line {number}: {message}") from None
    return requests


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    requests = requests_of(args)
    if len(requests) == 1:  # among many, one bad picture is a failure; alone, it is an error
        pictures.read(Path(requests[0].input))
    cache_compilations()
    console = Console(stderr=True)
    with console.status(f"loading {args.model}"):
        pretrained = load(
            args.model, revision=args.revision, variant=args.variant, safety=args.safety
        )
        checker = SafetyChecker.from_pretrained(pretrained) if args.safety else None
        editor = Editor(pretrained, dtype=DTYPES.get(args.dtype))
    own = pretrained.config.unet.sample_size * pretrained.config.vae.factor
    requests = [
        replace(r, resolution=own if r.resolution is None else r.resolution) for r in requests
    ]
    todo = list(units(requests, editor, args.model, skip_done=args.requests is not None))
    failures = run(editor, checker, args.model, todo, console)
    for request, reason in failures:
        print(f"failed: {request.input}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def units(
    requests: list[Request], editor: Editor, model: str, *, skip_done: bool
) -> Iterator[list[tuple[Request, bool]]]:
    """Cuts the requests into batches by their place in the file, each with whether it is due.

    A batch of which anything is missing is computed as a whole, so that its pictures are the same
    bit for bit however often the work was interrupted.
    """
    groups: dict[tuple, list[Request]] = {}
    for request in requests:
        key = (request.steps, request.sampler, request.resolution)
        groups.setdefault(key, []).append(request)
    rows = editor.rows * editor.by_row.mesh.size
    for group in groups.values():
        for i in range(0, len(group), rows):
            unit = [(r, not (skip_done and is_done(r, model))) for r in group[i : i + rows]]
            if any(due for _, due in unit):
                yield unit


def settings(request: Request, model: str) -> dict:
    """What the PNG's metadata says of how it was made."""
    return {"model": model, **asdict(request)}


def is_done(request: Request, model: str) -> bool:
    """Whether the output is there and was made with these settings."""
    try:
        with Image.open(request.output) as image:
            return json.loads(image.info.get(METADATA, "{}")) == settings(request, model)
    except OSError:
        return False


def run(
    editor: Editor,
    checker: SafetyChecker | None,
    model: str,
    todo: list[list[tuple[Request, bool]]],
    console: Console,
) -> list[tuple[Request, str]]:
    """Edits and writes, batch by batch; returns the requests whose picture could not be read."""
    failures = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("editing", total=sum(len(unit) for unit in todo))
        for unit in todo:
            images, readable = [], []
            for request, due in unit:
                try:
                    images.append(read(request, editor.config.multiple))
                    readable.append((request, due))
                except (ValueError, OSError) as error:
                    failures.append((request, str(error)))
            results = edit(editor, images, [request for request, _ in readable])
            if checker is not None:
                results = checker.black_out(results)
            for (request, due), result in zip(readable, results, strict=True):
                if due:
                    write(result, Path(request.output), settings(request, model))
            progress.advance(task, len(unit))
    return failures


def editor_resolution(request: Request) -> int | None:
    return None if request.resolution == "own" else int(request.resolution or 0)


def read(request: Request, multiple: int) -> Image.Image:
    """The input picture; ValueError if it is none, or of a size that cannot be edited."""
    image = pictures.read(Path(request.input))
    edit_size(image.size, editor_resolution(request), multiple)
    return image


def edit(editor: Editor, images: list[Image.Image], requests: list[Request]) -> list[Image.Image]:
    """Runs the editor on requests that have steps, sampler and resolution in common."""
    if not requests:
        return []
    return editor(
        images,
        [r.instruction for r in requests],
        steps=requests[0].steps,
        sampler=requests[0].sampler,
        text_guidance=[r.text_guidance for r in requests],
        image_guidance=[r.image_guidance for r in requests],
        seed=[r.seed for r in requests],
        negative=[r.negative for r in requests],
        resolution=editor_resolution(requests[0]),
    )


def write(image: Image.Image, path: Path, made: dict) -> None:
    """Writes a PNG with its settings in the metadata, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA, json.dumps(made), zip=False)
    with atomic_path(path) as part:
        image.save(part, "PNG", pnginfo=info)


if __name__ == "__main__":
    sys.exit(main())
