"""Appending to a volume's log. Whoever creates the next number has committed.

In a store without conditional writes a record counts only when an empty object with its number in its name was created
after it (US11042504B2).
"""

from __future__ import annotations

import asyncio
import random

from blockferry.common.archive import format
from blockferry.common.archive.catalog import Catalog
from blockferry.common.archive.format import LogName
from blockferry.common.archive.store import Exists, Missing
from blockferry.common.errors import BlockferryError, Code

BACK_OFF_SECONDS = 0.5
"""At most, before a number is tried again that two committers have left to each other."""
READ_BACK_SECONDS = (0.0, 0.5, 2.0, 5.0)
"""How long a store may take to show what it has acknowledged."""


class Committer:
    """Commits log records of one volume."""

    def __init__(self, catalog: Catalog, volume: bytes) -> None:
        self._store = catalog.store
        self._volume = volume
        self._conditional = catalog.archive.conditional
        if self._conditional and not self._store.conditional:
            raise BlockferryError(
                Code.UNSUPPORTED,
                f"{self._store.uri} cannot be written",
                cause="the archive was created in a store that refuses to replace objects, and this one is said not to",
                next="leave --store-option conditional=no out, or create another archive",
            )

    async def next_number(self, seen: int) -> int:
        """A number to commit under, where the log was seen up to `seen`."""
        if self._conditional:
            return seen + 1
        # Nor one that somebody tries just now, or has tried and died.
        return max((name.number for name in await self._names()), default=0) + 1

    async def append(self, attempt: bytes, number: int, frame: bytes, seen: int) -> bool:
        """Commit a record; False where the number is somebody else's, or there are records behind `seen` that count:
        those are to be looked at before a larger number is tried. May be asked again with the same frame after any
        failure. Returns when the record has been read back."""
        if not self._conditional:
            return await self._append_unconditionally(attempt, number, frame, seen)
        # Without a gap: a record that was not seen would be in it.
        assert number == seen + 1, (number, seen)
        key = format.log_name(self._volume, number)
        try:
            await self._store.put_new(key, [frame])
        except Exists:
            if await self._store.get(key) != frame:
                return False
        await self._read_back(key, frame)
        return True

    async def _append_unconditionally(self, attempt: bytes, number: int, frame: bytes, seen: int) -> bool:
        key = format.log_name(self._volume, number, attempt)
        await self._store.put(key, frame)
        await self._read_back(key, frame)
        names = await self._names()
        if LogName(number, attempt, True) in names:
            return True
        rivals = any(name.number >= number and name.attempt != attempt for name in names)
        if rivals or any(seen < name.number < number and name.done for name in names):
            await self._store.delete(key)
            # Two that have seen each other both step back, and must not meet again.
            await asyncio.sleep(random.uniform(0, BACK_OFF_SECONDS))
            return False
        await self._store.put(key + format.DONE, b"")
        return True

    async def is_committed(self, attempt: bytes, number: int, frame: bytes) -> bool:
        """Whether a record that was to be committed is there, and counts."""
        key = format.log_name(self._volume, number, None if self._conditional else attempt)
        try:
            found = await self._store.get(key)
        except Missing:
            return False
        return found == frame and (self._conditional or LogName(number, attempt, True) in await self._names())

    async def _names(self) -> list[LogName]:
        names = await self._store.list(format.log_prefix(self._volume))
        return [found for name in names if (found := format.parse_log_name(name)) is not None]

    async def _read_back(self, key: str, frame: bytes) -> None:
        """The record makes the snapshot exist: an acknowledgement alone is not believed."""
        found = b""
        for seconds in READ_BACK_SECONDS:
            await asyncio.sleep(seconds)
            try:
                found = await self._store.get(key)
            except Missing:
                continue
            if found == frame:
                return
        raise BlockferryError(
            Code.DATA_MISMATCH,
            f"{self._store.uri}: {key} is not what was written",
            cause=f"the store acknowledged it, and {'returns other bytes' if found else 'has no such object'}",
            next="do not rely on this store before that is explained; then run it again: what was uploaded is found",
        )
