"""Which blocks of a region differ: digests per region, then per 64 KiB, then per block.

A level costs one round trip for all differing regions of a batch. Where region after region differs entirely, asking is
pointless: the regions are sent whole for a while, and the destination leaves equal blocks alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from blockferry.common.digests import PIECE_DIGEST_SIZE, PIECE_SIZE, differing_pieces, digests_of_parts
from blockferry.common.regions import BLOCK_SIZE, Run
from blockferry.common.volumes import in_thread

AskDigests = Callable[[int, Sequence[Run]], Awaitable[bytes]]
"""The other side's digests: (piece size in bytes, runs of piece numbers) to digests one after the other."""


class Refiner:
    """Finds differing blocks, and knows when to stop asking."""

    PATIENCE = 8
    """Entirely different regions in a row until asking stops."""

    HOLIDAY = 64
    """Regions then sent whole before asking is tried again."""

    def __init__(self, key: bytes, region_size: int) -> None:
        self._key = key
        # A region of 64 KiB is its own first level.
        self._levels = (PIECE_SIZE, BLOCK_SIZE) if region_size > PIECE_SIZE else (BLOCK_SIZE,)
        self._in_a_row = 0
        self._unasked = 0

    @property
    def asking(self) -> bool:
        """Whether asking for block digests is likely to pay."""
        return self._unasked == 0

    def sent_whole(self, count: int) -> None:
        """Note regions that were sent without asking."""
        self._unasked = max(self._unasked - count, 0)

    async def differing_blocks(self, regions: Sequence[tuple[int, memoryview]], ask: AskDigests) -> list[list[Run]]:
        """For each (offset in the volume, our bytes) the runs of blocks, numbered within the region, that differ."""
        suspects = [[(0, len(data))] for _, data in regions]
        for piece_size in self._levels:
            suspects = await self._narrow(regions, suspects, piece_size, ask)
        found = [[(start // BLOCK_SIZE, -(-length // BLOCK_SIZE)) for start, length in extents] for extents in suspects]
        for (_, data), extents in zip(regions, suspects, strict=True):
            self._learn(sum(length for _, length in extents) == len(data))
        return found

    def _learn(self, entirely_different: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if entirely_different else 0
        if self._in_a_row >= self.PATIENCE:
            self._in_a_row = 0
            self._unasked = self.HOLIDAY

    async def _narrow(
        self,
        regions: Sequence[tuple[int, memoryview]],
        suspects: list[list[tuple[int, int]]],
        piece_size: int,
        ask: AskDigests,
    ) -> list[list[tuple[int, int]]]:
        """Keep of each region's suspect (start, length) extents the pieces whose digests differ, merged."""
        runs = [
            ((offset + start) // piece_size, -(-length // piece_size))
            for (offset, _), extents in zip(regions, suspects, strict=True)
            for start, length in extents
        ]
        if not runs:
            return suspects
        parts = [
            (data[start : start + length], [(0, length)])
            for (_, data), extents in zip(regions, suspects, strict=True)
            for start, length in extents
        ]
        theirs, mine = await asyncio.gather(
            ask(piece_size, runs), in_thread(digests_of_parts, parts, piece_size, self._key, PIECE_DIGEST_SIZE)
        )
        position = 0
        narrowed: list[list[tuple[int, int]]] = []
        for (_, data), extents in zip(regions, suspects, strict=True):
            kept: list[tuple[int, int]] = []
            for start, length in extents:
                count = -(-length // piece_size)
                ours = mine[position : position + count * PIECE_DIGEST_SIZE]
                part = theirs[position : position + len(ours)]
                position += len(ours)
                for index in differing_pieces(ours, part, PIECE_DIGEST_SIZE):
                    begin = start + index * piece_size
                    end = min(begin + piece_size, len(data))
                    if kept and sum(kept[-1]) == begin:
                        kept[-1] = (kept[-1][0], end - kept[-1][0])
                    else:
                        kept.append((begin, end - begin))
            narrowed.append(kept)
        return narrowed
