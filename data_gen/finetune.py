# SPDX-License-Identifier: Apache-2.0
"""Teaches a language model to write triplets: checks hand-written ones, and fine-tunes on them.

  python -m data_gen.finetune --triplets mine.jsonl --output finetune
  python -m data_gen.finetune --triplets mine.jsonl --output finetune --price 25
  python -m data_gen.finetune --triplets mine.jsonl --validation held_out.jsonl \\
      --output finetune --model gpt-4.1-mini-2025-04-14 --submit
  python -m data_gen.triplets --captions captions --output triplets --model ft:...

A line of mine.jsonl is {"input": caption, "edit": instruction, "output": edited caption}; "caption"
for "input" and the old {"prompt", "completion"} are read too. Lines that are malformed, repeated,
too short or too long, or change nothing are named, and nothing is written before they are mended;
captions that are nearly the same are warned of. Some 700 lines teach a model well.

Written are chat.jsonl (what OpenAI and most tools fine-tune on), completions.jsonl (the old format
of completion models), and an estimate of the tokens that are paid for; with --price, of the cost.
With --submit (which wants the extra llm) the files are uploaded with the key in OPENAI_API_KEY, the
job is started and followed, and the name of the new model is printed and kept in job.json.
Interrupted and started again, the same command follows the same job; it starts no second one.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from data_gen.prompt import answer, messages
from data_gen.server_url import check_url
from data_gen.triplet_checks import check
from data_gen.triplet_file import Triplet, to_old_line
from data_gen.triplet_filter import Limits
from ip2p_jax.cli import Parser, alone, atomic_path, one_line_errors

RECORD = "job.json"

FEWEST = 10
"""Examples without which OpenAI starts no job."""

BYTES_A_TOKEN, TOKENS_A_MESSAGE = 4, 4
"""Of English text in today's vocabularies, and what a conversation's form costs, about."""


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = Parser(
        prog="python -m data_gen.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--triplets", type=Path, nargs="+", required=True, metavar="FILE.jsonl")
    add("--validation", type=Path, metavar="FILE.jsonl", help="triplets to measure progress on")
    add("--output", required=True, metavar="DIR", help="folder of what is written")
    add("--epochs", type=int, default=1, help="how often each is shown (%(default)s)")
    add("--price", type=float, metavar="USD", help="of a million training tokens")
    add("--submit", action="store_true", help="upload, start the job and follow it")
    add("--model", help="what is fine-tuned, as the server calls it")
    add("--suffix", default="ip2p", help="part of the new model's name (%(default)s)")
    add("--base-url", metavar="URL", help="of another server than OpenAI's")
    add("--poll", type=float, default=10.0, help="seconds between two looks (%(default)g)")
    return p


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError that names an option and what was expected; --output becomes a Path."""
    wanted = {
        "--epochs": (1 <= args.epochs <= 50, args.epochs, "1 to 50"),
        "--price": (args.price is None or args.price >= 0, args.price, "at least 0"),
        "--poll": (args.poll > 0, args.poll, "more than 0"),
        "--model": (bool(args.model) >= args.submit, args.model, "a name, to --submit"),
        "--output": ("://" not in args.output, args.output, "a local folder"),
        "--suffix": (len(args.suffix) <= 64, args.suffix, "at most 64 characters"),
    }
    for name, (right, value, expected) in wanted.items():
        if not right:
            raise ValueError(f"{name} {value}: expected {expected}")
    check_url("--base-url", args.base_url)
    args.output = Path(args.output)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is well, 1 the job failed or the server does not work, 2 wrong input."""
    args = parser().parse_args(argv)
    check_options(args)
    training, validation = checked(args)
    files = {"chat.jsonl": "".join(map(chat_line, training))}
    if validation:
        files["chat_validation.jsonl"] = "".join(map(chat_line, validation))
    if args.submit and len(training) < FEWEST:
        raise ValueError(f"--triplets: {len(training)} to teach, expected {FEWEST} at least")
    args.output.mkdir(parents=True, exist_ok=True)
    with alone(args.output):
        refuse_other_job(args.output, files)
        files["completions.jsonl"] = "".join(map(to_old_line, training))
        for name, text in files.items():
            with atomic_path(args.output / name) as part:
                part.write_text(text, "utf-8")
        print(estimate(training, args.epochs, args.price))
        return submit(args, bool(validation)) if args.submit else 0


def checked(args: argparse.Namespace) -> tuple[list[Triplet], list[Triplet]]:
    """The triplets to teach and to validate with; says on stderr what is odd about lines.

    Raises ValueError if any line is wrong, or if there is none.
    """
    held_out = [args.validation] if args.validation else []
    files = [*args.triplets, *held_out]
    good, findings = check(files, Limits())
    for finding in findings:
        print(finding, file=sys.stderr)
    if wrong := sum(finding.wrong for finding in findings):
        raise ValueError(f"{wrong} of {len(good) + wrong} lines are wrong; nothing is written")

    def of(wanted: Sequence[Path]) -> list[Triplet]:
        return [one.triplet for one in good if one.file in wanted]

    for file in files:
        if not of([file]):
            raise ValueError(f"{file}: holds no triplet")
    return of(args.triplets), of(held_out)


def chat_line(triplet: Triplet) -> str:
    """An example of chat fine-tuning: the conversation that `data_gen.triplets` has, answered."""
    turns = [*messages(triplet.input), {"role": "assistant", "content": answer(triplet)}]
    return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


def tokens(triplet: Triplet) -> int:
    """About how many tokens an example has, to a fifth for English."""
    turns = json.loads(chat_line(triplet))["messages"]
    size = sum(len(turn["content"].encode()) for turn in turns)
    return size // BYTES_A_TOKEN + TOKENS_A_MESSAGE * len(turns)


def estimate(training: Sequence[Triplet], epochs: int, price: float | None) -> str:
    """A line on what teaching takes."""
    paid = epochs * sum(map(tokens, training))
    cost = "" if price is None else f", {paid * price / 1e6:.2f} USD at {price:g} USD a million"
    times = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    return f"{len(training)} triplets, {times}: about {paid:,} tokens{cost}"


def refuse_other_job(folder: Path, files: dict[str, str]) -> None:
    """Raises ValueError if a job was started with other files, which must then stay."""
    if (folder / RECORD).exists():
        for name, text in files.items():
            file = folder / name
            if not file.exists() or file.read_text("utf-8") != text:
                raise ValueError(
                    f"{folder / RECORD}: a job was started with other triplets; give another "
                    "--output, or remove it to start anew"
                )


def submit(args: argparse.Namespace, validated: bool) -> int:
    """Starts the job or finds it again, and follows it."""
    try:
        from data_gen.asking import ServerError
        from data_gen.fine_tuning_job import Job, Order
        from data_gen.server import MINUTE, server_at
    except ModuleNotFoundError as error:
        raise ValueError(f"--submit: {error}; pip install 'ip2p_jax[llm]'") from None

    validation = args.output / "chat_validation.jsonl" if validated else None
    order = Order(args.output / "chat.jsonl", validation, args.model, args.epochs, args.suffix)
    server = server_at(args.base_url, "OPENAI_API_KEY", MINUTE)
    console = Console(stderr=True)
    with console.status("") as status:

        def told(text: str) -> None:
            console.print(escape(text), highlight=False)

        def at(text: str) -> None:
            status.update(escape(text))

        try:
            record = asyncio.run(Job(order, server, args.output / RECORD, told, at).run(args.poll))
        except ServerError as error:
            print(f"error: {error}; the same command goes on from there", file=sys.stderr)
            return 1
    if record["status"] != "succeeded":
        why = record["error"] or "the server does not say why"
        line = f"{record['job']} {record['status']}: {why}; remove {args.output / RECORD} to start"
        print(f"error: {line} another", file=sys.stderr)
        return 1
    print(f"model: {record['model']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
