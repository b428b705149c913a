"""Zero detection and digests agree with the plainest way of computing them, at every size, and stay what they are."""

from __future__ import annotations

import pytest
from blake3 import blake3
from blockferry.common.digests import (
    KEY_SIZE,
    PIECE_SIZE,
    differing_pieces,
    digest,
    digest_of_parts,
    digest_size,
    digests,
    fill_and_digest,
    is_zero,
    nonzero_extents,
    zero_digest,
)
from blockferry.common.regions import BLOCK_SIZE
from hypothesis import example, given, settings
from hypothesis import strategies as st

KEY = bytes(range(KEY_SIZE))

ODD_SIZES = [0, 1, 511, 4095, 4096, 4097, 65535, 65536, 65537, 135168, 140001, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20]


@st.composite
def sparse(draw: st.DrawFn) -> bytearray:
    """Zeros of any size with a few other bytes."""
    size = draw(st.one_of(st.sampled_from(ODD_SIZES), st.integers(0, 150_000)))
    data = bytearray(size)
    if size:
        for position in draw(st.lists(st.integers(0, size - 1), max_size=6)):
            data[position] = draw(st.integers(1, 255))
    return data


@given(sparse())
def test_is_zero_looks_at_every_byte(data: bytearray) -> None:
    assert is_zero(memoryview(data)) == (not any(data))


@pytest.mark.parametrize("size", ODD_SIZES[1:])
def test_one_byte_anywhere_at_an_edge_is_seen(size: int) -> None:
    edges = {edge + step for edge in range(0, size + 1, PIECE_SIZE) for step in (-1, 0)} | {size // 2, size - 1}
    data = bytearray(size)
    assert is_zero(memoryview(data))
    assert list(nonzero_extents(memoryview(data))) == []
    for position in edges & set(range(size)):
        data[position] = 1
        assert not is_zero(memoryview(data))
        start = position - position % BLOCK_SIZE
        assert list(nonzero_extents(memoryview(data))) == [(start, min(BLOCK_SIZE, size - start))]
        data[position] = 0


@given(sparse())
def test_nonzero_extents_are_the_maximal_runs_of_blocks_with_data(data: bytearray) -> None:
    expected: list[tuple[int, int]] = []
    for start in range(0, len(data), BLOCK_SIZE):
        block = data[start : start + BLOCK_SIZE]
        if not any(block):
            continue
        if expected and sum(expected[-1]) == start:
            expected[-1] = (expected[-1][0], expected[-1][1] + len(block))
        else:
            expected.append((start, len(block)))
    assert list(nonzero_extents(memoryview(data))) == expected


def reference(data: bytes, key: bytes) -> bytes:
    """The digest of a region, as docs/protocol.md defines it."""
    pieces = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    if len(pieces) <= 1:
        return blake3(data, key=key).digest(16)
    return blake3(b"".join(blake3(piece, key=key).digest(16) for piece in pieces), key=key).digest(16)


def test_a_digest_that_must_never_change() -> None:
    key = bytes(range(32))
    region = bytes(range(256)) * 1024
    assert digest(region, key).hex() == reference(region, key).hex() == "0b8cc43ea9410f10fe68548622ea4146"
    assert (
        digest(region[:65536], key).hex()
        == blake3(region[:65536], key=key).hexdigest()[:32]
        == "1b21977732c6b875d673983e65b43781"
    )


@st.composite
def regions_in_parts(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, bytes | None]]]:
    """A region of up to four pieces, and the parts it is made of; None: zeros."""
    parts: list[tuple[int, bytes | None]] = []
    for index in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 2 * PIECE_SIZE) | st.sampled_from([BLOCK_SIZE, PIECE_SIZE, 2 * PIECE_SIZE]))
        data = bytes([index + 1]) * size
        parts.append((size, data if draw(st.booleans()) else None))
    return b"".join(data or bytes(size) for size, data in parts), parts


@settings(max_examples=200)
@given(regions_in_parts())
def test_a_region_in_parts_has_the_digest_of_the_whole(found: tuple[bytes, list[tuple[int, bytes | None]]]) -> None:
    data, parts = found
    assert digest_of_parts(parts, len(data), KEY) == digest(data, KEY) == reference(data, KEY)


@settings(max_examples=200)
@given(regions_in_parts(), st.sampled_from([PIECE_SIZE, 4 * PIECE_SIZE, BLOCK_SIZE]))
def test_what_was_not_read_is_zeros_whatever_the_buffer_held(
    found: tuple[bytes, list[tuple[int, bytes | None]]], piece_size: int
) -> None:
    data, parts = found
    buffer, held, position = bytearray(b"\xee" * len(data)), [], 0
    for size, part in parts:
        if part is not None:
            buffer[position : position + size] = part
            held.append((position, size))
        position += size
    pieces = [data[start : start + piece_size] for start in range(0, len(data), piece_size)]
    expected = b"".join(reference(piece, KEY) for piece in pieces)
    assert fill_and_digest(memoryview(buffer), held, piece_size, KEY, 16) == expected
    assert buffer == data


@pytest.mark.parametrize("size", [1, BLOCK_SIZE, PIECE_SIZE - 1, PIECE_SIZE])
@pytest.mark.parametrize("key", [KEY, bytes(KEY_SIZE)], ids=["key", "zero key"])
def test_the_zero_digest_is_the_digest_of_zeros(size: int, key: bytes) -> None:
    assert zero_digest(key, size) == digest(bytes(size), key) == blake3(bytes(size), key=key).digest(16)


@given(
    st.binary(max_size=20_000),
    st.sampled_from([BLOCK_SIZE, 8192, PIECE_SIZE]),
    st.sampled_from([8, 16]),
)
@example(bytes(3 * PIECE_SIZE + 1), PIECE_SIZE, 8)
def test_digests_are_those_of_the_pieces_the_last_one_short(data: bytes, piece_size: int, size: int) -> None:
    pieces = [data[start : start + piece_size] for start in range(0, len(data), piece_size)]
    assert digests(memoryview(data), piece_size, KEY, size) == b"".join(digest(piece, KEY, size) for piece in pieces)


def test_a_shorter_digest_is_the_head_of_the_longer_one_and_keys_matter() -> None:
    assert digest(b"guest data", KEY, 16)[:8] == digest(b"guest data", KEY, 8)
    assert digest(b"guest data", KEY) != digest(b"guest data", bytes(KEY_SIZE))


@pytest.mark.parametrize(
    ("piece_size", "region_size", "size"),
    [(65536, 65536, 16), (65536, 131072, 8), (4096, 65536, 8), (1 << 20, 1 << 20, 16), (4096, 1 << 24, 8)],
)
def test_only_whole_regions_get_long_digests(piece_size: int, region_size: int, size: int) -> None:
    assert digest_size(piece_size, region_size) == size


@given(st.data(), st.sampled_from([8, 16]))
def test_differing_pieces_names_exactly_those_that_differ(data: st.DataObject, size: int) -> None:
    count = data.draw(st.integers(0, 20))
    ours = data.draw(st.binary(min_size=count * size, max_size=count * size))
    changed = data.draw(st.sets(st.integers(0, count - 1))) if count else set()
    theirs = bytearray(ours)
    for index in changed:
        theirs[index * size + data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    assert differing_pieces(ours, bytes(theirs), size) == sorted(changed)
