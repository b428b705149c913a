"""Messages of the NBD handshake: bytes to messages and back, for both sides (pure)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from blockferry.common.nbd.protocol import (
    MAX_OPTION_PAYLOAD,
    OPTION_ERROR,
    U16,
    U32,
    Buffer,
    HandshakeFlag,
    Info,
    ProtocolError,
    Reader,
    TransmissionFlag,
    counted,
    decode_text,
    encode_text,
    unpack,
)

_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
_OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
_OLDSTYLE_MAGIC = 0x00420281861253
_OPTION_REPLY_MAGIC = 0x0003E889045565A9

_GREETING = struct.Struct(">QQH")
_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")
_EXPORT = struct.Struct(">QH")
_BLOCK_SIZES = struct.Struct(">III")

GREETING_SIZE = _GREETING.size
CLIENT_FLAGS_SIZE = 4
OPTION_HEADER_SIZE = _OPTION.size
OPTION_REPLY_HEADER_SIZE = _OPTION_REPLY.size
EXPORT_NAME_REPLY_SIZE = _EXPORT.size
EXPORT_NAME_ZEROES = 124
"""Bytes that follow the reply to OPT_EXPORT_NAME unless both sides said NO_ZEROES."""


def encode_greeting(flags: int) -> bytes:
    """What a server says first."""
    return _GREETING.pack(_MAGIC, _OPTION_MAGIC, flags)


def decode_greeting(data: Buffer) -> HandshakeFlag:
    """The server's flags."""
    magic, style, flags = unpack(_GREETING, data, "the greeting")
    if magic != _MAGIC:
        raise ProtocolError("it does not greet as an NBD server does")
    if style == _OLDSTYLE_MAGIC:
        raise ProtocolError("it speaks the oldstyle handshake, which has no exports to choose from")
    if style != _OPTION_MAGIC:
        raise ProtocolError("its greeting is of no known style")
    return HandshakeFlag(flags)


def encode_client_flags(flags: int) -> bytes:
    """The client's answer to the greeting."""
    return U32.pack(flags)


def decode_client_flags(data: Buffer) -> HandshakeFlag:
    """Raise for flags that no client may set: such a connection cannot go on."""
    (flags,) = unpack(U32, data, "the client's flags")
    if flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
        raise ProtocolError(f"unknown client flags {flags:#x}")
    return HandshakeFlag(flags)


@dataclass(frozen=True)
class OptionHeader:
    """What a client asks for; `length` bytes of payload follow."""

    option: int
    length: int

    @classmethod
    def decode(cls, data: Buffer) -> OptionHeader:
        """From `OPTION_HEADER_SIZE` bytes."""
        magic, option, length = unpack(_OPTION, data, "an option")
        if magic != _OPTION_MAGIC:
            raise ProtocolError(f"an option begins with {magic:#x}")
        _check_option_length(length)
        return cls(option, length)


def encode_option(option: int, payload: Buffer = b"") -> bytes:
    """Header and payload."""
    return _OPTION.pack(_OPTION_MAGIC, option, len(payload)) + payload


@dataclass(frozen=True)
class OptionReplyHeader:
    """One of the replies to an option; `length` bytes of payload follow."""

    option: int
    reply: int
    length: int

    @property
    def is_error(self) -> bool:
        """Whether it ends the option with an error, known or not."""
        return bool(self.reply & OPTION_ERROR)

    @classmethod
    def decode(cls, data: Buffer) -> OptionReplyHeader:
        """From `OPTION_REPLY_HEADER_SIZE` bytes."""
        magic, option, reply, length = unpack(_OPTION_REPLY, data, "an option reply")
        if magic != _OPTION_REPLY_MAGIC:
            raise ProtocolError(f"an option reply begins with {magic:#x}")
        _check_option_length(length)
        return cls(option, reply, length)


def _check_option_length(length: int) -> None:
    if length > MAX_OPTION_PAYLOAD:
        raise ProtocolError(f"an option's payload of {length} bytes; at most {MAX_OPTION_PAYLOAD} are accepted")


def encode_option_reply(option: int, reply: int, payload: Buffer = b"") -> bytes:
    """Header and payload; of errors the payload is a text."""
    return _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, reply, len(payload)) + payload


@dataclass(frozen=True)
class GoRequest:
    """Payload of OPT_INFO and OPT_GO: which export, and what else should be told (`Info`)."""

    name: str
    infos: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """The payload."""
        return counted(self.name) + struct.pack(f">H{len(self.infos)}H", len(self.infos), *self.infos)

    @classmethod
    def decode(cls, data: Buffer) -> GoRequest:
        """From the payload."""
        reader = Reader(data, "the request for an export")
        name = reader.text()
        (count,) = reader.numbers(U16)
        infos = reader.numbers(struct.Struct(f">{count}H"))
        reader.end()
        return cls(name, infos)


