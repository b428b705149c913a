"""Digests of a generation's regions: what was committed, and what need not be read again.

The digests of a committed generation lie beside its image in `COMMIT-ID.digests`. They have two uses. `replica verify`
re-reads the image and compares: the digests are what was committed. And the next sync need not read an unchanged
destination: for that they must describe what the image holds *now*, so they are believed only while the image's inode,
size and change time are those noted by this process, or by one that shut down cleanly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blockferry.common.digests import REGION_DIGEST_SIZE
from blockferry.common.durable import write_unsynced
from blockferry.server.sealed import seal, unseal
from pyroaring import BitMap

FORMAT = 2
"""2: digests of regions are digests of the digests of their pieces. A file of another format is ignored."""
_MAGIC = b"BFDIGEST"
_PAGE_REGIONS = 1024
"""Regions per page: memory follows what is known (16 KiB per GiB at the default region size), not the volume's size."""


@dataclass(frozen=True)
class Stamp:
    """What tells whether anything has touched a file: inode, size in bytes, change time in nanoseconds."""

    inode: int
    size: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file now."""
        info = os.stat(path)
        return cls(info.st_ino, info.st_size, info.st_ctime_ns)


class DigestCache:
    """Known digests by region number. Whoever changes a region says so first (`forget`)."""

    def __init__(self) -> None:
        self.known = BitMap()
        self._pages: dict[int, bytearray] = {}

    def get(self, region: int) -> bytes | None:
        """The digest of a region, or None where it is not known."""
        if region not in self.known:
            return None
        start = region % _PAGE_REGIONS * REGION_DIGEST_SIZE
        return bytes(self._pages[region // _PAGE_REGIONS][start : start + REGION_DIGEST_SIZE])

    def put(self, region: int, digest: bytes) -> None:
        """Note a digest."""
        page = self._pages.get(region // _PAGE_REGIONS)
        if page is None:
            page = self._pages[region // _PAGE_REGIONS] = bytearray(_PAGE_REGIONS * REGION_DIGEST_SIZE)
        start = region % _PAGE_REGIONS * REGION_DIGEST_SIZE
        page[start : start + REGION_DIGEST_SIZE] = digest
        self.known.add(region)

    def forget(self, first: int, count: int = 1) -> None:
        """The content of these regions is about to change."""
        self.known.remove_range(first, first + count)

    def copy(self) -> DigestCache:
        """An independent copy, for a clone of the image."""
        other = DigestCache()
        other.known = self.known.copy()
        other._pages = {number: bytearray(page) for number, page in self._pages.items()}
        return other

    def items(self) -> Iterator[tuple[int, bytes]]:
        """(region, digest), ascending."""
        for region in self.known:
            digest = self.get(region)
            assert digest is not None
            yield region, digest


class _Header(msgspec.Struct, frozen=True):
    format: int
    commit_id: str
    region_size: int
    known_length: int


def encode(cache: DigestCache, commit_id: bytes, region_size: int) -> bytes:
    """The bytes of a digest file: known regions, then their digests."""
    known = cache.known.serialize()
    header = _Header(FORMAT, commit_id.hex(), region_size, len(known))
    return seal(_MAGIC, header, [known, *(digest for _, digest in cache.items())])


def decode(data: bytes, commit_id: bytes, region_size: int) -> DigestCache | None:
    """The cache of a digest file, or None where the file is damaged, of another format or of another generation."""
    found = unseal(_MAGIC, _Header, data)
    if found is None:
        return None
    header, body = found
    if (header.format, header.commit_id, header.region_size) != (FORMAT, commit_id.hex(), region_size):
        return None
    cache = DigestCache()
    position = header.known_length
    for region in BitMap.deserialize(body[:position]):
        cache.put(region, body[position : position + REGION_DIGEST_SIZE])
        position += REGION_DIGEST_SIZE
    return cache if position == len(body) else None


def save(path: Path, cache: DigestCache, commit_id: bytes, region_size: int) -> None:
    """Write a digest file. It is not flushed: a torn one fails its checksum, and then costs one reading of the disk."""
    write_unsynced(path, encode(cache, commit_id, region_size))


def load(path: Path, commit_id: bytes, region_size: int) -> DigestCache | None:
    """Read a digest file, or None where there is no usable one."""
    try:
        return decode(path.read_bytes(), commit_id, region_size)
    except OSError:
        return None
