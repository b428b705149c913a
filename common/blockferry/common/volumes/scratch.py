"""A volume whose changes are thrown away: what is written lies in a file without a name, and the volume below stays as
it is.

    write ──▶ ┌─ scratch ──┐   a sparse file in which each block lies at its own offset
    read  ◀── └─ base ─────┘   whatever was neither written nor zeroed

The file is gone with the process, however that ends.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from blockferry.common import disk, linux
from blockferry.common.blocks import blocks_of, clip, runs
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Provenance
from blockferry.common.volumes.volume import Volume, in_thread
from pyroaring import BitMap64


class ScratchVolume(Volume):
    """`base`, which is closed with this, under at most `limit` bytes of changes.

    Nobody may change two parts of one block at the same time: what is around them is read first. Reads, and changes of
    other blocks, may go on meanwhile. Nothing is ever durable.
    """

    def __init__(self, base: Volume, fd: int, directory: Path, limit: int) -> None:
        self.uri = base.uri
        self.size = base.size
        self.block_size = BLOCK_SIZE
        self.preferred_size = base.preferred_size
        self._base = base
        self._fd = fd
        self._directory = directory
        self._limit = limit
        self._data = BitMap64()
        self._zero = BitMap64()

    @classmethod
    async def open(cls, base: Volume, directory: Path, limit: int) -> ScratchVolume:
        """Raises what `from_os_error` makes of a directory in which no file can be made."""
        try:
            fd = await in_thread(_nameless, directory, base.size)
        except OSError as error:
            raise from_os_error(error, f"cannot make a file in {directory}", volume=base.uri) from error
        return cls(base, fd, directory, limit)

    @property
    def zeroing(self) -> str:
        return "scratch"

    @property
    def bytes_held(self) -> int:
        """Bytes of changes."""
        return len(self._data) * BLOCK_SIZE

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        touched = blocks_of(offset, len(buffer))
        if self._data.contains_range(touched.start, touched.stop) and _in_one_container(touched):
            try:
                return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
            except OSError:
                return False
        if clip(self._data, touched) or clip(self._zero, touched):
            return False
        return self._base.read_now(offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        wanted = blocks_of(offset, len(buffer))
        data, zero = clip(self._data, wanted), clip(self._zero, wanted)
        if len(data) + len(zero) < len(wanted):
            # All of it in one go: what is here is put on top.
            await self._base.read_into(offset, buffer)
        for first, count in runs(zero):
            start, stop = _within(first, count, offset, len(buffer))
            buffer[start:stop] = bytes(stop - start)
        if data:
            await self._failing("cannot read", offset, len(buffer), self._patch, data, offset, buffer)

    def _patch(self, data: BitMap64, offset: int, buffer: memoryview) -> None:
        for first, count in runs(data):
            start, stop = _within(first, count, offset, len(buffer))
            while start < stop:
                done = os.preadv(self._fd, [buffer[start:stop]], offset + start)
                assert done, "nobody else has this file"
                start += done

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        wanted, end = blocks_of(offset, length), offset + length
        blocks = BitMap64()
        for start, size in await self._base.data_extents(offset, length):
            touched = blocks_of(start, size)
            blocks.add_range(touched.start, touched.stop)
        blocks -= clip(self._zero, wanted)
        blocks |= clip(self._data, wanted)
        found = []
        for first, count in runs(blocks):
            start = max(first * BLOCK_SIZE, offset)
            found.append((start, min((first + count) * BLOCK_SIZE, end) - start))
        return found

    async def allocation(self, region_size: int) -> AllocationMap:
        geometry = Geometry(self.size, region_size)
        below = await self._base.allocation(region_size)
        if not self._data and not self._zero:
            return below
        found = AllocationMap.from_extents(geometry, await self.data_extents(0, self.size), below.provenance)
        if found.provenance is Provenance.ABSENT and len(found.regions) < geometry.count:
            # Of the base nothing is known; what was zeroed is.
            return AllocationMap(geometry, found.regions, Provenance.CONSERVATIVE)
        return found

    async def prefetch(self, offset: int, length: int) -> None:
        await self._base.prefetch(offset, length)

    # --- changing -----------------------------------------------------------------------------------------------------

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        for start, data in extents:
            if not len(data):
                continue
            offset, whole = await self._whole_blocks(start, memoryview(data))
            touched = blocks_of(offset, len(whole))
            self._refuse_past_limit(touched, start, len(data))
            await self._failing("cannot write", start, len(data), self._write, offset, whole)
            self._data.add_range(touched.start, touched.stop)
            self._zero.remove_range(touched.start, touched.stop)

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            count = disk.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count

    def _refuse_past_limit(self, touched: range, offset: int, length: int) -> None:
        more = len(touched) - len(clip(self._data, touched))
        if (len(self._data) + more) * BLOCK_SIZE > self._limit:
            raise BlockferryError(
                Code.OUT_OF_SPACE,
                "cannot write",
                cause=f"what is thrown away takes {self.bytes_held} bytes, and may take {self._limit}",
                next="begin again with a higher limit",
                volume=self.uri,
                offset=offset,
                length=length,
            )

    async def _whole_blocks(self, offset: int, data: memoryview) -> tuple[int, memoryview]:
        """An extent widened to whole blocks, with what is there now around it."""
        touched = blocks_of(offset, len(data))
        start, end = touched.start * BLOCK_SIZE, min(touched.stop * BLOCK_SIZE, self.size)
        if (start, end) == (offset, offset + len(data)):
            return offset, data
        wide = memoryview(bytearray(end - start))
        for edge in {touched.start, touched.stop - 1}:
            first = edge * BLOCK_SIZE
            await self.read_into(first, wide[first - start : first - start + BLOCK_SIZE])
        wide[offset - start : offset - start + len(data)] = data
        return start, wide

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        held = 0
        for offset, length in extents:
            held += sum(size for _, size in await self.data_extents(offset, length))
            end = offset + length
            first = min(-(-offset // BLOCK_SIZE) * BLOCK_SIZE, end)
            last = max(end if end == self.size else end // BLOCK_SIZE * BLOCK_SIZE, first)
            for start, stop in ((offset, first), (last, end)):
                if start < stop and await self.data_extents(start, stop - start):
                    await self.write([(start, bytes(stop - start))])
            if first < last:
                touched = blocks_of(first, last - first)
                self._zero.add_range(touched.start, touched.stop)
                freed = list(runs(clip(self._data, touched)))
                self._data.remove_range(touched.start, touched.stop)
                await in_thread(self._free, freed)
        return held

    def _free(self, freed: Sequence[tuple[int, int]]) -> None:
        for first, count in freed:
            try:
                linux.fallocate(self._fd, linux.PUNCH_HOLE, first * BLOCK_SIZE, count * BLOCK_SIZE)
            except OSError:
                # Then it only takes space.
                return

    async def flush(self) -> None:
        """Nothing of it will be needed after a crash."""

    async def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            await in_thread(os.close, fd)
        await self._base.close()

    async def _failing(
        self, what: str, offset: int, length: int, work: Callable[..., None], *arguments: object
    ) -> None:
        """Do blocking `work` on a thread; its failures are the volume's."""
        try:
            await in_thread(work, *arguments)
        except OSError as error:
            raise from_os_error(error, what, volume=self.uri, offset=offset, length=length) from error


_CONTAINER = 1 << 16


def _in_one_container(blocks: range) -> bool:
    # Across containers `contains_range` of 64-bit bitmaps is not to be trusted (blocks.py).
    return blocks.start // _CONTAINER == (blocks.stop - 1) // _CONTAINER


def _within(first: int, count: int, offset: int, length: int) -> tuple[int, int]:
    """(start, stop) of a run of blocks in a buffer of `length` bytes that begins at `offset`."""
    return max(first * BLOCK_SIZE - offset, 0), min((first + count) * BLOCK_SIZE - offset, length)


def _nameless(directory: Path, size: int) -> int:
    """A file of `size` bytes that goes with its descriptor."""
    path = directory / f".blockferry-{uuid.uuid4().hex}"
    fd = disk.create(path)
    try:
        disk.unlink(path)
        disk.truncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd
