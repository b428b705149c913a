"""Blocks: compressed or not, encrypted or not, and always proven by their digests."""

from __future__ import annotations

import random

import pytest
import zstandard
from blake3 import blake3
from blockferry.common.archive.format import ARCHIVE_BLOCK, Codec
from blockferry.common.archive.seal import Sealer, parse_level
from blockferry.common.errors import BlockferryError, Code
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.archive.examples import ATTEMPT, EARLIER, KEY, OTHER, VOLUME, some

PLAIN, ENCRYPTED = Sealer(None, VOLUME), Sealer(KEY, VOLUME)
SEALERS = pytest.mark.parametrize("sealer", [PLAIN, ENCRYPTED], ids=["plain", "encrypted"])
TEXT = b"compressible " * 1000


def damaged(
    sealer: Sealer, stored: bytes, codec: int, digest: bytes, length: int, *, block: int = 3, attempt: bytes = ATTEMPT
) -> BlockferryError:
    with pytest.raises(BlockferryError) as told:
        sealer.open_block(attempt, block, codec, stored, length, digest)
    assert told.value.code is Code.DATA_MISMATCH and told.value.offset == block * ARCHIVE_BLOCK
    return told.value


@SEALERS
@given(
    data=st.binary(min_size=1, max_size=3000), block=st.integers(0, (1 << 46) - 1), level=st.sampled_from([0, 1, 19])
)
def test_blocks_come_back(sealer: Sealer, data: bytes, block: int, level: int) -> None:
    codec, stored = sealer.seal_block(ATTEMPT, block, memoryview(data), level)
    assert sealer.open_block(ATTEMPT, block, codec, stored, len(data), sealer.digest(data)) == data


@SEALERS
def test_what_packs_is_packed_and_all_else_is_stored_plain(sealer: Sealer) -> None:
    extra = 28 if sealer.encrypted else 0
    for data, codec in (
        (bytes(ARCHIVE_BLOCK), Codec.ZSTD),
        (some("noise", ARCHIVE_BLOCK), Codec.PLAIN),
        (b"a", Codec.PLAIN),
    ):
        found, stored = sealer.seal_block(ATTEMPT, 0, memoryview(data), 3)
        assert found is codec
        assert len(stored) == len(data) + extra if codec is Codec.PLAIN else len(stored) < 100
    assert sealer.seal_block(ATTEMPT, 0, memoryview(bytes(5000)), 0)[0] is Codec.PLAIN


def test_a_block_that_packs_only_in_part_is_packed() -> None:
    """The sample must not take such a one for noise: half of it, in pieces of 64 KiB, is."""
    rng = random.Random(1)
    half = b"".join(rng.randbytes(65536) + b"text" * 16384 for _ in range(2))
    codec, stored = PLAIN.seal_block(ATTEMPT, 0, memoryview(half), 3)
    assert codec is Codec.ZSTD and len(stored) < 0.55 * len(half)


def test_a_block_is_copied_out_of_the_buffer_it_was_read_into() -> None:
    buffer = bytearray(some("noise", 5000))
    _, stored = PLAIN.seal_block(ATTEMPT, 0, memoryview(buffer), 3)
    buffer[:] = bytes(5000)
    assert stored == some("noise", 5000)


@SEALERS
def test_every_bit_of_a_block_counts(sealer: Sealer) -> None:
    data = TEXT[:200]
    codec, stored = sealer.seal_block(ATTEMPT, 3, memoryview(data), 3)
    assert codec is Codec.ZSTD
    digest = sealer.digest(data)
    for bit in range(len(stored) * 8):
        altered = bytearray(stored)
        altered[bit // 8] ^= 1 << bit % 8
        # The reserved bit of a zstd header changes nothing that is read: the digest still proves the block.
        try:
            found = sealer.open_block(ATTEMPT, 3, codec, altered, len(data), digest)
        except BlockferryError as error:
            assert error.code is Code.DATA_MISMATCH  # noqa: PT017
        else:
            assert found == data and not sealer.encrypted


@SEALERS
def test_blocks_that_are_cut_or_longer_or_of_another_length_are_refused(sealer: Sealer) -> None:
    codec, stored = sealer.seal_block(ATTEMPT, 3, memoryview(TEXT), 3)
    digest = sealer.digest(TEXT)
    for altered in (stored[:-1], stored + b"\0", b"", stored[:20]):
        damaged(sealer, altered, codec, digest, len(TEXT))
    for length in (len(TEXT) - 1, len(TEXT) + 1, 0):
        damaged(sealer, stored, codec, digest, length)
    damaged(sealer, stored, Codec.PLAIN, digest, len(TEXT))


def test_another_block_in_its_place_is_refused() -> None:
    codec, stored = ENCRYPTED.seal_block(ATTEMPT, 3, memoryview(TEXT), 3)
    digest = ENCRYPTED.digest(TEXT)
    damaged(ENCRYPTED, stored, codec, digest, len(TEXT), block=4)
    damaged(ENCRYPTED, stored, codec, digest, len(TEXT), attempt=EARLIER)
    damaged(Sealer(KEY, OTHER), stored, codec, digest, len(TEXT))
    error = damaged(Sealer(some("another key", 32), VOLUME), stored, codec, digest, len(TEXT))
    assert "key is wrong" in error.cause
    # Without encryption only the digest knows.
    codec, stored = PLAIN.seal_block(ATTEMPT, 3, memoryview(TEXT), 3)
    damaged(PLAIN, stored, codec, PLAIN.digest(b"another"), len(TEXT))


def test_digests_are_blake3_and_keyed_by_volume_where_the_archive_is_encrypted() -> None:
    assert PLAIN.digest(TEXT) == blake3(TEXT).digest() == Sealer(None, OTHER).digest(TEXT)
    key = HKDF(SHA256(), 32, VOLUME, b"blockferry archive v1 digest").derive(KEY)
    assert ENCRYPTED.digest(TEXT) == blake3(TEXT, key=key).digest()
    assert Sealer(KEY, OTHER).digest(TEXT) != ENCRYPTED.digest(TEXT)


def test_an_encrypted_block_is_what_the_document_says() -> None:
    _, stored = ENCRYPTED.seal_block(ATTEMPT, 3, memoryview(TEXT), 3)
    key = HKDF(SHA256(), 32, VOLUME + ATTEMPT, b"blockferry archive v1 attempt").derive(KEY)
    packed = AESGCM(key).decrypt(stored[:12], stored[12:], VOLUME + ATTEMPT + (3).to_bytes(8, "little"))
    assert zstandard.ZstdDecompressor().decompress(packed) == TEXT
    assert zstandard.get_frame_parameters(packed).content_size == len(TEXT)
    assert not zstandard.get_frame_parameters(packed).has_checksum


def test_nonces_are_never_the_same() -> None:
    found = {ENCRYPTED.seal_block(ATTEMPT, 3, memoryview(b"the same"), 0)[1][:12] for _ in range(1000)}
    assert len(found) == 1000


def test_levels() -> None:
    assert [parse_level(text) for text in ("none", "zstd:1", "zstd:19")] == [0, 1, 19]
    for text in ("", "zstd", "zstd:0", "zstd:20", "zstd:03", "lz4", "none "):
        with pytest.raises(BlockferryError) as told:
            parse_level(text)
        assert told.value.code is Code.USAGE
