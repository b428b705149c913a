"""The objects of an archive: their names, the frame around each, and the small records (pure).

docs/archive-format.md specifies all of it. The bodies that are made of columns (nodes, trailers, moves) are in
`columns.py`, keys and encryption in `seal.py`. Little-endian throughout; ids are 16 random bytes, in names and in JSON
32 hexadecimal digits.
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import msgspec
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code

VERSION = 1
MAGIC = b"BFAR"

CHUNK_SIZE = 16 * 1024 * 1024
"""Bytes of an object with data or nodes, at most: large enough for few requests, small enough to be sent again."""
ARCHIVE_BLOCK = 256 * 1024
"""Bytes of the volume that are stored, compared and fetched as one."""

ID_SIZE = 16
DIGEST_SIZE = 32
NONCE_SIZE = 12
TAG_SIZE = 16

MAX_BODY = 64 * 1024 * 1024
"""Bytes that the body of a frame may unpack to; a reader refuses more before it makes room for it."""

NOBODY = bytes(ID_SIZE)
"""The volume of what belongs to none, and the attempt of what was made in none."""


class Kind(enum.IntEnum):
    """What a frame holds."""

    NAME = 1
    TRAILER = 2
    NODE = 3
    SUPERBLOCK = 4
    DELETION = 5
    REMAP = 6
    ATTEMPT = 7
    PIN = 8


class Codec(enum.IntEnum):
    """How a block is stored, before it is encrypted."""

    PLAIN = 0
    ZSTD = 1


def damaged(name: str, cause: str) -> BlockferryError:
    """What is said of an object that cannot be what its name says."""
    return BlockferryError(
        Code.CORRUPT_STATE,
        f"{name} is damaged",
        cause=cause,
        next="run blockferry archive verify to learn what it affects; another snapshot may not need it",
    )


# --- names ----------------------------------------------------------------------------------------------------------

ARCHIVE_NAME = "archive.json"
KEYS = "keys/"
NAMES = "names/"


def key_name(key_id: str) -> str:
    """keys/ID"""
    return KEYS + key_id


def volume_name(name: str) -> str:
    """names/NAME; the name was checked before (address.check_volume_name)."""
    return NAMES + name


def data_name(volume: bytes, attempt: bytes, number: int) -> str:
    """UUID/data/ATTEMPT-NNNNNN: six digits, more where they do not suffice."""
    return f"{volume.hex()}/data/{attempt.hex()}-{number:06}"


def meta_name(volume: bytes, attempt: bytes, number: int) -> str:
    """UUID/meta/ATTEMPT-NNNNNN"""
    return f"{volume.hex()}/meta/{attempt.hex()}-{number:06}"


def log_prefix(volume: bytes) -> str:
    """UUID/log/"""
    return f"{volume.hex()}/log/"


def log_name(volume: bytes, number: int, attempt: bytes | None = None) -> str:
    """UUID/log/NNNNNNNNNN, and with -ATTEMPT in a store without conditional writes."""
    return f"{log_prefix(volume)}{number:010}" + (f"-{attempt.hex()}" if attempt is not None else "")


DONE = ".done"
"""Ends the name of the empty object that makes a log record count, in a store without conditional writes."""


def attempt_name(volume: bytes, attempt: bytes) -> str:
    """UUID/attempts/ID"""
    return f"{volume.hex()}/attempts/{attempt.hex()}"


def pin_name(volume: bytes, pin: bytes) -> str:
    """UUID/pins/ID"""
    return f"{volume.hex()}/pins/{pin.hex()}"


class LogName(NamedTuple):
    """What the name of a log record says. `attempt` is None where the store has conditional writes."""

    number: int
    attempt: bytes | None
    done: bool


_LOG = re.compile(r"([0-9]{10})(?:-([0-9a-f]{32})(\.done)?)?", re.ASCII)


def parse_log_name(name: str) -> LogName | None:
    """The part of a name after UUID/log/, or all of it; None for what is no log record."""
    found = _LOG.fullmatch(name.rpartition("/")[2])
    if found is None or int(found[1]) == 0:
        return None
    return LogName(int(found[1]), bytes.fromhex(found[2]) if found[2] else None, bool(found[3]))


# --- the frame ------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<4sBBBBII16s")
"""magic, version, kind, flags, 0, length of the body, length of what follows, attempt"""
_CONTEXT = struct.Struct("<16sQQ")

PACKED = 1
"""Flag: the body is a zstd frame."""
ENCRYPTED = 2
"""Flag: the body is encrypted; otherwise a digest stands for the tag."""


@dataclass(frozen=True)
class Header:
    """The 32 bytes before a body. `length` is that of the body, `stored` that of what follows the header."""

    kind: Kind
    flags: int
    length: int
    stored: int
    attempt: bytes

    def encode(self) -> bytes:
        """32 bytes."""
        return HEADER.pack(MAGIC, VERSION, self.kind, self.flags, 0, self.length, self.stored, self.attempt)

    @classmethod
    def decode(cls, data: Data, name: str) -> Header:
        """Raise CORRUPT_STATE, or UNSUPPORTED for a version from after this one."""
        if len(data) < HEADER.size:
            raise damaged(name, f"{len(data)} bytes are no frame")
        magic, version, kind, flags, zero, length, stored, attempt = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise damaged(name, "it does not begin as a frame does")
        if version != VERSION:
            raise unsupported(name, version)
        if kind not in Kind._value2member_map_ or flags & ~(PACKED | ENCRYPTED) or zero or length > MAX_BODY:
            raise damaged(name, "its header has values that no frame has")
        return cls(Kind(kind), flags, length, stored, attempt)


def context(header: Header, volume: bytes, number: int, offset: int) -> bytes:
    """What a frame's tag vouches for beside the body: its header and where it belongs."""
    return header.encode() + _CONTEXT.pack(volume, number, offset)


