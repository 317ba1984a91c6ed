# SPDX-License-Identifier: Apache-2.0
"""Takes captions from data sets: cleans them, drops repetitions, draws a sample, shares it out.

  python -m data_gen.captions --input ChristophSchuhmann/improved_aesthetics_6.5plus \\
      --output captions --count 700000
  python -m data_gen.captions --input metadata/*.parquet --output captions --partitions 8
  python -m data_gen.captions --input Train_GCC-training.tsv --no-header --column 1 \\
      --url-column 2 --output captions
  python -m data_gen.captions --input mine.jsonl.gz --column description --output captions --seed 1

Inputs are files (parquet, JSON lines, CSV, TSV, text; all but parquet also as .gz, .bz2, .zst),
folders of them, and data sets of the Hugging Face hub. Captions lose HTML, URLs and control
characters; those that are empty, too short, too long or without words are left out, in any
language, and so is what repeats a url, or a caption but for case and the full stop. What is left
comes in random order, which --seed alone decides, and --count takes the first of it.

Written are JSON lines {"caption": ..., "url": ...} in captions-00000-of-00001.jsonl (one file a
partition), and captions.json, which says how many were left out and why. Memory does not grow with
the input. Killed and started again, the same command goes on and ends with the same bytes.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Display
from rich.progress import TextColumn, TimeElapsedColumn

from data_gen.caption_files import Columns, find_files, rows
from data_gen.caption_shuffle import (
    Progress,
    cleaned,
    hash_of,
    in_order,
    one_of_a_url,
    order_of,
    parts,
    spread,
    to_line,
)
from data_gen.caption_text import Bounds
from ip2p_jax.cli import Parser, alone, atomic_path, one_line_errors
from ip2p_jax.storage import SETTINGS, open_folder

REPORT = "captions.json"


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = Parser(
        prog="python -m data_gen.captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, bounds = p.add_argument, Bounds()
    add("--input", nargs="+", required=True, help="files, folders, or hub data sets (owner/name)")
    add("--output", required=True, metavar="DIR", help="folder of the captions")
    add("--files", default="*.parquet", help="which files of a folder or data set (%(default)s)")
    add("--revision", help="branch, tag or commit of a hub data set")
    add("--column", help="column of the captions (default: TEXT, text, caption, ...)")
    add("--url-column", help="column of the pictures' addresses (default: URL, url, image_url)")
    add("--no-header", action="store_true", help="columns of CSV and TSV are called 1, 2, ...")
    add("--count", type=int, metavar="N", help="a sample of N captions (default: all)")
    add("--seed", type=int, default=0, help="another seed, another order (%(default)s)")
    add("--partitions", type=int, default=1, metavar="N", help="share them out (%(default)s)")
    add("--min-length", type=int, default=bounds.shortest, help="in characters (%(default)s)")
    add("--max-length", type=int, default=bounds.longest, help="in characters (%(default)s)")
    add("--min-letters", type=int, default=bounds.letters, help="of any script (%(default)s)")
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that names an option and what was expected; --output becomes a Path."""
    lengths = 1 <= args.min_length <= args.max_length
    wanted = {
        "--output": ("://" not in args.output, args.output, "a local folder"),
        "--count": (args.count is None or args.count >= 1, args.count, "at least 1"),
        "--seed": (0 <= args.seed < 2**32, args.seed, "0 to 2^32 - 1"),
        "--partitions": (1 <= args.partitions <= 512, args.partitions, "1 to 512"),
        "--min-length": (lengths, args.min_length, "1 to --max-length"),
        "--min-letters": (args.min_letters >= 0, args.min_letters, "at least 0"),
    }  # fmt: skip
    for name, (right, value, expected) in wanted.items():
        if not right:
            raise ValueError(f"{name} {value}: expected {expected}")
    args.output = Path(args.output)


