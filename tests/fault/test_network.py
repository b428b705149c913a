"""A bad network between client and server: cut, stalled and half-closed connections, duplicated and hostile calls.

A proxy of the tests lies in between. Whatever happens at whatever byte, the client ends with one clear line and exit
status 1, or recovers; the committed generation is what it was; and the next sync succeeds. Calls that arrive twice are
harmless, and a hostile stream of changes is refused without an effect on anybody else.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from blockferry.v1 import replication_pb2 as pb

from tests.conftest import ServerFactory
from tests.fault.proxy import DOWN, UP, Proxy, proxied
from tests.fault.raw import REGION, Raw, Refused, change_message, received, write_request
from tests.images import KIB, MIB, build, change, noise
from tests.support import Server, finish, ok, refused, run_cli, start_cli, until

SIZE = 16 * MIB
LEASE = 3.0
"""Seconds: short enough to wait for, and longer than a sync takes that follows at once."""


@pytest.fixture(scope="module")
def server(xfs_pool_root: Path) -> Iterator[Server]:
    """Tests use volumes of their own."""
    pool = xfs_pool_root / "pool-behind-a-proxy"
    pool.mkdir()
    server = Server(pool, flags=("--keep-at-least", "last=2", "--lease", str(LEASE))).start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxied(server.address) as proxy:
        yield proxy


@pytest.fixture
def source(server: Server, volume: str, tmp_path: Path) -> Path:
    """A source whose generation 1 is at the server, and which has changed everywhere since."""
    path = build(tmp_path / "source", SIZE, [(0, noise(1, SIZE))])
    server.sync(path, volume)
    change(path, [(0, noise(2, SIZE))])
    return path


def _first_is_whole(server: Server, volume: str) -> None:
    with Raw(server.address) as raw:
        assert raw.show(volume).generation == 1
        for offset in range(0, SIZE, 4 * MIB):
            assert raw.read(volume, 1, offset, 4 * MIB) == noise(1, SIZE)[offset : offset + 4 * MIB]


# --- cut --------------------------------------------------------------------------------------------------------------

CUTS = [
    # 1: before anything was asked. SIZE: about where the commit is.
    *((UP, at) for at in (1, 200, 600, 64 * KIB, MIB, SIZE // 2, SIZE - MIB, SIZE)),
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
        assert at <= 50 or at >= SIZE or (direction, at) == (DOWN, 800), done
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
    chances = itertools.count(1)

    def judge(way: str, passed: int, data: bytes) -> bool:
        return way != UP or passed + len(data) < 10 * MIB * (proxy.cuts + 1) or proxy.cuts >= 2

    proxy.judge = judge
    while True:
        done = run_cli("sync", source, f"{proxy.address}/{volume}", "--quiet", "--json")
        if done.status == 0:
            break
        assert next(chances) <= 2
        _first_is_whole(server, volume)
    assert proxy.cuts == 2 and done.report["bytes"]["data_sent"] < SIZE // 2
    assert server.image(volume).read_bytes() == source.read_bytes()


# --- stalled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [(UP,), (DOWN,), (UP, DOWN)], ids=["up", "down", "both"])
def test_a_connection_that_stalls_and_goes_on(
    server: Server, proxy: Proxy, volume: str, source: Path, directions: Sequence[str]
) -> None:
    syncing = start_cli("sync", source, f"{proxy.address}/{volume}", "--quiet", "--json", "--bwlimit", "16M")
    try:
        until(lambda: proxy.passed[UP] > 2 * MIB, "some of it has passed")
        proxy.stall(*directions)
        before = dict(proxy.passed)
        time.sleep(3)
        assert syncing.poll() is None
        for direction in directions:
            # What was in the proxy's hands when it stopped may still go.
            assert proxy.passed[direction] <= before[direction] + 16 * KIB
        proxy.go()
        done = finish(syncing)
    finally:
        proxy.go()
        syncing.kill()
        syncing.wait()
    assert (done.status, done.stderr) == (0, "")
    assert done.report["generation"] == 2 and proxy.connections == 1
    assert server.image(volume).read_bytes() == source.read_bytes()


def test_peers_that_say_nothing_are_noticed(start_cloning_server: ServerFactory, volume: str, tmp_path: Path) -> None:
    """Nothing comes, nothing goes, and nobody says so. Both ends notice within twice the ten seconds of keep-alive, and
    the lease, which is much longer, goes with the connection. A server that never says a word is noticed too."""
    server = start_cloning_server(flags=("--lease", "600"))
    source = build(tmp_path / "source", SIZE, [(0, noise(1, SIZE))])
    with proxied(server.address) as proxy, socket.create_server(("127.0.0.1", 0)) as silent:
        syncing = start_cli("sync", source, f"{proxy.address}/{volume}", "--quiet", "--bwlimit", "4M")
        waiting = start_cli("sync", source, f"grpc://127.0.0.1:{silent.getsockname()[1]}/v", "--quiet")
        try:
            until(lambda: proxy.passed[UP] > 2 * MIB, "some of it has passed")
            proxy.stall(UP, DOWN)
            with Raw(server.address) as raw:

                def takes() -> bool:
                    try:
                        raw.open(volume, SIZE, region_size=0)
                    except Refused as error:
                        if error.reason != "IN_USE":
                            raise
                        return False
                    return True

                until(takes, "the server has noticed", 40)
            refused(finish(syncing, 40), proxy.address, "run this again")
            refused(finish(waiting, 40), "no server answers there", "check that blockferry-server runs there")
        finally:
            for process in (syncing, waiting):
                process.kill()
                process.wait()


def test_a_stalled_sync_can_be_interrupted(server: Server, proxy: Proxy, volume: str, source: Path) -> None:
    syncing = start_cli("sync", source, f"{proxy.address}/{volume}", "--quiet")
    try:
        until(lambda: proxy.passed[UP] > MIB, "some of it has passed")
        proxy.stall(UP, DOWN)
        time.sleep(0.5)
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
    syncing = start_cli("sync", source, f"{proxy.address}/{volume}", "--quiet", "--bwlimit", "8M")
    try:
        until(lambda: proxy.passed[UP] > 2 * MIB, "some of it has passed")
        proxy.half_close(direction)
        done = finish(syncing, 60)
    finally:
        syncing.kill()
        syncing.wait()
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


@pytest.mark.parametrize("name", _hostile(pb.SessionRef(), pb.SessionRef()))
def test_a_hostile_stream_is_refused_and_hurts_nobody(server: Server, volume: str, name: str) -> None:
    size = 4 * REGION
    with Raw(server.address) as raw, Raw(server.address) as hostile:
        bystander = raw.open(f"{volume}-other", size).session
        session = hostile.open(volume, size).session
        messages, reason = _hostile(session, bystander)[name]
        answers: list[pb.ApplyChangesResponse] = []
        call = hostile.bidirectional("Replication/ApplyChanges", iter(messages), pb.ApplyChangesResponse)
        with pytest.raises(grpc.RpcError) as caught:
            answers.extend(call)
        del caught
        answers = list(_until_error(hostile, messages))
        # What was good before it is applied, and said to be: nobody is left guessing.
        assert max(answer.received for answer in answers) <= 1
        assert answers[-1].error
        with pytest.raises(Refused) as again:
            received(hostile.bidirectional("Replication/ApplyChanges", iter(messages), pb.ApplyChangesResponse))
        assert again.value.reason == reason
        # The lease went with the stream; the session itself works until somebody takes it.
        successor = raw.open(volume, size).session
        raw.write(successor, 0, noise(3, REGION))
        raw.write(bystander, 0, noise(4, REGION))
        for one, ref in ((volume, successor), (f"{volume}-other", bystander)):
            assert raw.commit(one, ref, os.urandom(16)).generation == 1
        assert raw.read(volume, 1, 0, size) == noise(3, REGION) + bytes(3 * REGION)
    assert _budget_is_free(server, volume)


def _until_error(raw: Raw, messages: Sequence[pb.ApplyChangesRequest | bytes]) -> Iterator[pb.ApplyChangesResponse]:
    """The answers of a stream that fails, without the failure."""
    call = raw.bidirectional("Replication/ApplyChanges", iter(messages), pb.ApplyChangesResponse)
    try:
        yield from call
    except grpc.RpcError:
        return


def _budget_is_free(server: Server, volume: str) -> bool:
    """Whether a stream of more bytes than the server takes in flight passes: streams that are over hold nothing."""
    with Raw(server.address) as raw:
        size = 96 * MIB
        opened = raw.open(f"{volume}-after", size, region_size=16 * MIB)
        messages = [
            change_message(number + 1, [write_request(number * 16 * MIB, bytes(16 * MIB))], session=opened.session)
            for number in range(6)
        ]
        assert opened.bytes_in_flight < size
        answers = raw.apply(messages)
        raw.abort(opened.session, discard=True)
        return answers[-1].received == 6


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
    """The server drops what still arrives, for a while, and holds none of it."""
    with Raw(server.address) as raw:
        session = raw.open(volume, 64 * REGION).session
        over = threading.Event()

        def endless() -> Iterator[pb.ApplyChangesRequest]:
            yield change_message(7, session=session)
            while not over.wait(0.001):
                yield change_message(8, [_region(0)])

        began = time.monotonic()
        with pytest.raises(Refused) as caught:
            received(raw.bidirectional("Replication/ApplyChanges", endless(), pb.ApplyChangesResponse))
        over.set()
        assert caught.value.reason == "INVALID_ARGUMENT"
        assert time.monotonic() - began < 60
    assert _budget_is_free(server, volume)


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
