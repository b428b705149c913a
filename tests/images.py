"""Images for tests: built from a description, looked at from outside, and an oracle for what a sync must do.

Nothing here imports blockferry. Expectations follow from the decision table alone: for every region what both sides
hold, and for every block of 4 KiB whether it differs.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import struct
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 4096
KIB = 1024
MIB = 1024 * 1024

PIECE = 64 * KIB
"""The level of digests between a region and a block."""

_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02
_FIEMAP = 0xC020660B
_FIEMAP_SYNC = 1
_EXTENT_LAST = 0x1
_EXTENT_UNWRITTEN = 0x800
_EXTENT = struct.Struct("=QQQ16xI12x")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass(frozen=True)
class Zeros:
    """Zeros written out as data; bytes."""

    length: int


@dataclass(frozen=True)
class Hole:
    """A range deallocated, as a trim does; bytes."""

    length: int


Content = bytes | Zeros | Hole
Piece = tuple[int, Content]
"""(offset in bytes, what is there)"""


_HIGH = bytes(byte | 0x80 for byte in range(256))


def noise(seed: int | str, length: int) -> bytes:
    """`length` random bytes from 128 up, equal for equal seeds: never zero, and different from any ASCII text."""
    return random.Random(seed).randbytes(length).translate(_HIGH)


def build(path: Path, size: int, pieces: Iterable[Piece] = ()) -> Path:
    """Make a sparse image of `size` bytes with these pieces."""
    with path.open("wb") as file:
        file.truncate(size)
    change(path, pieces)
    return path


def change(path: Path, pieces: Iterable[Piece]) -> None:
    """Write pieces into an existing image, in order; its size stays. Durable when this returns."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        for offset, content in pieces:
            if isinstance(content, Hole):
                # Past the end too, or the last partial page stays allocated.
                length = content.length if offset + content.length < size else content.length + 2 * BLOCK
                if _libc.fallocate(fd, _KEEP_SIZE_AND_PUNCH_HOLE, offset, length):
                    raise OSError(ctypes.get_errno(), "cannot punch a hole")
                continue
            data = bytes(content.length) if isinstance(content, Zeros) else content
            assert offset + len(data) <= size, "a piece ends outside the image"
            assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def extents(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of what the file system holds as data, merged and cut at the end of the file.

    By FIEMAP: unlike SEEK_DATA it does not call a range data because reading has put its zeros into the page cache
    above a preallocation, which XFS keeps around every copied-on-write block.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        try:
            found = list(_fiemap(fd))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            found = list(_seek(fd, size))
    finally:
        os.close(fd)
    merged: list[tuple[int, int]] = []
    for offset, length in found:
        length = min(length, size - offset)
        if length <= 0:
            continue
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    return merged


def _fiemap(fd: int) -> Iterable[tuple[int, int]]:
    position, count = 0, 512
    while True:
        buffer = bytearray(32 + count * _EXTENT.size)
        struct.pack_into("=QQIIII", buffer, 0, position, (1 << 64) - 1 - position, _FIEMAP_SYNC, 0, count, 0)
        fcntl.ioctl(fd, _FIEMAP, buffer)
        (mapped,) = struct.unpack_from("=I", buffer, 20)
        flags = _EXTENT_LAST
        for index in range(mapped):
            logical, _, length, flags = _EXTENT.unpack_from(buffer, 32 + index * _EXTENT.size)
            position = logical + length
            if not flags & _EXTENT_UNWRITTEN:
                yield logical, length
        if flags & _EXTENT_LAST:
            return


def _seek(fd: int, size: int) -> Iterable[tuple[int, int]]:
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position - start


@dataclass(frozen=True)
class Snapshot:
    """An image at one moment: its bytes, and the (offset, length) extents that are allocated."""

    content: bytes
    data: list[tuple[int, int]]

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """Take a file's."""
        return cls(path.read_bytes(), extents(path))

    @classmethod
    def empty(cls, size: int) -> Snapshot:
        """One hole of `size` bytes."""
        return cls(bytes(size), [])

    def allocated(self, start: int, end: int) -> int:
        """Allocated bytes in [start, end)."""
        return sum(max(0, min(end, at + length) - max(start, at)) for at, length in self.data)

    def grown(self, size: int) -> Snapshot:
        """The same with zeros up to `size`."""
        return Snapshot(self.content + bytes(size - len(self.content)), self.data)


@dataclass
class Expected:
    """What the report of a sync must say. Bytes."""

    regions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("skip", "unmap", "send", "compare"), 0))
    results: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("zero", "equal", "changed"), 0))
    source_read: int = 0
    destination_read: int = 0
    destination_written: int = 0
    data_sent: int = 0
    unmapped: int = 0

    def bytes(self) -> dict[str, int]:
        """The fields of `bytes` that follow from the images."""
        return {
            "source_read": self.source_read,
            "destination_read": self.destination_read,
            "destination_written": self.destination_written,
            "data_sent": self.data_sent,
            "unmapped": self.unmapped,
        }


