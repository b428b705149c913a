"""Wherever the process dies, the last committed generation is there afterwards, whole, and the next session can go on;
what is damaged or too new is refused and left alone."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from blockferry.common import disk, linux
from blockferry.common.durable import Log
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import volume
from blockferry.server.cache import DigestCache
from blockferry.server.store import FORMAT, FORMAT_OF_FILES, SessionRecord, Store
from pyroaring import BitMap

from tests.unit.conftest import Place
from tests.unit.stores import (
    IDS,
    REGION,
    SIZE,
    clones,
    clones_on,
    commit,
    fill,
    names,
    opened,
    pattern,
    read,
    read_work,
    recorded,
    reopened,
    snapshot,
    working,
)

T = TypeVar("T")

# --- dying anywhere ---------------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone; nothing catches this."""


class Death:
    """Lets the process die at its `at`-th change to the disk: before it, after it, or half way through a write."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, when: str) -> None:
        self.left = at
        self.when = when
        for name in ("create", "append", "pwrite", "truncate", "fsync", "fsync_directory", "rename", "unlink"):
            patch.setattr(disk, name, self._wrapped(name, getattr(disk, name)))
        patch.setattr(linux, "fallocate", self._wrapped("fallocate", linux.fallocate))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any) -> Any:
            self.left -= 1
            if self.left > 0:
                return real(*arguments)
            if self.left == 0 and self.when == "after":
                made = real(*arguments)
                if name == "create":
                    os.close(made)
            if self.left == 0 and self.when == "half" and name in ("append", "pwrite"):
                fd, data, *offset = arguments
                real(fd, data[: len(data) // 2], *offset)
            raise Died

        return change


@dataclass
class Told:
    """What the process has promised to anybody by the time it dies."""

    created: bool = False
    epoch: int = 0
    asked: int = 0
    """Newest generation somebody asked for."""
    committed: int = 0
    """Newest generation somebody was told of."""
    completed: int = 0
    """Newest generation that is one complete image."""
    dropping: int = 0
    dropped: int = 0


SIZES = {1: SIZE, 2: SIZE, 3: SIZE + REGION}
DROPS = (2, 1)
"""In this order after the last commit: one in the middle, then the oldest."""


async def live(directory: Path, told: Told, *, clones: bool) -> None:
    """Three generations, of which two are dropped."""
    store = Store.create(directory, REGION, clones=clones)
    told.created = True
    try:
        for number, size in SIZES.items():
            store.write_session(SessionRecord(epoch=number, session_id=f"session {number}", size=size))
            told.epoch = number
            async with working(store, size, "snapshot") as work:
                await work.write(written(number, size))
                await work.unmap(unmapped(number))
                await work.flush()
                store.write_progress("snapshot", size, BitMap([0]))
                told.asked = number
                await store.commit(work, IDS[number], size, DigestCache())
            told.committed = number
            await store.complete()
            told.completed = number
        for number in DROPS:
            told.dropping = number
            point = store.generations.point(number)
            assert point is not None
            await store.drop(point)
            told.dropped = number
        store.close()
    finally:
        store.abandon()


def written(number: int, size: int) -> list[tuple[int, bytes]]:
    """What generation `number` changes: the first one everything, later ones a few blocks of their own, blocks that the
    one before changed, too, and the end."""
    if number == 1:
        return [(0, pattern(1, size))]
    blocks = [(4096 * block, pattern(number, 4096)) for block in (number, number + 1, number + 20)]
    return [*blocks, (size - 5, pattern(number, 5))]


def unmapped(number: int) -> list[tuple[int, int]]:
    return [] if number == 1 else [(4096 * (number + 10), 3 * 4096)]


def holds(number: int) -> bytes:
    """All of generation `number`."""
    found = bytearray()
    for one in range(1, number + 1):
        found += bytes(SIZES[one] - len(found))
        for offset, data in written(one, SIZES[one]):
            found[offset : offset + len(data)] = data
        for offset, length in unmapped(one):
            found[offset : offset + length] = bytes(length)
    return bytes(found)


async def check_recovered(directory: Path, told: Told, *, clones: bool) -> None:
    """Whatever was promised holds, and nothing lies around that was not."""
    store = Store(directory, clones=clones)
    try:
        log = store.generations
        newest = log.newest.number if log.newest is not None else 0
        assert newest in (told.committed, told.asked)
        assert store.session.epoch in (told.epoch, told.epoch + 1)
        expected = set(range(1, newest + 1)) - set(DROPS[: DROPS.index(told.dropped) + 1] if told.dropped else ())
        present = {point.number for point in log.points}
        assert present == expected or (told.dropping != told.dropped and present == expected - {told.dropping})
        # Before anything is completed, and after it.
        for complete in (False, True):
            if complete:
                await store.complete()
            for point in log.points:
                assert store.content.problem(point) == ""
                assert await read(store, point) == holds(point.number), point.number
        if log.newest is not None:
            path = store.content.path(log.newest)
            assert path is not None and path.read_bytes() == holds(newest)
        for number in SIZES:
            found = log.committed(IDS[number])
            if number <= told.committed:
                assert found is not None and found.number == number
            elif number > told.asked:
                assert found is None
        await check_files(store)

        # And the next session goes on: with the same commit id where that commit did not happen.
        if told.asked > log.last_number:
            size = SIZES[told.asked]
            async with working(store, size) as work:
                await work.write([(0, holds(told.asked))])
                await work.flush()
                point = await store.commit(work, IDS[told.asked], size, DigestCache())
            assert point.number == told.asked
            await store.complete()
        last = await commit(store, 9, SIZE + 2 * REGION)
        assert last.number == max(told.asked, told.committed) + 1
        again = reopened(store)
        assert again.generations.newest == last
        for point in again.generations.points:
            content = pattern(9, SIZE + 2 * REGION) if point == last else holds(point.number)
            assert await read(again, point) == content
        await check_files(again)
        again.abandon()
    finally:
        store.abandon()


async def check_files(store: Store) -> None:
    """Nothing is there but what the generations need, and a session's work."""
    points = store.generations.points
    ids = [point.commit_id.hex() for point in points]
    assert {name for name in names(store) if name.endswith(".digests")} <= {f"{one}.digests" for one in ids}
    if clones(store):
        expected, work = {f"{one}.img" for one in ids}, {"work.img"}
    else:
        expected = {f"{one}.undo{suffix}" for one in ids[:-1] for suffix in ("", ".index")}
        expected, work = expected | ({"image.raw"} if points else set()), {"work.redo", "work.redo.index"}
        if not points:
            work = {"image.raw"}
    own = {"replica.json", "commits.log", "session.json", "progress.json"}
    found = {name for name in names(store) if not name.endswith(".digests")} - own
    assert expected <= found <= expected | work
    # A half of it is none.
    assert bool(found - expected) is store.content.has_work()


