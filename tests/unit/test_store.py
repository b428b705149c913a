"""A replica's directory without accidents: generations, work images, progress, and digests that are trusted only while
nobody can have touched the image."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blockferry.common.retention import Retention
from blockferry.server.cache import DigestCache
from blockferry.server.store import FORMAT, SessionRecord, Store
from pyroaring import BitMap

from tests.unit.stores import IDS, REGION, SIZE, clones_on, commit, fill, pattern, reopened

# --- a life without accidents -----------------------------------------------------------------------------------


def test_a_new_replica_is_empty_and_random(home: Path, kind: str) -> None:
    stores = [Store.create(home / name, REGION, clones=clones_on(kind)) for name in ("a", "b")]
    assert sorted(os.listdir(home)) == ["a", "b"]
    for one in stores:
        assert (one.newest, one.points, one.committed_size, one.last_number) == (None, [], None, 0)
        assert (one.identity.format, one.identity.region_size) == (FORMAT, REGION)
        assert (len(one.identity.key), len(bytes.fromhex(one.identity.uuid))) == (32, 16)
        assert one.session == SessionRecord()
        assert one.committed(IDS[1]) is None and one.point(0) is None and one.point(1) is None
    assert stores[0].identity.uuid != stores[1].identity.uuid
    assert stores[0].identity.key != stores[1].identity.key
    identity = stores[0].identity
    again = reopened(stores[0])
    assert again.identity == identity
    again.abandon()
    stores[1].abandon()


def test_generations_are_numbered_and_found_by_number_and_commit_id(store: Store, kind: str) -> None:
    points = [commit(store, number) for number in (1, 2, 3)]
    assert [point.number for point in points] == [1, 2, 3]
    again = reopened(store)
    assert again.newest == again.point(0) == again.point(3) == points[2]
    assert (again.last_number, again.committed_size) == (3, SIZE)
    assert again.points == (points if clones_on(kind) else points[2:])
    for point in again.points:
        assert again.image(point).read_bytes() == pattern(point.number, SIZE)
    # The log remembers what it has committed, whether or not the image is still there.
    assert [again.committed(IDS[number]) for number in (1, 2, 3, 4)] == [*points, None]
    assert not again.work.exists()
    again.abandon()


def test_a_dropped_generation_is_gone_and_its_commit_remembered(store: Store, kind: str) -> None:
    first = commit(store, 1)
    second = commit(store, 2)
    if clones_on(kind):
        store.drop(first)
    for one in (store, reopened(store)):
        assert one.points == [second]
        assert one.point(1) is None
        assert one.committed(IDS[1]) == first
        assert not one.image(first).exists()
        assert one.image(second).read_bytes() == pattern(2, SIZE)
        assert one.last_number == 2
        one.abandon()


def test_retention_rules_are_remembered(store: Store) -> None:
    store.set_keep(Retention(last=7, daily=2))
    store.set_keep(Retention(last=7, daily=2))
    assert sum(b"keep" in line for line in (store.directory / "commits.log").read_bytes().splitlines()) == 1
    again = reopened(store)
    assert again.keep == Retention(last=7, daily=2)
    again.abandon()


def test_the_epoch_is_remembered(store: Store) -> None:
    record = SessionRecord(epoch=41, session_id="s", size=SIZE, client="somebody \u00e9")
    store.write_session(record)
    assert store.session == record
    again = reopened(store)
    assert again.session == record
    again.abandon()


# --- the work image ---------------------------------------------------------------------------------------------


def test_work_starts_from_the_newest_generation_and_leaves_it_alone(store: Store, kind: str) -> None:
    first = commit(store, 1)
    store.begin_work(SIZE, "")
    assert store.work.read_bytes() == pattern(1, SIZE)
    fill(store, 9)
    if clones_on(kind):
        assert store.image(first).read_bytes() == pattern(1, SIZE)
        assert (store.newest, store.overwritten) == (first, False)
    else:
        # Without clones the generation itself is the work image: it is given up, and says so.
        assert (store.newest, store.overwritten, store.committed_size) == (None, True, SIZE)
        assert not store.image(first).exists()


def test_work_that_was_interrupted_goes_on(store: Store) -> None:
    store.begin_work(SIZE, "")
    fill(store, 9)
    again = reopened(store)
    again.begin_work(SIZE, "")
    assert again.work.read_bytes() == pattern(9, SIZE)
    again.abandon()


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("size", [SIZE + 1, SIZE + REGION, 2 * SIZE])
def test_what_an_image_grows_by_is_zero(store: Store, committed: bool, size: int) -> None:
    if committed:
        commit(store, 1)
    store.begin_work(SIZE, "")
    fill(store, 1)
    store.begin_work(size, "")
    assert store.work.read_bytes() == pattern(1, SIZE) + bytes(size - SIZE)


def test_an_unfinished_first_sync_of_a_larger_source_starts_over(store: Store) -> None:
    store.begin_work(SIZE, "")
    fill(store, 9)
    store.begin_work(SIZE - REGION, "")
    assert store.work.read_bytes() == bytes(SIZE - REGION)


def test_discarding_work_never_discards_the_last_thing_there_is(store: Store, kind: str) -> None:
    store.begin_work(SIZE, "")
    store.discard_work()
    assert not store.work.exists()
    commit(store, 1)
    store.begin_work(SIZE, "")
    store.discard_work()
    assert store.work.exists() is not clones_on(kind)


# --- progress and digests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("snapshot_id", "size", "offered"),
    [("snap", SIZE, [0, 2]), ("other", SIZE, []), ("", SIZE, []), ("snap", SIZE + REGION, [])],
)
def test_progress_is_offered_only_to_the_same_snapshot_of_the_same_size(
    store: Store, snapshot_id: str, size: int, offered: list[int]
) -> None:
    store.begin_work(SIZE, "snap")
    store.write_progress("snap", SIZE, BitMap([0, 2]))
    again = reopened(store)
    assert list(again.begin_work(size, snapshot_id)[0]) == offered
    if not offered:
        # Whoever came in between has written: the progress is no longer true for anybody.
        assert list(again.begin_work(SIZE, "snap")[0]) == []
    again.abandon()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"snapshot_id":"\xff"}', b'{"snapshot_id": "snap"}'])
def test_damaged_progress_is_no_progress(store: Store, content: bytes) -> None:
    store.begin_work(SIZE, "snap")
    store.write_progress("snap", SIZE, BitMap([0, 2]))
    (store.directory / "progress.json").write_bytes(content)
    assert list(store.begin_work(SIZE, "snap")[0]) == []


def test_progress_without_its_work_image_is_no_progress(store: Store) -> None:
    store.begin_work(SIZE, "snap")
    store.write_progress("snap", SIZE, BitMap([0, 2]))
    store.discard_work()
    assert list(store.begin_work(SIZE, "snap")[0]) == []


def known_digests() -> DigestCache:
    cache = DigestCache()
    for region in (0, 1, 3):
        cache.put(region, bytes([region]) * 16)
    return cache


def trusted(store: Store) -> list[int] | None:
    assert store.newest is not None
    found = store.trusted_digests(store.newest)
    return None if found is None else list(found.known)


def test_digests_are_trusted_by_the_process_that_committed_and_after_a_clean_end(store: Store) -> None:
    commit(store, 1, digests=known_digests())
    assert trusted(store) == [0, 1, 3]
    store.close()
    again = Store(store.directory, clones=store.clones)
    assert trusted(again) == [0, 1, 3]
    # Once: this process vouches for nothing unless it ends cleanly, too.
    third = reopened(again)
    assert trusted(third) is None
    assert third.newest is not None
    recorded = third.recorded_digests(third.newest)
    assert recorded is not None and dict(recorded.items()) == dict(known_digests().items())
    third.abandon()


def touch_image(image: Path) -> None:
    with image.open("r+b") as file:
        file.write(b"y")


def replace_image(image: Path) -> None:
    content = image.read_bytes()
    image.unlink()
    image.write_bytes(content)


@pytest.mark.parametrize("touch", [touch_image, replace_image, lambda image: os.truncate(image, SIZE - 1), os.unlink])
@pytest.mark.parametrize("running", [False, True])
def test_digests_of_an_image_that_was_touched_are_not_trusted(
    store: Store, touch: Callable[[Path], None], running: bool
) -> None:
    point = commit(store, 1, digests=known_digests())
    if running:
        touch(store.image(point))
        assert trusted(store) is None
        return
    store.close()
    touch(store.image(point))
    again = Store(store.directory, clones=store.clones)
    assert trusted(again) is None
    again.abandon()


def test_digests_that_proved_wrong_are_not_trusted_again(store: Store) -> None:
    point = commit(store, 1, digests=known_digests())
    store.distrust(point)
    assert trusted(store) is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"{}", b'{"zz": {"inode": 1, "size": 1, "ctime_ns": 1}}'])
def test_a_damaged_note_of_a_clean_end_vouches_for_nothing(store: Store, content: bytes) -> None:
    commit(store, 1, digests=known_digests())
    store.close()
    (store.directory / "clean.json").write_bytes(content)
    again = Store(store.directory, clones=store.clones)
    assert trusted(again) is None
    again.abandon()
