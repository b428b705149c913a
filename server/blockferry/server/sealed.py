"""Small files that carry their own checksum: magic, header, body (pure).

    8 bytes     magic
    4 bytes     length of the header, little-endian
    ...         header, JSON
    ...         body; the header says how long its parts are
    32 bytes    BLAKE3 of all that comes before

A torn or damaged file is told from a whole one, whatever happened to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec
from blake3 import blake3

MAGIC_SIZE = 8
CHECKSUM_SIZE = 32

H = TypeVar("H", bound=msgspec.Struct)


def seal(magic: bytes, header: msgspec.Struct, parts: Sequence[bytes]) -> bytes:
    """The bytes of a file; `magic` has 8 bytes."""
    assert len(magic) == MAGIC_SIZE
    head = msgspec.json.encode(header)
    content = b"".join([magic, len(head).to_bytes(4, "little"), head, *parts])
    return content + blake3(content).digest()


def unseal(magic: bytes, kind: type[H], data: bytes) -> tuple[H, bytes] | None:
    """(header, body) of a file, or None where it is damaged or something else."""
    content = data[:-CHECKSUM_SIZE]
    if not content.startswith(magic) or blake3(content).digest() != data[-CHECKSUM_SIZE:]:
        return None
    start = MAGIC_SIZE + 4
    end = start + int.from_bytes(content[MAGIC_SIZE:start], "little")
    try:
        return msgspec.json.decode(content[start:end], type=kind), content[end:]
    except (UnicodeDecodeError, msgspec.MsgspecError):
        return None
