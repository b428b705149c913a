"""Journals in front of a device: what is on it before, behind and after the replica, which one it is, what is believed
of it and for how long, and how it is handed out and taken back. The device is a file here (devices.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from blockferry.common.durable import Log
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import Volume
from blockferry.server import pool as pool_module
from blockferry.server.cache import DigestCache
from blockferry.server.devices import DeviceSpec, check_distinct_devices, parse_device
from blockferry.server.generations import Promotion
from blockferry.server.pools import Pools, PoolSpec, with_devices
from blockferry.server.store import Store
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from tests.unit.conftest import Place
from tests.unit.devices import CAPACITY, FileBase, base_of, external, garbage, make_device, on_device
from tests.unit.journals import SIZE, change, check, commit, expected, grow, record
from tests.unit.layers import B, quick_directory
from tests.unit.stores import IDS, REGION, content_of, names, read, working


@pytest.fixture
def home(place: Place) -> Path:
    return place("tmpfs")


@pytest.fixture
def device(home: Path) -> Path:
    return make_device(home / "device")


@pytest_asyncio.fixture
async def store(home: Path, device: Path) -> AsyncIterator[Store]:
    made = on_device(device, home / "db")
    yield made
    made.abandon()


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def move(path: Path, target: Path) -> None:
    path.rename(target)


def lives(store: Store) -> Iterator[Store]:
    """The replica, and then the same one after its process died."""
    yield store
    yield reopened(store)


def reopened(store: Store) -> Store:
    """The same replica after its process died."""
    store.abandon()
    return on_device(external(store).path, store.directory)


async def promote(store: Store, number: int) -> None:
    """As handover.py does it."""
    point = store.generations.point(number)
    assert point is not None
    await store.complete()
    if point != store.generations.newest:
        await store.rewind(point)
        await store.complete()
    await store.give_away(Promotion(point.number, b"p" * 16, 1, in_place=True))


async def refused(store: Store, code: Code, size: int = SIZE) -> BlockferryError:
    with pytest.raises(BlockferryError) as caught:
        await store.content.check(size)
    assert caught.value.code is code and caught.value.next
    return caught.value


# --- what is on it ----------------------------------------------------------------------------------------------------


async def test_generations_on_a_device_that_had_something_on_it(store: Store, device: Path) -> None:
    for number in range(1, 10):
        await record(store, number)
        await check(store)
        await store.complete()
        await check(store)
        # What lies behind the replica is nobody's business.
        assert bytes_of(device) == expected(number) + garbage(CAPACITY)[grow(number) :]
    assert store.content.location(store.generations.points[-1]) == str(device)
    store = reopened(store)
    await check(store)
    assert sorted(path.name for path in store.directory.glob("*.img")) == []
    assert not (store.directory / "image.raw").exists()
    store.abandon()


async def test_a_first_sync_goes_on_from_what_is_there_and_a_discarded_one_too(store: Store, device: Path) -> None:
    async with working(store, SIZE) as work:
        assert work.size == SIZE
        assert await content_of(work) == garbage(SIZE)
        await work.write([(B, b"x" * B)])
    await store.discard_work()
    async with working(store, SIZE) as work:
        assert (await content_of(work))[: 3 * B] == garbage(B) + b"x" * B + garbage(3 * B)[2 * B :]
    assert store.content.path(store.generations.next(IDS[1], SIZE)) is None
    assert len(bytes_of(device)) == CAPACITY


async def test_what_a_replica_grows_into_is_zeros_whatever_was_there(store: Store, device: Path) -> None:
    await commit(store, 1)
    larger = SIZE + 5 * B + 100
    async with working(store, larger) as work:
        assert await read(store, store.generations.points[0]) == expected(1)
        found = bytearray(larger)
        await work.read_into(0, memoryview(found))
        assert found == expected(1) + bytes(larger - SIZE)
        await work.write([(SIZE + 2 * B, b"data")])
    async with working(store, larger) as work:
        await work.flush()
        await store.commit(work, IDS[2], larger, DigestCache())
    after = bytearray(expected(1) + bytes(larger - SIZE))
    after[SIZE + 2 * B : SIZE + 2 * B + 4] = b"data"
    points = store.generations.points
    assert [await read(store, point) for point in points] == [expected(1), bytes(after)]
    await store.complete()
    assert bytes_of(device) == bytes(after) + garbage(CAPACITY)[larger:]
    assert [await read(store, point) for point in points] == [expected(1), bytes(after)]


@settings(max_examples=40)
@given(
    st.lists(
        st.sampled_from(["commit", "record", "complete", "drop", "reopen", "reload", "discard", "rewind", "lose"]),
        max_size=14,
    ),
    st.data(),
)
async def test_whatever_happened_every_generation_is_what_was_committed(
    history: list[str], data: st.DataObject
) -> None:
    with quick_directory() as directory:
        device = make_device(directory / "device")
        store = on_device(device, directory / "db")
        contents: dict[int, bytes] = {}
        try:
            for action in history:
                number = store.generations.last_number + 1
                points = store.generations.points
                if action in ("commit", "record", "discard", "rewind"):
                    await store.complete()
                if action in ("commit", "record") and number < len(IDS):
                    before = contents[points[-1].number] if points else b""
                    size = max(grow(number), len(before))
                    async with working(store, size) as work:
                        if not points:
                            await work.write([(0, bytes(size))])
                        await work.write([(number * B, bytes([number]) * B), (size - 3, bytes([number]) * 3)])
                        await work.unmap([((20 + number) * B, 2 * B)])
                        await work.flush()
                        await store.commit(work, IDS[number], size, DigestCache())
                    after = bytearray(before + bytes(size - len(before)))
                    after[number * B : (number + 1) * B] = bytes([number]) * B
                    after[size - 3 :] = bytes([number]) * 3
                    after[(20 + number) * B : (22 + number) * B] = bytes(2 * B)
                    contents[number] = bytes(after)
                if action in ("commit", "complete"):
                    await store.complete()
                if action == "drop" and len(points) > 1:
                    await store.drop(data.draw(st.sampled_from(points[:-1])))
                if action == "rewind" and len(points) > 1:
                    await store.rewind(data.draw(st.sampled_from(points[:-1])))
                if action == "discard" and number < len(IDS) and points:
                    async with working(store, points[-1].size + B) as work:
                        await work.write([(0, b"given up"), (points[-1].size, b"and this")])
                    await store.discard_work()
                if action == "reopen":
                    store = reopened(store)
                if action == "reload":
                    await store.reload()
                if action == "lose":
                    external(store).doubt()
                for point in store.generations.points:
                    assert await read(store, point) == contents[point.number], point.number
            await store.complete()
            if store.generations.points:
                newest = contents[store.generations.points[-1].number]
                assert bytes_of(device)[: len(newest)] == newest
            assert bytes_of(device)[grow(len(IDS)) :] == garbage(CAPACITY)[grow(len(IDS)) :]
        finally:
            store.abandon()


# --- which one it is --------------------------------------------------------------------------------------------------


async def test_another_device_is_refused_with_both_identities(store: Store, device: Path, home: Path) -> None:
    await commit(store, 1)
    store.abandon()
    before = bytes_of(store.directory / "device.json"), bytes_of(store.directory / "commits.log")
    move(device, home / "away")
    make_device(device)
    store = on_device(device, store.directory)
    error = await refused(store, Code.WRONG_STATE)
    inodes = [f"inode:{path.stat().st_ino}" for path in (home / "away", device)]
    assert (error.expected, error.found) == tuple(inodes) and all(one in error.cause for one in inodes)
    assert inodes[1] in await store.content.trouble()
    with pytest.raises(BlockferryError):
        await store.content.open_point(store.generations.points[0])
    assert before == (bytes_of(store.directory / "device.json"), bytes_of(store.directory / "commits.log"))
    assert bytes_of(device) == garbage(CAPACITY)
    # The right one again, without anything being restarted.
    move(home / "away", device)
    assert await store.content.trouble() == ""
    await check(store)
    store.abandon()


async def test_a_device_that_is_gone_comes_back(store: Store, device: Path, home: Path) -> None:
    await commit(store, 1)
    move(device, home / "away")
    assert "no such file" in await store.content.trouble()
    await refused(store, Code.NOT_FOUND)
    move(home / "away", device)
    await store.content.check(SIZE)
    await commit(store, 2)
    await check(store)


async def test_sizes(store: Store, device: Path) -> None:
    await store.content.check(CAPACITY)
    error = await refused(store, Code.SIZE_MISMATCH, CAPACITY + 1)
    assert "enlarge the device first" in error.next
    assert (error.expected, error.found) == (str(CAPACITY + 1), str(CAPACITY))
    await commit(store, 1)
    os.truncate(device, CAPACITY + B)
    await store.content.check(CAPACITY + 1)
    os.truncate(device, SIZE - 1)
    error = await refused(store, Code.SIZE_MISMATCH)
    assert (error.expected, error.found) == (str(SIZE), str(SIZE - 1))


async def test_nothing_is_bound_before_the_first_session(store: Store) -> None:
    await store.content.check(SIZE)
    assert (await store.content.open_unfinished(SIZE)) is not None
    assert not (store.directory / "device.json").exists()
    async with working(store, SIZE):
        assert (store.directory / "device.json").exists()


async def test_a_damaged_binding_is_refused(store: Store, device: Path) -> None:
    await commit(store, 1)
    store.abandon()
    (store.directory / "device.json").write_bytes(b"{}")
    store = on_device(device, store.directory)
    await refused(store, Code.CORRUPT_STATE)
    store.abandon()


async def test_a_replica_is_on_its_device_or_in_its_directory_for_ever(store: Store, device: Path) -> None:
    await commit(store, 1)
    store.abandon()
    with pytest.raises(BlockferryError, match="no device is called db") as caught:
        Store(store.directory, clones=True)
    assert caught.value.code is Code.WRONG_STATE and "--device db=" in caught.value.next
    plain = store.directory.with_name("plain")
    Store.create(plain, REGION, clones=False).abandon()
    with pytest.raises(BlockferryError, match="holds the generations of plain itself"):
        Store(plain, clones=False, base=base_of(device, plain))
    store = on_device(device, store.directory)
    await check(store)
    store.abandon()


def test_only_replicas_on_devices_have_the_newer_format(store: Store) -> None:
    assert (store.identity.format, store.identity.device) == (3, True)
    plain = Store.create(store.directory.with_name("plain"), REGION, clones=False)
    plain.abandon()
    assert b"device" not in (plain.directory / "replica.json").read_bytes()
    assert plain.identity.format == 2


# --- what is believed -------------------------------------------------------------------------------------------------


async def _committed(store: Store, number: int) -> None:
    digests = DigestCache()
    digests.put(0, b"d" * 16)
    async with working(store, grow(number)) as work:
        await change(work, number)
        await store.commit(work, IDS[number], grow(number), digests)
    await store.complete()


@pytest.mark.parametrize("after", [[1], [1, 2]], ids=["a first sync", "an update"])
async def test_digests_are_believed_as_long_as_it_is_held(store: Store, after: list[int]) -> None:
    for number in after:
        await _committed(store, number)
    newest = store.generations.points[-1]
    assert store.trusted_digests(newest) is not None
    external(store).doubt()
    assert store.trusted_digests(newest) is None
    await store.content.check(SIZE)
    assert external(store).opened_times == 2 and store.trusted_digests(newest) is None


@pytest.mark.parametrize("clean", [True, False])
async def test_digests_are_not_believed_by_another_process(store: Store, device: Path, clean: bool) -> None:
    await _committed(store, 1)
    store.close() if clean else store.abandon()
    store = on_device(device, store.directory)
    await store.content.check(SIZE)
    assert store.trusted_digests(store.generations.points[0]) is None
    assert store.recorded_digests(store.generations.points[0]) is not None
    store.abandon()


@pytest.mark.parametrize("committed", [False, True])
async def test_progress_is_believed_as_long_as_it_is_held(store: Store, committed: bool) -> None:
    if committed:
        await commit(store, 1)

    async def resumed() -> set[int]:
        work, settled, _ = await store.begin_work(SIZE, "snapshot")
        await store.content.end(work)
        return set(settled)

    assert await resumed() == set()
    store.write_progress("snapshot", SIZE, BitMap([0, 2]))
    if committed:
        async with working(store, SIZE, "snapshot") as work:
            await work.flush()
    assert await resumed() == {0, 2}
    external(store).doubt()
    assert await resumed() == set()
    # Nor does it come back.
    assert await resumed() == set()


async def test_a_commit_fails_where_others_may_have_written_meanwhile(store: Store) -> None:
    await commit(store, 1)
    async with working(store, SIZE) as work:
        await change(work, 2)
        external(store).doubt()
        await store.content.check(SIZE)
        with pytest.raises(BlockferryError, match="was lost during the session") as caught:
            await store.commit(work, IDS[2], SIZE, DigestCache())
    assert caught.value.code is Code.UNAVAILABLE
    await store.reload()
    await check(store)
    assert store.generations.last_number == 1


# --- handing over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [5, 4, 2, 1])
@pytest.mark.parametrize("pending", [False, True])
async def test_the_device_is_handed_out_as_a_point_was(store: Store, device: Path, number: int, pending: bool) -> None:
    for one in range(1, 5):
        await commit(store, one)
    await (record if pending else commit)(store, 5)
    point = store.generations.point(number)
    assert point is not None
    await promote(store, number)
    assert bytes_of(device)[: point.size] == expected(number)
    assert [one.number for one in store.generations.points] == [number]
    left = {"commits.log", "device.json", "replica.json", f"{point.commit_id.hex()}.digests"}
    assert set(names(store)) == left
    # Others write to it, and a server that starts leaves it alone.
    os.truncate(device, CAPACITY)
    with device.open("r+b") as file:
        file.write(b"a guest was here")
    held = bytes_of(device)
    for life in lives(store):
        store = life
        assert store.content.problem(point) and await store.content.trouble() == ""
        with pytest.raises(BlockferryError) as caught:
            await store.content.open_point(point)
        assert caught.value.code is Code.WRONG_STATE
    assert bytes_of(device) == held and external(store).opened_times == 0
    taken = await store.take_back_in_place(IDS[9])
    assert (taken.number, taken.size) == (6, point.size)
    assert await read(store, taken) == held[: point.size]
    assert [one.number for one in store.generations.points] == [6]
    assert store.trusted_digests(taken) is None and store.generations.promoted is None
    store = reopened(store)
    assert await read(store, taken) == held[: point.size]
    store.abandon()


async def test_a_newer_generation_may_follow_one_that_was_gone_back_to(store: Store, device: Path) -> None:
    for number in (1, 2, 3, 4):
        await commit(store, number)
    point = store.generations.point(2)
    assert point is not None
    await store.rewind(point)
    assert [one.number for one in store.generations.points] == [1, 2] and store.content.incomplete
    for life in lives(store):
        store = life
        assert await read(store, store.generations.points[0]) == expected(1)
        assert await read(store, point) == expected(2)
    await store.complete()
    async with working(store, grow(3)) as work:
        await work.write([(0, b"another three")])
        await work.flush()
        made = await store.commit(work, IDS[5], grow(3), DigestCache())
    await store.complete()
    assert made.number == 5
    after = b"another three" + expected(2)[13:] + bytes(grow(3) - grow(2))
    assert bytes_of(device)[: grow(3)] == await read(store, made) == after
    assert [await read(store, one) for one in store.generations.points[:2]] == [expected(1), expected(2)]
    store.abandon()


async def test_the_log_of_an_older_server_knows_no_rewind(store: Store) -> None:
    for number in (1, 2):
        await commit(store, number)
    point = store.generations.point(1)
    assert point is not None
    await store.rewind(point)
    store.abandon()
    log = Log(store.directory / "commits.log")
    assert log.records[-1] == {"kind": "rewind", "number": 1}
    # A number that is not there is damage, not news.
    log.append({"kind": "rewind", "number": 7})
    log.close()
    with pytest.raises(BlockferryError) as caught:
        on_device(external(store).path, store.directory)
    assert caught.value.code is Code.CORRUPT_STATE


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("db=/dev/sdb,journal=/srv/j", DeviceSpec("db", "/dev/sdb", Path("/srv/j"))),
        ("db=/dev/a,b,journal=/srv/j,limit=2K", DeviceSpec("db", "/dev/a,b", Path("/srv/j"), 2048)),
        ("db=nbd://h/e=x,journal=/srv/j", DeviceSpec("db", "nbd://h/e=x", Path("/srv/j"))),
        ("db=nbd+unix:///?socket=/s,journal=/j", DeviceSpec("db", "nbd+unix:///?socket=/s", Path("/j"))),
    ],
)
def test_devices_on_the_command_line(text: str, spec: DeviceSpec) -> None:
    assert parse_device(text) == spec


@pytest.mark.parametrize(
    "text",
    ["", "db=/dev/sdb", "db=/dev/sdb,journal=", "=/dev/sdb,journal=/j", "db=,journal=/j", "db=sdb,journal=/j",
     "d b=/dev/sdb,journal=/j", "db=nbd://,journal=/j", "db=/dev/sdb,journal=/j,limit=x", "db=grpc://h/v,journal=/j"],
)  # fmt: skip
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(BlockferryError) as caught:
        parse_device(text)
    assert caught.value.code in (Code.INVALID_ARGUMENT, Code.USAGE) and caught.value.next


def test_one_name_for_each_device(tmp_path: Path) -> None:
    one, two = DeviceSpec("a", "/dev/x", tmp_path), DeviceSpec("b", "/dev/y", tmp_path)
    check_distinct_devices([one, two])
    for other in (DeviceSpec("a", "/dev/y", tmp_path), DeviceSpec("b", "/dev/x", tmp_path)):
        with pytest.raises(BlockferryError, match="they are both"):
            check_distinct_devices([one, other])


def test_journals_lie_in_pools_or_in_directories_of_their_own(tmp_path: Path) -> None:
    for name in ("p", "j", "x/j", ".odd"):
        (tmp_path / name).mkdir(parents=True)
    devices = [DeviceSpec(name, f"/dev/{name}", tmp_path / path) for name, path in
               (("a", "p"), ("b", "j"), ("c", "x/../j"), ("d", "x/j"), ("e", ".odd"))]  # fmt: skip
    specs = with_devices([PoolSpec("main", tmp_path / "p")], devices)
    assert [(spec.name, [one.name for one in spec.devices], spec.only_devices) for spec in specs] == [
        ("main", ["a"], False),
        ("j", ["b", "c"], True),
        ("j-2", ["d"], True),
        ("journal", ["e"], True),
    ]


async def test_a_server_of_devices_alone_makes_no_other_replicas(
    tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "external_base", FileBase)
    specs = [DeviceSpec("db", str(device), tmp_path), DeviceSpec("gone", str(tmp_path / "gone"), tmp_path)]
    # Of somebody else, and nobody's replica.
    (tmp_path / "other").mkdir()
    pools = await Pools.open(with_devices([], specs), 60.0)
    assert [name for pool in pools for name in pool.names] == ["db", "gone"]
    try:
        with pytest.raises(BlockferryError, match="devices only: db, gone") as caught:
            await pools.get_or_create("other", 0)
        assert caught.value.code is Code.NOT_FOUND
        # Nothing is made for what cannot be used.
        for name, size in (("gone", SIZE), ("db", CAPACITY + 1)):
            with pytest.raises(BlockferryError) as caught:
                await pools.get_or_create(name, 0, size=size)
            assert caught.value.volume == name and not (tmp_path / name).exists()
        replica = await pools.get_or_create("db", REGION, size=SIZE)
        assert replica.store.content.kind == "device"
        with pytest.raises(BlockferryError, match="whose own content") as caught:
            await pools.adopt("db", "seed", 0)
        assert caught.value.code is Code.UNSUPPORTED
        await pools.delete(replica)
        assert bytes_of(device) == garbage(CAPACITY) and not (tmp_path / "db").exists()
        assert (await pools.get_or_create("db", 2 * REGION, size=SIZE)).store.identity.region_size == 2 * REGION
    finally:
        await pools.close()


async def test_nothing_stays_open_that_was_being_opened(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device may be slow: whoever lets go of it meanwhile is not to find it open later."""
    directory = tmp_path / "db"
    directory.mkdir()
    base = base_of(device, directory)
    opened, go_on = asyncio.Event(), asyncio.Event()
    real = base._open

    async def slow() -> Volume:
        volume = await real()
        opened.set()
        await go_on.wait()
        return volume

    monkeypatch.setattr(base, "_open", slow)
    opening = asyncio.create_task(base.opened(0))
    await opened.wait()
    base.let_go()
    go_on.set()
    with pytest.raises(BlockferryError, match="is not in use any more"):
        await opening
    assert str(device) not in open_files()


def open_files() -> set[str]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(link.readlink()))
    return found
