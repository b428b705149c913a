"""A disk that works at once: a primary that is filled from a backup while it is used.

            hydrated?
    read ──▶ yes ──▶ primary
             no ───▶ fetched from a source ──▶ answered, and written through to the primary
    write ─▶ primary; whole blocks are hydrated by it, of others what surrounds the change is fetched before

Whoever writes to the primary holds a lock on the blocks meanwhile, and what was fetched is written only where the map,
looked at again under the lock, still says that it is missing: so no guest's write is ever overwritten by older data.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

from blockferry.common import disk
from blockferry.common.digests import Data, nonzero_extents
from blockferry.common.errors import BlockferryError, from_os_error
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Provenance, Run, split_runs
from blockferry.common.volumes import Volume, in_thread
from blockferry.server.gate import Gate
from blockferry.server.rehydrate.fetch import UNIT_BLOCKS, Fetcher
from blockferry.server.rehydrate.locks import RangeLocks
from blockferry.server.rehydrate.map import HydrationMap
from blockferry.server.rehydrate.sources import Sources

HYDRATED = "blockferry:hydrated"
"""The context that says which blocks are hydrated: flag 1 for those that are."""

MOST_RUNS = 1024
"""Missing runs in a range, from which on all of it is called data: telling them apart would cost more."""


class HydratingVolume(Volume):
    """`primary` is at least as large as what `sources` hold, and is written by nobody else."""

    contexts = (HYDRATED,)

    def __init__(
        self,
        primary: Volume,
        hydration: HydrationMap,
        sources: Sources,
        *,
        source_timeout: float,
        bandwidth: int = 0,
        fresh: bool = False,
    ) -> None:
        self.uri = primary.uri
        self.size = hydration.binding.size
        self.block_size = BLOCK_SIZE
        self.preferred_size = primary.preferred_size
        self.identity = primary.identity
        self.primary = primary
        self.map = hydration
        self.fetcher = Fetcher(
            hydration,
            sources,
            self._store,
            source_timeout=source_timeout,
            bandwidth=bandwidth,
            zeroing=lambda: primary.zeroing,
        )
        self.failed: BlockferryError | None = None
        """A flush of the primary that failed. What it holds is unknown from then on: everything is refused."""
        self._fresh = fresh
        """What is missing in the primary reads as zeros there: nobody has ever tried to write it."""
        self._gate = Gate()
        self._locks = RangeLocks()
        self._committing = asyncio.Lock()
        self._asked = 0
        self._answered = 0

    @property
    def zeroing(self) -> str:
        return self.primary.zeroing

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        if self.failed is not None or not self.map.is_hydrated(*_touched(offset, len(buffer))):
            return False
        return self.primary.read_now(offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._refuse_failed()
        first, stop = _touched(offset, len(buffer))
        missing = self.map.missing(first, stop)
        if not missing:
            await self.primary.read_into(offset, buffer)
            return
        here = _Request(offset, buffer)
        work = [self._read_missing(here, *run) for run in _in_units(missing)]
        hydrated = [here.part(start, end) for start, end in _between(missing, first, stop)]
        if hydrated:
            work.append(self.primary.read_many(hydrated))
        if len(work) == 1:
            await work[0]
            return
        # To the end of all of them: the buffer must not be written to once it is given back.
        for found in await asyncio.gather(*work, return_exceptions=True):
            if found is not None:
                raise found

    async def _read_missing(self, here: _Request, first: int, stop: int) -> None:
        """Blocks of one unit, which were missing when they were asked for: so whatever the source holds is an answer,
        even if the guest writes meanwhile."""
        fetched = await self.fetcher.demand(first, stop)
        missing: list[Run] = []
        if fetched is not None:
            missing, data, start = fetched
            for run, count in missing:
                position, part = here.part(run, run + count)
                begin = position - start * BLOCK_SIZE
                part[:] = data[begin : begin + len(part)]
        # What became hydrated before it was fetched.
        await self.primary.read_many([here.part(*run) for run in _between(missing, first, stop)])

    async def prefetch(self, offset: int, length: int) -> None:
        first, stop = _touched(offset, length)
        if self.map.is_hydrated(first, stop):
            await self.primary.prefetch(offset, length)
        else:
            self.fetcher.soon(first // UNIT_BLOCKS, -(-stop // UNIT_BLOCKS) - first // UNIT_BLOCKS)

    # --- what holds data ----------------------------------------------------------------------------------------------

    async def allocation(self, region_size: int) -> AllocationMap:
        # Looked at before the primary is: what is missing now is called data, whatever becomes of it meanwhile.
        missing = self.map.missing(0, self.map.blocks)
        found = await self.primary.allocation(region_size)
        if not missing:
            return found
        extents = [(first * BLOCK_SIZE, count * BLOCK_SIZE) for first, count in missing]
        regions = AllocationMap.from_extents(found.geometry, extents, Provenance.CONSERVATIVE).regions
        absent = found.provenance is Provenance.ABSENT
        return AllocationMap(
            found.geometry, found.regions | regions, Provenance.ABSENT if absent else Provenance.CONSERVATIVE
        )

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """What is not hydrated is never called a hole."""
        missing = self.map.missing(*_touched(offset, length))
        if not missing:
            return await self.primary.data_extents(offset, length)
        if len(missing) > MOST_RUNS:
            return [(offset, length)]
        found = [_clipped(first, first + count, offset, length) for first, count in missing]
        for first, stop in _between(missing, *_touched(offset, length)):
            found += await self.primary.data_extents(*_clipped(first, stop, offset, length))
        return _joined(sorted(found))

    async def status(self, context: str, offset: int, length: int) -> Sequence[tuple[int, int]]:
        if context != HYDRATED:
            return await super().status(context, offset, length)
        first, stop = _touched(offset, length)
        missing = self.map.missing(first, stop)
        runs = [(start, start + count, 0) for start, count in missing]
        runs += [(start, end, 1) for start, end in _between(missing, first, stop)]
        return [(_clipped(start, end, offset, length)[1], flag) for start, end, flag in sorted(runs)]

    # --- writing ------------------------------------------------------------------------------------------------------

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        for offset, data in extents:
            await self._complete_edges(offset, len(data))
            async with self._changing(offset, len(data)):
                await self.primary.write([(offset, data)])
                disk.crash_point("rehydrate-guest-written")
                self._mark(offset, len(data))

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        held = 0
        for offset, length in extents:
            await self._complete_edges(offset, length)
            async with self._changing(offset, length):
                held += await self.primary.unmap([(offset, length)])
                self._mark(offset, length)
        return held

    async def deallocate(self, extents: Sequence[tuple[int, int]]) -> tuple[int, Sequence[tuple[int, int]]]:
        """What is not hydrated becomes zeros, as in `unmap`: nothing has to be fetched for it any more. Blocks of which
        it is a part that is to go are left."""
        held = 0
        left: list[tuple[int, int]] = []
        for offset, length in extents:
            async with self._changing(offset, length):
                edges = [block for block in self._edges(offset, length) if not self.map.is_hydrated(block, block + 1)]
                left += [_clipped(block, block + 1, offset, length) for block in edges]
                first, stop = _touched(offset, length)
                first, stop = first + (first in edges), stop - (stop - 1 in edges)
                if first >= stop:
                    continue
                missing = self.map.missing(first, stop)
                zeroed = [_clipped(start, start + count, offset, length) for start, count in missing]
                if zeroed:
                    await self.primary.unmap(zeroed)
                whole = [_clipped(start, end, offset, length) for start, end in _between(missing, first, stop)]
                if whole:
                    freed, still = await self.primary.deallocate(whole)
                    held, left = held + freed, [*left, *still]
                self._mark(offset, length)
        return held, left

    async def _complete_edges(self, offset: int, length: int) -> None:
        """A block of which only a part changes is fetched before: the rest of it must be there."""
        for block in self._edges(offset, length):
            if not self.map.is_hydrated(block, block + 1):
                await self.fetcher.demand(block, block + 1, settled=True)

    def _edges(self, offset: int, length: int) -> list[int]:
        """The blocks that a range begins and ends inside of."""
        end = offset + length
        found = [offset // BLOCK_SIZE] if offset % BLOCK_SIZE else []
        if end % BLOCK_SIZE and end != self.size and end // BLOCK_SIZE not in found:
            found.append(end // BLOCK_SIZE)
        return found

    @contextlib.asynccontextmanager
    async def _changing(self, offset: int, length: int) -> AsyncIterator[None]:
        """Be alone with these blocks of the primary, and not while a snapshot is taken."""
        async with self._gate.passing():
            self._refuse_failed()
            if self.map.complete:
                # Nothing is written through any more, and the order of guests' own writes is theirs.
                yield
                return
            async with self._locks.holding(*_touched(offset, length)), self._trying():
                yield

    @contextlib.asynccontextmanager
    async def _trying(self) -> AsyncIterator[None]:
        """What fails half-way may leave something in blocks that are still missing afterwards."""
        try:
            yield
        except BaseException:
            self._fresh = False
            raise

    def _mark(self, offset: int, length: int) -> None:
        """The blocks that were written as a whole are hydrated."""
        end = offset + length
        first = -(-offset // BLOCK_SIZE)
        stop = self.map.blocks if end == self.size else end // BLOCK_SIZE
        if first < stop:
            self.map.mark(first, stop)

    async def _store(self, first: int, stop: int, data: memoryview | None) -> None:
        """Write what was fetched through to the primary, where it is still missing."""
        async with self._gate.passing(), self._locks.holding(first, stop), self._trying():
            self._refuse_failed()
            start = first * BLOCK_SIZE
            missing = self.map.missing(first, stop)
            zero: list[tuple[int, int]] = []
            writes: list[tuple[int, Data]] = []
            for run, count in missing:
                offset, length = _clipped(run, run + count, start, self.size - start)
                if data is None:
                    zero.append((offset, length))
                    continue
                part = data[offset - start : offset - start + length]
                position = 0
                for at, size in nonzero_extents(part):
                    if at > position:
                        zero.append((offset + position, at - position))
                    writes.append((offset + at, part[at : at + size]))
                    position = at + size
                if position < length:
                    zero.append((offset + position, length - position))
            if zero and not self._fresh:
                # Also on a primary that was made for this: a write that was never flushed may have left something.
                await self.primary.unmap(zero)
            if writes:
                await self.primary.write(writes)
            disk.crash_point("rehydrate-written-through")
            for run, count in missing:
                self.map.mark(run, run + count)

    # --- making it durable --------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Make everything that has returned durable: the primary, then the map that vouches for it (invariant 5).
        Whoever comes meanwhile shares the next one."""
        self._asked += 1
        # To its end, whoever gives up waiting: what it has captured must not get lost.
        await asyncio.shield(asyncio.create_task(self._flush(self._asked), name="map-commit"))

    async def _flush(self, mine: int) -> None:
        async with self._committing:
            self._refuse_failed()
            if self._answered >= mine:
                return
            covered = self._asked
            await self._commit()
            self._answered = covered

    async def _commit(self) -> None:
        captured = self.map.capture()
        disk.crash_point("rehydrate-captured")
        try:
            await self.primary.flush()
        except BlockferryError as error:
            # Invariant 3: after a failed flush nobody knows what is on the disk, and the kernel tells only once.
            self.failed = error
            raise
        disk.crash_point("rehydrate-flushed")
        try:
            await in_thread(self.map.commit, captured)
        except OSError as error:
            self.map.give_back(captured)
            raise from_os_error(error, "cannot record what is hydrated", volume=str(self.map.directory)) from error
        disk.crash_point("rehydrate-committed")

    @contextlib.asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Nothing changes in the primary or the map, and all that has is durable. Reads go on; changes wait."""
        async with self._gate.closed():
            await self.flush()
            yield

    def _refuse_failed(self) -> None:
        if self.failed is not None:
            raise self.failed

    async def close(self) -> None:
        """Let go of everything but the sources. Does not flush."""
        await self.fetcher.close()
        await self.primary.close()
        await in_thread(self.map.close)


class _Request:
    """A buffer to be filled from `offset`."""

    def __init__(self, offset: int, buffer: memoryview) -> None:
        self._offset = offset
        self._buffer = buffer

    def part(self, first: int, stop: int) -> tuple[int, memoryview]:
        """(offset, part of the buffer) of what was asked for of blocks [first, stop)."""
        offset, length = _clipped(first, stop, self._offset, len(self._buffer))
        return offset, self._buffer[offset - self._offset : offset - self._offset + length]


def _touched(offset: int, length: int) -> tuple[int, int]:
    """Blocks [first, stop) of a range of bytes."""
    return offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)


def _clipped(first: int, stop: int, offset: int, length: int) -> tuple[int, int]:
    """(offset, length) of what blocks [first, stop) have of a range of bytes."""
    start = max(first * BLOCK_SIZE, offset)
    return start, min(stop * BLOCK_SIZE, offset + length) - start


def _between(runs: Sequence[Run], first: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, end) of what lies between ascending runs in [first, stop)."""
    for start, count in runs:
        if start > first:
            yield first, start
        first = start + count
    if first < stop:
        yield first, stop


def _in_units(runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """[start, end) of runs, cut at the borders of units."""
    for first, count in runs:
        head = min(count, -first % UNIT_BLOCKS)
        if head:
            yield first, first + head
        for start, size in split_runs([(first + head, count - head)], UNIT_BLOCKS):
            yield start, start + size


def _joined(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending extents, with those that touch made one."""
    found: list[tuple[int, int]] = []
    for offset, length in extents:
        if found and sum(found[-1]) == offset:
            start, before = found.pop()
            offset, length = start, before + length
        found.append((offset, length))
    return found