def settings_of(args: argparse.Namespace, files: Sequence[Path]) -> dict[str, Any]:
    """What decides the bytes that are written."""
    names = ("column", "url_column", "no_header", "count", "seed", "partitions")
    bounds = ("min_length", "max_length", "min_letters")
    values = {name: getattr(args, name) for name in (*names, *bounds)}
    return {"files": [[str(file), file.stat().st_size] for file in files]} | values


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is there, 2 wrong input."""
    args = parser().parse_args(argv)
    check(args)
    files = find_files(args.input, args.files, args.revision)
    if not (args.output / REPORT).exists():
        check_files(args, files)
    open_folder(str(args.output), settings_of(args, files), "captions")
    with alone(args.output):
        if not (args.output / REPORT).exists():
            make(args, files)
        shutil.rmtree(args.output / ".work", ignore_errors=True)
    print(summary(json.loads((args.output / REPORT).read_text()), args.output))
    return 0


def columns_of(args: argparse.Namespace) -> Columns:
    """The columns that are asked for."""
    return Columns(args.column, args.url_column, not args.no_header)


def check_files(args: argparse.Namespace, files: Sequence[Path]) -> None:
    """Raises ValueError for a file that cannot be read or lacks a column, before its folder is
    begun: so the command may be given anew with another column."""
    for file in files:
        next(rows(file, columns_of(args)), None)


def make(args: argparse.Namespace, files: Sequence[Path]) -> None:
    """Writes what the folder lacks, under a line that says how far it is."""
    columns = columns_of(args)
    bounds = Bounds(args.min_length, args.max_length, args.min_letters)
    work, seed = args.output / ".work", args.seed
    layout = TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Display(*layout, console=console, transient=True, disable=hidden) as display:
        task = display.add_task("reading")

        def tick(progress: Progress) -> None:
            display.update(task, description=f"{progress.files} files read, {progress.kept} kept")

        read = spread(
            files,
            lambda file: cleaned(rows(file, columns), bounds),
            lambda item: hash_of(item.url or item.caption),
            work / "urls",
            tick,
        )
        display.update(task, description="looking for repetitions")
        once = spread(
            parts(work / "urls"),
            one_of_a_url,
            lambda item: order_of(item.caption, seed),
            work / "order",
            lambda _: None,
        )
        write(args, read, once)


def write(args: argparse.Namespace, read: Progress, once: Progress) -> None:
    """Writes the captions in their order, and the report. ValueError if there is none: then the
    folder is left empty, for other settings."""
    names = [f"captions-{i:05d}-of-{args.partitions:05d}.jsonl" for i in range(args.partitions)]
    distinct = written = 0
    last = Progress()
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(atomic_path(args.output / name)) for name in names]
        outputs = [stack.enter_context(path.open("w", encoding="utf-8")) for path in paths]
        for item in in_order(args.output / ".work" / "order", args.seed):
            if item.reason:
                last.leave_out(item)
                continue
            distinct += 1
            if args.count is None or written < args.count:
                outputs[written % args.partitions].write(to_line(item))
                written += 1
        left_out = read.left_out | once.left_out | last.left_out
        if not written:
            shutil.rmtree(args.output / ".work")
            (args.output / SETTINGS).unlink()
            raise ValueError(f"{', '.join(args.input)}: no caption is left ({left_out})")
    report = {
        "read": read.kept + sum(read.left_out.values()),
        "left out": dict(sorted(left_out.items())),
        "distinct": distinct,
        "written": written,
        "files": names,
        "examples": dict(sorted((read.examples | once.examples | last.examples).items())),
    }
    with atomic_path(args.output / REPORT) as part:
        part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")


def summary(report: dict[str, Any], folder: Path) -> str:
    """A line on what came of it."""
    left_out = ", ".join(f"{reason} {count}" for reason, count in report["left out"].items())
    return (
        f"{report['read']} read, left out: {left_out or 'none'}; {report['distinct']} distinct, "
        f"{report['written']} written to {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
