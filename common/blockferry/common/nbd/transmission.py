"""Messages of NBD transmission, requests and replies: bytes to messages and back, for both sides (pure)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from blockferry.common.nbd.protocol import (
    CHUNK_DONE,
    MAX_EXTENTS,
    MAX_OPTION_PAYLOAD,
    MAX_PAYLOAD,
    MAX_STRING,
    U32,
    U64,
    Buffer,
    ChunkKind,
    Command,
    ProtocolError,
    Reader,
    decode_text,
    encode_text,
    unpack,
)

_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698
_CHUNK_MAGIC = 0x668E33EF

_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE_REPLY = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_HOLE = struct.Struct(">QI")
_EXTENT = struct.Struct(">II")
_ERROR = struct.Struct(">IH")
_DATA_HEADER = struct.Struct(">IHHQIQ")

REQUEST_SIZE = _REQUEST.size
SIMPLE_REPLY_SIZE = _SIMPLE_REPLY.size
CHUNK_HEADER_SIZE = _CHUNK.size
OFFSET_SIZE = U64.size
"""Bytes of the offset that begins the payload of OFFSET_DATA."""
DATA_HEADER_SIZE = _DATA_HEADER.size
"""Bytes before the data of an OFFSET_DATA chunk: its header and that offset."""

MAX_MESSAGE = MAX_STRING // 4
"""Characters of the text of an error: in UTF-8 they have at most `MAX_STRING` bytes."""

_LENGTHS = {
    ChunkKind.NONE: (0, 0),
    ChunkKind.OFFSET_DATA: (OFFSET_SIZE + 1, OFFSET_SIZE + MAX_PAYLOAD),
    ChunkKind.OFFSET_HOLE: (_HOLE.size, _HOLE.size),
    ChunkKind.BLOCK_STATUS: (4 + _EXTENT.size, 4 + _EXTENT.size * MAX_EXTENTS),
    ChunkKind.ERROR: (_ERROR.size, _ERROR.size + MAX_STRING),
    ChunkKind.ERROR_OFFSET: (_ERROR.size + OFFSET_SIZE, _ERROR.size + MAX_STRING + OFFSET_SIZE),
}
"""(least, most) bytes of payload."""


@dataclass(frozen=True)
class Request:
    """A request; after a WRITE come `length` bytes of data."""

    command: int
    cookie: int
    offset: int
    length: int
    flags: int = 0

    def encode(self) -> bytes:
        """`REQUEST_SIZE` bytes."""
        return _REQUEST.pack(_REQUEST_MAGIC, self.flags, self.command, self.cookie, self.offset, self.length)

    @classmethod
    def decode(cls, data: Buffer) -> Request:
        """Raise for a write that is too long: what follows could not be skipped within bounds."""
        magic, flags, command, cookie, offset, length = unpack(_REQUEST, data, "a request")
        if magic != _REQUEST_MAGIC:
            raise ProtocolError(f"a request begins with {magic:#x}")
        if command == Command.WRITE and length > MAX_PAYLOAD:
            raise ProtocolError(f"a write of {length} bytes; at most {MAX_PAYLOAD} are accepted")
        return cls(command, cookie, offset, length, flags)


def unpack_request(buffer: Buffer, position: int) -> tuple[int, int, int, int, int]:
    """(flags, command, cookie, offset, length) of the request at `position`, which has all its `REQUEST_SIZE` bytes: as
    `Request.decode`, for a server that has no time to make an object of each."""
    magic, flags, command, cookie, offset, length = _REQUEST.unpack_from(buffer, position)
    if magic != _REQUEST_MAGIC:
        raise ProtocolError(f"a request begins with {magic:#x}")
    if command == Command.WRITE and length > MAX_PAYLOAD:
        raise ProtocolError(f"a write of {length} bytes; at most {MAX_PAYLOAD} are accepted")
    return flags, command, cookie, offset, length


@dataclass(frozen=True)
class SimpleReply:
    """The whole answer to a request; where `error` is 0, a READ's data follows."""

    cookie: int
    error: int = 0

    def encode(self) -> bytes:
        """`SIMPLE_REPLY_SIZE` bytes."""
        return _SIMPLE_REPLY.pack(_SIMPLE_REPLY_MAGIC, self.error, self.cookie)


@dataclass(frozen=True)
class Chunk:
    """Header of one of the chunks of a structured reply; `length` bytes of payload follow."""

    cookie: int
    kind: int
    length: int
    done: bool = True

    @property
    def is_error(self) -> bool:
        """Whether the request has failed; the payload begins as an `ErrorChunk`, whatever the kind."""
        return bool(self.kind & (1 << 15))

    def encode(self) -> bytes:
        """`CHUNK_HEADER_SIZE` bytes."""
        return _CHUNK.pack(_CHUNK_MAGIC, CHUNK_DONE if self.done else 0, self.kind, self.cookie, self.length)


def pack_simple_reply(buffer: bytearray, position: int, cookie: int) -> None:
    """Put the `SIMPLE_REPLY_SIZE` bytes before the data of a READ in front of it."""
    _SIMPLE_REPLY.pack_into(buffer, position, _SIMPLE_REPLY_MAGIC, 0, cookie)


