"""Random pairs of images: whatever the two sides hold, a sync makes them equal and does no more than it has to.

Every example makes a replica from one random image and then syncs another one to it. The server is a process of its
own; the client is the library in this process, because hundreds of examples would spend their time starting
interpreters. The oracle knows only the images and the decision table.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blockferry.client.compare import Refiner
from blockferry.client.report import Progress
from blockferry.client.sync import SyncOptions, sync
from blockferry.common.address import Address
from blockferry.common.rpc import Connection
from blockferry.common.volumes import open_volume
from blockferry.v1 import replicas_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.filesystems import allocate_exactly
from tests.images import (
    BLOCK,
    KIB,
    MIB,
    Expected,
    Hole,
    Piece,
    Snapshot,
    Zeros,
    blocks_of,
    build,
    change,
    differing_blocks,
    expect,
    extents,
    noise,
)
from tests.support import Report, Server

EXAMPLES = 300
REGION_SIZES = (64 * KIB, 128 * KIB, 256 * KIB)
MOST_REGIONS = 12

_volumes = itertools.count(1)


class Client:
    """The client library, on one event loop for all examples: gRPC binds its channels to the first one it sees."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.loop = asyncio.new_event_loop()

    def sync(self, source: Path, volume: str, region_size: int, bytes_in_flight: int = 64 * MIB) -> Report:
        """Sync and return the report."""
        return self.loop.run_until_complete(self._sync(source, volume, region_size, bytes_in_flight))

    async def _sync(self, source: Path, volume: str, region_size: int, bytes_in_flight: int) -> Report:
        opened = await open_volume(str(source))
        try:
            options = SyncOptions(region_size=region_size, bytes_in_flight=bytes_in_flight)
            return await sync(opened, Address.parse(self.server.url(volume)), options, Progress())
        finally:
            await opened.close()

    def image(self, volume: str) -> Path:
        """Where the committed image is."""
        return Path(self.loop.run_until_complete(self._show(volume)).path)

    async def _show(self, volume: str) -> Any:
        connection = Connection(Address.parse(self.server.url(volume)))
        try:
            request = replicas_pb2.GetReplicaRequest(volume=volume)
            found = await connection.call("Replicas/GetReplica", request, replicas_pb2.GetReplicaResponse)
        finally:
            await connection.close()
        return found.replica


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    """The library, talking to the module's server."""
    allocate_exactly(server.pool)
    found = Client(server)
    yield found
    found.loop.close()


# --- random images --------------------------------------------------------------------------------------------------


def pieces_within(size: int) -> st.SearchStrategy[list[Piece]]:
    """Data, zeros as data and holes anywhere in an image, at block borders and across them, up to its very end."""

    def cut(drawn: tuple[int, int, str, int]) -> Piece:
        offset, length, kind, seed = drawn
        length = min(length, size - offset)
        if kind == "data":
            return offset, noise(seed, length)
        # A few seeds only, so that two images often hold the same bytes at the same place.
        return offset, Zeros(length) if kind == "zeros" else Hole(length)

    offsets = st.one_of(
        st.integers(0, size - 1),
        st.integers(0, (size - 1) // BLOCK).map(lambda block: block * BLOCK),
        st.just(max(0, size - 5000)),
    )
    lengths = st.one_of(
        st.sampled_from([1, BLOCK, 3 * BLOCK, 64 * KIB, 128 * KIB, size]), st.integers(1, min(size, 300 * KIB))
    )
    kinds = st.sampled_from(["data", "data", "zeros", "hole"])
    return st.lists(st.tuples(offsets, lengths, kinds, st.integers(0, 3)).map(cut), max_size=6)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, int, list[Piece], list[Piece], bool]:
    """(size, region size, pieces of the first image, pieces of the second, whether the second starts as the first)."""
    region_size = draw(st.sampled_from(REGION_SIZES))
    regions = draw(st.integers(1, MOST_REGIONS))
    odd = draw(st.one_of(st.just(0), st.sampled_from([1, 511, 512, 4095, 4097]), st.integers(0, region_size - 1)))
    size = max(1, regions * region_size - odd)
    return size, region_size, draw(pieces_within(size)), draw(pieces_within(size)), draw(st.booleans())


# --- what must hold -------------------------------------------------------------------------------------------------


