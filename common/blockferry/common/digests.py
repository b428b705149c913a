"""Keyed digests of regions and of the pieces inside them (pure).

BLAKE3 keyed with 32 bytes that belong to the replica, so that nobody who writes guest data can prepare a collision. A
region's digest has 16 bytes. It is the digest of the digests of its 64 KiB pieces, where it has more than one: so
pieces that are known to be zeros need neither be read nor hashed, and a disk of scattered small files costs what it
holds and not the regions that it touches. Inside a differing region 8 bytes per 64 KiB and then per 4 KiB narrow down
the change, and the region's own digest is checked after the change is applied.
"""

from __future__ import annotations

import bisect
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence

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
    """The keyed digest of a region or of a smaller piece, `size` bytes long.

    Two regions are only ever compared at equal length, so what is hashed is either content on both sides or digests on
    both sides.
    """
    if len(data) <= PIECE_SIZE:
        return blake3(data, key=key).digest(size)
    view = memoryview(data)
    pieces = (view[start : start + PIECE_SIZE] for start in range(0, len(view), PIECE_SIZE))
    return _combined([blake3(piece, key=key).digest(REGION_DIGEST_SIZE) for piece in pieces], key, size)


def _combined(found: Sequence[bytes], key: bytes, size: int) -> bytes:
    return blake3(b"".join(found), key=key).digest(size)


@functools.lru_cache(maxsize=64)
def zero_digest(key: bytes, length: int) -> bytes:
    """The predetermined 16-byte digest of `length` zero bytes, which is at most a piece."""
    return blake3(bytes(length), key=key).digest(REGION_DIGEST_SIZE)


def digest_of_parts(parts: Iterable[tuple[int, Data | None]], length: int, key: bytes) -> bytes:
    """The 16-byte digest of a region of `length` bytes that comes in parts: (bytes, data), without data zeros. Whole
    pieces of zeros are not hashed."""
    found: list[bytes] = []
    piece = min(PIECE_SIZE, length)
    hasher, filled, done = blake3(key=key), 0, 0
    for size, data in parts:
        position = 0
        while position < size:
            step = min(size - position, piece - filled)
            if data is None and step == piece:
                found.append(zero_digest(key, piece))
            else:
                hasher.update(
                    memoryview(_ZEROS)[:step] if data is None else memoryview(data)[position : position + step]
                )
                filled += step
                if filled < piece:
                    position += step
                    continue
                found.append(hasher.digest(REGION_DIGEST_SIZE))
                hasher, filled = blake3(key=key), 0
            position, done = position + step, done + piece
            piece = min(PIECE_SIZE, length - done)
    return found[0] if len(found) == 1 else _combined(found, key, REGION_DIGEST_SIZE)


def digests(data: memoryview, piece_size: int, key: bytes, size: int) -> bytes:
    """Digests of consecutive pieces of `data`, one after the other; the last piece may be short."""
    return b"".join(digest(data[start : start + piece_size], key, size) for start in range(0, len(data), piece_size))


def fill_and_digest(data: memoryview, held: Sequence[Run], piece_size: int, key: bytes, size: int) -> bytes:
    """As `digests`, where only `held`, (offset, length) ascending, was read into `data` and all else is known to be
    zeros: it is filled in, and pieces of 64 KiB that have no part in `held` are not hashed."""
    position = 0
    holes: list[Run] = []
    for start, length in [*held, (len(data), 0)]:
        if start > position:
            data[position:start] = bytes(start - position)
            holes.append((position, start))
        position = start + length
    if piece_size <= PIECE_SIZE or not any(end - start >= PIECE_SIZE for start, end in holes):
        return digests(data, piece_size, key, size)
    return b"".join(
        _digest_with_holes(data[start : start + piece_size], start, holes, key, size)
        for start in range(0, len(data), piece_size)
    )


def digests_of_parts(
    parts: Sequence[tuple[memoryview, Sequence[Run]]], piece_size: int, key: bytes, size: int
) -> bytes:
    """`fill_and_digest` of each (data, held), one after the other; each part begins with a piece."""
    return b"".join(fill_and_digest(data, held, piece_size, key, size) for data, held in parts)


def _digest_with_holes(region: memoryview, at: int, holes: Sequence[Run], key: bytes, size: int) -> bytes:
    if len(region) <= PIECE_SIZE:
        return blake3(region, key=key).digest(size)
    found: list[bytes] = []
    for start in range(0, len(region), PIECE_SIZE):
        piece = region[start : start + PIECE_SIZE]
        index = bisect.bisect_right(holes, (at + start, sys.maxsize)) - 1
        hole = holes[index] if index >= 0 else (0, 0)
        if hole[0] <= at + start and at + start + len(piece) <= hole[1]:
            found.append(zero_digest(key, len(piece)))
        else:
            found.append(blake3(piece, key=key).digest(REGION_DIGEST_SIZE))
    return _combined(found, key, size)


def zeros(length: int) -> Iterator[Data]:
    """`length` zero bytes, in pieces."""
    while length > 0:
        yield _ZEROS if length >= len(_ZEROS) else memoryview(_ZEROS)[:length]
        length -= len(_ZEROS)


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
