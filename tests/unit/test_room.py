"""Reserve and quota while sessions write: exactly what there is room for. The session fails, never the generation."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.server import commits
from blockferry.server import room as room_module
from blockferry.server.pool import Pool
from blockferry.server.room import Measured, ReplicaRoom, Room
from blockferry.server.space import LOOK_BYTES, Limits
from blockferry.server.writer import Session
from blockferry.v1 import replication_pb2 as pb

MIB = 1 << 20
REGION = 65536
SIZE = 8 * REGION


class Disk:
    """A file system of which a test says how much is free."""

    def __init__(self, free: int, reserve: int) -> None:
        self.free = free
        self.reserve = reserve
        self.looks = 0

    async def measure(self) -> Measured:
        self.looks += 1
        free = self.free
        await asyncio.sleep(0)
        return Measured(1 << 40, free, self.reserve)

    def under(self, room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let a room measure this."""
        monkeypatch.setattr(room, "measure", self.measure)


async def test_writers_at_the_same_time_share_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room("p", tmp_path, Limits())
    disk = Disk(free=17 * MIB, reserve=10 * MIB)
    disk.under(room, monkeypatch)
    writers = [ReplicaRoom(room, f"v{number}", tmp_path) for number in range(20)]

    async def write(one: ReplicaRoom) -> str:
        try:
            async with one.writing(MIB):
                await asyncio.sleep(0)
                disk.free -= MIB
                await asyncio.sleep(0)
        except BlockferryError as error:
            return error.line()
        return ""

    found = await asyncio.gather(*map(write, writers))
    assert found.count("") <= 7
    assert disk.free >= disk.reserve
    # What was refused because others were under way fits when they are done.
    for one in writers:
        await write(one)
    assert disk.free == disk.reserve
    line = await write(writers[0])
    assert "v0" in line and "pool p has 10.0 MiB free, of which 10.0 MiB are reserved" in line
    assert "start the server with a smaller --reserve" in line


async def test_one_looks_again_at_least_every_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room("p", tmp_path, Limits())
    disk = Disk(free=1 << 40, reserve=0)
    disk.under(room, monkeypatch)
    one = ReplicaRoom(room, "v", tmp_path)
    for _ in range(3 * LOOK_BYTES // (16 * MIB)):
        async with one.writing(16 * MIB):
            pass
    assert disk.looks == 3


async def test_a_quota_counts_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [3 * MIB]
    monkeypatch.setattr(room_module, "bytes_held", lambda directory, settled: held[0])
    one = ReplicaRoom(Room("p", tmp_path, Limits(reserve=0, quota=5 * MIB)), "v", tmp_path)
    await one.check_start()
    for _ in range(2):
        async with one.writing(MIB):
            held[0] += MIB
    with pytest.raises(BlockferryError, match=r"it holds 5.0 MiB .* and 5.0 MiB are its quota") as caught:
        async with one.writing(1):
            raise AssertionError("it must not get here")
    assert (caught.value.code, caught.value.volume) == (Code.OUT_OF_SPACE, "v")
    await one.check()
    held[0] += 1
    for check in (one.check, one.check_start):
        with pytest.raises(BlockferryError, match="quota"):
            await check()


# --- in a session -----------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    """An empty pool with a reserve."""
    opened = await Pool.open("main", tmp_path, 60.0, Retention(last=1), Limits(reserve=10 * MIB))
    yield opened
    await opened.close()


async def _session(pool: Pool) -> tuple[Session, pb.SessionRef]:
    replica = await pool.get_or_create("v", REGION)
    session = await replica.open_session(pb.OpenSessionRequest(volume="v", size=SIZE))
    return session, pb.SessionRef(session_id=session.session_id, epoch=session.epoch)


def _write(number: int) -> tuple[pb.WriteRegionRequest, memoryview]:
    data = bytes([number + 1]) * REGION
    request = pb.WriteRegionRequest(offset=number * REGION, length=REGION)
    request.writes.add(offset=0, length=REGION)
    return request, memoryview(data)


async def test_no_session_and_no_replica_below_the_reserve(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(free=10 * MIB - 1, reserve=10 * MIB)
    disk.under(pool.room, monkeypatch)
    with pytest.raises(BlockferryError, match="cannot create v: the file system of pool main") as caught:
        await pool.get_or_create("v", 0)
    assert caught.value.code is Code.OUT_OF_SPACE
    assert not (pool.path / "v").exists()
    disk.free += 1
    await _session(pool)
    replica = pool.get("v")
    disk.free -= 1
    epoch = replica.store.session.epoch
    with pytest.raises(BlockferryError, match="cannot open a session of v"):
        await replica.open_session(
            pb.OpenSessionRequest(volume="v", size=SIZE, resume_session_id=replica.store.session.session_id)
        )
    assert replica.store.session.epoch == epoch and replica.session is not None


async def test_a_write_that_would_break_the_reserve_fails_the_session(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(free=10 * MIB + 2 * REGION, reserve=10 * MIB)
    disk.under(pool.room, monkeypatch)
    session, ref = await _session(pool)
    replica = pool.get("v")
    await replica.write_regions([_write(0), _write(1)], ref)
    disk.free -= 2 * REGION
    with pytest.raises(BlockferryError, match="are reserved"):
        await replica.write_regions([_write(2)], ref)
    assert os.pread(session.volume._fd, 1, 2 * REGION) == b"\0"  # type: ignore[attr-defined]
    with pytest.raises(BlockferryError, match="are reserved"):
        await commits.commit([commits.Asked(replica, ref, bytes(16))])
    await replica.abort(ref, discard=False)
    assert not replica.store.content.has_work(), "its space was not given back"


async def test_a_checkpoint_notices_what_others_took(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(free=1 << 30, reserve=10 * MIB)
    disk.under(pool.room, monkeypatch)
    _, ref = await _session(pool)
    replica = pool.get("v")
    await replica.write_regions([_write(0)], ref)
    await replica.flush(ref)
    disk.free = 10 * MIB - 1
    with pytest.raises(BlockferryError, match=r"cannot go on with v: .* are reserved") as caught:
        await replica.flush(ref)
    assert caught.value.code is Code.OUT_OF_SPACE
    await replica.abort(ref, discard=False)
    assert not replica.store.content.has_work()
