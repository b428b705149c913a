"""Compression, encryption and digests of what is in an archive (pure).

Every block and every frame is compressed alone and, where the archive is encrypted, sealed alone with AES-256-GCM (NIST
SP 800-38D) under a random nonce. Keys come from the archive's key by HKDF-SHA256 (RFC 5869), one for each attempt, so
that no key seals more than one attempt's blocks. The tag vouches for where a thing belongs as well: a block or frame in
another's place is refused.

Digests are BLAKE3 of the plaintext, 32 bytes. In an encrypted archive they are keyed, or whoever sees the trees could
tell whether a volume has a block that he knows.
"""

from __future__ import annotations

import functools
import hmac
import secrets
import threading
from collections.abc import Callable

import zstandard
from blake3 import blake3
from blockferry.common.archive import format
from blockferry.common.archive.format import DIGEST_SIZE, ENCRYPTED, NONCE_SIZE, PACKED, TAG_SIZE, Codec, Header, Kind
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_SIZE = 32
"""AES-256, and what BLAKE3 takes for a key."""

FRAME_LEVEL = 3
"""zstd level of frames: nodes and trailers are mostly digests, which no level packs."""

SAMPLE_SIZE = 4096
SAMPLES = 4
"""Bytes at a time, and how many of them, that are tried before a whole block is compressed: what is encrypted or packed
already costs a sixteenth of the time then."""
POOR = 0.97
"""A sample that keeps more than this share of its bytes is called incompressible."""

Nonce = Callable[[int], bytes]

_thread = threading.local()


def _pack(data: Data, level: int) -> bytes:
    """One zstd frame (RFC 8878) that says how long its content is, without a checksum."""
    packers: dict[int, zstandard.ZstdCompressor] = _thread.__dict__.setdefault("packers", {})
    if level not in packers:
        packers[level] = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
    # A copy: zstandard shrinks a buffer for the worst case, and what it cuts off is too short for the next one. The
    # heap of a sparse volume of 16 TiB would grow by a block for each that is kept.
    return bytes(memoryview(packers[level].compress(data)))


