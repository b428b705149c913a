"""Archiving: what is read, stored, referred to and asked for, counted exactly."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from blockferry.client.archive_forecast import forecast
from blockferry.client.archiver import Changed
from blockferry.common.archive.format import ARCHIVE_BLOCK
from blockferry.common.archive.store import Access
from blockferry.common.errors import BlockferryError, Code
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from tests.archive_faults import CountingStore, MemoryStore
from tests.unit.archive.site import Site, block, chunks, content, parts, volume
from tests.unit.memory_volume import MemoryVolume

ONCE = {"get archive.json": 1, "get names": 1, "list log": 1, "put attempts": 1, "delete attempts": 1}
"""What every run asks for."""


async def test_a_first_archive_stores_what_is_not_zero(site: Site) -> None:
    counting = CountingStore(site.store)
    data = content(1, None, 2, 3, None, None, 4, tail=1000)
    report = await site.on(counting).archive(volume(data))
    await site.check(data)
    assert report["outcome"] == "archived" and (report["snapshot"], report["base"]) == (1, None)
    assert report["blocks"] == {"archived": 5, "zero": 0, "equal": 0, "stored": 5, "kept": 0, "holes": 0}
    assert report["bytes"]["source_read"] == report["bytes"]["stored"] == 4 * ARCHIVE_BLOCK + 1000
    assert report["objects"] == {"data": 2, "meta": 1}
    assert report["bytes"]["uploaded"] == sum(
        [len(await site.store.get(key)) for kind in ("data", "meta") for key in chunks(counting, kind)]
    )
    assert parts(counting) == {
        "put_new probe": 2, "get probe": 1, "delete probe": 1,
        "get archive.json": 1, "put_new archive.json": 1,
        "get names": 2, "put_new names": 1,
        "list log": 1, "put attempts": 1, "delete attempts": 1,
        "put_new data": 2, "put_new meta": 1, "put_new log": 1, "get log": 1,
    }  # fmt: skip


async def test_an_unchanged_volume_costs_a_trailer_and_a_superblock(site: Site) -> None:
    data = content(1, None, 2, 3, 4, 5, 6, 7, 8)
    await site.archive(volume(data))
    counting = CountingStore(site.store)
    report = await site.on(counting).archive(volume(data))
    await site.check(data, data)
    assert report["blocks"] == {"archived": 8, "zero": 0, "equal": 8, "stored": 0, "kept": 0, "holes": 0}
    assert report["objects"] == {"data": 1, "meta": 0} and report["bytes"]["uploaded"] < 200
    assert (report["snapshot"], report["base"]) == (2, 1)
    # The base's superblock, and the one that was written, read back. Its tree is still in the cache.
    assert parts(counting) == {**ONCE, "put_new data": 1, "put_new log": 1, "get log": 2}


async def test_what_changed_is_stored_and_what_became_zero_is_a_hole(site: Site) -> None:
    first = content(1, 2, 3, 4, None, 6, tail=100)
    await site.archive(volume(first))
    second = bytearray(content(1, None, 30, 4, 5, 6, tail=100))
    source = volume(bytes(second))
    # This one is zeros that were written, and so may hold data as far as anybody knows.
    source._held.add(ARCHIVE_BLOCK // 4096)
    report = await site.archive(source)
    await site.check(first, bytes(second))
    assert report["blocks"] == {"archived": 6, "zero": 1, "equal": 4, "stored": 2, "kept": 0, "holes": 1}
    assert report["bytes"]["stored"] == 2 * ARCHIVE_BLOCK


async def test_another_host_fetches_the_metadata_of_the_base_once(site: Site) -> None:
    data = content(*range(20))
    await site.archive(volume(data))
    counting = CountingStore(site.store)
    other = site.beside("other").on(counting)
    await other.archive(volume(data))
    assert parts(counting)["get meta"] == 1
    counting.requests.clear()
    await other.archive(volume(data))
    assert "get meta" not in parts(counting)
    await site.check(data, data, data)


async def test_metadata_in_the_cache_that_was_damaged_is_fetched_again(site: Site) -> None:
    data = content(*range(5))
    await site.archive(volume(data))
    (cached,) = site.directory.glob("*/*/cache/*")
    whole = cached.read_bytes()
    for damage in (b"", whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        cached.write_bytes(damage)
        counting = CountingStore(site.store)
        await site.on(counting).archive(volume(data))
        assert parts(counting)["get meta"] == 1 and cached.read_bytes() == whole


@pytest.mark.parametrize("sizes", [(10, 11), (11, 10), (10.5, 12), (12, 10.5), (10.25, 10.5), (10.5, 10.25), (3, 1)])
@pytest.mark.parametrize("tracked", [False, True], ids=["all", "tracked"])
async def test_volumes_that_grow_and_shrink(site: Site, sizes: tuple[float, float], tracked: bool) -> None:
    whole = content(*range(12))
    first, second = (whole[: int(size * ARCHIVE_BLOCK)] for size in sizes)
    await site.archive(volume(first, "one"))
    changed = Changed("one", BitMap(), ARCHIVE_BLOCK) if tracked else None
    await site.archive(volume(second, "two"), changed=changed)
    await site.check(first, second)


async def test_a_volume_that_became_empty_and_full_again(site: Site) -> None:
    for data in (content(None), content(None, None), content(1, 2), content(None, None), content(3)):
        await site.archive(volume(data))
    await site.check(content(None), content(None, None), content(1, 2), content(None, None), content(3))


tags = st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=9)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=st.lists(st.tuples(tags, st.sampled_from([0, 1, 5000])), min_size=1, max_size=4),
    compression=st.sampled_from(["none", "zstd:1"]),
    hosts=st.integers(1, 2),
)
async def test_every_history_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    small_chunks: None,
    small_metadata: None,
    history: list[tuple[list[int | None], int]],
    compression: str,
    hosts: int,
) -> None:
    site = Site(tmp_path_factory.mktemp("staging"), compression=compression)
    expected = []
    for number, (found, tail) in enumerate(history):
        # The same tag is the same block, wherever it is.
        data = content(*found, tail=tail)
        expected.append(data)
        await site.beside(str(number % hosts)).archive(volume(data))
    await site.check(*expected)


# --- change tracking --------------------------------------------------------------------------------------------------


async def test_blocks_that_a_tracker_calls_unchanged_are_neither_read_nor_looked_up(
    site: Site, small_metadata: None
) -> None:
    first = content(*range(40))
    await site.archive(volume(first, "one"))
    second = bytearray(first)
    second[7 * ARCHIVE_BLOCK : 8 * ARCHIVE_BLOCK] = block("new")
    source = volume(bytes(second), "two")
    counting = CountingStore(site.store)
    other = site.beside("other").on(counting)
    # Regions of 64 KiB: the last of block 6 and the first two of block 7.
    report = await other.archive(source, changed=Changed("one", BitMap([27, 28, 29]), 65536))
    await site.check(first, bytes(second))
    assert source.of("read") == [(6 * ARCHIVE_BLOCK, 2 * ARCHIVE_BLOCK)]
    assert report["blocks"] == {"archived": 40, "zero": 0, "equal": 1, "stored": 1, "kept": 0, "holes": 0}
    # A path of three nodes, of seventeen that the tree has; a chunk holds one or two.
    assert parts(counting)["get meta"] <= 3


async def test_a_tracked_block_that_became_a_hole_goes(site: Site) -> None:
    await site.archive(volume(content(1, 2, 3), "one"))
    source = volume(content(1, None, 3), "two")
    report = await site.archive(source, changed=Changed("one", BitMap([1]), ARCHIVE_BLOCK))
    await site.check(content(1, 2, 3), content(1, None, 3))
    assert source.of("read") == [] and report["blocks"]["holes"] == 1


@pytest.mark.parametrize("base", ["", "another"])
async def test_a_tracker_with_another_base_is_not_believed(site: Site, base: str) -> None:
    await site.archive(volume(content(1, 2, 3), "one"))
    source = volume(content(1, 20, 3), "two")
    await site.archive(source, changed=Changed(base, BitMap(), ARCHIVE_BLOCK))
    await site.check(content(1, 2, 3), content(1, 20, 3))


async def test_a_tracker_without_a_snapshot_id_in_the_archive_is_not_believed(site: Site) -> None:
    await site.archive(volume(content(1, 2, 3)))
    await site.archive(volume(content(1, 20, 3)), changed=Changed("", BitMap(), ARCHIVE_BLOCK))
    await site.check(content(1, 2, 3), content(1, 20, 3))


async def test_the_same_snapshot_is_archived_once(site: Site) -> None:
    data = content(1, 2, 3)
    first = await site.archive(volume(data, "one"))
    counting, source = CountingStore(site.store), volume(data, "one")
    again = await site.beside("other").on(counting).archive(source)
    assert (again["outcome"], again["snapshot"]) == ("present", first["snapshot"])
    assert source.operations == []
    assert parts(counting) == {"get archive.json": 1, "get names": 1, "list log": 1, "get log": 1}
    await site.check(data)


# --- sources ----------------------------------------------------------------------------------------------------------


class Busy(MemoryVolume):
    """Somebody writes to it."""

    async def writers(self) -> list[str]:
        return ["qemu (pid 7)"]


async def test_a_source_in_use_is_refused_before_anything_is_written(site: Site) -> None:
    with pytest.raises(BlockferryError) as told:
        await site.archive(Busy(content(1)))
    assert told.value.code is Code.IN_USE and "--live" in told.value.next
    assert not any("/" in key for key in await site.store.list(""))
    await site.archive(Busy(content(1)), live=True)
    await site.check(content(1))


class Resized(MemoryVolume):
    """It grew while it was read."""

    async def current_size(self) -> int:
        return self.size + 1


async def test_a_source_that_was_resized_is_not_committed(site: Site) -> None:
    with pytest.raises(BlockferryError) as told:
        await site.archive(Resized(content(1, 2)))
    assert told.value.code is Code.SOURCE_CHANGED
    assert await site.snapshots() == []
    report = await site.archive(volume(content(1, 2)))
    # The last chunk was not yet full, and had not been uploaded.
    assert report["resumed"] and report["blocks"]["stored"] == 2
    await site.check(content(1, 2))


class Unreadable(MemoryVolume):
    """From some block on."""

    def __init__(self, data: bytes, bad: int) -> None:
        super().__init__(data)
        self.bad = bad

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > self.bad * ARCHIVE_BLOCK:
            raise BlockferryError(Code.IO_ERROR, "cannot read", next="check the disk", offset=offset)
        await super().read_into(offset, buffer)


async def test_a_source_that_cannot_be_read_ends_the_attempt_and_the_next_goes_on(site: Site) -> None:
    # Batches have 32 blocks: the second one fails.
    data = content(*range(40))
    with pytest.raises(BlockferryError) as told:
        await site.archive(Unreadable(data, 35))
    assert told.value.code is Code.IO_ERROR
    assert await site.snapshots() == []
    report = await site.archive(volume(data))
    await site.check(data)
    assert await site.stored_twice() == []
    assert report["resumed"] and report["blocks"]["kept"] + report["blocks"]["stored"] == 40


# --- attempts ---------------------------------------------------------------------------------------------------------


async def test_an_attempt_says_that_it_lives_while_it_works(site: Site) -> None:
    counting = CountingStore(site.store)

    class Slow(MemoryVolume):
        async def read_into(self, offset: int, buffer: memoryview) -> None:
            while counting.count("put", "/attempts/") < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await super().read_into(offset, buffer)

    await site.on(counting).archive(Slow(content(1)), renew_seconds=0.001)
    await site.check(content(1))


async def test_an_attempt_is_announced_before_anything_is_uploaded(site: Site) -> None:
    counting = CountingStore(site.store)
    await site.on(counting).archive(volume(content(1, 2, 3, 4, 5)))
    kinds = [
        key.split("/")[1] for name, key in counting.requests if len(key.split("/")) == 3 and name.startswith("put")
    ]
    assert kinds == ["attempts", "data", "data", "meta", "log"]


async def test_two_archivers_in_one_staging_directory_are_one_too_many(site: Site) -> None:
    class Slow(MemoryVolume):
        async def read_into(self, offset: int, buffer: memoryview) -> None:
            with pytest.raises(BlockferryError) as told:
                await site.archive(volume(content(2)))
            assert told.value.code is Code.IN_USE
            await super().read_into(offset, buffer)

    await site.archive(Slow(content(1)))
    await site.check(content(1))


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, Access]:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "other").write_bytes(bytes(32))
    (tmp_path / "phrase").write_text("open sesame\n")
    return {
        "none": Access(),
        "key": Access(key_file=tmp_path / "key"),
        "other": Access(key_file=tmp_path / "other"),
        "phrase": Access(passphrase_file=tmp_path / "phrase"),
    }


@pytest.mark.parametrize("how", ["key", "phrase"])
async def test_an_encrypted_archive(site: Site, secrets: dict[str, Access], how: str) -> None:
    site.access = secrets[how]
    text = b"nobody may read this " * 12500
    data = text[:ARCHIVE_BLOCK] + content(None, 1, 2, 3)
    await site.archive(volume(data))
    report = await site.archive(volume(data))
    assert report["encrypted"] and report["blocks"]["equal"] == 4
    await site.check(data, data)
    assert isinstance(site.store, MemoryStore)
    for key, stored in site.store.objects.items():
        assert text[:20] not in stored and block(1)[:20] not in stored, key
    for name, wrong in secrets.items():
        if name != how:
            site.access = wrong
            with pytest.raises(BlockferryError) as told:
                await site.archive(volume(data))
            assert told.value.code is Code.PERMISSION


async def test_a_key_for_an_archive_that_is_not_encrypted_is_refused(site: Site, secrets: dict[str, Access]) -> None:
    """Or whoever can replace archive.json would be sent plaintext."""
    await site.archive(volume(content(1)))
    site.access = secrets["key"]
    counting = CountingStore(site.store)
    with pytest.raises(BlockferryError) as told:
        await site.on(counting).archive(volume(content(2)))
    assert told.value.code in (Code.PERMISSION, Code.USAGE) and "not encrypted" in told.value.line()
    assert counting.counts == {"get": 1}


async def test_of_two_that_create_an_archive_both_use_the_one(site: Site, secrets: dict[str, Access]) -> None:
    site.access = secrets["key"]
    await asyncio.gather(*(site.beside(name).archive(volume(content(name))) for name in "ab"))
    snapshots = await site.snapshots()
    assert sorted([await site.read(one.number) for one in snapshots]) == sorted([content("a"), content("b")])
    assert len(await site.store.list("keys/")) == 1 and len(await site.store.list("names/")) == 1


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
async def test_what_it_costs_is_within_what_the_plan_said(
    site: Site, secrets: dict[str, Access], monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    monkeypatch.setattr("blockferry.client.archive_forecast.CHUNK_SIZE", 1024 * 1024)
    if encrypted:
        site.access = secrets["key"]
    for data in (content(*range(30), None), content(*range(30), None), content(*range(20), 40, tail=5)):
        counting = CountingStore(site.store)
        planned: dict[str, Any] = await forecast(volume(data), counting, site.access, "vm")
        assert not any(name in counting.counts for name in ("put", "put_new", "delete"))
        counting.requests.clear()
        report = await site.on(counting).archive(volume(data))
        requests, moved = planned["requests"], planned["bytes"]
        puts = counting.count("put") + counting.count("put_new")
        assert requests["put_min"] <= puts <= requests["put_max"]
        assert [counting.count(name) for name in ("get", "list", "delete")] == [
            requests[name] for name in ("get", "list", "delete")
        ]
        assert report["bytes"]["stored"] <= moved["data_max"] + 28 * report["blocks"]["stored"]
        assert report["bytes"]["source_read"] == moved["source_read"]
        metadata = sum([len(await site.store.get(key)) for key in chunks(counting, "meta")])
        assert metadata <= moved["metadata"]
        assert planned["base"] == report["base"]
