"""Generations as one image and deltas: chains of before-images, what is left by a crash between any two steps, damage
that hides what it must and nothing else, and readers that never notice."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from blake3 import blake3
from blockferry.common.errors import BlockferryError, Code
from blockferry.server.store import Store
from hypothesis import given, settings
from hypothesis import strategies as st

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
from tests.unit.layers import B, quick_directory
from tests.unit.stores import IDS, REGION, content_of, names, reopened, snapshot, working

# --- chains -----------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def store(place: Place) -> AsyncIterator[Store]:
    """A new replica with a journal."""
    made = Store.create(place("tmpfs") / "db", REGION, clones=False)
    yield made
    made.abandon()


async def test_many_generations_are_read_through_their_before_images(store: Store) -> None:
    for number in range(1, 10):
        await record(store, number)
        await check(store)
        await store.complete()
        await check(store)
    newest = store.generations.newest
    assert newest is not None
    assert [store.content.path(point) for point in store.generations.points] == [None] * 8 + [journal_of(store).image]
    assert journal_of(store).image.read_bytes() == expected(9)
    again = reopened(store)
    await check(again)
    again.abandon()


async def test_a_generation_costs_what_its_successor_changed(store: Store) -> None:
    for number in (1, 2):
        await commit(store, number)
    first, second = store.generations.points
    undo = journal_of(store)._undo[IDS[1]]
    # Block 27 is zero in both.
    changed = {offset // B for offset, _ in marked(2, SIZE)} | {28}
    assert (set(undo.data), set(undo.zero)) == (changed, set())
    assert store.content.bytes_held(first) <= (len(changed) + 1) * B
    assert store.content.bytes_held(second) >= SIZE - 10 * B


@pytest.mark.parametrize("order", [*itertools.permutations([1, 2, 3])], ids=str)
async def test_dropping_in_any_order_leaves_the_others_whole(store: Store, order: tuple[int, ...]) -> None:
    for number in range(1, 5):
        await commit(store, number)
    for number in order:
        await drop(store, number)
        await check(store)
        store = reopened(store)
        await check(store)
    assert [point.number for point in store.generations.points] == [4]
    assert names(store) == [path_of(store, 4, ".digests").name, "commits.log", "image.raw", "replica.json"]
    store.abandon()


async def test_dropping_before_the_redo_is_applied(store: Store) -> None:
    for number in range(1, 4):
        await commit(store, number)
    await record(store, 4)
    for number in (2, 3):
        await drop(store, number)
        await check(store)
    again = reopened(store)
    await check(again)
    await again.complete()
    await check(again)
    again.abandon()


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(["commit", "record", "complete", "drop", "reopen", "reload", "discard"]), max_size=12),
    st.data(),
)
async def test_whatever_happened_every_generation_is_what_was_committed(
    history: list[str], data: st.DataObject
) -> None:
    with quick_directory() as directory:
        store = Store.create(directory / "db", REGION, clones=False)
        try:
            for action in history:
                number = store.generations.last_number + 1
                points = store.generations.points
                if action in ("commit", "record", "discard"):
                    await store.complete()
                if action in ("commit", "record") and number < len(IDS):
                    await record(store, number)
                if action in ("commit", "complete"):
                    await store.complete()
                if action == "drop" and len(points) > 1:
                    await store.drop(data.draw(st.sampled_from(points[:-1])))
                if action == "discard" and number < len(IDS):
                    async with working(store, grow(number)) as work:
                        await change(work, number)
                    await store.discard_work()
                if action == "reopen":
                    store = reopened(store)
                if action == "reload":
                    await store.reload()
                await check(store)
        finally:
            store.abandon()


# --- damage -----------------------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = [
    pytest.param(".undo.index", flip, id="index changed"),
    pytest.param(".undo.index", cut_off, id="index cut off"),
    pytest.param(".undo.index", Path.unlink, id="index gone"),
    pytest.param(".undo", cut_off, id="data cut off"),
    pytest.param(".undo", Path.unlink, id="data gone"),
]


@pytest.mark.parametrize(("suffix", "damage"), DAMAGE)
@pytest.mark.parametrize("victim", [1, 3, 5])
async def test_damaged_before_images_hide_what_needs_them_and_nothing_newer(
    store: Store, suffix: str, damage: Callable[[Path], None], victim: int
) -> None:
    for number in range(1, 7):
        await commit(store, number)
    store.abandon()
    damage(path_of(store, victim, suffix))
    again = reopened(store)
    hidden = range(1, victim + 1)
    await check(again, *hidden)
    for point in again.generations.points[:victim]:
        assert f"generation {victim} are damaged" in again.content.problem(point)
    # And generations go on.
    await commit(again, 7)
    await check(again, *hidden)
    again.abandon()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("order", [*itertools.permutations([1, 2, 3])], ids=str)
@pytest.mark.parametrize("victim", [1, 2, 3])
async def test_dropping_damaged_generations_never_makes_an_older_one_readable(
    store: Store, victim: int, order: tuple[int, ...], restart: bool
) -> None:
    for number in range(5):
        await commit(store, number + 1)
    store.abandon()
    # Generations 1 to 5; 4 and the newest are whole.
    flip(path_of(store, victim, ".undo.index"))
    store = reopened(store)
    hidden = set(range(1, victim + 1))
    for number in order:
        await drop(store, number)
        hidden.discard(number)
        await check(store, *hidden)
        if restart:
            store = reopened(store)
            await check(store, *hidden)
    assert [point.number for point in store.generations.points] == [4, 5]
    assert [name for name in names(store) if ".undo" in name] == [f"{IDS[4].hex()}.undo", f"{IDS[4].hex()}.undo.index"]
    store.abandon()


async def test_before_images_that_come_back_too_late_are_not_believed(store: Store) -> None:
    for number in range(1, 4):
        await commit(store, number)
    store.abandon()
    index = path_of(store, 1, ".undo.index")
    good = index.read_bytes()
    flip(index)
    store = reopened(store)
    await drop(store, 2)
    await check(store, 1)
    # Half of what the older one needs went with generation 2. The mark that this is so was made before.
    assert not index.exists()
    store.abandon()
    index.write_bytes(good)
    data = path_of(store, 1, ".undo").read_bytes()
    assert len(data) == SIZE


@pytest.mark.parametrize("victim", [1, 2])
async def test_before_images_of_a_newer_server_are_refused_and_left_alone(store: Store, victim: int) -> None:
    for number in range(1, 4):
        await commit(store, number)
    await record(store, 4)
    store.abandon()
    index = path_of(store, victim, ".undo.index")
    content = index.read_bytes()[:-32]
    end = 12 + int.from_bytes(content[8:12], "little")
    head = msgspec.json.encode({**msgspec.json.decode(content[12:end]), "format": 2})
    content = content[:8] + len(head).to_bytes(4, "little") + head + content[end:]
    index.write_bytes(content + blake3(content).digest())
    before = snapshot(store.directory), set(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockferryError) as caught:
        Store(store.directory, clones=False)
    assert caught.value.code is Code.UNSUPPORTED
    assert (snapshot(store.directory), set(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize(("suffix", "damage"), [(".redo.index", flip), (".redo", cut_off)], ids=["index", "data"])
async def test_a_damaged_redo_of_the_newest_generation_is_refused(
    store: Store, suffix: str, damage: Callable[[Path], None]
) -> None:
    await commit(store, 1)
    await record(store, 2)
    store.abandon()
    damage(path_of(store, 2, suffix))
    before = snapshot(store.directory)
    with pytest.raises(BlockferryError) as caught:
        Store(store.directory, clones=False)
    assert caught.value.code is Code.CORRUPT_STATE
    assert snapshot(store.directory) == before


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [("", cut_off), ("", Path.unlink), (".index", flip), (".index", cut_off), (".index", Path.unlink)],
)
async def test_damaged_work_costs_time_and_nothing_else(
    store: Store, suffix: str, damage: Callable[[Path], None]
) -> None:
    await commit(store, 1)
    async with working(store, SIZE) as work:
        await change(work, 2)
    store.abandon()
    damage(store.directory / f"work.redo{suffix}")
    again = reopened(store)
    await check(again)
    async with working(again, SIZE) as work:
        assert await content_of(work) == expected(1)
    await commit(again, 2)
    await check(again)
    again.abandon()


async def test_a_missing_image(store: Store) -> None:
    for number in (1, 2):
        await commit(store, number)
    store.abandon()
    journal_of(store).image.unlink()
    again = reopened(store)
    for point in again.generations.points:
        assert again.content.problem(point) == "its image is missing"
    again.abandon()
