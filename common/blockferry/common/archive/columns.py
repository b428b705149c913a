"""Bodies that are made of columns: tree nodes, trailers of data chunks, moves of a repacking (pure).

Values of one kind stand one after the other, which packs better than rows do, and whole columns are taken apart in one
step. Numbers of blocks ascend and are written as the difference to the one before; attempts are written once and
referred to by index.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from blockferry.common.archive.format import (
    CHUNK_SIZE,
    DIGEST_SIZE,
    ID_SIZE,
    NOBODY,
    Codec,
    damaged,
)
from blockferry.common.digests import Data
from blockferry.common.regions import Run

MAX_ENTRIES = 256
"""Entries of a node: a changed block rewrites some 10 KiB of leaf, and 1 TiB has 16384 leaves."""
MAX_LEVEL = 7
"""Levels above the leaves that a reader follows: 256^8 blocks are more than a volume can have."""
MAX_BLOCKS = 1 << 46
"""Archive blocks of a volume of 2^64 bytes."""
MAX_CHUNK_BLOCKS = 4096
"""Blocks in one chunk: those that pack to almost nothing must not make a trailer larger than what it describes."""
MAX_MOVES = 1 << 18
"""Moves in one remap record."""


class Entry(NamedTuple):
    """Where a block is (the CPBA: chunk, offset, length), how it is stored, and the digest of its plaintext."""

    attempt: bytes
    chunk: int
    offset: int
    length: int
    codec: int
    digest: bytes


class NodeRef(NamedTuple):
    """Where a node's frame is: metadata chunk, offset, length."""

    attempt: bytes
    chunk: int
    offset: int
    length: int


class Child(NamedTuple):
    """A subtree: its root, and the blocks in it."""

    ref: NodeRef
    blocks: int


@dataclass(frozen=True)
class Leaf:
    """Blocks `keys`, ascending, and where each is."""

    keys: Sequence[int]
    items: Sequence[Entry]

    @property
    def level(self) -> int:
        return 0

    @property
    def blocks(self) -> int:
        """Blocks in the subtree."""
        return len(self.keys)


@dataclass(frozen=True)
class Inner:
    """Subtrees; `keys` are the smallest blocks in them, ascending. Below this one all nodes have `level` - 1."""

    level: int
    keys: Sequence[int]
    items: Sequence[Child]

    @property
    def blocks(self) -> int:
        """Blocks in the subtree."""
        return sum(item.blocks for item in self.items)


Node = Leaf | Inner

_NODE = struct.Struct("<BBHHH")


def encode_node(node: Node) -> bytes:
    """The body of a node's frame."""
    count = len(node.keys)
    refs: Sequence[Entry | NodeRef] = node.items if isinstance(node, Leaf) else [item.ref for item in node.items]
    attempts, indexes = _indexed(ref.attempt for ref in refs)
    parts = [
        _NODE.pack(node.level, 0, count, len(attempts), 0),
        *attempts,
        _gaps(node.keys),
        struct.pack(f"<{count}H", *indexes),
        struct.pack(f"<{count}I", *(ref.chunk for ref in refs)),
        struct.pack(f"<{count}I", *(ref.offset for ref in refs)),
        struct.pack(f"<{count}I", *(ref.length for ref in refs)),
    ]
    if isinstance(node, Leaf):
        parts += [bytes(item.codec for item in node.items), *(item.digest for item in node.items)]
    else:
        parts.append(struct.pack(f"<{count}Q", *(item.blocks for item in node.items)))
    return b"".join(parts)


def decode_node(body: Data, name: str) -> Node:
    """Raise CORRUPT_STATE unless `body` is what `encode_node` makes of some node."""
    columns = _Columns(body, name)
    level, zero, count, known, zero2 = columns.record(_NODE)
    if zero or zero2 or not 1 <= count <= MAX_ENTRIES or level > MAX_LEVEL:
        raise damaged(name, "no node has these counts")
    attempts = columns.attempts(known)
    keys = columns.keys(count)
    refs = columns.references(attempts, count)
    if level:
        blocks = columns.column("Q", count)
        columns.end()
        if not all(0 < one <= MAX_BLOCKS for one in blocks):
            raise damaged(name, "a subtree without blocks")
        items = [Child(NodeRef(*ref), held) for ref, held in zip(refs, blocks, strict=True)]
        return Inner(level, keys, items)
    codecs = columns.codecs(count)
    digests = columns.fixed(DIGEST_SIZE, count)
    columns.end()
    entries = [Entry(*ref, codec, one) for ref, codec, one in zip(refs, codecs, digests, strict=True)]
    return Leaf(keys, entries)


# --- trailers of data chunks ----------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """Consecutive blocks that an earlier run of the attempt has stored in one of its chunks."""

    first: int
    blocks: int
    chunk: int


