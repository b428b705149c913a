"""An archived snapshot as a volume: `STORE#NAME[@NUMBER]`, read-only.

Holes are those of the tree: the map costs no data, and is exact for regions of a block or more. What is read is proven,
block by block, to be what was archived. The snapshot is pinned while it is open.
"""

from __future__ import annotations

import asyncio
import collections
import functools
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence

from blockferry.common.archive.blocks import BlockReader
from blockferry.common.archive.catalog import Catalog, Log
from blockferry.common.archive.columns import Entry
from blockferry.common.archive.fetch import Range, ranges
from blockferry.common.archive.format import ARCHIVE_BLOCK, Superblock
from blockferry.common.archive.pins import Pinned
from blockferry.common.archive.store import Access, ObjectStore, SnapshotName, open_store
from blockferry.common.archive.walk import Damage, TreeReader
from blockferry.common.errors import BlockferryError, Code, first_of
from blockferry.common.flow import ByteBudget
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Provenance
from blockferry.common.volumes.volume import ReadOnlyVolume
from pyroaring import BitMap

BYTES_IN_FLIGHT = 64 * 1024 * 1024
"""Bytes of blocks asked for at once, by all readers of a volume: eight ranges of the largest size."""
BLOCKS = 64
"""Blocks kept: 16 MiB, so that what is read in small pieces is fetched once."""


Entries = Iterable[tuple[int, Entry]]
"""Blocks and where each is"""

Handler = Callable[[list[tuple[int, bytes]]], Awaitable[None]]
"""Takes blocks, (number, content), while the budget holds their bytes."""