def check(report: Report, expected: Expected, ours: Snapshot, theirs: Snapshot, region_size: int) -> None:
    """The report against the oracle."""
    moved = report["bytes"]
    assert report["regions"] == expected.regions
    assert report["results"] == expected.results
    assert sum(report["regions"].values()) == -(-len(ours.content) // region_size)
    assert sum(report["results"].values()) == report["regions"]["send"] + report["regions"]["compare"]
    assert moved["source_read"] == expected.source_read
    # Equal bytes are never rewritten, however the difference was found.
    assert moved["destination_written"] == expected.destination_written
    if entirely_different(ours, theirs, region_size) < Refiner.PATIENCE:
        assert moved["data_sent"] == expected.data_sent
        assert moved["unmapped"] == expected.unmapped
        assert moved["destination_read"] == expected.destination_read
    else:
        # Asking for block digests may have stopped: regions then travel whole, but never more than that.
        whole = expect(ours, theirs, region_size, sent_whole=range(1 << 32))
        assert expected.data_sent <= moved["data_sent"] <= whole.data_sent


def entirely_different(ours: Snapshot, theirs: Snapshot, region_size: int) -> int:
    """Number of regions allocated on both sides that have no block in common."""
    size = len(ours.content)
    found = 0
    for start in range(0, size, region_size):
        end = min(start + region_size, size)
        if ours.allocated(start, end) and theirs.allocated(start, end):
            blocks = -(-(end - start) // BLOCK)
            found += len(differing_blocks(ours.content[start:end], theirs.content[start:end])) == blocks
    return found


def check_image(image: Path, ours: Snapshot, theirs: Snapshot, region_size: int) -> None:
    """Byte equality, and holes wherever the destination had holes or an unmap made them."""
    after = Snapshot.of(image)
    assert after.content == ours.content
    size = len(ours.content)
    written = {
        block
        for block in differing_blocks(ours.content, theirs.content)
        if any(ours.content[block * BLOCK : (block + 1) * BLOCK])
    }
    assert blocks_of(after.data) <= blocks_of(theirs.data) | written
    for start in range(0, size, region_size):
        end = min(start + region_size, size)
        if not ours.allocated(start, end):
            assert after.allocated(start, end) == 0, f"no hole at {start}"


def run(client: Client, directory: Path, drawn: tuple[int, int, list[Piece], list[Piece], bool]) -> None:
    size, region_size, first, second, related = drawn
    volume = f"random-{next(_volumes)}"
    source = build(directory / f"{volume}.img", size, first)
    theirs = Snapshot.empty(size)
    for step in range(2):
        if step:
            if not related:
                build(source, size)
            change(source, second)
        ours = Snapshot.of(source)
        report = client.sync(source, volume, region_size)
        assert report["generation"] == step + 1
        check(report, expect(ours, theirs, region_size), ours, theirs, region_size)
        image = client.image(volume)
        check_image(image, ours, theirs, region_size)
        theirs = Snapshot.of(image)
    source.unlink()
    # The server never looks at this replica again; the space is wanted for the next examples.
    shutil.rmtree(client.server.pool / volume)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=pairs())
def test_random_pairs_become_equal_at_the_least_cost(
    client: Client, tmp_path: Path, drawn: tuple[int, int, list[Piece], list[Piece], bool]
) -> None:
    run(client, tmp_path, drawn)


# --- regions that differ entirely -----------------------------------------------------------------------------------


def test_where_everything_differs_asking_stops_and_equal_blocks_are_left_alone(
    client: Client, volume: str, tmp_path: Path
) -> None:
    """With one buffer batches follow one another: the first teaches, the second is sent whole, the third is asked
    about again. A batch is as large as the buffer, here 128 regions of 64 KiB."""
    region_size, batch = 64 * KIB, 8 * MIB
    source = build(tmp_path / "source.img", 3 * batch, [(0, noise("before", 3 * batch))])
    client.sync(source, volume, region_size)
    theirs = Snapshot.of(client.image(volume))
    # All of the first and third batch; of every region of the second only the last block, and in one of them a zero.
    change(source, [(0, noise("after", batch)), (2 * batch, noise("after too", batch))])
    last = region_size - BLOCK
    change(source, [(start + last, b"changed") for start in range(batch, 2 * batch, region_size)])
    change(source, [(batch, Zeros(BLOCK))])
    ours = Snapshot.of(source)

    report = client.sync(source, volume, region_size, bytes_in_flight=2 * batch)

    first, count = batch // region_size, batch // region_size
    expected = expect(ours, theirs, region_size, sent_whole=range(first, first + count))
    assert report["results"] == expected.results == {"zero": 0, "equal": 0, "changed": 3 * count}
    moved = {name: report["bytes"][name] for name in expected.bytes()}
    assert moved == expected.bytes()
    assert moved["data_sent"] == 3 * batch - BLOCK
    assert moved["destination_written"] == 2 * batch + count * BLOCK
    assert moved["unmapped"] == BLOCK
    image = client.image(volume)
    assert image.read_bytes() == ours.content
    assert extents(image) == [(0, batch), (batch + BLOCK, 2 * batch - BLOCK)]
