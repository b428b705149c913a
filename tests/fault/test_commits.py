"""Commits whose answer is lost, sessions that are resumed, and updates through a journal: two processes and what lies
between.

Proves that a commit id is durable at the source before the commit is asked for and reconciled afterwards, that a lost
answer is asked for again and never makes a second generation, that only the very same immutable snapshot continues
without being read again (by exact counts), and that an update where nothing can be cloned leaves the image alone until
it is committed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blockferry.v1 import replication_pb2 as pb

from tests.conftest import ServerFactory
from tests.fault.proxy import DOWN, Proxy, proxied
from tests.fault.raw import REGION, Raw, change_message, write_request
from tests.images import KIB, MIB, Hole, build, change, noise
from tests.support import Report, Server, command, finish, ok, own_directory, refused, run_cli, start_cli, until

# --- the ledger -------------------------------------------------------------------------------------------------------


def crash_at(point: str, *args: object) -> None:
    """Run `blockferry` until it kills itself at a crash point."""
    done = subprocess.run(
        command(*args, "--quiet"),
        env={**os.environ, "BLOCKFERRY_CRASH_POINT": point},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, f"{point} was never reached: {done}"


def ledger(state: Path, server: Server, volume: str) -> Report:
    """What the source remembers of the last commit it asked for."""
    found = json.loads((state / "commits" / f"{server.show(volume)['uuid']}.json").read_bytes())
    assert isinstance(found, dict)
    return found


def confirmed(record: dict[str, object], generation: int) -> dict[str, object]:
    """What the ledger says once a commit is known to have made that generation."""
    return {**record, "confirmed": True, "newest_id": record["commit_id"], "newest_generation": generation}


def test_a_commit_id_is_minted_before_and_confirmed_after(server: Server, volume: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", 2 * MIB, [(0, noise(1, MIB))])
    state = tmp_path / "state"
    words = ("sync", source, server.url(volume), "--state-dir", state)

    crash_at("client-commit-minted", *words)
    minted = ledger(state, server, volume)
    assert (minted["confirmed"], minted["volume"], minted["source"]) == (False, volume, str(source))
    assert server.show(volume)["generation"] == 0

    # That one never happened: the next run mints another, and it alone becomes a generation.
    crash_at("client-commit-answered", *words)
    unconfirmed = ledger(state, server, volume)
    assert unconfirmed["commit_id"] != minted["commit_id"] and unconfirmed["confirmed"] is False
    shown = server.show(volume)
    assert (shown["generation"], shown["commit_id"]) == (1, unconfirmed["commit_id"])

    # The next run learns that it did happen before it does anything else. The first atomic file of a run is that.
    crash_at("atomic-before-rename:2", *words)
    assert ledger(state, server, volume) == confirmed(unconfirmed, 1)

    report = ok(*words)
    assert ledger(state, server, volume) == {
        "replica_uuid": shown["uuid"],
        "volume": volume,
        "source": str(source),
        "commit_id": report["commit_id"],
        "confirmed": True,
        "newest_id": report["commit_id"],
        "newest_generation": 2,
    }
    assert report["generation"] == 2
    for path in (state / "commits", *(state / "commits").iterdir()):
        assert path.stat().st_mode & 0o077 == 0


# --- lost answers -----------------------------------------------------------------------------------------------------


def commits(server: Server, volume: str) -> int:
    """Commit records on the server's disk."""
    log = server.pool / volume / "commits.log"
    return log.read_text().count('"kind":"commit"') if log.exists() else 0


def cut_before_the_answer(proxy: Proxy, server: Server, volume: str, *, times: int = 1, refuse: bool = False) -> None:
    """Pass nothing down any more once the record of a new commit is there: that can only be the answer to it."""
    before = commits(server, volume)

    def judge(direction: str, passed: int, data: bytes) -> bool:
        if direction == DOWN and proxy.cuts < times and commits(server, volume) > before:
            proxy.refusing = refuse
            return False
        return True

    proxy.judge = judge


@pytest.mark.parametrize("times", [1, 2])
def test_a_lost_answer_is_asked_for_again(server: Server, volume: str, tmp_path: Path, times: int) -> None:
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, 2 * MIB))])
    server.sync(source, volume)
    change(source, [(MIB, noise(2, 64 * KIB))])
    with proxied(server.address) as proxy:
        cut_before_the_answer(proxy, server, volume, times=times)
        report = ok("sync", source, f"{proxy.address}/{volume}")
        assert proxy.cuts == times
    assert report["outcome"] == "committed" and report["generation"] == 2
    points = ok("replica", "points", server.url(volume))["points"]
    assert [point["number"] for point in points] == [2, 1]
    assert points[0]["commit_id"] == report["commit_id"]
    assert server.image(volume).read_bytes() == source.read_bytes()