@dataclass
class Trailer:
    """What a data chunk says of itself: enough to make the snapshot's tree anew from data chunks alone.

    `keys` are the blocks in it, one after the other from offset 0; `lengths` their stored bytes. `holes` are blocks
    that the base has and this snapshot has not, `kept` those that are in chunks of earlier runs of the attempt.
    """

    run: int
    """how often the attempt was begun before: what earlier runs say counts only where it is kept"""
    base: int
    base_attempt: bytes
    """that of the base; zeros where there is none"""
    size: int
    created: int
    """microseconds since 1970, by the archiver's clock; for people"""
    last: bool = False
    """the attempt has no chunk after this one"""
    keys: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    codecs: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    holes: list[Run] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    first: int = 0
    """number of the run's first chunk; all from there to the last are needed"""

    def entries(self, attempt: bytes, chunk: int) -> list[tuple[int, Entry]]:
        """The blocks in the chunk and where each is."""
        offsets = itertools.accumulate(self.lengths, initial=0)
        return [
            (key, Entry(attempt, chunk, offset, length, codec, digest))
            for key, offset, length, codec, digest in zip(
                self.keys, offsets, self.lengths, self.codecs, self.digests, strict=False
            )
        ]

    @property
    def data_length(self) -> int:
        """Bytes of the blocks: the trailer's frame begins there."""
        return sum(self.lengths)


_TRAILER = struct.Struct("<BBHIQ16sQQIIII")
_LAST = 1


def encode_trailer(trailer: Trailer) -> bytes:
    """The body of a trailer's frame."""
    count = len(trailer.keys)
    return b"".join(
        [
            _TRAILER.pack(
                _LAST if trailer.last else 0, 0, 0, trailer.run, trailer.base, trailer.base_attempt, trailer.size,
                trailer.created, trailer.first, count, len(trailer.holes), len(trailer.kept),
            ),
            _gaps(trailer.keys),
            struct.pack(f"<{count}I", *trailer.lengths),
            bytes(trailer.codecs),
            *trailer.digests,
            *(struct.pack("<QQ", *run) for run in trailer.holes),
            *(struct.pack("<QQI", *one) for one in trailer.kept),
        ]
    )  # fmt: skip


def decode_trailer(body: Data, name: str) -> Trailer:
    """Raise CORRUPT_STATE unless `body` is what `encode_trailer` makes of some trailer."""
    columns = _Columns(body, name)
    flags, zero, zero2, run, base, base_attempt, size, created, first, count, holes, kept = columns.record(_TRAILER)
    if flags & ~_LAST or zero or zero2 or count > MAX_CHUNK_BLOCKS or bool(base) != (base_attempt != NOBODY):
        raise damaged(name, "no trailer has these values")
    keys = columns.keys(count)
    lengths = columns.column("I", count)
    codecs = columns.codecs(count)
    digests = columns.fixed(DIGEST_SIZE, count)
    if not all(lengths) or sum(lengths) > CHUNK_SIZE:
        raise damaged(name, "the lengths of its blocks are not those of a chunk")
    hole_runs = [(first, length) for first, length in columns.records(struct.Struct("<QQ"), holes)]
    kept_runs = [Kept(*one) for one in columns.records(struct.Struct("<QQI"), kept)]
    columns.end()
    columns.check_runs(hole_runs)
    columns.check_runs([one[:2] for one in kept_runs])
    return Trailer(
        run, base, base_attempt, size, created, bool(flags & _LAST), list(keys), list(lengths), list(codecs), digests,
        hole_runs, kept_runs, first,
    )  # fmt: skip


# --- moves of a repacking -------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """A block that was at (attempt, chunk, offset) and is, stored anew, in the chunk of another attempt."""

    attempt: bytes
    chunk: int
    offset: int
    new_attempt: bytes
    new_chunk: int
    new_offset: int
    new_length: int
    new_codec: int


_REMAP = struct.Struct("<IHH")


def encode_remap(moves: Sequence[Move]) -> bytes:
    """The body of a remap record. Moves are sorted by where the blocks were."""
    count = len(moves)
    attempts, indexes = _indexed(itertools.chain.from_iterable((one.attempt, one.new_attempt) for one in moves))
    columns = list(zip(*moves, strict=True)) if moves else [()] * len(Move._fields)
    return b"".join(
        [
            _REMAP.pack(count, len(attempts), 0),
            *attempts,
            struct.pack(f"<{count}H", *indexes[::2]),
            struct.pack(f"<{count}I", *columns[1]),
            struct.pack(f"<{count}I", *columns[2]),
            struct.pack(f"<{count}H", *indexes[1::2]),
            struct.pack(f"<{count}I", *columns[4]),
            struct.pack(f"<{count}I", *columns[5]),
            struct.pack(f"<{count}I", *columns[6]),
            bytes(columns[7]),
        ]
    )


