"""A device or an NBD export under the deltas of a journal.

It is somebody else's: it has a size of its own, of which a replica uses the beginning; what lies behind that is left
alone, and so is everything when the replica is deleted. It is claimed for as long as the server uses it, may vanish at
any time, and is looked for again by whoever needs it next. Which one it is was noted when it was first used:
`device.json`, in the replica's directory.
"""

from __future__ import annotations

import abc
import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec
from blockferry.common.digests import Data
from blockferry.common.durable import write_atomic
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap, Geometry
from blockferry.common.volumes import DeviceVolume, NbdVolume, Volume, in_thread
from blockferry.server.base import Base
from blockferry.server.cache import Stamp
from blockferry.server.devices import DeviceSpec
from blockferry.server.generations import corrupt

BINDING_NAME = "device.json"

LOOK_SECONDS = 3.0
"""For whoever merely wants to know whether an export answers."""


class Binding(msgspec.Struct, frozen=True):
    """Which device a replica is on: what stays the same whatever it is called today, its size in bytes and its name
    when it was first used."""

    identity: str
    size: int
    uri: str


class ExternalBase(Base):
    """What is common to devices and exports."""

    ours = False

    def __init__(self, spec: DeviceSpec, directory: Path) -> None:
        self.spec = spec
        self._binding = directory / BINDING_NAME
        self._volume: Volume | None = None
        self._opening: asyncio.Task[Volume] | None = None
        self._doubtful = False
        self._over = False
        """It was let go of for good."""

    @property
    def location(self) -> str:
        return self.spec.uri

    def exists(self) -> bool:
        # What it holds before a first sync is compared like anything else. Opening it says whether it is there.
        return True

    def bytes_held(self) -> int:
        return 0

    def stamp(self) -> Stamp | None:
        volume = self._volume
        # No other process, and no later opening in this one, has the same number.
        return None if volume is None or self._doubtful else Stamp(0, volume.size, self.hold)

    async def trouble(self, least: int) -> str:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self.opened(least)
        except BlockferryError as error:
            return f"{error.what}: {error.cause}" if error.cause else error.what
        except TimeoutError:
            return f"{self.location} does not answer"
        return ""

    # --- opening --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def _open(self) -> Volume:
        """Open it for writing, and claim it as far as that is possible."""

    @abc.abstractmethod
    async def _is_lost(self, volume: Volume) -> bool:
        """Whether what was opened is of no use any more."""

    @abc.abstractmethod
    def _identity(self, volume: Volume) -> str:
        """What tells it from others, for people to compare, too."""

    @abc.abstractmethod
    def _let_go(self, volume: Volume) -> None:
        """Close a volume at once. Blocking."""

    async def opened(self, least: int) -> Volume:
        if self._opening is None:
            # To its end, whoever gives up waiting: what was just opened must not get lost. Others wait for the same.
            self._opening = asyncio.create_task(self._current(), name=f"open-{self.spec.name}")
            self._opening.add_done_callback(self._is_opened)
        volume = await asyncio.shield(self._opening)
        self._check_size(volume.size, least, "its newest generation")
        return volume

    def _is_opened(self, task: asyncio.Task[Volume]) -> None:
        self._opening = None
        if not task.cancelled():
            # Whoever still waits is told; perhaps nobody does.
            task.exception()

    async def _current(self) -> Volume:
        volume = self._volume
        if volume is not None and not self._doubtful and not await self._is_lost(volume):
            return volume
        # Caches are dropped with it: after a failed flush they hold what the device does not.
        await self._close()
        volume = await self._open()
        try:
            self._check_identity(volume, await in_thread(self._bound))
        except BaseException:
            await volume.close()
            raise
        self._volume, self._doubtful = volume, False
        self.hold = 1 + secrets.randbits(62)
        if self._over:
            # Whoever asked for it has gone, and nobody will close it.
            self.let_go()
            raise BlockferryError(
                Code.UNAVAILABLE,
                f"{self.location} is not in use any more",
                cause="its replica is being closed",
                next="run it again when the server is back",
            )
        return volume

    def _bound(self) -> Binding | None:
        try:
            return msgspec.json.decode(self._binding.read_bytes(), type=Binding)
        except FileNotFoundError:
            return None
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise corrupt(self._binding, str(error)) from error

    def _check_identity(self, volume: Volume, bound: Binding | None) -> None:
        identity = self._identity(volume)
        if bound is not None and bound.identity != identity:
            raise BlockferryError(
                Code.WRONG_STATE,
                f"{self.location} is another device than before",
                cause=f"the replica is on {bound.identity}, called {bound.uri} then, and this is {identity}",
                next="name the right one with --device; if this one is meant, delete the replica and sync anew, or "
                f"remove {self._binding} where its content was moved. Nothing was changed",
                volume=self.spec.name,
                expected=bound.identity,
                found=identity,
            )

    def _check_size(self, size: int, least: int, whose: str) -> None:
        if size < least:
            raise BlockferryError(
                Code.SIZE_MISMATCH,
                f"{self.location} is too small",
                cause=f"it has {size} bytes, and {whose} {least}",
                next="enlarge the device first; nothing was changed",
                volume=self.spec.name,
                expected=str(least),
                found=str(size),
            )

    # --- use ------------------------------------------------------------------------------------------------------

    async def check(self, size: int, least: int) -> None:
        volume = await self.opened(least)
        if await volume.current_size() != volume.size or volume.size < size:
            # It was resized. An export has to be opened again to know.
            self.doubt()
            volume = await self.opened(least)
        self._check_size(volume.size, size, "the source has")

    async def begin(self, size: int, *, adopted: bool) -> tuple[Volume, bool]:
        volume = await self.opened(0)
        await in_thread(self._bind, volume)
        return Window(volume, size), True

    async def unfinished(self, size: int) -> Volume | None:
        return Window(await self.opened(size), size) if size else None

    def _bind(self, volume: Volume) -> None:
        """Note durably which one it is, before the first byte is written."""
        if self._bound() is None:
            binding = Binding(self._identity(volume), volume.size, self.location)
            write_atomic(self._binding, msgspec.json.encode(binding))

    async def discard(self) -> None:
        # What was written stays, and is compared next time: as it is on the device, not as it is remembered.
        self.doubt()

    def doubt(self) -> None:
        self._doubtful = True

    # --- the end of it --------------------------------------------------------------------------------------------

    async def release(self) -> None:
        if self._opening is not None:
            await asyncio.wait([self._opening])
        await self._close()

    async def _close(self) -> None:
        volume, self._volume = self._volume, None
        if volume is not None:
            await volume.close()

    def let_go(self) -> None:
        self._over = True
        volume, self._volume = self._volume, None
        if volume is not None:
            self._let_go(volume)


