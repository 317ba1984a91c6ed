# SPDX-License-Identifier: Apache-2.0
"""Runs the VAE's encoder over training pairs once, so that training need not run it at each step.

  python -m ip2p_jax.cache_latents --data shards --output latents \\
      --model stable-diffusion-v1-5/stable-diffusion-v1-5
  python -m ip2p_jax.cache_latents --data shards --output latents --model runs/vae \\
      --resolution 64 --resize-max 72 --views 8
  python -m ip2p_jax.cache_latents --verify --output latents
  python -m ip2p_jax.train --config configs/tpu_v4.py --workdir run --config.data.path=latents

Of each pair so many views (window and flip, drawn as training draws them) are written as moments of
the posterior; without --resize-max two views, one of them mirrored, are all that there are.
Training draws its samples from the moments. DIR/report.json names what was left out. The same
command again goes on where it was stopped, and ends with the same bytes. Several hosts share the
work and the --output on a shared disk: the same command on each, with --distributed (on a TPU pod,
GKE or SLURM), or with --hosts N --host I. --verify reads all of DIR again.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from rich.console import Console
from rich.markup import escape

from ip2p_jax import jobs
from ip2p_jax.cli import Parser, one_line_errors, set_up_jax
from ip2p_jax.config import Data
from ip2p_jax.data import manifest
from ip2p_jax.data.buckets import Bucket, buckets
from ip2p_jax.data.latents import MadeWith, made_with, verify
from ip2p_jax.data.pairs import SPLITS, PairSource
from ip2p_jax.latent_shards import Encoder, Job, Recipe, cut, gather, is_done, make_shard
from ip2p_jax.storage import StorageError, check_folder, open_folder, retried, write_whole
from ip2p_jax.weights.digest import encoder_digest
from ip2p_jax.weights.load import load_vae

KIND = "latents"
SETTINGS = "split seed rows dtype shard_size".split()
"""Options that decide the bytes, beside what `MadeWith` holds."""
VIEW = "resolution resize_min resize_max flip buckets".split()
"""What of config.Data decides how views are drawn."""


def parser() -> argparse.ArgumentParser:
    """Describes the command line; defaults are those of training."""
    p = Parser(
        prog="python -m ip2p_jax.cache_latents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, data = p.add_argument, Data()
    add("--data", metavar="DIR", help="folder written by data_gen.pack")
    add("--output", required=True, metavar="DIR", help="latent folder, on a disk all hosts share")
    add("--model", metavar="M", help="a model, or a VAE alone; only its VAE is used")
    add("--verify", action="store_true", help="check --output instead of making it")
    add("--views", type=int, default=2, help="of each pair (%(default)s)")
    add("--resolution", type=int, default=data.resolution, help="side in px (%(default)s)")
    add("--buckets", default="", metavar="WxH,...", help="sizes in px, by the pictures' shape")
    add("--resize-min", type=int, default=0, help="pictures are resized to between this and")
    add("--resize-max", type=int, default=0, help="this, then cut; 0: --resolution")
    add("--flip", type=float, default=data.flip, help="share of mirrored views (%(default)s)")
    add("--split", default=",".join(SPLITS), help="those that are wanted (%(default)s)")
    add("--seed", type=int, default=0, help="everything random comes from it (0)")
    add("--rows", type=int, help="pairs a device encodes at once (8; on the CPU 2)")
    add("--dtype", choices=jobs.DTYPES, help="float32 on CPU, else bfloat16")
    add("--shard-size", type=int, default=64, help="prompts in a shard (%(default)s)")
    add("--max-refused", type=float, default=0.1, help="share that may be unusable (%(default)s)")
    jobs.add_hosts(p)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that names an option and what was expected."""
    given = [option is not None for option in (args.data, args.model)]
    if any(given) if args.verify else not all(given):
        raise ValueError("expected either --data and --model, or --verify")
    splits = args.split.split(",")
    wanted = {
        "--output": ("://" not in args.output, args.output, "a local folder"),
        "--data": ("://" not in (args.data or ""), args.data, "a local folder"),
        "--views": (args.views >= 1, args.views, "at least 1"),
        "--resolution": (args.resolution >= 1, args.resolution, "at least 1"),
        "--resize-min": (
            args.resolution <= (args.resize_min or args.resolution),
            args.resize_min,
            "at least --resolution",
        ),
        "--resize-max": (
            (args.resize_min or args.resolution) <= (args.resize_max or args.resolution),
            args.resize_max,
            "at least --resize-min and --resolution",
        ),
        "--flip": (0 <= args.flip <= 1, args.flip, "0 to 1"),
        "--split": (set(splits) <= set(SPLITS), args.split, f"some of {','.join(SPLITS)}"),
        "--seed": (0 <= args.seed < 2**32, args.seed, "0 to 2^32 - 1"),
        "--rows": (args.rows is None or args.rows >= 2, args.rows, "at least 2"),
        "--shard-size": (args.shard_size >= 1, args.shard_size, "at least 1"),
        "--max-refused": (0 <= args.max_refused <= 1, args.max_refused, "0 to 1"),
    }
    for name, (right, value, expected) in wanted.items():
        if not right:
            raise ValueError(f"{name} {value}: expected {expected}")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """How views are drawn."""
    side = args.resolution
    data = Data(
        path=args.data,
        resolution=side,
        resize_min=args.resize_min or side,
        resize_max=args.resize_max or side,
        flip=args.flip,
        buckets=args.buckets,
    )
    return Recipe(data, args.views, args.seed)


