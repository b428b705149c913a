"""Locks on ranges of blocks: whoever writes to the primary, guest or write-through, is alone there meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class _Claim:
    """A range somebody holds or waits for."""

    __slots__ = ("first", "over", "stop")

    def __init__(self, first: int, stop: int) -> None:
        self.first = first
        self.stop = stop
        self.over = asyncio.Event()


class RangeLocks:
    """Exclusive locks on [first, stop). They are granted in the order they were asked for where they overlap, so that
    nobody waits for ever, and whoever holds one and asks for no second never deadlocks."""

    def __init__(self) -> None:
        self._claims: dict[_Claim, None] = {}

    @contextlib.asynccontextmanager
    async def holding(self, first: int, stop: int) -> AsyncIterator[None]:
        """Hold a range."""
        ahead = [one for one in self._claims if one.first < stop and first < one.stop]
        mine = _Claim(first, stop)
        self._claims[mine] = None
        try:
            for one in ahead:
                await one.over.wait()
            yield
        finally:
            del self._claims[mine]
            mine.over.set()
