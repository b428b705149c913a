"""A replica's directory without accidents: generations, a session's work, progress, and digests that are trusted only
while nobody can have touched the image."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blockferry.common.retention import Retention
from blockferry.server.cache import DigestCache
from blockferry.server.store import FORMAT_OF_FILES, SessionRecord, Store
from pyroaring import BitMap

from tests.unit.stores import (
    IDS,
    REGION,
    SIZE,
    clones,
    clones_on,
    commit,
    content_of,
    fill,
    lives,
    names,
    opened,
    pattern,
    read,
    read_work,
    recorded,
    reopened,
    working,
)

# --- a life without accidents -----------------------------------------------------------------------------------


def test_a_new_replica_is_empty_and_random(home: Path, kind: str) -> None:
    stores = [Store.create(home / name, REGION, clones=clones_on(kind)) for name in ("a", "b")]
    assert sorted(os.listdir(home)) == ["a", "b"]
    for one in stores:
        log = one.generations
        assert (log.newest, log.points, log.committed_size, log.last_number) == (None, [], None, 0)
        assert (log.adopted_size, log.promoted) == (None, None)
        assert (one.identity.format, one.identity.region_size) == (FORMAT_OF_FILES, REGION)
        assert (len(one.identity.key), len(bytes.fromhex(one.identity.uuid))) == (32, 16)
        assert one.session == SessionRecord()
        assert log.committed(IDS[1]) is None and log.point(0) is None and log.point(1) is None
        assert not one.content.has_work()
        assert names(one) == ["commits.log", "replica.json"]
    assert stores[0].identity.uuid != stores[1].identity.uuid
    assert stores[0].identity.key != stores[1].identity.key
    identity = stores[0].identity
    again = reopened(stores[0])
    assert again.identity == identity
    again.abandon()
    stores[1].abandon()


async def test_generations_are_numbered_and_found_by_number_and_commit_id(store: Store) -> None:
    points = [await commit(store, number) for number in (1, 2, 3)]
    assert [point.number for point in points] == [1, 2, 3]
    again = reopened(store)
    log = again.generations
    assert log.newest == log.point(0) == log.point(3) == points[2]
    assert (log.last_number, log.committed_size) == (3, SIZE)
    assert log.points == points
    for point in points:
        assert await read(again, point) == pattern(point.number, SIZE)
        assert again.content.problem(point) == ""
    path = again.content.path(points[2])
    assert path is not None and path.read_bytes() == pattern(3, SIZE)
    # The log remembers what it has committed, whether or not the image is still there.
    assert [log.committed(IDS[number]) for number in (1, 2, 3, 4)] == [*points, None]
    assert not again.content.has_work()
    again.abandon()


async def test_a_generation_is_whole_for_readers_before_it_is_one_image(store: Store) -> None:
    first = await commit(store, 1)
    for number, one in enumerate(lives(store), 2):
        second = await recorded(one, number)
        assert (one.content.path(second) is not None) is clones(store)
        assert await read(one, first) == pattern(1, SIZE)
        assert await read(one, second) == pattern(number, SIZE)
        # More than once is as good.
        for _ in range(2):
            await one.complete()
            path = one.content.path(second)
            assert path is not None and path.read_bytes() == pattern(number, SIZE)
            assert await read(one, first) == pattern(1, SIZE)
        one.abandon()


async def test_a_dropped_generation_is_gone_and_its_commit_remembered(store: Store) -> None:
    first = await commit(store, 1)
    second = await commit(store, 2)
    before = names(store)
    await store.drop(first)
    for one in lives(store):
        log = one.generations
        assert log.points == [second]
        assert log.point(1) is None
        assert log.committed(IDS[1]) == first
        assert [name for name in names(one) if name.startswith(IDS[1].hex())] == []
        assert set(names(one)) < set(before)
        assert await read(one, second) == pattern(2, SIZE)
        assert log.last_number == 2
        one.abandon()


def test_retention_rules_are_remembered(store: Store) -> None:
    store.generations.set_keep(Retention(last=7, daily=2))
    store.generations.set_keep(Retention(last=7, daily=2))
    assert sum(b"keep" in line for line in (store.directory / "commits.log").read_bytes().splitlines()) == 1
    again = reopened(store)
    assert again.generations.keep == Retention(last=7, daily=2)
    again.abandon()


def test_the_epoch_is_remembered(store: Store) -> None:
    record = SessionRecord(epoch=41, session_id="s", size=SIZE, client="somebody \u00e9")
    store.write_session(record)
    assert store.session == record
    again = reopened(store)
    assert again.session == record
    again.abandon()


# --- a session's work -------------------------------------------------------------------------------------------


async def test_work_starts_from_the_newest_generation_and_leaves_it_alone(store: Store) -> None:
    first = await commit(store, 1)
    async with working(store) as work:
        assert await content_of(work) == pattern(1, SIZE)
        await fill(work, 9)
        await work.flush()
        assert await content_of(work) == pattern(9, SIZE)
        assert await read(store, first) == pattern(1, SIZE)
    path = store.content.path(first)
    assert path is not None and path.read_bytes() == pattern(1, SIZE)
    assert (store.generations.newest, store.generations.committed_size) == (first, SIZE)


@pytest.mark.parametrize("committed", [False, True])
async def test_work_that_was_interrupted_goes_on(store: Store, committed: bool) -> None:
    if committed:
        await commit(store, 1)
    async with working(store) as work:
        await fill(work, 9)
        await work.flush()
    again = reopened(store)
    assert again.content.has_work()
    assert await read_work(again) == pattern(9, SIZE)
    again.abandon()


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("size", [SIZE + 1, SIZE + REGION, 2 * SIZE])
async def test_what_a_volume_grows_by_is_zero(store: Store, committed: bool, size: int) -> None:
    if committed:
        await commit(store, 2)
    async with working(store) as work:
        await fill(work, 1)
        await work.flush()
    async with working(store, size) as work:
        grown = pattern(1, SIZE) + bytes(size - SIZE)
        assert await content_of(work) == grown
        await work.flush()
        point = await store.commit(work, IDS[3], size, DigestCache())
    assert await read(store, point) == grown
    await store.complete()
    assert await read(store, point) == grown
    if committed:
        assert await read(store, store.generations.points[0]) == pattern(2, SIZE)


@pytest.mark.parametrize("size", [SIZE + 1, SIZE + REGION, 2 * SIZE])
async def test_an_attempt_to_grow_that_was_given_up_leaves_nothing(store: Store, size: int) -> None:
    point = await commit(store, 1)
    async with working(store, size) as work:
        await fill(work, 9)
        await work.flush()
    assert await read(store, point) == pattern(1, SIZE)
    # The next session does not grow, and the one after it does.
    async with working(store) as work:
        assert await content_of(work) == pattern(9, SIZE)
        await work.flush()
    assert await read_work(store, size) == pattern(9, SIZE) + bytes(size - SIZE)


async def test_an_unfinished_first_sync_of_a_larger_source_starts_over(store: Store) -> None:
    async with working(store) as work:
        await fill(work, 9)
    assert await read_work(store, SIZE - REGION) == bytes(SIZE - REGION)


async def test_discarding_work_gives_up_the_work_alone(store: Store) -> None:
    assert not store.content.has_work()
    await store.discard_work()
    async with working(store) as work:
        await fill(work, 9)
        await work.flush()
    await store.discard_work()
    assert not store.content.has_work()
    assert names(store) == ["commits.log", "replica.json"]
    point = await commit(store, 1)
    before = names(store)
    async with working(store) as work:
        await fill(work, 9)
        await work.flush()
    assert store.content.has_work() and names(store) != before
    await store.discard_work()
    assert not store.content.has_work() and names(store) == before
    assert await read_work(store) == await read(store, point) == pattern(1, SIZE)


async def test_an_image_that_was_adopted_is_compared_and_never_discarded(store: Store) -> None:
    seed = store.directory.parent / "seed"
    seed.write_bytes(pattern(4, SIZE))
    await store.adopt(seed)
    assert not seed.exists()
    for one in lives(store):
        assert (one.generations.adopted_size, one.content.has_work()) == (SIZE, True)
        await one.discard_work()
        assert await read_work(one) == pattern(4, SIZE)
    async with working(one, 2 * SIZE) as work:
        await work.flush()
        point = await one.commit(work, IDS[1], 2 * SIZE, DigestCache())
    assert await read(one, point) == pattern(4, SIZE) + bytes(SIZE)
    # Once there is a generation its work is like any other.
    assert await read_work(one, 2 * SIZE) == await read(one, point)
    await one.discard_work()
    assert not one.content.has_work()
    one.abandon()


# --- progress and digests ---------------------------------------------------------------------------------------


async def offered(store: Store, snapshot_id: str, size: int = SIZE) -> list[int]:
    """The regions that a session of a snapshot need not look at."""
    work, settled, _ = await store.begin_work(size, snapshot_id)
    await store.content.end(work)
    return list(settled)


async def interrupted(store: Store) -> None:
    """A session of `snap` that is done with regions 0 and 2."""
    async with working(store, SIZE, "snap") as work:
        await fill(work, 9)
        await work.flush()
        store.write_progress("snap", SIZE, BitMap([0, 2]))


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize(
    ("snapshot_id", "size", "settled"),
    [("snap", SIZE, [0, 2]), ("other", SIZE, []), ("", SIZE, []), ("snap", SIZE + REGION, [])],
)
async def test_progress_is_offered_only_to_the_same_snapshot_of_the_same_size(
    store: Store, committed: bool, snapshot_id: str, size: int, settled: list[int]
) -> None:
    if committed:
        await commit(store, 1)
    await interrupted(store)
    again = reopened(store)
    assert await offered(again, snapshot_id, size) == settled
    if not settled:
        # Whoever came in between has written: the progress is no longer true for anybody.
        assert await offered(again, "snap") == []
    again.abandon()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"snapshot_id":"\xff"}', b'{"snapshot_id": "snap"}'])
async def test_damaged_progress_is_no_progress(store: Store, content: bytes) -> None:
    await interrupted(store)
    (store.directory / "progress.json").write_bytes(content)
    assert await offered(store, "snap") == []


@pytest.mark.parametrize("committed", [False, True])
async def test_progress_without_its_work_is_no_progress(store: Store, committed: bool) -> None:
    if committed:
        await commit(store, 1)
    await interrupted(store)
    await store.discard_work()
    assert await offered(store, "snap") == []


async def test_progress_ends_with_its_commit(store: Store) -> None:
    await interrupted(store)
    async with working(store, SIZE, "snap") as work:
        await work.flush()
        await store.commit(work, IDS[1], SIZE, DigestCache())
    await store.complete()
    assert await offered(store, "snap") == []
    assert not (store.directory / "progress.json").exists()


def known_digests() -> DigestCache:
    cache = DigestCache()
    for region in (0, 1, 3):
        cache.put(region, bytes([region]) * 16)
    return cache


def trusted(store: Store) -> list[int] | None:
    newest = store.generations.newest
    assert newest is not None
    found = store.trusted_digests(newest)
    return None if found is None else list(found.known)


async def test_digests_are_trusted_by_the_process_that_committed_and_after_a_clean_end(store: Store) -> None:
    await commit(store, 2)
    await commit(store, 1, digests=known_digests())
    assert trusted(store) == [0, 1, 3]
    store.close()
    again = opened(store.directory, store)
    assert trusted(again) == [0, 1, 3]
    # Once: this process vouches for nothing unless it ends cleanly, too.
    third = reopened(again)
    assert trusted(third) is None
    assert third.generations.newest is not None
    known = third.recorded_digests(third.generations.newest)
    assert known is not None and dict(known.items()) == dict(known_digests().items())
    third.abandon()


async def test_digests_are_offered_to_the_next_session_as_far_as_they_hold(store: Store) -> None:
    await commit(store, 1, digests=known_digests())
    for size, regions in ((SIZE, [0, 1, 3]), (SIZE + 1, [0, 1])):
        work, _, digests = await store.begin_work(size, "")
        # The last region was short, and is another one now.
        assert list(digests.known) == regions
        await work.flush()
        await store.content.end(work)
        # What a session has left is not what was committed.
        work, _, digests = await store.begin_work(size, "")
        assert list(digests.known) == []
        await store.content.end(work)
        await store.discard_work()


async def test_a_commit_that_is_not_complete_has_no_digests_to_trust(store: Store) -> None:
    await commit(store, 1, digests=known_digests())
    point = await recorded(store, 2, digests=known_digests())
    assert trusted(store) == ([0, 1, 3] if clones(store) else None)
    assert store.trusted_digests(store.generations.points[0]) is None or clones(store)
    await store.complete()
    assert trusted(store) == [0, 1, 3]
    assert store.generations.newest == point


async def test_who_completes_the_commit_of_a_dead_process_trusts_nothing_it_knew(store: Store) -> None:
    await commit(store, 1)
    await recorded(store, 2, digests=known_digests())
    again = reopened(store)
    await again.complete()
    assert trusted(again) is None
    again.abandon()


def touch_image(image: Path) -> None:
    with image.open("r+b") as file:
        file.write(b"y")


def replace_image(image: Path) -> None:
    content = image.read_bytes()
    image.unlink()
    image.write_bytes(content)


@pytest.mark.parametrize("touch", [touch_image, replace_image, lambda image: os.truncate(image, SIZE - 1), os.unlink])
@pytest.mark.parametrize("running", [False, True])
async def test_digests_of_an_image_that_was_touched_are_not_trusted(
    store: Store, touch: Callable[[Path], None], running: bool
) -> None:
    point = await commit(store, 1, digests=known_digests())
    image = store.content.path(point)
    assert image is not None
    if running:
        touch(image)
        assert trusted(store) is None
        return
    store.close()
    touch(image)
    again = opened(store.directory, store)
    assert trusted(again) is None
    again.abandon()


async def test_digests_that_proved_wrong_are_not_trusted_again(store: Store) -> None:
    point = await commit(store, 1, digests=known_digests())
    store.distrust(point)
    assert trusted(store) is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"{}", b'{"zz": {"inode": 1, "size": 1, "ctime_ns": 1}}'])
async def test_a_damaged_note_of_a_clean_end_vouches_for_nothing(store: Store, content: bytes) -> None:
    await commit(store, 1, digests=known_digests())
    store.close()
    (store.directory / "clean.json").write_bytes(content)
    again = opened(store.directory, store)
    assert trusted(again) is None
    again.abandon()
