"""Bounds on what is in flight: bytes, buffers and bandwidth.

Bounds are in bytes, never in counts: a message may carry 4 KiB or 16 MiB.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Sequence


class ByteBudget:
    """Lets at most `limit` bytes be in flight. Waiters are served in order, so a large one is never starved.

    A request larger than the whole budget is granted when nothing else is in flight.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.most = 0
        """The largest value `used` ever had."""
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    async def acquire(self, amount: int) -> None:
        """Wait until `amount` more bytes may be in flight."""
        if not self._waiting and self._fits(amount):
            self._take(amount)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # Even one that was not granted may have kept others waiting that fit.
            self.release(amount if turn.done() and not turn.cancelled() else 0)
            raise

    def release(self, amount: int) -> None:
        """Give back what `acquire` granted."""
        self.used -= amount
        while self._waiting:
            wanted, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif self._fits(wanted):
                self._waiting.popleft()
                self._take(wanted)
                turn.set_result(None)
            else:
                return

    def _fits(self, amount: int) -> bool:
        return self.used == 0 or self.used + amount <= self.limit

    def _take(self, amount: int) -> None:
        self.used += amount
        self.most = max(self.most, self.used)


class Share:
    """A part of a budget: at most `limit` of its bytes, for whoever must leave some to others."""

    def __init__(self, whole: ByteBudget, limit: int) -> None:
        self._whole = whole
        self._own = ByteBudget(min(limit, whole.limit))

    @property
    def limit(self) -> int:
        """Bytes that may be in flight at most."""
        return self._own.limit

    @property
    def used(self) -> int:
        """Bytes in flight, or waiting for those of others to leave."""
        return self._own.used

    async def acquire(self, amount: int) -> None:
        """Wait until `amount` more bytes may be in flight. Waiting for the share is in nobody else's way."""
        await self._own.acquire(amount)
        try:
            await self._whole.acquire(amount)
        except asyncio.CancelledError:
            self._own.release(amount)
            raise

    def release(self, amount: int) -> None:
        """Give back what `acquire` granted."""
        self._whole.release(amount)
        self._own.release(amount)


class BufferPool:
    """Hands out at most `limit` bytes of reusable buffers of `size` bytes each, always at least one buffer.

    Reuse matters: glibc gives large freed buffers back to the kernel, and the page faults of fresh ones become the
    largest cost of a copy.
    """

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        self._left = max(limit // size, 1)
        self._free: list[bytearray] = []
        self._slots = asyncio.Semaphore(self._left)

    async def acquire(self) -> bytearray:
        """Wait for a buffer. Its content is whatever its last user left."""
        await self._slots.acquire()
        return self._free.pop() if self._free else bytearray(self.size)

    def release(self, buffer: bytearray) -> None:
        """Give a buffer back; nobody may look at it any more."""
        self._free.append(buffer)
        self._slots.release()


class RateLimiter:
    """Spreads bytes over time: on average at most `rate` bytes per second, with bursts of at most a fifth of a second's
    worth. `rate` 0 means no limit. The rate may be changed at any time."""

    BURST_SECONDS = 0.2

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._free_at = clock()

    def delay(self, amount: int) -> float:
        """Account for `amount` bytes and return the seconds to wait before sending them."""
        if self.rate <= 0:
            return 0.0
        now = self._clock()
        start = max(self._free_at, now - self.BURST_SECONDS)
        self._free_at = start + amount / self.rate
        return max(0.0, self._free_at - now)

    async def acquire(self, amount: int) -> None:
        """Wait until `amount` bytes may be sent."""
        delay = self.delay(amount)
        if delay > 0:
            await asyncio.sleep(delay)


class AllOf:
    """Several limits that hold together: what is sent counts for each of them. Some may be shared with others."""

    def __init__(self, limiters: Sequence[RateLimiter]) -> None:
        self._limiters = tuple(limiters)

    @property
    def rate(self) -> int:
        """The lowest of their rates, in bytes per second; 0 for no limit."""
        return min((one.rate for one in self._limiters if one.rate), default=0)

    async def acquire(self, amount: int) -> None:
        """Wait until `amount` bytes may be sent by all of them."""
        delay = max((one.delay(amount) for one in self._limiters), default=0.0)
        if delay > 0:
            await asyncio.sleep(delay)
