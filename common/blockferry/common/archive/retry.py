"""Asking a store again: what is transient is tried again with growing pauses, and in the end reported.

Amazon, Google and Microsoft all ask clients to back off exponentially with jitter after 429, 500, 503 and time-outs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from blockferry.common.archive.store import Entry, Exists, ObjectStore, Transient
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How often and how long. Seconds."""

    attempts: int = 8
    first_attempts: int = 3
    """Until the store has answered once: a wrong endpoint should be told soon."""
    pause: float = 0.25
    most: float = 8.0
    """With eight attempts about half a minute, which is what a throttling store takes to make room."""


class Retrying(ObjectStore):
    """A store that asks another one until it answers."""

    def __init__(self, store: ObjectStore, patience: Patience | None = None) -> None:
        self.uri = store.uri
        self.conditional = store.conditional
        self.notice = store.notice
        self._store = store
        self.patience = patience or Patience()
        self.answered = False
        """Whether the store has answered anything at all."""
        self.retries = 0
        """Requests that had to be made again."""

    async def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        tries = _Tries(self)
        while True:
            try:
                found = await request()
            except Transient as error:
                await tries.failed(error)
            except BlockferryError:
                self.answered = True
                raise
            else:
                self.answered = True
                return found

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        unanswered = False

        async def attempt() -> None:
            nonlocal unanswered
            try:
                await self._store.put_new(key, parts)
            except Transient:
                unanswered = True
                raise
            except Exists:
                # The request whose answer was lost may have made it: then it has our bytes. They carry a random
                # attempt, so that nobody else's can be the same.
                if not (unanswered and await self._ask(lambda: self._store.get(key)) == b"".join(parts)):
                    raise

        await self._ask(attempt)

    async def put(self, key: str, data: Data) -> None:
        await self._ask(lambda: self._store.put(key, data))

    async def get(self, key: str) -> bytes:
        return await self._ask(lambda: self._store.get(key))

    async def get_range(self, key: str, offset: int, length: int) -> bytes:
        return await self._ask(lambda: self._store.get_range(key, offset, length))

    async def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        tries = _Tries(self)
        while True:
            try:
                # What was told is not asked for again; an iterator that has failed tells nothing more.
                async for entry in self._store.entries(prefix, after=after):
                    after, self.answered, tries = entry.key, True, _Tries(self)
                    yield entry
                return
            except Transient as error:
                await tries.failed(error)

    async def delete(self, key: str) -> None:
        await self._ask(lambda: self._store.delete(key))

    async def close(self) -> None:
        await self._store.close()


class _Tries:
    """The attempts of one request."""

    def __init__(self, store: Retrying) -> None:
        self._store = store
        self._made = 0

    async def failed(self, error: Transient) -> None:
        """Wait before the next attempt, or raise `error` where there is none."""
        patience = self._store.patience
        self._made += 1
        if self._made >= (patience.attempts if self._store.answered else patience.first_attempts):
            raise error
        self._store.retries += 1
        await asyncio.sleep(min(patience.pause * 2 ** (self._made - 1), patience.most) * random.uniform(0.5, 1.0))
