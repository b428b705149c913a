"""Changes make the destination equal: every changed byte is sent or zeroed, and nothing else is touched."""

from __future__ import annotations

import os
from typing import cast

import pytest
from blockferry.client.transfer import _encode, _writes_and_zeros, _writes_of_nonzero
from blockferry.common.digests import digest, nonzero_extents
from blockferry.common.errors import BlockferryError, Code, first_of
from blockferry.common.framing import decode_request, encode_request
from blockferry.common.regions import BLOCK_SIZE, Geometry, Run
from blockferry.server import apply
from blockferry.v1 import replication_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.memory_volume import MemoryVolume

B = BLOCK_SIZE
REGION = 65536
KEY = bytes(range(32))

lengths = st.one_of(st.sampled_from([1, B - 1, B, B + 1, REGION - 1, REGION]), st.integers(1, REGION))


@st.composite
def sparse_regions(draw: st.DrawFn) -> bytes:
    """A region, short or not, some of whose blocks are zero."""
    length = draw(lengths)
    region = bytearray(length)
    for block in draw(st.sets(st.integers(0, (length - 1) // B))):
        region[min(block * B + draw(st.integers(0, B - 1)), length - 1)] = draw(st.integers(1, 255))
    return bytes(region)


@st.composite
def runs_within(draw: st.DrawFn, length: int) -> list[Run]:
    """Maximal runs of blocks of a region of `length` bytes."""
    runs: list[Run] = []
    for block in sorted(draw(st.sets(st.integers(0, (length - 1) // B)))):
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


@given(st.data(), sparse_regions())
def test_changed_blocks_fall_into_those_with_data_and_those_that_became_zero(
    data: st.DataObject, region: bytes
) -> None:
    runs = data.draw(runs_within(len(region)))
    writes, zeros = _writes_and_zeros(memoryview(region), runs)
    for extents in (writes, zeros):
        assert all(length > 0 and start % B == 0 for start, length in extents)
        assert extents == sorted(extents)
    for start, length in writes:
        assert all(any(region[at : at + B]) for at in range(start, start + length, B))
    assert not any(any(region[start : start + length]) for start, length in zeros)
    covered = sorted(at for start, length in [*writes, *zeros] for at in range(start, start + length))
    assert covered == [at for first, count in runs for at in range(first * B, min((first + count) * B, len(region)))]


@pytest.mark.parametrize("known", [False, True])
@given(st.lists(sparse_regions(), max_size=4))
def test_regions_of_zeros_are_not_written_and_others_without_their_zeros(known: bool, regions: list[bytes]) -> None:
    # Where the source has no data the buffer holds whatever its last user left.
    buffer = bytearray(b"\xaa" if known else b"\0") * sum(map(len, regions))
    extents: list[Run] = []
    placed, position = [], 0
    for number, region in enumerate(regions):
        for start, length in nonzero_extents(memoryview(region)):
            buffer[position + start : position + start + length] = region[start : start + length]
            extents.append((position + start, length))
        placed.append((number * REGION, memoryview(buffer)[position : position + len(region)]))
        position += len(region)
    found = _writes_of_nonzero(placed, extents if known else [(0, len(buffer))])
    placed = [(number * REGION, memoryview(region)) for number, region in enumerate(regions)]
    assert list(found) == [offset for offset, region in placed if any(region)]
    for offset, change in found.items():
        _, (arrived,) = decode_request(encode_request(pb.ApplyChangesRequest(), [change]))
        request, data = arrived.request, arrived.data
        assert isinstance(request, pb.WriteRegionRequest)
        region = regions[offset // REGION]
        assert (request.offset, request.length, request.uncompared) == (offset, len(region), False)
        assert list(request.zeros) == []
        rebuilt = bytearray(len(region))
        position = 0
        for extent in request.writes:
            rebuilt[extent.offset : extent.offset + extent.length] = data[position : position + extent.length]
            position += extent.length
        assert rebuilt == region
        assert change.payload == len(data) == sum(
            len(region[at : at + B]) for at in range(0, len(region), B) if any(region[at : at + B])
        )  # fmt: skip


@pytest.mark.parametrize("uncompared", [False, True])
@given(ours=sparse_regions(), seed=st.binary(min_size=1, max_size=16))
async def test_a_change_makes_the_destination_equal_and_sends_only_what_differs(
    ours: bytes, seed: bytes, uncompared: bool
) -> None:
    length = len(ours)
    theirs = bytearray(ours)
    for number, value in enumerate(seed):
        block = number % (-(-length // B))
        if value % 3 == 0:
            theirs[block * B] ^= value or 1
        elif value % 3 == 1:
            theirs[block * B : (block + 1) * B] = bytes(len(theirs[block * B : (block + 1) * B]))
    size = REGION + length
    volume = MemoryVolume(os.urandom(REGION) + bytes(theirs))
    before = bytes(volume.data[:REGION])

    differing = [number for number in range(-(-length // B)) if ours[number * B :][:B] != theirs[number * B :][:B]]
    runs = [(0, -(-length // B))] if uncompared else [(number, 1) for number in differing]
    change = _encode((REGION, memoryview(ours)), runs, digest(ours, KEY), uncompared=uncompared)
    message = encode_request(pb.ApplyChangesRequest(sequence=1), [change])
    _, (arrived,) = decode_request(message)
    request = arrived.request
    assert isinstance(request, pb.WriteRegionRequest)
    apply.check_write("db", Geometry(size, REGION), request, len(arrived.data))
    applied = apply.Write(request, arrived.data, was_zero=False)
    await apply.write_regions(volume, KEY, [applied])
    result = applied.result

    assert volume.data == before + ours
    assert not result.mismatch
    assert result.written == sum(len(ours[number * B :][:B]) for number in differing if any(ours[number * B :][:B]))
    if not uncompared:
        assert change.payload == result.written


def test_the_first_of_several_failures_is_reported() -> None:
    first, second = BlockferryError(Code.IO_ERROR, "first"), BlockferryError(Code.INTERNAL, "second")
    assert first_of(BaseExceptionGroup("", [first, second])) is first
    nested: BaseExceptionGroup[Exception] = BaseExceptionGroup("", [ExceptionGroup("", [second]), first])
    assert first_of(cast("BaseExceptionGroup[BlockferryError]", nested)) is second
