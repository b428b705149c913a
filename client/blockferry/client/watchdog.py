"""Ends work that makes no progress: nothing may hang for ever, and nobody may wait for it without knowing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import TypeVar

from blockferry.common.errors import BlockferryError, Code

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""How long work that was cancelled may take to end. A call into a disk that stands still cannot be interrupted: it is
left behind."""

_left_behind: set[asyncio.Task[object]] = set()


async def watched(
    work: Coroutine[object, object, T],
    look: Callable[[], object],
    seconds: float,
    volume: str,
    phase: Callable[[], str],
) -> T:
    """Finish `work`. It is cancelled, and UNAVAILABLE is raised, where what `look` returns has been the same for
    `seconds`; `phase` says what it was doing then."""
    task = asyncio.create_task(work)
    seen, since = look(), time.monotonic()
    try:
        while not task.done():
            await asyncio.wait([task], timeout=min(seconds / 4, 1.0))
            now = look()
            if now != seen:
                seen, since = now, time.monotonic()
            elif not task.done() and time.monotonic() - since >= seconds:
                raise BlockferryError(
                    Code.UNAVAILABLE,
                    f"{volume} makes no progress",
                    cause=f"nothing has moved for {seconds:g} s in phase {phase()}",
                    next="look at the disks of both sites and at the network; it is tried again",
                    volume=volume,
                )
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            _left_behind.add(task)
            task.add_done_callback(_left_behind.discard)
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait([task], timeout=GRACE_SECONDS)
