# SPDX-License-Identifier: Apache-2.0
"""Imports pairs into the ArrayRecord shards that training reads.

python -m data_gen.pack --input FOLDER --output DIR
python -m data_gen.pack --input FILE.parquet... --output DIR [--columns input=a,...]
python -m data_gen.pack --verify --output DIR

The same command again goes on where it was stopped; another --input, or others of its pairs, need
another DIR. DIR/settings.json holds what DIR was made of, DIR/report.json names what was left out,
DIR/contact_sheet.png shows some pairs. --verify reads all of DIR again: hashes, counts, pictures.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import Progress

from data_gen.sources import Folder, Parquet, Refusal, open_source
from data_gen.verify import verify as verify_pairs
from data_gen.verify import write_sheet
from ip2p_jax.cli import Parser, atomic_path, one_line_errors
from ip2p_jax.data.manifest import MANIFEST, Shard, measure, save_manifest, verify
from ip2p_jax.data.pairs import SPLITS, Pairs, serialize, split_range
from ip2p_jax.data.pictures import size
from ip2p_jax.storage import SETTINGS, open_folder

Source = Folder | Parquet

KIND = "packed pairs"
"""What the folder is of, in words."""


class Job(NamedTuple):
    """One shard: the prompts start..stop of the sorted list."""

    split: str
    start: int
    stop: int
    path: Path

    @property
    def done(self) -> Path:
        """Written last; says that the shard is whole and what is in it."""
        return self.path.with_suffix(".json")


def plan(count: int, shard_size: int, folder: Path) -> list[Job]:
    """Cuts `count` prompts into contiguous splits (90/5/5), and these into shards."""
    jobs = []
    for split in SPLITS:
        members = split_range(count, split)
        for start in range(members.start, members.stop, shard_size):
            stop = min(start + shard_size, members.stop)
            jobs.append(Job(split, start, stop, folder / f"{split}-{start:09d}.array_record"))
    return jobs


def write_shard(source: Source, job: Job) -> None:
    """Writes one shard under a temporary name, then its sidecar."""
    sizes: list[int] = []
    sides: list[tuple[int, int]] = []
    refused: list[Refusal] = []
    with atomic_path(job.path) as part:
        writer = ArrayRecordWriter(str(part), "group_size:1")
        for pairs, refusals in source.read(job.start, job.stop):
            for pair in pairs:
                writer.write(serialize(pair))
            sizes += [len(pairs)] if pairs else []
            sides += [size(io.BytesIO(pair.input)) for pair in pairs[:1]]
            refused += refusals
        writer.close()
    sidecar = {"shard": measure(job.path, sizes, sides)._asdict(), "refused": refused}
    with atomic_path(job.done) as part:
        part.write_text(json.dumps(sidecar))


_source: Source | None = None


def _start_worker(source: Source) -> None:
    global _source
    _source = source


def _work(job: Job) -> None:
    assert _source is not None
    write_shard(_source, job)


def write_shards(source: Source, jobs: list[Job], workers: int) -> Iterator[int]:
    """Writes shards, in `workers` processes (1: in this one); yields the prompts of each."""
    if workers == 1:
        for job in jobs:
            write_shard(source, job)
            yield job.stop - job.start
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (source,)) as pool:
        futures = {pool.submit(_work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future].stop - futures[future].start
        except BrokenProcessPool:
            raise ValueError("a worker was killed; the same command goes on from there") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _stage(output: Path, settings: dict[str, Any]) -> Path:
    """The folder where shards are gathered: an earlier run's if it had the same settings."""
    stage = output.with_name(f".{output.name}.incomplete")
    note, text = stage / SETTINGS, json.dumps(settings, indent=1)
    if not (note.is_file() and note.read_text() == text):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        note.write_text(text)
    shutil.rmtree(stage / "pairs", ignore_errors=True)
    return stage


def _finished(job: Job) -> bool:
    return job.done.is_file() and job.path.is_file()


def _gather(jobs: list[Job]) -> tuple[dict[str, list[tuple[Path, Shard]]], list[Refusal]]:
    """What the shards hold; empty ones are left out."""
    shards: dict[str, list[tuple[Path, Shard]]] = {}
    refused: list[Refusal] = []
    for job in jobs:
        sidecar = json.loads(job.done.read_text())
        shard = Shard(**sidecar["shard"])
        refused += [Refusal(*entry) for entry in sidecar["refused"]]
        if shard.records:
            shards.setdefault(job.split, []).append((job.path, shard))
    return shards, refused


def _report(path: Path, kept: int, refused: list[Refusal]) -> Counter[str]:
    """Writes report.json; returns how often each reason occurred."""
    reasons = Counter(refusal.reason for refusal in refused)
    report = {
        "pairs": kept,
        "refused": len(refused),
        "reasons": dict(reasons),
        "list": [refusal._asdict() for refusal in refused],
    }
    with atomic_path(path) as part:
        part.write_text(json.dumps(report, indent=1))
    return reasons


