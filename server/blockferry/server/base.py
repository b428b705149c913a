"""What lies under the deltas of a journal: where the newest generation is, byte for byte.

An image in the replica's directory (`ImageBase`), or a device or an export that somebody else has made (external.py).
The first is ours: it is created, grown and removed. The others have a size of their own and hold something before the
first sync, are claimed for as long as they are used, and may be gone at any time.
"""

from __future__ import annotations

import abc
import asyncio
import os
from pathlib import Path

from blockferry.common import disk
from blockferry.common.durable import move_durably, rename_durably
from blockferry.common.volumes import ImageVolume, Volume, in_thread
from blockferry.server.cache import Stamp
from blockferry.server.content import forget_pages_of, open_image, unshared_bytes_of

IMAGE_NAME = "image.raw"


class Base(abc.ABC):
    """Methods may raise BlockferryError and OSError."""

    ours = True
    """It is nobody else's: created, grown and removed with the replica. What lies past the end of a generation on one
    that is not ours may be anything."""
    hold = 0
    """Another number whenever somebody else may have written to it since: what was learned under one proves nothing
    under another."""

    # --- what is there --------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def location(self) -> str:
        """Where people find it on the server."""

    @property
    @abc.abstractmethod
    def path(self) -> Path | None:
        """The same as a path, where it has one."""

    @abc.abstractmethod
    def exists(self) -> bool:
        """Whether there is one, as far as can be known without opening it. Blocking."""

    @abc.abstractmethod
    def stamp(self) -> Stamp | None:
        """What tells whether it was touched; None where nothing does. Blocking."""

    @abc.abstractmethod
    def bytes_held(self) -> int:
        """Bytes of the disk of the replica's directory that it takes alone. Blocking."""

    @abc.abstractmethod
    def forget_pages(self) -> None:
        """Have the kernel drop what it remembers of it. Blocking."""

    async def trouble(self, least: int) -> str:
        """Why it cannot be used now, in words; empty if it can. Takes hold of it, where that is possible."""
        return ""

    # --- use ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def opened(self, least: int) -> Volume:
        """It, open for writing, until `release`; it must have `least` bytes. After a failure of the volume another call
        may give another one: what is flushed in one was written in the same."""

    @abc.abstractmethod
    async def begin(self, size: int, *, adopted: bool) -> tuple[Volume, bool]:
        """Its first `size` bytes for a first sync that writes in place, to be closed by the caller; and whether all
        that an earlier one has written is still there. What was `adopted` is never cut off."""

    @abc.abstractmethod
    async def unfinished(self, size: int) -> Volume | None:
        """What a first sync of `size` bytes would go on with, to be read and closed; None where there is nothing."""

    async def check(self, size: int, least: int) -> None:
        """Raise unless a session of a source of `size` bytes may begin; the newest generation has `least`. Nothing is
        changed."""
        return

    async def reserve(self, size: int) -> None:
        """Have at least `size` bytes."""
        return

    async def unreserve(self) -> None:
        """Give back the space that was taken for what was not written then. Nobody may write meanwhile."""
        return

    @abc.abstractmethod
    async def discard(self) -> None:
        """Give up a first sync."""

    def doubt(self) -> None:
        """Writing to it or flushing it has failed: nothing that was not flushed before is believed to be there."""
        return

    # --- the end of it --------------------------------------------------------------------------------------------

    async def release(self) -> None:
        """Let go of it, so that others may use it."""
        await in_thread(self.let_go)

    @abc.abstractmethod
    def let_go(self) -> None:
        """As `release`, where nobody may wait. Blocking."""


class ImageBase(Base):
    """A sparse file in the replica's directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / IMAGE_NAME
        self._volume: ImageVolume | None = None
        self._opening = asyncio.Lock()

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether a replica has one."""
        return (directory / IMAGE_NAME).exists()

    @property
    def location(self) -> str:
        return str(self._path)

    @property
    def path(self) -> Path:
        return self._path

    def exists(self) -> bool:
        return self._path.exists()

    def stamp(self) -> Stamp:
        return Stamp.of(self._path)

    def bytes_held(self) -> int:
        return unshared_bytes_of(self._path)

    def forget_pages(self) -> None:
        forget_pages_of(self._path)

    def settle(self, newest: Path | None, known: set[Path], found: list[Path]) -> None:
        """Of the images that a pool of clones, or an update in place, has left on a file system that cannot clone:
        that of the `newest` generation becomes the one image, `known` ones stay what they are, and all else that was
        `found` is work of no use here. Without a generation (None) that work is the first sync's. Blocking."""
        if newest is not None and newest.exists() and not self.exists():
            rename_durably(newest, self._path)
        for path in sorted(set(found) - known, reverse=True):
            if newest is None and not self.exists():
                rename_durably(path, self._path)
            else:
                disk.unlink(path)

    async def adopt(self, image: Path) -> None:
        """Move an image of somebody else's here."""
        await in_thread(move_durably, image, self._path)

    async def opened(self, least: int) -> ImageVolume:
        async with self._opening:
            if self._volume is None:
                self._volume = await ImageVolume.open(self._path, writable=True)
            return self._volume

    async def begin(self, size: int, *, adopted: bool) -> tuple[Volume, bool]:
        continued = await in_thread(self._make, size, adopted)
        return await ImageVolume.open(self._path, writable=True), continued

    def _make(self, size: int, adopted: bool) -> bool:
        continued = self.exists()
        fd = disk.create(self._path)
        try:
            if not adopted and os.fstat(fd).st_size > size:
                # An unfinished first sync of a larger source.
                disk.truncate(fd, 0)
                continued = False
            disk.truncate(fd, size)
        finally:
            os.close(fd)
        return continued

    async def reserve(self, size: int) -> None:
        volume = await self.opened(0)
        if volume.size < size:
            await volume.resize(size)

    async def unreserve(self) -> None:
        await (await self.opened(0)).release()

    async def unfinished(self, size: int) -> Volume | None:
        return await open_image(self._path)

    async def discard(self) -> None:
        await in_thread(disk.unlink, self._path)

    def let_go(self) -> None:
        volume, self._volume = self._volume, None
        if volume is not None:
            volume.let_go()
