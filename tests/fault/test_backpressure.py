"""A destination whose disk stands still stops the sender, and nothing piles up in between.

The disk is a frozen file system under a real server, or a write that does not return in a server of the test's own
process, where every byte in flight can be counted. Proves the bounds of docs/design.md (32 MiB of changes at the
source, 64 MiB at the server for all streams together), that people are told, that everything goes on when the disk
does, that streams of a slow replica leave room for others, and that `received` and `durable` are two things.
"""

from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockferry.client import sync as sync_module
from blockferry.client.replica import ChangeStream
from blockferry.client.report import Progress
from blockferry.client.transfer import BYTES_IN_FLIGHT, MESSAGE_SIZE
from blockferry.common import disk as disk_module
from blockferry.common import rpc
from blockferry.common.address import Address
from blockferry.common.config import ClientLimits, LimitsConfig
from blockferry.common.volumes import open_volume
from blockferry.server import changes
from blockferry.server.limits import Limits
from blockferry.server.pools import Pools
from blockferry.server.replication import ReplicationService
from blockferry.v1 import replication_pb2 as pb

from tests.conftest import ServerFactory
from tests.fault.local import NO_CONTEXT, Local, served, stalled
from tests.fault.proxy import UP, Proxy, proxied
from tests.fault.raw import REGION, Raw, change_message, received, write_request
from tests.filesystems import Unavailable, mounted
from tests.images import KIB, MIB, build, noise
from tests.support import Server, until
from tests.terminal import on_terminal

CLIENT_BOUND = 32 * MIB
SERVER_BOUND = 64 * MIB

AROUND = 64 * KIB
"""Bytes that travel beside the changes: frames, headers, other calls."""

QUIET_SECONDS = 2.0
"""What has not moved for this long is taken to stand still."""


