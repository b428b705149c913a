"""A delta: the blocks in which one content of a volume differs from another. Blocking calls.

    NAME          the data: a sparse file in which every block lies at its own offset in the volume
    NAME.index    which blocks those are, and which are zeros: a sealed file (sealed.py)

A *redo* holds what is newer than the volume below it, an *undo* what is older; both are read and written the same way.
Invariant 5: an index is written only once the data it vouches for is flushed. docs/formats.md has every byte.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from blockferry.common import disk, linux
from blockferry.common.blocks import runs
from blockferry.common.digests import Data
from blockferry.common.durable import write_atomic
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE, Run
from blockferry.server.generations import corrupt
from blockferry.server.sealed import seal, unseal
from pyroaring import BitMap64

FORMAT = 1
_MAGIC = b"BFDELTA\x00"
INDEX_SUFFIX = ".index"


class _Header(msgspec.Struct, frozen=True):
    format: int
    block_size: int
    size: int
    data_length: int
    zero_length: int


def extents(blocks: BitMap64, size: int) -> list[tuple[int, int]]:
    """(offset, length) in bytes of runs of blocks, cut at the end of a volume of `size` bytes."""
    ends = ((first * BLOCK_SIZE, min((first + count) * BLOCK_SIZE, size)) for first, count in runs(blocks))
    return [(start, end - start) for start, end in ends if start < end]


def below(blocks: BitMap64, size: int) -> BitMap64:
    """Those of `blocks` that a volume of `size` bytes has."""
    found = blocks.copy()
    end = -(-size // BLOCK_SIZE)
    if found and found.max() >= end:
        found.remove_range(end, found.max() + 1)
    return found


def index_of(path: Path) -> Path:
    """Where the index of a delta is."""
    return path.with_name(path.name + INDEX_SUFFIX)


class Delta:
    """One delta. `data` and `zero` are disjoint sets of block numbers; what is in neither is as in the volume below.

    The last block of a volume whose size is no multiple of the block size is as short as the volume.
    """

    def __init__(self, path: Path, fd: int, size: int, data: BitMap64, zero: BitMap64) -> None:
        self.path = path
        self.size = size
        """Bytes of the volume this is a delta of."""
        self.data = data
        self.zero = zero
        self._fd = fd

    @classmethod
    def create(cls, path: Path, size: int) -> Delta:
        """An empty delta. It exists for others once `save` has returned."""
        fd = disk.create(path, os.O_RDWR | os.O_TRUNC)
        try:
            disk.truncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, size, BitMap64(), BitMap64())

    @classmethod
    def open(cls, path: Path) -> Delta:
        """An existing delta as it was saved last. Raises CORRUPT_STATE where its index or its data is missing or
        damaged, UNSUPPORTED where a newer version wrote it."""
        try:
            found = unseal(_MAGIC, _Header, index_of(path).read_bytes())
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise corrupt(path, f"{Path(str(error.filename)).name} is missing") from error
        try:
            if found is None:
                raise corrupt(path, "its index fails its checksum")
            header, body = found
            if header.format > FORMAT:
                raise BlockferryError(
                    Code.UNSUPPORTED,
                    f"{path} was written by a newer blockferry",
                    cause=f"it has format {header.format}, this server knows {FORMAT}",
                    next="run the newer server; nothing was changed",
                )
            if header.block_size != BLOCK_SIZE or len(body) != header.data_length + header.zero_length:
                raise corrupt(path, "its index contradicts itself")
            if os.fstat(fd).st_size < header.size:
                raise corrupt(path, "its data is cut off")
            data = BitMap64.deserialize(body[: header.data_length])
            zero = BitMap64.deserialize(body[header.data_length :])
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, header.size, data, zero)

    @staticmethod
    def remove(path: Path) -> None:
        """Remove a delta that may be gone in part: the index first, for without it the data means nothing."""
        disk.unlink(index_of(path))
        disk.crash_point("delta-index-removed")
        disk.unlink(path)

    @property
    def bytes_held(self) -> int:
        """Bytes of data."""
        return len(self.data) * BLOCK_SIZE

    def resize(self, size: int) -> None:
        """Become a delta of a volume of another size: what it grows by reads as zeros."""
        self.data, self.zero = below(self.data, size), below(self.zero, size)
        disk.truncate(self._fd, size)
        self.size = size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from blocks that have data here. A short read is an error, never silently zeros."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise corrupt(self.path, f"its data ends at {offset + done}")
            done += count

    def write(self, extents: Iterable[tuple[int, Data]]) -> None:
        """Write whole blocks; the caller notes them in `data` afterwards."""
        for start, data in extents:
            view, offset = memoryview(data), start
            while view:
                count = disk.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count

    def free(self, blocks: Sequence[Run]) -> None:
        """Give back the space of blocks that have no data any more; where that is not possible they only take space."""
        for first, count in blocks:
            with contextlib.suppress(OSError):
                linux.fallocate(self._fd, linux.PUNCH_HOLE, first * BLOCK_SIZE, count * BLOCK_SIZE)

    def flush(self) -> None:
        """Make the data durable."""
        disk.fsync(self._fd)

    def save(self, data: BitMap64, zero: BitMap64) -> None:
        """Make these sets durable as the index of what was flushed before (invariant 5)."""
        for blocks in (data, zero):
            blocks.run_optimize()
        parts = [data.serialize(), zero.serialize()]
        header = _Header(FORMAT, BLOCK_SIZE, self.size, *map(len, parts))
        write_atomic(index_of(self.path), seal(_MAGIC, header, parts))

    def forget_pages(self) -> None:
        """What the kernel remembers of the data is no evidence of what is on the disk."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file, once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
