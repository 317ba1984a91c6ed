# SPDX-License-Identifier: Apache-2.0
"""What commands that compile for a TPU share: options, the table, the files."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ip2p_jax.cli import Parser, atomic_path, check_writable
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.programs import keep
from ip2p_jax.tpu.estimate import Report, compile_plan, lower
from ip2p_jax.tpu.programs import Plan
from ip2p_jax.tpu.topologies import CHIPS, Topology


def positive(text: str) -> int:
    """Reads a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number above 0")
    return int(text)


def parser(name: str, doc: str | None) -> Parser:
    """The options that such commands share."""
    p = Parser(
        prog=f"python -m {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--topology",
        required=True,
        metavar="SLICE",
        help=f"{', '.join(CHIPS)} and -N as Google counts (v4-32: 16 chips), or :AxBxC chips",
    )
    p.add_argument("--rows", type=positive, help="rows a chip")
    p.add_argument("--resolution", type=positive, help="side of the pictures, px")
    p.add_argument("--steps", type=positive, default=100, help="sampling steps (%(default)s)")
    p.add_argument(
        "--sampler", choices=sorted(SAMPLERS), default="euler_ancestral", help="(%(default)s)"
    )
    p.add_argument(
        "--lower",
        action="store_true",
        help="only trace and lower, which finds what is wrong with shapes",
    )
    p.add_argument("--output", metavar="FILE.json", help="write the table's numbers there too")
    p.add_argument("--executable", metavar="FILE", help="keep the compiled program there")
    return p


def run(args: argparse.Namespace, plans: Iterable[Plan], topology: Topology) -> int:
    """Compiles each plan, prints its table and writes the files that were asked for.

    Returns the exit code: 1 if a program does not fit.
    """
    if args.lower and args.executable:
        raise ValueError("--executable has no effect with --lower")
    for path in (args.output, args.executable):
        if path:
            check_writable(Path(path).absolute().parent)
    reports = []
    for plan in plans:
        report, compiled = (lower if args.lower else compile_plan)(plan, topology)
        reports.append(report)
        print("\n".join(table(report)), flush=True)
        if args.output:
            with atomic_path(args.output) as part:
                part.write_text(json.dumps([x.to_json() for x in reports], indent=1) + "\n")
        if args.executable and report.fits:
            keep(Path(args.executable), compiled)  # pyright: ignore[reportArgumentType]
    if len(reports) > 1 and all(report.seconds for report in reports):
        print("\n".join(summary(reports)))
    for report in reports:
        if report.problem:
            print(f"{report.name}: {report.problem}", file=sys.stderr)
    return int(any(report.fits is False for report in reports))


def table(report: Report) -> Iterator[str]:
    """What to print about one program."""
    like = f", {report.runs} like it" if report.runs > 1 else ""
    yield f"{report.name}{like}"
    yield from line(
        "slice", f"{report.topology}, {report.chips} chips; all that follows is a chip's"
    )
    if report.fits is None:
        yield from line("model", f"{report.model_flops / 1e12:,.3f} TFLOP")
        yield from line("lowered in", f"{report.compile_seconds:.1f} s; not compiled")
        return
    if not report.fits:
        yield from line("fits", f"no: {report.problem.split(':')[0]}")
        return
    left = report.memory - report.peak_bytes
    yield from line(
        "fits", f"yes: peak {gib(report.peak_bytes)} of {gib(report.memory)}, {gib(left)} left"
    )
    yield from line(
        "memory", f"arguments {gib(report.argument_bytes)}, temporary {gib(report.temporary_bytes)}"
    )
    yield from line(
        "FLOPs",
        f"model {report.model_flops / 1e12:,.3f} T, compiled {report.flops / 1e12:,.3f} T "
        f"({report.flops / max(report.model_flops, 1):.2f}x)",
    )
    total = max(sum(report.cycles.values()), 1)
    for kind, cycles in report.cycles.items():
        yield from line("", f"{kind:28}{cycles / total:7.1%}  {cycles:>15,} cycles")
    for kind, (count, size) in report.collectives.items():
        yield from line("", f"{count:6} {kind:28}{size / 2**20:12,.2f} MiB")
    yield from line(
        "also", f"{report.copies} copies, {report.float32_convolutions} products in float32"
    )
    if report.seconds and report.utilisation is not None:
        yield from line(
            "estimate",
            f"{1e3 * report.seconds:,.3f} ms a {report.unit}, {report.utilisation:.1%} of peak; "
            f"compiled in {report.compile_seconds:.0f} s",
        )
    yield from line("", report.left_out)


def line(name: str, text: str) -> Iterator[str]:
    yield f"  {name:11}{text}"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def summary(reports: list[Report]) -> Iterator[str]:
    """All layers together, each as often as there are such."""
    yield "together, each as often as the network has it"
    seconds = sum(x.runs * (x.seconds or 0.0) for x in reports)
    used = sum(x.runs * (x.utilisation or 0.0) * (x.seconds or 0.0) for x in reports)
    yield from line("estimate", f"{1e3 * seconds:,.2f} ms, {used / seconds:.1%} of peak")


def check_only(args: Any, what: str, unused: dict[str, Any]) -> None:
    """Raises ValueError for an option that `what` has no use for."""
    for name, default in unused.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name} has no effect with --what {what}")
