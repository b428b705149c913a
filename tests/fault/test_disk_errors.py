"""What a failing disk does to a replica: nothing to what is committed.

In one process every call of disk.py that a session makes is made to fail once, one after the other: whatever fails, the
committed generations stay byte-identical, a commit either happened or did not (and the answer says which), a session
whose flush failed is dead and its work dropped, and the next sync succeeds. The same with real errors of real system
calls, injected by strace into the server's and the client's process, and with a file system that is really full or
read-only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from blockferry.common import disk
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.server.session import State
from blockferry.v1 import replication_pb2 as pb

from tests.conftest import ServerFactory
from tests.fault.faults import Injected
from tests.fault.local import Local
from tests.fault.raw import REGION, change_message, write_request
from tests.images import KIB, MIB, build, change, noise
from tests.support import PROGRAMS, Finished, Server, refused, run_cli

SIZE = 8 * REGION
NAME = "v"

# --- every call once, in one process ----------------------------------------------------------------------------------

CALLS = ("create", "append", "pwrite", "truncate", "fsync", "fsync_directory", "rename", "unlink")


@dataclass
class Outcome:
    """How far a session came."""

    error: BlockferryError | OSError | None
    at: str
    committed: bool


async def _committed(local: Local, seed: int) -> bytes:
    session = (await local.open(NAME, SIZE)).session
    content = noise(seed, SIZE)
    for offset in range(0, SIZE, REGION):
        await local.write(session, offset, content[offset : offset + REGION])
    await local.commit(NAME, session, seed.to_bytes(16, "big"), pb.Retention(last=2))
    await local.replica(NAME).complete()
    return content


async def _session(local: Local, content: bytes) -> Outcome:
    """A whole session, as a client goes through it: at the first error it aborts."""
    at, session = "open", pb.SessionRef()
    try:
        session = (await local.open(NAME, SIZE, snapshot_id="snapshot")).session
        at = "map"
        await local.map(session)
        at = "write"
        messages = [
            change_message(1, [write_request(0, content[:REGION])], session=session, flush=True),
            change_message(2, [write_request(REGION, content[REGION : 2 * REGION])], flush=True),
            change_message(3, [pb.UnmapRegionRequest(offset=2 * REGION, length=REGION)]),
        ]
        messages[-1].last = True
        await local.apply(messages)
        at = "commit"
        await local.commit(NAME, session, b"c" * 16, pb.Retention(last=1))
    except (BlockferryError, OSError) as error:
        await local.abort(session)
        return Outcome(error, at, False)
    # What fails now is tried again: by the next session, or at the next start.
    with contextlib.suppress(BlockferryError, OSError):
        await local.replica(NAME).complete()
    return Outcome(None, "", True)


def _after(before: bytes) -> bytes:
    return noise(9, 2 * REGION) + bytes(REGION) + before[3 * REGION :]


async def _count(directory: Path, clones: bool) -> dict[str, int]:
    """How often a session that succeeds makes each call."""
    local = await Local.start(directory, clones=clones)
    before = b""
    for seed in (1, 2):
        before = await _committed(local, seed)
    with pytest.MonkeyPatch.context() as patch:
        watched = {name: Injected(patch, name, errno.EIO, when=0) for name in CALLS}
        assert (await _session(local, _after(before))).committed
    await local.stop()
    return {name: one.calls for name, one in watched.items()}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("clones", [True, False], ids=["clones", "journal"])
@pytest.mark.parametrize("name", CALLS)
async def test_any_call_may_fail(
    xfs_pool_root: Path, tmp_path: Path, name: str, clones: bool, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = xfs_pool_root / tmp_path.name
    await asyncio.to_thread(base.mkdir)
    calls = (await _count(base / "count", clones))[name]
    assert calls > 0 or (name, clones) == ("create", True), f"a session never calls {name}"
    for when in range(1, calls + 1):
        local = await Local.start(base / f"{when}", clones=clones, floor=Retention(last=1))
        old = {1: await _committed(local, 1), 2: await _committed(local, 2)}
        new = _after(old[2])
        with pytest.MonkeyPatch.context() as patch:
            log = local.replica(NAME).store.directory / "commits.log"
            injected = Injected(patch, name, number, when=when, look=log)
            outcome = await _session(local, new)
            assert injected.failed == 1
        what = f"call {when} of {name} at {outcome.at or 'the end'}: {outcome.error}"
        # Only what comes after the commit record may fail without failing the commit.
        assert (b"c" * 16).hex() in injected.seen or not outcome.committed, what
        if isinstance(outcome.error, BlockferryError):
            assert outcome.error.code in (Code.IO_ERROR, Code.OUT_OF_SPACE), what
        await _check(local, old, new, outcome, what)
        if outcome.at == "write" and name == "fsync":
            # Invariant 3: after a failed flush the session is dead.
            assert not local.replica(NAME).store.content.has_work(), what
        # The same by what is on the disk alone.
        await local.die()
        local = await Local.start(base / f"{when}", clones=clones, floor=Retention(last=1))
        await _check(local, old, new, outcome, what)
        last = await _committed(local, 7)
        assert await local.read(NAME, 0, 0, SIZE) == last, what
        assert local.replica(NAME).state is State.CONSISTENT
        await local.stop()
        await asyncio.to_thread(shutil.rmtree, base / f"{when}")


async def _check(local: Local, old: dict[int, bytes], new: bytes, outcome: Outcome, what: str) -> None:
    replica = local.replica(NAME)
    found = [point.number for point in replica.store.generations.points]
    if outcome.committed:
        assert found[-1] == 3, what
    else:
        assert found == [1, 2], what
    for number in found:
        expected = new if number == 3 else old[number]
        assert await local.read(NAME, number, 0, SIZE) == expected, f"{what}: generation {number}"
    assert replica.session is None and replica.state is State.CONSISTENT, what


# --- in one process: what fails for good ------------------------------------------------------------------------------


@pytest.fixture
async def local(xfs_pool_root: Path, tmp_path: Path) -> AsyncIterator[Local]:
    local = await Local.start(xfs_pool_root / tmp_path.name)
    yield local
    await local.stop()


async def test_a_commit_after_a_failed_flush_is_refused_with_its_cause(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await _committed(local, 1)
    session = (await local.open(NAME, SIZE)).session
    await local.write(session, 0, noise(2, REGION))
    injected = Injected(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(BlockferryError) as caught:
        await local.flush(session)
    assert (caught.value.code, caught.value.volume) == (Code.IO_ERROR, NAME)
    # The disk is well again, and that changes nothing: whatever is tried, the session is dead.
    injected.over()
    for attempt in (
        local.write(session, REGION, noise(2, REGION)),
        local.flush(session),
        local.digests(session, [(0, 1)]),
        local.commit(NAME, session, b"x" * 16),
    ):
        with pytest.raises(BlockferryError) as caught:
            await attempt
        assert caught.value.code is Code.IO_ERROR
    assert [point.number for point in await local.points(NAME)] == [1]
    await local.abort(session)
    assert not local.replica(NAME).store.content.has_work()
    assert await local.read(NAME, 0, 0, SIZE) == before


async def test_the_flush_of_a_map_counts(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the map flushes the image, and the kernel tells of a lost write once."""
    session = (await local.open(NAME, SIZE)).session
    await local.write(session, 0, noise(2, REGION))
    Injected(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(BlockferryError):
        await local.map(session)
    with pytest.raises(BlockferryError) as caught:
        await local.commit(NAME, session, b"x" * 16)
    assert caught.value.code is Code.IO_ERROR
    assert await local.points(NAME) == []


async def test_a_commit_record_that_is_not_durable_is_not_believed(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record was written, its flush failed: whoever reads the log next must not find it there."""
    await _committed(local, 1)
    session = (await local.open(NAME, SIZE)).session
    log = local.replica(NAME).store.directory / "commits.log"
    before = log.read_bytes()
    real: Callable[[int], None] = disk.fsync
    failed: list[int] = []

    def fail_once_for_the_log(fd: int) -> None:
        if not failed and os.path.samestat(os.fstat(fd), os.stat(log)):
            failed.append(fd)
            raise OSError(errno.EIO, "injected")
        real(fd)

    monkeypatch.setattr(disk, "fsync", fail_once_for_the_log)
    with pytest.raises(BlockferryError) as caught:
        await local.commit(NAME, session, b"x" * 16)
    assert caught.value.code is Code.IO_ERROR and len(failed) == 1
    assert log.read_bytes() == before
    assert [point.number for point in await local.points(NAME)] == [1]
    # Asked again, as after a lost answer: it still did not happen.
    with pytest.raises(BlockferryError) as caught:
        await local.commit(NAME, session, b"x" * 16)
    assert caught.value.code is Code.STALE_EPOCH


async def test_a_replica_that_cannot_be_opened_leaves_the_others_alone(local: Local, tmp_path: Path) -> None:
    await _committed(local, 1)
    path = local.pool.path
    await local.stop()
    shutil.copytree(path / NAME, path / "broken")
    (path / "broken" / "session.json").unlink()
    (path / "broken" / "session.json").mkdir()
    local.pool = (await Local.start(path)).pool
    assert [replica.name for replica in local.pool.list()] == [NAME]


# --- really full ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pool(tmp_path: Path) -> Iterator[Path]:
    """A mounted XFS of 300 MiB, the smallest there is."""
    if os.geteuid() != 0:
        pytest.skip("mounting XFS needs root")
    image, mount = tmp_path / "small.img", tmp_path / "small"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(300 * MIB)
    for words in (["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], ["mount", "-o", "loop", str(image), str(mount)]):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{words[0]}: {done.stderr.strip()}")
    pool = mount / "pool"
    pool.mkdir()
    try:
        yield pool
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.fixture
def small_server(small_pool: Path, tmp_path: Path) -> Iterator[Server]:
    # Nothing is reserved: these tests are about a disk that really is full.
    server = Server(small_pool, flags=("--reserve", "0"))
    server.log = tmp_path / "server.log"
    server.start()
    yield server
    server.stop()


def _fill(path: Path, length: int) -> None:
    """Take space that is not worth writing."""
    with path.open("wb") as file:
        while length > 0:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, min(length, 16 * MIB))
            except OSError:
                return
            length -= 16 * MIB


def _free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def test_a_full_pool_ends_the_session_and_not_the_generation(small_server: Server, tmp_path: Path) -> None:
    server = small_server
    source = build(tmp_path / "source", 128 * MIB, [(0, noise(1, 64 * MIB))])
    server.sync(source, NAME)
    first = source.read_bytes()
    ballast = server.pool.parent / "ballast"
    _fill(ballast, _free(server.pool) - 24 * MIB)
    before = _free(server.pool)

    change(source, [(0, noise(2, 64 * MIB))])
    line = refused(run_cli("sync", source, server.url(NAME), "--quiet"), NAME, "no space left on device", "free or add")
    assert "Traceback" not in line
    shown = server.show(NAME)
    assert (shown["state"], shown["generation"], shown["session_client"]) == ("CONSISTENT", 1, None)
    assert server.image(NAME).read_bytes() == first
    # All space the session took is given back, but for what the file system itself needs to have had it.
    subprocess.run(["sync", "-f", server.pool], check=True)
    assert _free(server.pool) > before - 2 * MIB

    ballast.unlink()
    report = server.sync(source, NAME)
    assert report["generation"] == 2
    assert server.image(NAME).read_bytes() == source.read_bytes()
    assert run_cli("verify", source, server.url(NAME)).status == 0


def test_a_full_pool_ends_a_first_sync_too(small_server: Server, tmp_path: Path) -> None:
    server = small_server
    source = build(tmp_path / "source", 400 * MIB, [(at * MIB, noise(at, 32 * MIB)) for at in range(0, 320, 32)])
    before = _free(server.pool)
    refused(run_cli("sync", source, server.url(NAME), "--quiet"), NAME, "no space left on device")
    assert server.show(NAME)["state"] == "SYNCING" and server.show(NAME)["path"] is None
    subprocess.run(["sync", "-f", server.pool], check=True)
    assert _free(server.pool) > before - 2 * MIB
    smaller = build(tmp_path / "smaller", 64 * MIB, [(0, noise(2, 32 * MIB))])
    server.sync(smaller, NAME)
    assert server.image(NAME).read_bytes() == smaller.read_bytes()


def test_a_pool_without_room_for_a_session_record(small_server: Server, tmp_path: Path) -> None:
    server = small_server
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, 4 * MIB))])
    server.sync(source, NAME)
    ballast = server.pool.parent / "ballast"
    _fill(ballast, _free(server.pool))
    for number in range(10000):
        try:
            (server.pool.parent / f"small-{number}").write_bytes(bytes(4 * KIB))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            break
    change(source, [(0, noise(2, 4 * MIB))])
    refused(run_cli("sync", source, server.url(NAME), "--quiet"), NAME, "no space left on device")
    # Looking and reading need none.
    assert server.show(NAME)["generation"] == 1
    refused(run_cli("sync", source, server.url("another"), "--quiet"), "another", "no space left on device")
    assert [path.name for path in server.pool.iterdir() if not path.name.startswith(".blockferry")] == [NAME]
    ballast.unlink()
    assert server.sync(source, NAME)["generation"] == 2


def test_a_read_only_pool_is_refused_when_the_server_starts(small_pool: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_pool.parent], check=True)
    done = _server("--pool", small_pool)
    refused(done, str(small_pool), "read-only file system", program="blockferry-server")


def test_a_pool_that_becomes_read_only_keeps_its_generation(small_server: Server, tmp_path: Path) -> None:
    server = small_server
    source = build(tmp_path / "source", 4 * MIB, [(0, noise(1, 4 * MIB))])
    server.sync(source, NAME)
    first = source.read_bytes()
    change(source, [(0, noise(2, 4 * MIB))])
    # What a file system does to itself when its disk fails; the open log keeps a plain remount from working.
    subprocess.run(["xfs_io", "-x", "-c", "shutdown", str(server.pool.parent)], check=True)
    refused(run_cli("sync", source, server.url(NAME), "--quiet"), NAME, "input/output error")
    server.kill()
    subprocess.run(["umount", server.pool.parent], check=True)
    subprocess.run(["mount", "-o", "loop", tmp_path / "small.img", server.pool.parent], check=True)
    server.start()
    assert server.image(NAME).read_bytes() == first
    assert server.sync(source, NAME)["generation"] == 2


def _server(*args: object) -> Finished:
    words = [str(PROGRAMS / "blockferry-server"), *map(str, args)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


# --- real errors of real calls ----------------------------------------------------------------------------------------


def _strace(path: Path, rule: str) -> list[str]:
    """Calls on `path` fail by `rule`. With -D the process that is started stays the one that can be ended."""
    return ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-P", str(path), "-e", f"inject={rule}", "--"]


@pytest.fixture(scope="module")
def can_trace() -> None:
    """Skips, saying why, where processes cannot be traced."""
    try:
        done = subprocess.run(
            [*_strace(Path("/"), "fsync:error=EIO"), "true"], capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    if done.returncode:
        pytest.skip(f"strace cannot trace here: {done.stderr.strip()}")


class TracedServer(Server):
    """A server some of whose system calls fail."""

    rule = ""

    @property
    def words(self) -> list[str]:
        image = self.pool / NAME / "work.img"
        return [*_strace(image, self.rule), *super().words] if self.rule else super().words


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("fsync:error=EIO", ("input/output error",)),
        ("pwrite64,pwritev,pwritev2:error=EIO", ("cannot write", "at offset", "input/output error")),
        ("pread64,preadv,preadv2:error=EIO", ("cannot read", "at offset", "input/output error")),
    ],
    ids=["fsync", "write", "read"],
)
def test_the_server_survives_its_disk(
    rule: str, words: tuple[str, ...], pool_root: Path, tmp_path: Path, can_trace: None
) -> None:
    pool = pool_root / tmp_path.name
    pool.mkdir()
    server = TracedServer(pool)
    source = build(tmp_path / "source", 16 * MIB, [(0, noise(1, 16 * MIB))])
    try:
        server.start()
        server.sync(source, NAME)
        first = source.read_bytes()
        server.kill()
        change(source, [(number * MIB, noise(2 + number, 64 * KIB)) for number in range(16)])
        server.rule = rule
        server.start()
        line = refused(run_cli("sync", source, server.url(NAME), "--quiet"), NAME, *words)
        assert str(pool) not in line, "a client has no business with paths of the server"
        assert (server.show(NAME)["state"], server.show(NAME)["generation"]) == ("CONSISTENT", 1)
        server.kill()
        server.rule = ""
        server.start()
        assert server.image(NAME).read_bytes() == first
        assert server.sync(source, NAME)["generation"] == 2
        assert server.image(NAME).read_bytes() == source.read_bytes()
    finally:
        server.kill()


def _traced_sync(path: Path, rule: str, source: Path, server: Server, state: Path) -> Finished:
    words = [
        *_strace(path, rule), str(PROGRAMS / "blockferry"), "sync", str(source), server.url(NAME), "--quiet",
        "--state-dir", str(state),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("pread64,preadv,preadv2:error=EIO", ("source: cannot read at offset", "input/output error")),
        ("fsync:error=EIO", ("source: cannot read the allocation", "input/output error")),
        ("fsync:error=EIO", ("cannot keep the commit id", "input/output error")),
    ],
    ids=["read", "map", "commit-id"],
)
def test_the_client_survives_its_disk(
    rule: str, words: tuple[str, ...], start_server: ServerFactory, tmp_path: Path, can_trace: None
) -> None:
    server = start_server()
    source = build(tmp_path / "source", 64 * MIB, [(0, noise(1, 64 * MIB))])
    server.sync(source, NAME)
    first = source.read_bytes()
    change(source, [(8 * MIB, noise(2, 4 * MIB))])
    ledger = tmp_path / "state" / "commits" / f"{server.show(NAME)['uuid']}.json.tmp"
    path = ledger if "commit id" in words[0] else source
    refused(_traced_sync(path, rule, source, server, tmp_path / "state"), *words)
    shown = server.show(NAME)
    assert (shown["state"], shown["generation"], shown["session_client"]) == ("CONSISTENT", 1, None)
    assert server.image(NAME).read_bytes() == first
    assert server.sync(source, NAME)["generation"] == 2
    assert server.image(NAME).read_bytes() == source.read_bytes()
