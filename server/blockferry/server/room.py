"""The room in a pool's file system, and a replica's share of it: looked at before and while sessions write.

Whoever would break the reserve or the quota gets OUT_OF_SPACE while there still is room for everything else. That ends
the session, never the generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from blockferry.common import linux
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.units import human_bytes
from blockferry.common.volumes import in_thread
from blockferry.server.space import Allowance, Limits, reserve_of, union_length


@dataclass(frozen=True)
class Measured:
    """A pool's file system at one instant; bytes. `free` is what users without privileges may take."""

    total: int
    free: int
    reserve: int


class Room:
    """The room of one pool, shared by all its sessions."""

    def __init__(self, pool: str, path: Path, limits: Limits) -> None:
        self.pool = pool
        self.path = path
        self.limits = limits
        self._allowance = Allowance()
        self._looking = asyncio.Lock()

    async def measure(self) -> Measured:
        """Ask the file system. Raises OSError."""
        found = await in_thread(os.statvfs, self.path)
        total = found.f_blocks * found.f_frsize
        return Measured(total, found.f_bavail * found.f_frsize, reserve_of(self.limits, total))

    async def check(self, volume: str, what: str) -> None:
        """Raise OUT_OF_SPACE if less than the reserve is free."""
        if self._unlimited:
            return
        async with self._looking:
            found = await self._look(volume, what, 0)
            if found.free < found.reserve:
                raise self._refusal(volume, what, found)

    async def take(self, volume: str, what: str, amount: int) -> None:
        """Allow `amount` bytes to be written, or raise OUT_OF_SPACE; `done` afterwards."""
        if self._unlimited or self._allowance.take(amount):
            return
        async with self._looking:
            # Somebody may have looked while this one waited.
            if self._allowance.take(amount):
                return
            found = await self._look(volume, what, amount)
            if not self._allowance.take(amount):
                raise self._refusal(volume, what, found)

    def done(self, amount: int) -> None:
        """What was taken is written, or given up."""
        if not self._unlimited:
            self._allowance.done(amount)

    @property
    def _unlimited(self) -> bool:
        """Nothing is reserved: the disk itself says when it is full."""
        return self.limits.reserve == 0

    async def _look(self, volume: str, what: str, wanted: int) -> Measured:
        under_way = self._allowance.pause()
        try:
            found = await self.measure()
        except OSError as error:
            raise from_os_error(error, what, volume=volume) from error
        self._allowance.looked(found.free - found.reserve, under_way, wanted)
        return found

    def _refusal(self, volume: str, what: str, found: Measured) -> BlockferryError:
        return BlockferryError(
            Code.OUT_OF_SPACE,
            what,
            cause=f"the file system of pool {self.pool} has {human_bytes(found.free)} free, of which "
            f"{human_bytes(found.reserve)} are reserved",
            next="free or add space there, or start the server with a smaller --reserve, then run it again",
            volume=volume,
        )


class ReplicaRoom:
    """What one replica may take of its pool's room."""

    def __init__(self, room: Room, volume: str, directory: Path) -> None:
        self._room = room
        self._volume = volume
        self._directory = directory
        self._allowance = Allowance()
        self._looking = asyncio.Lock()

    async def check_start(self) -> None:
        """Raise OUT_OF_SPACE if no session may begin."""
        await self._check(f"cannot open a session of {self._volume}")

    async def check(self) -> None:
        """Raise OUT_OF_SPACE if the session may not go on: for checkpoints."""
        await self._check(f"cannot go on with {self._volume}")

    async def _check(self, what: str) -> None:
        await self._room.check(self._volume, what)
        if self._quota:
            async with self._looking:
                held = await self._look(what, 0)
                if held > self._quota:
                    raise self._refusal(what, held)

    @contextlib.asynccontextmanager
    async def writing(self, amount: int) -> AsyncIterator[None]:
        """Write at most `amount` bytes in here; OUT_OF_SPACE before the first of them."""
        what = f"cannot write to {self._volume}"
        await self._room.take(self._volume, what, amount)
        try:
            if not self._quota:
                yield
                return
            await self._take(what, amount)
            try:
                yield
            finally:
                self._allowance.done(amount)
        finally:
            self._room.done(amount)

    async def _take(self, what: str, amount: int) -> None:
        async with self._looking:
            if self._allowance.take(amount):
                return
            held = await self._look(what, amount)
            if not self._allowance.take(amount):
                raise self._refusal(what, held)

    async def _look(self, what: str, wanted: int) -> int:
        under_way = self._allowance.pause()
        try:
            held = await in_thread(bytes_held, self._directory, settled=True)
        except OSError as error:
            raise from_os_error(error, what, volume=self._volume) from error
        self._allowance.looked(self._quota - held, under_way, wanted)
        return held

    @property
    def _quota(self) -> int:
        return self._room.limits.quota

    def _refusal(self, what: str, held: int) -> BlockferryError:
        return BlockferryError(
            Code.OUT_OF_SPACE,
            what,
            cause=f"it holds {human_bytes(held)} with its recovery points, and {human_bytes(self._quota)} are its "
            "quota",
            next="keep fewer recovery points, or start the server with a larger --quota, then run it again",
            volume=self._volume,
        )


def bytes_held(directory: Path, *, settled: bool = False) -> int:
    """Bytes of disk of all files in a replica's directory. What clones share counts once, except in files that cannot
    be opened. `settled`: what is on its way to the disk is written first, so that it is counted where it will be.
    Raises OSError."""
    placed: list[tuple[int, int]] = []
    loose = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except PermissionError:
                loose += path.stat().st_blocks * 512
                continue
            try:
                found = list(linux.extents(fd, sync=settled))
                placed += [(physical, length) for _, physical, length, flags in found if flags & linux.UNPLACED == 0]
                loose += sum(length for _, _, length, flags in found if flags & linux.UNPLACED)
            except OSError as error:
                if error.errno not in linux.NOT_SUPPORTED:
                    raise
                loose += os.fstat(fd).st_blocks * 512
            finally:
                os.close(fd)
    return loose + union_length(placed)
