"""Volumes in memory for the tests of the server: slow, bad or silent where a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code

from tests.images import BLOCK, MIB, noise
from tests.unit.memory_volume import MemoryVolume

CONTENT = noise("served", MIB) + bytes(MIB) + noise("end", 4 * MIB + 5)
SIZE = len(CONTENT)


class Volume(MemoryVolume):
    """Memory in which a test lets operations wait, or fail."""

    def __init__(self, content: bytes = CONTENT) -> None:
        super().__init__(content)
        self.slow: dict[int, asyncio.Event] = {}
        """What reads and writes at an offset wait for."""
        self.bad: dict[int, Code] = {}
        """How reads and writes at an offset fail."""
        self.flushes = 0
        self.flushing = asyncio.Event()
        self.flushing.set()
        self.flush_fails = False
        self.prefetched: list[tuple[int, int]] = []

    async def _wait(self, offset: int) -> None:
        if offset in self.slow:
            await self.slow[offset].wait()
        if offset in self.bad:
            raise BlockferryError(self.bad[offset], "cannot", cause=f"bad at {offset}", volume="memory", offset=offset)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._wait(offset)
        await super().read_into(offset, buffer)

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        for offset, _ in extents:
            await self._wait(offset)
        await super().write(extents)

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        found = [(block * BLOCK, min(BLOCK, self.size - block * BLOCK)) for block in sorted(self._held)]
        return [
            (max(start, offset), min(start + size, offset + length) - max(start, offset))
            for start, size in found
            if start < offset + length and start + size > offset
        ]

    async def flush(self) -> None:
        self.flushes += 1
        self.operations.append(("flush", 0, 0))
        await self.flushing.wait()
        if self.flush_fails:
            raise BlockferryError(Code.IO_ERROR, "cannot flush", cause="input/output error", volume="memory")

    async def prefetch(self, offset: int, length: int) -> None:
        self.prefetched.append((offset, length))


class Batching(Volume):
    """One that takes many operations at once."""

    batches = True
