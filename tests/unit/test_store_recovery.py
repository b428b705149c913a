"""Wherever the process dies, the last committed generation is there afterwards, whole, and the next session can go on;
what is damaged or too new is refused and left alone."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blockferry.common import disk
from blockferry.common.durable import Log
from blockferry.common.errors import BlockferryError, Code
from blockferry.server.cache import DigestCache
from blockferry.server.store import FORMAT, SessionRecord, Store
from pyroaring import BitMap

from tests.unit.conftest import Place
from tests.unit.stores import IDS, REGION, SIZE, clones_on, commit, fill, pattern, reopened, snapshot

# --- dying anywhere ---------------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone; nothing catches this."""


class Death:
    """Lets the process die at its `at`-th change to the disk: before it, after it, or half way through an append."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, when: str) -> None:
        self.left = at
        self.when = when
        for name in ("create", "append", "truncate", "fsync", "fsync_directory", "rename", "unlink"):
            patch.setattr(disk, name, self._wrapped(name, getattr(disk, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any) -> Any:
            self.left -= 1
            if self.left > 0:
                return real(*arguments)
            if self.left == 0 and self.when == "after":
                made = real(*arguments)
                if name == "create":
                    os.close(made)
            if self.left == 0 and self.when == "half" and name == "append":
                fd, data = arguments
                real(fd, data[: len(data) // 2])
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
    given_up: bool = False
    """The newest generation may have been given up to an update in place."""
    dropping: bool = False
    dropped: bool = False


SIZES = {1: SIZE, 2: SIZE, 3: SIZE + REGION}


def live(directory: Path, told: Told, *, clones: bool) -> None:
    """Three generations, and the first one dropped."""
    store = Store.create(directory, REGION, clones=clones)
    told.created = True
    try:
        for number, size in SIZES.items():
            store.write_session(SessionRecord(epoch=number, session_id=f"session {number}", size=size))
            told.epoch = number
            told.given_up = not clones
            store.begin_work(size, "snapshot")
            fill(store, number, size)
            store.write_progress("snapshot", size, BitMap([0]))
            told.asked = number
            store.commit(IDS[number], size, DigestCache())
            told.committed, told.given_up = number, False
        if clones:
            told.dropping = True
            store.drop(store.points[0])
            told.dropped = True
        store.close()
    finally:
        store.abandon()


def check_recovered(directory: Path, told: Told, *, clones: bool) -> None:
    """Whatever was promised holds, and nothing lies around that was not."""
    if not directory.exists():
        assert not told.created
        return
    store = Store(directory, clones=clones)
    try:
        newest = store.newest.number if store.newest is not None else 0
        if newest == 0 and told.committed:
            assert told.given_up and store.overwritten and store.work.exists()
        else:
            assert newest in (told.committed, told.asked)
        assert store.session.epoch in (told.epoch, told.epoch + 1)
        present = {point.number for point in store.points}
        if not clones:
            assert present == {newest} - {0}
        elif told.dropping and not told.dropped:
            assert {2, 3} <= present <= {1, 2, 3}
        else:
            assert present == set(range(1, newest + 1)) - ({1} if told.dropped else set())
        for point in store.points:
            assert store.image(point).read_bytes() == pattern(point.number, SIZES[point.number])
        for number in SIZES:
            found = store.committed(IDS[number])
            if number <= told.committed:
                assert found is not None and found.number == number
            elif number > told.asked:
                assert found is None
        images = {path.name for path in directory.glob("*.img")}
        assert images - {store.work.name} == {store.image(point).name for point in store.points}
        assert list(directory.glob("*.tmp")) == []
        assert len(list(directory.glob("*.digests"))) <= len(store.points)

        # And the next session goes on: with the same commit id where that commit did not happen.
        if told.asked > store.last_number:
            size = SIZES[told.asked]
            store.begin_work(size, "")
            fill(store, told.asked, size)
            assert store.commit(IDS[told.asked], size, DigestCache()).number == told.asked
        last = commit(store, 9, SIZE + 2 * REGION)
        assert last.number == max(told.asked, told.committed) + 1
        again = reopened(store)
        assert again.newest == last
        assert again.image(last).read_bytes() == pattern(9, SIZE + 2 * REGION)
        again.abandon()
    finally:
        store.abandon()


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_dying_at_any_change_to_the_disk_loses_nothing_that_was_promised(
    home: Path, kind: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The machine stays up: what was written is there, flushed or not.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    clones = clones_on(kind)
    ended: list[Told] = []
    for at in itertools.count(1):
        told = Told()
        directory = home / f"replica-{at}"
        with pytest.MonkeyPatch.context() as patch:
            death = Death(patch, at, when)
            try:
                live(directory, told, clones=clones)
            except Died:
                pass
            else:
                assert death.left > 0
                break
        check_recovered(directory, told, clones=clones)
        ended.append(told)
    # Every stage of the life was cut short at least once.
    assert {told.created for told in ended} == {False, True}
    assert {told.committed for told in ended} == {0, 1, 2, 3}
    assert {told.asked - told.committed for told in ended} == {0, 1}
    assert {told.epoch for told in ended} == {0, 1, 2, 3}
    assert {told.given_up for told in ended} == ({False} if clones else {False, True})
    assert any(told.dropping and not told.dropped for told in ended) is clones


# --- states between two steps, made by hand ---------------------------------------------------------------------


def test_an_image_renamed_for_a_commit_that_was_never_recorded_is_work_again(store: Store, kind: str) -> None:
    commit(store, 1)
    store.begin_work(SIZE, "")
    fill(store, 2)
    store.work.rename(store.directory / f"{IDS[2].hex()}.img")
    again = reopened(store)
    assert again.committed(IDS[2]) is None
    assert (again.newest is not None) is clones_on(kind)
    assert again.work.read_bytes() == pattern(2, SIZE)
    # The same commit, asked for again, now happens.
    assert again.commit(IDS[2], SIZE, DigestCache()).number == 2
    assert again.image(again.points[-1]).read_bytes() == pattern(2, SIZE)
    again.abandon()


def test_a_torn_record_is_a_commit_that_did_not_happen(store: Store, kind: str) -> None:
    commit(store, 1)
    commit(store, 2)
    log = store.directory / "commits.log"
    os.truncate(log, log.stat().st_size - 1)
    again = reopened(store)
    assert again.committed(IDS[2]) is None
    assert [point.number for point in again.points] == ([1] if clones_on(kind) else [])
    assert again.work.read_bytes() == pattern(2, SIZE)
    again.abandon()


def test_an_image_that_was_dropped_and_not_yet_removed_is_removed(place: Place) -> None:
    store = Store.create(place("xfs") / "db", REGION, clones=True)
    first, second = commit(store, 1), commit(store, 2)
    kept = store.image(first).read_bytes()
    store.drop(first)
    store.image(first).write_bytes(kept)
    again = reopened(store)
    assert again.points == [second]
    assert not again.image(first).exists() and not again.work.exists()
    again.abandon()


def test_an_image_given_up_and_not_yet_renamed_is_work(place: Place) -> None:
    store = Store.create(place("temporary") / "db", REGION, clones=False)
    first = commit(store, 1)
    store.begin_work(SIZE, "")
    store.work.rename(store.image(first))
    again = reopened(store)
    assert (again.newest, again.overwritten, again.committed_size) == (None, True, SIZE)
    assert again.work.read_bytes() == pattern(1, SIZE)
    assert not again.image(first).exists()
    again.abandon()


def test_temporary_files_of_a_dead_process_are_removed(store: Store) -> None:
    commit(store, 1)
    for name in ("work.tmp", "session.json.tmp", "anything.tmp", f"{IDS[5].hex()}.digests"):
        (store.directory / name).write_bytes(b"x")
    again = reopened(store)
    assert sorted(path.name for path in again.directory.iterdir()) == sorted(
        ["commits.log", "replica.json", f"{IDS[1].hex()}.img", f"{IDS[1].hex()}.digests"]
    )
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
def test_damaged_state_is_refused_and_left_alone(store: Store, name: str, content: bytes) -> None:
    commit(store, 1)
    store.write_session(SessionRecord(epoch=5))
    store.abandon()
    (store.directory / name).write_bytes(content)
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        Store(store.directory, clones=store.clones)
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
def test_an_identity_that_cannot_be_used_is_refused_at_the_start(store: Store, changes: dict[str, object]) -> None:
    commit(store, 1)
    store.abandon()
    path = store.directory / "replica.json"
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **changes}))
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        Store(store.directory, clones=store.clones)
    assert caught.value.code is Code.CORRUPT_STATE
    assert "replica.json" in caught.value.line() and caught.value.cause
    assert snapshot(store.directory) == before


def test_a_replica_without_its_identity_is_refused(store: Store) -> None:
    store.abandon()
    (store.directory / "replica.json").unlink()
    with pytest.raises(BlockferryError) as caught:
        Store(store.directory, clones=store.clones)
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
        Store(store.directory, clones=store.clones)
    assert caught.value.code is Code.CORRUPT_STATE


def test_a_damaged_log_is_refused_and_left_alone(store: Store) -> None:
    commit(store, 1)
    commit(store, 2)
    store.abandon()
    log = store.directory / "commits.log"
    damaged = bytearray(log.read_bytes())
    damaged[20] ^= 1
    log.write_bytes(damaged)
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        Store(store.directory, clones=store.clones)
    assert caught.value.code is Code.CORRUPT_STATE
    assert snapshot(store.directory) == before


@pytest.mark.parametrize(
    "changes",
    [{}, {"region_size": "64K"}, {"digest_key": None}, {"more": [1]}],
    ids=["same fields", "other type", "field gone", "field more"],
)
def test_a_newer_format_is_refused_by_name_and_left_alone(store: Store, changes: dict[str, object]) -> None:
    commit(store, 1)
    store.abandon()
    path = store.directory / "replica.json"
    identity = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**identity, "format": FORMAT + 1, **changes}))
    # A torn record is not cut off either.
    with (store.directory / "commits.log").open("ab") as file:
        file.write(b"torn")
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        Store(store.directory, clones=store.clones)
    assert caught.value.code is Code.UNSUPPORTED
    assert "newer" in caught.value.line()
    assert snapshot(store.directory) == before


def test_fields_that_a_newer_server_added_to_this_format_are_passed_over(store: Store) -> None:
    store.write_session(SessionRecord(epoch=5))
    store.abandon()
    for name in ("replica.json", "session.json"):
        path = store.directory / name
        path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "added": 1}))
    again = Store(store.directory, clones=store.clones)
    assert again.session.epoch == 5
    again.abandon()


def test_no_descriptor_is_left_behind_by_a_replica_that_is_refused(store: Store) -> None:
    store.abandon()
    (store.directory / "session.json").write_bytes(b"{")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockferryError):
        Store(store.directory, clones=store.clones)
    assert set(os.listdir("/proc/self/fd")) == before
