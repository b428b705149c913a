"""ApplyChangesRequest built and taken apart in place (pure).

The messages are plain protobuf, readable by any gRPC client. What is special is only how they are made: the generated
classes copy a region's data twice on its way into a message and twice on its way out. Here the data is joined into the
message once, and the receiver gets a view of the message it arrived in. Field numbers are those of replication.proto;
the encoding is that of https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code
from blockferry.v1 import replication_pb2 as pb
from google.protobuf.message import DecodeError

_BYTES = 2  # the wire type of everything that has a length
_CHANGES = pb.ApplyChangesRequest.CHANGES_FIELD_NUMBER
_WRITE = pb.Change.WRITE_FIELD_NUMBER
_UNMAP = pb.Change.UNMAP_FIELD_NUMBER
_DATA = pb.WriteRegionRequest.DATA_FIELD_NUMBER


@dataclass(frozen=True)
class Outgoing:
    """One encoded change. `size` is its length in the message, `payload` the bytes of data in it, `length` that of the
    range of the volume it is about."""

    parts: Sequence[Data]
    size: int
    payload: int
    length: int


@dataclass(frozen=True)
class Incoming:
    """One change that arrived. A write's data is a view of the message, not a field of the request."""

    request: pb.WriteRegionRequest | pb.UnmapRegionRequest | None
    data: memoryview


_NOTHING = memoryview(b"")


def encode_write(request: pb.WriteRegionRequest, data: Sequence[Data]) -> Outgoing:
    """`request` without its data, and the data in pieces."""
    head = request.SerializeToString()
    payload = sum(len(part) for part in data)
    tail = _tag(_DATA, payload) if payload else b""
    write = _tag(_WRITE, len(head) + len(tail) + payload)
    change = _tag(_CHANGES, len(write) + len(head) + len(tail) + payload)
    front = b"".join([change, write, head, tail])
    return Outgoing([front, *data], len(front) + payload, payload, request.length)


def encode_unmap(request: pb.UnmapRegionRequest) -> Outgoing:
    """A change that unmaps."""
    body = request.SerializeToString()
    change = _tag(_UNMAP, len(body)) + body
    whole = _tag(_CHANGES, len(change)) + change
    return Outgoing([whole], len(whole), 0, request.length)


def encode_request(head: pb.ApplyChangesRequest, changes: Sequence[Outgoing]) -> bytes:
    """The whole message; `head` has everything but the changes."""
    return b"".join([head.SerializeToString(), *(part for change in changes for part in change.parts)])


def decode_request(message: bytes) -> tuple[pb.ApplyChangesRequest, list[Incoming]]:
    """Everything but the changes, and the changes. Raises PROTOCOL where the message is not valid protobuf, or where a
    change holds more than one write or unmap."""
    changes: list[Incoming] = []
    rest: list[memoryview] = []
    try:
        for number, whole, body in _fields(memoryview(message)):
            if number == _CHANGES and body is not None:
                changes.append(_decode_change(body))
            else:
                rest.append(whole)
        return pb.ApplyChangesRequest.FromString(b"".join(rest)), changes
    except (ValueError, IndexError, DecodeError) as error:
        raise BlockferryError(
            Code.PROTOCOL,
            "a message of changes cannot be read",
            cause=str(error) or "it is not valid protobuf",
            next="check that both sides run a released version of blockferry",
        ) from error


def _decode_change(change: memoryview) -> Incoming:
    found = Incoming(None, _NOTHING)
    for number, _, body in _fields(change):
        if number in (_WRITE, _UNMAP) and body is not None and found.request is not None:
            # Parsers of protobuf merge two writes, and take the last of a write and an unmap: nobody who sends that can
            # mean it, and guessing would write to a volume.
            raise ValueError("a change holds more than one write or unmap")
        if number == _WRITE and body is not None:
            data, rest = _NOTHING, []
            for inner, whole, content in _fields(body):
                if inner == _DATA and content is not None:
                    data = content
                else:
                    rest.append(whole)
            found = Incoming(pb.WriteRegionRequest.FromString(b"".join(rest)), data)
        elif number == _UNMAP and body is not None:
            found = Incoming(pb.UnmapRegionRequest.FromString(bytes(body)), _NOTHING)
    return found


def _tag(number: int, length: int) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """(number, the field with its tag, its content if it has a length) of every field of a message."""
    position, end = 0, len(data)
    while position < end:
        start = position
        tag, position = _read_varint(data, position)
        body = None
        match tag & 7:
            case 0:
                _, position = _read_varint(data, position)
            case 1:
                position += 8
            case 2:
                length, position = _read_varint(data, position)
                body = data[position : position + length]
                position += length
            case 5:
                position += 4
            case kind:
                raise ValueError(f"a field has wire type {kind}")
        if position > end or tag >> 3 == 0:
            raise ValueError("a field does not end where it should")
        yield tag >> 3, data[start:position], body
