"""One writer, and commits that happen once: sessions of a server in a process of its own.

Proves that a second writer is refused and told who holds the replica, that a writer whose lease ran out is fenced at
the moment of writing (whatever call it uses, and across restarts of the server), that nobody can hold up a successor by
not reading its answers, that empty messages keep a lease, and that a commit id commits once however often it is asked
for.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from blockferry.v1 import replication_pb2 as pb

from tests.conftest import ServerFactory
from tests.fault.raw import (
    REGION,
    Raw,
    Refused,
    change_message,
    finished,
    received,
    wire_runs,
    write_request,
)
from tests.images import MIB, build, noise
from tests.support import PROGRAMS, Server, finish, own_directory, refused, run_cli, start_cli, until

SIZE = 8 * REGION
LEASE = ("--lease", "0.5")


@pytest.fixture(scope="module")
def server(pool_root: Path) -> Iterator[Server]:
    """A server with a lease of half a second. Tests restart it as they like, and use volumes of their own."""
    pool = own_directory(pool_root, "pool-of-sessions")
    server = Server(pool, flags=LEASE).start()
    yield server
    server.stop()


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    with Raw(server.address) as connection:
        yield connection


def take(raw: Raw, volume: str, size: int = SIZE) -> pb.OpenSessionResponse:
    """Open a session as soon as whoever holds the replica has lost its lease."""
    opened: list[pb.OpenSessionResponse] = []

    def tried() -> bool:
        try:
            opened.append(raw.open(volume, size, client="the successor"))
        except Refused as error:
            if error.reason != "IN_USE":
                raise
            return False
        return True

    until(tried, "the lease has run out")
    return opened[0]


def committed(raw: Raw, volume: str, content: bytes) -> bytes:
    """A replica with one generation of this content; its commit id."""
    session = raw.open(volume, len(content)).session
    for offset in range(0, len(content), REGION):
        raw.write(session, offset, content[offset : offset + REGION])
    commit_id = os.urandom(16)
    raw.commit(volume, session, commit_id)
    return commit_id


# --- two clients ------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_naming_the_first_and_takes_over_once_it_is_killed(
    start_server: ServerFactory, volume: str, tmp_path: Path
) -> None:
    # The default lease of a minute: were the second client to wait for it, it would be refused.
    server = start_server()
    source = build(tmp_path / "source", 64 * MIB, [(0, noise(1, 64 * MIB))])
    first = start_cli("sync", source, server.url(volume), "--bwlimit", "4M", "--quiet")
    try:
        with Raw(server.address) as raw:
            until(lambda: volume in raw.volumes() and raw.state(volume) == "SYNCING", "the first sync has begun")
            until(lambda: raw.show(volume).bytes_held > 2 * MIB, "the first sync has sent something")
            holder = raw.show(volume).session_client
            assert holder.endswith(f"(process {first.pid})")
            refused(run_cli("sync", source, server.url(volume), "--quiet"), holder, volume, "lease runs out in")
            assert raw.show(volume).session_client == holder
            first.kill()
            finish(first)
            report = server.sync(source, volume)
            assert report["generation"] == 1
            assert server.image(volume).read_bytes() == source.read_bytes()
            assert raw.state(volume) == "CONSISTENT" and raw.show(volume).session_client == ""
    finally:
        first.kill()
        first.communicate()


# --- zombies ----------------------------------------------------------------------------------------------------------

Attempt = Callable[[Raw, str, pb.SessionRef], object]

ATTEMPTS: dict[str, Attempt] = {
    "write": lambda raw, _, ref: raw.write(ref, 0, noise("zombie", REGION)),
    "unmap": lambda raw, _, ref: raw.call(
        "Replication/UnmapRegion",
        pb.UnmapRegionRequest(session=ref, offset=0, length=REGION),
        pb.UnmapRegionResponse,
    ),
    "stream": lambda raw, _, ref: raw.apply(
        [change_message(1, [write_request(0, noise("zombie", REGION))], session=ref)]
    ),
    "renewal": lambda raw, _, ref: raw.apply([change_message(1, session=ref)]),
    "digests": lambda raw, _, ref: raw.digests(ref, REGION, [(0, 8)]),
    "map": lambda raw, _, ref: received(
        raw.stream("Replication/GetAllocationMap", pb.GetAllocationMapRequest(session=ref), pb.GetAllocationMapResponse)
    ),
    "commit": lambda raw, volume, ref: raw.commit(volume, ref, os.urandom(16)),
}


@pytest.mark.parametrize("restart", ["none", "clean", "killed"])
def test_a_zombie_is_refused_whatever_it_tries(server: Server, raw: Raw, volume: str, restart: str) -> None:
    content = noise(1, SIZE)
    zombie = raw.open(volume, SIZE, client="the zombie").session
    raw.write(zombie, 0, content[:REGION])
    if restart != "none":
        server.stop() if restart == "clean" else server.kill()
        server.start()
        _assert_stale(raw, volume, zombie)
    successor = take(raw, volume)
    assert successor.session.epoch == zombie.epoch + 1
    assert successor.session.session_id != zombie.session_id
    before = raw.digests(successor.session, REGION, [(0, 8)])
    _assert_stale(raw, volume, zombie)
    # Half of a reference is not enough either.
    _assert_stale(raw, volume, pb.SessionRef(session_id=successor.session.session_id, epoch=zombie.epoch))
    _assert_stale(raw, volume, pb.SessionRef(session_id=zombie.session_id, epoch=successor.session.epoch))
    raw.abort(zombie, discard=True)
    assert raw.digests(successor.session, REGION, [(0, 8)]) == before
    for offset in range(0, SIZE, REGION):
        raw.write(successor.session, offset, content[offset : offset + REGION])
    assert raw.commit(volume, successor.session, os.urandom(16)).generation == 1
    assert raw.read(volume, 1, 0, SIZE) == content


def _assert_stale(raw: Raw, volume: str, ref: pb.SessionRef) -> None:
    """Nothing that a session is needed for is possible with `ref`."""
    outcomes = {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt(raw, volume, ref)
        except Refused as error:
            outcomes[name] = (error.status, error.reason)
    assert outcomes == dict.fromkeys(ATTEMPTS, (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH"))


def test_epochs_rise_over_restarts_of_the_server(server: Server, raw: Raw, volume: str) -> None:
    epochs = []
    for number in range(4):
        epochs.append(raw.open(volume, SIZE).session.epoch)
        server.stop() if number % 2 else server.kill()
        server.start()
    assert epochs == [1, 2, 3, 4]


def test_resuming_a_session_fences_its_own_earlier_writer(raw: Raw, volume: str) -> None:
    first = raw.open(volume, SIZE).session
    second = raw.open(volume, SIZE, resume_session_id=first.session_id).session
    assert second.epoch == first.epoch + 1
    _assert_stale(raw, volume, first)
    raw.write(second, 0, noise(1, REGION))


# --- nobody holds up a successor --------------------------------------------------------------------------------------

NARROW = (("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1))


def test_digests_that_nobody_reads_do_not_block_a_successor(server: Server, volume: str) -> None:
    with Raw(server.address, NARROW) as deaf, Raw(server.address) as raw:
        session = deaf.open(volume, 8 * MIB).session
        # 32 MiB of answers, of which a few KiB fit into the window.
        request = pb.GetRegionDigestsRequest(session=session, piece_size=4096, pieces=wire_runs([(0, 2048)] * 2000))
        unread = deaf.stream("Replication/GetRegionDigests", request, pb.GetRegionDigestsResponse)
        assert len(next(unread).digests) == 2048 * 8
        successor = take(raw, volume, 8 * MIB).session
        raw.write(successor, 0, noise(1, REGION))
        with pytest.raises(Refused) as caught:
            received(unread)
        assert caught.value.reason == "STALE_EPOCH"
        assert raw.commit(volume, successor, os.urandom(16)).generation == 1


def test_a_map_that_nobody_reads_does_not_block_a_successor(server: Server, volume: str) -> None:
    fragments = 3 * 8192
    size = fragments * 2 * REGION
    with Raw(server.address, NARROW) as deaf, Raw(server.address) as raw:
        session = deaf.open(volume, size).session
        with (server.pool / volume / "work.img").open("r+b", buffering=0) as image:
            for number in range(fragments):
                os.pwrite(image.fileno(), b"x", number * 2 * REGION)
        request = pb.GetAllocationMapRequest(session=session)
        unread = deaf.stream("Replication/GetAllocationMap", request, pb.GetAllocationMapResponse)
        first = next(unread)
        assert len(first.allocated) == 8192
        successor = take(raw, volume, size).session
        raw.write(successor, REGION, noise(1, REGION))
        # The map was taken under the lease; it goes on to describe that moment.
        rest = [run for message in received(unread) for run in message.allocated]
        assert [(run.first, run.count) for run in [*first.allocated, *rest]] == [
            (2 * number, 1) for number in range(fragments)
        ]


# --- leases -----------------------------------------------------------------------------------------------------------


def test_empty_messages_keep_a_lease_and_silence_loses_it(server: Server, raw: Raw, volume: str) -> None:
    holder = raw.open(volume, SIZE, client="the holder").session
    speaking, over = threading.Event(), threading.Event()
    speaking.set()

    def renewals() -> Iterator[pb.ApplyChangesRequest]:
        for sequence in itertools.count(1):
            yield change_message(sequence, session=holder if sequence == 1 else None)
            if over.wait(0.1):
                return
            if not speaking.is_set():
                over.wait()
                return

    answers = raw.bidirectional("Replication/ApplyChanges", renewals(), pb.ApplyChangesResponse)
    try:
        # Four leases long; every attempt in between is refused.
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with pytest.raises(Refused) as caught:
                raw.open(volume, SIZE)
            assert caught.value.reason == "IN_USE"
            assert "the holder" in caught.value.line
            time.sleep(0.05)
        speaking.clear()
        assert take(raw, volume).session.epoch == holder.epoch + 1
    finally:
        over.set()
        answers.cancel()


def test_a_quiet_sync_keeps_its_lease(start_server: ServerFactory, volume: str, tmp_path: Path) -> None:
    """A bandwidth limit makes each message wait longer than the lease: only the heartbeat renews it."""
    server = start_server(flags=("--lease", "0.5"))
    source = build(tmp_path / "source", 2 * MIB, [(0, noise(1, 2 * MIB))])
    with Raw(server.address) as raw:
        syncing = start_cli("sync", source, server.url(volume), "--bwlimit", "500K", "--quiet", "--json")
        until(lambda: volume in raw.volumes() and bool(raw.show(volume).session_client), "the sync has begun")
        attempts = 0
        while syncing.poll() is None:
            try:
                raw.open(volume, 2 * MIB, region_size=0)
            except Refused as error:
                if error.reason != "IN_USE":
                    raise
            else:
                assert syncing.wait(10) == 0, "the replica was taken from a source that is alive"
            attempts += 1
            time.sleep(0.05)
        done = finish(syncing)
        assert done.status == 0 and not done.stderr, done.stderr
        assert attempts > 5
        assert done.report["generation"] == 1


@pytest.mark.parametrize("lease", ["0", "-1", "nan", "inf", "86401", "soon"])
def test_a_lease_out_of_range_is_a_usage_error(lease: str, tmp_path: Path) -> None:
    done = _run_server("--pool", tmp_path, "--lease", lease)
    assert done.returncode == 2
    assert f"'{lease}' is not a lease" in done.stderr


def test_the_lease_is_documented() -> None:
    assert "--lease SECONDS" in _run_server("--help").stdout


def _run_server(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAMS / "blockferry-server", *map(str, args)], capture_output=True, text=True, timeout=30, check=False
    )


# --- commits ----------------------------------------------------------------------------------------------------------


def test_a_commit_id_commits_once(server: Server, raw: Raw, volume: str) -> None:
    content = noise(1, SIZE)
    session = raw.open(volume, SIZE).session
    for offset in range(0, SIZE, REGION):
        raw.write(session, offset, content[offset : offset + REGION])
    commit_id = os.urandom(16)
    first = raw.commit(volume, session, commit_id)
    assert (first.generation, first.commit_id) == (1, commit_id)

    # Again, at once; the session is gone by now.
    assert raw.commit(volume, session, commit_id) == first
    # With a reference to nothing at all: the id alone decides.
    assert raw.commit(volume, pb.SessionRef(), commit_id) == first
    for end in (server.stop, server.kill):
        end()
        server.start()
        assert raw.commit(volume, session, commit_id) == first
    # While another session is open, which goes on undisturbed.
    other = raw.open(volume, SIZE).session
    raw.write(other, 0, noise(2, REGION))
    assert raw.commit(volume, session, commit_id) == first
    second = raw.commit(volume, other, os.urandom(16), pb.Retention(last=1))
    assert second.generation == 2
    assert raw.commit(volume, session, commit_id) == first
    assert [point.number for point in raw.points(volume)] == [2, 1]
    assert raw.read(volume, 1, 0, SIZE) == content


def test_a_commit_that_retention_dropped_is_still_known(start_server: ServerFactory, volume: str) -> None:
    server = start_server(flags=("--keep-at-least", "last=1"))
    with Raw(server.address) as raw:
        session = raw.open(volume, SIZE).session
        commit_id = os.urandom(16)
        first = raw.commit(volume, session, commit_id, pb.Retention(last=1))
        raw.commit(volume, raw.open(volume, SIZE).session, os.urandom(16))
        assert [point.number for point in raw.points(volume)] == [2]
        assert raw.commit(volume, session, commit_id) == first
        server.kill()
        server.start()
        assert raw.commit(volume, session, commit_id) == first
        assert [point.number for point in raw.points(volume)] == [2]


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_commit_id_of_another_length_is_refused(raw: Raw, volume: str, length: int) -> None:
    session = raw.open(volume, SIZE).session
    with pytest.raises(Refused) as caught:
        raw.commit(volume, session, bytes(length))
    assert caught.value.reason == "INVALID_ARGUMENT"
    assert raw.commit(volume, session, os.urandom(16)).generation == 1


def test_two_commits_of_one_session_at_once(raw: Raw, volume: str) -> None:
    """Each asks with an id of its own: one wins, and the other learns that the session is over."""
    session = raw.open(volume, SIZE).session
    raw.write(session, 0, noise(1, REGION))
    calls = []
    for _ in range(2):
        request = pb.CommitSessionsRequest()
        request.commits.add(session=session, volume=volume, commit_id=os.urandom(16))
        calls.append(raw.begin("Replication/CommitSessions", request, pb.CommitSessionsResponse))
    outcomes = []
    for call in calls:
        try:
            outcomes.append(str(finished(call, pb.CommitSessionsResponse).commits[0].generation))
        except Refused as error:
            outcomes.append(error.reason)
    assert sorted(outcomes) == ["1", "STALE_EPOCH"]
    assert [point.number for point in raw.points(volume)] == [1]


# --- states -----------------------------------------------------------------------------------------------------------


def test_the_state_is_shown_in_every_phase(server: Server, raw: Raw, volume: str) -> None:
    def shown() -> tuple[str, int, str]:
        found = server.show(volume)
        assert (found["path"] is not None) == (found["generation"] > 0)
        return found["state"], found["generation"], found["session_client"] or ""

    first = raw.open(volume, SIZE, client="one").session
    assert shown() == ("SYNCING", 0, "one")
    raw.abort(first)
    assert shown() == ("SYNCING", 0, "")
    second = raw.open(volume, SIZE, client="two").session
    raw.write(second, 0, noise(1, REGION))
    raw.commit(volume, second, os.urandom(16))
    assert shown() == ("CONSISTENT", 1, "")
    third = raw.open(volume, SIZE, client="three").session
    assert shown() == ("UPDATING", 1, "three")
    raw.abort(third, discard=True)
    assert shown() == ("CONSISTENT", 1, "")
    raw.open(volume, SIZE, client="four")
    server.kill()
    server.start()
    assert shown() == ("CONSISTENT", 1, "")
