"""The pipeline of a sync: carries out a plan over one change stream.

Batches of regions are read, hashed, asked about and sent side by side. What bounds them is bytes: buffers
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
from blockferry.common.digests import REGION_DIGEST_SIZE, differing_pieces, digest, nonzero_extents
from blockferry.common.errors import BlockferryError, Code, first_of
from blockferry.common.flow import BufferPool
from blockferry.common.framing import Outgoing, encode_unmap, encode_write
from blockferry.common.regions import BLOCK_SIZE, Run, group_runs, runs_of, split_runs
from blockferry.common.volumes import Volume, in_thread, parts_of
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

BYTES_IN_FLIGHT = 64 * 1024 * 1024
"""Default bound in bytes: half for buffers of source data, half for changes on their way."""

BATCH_SIZE = 16 * 1024 * 1024
"""Bytes of regions handled together, as far as buffers reach: one hand-off to read, one to hash, one question to the
destination."""

UNMAP_SIZE = 1024 * 1024 * 1024
"""Bytes unmapped by one message, so that very long runs still show progress."""

MESSAGE_SIZE = 4 * 1024 * 1024
"""Bytes of changes gathered in one message; a single larger change goes alone. See docs/performance.md."""

Region = tuple[int, memoryview]
"""(offset in the volume, the region's bytes at the source)"""

Part = tuple[int, memoryview]
"""(offset in the volume, the bytes of consecutive regions from there)"""

Handler = Callable[[Sequence[Part]], Awaitable[None]]
"""Takes the parts whose buffers are to be filled."""


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
        # Invariant 1: only the very same immutable snapshot need not be looked at again.
        done = session.durable if source.snapshot_id else BitMap()
        self._compare_regions, self._send_regions = plan.compare - done, plan.send - done
        tally.equal += len(plan.compare & done) + len(plan.send & done)
        self._unmap_regions = plan.unmap
        self._settling = bool(source.snapshot_id)
        self._geometry = plan.geometry
        self._phase = phase
        self._tally = tally
        self._refiner = Refiner(session.key, plan.geometry.region_size)
        self._batch = max(min(BATCH_SIZE, buffer_bytes) // plan.geometry.region_size, 1)
        self._buffers = BufferPool(self._batch * plan.geometry.region_size, buffer_bytes)

    async def run(self) -> None:
        """Carry out the plan; returns when every change is applied and every checked region has its digest."""
        self._phase.total = sum(
            self._geometry.bytes_in(regions)
            for regions in (self._compare_regions, self._send_regions, self._unmap_regions)
        )
        failure: BlockferryError | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._unmap()
                for runs, compare in self._batches():
                    buffer = await self._buffers.acquire()
                    handle = self._compare if compare else self._send
                    tasks.create_task(self._handle(handle, runs, buffer), name=f"regions-{runs[0][0]}")
        except* BlockferryError as group:
            failure = first_of(group)
        if failure is not None:
            # Not raised above: before Python 3.11.4 whatever leaves an `except*` is wrapped in a group again.
            raise failure
        await self._send_again(await self._stream.drain())

    @property
    def _message_size(self) -> int:
        # Under a low bandwidth limit small messages: a large one would take long enough to look stuck.
        return min(MESSAGE_SIZE, self._stream.rate // 4) if self._stream.rate else MESSAGE_SIZE

    def _batches(self) -> Iterable[tuple[list[Run], bool]]:
        """(runs of regions, compare?) in ascending order, so that both disks are read in order."""
        compare = ((runs, True) for runs in self._grouped(self._compare_regions))
        send = ((runs, False) for runs in self._grouped(self._send_regions))
        return heapq.merge(compare, send)

    def _grouped(self, regions: BitMap) -> Iterable[list[Run]]:
        return group_runs(runs_of(regions, self._geometry.count), self._batch)

    async def _handle(self, handle: Handler, runs: Sequence[Run], buffer: bytearray) -> None:
        try:
            extents = [self._geometry.extent(*run) for run in runs]
            await handle(parts_of(memoryview(buffer), extents, self._geometry.size))
        finally:
            self._buffers.release(buffer)

    async def _read(self, offset: int, data: memoryview) -> None:
        await self._source.read_into(offset, data)
        self._tally.source_read += len(data)

    # --- destination only: unmap ----------------------------------------------------------------------------------

    async def _unmap(self) -> None:
        most = UNMAP_SIZE // self._geometry.region_size
        for first, count in split_runs(runs_of(self._unmap_regions, self._geometry.count), most):
            offset, length = self._geometry.extent(first, count)
            await self._stream.send([encode_unmap(pb.UnmapRegionRequest(offset=offset, length=length))])
            self._phase.done += length

    # --- source only: send what is not zero ------------------------------------------------------------------------

    async def _send(self, parts: Sequence[Part]) -> None:
        held = await self._source.read_data_many(parts)
        self._tally.source_read += sum(length for one in held for _, length in one)
        regions = list(self._regions(parts))
        changes = await in_thread(self._writes_of_parts, parts, held)
        self._tally.changed += len(changes)
        self._tally.zero += len(regions) - len(changes)
        for start, region in regions:
            if start not in changes:
                self._settle(start)
                self._phase.done += len(region)
        await self._send_changes(list(changes.values()))

    # --- both: compare, then send what differs ---------------------------------------------------------------------

    async def _compare(self, parts: Sequence[Part]) -> None:
        size = self._geometry.region_size
        runs = [(offset // size, -(-len(data) // size)) for offset, data in parts]
        ours, theirs = await asyncio.gather(
            self._read_and_digest(parts), self._session.digests(size, runs, self._tally)
        )
        differing = differing_pieces(ours, theirs, REGION_DIGEST_SIZE)
        regions = list(self._regions(parts))
        self._tally.equal += len(regions) - len(differing)
        self._tally.changed += len(differing)
        for index in {*range(len(regions))}.difference(differing):
            self._settle(regions[index][0])
            self._phase.done += len(regions[index][1])
        if not differing:
            return
        expected = [ours[index * REGION_DIGEST_SIZE : (index + 1) * REGION_DIGEST_SIZE] for index in differing]
        chosen = [regions[index] for index in differing]
        if not self._refiner.asking:
            self._refiner.sent_whole(len(chosen))
            changes = [
                (region, [_whole(region)], wanted, True) for region, wanted in zip(chosen, expected, strict=True)
            ]
            await self._send_changes(await in_thread(_encode_all, changes))
            return
        blocks = await self._refiner.differing_blocks(
            chosen, lambda piece_size, runs: self._session.digests(piece_size, runs, self._tally)
        )
        changes = [(region, runs, wanted, False) for region, wanted, runs in zip(chosen, expected, blocks, strict=True)]
        await self._send_changes(await in_thread(_encode_all, changes))

    def _settle(self, offset: int) -> None:
        if self._settling:
            self._stream.settle(offset // self._geometry.region_size, 1)

    async def _read_and_digest(self, parts: Sequence[Part]) -> bytes:
        region_size, key = self._geometry.region_size, self._session.key
        held, found = await self._source.read_and_digest(parts, region_size, key, REGION_DIGEST_SIZE)
        self._tally.source_read += sum(length for one in held for _, length in one)
        return found

    async def _send_again(self, offsets: Sequence[int]) -> None:
        """Send regions whole whose digest did not match after their change. A second mismatch is a broken disk."""
        for offset in offsets:
            data = memoryview(bytearray(min(self._geometry.region_size, self._geometry.size - offset)))
            await self._read(offset, data)
            region = (offset, data)
            wanted = await in_thread(digest, data, self._session.key)
            await self._send_changes([_encode(region, [_whole(region)], wanted, uncompared=True)])
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

    def _regions(self, parts: Iterable[Part]) -> Iterable[Region]:
        size = self._geometry.region_size
        return (
            (offset + start, data[start : start + size])
            for offset, data in parts
            for start in range(0, len(data), size)
        )

    def _writes_of_parts(self, parts: Sequence[Part], held: Sequence[Sequence[Run]]) -> dict[int, Outgoing]:
        found: dict[int, Outgoing] = {}
        for part, extents in zip(parts, held, strict=True):
            found |= _writes_of_nonzero(self._regions([part]), extents)
        return found

    async def _send_changes(self, changes: Sequence[Outgoing]) -> None:
        """Send changes, as many in a message as fit."""
        gathered: list[Outgoing] = []
        for change in changes:
            if gathered and sum(one.size for one in gathered) + change.size > self._message_size:
                await self._send_gathered(gathered)
                gathered = []
            gathered.append(change)
        if gathered:
            await self._send_gathered(gathered)

    async def _send_gathered(self, changes: Sequence[Outgoing]) -> None:
        await self._stream.send(changes)
        self._phase.done += sum(change.length for change in changes)


def _whole(region: Region) -> Run:
    return 0, -(-len(region[1]) // BLOCK_SIZE)


def _writes_of_nonzero(regions: Iterable[Region], extents: Sequence[Run]) -> dict[int, Outgoing]:
    """By offset the writes of what is not zero in each of consecutive regions; a region of zeros has none. Only
    `extents`, counted from the first region, hold data."""
    found = {}
    position = 0
    for offset, data in regions:
        writes = [
            (start + inner, length)
            for start, end in _clipped(extents, position, position + len(data))
            for inner, length in nonzero_extents(data[start:end])
        ]
        if writes:
            found[offset] = _encode_write(offset, data, writes)
        position += len(data)
    return found


def _clipped(extents: Iterable[Run], begin: int, end: int) -> Iterable[Run]:
    """(start, end) within [begin, end), counted from `begin`, of the extents that reach into it."""
    for start, length in extents:
        low, high = max(start, begin), min(start + length, end)
        if low < high:
            yield low - begin, high - begin


def _encode_all(changes: Iterable[tuple[Region, Sequence[Run], bytes, bool]]) -> list[Outgoing]:
    return [_encode(region, runs, wanted, uncompared=flag) for region, runs, wanted, flag in changes]


def _encode(region: Region, blocks: Sequence[Run], wanted: bytes, *, uncompared: bool) -> Outgoing:
    """The change that brings runs of blocks of a region to what it holds here."""
    writes, zeros = _writes_and_zeros(region[1], blocks)
    return _encode_write(*region, writes, zeros, wanted, uncompared=uncompared)


def _encode_write(
    offset: int,
    data: memoryview,
    writes: Sequence[Run],
    zeros: Sequence[Run] = (),
    wanted: bytes = b"",
    *,
    uncompared: bool = False,
) -> Outgoing:
    request = pb.WriteRegionRequest(
        offset=offset,
        length=len(data),
        writes=[pb.Extent(offset=start, length=length) for start, length in writes],
        zeros=[pb.Extent(offset=start, length=length) for start, length in zeros],
        digest=wanted,
        uncompared=uncompared,
    )
    return encode_write(request, [data[start : start + length] for start, length in writes])


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
