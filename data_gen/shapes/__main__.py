# SPDX-License-Identifier: Apache-2.0
"""Makes data of the shapes world: rendered pairs whose true edits are known, or texts alone.

  python -m data_gen.shapes --output data/shapes_pairs --pairs 20000
  python -m data_gen.pack --input data/shapes_pairs --output data/shapes
  python -m data_gen.shapes --output data/shapes_validation --pairs 500 --seed 1
  python -m data_gen.shapes --output data/shapes_alone --pairs 8000 --seed 4 --objects 1
  python -m data_gen.shapes --output data/shapes_held_out --pairs 500 --seed 2 --held-out
  python -m data_gen.shapes --output triplets.jsonl --triplets 5000

A pair is an example of a seed: number 7 of seed 0 is always the same. --pairs writes parquet files,
which data_gen.pack and ip2p_jax.evaluate read, into a folder; --triplets writes the lines that
data_gen.pairs reads. Both hold the scenes as well. With --held-out, all wordings of instructions
and all combinations of colour, shape and texture are such as training never sees. Killed and
started again, the same command goes on and ends with the same bytes.
"""

import argparse
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_gen.shapes.examples import MOST
from data_gen.shapes.write import write_pairs, write_triplets
from ip2p_jax.cli import Parser, one_line_errors


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = Parser(
        prog="python -m data_gen.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--output", type=Path, required=True, help="folder of pairs, or file of triplets")
    amount = p.add_mutually_exclusive_group(required=True)
    amount.add_argument("--pairs", type=int, metavar="N", help="pictures and texts of N edits")
    amount.add_argument("--triplets", type=int, metavar="N", help="texts and scenes of N edits")
    add("--seed", type=int, default=0, help="another seed, other examples (default 0)")
    add("--held-out", action="store_true", help="what training never sees, and nothing else")
    add("--objects", type=int, default=MOST, metavar="N", help=f"at most N in a scene ({MOST})")
    return p


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 all is there, 2 wrong options."""
    args = parser().parse_args(argv)
    kind, count = ("pairs", args.pairs) if args.pairs is not None else ("triplets", args.triplets)
    if count < 1:
        raise ValueError(f"--{kind} {count}: expected at least 1")
    if kind == "triplets" and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder, expected a file for the triplets")
    if not 1 <= args.objects <= MOST:
        raise ValueError(f"--objects {args.objects}: expected 1 to {MOST}")
    write = write_pairs if kind == "pairs" else write_triplets
    columns = (TextColumn(kind), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(kind, total=count)
        for done in write(args.output, count, args.seed, args.held_out, args.objects):
            progress.update(task, completed=done)
    print(f"{count} {kind} in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
