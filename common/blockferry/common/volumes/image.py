"""Raw image files.

Allocation comes from SEEK_DATA/SEEK_HOLE on a descriptor of its own, after an fsync: with dirty pages some file systems
have reported holes where data was about to be. Where the file system cannot tell, everything counts as allocated.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from blockferry.common import disk, linux
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Provenance
from blockferry.common.volumes.volume import Volume, in_thread


class ImageVolume(Volume):
    """A regular file. Open one with `ImageVolume.open`; a writable one is created or resized with `create`."""

    def __init__(self, path: Path, fd: int, size: int, writable: bool) -> None:
        self.path = path
        self.uri = str(path)
        self.size = size
        self.block_size = BLOCK_SIZE
        self._fd = fd
        self._writable = writable
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
            own = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise from_os_error(error, "cannot read the allocation", volume=self.uri) from error
        try:
            return AllocationMap.from_extents(geometry, linux.data_extents(own, 0, self.size), Provenance.EXACT)
        except OSError as error:
            if error.errno in linux.NOT_SUPPORTED:
                return AllocationMap.full(geometry)
            raise from_os_error(error, "cannot read the allocation", volume=self.uri) from error
        finally:
            os.close(own)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await in_thread(self._read_into, offset, buffer)

    async def read_many(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        await in_thread(self._read_many, extents)

    def _read_many(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        for offset, buffer in extents:
            self._read_into(offset, buffer)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise from_os_error(
                    error, "cannot read", volume=self.uri, offset=offset + done, length=len(buffer) - done
                ) from error
            if count == 0:
                raise self._shorter(offset + done, len(buffer) - done)
            done += count

    def _shorter(self, offset: int, length: int) -> BlockferryError:
        return BlockferryError(
            Code.SOURCE_CHANGED,
            f"{self.uri} became shorter while it was read",
            cause=f"it had {self.size} bytes and now ends at {os.fstat(self._fd).st_size}",
            next="stop whatever changes it, or sync from a snapshot",
            volume=self.uri,
            offset=offset,
            length=length,
        )

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        return await in_thread(self._data_extents, offset, length)

    def _data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        try:
            # Of its own: lseek moves a descriptor's offset, and others may be looking.
            own = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return list(linux.data_extents(own, offset, offset + length))
            finally:
                os.close(own)
        except OSError as error:
            if error.errno not in linux.NOT_SUPPORTED:
                raise from_os_error(error, "cannot read the allocation", volume=self.uri, offset=offset) from error
            return [(offset, length)]

    async def read_data_into(self, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
        return await in_thread(self._read_data_into, offset, buffer)

    def _read_data_into(self, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
        end = offset + len(buffer)
        if os.fstat(self._fd).st_size < end:
            # Past the end of a file there is nothing but a hole, which must not be taken for zeros.
            raise self._shorter(offset, len(buffer))
        found: list[tuple[int, int]] = []
        for data, length in self._data_extents(offset, len(buffer)):
            start = (data - offset) // BLOCK_SIZE * BLOCK_SIZE
            stop = min(-(-(data + length - offset) // BLOCK_SIZE) * BLOCK_SIZE, len(buffer))
            if found and sum(found[-1]) >= start:
                start = found.pop()[0]
            found.append((start, stop - start))
        for start, length in found:
            self._read_into(offset + start, buffer[start : start + length])
        return found

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        await in_thread(self._write, extents)

    def _write(self, extents: Sequence[tuple[int, Data]]) -> None:
        for offset, data in extents:
            view = memoryview(data)
            try:
                while view:
                    count = disk.pwrite(self._fd, view, offset)
                    view, offset = view[count:], offset + count
            except OSError as error:
                raise from_os_error(error, "cannot write", volume=self.uri, offset=offset, length=len(view)) from error

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        return (await in_thread(self._unmap, extents, write=True))[0]

    async def deallocate(self, extents: Sequence[tuple[int, int]]) -> tuple[int, Sequence[tuple[int, int]]]:
        return await in_thread(self._unmap, extents, write=False)

    def _unmap(self, extents: Sequence[tuple[int, int]], *, write: bool) -> tuple[int, list[tuple[int, int]]]:
        """Bytes that held data, and what is left because zeros would have to be written out without `write`."""
        held = 0
        left: list[tuple[int, int]] = []
        for offset, length in extents:
            try:
                data = sum(size for _, size in self._data_extents(offset, length))
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
            for start, length in list(linux.unwritten_extents(self._fd)):
                linux.fallocate(self._fd, linux.PUNCH_HOLE, start, length)

    async def resize(self, size: int) -> None:
        """Grow to `size` bytes; what it grows by reads as zeros."""
        try:
            await in_thread(disk.truncate, self._fd, size)
        except OSError as error:
            raise from_os_error(error, f"cannot give {self.uri} {size} bytes", volume=self.uri) from error
        self.size = size

    async def flush(self) -> None:
        try:
            await in_thread(disk.fsync, self._fd)
        except OSError as error:
            raise from_os_error(error, "cannot flush", volume=self.uri) from error

    async def close(self) -> None:
        await in_thread(self.let_go)

    def let_go(self) -> None:
        """Close the descriptor, once. Blocking."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    async def current_size(self) -> int:
        return (await in_thread(os.fstat, self._fd)).st_size

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
