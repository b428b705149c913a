"""Fills data chunks: blocks one after the other, and a trailer that says what they are (pure)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockferry.common.archive.columns import MAX_CHUNK_BLOCKS, Entry, Kept, Trailer, encode_trailer
from blockferry.common.archive.format import (
    CHUNK_SIZE,
    DIGEST_SIZE,
    FOOTER,
    HEADER,
    MAGIC,
    NONCE_SIZE,
    TAG_SIZE,
    TAIL_SIZE,
    Kind,
)
from blockferry.common.archive.seal import Sealer

_FRAME = HEADER.size + NONCE_SIZE + TAG_SIZE + FOOTER.size + 64
"""Bytes that a trailer takes at most before its columns."""
_ROW = 8 + 4 + 1 + DIGEST_SIZE
_HOLE = 16
_KEPT = 20
MAX_RUNS = 1 << 16
"""Runs of holes and of kept blocks in one trailer: a megabyte."""


@dataclass(frozen=True)
class Chunk:
    """A chunk to be stored: `parts` one after the other. `trailer` is the frame in it that describes it."""

    number: int
    parts: Sequence[bytes]
    trailer: bytes
    content: Trailer

    @property
    def size(self) -> int:
        """Bytes of the object."""
        return sum(map(len, self.parts))

    @property
    def tail(self) -> bytes:
        """Its last bytes, which no other chunk has."""
        return b"".join(self.parts[-2:])[-TAIL_SIZE:]


class Packer:
    """Takes blocks in ascending order and says where each will be. `new` makes the trailer of the next chunk."""

    def __init__(self, sealer: Sealer, attempt: bytes, number: int, new: Callable[[], Trailer]) -> None:
        self._sealer = sealer
        self._attempt = attempt
        self._new = new
        self.number = number
        """of the chunk that is being filled"""
        self._trailer = new()
        self._parts: list[bytes] = []
        self._length = 0
        self._full: list[Chunk] = []

    @property
    def _room(self) -> int:
        trailer = self._trailer
        columns = _ROW * len(trailer.keys) + _HOLE * len(trailer.holes) + _KEPT * len(trailer.kept)
        return CHUNK_SIZE - _FRAME - columns - self._length

    def add(self, block: int, codec: int, stored: bytes, digest: bytes) -> Entry:
        """Store a block."""
        if len(stored) + _ROW > self._room or len(self._trailer.keys) == MAX_CHUNK_BLOCKS:
            self._close()
        entry = Entry(self._attempt, self.number, self._length, len(stored), codec, digest)
        self._parts.append(stored)
        self._length += len(stored)
        self._trailer.keys.append(block)
        self._trailer.lengths.append(len(stored))
        self._trailer.codecs.append(codec)
        self._trailer.digests.append(digest)
        return entry

    def hole(self, block: int) -> None:
        """Say that the base has a block and the snapshot has not."""
        holes = self._trailer.holes
        if holes and sum(holes[-1]) == block:
            holes[-1] = (holes[-1][0], holes[-1][1] + 1)
            return
        self._need_run()
        self._trailer.holes.append((block, 1))

    def keep(self, block: int, entry: Entry) -> None:
        """Say that a block is in a chunk of an earlier run."""
        kept = self._trailer.kept
        if kept and kept[-1].first + kept[-1].blocks == block and kept[-1].chunk == entry.chunk:
            kept[-1] = kept[-1]._replace(blocks=kept[-1].blocks + 1)
            return
        self._need_run()
        self._trailer.kept.append(Kept(block, 1, entry.chunk))

    def _need_run(self) -> None:
        trailer = self._trailer
        if self._room < _KEPT or len(trailer.holes) + len(trailer.kept) == MAX_RUNS:
            self._close()

    def _close(self) -> None:
        frame = self._sealer.seal_frame(
            Kind.TRAILER, self._attempt, encode_trailer(self._trailer), number=self.number, offset=self._length
        )
        parts = [*self._parts, frame, FOOTER.pack(len(frame), MAGIC)]
        self._full.append(Chunk(self.number, parts, frame, self._trailer))
        self.number += 1
        self._trailer, self._parts, self._length = self._new(), [], 0

    def full(self) -> list[Chunk]:
        """The chunks that were filled since this was asked last."""
        found, self._full = self._full, []
        return found

    def finish(self) -> list[Chunk]:
        """The last chunk, with what was not asked for yet. There is one even if nothing was to be stored."""
        self._trailer.last = True
        self._close()
        return self.full()
