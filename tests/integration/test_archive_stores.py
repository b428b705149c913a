"""Object stores over real files and real sockets: the contract, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blockferry.common import disk
from blockferry.common.archive import remote
from blockferry.common.archive.directory import INCOMING, DirectoryStore
from blockferry.common.archive.remote import RemoteStore
from blockferry.common.archive.retry import Patience, Retrying
from blockferry.common.archive.store import Access, Exists, Missing, Place, Transient, open_store
from blockferry.common.errors import BlockferryError, Code

from tests.s3 import CUT, HANG, S3, Answer, error, imitated
from tests.store_contract import CHECKS, Check

QUICK = Patience(pause=0.001, most=0.002)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of whoever runs the tests says where stores are."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
async def s3(environment: pytest.MonkeyPatch) -> AsyncIterator[S3]:
    """An imitation, which the environment names."""
    async with imitated() as state:
        for name, value in state.environment().items():
            environment.setenv(name, value)
        yield state


def once(uri: str = "s3://bucket/some/prefix", **options: str) -> RemoteStore:
    """A store that asks once."""
    return RemoteStore.open(Place.parse(uri), Access(options=options))


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_a_directory_keeps_the_contract(check: Check, tmp_path: Path) -> None:
    async with await open_store(f"file://{tmp_path}") as store:
        await check(store)
    assert list((tmp_path / INCOMING).iterdir() if (tmp_path / INCOMING).exists() else []) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_s3_keeps_the_contract(check: Check, s3: S3) -> None:
    s3.page = 2
    s3.objects["some/prefixed"] = s3.objects["some/a"] = b"somebody else's"
    async with await open_store("s3://bucket/some/prefix") as store:
        await check(store)
    assert (s3.objects.pop("some/prefixed"), s3.objects.pop("some/a")) == (b"somebody else's",) * 2
    assert {key for key in s3.objects if not key.startswith("some/prefix/")} == set()


async def test_without_a_prefix_the_bucket_is_the_store(s3: S3) -> None:
    async with await open_store("s3://bucket") as store:
        await store.put_new("a/b", [b"x"])
        assert list(await store.list("")) == ["a/b"]
    assert s3.objects == {"a/b": b"x"}


# --- directories ------------------------------------------------------------------------------------------------------


async def test_a_directory_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("nothing", "file"):
        with pytest.raises(BlockferryError) as told:
            await open_store(f"file://{tmp_path}/{name}")
        assert told.value.code is Code.NOT_FOUND
    with pytest.raises(BlockferryError, match="no options"):
        await open_store(f"file://{tmp_path}", Access(options={"region": "x"}))


async def test_objects_are_durable_before_they_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, then the name, then the directory that holds it, in this order."""
    done: list[tuple[str, str]] = []
    for name in ("fsync", "link", "rename", "unlink", "fsync_directory"):
        real = getattr(disk, name)

        def noted(*args: object, name: str = name, real: object = real) -> None:
            shown = args[-1]
            done.append((name, shown.name if isinstance(shown, Path) and name != "unlink" else ""))
            real(*args)  # type: ignore[operator]

        monkeypatch.setattr(disk, name, noted)
    store = await DirectoryStore.open(tmp_path)
    await store.put_new("log/1", [b"x"])
    new = [("fsync", ""), ("link", "1"), ("unlink", ""), ("fsync_directory", "log")]
    # The directories are made first, each flushed in the one above.
    assert done[-4:] == new and {name for name, _ in done[:-4]} == {"fsync_directory"}
    assert ("fsync_directory", tmp_path.name) in done[:-4]
    del done[:]
    await store.put("log/1", b"y")
    assert [one for one in done if one[0] != "fsync_directory" or one[1] == "log"] == [
        ("fsync", ""), ("rename", "1"), ("unlink", ""), ("fsync_directory", "log"),
    ]  # fmt: skip
    del done[:]
    with pytest.raises(Exists):
        await store.put_new("log/1", [b"z"])
    # Whoever loses relies on the winner's object.
    assert ("fsync_directory", "log") in done[done.index(("link", "1")) :]
    del done[:]
    await store.delete("log/1")
    assert done == [("unlink", ""), ("fsync_directory", "log")]


