"""Archives made for tests of reading: a small writer, without staging or resuming, whose chunks are as small as one
likes."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from blockferry.common.archive import format, keys, tree
from blockferry.common.archive.columns import Entry, Move, Node, NodeRef, Trailer, encode_node, encode_trailer
from blockferry.common.archive.format import ARCHIVE_BLOCK, Deletion, Kind, NodeAt, Superblock
from blockferry.common.archive.keys import Secret
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.store import ObjectStore
from blockferry.common.archive.tree import Root

EXAMPLES = int(os.environ.get("BLOCKFERRY_ARCHIVE_EXAMPLES", "25"))
"""Chains of snapshots that tests draw; many more in `make soak`."""

WHEN = "2026-01-01T00:00:00Z"
QUICK_SCRYPT = (2, 1, 1)


@dataclass
class Made:
    """A snapshot that was made: what it reads as, and where everything is."""

    number: int
    size: int
    attempt: bytes
    root: Root | None
    blocks: dict[int, bytes]
    entries: dict[int, Entry]

    @property
    def content(self) -> bytes:
        """All of it."""
        found = bytearray(self.size)
        for block, data in self.blocks.items():
            found[block * ARCHIVE_BLOCK : block * ARCHIVE_BLOCK + len(data)] = data
        return bytes(found)


@dataclass
class Maker:
    """Writes one volume of an archive."""

    store: ObjectStore
    name: str = "vm"
    secret: Secret | None = None
    level: int = 3
    chunk_blocks: int = 4
    """Blocks in a data chunk at most."""
    chunk_nodes: int = 3
    """Nodes in a metadata chunk at most."""
    volume: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    key: bytes | None = None
    snapshots: list[Made] = field(default_factory=list)
    number: int = 0
    nodes: dict[NodeRef, Node] = field(default_factory=dict)

    @property
    def sealer(self) -> Sealer:
        """Of the volume."""
        return Sealer(self.key, self.volume)

    async def create(self, **changes: object) -> Maker:
        """The archive itself, and the volume's name."""
        archive = format.Archive(
            id=secrets.token_hex(16), compression=f"zstd:{self.level}" if self.level else "none",
            encryption="none" if self.secret is None else "aes-256-gcm", conditional=True, created=WHEN,
        )  # fmt: skip
        await self.store.put_new(format.ARCHIVE_NAME, [format.encode(archive)])
        if self.secret is not None:
            self.key = secrets.token_bytes(32)
            wrapped = keys.wrap(self.secret, self.key, archive.id, scrypt=QUICK_SCRYPT)
            await self.store.put_new(format.key_name(wrapped.id), [format.encode(wrapped)])
        return await self.named()

    async def named(self) -> Maker:
        """The volume's name alone, in an archive that is there."""
        record = format.Name(name=self.name, volume=self.volume.hex(), created=WHEN)
        frame = Sealer(self.key).seal_frame(Kind.NAME, format.NOBODY, format.encode(record))
        await self.store.put_new(format.volume_name(self.name), [frame])
        return self

    async def snapshot(
        self, size: int, changes: Mapping[int, bytes | None], *, base: Made | None = None, attempt: bytes | None = None
    ) -> Made:
        """Archive the base (none: all zeros) with these archive blocks changed; None makes one a hole."""
        attempt = attempt or secrets.token_bytes(16)
        length = {block: min(ARCHIVE_BLOCK, size - block * ARCHIVE_BLOCK) for block in changes}
        filled = sorted((block, data) for block, data in changes.items() if data is not None)
        assert all(len(data) == length[block] for block, data in filled)
        entries, chunks = await self._data(attempt, size, filled)
        root, metas = await self._tree(attempt, base, {block: entries.get(block) for block in changes})
        self.number += 1
        superblock = Superblock(
            number=self.number, volume=self.volume.hex(), attempt=attempt.hex(),
            base=base.number if base else 0, base_attempt=base.attempt.hex() if base else "", seen=self.number - 1,
            created=WHEN, source="file:///srv/vm.raw", snapshot_id="", size=size, block_size=ARCHIVE_BLOCK,
            root=None if root is None else NodeAt(
                attempt=root.ref.attempt.hex(), chunk=root.ref.chunk, offset=root.ref.offset, length=root.ref.length,
                level=root.level, blocks=root.blocks,
            ),
            data_chunks=chunks, meta_chunks=metas, stored=sum(one.length for one in entries.values()),
        )  # fmt: skip
        await self.log(Kind.SUPERBLOCK, superblock, attempt)
        blocks = dict(base.blocks if base else {})
        places = dict(base.entries if base else {})
        for block, data in changes.items():
            if data is None:
                blocks.pop(block, None)
                places.pop(block, None)
            else:
                blocks[block], places[block] = data, entries[block]
        made = Made(self.number, size, attempt, root, blocks, places)
        self.snapshots.append(made)
        return made

    async def delete(self, snapshot: int) -> None:
        """A deletion mark, which removes no chunks."""
        self.number += 1
        mark = Deletion(
            number=self.number, volume=self.volume.hex(), snapshots=[snapshot], chunks=[], grace=3600, created=WHEN
        )
        await self.log(Kind.DELETION, mark, secrets.token_bytes(16))

    async def log(self, kind: Kind, record: format.Record | bytes, attempt: bytes) -> None:
        """The record with the number `self.number`."""
        body = record if isinstance(record, bytes) else format.encode(record)
        frame = self.sealer.seal_frame(kind, attempt, body, number=self.number)
        await self.store.put_new(format.log_name(self.volume, self.number), [frame])

    async def _data(
        self, attempt: bytes, size: int, filled: Sequence[tuple[int, bytes]]
    ) -> tuple[dict[int, Entry], int]:
        entries: dict[int, Entry] = {}
        groups = [
            filled[start : start + self.chunk_blocks] for start in range(0, max(len(filled), 1), self.chunk_blocks)
        ]
        for number, group in enumerate(groups):
            trailer = Trailer(0, 0, format.NOBODY, size, 0, last=number == len(groups) - 1)
            parts = []
            for block, data in group:
                codec, stored = self.sealer.seal_block(attempt, block, memoryview(data), self.level)
                parts.append(stored)
                trailer.keys.append(block)
                trailer.lengths.append(len(stored))
                trailer.codecs.append(codec)
                trailer.digests.append(self.sealer.digest(data))
            offset = trailer.data_length
            frame = self.sealer.seal_frame(Kind.TRAILER, attempt, encode_trailer(trailer), number=number, offset=offset)
            parts += [frame, format.FOOTER.pack(len(frame), format.MAGIC)]
            await self.store.put_new(format.data_name(self.volume, attempt, number), parts)
            entries.update(trailer.entries(attempt, number))
        return entries, len(groups)

    async def _tree(
        self, attempt: bytes, base: Made | None, edits: Mapping[int, Entry | None]
    ) -> tuple[Root | None, int]:
        chunks: list[list[bytes]] = [[]]

        async def save(node: Node) -> NodeRef:
            if len(chunks[-1]) == self.chunk_nodes:
                chunks.append([])
            number, offset = len(chunks) - 1, sum(map(len, chunks[-1]))
            frame = self.sealer.seal_frame(Kind.NODE, attempt, encode_node(node), number=number, offset=offset)
            chunks[-1].append(frame)
            ref = NodeRef(attempt, number, offset, len(frame))
            self.nodes[ref] = node
            return ref

        async def load(ref: NodeRef) -> Node:
            return self.nodes[ref]

        async def batches() -> AsyncIterator[list[tree.Edit]]:
            yield sorted(edits.items())

        root = await tree.edit(base.root if base else None, batches(), load, save)
        used = [chunk for chunk in chunks if chunk]
        for number, chunk in enumerate(used):
            await self.store.put_new(format.meta_name(self.volume, attempt, number), chunk)
        return root, len(used)


def moved(old: Entry, new: Entry) -> Move:
    """That a block went from one place to another."""
    return Move(old.attempt, old.chunk, old.offset, new.attempt, new.chunk, new.offset, new.length, new.codec)


def noise(tag: int, length: int = ARCHIVE_BLOCK) -> bytes:
    """Bytes that differ by their tag and compress, with holes of zeros in them."""
    one = random.Random(tag)
    parts = [one.randbytes(4096) if one.random() < 0.3 else bytes([one.randrange(1, 256)]) * 4096 for _ in range(4)]
    parts[one.randrange(1, 4)] = bytes(4096)
    return (b"".join(parts) * (length // 16384 + 1))[:length]
