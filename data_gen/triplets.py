# SPDX-License-Identifier: Apache-2.0
"""Asks a language model for edits of captions: captions in, triplets of texts out.

  python -m data_gen.triplets --captions captions --output triplets --model ft:gpt-4.1-mini:me::8
  python -m data_gen.triplets --captions captions --output triplets --model M --batch
  python -m data_gen.triplets --captions captions --output triplets --model qwen3:8b \\
      --base-url http://127.0.0.1:11434/v1 --few-shot 12 --moderation off
  python -m data_gen.triplets --review triplets/triplets.jsonl

The server is OpenAI's or any that speaks its API (vLLM, Ollama, llama.cpp). The key is read from
OPENAI_API_KEY, and that of another server for moderation from MODERATION_API_KEY. Every answer is
written to answers.jsonl at once; the same command again goes on where it was stopped, and asks
nothing twice. At the end triplets.jsonl, report.md and its pictures are written. --review opens a
page on which triplets are accepted, corrected, rejected and written.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from data_gen import triplet_set
from data_gen.caption_index import CaptionIndex
from data_gen.event_log import EventLog
from data_gen.pace import ServerError
from data_gen.prompt import SAMPLING, SYSTEM, Question
from data_gen.server_url import check_url
from data_gen.standing import Standing, counts
from data_gen.triplet_file import read_triplets
from data_gen.triplet_filter import Limits
from data_gen.triplet_report import Tally
from ip2p_jax.cli import Parser, one_line_errors
from ip2p_jax.storage import SETTINGS, StorageError, open_folder

EXAMPLES = Path(__file__).with_name("examples.jsonl")
SIMILAR = "similarity, 0 to 1, to an earlier triplet from which on one is left out"
MODERATION, OFF = "omni-moderation-latest", "off"


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = Parser(
        prog="python -m data_gen.triplets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--captions", nargs="+", metavar="PATH", help="JSON lines, or folders of data_gen.captions")
    add("--output", metavar="DIR", help="folder of the run")
    add("--model", help="the model's name on the server")
    add("--base-url", metavar="URL", help="the server (default: OPENAI_BASE_URL, or OpenAI's)")
    add("--few-shot", type=int, default=0, metavar="N", help="examples in each request (0)")
    add("--examples", metavar="FILE", default=str(EXAMPLES), help="triplets to take them from")
    add("--request", default="{}", metavar="JSON", help="fields to add or replace; null: leave out")
    add("--moderation", metavar="MODEL", default=MODERATION, help="or off (%(default)s)")
    add("--moderation-url", metavar="URL", help="server for moderation (default: the same)")
    add("--concurrency", type=int, default=64, help="requests at once at most (%(default)s)")
    add("--timeout", type=float, default=60.0, help="seconds an answer may take (%(default)s)")
    add("--backoff", type=float, default=0.5, help="seconds to wait after a failure; doubles (0.5)")
    add("--batch", action="store_true", help="use the Batch API: half the price, within a day")
    add("--batch-size", type=int, default=50_000, help="requests in a batch (%(default)s)")
    add("--poll", type=float, default=60.0, help="seconds between looks at batches (%(default)s)")
    ends = {"type": int, "nargs": 2, "metavar": ("MIN", "MAX")}
    add("--edit-length", **ends, default=Limits().edit, help="of instructions, characters (2 200)")
    add("--output-length", **ends, default=Limits().output, help="of edited captions (2 500)")
    add("--near-duplicates", type=float, default=0.8, metavar="S", help=f"{SIMILAR} (%(default)s)")
    add("--report", action="store_true", help="ask nothing, write what there is")
    add("--review", metavar="FILE", help="open a page to review triplets, or to write them")
    add("--port", type=int, default=7860, help="of that page (%(default)s)")
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that names an option and what was expected."""
    wanted = {
        "--captions": (args.captions, "files or folders of captions"),
        "--output": (args.output and "://" not in args.output, "a local folder"),
        "--model": (args.model, "the model's name on the server"),
        "--few-shot": (args.few_shot >= 0, "0 or more"),
        "--concurrency": (1 <= args.concurrency <= 1000, "1 to 1000"),
        "--timeout": (0 < args.timeout < float("inf"), "seconds"),
        "--backoff": (0 < args.backoff < float("inf"), "seconds"),
        "--poll": (0 < args.poll < float("inf"), "seconds"),
        "--batch-size": (1 <= args.batch_size <= 50_000, "1 to 50000"),
        "--edit-length": (1 <= args.edit_length[0] <= args.edit_length[1], "1 <= MIN <= MAX"),
        "--output-length": (1 <= args.output_length[0] <= args.output_length[1], "1 <= MIN <= MAX"),
        "--near-duplicates": (0 < args.near_duplicates <= 1, "above 0, to 1"),
    }
    for name, (right, expected) in wanted.items():
        if not right:
            value = getattr(args, name[2:].replace("-", "_"))
            raise ValueError(
                f"{name} {'is missing' if value is None else value}: expected {expected}"
            )
    check_url("--base-url", args.base_url)
    check_url("--moderation-url", args.moderation_url)