def expect(
    source: Snapshot,
    destination: Snapshot,
    region_size: int,
    sent_whole: Container[int] = frozenset(),
    *,
    cached: bool = True,
) -> Expected:
    """What a sync must do. `sent_whole`: numbers of compared regions for which block digests are not asked for.
    `cached`: the server knows the digests of the newest generation and need not read it to compare."""
    expected = Expected()
    size = len(source.content)
    destination = destination.grown(size)
    for number, start in enumerate(range(0, size, region_size)):
        end = min(start + region_size, size)
        held = destination.allocated(start, end)
        match bool(source.allocated(start, end)), bool(held):
            case False, False:
                expected.regions["skip"] += 1
            case False, True:
                expected.regions["unmap"] += 1
                expected.unmapped += held
            case True, False:
                expected.regions["send"] += 1
                expected.source_read += _held(source, start, end)
                sent = sum(stop - at for at, stop in _blocks(start, end) if any(source.content[at:stop]))
                expected.results["changed" if sent else "zero"] += 1
                expected.data_sent += sent
                expected.destination_written += sent
            case _:
                expected.regions["compare"] += 1
                # What a map proves to be zero inside a region is not read either.
                expected.source_read += _held(source, start, end)
                expected.destination_read += 0 if cached else _held(destination, start, end)
                if source.content[start:end] == destination.content[start:end]:
                    expected.results["equal"] += 1
                else:
                    expected.results["changed"] += 1
                    _expect_changed(expected, source, destination, start, end, region_size, number in sent_whole)
    return expected


def _held(snapshot: Snapshot, start: int, end: int) -> int:
    """Bytes of the blocks in a range that may hold data."""
    return sum(stop - at for at, stop in _blocks(start, end) if snapshot.allocated(at, stop))


def _blocks(start: int, end: int, step: int = BLOCK) -> Iterable[tuple[int, int]]:
    return ((at, min(at + step, end)) for at in range(start, end, step))


def _expect_changed(
    expected: Expected, source: Snapshot, destination: Snapshot, start: int, end: int, region_size: int, whole: bool
) -> None:
    # Sent whole: what is there is read, and what it becomes follows from the message. Otherwise the region is read to
    # find the pieces (its own digest is enough where it is a single piece), and again after the change to check it,
    # unless every block is in the message.
    described = all(source.content[at:stop] != destination.content[at:stop] for at, stop in _blocks(start, end))
    expected.destination_read += end - start if whole or not described else 0
    if not whole:
        asked = [(start, end)] if region_size > PIECE else []
        asked += [
            (at, stop)
            for at, stop in _blocks(start, end, PIECE)
            if source.content[at:stop] != destination.content[at:stop]
        ]
        for at, stop in asked:
            expected.destination_read += _held(destination, at, stop)
    for at, stop in _blocks(start, end):
        ours = source.content[at:stop]
        differs = ours != destination.content[at:stop]
        if any(ours):
            expected.data_sent += stop - at if differs or whole else 0
            expected.destination_written += stop - at if differs else 0
        elif differs or whole:
            expected.unmapped += destination.allocated(at, stop)


def blocks_of(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """Numbers of the blocks that (offset, length) ranges touch."""
    return {block for offset, length in ranges for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))}


def differing_blocks(one: bytes, other: bytes) -> set[int]:
    """Numbers of the blocks in which two images of one size differ."""
    assert len(one) == len(other)
    return {at // BLOCK for at, stop in _blocks(0, len(one)) if one[at:stop] != other[at:stop]}
