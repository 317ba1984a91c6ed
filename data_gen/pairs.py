# SPDX-License-Identifier: Apache-2.0
"""Makes training pairs from triplets of texts, with Stable Diffusion and Prompt-to-Prompt.

  python -m data_gen.pairs --triplets triplets.jsonl --output pairs \\
      --model stable-diffusion-v1-5/stable-diffusion-v1-5 --vae stabilityai/sd-vae-ft-mse \\
      --clip openai/clip-vit-large-patch14
  python -m data_gen.pairs --triplets triplets.jsonl --output pairs --model sd/ --clip clip/ \\
      --resolution 64 --steps 20 --candidates 8
  python -m data_gen.pack --input pairs --output shards

A line of triplets.jsonl is {"input": caption, "edit": instruction, "output": edited caption}. For
each, candidates are drawn (p and the guidance scale at random), scored with CLIP, filtered, and the
best few are kept. The same command again goes on where it was stopped, and ends with the same
bytes. Several hosts share the work and the --output: the same command on each, with --distributed
(on a TPU pod, GKE or SLURM), or with --hosts N --host I. The last one to finish writes seeds.json,
report.json, report.png and contact_sheet.png.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_gen import pair_report
from data_gen.candidates import CandidateMaker, Recipe
from data_gen.contact_sheet import contact_sheet
from data_gen.pair_filter import Thresholds
from data_gen.pair_folder import KIND, PairFolder
from data_gen.pair_run import Selection, make_pairs
from data_gen.triplet_file import Triplet, read_triplets
from ip2p_jax import checks, jobs
from ip2p_jax.cli import one_line_errors, set_up_jax
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.evaluation.clip_scores import Clip
from ip2p_jax.placed import place
from ip2p_jax.safety import SafetyChecker
from ip2p_jax.storage import StorageError, check_folder, retried, write_whole
from ip2p_jax.weights.clip import load_clip
from ip2p_jax.weights.digest import weights_digest

READERS = 32
"""Threads that look at prompt folders: a bucket answers slowly, but many at once."""


def parser() -> argparse.ArgumentParser:
    """Describes the command line; options that the released script has carry its defaults."""
    p = jobs.parser("data_gen.pairs", __doc__)
    add = p.add_argument
    add("--triplets", required=True, metavar="FILE.jsonl", help="texts, one object a line")
    add("--output", required=True, metavar="DIR", help="folder of pairs, local or gs://")
    add("--clip", required=True, help="CLIP that scores: hub id, folder, or file in OpenAI's names")
    add("--resolution", type=int, help="side of the pictures in px (default: the model's)")
    add("--steps", type=int, default=100, help="sampling steps (%(default)s)")
    add("--sampler", default="euler_ancestral", help=", ".join(SAMPLERS))
    add("--candidates", type=int, default=100, help="tries for each triplet (%(default)s)")
    add("--keep", type=int, default=4, help="pairs kept of a triplet at most (%(default)s)")
    add("--stop-early", action="store_true", help="a triplet is done once --keep have passed")
    add("--min-p", type=float, default=0.1, help="least share of shared steps (%(default)s)")
    add("--max-p", type=float, default=0.9, help="(%(default)s)")
    add("--min-cfg", type=float, default=7.5, help="least guidance scale (%(default)s)")
    add("--max-cfg", type=float, default=15.0, help="(%(default)s)")
    limits = Thresholds()
    add("--clip-threshold", type=float, default=limits.caption, help="of a picture to its caption")
    add("--clip-dir-threshold", type=float, default=limits.direction, help="of the directions")
    add("--clip-img-threshold", type=float, default=limits.image, help="of the two pictures")
    add("--safety", action="store_true", help="reject what the model's safety checker flags")
    add("--seed", type=int, default=0, help="everything random comes from it (0)")
    add("--rows", type=int, default=2, help="candidates a device makes at once (%(default)s)")
    jobs.add_hosts(p)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that names an option and what was expected."""
    wanted = {
        "--candidates": (args.candidates >= 1, args.candidates, "at least 1"),
        "--keep": (args.keep >= 1, args.keep, "at least 1"),
        "--rows": (args.rows >= 2, args.rows, "at least 2"),
        "--seed": (0 <= args.seed < 2**32, args.seed, "0 to 2^32 - 1"),
        "--steps": (1 <= args.steps <= 1000, args.steps, "1 to 1000"),
        "--sampler": (args.sampler in SAMPLERS, args.sampler, f"one of {', '.join(SAMPLERS)}"),
        "--min-p": (0 <= args.min_p <= args.max_p <= 1, args.min_p, "0 <= --min-p <= --max-p <= 1"),
        "--min-cfg": (
            abs(args.min_cfg) <= abs(args.max_cfg) < float("inf") and args.min_cfg <= args.max_cfg,
            args.min_cfg,
            "a finite number, at most --max-cfg",
        ),
    }  # fmt: skip
    for name in ("--clip-threshold", "--clip-dir-threshold", "--clip-img-threshold"):
        value = getattr(args, name[2:].replace("-", "_"))
        wanted[name] = (-1 <= value <= 1, value, "a cosine, -1 to 1")
    for name, (right, value, expected) in wanted.items():
        if not right:
            raise ValueError(f"{name} {value}: expected {expected}")