@pytest.mark.parametrize("failing", ["fsync", "link", "append"])
async def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    store = await DirectoryStore.open(tmp_path)
    await store.put_new("log/1", [b"x"])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, failing, full)
    with pytest.raises(BlockferryError) as told:
        await store.put_new("log/2", [b"y"])
    assert told.value.code is Code.OUT_OF_SPACE and "log/2" in told.value.line()
    monkeypatch.undo()
    assert list(await store.list("")) == ["log/1"]
    assert list((tmp_path / INCOMING).iterdir()) == []


async def test_what_the_dead_left_is_swept_and_the_living_are_not(tmp_path: Path) -> None:
    incoming = tmp_path / INCOMING
    incoming.mkdir()
    (incoming / "left").write_bytes(b"half")
    with (incoming / "held").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        store = await DirectoryStore.open(tmp_path)
        await store.put_new("a", [b"x"])
        assert [path.name for path in incoming.iterdir()] == ["held"]


async def test_links_lead_out_of_a_directory_and_are_not_followed(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    for path in (outside, root):
        path.mkdir()
    (outside / "x").write_bytes(b"precious")
    (root / "data").symlink_to(outside)
    store = await DirectoryStore.open(root)
    for request in (
        store.put("data/x", b"y"),
        store.put_new("data/y", [b"y"]),
        store.get("data/x"),
        store.delete("data/x"),
    ):
        with pytest.raises(BlockferryError) as told:
            await request
        assert told.value.code is Code.UNSUPPORTED
    assert [path.read_bytes() for path in outside.iterdir()] == [b"precious"]
    assert list(await store.list("")) == []


async def test_an_object_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    store = await DirectoryStore.open(tmp_path)
    await store.put_new("a", [b"x" * 100])
    os.truncate(tmp_path / "a", 10)
    with pytest.raises(BlockferryError) as told:
        await store.get_range("a", 0, 100)
    assert told.value.code is Code.DATA_MISMATCH


_WRITE = """
import asyncio, sys
from blockferry.common.archive.store import open_store

async def write():
    async with await open_store(sys.argv[1]) as store:
        await store.put_new("log/1", [b"whole ", b"object"])

asyncio.run(write())
"""


@pytest.mark.parametrize(("point", "there"), [("object-before-link", False), ("object-before-flush", True)])
async def test_a_writer_that_dies_leaves_a_whole_object_or_none(tmp_path: Path, point: str, there: bool) -> None:
    environment = {**os.environ, "BLOCKFERRY_CRASH_POINT": point}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _WRITE, f"file://{tmp_path}", env=environment)
    assert await process.wait() == -signal.SIGKILL
    store = await DirectoryStore.open(tmp_path)
    assert list(await store.list("")) == (["log/1"] if there else [])
    if there:
        assert await store.get("log/1") == b"whole object"
    await store.put_new("log/2", [b"x"])
    assert list((tmp_path / INCOMING).iterdir()) == []


# --- what S3 answers on bad days --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_store_that_is_busy_is_asked_again(s3: S3, status: int) -> None:
    s3.objects["some/prefix/a"] = b"x"
    left = [2]

    def script(method: str, key: str) -> Answer | None:
        left[0] -= 1
        return error(status, "SlowDown") if left[0] >= 0 else None

    s3.script = script
    store = Retrying(once(), QUICK)
    assert await store.get("a") == b"x"
    assert (store.retries, len(s3.asked)) == (2, 3)


async def test_connections_that_break_are_made_again(s3: S3) -> None:
    s3.objects["some/prefix/a"] = b"x" * 1000
    answers = [CUT, Answer(200, b"x" * 1000, cut_after=10), CUT]
    s3.script = lambda method, key: answers.pop() if answers and method != "PUT" else None
    store = Retrying(once(), QUICK)
    await store.put("b", b"answered once")
    assert await store.get("a") == b"x" * 1000
    assert store.retries == 3


async def test_a_lost_answer_is_no_conflict(s3: S3) -> None:
    lost = [True]
    s3.lost = lambda method, key: method == "PUT" and bool(lost) and lost.pop()
    store = Retrying(once(), QUICK)
    await store.put_new("log/1", [b"ours"])
    assert [(method, headers.get("if-none-match")) for method, _, headers in s3.asked] == [
        ("PUT", "*"), ("PUT", "*"), ("HEAD", None), ("GET", None),
    ]  # fmt: skip