class DeviceBase(ExternalBase):
    """A block device."""

    @property
    def path(self) -> Path:
        return Path(self.spec.uri)

    async def _open(self) -> DeviceVolume:
        return await DeviceVolume.open(self.path, writable=True)

    async def _is_lost(self, volume: Volume) -> bool:
        return isinstance(volume, DeviceVolume) and not await in_thread(volume.is_current)

    def _identity(self, volume: Volume) -> str:
        return volume.identity or f"path:{self.path}"

    def _let_go(self, volume: Volume) -> None:
        assert isinstance(volume, DeviceVolume)
        volume.let_go()

    def forget_pages(self) -> None:
        if isinstance(self._volume, DeviceVolume):
            self._volume.drop_cache()


class ExportBase(ExternalBase):
    """An NBD export. Nothing says which disk is behind it: its URI and its size are all there is to compare."""

    @property
    def path(self) -> None:
        return None

    async def _open(self) -> NbdVolume:
        return await NbdVolume.open(self.spec.uri, writable=True, insecure=self.spec.insecure)

    async def _is_lost(self, volume: Volume) -> bool:
        return isinstance(volume, NbdVolume) and volume.is_lost

    def _identity(self, volume: Volume) -> str:
        return f"export:{self.spec.uri}"

    def _check_identity(self, volume: Volume, bound: Binding | None) -> None:
        super()._check_identity(volume, bound)
        if bound is not None:
            self._check_size(volume.size, bound.size, "when it was first used it had")

    async def check(self, size: int, least: int) -> None:
        await super().check(size, least)
        volume = await self.opened(least)
        if size % volume.sector_size and size != volume.size:
            raise BlockferryError(
                Code.UNSUPPORTED,
                f"{self.location} cannot hold a volume of {size} bytes",
                cause=f"it takes whole blocks of {volume.sector_size} bytes",
                next="let the server offer smaller blocks; nothing was changed",
                volume=self.spec.name,
            )

    def _let_go(self, volume: Volume) -> None:
        assert isinstance(volume, NbdVolume)
        volume.let_go()

    def forget_pages(self) -> None:
        # What the other side remembers is out of reach.
        return


class Window(Volume):
    """The first `size` bytes of a volume, which stays open."""

    def __init__(self, volume: Volume, size: int) -> None:
        self.uri = volume.uri
        self.size = size
        self.block_size = volume.block_size
        self.sector_size = volume.sector_size
        self.preferred_size = volume.preferred_size
        self._volume = volume

    @property
    def zeroing(self) -> str:
        return self._volume.zeroing

    async def allocation(self, region_size: int) -> AllocationMap:
        return (await self._volume.allocation(region_size)).cut_to(Geometry(self.size, region_size))

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        return await self._volume.data_extents(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._volume.read_into(offset, buffer)

    async def read_many(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        await self._volume.read_many(extents)

    async def read_data_into(self, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
        return await self._volume.read_data_into(offset, buffer)

    async def read_data_many(self, parts: Sequence[tuple[int, memoryview]]) -> list[list[tuple[int, int]]]:
        return await self._volume.read_data_many(parts)

    async def read_and_digest(
        self, parts: Sequence[tuple[int, memoryview]], piece_size: int, key: bytes, size: int
    ) -> tuple[list[list[tuple[int, int]]], bytes]:
        return await self._volume.read_and_digest(parts, piece_size, key, size)

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        await self._volume.write(extents)

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        return await self._volume.unmap(extents)

    async def deallocate(self, extents: Sequence[tuple[int, int]]) -> tuple[int, Sequence[tuple[int, int]]]:
        return await self._volume.deallocate(extents)

    async def flush(self) -> None:
        await self._volume.flush()

    async def close(self) -> None:
        """The volume belongs to whoever made this."""


def external_base(spec: DeviceSpec, directory: Path) -> ExternalBase:
    """The base of the replica in `directory`."""
    return (ExportBase if spec.is_export else DeviceBase)(spec, directory)