_BLOCK = struct.Struct("<16s16sQ")


def block_context(volume: bytes, attempt: bytes, block: int) -> bytes:
    """What the tag of an encrypted block vouches for beside its content."""
    return _BLOCK.pack(volume, attempt, block)


FOOTER = struct.Struct("<I4s")
"""The last bytes of a data chunk: length of the trailer's frame before them, magic."""
TAIL_SIZE = TAG_SIZE + FOOTER.size
"""Bytes at the end of a data chunk that no other chunk has: the tag of its trailer, and the footer."""


def unsupported(name: str, version: object) -> BlockferryError:
    """What is said of what a later release has written."""
    return BlockferryError(
        Code.UNSUPPORTED,
        f"{name} cannot be read",
        cause=f"it has version {version}, and this release knows version {VERSION}",
        next="use a newer release of blockferry",
    )


# --- records in JSON ------------------------------------------------------------------------------------------------

Id = str
"""32 hexadecimal digits"""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A small JSON object: fields in the order of the class, no white space, UTF-8. Unknown fields are refused."""


class Archive(Record, frozen=True, kw_only=True):
    """archive.json: what holds for all that is in the archive. Created once and never rewritten."""

    format: Literal["blockferry-archive"] = "blockferry-archive"
    version: int = VERSION
    id: Id
    chunk_size: int = CHUNK_SIZE
    block_size: int = ARCHIVE_BLOCK
    compression: str
    """`zstd:LEVEL` or `none`: the default of those who write"""
    encryption: Literal["none", "aes-256-gcm"]
    conditional: bool
    """whether the store refuses to create what exists"""
    created: str


class Key(Record, frozen=True, kw_only=True):
    """keys/ID: the archive's key, wrapped. `n`, `r`, `p` are those of scrypt, and 0 for a key file."""

    version: int = VERSION
    id: Id
    archive: Id
    kdf: Literal["scrypt", "hkdf-sha256"]
    salt: str
    n: int
    r: int
    p: int
    nonce: str
    wrapped: str


class Name(Record, frozen=True, kw_only=True):
    """names/NAME"""

    name: str
    volume: Id
    created: str


class NodeAt(Record, frozen=True, kw_only=True):
    """The root of a tree: where its frame is, its level (0: a leaf), and the blocks in the tree."""

    attempt: Id
    chunk: int
    offset: int
    length: int
    level: int
    blocks: int


class Superblock(Record, frozen=True, kw_only=True):
    """The record that makes a snapshot exist. Sizes in bytes; numbers are those of the log."""

    number: int
    volume: Id
    attempt: Id
    base: int
    """the snapshot that this one was made from; 0: none"""
    base_attempt: str
    seen: int
    """the last log record whose deletions were honoured"""
    created: str
    source: str
    snapshot_id: str
    size: int
    block_size: int
    root: NodeAt | None
    """None where all is zeros"""
    data_chunks: int
    """data chunks of this attempt have numbers below this"""
    meta_chunks: int
    stored: int
    """bytes of blocks that this attempt has stored"""


