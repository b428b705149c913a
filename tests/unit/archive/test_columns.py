"""Nodes, trailers and moves: they come back as they were; what is altered is refused, or is another valid one."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

import pytest
from blockferry.common.archive import columns
from blockferry.common.archive.columns import (
    MAX_BLOCKS,
    MAX_CHUNK_BLOCKS,
    MAX_ENTRIES,
    Child,
    Entry,
    Inner,
    Kept,
    Leaf,
    Move,
    Node,
    NodeRef,
    Trailer,
    decode_node,
    decode_remap,
    decode_trailer,
    encode_node,
    encode_remap,
    encode_trailer,
)
from blockferry.common.archive.format import CHUNK_SIZE
from blockferry.common.errors import BlockferryError, Code
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.archive import examples
from tests.unit.archive.examples import ATTEMPT, EARLIER, some
from tests.unit.archive.test_format import refused

ids = st.integers(0, 5).map(lambda number: some(f"attempt {number}", 16))
small = st.integers(0, 9)
blocks = st.lists(st.integers(0, MAX_BLOCKS - 1) | st.integers(0, 1000), unique=True, min_size=1, max_size=40).map(
    sorted
)
places = st.tuples(st.integers(0, CHUNK_SIZE - 1), st.integers(1, CHUNK_SIZE)).map(
    lambda one: (one[0], min(one[1], CHUNK_SIZE - one[0]))
)
entries = st.builds(
    lambda attempt, chunk, place, codec, digest: Entry(attempt, chunk, place[0], place[1], codec, digest),
    ids, st.integers(0, (1 << 32) - 1), places, st.integers(0, 1), st.binary(min_size=32, max_size=32),
)  # fmt: skip
children = st.builds(
    lambda attempt, chunk, place, count: Child(NodeRef(attempt, chunk, place[0], place[1]), count),
    ids, st.integers(0, (1 << 32) - 1), places, st.integers(1, MAX_BLOCKS),
)  # fmt: skip


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    keys = draw(blocks)
    many = len(keys)
    level = draw(st.integers(0, 7))
    if level:
        return Inner(level, keys, draw(st.lists(children, min_size=many, max_size=many)))
    return Leaf(keys, draw(st.lists(entries, min_size=many, max_size=many)))


@st.composite
def trailers(draw: st.DrawFn) -> Trailer:
    keys = draw(st.just([]) | blocks)
    many = len(keys)
    ends = draw(st.lists(st.integers(0, 500), unique=True, max_size=12).map(sorted))
    runs = [(first, last - first) for first, last in zip(ends[::2], ends[1::2], strict=False)]
    base = draw(st.integers(0, 3))
    return Trailer(
        draw(st.integers(0, 9)), base, some("base", 16) if base else bytes(16), draw(st.integers(0, (1 << 64) - 1)),
        draw(st.integers(0, (1 << 64) - 1)), draw(st.booleans()), keys,
        draw(st.lists(st.integers(1, 1000), min_size=many, max_size=many)),
        draw(st.lists(st.integers(0, 1), min_size=many, max_size=many)),
        draw(st.lists(st.binary(min_size=32, max_size=32), min_size=many, max_size=many)),
        runs, [Kept(first, count, number) for number, (first, count) in enumerate(runs)],
    )  # fmt: skip


@given(nodes())
def test_nodes_come_back(node: Node) -> None:
    assert decode_node(encode_node(node), "object-1") == node


@given(trailers())
def test_trailers_come_back(trailer: Trailer) -> None:
    assert decode_trailer(encode_trailer(trailer), "object-1") == trailer


@given(
    st.lists(
        st.builds(Move, ids, small, small, ids, small, small, st.integers(1, 9), st.integers(0, 1)),
        min_size=1, max_size=20, unique_by=lambda move: move[:3],
    ).map(sorted)
)  # fmt: skip
def test_moves_come_back(moves: list[Move]) -> None:
    assert decode_remap(encode_remap(moves), "object-1") == moves


def test_full_nodes_come_back() -> None:
    leaf = Leaf(range(MAX_ENTRIES), [Entry(some(f"{i}", 16), i, i, 1, 0, some(f"{i}", 32)) for i in range(MAX_ENTRIES)])
    found = decode_node(encode_node(leaf), "object-1")
    assert list(found.keys) == list(leaf.keys) and list(found.items) == list(leaf.items)


def test_where_blocks_are_follows_from_their_lengths() -> None:
    found = examples.TRAILER.entries(ATTEMPT, 4)
    assert [(key, one.attempt, one.chunk, one.offset, one.length) for key, one in found] == [
        (0, ATTEMPT, 4, 0, 300),
        (7, ATTEMPT, 4, 300, 262_144),
        (8, ATTEMPT, 4, 262_444, 65),
    ]
    assert examples.TRAILER.data_length == 262_509


DECODERS: dict[str, tuple[Callable[[bytes, str], object], Callable[..., bytes]]] = {
    "leaf": (decode_node, encode_node),
    "inner": (decode_node, encode_node),
    "trailer": (decode_trailer, encode_trailer),
    "remap": (decode_remap, encode_remap),
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_altered_byte_is_refused_or_is_all_there_is_to_another_value(name: str) -> None:
    """So no byte means nothing, and two bodies never mean the same."""
    decode, encode = DECODERS[name]
    body = examples.BODIES[name]
    whole = decode(body, "object-1")
    for position in range(len(body)):
        for value in {body[position] ^ 1, body[position] ^ 0x80, 0, 255} - {body[position]}:
            altered = body[:position] + bytes([value]) + body[position + 1 :]
            try:
                found = decode(altered, "object-1")
            except BlockferryError as error:
                assert error.code is Code.CORRUPT_STATE and "object-1" in error.line()  # noqa: PT017
            else:
                assert found != whole
                # An attempt that was altered may come earlier in the order of its first use; the values stand.
                assert decode(encode(found), "object-1") == found


@pytest.mark.parametrize("name", DECODERS)
def test_bodies_that_are_cut_or_longer_are_refused(name: str) -> None:
    decode, _ = DECODERS[name]
    body = examples.BODIES[name]
    for altered in (*(body[:length] for length in range(len(body))), body + b"\0"):
        with refused():
            decode(altered, "object-1")


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_noise_is_refused(data: bytes) -> None:
    for decode, _ in DECODERS.values():
        try:
            decode(data, "object-1")
        except BlockferryError as error:
            assert error.code is Code.CORRUPT_STATE  # noqa: PT017


ENTRY = examples.LEAF.items[0]
NODES: list[tuple[str, Node]] = [
    ("no entries", Leaf([], [])),
    ("too many", Leaf(range(MAX_ENTRIES + 1), [ENTRY] * (MAX_ENTRIES + 1))),
    ("a level too high", Inner(8, [1], [examples.INNER.items[0]])),
    ("a block twice", Leaf([1, 1], [ENTRY, ENTRY])),
    ("a block past all volumes", Leaf([MAX_BLOCKS], [ENTRY])),
    ("no length", Leaf([1], [ENTRY._replace(length=0)])),
    ("past the end of its chunk", Leaf([1], [ENTRY._replace(offset=CHUNK_SIZE, length=1)])),
    ("an unknown codec", Leaf([1], [ENTRY._replace(codec=2)])),
    ("an empty subtree", Inner(1, [1], [Child(NodeRef(ATTEMPT, 0, 0, 1), 0)])),
]


@pytest.mark.parametrize("node", [node for _, node in NODES], ids=[name for name, _ in NODES])
def test_nodes_that_cannot_be_are_refused(node: Node) -> None:
    with refused():
        decode_node(encode_node(node), "object-1")


def test_attempts_are_named_once_and_all_are_used_by_index() -> None:
    body = bytearray(encode_node(Leaf([1, 2], [ENTRY, ENTRY._replace(attempt=EARLIER)])))
    with refused():
        decode_node(body[:8] + ATTEMPT * 2 + body[40:], "object-1")
    indexes = 8 + 32 + 16
    assert struct.unpack_from("<2H", body, indexes) == (0, 1)
    struct.pack_into("<2H", body, indexes, 0, 2)
    with refused():
        decode_node(body, "object-1")


T = examples.TRAILER
TRAILERS: list[tuple[str, Trailer]] = [
    ("a base without an attempt", dataclasses.replace(T, base_attempt=bytes(16))),
    ("an attempt without a base", dataclasses.replace(T, base=0)),
    ("blocks that descend", dataclasses.replace(T, keys=[0, 8, 8])),
    ("no length", dataclasses.replace(T, lengths=[1, 0, 1])),
    ("longer than a chunk", dataclasses.replace(T, lengths=[CHUNK_SIZE, 1, 1])),
    ("an unknown codec", dataclasses.replace(T, codecs=[0, 0, 9])),
    ("an empty hole", dataclasses.replace(T, holes=[(1, 0)])),
    ("holes that overlap", dataclasses.replace(T, holes=[(1, 2), (2, 1)])),
    ("kept blocks that descend", dataclasses.replace(T, kept=[Kept(5, 1, 0), Kept(1, 1, 0)])),
    ("a hole past all volumes", dataclasses.replace(T, holes=[(MAX_BLOCKS, 1)])),
]


@pytest.mark.parametrize("trailer", [trailer for _, trailer in TRAILERS], ids=[name for name, _ in TRAILERS])
def test_trailers_that_cannot_be_are_refused(trailer: Trailer) -> None:
    with refused():
        decode_trailer(encode_trailer(trailer), "object-1")


def test_trailers_with_too_many_blocks_are_refused() -> None:
    many = MAX_CHUNK_BLOCKS + 1
    with refused():
        decode_trailer(
            encode_trailer(
                dataclasses.replace(
                    T, keys=list(range(many)), lengths=[1] * many, codecs=[0] * many, digests=[bytes(32)] * many
                )
            ),
            "object-1",
        )


def test_moves_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = examples.MOVES[:2]
    for moves in ([], [two, one], [one, one], [one._replace(new_length=0)], [one._replace(new_codec=2)]):
        with refused():
            decode_remap(encode_remap(moves), "object-1")
    monkeypatch.setattr(columns, "MAX_MOVES", 1)
    with refused():
        decode_remap(encode_remap([one, two]), "object-1")
