# SPDX-License-Identifier: Apache-2.0
"""Where every caption stands, by all that was said of it: taken from answers.jsonl when a command
begins, and kept up with what is appended to it.

    {"run": "0c9f51e2"}               first of all: what the run's Idempotency-Keys begin with
    {"caption": "a cat", "url": "http://x/1.jpg", "attempt": 1, "answer": "{...}", "finish": "stop",
     "tokens": [310, 28]}             an answer as it came; tokens of the request and of the answer
    {"caption": "a cat", "attempt": 1, "refused": "..."}    the server will not take this request
    {"caption": "a cat", "attempt": 1, "flagged": []}       what moderation says of that answer
    {"caption": "a cat", "attempt": 0, "flagged": ["violence"]}             and of the caption
    {"batch": "5f3a", "captions": ["91d0...", ...]}         a batch is to be made, of these keys
    {"batch": "5f3a", "id": "batch_12"}                     the server has it
    {"batch": "5f3a", "ended": "completed"}                 all its answers are in this file
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from data_gen.caption_index import FIRST, CaptionIndex, key_of
from data_gen.event_log import Event, EventLog
from data_gen.triplet_filter import ATTEMPTS, Judgement, Limits, judge

OPEN, BATCHED, SETTLED = 0, 1, 2
"""To be asked (again); in a batch that is not collected; nothing more to be asked."""

ACCEPTED = ""

Taken = tuple[int, Event, Judgement]
"""Where a caption stands in its index, the line of its answer (or refusal), how it was judged."""


@dataclass
class Batch:
    """A batch that is not collected yet: the keys of its captions, and its id once there is one."""

    keys: list[int]
    id: str = ""


@dataclass
class Standing:
    """The state of every position of `index`.

    run: its name. attempts: answers so far. state: OPEN, BATCHED or SETTLED. accepted: where in the
    file of answers that one begins which is the triplet, or -1. unjudged: answers that await
    moderation, by position, with where they begin. batches: those not collected. strangers: how
    many lines are of captions that the index lacks.
    """

    index: CaptionIndex
    limits: Limits
    moderated: bool
    run: str = ""
    attempts: UInt8[np.ndarray, " n"] = field(init=False)
    state: UInt8[np.ndarray, " n"] = field(init=False)
    accepted: Int64[np.ndarray, " n"] = field(init=False)
    unjudged: dict[int, tuple[int, Event]] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    strangers: int = 0

    def __post_init__(self) -> None:
        n = len(self.index)
        self.attempts, self.state = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
        self.accepted = np.full(n, -1, np.int64)
        self.state[self.index.repeats != FIRST] = SETTLED

    def replay(self, answers: EventLog) -> Iterator[Taken]:
        """Takes all of a file, and yields what `take` returns where that is not None."""
        for begin, event in answers.events():
            taken = self.take(event, begin)
            if taken is not None:
                yield taken

    def take(self, event: Event, begin: int) -> Taken | None:
        """Takes a line of the file that begins at `begin`.

        Returns the position, the line and the judgement if it decides on an answer or a caption:
        an answer that moderation has yet to see is decided on by the line that says what it saw.
        """
        if "run" in event:
            self.run = event["run"]
            return None
        if "batch" in event:
            self.take_batch(event)
            return None
        at = self.index.find(key_of(event["caption"]))
        if at is None:
            self.strangers += 1
            return None
        if "flagged" in event:
            return self.take_flags(at, event)
        if self.state[at] == SETTLED or event["attempt"] <= self.attempts[at]:
            return None  # said twice
        self.attempts[at] = event["attempt"]
        self.unjudged.pop(at, None)  # an earlier one, rejected when this one was asked for
        if "refused" in event:
            self.state[at] = SETTLED
            return at, event, Judgement("", "", "refused")
        judgement = self.judged(event)
        if judgement.reason == ACCEPTED and self.moderated:
            self.unjudged[at] = begin, event
            return None
        return self.decide(at, event, begin, judgement)

    def judged(self, event: Event) -> Judgement:
        """Judges the line of an answer by everything but moderation."""
        return judge(event["caption"], event["answer"], event["finish"], self.limits)

    def take_flags(self, at: int, event: Event) -> Taken | None:
        """Takes what moderation says of a caption (attempt 0) or of its answer."""
        if event["attempt"] == 0:
            self.state[at] = SETTLED
            return at, event, Judgement("", "", "caption_flagged")
        if at not in self.unjudged or event["attempt"] != self.attempts[at]:
            return None
        begin, answered = self.unjudged.pop(at)
        judgement = self.judged(answered)
        if event["flagged"]:
            judgement = judgement._replace(reason="flagged")
        return self.decide(at, answered, begin, judgement)

    def decide(self, at: int, event: Event, begin: int, judgement: Judgement) -> Taken:
        """Settles a caption if its answer is accepted, or was the last one."""
        if judgement.reason == ACCEPTED:
            self.accepted[at] = begin
        if judgement.reason == ACCEPTED or self.attempts[at] >= ATTEMPTS:
            self.state[at] = SETTLED
        return at, event, judgement

    def take_batch(self, event: Event) -> None:
        """Takes a line about a batch."""
        name = event["batch"]
        if "captions" in event:
            self.batches[name] = Batch([int(key, 16) for key in event["captions"]])
            self.mark(self.batches[name], OPEN, BATCHED)
        elif "id" in event:
            self.batches[name].id = event["id"]
        elif name in self.batches:
            self.mark(self.batches.pop(name), BATCHED, OPEN)

    def mark(self, batch: Batch, old: int, new: int) -> None:
        """Moves the captions of a batch from one state to another, but settled ones."""
        for key in batch.keys:
            at = self.index.find(key)
            if at is not None and self.state[at] == old:
                self.state[at] = new

    def open(self) -> Bool[np.ndarray, " n"]:
        """The captions that are to be asked now; it does not change when they do."""
        return self.state == OPEN


def counts(standing: Standing) -> dict[str, Any]:
    """How many captions stand how."""
    first = standing.index.repeats == FIRST
    accepted = int((standing.accepted >= 0).sum())
    settled = int((first & (standing.state == SETTLED)).sum())
    return {
        "captions": len(standing.index),
        "repeated": int((~first).sum()),
        "open": int((standing.state == OPEN).sum()),
        "batched": int((standing.state == BATCHED).sum()),
        "accepted": accepted,
        "given up": settled - accepted,
    }
