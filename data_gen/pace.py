# SPDX-License-Identifier: Apache-2.0
"""How many requests are under way at once, and how long one waits that failed.

As TCP does it (additive increase, multiplicative decrease): a server that is too busy gets three
quarters as many at once, and one more again after as many answers as go at once.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CUT = 0.75
LONGEST = 30.0
"""Seconds between two tries at most, but where the server asks for more."""


class ServerError(Exception):
    """A server that does not work; the same command goes on when it does."""


class Pace:
    """Lets at most `most` requests go at once, fewer while the server is busy."""

    def __init__(self, most: int) -> None:
        self.most, self.limit = most, float(most)
        self.under_way = 0
        self.not_before = self.cut = 0.0  # seconds of time.monotonic
        self.waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Waits until a request may go; yields when it went. The block is the request."""
        while (wait := self.not_before - time.monotonic()) > 0 or self.under_way >= int(self.limit):
            if wait > 0:
                await asyncio.sleep(wait * random.uniform(1.0, 1.1))
            else:
                place = asyncio.get_running_loop().create_future()
                self.waiting.append(place)
                await place
        self.under_way += 1
        try:
            yield time.monotonic()
        finally:
            self.under_way -= 1
            self.let_go()

    def let_go(self) -> None:
        """Wakes as many of those that wait as there is room for."""
        room = int(self.limit) - self.under_way
        while self.waiting and room > 0:
            place = self.waiting.popleft()
            if not place.done():  # else it was cancelled
                place.set_result(None)
                room -= 1

    def answered(self) -> None:
        """One more at once, after as many answers as go at once."""
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def busy(self, went: float, wait: float | None) -> None:
        """The server was too busy for a request that `went` then, and asks for `wait` seconds.

        What went before the last cut says nothing about the pace since.
        """
        now = time.monotonic()
        if went >= self.cut:
            self.limit, self.cut = max(1.0, self.limit * CUT), now
        self.not_before = max(self.not_before, now + (wait or 0.0))


def back_off(first: float, failures: int) -> float:
    """Seconds to wait after so many failures: about `first`, then twice as long each time."""
    return min(LONGEST, first * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