def settings_of(
    args: argparse.Namespace, recipe: Recipe, selection: Selection, dtype: str, weights: str
) -> dict[str, Any]:
    """What decides the bytes that are written; `weights` is a digest of model and CLIP."""
    named = ("model", "revision", "variant", "vae", "lora", "clip", "rows", "safety")
    values = {name: getattr(args, name) for name in named} | recipe._asdict() | selection._asdict()
    values |= {"dtype": dtype, "weights": weights}
    values["thresholds"] = selection.thresholds._asdict()
    return json.loads(json.dumps(values))


def selection_of(args: argparse.Namespace) -> Selection:
    thresholds = Thresholds(args.clip_threshold, args.clip_dir_threshold, args.clip_img_threshold)
    return Selection(args.candidates, args.keep, args.stop_early, thresholds)


def recipe_of(args: argparse.Namespace, side: int) -> Recipe:
    ranges = (args.min_p, args.max_p), (args.min_cfg, args.max_cfg)
    return Recipe(args.steps, args.sampler, side, side, args.seed, *ranges)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 this host's part is done, 1 storage failed for long, 2 wrong input."""
    args = parser().parse_args(argv)
    check(args)
    check_folder(args.output, KIND)
    triplets = read_triplets(Path(args.triplets))
    set_up_jax()
    host, hosts = jobs.this_host(args)
    console = Console(stderr=True)
    with console.status(escape(f"loading {args.model}")):
        pretrained = jobs.load_model(args)
        checks.generates(pretrained.config)
        recipe = recipe_of(args, jobs.side_of(args.resolution, pretrained.config))
        checker = SafetyChecker.from_pretrained(pretrained) if args.safety else None
        model = place(pretrained, dtype=jobs.DTYPES.get(args.dtype), devices=jax.local_devices())
        scorer = load_clip(args.clip)
        weights = weights_digest(pretrained.params | {"clip": scorer.params})
        clip = Clip(scorer, devices=jax.local_devices())
        maker = CandidateMaker(model, clip, recipe, args.rows)
    selection = selection_of(args)
    try:
        settings = settings_of(args, recipe, selection, str(model.dtype), weights)
        folder = PairFolder.open(args.output, settings)
        run(folder, triplets, range(host, len(triplets), hosts), maker, selection, checker, console)
        return finish(folder, triplets, selection.thresholds)
    except StorageError as error:
        print(f"error: {error}; the same command goes on from there", file=sys.stderr)
        return 1


def missing(folder: PairFolder, triplets: Sequence[Triplet], numbers: Iterable[int]) -> list[int]:
    """Those of the prompts `numbers` that are not whole yet."""
    numbers = list(numbers)
    with ThreadPoolExecutor(READERS) as pool:
        done = pool.map(
            lambda n: retried(lambda: folder.is_done(n, triplets[n]), "reading"), numbers
        )
        return [n for n, is_done in zip(numbers, done, strict=True) if not is_done]


def run(
    folder: PairFolder,
    triplets: Sequence[Triplet],
    numbers: Sequence[int],
    maker: CandidateMaker,
    selection: Selection,
    checker: SafetyChecker | None,
    console: Console,
) -> None:
    """Makes what is missing of this host's prompts, under a progress bar."""
    todo = missing(folder, triplets, numbers)
    columns = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} candidates/s, {task.fields[share]:.1%} kept"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    flagged = None if checker is None else checker.flagged
    with Progress(*columns, console=console) as progress:
        done = len(numbers) - len(todo)
        task = progress.add_task("", total=len(numbers), completed=done, rate=0.0, share=0.0)
        begin, tried, kept = time.monotonic(), 0, 0
        for candidates in make_pairs(folder, triplets, todo, maker, selection, flagged):
            tried += len(candidates)
            kept += sum(not c.rejected for c in candidates)
            rate = tried / (time.monotonic() - begin)
            progress.update(task, advance=1, rate=rate, share=kept / tried)


def finish(folder: PairFolder, triplets: Sequence[Triplet], thresholds: Thresholds) -> int:
    """Writes what is written of all prompts, if all are there; says what came of them."""
    others = missing(folder, triplets, range(len(triplets)))
    if others:
        print(f"this host is done; {len(others)} prompts of other hosts are still to come")
        return 0
    tally = pair_report.Tally()
    with ThreadPoolExecutor(READERS) as pool:
        for some in batched(range(len(triplets)), 100 * READERS):
            rows = pool.map(lambda n: retried(lambda: folder.rows(n), "reading"), some)
            for number, of_prompt in zip(some, rows, strict=True):
                tally.add(number, of_prompt)
    counts = tally.summary()
    shown = contact_pictures(folder, triplets, tally.kept)
    for name, data in (
        ("report.json", pair_report.as_json(counts)),
        ("report.png", pair_report.histograms(tally, thresholds)),
        ("contact_sheet.png", contact_sheet(shown)),
    ):
        file = folder.path / name
        retried(functools.partial(write_whole, file, data), str(file))
    folder.finish(tally.kept)
    print(", ".join(f"{name} {count}" for name, count in counts.items()) + f": {folder.path}")
    return 0


def batched(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cuts numbers into runs of at most `size`."""
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def contact_pictures(
    folder: PairFolder, triplets: Sequence[Triplet], kept: Mapping[int, Sequence[str]]
) -> Iterator[tuple[Image.Image, Image.Image, str]]:
    """Kept pairs to look at, one of a prompt, read as they are asked for."""
    for number, (seed, *_) in kept.items():
        pictures = functools.partial(folder.pictures, number, seed)
        yield *retried(pictures, "reading"), triplets[number].edit


if __name__ == "__main__":
    sys.exit(main())
