# SPDX-License-Identifier: Apache-2.0
"""The same questions by the Batch API: half the price, an answer within a day.

A batch is written down before it is created, under a name that the server keeps too: whenever a
process is killed, the next one finds every batch that it has created and creates none twice.
"""

import asyncio
import itertools
import json
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np

from data_gen.asking import Asker, Left, answer_event
from data_gen.caption_index import key_of
from data_gen.pace import ServerError
from data_gen.server import Fault, Refused, said
from data_gen.standing import BATCHED, OPEN, Batch

MAX_BYTES = 200_000_000
"""Of the file of a batch, as the API has it."""

OPEN_BATCHES = 8
"""Batches on the server at once; fewer if it says that they hold too many tokens."""

FAILURES = 3
"""Batches in a row that end without an answer until the run ends."""

TOGETHER = 16
"""Answers, of two texts, or captions in one request for moderation."""

MODERATED = 1024
"""Answers or captions that are read before they are moderated."""

QUEUE_FULL = "token_limit_exceeded"
ENDED = ("completed", "expired", "cancelled", "failed")


class Output(NamedTuple):
    """What a line of a batch's output says: of which caption and attempt, a status and a body."""

    key: int
    attempt: int
    status: int | None
    body: Any


@dataclass
class BatchRun:
    """Keeps `asker`'s captions in batches of at most `size` requests; looks every `poll` seconds.

    said: is called with a line of text on what goes on. room: batches at once. failures: batches
    in a row without an answer.
    """

    asker: Asker
    size: int
    poll: float
    said: Callable[[str], None]
    room: int = OPEN_BATCHES
    failures: int = 0

    async def run(self) -> None:
        """Collects and creates batches until every caption is settled.

        Raises ServerError, StorageError, or ValueError where the server refuses.
        """
        try:
            await self.run_batches()
        except Left:
            raise ServerError(f"{self.asker.server.name} fails again and again") from None
        except Refused as error:
            raise ValueError(f"{self.asker.server.name} refuses: {error}") from None

    async def run_batches(self) -> None:
        batches = self.asker.standing.batches
        await self.check_waiting()
        for name in [name for name, batch in batches.items() if not batch.id]:
            await self.create(name)
        least = 1
        while True:
            while len(batches) < self.room and await self.plan(least):
                pass
            if not batches:
                return
            least = self.size  # what is left of ended batches waits until it makes another
            ended = [await self.look(name, batch.id) for name, batch in list(batches.items())]
            if not batches:
                least = 1
            elif not any(ended):
                await asyncio.sleep(self.poll)

    async def check_waiting(self) -> None:
        """Has all answers moderated that await it."""
        waiting = list(self.asker.standing.unjudged)
        groups = [waiting[i : i + TOGETHER] for i in range(0, len(waiting), TOGETHER)]
        await asyncio.gather(*(self.asker.check(group) for group in groups))

    async def plan(self, least: int) -> bool:
        """Puts captions that are open into another batch, if there are at least so many; says
        whether it did."""
        keys, size = [], 0
        if np.count_nonzero(self.asker.standing.state == OPEN) < least:
            return False
        captions = self.open_captions()
        while len(keys) < self.size and size < MAX_BYTES:
            some = list(itertools.islice(captions, min(MODERATED, self.size - len(keys))))
            if not some:
                break
            for at, caption in await self.unflagged(some):
                size += len(self.line(at, caption))
                if size <= MAX_BYTES:
                    keys.append(key_of(caption))
        if not keys:
            return False
        name = secrets.token_hex(8)
        self.asker.write({"batch": name, "captions": [f"{key:016x}" for key in keys]})
        await self.create(name)
        return True

    def open_captions(self) -> Iterator[tuple[int, str]]:
        """Those that can be asked now."""
        standing = self.asker.standing
        for at, caption, _ in standing.index.read(standing.state == OPEN):
            yield at, caption

    async def unflagged(self, captions: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """Those that moderation has nothing against; the others are written down."""
        asker = self.asker
        if asker.moderation is None:
            return list(captions)
        new = [caption for at, caption in captions if not asker.standing.attempts[at]]
        groups = [new[i : i + TOGETHER] for i in range(0, len(new), TOGETHER)]
        for group, flags in zip(
            groups, await asyncio.gather(*map(asker.moderated, groups)), strict=True
        ):
            for caption, flagged in zip(group, flags, strict=True):
                if flagged:
                    asker.write({"caption": caption, "attempt": 0, "flagged": flagged})
        return [(at, caption) for at, caption in captions if asker.standing.state[at] == OPEN]

    def line(self, at: int, caption: str) -> bytes:
        """A request as a batch's file has it."""
        attempt = int(self.asker.standing.attempts[at]) + 1
        request = {
            "custom_id": f"{key_of(caption):016x}-{attempt}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": self.asker.question.body(caption, attempt),
        }
        return json.dumps(request, ensure_ascii=False).encode() + b"\n"

    def temporary(self) -> IO[bytes]:
        """A file without a name in the folder of the run."""
        return tempfile.TemporaryFile(dir=self.asker.answers.path.parent)

    def texts(self, batch: Batch) -> dict[int, tuple[int, str, str]]:
        """Position, caption and url of the captions of a batch that are not settled, by key."""
        standing = self.asker.standing
        wanted = np.zeros(len(standing.index), bool)
        wanted[[at for key in batch.keys if (at := standing.index.find(key)) is not None]] = True
        wanted &= standing.state == BATCHED
        return {key_of(place[1]): place for place in standing.index.read(wanted)}

    async def create(self, name: str) -> None:
        """Creates a batch that is written down, unless the server has it; then writes its id."""
        asker, server, pace = self.asker, self.asker.server, self.asker.pace
        asker.answers.sync()
        id = await asker.patiently(lambda: server.find_batch(name), pace)
        if id is None:
            with self.temporary() as file:
                for at, caption, _ in self.texts(asker.standing.batches[name]).values():
                    file.write(self.line(at, caption))
                uploaded = await asker.patiently(lambda: server.upload(file, f"{name}.jsonl"), pace)

            async def found_or_created() -> str:
                """Created once, also if the answer to that was lost."""
                return await server.find_batch(name) or await server.create_batch(uploaded, name)

            id = await asker.patiently(found_or_created, pace)
        asker.write({"batch": name, "id": id})
        self.said(f"{id} created")

    async def look(self, name: str, id: str) -> bool:
        """Looks how a batch is, and collects it if it has ended; says whether it has."""
        asker, server = self.asker, self.asker.server
        values = await asker.patiently(lambda: server.batch(id), asker.pace)
        status, counts = values["status"], values.get("request_counts") or {}
        done = f"{counts.get('completed', 0)} of {counts.get('total', '?')} answered"
        self.said(f"{id} {status}, {done}")
        if status not in ENDED:
            return False
        answered = 0
        texts = self.texts(asker.standing.batches[name])
        for file in (values.get("output_file_id"), values.get("error_file_id")):
            if file:
                answered += await self.collect(file, texts)
        asker.believe()
        asker.write({"batch": name, "ended": status})
        asker.answers.sync()
        self.consider(id, answered, (values.get("errors") or {}).get("data") or [])
        return True

    async def collect(self, file: str, texts: dict[int, tuple[int, str, str]]) -> int:
        """Writes down what a file of a batch says of captions; returns how many were answered.

        What was written down before the process was killed is passed over. Lines that are not what
        the API says are no answers, and are told of on stderr.
        """
        asker, answered, broken = self.asker, 0, []
        with self.temporary() as content:
            await asker.patiently(lambda: asker.server.download(file, content), asker.pace)
            content.seek(0)
            for number, line in enumerate(content, 1):
                if (output := read_output(line)) is None:
                    broken.append(number)
                else:
                    answered += self.take(output, texts)
                if number % MODERATED == 0:
                    await self.check_waiting()
        await self.check_waiting()
        if broken:
            print(
                f"{file}: {len(broken)} lines are no answers of a batch, the first is line "
                f"{broken[0]}; what they should answer is asked again",
                file=sys.stderr,
            )
        return answered

    def take(self, output: Output, texts: dict[int, tuple[int, str, str]]) -> bool:
        """Takes a line of output; says whether it is an answer. What failed is asked again."""
        at, caption, url = texts.get(output.key, (-1, "", ""))
        new = at >= 0 and output.attempt == self.asker.standing.attempts[at] + 1
        if new and output.status in (400, 413, 422):
            text = json.dumps(output.body, ensure_ascii=False)
            self.asker.refused({"caption": caption, "attempt": output.attempt, "refused": text})
        if output.status != 200:
            return False
        try:
            answer = said(output.body)
        except Fault:
            return False
        if new:
            self.asker.write(answer_event(caption, url, output.attempt, answer))
            self.asker.now_answered()
        return True

    def consider(self, id: str, answered: int, errors: Sequence[dict[str, Any]]) -> None:
        """Ends the run if batches come to nothing; has fewer at once if they are too much."""
        open_batches = len(self.asker.standing.batches)
        if answered:
            self.failures = 0
        elif open_batches and any(error.get("code") == QUEUE_FULL for error in errors):
            self.room = open_batches
        else:
            self.failures += 1
            if self.failures >= FAILURES:
                said = "; ".join(str(error.get("message")) for error in errors[:3])
                raise ServerError(f"{self.failures} batches came to nothing, at last {id}: {said}")


def read_output(line: bytes) -> Output | None:
    """Reads a line of a batch's output; None if it is not what the API says."""
    try:
        result = json.loads(line)
        key, attempt = result["custom_id"].split("-")
        response = result.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        return Output(int(key, 16), int(attempt), status, body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
