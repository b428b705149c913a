"""Applying one change to the volume of a session: the single handler of WriteRegion and UnmapRegion, unary or in bulk.

Everything in a request is checked before anything is touched. Invariant 2: zeros arrive as an operation and are never
left out. Invariant 6: bytes that are already there are not written again; unmapping is exempt where the disk can
deallocate.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from blockferry.common.digests import (
    REGION_DIGEST_SIZE,
    Data,
    digest,
    digest_of_parts,
    is_zero,
    nonzero_extents,
)
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code
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


@dataclass
class Write:
    """One checked WriteRegion on its way."""

    request: pb.WriteRegionRequest
    data: memoryview
    """The request's data, which may be a view of a larger message."""
    was_zero: bool
    """The region is proven to read as zeros before the change."""
    pieces: list[tuple[int, memoryview]] = field(default_factory=list)
    """(offset in the region, data) of what is written."""
    result: Result = field(default_factory=Result)

    def __post_init__(self) -> None:
        position = 0
        for extent in self.request.writes:
            self.pieces.append((extent.offset, self.data[position : position + extent.length]))
            position += extent.length
        self.whole = position + sum(extent.length for extent in self.request.zeros) == self.request.length

    @property
    def content_is_known(self) -> bool:
        """Whether the region's content after the change follows from the request alone."""
        return self.whole or (self.was_zero and not self.request.digest)

    def content(self) -> Iterator[tuple[int, Data | None]]:
        """(bytes, data) of the region after the change, where it is known; without data they are zeros."""
        position = end = 0
        for extent in self.request.writes:
            if extent.offset > end:
                yield extent.offset - end, None
            yield extent.length, self.data[position : position + extent.length]
            position += extent.length
            end = extent.offset + extent.length
        if self.request.length > end:
            yield self.request.length - end, None


async def write_regions(volume: Volume, key: bytes, changes: Sequence[Write]) -> None:
    """Apply changes of different regions together, in as few hand-offs to threads as possible; each one's `result` says
    what it did.

    The digest of a region that the request describes whole is taken from the request; where part of the region was
    inferred from block digests, it is read back (the check of the second level of comparison).
    """
    for change in changes:
        if change.request.uncompared:
            present = await _read(volume, change)
            change.pieces = [one for piece in change.pieces for one in differing_blocks(present, *piece)]
        change.result.written = sum(len(part) for _, part in change.pieces)
    writes = [(change.request.offset + offset, part) for change in changes for offset, part in change.pieces]
    known = [change for change in changes if change.content_is_known]
    _, found = await asyncio.gather(volume.write(writes), in_thread(_digests, known, key))
    crash_point("apply-written")
    for change in changes:
        if change.request.zeros:
            start = change.request.offset
            extents = [(start + extent.offset, extent.length) for extent in change.request.zeros]
            await zero_out(volume, extents, change.result)
    for change, value in zip(known, found, strict=True):
        change.result.digest = value
    for change in changes:
        if change.request.digest and not change.content_is_known:
            change.result.digest = await in_thread(digest, await _read(volume, change), key)
        if change.request.digest:
            change.result.mismatch = change.result.digest != change.request.digest


def _digests(changes: Sequence[Write], key: bytes) -> list[bytes]:
    return [digest_of_parts(change.content(), change.request.length, key) for change in changes]


async def _read(volume: Volume, change: Write) -> memoryview:
    region = memoryview(bytearray(change.request.length))
    await volume.read_into(change.request.offset, region)
    change.result.read += len(region)
    return region


async def unmap_region(volume: Volume, request: pb.UnmapRegionRequest) -> Result:
    """Apply a checked request."""
    result = Result()
    await zero_out(volume, [(request.offset, request.length)], result)
    return result


async def zero_out(volume: Volume, extents: list[tuple[int, int]], result: Result) -> None:
    """Make ranges read as zeros, without reading where the volume can deallocate."""
    freed, left = await volume.deallocate(extents)
    # What is left reads as before: it is looked at before the first zero is written over it.
    differing = [found for offset, length in left for found in await _not_zero(volume, offset, length, result)]
    if differing:
        freed += await volume.unmap(differing)
    result.unmapped += freed
    if differing or len(left) < len(extents):
        crash_point("apply-unmapped")


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
        # A plain == of two memoryviews compares element by element; this is a memcmp.
        if bytes(present[offset + position : offset + position + step]).startswith(data[position : position + step]):
            if start >= 0:
                found.append((offset + start, data[start:position]))
                start = -1
        elif start < 0:
            start = position
        position += step
    if start >= 0:
        found.append((offset + start, data[start:]))
    return found
