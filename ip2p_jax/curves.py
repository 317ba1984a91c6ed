# SPDX-License-Identifier: Apache-2.0
"""Draws evaluations in one figure, and says what lies between them.

  python -m ip2p_jax.curves runs/ours/metrics.jsonl runs/sdedit/metrics.jsonl --output plot.png
  python -m ip2p_jax.curves all/metrics.jsonl tenth/metrics.jsonl --output data.svg \\
      --labels "all data" "10 % of the data"
  python -m ip2p_jax.curves a/metrics.jsonl b/metrics.jsonl --output dino.pdf \\
      --x clip_text --y dino_input

Every run is a line through its points in order of image guidance or strength; a run that holds
several methods, turns or text guidances is a line for each. For every two lines the mean
difference of y at equal x is printed, over the range of x that both have; between their points
the lines are straight.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ip2p_jax.cli import Parser, atomic_path, one_line_errors
from ip2p_jax.evaluation.columns import SCORES, Row
from ip2p_jax.evaluation.figures import render, trade_off
from ip2p_jax.evaluation.report import read_metrics
from ip2p_jax.evaluation.trade_off import compare, curves

KINDS = ("png", "svg", "pdf")


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = Parser(
        prog="python -m ip2p_jax.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="FILE", help="metrics.jsonl of a run")
    p.add_argument("--output", required=True, type=Path, help=".png, .svg or .pdf file")
    p.add_argument("--labels", nargs="+", metavar="NAME", help="one a FILE (their folders)")
    scores = f"one of {', '.join(SCORES)}"
    p.add_argument("--x", default="clip_direction", choices=SCORES, metavar="SCORE", help=scores)
    p.add_argument("--y", default="clip_image", choices=SCORES, metavar="SCORE", help="the same")
    return p


def names_of(files: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    """What the runs are called: labels, else as much of their folders as tells them apart.

    Raises ValueError where names are not one a run.
    """
    names = folders(files) if labels is None else list(labels)
    if len(names) != len(files):
        raise ValueError(f"--labels: {len(names)} names for {len(files)} files")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        option = "FILE" if labels is None else "--labels"
        raise ValueError(f"{option}: {name} is given {count} times")
    return names


def folders(files: Sequence[Path]) -> list[str]:
    """The ends of the folders of files, as short as they can be to differ."""
    parts = [file.absolute().parent.parts for file in files]
    ends = [[str(Path(*x[-depth:])) for x in parts] for depth in range(1, max(map(len, parts)) + 1)]
    return next((names for names in ends if len(set(names)) == len(names)), ends[-1])


def read_points(file: Path) -> list[Row]:
    """The points of a run. Raises ValueError if there is none."""
    points = [row for row in read_metrics(file) if row["kind"] == "point"]
    if not points:
        raise ValueError(f"{file}: holds no point, expected a finished evaluation")
    return points


def comparisons(runs: dict[str, list[Row]], x: str, y: str) -> Iterator[str]:
    """A line for every two curves: by how much one is above the other, and where."""
    for a, b in itertools.combinations(curves(runs, x, y), 2):
        gap = compare(a, b, x, y)
        if gap is None:
            where = f"{a.range(x)}; {b.range(x)}"
            yield f"{a.name} - {b.name}: no {x} in common ({where})"
        else:
            yield (
                f"{a.name} - {b.name}: {y} {gap.mean:+.4f} in the mean ({gap.least:+.4f} to "
                f"{gap.most:+.4f}) at equal {x} from {gap.low:.4f} to {gap.high:.4f}"
            )


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Exit codes: 0 drawn, 2 wrong input."""
    args = parser().parse_args(argv)
    kind = args.output.suffix.removeprefix(".")
    if kind not in KINDS:
        raise ValueError(f"--output {args.output}: expected a name in .png, .svg or .pdf")
    if args.x == args.y:
        raise ValueError(f"--y {args.y}: the same as --x")
    names = names_of(args.runs, args.labels)
    runs = dict(zip(names, map(read_points, args.runs), strict=True))
    lines = list(comparisons(runs, args.x, args.y))
    drawn = render(trade_off(runs, args.x, args.y), kind)
    with atomic_path(args.output) as part:
        part.write_bytes(drawn)
    print("\n".join([*lines, str(args.output)]))


if __name__ == "__main__":
    sys.exit(main())