def pack_data_header(buffer: bytearray, position: int, cookie: int, offset: int, length: int, done: int) -> None:
    """Put the `DATA_HEADER_SIZE` bytes before `length` bytes of data in front of them; `done` 1 for the last chunk."""
    _DATA_HEADER.pack_into(
        buffer, position, _CHUNK_MAGIC, done, ChunkKind.OFFSET_DATA, cookie, length + OFFSET_SIZE, offset
    )


def reply_header_size(magic: Buffer) -> int:
    """Bytes of the header that begins with these 4 bytes."""
    (number,) = unpack(U32, magic, "a reply")
    if number == _SIMPLE_REPLY_MAGIC:
        return SIMPLE_REPLY_SIZE
    if number == _CHUNK_MAGIC:
        return CHUNK_HEADER_SIZE
    raise ProtocolError(f"a reply begins with {number:#x}")


def decode_reply_header(data: Buffer) -> SimpleReply | Chunk:
    """From as many bytes as `reply_header_size` says."""
    if reply_header_size(data[:4]) == SIMPLE_REPLY_SIZE:
        _, error, cookie = unpack(_SIMPLE_REPLY, data, "a reply")
        return SimpleReply(cookie, error)
    _, flags, kind, cookie, length = unpack(_CHUNK, data, "a reply")
    chunk = Chunk(cookie, kind, length, bool(flags & CHUNK_DONE))
    _check_chunk(chunk)
    return chunk


def _check_chunk(chunk: Chunk) -> None:
    try:
        least, most = _LENGTHS[ChunkKind(chunk.kind)]
    except ValueError:
        if not chunk.is_error:
            raise ProtocolError(f"a chunk of unknown kind {chunk.kind}") from None
        least, most = _ERROR.size, MAX_OPTION_PAYLOAD
    if not least <= chunk.length <= most:
        raise ProtocolError(f"a chunk of kind {chunk.kind} and {chunk.length} bytes; {least} to {most} are possible")
    if chunk.kind == ChunkKind.BLOCK_STATUS and (chunk.length - 4) % _EXTENT.size:
        raise ProtocolError(f"a block status of {chunk.length} bytes, which is no whole number of extents")
    if chunk.kind == ChunkKind.NONE and not chunk.done:
        raise ProtocolError("an empty chunk that is not the last")


def encode_offset(offset: int) -> bytes:
    """What begins the payload of OFFSET_DATA: where the data belongs in the export."""
    return U64.pack(offset)


def decode_offset(data: Buffer) -> int:
    """From `OFFSET_SIZE` bytes."""
    return unpack(U64, data, "an offset")[0]


def encode_hole(offset: int, length: int) -> bytes:
    """Payload of OFFSET_HOLE: these bytes of a READ are zeros."""
    return _HOLE.pack(offset, length)


def decode_hole(data: Buffer) -> tuple[int, int]:
    """(offset, length)"""
    offset, length = unpack(_HOLE, data, "a hole")
    if length == 0:
        raise ProtocolError("a hole of no bytes")
    return offset, length


@dataclass(frozen=True)
class BlockStatus:
    """Payload of BLOCK_STATUS: consecutive (length, flags) from the request's offset, in one metadata context. They may
    end before the request does, and the last may reach past it."""

    context: int
    extents: tuple[tuple[int, int], ...]

    def encode(self) -> bytes:
        """The payload."""
        return U32.pack(self.context) + b"".join(_EXTENT.pack(*extent) for extent in self.extents)

    @classmethod
    def decode(cls, data: Buffer) -> BlockStatus:
        """From the payload."""
        reader = Reader(data, "a block status")
        (context,) = reader.numbers(U32)
        rest = reader.rest()
        if not rest or len(rest) % _EXTENT.size:
            raise ProtocolError(f"a block status with {len(rest)} bytes of extents")
        extents: tuple[tuple[int, int], ...] = tuple(_EXTENT.iter_unpack(rest))
        if not all(length for length, _ in extents):
            raise ProtocolError("a block status with an extent of no bytes")
        return cls(context, extents)


@dataclass(frozen=True)
class ErrorChunk:
    """Payload of ERROR, or with `offset` of ERROR_OFFSET."""

    error: int
    message: str = ""
    offset: int | None = None

    def encode(self) -> bytes:
        """The payload."""
        text = encode_text(self.message)
        where = b"" if self.offset is None else U64.pack(self.offset)
        return _ERROR.pack(self.error, len(text)) + text + where

    @classmethod
    def decode(cls, kind: int, data: Buffer) -> ErrorChunk:
        """From the payload of a chunk of an error's kind, known or not."""
        reader = Reader(data, "an error")
        error, length = reader.numbers(_ERROR)
        if error == 0:
            raise ProtocolError("an error that is none")
        message = decode_text(reader.take(length))
        offset = reader.numbers(U64)[0] if kind == ChunkKind.ERROR_OFFSET else None
        if kind in (ChunkKind.ERROR, ChunkKind.ERROR_OFFSET):
            reader.end()
        return cls(error, message, offset)


def encode_chunks(cookie: int, chunks: Iterable[tuple[int, Buffer]]) -> bytes:
    """A structured reply of (kind, payload), the last of them marked as such."""
    parts = list(chunks)
    return b"".join(
        part
        for index, (kind, payload) in enumerate(parts, 1)
        for part in (Chunk(cookie, kind, len(payload), index == len(parts)).encode(), payload)
    )
