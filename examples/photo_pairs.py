# SPDX-License-Identifier: Apache-2.0
"""Makes real training pairs, offline, from the photographs that scikit-image ships.

python examples/photo_pairs.py --output DIR [--count 20000] [--size 64] [--seed 0]
python -m data_gen.pack --input DIR --output SHARDS
"""

import argparse
import sys
from pathlib import Path

from rich.progress import Progress

from data_gen.photos import write_pairs
from ip2p_jax.cli import Parser, one_line_errors
from ip2p_jax.data.files import atomic_folder


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Writes the released folder layout (seeds.json, one folder a prompt) in one rename."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder to write")
    parser.add_argument("--count", type=int, default=20_000, help="pairs (default 20000)")
    parser.add_argument("--size", type=int, default=64, help="side of the crops in px (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.count < 1 or args.size < 8:
        raise ValueError("--count must be at least 1 and --size at least 8")
    if (args.output / "seeds.json").is_file():
        print(f"{args.output} is already there")
        return 0
    with atomic_folder(args.output) as folder, Progress() as progress:
        task = progress.add_task("pairs", total=args.count)
        for done in write_pairs(folder, args.count, args.size, args.seed):
            progress.update(task, completed=done)
    print(f"{args.count} pairs of {args.size} px in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
