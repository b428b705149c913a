"""The pipeline of a sync: carries out a plan over one change stream.

Batches of consecutive regions are read, hashed, asked about and sent side by side. What bounds them is bytes: buffers
with source data, and changes not yet acknowledged. A region's buffer is kept until its changes are sent, so what is
hashed is what is sent even if the source changes meanwhile.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Iterable, Sequence

from blockferry.client.compare import Refiner
from blockferry.client.plan import Plan
from blockferry.client.replica import ChangeStream, ReplicaSession
from blockferry.client.report import Phase, Tally
from blockferry.common.digests import REGION_DIGEST_SIZE, differing_pieces, digest, digests, is_zero, nonzero_extents
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import BufferPool
from blockferry.common.regions import BLOCK_SIZE, Run, runs_of, split_runs
from blockferry.common.volumes import Volume, in_thread
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

BYTES_IN_FLIGHT = 64 * 1024 * 1024
"""Default bound in bytes: half for buffers of source data, half for changes on their way."""

BATCH_SIZE = 8 * 1024 * 1024
"""Bytes of consecutive regions handled together: one read, one hand-off to hash, one question to the destination."""

UNMAP_SIZE = 1024 * 1024 * 1024
"""Bytes unmapped by one message, so that very long runs still show progress."""

UNMAP_WEIGHT = 64
"""Bytes an unmap counts for while it is in flight: about its size on the wire."""

Handler = Callable[[int, int, int, memoryview], Awaitable[None]]
"""(first region, count, offset in bytes, buffer to fill)"""


class Transfer:
    """One run of a plan. `buffer_bytes` bounds what is held of the source."""

    def __init__(
        self,
        source: Volume,
        session: ReplicaSession,
        stream: ChangeStream,
        plan: Plan,
        buffer_bytes: int,
        phase: Phase,
        tally: Tally,
    ) -> None:
        self._source = source
        self._session = session
        self._stream = stream
        self._plan = plan
        self._geometry = plan.geometry
        self._phase = phase
        self._tally = tally
        self._refiner = Refiner(session.key, plan.geometry.region_size)
        self._batch = max(BATCH_SIZE // plan.geometry.region_size, 1)
        self._buffers = BufferPool(self._batch * plan.geometry.region_size, buffer_bytes)

    async def run(self) -> None:
        """Carry out the plan; returns when every change is applied and every checked region has its digest."""
        self._phase.total = self._plan.bytes_to_read + self._geometry.bytes_in(self._plan.unmap)
        failure: BlockferryError | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._unmap()
                for first, count, compare in self._batches():
                    buffer = await self._buffers.acquire()
                    handle = self._compare if compare else self._send
                    tasks.create_task(self._handle(handle, first, count, buffer), name=f"regions-{first}")
        except* BlockferryError as group:
            failure = _first(group)
        if failure is not None:
            # Not raised above: before Python 3.11.4 whatever leaves an `except*` is wrapped in a group again.
            raise failure
        await self._send_again(await self._stream.drain())

    def _batches(self) -> Iterable[tuple[int, int, bool]]:
        """(first region, count, compare?) in ascending order, so that both disks are read in order."""
        compare = ((first, count, True) for first, count in self._split(self._plan.compare))
        send = ((first, count, False) for first, count in self._split(self._plan.send))
        return heapq.merge(compare, send)

    def _split(self, regions: BitMap) -> Iterable[Run]:
        return split_runs(runs_of(regions, self._geometry.count), self._batch)

    async def _handle(self, handle: Handler, first: int, count: int, buffer: bytearray) -> None:
        try:
            offset, length = self._geometry.extent(first, count)
            data = memoryview(buffer)[:length]
            await handle(first, count, offset, data)
        finally:
            self._buffers.release(buffer)

    async def _read(self, offset: int, data: memoryview) -> None:
        await self._source.read_into(offset, data)
        self._tally.source_read += len(data)

    # --- destination only: unmap ----------------------------------------------------------------------------------

    async def _unmap(self) -> None:
        most = UNMAP_SIZE // self._geometry.region_size
        for first, count in split_runs(runs_of(self._plan.unmap, self._geometry.count), most):
            offset, length = self._geometry.extent(first, count)
            change = pb.Change(unmap=pb.UnmapRegionRequest(offset=offset, length=length))
            await self._stream.send([change], UNMAP_WEIGHT, 0)
            self._phase.done += length

    # --- source only: send what is not zero ------------------------------------------------------------------------

    async def _send(self, first: int, count: int, offset: int, data: memoryview) -> None:
        await self._read(offset, data)
        for start, region in self._regions(offset, data):
            extents = await in_thread(_nonzero, region)
            if extents:
                self._tally.changed += 1
                await self._send_region(start, region, writes=extents)
            else:
                self._tally.zero += 1
            # Region by region: under a low bandwidth limit a batch takes long enough to look stuck.
            self._phase.done += len(region)

    # --- both: compare, then send what differs ---------------------------------------------------------------------

    async def _compare(self, first: int, count: int, offset: int, data: memoryview) -> None:
        ours, theirs = await asyncio.gather(
            self._read_and_digest(offset, data),
            self._session.digests(self._geometry.region_size, [(first, count)], self._tally),
        )
        differing = differing_pieces(ours, theirs, REGION_DIGEST_SIZE)
        self._tally.equal += count - len(differing)
        self._tally.changed += len(differing)
        regions = list(self._regions(offset, data))
        self._phase.done += len(data) - sum(len(regions[index][1]) for index in differing)
        if not differing:
            return
        expected = [ours[index * REGION_DIGEST_SIZE : (index + 1) * REGION_DIGEST_SIZE] for index in differing]
        chosen = [regions[index] for index in differing]
        if not self._refiner.asking:
            for (start, region), wanted in zip(chosen, expected, strict=True):
                self._refiner.sent_whole()
                await self._send_whole(start, region, wanted)
                self._phase.done += len(region)
            return
        blocks = await self._refiner.differing_blocks(
            chosen, lambda piece_size, runs: self._session.digests(piece_size, runs, self._tally)
        )
        for (start, region), wanted, runs in zip(chosen, expected, blocks, strict=True):
            writes, zeros = await in_thread(_writes_and_zeros, region, runs)
            await self._send_region(start, region, writes=writes, zeros=zeros, wanted=wanted)
            self._phase.done += len(region)

    async def _read_and_digest(self, offset: int, data: memoryview) -> bytes:
        await self._read(offset, data)
        return await in_thread(digests, data, self._geometry.region_size, self._session.key, REGION_DIGEST_SIZE)

    async def _send_again(self, offsets: Sequence[int]) -> None:
        """Send regions whole whose digest did not match after their change. A second mismatch is a broken disk."""
        for offset in offsets:
            data = memoryview(bytearray(min(self._geometry.region_size, self._geometry.size - offset)))
            await self._read(offset, data)
            await self._send_whole(offset, data, await in_thread(digest, data, self._session.key))
        still = await self._stream.drain() if offsets else []
        if still:
            raise BlockferryError(
                Code.DATA_MISMATCH,
                "the destination does not keep what is written to it",
                cause="a region that was sent whole has another digest there",
                next="check the destination's disk and memory",
                volume=self._session.volume,
                offset=still[0],
                length=self._geometry.region_size,
            )

    # --- building changes ------------------------------------------------------------------------------------------

    def _regions(self, offset: int, data: memoryview) -> Iterable[tuple[int, memoryview]]:
        size = self._geometry.region_size
        return ((offset + start, data[start : start + size]) for start in range(0, len(data), size))

    async def _send_whole(self, offset: int, region: memoryview, wanted: bytes) -> None:
        writes, zeros = await in_thread(_writes_and_zeros, region, [(0, -(-len(region) // BLOCK_SIZE))])
        await self._send_region(offset, region, writes=writes, zeros=zeros, wanted=wanted, uncompared=True)

    async def _send_region(
        self,
        offset: int,
        region: memoryview,
        *,
        writes: Sequence[Run],
        zeros: Sequence[Run] = (),
        wanted: bytes = b"",
        uncompared: bool = False,
    ) -> None:
        data = b"".join([region[start : start + length] for start, length in writes])
        request = pb.WriteRegionRequest(
            offset=offset,
            length=len(region),
            writes=[pb.Extent(offset=start, length=length) for start, length in writes],
            zeros=[pb.Extent(offset=start, length=length) for start, length in zeros],
            data=data,
            digest=wanted,
            uncompared=uncompared,
        )
        await self._stream.send([pb.Change(write=request)], request.ByteSize(), len(data))


def _nonzero(region: memoryview) -> list[Run]:
    return list(nonzero_extents(region)) if not is_zero(region) else []


def _writes_and_zeros(region: memoryview, blocks: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Split runs of changed blocks into (offset, length) extents with data and extents that became zero."""
    writes: list[Run] = []
    zeros: list[Run] = []
    for first, count in blocks:
        start = first * BLOCK_SIZE
        part = region[start : start + count * BLOCK_SIZE]
        position = 0
        for offset, length in nonzero_extents(part):
            if offset > position:
                zeros.append((start + position, offset - position))
            writes.append((start + offset, length))
            position = offset + length
        if position < len(part):
            zeros.append((start + position, len(part) - position))
    return writes, zeros


def _first(group: BaseExceptionGroup[BlockferryError]) -> BlockferryError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
