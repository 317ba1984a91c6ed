# SPDX-License-Identifier: Apache-2.0
"""Measures an editing model on paired pictures: the trade-off curve of figure 8, and more scores.

  python -m ip2p_jax.evaluate --model runs/ip2p --data shards --output eval/ip2p \\
      --image-guidance 1.0,1.2,1.4,1.6,1.8,2.0,2.2 --samples 5000
  python -m ip2p_jax.evaluate --model stable-diffusion-v1-5/stable-diffusion-v1-5 --data shards \\
      --output eval/sdedit --method sdedit --strength 0.3,0.5,0.7,0.9
  python -m ip2p_jax.evaluate --model M --data magicbrush/test --turns multi --output eval/mb \\
      --image-guidance 1.5 --dino facebook/dino-vits16 --lpips alexnet-owt-7be5be79.pth
  python -m ip2p_jax.evaluate --model M --data shards --output eval/search --samples 200 \\
      --search examples --floor 0.8 --budget 12
  python -m ip2p_jax.curves eval/ip2p/metrics.jsonl eval/sdedit/metrics.jsonl --output curves.png

Writes metrics.jsonl (a line an example and point, and a line a point with bootstrap 95 %
intervals), table.md, curve.png and samples.png. The same command again goes on where it was
stopped; with more points or more --samples it only does what is new. Every example has its own
noise, so devices, hosts and restarts change no number. Several hosts share the work and the
--output (--distributed, or --hosts N --host I).
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ip2p_jax import jobs
from ip2p_jax.cli import cache_compilations, one_line_errors
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.evaluation import examples as sets
from ip2p_jax.evaluation import report, scorer, search
from ip2p_jax.evaluation.evaluation_folder import EvaluationFolder
from ip2p_jax.evaluation.evaluation_run import Plan, missing, run
from ip2p_jax.evaluation.methods import METHODS, Method, Recipe
from ip2p_jax.evaluation.summary import summarise
from ip2p_jax.evaluation.sweep import Point, Shown, Sweep, in_order
from ip2p_jax.placed import place
from ip2p_jax.storage import StorageError, json_lines

CLIP = "openai/clip-vit-large-patch14"


def numbers(text: str) -> list[float]:
    """Numbers with commas between."""
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers like 1.0,1.2,1.5") from None


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = jobs.parser("ip2p_jax.evaluate", __doc__)
    add = p.add_argument
    add("--data", required=True, help="test set: packed pairs, a public layout, or a .jsonl")
    add("--layout", choices=sets.LAYOUTS, help="of --data (default: what it looks like)")
    add("--split", default="test", help="part of --data (%(default)s)")
    add("--turns", choices=("single", "multi"), default="single", help="of sessions (MagicBrush)")
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
    add("--floor", type=float, default=0.8, help="image similarity to keep (%(default)s)")
    add("--budget", type=int, default=12, help="points that a search may try (%(default)s)")
    add("--pictures", type=int, default=8, help="examples whose results are kept (%(default)s)")
    add("--seed", type=int, default=0, help="everything random comes from it (0)")
    add("--rows", type=int, default=2, help="examples a device edits at once (%(default)s)")
    jobs.add_hosts(p)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that names an option and what was expected."""
    wanted = {
        "--samples": (args.samples is None or args.samples >= 1, args.samples, "at least 1"),
        "--steps": (1 <= args.steps <= 1000, args.steps, "1 to 1000"),
        "--sampler": (args.sampler in SAMPLERS, args.sampler, f"one of {', '.join(SAMPLERS)}"),
        "--pictures": (args.pictures >= 0, args.pictures, "at least 0"),
        "--seed": (0 <= args.seed < 2**32, args.seed, "0 to 2^32 - 1"),
        "--rows": (args.rows >= 2, args.rows, "at least 2"),
        "--floor": (-1 <= args.floor <= 1, args.floor, "a cosine, -1 to 1"),
        "--budget": (1 <= args.budget <= search.MOST, args.budget, f"1 to {search.MOST}"),
        "--legacy": (not args.legacy or args.clip != "none", "given", "a CLIP that scores"),
    }
    if args.search:
        given = args.image_guidance or args.text_guidance or args.turns == "multi"
        alone = args.hosts == 1 and not args.distributed
        right = args.method == "ip2p" and args.clip != "none" and alone and not given
        words = "--method ip2p, CLIP, one host, single turns and no points given"
        wanted["--search"] = (right, args.search, words)
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


def points_of(args: argparse.Namespace, method: Method) -> list[Point]:
    """The points asked for; ValueError for one that the method does not have."""
    values = getattr(args, method.axis) or method.useful
    for value in values:
        method.grid(value)
    return sorted({Point(s, v) for s in args.text_guidance or [7.5] for v in values})


def settings_of(args: argparse.Namespace, count: int, side: int) -> dict[str, Any]:
    """What decides the numbers that are written."""
    names = ("model", "revision", "variant", "vae", "dtype", "data", "layout", "split", "turns")
    names += (
        "method",
        "steps",
        "sampler",
        "fit",
        "clip",
        "dino",
        "lpips",
        "legacy",
        "seed",
        "rows",
    )
    values = {name: getattr(args, name) for name in names} | {"examples": count, "resolution": side}
    return values | {"search": args.search, "floor": args.floor if args.search else None}


