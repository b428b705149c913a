"""A disk that is rehydrated, in memory: a primary that may crash, sources that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE
from blockferry.common.volumes import Volume
from blockferry.server.rehydrate.map import Binding, HydrationMap
from blockferry.server.rehydrate.sources import Sources
from blockferry.server.rehydrate.volume import HydratingVolume

from tests.unit.memory_volume import MemoryVolume

B = BLOCK_SIZE
SECTOR = 512
SNAPSHOT = "commit:" + "a5" * 16


class Primary(MemoryVolume):
    """What is written survives a crash once it is flushed, and else sector by sector as it happens. `pauses`: turns
    that others get in the middle of each operation."""

    def __init__(self, content: bytes, pauses: int = 1) -> None:
        super().__init__(content)
        self.uri = "primary"
        self.durable = bytearray(content)
        self.pauses = pauses
        self.failing: set[str] = set()
        """Operations that fail half-way, once each."""

    async def _pause(self) -> None:
        for _ in range(self.pauses):
            await asyncio.sleep(0)

    def _fail(self, kind: str) -> None:
        if kind in self.failing:
            self.failing.remove(kind)
            raise BlockferryError(Code.IO_ERROR, f"{kind} fails", next="use a better disk", volume=self.uri)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._pause()
        await super().read_into(offset, buffer)

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        buffer[:] = self.data[offset : offset + len(buffer)]
        return True

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        for offset, data in extents:
            half = (offset + len(data) // 2) // SECTOR * SECTOR - offset
            for start, stop in ((0, half), (max(half, 0), len(data))):
                if start < stop:
                    await super().write([(offset + start, memoryview(data)[start:stop])])
                await self._pause()
                if start == 0:
                    self._fail("write")

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        await self._pause()
        held = 0
        for offset, length in extents:
            held += await super().unmap([(offset, length)])
            self._fail("unmap")
        return held

    async def flush(self) -> None:
        seen = bytes(self.data)
        await self._pause()
        self._fail("flush")
        self.operations.append(("flush", 0, 1))
        self.durable[:] = seen

    def crashed(self, rng: random.Random) -> Primary:
        """What is left of it."""
        for start in range(0, self.size, SECTOR):
            if rng.random() < 0.5:
                self.durable[start : start + SECTOR] = self.data[start : start + SECTOR]
        return Primary(bytes(self.durable), self.pauses)


class Site:
    """Where a source is. `down`: nobody answers; `silent`: nobody answers either, but connections stay."""

    def __init__(self, content: bytes, snapshot_id: str = SNAPSHOT) -> None:
        self.volume = MemoryVolume(content)
        self.volume.writable = False
        self.volume.snapshot_id = snapshot_id
        self.down = False
        self.silent = False
        self.rotten = False
        self.opened = 0
        self.closed = 0

    @property
    def reads(self) -> list[tuple[int, int]]:
        """(offset, length) of what was read, but for what only touches it."""
        return [one for one in self.volume.of("read") if one[1] > 1]

    async def answer(self) -> None:
        """Raise, or wait for ever, where it does not answer."""
        await asyncio.sleep(0)
        if self.silent:
            await asyncio.Event().wait()
        if self.down:
            raise BlockferryError(Code.UNAVAILABLE, "the source is down", next="wait")
        if self.rotten:
            raise BlockferryError(Code.DATA_MISMATCH, "the source is rotten", next="use another one")


class Remote(MemoryVolume):
    """A connection to a site."""

    def __init__(self, site: Site) -> None:
        super().__init__(b"")
        self.uri = "remote"
        self.size = site.volume.size
        self.snapshot_id = site.volume.snapshot_id
        self._site = site

    async def allocation(self, region_size: int):  # type: ignore[no-untyped-def]
        rotten, self._site.rotten = self._site.rotten, False
        try:
            await self._site.answer()
        finally:
            self._site.rotten = rotten
        return await self._site.volume.allocation(region_size)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._site.answer()
        await self._site.volume.read_into(offset, buffer)

    async def close(self) -> None:
        self._site.closed += 1


class World:
    """Sites by their URIs."""

    def __init__(self, **sites: Site) -> None:
        self.sites = sites

    async def open(self, uri: str, wanted: str) -> Volume:
        """As `source_opener` does."""
        site = self.sites[uri]
        rotten, site.rotten = site.rotten, False
        try:
            await site.answer()
        finally:
            site.rotten = rotten
        site.opened += 1
        return Remote(site)


def new_map(directory: Path, size: int) -> HydrationMap:
    """An empty map."""
    return HydrationMap.create(directory, Binding("memory", size, SNAPSHOT, "primary", 0))


def disk_of(
    primary: Primary,
    hydration: HydrationMap,
    world: World,
    *,
    timeout: float = 0.05,
    bandwidth: int = 0,
    fresh: bool = False,
) -> HydratingVolume:
    """A disk over all of that."""
    sources = Sources(list(world.sites), hydration.binding.size, hydration.binding.snapshot_id, world.open)
    return HydratingVolume(primary, hydration, sources, source_timeout=timeout, bandwidth=bandwidth, fresh=fresh)


@contextlib.asynccontextmanager
async def sweeping(disk: HydratingVolume) -> AsyncIterator[asyncio.Task[None]]:
    """The sweep runs meanwhile."""
    task = asyncio.create_task(disk.fetcher.sweep())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def read(disk: Volume, offset: int, length: int) -> bytes:
    """Bytes of a volume."""
    buffer = bytearray(length)
    await disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def pattern(seed: int, length: int) -> bytes:
    """Bytes without zero sectors."""
    return random.Random(seed).randbytes(length)
