"""One change on the server: bad requests change nothing, equal bytes are not written again, every count is exact."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from blockferry.common import disk, linux
from blockferry.common.digests import Data, digest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE, Geometry
from blockferry.common.volumes import ImageVolume, Volume
from blockferry.server import apply
from blockferry.v1 import replication_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.memory_volume import MemoryVolume

KEY = bytes(range(32))
REGION = 65536
TAIL = 5000
SIZE = 4 * REGION + TAIL
GEOMETRY = Geometry(SIZE, REGION)
B = BLOCK_SIZE

Extents = list[tuple[int, int]]


def write_request(
    offset: int = 0,
    length: int = REGION,
    *,
    writes: Extents | None = None,
    zeros: Extents | None = None,
    data: bytes = b"",
    digest: bytes = b"",
    uncompared: bool = False,
) -> pb.WriteRegionRequest:
    return pb.WriteRegionRequest(
        offset=offset,
        length=length,
        writes=[pb.Extent(offset=start, length=size) for start, size in writes or []],
        zeros=[pb.Extent(offset=start, length=size) for start, size in zeros or []],
        data=data,
        digest=digest,
        uncompared=uncompared,
    )


def check(request: pb.WriteRegionRequest) -> None:
    apply.check_write("db", GEOMETRY, request, len(request.data))


async def write(volume: Volume, request: pb.WriteRegionRequest, *, was_zero: bool = False) -> apply.Result:
    change = apply.Write(request, memoryview(request.data), was_zero)
    await apply.write_regions(volume, KEY, [change])
    return change.result


# --- what is refused --------------------------------------------------------------------------------------------

BAD_UNMAPS = [
    pytest.param(0, 0, id="length 0"),
    pytest.param(REGION, 0, id="length 0 inside"),
    pytest.param(0, 2**63, id="length 2**63"),
    pytest.param(0, 2**64 - 1, id="length 2**64-1"),
    pytest.param(2**64 - 1, 2, id="wrapping round"),
    pytest.param(2**63, 2**63, id="both huge"),
    pytest.param(2**64 - REGION, REGION, id="wrapping to 0"),
    pytest.param(SIZE, REGION, id="starts at the end"),
    pytest.param(5 * REGION, REGION, id="starts past the end"),
    pytest.param(4 * REGION, REGION, id="ends past the end"),
    pytest.param(4 * REGION, TAIL + 1, id="ends one past the end"),
    pytest.param(4 * REGION, TAIL - 1, id="ends one before the end"),
    pytest.param(1, REGION, id="offset unaligned"),
    pytest.param(B, REGION, id="offset aligned to blocks only"),
    pytest.param(SIZE - 1, 1, id="last byte"),
    pytest.param(0, B, id="length aligned to blocks only"),
    pytest.param(0, REGION - 1, id="length unaligned"),
]


@pytest.mark.parametrize(("offset", "length"), BAD_UNMAPS)
def test_a_bad_unmap_is_refused(offset: int, length: int) -> None:
    with pytest.raises(BlockferryError) as caught:
        apply.check_unmap("db", GEOMETRY, pb.UnmapRegionRequest(offset=offset, length=length))
    error = caught.value
    assert (error.code, error.volume, error.offset, error.length) == (Code.INVALID_ARGUMENT, "db", offset, length)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, REGION), (0, 4 * REGION), (0, SIZE), (3 * REGION, REGION), (3 * REGION, REGION + TAIL), (4 * REGION, TAIL)],
)
def test_an_unmap_of_whole_regions_is_accepted(offset: int, length: int) -> None:
    apply.check_unmap("db", GEOMETRY, pb.UnmapRegionRequest(offset=offset, length=length))


BAD_WRITES = [
    pytest.param(write_request(SIZE), id="offset at the end, unaligned"),
    pytest.param(write_request(5 * REGION), id="offset past the end"),
    pytest.param(write_request(2**63), id="offset 2**63"),
    pytest.param(write_request(2**64 - REGION), id="offset wrapping to 0"),
    pytest.param(write_request(1), id="offset unaligned"),
    pytest.param(write_request(B), id="offset aligned to blocks only"),
    pytest.param(write_request(0, 0), id="length 0"),
    pytest.param(write_request(0, REGION - 1), id="length too short"),
    pytest.param(write_request(0, 2 * REGION), id="two regions"),
    pytest.param(write_request(0, 2**63), id="length 2**63"),
    pytest.param(write_request(4 * REGION, REGION), id="last region with a full length"),
    pytest.param(write_request(4 * REGION, TAIL + 1), id="last region one too long"),
    pytest.param(write_request(0, TAIL), id="first region with the last one's length"),
    pytest.param(write_request(data=b"x"), id="data without extents"),
    pytest.param(write_request(writes=[(0, B)]), id="extents without data"),
    pytest.param(write_request(writes=[(0, B)], data=bytes(B - 1)), id="data too short"),
    pytest.param(write_request(writes=[(0, B)], data=bytes(B + 1)), id="data too long"),
    pytest.param(write_request(zeros=[(0, B)], data=bytes(B)), id="data for zeros"),
    pytest.param(write_request(writes=[(0, 0)]), id="empty written extent"),
    pytest.param(write_request(writes=[(0, 1), (1, 0), (1, 1)], data=b"xx"), id="empty extent between"),
    pytest.param(write_request(zeros=[(B, 0)]), id="empty zeroed extent"),
    pytest.param(write_request(writes=[(0, B), (B - 1, B)], data=bytes(2 * B)), id="written extents overlap"),
    pytest.param(write_request(writes=[(0, B), (0, B)], data=bytes(2 * B)), id="written twice"),
    pytest.param(write_request(writes=[(B, B), (0, B)], data=bytes(2 * B)), id="written out of order"),
    pytest.param(write_request(zeros=[(0, 2 * B), (B, B)]), id="zeroed extents overlap"),
    pytest.param(write_request(zeros=[(B, B), (0, B)]), id="zeroed out of order"),
    pytest.param(write_request(writes=[(REGION - 1, 2)], data=b"xx"), id="written past the region"),
    pytest.param(write_request(writes=[(REGION, 1)], data=b"x"), id="written behind the region"),
    pytest.param(write_request(writes=[(2**32 - 1, 1)], data=b"x"), id="written far behind the region"),
    pytest.param(write_request(zeros=[(0, 2**32 - 1)]), id="zeroed 4 GiB"),
    pytest.param(write_request(zeros=[(1, REGION)]), id="zeroed past the region"),
    pytest.param(write_request(4 * REGION, TAIL, zeros=[(0, REGION)]), id="zeroed past the volume"),
    pytest.param(write_request(4 * REGION, TAIL, writes=[(TAIL, 1)], data=b"x"), id="written past the volume"),
    pytest.param(write_request(writes=[(0, B)], zeros=[(B - 1, 1)], data=bytes(B)), id="zeros inside a write"),
    pytest.param(write_request(writes=[(B, B)], zeros=[(0, 3 * B)], data=bytes(B)), id="a write inside zeros"),
    pytest.param(write_request(writes=[(0, B)], zeros=[(0, B)], data=bytes(B)), id="written and zeroed"),
    pytest.param(write_request(digest=bytes(15)), id="digest too short"),
    pytest.param(write_request(digest=bytes(17)), id="digest too long"),
    pytest.param(write_request(digest=bytes(8)), id="digest of a piece"),
]


@pytest.mark.parametrize("request_", BAD_WRITES)
def test_a_bad_write_is_refused(request_: pb.WriteRegionRequest) -> None:
    with pytest.raises(BlockferryError) as caught:
        check(request_)
    error = caught.value
    assert (error.code, error.volume) == (Code.INVALID_ARGUMENT, "db")
    assert (error.offset, error.length) == (request_.offset, request_.length)
    assert "nothing was changed" in error.next


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(write_request(), id="nothing to do"),
        pytest.param(write_request(digest=bytes(16)), id="only a check"),
        pytest.param(write_request(writes=[(0, REGION)], data=bytes(REGION)), id="whole region"),
        pytest.param(write_request(zeros=[(0, REGION)]), id="whole region zero"),
        pytest.param(write_request(writes=[(0, 1), (1, 1), (5, 3)], data=bytes(5)), id="adjacent and apart"),
        pytest.param(write_request(writes=[(B, B)], zeros=[(0, B), (2 * B, B)], data=bytes(B)), id="side by side"),
        pytest.param(write_request(4 * REGION, TAIL, writes=[(TAIL - 1, 1)], data=b"x"), id="last byte"),
    ],
)
def test_a_good_write_is_accepted(request_: pb.WriteRegionRequest) -> None:
    check(request_)


@given(
    st.one_of(st.integers(0, 6).map(REGION.__mul__), st.integers(0, 2**64 - 1)),
    st.one_of(st.sampled_from([REGION, TAIL]), st.integers(0, 2**64 - 1)),
    st.lists(st.tuples(st.integers(0, REGION + 9), st.integers(0, B)), max_size=3).map(sorted),
    st.lists(st.tuples(st.integers(0, REGION + 9), st.integers(0, B)), max_size=3).map(sorted),
)
async def test_whatever_is_accepted_stays_inside_its_region(
    offset: int, length: int, writes: Extents, zeros: Extents
) -> None:
    data = os.urandom(sum(size for _, size in writes))
    request = write_request(offset, length, writes=writes, zeros=zeros, data=data)
    volume = MemoryVolume(bytes(SIZE))
    try:
        check(request)
    except BlockferryError:
        return
    # The recording volume fails on any operation outside itself.
    result = await write(volume, request)
    assert result.written == len(data)
    assert all(offset <= start and start + size <= offset + length for _, start, size in volume.operations)


# --- what a write does ------------------------------------------------------------------------------------------


def patterned(size: int = SIZE) -> bytes:
    """Every block different, none zero."""
    return b"".join(bytes([1 + number % 255]) * B for number in range(-(-size // B)))[:size]


async def test_a_write_does_what_it_says_and_nothing_else() -> None:
    volume = MemoryVolume(patterned())
    request = write_request(REGION, writes=[(B, 2 * B), (8 * B, B)], zeros=[(4 * B, 2 * B)], data=b"n" * 3 * B)
    result = await write(volume, request)
    expected = bytearray(patterned())
    expected[REGION + B : REGION + 3 * B] = b"n" * 2 * B
    expected[REGION + 8 * B : REGION + 9 * B] = b"n" * B
    expected[REGION + 4 * B : REGION + 6 * B] = bytes(2 * B)
    assert volume.data == expected
    assert result == apply.Result(mismatch=False, written=3 * B, unmapped=2 * B, read=0)
    assert volume.operations == [
        ("write", REGION + B, 2 * B),
        ("write", REGION + 8 * B, B),
        ("unmap", REGION + 4 * B, 2 * B),
    ]


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(REGION, REGION), (4 * REGION, TAIL)])
async def test_the_digest_is_checked_after_the_change(offset: int, length: int, spoiled: bool) -> None:
    volume = MemoryVolume(patterned())
    wanted = bytearray(volume.data[offset : offset + length])
    wanted[:B] = b"n" * B
    if spoiled:
        volume.data[offset + length - 1] ^= 1
    request = write_request(offset, length, writes=[(0, B)], data=b"n" * B, digest=digest(wanted, KEY))
    result = await write(volume, request)
    holds = digest(volume.data[offset : offset + length], KEY)
    assert result == apply.Result(mismatch=spoiled, written=B, unmapped=0, read=length, digest=holds)
    assert volume.operations == [("write", offset, B), ("read", offset, length)]


async def test_a_digest_under_another_key_is_a_mismatch() -> None:
    volume = MemoryVolume(patterned())
    request = write_request(digest=digest(volume.data[:REGION], bytes(32)))
    assert (await write(volume, request)).mismatch


@pytest.mark.parametrize("uncompared", [False, True])
@pytest.mark.parametrize(
    ("was_zero", "writes", "zeros", "known"),
    [
        pytest.param(False, [(0, TAIL)], [], True, id="whole region"),
        pytest.param(False, [(0, 100), (100, TAIL - 100)], [], True, id="whole region in pieces"),
        pytest.param(False, [(7, 100)], [(0, 7), (107, TAIL - 107)], True, id="whole region with zeros"),
        pytest.param(False, [], [(0, TAIL)], True, id="whole region zero"),
        pytest.param(False, [(0, B)], [], False, id="part of a region with unknown rest"),
        pytest.param(False, [(0, B)], [(B, 1)], False, id="data and zeros with unknown rest"),
        pytest.param(False, [], [], False, id="nothing"),
        pytest.param(True, [(0, B)], [], True, id="part of a region that was zero"),
        pytest.param(True, [(5, 7), (4990, 10)], [(100, 7)], True, id="odd pieces of a region that was zero"),
        pytest.param(True, [], [], True, id="nothing in a region that was zero"),
    ],
)
async def test_the_digest_of_a_region_is_learnt_without_reading_and_is_true(
    was_zero: bool, writes: Extents, zeros: Extents, known: bool, uncompared: bool
) -> None:
    content = bytearray(patterned())
    if was_zero:
        content[4 * REGION :] = bytes(TAIL)
    volume = MemoryVolume(bytes(content))
    data = os.urandom(sum(size for _, size in writes))
    request = write_request(4 * REGION, TAIL, writes=writes, zeros=zeros, data=data, uncompared=uncompared)
    check(request)
    result = await write(volume, request, was_zero=was_zero)
    assert result.digest == (digest(volume.data[4 * REGION :], KEY) if known else None)
    assert result.read == (TAIL if uncompared else 0)


@pytest.mark.parametrize("given_digest", ["right", "wrong"])
async def test_a_whole_region_is_checked_against_what_came_and_not_read(given_digest: str) -> None:
    volume = MemoryVolume(patterned())
    data = os.urandom(REGION)
    wanted = digest(data if given_digest == "right" else bytes(REGION), KEY)
    result = await write(volume, write_request(REGION, writes=[(0, REGION)], data=data, digest=wanted))
    mismatch = given_digest == "wrong"
    assert result == apply.Result(mismatch=mismatch, written=REGION, read=0, digest=digest(data, KEY))
    assert volume.operations == [("write", REGION, REGION)]


async def test_changes_of_one_message_each_get_their_own_result() -> None:
    content = bytearray(patterned())
    content[2 * REGION : 3 * REGION] = bytes(REGION)
    volume = MemoryVolume(bytes(content))
    same, other = bytes(content[3 * REGION : 4 * REGION]), os.urandom(TAIL)
    requests = [
        write_request(0, writes=[(B, B)], zeros=[(0, B)], data=b"n" * B),
        write_request(2 * REGION, writes=[(0, 5)], data=b"hello"),
        write_request(3 * REGION, writes=[(0, REGION)], data=same, uncompared=True),
        write_request(4 * REGION, TAIL, writes=[(0, TAIL)], data=other, digest=bytes(16)),
        write_request(REGION),
    ]
    changes = [apply.Write(one, memoryview(one.data), one.offset == 2 * REGION) for one in requests]
    await apply.write_regions(volume, KEY, changes)
    content[: 2 * B] = bytes(B) + b"n" * B
    content[2 * REGION : 2 * REGION + 5] = b"hello"
    content[4 * REGION :] = other
    assert volume.data == content
    assert [change.result for change in changes] == [
        apply.Result(written=B, unmapped=B),
        apply.Result(written=5, digest=digest(content[2 * REGION : 3 * REGION], KEY)),
        apply.Result(read=REGION, digest=digest(same, KEY)),
        apply.Result(written=TAIL, mismatch=True, digest=digest(other, KEY)),
        apply.Result(),
    ]
    assert volume.of("write") == [(B, B), (2 * REGION, 5), (4 * REGION, TAIL)]


@st.composite
def regions_and_news(draw: st.DrawFn) -> tuple[int, bytes, bytes, Extents]:
    """(offset, what is there, what shall be there, extents to write) of one region, some blocks equal."""
    length = draw(st.sampled_from([REGION, TAIL]))
    offset = 4 * REGION if length == TAIL else draw(st.sampled_from([0, REGION]))
    present = bytearray(patterned(length))
    news = bytearray(present)
    for block in draw(st.sets(st.integers(0, (length - 1) // B))):
        place = min(block * B + draw(st.integers(0, B - 1)), length - 1)
        news[place] ^= draw(st.integers(1, 255))
    extents: Extents = []
    position = 0
    for gap, size in draw(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 30_000)), max_size=4)):
        start = position + gap
        if start < length:
            extents.append((start, min(size, length - start)))
        position = start + size
    return offset, bytes(present), bytes(news), extents


@given(regions_and_news())
async def test_an_uncompared_write_touches_only_blocks_that_differ(drawn: tuple[int, bytes, bytes, Extents]) -> None:
    offset, present, news, extents = drawn
    content = bytearray(SIZE)
    content[offset : offset + len(present)] = present
    volume = MemoryVolume(bytes(content))
    data = b"".join(news[start : start + size] for start, size in extents)
    request = write_request(offset, len(present), writes=extents, data=data, uncompared=True)
    check(request)
    result = await write(volume, request)

    differing: set[int] = set()
    for start, size in extents:
        for block in range(start // B, (start + size - 1) // B + 1):
            part = slice(max(start, block * B), min(start + size, (block + 1) * B))
            if present[part] != news[part]:
                differing.update(range(part.start, part.stop))
        content[offset + start : offset + start + size] = news[start : start + size]
    touched = [place for start, size in volume.of("write") for place in range(start - offset, start - offset + size)]
    assert volume.data == content
    assert len(touched) == len(set(touched)) == result.written
    assert set(touched) == differing
    assert volume.of("read") == [(offset, len(present))] and result.read == len(present)
    # Neighbouring blocks of an extent go in one write.
    assert len(volume.of("write")) <= len(differing) // B + 2 * len(extents)


async def test_an_uncompared_write_of_what_is_there_writes_nothing() -> None:
    volume = MemoryVolume(patterned())
    same = bytes(volume.data[REGION : 2 * REGION])
    request = write_request(REGION, writes=[(0, REGION)], data=same, digest=digest(same, KEY), uncompared=True)
    result = await write(volume, request)
    assert result == apply.Result(mismatch=False, written=0, unmapped=0, read=REGION, digest=digest(same, KEY))
    assert volume.operations == [("read", REGION, REGION)]


async def test_differing_neighbours_are_written_together() -> None:
    volume = MemoryVolume(patterned())
    news = bytearray(volume.data[:REGION])
    for block in (0, 1, 2, 7, 15):
        news[block * B] ^= 1
    request = write_request(writes=[(0, REGION)], data=bytes(news), uncompared=True)
    assert (await write(volume, request)).written == 5 * B
    assert volume.of("write") == [(0, 3 * B), (7 * B, B), (15 * B, B)]


# --- what an unmap does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeroing", ["punch-hole", "zero-range"])
async def test_where_the_disk_can_deallocate_nothing_is_read(zeroing: str) -> None:
    volume = MemoryVolume(patterned(), zeroing=zeroing)
    result = await apply.unmap_region(volume, pb.UnmapRegionRequest(offset=REGION, length=SIZE - REGION))
    assert result == apply.Result(unmapped=SIZE - REGION)
    assert volume.operations == [("unmap", REGION, SIZE - REGION)]
    assert volume.data == patterned()[:REGION] + bytes(SIZE - REGION)
    again = await apply.unmap_region(volume, pb.UnmapRegionRequest(offset=REGION, length=SIZE - REGION))
    assert again == apply.Result(unmapped=0)


@given(
    st.sets(st.integers(0, SIZE - 1), max_size=8),
    st.sampled_from([(0, SIZE), (0, REGION), (3 * REGION, REGION + TAIL)]),
)
async def test_where_zeros_must_be_written_zero_blocks_are_left_alone(
    places: set[int], extent: tuple[int, int]
) -> None:
    content = bytearray(SIZE)
    for place in places:
        content[place] = 7
    volume = MemoryVolume(bytes(content), zeroing="write")
    offset, length = extent
    result = await apply.unmap_region(volume, pb.UnmapRegionRequest(offset=offset, length=length))
    blocks = sorted({place // B for place in places if offset <= place < offset + length})
    touched = [place for start, size in volume.of("unmap") for place in range(start, start + size)]
    assert touched == [place for block in blocks for place in range(block * B, min((block + 1) * B, SIZE))]
    assert result == apply.Result(unmapped=len(touched), read=length)
    assert not any(volume.data[offset : offset + length])
    assert volume.data[:offset] == content[:offset] and volume.data[offset + length :] == content[offset + length :]


async def test_zeros_of_a_write_compare_first_where_they_must_be_written() -> None:
    content = bytearray(patterned())
    content[B : 3 * B] = bytes(2 * B)
    volume = MemoryVolume(bytes(content), zeroing="write")
    result = await write(volume, write_request(zeros=[(0, 4 * B)]))
    assert result == apply.Result(unmapped=2 * B, read=4 * B)
    assert volume.operations == [("read", 0, 4 * B), ("unmap", 0, B), ("unmap", 3 * B, B)]


@pytest.mark.parametrize("bulk", [False, True], ids=["unmap", "zeros of a write"])
async def test_the_first_unmap_of_a_disk_that_cannot_deallocate_leaves_zeros_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bulk: bool
) -> None:
    """Which way of zeroing works shows only when the first one is asked for: even that one compares before it writes
    (invariant 6)."""

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "injected")

    written: list[tuple[int, int]] = []
    real = disk.pwrite

    def pwrite(fd: int, data: Data, offset: int) -> int:
        written.append((offset, len(data)))
        return real(fd, data, offset)

    content = bytearray(4 * REGION)
    for region in (0, 2):
        content[region * REGION + B] = content[region * REGION + 3 * B + 7] = 1
    path = tmp_path / "image"
    # All of it is data on the disk, zeros too.
    path.write_bytes(content)
    volume = await ImageVolume.open(path, writable=True)
    monkeypatch.setattr(linux, "fallocate", refuse)
    monkeypatch.setattr(disk, "pwrite", pwrite)
    for region in (0, 2):
        offset, length = region * REGION, 2 * REGION
        if bulk:
            length = REGION - B
            result = await write(volume, write_request(offset, zeros=[(0, length)]))
        else:
            result = await apply.unmap_region(volume, pb.UnmapRegionRequest(offset=offset, length=length))
        assert written == [(offset + B, B), (offset + 3 * B, B)]
        assert result == apply.Result(unmapped=2 * B, read=length)
        assert volume.zeroing == "write"
        written.clear()
    await volume.close()
    assert path.read_bytes() == bytes(4 * REGION)


async def test_a_long_unmap_compares_in_bounded_pieces() -> None:
    size = 3 * apply.COMPARE_SIZE + 17
    volume = MemoryVolume(bytes(size), zeroing="write")
    result = await apply.unmap_region(volume, pb.UnmapRegionRequest(offset=0, length=size))
    assert result == apply.Result(read=size)
    assert [length for _, length in volume.of("read")] == [apply.COMPARE_SIZE] * 3 + [17]
    assert volume.of("unmap") == []


def test_results_add_up() -> None:
    message = pb.ChangeResult()
    apply.Result(written=1, unmapped=2, read=3).add_to(message)
    apply.Result(mismatch=True, written=10, unmapped=20, read=30).add_to(message)
    apply.Result().add_to(message)
    assert message == pb.ChangeResult(mismatch=True, bytes_written=11, bytes_unmapped=22, bytes_read=33)