def what_is_missing(examples: sets.ExampleSet, args: argparse.Namespace) -> list[str]:
    """The scores that this set, and these options, do not allow, with the reason."""
    steps = [step for plan in examples.plans for step in plan.steps]
    needs = [(scorer.OF_TARGET, "target picture", [bool(s.target) for s in steps])]
    if args.clip != "none":
        after = [bool(s.output_caption) for s in steps]
        both = [bool(s.input_caption and s.output_caption) for s in steps]
        needs += [(scorer.OF_OUTPUT_CAPTION, "output caption", after)]
        needs += [(scorer.OF_CAPTIONS, "captions before and after", both)]
    reasons = [
        f"no {', '.join(names)} for {have.count(False)} of {len(have)} edits: no {what}"
        for names, what, have in needs
        if not all(have)
    ]
    if args.clip == "none":
        reasons.append("no scores of CLIP, and no curve: --clip none")
    return [f"{args.data}: {reason}" for reason in reasons]


def open_set(args: argparse.Namespace, console: Console) -> sets.ExampleSet:
    """Opens and checks the test set, and says what it does not allow."""
    examples = sets.open_examples(args.data, split=args.split, layout=args.layout, turns=args.turns)
    with console.status(escape(f"checking {args.data}")):
        sets.check(examples, args.fit)
    if args.method == "sdedit" and not examples.has_output_captions:
        raise ValueError(f"{args.data}: no output captions, which --method sdedit is given")
    if args.search and not (examples.has_input_captions and examples.has_output_captions):
        raise ValueError(f"{args.data}: no captions before and after, which --search goes by")
    for reason in what_is_missing(examples, args):
        console.print(escape(reason), soft_wrap=True)
    return examples


def open_sweep(args: argparse.Namespace, examples: sets.ExampleSet, console: Console) -> Sweep:
    """Loads what edits and what scores."""
    cache_compilations()
    devices = jax.local_devices()
    with console.status(escape(f"loading {args.clip}")):
        networks = scorer.open_scorer(
            None if args.clip == "none" else args.clip,
            args.dino,
            args.lpips,
            args.legacy,
            devices,
        )
    with console.status(escape(f"loading {args.model}")):
        pretrained = jobs.load_model(args)
        METHODS[args.method].check(pretrained.config)
        side = jobs.side_of(args.resolution, pretrained.config)
        model = place(pretrained, dtype=jobs.DTYPES.get(args.dtype), devices=devices)
    method = METHODS[args.method](model, Recipe(args.steps, args.sampler, args.seed))
    return Sweep(method, networks, examples, Shown(side, args.fit), args.rows)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 this host's part is done, 1 storage failed for long, 2 wrong input."""
    args = parser().parse_args(argv)
    check(args)
    host, hosts = jobs.this_host(args)
    console = Console(stderr=True)
    examples = open_set(args, console)
    sweep = open_sweep(args, examples, console)
    order = in_order(len(examples), args.samples, args.seed)
    plan = Plan(order, points_of(args, sweep.method), args.rows, args.pictures)
    try:
        settings = settings_of(args, len(examples), sweep.shown.side)
        folder = EvaluationFolder.open(args.output, settings, sweep.method.axis)
        if args.search:
            return find(args, sweep, folder, plan, console)
        with_progress(sweep, folder, plan, range(host, len(plan.units), hosts), console)
        return finish(sweep, folder, plan)
    except StorageError as error:
        print(f"error: {error}; the same command goes on from there", file=sys.stderr)
        return 1


def with_progress(
    sweep: Sweep, folder: EvaluationFolder, plan: Plan, mine: Sequence[int], console: Console
) -> None:
    """Does what is missing of this host's units, under a progress bar."""
    todo, units = missing(folder, plan, mine), plan.units
    total = sum(len(units[n]) for n in mine) * len(plan.points)
    due = sum(len(units[n]) * len(points) for n, points in todo.items())
    watch(run(sweep, folder, plan, todo), total, due, console)


def watch(counts: Iterable[int], total: int, due: int, console: Console) -> None:
    """Shows a progress bar while edits are made, so many at a time."""
    columns = (
        TextColumn("edits"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} edits/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=total - due, rate=0.0)
        begin, made = time.monotonic(), 0
        for count in counts:
            made += count
            progress.update(task, advance=count, rate=made / (time.monotonic() - begin))


def find(
    args: argparse.Namespace, sweep: Sweep, folder: EvaluationFolder, plan: Plan, console: Console
) -> int:
    """Searches for guidance scales, and writes what that bought."""
    plan = plan._replace(pictures=0)
    if args.search == "set":
        counts = search.search_set(sweep, folder, plan, args.floor, args.budget)
    else:
        counts = search.search_examples(sweep, folder, plan, args.floor, args.budget)
    total = len(plan.order) * args.budget
    done = sum(len(folder.lines(n)) for n in range(len(plan.units)))
    watch(counts, total, total - done, console)
    of = search.found_for_set if args.search == "set" else search.found_for_examples
    found = of(folder, plan, args.floor, args.budget)
    folder.write("search.jsonl", json_lines(search.rows(found, sweep.method.axis)))
    text = search.account(found, args.floor, args.budget)
    folder.write("search.md", text.encode())
    print(text, f"{folder.path}", sep="\n")
    return 0


def finish(sweep: Sweep, folder: EvaluationFolder, plan: Plan) -> int:
    """Writes what is written of all units, if all are there; says what came of them."""
    others = missing(folder, plan, range(len(plan.units)))
    if others:
        print(f"this host is done; {len(others)} units of other hosts are still to come")
        return 0
    points = summarise(sweep, folder, plan)
    print(report.table(points), f"{folder.path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
