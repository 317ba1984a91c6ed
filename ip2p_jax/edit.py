# SPDX-License-Identifier: Apache-2.0
"""Edits pictures by instruction.

  python -m ip2p_jax.edit --model photos --input cat.jpg --instruction "make it black and white" \\
      --output cat_bw.png
  python -m ip2p_jax.edit --model timbrooks/instruct-pix2pix --input a.jpg b.jpg \\
      --instruction "make it winter" --output winter/ --steps 20 --sampler dpmpp_2m
  python -m ip2p_jax.edit --model photos --requests edits.jsonl

A requests file has one JSON object a line: {"input": ..., "instruction": ..., "output": ...} and
any of steps, sampler, text_guidance, image_guidance, guidance_rescale, guidance_interval, seed,
negative, resolution; what a line leaves out comes from the command line. Of several edits, one
whose output is there already, made with the same settings, is left alone: the same command again
does only what is missing. Pictures that cannot be edited are listed at the end, and the exit code
is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console

from ip2p_jax import jobs
from ip2p_jax.cli import one_line_errors
from ip2p_jax.data import pictures
from ip2p_jax.edit_requests import OPTIONS, REQUIRED, Request, make_request, read_requests
from ip2p_jax.editor import Editor
from ip2p_jax.safety import SafetyChecker
from ip2p_jax.sizes import edit_size


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = jobs.parser("ip2p_jax.edit", __doc__)
    jobs.add_safety(p)
    p.add_argument("--input", nargs="+", metavar="PATH", help="pictures to edit")
    p.add_argument("--instruction", help="what to change")
    p.add_argument("--output", help=".png file, or a folder for several pictures")
    p.add_argument("--requests", metavar="FILE.jsonl", help="many edits, one JSON object a line")
    jobs.add_sampling(p, Request)
    p.add_argument(
        "--image-guidance",
        type=float,
        default=Request.image_guidance,
        help="s_I, useful 1 to 2.2 (%(default)s)",
    )
    p.add_argument(
        "--resolution",
        type=resolution,
        help="size by the paper's rule, e.g. 512, or 'own' to keep it (default: the model's)",
    )
    return p


def resolution(text: str) -> int | str:
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
    outputs = jobs.outputs_of([Path(x).stem for x in args.input], args.output)
    return [
        make_request(options | {"input": x, "instruction": args.instruction, "output": y})
        for x, y in zip(args.input, outputs, strict=True)
    ]


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is done, 1 some of several pictures failed, 2 wrong input."""
    args = parser().parse_args(argv)
    requests = requests_of(args)
    jobs.check_outputs([r.output for r in requests], [r.input for r in requests])
    single = args.requests is None and len(requests) == 1
    if single:  # fails before the model is opened; a picture that is there is made anew
        pictures.read(Path(requests[0].input))
        due = {r: jobs.settings(args, r) for r in requests}
    elif not (due := jobs.missing(args, requests)):
        return 0
    console = Console(stderr=True)
    editor, checker = jobs.open_model(args, Editor, console)
    jobs.check_grids(due, editor.model)
    batches = jobs.units(requests, due, editor.most, together)

    def make(batch: Sequence[Request]) -> tuple[dict[Request, Image.Image], list[str]]:
        images, failures = read_all(editor, batch)
        if images.keys().isdisjoint(due):
            return {}, failures
        return edit(editor, checker, images), failures

    failures = jobs.run("editing", batches, due, make, console)
    if single and failures:
        raise ValueError(failures[0])
    for reason in failures:
        print(f"failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def together(r: Request) -> tuple:
    """What requests of one batch have in common."""
    return (r.steps, r.sampler, r.resolution, r.guidance_interval)


def resolution_of(request: Request, editor: Editor) -> int | None:
    """The resolution in the editor's terms: None keeps a picture's own size."""
    if request.resolution is None:
        return editor.model.resolution
    return None if request.resolution == "own" else int(request.resolution)


def read_all(
    editor: Editor, batch: Sequence[Request]
) -> tuple[dict[Request, Image.Image], list[str]]:
    """The input pictures, and why those that are left out cannot be edited, by file."""
    images, failures = {}, []
    for request in batch:
        try:
            images[request] = read(request, editor)
        except (ValueError, OSError) as error:
            failures.append(str(error))
    return images, failures


def read(request: Request, editor: Editor) -> Image.Image:
    """The input picture; ValueError if it is none, or of a size that cannot be edited."""
    image = pictures.read(Path(request.input))
    try:
        edit_size(image.size, resolution_of(request, editor), editor.model.config.multiple)
    except ValueError as error:
        raise ValueError(f"{request.input}: {error}") from None
    return image


def edit(
    editor: Editor, checker: SafetyChecker | None, images: dict[Request, Image.Image]
) -> dict[Request, Image.Image]:
    """Runs the editor on requests of one batch."""
    first = next(iter(images))
    results = editor(
        list(images.values()),
        [r.instruction for r in images],
        steps=first.steps,
        sampler=first.sampler,
        text_guidance=[r.text_guidance for r in images],
        image_guidance=[r.image_guidance for r in images],
        guidance_rescale=[r.guidance_rescale for r in images],
        seed=[r.seed for r in images],
        negative=[r.negative for r in images],
        resolution=resolution_of(first, editor),
        guidance_interval=first.guidance_interval,
    )
    if checker is not None:
        results = checker.black_out(results)
    return dict(zip(images, results, strict=True))


if __name__ == "__main__":
    sys.exit(main())