def open_encoder(args: argparse.Namespace, of: Sequence[Bucket]) -> tuple[Encoder, str]:
    """Loads the VAE; returns a digest of its encoder too. Raises ValueError for sides that it does
    not take."""
    cfg, params = load_vae(args.model)
    if any(side % cfg.factor for bucket in of for side in bucket):
        name, value = ("buckets", args.buckets) if args.buckets else ("resolution", args.resolution)
        raise ValueError(f"--{name} {value}: expected a multiple of {cfg.factor} px")
    dtype = jnp.dtype(args.dtype)
    encoder = Encoder(cfg, params, dtype=dtype, rows=args.rows, devices=jax.local_devices())
    return encoder, encoder_digest(params)


def open_sources(data: str, splits: Sequence[str]) -> dict[str, PairSource]:
    """The splits that are wanted, of those that are there; ValueError if these are none."""
    if made_with(data):
        raise ValueError(f"--data {data}: holds latents, expected a folder of data_gen.pack")
    there = manifest.load_manifest(Path(data))
    if not set(splits) & set(there):
        raise ValueError(f"--split {','.join(splits)}: {data} has {', '.join(there)}")
    return {
        split: PairSource(data, split) for split in SPLITS if split in splits and split in there
    }


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 this host's part is done, 1 storage failed for long or --verify found faults,
    2 wrong input."""
    args = parser().parse_args(argv)
    check(args)
    if args.verify:
        return show_faults(args.output)
    check_folder(args.output, KIND)
    set_up_jax()
    host, hosts = jobs.this_host(args)
    on_cpu = jax.default_backend() == "cpu"
    args.rows = args.rows or (2 if on_cpu else 8)
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    console, recipe = Console(stderr=True), recipe_of(args)
    sources = open_sources(args.data, args.split.split(","))
    with console.status(escape(f"loading {args.model}")):
        encoder, vae = open_encoder(args, buckets(recipe.data))
    made = MadeWith(vae=vae, views=args.views, **{n: getattr(recipe.data, n) for n in VIEW})
    settings = {name: getattr(args, name) for name in SETTINGS} | made._asdict()
    settings["data"] = manifest.sha256(Path(args.data) / manifest.MANIFEST)
    try:
        folder = Path(open_folder(args.output, settings, KIND))
        prompts = {split: len(source.prompts) for split, source in sources.items()}
        plan = cut(prompts, args.shard_size, folder)
        run(plan[host::hosts], sources, recipe, encoder, console)
        return finish(folder, plan, made, args.max_refused)
    except StorageError as error:
        print(f"error: {error}; the same command goes on from there", file=sys.stderr)
        return 1


def run(
    mine: Sequence[Job],
    sources: dict[str, PairSource],
    recipe: Recipe,
    encoder: Encoder,
    console: Console,
) -> None:
    """Makes what is missing of this host's shards, under a progress bar."""
    todo = [job for job in mine if not retried(lambda job=job: is_done(job), str(job.done))]

    def made() -> Iterator[int]:
        for job in todo:
            make_shard(job, sources[job.split], recipe, encoder)
            yield job.stop - job.start

    total, due = (sum(job.stop - job.start for job in x) for x in (mine, todo))
    jobs.watch("prompts", made(), total, due, console)


def finish(folder: Path, plan: Sequence[Job], made: MadeWith, max_refused: float) -> int:
    """Writes report and manifest if the shards of all hosts are there; says what came of them.

    Raises ValueError if too many pairs cannot be used.
    """
    missing = sum(not is_done(job) for job in plan)
    if missing:
        print(f"this host is done; {missing} shards of other hosts are still to come")
        return 0
    shards, refused = gather(plan)
    views = sum(shard.records for split in shards.values() for shard in split)
    pairs = views // made.views
    reasons = Counter(pair.reason for pair in refused)
    named = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    report = {
        "pairs": pairs,
        "views": views,
        "refused": len(refused),
        "reasons": dict(reasons),
        "list": [pair._asdict() for pair in refused],
    }
    write(folder / "report.json", json.dumps(report, indent=1))
    if not pairs or len(refused) > max_refused * (pairs + len(refused)):
        raise ValueError(
            f"{len(refused)} of {pairs + len(refused)} pairs cannot be used ({named}), more than "
            f"--max-refused {max_refused:g}: see {folder / 'report.json'}"
        )
    write(folder / manifest.MANIFEST, manifest.as_json(shards, latents=made._asdict()))
    left_out = f"; {len(refused)} left out ({named}): report.json" if refused else ""
    print(f"{views} views of {pairs} pairs in {folder}{left_out}")
    return 0


def write(file: Path, text: str) -> None:
    retried(lambda: write_whole(epath.Path(file), text.encode()), str(file))


def show_faults(output: str) -> int:
    """Reads all of a latent folder; returns 1 if a record is not right."""
    counts, faults = verify(output)
    for fault in faults:
        print(fault, file=sys.stderr)
    splits = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"{output}: {sum(counts.values())} views ({splits}), {len(faults)} not right")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