def _unpack(data: Data, length: int) -> bytes:
    """Raise ValueError unless it is one zstd frame of `length` bytes."""
    unpacker: zstandard.ZstdDecompressor | None = _thread.__dict__.get("unpacker")
    if unpacker is None:
        unpacker = _thread.__dict__["unpacker"] = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(data) != length:
            raise ValueError("it has another length than it should")
        return unpacker.decompress(data, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error


def parse_level(compression: str) -> int:
    """The zstd level of `zstd:N`; 0 for `none`. Raises USAGE."""
    if not format.is_compression(compression):
        raise BlockferryError(Code.USAGE, f"{compression!r} is no compression", next="write none, or zstd:1 to zstd:19")
    return 0 if compression == "none" else int(compression.partition(":")[2])


def _compressible(data: memoryview) -> bool:
    if len(data) < SAMPLES * SAMPLE_SIZE:
        return True
    step = len(data) // SAMPLES
    sample = b"".join(data[start : start + SAMPLE_SIZE] for start in range(0, step * SAMPLES, step))
    return len(_pack(sample, 1)) < POOR * len(sample)


def _derive(key: bytes, salt: bytes, purpose: str) -> bytes:
    return HKDF(SHA256(), KEY_SIZE, salt, f"blockferry archive v1 {purpose}".encode()).derive(key)


class Sealer:
    """Seals and opens what belongs to one volume of an archive, or (without a volume) to the archive itself.

    `key` is the archive's key, None where it is not encrypted. May be used by several threads.
    """

    def __init__(self, key: bytes | None, volume: bytes = format.NOBODY, nonce: Nonce = secrets.token_bytes) -> None:
        self.volume = volume
        self._key = key
        self._nonce = nonce
        self._digest_key = None if key is None else _derive(key, volume, "digest")
        # One cipher for each attempt that a tree refers to: hundreds for an old volume, and an HKDF for each block
        # would cost as much as the block.
        self._cipher = functools.lru_cache(maxsize=1024)(self._make_cipher)

    @property
    def encrypted(self) -> bool:
        """Whether the archive is."""
        return self._key is not None

    def _make_cipher(self, attempt: bytes) -> AESGCM:
        assert self._key is not None
        return AESGCM(_derive(self._key, self.volume + attempt, "attempt"))

    def digest(self, data: Data) -> bytes:
        """32 bytes that stand for a block's plaintext within this volume."""
        if self._digest_key is None:
            return blake3(data).digest(DIGEST_SIZE)
        return blake3(data, key=self._digest_key).digest(DIGEST_SIZE)

    # --- blocks ---------------------------------------------------------------------------------------------------

    def seal_block(self, attempt: bytes, block: int, data: memoryview, level: int) -> tuple[Codec, bytes]:
        """How a block is stored, and its stored bytes; `level` 0 does not compress."""
        codec, stored = Codec.PLAIN, None
        if level and _compressible(data):
            packed = _pack(data, level)
            if len(packed) < len(data):
                codec, stored = Codec.ZSTD, packed
        if self._key is None:
            return codec, bytes(data) if stored is None else stored
        nonce = self._nonce(NONCE_SIZE)
        aad = format.block_context(self.volume, attempt, block)
        return codec, nonce + self._cipher(attempt).encrypt(nonce, data if stored is None else stored, aad)

    def open_block(self, attempt: bytes, block: int, codec: int, stored: Data, length: int, digest: bytes) -> bytes:
        """The `length` bytes of a block. Raises DATA_MISMATCH where they are not those that were archived."""
        try:
            data: Data = stored
            if self._key is not None:
                aad = format.block_context(self.volume, attempt, block)
                data = self._decrypt(attempt, stored, aad)
            if codec == Codec.ZSTD:
                data = _unpack(data, length)
            if len(data) != length:
                raise ValueError(f"it has {len(data)} bytes where the volume has {length}")
            if not hmac.compare_digest(self.digest(data), digest):
                raise ValueError("its digest is not that of what was archived")
        except ValueError as error:
            raise BlockferryError(
                Code.DATA_MISMATCH,
                "a block in the archive is damaged",
                cause=str(error),
                next="restore another snapshot, or this one with --allow-damaged, which lists what is missing",
                offset=block * format.ARCHIVE_BLOCK,
                length=length,
            ) from error
        return bytes(data)

    def _decrypt(self, attempt: bytes, stored: Data, aad: bytes) -> bytes:
        if len(stored) < NONCE_SIZE + TAG_SIZE:
            raise ValueError("it is too short to be sealed")
        view = memoryview(stored)
        try:
            return self._cipher(attempt).decrypt(bytes(view[:NONCE_SIZE]), view[NONCE_SIZE:], aad)
        except InvalidTag as error:
            raise ValueError(
                "its tag does not match: it was changed, is in another's place, or the key is wrong"
            ) from error

    # --- frames ---------------------------------------------------------------------------------------------------

    def seal_frame(self, kind: Kind, attempt: bytes, body: bytes, *, number: int = 0, offset: int = 0) -> bytes:
        """A frame. `number` is that of the chunk or log record it is in, `offset` where in the chunk it begins."""
        packed = _pack(body, FRAME_LEVEL)
        flags = PACKED if len(packed) < len(body) else 0
        content = packed if flags else body
        if self._key is None:
            header = Header(kind, flags, len(body), len(content) + TAG_SIZE, attempt)
            tag = self._plain_tag(header, content, number, offset)
            return b"".join([header.encode(), content, tag])
        header = Header(kind, flags | ENCRYPTED, len(body), NONCE_SIZE + len(content) + TAG_SIZE, attempt)
        nonce = self._nonce(NONCE_SIZE)
        aad = format.context(header, self.volume, number, offset)
        return b"".join([header.encode(), nonce, self._cipher(attempt).encrypt(nonce, content, aad)])

    def open_frame(
        self, kind: Kind, frame: Data, name: str, *, number: int = 0, offset: int = 0
    ) -> tuple[bytes, bytes]:
        """(attempt, body) of a frame that is all of `frame`; `name` is the object's, for people. Raises CORRUPT_STATE
        unless it is of this kind and belongs there, UNSUPPORTED for one of a later version."""
        header = Header.decode(frame, name)
        if header.kind is not kind:
            raise format.damaged(name, f"it holds a {header.kind.name.lower()} and no {kind.name.lower()}")
        if bool(header.flags & ENCRYPTED) != self.encrypted:
            # Whoever could pass off plain frames in an encrypted archive would need no key.
            raise format.damaged(name, f"it is {'not ' if self.encrypted else ''}encrypted, unlike the archive")
        if len(frame) - format.HEADER.size != header.stored:
            raise format.damaged(name, f"it has {len(frame)} bytes, which its header contradicts")
        stored = memoryview(frame)[format.HEADER.size :]
        try:
            if self.encrypted:
                aad = format.context(header, self.volume, number, offset)
                body: Data = self._decrypt(header.attempt, stored, aad)
            else:
                body = self._check_plain(header, stored, number, offset)
            if header.flags & PACKED:
                body = _unpack(body, header.length)
            if len(body) != header.length:
                raise ValueError(f"its body has {len(body)} bytes and should have {header.length}")
        except ValueError as error:
            raise format.damaged(name, str(error)) from error
        return header.attempt, bytes(body)

    def _plain_tag(self, header: Header, content: Data, number: int, offset: int) -> bytes:
        hasher = blake3(format.context(header, self.volume, number, offset))
        hasher.update(content)
        return hasher.digest(TAG_SIZE)

    def _check_plain(self, header: Header, stored: memoryview, number: int, offset: int) -> memoryview:
        if len(stored) < TAG_SIZE:
            raise ValueError("it is too short")
        content = stored[:-TAG_SIZE]
        if self._plain_tag(header, content, number, offset) != bytes(stored[-TAG_SIZE:]):
            raise ValueError("its checksum does not match: it was changed, or is in another's place")
        return content
