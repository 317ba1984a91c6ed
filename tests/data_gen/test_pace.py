# SPDX-License-Identifier: Apache-2.0
"""Claims: no more requests are under way than the pace allows; a busy server gets fewer, and none
before the time that it asks for; back-off doubles, with jitter, up to half a minute.
"""

import asyncio
import time

from data_gen.pace import CUT, LONGEST, Pace, back_off


def test_never_more_than_allowed_and_nobody_is_forgotten():
    async def run(pace: Pace) -> list[int]:
        seen = []

        async def request() -> None:
            async with pace.turn():
                seen.append(pace.under_way)
                await asyncio.sleep(0.001)
            pace.answered()

        await asyncio.gather(*(request() for _ in range(50)))
        return seen

    pace = Pace(4)
    seen = asyncio.run(run(pace))
    assert len(seen) == 50 and max(seen) == 4 and pace.under_way == 0


def test_a_round_of_failures_cuts_once_and_answers_bring_it_back():
    pace, went = Pace(64), time.monotonic()
    for _ in range(64):
        pace.busy(went, None)
    assert pace.limit == 64 * CUT
    pace.busy(time.monotonic(), None)
    assert pace.limit == 64 * CUT * CUT
    for _ in range(10_000):
        pace.answered()
    assert pace.limit == 64
    for _ in range(100):
        pace.busy(time.monotonic(), None)
    assert pace.limit == 1


def test_nothing_goes_before_the_server_wants_it():
    async def run() -> float:
        pace = Pace(2)
        pace.busy(time.monotonic(), 0.1)
        pace.busy(time.monotonic(), None)  # does not shorten it
        began = time.monotonic()
        async with pace.turn() as went:
            return went - began

    assert asyncio.run(run()) >= 0.09


def test_a_request_that_is_cancelled_makes_room():
    async def run() -> list[int]:
        pace, went = Pace(1), []

        async def request(number: int) -> None:
            async with pace.turn():
                went.append(number)
                await asyncio.sleep(60 if number < 2 else 0)

        requests = [asyncio.create_task(request(number)) for number in range(4)]
        await asyncio.sleep(0)
        requests[1].cancel()  # it waits
        requests[0].cancel()  # it is under way
        await asyncio.wait(requests, timeout=5)
        return went

    assert asyncio.run(run()) == [0, 2, 3]


def test_back_off_doubles_with_jitter():
    for failures, most in ((1, 0.5), (2, 1.0), (4, 4.0), (30, LONGEST)):
        waits = [back_off(0.5, failures) for _ in range(200)]
        assert most / 2 <= min(waits) < max(waits) <= most
        assert max(waits) - min(waits) > most / 4
