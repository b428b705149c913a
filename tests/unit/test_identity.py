"""A pool is known by the file that names it: moved and copied pools are told apart, and in a copy nothing vouches for
content."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from blockferry.common import disk, linux
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.server import commits, identity
from blockferry.server import pool as pool_module
from blockferry.server.identity import File, PoolIdentity, PoolRecord, Verdict, judge
from blockferry.server.pool import Pool
from blockferry.server.store import VOUCHERS, Store
from blockferry.v1 import replication_pb2 as pb

RECORD = PoolRecord(format=1, uuid="u", path="/a", device=1, inode=2, born_ns=3, created_at_us=4)


@pytest.mark.parametrize(
    ("record", "path", "found", "verdict"),
    [
        (RECORD, "/a", File(1, 2, 3), Verdict.KNOWN),
        (RECORD, "/a", File(9, 2, 3), Verdict.KNOWN),
        (RECORD, "/b", File(1, 2, 3), Verdict.MOVED),
        (RECORD, "/b", File(9, 2, 3), Verdict.RESTORED),
        (RECORD, "/a", File(1, 9, 3), Verdict.RESTORED),
        (RECORD, "/b", File(1, 9, 3), Verdict.RESTORED),
        (RECORD, "/a", File(1, 2, 9), Verdict.RESTORED),
        (None, "/a", File(1, 2, 3), Verdict.RESTORED),
        (None, "/a", None, Verdict.NEW),
    ],
    ids=[
        *("known", "numbered-anew", "moved", "another-disk", "copied", "copied-elsewhere", "inode-used-again"),
        *("unreadable", "new"),
    ],
)
def test_verdicts(record: PoolRecord | None, path: str, found: File | None, verdict: Verdict) -> None:
    assert judge(record, path, found) is verdict


def test_a_file_has_a_birth_that_no_copy_has(tmp_path: Path) -> None:
    births = []
    for name in ("one", "other"):
        path = tmp_path / name
        path.touch()
        fd = os.open(path, os.O_RDONLY)
        births.append(linux.birth_ns(fd))
        os.utime(path, (1, 1))
        assert linux.birth_ns(fd) == births[-1]
        # It was made just now; 0 where the file system does not say.
        assert births[-1] == 0 or abs(births[-1] - os.fstat(fd).st_ctime_ns) < 10**9
        os.close(fd)
    assert births[0] <= births[1]


async def _open(path: Path) -> Pool:
    return await Pool.open("main", path, 60.0, Retention(last=1))


async def _with_a_replica(path: Path) -> None:
    disk.make_directory(path)
    pool = await _open(path)
    replica = await pool.get_or_create("v", 0)
    session = await replica.open_session(pb.OpenSessionRequest(volume="v", size=4096))
    ref = pb.SessionRef(session_id=session.session_id, epoch=session.epoch)
    await commits.commit([commits.Asked(replica, ref, bytes(range(16)))])
    await pool.close()
    assert (path / "v/clean.json").exists()


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _record(path: Path) -> PoolRecord:
    return msgspec.json.decode((path / identity.NAME).read_bytes(), type=PoolRecord)


async def test_what_is_noted_is_the_file_itself(tmp_path: Path) -> None:
    await _with_a_replica(tmp_path / "a")
    info, record = (tmp_path / "a" / identity.NAME).stat(), _record(tmp_path / "a")
    assert (record.device, record.inode) == (info.st_dev, info.st_ino)
    assert (record.format, record.path) == (1, _real(tmp_path / "a"))
    assert PoolIdentity(tmp_path / "a").verdict is Verdict.KNOWN


async def test_a_pool_that_is_where_it_was_is_not_written(tmp_path: Path) -> None:
    await _with_a_replica(tmp_path / "a")
    before = (tmp_path / "a" / identity.NAME).stat()
    pool = await _open(tmp_path / "a")
    store = pool.get("v").store
    assert store.generations.newest is not None and store.trusted_digests(store.generations.newest) is not None
    await pool.close()
    after = (tmp_path / "a" / identity.NAME).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


async def test_a_moved_pool_is_believed(tmp_path: Path) -> None:
    await _with_a_replica(tmp_path / "a")
    uuid = _record(tmp_path / "a").uuid
    (tmp_path / "a").rename(tmp_path / "b")
    pool = await _open(tmp_path / "b")
    store = pool.get("v").store
    assert store.generations.newest is not None and store.trusted_digests(store.generations.newest) is not None
    assert not pool.is_behind(pool.get("v"))
    await pool.close()
    assert (_record(tmp_path / "b").uuid, _record(tmp_path / "b").path) == (uuid, _real(tmp_path / "b"))
    assert PoolIdentity(tmp_path / "b").verdict is Verdict.KNOWN


@pytest.mark.parametrize("kind", ["copied", "named-by-nothing", "unreadable"])
async def test_in_doubt_nothing_vouches_before_anything_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "a"
    await _with_a_replica(path)
    if kind == "copied":
        path.rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", path)
    elif kind == "named-by-nothing":
        (path / identity.NAME).unlink()
    else:
        (path / identity.NAME).write_bytes(b"{")
    (path / "v/progress.json").write_bytes(b"{}")
    seen: list[list[str]] = []

    def opened(directory: Path, *, clones: bool, journal_limit: int) -> Store:
        seen.append([name for name in VOUCHERS if (directory / name).exists()])
        return Store(directory, clones=clones, journal_limit=journal_limit)

    monkeypatch.setattr(pool_module, "Store", opened)
    pool = await _open(path)
    assert seen == [[]]
    store = pool.get("v").store
    assert store.generations.newest is not None and store.trusted_digests(store.generations.newest) is None
    assert pool.is_behind(pool.get("v")) is (kind != "named-by-nothing")
    await pool.close()
    assert PoolIdentity(path).verdict is Verdict.KNOWN


async def test_a_copy_stays_one_until_its_doubts_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await _with_a_replica(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "remove_durably", fails)
        with pytest.raises(BlockferryError) as caught:
            await _open(tmp_path / "b")
        assert caught.value.code is Code.IO_ERROR
    assert PoolIdentity(tmp_path / "b").verdict is Verdict.RESTORED
    await (await _open(tmp_path / "b")).close()
    assert PoolIdentity(tmp_path / "b").verdict is Verdict.KNOWN


async def test_the_notice_lasts_until_the_next_commit_over_restarts(tmp_path: Path) -> None:
    await _with_a_replica(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for _ in range(2):
        pool = await _open(tmp_path / "b")
        assert pool.is_behind(pool.get("v")) and pool.restored_at_us > 0
        await pool.close()
    pool = await _open(tmp_path / "b")
    replica = pool.get("v")
    session = await replica.open_session(pb.OpenSessionRequest(volume="v", size=4096))
    ref = pb.SessionRef(session_id=session.session_id, epoch=session.epoch)
    await commits.commit([commits.Asked(replica, ref, bytes(16))])
    assert not pool.is_behind(replica)
    await pool.close()


async def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    await _with_a_replica(tmp_path / "a")
    content = b'{"format": 2, "other": true}'
    (tmp_path / "a" / identity.NAME).write_bytes(content)
    with pytest.raises(BlockferryError, match="written by a newer blockferry") as caught:
        await _open(tmp_path / "a")
    assert caught.value.code is Code.UNSUPPORTED
    assert (tmp_path / "a" / identity.NAME).read_bytes() == content
    assert (tmp_path / "a/v/clean.json").exists()


async def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    await _with_a_replica(path)
    assert PoolIdentity(path).verdict is Verdict.KNOWN