class Doomed(Record, frozen=True, kw_only=True):
    """Consecutive chunks of one attempt."""

    kind: Literal["data", "meta"]
    attempt: Id
    first: int
    count: int


class Deletion(Record, frozen=True, kw_only=True):
    """A deletion mark: these snapshots are gone, and these chunks will be after the grace period."""

    number: int
    volume: Id
    snapshots: list[int]
    chunks: list[Doomed]
    grace: int
    """seconds, by the store's clock"""
    created: str


class Attempt(Record, frozen=True, kw_only=True):
    """attempts/ID: an archiver at work. Rewritten with one more renewal while it is."""

    attempt: Id
    volume: Id
    host: str
    started: str
    renewals: int
    base: int
    seen: int


class Pin(Record, frozen=True, kw_only=True):
    """pins/ID: a reader at work."""

    pin: Id
    volume: Id
    snapshot: int
    reader: str
    host: str
    started: str
    renewals: int


_R = TypeVar("_R", bound=Record)


def encode(record: Record) -> bytes:
    """The JSON of a record."""
    return msgspec.json.encode(record)


def decode(data: Data, kind: type[_R], name: str) -> _R:
    """Raise CORRUPT_STATE unless `data` is the JSON of a record of this kind with sensible values, or UNSUPPORTED for
    one of a later version."""
    try:
        record = msgspec.json.decode(bytes(data), type=kind)
    except (UnicodeDecodeError, msgspec.MsgspecError) as error:
        _refuse_later_version(data, name)
        raise damaged(name, str(error)) from error
    version = getattr(record, "version", VERSION)
    if version != VERSION:
        raise unsupported(name, version)
    _check(record, name)
    return record


class _Versioned(msgspec.Struct):
    version: int = VERSION


def _refuse_later_version(data: Data, name: str) -> None:
    """A later version may have fields that are unknown here: that is not damage."""
    try:
        found = msgspec.json.decode(bytes(data), type=_Versioned)
    except (UnicodeDecodeError, msgspec.MsgspecError):
        return
    if found.version != VERSION:
        raise unsupported(name, found.version)


_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})+", re.ASCII)
_COMPRESSION = re.compile(r"none|zstd:([1-9]|1[0-9])", re.ASCII)
_IDS = {"id", "archive", "volume", "attempt", "pin"}
_BYTES = {"salt", "nonce", "wrapped"}
_MOST = 1 << 63


def is_compression(text: str) -> bool:
    """`none`, or `zstd:1` to `zstd:19`."""
    return _COMPRESSION.fullmatch(text) is not None


def _check(record: Record, name: str) -> None:
    """What all records have in common: ids are ids, and no number is negative."""
    for field in record.__struct_fields__:
        value = getattr(record, field)
        if field in _IDS and not _ID.fullmatch(value):
            raise damaged(name, f"{field} is no id")
        if field in _BYTES and not _HEX.fullmatch(value):
            raise damaged(name, f"{field} is not hexadecimal")
        if isinstance(value, int) and not 0 <= value < _MOST:
            raise damaged(name, f"{field} is {value}")
        if isinstance(value, Record):
            _check(value, name)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, Record):
                    _check(item, name)
    if isinstance(record, Archive):
        _check_archive(record, name)
    if isinstance(record, Superblock):
        _check_superblock(record, name)


def _check_archive(record: Archive, name: str) -> None:
    if not is_compression(record.compression):
        raise damaged(name, f"compression is {record.compression!r}")
    if (record.chunk_size, record.block_size) != (CHUNK_SIZE, ARCHIVE_BLOCK):
        raise damaged(name, "version 1 has chunks of 16 MiB and blocks of 256 KiB")


def _check_superblock(record: Superblock, name: str) -> None:
    blocks = record.root.blocks if record.root is not None else 0
    most = -(-record.size // ARCHIVE_BLOCK)
    if record.size < 1 or record.block_size != ARCHIVE_BLOCK or blocks > most:
        raise damaged(name, f"a volume of {record.size} bytes has no {blocks} blocks of {record.block_size}")
    if record.base_attempt and not _ID.fullmatch(record.base_attempt):
        raise damaged(name, "base_attempt is no id")
    if record.base >= record.number or record.seen >= record.number:
        raise damaged(name, "it refers to a later record")