def test_an_answer_that_stays_lost_is_learnt_from_the_replica(server: Server, volume: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, 2 * MIB))])
    state = tmp_path / "state"
    with proxied(server.address) as proxy:
        cut_before_the_answer(proxy, server, volume, refuse=True)
        done = run_cli("sync", source, f"{proxy.address}/{volume}", "--state-dir", state, "--quiet")
        refused(done, "no answer to the commit", proxy.address, "may have committed or not", "run this again")
    shown = server.show(volume)
    last = ledger(state, server, volume)
    assert (shown["generation"], shown["commit_id"], last["confirmed"]) == (1, last["commit_id"], False)
    crash_at("atomic-before-rename:2", "sync", source, server.url(volume), "--state-dir", state)
    assert ledger(state, server, volume) == confirmed(last, 1)


# --- resuming ---------------------------------------------------------------------------------------------------------

COUNT = 16
SIZE = COUNT * REGION


@pytest.fixture(scope="module")
def server(pool_root: Path) -> Iterator[Server]:
    """Tests restart it as they like, and use volumes of their own. A source that dies between its last change and the
    commit leaves a lease behind: a short one, so that the next sync finds it over."""
    pool = own_directory(pool_root, "pool-of-commits")
    server = Server(pool, flags=("--lease", "0.1")).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def origin(pool_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, bytes]]:
    """A server whose generations are sources: immutable snapshots. And what generation 1 holds."""
    pool = own_directory(pool_root, "pool-of-snapshots")
    server = Server(pool).start()
    source = build(tmp_path_factory.mktemp("origin") / "source", SIZE, [(0, noise(1, SIZE))])
    server.sync(source, "v", "--region-size", "64K")
    content = source.read_bytes()
    change(source, [(0, noise(2, SIZE))])
    server.sync(source, "v")
    yield server, content
    server.stop()


End = Callable[[Raw, Server, pb.SessionRef], None]


def _abort(raw: Raw, server: Server, session: pb.SessionRef) -> None:
    raw.abort(session)


def _kill(raw: Raw, server: Server, session: pb.SessionRef) -> None:
    server.kill()
    server.start()


def _stop(raw: Raw, server: Server, session: pb.SessionRef) -> None:
    server.stop()
    server.start()


@pytest.mark.parametrize("end", [_abort, _kill, _stop])
@pytest.mark.parametrize("committed", [False, True], ids=["first", "update"])
def test_the_same_snapshot_continues_without_being_read_again(
    server: Server, origin: tuple[Server, bytes], volume: str, tmp_path: Path, end: End, committed: bool
) -> None:
    there, content = origin
    if committed:
        server.sync(build(tmp_path / "before", SIZE, [(0, noise(3, SIZE))]), volume, "--region-size", "64K")
    snapshot = f"commit:{ok('replica', 'points', there.url('v'))['points'][1]['commit_id']}"
    durable, lost = 5, 2
    with Raw(server.address) as raw:
        session = raw.open(volume, SIZE, snapshot_id=snapshot).session
        changes = [write_request(at * REGION, content[at * REGION : (at + 1) * REGION]) for at in range(durable + lost)]
        raw.apply(
            [
                change_message(1, changes[:durable], session=session, flush=True),
                # Applied, and never made durable: only what is durable counts.
                change_message(2, changes[durable:]),
            ]
        )
        end(raw, server, session)
        report = ok("sync", f"{there.address}/v@1", server.url(volume))
    assert report["bytes"]["source_read"] == SIZE - durable * REGION
    assert report["regions"] == {"skip": 0, "unmap": 0, "send": 0, "compare": COUNT} if committed else True
    assert server.image(volume).read_bytes() == content


@pytest.mark.parametrize("other", ["commit:00", "", "the generation after it"])
def test_another_snapshot_is_read_whole(server: Server, origin: tuple[Server, bytes], volume: str, other: str) -> None:
    there, content = origin
    numbers = {point["number"]: point["commit_id"] for point in ok("replica", "points", there.url("v"))["points"]}
    with Raw(server.address) as raw:
        snapshot = f"commit:{numbers[2]}" if other.startswith("the") else other
        session = raw.open(volume, SIZE, snapshot_id=snapshot).session
        raw.apply([change_message(1, [write_request(0, content[:REGION])], session=session, flush=True)])
        raw.abort(session)
        report = ok("sync", f"{there.address}/v@1", server.url(volume))
    assert report["bytes"]["source_read"] == SIZE
    assert server.image(volume).read_bytes() == content


def test_work_that_was_discarded_is_not_continued(server: Server, origin: tuple[Server, bytes], volume: str) -> None:
    there, content = origin
    snapshot = f"commit:{ok('replica', 'points', there.url('v'))['points'][1]['commit_id']}"
    with Raw(server.address) as raw:
        session = raw.open(volume, SIZE, snapshot_id=snapshot).session
        raw.apply([change_message(1, [write_request(0, content[:REGION])], session=session, flush=True)])
        raw.abort(session, discard=True)
        report = ok("sync", f"{there.address}/v@1", server.url(volume))
    assert report["bytes"]["source_read"] == SIZE