def test_the_bounds_are_those_of_the_code() -> None:
    assert (BYTES_IN_FLIGHT // 2, ClientLimits().bytes_in_flight) == (CLIENT_BOUND, SERVER_BOUND)


# --- a frozen file system ---------------------------------------------------------------------------------------------


class Disk:
    """A file system of its own that can be frozen: whoever writes to it waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._frozen = False
        self._lock = threading.Lock()

    def freeze(self) -> None:
        """What is written already is flushed; what comes now waits."""
        with self._lock:
            if not self._frozen:
                subprocess.run(["fsfreeze", "--freeze", str(self.path)], check=True)
                self._frozen = True

    def thaw(self) -> None:
        """Everything goes on."""
        with self._lock:
            if self._frozen:
                subprocess.run(["fsfreeze", "--unfreeze", str(self.path)], check=True)
                self._frozen = False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        with mounted("xfs", tmp_path, 1024 * MIB) as path:
            disk = Disk(path)
            try:
                yield disk
            finally:
                disk.thaw()
    except Unavailable as reason:
        pytest.skip(f"no file system to freeze: {reason}")


@pytest.fixture
def server(disk: Disk) -> Iterator[Server]:
    pool = disk.path / "pool"
    pool.mkdir()
    server = Server(pool).start()
    try:
        yield server
    finally:
        disk.thaw()
        server.stop()


def _stands_still(proxy: Proxy) -> int:
    """Wait until nothing passes upwards any more; the bytes that have."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        if proxy.passed[UP] != last:
            last, since = proxy.passed[UP], time.monotonic()
        time.sleep(0.05)
    return last


def _resident(pid: int) -> int:
    """Bytes of memory a process has of its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * KIB


def test_a_disk_that_stands_still_stops_the_source(disk: Disk, server: Server, volume: str, tmp_path: Path) -> None:
    size = 4 * CLIENT_BOUND
    source = build(tmp_path / "source", size, [(0, noise(1, size))])
    before = _resident(server.pid)
    with proxied(server.address) as proxy:

        def judge(way: str, passed: int, data: bytes) -> bool:
            # Data has begun to come, and not one message of it is whole: none is ever acknowledged.
            if way == UP and passed > 256 * KIB and not frozen:
                frozen.append(passed)
                disk.freeze()
            return True

        frozen: list[int] = []

        proxy.judge = judge
        with on_terminal("sync", source, f"{proxy.address}/{volume}") as terminal:
            until(lambda: proxy.passed[UP] > CLIENT_BOUND - MESSAGE_SIZE, "the source has sent what it may")
            for seconds in (3, 5):
                terminal.await_stall(seconds)
            assert CLIENT_BOUND - MESSAGE_SIZE < _stands_still(proxy) <= CLIENT_BOUND + AROUND
            assert _resident(server.pid) - before < 3 * CLIENT_BOUND
            assert terminal.process.poll() is None
            disk.thaw()
            assert terminal.finish()[0] == 0
        assert proxy.connections == 1
    assert server.show(volume)["generation"] == 1
    assert server.image(volume).read_bytes() == source.read_bytes()


def test_all_streams_together_stop_at_the_bound_of_the_server(disk: Disk, server: Server, volume: str) -> None:
    """Senders that keep to no bound of their own."""
    count, size = 3, SERVER_BOUND
    names = [f"{volume}-{number}" for number in range(count)]
    data = noise(1, MIB)
    ends: queue.Queue[int] = queue.Queue()
    before = _resident(server.pid)

    def send(raw: Raw, session: pb.SessionRef) -> None:
        messages = (
            change_message(number + 1, [write_request(number * MIB, data)], session=session)
            for number in range(size // MIB)
        )
        ends.put(raw.apply(messages)[-1].received)

    with proxied(server.address) as proxy, Raw(server.address) as looking:
        raws = [Raw(proxy.address) for _ in range(count)]
        try:
            sessions = [raw.open(name, size, region_size=MIB).session for raw, name in zip(raws, names, strict=True)]
            disk.freeze()
            for raw, session in zip(raws, sessions, strict=True):
                threading.Thread(target=send, args=(raw, session), daemon=True).start()
            until(lambda: proxy.passed[UP] > SERVER_BOUND - MIB, "the server has taken what it may")
            # Each stream has one more message that waits to be let in, and a window of HTTP/2, which is granted anew
            # when half of it is used up.
            assert _stands_still(proxy) <= SERVER_BOUND + count * (MIB + 2 * rpc.WINDOW)
            assert _resident(server.pid) - before < 2 * SERVER_BOUND
            assert ends.empty()
            # Looking needs no room among the changes.
            assert looking.show(names[0]).generation == 0
            disk.thaw()
            assert [ends.get(timeout=60) for _ in names] == [size // MIB] * count
            for name, session in zip(names, sessions, strict=True):
                assert looking.commit(name, session, os.urandom(16)).generation == 1
                assert looking.read(name, 1, size - MIB, MIB) == data
        finally:
            disk.thaw()
            for raw in raws:
                raw.__exit__()


# --- every byte counted -----------------------------------------------------------------------------------------------


@pytest.fixture
async def local(xfs_pool_root: Path, tmp_path: Path) -> AsyncIterator[Local]:
    local = await Local.start(xfs_pool_root / tmp_path.name)
    yield local
    await local.stop()


async def _until(condition: Any, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        await asyncio.sleep(0.01)


async def test_both_sides_count_their_bytes(
    local: Local, volume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * CLIENT_BOUND
    source = build(tmp_path / "source", size, [(0, noise(1, size))])
    streams: list[ChangeStream] = []

    class Watched(ChangeStream):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            streams.append(self)

    monkeypatch.setattr(sync_module, "ChangeStream", Watched)
    options = sync_module.SyncOptions(state_directory=tmp_path / "state")
    opened = await open_volume(str(source))
    progress = Progress()
    async with served(local) as address:
        syncing = asyncio.create_task(sync_module.sync(opened, Address.parse(f"{address}/{volume}"), options, progress))
        with stalled(monkeypatch, "pwrite") as stall:
            await stall.wait()
            (stream,) = streams
            await _until(lambda: stream.budget.used > CLIENT_BOUND - MESSAGE_SIZE, "the source has sent what it may")
            await _until(lambda: local.budget.used >= stream.budget.used, "all of it has arrived")
            await _until(lambda: progress.phases[-1].note().startswith("waiting for the destination for "), "told")
            assert stream.budget.used <= CLIENT_BOUND
            assert local.budget.used <= CLIENT_BOUND + AROUND
            assert not syncing.done()
        report = await syncing
    await opened.close()
    assert report["generation"] == 1
    assert progress.phases[-1].note() == ""
    assert stream.budget.most <= CLIENT_BOUND and local.budget.most <= CLIENT_BOUND + AROUND
    assert (stream.budget.used, local.budget.used) == (0, 0)
    image = local.replica(volume).path
    assert image is not None
    assert await asyncio.to_thread(image.read_bytes) == await asyncio.to_thread(source.read_bytes)


class SlowWrites:
    """Writes to files in `directories` wait for one `tick` each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directories: tuple[Path, ...]) -> None:
        self._ticks = threading.Semaphore(0)
        real = disk_module.pwrite

        def pwrite(fd: int, data: Any, offset: int) -> int:
            if Path(os.readlink(f"/proc/self/fd/{fd}")).parent in directories:
                assert self._ticks.acquire(timeout=60), "nobody let the disk go on"
            return real(fd, data, offset)

        monkeypatch.setattr(disk_module, "pwrite", pwrite)

    def tick(self) -> None:
        """Let one write go on."""
        self._ticks.release()

    def go(self) -> None:
        """Let all go on."""
        self._ticks.release(10_000)


