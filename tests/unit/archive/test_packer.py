"""Data chunks: filled up to their size and no further, and described by their trailers."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from blockferry.client import packer
from blockferry.client.packer import Chunk, Packer
from blockferry.common.archive.columns import (
    MAX_CHUNK_BLOCKS,
    Entry,
    Kept,
    Leaf,
    Trailer,
    decode_trailer,
    encode_node,
    encode_trailer,
)
from blockferry.common.archive.format import (
    ARCHIVE_BLOCK,
    CHUNK_SIZE,
    FOOTER,
    MAGIC,
    NONCE_SIZE,
    TAG_SIZE,
    TAIL_SIZE,
    Kind,
)
from blockferry.common.archive.seal import Sealer
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.archive.examples import ATTEMPT, KEY, VOLUME, some

SMALL = 4096


def new() -> Trailer:
    return Trailer(3, 0, bytes(16), 1 << 44, 1, first=5)


def made(sealer: Sealer | None = None) -> Packer:
    return Packer(sealer or Sealer(None, VOLUME), ATTEMPT, 5, new)


def opened(chunk: Chunk, sealer: Sealer) -> tuple[bytes, Trailer]:
    """The blocks and the trailer, found from the end of the object."""
    data = b"".join(chunk.parts)
    assert len(data) == chunk.size and data[-TAIL_SIZE:] == chunk.tail
    length, magic = FOOTER.unpack(data[-FOOTER.size :])
    offset = len(data) - FOOTER.size - length
    frame = data[offset : -FOOTER.size]
    assert magic == MAGIC and frame == chunk.trailer
    attempt, body = sealer.open_frame(Kind.TRAILER, frame, "trailer", number=chunk.number, offset=offset)
    assert attempt == ATTEMPT
    return data[:offset], decode_trailer(body, "trailer")


blocks = st.tuples(st.just("block"), st.integers(1, 1500))
holes = st.tuples(st.just("hole"), st.integers(1, 3))
kept = st.tuples(st.just("keep"), st.integers(0, 2))


@pytest.mark.parametrize("sealer", [Sealer(None, VOLUME), Sealer(KEY, VOLUME)], ids=["plain", "encrypted"])
@settings(max_examples=100)
@given(steps=st.lists(blocks | holes | kept, max_size=60), gaps=st.lists(st.integers(1, 3), min_size=60, max_size=60))
def test_chunks_are_what_was_put_into_them(sealer: Sealer, steps: list[tuple[str, int]], gaps: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "CHUNK_SIZE", SMALL)
        packing = made(sealer)
        block, chunks = 0, []
        stored: dict[int, tuple[Entry, bytes]] = {}
        holes_made, blocks_kept = set(), {}
        for (kind, value), gap in zip(steps, gaps, strict=False):
            block += gap
            if kind == "block":
                data = some(f"{block}", value)
                stored[block] = packing.add(block, block % 2, data, some(f"digest {block}", 32)), data
            elif kind == "hole":
                packing.hole(block)
                holes_made.add(block)
            else:
                packing.keep(block, Entry(ATTEMPT, value, 0, 1, 0, b""))
                blocks_kept[block] = value
            chunks += packing.full()
        chunks += packing.finish()
    assert [chunk.number for chunk in chunks] == list(range(5, 5 + len(chunks)))
    told: dict[int, Entry] = {}
    for chunk in chunks:
        assert chunk.size <= SMALL
        data, trailer = opened(chunk, sealer)
        assert (trailer.run, trailer.first, trailer.last) == (3, 5, chunk is chunks[-1])
        for key, entry in trailer.entries(ATTEMPT, chunk.number):
            assert data[entry.offset : entry.offset + entry.length] == stored[key][1]
            told[key] = entry
        for first, count in trailer.holes:
            assert all(key in holes_made for key in range(first, first + count))
            holes_made -= set(range(first, first + count))
        for first, count, number in trailer.kept:
            assert all(blocks_kept.pop(key) == number for key in range(first, first + count))
    assert told == {key: entry for key, (entry, _) in stored.items()}
    assert not holes_made and not blocks_kept


def test_chunks_are_full() -> None:
    """One more block would not have fitted: 16 MiB hold 63 blocks that do not pack."""
    packing = made()
    data = bytes(ARCHIVE_BLOCK)
    for block in range(200):
        packing.add(block, 0, data, bytes(32))
    chunks = packing.full()
    assert [len(chunk.content.keys) for chunk in chunks] == [63, 63, 63]
    assert all(CHUNK_SIZE - 2 * ARCHIVE_BLOCK < chunk.size <= CHUNK_SIZE for chunk in chunks)
    assert packing.full() == []
    assert [len(chunk.content.keys) for chunk in packing.finish()] == [11]


def test_blocks_that_pack_to_nothing_do_not_make_a_trailer_larger_than_what_it_describes() -> None:
    packing = made()
    for block in range(MAX_CHUNK_BLOCKS + 1):
        packing.add(block, 1, b"x", bytes(32))
    (chunk,) = packing.full()
    assert len(chunk.content.keys) == MAX_CHUNK_BLOCKS


def test_runs_are_joined_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "MAX_RUNS", 10)
    packing = made()
    for block in range(100):
        packing.hole(block)
    for block in range(100, 200):
        packing.keep(block, Entry(ATTEMPT, block // 150, 0, 1, 0, b""))
    for block in range(201, 240, 2):
        packing.hole(block)
    chunks = packing.finish()
    assert [(len(one.content.holes), len(one.content.kept)) for one in chunks] == [(8, 2), (10, 0), (3, 0)]
    assert chunks[0].content.holes[0] == (0, 100)
    assert chunks[0].content.kept == [Kept(100, 50, 0), Kept(150, 50, 1)]


def test_metadata_is_less_than_a_two_thousandth_of_the_data() -> None:
    """0.05 %, trailers, nonces and tags included, of a full volume whose blocks pack to all kinds of lengths."""
    rng = random.Random(7)
    sealer = Sealer(KEY, VOLUME)
    blocks = iter(range(16 * 256))
    entries: list[Entry] = []
    trailers = 0
    for number in range(16 * 256 // 64):
        trailer = dataclasses.replace(new(), keys=list(itertools.islice(blocks, 64)))
        trailer.lengths = [rng.randrange(100_000, ARCHIVE_BLOCK) for _ in trailer.keys]
        trailer.codecs = [1] * 64
        trailer.digests = [rng.randbytes(32) for _ in trailer.keys]
        frame = sealer.seal_frame(Kind.TRAILER, ATTEMPT, encode_trailer(trailer), number=number)
        trailers += len(frame) + FOOTER.size
        entries += [entry for _, entry in trailer.entries(ATTEMPT, number)]
    leaves = [Leaf(range(first, first + 256), entries[first : first + 256]) for first in range(0, len(entries), 256)]
    nodes = sum(len(sealer.seal_frame(Kind.NODE, ATTEMPT, encode_node(leaf))) for leaf in leaves)
    # One node above 256 of them, and the nonce and the tag of each block.
    each = (trailers + nodes * 257 / 256) / len(entries) + NONCE_SIZE + TAG_SIZE
    print(f"{trailers / len(entries):.1f} bytes of trailer and {nodes / len(entries):.1f} of nodes for each block")
    assert each < 0.0005 * ARCHIVE_BLOCK
