"""Reads a source for an archiver, and says of every block what is to be done with it.

    allocated, not zeros   equal to the base's              nothing
                           stored by an earlier run          keep
                           anything else                     store
    zeros, or no data      the base has it                   hole
                           the base has it not               nothing

Invariant 1: a block is left alone only because its digest is the base's, because a change tracker whose base is this
very snapshot proves it untouched, or because both prove zeros. It is left unread only where it was stored before from
the very same immutable snapshot.
"""

from __future__ import annotations

import asyncio
import collections
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from blockferry.client.report import Phase
from blockferry.client.staging import Noted, Staging
from blockferry.common.archive.columns import Entry, decode_trailer
from blockferry.common.archive.format import ARCHIVE_BLOCK, Kind
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.tree import Load, Root, leaves
from blockferry.common.digests import is_zero
from blockferry.common.errors import BlockferryError
from blockferry.common.flow import BufferPool
from blockferry.common.regions import AllocationMap, Run, runs_of
from blockferry.common.volumes import Volume, in_thread, parts_of
from pyroaring import BitMap

BATCH_BLOCKS = 32
"""Blocks that are read in one hand-off, and hashed and packed in another: 8 MiB. Fewer would stay in the processor's
cache, but each read asks a file for its holes, and on tmpfs that walks every page up to the next one."""
BATCHES = 4
"""Batches at work side by side."""
BATCH_LOOKS = 8192
"""Blocks of the base that a batch lets go of, at most."""


class Look(NamedTuple):
    """A block to look at: what the base has, and whether the source may have data."""

    block: int
    base: Entry | None
    allocated: bool


class Verdict(enum.Enum):
    """What is to be done with a block."""

    STORE = "store"
    KEEP = "keep"
    HOLE = "hole"


class Outcome(NamedTuple):
    """A block with something to be done: `entry` to keep, or codec, stored bytes and digest to store."""

    block: int
    verdict: Verdict
    entry: Entry | None = None
    codec: int = 0
    stored: bytes = b""
    digest: bytes = b""