class Inline(ThreadPoolExecutor):
    """Runs blocking calls where they are made: a process that lives for one change needs no threads."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


@pytest.fixture
def graves(place: Place, kind: str) -> Path:
    """Where replicas live and die: a journal can do so in memory."""
    return place(kind if clones_on(kind) else "tmpfs")


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_dying_at_any_change_to_the_disk_loses_nothing_that_was_promised(
    graves: Path, kind: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume, "_executor", Inline())
    # The machine stays up: what was written is there, flushed or not.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    clones = clones_on(kind)
    ended: list[Told] = []
    with asyncio.Runner() as runner:
        for at in itertools.count(1):
            told = Told()
            directory = graves / f"replica-{at}"
            with pytest.MonkeyPatch.context() as patch:
                death = Death(patch, at, when)
                try:
                    runner.run(live(directory, told, clones=clones))
                except Died:
                    pass
                else:
                    assert death.left > 0
                    break
            if told.created or directory.exists():
                runner.run(check_recovered(directory, told, clones=clones))
            ended.append(told)
    # Every stage of the life was cut short at least once.
    assert {told.created for told in ended} == {False, True}
    assert {told.committed for told in ended} == {0, 1, 2, 3}
    assert {told.asked - told.committed for told in ended} == {0, 1}
    assert {told.committed - told.completed for told in ended} == ({0} if clones else {0, 1})
    assert {told.epoch for told in ended} == {0, 1, 2, 3}
    assert {(told.dropping, told.dropped) for told in ended} == {(0, 0), (2, 0), (1, 2), (1, 1)}


# --- states between two steps, made by hand ---------------------------------------------------------------------


async def test_work_renamed_for_a_commit_that_was_never_recorded_is_work_again(store: Store) -> None:
    first = await commit(store, 1)
    async with working(store) as work:
        await fill(work, 2)
        await work.flush()
        await store.content.seal(work, store.generations.next(IDS[2], SIZE))
    assert [name for name in names(store) if name.startswith("work.")] == []
    again = reopened(store)
    assert again.generations.committed(IDS[2]) is None
    assert again.generations.newest == first
    assert await read(again, first) == pattern(1, SIZE)
    assert await read_work(again) == pattern(2, SIZE)
    # The same commit, asked for again, now happens.
    async with working(again) as work:
        await work.flush()
        second = await again.commit(work, IDS[2], SIZE, DigestCache())
    assert second.number == 2
    await again.complete()
    assert [await read(again, point) for point in (first, second)] == [pattern(1, SIZE), pattern(2, SIZE)]
    again.abandon()


async def test_a_torn_record_is_a_commit_that_did_not_happen(store: Store) -> None:
    first = await commit(store, 1)
    await recorded(store, 2)
    log = store.directory / "commits.log"
    os.truncate(log, log.stat().st_size - 1)
    again = reopened(store)
    assert again.generations.committed(IDS[2]) is None
    assert again.generations.points == [first]
    assert await read(again, first) == pattern(1, SIZE)
    assert await read_work(again) == pattern(2, SIZE)
    again.abandon()


async def test_a_torn_record_of_a_first_commit(store: Store) -> None:
    await commit(store, 1)
    log = store.directory / "commits.log"
    os.truncate(log, log.stat().st_size - 1)
    again = reopened(store)
    assert again.generations.points == []
    assert await read_work(again) == pattern(1, SIZE)
    again.abandon()


async def test_what_was_dropped_and_not_yet_removed_is_removed(store: Store) -> None:
    first, second = await commit(store, 1), await commit(store, 2)
    kept = {name: (store.directory / name).read_bytes() for name in names(store) if name.startswith(IDS[1].hex())}
    assert len(kept) == (2 if clones(store) else 3)
    await store.drop(first)
    after = names(store)
    for name, content in kept.items():
        (store.directory / name).write_bytes(content)
    again = reopened(store)
    assert again.generations.points == [second]
    assert names(again) == after
    assert not again.content.has_work()
    again.abandon()


async def test_a_generation_given_up_by_an_update_in_place_is_work(place: Place) -> None:
    # As servers have left it that had no journal: after the record, before and after the image was renamed.
    for renamed in (False, True):
        store = Store.create(place("temporary") / "db", REGION, clones=False)
        await commit(store, 1)
        store.abandon()
        log = Log(store.directory / "commits.log")
        log.append({"kind": "overwrite", "number": 1})
        log.close()
        name = "work" if renamed else IDS[1].hex()
        (store.directory / "image.raw").rename(store.directory / f"{name}.img")
        again = opened(store.directory, store)
        assert (again.generations.newest, again.generations.committed_size) == (None, SIZE)
        assert again.content.has_work()
        assert await read_work(again) == pattern(1, SIZE)
        assert [name for name in names(again) if name.endswith(".img")] == []
        again.abandon()


async def test_temporary_files_of_a_dead_process_are_removed(store: Store) -> None:
    await commit(store, 1)
    before = names(store)
    for name in ("work.tmp", "session.json.tmp", "anything.tmp", f"{IDS[5].hex()}.digests", "promoted.img"):
        (store.directory / name).write_bytes(b"x")
    again = reopened(store)
    assert names(again) == before
    again.abandon()


# --- damage and other versions ----------------------------------------------------------------------------------

GARBAGE = [
    pytest.param(b"", id="empty"),
    pytest.param(b"{", id="torn"),
    pytest.param(bytes(50), id="zeros"),
    pytest.param(b"null", id="null"),
    pytest.param(b"[1]", id="list"),
    pytest.param(b"\xff\xfe{}", id="not UTF-8"),
    pytest.param(b'{"client": "\xff", "uuid": "\xff", "format": 1}', id="not UTF-8 inside"),
    pytest.param(b'{"format": "1", "epoch": "1"}', id="wrong types"),
]


@pytest.mark.parametrize("name", ["replica.json", "session.json"])
@pytest.mark.parametrize("content", GARBAGE)
async def test_damaged_state_is_refused_and_left_alone(store: Store, name: str, content: bytes) -> None:
    await commit(store, 1)
    store.write_session(SessionRecord(epoch=5))
    store.abandon()
    (store.directory / name).write_bytes(content)
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        opened(store.directory, store)
    assert caught.value.code is Code.CORRUPT_STATE
    assert name in caught.value.line()
    assert snapshot(store.directory) == before


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"digest_key": "z" * 64}, id="key that is no hexadecimal"),
        pytest.param({"digest_key": "\u0661" * 64}, id="key of other digits"),
        pytest.param({"digest_key": "0" * 63}, id="half a byte of a key missing"),
        pytest.param({"digest_key": "0" * 62}, id="key too short"),
        pytest.param({"digest_key": "0" * 66}, id="key too long"),
        pytest.param({"digest_key": ""}, id="no key"),
        pytest.param({"uuid": "z" * 32}, id="UUID that is no hexadecimal"),
        pytest.param({"uuid": "0" * 30}, id="UUID too short"),
        pytest.param({"uuid": ""}, id="no UUID"),
        pytest.param({"region_size": 0}, id="region size 0"),
        pytest.param({"region_size": 100_000}, id="region size that is no power of two"),
        pytest.param({"region_size": -65536}, id="region size below 0"),
        pytest.param({"region_size": 2**63}, id="region size too large"),
    ],
)
async def test_an_identity_that_cannot_be_used_is_refused_at_the_start(
    store: Store, changes: dict[str, object]
) -> None:
    await commit(store, 1)
    store.abandon()
    path = store.directory / "replica.json"
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **changes}))
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        opened(store.directory, store)
    assert caught.value.code is Code.CORRUPT_STATE
    assert "replica.json" in caught.value.line() and caught.value.cause
    assert snapshot(store.directory) == before


def test_a_replica_without_its_identity_is_refused(store: Store) -> None:
    store.abandon()
    (store.directory / "replica.json").unlink()
    with pytest.raises(BlockferryError) as caught:
        opened(store.directory, store)
    assert caught.value.code is Code.CORRUPT_STATE


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"kind": "future"},
        {"kind": "commit"},
        {"kind": "commit", "number": "1", "commit_id": IDS[1].hex(), "size": 1, "at_us": 1},
        {"kind": "commit", "number": 1, "commit_id": 1, "size": 1, "at_us": 1},
        {"kind": "commit", "number": 1, "commit_id": "xyz", "size": 1, "at_us": 1},
        {"kind": "commit", "number": 1, "commit_id": IDS[1].hex(), "size": None, "at_us": 1},
        {"kind": "drop"},
        {"kind": "overwrite", "number": None},
        {"kind": "adopt"},
        {"kind": "adopt", "size": "1"},
        {"kind": "promote"},
        {"kind": "promote", "number": 1, "commit_id": "xyz", "at_us": 1},
        {"kind": "promote", "number": 1, "commit_id": IDS[1].hex(), "at_us": None},
        {"kind": "keep", "rules": {"last": "many"}},
        {"kind": "keep", "rules": {"fortnightly": 1}},
    ],
    ids=repr,
)
def test_a_record_that_means_nothing_is_damage(store: Store, record: dict[str, object]) -> None:
    store.abandon()
    log = Log(store.directory / "commits.log")
    log.append(record)
    log.close()
    with pytest.raises(BlockferryError) as caught:
        opened(store.directory, store)
    assert caught.value.code is Code.CORRUPT_STATE


async def test_a_damaged_log_is_refused_and_left_alone(store: Store) -> None:
    await commit(store, 1)
    await commit(store, 2)
    store.abandon()
    log = store.directory / "commits.log"
    damaged = bytearray(log.read_bytes())
    damaged[20] ^= 1
    log.write_bytes(damaged)
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        opened(store.directory, store)
    assert caught.value.code is Code.CORRUPT_STATE
    assert snapshot(store.directory) == before


@pytest.mark.parametrize(
    "changes",
    [{}, {"region_size": "64K"}, {"digest_key": None}, {"more": [1]}],
    ids=["same fields", "other type", "field gone", "field more"],
)
async def test_a_newer_format_is_refused_by_name_and_left_alone(store: Store, changes: dict[str, object]) -> None:
    await commit(store, 1)
    store.abandon()
    path = store.directory / "replica.json"
    identity = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**identity, "format": FORMAT + 1, **changes}))
    # A torn record is not cut off either.
    with (store.directory / "commits.log").open("ab") as file:
        file.write(b"torn")
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        opened(store.directory, store)
    assert caught.value.code is Code.UNSUPPORTED
    assert "newer" in caught.value.line()
    assert snapshot(store.directory) == before


def test_an_older_format_is_raised_so_that_older_servers_refuse_what_is_written_from_now_on(store: Store) -> None:
    store.abandon()
    path = store.directory / "replica.json"
    identity = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**identity, "format": 1}))
    again = opened(store.directory, store)
    assert again.identity.format == FORMAT_OF_FILES
    assert msgspec.json.decode(path.read_bytes()) == identity
    again.abandon()


@pytest.mark.parametrize("damage", ["session.json", "commits.log"])
def test_a_format_is_not_raised_where_a_replica_is_refused(store: Store, damage: str) -> None:
    store.abandon()
    path = store.directory / "replica.json"
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "format": 1}))
    (store.directory / damage).write_bytes(b"rubbish\nrubbish\n")
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError):
        opened(store.directory, store)
    assert snapshot(store.directory) == before


def test_fields_that_a_newer_server_added_to_this_format_are_passed_over(store: Store) -> None:
    store.write_session(SessionRecord(epoch=5))
    store.abandon()
    for name in ("replica.json", "session.json"):
        path = store.directory / name
        path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "added": 1}))
    again = opened(store.directory, store)
    assert again.session.epoch == 5
    again.abandon()


@pytest.mark.parametrize("damage", ["session.json", f"{IDS[3].hex()}.redo.index"])
async def test_no_descriptor_is_left_behind_by_a_replica_that_is_refused(store: Store, damage: str) -> None:
    for number in (1, 2):
        await commit(store, number)
    await recorded(store, 3)
    store.abandon()
    if clones(store):
        damage = "session.json"
    (store.directory / damage).write_bytes(b"{")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockferryError):
        opened(store.directory, store)
    assert set(os.listdir("/proc/self/fd")) == before
