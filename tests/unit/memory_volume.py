"""A Volume in memory that records every operation, so that tests can say exactly what was touched and what was not."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Provenance
from blockferry.common.volumes import Volume

Operation = tuple[str, int, int]
"""(read, write or unmap; offset; length), in bytes"""


class MemoryVolume(Volume):
    """Holds `content`; whole blocks that are written count as allocated until they are unmapped."""

    writable = True

    def __init__(self, content: bytes, *, zeroing: str = "punch-hole") -> None:
        self.uri = "memory"
        self.size = len(content)
        self.block_size = BLOCK_SIZE
        self.data = bytearray(content)
        self.operations: list[Operation] = []
        self._zeroing = zeroing
        self._held = {
            offset // BLOCK_SIZE
            for offset in range(0, self.size, BLOCK_SIZE)
            if content[offset : offset + BLOCK_SIZE].strip(b"\0")
        }

    @property
    def zeroing(self) -> str:
        return self._zeroing

    def opened(self, *, writable: bool) -> MemoryVolume:
        """The same memory as another volume."""
        found = copy.copy(self)
        found.writable = writable
        return found

    def of(self, kind: str) -> list[tuple[int, int]]:
        """(offset, length) of the recorded operations of one kind, in order."""
        return [(offset, length) for name, offset, length in self.operations if name == kind]

    def _touch(self, kind: str, offset: int, length: int) -> None:
        assert offset >= 0 and length > 0 and offset + length <= self.size, (kind, offset, length)
        if kind != "read" and not self.writable:
            raise BlockferryError(Code.READ_ONLY, "memory cannot be written", next="open it for writing")
        self.operations.append((kind, offset, length))

    async def allocation(self, region_size: int) -> AllocationMap:
        extents = [(block * BLOCK_SIZE, BLOCK_SIZE) for block in sorted(self._held)]
        return AllocationMap.from_extents(Geometry(self.size, region_size), extents, Provenance.EXACT)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._touch("read", offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        for offset, data in extents:
            self._touch("write", offset, len(data))
            self.data[offset : offset + len(data)] = data
            self._held.update(range(offset // BLOCK_SIZE, -(-(offset + len(data)) // BLOCK_SIZE)))

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        freed = 0
        for offset, length in extents:
            self._touch("unmap", offset, length)
            self.data[offset : offset + length] = bytes(length)
            end = offset + length
            for block in range(-(-offset // BLOCK_SIZE), -(-end // BLOCK_SIZE)):
                block_end = min((block + 1) * BLOCK_SIZE, self.size)
                if block in self._held and block_end <= end:
                    self._held.discard(block)
                    freed += block_end - block * BLOCK_SIZE
        return freed

    async def flush(self) -> None:
        """Nothing is buffered."""

    async def close(self) -> None:
        """Nothing is held."""
