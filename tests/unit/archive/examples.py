"""One of everything that an archive holds, always the same: what the frozen vectors were made of."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

from blockferry.common.archive import format
from blockferry.common.archive.columns import (
    Child,
    Entry,
    Inner,
    Kept,
    Leaf,
    Move,
    NodeRef,
    Trailer,
    encode_node,
    encode_remap,
    encode_trailer,
)
from blockferry.common.archive.format import (
    Archive,
    Attempt,
    Deletion,
    Doomed,
    Key,
    Kind,
    Name,
    NodeAt,
    Pin,
    Record,
    Superblock,
)
from blockferry.common.archive.keys import Secret, wrap
from blockferry.common.archive.seal import Sealer


def some(tag: str, size: int) -> bytes:
    """Bytes that look random and are always the same."""
    return hashlib.shake_128(tag.encode()).digest(size)


def counted(tag: str) -> Callable[[int], bytes]:
    """In place of random bytes: other ones at each call."""
    numbers = itertools.count()
    return lambda size: some(f"{tag} {next(numbers)}", size)


VOLUME, OTHER = some("volume", 16), some("other volume", 16)
ATTEMPT, EARLIER = some("attempt", 16), some("earlier attempt", 16)
KEY = some("archive key", 32)
CREATED = "2026-01-02T03:04:05Z"

ARCHIVE = Archive(
    id=some("archive", 16).hex(), compression="zstd:3", encryption="aes-256-gcm", conditional=True, created=CREATED
)
NAME = Name(name="db-1.raw", volume=VOLUME.hex(), created=CREATED)
SUPERBLOCK = Superblock(
    number=7, volume=VOLUME.hex(), attempt=ATTEMPT.hex(), base=5, base_attempt=EARLIER.hex(), seen=6, created=CREATED,
    source="/srv/vm.raw", snapshot_id="commit:00ff", size=1_000_000_001, block_size=format.ARCHIVE_BLOCK,
    root=NodeAt(attempt=ATTEMPT.hex(), chunk=1, offset=4096, length=321, level=1, blocks=300),
    data_chunks=3, meta_chunks=2, stored=123_456_789,
)  # fmt: skip
EMPTY = Superblock(
    number=1, volume=VOLUME.hex(), attempt=EARLIER.hex(), base=0, base_attempt="", seen=0, created=CREATED,
    source="nbd://localhost/a%20disk", snapshot_id="", size=1, block_size=format.ARCHIVE_BLOCK, root=None,
    data_chunks=1, meta_chunks=0, stored=0,
)  # fmt: skip
DELETION = Deletion(
    number=8, volume=VOLUME.hex(), snapshots=[1, 5], grace=259_200, created=CREATED,
    chunks=[
        Doomed(kind="data", attempt=EARLIER.hex(), first=0, count=3),
        Doomed(kind="meta", attempt=EARLIER.hex(), first=1, count=1),
    ],
)  # fmt: skip
RUNNING = Attempt(
    attempt=ATTEMPT.hex(), volume=VOLUME.hex(), host="host.example", started=CREATED, renewals=3, base=5, seen=6
)
READING = Pin(
    pin=some("pin", 16).hex(), volume=VOLUME.hex(), snapshot=7, reader="restore", host="host.example", started=CREATED,
    renewals=1,
)  # fmt: skip

RECORDS: dict[str, Record] = {
    "archive": ARCHIVE,
    "name": NAME,
    "superblock": SUPERBLOCK,
    "superblock-empty": EMPTY,
    "deletion": DELETION,
    "attempt": RUNNING,
    "pin": READING,
}

LEAF = Leaf(
    [0, 1, 4, 5000, (1 << 46) - 1],
    [
        Entry(ATTEMPT, 0, 0, 262_144, 0, some("digest 0", 32)),
        Entry(ATTEMPT, 0, 262_144, 1, 1, some("digest 1", 32)),
        Entry(EARLIER, 999_999, 16_000_000, 70_000, 1, some("digest 2", 32)),
        Entry(ATTEMPT, 1, 0, 4096, 1, some("digest 3", 32)),
        Entry(EARLIER, 1_000_000, 0, 1 << 24, 0, some("digest 4", 32)),
    ],
)
INNER = Inner(
    2,
    [3, 1000, 70_000],
    [
        Child(NodeRef(EARLIER, 0, 0, 300), 65_536),
        Child(NodeRef(ATTEMPT, 2, 1 << 20, 12_000), 1),
        Child(NodeRef(ATTEMPT, 3, 0, 12_000), 17),
    ],
)
TRAILER = Trailer(
    2, 5, EARLIER, 1_000_000_001, 1_767_323_045_000_001, True,
    [0, 7, 8], [300, 262_144, 65], [1, 0, 1], [some("digest 0", 32), some("digest 7", 32), some("digest 8", 32)],
    [(1, 2), (9, 1)], [Kept(3, 4, 0), Kept(100, 1, 1)], 2,
)  # fmt: skip
BARE = Trailer(0, 0, bytes(16), 1, 0)
MOVES = sorted(
    [
        Move(EARLIER, 0, 0, ATTEMPT, 9, 0, 300, 1),
        Move(EARLIER, 0, 300, ATTEMPT, 9, 300, 262_172, 0),
        Move(ATTEMPT, 2, 7, some("third attempt", 16), 0, 0, 1, 1),
    ]
)

BODIES: dict[str, bytes] = {
    "leaf": encode_node(LEAF),
    "inner": encode_node(INNER),
    "trailer": encode_trailer(TRAILER),
    "trailer-bare": encode_trailer(BARE),
    "remap": encode_remap(MOVES),
}

BLOCK = (b"a block of the volume, " * 20_000)[:262_144]
"""It packs well."""
NOISE = some("noise", 5000)
"""It does not."""


def sealers() -> dict[str, Sealer]:
    """With and without encryption."""
    return {"plain": Sealer(None, VOLUME), "encrypted": Sealer(KEY, VOLUME, counted("nonce"))}


FRAMES: dict[str, tuple[Kind, bytes, int, int]] = {
    "superblock": (Kind.SUPERBLOCK, format.encode(SUPERBLOCK), 7, 0),
    "leaf": (Kind.NODE, BODIES["leaf"], 1, 4096),
    "trailer": (Kind.TRAILER, BODIES["trailer"], 2, 262_509),
    "noise": (Kind.REMAP, NOISE, 9, 0),
}
"""Kind, body, number and offset."""

KEY_FILE = Secret("key file", some("key file", 32))
PASSPHRASE = Secret("passphrase", "Füchse kauen lautlos".encode())


def keys() -> dict[str, Key]:
    """The archive's key, wrapped for both."""
    return {
        "key-file": wrap(KEY_FILE, KEY, ARCHIVE.id, random=counted("key file")),
        "passphrase": wrap(PASSPHRASE, KEY, ARCHIVE.id, scrypt=(1024, 8, 1), random=counted("passphrase")),
    }


def vectors() -> dict[str, bytes]:
    """Everything, by the name of its file."""
    found = {
        f"{name}.json": format.encode(record)
        for name, record in {**RECORDS, **{f"key-{n}": k for n, k in keys().items()}}.items()
    }
    found |= {f"{name}.body": body for name, body in BODIES.items()}
    for how, sealer in sealers().items():
        for name, (kind, body, number, offset) in FRAMES.items():
            found[f"{name}.{how}.frame"] = sealer.seal_frame(kind, ATTEMPT, body, number=number, offset=offset)
        for name, data, block in (("block", BLOCK, 3), ("noise", NOISE, 1 << 40)):
            codec, stored = sealer.seal_block(ATTEMPT, block, memoryview(data), 3)
            found[f"{name}.{how}.block"] = bytes([codec]) + sealer.digest(data) + stored
    return found
