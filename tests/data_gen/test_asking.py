# SPDX-License-Identifier: Apache-2.0
"""Claims: failures are repeated until the server answers, or a caption is left for later; refusals
are believed of a server that answers; a limit on requests a second is found and kept to.
"""

import asyncio
import time
from itertools import islice

import pytest

from data_gen import asking
from data_gen.asking import REFUSALS, Asker, Left, Moderation, ask_all
from data_gen.caption_index import CaptionIndex
from data_gen.event_log import EventLog
from data_gen.pace import Pace, ServerError
from data_gen.prompt import SAMPLING, Question
from data_gen.server import Fault, Refused, Said, Server
from data_gen.standing import OPEN, SETTLED, Standing
from data_gen.triplet_filter import Limits
from tests.data_gen.triplet_cases import captions, lines, write_captions
from tests.openai_server import KEY, serve

LIMITS = Limits()
GOOD = Said('{"edit": "make it winter", "output": "snow"}', "stop", (1, 1))


class Scripted(Server):
    """A server that answers from a list; a caption's own comes first."""

    def __init__(self, script, flagged=()):
        self.script, self.flagged, self.asked, self.name = list(script), flagged, [], "the server"

    async def chat(self, body, once):
        self.asked.append(once)
        await asyncio.sleep(0)
        said = self.script.pop(0) if self.script else GOOD
        if isinstance(said, Exception):
            raise said
        return said

    async def moderate(self, model, texts):
        return [["violence"] if text in self.flagged else [] for text in texts]

    async def close(self):
        pass


@pytest.fixture
def asker(tmp_path):
    """Makes an asker about some captions, which waits no longer than it has to."""
    logs = []

    def make(
        server, count: int = 1, moderated: bool = False, pace: int = 4, limits: Limits = LIMITS
    ) -> Asker:
        while logs:
            logs.pop().close()
        path = write_captions(tmp_path / "captions.jsonl", captions(count))
        standing = Standing(CaptionIndex.open([path]), limits, moderated, run="run")
        logs.append(EventLog(tmp_path / "answers.jsonl"))
        moderation = Moderation(server, "m", Pace(4)) if moderated else None
        question = Question("m", SAMPLING)
        return Asker(question, server, Pace(pace), moderation, logs[-1], standing, first=1e-4)

    yield make
    for log in logs:
        log.close()


async def settled(asker: Asker, at_once: int = 4) -> None:
    await ask_all(asker, asker.standing.index.read(asker.standing.state == OPEN), at_once)


def run(asker: Asker, at_once: int = 4) -> Asker:
    asyncio.run(settled(asker, at_once))
    return asker


def test_what_fails_is_repeated_under_the_same_name(asker):
    server = Scripted([Fault("500"), Fault("429", limited=True), Fault("late", busy=True)])
    done = run(asker(server))
    assert len(server.asked) == 4 and len(set(server.asked)) == 1
    assert done.standing.state.tolist() == [SETTLED] and done.pace.limit < 4


def test_another_attempt_has_another_name_and_the_fourth_is_the_last(asker):
    server = Scripted([Said("no", "stop", (1, 1))] * 9)
    done = run(asker(server))
    assert len(server.asked) == len(set(server.asked)) == 4
    assert done.standing.accepted.tolist() == [-1] and done.standing.state.tolist() == [SETTLED]


def test_a_caption_that_always_fails_is_left_if_others_are_answered(asker, monkeypatch):
    """Nothing of it is written, so the next start asks again."""
    monkeypatch.setattr(asking, "TRIES", 3)

    class One(Scripted):
        async def chat(self, body, once):
            if body["messages"][-1]["content"] == captions(1)[0]:
                await asyncio.sleep(0.01)
                self.heard()
                raise Fault("500")
            return await super().chat(body, once)

    server = One([])
    made = asker(server, 20)
    server.heard = lambda: setattr(made, "heard", time.monotonic())
    done = run(made)
    assert done.standing.state.tolist() == [OPEN] + [SETTLED] * 19
    assert len(lines(done.answers.path.parent)) == 19


def test_a_server_that_never_answers_ends_the_run(asker, monkeypatch):
    monkeypatch.setattr(asking, "TRIES", 3)
    with pytest.raises(ServerError, match="the server does not answer \\(500\\)"):
        run(asker(Scripted([Fault("500")] * 99)))


def test_too_many_requests_are_no_failure(asker, monkeypatch):
    monkeypatch.setattr(asking, "TRIES", 3)
    done = run(asker(Scripted([Fault("429", limited=True)] * 9)))
    assert done.standing.state.tolist() == [SETTLED]