async def test_a_fast_replica_gets_its_share_of_what_slow_ones_fill(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three streams whose disk is slow fill the server's bound; whoever comes then waits for its turn and no longer."""
    region, slow_messages, fast_messages = 4 * MIB, 20, 5
    names = ["slow-1", "slow-2", "slow-3", "fast"]
    lengths = dict(zip(names, (slow_messages, slow_messages, slow_messages, fast_messages), strict=True))
    sessions = {name: (await local.open(name, lengths[name] * region, region_size=region)).session for name in names}
    slow = SlowWrites(monkeypatch, tuple(local.pool.path / name for name in names[:3]))
    data = noise(1, region)
    taken, applied = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    weight = len(change_message(1, [write_request(0, data)]).SerializeToString())

    async def run(name: str) -> int:
        async def requests() -> AsyncIterator[bytes]:
            for number in range(lengths[name]):
                taken[name] += 1
                message = change_message(
                    number + 1, [write_request(number * region, data)], session=None if number else sessions[name]
                )
                yield message.SerializeToString()

        async for answer in local.replication.ApplyChanges(requests(), NO_CONTEXT):
            applied[name] = answer.received
        return applied[name]

    fits = SERVER_BOUND // weight
    slow_tasks = [asyncio.create_task(run(name)) for name in names[:3]]
    # Each of them holds one message more, which waits to be let in.
    await _until(lambda: sum(taken.values()) == fits + 3, "the slow streams fill the bound")
    assert local.budget.used > SERVER_BOUND - weight
    fast_task = asyncio.create_task(run("fast"))
    await _until(lambda: taken["fast"] == 1, "the fast stream waits behind them")
    ticks = 0

    def at_rest() -> bool:
        full = local.budget.used > SERVER_BOUND - weight and applied["fast"] == taken["fast"] - 1
        return fast_task.done() or (full and sum(applied[name] for name in names[:3]) == ticks)

    try:
        while not fast_task.done():
            slow.tick()
            ticks += 1
            await _until(at_rest, "everybody but the slow disk has done what it can")
        assert await fast_task == fast_messages
        # Turn by turn: while one message of the fast stream is let in, one of each slow stream is.
        assert ticks <= 3 * (fast_messages + 1) < slow_messages
        assert not any(task.done() for task in slow_tasks)
        assert (await local.commit("fast", sessions["fast"], os.urandom(16))).generation == 1
    finally:
        slow.go()
    assert await asyncio.gather(*slow_tasks) == [slow_messages] * 3
    assert local.budget.used == 0 and local.budget.most <= SERVER_BOUND
    for name in names[:3]:
        assert (await local.commit(name, sessions[name], os.urandom(16))).generation == 1
        assert await local.read(name, 1, 0, region) == data


# --- received and durable ---------------------------------------------------------------------------------------------


async def test_durable_waits_for_a_flush_and_vouches_for_what_came_before_it(
    local: Local, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "CHECKPOINT_SECONDS", 0.05)
    session = (await local.open(volume, 4 * REGION)).session
    messages: asyncio.Queue[pb.ApplyChangesRequest | None] = asyncio.Queue()
    said: list[tuple[int, int]] = []

    async def requests() -> AsyncIterator[bytes]:
        while (message := await messages.get()) is not None:
            yield message.SerializeToString()

    async def take() -> None:
        async for answer in local.replication.ApplyChanges(requests(), NO_CONTEXT):
            said.append((answer.received, answer.durable))

    def put(number: int) -> None:
        region = write_request((number - 1) * REGION, noise(number, REGION))
        messages.put_nowait(change_message(number, [region], session=session if number == 1 else None))

    taking = asyncio.create_task(take())
    with stalled(monkeypatch, "fsync") as flush:
        put(1)
        await flush.wait()
        for number in (2, 3):
            put(number)
            await _until(lambda number=number: said and said[-1][0] == number, "it is applied")
        assert {durable for _, durable in said} == {0}
    # The flush that was held up covers the first message, and another one the rest.
    await _until(lambda: said[-1] == (3, 3), "everything is durable")
    assert (3, 1) in said and said == sorted(said)
    messages.put_nowait(None)
    await taking


def test_received_comes_before_durable(start_server: ServerFactory, volume: str) -> None:
    """Through a real server. Nobody asks for the first flush."""
    server = start_server()
    messages: queue.Queue[pb.ApplyChangesRequest | None] = queue.Queue()
    with Raw(server.address) as raw:
        session = raw.open(volume, 4 * REGION).session
        messages.put(change_message(1, [write_request(0, noise(1, REGION))], session=session))
        answers = raw.bidirectional("Replication/ApplyChanges", iter(messages.get, None), pb.ApplyChangesResponse)
        began = time.monotonic()
        first = next(answers)
        assert (first.received, first.durable) == (1, 0)
        later = next(answers)
        assert (later.received, later.durable) == (1, 1)
        # The server's clock for checkpoints began to run with the stream.
        assert time.monotonic() - began > changes.CHECKPOINT_SECONDS / 2
        messages.put(change_message(2, [write_request(REGION, noise(2, REGION))]))
        second = next(answers)
        assert (second.received, second.durable) == (2, 1)
        # A message that asks for a flush is acknowledged as received when it is durable.
        messages.put(change_message(3, [write_request(2 * REGION, noise(3, REGION))], flush=True))
        messages.put(None)
        rest = [(answer.received, answer.durable) for answer in received(answers)]
        assert rest[-1] == (3, 3) and (3, 2) not in rest and (3, 1) not in rest


async def test_a_client_whose_disk_stands_still_leaves_the_others_their_share(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client fills what it may have in flight, however many streams it has; another one is not held up at all."""

    class Caller:
        def __init__(self, address: str) -> None:
            self.address = address

        def auth_context(self) -> dict[str, list[bytes]]:
            return {}

        def peer(self) -> str:
            return f"ipv4:{self.address}:1234"

    greedy, other = Caller("192.0.2.1"), Caller("192.0.2.2")
    share, whole, region = 4 * MIB, 12 * MIB, MIB
    limits = Limits(LimitsConfig(bytes_in_flight=whole, per_client=ClientLimits(bytes_in_flight=share)), time.monotonic)
    local.limits, local.replication = limits, ReplicationService(Pools([local.pool]), limits, local.access)
    names = ["greedy-1", "greedy-2", "greedy-3", "greedy-4", "other"]
    count = 8
    sessions = {name: (await local.open(name, count * region, region_size=region)).session for name in names}
    slow = SlowWrites(monkeypatch, tuple(local.pool.path / name for name in names[:4]))
    data = noise(1, region)
    taken = dict.fromkeys(names, 0)

    async def run(name: str, caller: Any) -> int:
        async def requests() -> AsyncIterator[bytes]:
            for number in range(count):
                taken[name] += 1
                session = None if number else sessions[name]
                request = change_message(number + 1, [write_request(number * region, data)], session=session)
                yield request.SerializeToString()

        received = 0
        async for answer in local.replication.ApplyChanges(requests(), caller):
            received = answer.received
        return received

    tasks = [asyncio.create_task(run(name, greedy)) for name in names[:4]]
    try:
        # Three messages fit its share; each stream holds one more that waits to be let in.
        await _until(lambda: sum(taken.values()) == 3 + 4, "the greedy client has all it may have")
        assert share - 2 * region < local.budget.used <= share
        assert await run("other", other) == count
        assert (await local.commit("other", sessions["other"], os.urandom(16))).generation == 1
        assert sum(taken[name] for name in names[:4]) == 3 + 4
        assert local.budget.most <= 2 * share
    finally:
        slow.go()
    assert await asyncio.gather(*tasks) == [count] * 4
    assert local.budget.used == 0
