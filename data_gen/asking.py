# SPDX-License-Identifier: Apache-2.0
"""Asks a language model about many captions at once, and writes every answer down as it comes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from data_gen.caption_index import key_of
from data_gen.event_log import Event, EventLog
from data_gen.pace import Pace, ServerError, back_off
from data_gen.prompt import Question
from data_gen.server import Fault, Refused, Said, Server
from data_gen.standing import OPEN, Standing, Taken
from ip2p_jax.storage import StorageError

T = TypeVar("T")

TRIES = 8
"""Failures of one request in a row, not counting those that came too fast, until it is left."""

REFUSALS = 8
"""Requests that a server refuses before it answers any: then it is the command that is wrong, or
the server."""


class Left(Exception):
    """A caption that is left for the next start of the command."""


@dataclass(frozen=True)
class Moderation:
    """Who moderates: a model of a server, which has limits of its own."""

    server: Server
    model: str
    pace: Pace


@dataclass
class Asker:
    """Asks; what it is told goes to `answers` and `standing` at once.

    first: seconds to wait after a first failure.
    told: is called with whatever `Standing.take` returns. answered: whether the server has
    answered this process. heard: when one last did. doubted: how often it has refused until
    then. refusals: those that are not believed yet.
    """

    question: Question
    server: Server
    pace: Pace
    moderation: Moderation | None
    answers: EventLog
    standing: Standing
    first: float
    told: Callable[[Taken], None] = lambda taken: None
    answered: bool = False
    heard: float = field(default_factory=time.monotonic)
    doubted: int = 0
    refusals: list[Event] = field(default_factory=list)

    async def close(self) -> None:
        """Closes the connections."""
        await self.server.close()
        if self.moderation:
            await self.moderation.server.close()

    def write(self, event: Event) -> None:
        """Writes a line down and takes it in."""
        begin = self.answers.append(event)
        if (taken := self.standing.take(event, begin)) is not None:
            self.told(taken)

    async def patiently(
        self, request: Callable[[], Awaitable[T]], pace: Pace, server: Server | None = None
    ) -> T:
        """Repeats a request to a server (None: the one that is asked) until it is answered.

        Raises Refused, Left, ServerError.
        """
        name = (server or self.server).name
        failures, counted, since = 0, 0, time.monotonic()
        while True:
            went = since
            try:
                async with pace.turn() as went:
                    result = await request()
                pace.answered()
                self.heard = time.monotonic()
                return result
            except Fault as fault:
                if fault.busy:
                    pace.busy(went, fault.wait)
                failures, counted = failures + 1, counted + (not fault.limited)
                if counted > TRIES and self.heard < since:
                    raise ServerError(f"{name} does not answer ({fault})") from None
                if counted > TRIES:
                    raise Left from None
                if fault.limited:
                    self.heard = time.monotonic()
            await asyncio.sleep(back_off(self.first, failures))

    async def moderated(self, texts: Sequence[str]) -> list[list[str]]:
        """The categories in which each text is flagged."""
        moderation = self.moderation
        assert moderation is not None
        try:
            flagged = await self.patiently(
                lambda: moderation.server.moderate(moderation.model, texts),
                moderation.pace,
                moderation.server,
            )
        except (Refused, ValueError) as error:
            hint = "--moderation off goes without it, --moderation-url asks another server"
            raise ValueError(f"moderation: {error}; {hint}") from None
        return flagged

    async def ask(self, at: int, caption: str, url: str) -> None:
        """Asks once and writes the answer down."""
        attempt = int(self.standing.attempts[at]) + 1
        body, once = (
            self.question.body(caption, attempt),
            f"{self.standing.run}-{key_of(caption):016x}",
        )
        try:
            said = await self.patiently(
                lambda: self.server.chat(body, f"{once}-{attempt}"), self.pace
            )
        except Refused as error:
            self.refused({"caption": caption, "attempt": attempt, "refused": str(error)})
            raise Left from None
        self.write(answer_event(caption, url, attempt, said))
        self.now_answered()

    def now_answered(self) -> None:
        """A server that answers may be believed when it refuses."""
        self.answered = True
        self.believe()

    def believe(self) -> None:
        """Writes refusals down, if the run has answers: a server that now refuses all is found out
        before they are many."""
        if self.refusals and self.standing.attempts.any():
            for event in self.refusals:
                self.write(event)
            self.refusals.clear()

    def refused(self, event: Event) -> None:
        """Writes a refusal down, if the server answers others. ValueError if it does not."""
        self.refusals.append(event)
        self.doubted += not self.answered
        if self.answered:
            self.believe()
        elif self.doubted >= REFUSALS:
            raise ValueError(f"{self.server.name} refuses every request: {event['refused']}")

    async def check(self, places: Sequence[int]) -> None:
        """Has answers that await it moderated, and writes down what comes of it."""
        events = [self.standing.unjudged[at][1] for at in places]
        judged = [self.standing.judged(event) for event in events]
        flagged = await self.moderated([text for x in judged for text in (x.edit, x.output)])
        for event, *of_texts in zip(events, flagged[::2], flagged[1::2], strict=True):
            place = {"caption": event["caption"], "attempt": event["attempt"]}
            self.write({**place, "flagged": sorted({*of_texts[0], *of_texts[1]})})

    async def settle(self, at: int, caption: str, url: str) -> None:
        """Asks about a caption until nothing more is to be asked, or leaves it as it is."""
        try:
            if self.moderation and not self.standing.attempts[at]:
                [flagged] = await self.moderated([caption])
                if flagged:
                    self.write({"caption": caption, "attempt": 0, "flagged": flagged})
            while self.standing.state[at] == OPEN:
                if at in self.standing.unjudged:
                    await self.check([at])
                else:
                    await self.ask(at, caption, url)
        except Left:
            return


def answer_event(caption: str, url: str, attempt: int, said: Said) -> Event:
    """The line of an answer."""
    place = {"caption": caption, "url": url} if url else {"caption": caption}
    return place | {
        "attempt": attempt,
        "answer": said.answer,
        "finish": said.finish,
        "tokens": list(said.tokens),
    }


async def ask_all(asker: Asker, captions: Iterator[tuple[int, str, str]], at_once: int) -> None:
    """Settles captions (position, text, url), twice as many at a time as requests go at once.

    So those that wait after a failure keep no others from being asked. Raises what ends the run:
    ServerError, StorageError, ValueError.
    """

    async def work() -> None:
        for caption in captions:  # all workers take from the same
            await asker.settle(*caption)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(2 * at_once):
                group.create_task(work())
    except* (ServerError, StorageError, ValueError) as errors:
        raise errors.exceptions[0] from None
    asker.believe()
    if asker.refusals:
        raise ValueError(f"{asker.server.name} refuses: {asker.refusals[0]['refused']}")
