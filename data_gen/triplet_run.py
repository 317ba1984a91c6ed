# SPDX-License-Identifier: Apache-2.0
"""The part of `data_gen.triplets` that talks to servers, under a progress bar."""

import argparse
import asyncio
import secrets

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_gen.asking import Asker, Moderation, ask_all
from data_gen.batches import BatchRun
from data_gen.caption_index import FIRST
from data_gen.event_log import EventLog
from data_gen.pace import Pace
from data_gen.prompt import Question
from data_gen.server import server_at
from data_gen.standing import ACCEPTED, OPEN, SETTLED, Standing, Taken
from data_gen.triplet_report import Tally


def run(
    args: argparse.Namespace,
    question: Question,
    answers: EventLog,
    standing: Standing,
    tally: Tally,
    console: Console,
) -> None:
    """Asks until every caption is settled or left. Raises ServerError, StorageError, ValueError."""
    asyncio.run(ask(args, question, answers, standing, tally, console))


async def ask(
    args: argparse.Namespace,
    question: Question,
    answers: EventLog,
    standing: Standing,
    tally: Tally,
    console: Console,
) -> None:
    """The same, in an event loop."""
    asker = asker_of(args, question, answers, standing)
    if not standing.run:
        asker.write({"run": secrets.token_hex(8)})
    columns = (
        TextColumn("captions"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[kept]:.1%} of answers accepted, {task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    first = standing.index.repeats == FIRST
    with Progress(*columns, console=console) as progress:
        done = int((first & (standing.state == SETTLED)).sum())
        task = progress.add_task("", total=int(first.sum()), completed=done, kept=0.0, state="")

        def told(taken: Taken) -> None:
            tally.take(taken)
            kept = tally.reasons[ACCEPTED] / tally.reasons.total()
            progress.update(task, advance=standing.state[taken[0]] == SETTLED, kept=kept)
            if not args.batch:
                progress.update(task, state=f"{int(asker.pace.limit)} at once")

        def said(text: str) -> None:
            progress.update(task, state=text)

        asker.told = told
        try:
            if args.batch:
                await BatchRun(asker, args.batch_size, args.poll, said).run()
            else:
                await ask_all(asker, standing.index.read(standing.state == OPEN), args.concurrency)
        finally:
            await asker.close()


def asker_of(
    args: argparse.Namespace, question: Question, answers: EventLog, standing: Standing
) -> Asker:
    """Everything that is needed to ask."""
    server = server_at(args.base_url, "OPENAI_API_KEY", args.timeout)
    moderation = None
    if standing.moderated:
        url, name = args.moderation_url, "MODERATION_API_KEY"
        other = server_at(url, name, args.timeout) if url else server
        moderation = Moderation(other, args.moderation, Pace(args.concurrency))
    return Asker(
        question=question,
        server=server,
        pace=Pace(args.concurrency),
        moderation=moderation,
        answers=answers,
        standing=standing,
        first=args.backoff,
    )
