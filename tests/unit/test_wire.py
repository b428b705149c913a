"""Maps survive the wire in streams of bounded messages, and a stream that breaks the rules is a protocol error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from blockferry.common.wire import RUNS_PER_MESSAGE, map_from_messages, map_to_messages, runs_from_wire, runs_to_wire
from blockferry.v1 import replication_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

REGION = 65536


async def stream(messages: Iterable[pb.GetAllocationMapResponse]) -> AsyncIterator[pb.GetAllocationMapResponse]:
    for message in messages:
        yield pb.GetAllocationMapResponse.FromString(message.SerializeToString())


@given(st.sets(st.integers(0, 99)), st.sampled_from(Provenance), st.integers(0, REGION - 1))
async def test_a_map_survives_the_wire(members: set[int], provenance: Provenance, short: int) -> None:
    sent = AllocationMap(Geometry(100 * REGION - short, REGION), BitMap(members), provenance)
    header = pb.AllocationMapHeader(generation=7, commit_id=bytes(16))
    found, received = await map_from_messages(stream(map_to_messages(sent, header)))
    assert found == sent
    assert (received.generation, received.commit_id, received.size) == (7, bytes(16), sent.geometry.size)


@pytest.mark.parametrize(
    ("runs", "messages"),
    [
        (0, 1),
        (1, 1),
        (RUNS_PER_MESSAGE - 1, 1),
        (RUNS_PER_MESSAGE, 1),
        (RUNS_PER_MESSAGE + 1, 2),
        (3 * RUNS_PER_MESSAGE, 3),
    ],
)
async def test_a_fragmented_map_is_cut_into_messages(runs: int, messages: int) -> None:
    regions = BitMap(range(0, 2 * runs, 2))
    sent = AllocationMap(Geometry(max(2 * runs, 1) * REGION, REGION), regions, Provenance.EXACT)
    parts = list(map_to_messages(sent, pb.AllocationMapHeader()))
    assert len(parts) == messages
    assert [part.HasField("header") for part in parts] == [True] + [False] * (messages - 1)
    assert all(part.ByteSize() < 100 * 1024 for part in parts)
    found, _ = await map_from_messages(stream(parts))
    assert found == sent


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=5))
def test_runs_keep_their_numbers(runs: list[tuple[int, int]]) -> None:
    assert list(runs_from_wire(runs_to_wire(runs))) == runs


def message(
    *runs: tuple[int, int],
    provenance: pb.Provenance = pb.PROVENANCE_EXACT,
    size: int = 10 * REGION,
    region: int = REGION,
) -> pb.GetAllocationMapResponse:
    header = pb.AllocationMapHeader(provenance=provenance, size=size, region_size=region)
    return pb.GetAllocationMapResponse(header=header, allocated=runs_to_wire(runs))


def tail(*runs: tuple[int, int]) -> pb.GetAllocationMapResponse:
    return pb.GetAllocationMapResponse(allocated=runs_to_wire(runs))


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([], id="empty stream"),
        pytest.param([tail((0, 1))], id="no header"),
        pytest.param([tail(), message((0, 1))], id="header late"),
        pytest.param([message(provenance=pb.PROVENANCE_UNSPECIFIED)], id="no provenance"),
        pytest.param([message((0, 0))], id="empty run"),
        pytest.param([message((9, 2))], id="past the end"),
        pytest.param([message((5, 1)), tail((5, 1))], id="overlap across messages"),
        pytest.param([message((5, 1)), tail((4, 1))], id="out of order across messages"),
        pytest.param([message(size=0)], id="volume without size"),
        pytest.param([message(size=2**64 - 1)], id="volume too large"),
        pytest.param([message(region=REGION + 1)], id="region size no power of two"),
    ],
)
async def test_a_stream_that_breaks_the_rules_is_refused(messages: list[pb.GetAllocationMapResponse]) -> None:
    with pytest.raises(BlockferryError) as caught:
        await map_from_messages(stream(messages))
    assert caught.value.code is Code.PROTOCOL
