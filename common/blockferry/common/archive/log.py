"""A volume's log: the sequence of superblocks, deletion marks and remap records that says which snapshots exist.

Whoever creates the next number has committed. In a store without conditional writes a record counts only when an empty
object with its number in its name was created after it (US11042504B2).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockferry.common.archive import format
from blockferry.common.archive.columns import Move, decode_remap
from blockferry.common.archive.format import Deletion, Header, Kind, LogName, Superblock
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import Exists, Missing, ObjectStore
from blockferry.common.errors import BlockferryError, Code

BACK_OFF_SECONDS = 0.5
"""At most, before a number is tried again that two committers have left to each other."""
READ_BACK_SECONDS = (0.0, 0.5, 2.0, 5.0)
"""How long a store may take to show what it has acknowledged."""


@dataclass(frozen=True)
class Remap:
    """Blocks that were moved."""

    number: int
    moves: Sequence[Move]


LogRecord = Superblock | Deletion | Remap


@dataclass
class Found:
    """A snapshot, and what the log says after it. `top` is the last number of the log, 0 where it is empty."""

    superblock: Superblock | None
    top: int
    deletions: list[Deletion] = field(default_factory=list)
    remaps: list[Remap] = field(default_factory=list)
    """ascending"""


class Log:
    """The log of the sealer's volume."""

    def __init__(self, store: ObjectStore, sealer: Sealer, *, conditional: bool) -> None:
        self._store = store
        self._sealer = sealer
        self._conditional = conditional

    # --- reading ----------------------------------------------------------------------------------------------------

    async def names(self) -> list[LogName]:
        """The records that count, by number, ascending. One LIST."""
        return self._counting(await self._all_names())

    async def _all_names(self) -> list[LogName]:
        names = await self._store.list(format.log_prefix(self._sealer.volume))
        return [found for name in names if (found := format.parse_log_name(name)) is not None]

    def _counting(self, names: Sequence[LogName]) -> list[LogName]:
        if self._conditional:
            return sorted(name for name in names if name.attempt is None)
        there = {(name.number, name.attempt) for name in names if not name.done}
        found: dict[int, LogName] = {}
        for name in sorted((name for name in names if name.done), key=lambda one: (one.number, one.attempt or b"")):
            if (name.number, name.attempt) in there:
                found.setdefault(name.number, name)
        return list(found.values())

    def _object(self, name: LogName) -> str:
        return format.log_name(self._sealer.volume, name.number, name.attempt)

    async def read(self, name: LogName) -> LogRecord:
        """Raises CORRUPT_STATE unless the record belongs there."""
        key = self._object(name)
        frame = await self._store.get(key)
        kind = Header.decode(frame, key).kind
        if kind not in (Kind.SUPERBLOCK, Kind.DELETION, Kind.REMAP):
            raise format.damaged(key, f"it is a {kind.name.lower()}")
        attempt, body = self._sealer.open_frame(kind, frame, key, number=name.number)
        if kind is Kind.REMAP:
            return Remap(name.number, decode_remap(body, key))
        record: Superblock | Deletion
        record = format.decode(body, Superblock if kind is Kind.SUPERBLOCK else Deletion, key)
        if record.number != name.number or record.volume != self._sealer.volume.hex():
            raise format.damaged(key, f"it is record {record.number} of volume {record.volume}")
        if isinstance(record, Superblock) and record.attempt != attempt.hex():
            raise format.damaged(key, "its header names another attempt")
        return record

    async def find(self, number: int = 0) -> Found:
        """The snapshot `number`, or the newest one (0). There may be none: the superblock is None then. One LIST, and
        one GET for each record from the last back to that one."""
        names = await self.names()
        found = Found(None, names[-1].number if names else 0)
        deleted: set[int] = set()
        for name in reversed(names):
            if number and name.number < number:
                break
            record = await self.read(name)
            if isinstance(record, Deletion):
                found.deletions.insert(0, record)
                deleted.update(record.snapshots)
            elif isinstance(record, Remap):
                found.remaps.insert(0, record)
            elif name.number not in deleted and number in (0, name.number):
                found.superblock = record
                break
        return found

    async def after(self, number: int) -> list[LogRecord]:
        """The records behind `number`, ascending."""
        return [await self.read(name) for name in await self.names() if name.number > number]

    async def snapshots(self) -> list[Superblock]:
        """All that exist, ascending."""
        found: list[Superblock] = []
        deleted: set[int] = set()
        for name in reversed(await self.names()):
            record = await self.read(name)
            if isinstance(record, Deletion):
                deleted.update(record.snapshots)
            elif isinstance(record, Superblock) and name.number not in deleted:
                found.append(record)
        return found[::-1]

    # --- writing ----------------------------------------------------------------------------------------------------

    def seal(self, kind: Kind, attempt: bytes, number: int, body: bytes) -> bytes:
        """The object of a record."""
        return self._sealer.seal_frame(kind, attempt, body, number=number)

    async def append(self, attempt: bytes, number: int, frame: bytes, seen: int) -> bool:
        """Commit a record; False where the number is somebody else's, or there are records behind `seen` that count:
        those are to be looked at before a larger number is tried. May be asked again with the same frame after any
        failure. Returns when the record has been read back."""
        if self._conditional:
            # Without a gap: a record that was not seen would be in it.
            assert number == seen + 1, (number, seen)
            key = format.log_name(self._sealer.volume, number)
            try:
                await self._store.put_new(key, [frame])
            except Exists:
                if await self._store.get(key) != frame:
                    return False
            await self._read_back(key, frame)
            return True
        return await self._append_unconditionally(attempt, number, frame, seen)

    async def _append_unconditionally(self, attempt: bytes, number: int, frame: bytes, seen: int) -> bool:
        key = format.log_name(self._sealer.volume, number, attempt)
        await self._store.put(key, frame)
        await self._read_back(key, frame)
        names = await self._all_names()
        if LogName(number, attempt, True) in names:
            return True
        rivals = any(name.number >= number and name.attempt != attempt for name in names)
        if rivals or any(seen < name.number < number for name in self._counting(names)):
            await self._store.delete(key)
            # Two that have seen each other both step back, and must not meet again.
            await asyncio.sleep(random.uniform(0, BACK_OFF_SECONDS))
            return False
        await self._store.put(key + format.DONE, b"")
        return True

    async def is_committed(self, attempt: bytes, number: int, frame: bytes) -> bool:
        """Whether a record that was to be committed is there, and counts."""
        key = format.log_name(self._sealer.volume, number, None if self._conditional else attempt)
        try:
            found = await self._store.get(key)
        except Missing:
            return False
        return found == frame and (self._conditional or LogName(number, attempt, True) in await self._all_names())

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
            cause="the store acknowledged it, and returns other bytes" if found else "the store acknowledged it, and has no such object",
            next="do not rely on this store before that is explained; then run it again, what was uploaded is found",
        )

    async def next_number(self, seen: int) -> int:
        """A number to commit under, where the log was seen up to `seen`."""
        if self._conditional:
            return seen + 1
        # Nor one that somebody tries just now, or has tried and died.
        return max((name.number for name in await self._all_names()), default=0) + 1