async def test_a_race_is_looked_at_again(s3: S3) -> None:
    """409 says that another request is under way, not that there is an object."""
    answers = [error(409, "ConditionalRequestConflict")]
    s3.script = lambda method, key: answers.pop() if answers and method == "PUT" else None
    await Retrying(once(), QUICK).put_new("log/1", [b"ours"])
    assert s3.objects == {"some/prefix/log/1": b"ours"}


async def test_deadlines_are_kept(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.2)
    s3.script = lambda method, key: HANG
    with pytest.raises(Transient, match="no answer in time"):
        async with asyncio.timeout(60):
            await once().get("a")


@pytest.mark.parametrize(
    ("answer", "code", "word"),
    [
        (error(404, "NoSuchBucket"), Code.NOT_FOUND, "no bucket bucket"),
        (error(403, "AccessDenied"), Code.PERMISSION, "somebody else's"),
        (error(403, "InvalidAccessKeyId"), Code.PERMISSION, "credentials"),
        (error(403, "SignatureDoesNotMatch"), Code.PERMISSION, "credentials"),
        (error(400, "ExpiredToken"), Code.PERMISSION, "credentials"),
        (error(403, "RequestTimeTooSkewed"), Code.PERMISSION, "clock"),
        (error(403, "QuotaExceeded"), Code.OUT_OF_SPACE, "quota"),
        (error(507, "InsufficientStorage"), Code.OUT_OF_SPACE, "full"),
        (error(301, "PermanentRedirect"), Code.INVALID_ARGUMENT, "region"),
        (error(400, "AuthorizationHeaderMalformed"), Code.INVALID_ARGUMENT, "region"),
        (error(503, "SlowDown"), Code.UNAVAILABLE, "503"),
        (Answer(405, b"<html>not an object store</html>"), Code.IO_ERROR, "405"),
        (CUT, Code.UNAVAILABLE, "127.0.0.1"),
    ],
)
async def test_errors_are_told_in_our_words(s3: S3, answer: Answer, code: Code, word: str) -> None:
    s3.script = lambda method, key: answer
    store = once()
    for request in (store.put_new("a", [b"x"]), store.get("a"), store.get_range("a", 0, 1), store.list("")):
        with pytest.raises(BlockferryError) as told:
            await request
        line = told.value.line()
        assert (told.value.code, word in line, "s3://bucket/some/prefix" in line) == (code, True, True), line
        assert told.value.next and "imitated-secret" not in line
        assert isinstance(told.value, Transient) == (code is Code.UNAVAILABLE)


async def test_nobody_listens(environment: pytest.MonkeyPatch) -> None:
    async with imitated() as gone:
        pass
    for name, value in gone.environment().items():
        environment.setenv(name, value)
    store = Retrying(once(), QUICK)
    with pytest.raises(Transient, match="connection refused") as told:
        await store.get("a")
    assert gone.endpoint in told.value.line() and "endpoint" in told.value.next
    assert store.retries == Patience().first_attempts - 1


async def test_a_store_without_conditional_writes_is_asked_first(s3: S3) -> None:
    store = once(conditional="no")
    assert not store.conditional
    await store.put_new("a", [b"x"])
    with pytest.raises(Exists):
        await store.put_new("a", [b"y"])
    assert s3.objects == {"some/prefix/a": b"x"}
    assert [(method, headers.get("if-none-match")) for method, _, headers in s3.asked] == [
        ("HEAD", None), ("PUT", None), ("HEAD", None),
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["gs", "az"])
async def test_other_providers_are_accepted_and_said_to_be_untested(
    environment: pytest.MonkeyPatch, tmp_path: Path, scheme: str
) -> None:
    environment.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    environment.setenv("AZURE_STORAGE_ACCOUNT_KEY", "aHVzaA==")
    store = await open_store(f"{scheme}://container/prefix")
    assert "never been tried" in store.notice
    with pytest.raises(BlockferryError):
        await open_store(f"{scheme}://container/prefix", Access(options={"region": "x"}))


async def test_missing_objects_are_missing(s3: S3) -> None:
    with pytest.raises(Missing):
        await once().get("a")
    with contextlib.suppress(Missing):
        await once().delete("a")
