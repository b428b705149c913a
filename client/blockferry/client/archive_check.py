"""Verify an archive: its metadata, a sample of its data, or all of it.

The tree of every snapshot is always walked whole. What snapshots share is read once, as long as it is sound.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from blockferry.client.report import Phase
from blockferry.common.archive import format
from blockferry.common.archive.catalog import Catalog, Log
from blockferry.common.archive.columns import Entry, Leaf, NodeRef
from blockferry.common.archive.fetch import ranges
from blockferry.common.archive.format import ARCHIVE_BLOCK, Superblock
from blockferry.common.archive.reader import SnapshotVolume
from blockferry.common.archive.walk import is_damage
from blockferry.common.errors import BlockferryError, Code
from pyroaring import BitMap64

_CHUNK_BITS = 24
"""An offset in a chunk of 16 MiB."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong. Bytes of the volume; `length` 0 where it is not about a part of it, and `snapshot` 0
    where it is not about one."""

    volume: str
    snapshot: int
    what: str
    cause: str
    offset: int = 0
    length: int = 0

    def fields(self) -> dict[str, object]:
        """For reports."""
        return {
            "volume": self.volume,
            "snapshot": self.snapshot or None,
            "what": self.what,
            "cause": self.cause or None,
            "offset": self.offset if self.length else None,
            "length": self.length or None,
        }


@dataclass
class Checked:
    """What was looked at, and what was found."""

    snapshots: int = 0
    nodes: int = 0
    blocks: int = 0
    blocks_read: int = 0
    bytes_read: int = 0
    findings: list[Finding] = field(default_factory=list)


class _Known:
    """What need not be looked at again, of one volume: nodes that are sound with all that is below them, and blocks by
    their place."""

    def __init__(self) -> None:
        self.nodes: set[NodeRef] = set()
        self._blocks: dict[bytes, BitMap64] = {}

    def has(self, entry: Entry) -> bool:
        """Whether a block is."""
        return _place(entry) in self._blocks.get(entry.attempt, ())

    def add(self, entries: Iterable[Entry]) -> None:
        """These are."""
        for entry in entries:
            self._blocks.setdefault(entry.attempt, BitMap64()).add(_place(entry))


def _place(entry: Entry) -> int:
    return entry.chunk << _CHUNK_BITS | entry.offset


async def check(catalog: Catalog, names: Sequence[str], number: int, share: float, phase: Phase) -> Checked:
    """Look at the volumes `names`; at one snapshot if `number` is not 0, else at all of them. `share` of the data is
    read, 0 (none) to 1 (all); whether all chunks are there and long enough is looked at in any case.

    Raises what keeps it from looking at all: what is wrong with the archive is a finding.
    """
    checked = Checked()
    for name in names:
        try:
            volume = await catalog.volume(name)
        except BlockferryError as error:
            checked.findings.append(_found(error, name))
            continue
        log = await catalog.log(volume)
        known = _Known()
        sizes = {
            entry.key: entry.size
            for kind in ("data", "meta")
            async for entry in catalog.store.entries(f"{volume.hex()}/{kind}/")
        }
        for superblock in await _snapshots(log, name, number, checked, catalog):
            checked.snapshots += 1
            uri = f"{catalog.store.uri}#{name}@{superblock.number}"
            opened = await SnapshotVolume.of_superblock(uri, catalog, log, superblock)
            try:
                await _Check(opened, name, share, phase, checked, known, sizes).run()
            finally:
                await opened.close()
    return checked


async def _snapshots(log: Log, name: str, number: int, checked: Checked, catalog: Catalog) -> list[Superblock]:
    """Those to look at, the newest first. A damaged record is a finding, and the others are looked at all the same."""
    if number:
        one = await log.snapshot(number)
        if one is None:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"{catalog.store.uri} has no snapshot {name}@{number}",
                next=f"see which there are: blockferry archive list {catalog.store.uri}",
            )
        return [one]
    found: list[Superblock] = []
    deleted: set[int] = set()
    for one_number in reversed(log.numbers):
        try:
            record = await log.record(one_number)
        except BlockferryError as error:
            checked.findings.append(_found(error, name, one_number))
            continue
        if isinstance(record, format.Deletion):
            deleted |= set(record.snapshots)
        elif isinstance(record, Superblock) and one_number not in deleted:
            found.append(record)
    return found


class _Check:
    """One snapshot."""

    def __init__(
        self,
        snapshot: SnapshotVolume,
        name: str,
        share: float,
        phase: Phase,
        checked: Checked,
        known: _Known,
        sizes: dict[str, int],
    ) -> None:
        self._snapshot = snapshot
        self._name = name
        self._share = share
        self._phase = phase
        self._checked = checked
        self._known = known
        self._sizes = sizes
        self._read: dict[int, Entry] = {}

    async def run(self) -> None:
        before = len(self._checked.findings)
        refs: list[NodeRef] = []
        root = self._snapshot.superblock.root
        if root is not None and self._share:
            self._phase.total += root.blocks * ARCHIVE_BLOCK
        await self._snapshot.fetch(self._batches(refs), self._take, self._damage)
        self._checked.bytes_read += self._snapshot.blocks.bytes_read
        if len(self._checked.findings) == before:
            self._known.nodes.update(refs)

    def _damage(self, error: BlockferryError, first: int, end: int) -> None:
        offset = first * ARCHIVE_BLOCK
        length = min(end * ARCHIVE_BLOCK, self._snapshot.size) - offset
        self._checked.findings.append(
            Finding(self._name, self._snapshot.superblock.number, error.what, error.cause, offset, length)
        )

    async def _batches(self, refs: list[NodeRef]) -> AsyncIterator[list[tuple[int, Entry]]]:
        """The blocks to read, and everything that can be said without reading any."""
        async for ref, node in self._snapshot.tree.nodes(self._damage, self._known.nodes):
            refs.append(ref)
            self._checked.nodes += 1
            if not isinstance(node, Leaf):
                continue
            new = [one for one in zip(node.keys, node.items, strict=True) if not self._known.has(one[1])]
            self._checked.blocks += len(new)
            present = [one for one in new if await self._is_there(*one)]
            if self._share >= 1:
                chosen = present
            else:
                chosen = [one for part in ranges(present) if random.random() < self._share for one in part.items]
            # Whatever is not drawn had its chance: another snapshot that has it does not give it another.
            drawn = {block for block, _ in chosen}
            self._known.add(entry for block, entry in present if block not in drawn)
            self._phase.done += (len(node.keys) - len(chosen)) * ARCHIVE_BLOCK if self._share else 0
            self._read.update(chosen)
            yield chosen

    async def _is_there(self, block: int, entry: Entry) -> bool:
        """Whether the chunk of a block is in the store and long enough."""
        name, size = self._stored(entry)
        if size is None and (now := await self._snapshot.blocks.moved(entry)) is not None:
            entry = now
            name, size = self._stored(entry)
        if size is not None and entry.offset + entry.length <= size:
            return True
        cause = "it is not in the store" if size is None else f"it has {size} bytes and is cut off"
        self._damage(format.damaged(f"chunk {self._snapshot.store_uri}/{name}", cause), block, block + 1)
        return False

    def _stored(self, entry: Entry) -> tuple[str, int | None]:
        name = format.data_name(self._snapshot.sealer.volume, entry.attempt, entry.chunk)
        return name, self._sizes.get(name)

    async def _take(self, blocks: list[tuple[int, bytes]]) -> None:
        self._checked.blocks_read += len(blocks)
        self._known.add(self._read.pop(block) for block, _ in blocks)
        self._phase.done += len(blocks) * ARCHIVE_BLOCK


def _found(error: BlockferryError, name: str, number: int = 0) -> Finding:
    if not is_damage(error) and error.code is not Code.UNSUPPORTED and error.code is not Code.NOT_FOUND:
        raise error
    return Finding(name, number, error.what, error.cause)
