"""A volume under deltas: what lies in a delta is read there, all else from the volume below.

    write ──▶ ┌─ top ────┐   the deltas, newest first: a block is read from the first one that holds it
    read  ◀── ├─ … ──────┤
              └─ base ───┘   past its end it reads as zeros

With a `top` the volume is writable, and everything written or zeroed goes there: the volume below stays as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from blockferry.common.blocks import blocks_of, clip, runs
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Provenance, Run
from blockferry.common.volumes import Volume, in_thread
from blockferry.server.delta import Delta
from blockferry.server.gate import Gate
from pyroaring import BitMap64

Layers = Sequence[Delta]
"""Newest first."""


class OverlayVolume(Volume):
    """`size` bytes of `base` under the deltas that `layers` names at the time of each call.

    `gate` is passed by whoever reads: whoever closes it may change the layers and the base. `limit` bounds the bytes of
    data in `top`; 0 for none.
    """

    def __init__(
        self,
        uri: str,
        size: int,
        base: Volume,
        layers: Callable[[], Layers],
        gate: Gate,
        *,
        top: Delta | None = None,
        limit: int = 0,
    ) -> None:
        self.uri = uri
        self.size = size
        self.block_size = BLOCK_SIZE
        self.base = base
        self.top = top
        self._layers = layers
        self._gate = gate
        self._limit = limit
        self._flushing = asyncio.Lock()

    @property
    def zeroing(self) -> str:
        return "journal"

    # --- reading --------------------------------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        async with self._gate.passing():
            await self._read(offset, buffer)

    async def _read(self, offset: int, buffer: memoryview) -> None:
        wanted = blocks_of(offset, len(buffer))
        missing = BitMap64()
        missing.add_range(wanted.start, wanted.stop)
        found: list[tuple[Delta | None, list[Run]]] = []
        for delta in self._layers():
            for here, blocks in ((delta, delta.data), (None, delta.zero)):
                hit = missing & blocks
                if hit:
                    missing -= hit
                    found.append((here, list(runs(hit))))
        if missing:
            # All of it in one go: what a delta holds is put on top.
            below = buffer[: max(0, min(len(buffer), self.base.size - offset))]
            if below:
                await self.base.read_into(offset, below)
            buffer[len(below) :] = bytes(len(buffer) - len(below))
        if found:
            try:
                await in_thread(_patch, found, offset, buffer)
            except OSError as error:
                raise from_os_error(error, "cannot read", volume=self.uri, offset=offset, length=len(buffer)) from error

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        async with self._gate.passing():
            return await self._data_extents(offset, length)

    async def _data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        blocks = await self._base_blocks(offset, length)
        wanted = blocks_of(offset, length)
        for delta in reversed(self._layers()):
            blocks -= delta.zero
            blocks |= clip(delta.data, wanted)
        end = offset + length
        return [
            (max(first * BLOCK_SIZE, offset), min((first + count) * BLOCK_SIZE, end) - max(first * BLOCK_SIZE, offset))
            for first, count in runs(blocks)
        ]

    async def _base_blocks(self, offset: int, length: int) -> BitMap64:
        """The blocks of a range in which the volume below may hold data."""
        blocks = BitMap64()
        length = min(length, self.base.size - offset)
        if length > 0:
            for start, size in await self.base.data_extents(offset, length):
                touched = blocks_of(start, size)
                blocks.add_range(touched.start, touched.stop)
        return blocks

    async def allocation(self, region_size: int) -> AllocationMap:
        geometry = Geometry(self.size, region_size)
        async with self._gate.passing():
            # Data that the file system has not placed yet may be reported as a hole.
            below = await self.base.allocation(region_size)
            if any(delta.data or delta.zero for delta in self._layers()):
                extents = await self._data_extents(0, self.size)
                found = AllocationMap.from_extents(geometry, extents, below.provenance)
            else:
                found = below.cut_to(geometry)
        if found.provenance is Provenance.ABSENT and len(found.regions) < geometry.count:
            # Of the base nothing is known; what a delta has zeroed, or the volume has grown by, is.
            return AllocationMap(geometry, found.regions, Provenance.CONSERVATIVE)
        return found

    # --- writing --------------------------------------------------------------------------------------------------

    def _writable(self) -> Delta:
        if self.top is None:
            raise BlockferryError(
                Code.READ_ONLY, f"{self.uri} cannot be written", cause="it is a committed generation", volume=self.uri
            )
        return self.top

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        whole = [(offset, memoryview(data)) for offset, data in extents if len(data)]
        if all(self._aligned(offset, len(data)) for offset, data in whole):
            await self._write(whole)
            return
        for offset, data in whole:
            # One by one: two may share a block.
            await self._write([await self._whole_blocks(offset, data)])

    async def _write(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        top = self._writable()
        self._refuse_past_limit(top, sum(len(data) for _, data in extents))
        for offset, data in extents:
            try:
                await in_thread(top.write, [(offset, data)])
            except OSError as error:
                raise from_os_error(error, "cannot write", volume=self.uri, offset=offset, length=len(data)) from error
        for offset, data in extents:
            touched = blocks_of(offset, len(data))
            top.data.add_range(touched.start, touched.stop)
            if top.zero:
                top.zero.remove_range(touched.start, touched.stop)

    def _refuse_past_limit(self, top: Delta, more: int) -> None:
        if self._limit and top.bytes_held + more > self._limit:
            raise BlockferryError(
                Code.OUT_OF_SPACE,
                f"the journal of {self.uri} is full",
                cause=f"it holds {top.bytes_held} bytes of changes, {more} more would pass its limit of {self._limit}",
                next="raise the limit of the journal, or sync more often; what was committed is untouched",
                volume=self.uri,
            )

    def _aligned(self, offset: int, length: int) -> bool:
        end = offset + length
        return offset % BLOCK_SIZE == 0 and (end % BLOCK_SIZE == 0 or end == self.size)

    async def _whole_blocks(self, offset: int, data: memoryview) -> tuple[int, memoryview]:
        """An extent widened to whole blocks, with what is there now around it."""
        if self._aligned(offset, len(data)):
            return offset, data
        touched = blocks_of(offset, len(data))
        start, end = touched.start * BLOCK_SIZE, min(touched.stop * BLOCK_SIZE, self.size)
        wide = memoryview(bytearray(end - start))
        for edge in {touched.start, touched.stop - 1}:
            first = edge * BLOCK_SIZE
            await self.read_into(first, wide[first - start : first - start + BLOCK_SIZE])
        wide[offset - start : offset - start + len(data)] = data
        return start, wide

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        top = self._writable()
        held = 0
        for offset, length in extents:
            held += sum(size for _, size in await self.data_extents(offset, length))
            end = offset + length
            first = min(-(-offset // BLOCK_SIZE) * BLOCK_SIZE, end)
            last = max(end if end == self.size else end // BLOCK_SIZE * BLOCK_SIZE, first)
            await self._zero_blocks(top, first, last - first)
            for start, stop in ((offset, first), (last, end)):
                if start < stop and await self.data_extents(start, stop - start):
                    await self.write([(start, bytes(stop - start))])
        return held

    async def _zero_blocks(self, top: Delta, offset: int, length: int) -> None:
        """Zero whole blocks. Where nothing below holds data there is nothing to note."""
        if not length:
            return
        wanted = blocks_of(offset, length)
        async with self._gate.passing():
            below = await self._base_blocks(offset, length)
            for delta in self._layers():
                if delta is not top:
                    below |= clip(delta.data, wanted)
        freed = list(runs(clip(top.data, wanted)))
        top.data.remove_range(wanted.start, wanted.stop)
        top.zero |= below
        await in_thread(top.free, freed)

    async def flush(self) -> None:
        """Make everything written durable, and then the index that says where it is (invariant 5)."""
        top = self._writable()
        # One at a time: the index of an earlier one must not replace that of a later one.
        async with self._flushing:
            data, zero = top.data.copy(), top.zero.copy()
            try:
                await in_thread(top.flush)
                await in_thread(top.save, data, zero)
            except OSError as error:
                raise from_os_error(error, "cannot flush", volume=self.uri) from error

    async def close(self) -> None:
        """The base and the deltas belong to whoever made this."""


def _patch(found: Iterable[tuple[Delta | None, list[Run]]], offset: int, buffer: memoryview) -> None:
    """Put runs of blocks on top of what a buffer holds from `offset`; without a delta they are zeros."""
    for delta, blocks in found:
        for first, count in blocks:
            start = max(first * BLOCK_SIZE - offset, 0)
            stop = min((first + count) * BLOCK_SIZE - offset, len(buffer))
            if delta is None:
                buffer[start:stop] = bytes(stop - start)
            else:
                delta.read_into(offset + start, buffer[start:stop])
