"""Raw image files.

Allocation comes from SEEK_DATA/SEEK_HOLE on a descriptor of its own, after an fsync: with dirty pages some file systems
have reported holes where data was about to be. Where the file system cannot tell, everything counts as allocated; most
that cannot do not say so, but call the whole file data (lseek(2)).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from blockferry.common import disk, linux
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from blockferry.common.volumes.descriptor import DescriptorVolume
from blockferry.common.volumes.volume import in_thread

_BLOCKS_UNIT = 512
"""Bytes that st_blocks counts in, whatever the file system (inode(7))."""


class ImageVolume(DescriptorVolume):
    """A regular file. Open one with `ImageVolume.open`; a writable one is created or resized with `create`."""

    def __init__(self, path: Path, fd: int, size: int, writable: bool) -> None:
        super().__init__(path, fd, size, writable)
        self.preferred_size = os.fstat(fd).st_blksize
        self._ladder = linux.ZeroingLadder()

    @classmethod
    async def open(cls, path: Path, *, writable: bool = False) -> ImageVolume:
        """Open an existing image. Raises NOT_FOUND, UNREADABLE, UNSUPPORTED (not a regular file) or
        INVALID_ARGUMENT (empty)."""
        return await in_thread(cls._open, path, writable)

    @classmethod
    async def create(cls, path: Path, size: int) -> ImageVolume:
        """Open `path` for writing, creating it if need be, and give it `size` bytes. An image is never shrunk."""
        return await in_thread(cls._create, path, size)

    @classmethod
    def _open(cls, path: Path, writable: bool) -> ImageVolume:
        what = f"cannot open {path}"
        try:
            # O_NONBLOCK: opening a FIFO by mistake must not hang.
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.EISDIR:
                raise _not_an_image(path, "it is a directory") from error
            raise from_os_error(error, what, volume=str(path)) from error
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                kind = "a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file"
                raise _not_an_image(path, f"it is {kind}")
            if info.st_size == 0:
                raise BlockferryError(
                    Code.INVALID_ARGUMENT,
                    what,
                    cause="it is empty (0 bytes)",
                    next="check that this is the right file",
                    volume=str(path),
                )
            return cls(path, fd, info.st_size, writable)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _create(cls, path: Path, size: int) -> ImageVolume:
        try:
            fd = disk.create(path)
        except OSError as error:
            raise from_os_error(error, f"cannot create {path}", volume=str(path)) from error
        try:
            if os.fstat(fd).st_size > size:
                raise BlockferryError(Code.SIZE_MISMATCH, f"{path} is larger than {size} bytes", volume=str(path))
            disk.truncate(fd, size)
        except OSError as error:
            os.close(fd)
            raise from_os_error(error, f"cannot give {path} {size} bytes", volume=str(path)) from error
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, size, True)

    @property
    def zeroing(self) -> str:
        return self._ladder.method.value

    async def allocation(self, region_size: int) -> AllocationMap:
        return await in_thread(self._allocation, Geometry(self.size, region_size))

    def _allocation(self, geometry: Geometry) -> AllocationMap:
        try:
            # Delayed allocation: what is not on its way to the disk yet may be reported as a hole.
            disk.fsync(self._fd)
        except OSError as error:
            raise from_os_error(error, "cannot read the allocation", volume=self.uri) from error
        try:
            found = linux.data_extents_apart(self._fd, 0, self.size)
            first = next(found, (0, 0))
            if first == (0, self.size) and os.fstat(self._fd).st_blocks * _BLOCKS_UNIT < self.size:
                # All of it data, and less space taken than that: nothing was told.
                return AllocationMap.full(geometry)
            return AllocationMap.from_extents(geometry, itertools.chain([first], found), Provenance.EXACT)
        except OSError as error:
            if error.errno in linux.NOT_SUPPORTED:
                return AllocationMap.full(geometry)
            raise from_os_error(error, "cannot read the allocation", volume=self.uri) from error

    def _held_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        if os.fstat(self._fd).st_size < offset + length:
            # Past the end of a file there is nothing but a hole, which must not be taken for zeros.
            raise self.shorter(offset, length)
        try:
            return list(linux.data_extents_apart(self._fd, offset, offset + length))
        except OSError as error:
            if error.errno in linux.NOT_SUPPORTED:
                return [(offset, length)]
            raise from_os_error(error, "cannot read the allocation", volume=self.uri, offset=offset) from error

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        return (await in_thread(self._unmap, extents, write=True))[0]

    async def deallocate(self, extents: Sequence[tuple[int, int]]) -> tuple[int, Sequence[tuple[int, int]]]:
        return await in_thread(self._unmap, extents, write=False)

    def _unmap(self, extents: Sequence[tuple[int, int]], *, write: bool) -> tuple[int, list[tuple[int, int]]]:
        """Bytes that held data, and what is left because zeros would have to be written out without `write`."""
        self.refuse_read_only()
        held = 0
        left: list[tuple[int, int]] = []
        for offset, length in extents:
            try:
                data = sum(size for _, size in self._held_extents(offset, length))
                if self._ladder.zero(self._fd, offset, length, self.size, write=write):
                    held += data
                else:
                    left.append((offset, length))
            except OSError as error:
                raise from_os_error(error, "cannot unmap", volume=self.uri, offset=offset, length=length) from error
        return held, left

    async def reserve(self, extents: Sequence[tuple[int, int]]) -> None:
        await in_thread(self._reserve, extents)

    def _reserve(self, extents: Sequence[tuple[int, int]]) -> None:
        for offset, length in extents:
            try:
                linux.fallocate(self._fd, linux.RESERVE, offset, length)
            except OSError as error:
                if error.errno in linux.NOT_SUPPORTED:
                    return
                raise from_os_error(
                    error, "cannot reserve space", volume=self.uri, offset=offset, length=length
                ) from error

    async def release(self) -> None:
        await in_thread(self._release)

    def _release(self) -> None:
        # Not by SEEK_DATA: what somebody has read of a reservation is in the page cache, and counts as data there.
        with contextlib.suppress(OSError):
            reserved = list(linux.unwritten_extents(self._fd))
            for start, length in reserved:
                linux.fallocate(self._fd, linux.PUNCH_HOLE, start, length)
            if reserved and sum(reserved[-1]) > self.size_now():
                # ext4 punches nothing past the end of a file, but cuts it off.
                disk.truncate(self._fd, self.size_now())

    async def resize(self, size: int) -> None:
        """Grow to `size` bytes; what it grows by reads as zeros."""
        try:
            await in_thread(disk.truncate, self._fd, size)
        except OSError as error:
            raise from_os_error(error, f"cannot give {self.uri} {size} bytes", volume=self.uri) from error
        self.size = size

    def size_now(self) -> int:
        return os.fstat(self._fd).st_size

    async def writers(self) -> list[str]:
        return await in_thread(linux.users_of, self.path, self._fd)


def _not_an_image(path: Path, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.UNSUPPORTED,
        f"{path} is not a raw image",
        cause=cause,
        next="name a raw image file",
        volume=str(path),
    )
