"""Digests that are learned while regions change: a reader remembers nothing that changed while it read, whoever else
reads the same regions at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from blockferry.common.digests import digest
from blockferry.common.regions import Run
from blockferry.common.retention import Retention
from blockferry.server.replica import Replica
from blockferry.server.store import Store
from blockferry.v1 import replication_pb2 as pb

REGION = 64 * 1024


@pytest.mark.parametrize("finish", [(1, 0), (0, 1)], ids=["last-first", "first-first"])
async def test_a_reader_that_ends_leaves_the_others_watching(tmp_path: Path, finish: tuple[int, int]) -> None:
    store = Store.create(tmp_path / "v", REGION, clones=False)
    replica = Replica("v", "pool", store, 60.0, Retention(last=1))
    session = await replica.open_session(pb.OpenSessionRequest(volume="v", size=REGION))
    ref = pb.SessionRef(session_id=session.session_id, epoch=session.epoch)
    gates = [asyncio.Event(), asyncio.Event()]
    both_read = asyncio.Event()
    reading = 0
    real = session.volume.read_digests

    async def slow(piece_size: int, pieces: Sequence[Run], key: bytes, region_size: int) -> tuple[bytes, int]:
        nonlocal reading
        number, reading = reading, reading + 1
        found = await real(piece_size, pieces, key, region_size)
        if reading == len(gates):
            both_read.set()
        if number < len(gates):
            await gates[number].wait()
        return found

    session.volume.read_digests = slow  # type: ignore[method-assign]
    readers = [asyncio.create_task(replica.session_digests(ref, REGION, [(0, 1)], fresh=True)) for _ in gates]
    await asyncio.wait_for(both_read.wait(), 30)
    gates[finish[0]].set()
    await readers[finish[0]]

    data = b"x" * REGION
    change = pb.WriteRegionRequest(offset=0, length=REGION, writes=[pb.Extent(offset=0, length=REGION)])
    key = store.identity.key
    await replica.write_regions([(change, memoryview(data))], ref)
    session.digests.forget(0)
    gates[finish[1]].set()
    found, _ = await readers[finish[1]]
    assert found == digest(data, key)
    assert session.digests.get(0) in (None, digest(data, key))
    assert session.racing == []
    await replica.close()


async def test_who_stops_watching_stops_for_itself_alone(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "v", REGION, clones=False)
    replica = Replica("v", "pool", store, 60.0, Retention(last=1))
    session = await replica.open_session(pb.OpenSessionRequest(volume="v", size=4 * REGION))
    with session.watching() as first:
        with session.watching() as second:
            pass
        session.change(1, 2)
        with session.watching() as third:
            session.change(3, 1)
    session.change(0, 1)
    assert (set(first), set(second), set(third)) == ({1, 2, 3}, set(), {3})
    await replica.close()
