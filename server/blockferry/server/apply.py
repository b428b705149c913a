"""Applying one change to the volume of a session: the single handler of WriteRegion and UnmapRegion, unary or in bulk.

Everything in a request is checked before anything is touched. Invariant 2: zeros arrive as an operation and are never
left out. Invariant 6: bytes that are already there are not written again; unmapping is exempt where the disk can
deallocate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from blockferry.common.digests import REGION_DIGEST_SIZE, digest, is_zero, nonzero_extents
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.linux import Zeroing
from blockferry.common.regions import BLOCK_SIZE, Geometry
from blockferry.common.volumes import Volume, in_thread
from blockferry.v1 import replication_pb2 as pb

COMPARE_SIZE = 1024 * 1024
"""Bytes read at once where zeros must be written out and equal blocks are left alone."""


@dataclass
class Result:
    """What a change did; bytes."""

    mismatch: bool = False
    written: int = 0
    unmapped: int = 0
    read: int = 0
    digest: bytes | None = None
    """What the region holds now, where that came to be known without reading for it."""

    def add_to(self, message: pb.ChangeResult) -> None:
        """Sum into a message."""
        message.mismatch = message.mismatch or self.mismatch
        message.bytes_written += self.written
        message.bytes_unmapped += self.unmapped
        message.bytes_read += self.read


def _refuse(volume: str, offset: int, length: int, what: str, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.INVALID_ARGUMENT,
        what,
        cause=cause,
        next="nothing was changed; correct the request",
        volume=volume,
        offset=offset,
        length=length,
    )


def check_unmap(name: str, geometry: Geometry, request: pb.UnmapRegionRequest) -> None:
    """Raise INVALID_ARGUMENT unless the range is made of whole regions of the volume."""
    offset, length = request.offset, request.length
    end = offset + length
    if length == 0 or end > geometry.size:
        raise _refuse(name, offset, length, "cannot unmap", f"the range is empty or ends past {geometry.size} bytes")
    if offset % geometry.region_size or (length % geometry.region_size and end != geometry.size):
        raise _refuse(name, offset, length, "cannot unmap", f"it is not whole regions of {geometry.region_size} bytes")


def check_write(name: str, geometry: Geometry, request: pb.WriteRegionRequest, received: int) -> None:
    """Raise INVALID_ARGUMENT unless the request names one region and extents inside it that match the `received`
    bytes of data."""
    offset, length = request.offset, request.length
    if offset >= geometry.size or offset % geometry.region_size:
        raise _refuse(name, offset, length, "cannot write", f"no region of {geometry.region_size} bytes starts there")
    actual = min(geometry.region_size, geometry.size - offset)
    if length != actual:
        raise _refuse(name, offset, length, "cannot write", f"the region there has {actual} bytes")
    _check_extents(name, request, request.writes)
    _check_extents(name, request, request.zeros)
    total = sum(extent.length for extent in request.writes)
    if total != received:
        raise _refuse(name, offset, length, "cannot write", f"{received} bytes of data came for extents of {total}")
    if request.digest and len(request.digest) != REGION_DIGEST_SIZE:
        raise _refuse(name, offset, length, "cannot write", f"a digest has {REGION_DIGEST_SIZE} bytes")
    if request.writes and request.zeros:
        both = sorted((extent.offset, extent.length) for extent in [*request.writes, *request.zeros])
        if any(start + size > following for (start, size), (following, _) in itertools.pairwise(both)):
            raise _refuse(name, offset, length, "cannot write", "written and zeroed extents overlap")


def _check_extents(name: str, request: pb.WriteRegionRequest, extents: Sequence[pb.Extent]) -> None:
    end = 0
    for extent in extents:
        if extent.length == 0 or extent.offset < end or extent.offset + extent.length > request.length:
            raise _refuse(
                name,
                request.offset,
                request.length,
                "cannot write",
                f"extent ({extent.offset}, {extent.length}) is empty, out of order or outside the region",
            )
        end = extent.offset + extent.length


async def write_region(
    volume: Volume, key: bytes, request: pb.WriteRegionRequest, data: memoryview, *, was_zero: bool
) -> Result:
    """Apply a checked request. `was_zero`: the region is proven to read as zeros before the change."""
    result = Result()
    writes: list[tuple[int, memoryview]] = []
    position = 0
    for extent in request.writes:
        writes.append((extent.offset, data[position : position + extent.length]))
        position += extent.length
    if request.uncompared:
        result.read += request.length
        present = memoryview(bytearray(request.length))
        await volume.read_into(request.offset, present)
        writes = [piece for offset, part in writes for piece in differing_blocks(present, offset, part)]
    if writes:
        await volume.write([(request.offset + offset, part) for offset, part in writes])
        result.written += sum(len(part) for _, part in writes)
    crash_point("apply-written")
    if request.zeros:
        await _unmap(volume, [(request.offset + extent.offset, extent.length) for extent in request.zeros], result)
    if request.digest:
        result.read += request.length
        present = memoryview(bytearray(request.length))
        await volume.read_into(request.offset, present)
        result.digest = await in_thread(digest, present, key)
        result.mismatch = result.digest != request.digest
    elif len(data) == request.length:
        result.digest = await in_thread(digest, data, key)
    elif was_zero:
        result.digest = await in_thread(_digest_of_sparse, request.length, writes, key)
    return result


def _digest_of_sparse(length: int, writes: list[tuple[int, memoryview]], key: bytes) -> bytes:
    region = bytearray(length)
    for offset, part in writes:
        region[offset : offset + len(part)] = part
    return digest(region, key)


async def unmap_region(volume: Volume, request: pb.UnmapRegionRequest) -> Result:
    """Apply a checked request."""
    result = Result()
    await _unmap(volume, [(request.offset, request.length)], result)
    return result


async def _unmap(volume: Volume, extents: list[tuple[int, int]], result: Result) -> None:
    if volume.zeroing == Zeroing.WRITE.value:
        extents = [found for offset, length in extents for found in await _not_zero(volume, offset, length, result)]
    if extents:
        result.unmapped += await volume.unmap(extents)


async def _not_zero(volume: Volume, offset: int, length: int, result: Result) -> list[tuple[int, int]]:
    """The parts of a range that do not read as zeros: where zeros must be written out, equal ones are left alone."""
    found: list[tuple[int, int]] = []
    buffer = memoryview(bytearray(min(COMPARE_SIZE, length)))
    end = offset + length
    while offset < end:
        part = buffer[: min(COMPARE_SIZE, end - offset)]
        await volume.read_into(offset, part)
        result.read += len(part)
        if not is_zero(part):
            found += [(offset + start, size) for start, size in nonzero_extents(part)]
        offset += len(part)
    return found


def differing_blocks(present: memoryview, offset: int, data: memoryview) -> list[tuple[int, memoryview]]:
    """(offset, data) of the runs of blocks of `data`, to be written at `offset`, that are not `present` there."""
    found: list[tuple[int, memoryview]] = []
    start = -1
    position = 0
    while position < len(data):
        # Blocks are aligned in the region, so the first and last pieces of an unaligned extent are shorter.
        step = min(BLOCK_SIZE - (offset + position) % BLOCK_SIZE, len(data) - position)
        # A bytearray on the left compares by memcmp.
        here = bytearray(present[offset + position : offset + position + step])
        if here == data[position : position + step]:
            if start >= 0:
                found.append((offset + start, data[start:position]))
                start = -1
        elif start < 0:
            start = position
        position += step
    if start >= 0:
        found.append((offset + start, data[start:]))
    return found
