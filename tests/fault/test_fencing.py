"""Fencing while the disk stands still, in one process so that every instant can be chosen.

Proves that OpenSession answers only when writes in flight have drained, that changes which had arrived but were not yet
applied are refused then, and that digests and maps taken while regions change are never remembered wrongly.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from blockferry.common import disk
from blockferry.common.digests import digest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import AllocationMap, Geometry
from blockferry.common.volumes import ImageVolume
from blockferry.server import points as points_module
from blockferry.server import replica as replica_module
from blockferry.server.session import State
from blockferry.v1 import replication_pb2 as pb

from tests.fault.local import Clock, Local, stalled
from tests.fault.raw import REGION, change_message, write_request
from tests.images import noise

SIZE = 8 * REGION
LEASE = 60.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (replica_module, points_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
async def local(pool_root: Path, tmp_path: Path, clock: Clock) -> AsyncIterator[Local]:
    local = await Local.start(pool_root / tmp_path.name, lease=LEASE)
    yield local
    await local.stop()


async def _settle() -> None:
    """Give every task that can run the time to do so."""
    for _ in range(20):
        await asyncio.sleep(0.005)


async def test_a_successor_waits_for_writes_in_flight(
    local: Local, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie = (await local.open("v", SIZE)).session
    with stalled(monkeypatch, "pwrite") as stall:
        writing = asyncio.create_task(local.write(zombie, 0, noise(1, REGION)))
        await stall.wait()
        clock.now += LEASE
        opening = asyncio.create_task(local.open("v", SIZE))
        await _settle()
        late = asyncio.create_task(local.write(zombie, REGION, noise(2, REGION)))
        await _settle()
        assert not writing.done() and not opening.done() and not late.done()
        assert local.replica("v").store.session.epoch == zombie.epoch
        stall.go()
        assert (await writing).bytes_written == REGION
        successor = (await opening).session
        with pytest.raises(BlockferryError) as caught:
            await late
    assert caught.value.code is Code.STALE_EPOCH
    key = local.replica("v").store.identity.key
    found, _ = await local.digests(successor, [(0, 2)])
    assert found == digest(noise(1, REGION), key) + digest(bytes(REGION), key)


async def test_changes_that_arrived_but_were_not_applied_are_refused(
    local: Local, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked at the moment of writing, not on receipt."""
    zombie = (await local.open("v", SIZE)).session
    messages = [
        change_message(number + 1, [write_request(number * REGION, noise(number, REGION))], session=zombie)
        for number in range(8)
    ]
    with stalled(monkeypatch, "pwrite") as stall:
        streaming = asyncio.create_task(local.apply(messages))
        await stall.wait()
        await _settle()
        clock.now += LEASE
        opening = asyncio.create_task(local.open("v", SIZE))
        await _settle()
        assert not opening.done()
        stall.go()
        successor = (await opening).session
        with pytest.raises(BlockferryError) as caught:
            await streaming
    assert caught.value.code is Code.STALE_EPOCH
    key = local.replica("v").store.identity.key
    found, _ = await local.digests(successor, [(0, 8)])
    assert found == digest(noise(0, REGION), key) + digest(bytes(REGION), key) * 7


