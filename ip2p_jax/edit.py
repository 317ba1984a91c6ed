# SPDX-License-Identifier: Apache-2.0
"""Edits pictures by instruction.

  python -m ip2p_jax.edit --model photos --input cat.jpg --instruction "make it black and white" \\
      --output cat_bw.png
  python -m ip2p_jax.edit --model timbrooks/instruct-pix2pix --input a.jpg b.jpg \\
      --instruction "make it winter" --output winter/ --steps 20 --sampler dpmpp_2m
  python -m ip2p_jax.edit --model photos --requests edits.jsonl

A requests file has one JSON object a line: {"input": ..., "instruction": ..., "output": ...} and
any of steps, sampler, text_guidance, image_guidance, seed, negative, resolution; what a line leaves
out comes from the command line. Of several edits, one whose output is there already, made with the
same settings, is left alone: the same command again does only what is missing. Pictures that cannot
be edited are listed at the end, and the exit code is 1.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.markup import escape
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
from ip2p_jax.diffusion.grids import grid
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.edit_requests import (
    OPTIONS,
    REQUIRED,
    Request,
    check_outputs,
    make_request,
    outputs_of,
    read_requests,
)
from ip2p_jax.editor import Editor
from ip2p_jax.safety import SafetyChecker
from ip2p_jax.sizes import edit_size
from ip2p_jax.weights.load import load

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
METADATA = "ip2p_jax"  # the PNG's text chunk that holds the settings, as JSON
MODEL_OPTIONS = ("model", "revision", "variant", "dtype", "safety")


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
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
    p.add_argument("--steps", type=int, default=Request.steps, help="sampling steps (%(default)s)")
    p.add_argument("--sampler", default=Request.sampler, help=", ".join(SAMPLERS))
    p.add_argument(
        "--text-guidance",
        type=float,
        default=Request.text_guidance,
        help="s_T, useful 5 to 10 (%(default)s)",
    )
    p.add_argument(
        "--image-guidance",
        type=float,
        default=Request.image_guidance,
        help="s_I, useful 1 to 2.2 (%(default)s)",
    )
    p.add_argument("--seed", type=int, default=Request.seed, help="another seed, another edit (0)")
    p.add_argument("--negative", default=Request.negative, help="what the result should not be")
    p.add_argument(
        "--resolution",
        type=pixels,
        help="size by the paper's rule, e.g. 512, or 'own' to keep it (default: the model's)",
    )
    p.add_argument("--dtype", choices=DTYPES, help="float32 on CPU, else bfloat16")
    p.add_argument("--safety", action="store_true", help="black out what the model's checker flags")
    return p


def pixels(text: str) -> int | str:
    """Reads --resolution."""
    if text != "own" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected pixels or 'own'")
    return text if text == "own" else int(text)


def requests_of(args: argparse.Namespace) -> list[Request]:
    """The edits that the command line asks for. Raises ValueError for what cannot be one."""
    options = {name: getattr(args, name) for name in OPTIONS}
    given = [name for name in REQUIRED if getattr(args, name) is not None]
    if args.requests is not None:
        if given:
            raise ValueError("--requests: leave out --input, --instruction and --output")
        return read_requests(Path(args.requests), options)
    for name in REQUIRED:
        if name not in given:
            raise ValueError(f"--{name} is required (or --requests)")
    return [
        make_request(options | {"input": x, "instruction": args.instruction, "output": y})
        for x, y in zip(args.input, outputs_of(args.input, args.output), strict=True)
    ]


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is done, 1 some of several pictures failed, 2 wrong input."""
    args = parser().parse_args(argv)
    requests = requests_of(args)
    check_outputs(requests)
    single = args.requests is None and len(requests) == 1
    if single:  # fails before the model is opened
        pictures.read(Path(requests[0].input))
    made = {r: settings(args, r) for r in requests if single or not is_done(args, r)}
    if not made:
        print(f"all {len(requests)} pictures are there", file=sys.stderr)
        return 0
    cache_compilations()
    console = Console(stderr=True)
    with console.status(escape(f"loading {args.model}")):
        pretrained = load(
            args.model, revision=args.revision, variant=args.variant, safety=args.safety
        )
        checker = SafetyChecker.from_pretrained(pretrained) if args.safety else None
        editor = Editor(pretrained, dtype=DTYPES.get(args.dtype))
    for steps, sampler in sorted({(r.steps, r.sampler) for r in made}):
        grid(sampler, steps, editor.schedule, editor.scheduler)  # the model may refuse them
    failures = run(editor, checker, units(requests, made, editor), made, console)
    if single and failures:
        raise ValueError(failures[0])
    for reason in failures:
        print(f"failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def settings(args: argparse.Namespace, request: Request) -> dict[str, Any]:
    """What the PNG's metadata says of how it was made."""
    return {name: getattr(args, name) for name in MODEL_OPTIONS} | asdict(request)


def is_done(args: argparse.Namespace, request: Request) -> bool:
    """Whether the output is there and was made with these settings."""
    try:
        with Image.open(request.output, formats=("PNG",)) as image:
            return json.loads(image.info.get(METADATA, "{}")) == settings(args, request)
    except (OSError, ValueError, Image.DecompressionBombError):
        return False  # not there, or not ours


def units(
    requests: Iterable[Request], due: Iterable[Request], editor: Editor
) -> list[list[Request]]:
    """Cuts the requests into batches by their place in the file; those of which any is due.

    A batch of which anything is due is computed as a whole, so that its pictures are the same bit
    for bit however often the work was interrupted.
    """
    groups: dict[tuple, list[Request]] = {}
    for r in requests:
        groups.setdefault((r.steps, r.sampler, r.resolution), []).append(r)
    rows = editor.rows * editor.by_row.mesh.size
    batches = [g[i : i + rows] for g in groups.values() for i in range(0, len(g), rows)]
    due = set(due)
    return [batch for batch in batches if not due.isdisjoint(batch)]


def run(
    editor: Editor,
    checker: SafetyChecker | None,
    batches: Sequence[Sequence[Request]],
    made: dict[Request, dict],
    console: Console,
) -> list[str]:
    """Edits batch by batch, and writes what is due: the keys of `made`, with their metadata.

    Returns why pictures could not be edited, each reason with the name of its file.
    """
    failures: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("editing", total=sum(map(len, batches)))
        for batch in batches:
            images: dict[Request, Image.Image] = {}
            for request in batch:
                try:
                    images[request] = read(request, editor)
                except (ValueError, OSError) as error:
                    failures.append(str(error))
            if not images.keys().isdisjoint(made):
                results = edit(editor, images)
                if checker is not None:
                    results = checker.black_out(results)
                for request, result in zip(images, results, strict=True):
                    if request in made:
                        write(result, Path(request.output), made[request])
            progress.advance(task, len(batch))
    return failures


def resolution_of(request: Request, editor: Editor) -> int | None:
    """The resolution in the editor's terms: None keeps a picture's own size."""
    if request.resolution is None:
        return editor.config.unet.sample_size * editor.config.vae.factor
    return None if request.resolution == "own" else int(request.resolution)


def read(request: Request, editor: Editor) -> Image.Image:
    """The input picture; ValueError if it is none, or of a size that cannot be edited."""
    image = pictures.read(Path(request.input))
    try:
        edit_size(image.size, resolution_of(request, editor), editor.config.multiple)
    except ValueError as error:
        raise ValueError(f"{request.input}: {error}") from None
    return image


def edit(editor: Editor, images: dict[Request, Image.Image]) -> list[Image.Image]:
    """Runs the editor on requests that have steps, sampler and resolution in common."""
    first = next(iter(images))
    return editor(
        list(images.values()),
        [r.instruction for r in images],
        steps=first.steps,
        sampler=first.sampler,
        text_guidance=[r.text_guidance for r in images],
        image_guidance=[r.image_guidance for r in images],
        seed=[r.seed for r in images],
        negative=[r.negative for r in images],
        resolution=resolution_of(first, editor),
    )


def write(image: Image.Image, path: Path, made: dict) -> None:
    """Writes a PNG with its settings in the metadata, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA, json.dumps(made))
    try:
        with atomic_path(path) as part:
            image.save(part, "PNG", pnginfo=info)
    except OSError as error:
        raise ValueError(f"output {path}: not written ({error.strerror or error})") from error


if __name__ == "__main__":
    sys.exit(main())