@dataclass(frozen=True)
class ExportInfo:
    """Size in bytes and abilities of an export: the answer to OPT_EXPORT_NAME, and one of those to OPT_GO."""

    size: int
    flags: TransmissionFlag

    def encode(self) -> bytes:
        """As after OPT_EXPORT_NAME, without the zeroes."""
        return _EXPORT.pack(self.size, self.flags)

    @classmethod
    def decode(cls, data: Buffer) -> ExportInfo:
        """From `EXPORT_NAME_REPLY_SIZE` bytes."""
        size, flags = unpack(_EXPORT, data, "an export's description")
        if size >> 63:
            raise ProtocolError(f"an export of {size} bytes")
        if not flags & TransmissionFlag.HAS_FLAGS:
            raise ProtocolError("an export without flags")
        return cls(size, TransmissionFlag(flags))


@dataclass(frozen=True)
class NameInfo:
    """The export's canonical name."""

    name: str


@dataclass(frozen=True)
class DescriptionInfo:
    """The export's description, for people."""

    description: str


@dataclass(frozen=True)
class BlockSizes:
    """Bytes. Offsets and lengths are multiples of `minimum`, a power of two up to 64 KiB; reads and writes have at most
    `maximum`."""

    minimum: int
    preferred: int
    maximum: int


@dataclass(frozen=True)
class OtherInfo:
    """An information nobody asked for: to be ignored."""

    kind: int


AnyInfo = ExportInfo | NameInfo | DescriptionInfo | BlockSizes | OtherInfo


def encode_info(info: AnyInfo) -> bytes:
    """Payload of the reply INFO."""
    match info:
        case ExportInfo():
            return U16.pack(Info.EXPORT) + info.encode()
        case NameInfo():
            return U16.pack(Info.NAME) + encode_text(info.name)
        case DescriptionInfo():
            return U16.pack(Info.DESCRIPTION) + encode_text(info.description)
        case BlockSizes():
            return U16.pack(Info.BLOCK_SIZE) + _BLOCK_SIZES.pack(info.minimum, info.preferred, info.maximum)
        case OtherInfo():
            return U16.pack(info.kind)


def decode_info(data: Buffer) -> AnyInfo:
    """From the payload of the reply INFO."""
    reader = Reader(data, "an information")
    (kind,) = reader.numbers(U16)
    rest = reader.rest()
    match kind:
        case Info.EXPORT:
            return ExportInfo.decode(rest)
        case Info.NAME:
            return NameInfo(decode_text(rest))
        case Info.DESCRIPTION:
            return DescriptionInfo(decode_text(rest))
        case Info.BLOCK_SIZE:
            minimum, preferred, maximum = unpack(_BLOCK_SIZES, rest, "the block sizes")
            if not 1 <= minimum <= 1 << 16 or minimum & (minimum - 1) or maximum < minimum:
                raise ProtocolError(f"unusable block sizes {minimum}, {preferred}, {maximum}")
            return BlockSizes(minimum, preferred, maximum)
        case _:
            return OtherInfo(kind)


@dataclass(frozen=True)
class ListedExport:
    """Payload of the reply SERVER, one of those to OPT_LIST."""

    name: str
    details: str = ""

    def encode(self) -> bytes:
        """The payload."""
        return counted(self.name) + encode_text(self.details)

    @classmethod
    def decode(cls, data: Buffer) -> ListedExport:
        """From the payload."""
        reader = Reader(data, "a listed export")
        name = reader.text()
        return cls(name, decode_text(reader.rest()))


@dataclass(frozen=True)
class MetaContextRequest:
    """Payload of OPT_LIST_META_CONTEXT and OPT_SET_META_CONTEXT."""

    export: str
    queries: tuple[str, ...]

    def encode(self) -> bytes:
        """The payload."""
        return counted(self.export) + U32.pack(len(self.queries)) + b"".join(map(counted, self.queries))

    @classmethod
    def decode(cls, data: Buffer) -> MetaContextRequest:
        """From the payload."""
        reader = Reader(data, "a request for metadata contexts")
        export = reader.text()
        (count,) = reader.numbers(U32)
        # Each takes 4 bytes of a payload that is bounded: a count that lies ends at the end of the payload.
        queries = []
        for _ in range(count):
            queries.append(reader.text())
        reader.end()
        return cls(export, tuple(queries))


@dataclass(frozen=True)
class MetaContext:
    """Payload of the reply META_CONTEXT: the number that stands for a context in block status replies."""

    number: int
    name: str

    def encode(self) -> bytes:
        """The payload."""
        return U32.pack(self.number) + encode_text(self.name)

    @classmethod
    def decode(cls, data: Buffer) -> MetaContext:
        """From the payload."""
        reader = Reader(data, "a metadata context")
        (number,) = reader.numbers(U32)
        return cls(number, decode_text(reader.rest()))
