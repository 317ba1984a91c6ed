# SPDX-License-Identifier: Apache-2.0
"""The options of `python -m ip2p_jax.evaluate`, and what they have to be."""

import argparse

import numpy as np

from ip2p_jax import jobs
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.evaluation import examples as sets
from ip2p_jax.evaluation import search
from ip2p_jax.evaluation.methods import METHODS

CLIP = "openai/clip-vit-large-patch14"
FLOOR, BUDGET = 0.8, 12
MOST_PICTURES = 64  # on a sheet


def numbers(text: str) -> list[float]:
    """Numbers with commas between."""
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers like 1.0,1.2,1.5") from None


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """Describes the command line."""
    p = jobs.parser("ip2p_jax.evaluate", description)
    add = p.add_argument
    add("--data", required=True, help="test set: packed pairs, a public layout, or a .jsonl")
    add("--layout", choices=sets.LAYOUTS, help="of --data (default: what it looks like)")
    add("--split", default="test", help="part of --data (%(default)s)")
    add("--turns", choices=sets.TURNS, default="single", help="of sessions (MagicBrush)")
    add("--output", required=True, metavar="DIR", help="folder of results, local or gs://")
    add("--method", choices=METHODS, default="ip2p", help="(%(default)s)")
    add("--text-guidance", type=numbers, help="s_T, several with commas (7.5)")
    add("--image-guidance", type=numbers, help="s_I, several with commas (1.0,1.2,...,2.2)")
    add("--strength", type=numbers, help="of --method sdedit, several (0.3,0.4,...,0.9)")
    add("--samples", type=int, help="so many examples, at random (default: all)")
    add("--steps", type=int, default=100, help="sampling steps (%(default)s)")
    add("--sampler", default="euler_ancestral", help=", ".join(SAMPLERS))
    add("--resolution", type=int, help="side of the pictures in px (default: the model's)")
    add("--fit", choices=sets.FITS, default="refuse", help="if not square")
    add("--clip", default=CLIP, help="CLIP that scores, or none (%(default)s)")
    add("--dino", help="DINO that scores too: facebook/dino-vits16, a folder or a .pth")
    add("--lpips", metavar="FILE", help="LPIPS too: torchvision's AlexNet or VGG16 weights")
    add("--legacy", action="store_true", help="feed CLIP pictures as the authors' code did")
    add("--search", choices=("set", "examples"), help="find scales: one s_T, s_I, or one each")
    add("--floor", type=float, help=f"image similarity that a search keeps ({FLOOR})")
    add("--budget", type=int, help=f"points that a search may try ({BUDGET})")
    add(
        "--pictures", type=int, default=8, help="examples whose results a curve keeps (%(default)s)"
    )
    add("--seed", type=int, default=0, help="everything random comes from it (0)")
    add("--rows", type=int, help="examples a device edits at once (8; on the CPU 2)")
    jobs.add_hosts(p)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that names an option and what was expected."""
    wanted = {
        "--samples": (args.samples is None or args.samples >= 1, args.samples, "at least 1"),
        "--steps": (1 <= args.steps <= 1000, args.steps, "1 to 1000"),
        "--sampler": (args.sampler in SAMPLERS, args.sampler, f"one of {', '.join(SAMPLERS)}"),
        "--pictures": (0 <= args.pictures <= MOST_PICTURES, args.pictures, f"0 to {MOST_PICTURES}"),
        "--seed": (0 <= args.seed < 2**32, args.seed, "0 to 2^32 - 1"),
        "--rows": (args.rows is None or args.rows >= 2, args.rows, "at least 2"),
        "--floor": (-1 <= (args.floor or 0) <= 1, args.floor, "a cosine, -1 to 1"),
        "--budget": (
            args.budget is None or 1 <= args.budget <= search.MOST,
            args.budget,
            f"1 to {search.MOST}",
        ),
        "--legacy": (not args.legacy or args.clip != "none", "given", "a CLIP that scores"),
    }
    if args.search:
        given = args.image_guidance or args.text_guidance or args.turns == "multi"
        alone = args.hosts == 1 and not args.distributed
        right = args.method == "ip2p" and args.clip != "none" and alone and not given
        words = "--method ip2p, CLIP, one host, single turns and no points given"
        wanted["--search"] = (right, args.search, words)
    for name in ("floor", "budget"):
        if not args.search and getattr(args, name) is not None:
            wanted[f"--{name}"] = (False, getattr(args, name), "it with --search only")
    axes = {method.axis for method in METHODS.values()}
    for axis in sorted({"text_guidance", *axes}):
        values, option = getattr(args, axis), f"--{axis.replace('_', '-')}"
        used = axis in ("text_guidance", METHODS[args.method].axis)
        wanted[option] = (used or values is None, "given", f"nothing with --method {args.method}")
        for value in values or []:
            if not np.isfinite(value):
                wanted[option] = (False, value, "finite numbers")
    for name, (right, value, expected) in wanted.items():
        if not right:
            raise ValueError(f"{name} {value}: expected {expected}")


def floor_of(args: argparse.Namespace) -> float:
    """How much of the picture a search keeps."""
    return FLOOR if args.floor is None else args.floor
