"""What volumes on a file descriptor have in common: images and block devices."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from blockferry.common import disk, linux
from blockferry.common.digests import Data, digest_size, fill_and_digest
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import BLOCK_SIZE, Run, group_runs
from blockferry.common.volumes.volume import READ_SIZE, Volume, in_thread

CACHED_SIZE = 1024 * 1024
"""Bytes read and hashed before the next are read: they fit into the cache of a core (docs/performance.md)."""


class DescriptorVolume(Volume):
    """Reads and writes by pread and pwrite. What is public here and no coroutine blocks, but for `read_now`: call it on
    an I/O thread."""

    batches = True

    def __init__(self, path: Path, fd: int, size: int, writable: bool) -> None:
        self.path = path
        self.uri = str(path)
        self.size = size
        self.block_size = BLOCK_SIZE
        self._fd = fd
        self._writable = writable
        # A file in memory is always in memory; of all others the kernel is asked not to wait (preadv2(2)).
        self._now: int | None = 0 if linux.lies_in_memory(fd) else os.RWF_NOWAIT

    @abc.abstractmethod
    def size_now(self) -> int:
        """The size in bytes, as the kernel says it is now."""

    @abc.abstractmethod
    def _held_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(offset, length) of what may be data in a range, ascending; all of it where that is not known. Blocking."""

    async def current_size(self) -> int:
        return await in_thread(self.size_now)

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        return await in_thread(self._held_extents, offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await in_thread(self._read_into, offset, buffer)

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        if self._now is None:
            return False
        try:
            return os.preadv(self._fd, [buffer], offset, self._now) == len(buffer)
        except OSError as error:
            if error.errno in linux.NOT_SUPPORTED:
                self._now = None
            # Whatever it is, whoever reads with patience is told.
            return False

    async def read_many(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        await in_thread(self._read_many, extents)

    async def prefetch(self, offset: int, length: int) -> None:
        # Only begins to read; but finding out where from may wait.
        await in_thread(os.posix_fadvise, self._fd, offset, length, os.POSIX_FADV_WILLNEED)

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
                raise self.shorter(offset + done, len(buffer) - done)
            done += count

    def shorter(self, offset: int, length: int) -> BlockferryError:
        """The error for bytes that are no longer there: they are never taken for zeros."""
        return BlockferryError(
            Code.SOURCE_CHANGED,
            f"{self.uri} became shorter while it was read",
            cause=f"it had {self.size} bytes and now ends at {self.size_now()}",
            next="stop whatever changes it, or sync from a snapshot",
            volume=self.uri,
            offset=offset,
            length=length,
        )

    async def read_data_into(self, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
        return await in_thread(self._read_data_into, offset, buffer)

    async def read_data_many(self, parts: Sequence[tuple[int, memoryview]]) -> list[list[tuple[int, int]]]:
        return await in_thread(lambda: [self._read_data_into(offset, buffer) for offset, buffer in parts])

    def _read_data_into(self, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
        found = self._held_blocks(offset, len(buffer))
        for start, length in found:
            self._read_into(offset + start, buffer[start : start + length])
        return found

    def _held_blocks(self, offset: int, length: int) -> list[tuple[int, int]]:
        """As `_held_extents`, in whole blocks and counted from `offset`."""
        found: list[tuple[int, int]] = []
        for data, size in self._held_extents(offset, length):
            start = (data - offset) // BLOCK_SIZE * BLOCK_SIZE
            stop = min(-(-(data + size - offset) // BLOCK_SIZE) * BLOCK_SIZE, length)
            if found and sum(found[-1]) >= start:
                start = found.pop()[0]
            found.append((start, stop - start))
        return found

    async def read_and_digest(
        self, parts: Sequence[tuple[int, memoryview]], piece_size: int, key: bytes, size: int
    ) -> tuple[list[list[tuple[int, int]]], bytes]:
        def work() -> tuple[list[list[tuple[int, int]]], bytes]:
            held, found = [], []
            for offset, buffer in parts:
                room = _parts_of(buffer)
                extents, digests = self._digest_range(offset, len(buffer), room, piece_size, key, size)
                held.append(extents)
                found.append(digests)
            return held, b"".join(found)

        return await in_thread(work)

    async def read_digests(
        self, piece_size: int, pieces: Sequence[Run], key: bytes, region_size: int
    ) -> tuple[bytes, int]:
        size = digest_size(piece_size, region_size)
        buffer = memoryview(bytearray(max(CACHED_SIZE, piece_size)))

        def work(runs: Sequence[Run]) -> tuple[bytes, int]:
            """Nobody keeps the data: the same memory is read into again and again."""
            found, read = [], 0
            for first, count in runs:
                offset = first * piece_size
                length = min(count * piece_size, self.size - offset)
                held, digests = self._digest_range(
                    offset, length, lambda _, count: buffer[:count], piece_size, key, size
                )
                found.append(digests)
                read += sum(length for _, length in held)
            return b"".join(found), read

        groups = group_runs(pieces, max(READ_SIZE // piece_size, 1))
        done = [await in_thread(work, group) for group in groups]
        return b"".join(digests for digests, _ in done), sum(read for _, read in done)

    def _digest_range(
        self, offset: int, length: int, room: Callable[[int, int], memoryview], piece_size: int, key: bytes, size: int
    ) -> tuple[list[tuple[int, int]], bytes]:
        """What holds data in a range, counted from its start, and its digests. It is read and hashed little by little:
        what is hashed is still in the cache of the core. `room` says where (start, length) of the range goes."""
        # Once for all of it: on tmpfs each question walks every page up to the next hole.
        held = self._held_blocks(offset, length)
        step = max(CACHED_SIZE, piece_size)
        found: list[bytes] = []
        index = 0
        for start in range(0, length, step):
            stop = min(start + step, length)
            data = room(start, stop - start)
            extents: list[tuple[int, int]] = []
            while index < len(held) and held[index][0] < stop:
                low, high = max(held[index][0], start), min(sum(held[index]), stop)
                self._read_into(offset + low, data[low - start : high - start])
                extents.append((low - start, high - low))
                if sum(held[index]) > stop:
                    break
                index += 1
            found.append(fill_and_digest(data, extents, piece_size, key, size))
        return held, b"".join(found)

    def refuse_read_only(self) -> None:
        """Raise READ_ONLY unless the volume was opened for writing."""
        if not self._writable:
            raise BlockferryError(
                Code.READ_ONLY,
                f"{self.uri} cannot be written",
                cause="it was opened for reading",
                next="sync to a replica instead",
                volume=self.uri,
            )

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        await in_thread(self._write, extents)

    def _write(self, extents: Sequence[tuple[int, Data]]) -> None:
        self.refuse_read_only()
        for offset, data in extents:
            view = memoryview(data)
            try:
                while view:
                    count = disk.pwrite(self._fd, view, offset)
                    view, offset = view[count:], offset + count
            except OSError as error:
                raise from_os_error(error, "cannot write", volume=self.uri, offset=offset, length=len(view)) from error

    async def flush(self) -> None:
        try:
            await in_thread(disk.fsync, self._fd)
        except OSError as error:
            raise from_os_error(error, "cannot flush", volume=self.uri) from error

    async def close(self) -> None:
        await in_thread(self.let_go)

    def let_go(self) -> None:
        """Close what is open, once. Blocking."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _parts_of(buffer: memoryview) -> Callable[[int, int], memoryview]:
    return lambda start, length: buffer[start : start + length]
