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
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from ip2p_jax import jobs
from ip2p_jax.cli import one_line_errors, set_up_jax
from ip2p_jax.evaluation import examples as sets
from ip2p_jax.evaluation import scorer, search
from ip2p_jax.evaluation.evaluation_folder import KIND, EvaluationFolder
from ip2p_jax.evaluation.evaluation_run import Plan, missing, run
from ip2p_jax.evaluation.identity import set_digest
from ip2p_jax.evaluation.methods import METHODS, Method, Recipe
from ip2p_jax.evaluation.options import BUDGET, check, floor_of, parser
from ip2p_jax.evaluation.summary import summarise
from ip2p_jax.evaluation.sweep import Point, Shown, Sweep, in_order
from ip2p_jax.placed import place
from ip2p_jax.storage import StorageError, check_folder, json_lines
from ip2p_jax.weights.digest import weights_digest

SETTINGS = (
    "model revision variant vae lora data layout split turns method steps sampler fit clip dino "
    "lpips legacy seed rows"
).split()
"""Options that decide the numbers; those of a search, and what options leave open, come to them."""


def points_of(args: argparse.Namespace, method: Method) -> list[Point]:
    """The points asked for; ValueError for one that the method does not have."""
    values = getattr(args, method.axis) or method.useful
    for value in values:
        method.grid(value)
    return sorted({Point(s, v) for s in args.text_guidance or [7.5] for v in values})


def settings_of(args: argparse.Namespace, sweep: Sweep) -> dict[str, Any]:
    """What decides the numbers that are written."""
    values = {name: getattr(args, name) for name in SETTINGS} | {
        "dtype": str(sweep.model.dtype),
        "examples": len(sweep.examples),
        "texts": set_digest(args.data, sweep.examples),
        "resolution": sweep.shown.side,
    }
    for name, params in sweep.scorer.params.items():
        values[f"{name}_weights"] = weights_digest(params)
    return values | {"search": args.search, "floor": floor_of(args) if args.search else None}


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


def open_set(args: argparse.Namespace, console: Console) -> tuple[sets.ExampleSet, list[int]]:
    """Opens the test set and chooses from it, checks those, and says what they do not allow.

    Returns the set, and the indices of the chosen examples in the order of the run.
    """
    whole = sets.open_examples(args.data, split=args.split, layout=args.layout, turns=args.turns)
    order = in_order(len(whole), args.samples, args.seed)
    examples = whole.take(order)
    with console.status(escape(f"checking {args.data}")):
        sets.check(examples, args.fit)
    if args.method == "sdedit" and not examples.has_output_captions:
        raise ValueError(f"{args.data}: no output captions, which --method sdedit is given")
    if args.search and not (examples.has_input_captions and examples.has_output_captions):
        raise ValueError(f"{args.data}: no captions before and after, which --search goes by")
    for reason in what_is_missing(examples, args):
        console.print(escape(reason), soft_wrap=True)
    return whole, order


def open_sweep(
    args: argparse.Namespace, examples: sets.ExampleSet, console: Console
) -> tuple[Sweep, str]:
    """Loads what edits and what scores; returns a digest of the model's weights too."""
    set_up_jax()
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
    sweep = Sweep(method, networks, examples, Shown(side, args.fit), args.rows)
    return sweep, weights_digest(pretrained.params)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 this host's part is done, 1 storage failed for long, 2 wrong input."""
    args = parser(__doc__).parse_args(argv)
    check(args)
    check_folder(args.output, KIND)
    host, hosts = jobs.this_host(args)
    args.rows = args.rows or (2 if jax.default_backend() == "cpu" else 8)
    console = Console(stderr=True)
    examples, order = open_set(args, console)
    sweep, weights = open_sweep(args, examples, console)
    plan = Plan(order, points_of(args, sweep.method), args.rows, args.pictures)
    try:
        settings = settings_of(args, sweep) | {"weights": weights}
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
    jobs.watch("edits", run(sweep, folder, plan, todo), total, due, console)


def find(
    args: argparse.Namespace, sweep: Sweep, folder: EvaluationFolder, plan: Plan, console: Console
) -> int:
    """Searches for guidance scales, and writes what that bought."""
    plan, floor, budget = plan._replace(pictures=0), floor_of(args), args.budget or BUDGET
    if args.search == "set":
        counts = search.search_set(sweep, folder, plan, floor, budget)
    else:
        counts = search.search_examples(sweep, folder, plan, floor, budget)
    total = len(plan.order) * budget
    done = sum(len(folder.lines(n)) for n in range(len(plan.units)))
    jobs.watch("edits", counts, total, total - done, console)
    of = search.found_for_set if args.search == "set" else search.found_for_examples
    found = of(folder, plan, floor, budget)
    folder.write("search.jsonl", json_lines(search.rows(found, sweep.method.axis)))
    text = search.account(found, floor, budget)
    folder.write("search.md", text.encode())
    print(text, f"{folder.path}", sep="\n")
    return 0


def finish(sweep: Sweep, folder: EvaluationFolder, plan: Plan) -> int:
    """Writes what is written of all units, if all are there; says what came of them."""
    others = missing(folder, plan, range(len(plan.units)))
    if others:
        print(f"this host is done; {len(others)} units of other hosts are still to come")
        return 0
    print(summarise(sweep, folder, plan), f"{folder.path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
