"""A hydrating volume: what is fetched and what is not, orders, failures; all in memory, with exact operations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import Volume
from blockferry.server.rehydrate import fetch, sources
from blockferry.server.rehydrate.locks import RangeLocks
from blockferry.server.rehydrate.map import HydrationMap
from blockferry.server.rehydrate.sources import Sources
from blockferry.server.rehydrate.volume import HYDRATED, HydratingVolume

from tests.unit.rehydration import SNAPSHOT, B, Primary, Site, World, disk_of, new_map, pattern, read, sweeping

UNIT = fetch.UNIT_BLOCKS * B
SIZE = 4 * UNIT + 5 * B + 77
CONTENT = pattern(1, SIZE)


@pytest.fixture
def site() -> Site:
    return Site(CONTENT)


@pytest.fixture
def primary() -> Primary:
    return Primary(bytes(SIZE))


@pytest.fixture
def disk(tmp_path: Path, site: Site, primary: Primary) -> HydratingVolume:
    return disk_of(primary, new_map(tmp_path, SIZE), World(a=site))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(sources, "RETRY_SECONDS", 0.0005)


async def settled(disk: HydratingVolume) -> None:
    """Let what is under way come to its end."""
    await disk.fetcher.idle()


async def until(condition: Callable[[], bool]) -> None:
    """Give others their turns until something has come to pass."""
    while not condition():  # noqa: ASYNC110 it is somebody else's state
        await asyncio.sleep(0)


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_a_read_fetches_its_unit_once(disk: HydratingVolume, site: Site, primary: Primary) -> None:
    assert await read(disk, UNIT + 3 * B + 1, 100) == CONTENT[UNIT + 3 * B + 1 :][:100]
    assert site.reads == [(UNIT, UNIT)]
    await settled(disk)
    assert primary.of("write") == [(UNIT, UNIT // 2), (UNIT + UNIT // 2, UNIT // 2)]
    primary.operations.clear()
    assert await read(disk, 2 * UNIT - B, B) == CONTENT[2 * UNIT - B :][:B]
    assert site.reads == [(UNIT, UNIT)]
    assert primary.operations == [("read", 2 * UNIT - B, B)]
    await disk.close()


async def test_whoever_wants_the_same_waits_for_the_same(disk: HydratingVolume, site: Site) -> None:
    found = await asyncio.gather(*(read(disk, number * B, B) for number in range(20)), read(disk, 0, UNIT))
    assert found == [CONTENT[number * B :][:B] for number in range(20)] + [CONTENT[:UNIT]]
    assert site.reads == [(0, UNIT)]
    await disk.close()


async def test_a_large_read_fetches_units_side_by_side(disk: HydratingVolume, site: Site) -> None:
    assert await read(disk, 0, SIZE) == CONTENT
    assert sorted(site.reads) == [(at, min(UNIT, SIZE - at)) for at in range(0, SIZE, UNIT)]
    await disk.close()


async def test_what_is_hydrated_is_never_asked_for(disk: HydratingVolume, site: Site) -> None:
    """Not even beside what is missing: of a unit only the span from the first to the last missing block is fetched."""
    new = pattern(2, 4 * B)
    await disk.write([(0, new), (UNIT - 4 * B, new)])
    assert site.reads == []
    site.down = True
    assert await read(disk, 0, 4 * B) == new
    site.down = False
    assert await read(disk, 0, UNIT) == new + CONTENT[4 * B : UNIT - 4 * B] + new
    assert site.reads == [(4 * B, UNIT - 8 * B)]
    await disk.close()


async def test_reading_now_is_for_what_is_there(disk: HydratingVolume) -> None:
    buffer = memoryview(bytearray(B))
    assert not disk.read_now(0, buffer)
    await read(disk, 0, B)
    await settled(disk)
    assert disk.read_now(0, buffer) and buffer == CONTENT[:B]
    assert not disk.read_now(UNIT, buffer)
    await disk.close()


async def test_a_read_is_answered_though_the_primary_cannot_be_written(disk: HydratingVolume, primary: Primary) -> None:
    primary.failing = {"write"}
    assert await read(disk, 0, B) == CONTENT[:B]
    await settled(disk)
    assert not disk.map.is_hydrated(0, 1)
    assert await read(disk, 0, B) == CONTENT[:B]
    await settled(disk)
    assert disk.map.is_hydrated(0, fetch.UNIT_BLOCKS)
    await disk.close()


# --- writing ----------------------------------------------------------------------------------------------------------


async def test_whole_blocks_are_written_without_fetching(disk: HydratingVolume, site: Site) -> None:
    tail = pattern(3, SIZE - (SIZE // B) * B)
    await disk.write([(B, pattern(2, 2 * B)), (SIZE - len(tail), tail)])
    await disk.unmap([(10 * B, B)])
    assert site.reads == []
    assert disk.map.missing(0, disk.map.blocks) == [(0, 1), (3, 7), (11, disk.map.blocks - 12)]
    await disk.close()


async def test_a_part_of_a_block_is_merged(disk: HydratingVolume, site: Site) -> None:
    await disk.write([(B + 5, b"x" * (2 * B))])
    assert site.reads == [(0, UNIT)]
    expected = CONTENT[: B + 5] + b"x" * (2 * B) + CONTENT[3 * B + 5 : UNIT]
    assert await read(disk, 0, UNIT) == expected
    await disk.unmap([(2 * UNIT - 7, 14)])
    expected = CONTENT[2 * UNIT - B : 2 * UNIT - 7] + bytes(14) + CONTENT[2 * UNIT + 7 : 2 * UNIT + B]
    assert await read(disk, 2 * UNIT - B, 2 * B) == expected
    assert site.reads == [(0, UNIT), (UNIT, UNIT), (2 * UNIT, UNIT)]
    await disk.close()


async def test_trimming_what_is_missing_zeroes_it(disk: HydratingVolume, site: Site, primary: Primary) -> None:
    primary.data[:] = pattern(9, SIZE)  # what somebody has left there
    held, left = await disk.deallocate([(B, 3 * B)])
    assert (held, left) == (0, [])
    assert await read(disk, B, 3 * B) == bytes(3 * B)
    assert site.reads == []
    # Blocks of which a part would have to be fetched first are left as they are.
    assert (await disk.deallocate([(10 * B + 1, 2 * B)]))[1] == [(10 * B + 1, B - 1), (12 * B, 1)]
    assert await read(disk, 10 * B, 3 * B) == CONTENT[10 * B : 11 * B] + bytes(B) + CONTENT[12 * B : 13 * B]
    await disk.close()


async def test_a_write_wins_over_what_is_being_fetched(disk: HydratingVolume, primary: Primary) -> None:
    """It comes when the data is there and is about to be written through."""
    primary.pauses = 20
    reading = asyncio.create_task(read(disk, 0, UNIT))
    await until(lambda: bool(primary.of("write")))
    new = pattern(4, 2 * B)
    await disk.write([(B, new)])
    await reading
    await settled(disk)
    assert await read(disk, 0, UNIT) == CONTENT[:B] + new + CONTENT[3 * B : UNIT]
    await disk.close()


async def test_a_write_before_the_data_arrives_is_not_overwritten(disk: HydratingVolume, site: Site) -> None:
    site.silent = True
    reading = asyncio.create_task(read(disk, 0, B))
    await asyncio.sleep(0.001)
    new = pattern(4, B)
    await disk.write([(5 * B, new)])
    assert await read(disk, 5 * B, B) == new
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await disk.close()


async def test_a_failed_write_leaves_what_the_source_has(disk: HydratingVolume, primary: Primary) -> None:
    primary.failing = {"write"}
    with pytest.raises(BlockferryError, match="write fails"):
        await disk.write([(B, pattern(5, 4 * B))])
    assert await read(disk, 0, UNIT) == CONTENT[:UNIT]
    await settled(disk)
    assert bytes(primary.data[:UNIT]) == CONTENT[:UNIT]
    await disk.close()


@pytest.mark.parametrize("fresh", [True, False])
async def test_holes_are_zeroed_unless_nobody_has_touched_them(tmp_path: Path, fresh: bool) -> None:
    content = CONTENT[:B] + bytes(UNIT - B)
    primary = Primary(bytes(UNIT) if fresh else pattern(8, UNIT))
    disk = disk_of(primary, new_map(tmp_path, UNIT), World(a=Site(content)), fresh=fresh)
    assert await read(disk, 0, UNIT) == content
    await settled(disk)
    assert bytes(primary.data) == content
    assert primary.of("unmap") == ([] if fresh else [(B, UNIT - B)])
    await disk.close()


async def test_a_fresh_primary_is_fresh_until_a_write_fails(tmp_path: Path) -> None:
    primary = Primary(bytes(UNIT))
    disk = disk_of(primary, new_map(tmp_path, UNIT), World(a=Site(bytes(UNIT))), fresh=True)
    primary.failing = {"write"}
    with pytest.raises(BlockferryError):
        await disk.write([(0, pattern(5, 4 * B))])
    assert any(primary.data)
    assert await read(disk, 0, UNIT) == bytes(UNIT)
    await settled(disk)
    assert await read(disk, 0, UNIT) == bytes(UNIT)
    await disk.close()


# --- what is data -----------------------------------------------------------------------------------------------------


async def test_what_is_missing_is_never_a_hole(disk: HydratingVolume, primary: Primary) -> None:
    assert await disk.data_extents(0, SIZE) == [(0, SIZE)]
    found = await disk.allocation(64 * 1024)
    assert found.allocated_bytes == SIZE
    await disk.unmap([(B, 3 * B)])
    await disk.write([(4 * B, CONTENT[: 2 * B])])
    assert await disk.status(HYDRATED, 0, 8 * B) == [(B, 0), (5 * B, 1), (2 * B, 0)]
    assert await disk.status(HYDRATED, B + 10, B) == [(B, 1)]
    # The primary in memory names everything it is asked about: what matters is that nothing missing is left out.
    assert await disk.data_extents(0, 8 * B) == [(0, 8 * B)]
    await disk.close()


# --- sources ----------------------------------------------------------------------------------------------------------


async def test_a_request_waits_for_a_source_and_fails_with_nothing_changed(
    disk: HydratingVolume, site: Site, primary: Primary
) -> None:
    site.down = True
    with pytest.raises(BlockferryError, match="the source is down") as caught:
        await read(disk, 0, B)
    assert caught.value.code is Code.UNAVAILABLE
    with pytest.raises(BlockferryError):
        await disk.write([(5, b"part")])
    assert primary.of("write") == []
    await disk.write([(B, CONTENT[B : 2 * B])])
    site.down = False
    assert await read(disk, 0, 3 * B) == CONTENT[: 3 * B]
    await disk.close()


async def test_a_request_that_waits_goes_on_when_the_source_returns(tmp_path: Path, site: Site) -> None:
    disk = disk_of(Primary(bytes(SIZE)), new_map(tmp_path, SIZE), World(a=site), timeout=60)
    site.down = True
    reading = asyncio.create_task(read(disk, 0, B))
    await until(lambda: bool(disk.fetcher.demands))
    await asyncio.sleep(0.01)
    assert not reading.done()
    site.down = False
    assert await reading == CONTENT[:B]
    await disk.close()


async def test_another_source_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Site(CONTENT), Site(CONTENT)
    disk = disk_of(Primary(bytes(SIZE)), new_map(tmp_path, SIZE), World(one=one, other=other))
    assert await read(disk, 0, B) == CONTENT[:B]
    assert (len(one.reads), len(other.reads)) == (1, 0)
    one.down = True
    assert await read(disk, UNIT, B) == CONTENT[UNIT:][:B]
    assert (len(one.reads), len(other.reads)) == (1, 1)
    # The one that answers stays the first choice, also when the other is back.
    one.down = False
    assert await read(disk, 2 * UNIT, B) == CONTENT[2 * UNIT :][:B]
    assert (len(one.reads), len(other.reads)) == (1, 2)
    # One that neither answers nor hangs up has a deadline.
    monkeypatch.setattr(sources, "FETCH_SECONDS", 0.01)
    other.silent = True
    assert await read(disk, 3 * UNIT, B) == CONTENT[3 * UNIT :][:B]
    assert (len(one.reads), len(other.reads)) == (2, 2)
    other.silent = False
    await disk.close()


async def test_what_one_source_has_lost_another_one_has(tmp_path: Path) -> None:
    one, other = Site(CONTENT), Site(CONTENT)
    one.rotten = True
    disk = disk_of(Primary(bytes(SIZE)), new_map(tmp_path, SIZE), World(one=one, other=other))
    assert await read(disk, 0, B) == CONTENT[:B]
    other.rotten = True
    with pytest.raises(BlockferryError, match="rotten") as caught:
        await read(disk, UNIT, B)
    assert caught.value.code is Code.DATA_MISMATCH
    await disk.close()


async def test_another_snapshot_is_never_read(tmp_path: Path) -> None:
    wrong, right = Site(pattern(99, SIZE), "commit:bb"), Site(CONTENT)
    disk = disk_of(Primary(bytes(SIZE)), new_map(tmp_path, SIZE), World(wrong=wrong, right=right))
    assert await read(disk, 0, SIZE) == CONTENT
    assert wrong.reads == []
    await disk.close()
    shorter = Site(CONTENT[:-1])
    alone = disk_of(Primary(bytes(SIZE)), HydrationMap.open(tmp_path), World(shorter=shorter))
    with pytest.raises(BlockferryError, match=f"has {SIZE - 1} bytes"):
        await read(alone, 0, B)
    assert shorter.reads == []
    await alone.close()


async def test_sources_must_agree_from_the_start() -> None:
    same = World(a=Site(CONTENT), b=Site(CONTENT))
    found = await Sources.first(["a", "b"], same.open)
    assert (found.size, found.snapshot_id) == (SIZE, SNAPSHOT)
    await found.close()
    other = World(a=Site(CONTENT), b=Site(CONTENT, "commit:bb"))
    with pytest.raises(BlockferryError, match="b is another snapshot"):
        await Sources.first(["a", "b"], other.open)
    assert (other.sites["a"].closed, other.sites["b"].closed) == (1, 1)
    with pytest.raises(BlockferryError, match="it may change meanwhile"):
        await Sources.first(["a"], World(a=Site(CONTENT, "")).open)
    away = World(a=Site(CONTENT), b=Site(CONTENT))
    away.sites["a"].down = True
    found = await Sources.first(["a", "b"], away.open)
    assert found.snapshot_id == SNAPSHOT
    await found.close()
    away.sites["b"].down = True
    with pytest.raises(BlockferryError, match="the source is down"):
        await Sources.first(["a", "b"], away.open)


# --- flushes ----------------------------------------------------------------------------------------------------------


async def test_the_primary_is_flushed_before_the_map_says_so(disk: HydratingVolume, primary: Primary) -> None:
    """And only for what was complete when it was captured: a write during the flush waits for the next one."""
    await disk.write([(0, CONTENT[:B])])
    primary.pauses = 50
    flushing = asyncio.create_task(disk.flush())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    primary.pauses = 0
    await disk.write([(B, CONTENT[B : 2 * B])])
    assert not flushing.done() and ("flush", 0, 1) not in primary.operations
    await flushing
    assert not disk.map.settled
    await disk.close()
    again = HydrationMap.open(disk.map.directory)
    assert list(again.hydrated()) == [0]
    again.close()


async def test_flushes_that_come_together_are_one(disk: HydratingVolume, primary: Primary) -> None:
    primary.pauses = 5
    await asyncio.gather(*(disk.flush() for _ in range(10)))
    assert len(primary.of("flush")) <= 2
    await disk.close()


async def test_after_a_failed_flush_nothing_is_believed(disk: HydratingVolume, primary: Primary) -> None:
    await disk.write([(0, CONTENT[:B])])
    primary.failing = {"flush"}
    with pytest.raises(BlockferryError, match="flush fails"):
        await disk.flush()
    for refused in (disk.flush(), disk.write([(0, b"x" * B)]), disk.unmap([(0, B)]), read(disk, 0, B)):
        with pytest.raises(BlockferryError, match="flush fails"):
            await refused
    assert not disk.read_now(0, memoryview(bytearray(B)))
    await disk.close()
    again = HydrationMap.open(disk.map.directory)
    assert list(again.hydrated()) == []
    again.close()


async def test_a_map_that_cannot_be_written_is_tried_again(
    disk: HydratingVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    await disk.write([(0, CONTENT[:B])])

    def full(*_: object) -> None:
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr(disk.map._log, "append", full)
        with pytest.raises(BlockferryError, match="cannot record what is hydrated") as caught:
            await disk.flush()
    assert caught.value.code is Code.OUT_OF_SPACE
    await disk.flush()
    await disk.close()
    again = HydrationMap.open(disk.map.directory)
    assert list(again.hydrated()) == [0]
    again.close()


async def test_whoever_gives_up_a_flush_loses_nothing(disk: HydratingVolume, primary: Primary) -> None:
    await disk.write([(0, CONTENT[:B])])
    primary.pauses = 10
    impatient = asyncio.create_task(disk.flush())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    await disk.flush()
    await disk.close()
    again = HydrationMap.open(disk.map.directory)
    assert list(again.hydrated()) == [0]
    again.close()


async def test_changes_wait_while_it_is_quiet(disk: HydratingVolume) -> None:
    await disk.write([(0, CONTENT[:B])])
    async with disk.quiet():
        assert disk.map.settled
        writing = asyncio.create_task(disk.write([(B, CONTENT[:B])]))
        part = asyncio.create_task(disk.write([(UNIT + 1, b"part")]))
        # Reads are answered from what is fetched, which is written through later.
        assert await asyncio.wait_for(read(disk, 2 * UNIT, B), 5) == CONTENT[2 * UNIT :][:B]
        assert not (writing.done() or part.done())
        assert disk.map.settled and not disk.map.is_hydrated(2 * fetch.UNIT_BLOCKS, 2 * fetch.UNIT_BLOCKS + 1)
    await asyncio.gather(writing, part)
    await disk.close()


# --- the sweep --------------------------------------------------------------------------------------------------------


async def test_the_sweep_brings_everything_once(disk: HydratingVolume, site: Site, primary: Primary) -> None:
    async with sweeping(disk) as task:
        await asyncio.wait_for(task, 20)
    assert disk.map.complete and bytes(primary.data) == CONTENT
    assert sorted(site.reads) == [(0, 4 * UNIT), (4 * UNIT, SIZE - 4 * UNIT)]
    assert disk.fetcher.bytes_fetched == SIZE
    await disk.close()


async def test_the_sweep_leaves_holes_where_they_are(tmp_path: Path) -> None:
    """What is not allocated at the source is neither asked for nor written."""
    size = 8 << 20
    content = bytearray(size)
    content[4 << 20 : (4 << 20) + B] = CONTENT[:B]
    site, primary = Site(bytes(content)), Primary(bytes(size))
    disk = disk_of(primary, new_map(tmp_path, size), World(a=site), fresh=True)
    async with sweeping(disk) as task:
        await asyncio.wait_for(task, 20)
    assert bytes(primary.data) == content
    assert site.reads == [(4 << 20, 1 << 20)]
    assert primary.of("write") == [((4 << 20), B // 2), ((4 << 20) + B // 2, B // 2)]
    assert primary.of("unmap") == []
    await disk.close()


async def test_demand_is_not_held_up_by_the_bandwidth_limit(tmp_path: Path, site: Site) -> None:
    disk = disk_of(Primary(bytes(SIZE)), new_map(tmp_path, SIZE), World(a=site), bandwidth=1)
    async with sweeping(disk):
        await asyncio.sleep(0.01)
        assert await asyncio.wait_for(read(disk, 3 * UNIT, B), 5) == CONTENT[3 * UNIT :][:B]
        assert site.reads == [(3 * UNIT, UNIT)]
    await disk.close()


async def test_neighbours_come_before_the_rest(tmp_path: Path) -> None:
    content = pattern(7, 64 * UNIT)
    site = Site(content)
    disk = disk_of(Primary(bytes(len(content))), new_map(tmp_path, len(content)), World(a=site))
    await read(disk, 40 * UNIT, B)
    async with sweeping(disk) as task:
        await asyncio.wait_for(task, 20)
    assert site.reads[:2] == [(40 * UNIT, UNIT), (41 * UNIT, UNIT)]
    assert site.reads[2] == (0, 4 * UNIT)
    await disk.close()


async def test_a_guest_that_reads_on_is_expected(tmp_path: Path) -> None:
    content = pattern(7, 64 * UNIT)
    disk = disk_of(Primary(bytes(len(content))), new_map(tmp_path, len(content)), World(a=Site(content)))
    for unit in (10, 11):
        await read(disk, unit * UNIT, B)
    assert list(disk.fetcher._neighbours) == [11, 12, 13, 14, 15]
    await disk.close()


async def test_the_sweep_waits_for_a_source_and_goes_on(disk: HydratingVolume, site: Site, primary: Primary) -> None:
    site.down = True
    async with sweeping(disk) as task:
        await until(lambda: bool(disk.fetcher.problem))
        assert "the source is down" in disk.fetcher.problem
        site.down = False
        await asyncio.wait_for(task, 20)
    assert disk.fetcher.problem == "" and bytes(primary.data) == CONTENT
    await disk.close()


async def test_the_sweep_passes_by_what_is_damaged(
    disk: HydratingVolume, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DAMAGE_SECONDS", 0.02)
    site.rotten = True
    async with sweeping(disk) as task:
        await until(lambda: bool(disk.fetcher.damaged))
        assert disk.map.missing(0, disk.map.blocks)
        site.rotten = False
        await asyncio.wait_for(task, 20)
    assert disk.map.complete
    await disk.close()


async def test_an_error_of_the_primary_holds_up_the_sweep_only(disk: HydratingVolume, primary: Primary) -> None:
    primary.failing = {"write"}
    async with sweeping(disk) as task:
        await asyncio.wait_for(task, 20)
    assert disk.map.complete and bytes(primary.data) == CONTENT
    await disk.close()


# --- locks ------------------------------------------------------------------------------------------------------------


async def test_locks_of_ranges() -> None:
    locks = RangeLocks()
    order: list[str] = []

    async def hold(name: str, first: int, stop: int, until: asyncio.Event) -> None:
        async with locks.holding(first, stop):
            order.append(f"+{name}")
            await until.wait()
            order.append(f"-{name}")

    events = {name: asyncio.Event() for name in "abcd"}
    tasks = [
        asyncio.create_task(hold(name, *span, events[name]))
        for name, span in (("a", (0, 10)), ("b", (5, 15)), ("c", (12, 20)), ("d", (20, 30)))
    ]
    await asyncio.sleep(0.001)
    assert order == ["+a", "+d"]  # c waits for b, which was there before
    tasks[1].cancel()
    await asyncio.sleep(0.001)
    assert order == ["+a", "+d", "+c"]
    for event in events.values():
        event.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not locks._claims


async def test_a_volume_is_named_after_its_primary(disk: HydratingVolume) -> None:
    assert isinstance(disk, Volume)
    assert (disk.uri, disk.size, disk.zeroing, disk.contexts) == ("primary", SIZE, "punch-hole", (HYDRATED,))
    await disk.close()
