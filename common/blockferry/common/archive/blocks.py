"""Blocks of a volume, read from data chunks and proven to be what was archived."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from blockferry.common.archive import format
from blockferry.common.archive.columns import Entry, Move
from blockferry.common.archive.fetch import Range, ranges
from blockferry.common.archive.format import Superblock
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import Missing, ObjectStore
from blockferry.common.archive.walk import Damage, is_damage
from blockferry.common.errors import BlockferryError
from blockferry.common.volumes.volume import in_thread

Place = tuple[bytes, int, int]
"""(attempt, chunk, offset)"""

Moves = Mapping[Place, Move]


class BlockReader:
    """Reads ranges of chunks. `moves` says, when it is asked, where repacking has put what is no longer there."""

    def __init__(
        self, store: ObjectStore, sealer: Sealer, superblock: Superblock, moves: Callable[[], Awaitable[Moves]]
    ) -> None:
        self._store = store
        self._sealer = sealer
        self._size = superblock.size
        self._ask_moves = moves
        self._moves: Moves | None = None
        self._asking = asyncio.Lock()
        self.bytes_read = 0
        """Bytes that came from the store."""

    def extent(self, block: int) -> tuple[int, int]:
        """(offset, length) of a block in the volume, in bytes; the last one may be short."""
        offset = block * format.ARCHIVE_BLOCK
        return offset, min(format.ARCHIVE_BLOCK, self._size - offset)

    async def read(self, one: Range[Entry], damage: Damage | None = None) -> list[tuple[int, bytes]]:
        """(number, plaintext) of the blocks in a range, ascending by where they are stored. Blocks that are damaged are
        an error, or told to `damage` and left out."""
        name = format.data_name(self._sealer.volume, one.attempt, one.chunk)
        try:
            data = await self._store.get_range(name, one.offset, one.length)
        except Missing as error:
            moved = await self._moved(one)
            if moved is not None:
                return [found for part in moved for found in await self.read(part, damage)]
            return await self._damaged(one, error, damage)
        except BlockferryError as error:
            return await self._damaged(one, error, damage)
        self.bytes_read += len(data)
        return await in_thread(self._open, one, memoryview(data), name, damage)

    async def _damaged(
        self, one: Range[Entry], error: BlockferryError, damage: Damage | None
    ) -> list[tuple[int, bytes]]:
        if damage is None or not is_damage(error):
            raise error
        if len(one.items) == 1:
            damage(error, one.items[0][0], one.items[0][0] + 1)
            return []
        # Some of them may still be whole.
        return [found for item in one.items for found in await self.read(ranges([item])[0], damage)]

    def _open(self, one: Range[Entry], data: memoryview, name: str, damage: Damage | None) -> list[tuple[int, bytes]]:
        found = []
        for block, entry in one.items:
            start = entry.offset - one.offset
            stored = data[start : start + entry.length]
            offset, length = self.extent(block)
            try:
                plain = self._sealer.open_block(entry.attempt, block, entry.codec, stored, length, entry.digest)
            except BlockferryError as error:
                told = BlockferryError(
                    error.code,
                    f"a block in chunk {self._store.uri}/{name} is damaged",
                    cause=f"{error.cause} (stored at {entry.offset}, {entry.length} bytes)",
                    next=error.next,
                    offset=offset,
                    length=length,
                )
                if damage is None or not is_damage(error):
                    raise told from error
                damage(told, block, block + 1)
                continue
            found.append((block, plain))
        return found

    async def moved(self, entry: Entry) -> Entry | None:
        """Where a repacking has put a block; None where none has moved it."""
        async with self._asking:
            if self._moves is None:
                self._moves = await self._ask_moves()
        found = None
        while (move := self._moves.get((entry.attempt, entry.chunk, entry.offset))) is not None:
            found = entry = Entry(
                move.new_attempt, move.new_chunk, move.new_offset, move.new_length, move.new_codec, entry.digest
            )
        return found

    async def _moved(self, one: Range[Entry]) -> list[Range[Entry]] | None:
        """The ranges that hold the blocks of a chunk that is gone, where a repacking has moved all of them."""
        found = [(block, now) for block, entry in one.items if (now := await self.moved(entry)) is not None]
        return ranges(found) if len(found) == len(one.items) else None