@dataclass
class Counts:
    """Of one run. Blocks, but for the bytes: those that may hold data are zero, equal, stored or kept; `holes` are
    those that the base has and the snapshot has not."""

    bytes_read: int = 0
    zero: int = 0
    equal: int = 0
    stored: int = 0
    stored_bytes: int = 0
    kept: int = 0
    holes: int = 0

    def add(self, other: Counts) -> None:
        """Count what another has counted."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Earlier:
    """Blocks that earlier runs of the attempt have stored. Asked in ascending order; trailers are read when their
    blocks come near."""

    def __init__(self, staging: Staging, sealer: Sealer, attempt: bytes, snapshot_id: str) -> None:
        self._staging = staging
        self._sealer = sealer
        self._attempt = attempt
        self._snapshot_id = snapshot_id
        chunks = [one for one in staging.state.data.values() if one.done and one.first >= 0]
        self._ahead = collections.deque(sorted(chunks, key=lambda one: one.first))
        self._near: list[tuple[Noted, dict[int, Entry]]] = []

    @property
    def left(self) -> bool:
        """Whether there may be any that were not asked for."""
        return bool(self._ahead or self._near)

    def among(self, blocks: Sequence[int]) -> dict[int, list[tuple[Entry, bool]]]:
        """What was stored of some ascending blocks: where it is, and whether it was read from the very same immutable
        snapshot."""
        first, last = blocks[0], blocks[-1]
        self._near = [one for one in self._near if one[0].last >= first]
        while self._ahead and self._ahead[0].first <= last:
            noted = self._ahead.popleft()
            if noted.last >= first:
                self._near.append((noted, self._entries(noted)))
        found: dict[int, list[tuple[Entry, bool]]] = {}
        for noted, entries in self._near:
            same = bool(self._snapshot_id) and self._staging.state.runs[noted.run] == self._snapshot_id
            for block in blocks:
                if (entry := entries.get(block)) is not None:
                    found.setdefault(block, []).append((entry, same))
        return found

    def _entries(self, noted: Noted) -> dict[int, Entry]:
        frame = self._staging.read_trailer(noted)
        name = f"trailer {noted.number}"
        try:
            # The frame, and 8 bytes behind it, end the chunk.
            offset = noted.size - noted.length - 8
            attempt, body = self._sealer.open_frame(Kind.TRAILER, frame, name, number=noted.number, offset=offset)
            if attempt != self._attempt:
                return {}
            return dict(decode_trailer(body, name).entries(attempt, noted.number))
        except BlockferryError:
            # Lost with the power: the blocks are stored again.
            return {}


@dataclass
class _Batch:
    looks: list[Look] = field(default_factory=list)
    earlier: dict[int, list[tuple[Entry, bool]]] = field(default_factory=dict)
    reads: list[int] = field(default_factory=list)


class Scan:
    """One pass over a source. `base` is the tree of the base; `changed` the only blocks that may differ from it (None:
    all)."""

    def __init__(
        self,
        source: Volume,
        allocation: AllocationMap,
        base: Root | None,
        load: Load,
        changed: BitMap | None,
        earlier: Earlier,
        sealer: Sealer,
        attempt: bytes,
        level: int,
        phase: Phase,
    ) -> None:
        self._source = source
        self._allocation = allocation
        self._base = base
        self._load = load
        self._changed = changed
        self._earlier = earlier
        self._sealer = sealer
        self._attempt = attempt
        self._level = level
        self._phase = phase
        self._buffers = BufferPool(BATCH_BLOCKS * ARCHIVE_BLOCK, BATCHES * BATCH_BLOCKS * ARCHIVE_BLOCK)
        self.counts = Counts()

    async def run(self, consume: Callable[[list[Outcome]], Awaitable[None]]) -> None:
        """Hand the outcomes to `consume`, in ascending order of blocks."""
        self._phase.total = self._allocation.geometry.bytes_in(
            self._allocation.regions if self._changed is None else self._allocation.regions & self._changed
        )
        waiting: collections.deque[asyncio.Task[list[Outcome]]] = collections.deque()
        async with asyncio.TaskGroup() as tasks:
            async for batch in self._batches():
                if len(waiting) == BATCHES:
                    await consume(await waiting.popleft())
                waiting.append(tasks.create_task(self._look_at(batch), name=f"blocks-{batch.looks[0].block}"))
            while waiting:
                await consume(await waiting.popleft())

    # --- what is to be looked at --------------------------------------------------------------------------------------

    async def _looks(self) -> AsyncIterator[Look]:
        """Ascending: what the source may have data of, and what the base has."""
        considered = [(0, 1 << 62)]
        if self._changed is not None:
            considered = list(runs_of(self._changed, max(self._changed.max() + 1, 1))) if self._changed else []
        count = self._allocation.geometry.count
        for first, length in considered:
            allocated = _members(self._allocation.regions, first, min(first + length, count))
            block = next(allocated, None)
            async for leaf in leaves(self._base, self._load, first, first + length):
                for key, entry in leaf:
                    while block is not None and block < key:
                        yield Look(block, None, True)
                        block = next(allocated, None)
                    if block == key:
                        yield Look(key, entry, True)
                        block = next(allocated, None)
                    else:
                        yield Look(key, entry, False)
            while block is not None:
                yield Look(block, None, True)
                block = next(allocated, None)

    async def _batches(self) -> AsyncIterator[_Batch]:
        batch, allocated = _Batch(), 0
        async for look in self._looks():
            batch.looks.append(look)
            allocated += look.allocated
            if allocated == BATCH_BLOCKS or len(batch.looks) == BATCH_LOOKS:
                yield await self._prepared(batch)
                batch, allocated = _Batch(), 0
        if batch.looks:
            yield await self._prepared(batch)

    async def _prepared(self, batch: _Batch) -> _Batch:
        if self._earlier.left:
            batch.earlier = await in_thread(self._earlier.among, [look.block for look in batch.looks])
        batch.reads = [
            look.block
            for look in batch.looks
            if look.allocated and not any(same for _, same in batch.earlier.get(look.block, ()))
        ]
        return batch

    # --- looking ------------------------------------------------------------------------------------------------------

    async def _look_at(self, batch: _Batch) -> list[Outcome]:
        found, counts = await self._judged(batch)
        self.counts.add(counts)
        self._phase.done += self._allocation.geometry.bytes_in(
            BitMap([look.block for look in batch.looks if look.allocated])
        )
        return found

    async def _judged(self, batch: _Batch) -> tuple[list[Outcome], Counts]:
        if not batch.reads:
            return self._judge(batch, {})
        buffer = await self._buffers.acquire()
        try:
            extents = [(first * ARCHIVE_BLOCK, count * ARCHIVE_BLOCK) for first, count in _runs(batch.reads)]
            parts = parts_of(memoryview(buffer), extents, self._source.size)
            held = await self._source.read_data_many(parts)
            self.counts.bytes_read += sum(length for one in held for _, length in one)
            return await in_thread(self._judge_read, batch, parts, held)
        finally:
            self._buffers.release(buffer)

    def _judge_read(
        self, batch: _Batch, parts: Sequence[tuple[int, memoryview]], held: Sequence[Sequence[Run]]
    ) -> tuple[list[Outcome], Counts]:
        blocks: dict[int, memoryview] = {}
        for (offset, data), one in zip(parts, held, strict=True):
            _fill_holes(data, one)
            for start in range(0, len(data), ARCHIVE_BLOCK):
                blocks[(offset + start) // ARCHIVE_BLOCK] = data[start : start + ARCHIVE_BLOCK]
        return self._judge(batch, blocks)

    def _judge(self, batch: _Batch, blocks: dict[int, memoryview]) -> tuple[list[Outcome], Counts]:
        """Runs on several threads at once, so it counts for itself."""
        counts = Counts()
        found: list[Outcome] = []
        for look in batch.looks:
            outcome = self._judge_one(look, batch.earlier.get(look.block, ()), blocks.get(look.block), counts)
            if outcome is not None:
                found.append(outcome)
        return found, counts

    def _judge_one(
        self, look: Look, earlier: Sequence[tuple[Entry, bool]], data: memoryview | None, counts: Counts
    ) -> Outcome | None:
        block, base = look.block, look.base
        if data is None and look.allocated:
            counts.kept += 1
            return Outcome(block, Verdict.KEEP, next(entry for entry, same in earlier if same))
        if data is None or is_zero(data):
            counts.zero += look.allocated
            counts.holes += base is not None
            return Outcome(block, Verdict.HOLE) if base is not None else None
        digest = self._sealer.digest(data)
        if base is not None and base.digest == digest:
            counts.equal += 1
            return None
        for entry, _ in earlier:
            if entry.digest == digest:
                counts.kept += 1
                return Outcome(block, Verdict.KEEP, entry)
        codec, stored = self._sealer.seal_block(self._attempt, block, data, self._level)
        counts.stored += 1
        counts.stored_bytes += len(stored)
        return Outcome(block, Verdict.STORE, None, codec, stored, digest)


def _members(numbers: BitMap, first: int, end: int) -> Iterator[int]:
    """The members from `first` up to `end`, ascending."""
    while first < end:
        try:
            first = numbers.next_set_bit(first)
        except ValueError:
            return
        if first >= end:
            return
        yield first
        first += 1


def _runs(blocks: Sequence[int]) -> list[Run]:
    found: list[Run] = []
    for block in blocks:
        if found and sum(found[-1]) == block:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((block, 1))
    return found


def _fill_holes(data: memoryview, held: Sequence[Run]) -> None:
    """Make zeros of what was not read."""
    position = 0
    for start, length in [*held, (len(data), 0)]:
        if start > position:
            data[position:start] = bytes(start - position)
        position = start + length
