"""A site that archives: a volume in memory, a store in memory, a staging directory, and everything that must hold of
what is in the store."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockferry.client.archiver import ArchiveOptions, archive
from blockferry.client.report import Progress
from blockferry.common.archive import format
from blockferry.common.archive.catalog import Catalog
from blockferry.common.archive.columns import Entry, Trailer, decode_trailer
from blockferry.common.archive.creation import open_or_create
from blockferry.common.archive.format import ARCHIVE_BLOCK, FOOTER, MAGIC, Kind, Superblock
from blockferry.common.archive.reader import SnapshotVolume
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import Access, ObjectStore

from tests.archive_faults import CountingStore, MemoryStore
from tests.unit.archive.examples import some
from tests.unit.memory_volume import MemoryVolume

Report = dict[str, Any]

QUICK_SCRYPT = (16, 1, 1)


@functools.lru_cache(maxsize=256)
def block(tag: object, size: int = ARCHIVE_BLOCK) -> bytes:
    """A block that does not pack."""
    return some(f"block {tag}", size)


def content(*tags: object, tail: int = 0) -> bytes:
    """Blocks by tag, None for zeros, and some bytes more of another."""
    parts = [bytes(ARCHIVE_BLOCK) if tag is None else block(tag) for tag in tags]
    return b"".join(parts) + (block("tail", tail) if tail else b"")


def volume(data: bytes, snapshot_id: str = "") -> MemoryVolume:
    """A source; with an id an immutable one."""
    made = MemoryVolume(data)
    made.snapshot_id = snapshot_id
    return made


@dataclass
class Site:
    """Archives the volume `vm`."""

    directory: Path
    store: ObjectStore = field(default_factory=MemoryStore)
    access: Access = field(default_factory=Access)
    compression: str = "none"
    options: dict[str, Any] = field(default_factory=dict)

    def beside(self, name: str) -> Site:
        """Another host, with a staging directory of its own, and the same store."""
        return replace(self, directory=self.directory / name)

    def on(self, store: ObjectStore) -> Site:
        """The same host with the store behind something."""
        return replace(self, store=store)

    async def archive(self, source: MemoryVolume, **options: Any) -> Report:
        """One `archive create`."""
        catalog = await open_or_create(self.store, self.access, compression=self.compression, scrypt=QUICK_SCRYPT)
        made = ArchiveOptions("vm", self.directory, **{**self.options, **options})
        return await archive(source, catalog, made, Progress())

    async def catalog(self) -> Catalog:
        """The archive, opened."""
        return await Catalog.open(self.store, self.access)

    async def snapshots(self) -> list[Superblock]:
        """All of them."""
        catalog = await self.catalog()
        return await (await catalog.log(await catalog.volume("vm"))).snapshots()

    async def read(self, number: int = 0) -> bytes:
        """What a snapshot reads as."""
        found = await SnapshotVolume.of("vm", await self.catalog(), "vm", number)
        data = bytearray(found.size)
        await found.read_into(0, memoryview(data))
        await found.close()
        return bytes(data)

    async def sealer(self) -> Sealer:
        """Of the volume."""
        catalog = await self.catalog()
        return catalog.sealer(await catalog.volume("vm"))

    async def entries(self, number: int) -> dict[int, Entry]:
        """Where the tree says that a snapshot's blocks are."""
        found = await SnapshotVolume.of("vm", await self.catalog(), "vm", number)
        listed = [one async for leaf in found.tree.leaves() for one in leaf]
        await found.close()
        return dict(listed)

    async def trailers(self, attempt: str = "") -> dict[int, Trailer]:
        """Of the data chunks of an attempt; of all of them, where there is only one."""
        sealer = await self.sealer()
        found = {}
        for key in await self.store.list(f"{sealer.volume.hex()}/data/"):
            of, _, digits = key.rpartition("/")[2].partition("-")
            if attempt in ("", of):
                assert int(digits) not in found
                found[int(digits)] = await self.trailer(sealer, bytes.fromhex(of), int(digits))
        return found

    async def trailer(self, sealer: Sealer, attempt: bytes, number: int) -> Trailer:
        """Read as docs/archive-format.md says."""
        data = await self.store.get(format.data_name(sealer.volume, attempt, number))
        assert len(data) <= format.CHUNK_SIZE
        length, magic = FOOTER.unpack(data[-FOOTER.size :])
        assert magic == MAGIC
        offset = len(data) - FOOTER.size - length
        frame = data[offset : -FOOTER.size]
        of, body = sealer.open_frame(Kind.TRAILER, frame, "trailer", number=number, offset=offset)
        found = decode_trailer(body, "trailer")
        assert of == attempt and found.data_length == offset
        return found

    async def rebuilt(self, of: str) -> dict[int, Entry]:
        """The tree that an attempt made, from trailers alone, as docs/archive-format.md says."""
        attempt = bytes.fromhex(of)
        trailers = await self.trailers(of)
        last = max(number for number, trailer in trailers.items() if trailer.last)
        run, base = trailers[last].run, trailers[last].base_attempt
        found = await self.rebuilt(base.hex()) if any(base) else {}
        stored = {number: dict(trailer.entries(attempt, number)) for number, trailer in trailers.items()}
        for number in range(trailers[last].first, last + 1):
            trailer = trailers[number]
            assert (trailer.run, trailer.base_attempt, trailer.first) == (run, base, trailers[last].first)
            for first, count in trailer.holes:
                for key in range(first, first + count):
                    assert key in found
                    del found[key]
            found.update(stored[number])
            for first, count, chunk in trailer.kept:
                found.update((key, stored[chunk][key]) for key in range(first, first + count))
        return dict(sorted(found.items()))

    async def check(self, *expected: bytes) -> None:
        """These snapshots are there and no others, their trees are what the trailers say, and nothing of an attempt is
        left."""
        snapshots = await self.snapshots()
        assert len(snapshots) == len(expected)
        for superblock, data in zip(snapshots, expected, strict=True):
            assert superblock.size == len(data)
            assert await self.read(superblock.number) == data
            entries = await self.entries(superblock.number)
            assert entries == await self.rebuilt(superblock.attempt)
            trailers = await self.trailers(superblock.attempt)
            assert all(number < superblock.data_chunks for number in trailers)
            last = trailers[max(number for number, trailer in trailers.items() if trailer.last)]
            assert (last.base, last.base_attempt.hex(), last.size) == (
                superblock.base, superblock.base_attempt or "00" * 16, superblock.size,
            )  # fmt: skip
            whole = range(0, len(data), ARCHIVE_BLOCK)
            assert list(entries) == [at // ARCHIVE_BLOCK for at in whole if any(data[at : at + ARCHIVE_BLOCK])]
        left = [key for key in await self.store.list("") if "/attempts/" in key]
        assert left == []

    async def stored_twice(self) -> list[tuple[int, bytes]]:
        """Blocks, by number and digest, that are in more than one place in the store."""
        seen: set[tuple[int, bytes]] = set()
        twice = []
        sealer = await self.sealer()
        for key in await self.store.list(f"{sealer.volume.hex()}/data/"):
            of, _, digits = key.rpartition("/")[2].partition("-")
            trailer = await self.trailer(sealer, bytes.fromhex(of), int(digits))
            for one in zip(trailer.keys, trailer.digests, strict=True):
                if one in seen:
                    twice.append(one)
                seen.add(one)
        return twice


def chunks(counting: CountingStore, kind: str) -> Sequence[str]:
    """Names of the chunks that were uploaded, in order."""
    return [key for name, key in counting.requests if name == "put_new" and f"/{kind}/" in key]


def parts(counting: CountingStore) -> dict[str, int]:
    """Requests by kind and part of the archive."""
    found: dict[str, int] = {}
    for name, key in counting.requests:
        part = key.split("/")[1] if "/" in key and len(key.split("/")[0]) == 32 else key.split("/")[0]
        found[f"{name} {part}"] = found.get(f"{name} {part}", 0) + 1
    return dict(itertools.chain(sorted(found.items())))