def decode_remap(body: Data, name: str) -> list[Move]:
    """Raise CORRUPT_STATE unless `body` is what `encode_remap` makes of some moves."""
    columns = _Columns(body, name)
    count, known, zero = columns.record(_REMAP)
    if zero or not 1 <= count <= MAX_MOVES:
        raise damaged(name, "no remap record has these counts")
    attempts = columns.attempts(known)
    old = [columns.column(code, count) for code in "HII"]
    new = [columns.column(code, count) for code in "HIII"]
    codecs = columns.codecs(count)
    columns.end()
    if any(index >= known for index in (*old[0], *new[0])) or not all(new[3]):
        raise damaged(name, "it refers to what it does not name")
    moves = [
        Move(attempts[a], chunk, offset, attempts[b], new_chunk, new_offset, length, codec)
        for a, chunk, offset, b, new_chunk, new_offset, length, codec in zip(*old, *new, codecs, strict=True)
    ]
    if any(one[:3] >= other[:3] for one, other in itertools.pairwise(moves)):
        raise damaged(name, "its moves are not in order")
    return moves


# --- columns --------------------------------------------------------------------------------------------------------


def _indexed(attempts: Iterable[bytes]) -> tuple[list[bytes], list[int]]:
    """Distinct attempts in the order of their first use, and the index of each."""
    known: dict[bytes, int] = {}
    indexes = [known.setdefault(attempt, len(known)) for attempt in attempts]
    return list(known), indexes


def _gaps(keys: Sequence[int]) -> bytes:
    if not keys:
        return b""
    return struct.pack(f"<{len(keys)}Q", keys[0], *(after - before for before, after in itertools.pairwise(keys)))


class _Columns:
    """Takes a body apart from its beginning to its end."""

    def __init__(self, body: Data, name: str) -> None:
        self._body = bytes(body)
        self._name = name
        self._position = 0

    def _take(self, length: int) -> int:
        start = self._position
        self._position += length
        if self._position > len(self._body):
            raise damaged(self._name, "it is shorter than it says")
        return start

    def record(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack_from(self._body, self._take(layout.size))

    def records(self, layout: struct.Struct, count: int) -> list[tuple[int, ...]]:
        start = self._take(layout.size * count)
        return list(layout.iter_unpack(self._body[start : self._position]))

    def column(self, code: str, count: int) -> tuple[int, ...]:
        layout = struct.Struct(f"<{count}{code}")
        return layout.unpack_from(self._body, self._take(layout.size))

    def fixed(self, size: int, count: int) -> list[bytes]:
        start = self._take(size * count)
        return [self._body[at : at + size] for at in range(start, self._position, size)]

    def keys(self, count: int) -> list[int]:
        gaps = self.column("Q", count)
        keys = list(itertools.accumulate(gaps))
        if 0 in gaps[1:] or (keys and keys[-1] >= MAX_BLOCKS):
            raise damaged(self._name, "its blocks do not ascend")
        return keys

    def attempts(self, count: int) -> list[bytes]:
        found = self.fixed(ID_SIZE, count)
        if not found or len(set(found)) != count:
            raise damaged(self._name, "its attempts are not distinct")
        return found

    def references(self, attempts: Sequence[bytes], count: int) -> list[tuple[bytes, int, int, int]]:
        indexes = self.column("H", count)
        chunks, offsets, lengths = (self.column("I", count) for _ in range(3))
        if max(indexes) >= len(attempts):
            raise damaged(self._name, "it refers to an attempt that it does not name")
        ends = map(sum, zip(offsets, lengths, strict=True))
        if not all(lengths) or max(ends) > CHUNK_SIZE:
            raise damaged(self._name, "it refers to what is outside of a chunk")
        return list(zip(map(attempts.__getitem__, indexes), chunks, offsets, lengths, strict=True))

    def codecs(self, count: int) -> bytes:
        start = self._take(count)
        found = self._body[start : self._position]
        if any(one not in (Codec.PLAIN, Codec.ZSTD) for one in set(found)):
            raise damaged(self._name, "a block is stored in an unknown way")
        return found

    def check_runs(self, runs: Sequence[tuple[int, int]]) -> None:
        end = 0
        for first, count in runs:
            if first < end or count < 1 or first + count > MAX_BLOCKS:
                raise damaged(self._name, "its runs do not ascend")
            end = first + count

    def end(self) -> None:
        if self._position != len(self._body):
            raise damaged(self._name, f"{len(self._body) - self._position} bytes are left over")