class SnapshotVolume(ReadOnlyVolume):
    """Open one with `SnapshotVolume.open`, or with `of` where the store is open already."""

    kind = "an archived snapshot"
    otherwise = "restore it, and write to what it was restored to"

    def __init__(
        self, uri: str, catalog: Catalog, log: Log, superblock: Superblock, pin: Pinned, store: ObjectStore | None
    ) -> None:
        self.uri = uri
        self.size = superblock.size
        self.block_size = BLOCK_SIZE
        self.preferred_size = ARCHIVE_BLOCK
        self.snapshot_id = f"archive:{superblock.volume}:{superblock.attempt}"
        self.superblock = superblock
        self.store_uri = catalog.store.uri
        self.archive = catalog.archive
        self.sealer = catalog.sealer(bytes.fromhex(superblock.volume))
        self.tree = TreeReader(catalog.store, self.sealer, superblock)
        self.blocks = BlockReader(catalog.store, self.sealer, superblock, log.moves)
        self._pin = pin
        self._owned = store
        self._budget = ByteBudget(BYTES_IN_FLIGHT)
        self._kept: collections.OrderedDict[int, bytes] = collections.OrderedDict()

    @classmethod
    async def open(cls, uri: str, access: Access | None = None) -> SnapshotVolume:
        """Raises INVALID_ARGUMENT (the URI), NOT_FOUND (archive, volume or snapshot), PERMISSION (credentials or key),
        CORRUPT_STATE, UNSUPPORTED (a later format) and UNAVAILABLE."""
        access = access or Access()
        name = SnapshotName.parse(uri)
        if not name.name:
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"{uri!r} names no snapshot",
                next="write STORE#NAME or STORE#NAME@NUMBER; blockferry archive list STORE names them",
            )
        store = await open_store(name.store, access)
        try:
            return await cls.of(uri, await Catalog.open(store, access), name.name, name.number, own=store)
        except BaseException:
            await store.close()
            raise

    @classmethod
    async def of(
        cls, uri: str, catalog: Catalog, name: str, number: int = 0, *, own: ObjectStore | None = None
    ) -> SnapshotVolume:
        """A snapshot of an archive that is open; `number` 0: the newest. A store that it shall `own` is closed with
        it."""
        volume = await catalog.volume(name)
        log = await catalog.log(volume)
        superblock = await (log.snapshot(number) if number else log.newest())
        if superblock is None:
            raise _no_snapshot(uri, number)
        return await cls.of_superblock(uri, catalog, log, superblock, own=own)

    @classmethod
    async def of_superblock(
        cls, uri: str, catalog: Catalog, log: Log, superblock: Superblock, *, own: ObjectStore | None = None
    ) -> SnapshotVolume:
        """The snapshot that a superblock makes.

        Whoever deletes honours pins that are there when he decides. So the pin comes first, and then another look at
        whether the snapshot is still there.
        """
        volume = bytes.fromhex(superblock.volume)
        pin = await Pinned.make(catalog.store, catalog.sealer(volume), superblock.number, "blockferry")
        try:
            if await log.is_deleted(superblock.number, await log.refresh()):
                raise _no_snapshot(uri, superblock.number)
            return cls(uri, catalog, log, superblock, pin, own)
        except BaseException:
            await pin.close()
            raise

    @property
    def zeroing(self) -> str:
        return "read-only"

    @property
    def notice(self) -> str:
        """What people should know; empty for nothing."""
        return self._pin.notice

    # --- holes --------------------------------------------------------------------------------------------------------

    async def allocation(self, region_size: int) -> AllocationMap:
        geometry = Geometry(self.size, region_size)
        # Of a block that is stored nobody knows which part of it is zeros.
        provenance = Provenance.EXACT if region_size >= ARCHIVE_BLOCK else Provenance.CONSERVATIVE
        regions = BitMap()
        async for entries in self.tree.leaves():
            extents = _extents((block for block, _ in entries), 0, self.size)
            regions |= AllocationMap.from_extents(geometry, extents, provenance).regions
        return AllocationMap(geometry, regions, provenance)

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        return _extents((block for block, _ in await self._entries(offset, length)), offset, offset + length)

    async def _entries(self, offset: int, length: int) -> list[tuple[int, Entry]]:
        first, end = offset // ARCHIVE_BLOCK, -(-(offset + length) // ARCHIVE_BLOCK)
        return [one async for entries in self.tree.leaves(first, end) for one in entries]

    # --- data ---------------------------------------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.read_many([(offset, buffer)])

    async def read_many(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        wanted: dict[int, Entry] = {}
        for offset, buffer in extents:
            entries = await self._entries(offset, len(buffer))
            wanted.update(entries)
            held = _extents((block for block, _ in entries), offset, offset + len(buffer))
            position = offset
            for start, length in [*held, (offset + len(buffer), 0)]:
                buffer[position - offset : start - offset] = bytes(start - position)
                position = start + length
        found = {block: self._kept[block] for block in wanted if block in self._kept}

        async def take(blocks: list[tuple[int, bytes]]) -> None:
            found.update(blocks)

        await self.fetch(_listed((block, entry) for block, entry in wanted.items() if block not in found), take)
        self._keep(found)
        for offset, buffer in extents:
            for block in range(offset // ARCHIVE_BLOCK, -(-(offset + len(buffer)) // ARCHIVE_BLOCK)):
                if block in found:
                    _copy(found[block], block * ARCHIVE_BLOCK, buffer, offset)

    def _keep(self, found: dict[int, bytes]) -> None:
        for block, data in found.items():
            self._kept[block] = data
            self._kept.move_to_end(block)
        while len(self._kept) > BLOCKS:
            self._kept.popitem(last=False)

    async def fetch(self, batches: AsyncIterable[Entries], handle: Handler, damage: Damage | None = None) -> None:
        """Hand the blocks of some entries, proven, to `handle`, in no order and side by side: as many ranges at once as
        the budget of bytes lets. Those that are damaged are an error, or told to `damage` and left out."""
        failure: BlockferryError | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                async for entries in batches:
                    for one in ranges(entries):
                        size = max(one.length, len(one.items) * ARCHIVE_BLOCK)
                        await self._budget.acquire(size)
                        task = tasks.create_task(self._range(one, handle, damage), name=f"fetch-{one.chunk}")
                        task.add_done_callback(functools.partial(self._release, size))
        except* BlockferryError as group:
            failure = first_of(group)
        if failure is not None:
            # Not raised above: before Python 3.11.4 whatever leaves an `except*` is wrapped in a group again.
            failure.volume = failure.volume or self.uri
            raise failure

    def _release(self, size: int, task: asyncio.Task[None]) -> None:
        self._budget.release(size)

    async def _range(self, one: Range[Entry], handle: Handler, damage: Damage | None) -> None:
        if found := await self.blocks.read(one, damage):
            await handle(found)

    async def close(self) -> None:
        await self._pin.close()
        if self._owned is not None:
            await self._owned.close()


async def _listed(entries: Entries) -> AsyncIterator[Entries]:
    yield entries


def _copy(data: bytes, start: int, buffer: memoryview, offset: int) -> None:
    """Put what a block that begins at `start` has of a buffer that begins at `offset` into it."""
    low, high = max(start, offset), min(start + len(data), offset + len(buffer))
    buffer[low - offset : high - offset] = memoryview(data)[low - start : high - start]


def _extents(blocks: Iterable[int], start: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of ascending blocks, merged and cut to the bytes from `start` to `end`."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        low, high = max(block * ARCHIVE_BLOCK, start), min((block + 1) * ARCHIVE_BLOCK, end)
        if found and sum(found[-1]) == low:
            low = found.pop()[0]
        found.append((low, high - low))
    return found


def _no_snapshot(uri: str, number: int) -> BlockferryError:
    name = SnapshotName.parse(uri)
    return BlockferryError(
        Code.NOT_FOUND,
        f"{name.store} has no snapshot {name.name}@{number}"
        if number
        else f"{name.store} has no snapshot of {name.name}",
        cause="it never was, or it was deleted",
        next=f"see which there are: blockferry archive list {name.store}",
        volume=uri,
    )
