"""What a journal recovers from, whatever a crash or another pool has left; the space it takes; its readers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from blockferry.common import disk
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.common.volumes import Volume
from blockferry.server import copying, handover, journal
from blockferry.server.cache import DigestCache
from blockferry.server.delta import Delta, index_of
from blockferry.server.generations import Point
from blockferry.server.replica import Replica
from blockferry.server.session import State
from blockferry.server.store import Store

from tests.unit.conftest import Place
from tests.unit.journals import (
    SIZE,
    change,
    check,
    commit,
    drop,
    expected,
    grow,
    journal_of,
    marked,
    path_of,
    record,
)
from tests.unit.layers import B
from tests.unit.stores import IDS, REGION, content_of, names, read, reopened, snapshot, working

# --- what a crash leaves ----------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def store(place: Place) -> AsyncIterator[Store]:
    """A new replica with a journal."""
    made = Store.create(place("tmpfs") / "db", REGION, clones=False)
    yield made
    made.abandon()


class Crash(Exception):
    """The process is gone."""


COMMIT_POINTS = [
    "commit-undo-flushed",
    "commit-undo-captured",
    "commit-space-reserved",
    "commit-redo-renamed",
    "commit-renamed",
]
COMPLETE_POINTS = ["complete-begun", "complete-written", "complete-applied", "complete-flushed", "delta-index-removed"]


def die_at(patch: pytest.MonkeyPatch, name: str) -> None:
    def crash_point(reached: str) -> None:
        if reached == name:
            raise Crash(name)

    patch.setattr(disk, "crash_point", crash_point)
    patch.setattr(copying, "crash_point", crash_point)


@pytest.mark.parametrize("at", COMMIT_POINTS)
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
async def test_dying_before_the_record_leaves_the_generation_and_the_work(
    store: Store, monkeypatch: pytest.MonkeyPatch, at: str, again: bool
) -> None:
    for number in (1, 2):
        await commit(store, number)
    for _ in range(2 if again else 1):
        with monkeypatch.context() as patch:
            die_at(patch, at)
            with pytest.raises(Crash):
                await record(store, 3)
        store = reopened(store)
        assert [point.number for point in store.generations.points] == [1, 2]
        assert {name for name in names(store) if "." in name and not name.endswith((".digests", ".json"))} == {
            "commits.log",
            "image.raw",
            f"{IDS[1].hex()}.undo",
            f"{IDS[1].hex()}.undo.index",
            "work.redo",
            "work.redo.index",
        }
        await check(store)
        assert journal_of(store).image.read_bytes() == expected(2)
        async with working(store, grow(3)) as work:
            assert await content_of(work) == expected(3)
    await commit(store, 3)
    await check(store)
    store.abandon()


@pytest.mark.parametrize("at", COMPLETE_POINTS)
async def test_dying_after_the_record_leaves_the_new_generation(
    store: Store, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    for number in (1, 2):
        await commit(store, number)
    await record(store, 3)
    for _ in range(2):
        with monkeypatch.context() as patch:
            die_at(patch, at)
            if journal_of(store)._redo is not None:
                with pytest.raises(Crash):
                    await store.complete()
        store = reopened(store)
        await check(store)
    await store.complete()
    await check(store)
    assert [name for name in names(store) if ".redo" in name] == []
    assert journal_of(store).image.read_bytes() == expected(3)
    store.abandon()


BEFORE, NEW, OTHER = "before", "new", "other"
"""Whose files are there: the newest generation's, those of work that was renamed for the commit that died, and those of
work that a later session has left."""


@pytest.mark.parametrize(
    ("present", "left"),
    [
        pytest.param({"work.redo": NEW, "work.redo.index": NEW}, NEW, id="nothing renamed"),
        pytest.param({"3.redo": NEW, "work.redo.index": NEW}, NEW, id="data renamed"),
        pytest.param({"work.redo": NEW, "3.redo.index": NEW}, NEW, id="index renamed"),
        pytest.param({"3.redo": NEW, "3.redo.index": NEW}, NEW, id="both renamed"),
        pytest.param({"3.redo": NEW}, BEFORE, id="data alone"),
        pytest.param({"3.redo.index": NEW}, BEFORE, id="index alone"),
        pytest.param({"work.redo": NEW}, BEFORE, id="work without index"),
        pytest.param({"work.redo.index": NEW}, BEFORE, id="work without data"),
        pytest.param(
            {"3.redo": NEW, "3.redo.index": NEW, "work.redo": OTHER, "work.redo.index": OTHER},
            OTHER,
            id="other work since",
        ),
        pytest.param(
            {"3.redo": NEW, "work.redo": OTHER, "work.redo.index": OTHER}, OTHER, id="other work since, and half of it"
        ),
        pytest.param(
            {"3.redo.index": NEW, "work.redo": OTHER, "work.redo.index": OTHER},
            OTHER,
            id="other work since, and the other half",
        ),
        pytest.param(
            {"3.redo": NEW, "3.redo.index": NEW, "work.redo": OTHER}, NEW, id="other work that was never flushed"
        ),
        pytest.param({"1.redo": OTHER, "1.redo.index": OTHER}, BEFORE, id="applied long ago"),
        pytest.param({"2.redo": OTHER}, BEFORE, id="applied, index removed"),
        pytest.param({"elsewhere.redo": OTHER}, BEFORE, id="not ours"),
    ],
)
@pytest.mark.parametrize("undo", [[], [".undo"], [".undo", ".undo.index"], [".undo.index"]], ids=str)
async def test_every_combination_of_files_recovers_to_one_state(
    store: Store, present: dict[str, str], left: str, undo: list[str]
) -> None:
    for number in (1, 2):
        await commit(store, number)
    content = {BEFORE: expected(2)}
    files = {}
    for owner, number in ((NEW, 3), (OTHER, 4)):
        async with working(store, grow(3)) as work:
            await work.write(marked(number, grow(3)))
            await work.flush()
            content[owner] = await content_of(work)
        for suffix in (".redo", ".redo.index"):
            files[owner, suffix] = (store.directory / f"work{suffix}").read_bytes()
        await store.discard_work()
    store.abandon()
    for name, owner in present.items():
        stem, _, suffix = name.partition(".")
        path = store.directory / (f"{IDS[int(stem)].hex()}.{suffix}" if stem.isdigit() else name)
        path.write_bytes(files[owner, f".{suffix}"])
    for suffix in undo:
        # Before-images of the newest generation, captured for the commit that died.
        path_of(store, 2, suffix).write_bytes(b"whatever")
    again = reopened(store)
    await check(again)
    assert not any(path_of(again, 2, suffix).exists() for suffix in (".undo", ".undo.index", ".redo"))
    async with working(again, grow(3)) as work:
        assert await content_of(work) == (content[left] if left != BEFORE else content[left] + bytes(B + 9))
        await work.flush()
    assert [name for name in names(again) if ".redo" in name] == ["work.redo", "work.redo.index"]
    again.abandon()


# --- from a pool that could clone -------------------------------------------------------------------------------


async def cloned(place: Place) -> Store:
    """Three generations and some work, made where files can be cloned, now where they cannot."""
    store = Store.create(place("xfs") / "db", REGION, clones=True)
    for number in (1, 2, 3):
        await commit(store, number)
    async with working(store, grow(3)) as work:
        await work.write([(0, b"w" * B)])
        await work.flush()
    store.abandon()
    target = place("tmpfs") / "db"
    target.mkdir()
    for name, content in snapshot(store.directory).items():
        (target / name).write_bytes(content)
    return Store(target, clones=False)


async def test_a_replica_from_a_pool_of_clones_goes_on_with_a_journal(place: Place) -> None:
    store = await cloned(place)
    content = journal_of(store)
    points = store.generations.points
    assert content.image.read_bytes() == expected(3)
    assert [content.path(point) for point in points] == [
        path_of(store, 1, ".img"),
        path_of(store, 2, ".img"),
        content.image,
    ]
    # Work that was not committed is of no use here: it would have to be compared block by block.
    assert not content.has_work()
    assert [name for name in names(store) if name.endswith(".img")] == [f"{IDS[number].hex()}.img" for number in (1, 2)]
    await check(store)
    assert content.bytes_held(points[0]) >= SIZE - 10 * B
    for number in (4, 5):
        await commit(store, number)
        await check(store)
    store = reopened(store)
    await check(store)
    for number in (2, 3, 1, 4):
        await drop(store, number)
        await check(store)
        store = reopened(store)
        await check(store)
    assert [name for name in names(store) if name.endswith(".img")] == []
    store.abandon()


async def test_a_replica_with_a_journal_keeps_it_where_files_can_be_cloned(place: Place) -> None:
    store = await cloned(place)
    await commit(store, 4)
    store.abandon()
    target = place("xfs") / "db"
    target.mkdir()
    for name, content in snapshot(store.directory).items():
        (target / name).write_bytes(content)
    moved = Store(target, clones=True)
    assert journal_of(moved).kind == "journal"
    await check(moved)
    await commit(moved, 5)
    await check(moved)
    moved.abandon()


async def test_work_is_never_taken_for_a_generation_whose_image_is_missing(place: Place) -> None:
    store = await cloned(place)
    await store.content.discard()
    store.abandon()
    journal_of(store).image.unlink()
    (store.directory / "work.img").write_bytes(b"w" * SIZE)
    again = reopened(store)
    newest = again.generations.newest
    assert newest is not None
    assert again.content.problem(newest) == "its image is missing"
    assert await read(again, again.generations.points[0]) == expected(1)
    again.abandon()


async def test_a_dropped_image_that_was_not_yet_removed_is_removed(place: Place) -> None:
    store = await cloned(place)
    image = path_of(store, 1, ".img")
    kept = image.read_bytes()
    await drop(store, 1)
    assert not image.exists()
    image.write_bytes(kept)
    again = reopened(store)
    assert not image.exists()
    await check(again)
    again.abandon()


@pytest.mark.parametrize("name", ["work", IDS[1].hex()], ids=["work", "renamed for its commit"])
async def test_an_unfinished_first_sync_of_a_pool_of_clones_goes_on(place: Place, name: str) -> None:
    store = Store.create(place("tmpfs") / "db", REGION, clones=False)
    store.abandon()
    (store.directory / f"{name}.img").write_bytes(b"f" * SIZE)
    again = reopened(store)
    assert again.content.has_work()
    async with working(again, SIZE) as work:
        assert await content_of(work) == b"f" * SIZE
    again.abandon()


# --- space ------------------------------------------------------------------------------------------------------


def space(path: Path) -> int:
    return path.stat().st_blocks * 512


async def sparse(store: Store) -> None:
    """A generation with holes."""
    async with working(store, SIZE) as work:
        await work.write([(0, b"x" * B)])
        await work.flush()
        await store.commit(work, IDS[1], SIZE, DigestCache())


@pytest.mark.parametrize("restart", [False, True])
async def test_reserved_space_is_given_back_with_the_work(
    reserving: Store, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    store = reserving
    await sparse(store)
    image = journal_of(store).image
    before = space(image)
    with monkeypatch.context() as patch:
        patch.setattr(store.generations, "commit", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "injected")))
        async with working(store, SIZE) as work:
            await work.write([(2 * B, b"y" * 20 * B)])
            await work.flush()
            with pytest.raises(OSError, match="injected"):
                await store.commit(work, IDS[2], SIZE, DigestCache())
    # Taken for the commit, so that applying it cannot fail for lack of space.
    assert space(image) == before + 20 * B
    if restart:
        store = reopened(store)
    else:
        await store.reload()
    await store.discard_work()
    assert space(image) == before
    assert image.read_bytes() == b"x" * B + bytes(SIZE - B)
    assert [name for name in names(store) if ".redo" in name or ".undo" in name] == []
    store.abandon()


@pytest.mark.parametrize("given_up", [False, True])
async def test_space_for_what_a_volume_grows_by_is_reserved_too(
    reserving: Store, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    store = reserving
    await sparse(store)
    image = journal_of(store).image
    before, larger, first = space(image), SIZE + 30 * B, SIZE // B + 1
    async with working(store, larger) as work:
        await work.write([(first * B, b"y" * 20 * B)])
        await work.flush()
        if given_up:
            with monkeypatch.context() as patch:
                patch.setattr(
                    store.generations, "commit", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "injected"))
                )
                with pytest.raises(OSError, match="injected"):
                    await store.commit(work, IDS[2], larger, DigestCache())
        else:
            await store.commit(work, IDS[2], larger, DigestCache())
    assert (space(image), image.stat().st_size) == (before + 20 * B, SIZE)
    if given_up:
        await store.reload()
        await store.discard_work()
        assert (space(image), image.stat().st_size) == (before, SIZE)
    else:
        await store.complete()
        content = b"x" * B + bytes((first - 1) * B) + b"y" * 20 * B
        assert image.read_bytes() == content + bytes(larger - len(content))
        assert space(image) == before + 20 * B


async def test_space_that_an_earlier_attempt_reserved_is_given_back_by_the_one_that_succeeds(
    reserving: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reserving
    await sparse(store)
    image = journal_of(store).image
    before = space(image)
    async with working(store, SIZE) as work:
        await work.write([(2 * B, b"y" * 20 * B)])
        await work.flush()
        with monkeypatch.context() as patch:
            die_at(patch, "commit-renamed")
            with pytest.raises(Crash):
                await store.commit(work, IDS[2], SIZE, DigestCache())
    store = reopened(store)
    async with working(store, SIZE) as work:
        await work.unmap([(2 * B, 18 * B)])
        await work.flush()
        await store.commit(work, IDS[2], SIZE, DigestCache())
    await store.complete()
    assert space(image) == before + 2 * B
    assert image.read_bytes() == b"x" * B + bytes(19 * B) + b"y" * 2 * B + bytes(SIZE - 22 * B)
    store.abandon()


async def test_giving_space_back_takes_nothing_from_a_redo_that_is_being_applied(
    reserving: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reserving
    await sparse(store)
    async with working(store, SIZE) as work:
        await work.write([(2 * B, b"y" * 20 * B)])
        await work.flush()
        point = await store.commit(work, IDS[2], SIZE, DigestCache())
    image = journal_of(store).image
    before = space(image)
    # As a promotion does it, with the commit before it not yet complete.
    await store.discard_work()
    assert space(image) == before
    await store.complete()
    assert await read(store, point) == image.read_bytes() == b"x" * B + bytes(B) + b"y" * 20 * B + bytes(SIZE - 22 * B)


async def test_a_journal_has_a_limit(place: Place) -> None:
    store = Store.create(place("tmpfs") / "db", REGION, clones=False, journal_limit=3 * B)
    await commit(store, 1)
    async with working(store, SIZE) as work:
        await work.write([(0, b"y" * 3 * B)])
        with pytest.raises(BlockferryError) as caught:
            await work.write([(3 * B, b"y")])
        assert caught.value.code is Code.OUT_OF_SPACE
    await check(store)
    store.abandon()


# --- readers ----------------------------------------------------------------------------------------------------


async def test_a_reader_keeps_its_generation_through_everything(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[tuple[int, Volume]] = []
    real = copying.apply

    async def look() -> None:
        for one, volume in readers:
            assert (volume.size, await content_of(volume)) == (grow(one), expected(one)), one

    async def apply(redo: Delta, volume: Volume) -> None:
        # Half of the image is new, and the other half old.
        for offset in range(0, redo.size // 2, B):
            if offset // B in redo.data:
                part = bytearray(B)
                redo.read_into(offset, memoryview(part))
                await volume.write([(offset, part)])
        await look()
        await real(redo, volume)
        await look()

    monkeypatch.setattr(copying, "apply", apply)
    for number in range(1, 5):
        point = await record(store, number)
        readers.append((number, await store.content.open_point(point)))
        await look()
        await store.complete()
        await look()
        await store.reload()
        await look()
    # 2 goes, and whoever reads it is told; what 1 needs of it stays.
    (_, second) = readers.pop(1)
    await drop(store, 2)
    with pytest.raises(BlockferryError) as caught:
        await content_of(second)
    assert caught.value.code is Code.NOT_FOUND
    await look()
    async with working(store, grow(5)) as work:
        await change(work, 5)
        await look()
    await store.discard_work()
    await look()
    for _, volume in readers:
        await volume.close()


async def test_a_reader_waits_while_generations_change_places(store: Store) -> None:
    first = await commit(store, 1)
    volume = await store.content.open_point(first)
    async with working(store, SIZE) as work:
        await change(work, 2)
        reading: list[asyncio.Task[bytes]] = []
        loop = asyncio.get_running_loop()

        def record_it(point: Point) -> None:
            asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
            store.generations.commit(point, demotes=False)

        async def begin() -> None:
            reading.append(asyncio.create_task(content_of(volume)))
            await asyncio.sleep(0)

        point = store.generations.next(IDS[2], SIZE)
        await store.content.seal(work, point)
        await store.content.publish(point, lambda: record_it(point))
    assert await reading[0] == expected(1)
    await check(store)


async def test_readers_that_begin_together_share_one_descriptor(store: Store) -> None:
    point = await commit(store, 1)
    again = reopened(store)
    before = len(os.listdir("/proc/self/fd"))
    volumes = await asyncio.gather(*(again.content.open_point(point) for _ in range(8)))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert {await content_of(volume) for volume in volumes} == {expected(1)}
    again.abandon()
    assert len(os.listdir("/proc/self/fd")) < before


async def test_nothing_is_left_open(store: Store) -> None:
    store.abandon()
    before = set(os.listdir("/proc/self/fd"))
    again = reopened(store)
    for number in (1, 2, 3):
        await commit(again, number)
    await record(again, 4)
    await again.reload()
    await drop(again, 2)
    await check(again)
    again.close()
    assert set(os.listdir("/proc/self/fd")) == before


async def test_handing_out_a_generation_copies_it_without_its_holes(store: Store, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        await commit(store, number)
    await record(store, 4)
    told: list[tuple[int, int]] = []
    for point in store.generations.points:
        target = tmp_path / f"{point.number}.img"
        told.clear()
        await store.content.hand_out(point, target, lambda done, total: told.append((done, total)))
        assert target.read_bytes() == expected(point.number)
        room = await store.content.room_to_hand_out(point)
        assert told[-1] == (room, room)
        assert space(target) <= room + B
    await store.complete()
    await check(store)


# --- handing over -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_changes", [False, True])
async def test_a_replica_is_demoted_only_from_a_complete_image(store: Store, keep_changes: bool) -> None:
    await commit(store, 1)
    await record(store, 2)
    replica = Replica("db", "main", store, 60.0, Retention(last=9))
    # Nobody has applied the redo: that failed, or is still under way.
    await handover.promote(replica, 0, lambda done, total: None)
    promoted = store.content.promoted
    assert promoted.read_bytes() == expected(2)
    changed = bytearray(expected(2))
    changed[5 * B : 5 * B + 3] = b"new"
    promoted.write_bytes(changed)
    point = await handover.demote(replica, keep_changes=keep_changes)
    assert (point.number, replica.state) == (3, State.CONSISTENT)
    await replica.complete()
    assert await read(store, point) == (changed if keep_changes else expected(2))
    assert await read(store, store.generations.points[1]) == expected(2)
    assert await read(store, store.generations.points[0]) == expected(1)


async def test_a_promotion_that_fails_leaves_the_completing_of_a_commit_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await commit(store, 1)
    point = await record(store, 2)
    replica = Replica("db", "main", store, 60.0, Retention(last=9))
    real, begun, go_on = copying.apply, asyncio.Event(), asyncio.Event()

    async def apply(redo: Delta, volume: Volume) -> None:
        begun.set()
        await go_on.wait()
        # With the redo that was there when this began, open as it was.
        await real(redo, volume)

    async def copy(*_: object) -> None:
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        raise OSError(28, "injected")

    monkeypatch.setattr(copying, "apply", apply)
    monkeypatch.setattr(copying, "copy", copy)
    completing = asyncio.create_task(replica.complete())
    await begun.wait()
    with pytest.raises(BlockferryError) as caught:
        await handover.promote(replica, 0, lambda done, total: None)
    assert (caught.value.code, replica.state) == (Code.OUT_OF_SPACE, State.CONSISTENT)
    await completing
    assert journal_of(store).image.read_bytes() == await read(store, point) == expected(2)
    assert [name for name in names(store) if ".redo" in name or name.endswith((".img", ".tmp"))] == []


def test_the_kinds_of_files_have_the_names_of_the_documentation() -> None:
    assert (journal.REDO, journal.UNDO, index_of(Path("x.redo")).name) == (".redo", ".undo", "x.redo.index")
