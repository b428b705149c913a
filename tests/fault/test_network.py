"""A bad network between client and server: cut, stalled and half-closed connections, duplicated and hostile calls.

A proxy of the tests lies in between. Whatever happens at whatever byte, the client ends with one clear line and exit
status 1, or recovers; the committed generation is what it was; and the next sync succeeds. Calls that arrive twice are
harmless, and a hostile stream of changes is refused without an effect on anybody else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from blockferry.common import rpc
from blockferry.common.errors import BlockferryError, Code
from blockferry.server import changes
from blockferry.v1 import replication_pb2 as pb

from tests.conftest import ServerFactory
from tests.fault.local import Local
from tests.fault.proxy import CHUNK, DOWN, UP, Proxy, proxied
from tests.fault.raw import REGION, Raw, Refused, change_message, received, refusal, write_request
from tests.images import KIB, MIB, build, change, noise
from tests.support import Server, finish, ok, own_directory, refused, run_cli, start_cli, until
from tests.terminal import on_terminal

SIZE = 16 * MIB
FIRST, SECOND = noise(1, SIZE), noise(2, SIZE)
LEASE = 3.0
"""Seconds: short enough to wait for, and longer than a sync takes that follows at once."""


@pytest.fixture(scope="module")
def server(xfs_pool_root: Path) -> Iterator[Server]:
    """Tests use volumes of their own."""
    pool = own_directory(xfs_pool_root, "pool-behind-a-proxy")
    server = Server(pool, flags=("--keep-at-least", "last=2", "--lease", str(LEASE))).start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxied(server.address) as proxy:
        yield proxy


@pytest.fixture
async def local(xfs_pool_root: Path, tmp_path: Path) -> AsyncIterator[Local]:
    local = await Local.start(xfs_pool_root / tmp_path.name)
    yield local
    await local.stop()


@pytest.fixture
def source(server: Server, volume: str, tmp_path: Path) -> Path:
    """A source whose generation 1 is at the server, and which has changed everywhere since."""
    path = build(tmp_path / "source", SIZE, [(0, FIRST)])
    server.sync(path, volume)
    change(path, [(0, SECOND)])
    return path


def _first_is_whole(server: Server, volume: str) -> None:
    with Raw(server.address) as raw:
        assert raw.show(volume).generation == 1
        for offset in range(0, SIZE, 4 * MIB):
            assert raw.read(volume, 1, offset, 4 * MIB) == FIRST[offset : offset + 4 * MIB]


# --- cut --------------------------------------------------------------------------------------------------------------

CUTS = [
    # 1: before anything was asked. SIZE: about where the commit is.
    *((UP, at) for at in (1, 200, 64 * KIB, MIB, SIZE - MIB, SIZE)),
    # 200: about where the answer to OpenSession is.
    *((DOWN, at) for at in (1, 50, 200, 400, 800)),
]


@pytest.mark.parametrize(("direction", "at"), CUTS)
def test_a_connection_that_is_cut(
    server: Server, proxy: Proxy, volume: str, source: Path, direction: str, at: int
) -> None:
    def judge(way: str, passed: int, data: bytes) -> bool:
        return way != direction or passed + len(data) < at or proxy.cuts > 0

    proxy.judge = judge
    done = run_cli("sync", source, f"{proxy.address}/{volume}", "--quiet")
    assert proxy.cuts == 1, "the connection was never cut"
    if done.status == 0:
        # What gRPC tries again before anything was asked, and what we ask again: the commit.
        assert (direction, at) in ((UP, 1), (UP, SIZE), (DOWN, 1), (DOWN, 50), (DOWN, 800)), done
        assert server.show(volume)["generation"] == 2
    else:
        refused(done, proxy.address, "run this again")
        _first_is_whole(server, volume)
        again = run_cli("sync", source, server.url(volume), "--quiet")
        if again.status:
            # A session that nobody has heard of keeps its lease. All others went with their connection.
            refused(again, volume, "lease runs out in")
            assert proxy.passed[UP] < 2 * KIB
            until(lambda: run_cli("sync", source, server.url(volume)).status == 0, "that lease is over")
    assert server.image(volume).read_bytes() == source.read_bytes()


def test_a_connection_that_is_cut_again_and_again(server: Server, proxy: Proxy, volume: str, source: Path) -> None:
    """Each run goes on with what has arrived, so a bad line ends in a sync all the same."""
    for cuts in (1, 2):
        proxy.passed[UP] = 0
        before = server.bytes_written()

        def judge(way: str, passed: int, data: bytes, cuts: int = cuts, before: int = before) -> bool:
            if way != UP or passed + len(data) < 6 * MIB or proxy.cuts == cuts:
                return True
            # The first message of data, which has three regions, is through by now: let it be applied.
            until(lambda: server.bytes_written() >= before + 3 * MIB, "something has been written")
            return False

        proxy.judge = judge
        refused(run_cli("sync", source, f"{proxy.address}/{volume}", "--quiet"), proxy.address, "run this again")
        assert proxy.cuts == cuts
        _first_is_whole(server, volume)
    report = ok("sync", source, f"{proxy.address}/{volume}")
    # Three regions at least of each run, and no more than had passed.
    equal = report["results"]["equal"]
    assert 6 <= equal <= 10
    assert report["bytes"]["data_sent"] == SIZE - equal * MIB
    assert server.image(volume).read_bytes() == source.read_bytes()


# --- stalled ----------------------------------------------------------------------------------------------------------


def test_connections_that_stall_and_go_on(server: Server, tmp_path: Path, volume: str) -> None:
    """In either direction and in both, at the same time: each takes as long as it takes until people are told."""
    source = build(tmp_path / "source", SIZE, [(0, FIRST)])
    with contextlib.ExitStack() as stack:
        syncs = []
        for number, directions in enumerate(((UP,), (DOWN,), (UP, DOWN))):
            proxy = stack.enter_context(proxied(server.address))
            proxy.stall_at(2 * MIB, *directions)
            replica = f"{volume}-{number}"
            terminal = stack.enter_context(on_terminal("sync", source, f"{proxy.address}/{replica}"))
            syncs.append((proxy, directions, replica, terminal))
        for proxy, directions, _, terminal in syncs:
            until(proxy.stalled.is_set, "the network stands still")
            before = dict(proxy.passed)
            terminal.await_stall(3)
            assert terminal.process.poll() is None
            for direction in directions:
                # What was in the proxy's hands when it stopped may still go.
                assert proxy.passed[direction] <= before[direction] + CHUNK
        for proxy, _, replica, terminal in syncs:
            proxy.go()
            status, drawn = terminal.finish()
            assert status == 0, drawn
            assert proxy.connections == 1
            assert server.show(replica)["generation"] == 1
            assert server.image(replica).read_bytes() == FIRST


def test_peers_that_say_nothing_are_noticed(start_cloning_server: ServerFactory, volume: str, tmp_path: Path) -> None:
    """Nothing comes, nothing goes, and nobody says so, while data is under way. Both ends notice when a ping has not
    been answered, and the lease, which is much longer, goes with the connection. A server that never says a word is
    noticed too."""
    noticed = rpc.KEEPALIVE_SECONDS + rpc.PING_SECONDS + 20
    server = start_cloning_server(flags=("--lease", "600"))
    source = build(tmp_path / "source", SIZE, [(0, FIRST)])
    with proxied(server.address) as proxy, socket.create_server(("127.0.0.1", 0)) as silent:
        proxy.stall_at(2 * MIB, UP, DOWN)
        syncing = start_cli("sync", source, f"{proxy.address}/{volume}", "--quiet")
        waiting = start_cli("sync", source, f"grpc://127.0.0.1:{silent.getsockname()[1]}/v", "--quiet")
        try:
            until(proxy.stalled.is_set, "the network stands still")
            with Raw(server.address) as raw:

                def takes() -> bool:
                    try:
                        raw.open(volume, SIZE, region_size=0)
                    except Refused as error:
                        if error.reason != "IN_USE":
                            raise
                        return False
                    return True

                until(takes, "the server has noticed", noticed)
            refused(finish(syncing, noticed), proxy.address, "run this again")
            refused(finish(waiting, noticed), "no server answers there", "check that blockferry-server runs there")
        finally:
            for process in (syncing, waiting):
                process.kill()
                process.wait()


def test_a_stalled_sync_can_be_interrupted(server: Server, proxy: Proxy, volume: str, source: Path) -> None:
    proxy.stall_at(2 * MIB, UP, DOWN)
    syncing = start_cli("sync", source, f"{proxy.address}/{volume}", "--quiet")
    try:
        until(proxy.stalled.is_set, "the network stands still")
        syncing.send_signal(signal.SIGINT)
        done = finish(syncing, 40)
    finally:
        syncing.kill()
        syncing.wait()
    refused(done, "interrupted by SIGINT", status=130)
    proxy.cut()
    proxy.go()
    _first_is_whole(server, volume)


# --- half-closed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_connection_that_is_half_closed(
    server: Server, proxy: Proxy, volume: str, source: Path, direction: str
) -> None:
    def judge(way: str, passed: int, data: bytes) -> bool:
        if way == UP and passed > 2 * MIB and not closed:
            closed.append(passed)
            proxy.half_close(direction)
        return True

    closed: list[int] = []
    proxy.judge = judge
    done = run_cli("sync", source, f"{proxy.address}/{volume}", "--quiet")
    assert len(closed) == 1
    refused(done, proxy.address, "run this again")
    _first_is_whole(server, volume)
    assert server.sync(source, volume)["generation"] == 2


# --- twice ------------------------------------------------------------------------------------------------------------


def test_calls_that_arrive_twice_are_harmless(server: Server, volume: str) -> None:
    size = 4 * REGION
    content = noise(1, size)
    with Raw(server.address) as raw:
        session = raw.open(volume, size).session
        for offset in range(0, size, REGION):
            results = [raw.write(session, offset, content[offset : offset + REGION]).result for _ in range(2)]
            assert results[0] == results[1]
        unmap = pb.UnmapRegionRequest(session=session, offset=REGION, length=REGION)
        unmapped = [
            raw.call("Replication/UnmapRegion", unmap, pb.UnmapRegionResponse).result.bytes_unmapped for _ in range(2)
        ]
        assert unmapped == [REGION, 0]
        commit_id = os.urandom(16)
        assert raw.commit(volume, session, commit_id) == raw.commit(volume, session, commit_id)
        raw.abort(session, discard=True)
        raw.abort(session, discard=True)
        assert [point.number for point in raw.points(volume)] == [1]
        assert raw.read(volume, 1, 0, size) == content[:REGION] + bytes(REGION) + content[2 * REGION :]
        # A late duplicate of an abort does not touch the session that came after.
        following = raw.open(volume, size).session
        raw.abort(session, discard=True)
        raw.write(following, 0, noise(2, REGION))
        for _ in range(2):
            raw.abort(following, discard=True)
        assert raw.read(volume, 0, 0, REGION) == content[:REGION]


def test_a_write_that_is_delayed_until_after_the_commit_is_refused(server: Server, volume: str) -> None:
    with Raw(server.address) as raw:
        session = raw.open(volume, REGION).session
        raw.write(session, 0, noise(1, REGION))
        raw.commit(volume, session, os.urandom(16))
        with pytest.raises(Refused) as caught:
            raw.write(session, 0, noise(2, REGION))
        assert caught.value.reason == "STALE_EPOCH"
        assert raw.read(volume, 1, 0, REGION) == noise(1, REGION)


# --- hostile streams --------------------------------------------------------------------------------------------------


def _region(number: int, seed: int = 1) -> pb.WriteRegionRequest:
    return write_request(number * REGION, noise(seed, REGION))


def _hostile(
    session: pb.SessionRef, other: pb.SessionRef
) -> dict[str, tuple[list[pb.ApplyChangesRequest | bytes], str]]:
    """Streams whose first message is good and whose second is not, and the reason for which they end."""
    good = change_message(1, [_region(0)], session=session)
    second = change_message(2, [_region(1)])
    truncated = second.SerializeToString()[:-5]
    outside = change_message(2, [_region(99)])
    return {
        "garbage": ([good, b"\xff" * 100], "PROTOCOL"),
        "cut short": ([good, truncated], "PROTOCOL"),
        "random": ([good, noise("hostile", 5000)], "PROTOCOL"),
        "a length that lies": ([good, b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"], "PROTOCOL"),
        "a group": ([good, b"\x0b\x0b\x0b\x0b"], "PROTOCOL"),
        "text that is none": ([good, b"\x08\x02\x12\x04\x0a\x02\xff\xfe"], "PROTOCOL"),
        "another session": ([good, change_message(2, [_region(1)], session=other)], "INVALID_ARGUMENT"),
        "another epoch": (
            [good, change_message(2, session=pb.SessionRef(session_id=session.session_id, epoch=99))],
            "INVALID_ARGUMENT",
        ),
        "the same number again": ([good, good], "INVALID_ARGUMENT"),
        "a number left out": ([good, change_message(3, [_region(1)])], "INVALID_ARGUMENT"),
        "no number": ([good, change_message(0, [_region(1)])], "INVALID_ARGUMENT"),
        "outside": ([good, outside], "INVALID_ARGUMENT"),
        "nothing inside": ([good, pb.ApplyChangesRequest(sequence=2, changes=[pb.Change()])], "INVALID_ARGUMENT"),
        "a write without its data": (
            [good, change_message(2, [pb.WriteRegionRequest(offset=0, length=REGION, writes=[pb.Extent(length=9)])])],
            "INVALID_ARGUMENT",
        ),
    }


HOSTILE = sorted(_hostile(pb.SessionRef(), pb.SessionRef()))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_stream_is_refused_and_hurts_nobody(server: Server, volume: str, name: str) -> None:
    size = 4 * REGION
    with Raw(server.address) as raw, Raw(server.address) as hostile:
        bystander = raw.open(f"{volume}-other", size).session
        session = hostile.open(volume, size).session
        messages, reason = _hostile(session, bystander)[name]
        call = hostile.bidirectional("Replication/ApplyChanges", iter(messages), pb.ApplyChangesResponse)
        answers: list[pb.ApplyChangesResponse] = []
        with pytest.raises(grpc.RpcError) as caught:
            answers.extend(call)
        assert refusal(caught.value).reason == reason
        assert [bool(answer.error) for answer in answers] == [False] * (len(answers) - 1) + [True]
        assert {answer.received for answer in answers} <= {0, 1}
        # The lease went with the stream, and what was good before the end was applied.
        successor = raw.open(volume, size).session
        raw.write(successor, REGION, noise(3, REGION))
        raw.write(bystander, 0, noise(4, REGION))
        for one, ref in ((volume, successor), (f"{volume}-other", bystander)):
            assert raw.commit(one, ref, os.urandom(16)).generation == 1
        assert raw.read(volume, 1, 0, size) == noise(1, REGION) + noise(3, REGION) + bytes(2 * REGION)


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_stream_leaves_nothing_behind(local: Local, volume: str, name: str) -> None:
    """The bound on bytes in flight belongs to all streams: one that ends badly gives every byte of it back."""
    bystander = (await local.open(f"{volume}-other", 4 * REGION)).session
    session = (await local.open(volume, 4 * REGION)).session
    messages, reason = _hostile(session, bystander)[name]
    with pytest.raises(BlockferryError) as caught:
        await local.apply(messages)
    assert caught.value.code.name == reason
    assert local.budget.used == 0
    assert REGION < local.budget.most < 3 * REGION


def test_messages_that_are_too_large_are_refused(server: Server, volume: str) -> None:
    with Raw(server.address) as raw:
        session = raw.open(volume, 64 * MIB, region_size=16 * MIB).session
        largest = write_request(0, bytes(16 * MIB))
        assert raw.apply([change_message(1, [largest], session=session)])[-1].received == 1
        session = raw.open(volume, 64 * MIB, region_size=0).session
        huge = change_message(1, [write_request(0, bytes(40 * MIB))], session=session)
        with pytest.raises(Refused) as caught:
            raw.apply([huge])
        assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(Refused) as caught:
            raw.write(session, 0, bytes(40 * MIB))
        assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
        raw.write(session, 0, bytes(16 * MIB))


def test_a_stream_that_begins_with_nothing_useful(server: Server, volume: str) -> None:
    with Raw(server.address) as raw:
        assert raw.apply([]) == []
        for first, reason in (
            (b"\xff\xff", "PROTOCOL"),
            (change_message(1), "STALE_EPOCH"),
            (change_message(1, session=pb.SessionRef(session_id="nobody's", epoch=1)), "STALE_EPOCH"),
        ):
            with pytest.raises(Refused) as caught:
                raw.apply([first])
            assert caught.value.reason == reason


def test_a_client_that_goes_on_sending_after_the_error_is_cut_off(server: Server, volume: str) -> None:
    with Raw(server.address) as raw:
        session = raw.open(volume, 64 * REGION).session
        over = threading.Event()

        def endless() -> Iterator[pb.ApplyChangesRequest]:
            yield change_message(7, session=session)
            while not over.wait(0.001):
                yield change_message(8, [_region(0)])

        try:
            with pytest.raises(Refused) as caught:
                received(raw.bidirectional("Replication/ApplyChanges", endless(), pb.ApplyChangesResponse))
        finally:
            over.set()
        assert caught.value.reason == "INVALID_ARGUMENT"
        assert raw.open(volume, 64 * REGION).session.epoch == session.epoch + 1


async def test_what_is_sent_after_the_error_is_dropped(
    local: Local, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times what the server takes in flight, on a stream that has failed: all of it is read and none is kept."""
    monkeypatch.setattr(changes, "PARTING_SECONDS", 60.0)
    session = (await local.open(volume, 16 * MIB, region_size=16 * MIB)).session
    large = change_message(2, [write_request(0, bytes(16 * MIB))]).SerializeToString()
    with pytest.raises(BlockferryError) as caught:
        await local.apply([change_message(7, session=session), *[large] * 12])
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert local.budget.used == 0 and local.budget.most <= local.budget.limit


# --- through it all ---------------------------------------------------------------------------------------------------


def test_looking_through_a_bad_network(server: Server, proxy: Proxy, volume: str, source: Path) -> None:
    """The commands that only look end with one line too."""
    proxy.judge = lambda way, passed, data: way != DOWN or passed + len(data) < 100
    for words in (
        ("replica", "show", f"{proxy.address}/{volume}"),
        ("replica", "verify", f"{proxy.address}/{volume}"),
        ("verify", source, f"{proxy.address}/{volume}"),
        ("plan", source, f"{proxy.address}/{volume}"),
    ):
        proxy.passed[DOWN] = 0
        refused(run_cli(*words, "--quiet"), proxy.address)
    proxy.judge = lambda *_: True
    assert ok("replica", "show", f"{proxy.address}/{volume}")["generation"] == 1
