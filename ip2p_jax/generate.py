# SPDX-License-Identifier: Apache-2.0
"""Makes pictures of texts with a Stable Diffusion model.

  python -m ip2p_jax.generate --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --prompt "a photograph of a cat" --output cat.png --steps 25 --sampler dpmpp_2m
  python -m ip2p_jax.generate --model sd15.safetensors --vae stabilityai/sd-vae-ft-mse \\
      --prompt "a castle" --prompt "a castle in winter" --count 4 --output castles/ --size 768x512

Several pictures go into a folder as PROMPT_SEED.png, prompts counted from 1, seeds upwards from
--seed. A picture that is there already, made with the same settings, is left alone: the same
command again does only what is missing.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from rich.console import Console

from ip2p_jax import checks, jobs, sizes
from ip2p_jax.cli import one_line_errors
from ip2p_jax.generator import Generator
from ip2p_jax.safety import SafetyChecker

MOST = 10_000  # pictures of one prompt
SIZE = re.compile(r"(\d{1,4})x(\d{1,4})")


@dataclass(frozen=True)
class Request:
    """One picture. `size`: "WxH" in pixels, or None (the model's own)."""

    prompt: str
    output: str
    steps: int = 100
    sampler: str = "euler_ancestral"
    text_guidance: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    negative: str = ""
    size: str | None = None


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = jobs.parser("ip2p_jax.generate", __doc__)
    jobs.add_safety(p)
    p.add_argument("--prompt", required=True, action="append", help="may be given several times")
    p.add_argument("--output", required=True, help=".png file, or a folder for several pictures")
    p.add_argument("--count", type=int, default=1, help="pictures of each prompt (%(default)s)")
    jobs.add_sampling(p, Request)
    p.add_argument("--size", metavar="WxH", help="in pixels, e.g. 768x512 (the model's own)")
    return p


def check_size(x: str | None) -> str | None:
    return None if x is None or SIZE.fullmatch(x) else "WxH in pixels, such as 768x512"


def requests_of(args: argparse.Namespace) -> list[Request]:
    """The pictures that the command line asks for. Raises ValueError for what cannot be one."""
    if not 1 <= args.count <= MOST:
        raise ValueError(f"--count: {args.count}, expected 1 to {MOST}")
    options = {
        name: getattr(args, name)
        for name in ("steps", "sampler", "text_guidance", "guidance_rescale", "negative", "size")
    }
    options["guidance_interval"] = args.guidance_interval and tuple(args.guidance_interval)
    seeds = range(args.seed, args.seed + args.count)
    pictures = [(i, seed) for i in range(len(args.prompt)) for seed in seeds]
    outputs = jobs.outputs_of([f"{i + 1}_{seed}" for i, seed in pictures], args.output)
    requests = [
        Request(prompt=args.prompt[i], seed=seed, output=output, **options)
        for (i, seed), output in zip(pictures, outputs, strict=True)
    ]
    for request in requests:
        for name, wanted in {**jobs.SAMPLING, "size": check_size}.items():
            checks.check(name, getattr(request, name), wanted)
    return requests


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is done, 2 wrong input."""
    args = parser().parse_args(argv)
    requests = requests_of(args)
    jobs.check_outputs([r.output for r in requests])
    due = jobs.missing(args, requests)
    if not due:
        return 0
    console = Console(stderr=True)
    generator, checker = jobs.open_model(args, Generator, console)
    jobs.check_grids(due, generator.model)
    size = size_of(args.size, generator)
    batches = jobs.units(requests, due, generator.most)

    def make(batch: Sequence[Request]) -> tuple[dict[Request, Image.Image], list[str]]:
        return generate(generator, checker, batch, size), []

    jobs.run("generating", batches, due, make, console)
    return 0


def size_of(text: str | None, generator: Generator) -> tuple[int, int] | None:
    """Width and height; ValueError if the model cannot make pictures of them."""
    match = SIZE.fullmatch(text or "")
    if match is None:
        return None
    size = (int(match[1]), int(match[2]))
    sizes.check_size(size, generator.model.config.multiple)
    return size


def generate(
    generator: Generator,
    checker: SafetyChecker | None,
    batch: Sequence[Request],
    size: tuple[int, int] | None,
) -> dict[Request, Image.Image]:
    """Runs the generator on requests that differ in prompt, scale, seed and negative text only."""
    results = generator(
        [r.prompt for r in batch],
        steps=batch[0].steps,
        sampler=batch[0].sampler,
        text_guidance=[r.text_guidance for r in batch],
        guidance_rescale=[r.guidance_rescale for r in batch],
        seed=[r.seed for r in batch],
        negative=[r.negative for r in batch],
        size=size,
        guidance_interval=batch[0].guidance_interval,
    )
    if checker is not None:
        results = checker.black_out(results)
    return dict(zip(batch, results, strict=True))


if __name__ == "__main__":
    sys.exit(main())
