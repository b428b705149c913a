"""Restoring and verifying, on stores and targets in memory: what is fetched, written and unmapped, exactly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from blockferry.client.archive_check import check
from blockferry.client.report import Phase, Progress
from blockferry.client.restore import RestoreOptions, restore
from blockferry.client.targets import Target
from blockferry.common import linux
from blockferry.common.archive import format, tree
from blockferry.common.archive.catalog import Catalog
from blockferry.common.archive.format import ARCHIVE_BLOCK
from blockferry.common.archive.reader import SnapshotVolume
from blockferry.common.archive.store import Access, ObjectStore
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.archive_faults import CountingStore, FaultyStore, MemoryStore, busy, flip
from tests.archives import EXAMPLES, Made, Maker, noise
from tests.unit.memory_volume import MemoryVolume

A = ARCHIVE_BLOCK
B = 4096


async def run(store: ObjectStore, target: MemoryVolume, state: Path, *, number: int = 0, **options: Any) -> Any:
    catalog = await Catalog.open(store, Access())
    uri = f"{store.uri}#vm" + (f"@{number}" if number else "")
    volume = await SnapshotVolume.of(uri, catalog, "vm", number)
    try:
        given_options = RestoreOptions(state_directory=state, **options)
        return await restore(volume, Target("memory", target, "memory"), given_options, Progress())
    finally:
        await volume.close()


def written(target: MemoryVolume) -> int:
    return sum(length for _, length in target.of("write"))


@pytest.fixture
async def maker() -> Maker:
    """A snapshot with data, holes, and zeros inside of the data."""
    made = await Maker(CountingStore(MemoryStore())).create()
    sparse = bytes(B) + b"\1" * B + bytes(A - 3 * B) + b"\2" * B
    await made.snapshot(11 * A + 100, {0: noise(0), 1: sparse, 5: noise(5), 6: noise(6), 11: b"\3" * 100})
    return made


def nonzero(content: bytes) -> int:
    return sum(len(content[at : at + B]) for at in range(0, len(content), B) if any(content[at : at + B]))


async def test_an_empty_target_gets_what_is_not_zero(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    target = MemoryVolume(bytes(made.size))
    report = await run(maker.store, target, tmp_path)
    assert bytes(target.data) == made.content
    assert report["outcome"] == "restored" and report["damaged"] == []
    assert report["blocks"] == {"skip": 7, "unmap": 0, "send": 5, "compare": 0}
    assert report["results"] == {"zero": 0, "equal": 0, "changed": 5}
    assert written(target) == nonzero(made.content) == report["bytes"]["target_written"]
    assert target.of("read") == target.of("unmap") == []
    assert list((tmp_path / "restores").iterdir()) == []


async def test_an_equal_target_is_left_alone_and_nothing_is_fetched(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    target = MemoryVolume(made.content)
    counting = maker.store
    assert isinstance(counting, CountingStore)
    del counting.requests[:]
    report = await run(counting, target, tmp_path, overwrite=True)
    assert counting.count("get_range", "/data/") == 0
    assert report["results"] == {"zero": 0, "equal": 5, "changed": 0}
    assert target.of("write") == target.of("unmap") == []


async def test_an_older_copy_gets_what_differs(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    older = bytearray(made.content)
    older[5 * A + 2 * B] ^= 1
    older[A + B : A + 2 * B] = bytes(B)
    older[A + 2 * B] = 7
    older[3 * A + 9] = 1
    target = MemoryVolume(bytes(older))
    report = await run(maker.store, target, tmp_path, overwrite=True)
    assert bytes(target.data) == made.content
    assert report["blocks"] == {"skip": 6, "unmap": 1, "send": 0, "compare": 5}
    assert report["results"] == {"zero": 1, "equal": 3, "changed": 2}
    assert sorted(target.of("write")) == [(A + B, B), (5 * A + 2 * B, B)]
    assert sorted(target.of("unmap")) == [(A + 2 * B, B), (3 * A, A)]
    assert report["bytes"]["unmapped"] == 2 * B


async def test_zeros_that_only_writing_makes_are_looked_for_first(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    older = bytearray(made.content)
    older[3 * A + 9 * B] = 1
    target = MemoryVolume(bytes(older), zeroing=linux.Zeroing.WRITE.value)
    await run(maker.store, target, tmp_path, overwrite=True)
    assert bytes(target.data) == made.content
    assert target.of("unmap") == [(3 * A + 9 * B, B)]


async def test_a_target_that_holds_something_is_refused(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    target = MemoryVolume(b"precious".ljust(made.size, b"\0"))
    with pytest.raises(BlockferryError) as told:
        await run(maker.store, target, tmp_path)
    assert told.value.code is Code.WRONG_STATE and "--overwrite" in told.value.next
    assert target.of("write") == target.of("unmap") == [] and bytes(target.data[:8]) == b"precious"


async def test_what_lies_behind_the_snapshot_stays(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    target = MemoryVolume(bytes(made.size) + b"behind" * 100_000)
    report = await run(maker.store, target, tmp_path, overwrite=True)
    assert bytes(target.data) == made.content + b"behind" * 100_000
    assert report["target_size"] == len(target.data)


class Written(MemoryVolume):
    """Tells when something was written."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.written = asyncio.Event()

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        await super().write(extents)
        self.written.set()