@pytest.mark.parametrize("ending", ["commit", "abort", "shutdown"])
async def test_whatever_ends_a_session_waits_for_writes_in_flight(
    pool_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    local = await Local.start(pool_root / tmp_path.name)
    session = (await local.open("v", SIZE)).session
    with stalled(monkeypatch, "pwrite") as stall:
        writing = asyncio.create_task(local.write(session, 0, noise(1, REGION)))
        await stall.wait()
        match ending:
            case "commit":
                end: asyncio.Task[Any] = asyncio.create_task(local.commit("v", session, bytes(16)))
            case "abort":
                end = asyncio.create_task(local.abort(session, discard=True))
            case _:
                end = asyncio.create_task(local.stop())
        await _settle()
        assert not end.done()
        stall.go()
        await writing
        await end
    if ending == "commit":
        assert await local.read("v", 1, 0, REGION) == noise(1, REGION)
    if ending != "shutdown":
        await local.stop()


def _partial(session: pb.SessionRef, region: int, data: bytes) -> pb.WriteRegionRequest:
    """Changes the start of a region and says nothing about the rest."""
    return pb.WriteRegionRequest(
        session=session,
        offset=region * REGION,
        length=REGION,
        data=data,
        writes=[pb.Extent(offset=0, length=len(data))],
    )


async def test_digests_taken_during_a_write_are_not_remembered(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    session = (await local.open("v", SIZE)).session
    await local.write(session, 0, noise(1, REGION))
    with stalled(monkeypatch, "pwrite") as stall:
        # Two writes: what the request says of the region leaves its content open, so only reading can tell it.
        writing = asyncio.create_task(local.change(_partial(session, 0, noise(2, 4096))))
        await stall.wait()
        before, _ = await local.digests(session, [(0, 1)])
        stall.go()
        await writing
    key = local.replica("v").store.identity.key
    assert before == digest(noise(1, REGION), key)
    after, _ = await local.digests(session, [(0, 1)])
    assert after == digest(noise(2, 4096) + noise(1, REGION)[4096:], key)


async def test_of_two_digests_at_once_each_hears_of_its_changes(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    session = (await local.open("v", SIZE)).session
    await local.write(session, 0, noise(1, REGION))
    await local.write(session, REGION, noise(1, REGION))
    await local.abort(session)
    # A session that goes on with what is there knows no digests.
    session = (await local.open("v", SIZE)).session
    read = ImageVolume._read_into
    started = {0: threading.Event(), REGION: threading.Event()}
    going = {0: threading.Event(), REGION: threading.Event()}

    def held(volume: ImageVolume, offset: int, buffer: memoryview) -> None:
        read(volume, offset, buffer)
        started[offset].set()
        assert going[offset].wait(60)

    monkeypatch.setattr(ImageVolume, "_read_into", held)
    first = asyncio.create_task(local.digests(session, [(0, 1)]))
    await asyncio.to_thread(started[0].wait, 30)
    second = asyncio.create_task(local.digests(session, [(1, 1)]))
    await asyncio.to_thread(started[REGION].wait, 30)
    going[REGION].set()
    await second
    await local.change(_partial(session, 0, noise(2, 4096)))
    going[0].set()
    await first
    found, _ = await local.digests(session, [(0, 1)])
    assert found == digest(noise(2, 4096) + noise(1, REGION)[4096:], local.replica("v").store.identity.key)


async def test_a_map_taken_during_a_write_proves_nothing_about_it(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of regions proven zero are inferred from what is written there. The map must not call a region zero that
    was written after it was looked at and before it was kept."""
    session = (await local.open("v", SIZE)).session
    looked, going = threading.Event(), threading.Event()
    look = ImageVolume._allocation

    def held(volume: ImageVolume, geometry: Geometry) -> AllocationMap:
        found = look(volume, geometry)
        looked.set()
        assert going.wait(60)
        return found

    monkeypatch.setattr(ImageVolume, "_allocation", held)
    mapping = asyncio.create_task(local.map(session))
    await asyncio.to_thread(looked.wait, 30)
    await local.write(session, 0, noise(1, REGION))
    going.set()
    assert await mapping == set()
    await local.change(_partial(session, 0, noise(2, 4096)))
    key = local.replica("v").store.identity.key
    found, _ = await local.digests(session, [(0, 1)])
    assert found == digest(noise(2, 4096) + noise(1, REGION)[4096:], key)


# --- clients that go away ---------------------------------------------------------------------------------------------


async def test_a_write_of_a_client_that_is_gone_is_still_waited_for(
    local: Local, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call is cancelled, but the thread that writes cannot be."""
    session = (await local.open("v", SIZE)).session
    with stalled(monkeypatch, "pwrite") as stall:
        streaming = asyncio.create_task(
            local.apply([change_message(1, [write_request(0, noise(1, REGION))], session=session)])
        )
        await stall.wait()
        clock.now += LEASE
        # A second impatient cancellation changes nothing.
        for _ in range(2):
            streaming.cancel()
            await _settle()
        opening = asyncio.create_task(local.open("v", SIZE))
        await _settle()
        assert not opening.done()
        stall.go()
        successor = (await opening).session
    found, _ = await local.digests(successor, [(0, 1)])
    assert found == digest(noise(1, REGION), local.replica("v").store.identity.key)


@pytest.mark.parametrize("at", ["fsync", "rename", "fsync_directory", "append"])
async def test_a_commit_whose_client_is_gone_happens_whole(
    local: Local, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    session = (await local.open("v", SIZE)).session
    await local.write(session, 0, noise(1, REGION))
    with stalled(monkeypatch, at) as stall:
        committing = asyncio.create_task(local.commit("v", session, bytes(16)))
        await stall.wait()
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await committing
        stall.go()
        # Asked again, as a client does whose answer was lost.
        assert (await local.commit("v", session, bytes(16))).generation == 1
    # The session's descriptor is that of the committed image by now: nobody may write through it.
    with pytest.raises(BlockferryError) as caught:
        await local.write(session, 0, noise(2, REGION))
    assert caught.value.code is Code.STALE_EPOCH
    assert await local.read("v", 1, 0, REGION) == noise(1, REGION)
    assert local.replica("v").state is State.CONSISTENT
    assert (await local.open("v", SIZE)).session.epoch == 2


async def test_a_session_whose_client_is_gone_before_it_opened_holds_nobody_up(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    await local.abort((await local.open("v", SIZE)).session)
    with stalled(monkeypatch, "fsync") as stall:
        opening = asyncio.create_task(local.open("v", SIZE))
        await stall.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        following = asyncio.create_task(local.open("v", SIZE))
        await _settle()
        assert not following.done()
        stall.go()
        assert (await following).session.epoch == 3


async def test_a_failed_flush_is_not_forgotten_with_its_client(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of a lost write once. If nobody listened, the next flush would vouch for what is gone."""
    first = (await local.open("v", SIZE)).session
    await local.commit("v", first, bytes(16))
    session = (await local.open("v", SIZE)).session
    with stalled(monkeypatch, "fsync") as stall:
        held = disk.fsync

        def told_once(fd: int) -> None:
            monkeypatch.setattr(disk, "fsync", lambda _: None)
            held(fd)
            raise OSError(errno.EIO, "told once")

        monkeypatch.setattr(disk, "fsync", told_once)
        streaming = asyncio.create_task(
            local.apply([change_message(1, [write_request(0, noise(1, REGION))], session=session, flush=True)])
        )
        await stall.wait()
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        stall.go()
        with pytest.raises(BlockferryError) as caught:
            await local.commit("v", session, b"x" * 16)
        assert caught.value.code is Code.IO_ERROR
    await local.abort(session)
    assert not local.replica("v").store.content.has_work()
    assert [point.number for point in await local.points("v")] == [1]
    assert local.replica("v").state is State.CONSISTENT