def _finish(stage: Path, output: Path, jobs: list[Job], max_refused: float) -> str:
    """Turns gathered shards into the data folder; returns the summary."""
    shards, refused = _gather(jobs)
    kept = sum(shard.records for split in shards.values() for _, shard in split)
    reasons = _report(stage / "report.json", kept, refused)
    named = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    if not kept or len(refused) > max_refused * (kept + len(refused)):
        for job in jobs:  # those are read again next time: what was wrong may be mended
            if json.loads(job.done.read_text())["refused"]:
                job.done.unlink()
        raise ValueError(
            f"{len(refused)} of {kept + len(refused)} pairs cannot be used ({named}), more than "
            f"--max-refused {max_refused:g}: see {stage / 'report.json'}"
        )
    builder = Pairs(stage, shards)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and makes
        builder.download_and_prepare(download_dir=stage / "downloads")  # room for one
    shutil.rmtree(stage / "downloads")
    save_manifest(stage, builder.manifest)
    shutil.rmtree(stage / "shards")
    write_sheet(stage)
    os.replace(stage, output)
    prompts = {s: sum(len(shard.sizes) for _, shard in shards[s]) for s in shards}
    splits = ", ".join(f"{split} {count}" for split, count in prompts.items())
    left_out = f"; {len(refused)} left out ({named}): report.json" if refused else ""
    return f"{kept} pairs of {sum(prompts.values())} prompts ({splits}) in {output}{left_out}"


def settings_of(
    source: Source, inputs: list[Path], columns: dict[str, str] | None, shard_size: int
) -> dict[str, Any]:
    """What decides the data folder."""
    listed = json.dumps([source.ids, source.seeds]).encode()
    return {
        "inputs": [str(path.resolve()) for path in inputs],
        "columns": columns,
        "shard_size": shard_size,
        "prompts": len(source.ids),
        "pairs": sum(map(len, source.seeds)),
        "seeds": hashlib.sha256(listed).hexdigest()[:16],
    }


def pack(
    inputs: list[Path],
    output: Path,
    *,
    columns: dict[str, str] | None = None,
    shard_size: int = 256,
    workers: int = 1,
    max_refused: float = 0.1,
) -> str:
    """Imports pairs into `output`, which appears whole at the end; returns one line of summary.

    Resumes what an earlier call with the same arguments left. Raises ValueError or
    FileNotFoundError for an input that is none, when `output` was made of another one, and when
    more than `max_refused` of the pairs cannot be used.
    """
    made = (output / MANIFEST).is_file()
    if not made and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} is already there and not an empty folder")
    source = open_source(inputs, columns)
    if not source.ids:
        raise ValueError(f"{inputs[0]}: lists no pairs")
    settings = settings_of(source, inputs, columns, shard_size)
    if made:
        open_folder(str(output), settings, KIND)
        verify(output)
        return f"{output} is already there"
    stage = _stage(output, settings)
    jobs = plan(len(source.ids), shard_size, stage / "shards")
    with Progress() as progress:
        task = progress.add_task("prompts", total=len(source.ids))
        todo = [job for job in jobs if not _finished(job)]
        progress.advance(task, sum(job.stop - job.start for job in jobs if _finished(job)))
        for count in write_shards(source, todo, workers):
            progress.advance(task, count)
    return _finish(stage, output, jobs, max_refused)


def parse_columns(text: str) -> dict[str, str]:
    """`input=a,output=b,instruction=c[,input_caption=d,output_caption=e]` as a dict."""
    parts = [part.partition("=") for part in text.split(",")]
    columns = {key.strip(): name.strip() for key, _, name in parts}
    needed = {"input", "output", "instruction"}
    known = needed | {"input_caption", "output_caption"}
    if not needed <= set(columns) <= known or not all(columns.values()):
        raise ValueError(
            f"--columns {text}: expected input=NAME,output=NAME,instruction=NAME"
            "[,input_caption=NAME,output_caption=NAME]"
        )
    return columns


def local_paths(args: argparse.Namespace) -> list[str]:
    """--output, then each --input. Raises ValueError for one that is a URL."""
    if "://" in args.output:
        raise ValueError(f"--output {args.output}: expected a local folder")
    for path in args.input or []:
        if "://" in path:
            raise ValueError(f"--input {path}: expected a local folder, or local parquet files")
    return [args.output, *(args.input or [])]


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 all is well, 1 --verify found broken pairs, 2 wrong input."""
    parser = Parser(
        prog="python -m data_gen.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", help="folder with seeds.json, or parquet files")
    add("--output", required=True, help="data folder to make")
    add("--columns", help="input=NAME,output=NAME,instruction=NAME[,input_caption=..,...]")
    add("--shard-size", type=int, default=256, help="prompts in a shard (default 256)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    add("--verify", action="store_true", help="check --output instead of making it")
    add("--max-refused", type=float, default=0.1, help="share that may be unusable (default 0.1)")
    args = parser.parse_args(argv)
    if args.verify == bool(args.input):
        raise ValueError("expected either --input or --verify")
    output, *inputs = (Path(path) for path in local_paths(args))
    if args.verify:
        verdict = verify_pairs(output)
        for fault in verdict.faults:
            print(fault, file=sys.stderr)
        print(f"{output}: {verdict}, {len(verdict.faults)} not right")
        return 1 if verdict.faults else 0
    for name in ("shard_size", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.max_refused <= 1:
        raise ValueError("--max-refused must be between 0 and 1")
    summary = pack(
        inputs,
        output,
        columns=parse_columns(args.columns) if args.columns else None,
        shard_size=args.shard_size,
        workers=args.workers,
        max_refused=args.max_refused,
    )
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
