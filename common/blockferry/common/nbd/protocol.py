"""Numbers, names and limits of the NBD protocol, and what its messages are made of (pure).

Source: doc/proto.md of NetworkBlockDevice/nbd. Everything is big-endian. A message is a fixed header, which says how
long its payload is, and the payload:

    handshake      greeting, client flags; option header + payload, option reply header + payload, and so on until
                   OPT_GO or OPT_EXPORT_NAME
    transmission   request header (+ data of a write); simple reply header (+ data of a read), or chunk header + payload
                   again and again until a chunk says DONE

`handshake.py` and `transmission.py` turn bytes into messages and back, for both sides. Headers check the length they
announce, so whoever reads the payload may allocate it. Whatever a peer sends, only `ProtocolError` is raised.
"""

from __future__ import annotations

import enum
import struct

Buffer = bytes | bytearray | memoryview


class ProtocolError(Exception):
    """The peer broke the protocol; the text says how."""


MAX_STRING = 4096
"""Bytes of any name or text, by the protocol."""

MAX_OPTION_PAYLOAD = 64 * 1024
"""Bytes of payload of an option or its reply: ours. The longest sensible one is a name and a few queries."""

MAX_PAYLOAD = 32 * 1024 * 1024
"""Bytes of a read or write that every server takes unless it announces otherwise, by the protocol."""

MAX_EXTENTS = 1024 * 1024
"""Extents of one block status reply (8 MiB): the most that nbdkit sends; qemu-nbd sends an eighth of it."""

MAX_STATUS = (1 << 32) - (1 << 16)
"""Bytes that one block status request may ask about: lengths are 32-bit, and a minimum block is at most 64 KiB."""


class HandshakeFlag(enum.IntFlag):
    """Of the greeting, and echoed by the client."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    """NBD_OPT_*"""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


OPTION_ERROR = 1 << 31
"""The bit that all replies have which refuse an option."""


class OptionReply(enum.IntEnum):
    """NBD_REP_*; errors have the highest bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = OPTION_ERROR + 1
    ERR_POLICY = OPTION_ERROR + 2
    ERR_INVALID = OPTION_ERROR + 3
    ERR_PLATFORM = OPTION_ERROR + 4
    ERR_TLS_REQD = OPTION_ERROR + 5
    ERR_UNKNOWN = OPTION_ERROR + 6
    ERR_SHUTDOWN = OPTION_ERROR + 7
    ERR_BLOCK_SIZE_REQD = OPTION_ERROR + 8
    ERR_TOO_BIG = OPTION_ERROR + 9


class Info(enum.IntEnum):
    """NBD_INFO_*"""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    """NBD_FLAG_*: what an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(enum.IntEnum):
    """NBD_CMD_*"""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """NBD_CMD_FLAG_*"""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class ChunkKind(enum.IntEnum):
    """NBD_REPLY_TYPE_*; errors have the highest bit set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


CHUNK_DONE = 1
"""NBD_REPLY_FLAG_DONE"""

BASE_ALLOCATION = "base:allocation"


class Allocation(enum.IntFlag):
    """Of an extent in `base:allocation`. ZERO proves that it reads as zeros; HOLE alone proves nothing."""

    HOLE = 1
    ZERO = 2


class Errno(enum.IntEnum):
    """Error numbers of replies, by the protocol: Linux's, whatever the server runs on."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


_ERRNO_TEXTS = {
    Errno.EPERM: "operation not permitted",
    Errno.EIO: "input/output error",
    Errno.ENOMEM: "cannot allocate memory",
    Errno.EINVAL: "invalid argument",
    Errno.ENOSPC: "no space left on device",
    Errno.EOVERFLOW: "value too large",
    Errno.ENOTSUP: "operation not supported",
    Errno.ESHUTDOWN: "server is shutting down",
}


def error_text(number: int) -> str:
    """`EIO (input/output error)`; a number alone where the protocol does not know it."""
    try:
        known = Errno(number)
    except ValueError:
        return f"error {number}"
    return f"{known.name} ({_ERRNO_TEXTS[known]})"


def printable(text: str) -> str:
    """Text of a peer, fit for a terminal and one line."""
    return "".join(character if character.isprintable() else "?" for character in text)


def unpack(layout: struct.Struct, data: Buffer, what: str) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise ProtocolError(f"{what} has {len(data)} bytes instead of {layout.size}")
    return layout.unpack(data)


class Reader:
    """Takes a payload apart from front to back."""

    def __init__(self, data: Buffer, what: str) -> None:
        self._data = memoryview(data)
        self._what = what

    def take(self, length: int) -> memoryview:
        if length > len(self._data):
            raise ProtocolError(f"{self._what} ends early")
        part, self._data = self._data[:length], self._data[length:]
        return part

    def numbers(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def text(self) -> str:
        """A string after its 32-bit length."""
        (length,) = self.numbers(U32)
        return decode_text(self.take(length))

    def rest(self) -> memoryview:
        return self.take(len(self._data))

    def end(self) -> None:
        if self._data:
            raise ProtocolError(f"{self._what} has {len(self._data)} bytes too many")


U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")


def decode_text(data: Buffer) -> str:
    """A name or text without its length: UTF-8, no NUL, at most 4096 bytes."""
    if len(data) > MAX_STRING:
        raise ProtocolError(f"a string of {len(data)} bytes; at most {MAX_STRING} are possible")
    try:
        text = bytes(data).decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("a string is no UTF-8") from error
    if "\0" in text:
        raise ProtocolError("a string has a NUL")
    return text


def encode_text(text: str) -> bytes:
    """As `decode_text`."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ProtocolError("a string is no UTF-8") from error
    if len(data) > MAX_STRING or b"\0" in data:
        raise ProtocolError(f"a string of {len(data)} bytes cannot be sent, or has a NUL")
    return data


def counted(text: str) -> bytes:
    data = encode_text(text)
    return U32.pack(len(data)) + data