def test_refusals_are_believed_once_there_is_an_answer(asker):
    done = run(asker(Scripted([Refused("400, bad words")] * 3, ()), 6))
    assert done.standing.state.tolist() == [SETTLED] * 6
    refused = [line for line in lines(done.answers.path.parent) if "refused" in line]
    assert len(refused) == 3 and refused[0]["refused"] == "400, bad words"


@pytest.mark.parametrize("count", [3, REFUSALS + 5])
def test_a_server_that_refuses_everything_ends_the_run(asker, count):
    made = asker(Scripted([Refused("400, no such field")] * 99), count)
    with pytest.raises(ValueError, match="the server refuses.*: 400, no such field"):
        run(made)
    assert lines(made.answers.path.parent) == []


@pytest.mark.parametrize("count", [REFUSALS - 1, REFUSALS + 5])
def test_refusals_after_a_new_start_are_believed_of_a_few_captions_only(asker, count):
    """The server may be another one now, and refuse whatever it is asked; a few that are left may
    be those that any server refuses."""
    answered = asker(Scripted([]), 1)
    run(answered)
    made = asker(Scripted([Refused("400, no such field")] * 99), 1 + count)
    assert len(list(made.standing.replay(made.answers))) == 1
    if count < REFUSALS:
        run(made)
        assert (made.standing.state == SETTLED).all()
    else:
        with pytest.raises(ValueError, match="the server refuses every request: 400"):
            run(made)
    assert len(lines(made.answers.path.parent)) == 1 + count * (count < REFUSALS)


def test_who_does_not_answer_is_named(asker, monkeypatch):
    """The server for moderation may be another one."""
    monkeypatch.setattr(asking, "TRIES", 2)

    class Silent(Scripted):
        async def moderate(self, model, texts):
            raise Fault("500")

    made, silent = asker(Scripted([]), moderated=True), Silent([])
    silent.name = "the moderator"
    made.moderation = Moderation(silent, "m", Pace(4))
    with pytest.raises(ServerError, match="^the moderator does not answer"):
        run(made)


def test_moderation_of_caption_and_answer(asker):
    texts = captions(3)
    server = Scripted([], flagged=(texts[1], "snow"))
    done = run(asker(server, 3, moderated=True))
    written = lines(done.answers.path.parent)
    assert {"caption": texts[1], "attempt": 0, "flagged": ["violence"]} in written
    assert len(server.asked) == 8, "four attempts for each of the others"
    assert done.standing.accepted.tolist() == [-1] * 3


def test_an_answer_that_was_not_moderated_is_not_asked_for_again(asker):
    class Dying(Scripted):
        async def moderate(self, model, texts):
            if len(texts) == 2:
                raise Left
            return await super().moderate(model, texts)

    first = run(asker(Dying([]), 2, moderated=True))
    assert len(first.standing.unjudged) == 2 and len(lines(first.answers.path.parent)) == 2
    server = Scripted([])
    second = asker(server, 2, moderated=True)
    assert list(second.standing.replay(second.answers)) == []
    run(second)
    assert server.asked == [] and (second.standing.accepted >= 0).all()


def test_limits_may_be_loosened_in_a_moderated_run(asker):
    """An answer that was too long once, and is not now, is not moderated when another was asked
    for since: that one counts."""
    bad = Said("no", "stop", (1, 1))

    class Stopping(Scripted):
        async def chat(self, body, once):
            if not self.script:
                raise Left
            return await super().chat(body, once)

    strict = asker(Stopping([GOOD, bad]), moderated=True, limits=Limits(output=(5, 500)))
    run(strict)
    assert strict.standing.attempts.tolist() == [2] and strict.standing.state.tolist() == [OPEN]
    loose = asker(Scripted([]), moderated=True)
    assert [taken[2].reason for taken in loose.standing.replay(loose.answers)] == ["not_json"]
    assert not loose.standing.unjudged
    run(loose)
    assert [line.get("attempt") for line in lines(loose.answers.path.parent)] == [1, 2, 3, 3]
    assert (loose.standing.accepted >= 0).all()


def test_a_limit_on_requests_a_second_is_found_and_kept_to(tmp_path, asker):
    """64 at once are far too fast for 60 a second; when that is known, little is sent in vain."""
    with serve(tmp_path, per_second=60.0, latency=0.2) as served:
        made = asker(Server(served.url, KEY, 5.0), 160, pace=64)

        def asked() -> int:
            return served.stats()["requests"]["POST /v1/chat/completions"]

        async def ask() -> int:
            open_ones = made.standing.index.read(made.standing.state == OPEN)
            await ask_all(made, islice(open_ones, 100), 64)
            known = asked()
            await ask_all(made, open_ones, 64)
            await made.server.close()
            return asked() - known

        assert asyncio.run(ask()) < 90, "for 60 answers"
        assert (made.standing.accepted >= 0).all() and made.pace.limit < 32
