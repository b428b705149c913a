"""Scrubs on a schedule: the newest generation of each replica is re-read when that was last done too long ago.

One replica at a time and at a bounded rate, so that sources do not notice. How old a scrub is comes from its file and
the wall clock, so it survives restarts; one from the future (the clock was set back) counts from when that is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import structlog
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import RateLimiter
from blockferry.common.volumes import in_thread
from blockferry.server.pools import Pools
from blockferry.server.replica import Replica
from blockferry.server.scrub import ScrubRecord, last_scrub, now_us, record_scrub, verify_point

log = structlog.get_logger("blockferry.scrub")

SCRUB_RATE = 64 * 1024 * 1024
"""Bytes per second: less than half of what a single hard disk reads in order, and 5 TiB a day."""

LOOK_SECONDS = 60.0
"""Seconds between two looks at what is due, at most."""
LOOKS_PER_PERIOD = 10
"""A scrub is late by no more than this part of its period, where that is shorter."""


def is_due(at_us: int | None, now: int, every_seconds: int) -> bool:
    """Whether what was last scrubbed at `at_us` (None: never) is to be scrubbed `now`, both in microseconds."""
    return at_us is None or now - at_us >= every_seconds * 1_000_000


class Scrubber:
    """Scrubs the replicas of all pools whose last scrub is older than `every` seconds."""

    def __init__(self, pools: Pools, every: int) -> None:
        self._pools = pools
        self._every = every
        self._limiter = RateLimiter(SCRUB_RATE)

    async def run(self) -> None:
        """For ever, or until it is cancelled."""
        while True:
            try:
                await self.round()
            except Exception as error:
                # Nobody waits for it: it must be heard of, and the next round goes on.
                log.error("scrubbing was interrupted", error=repr(error))
            await asyncio.sleep(min(LOOK_SECONDS, self._every / LOOKS_PER_PERIOD))

    async def round(self) -> None:
        """Scrub what is due now, one replica after the other."""
        for replica in self._pools.list():
            if await self._is_due(replica):
                await self._scrub(replica)

    async def _is_due(self, replica: Replica) -> bool:
        generations = replica.store.generations
        handed_out = replica.store.content.in_place and generations.promoted is not None
        if generations.newest is None or handed_out:
            return False
        last, now = await in_thread(last_scrub, replica.store), now_us()
        if last is not None and last.at_us > now:
            # By the clock it would not be due for as long as the clock was ahead.
            await in_thread(record_scrub, replica.store, msgspec.structs.replace(last, at_us=now))
            return False
        return is_due(last.at_us if last is not None else None, now, self._every)

    async def _scrub(self, replica: Replica) -> None:
        newest = replica.store.generations.newest
        try:
            done = 0
            async with contextlib.aclosing(verify_point(replica, 0)) as found:
                async for part in found:
                    await self._limiter.acquire(part.bytes_done - done)
                    done = part.bytes_done
        except (BlockferryError, OSError) as error:
            if isinstance(error, BlockferryError):
                if error.code is Code.NOT_FOUND and (
                    replica.session is not None or replica.store.generations.newest != newest
                ):
                    # It is being overwritten in place, or is not the newest any more.
                    return
                error.volume = replica.name
            # As old as a finished one: what cannot be read is not tried again and again.
            log.error("cannot scrub", volume=replica.name, error=str(error))
            if newest is not None:
                record = ScrubRecord(now_us(), newest.number, problem=str(error))
                await in_thread(record_scrub, replica.store, record)