def caption_files(paths: Sequence[str]) -> list[Path]:
    """The files of captions that are named, and those in folders that are."""
    files = []
    for path in map(Path, paths):
        found = sorted(path.glob("captions-*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"--captions {path}: no captions-*.jsonl in it")
        files += found
    return files


def question_of(args: argparse.Namespace) -> Question:
    """What the command asks of a model."""
    try:
        changed = dict(json.loads(args.request))
    except (ValueError, TypeError):
        raise ValueError(f"--request {args.request}: expected a JSON object") from None
    if {"model", "messages"} & set(changed):
        raise ValueError("--request: model and messages have options of their own")
    fields = {name: x for name, x in {**SAMPLING, **changed}.items() if x is not None}
    examples = read_triplets(Path(args.examples)) if args.few_shot else []
    if args.few_shot > len(examples):
        raise ValueError(f"--few-shot {args.few_shot}: {args.examples} holds {len(examples)}")
    return Question(args.model, fields, examples, args.few_shot)


def settings_of(args: argparse.Namespace, question: Question) -> dict[str, Any]:
    """What decides the answers: limits and similarity do not, they may change."""
    digest = sha256(json.dumps(question.examples).encode()).hexdigest()[:16]
    return {
        "model": question.model,
        "request": question.fields,
        "few_shot": f"{question.shown} of {digest}" if question.shown else "none",
        "prompt": sha256(SYSTEM.encode()).hexdigest()[:16],
        "moderation": args.moderation,
    }


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the server or the disk failed or captions are left, 2 wrong input,
    130 stopped by Ctrl-C."""
    args = parser().parse_args(argv)
    if args.review:
        page = extra("review_page", "app")
        return page.serve(Path(args.review), caption_files(args.captions or []), args.port)
    check(args)
    try:
        return make(args, Console(stderr=True))
    except (ServerError, StorageError) as error:
        print(f"error: {error}; the same command goes on from there", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130


def extra(module: str, name: str) -> ModuleType:
    """A module that needs an extra. ValueError says which, if something is not installed."""
    try:
        return import_module(f"data_gen.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'ip2p_jax[{name}]'") from None


def make(args: argparse.Namespace, console: Console) -> int:
    """Goes on with a run to its end, or to its report; returns the exit code."""
    question = question_of(args)
    settings = settings_of(args, question)
    with console.status("reading captions"):
        index = CaptionIndex.open(caption_files(args.captions))
    folder = run_folder(args.output, settings)
    limits = Limits(tuple(args.edit_length), tuple(args.output_length))
    standing, tally = Standing(index, limits, args.moderation != OFF), Tally()
    with closing(EventLog(folder / "answers.jsonl")) as answers:
        with console.status("reading answers"):
            for taken in standing.replay(answers):
                tally.take(taken)
        refuse(args, standing, folder)
        if not args.report:
            extra("triplet_run", "llm").run(args, question, answers, standing, tally, console)
        with console.status("leaving out near-duplicates"):
            kept = triplet_set.write_set(folder, answers, standing, tally, args.near_duplicates)
    triplet_set.write_report(folder, standing, tally, settings)
    return say(standing, kept, folder)


def run_folder(output: str, settings: dict[str, Any]) -> Path:
    """Opens the folder of a run. One in which nothing was answered, as where the model's name was
    wrong, begins anew with other settings. ValueError if the folder is another run's."""
    try:
        return Path(open_folder(output, settings, "triplets"))
    except ValueError:
        if not forgotten(Path(output)):
            raise
    return Path(open_folder(output, settings, "triplets"))


def forgotten(folder: Path) -> bool:
    """Removes what a run has written if nothing was answered and no batch waits; says whether."""
    file, waiting = folder / "answers.jsonl", set()
    if not file.exists():
        return False
    with closing(EventLog(file)) as answers:
        for _, event in answers.events():
            if "answer" in event or "refused" in event:
                return False
            if "batch" in event:
                (waiting.discard if "ended" in event else waiting.add)(event["batch"])
        if waiting:
            return False
        file.unlink()
        (folder / SETTINGS).unlink()
    return True


def refuse(args: argparse.Namespace, standing: Standing, folder: Path) -> None:
    """Raises ValueError if the run in the folder is not one that this command may go on with."""
    if standing.strangers:
        raise ValueError(
            f"{folder} holds {standing.strangers} lines of captions that --captions lacks, or that "
            "share an earlier one's url there: captions may be added at the end, not taken away"
        )
    if standing.batches and not args.batch and not args.report:
        raise ValueError(
            f"{folder} has {len(standing.batches)} batches that are not collected: give --batch"
        )


def say(standing: Standing, kept: int, folder: Path) -> int:
    """Says what came of it; the exit code is 1 if something is left."""
    found = counts(standing)
    print(f"{kept} triplets of {found['captions']} captions: {folder / 'triplets.jsonl'}")
    left = found["open"] + found["batched"]
    if left:
        print(f"{left} captions are not settled; the same command asks again", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
