"""Keyed digests of regions and of the pieces inside them (pure).

BLAKE3 keyed with 32 bytes that belong to the replica, so that nobody who writes guest data can prepare a collision.
A region's digest is 16 bytes; inside a differing region 8 bytes per 64 KiB and then per 4 KiB narrow down the change,
and the region's own digest is checked after the change is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blake3 import blake3
from blockferry.common.regions import BLOCK_SIZE, Run

KEY_SIZE = 32
REGION_DIGEST_SIZE = 16
PIECE_DIGEST_SIZE = 8

PIECE_SIZE = 64 * 1024
"""The level between a region and a block: 16 blocks, so that each level narrows by 16 or so."""

Data = bytes | bytearray | memoryview

_ZEROS = bytes(1024 * 1024)
"""What data is compared with. `_ZEROS.startswith(part)` is a memcmp with any buffer (28 us for a zero MiB, 0.1 us for a
block that is not zero); `==` with a memoryview would compare element by element (1760 us)."""


def digest_size(piece_size: int, region_size: int) -> int:
    """Bytes of digest per piece: regions get 16, smaller pieces 8."""
    return REGION_DIGEST_SIZE if piece_size == region_size else PIECE_DIGEST_SIZE


def digest(data: Data, key: bytes, size: int = REGION_DIGEST_SIZE) -> bytes:
    """The keyed digest of `data`, `size` bytes long."""
    return blake3(data, key=key).digest(size)


def digest_of_pieces(pieces: Iterable[Data], key: bytes, size: int = REGION_DIGEST_SIZE) -> bytes:
    """The keyed digest of pieces one after the other, without joining them."""
    hasher = blake3(key=key)
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest(size)


def zeros(length: int) -> Iterator[Data]:
    """`length` zero bytes, in pieces."""
    while length > 0:
        yield _ZEROS if length >= len(_ZEROS) else memoryview(_ZEROS)[:length]
        length -= len(_ZEROS)


def digests(data: memoryview, piece_size: int, key: bytes, size: int) -> bytes:
    """Digests of consecutive pieces of `data`, one after the other; the last piece may be short."""
    return b"".join(
        blake3(data[start : start + piece_size], key=key).digest(size) for start in range(0, len(data), piece_size)
    )


class ZeroDigests:
    """The predetermined digests of all-zero regions under one key, by length."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._known: dict[int, bytes] = {}

    def of(self, length: int) -> bytes:
        """The digest of `length` zero bytes (at most 16 MiB)."""
        known = self._known.get(length)
        if known is None:
            known = self._known[length] = digest(bytes(length), self._key)
        return known


def is_zero(data: memoryview) -> bool:
    """Whether every byte is zero. A plain comparison: cheaper than any digest, and cannot collide."""
    step = len(_ZEROS)
    return all(_ZEROS.startswith(data[start : start + step]) for start in range(0, len(data), step))


def nonzero_extents(data: memoryview) -> Iterator[Run]:
    """(offset, length) of the maximal runs of blocks of `data` that are not all zero."""
    size = len(data)
    # Most blocks that hold data begin with a byte that is not zero: only the others are looked at whole.
    heads = bytes(data[::BLOCK_SIZE])
    start = 0
    block = heads.find(0)
    while block >= 0:
        offset = block * BLOCK_SIZE
        if _ZEROS.startswith(data[offset : offset + BLOCK_SIZE]):
            if offset > start:
                yield start, offset - start
            start = min(offset + BLOCK_SIZE, size)
        block = heads.find(0, block + 1)
    if start < size:
        yield start, size - start


def differing_pieces(ours: bytes, theirs: bytes, size: int) -> list[int]:
    """Indexes at which two equally long digest lists differ; `size` is the length of one digest in bytes."""
    if ours == theirs:
        return []
    return [
        index // size
        for index in range(0, len(ours), size)
        if ours[index : index + size] != theirs[index : index + size]
    ]