def test_a_killed_sync_of_a_snapshot_goes_on_where_it_was_durable(
    start_server: ServerFactory, volume: str, tmp_path: Path
) -> None:
    there, server = start_server(), start_server()
    size = 64 * MIB
    source = build(tmp_path / "source", size, [(0, noise(1, size))])
    there.sync(source, "v")
    syncing = start_cli("sync", f"{there.address}/v@1", server.url(volume), "--bwlimit", "4M", "--quiet")
    try:
        # Written after five seconds by the server's own checkpoint.
        until((server.pool / volume / "progress.json").exists, "something is durable")
    finally:
        syncing.kill()
        finish(syncing)
    snapshot = f"commit:{there.show('v')['commit_id']}"
    with Raw(server.address) as raw:
        opened = raw.open(volume, size, snapshot_id=snapshot, region_size=0)
        durable = sum(run.count for run in opened.durable_regions)
        raw.abort(opened.session)
    assert 0 < durable < 64
    report = ok("sync", f"{there.address}/v@1", server.url(volume))
    assert report["bytes"]["source_read"] == size - durable * MIB
    assert server.image(volume).read_bytes() == source.read_bytes()


# --- where nothing can be cloned --------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Server]:
    """A server whose pool cannot clone files."""
    pool = tmp_path / "pool"
    pool.mkdir()
    probe = subprocess.run(
        ["cp", "--reflink=always", __file__, str(pool / "probe")], capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        pytest.skip(f"temporary files are on a file system that can clone: {pool}")
    (pool / "probe").unlink(missing_ok=True)
    server = Server(pool).start()
    yield server
    server.stop()


def test_an_update_leaves_the_image_alone_until_it_is_committed(plain: Server, volume: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", 32 * MIB, [(0, noise(1, 32 * MIB))])
    plain.sync(source, volume)
    first = source.read_bytes()
    image = plain.image(volume)
    before = image.stat()
    change(source, [(0, noise(2, 32 * MIB))])
    syncing = start_cli("sync", source, plain.url(volume), "--quiet", "--bwlimit", "8M")
    try:
        redo = plain.pool / volume / "work.redo"
        until(lambda: redo.exists() and redo.stat().st_blocks * 512 > 4 * MIB, "the update is under way")
        shown = plain.show(volume)
        assert (shown["state"], shown["generation"], shown["path"]) == ("UPDATING", 1, str(image))
        assert shown["session_client"].endswith(f"(process {syncing.pid})")
        with Raw(plain.address) as raw:
            assert raw.read(volume, 1, 0, 32 * MIB) == first
    finally:
        syncing.kill()
        finish(syncing)
    after = image.stat()
    assert (after.st_ctime_ns, after.st_blocks) == (before.st_ctime_ns, before.st_blocks)
    shown = plain.show(volume)
    assert (shown["state"], shown["generation"], shown["kind"]) == ("UPDATING", 1, "journal")
    report = plain.sync(source, volume)
    assert report["generation"] == 2
    # What had arrived was found in the journal and is not sent again.
    assert report["bytes"]["data_sent"] < 32 * MIB - 2 * MIB
    until(lambda: plain.show(volume)["path"] is not None, "the journal is applied")
    assert image.read_bytes() == source.read_bytes()
    with Raw(plain.address) as raw:
        assert raw.read(volume, 1, 0, 32 * MIB) == first
    assert sorted(path.suffix for path in (plain.pool / volume).glob("*.redo*")) == []


def test_an_update_of_little_through_the_journal(plain: Server, volume: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, 4 * MIB))])
    plain.sync(source, volume)
    change(source, [(MIB, noise(2, 8 * KIB)), (2 * MIB, Hole(MIB))])
    report = plain.sync(source, volume)
    assert report["bytes"]["destination_written"] == 8 * KIB
    assert report["bytes"]["unmapped"] == MIB
    assert report["generation"] == 2
    until(lambda: plain.show(volume)["path"] is not None, "the journal is applied")
    assert plain.image(volume).read_bytes() == source.read_bytes()
    points = ok("replica", "points", plain.url(volume))["points"]
    # The older one costs its before-images, and nothing else.
    assert [(point["number"], point["bytes_held"]) for point in points] == [(2, 3 * MIB), (1, MIB + 8 * KIB)]


def test_a_journal_has_the_limit_that_its_server_gives_it(tmp_path: Path, volume: str) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    server = Server(pool, flags=["--journal-limit", "1M"]).start()
    try:
        source = build(tmp_path / "source", 8 * MIB, [(0, noise(1, 8 * MIB))])
        # A first sync needs no journal.
        assert server.sync(source, volume)["generation"] == 1
        if server.show(volume)["kind"] != "journal":
            pytest.skip(f"temporary files are on a file system that can clone: {pool}")
        first = source.read_bytes()
        change(source, [(0, noise(2, 4 * MIB))])
        done = run_cli("sync", source, server.url(volume), "--quiet")
        refused(done, volume, "journal", "limit", str(MIB))
        assert server.image(volume).read_bytes() == first
        # What the session had written is given back with it.
        assert sorted(path.name for path in (pool / volume).glob("work*")) == []
        build(source, 8 * MIB, [(0, noise(1, 8 * MIB)), (MIB, noise(3, MIB // 2))])
        assert server.sync(source, volume)["generation"] == 2
    finally:
        server.stop()