async def test_an_interrupted_restore_goes_on_without_fetching_again(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    counting = maker.store
    assert isinstance(counting, CountingStore)
    target = Written(bytes(made.size))
    faulty = FaultyStore(counting)
    faulty.rule("get_range", part="/data/", after=1, before=busy, until=target.written)
    with pytest.raises(BlockferryError):
        await run(faulty, target, tmp_path)
    done = {block for block in made.blocks if target.data[block * A : (block + 1) * A] == made.content[block * A :][:A]}
    assert len(done) == 4
    del counting.ranges[:]
    report = await run(counting, target, tmp_path)
    assert bytes(target.data) == made.content
    assert report["results"] == {"zero": 0, "equal": 4, "changed": 1}
    assert [key for key, _, _ in counting.ranges if "/data/" in key] == [
        format.data_name(maker.volume, made.attempt, made.entries[11].chunk)
    ]


async def test_another_snapshot_does_not_go_on_from_it(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    target = Written(bytes(made.size))
    faulty = FaultyStore(maker.store)
    faulty.rule("get_range", part="/data/", after=1, before=busy, until=target.written)
    with pytest.raises(BlockferryError):
        await run(faulty, target, tmp_path)
    two = await maker.snapshot(made.size, {0: None}, base=made)
    with pytest.raises(BlockferryError) as told:
        await run(maker.store, target, tmp_path)
    assert told.value.code is Code.WRONG_STATE
    await run(maker.store, target, tmp_path, overwrite=True)
    assert bytes(target.data) == two.content


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tail=st.integers(1, A),
    held=st.dictionaries(st.integers(0, 12), st.integers(0, 3)),
    there=st.dictionaries(st.integers(0, 13 * 64 - 1), st.integers(0, 2), max_size=30),
    extra=st.integers(0, 3 * B),
    base=st.booleans(),
)
async def test_whatever_is_there_becomes_the_snapshot(
    tmp_path_factory: pytest.TempPathFactory,
    tail: int,
    held: dict[int, int],
    there: dict[int, int],
    extra: int,
    base: bool,
) -> None:
    size = 12 * A + tail
    maker = await Maker(MemoryStore()).create()
    changes = {block: noise(tag, A if block < 12 else tail) for block, tag in held.items()}
    if base:
        older = await maker.snapshot(size, {0: noise(50), 12: noise(51, tail)})
        made = await maker.snapshot(size, {0: None, 12: None, **changes}, base=older)
    else:
        made = await maker.snapshot(size, changes)
    content = made.content
    before = bytearray(size + extra)
    for block, kind in there.items():
        # The same as in the snapshot, something else, or zeros.
        at = block * B
        if at < size and kind < 2:
            before[at : at + B] = (content[at : at + B] if kind else b"\xee" * B)[: size - at]
    target = MemoryVolume(bytes(before))
    await run(maker.store, target, tmp_path_factory.mktemp("state"), overwrite=True)
    assert bytes(target.data) == content + bytes(before[size:])
    # Equal bytes are never rewritten.
    for offset, length in target.of("write"):
        for at in range(offset, offset + length, B):
            assert before[at : at + B][: size - at] != content[at : at + B]


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged_chunk(maker: Maker, block: int) -> tuple[MemoryStore, str]:
    """Flip a bit in a block where it is stored."""
    store = maker.store.store if isinstance(maker.store, CountingStore) else maker.store
    assert isinstance(store, MemoryStore)
    made = maker.snapshots[-1]
    entry = made.entries[block]
    key = format.data_name(maker.volume, entry.attempt, entry.chunk)
    store.objects[key] = flip(entry.offset + entry.length // 2)(store.objects[key])
    return store, key


@pytest.mark.parametrize("content", [b"", b"older"], ids=["fresh", "older"])
async def test_damage_stops_a_restore_or_is_listed(maker: Maker, tmp_path: Path, content: bytes) -> None:
    (made,) = maker.snapshots
    _, key = damaged_chunk(maker, 5)
    target = MemoryVolume((content * (made.size // 5 + 1) or bytes(made.size))[: made.size])
    with pytest.raises(BlockferryError) as told:
        await run(maker.store, target, tmp_path, overwrite=True)
    assert told.value.code is Code.DATA_MISMATCH and key in told.value.line()
    assert (told.value.offset, told.value.length) == (5 * A, A) and "--allow-damaged" in told.value.next
    report = await run(maker.store, target, tmp_path, overwrite=True, allow_damaged=True)
    assert report["outcome"] == "damaged"
    ((found),) = report["damaged"]
    assert (found["offset"], found["length"], key in found["cause"]) == (5 * A, A, True)
    expected = bytearray(made.content)
    expected[5 * A : 6 * A] = bytes(A)
    assert bytes(target.data) == bytes(expected)


async def test_a_damaged_node_takes_its_blocks_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_ENTRIES", 4)
    store = MemoryStore()
    maker = await Maker(store, chunk_nodes=1).create()
    made = await maker.snapshot(20 * A, {block: noise(block) for block in range(1, 17)})
    # The second leaf: blocks 5 to 8.
    key = format.meta_name(maker.volume, made.attempt, 1)
    store.objects[key] = flip(-1)(store.objects[key])
    target = MemoryVolume(b"\xee" * made.size)
    report = await run(store, target, tmp_path, overwrite=True, allow_damaged=True)
    assert [(one["offset"], one["length"]) for one in report["damaged"]] == [(5 * A, 4 * A)]
    expected = bytearray(made.content)
    expected[5 * A : 9 * A] = bytes(4 * A)
    assert bytes(target.data) == bytes(expected)


async def test_a_store_that_does_not_answer_is_no_damage(maker: Maker, tmp_path: Path) -> None:
    (made,) = maker.snapshots
    faulty = FaultyStore(maker.store)
    faulty.rule("get_range", part="/data/", before=busy)
    with pytest.raises(BlockferryError) as told:
        await run(faulty, MemoryVolume(bytes(made.size)), tmp_path, allow_damaged=True)
    assert told.value.code is Code.UNAVAILABLE


# --- verify -----------------------------------------------------------------------------------------------------------


async def checked(store: ObjectStore, share: float = 1.0, number: int = 0) -> Any:
    catalog = await Catalog.open(store, Access())
    return await check(catalog, await catalog.names(), number, share, Phase("verify"))


async def three(store: ObjectStore) -> tuple[Maker, list[Made]]:
    maker = await Maker(store, chunk_blocks=2).create()
    one = await maker.snapshot(20 * A, {block: noise(block) for block in range(12)})
    two = await maker.snapshot(20 * A, {3: noise(33)}, base=one)
    await maker.snapshot(20 * A, {3: None, 19: noise(19)}, base=two)
    return maker, maker.snapshots


async def test_what_is_shared_is_read_once() -> None:
    counting = CountingStore(MemoryStore())
    await three(counting)
    found = await checked(counting)
    # Three snapshots whose trees are one leaf each; 14 different blocks.
    assert (found.snapshots, found.nodes, found.blocks, found.blocks_read, found.findings) == (3, 3, 14, 14, [])


async def test_metadata_alone_reads_no_data() -> None:
    counting = CountingStore(MemoryStore())
    await three(counting)
    del counting.requests[:]
    found = await checked(counting, share=0.0)
    assert (found.nodes, found.blocks_read, found.findings) == (3, 0, [])
    assert counting.count("get_range", "/data/") == 0


async def test_a_sample_is_a_sample() -> None:
    maker = await Maker(MemoryStore(), chunk_blocks=1).create()
    await maker.snapshot(400 * A, {block: noise(block % 7) for block in range(400)})
    found = await checked(maker.store, share=0.25)
    assert 20 < found.blocks_read < 200 and found.findings == []


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("how", ["gone", "cut"])
async def test_a_chunk_that_is_not_there_is_found_without_reading(share: float, how: str) -> None:
    store = MemoryStore()
    maker, (one, _, _) = await three(store)
    key = format.data_name(maker.volume, one.attempt, 5)
    if how == "gone":
        del store.objects[key]
    else:
        store.objects[key] = store.objects[key][:50]
    found = await checked(store, share=share)
    # Blocks 10 and 11, in each of three snapshots.
    assert [(each.snapshot, each.offset // A) for each in found.findings] == [
        (number, block) for number in (3, 2, 1) for block in (10, 11)
    ]
    assert all(key in each.what for each in found.findings)


async def test_each_damaged_thing_is_a_finding_and_the_rest_is_looked_at() -> None:
    store = MemoryStore()
    maker, (one, two, _) = await three(store)
    other = await Maker(store, name="other").named()
    await other.snapshot(A, {0: noise(0)})
    data = format.data_name(maker.volume, one.attempt, 0)
    store.objects[data] = flip(0)(store.objects[data])
    meta = format.meta_name(maker.volume, two.attempt, 0)
    store.objects[meta] = flip(-1)(store.objects[meta])
    log = format.log_name(other.volume, 1)
    store.objects[log] = flip(-1)(store.objects[log])
    found = await checked(store)
    assert {(each.volume, each.snapshot, each.offset // A, each.length // A) for each in found.findings} == {
        ("vm", 3, 0, 1), ("vm", 1, 0, 1), ("vm", 2, 0, 20), ("other", 1, 0, 0),
    }  # fmt: skip
    assert found.snapshots == 3


async def test_one_snapshot_is_looked_at_if_it_is_named() -> None:
    store = MemoryStore()
    maker, (_, two, _) = await three(store)
    meta = format.meta_name(maker.volume, two.attempt, 0)
    del store.objects[meta]
    assert (await checked(store, number=1)).findings == []
    assert [one.snapshot for one in (await checked(store, number=2)).findings] == [2]
    with pytest.raises(BlockferryError, match="vm@9"):
        await checked(store, number=9)
