"""Several archivers of one volume, deletions meanwhile, and stores without conditional writes: nobody can damage what
another does, and each snapshot is whole."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence

import pytest
from blockferry.common.archive import committer, format
from blockferry.common.archive.columns import Move, encode_remap
from blockferry.common.archive.format import ARCHIVE_BLOCK, Deletion, Doomed, Kind
from blockferry.common.archive.store import Entry
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code

from tests.archive_faults import CountingStore, FaultyStore, MemoryStore, WrappedStore
from tests.unit.archive.examples import some
from tests.unit.archive.site import Site, content, volume


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "BACK_OFF_SECONDS", 0.002)
    monkeypatch.setattr(committer, "READ_BACK_SECONDS", (0.0, 0.001))


async def append(site: Site, kind: Kind, body: bytes, number: int) -> None:
    sealer = await site.sealer()
    frame = sealer.seal_frame(kind, secrets.token_bytes(16), body, number=number)
    await site.store.put_new(format.log_name(sealer.volume, number), [frame])


async def next_number(site: Site) -> int:
    sealer = await site.sealer()
    return len(await site.store.list(format.log_prefix(sealer.volume))) + 1


async def delete(site: Site, snapshots: Sequence[int], chunks: Sequence[tuple[str, str, int, int]]) -> None:
    """A deletion mark under the next number."""
    number = await next_number(site)
    mark = Deletion(
        number=number, volume=(await site.sealer()).volume.hex(), snapshots=list(snapshots), grace=60,
        chunks=[Doomed(kind=kind, attempt=of, first=first, count=count) for kind, of, first, count in chunks],  # type: ignore[arg-type]
        created="2026-01-01T00:00:00Z",
    )  # fmt: skip
    await append(site, Kind.DELETION, format.encode(mark), number)


class Meddling(WrappedStore):
    """Lets something happen just before the first superblock of somebody is created."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.store)
        self.before: list[object] = []
        self._site = site

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        if "/log/" in key and self.before:
            meddle = self.before.pop(0)
            assert callable(meddle)
            await meddle()
        await super().put_new(key, parts)


# --- archivers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archivers", [2, 5])
async def test_archivers_at_the_same_time_all_commit(site: Site, archivers: int) -> None:
    first = content(*range(8))
    await site.archive(volume(first))
    sources = [content(*range(4), f"{number}", *range(5, 8)) for number in range(archivers)]
    reports = await asyncio.gather(
        *(site.beside(f"{number}").archive(volume(data)) for number, data in enumerate(sources))
    )
    numbers = [report["snapshot"] for report in reports]
    assert sorted(numbers) == list(range(2, 2 + archivers))
    by_number = dict(zip(numbers, sources, strict=True))
    await site.check(first, *(by_number[number] for number in sorted(numbers)))


async def test_a_loser_uploads_nothing_again(site: Site) -> None:
    await site.archive(volume(content(1)))
    counting = CountingStore(site.store)
    meddling = Meddling(site.on(counting))

    async def other() -> None:
        await site.beside("other").archive(volume(content(7)))

    meddling.before = [other]
    report = await site.on(meddling).archive(volume(content(2)))
    await site.check(content(1), content(7), content(2))
    assert (report["snapshot"], report["base"]) == (3, 1)
    assert counting.count("put_new", "/data/") == 1 and counting.count("put_new", "/meta/") == 1
    assert counting.count("put_new", "/log/") == 2


async def test_archivers_of_other_volumes_do_not_meet(site: Site) -> None:
    from blockferry.client.archiver import ArchiveOptions, archive
    from blockferry.client.report import Progress

    await site.archive(volume(content(1)))
    catalog = await site.catalog()
    made = ArchiveOptions("other", site.directory)
    report = await archive(volume(content(2)), catalog, made, Progress())
    assert (report["snapshot"], report["base"]) == (1, None)
    await site.check(content(1))


# --- deletions --------------------------------------------------------------------------------------------------------


async def test_a_base_that_was_deleted_is_none(site: Site) -> None:
    await site.archive(volume(content(1, 2)))
    await site.archive(volume(content(1, 3)))
    await delete(site, [2], [])
    report = await site.archive(volume(content(1, 4)))
    assert (report["snapshot"], report["base"]) == (4, 1)
    await site.check(content(1, 2), content(1, 4))


async def test_a_deletion_meanwhile_that_takes_nothing_away_costs_a_number(site: Site) -> None:
    await site.archive(volume(content(1, 2)))
    base = await site.archive(volume(content(1, 3)))
    counting = CountingStore(site.store)
    meddling = Meddling(site.on(counting))
    attempt = (await site.snapshots())[0].attempt
    # Of the first attempt nothing but block 2 is gone, and nobody needs that.
    meddling.before = [lambda: delete(site, [1], [("data", attempt, 5, 1), ("meta", attempt, 0, 1)])]
    report = await site.on(meddling).archive(volume(content(1, 4)))
    assert (report["snapshot"], report["base"]) == (4, base["snapshot"])
    assert counting.count("put_new", "/data/") == 1
    await site.check(content(1, 3), content(1, 4))


@pytest.mark.parametrize("kind", ["data", "meta"])
async def test_a_deletion_meanwhile_of_what_is_reused_is_noticed(site: Site, small_metadata: None, kind: str) -> None:
    """The base was deleted and what it had is doomed: it is stored anew, from another base."""
    first, second = content(*range(12)), content(*range(12, 24))
    await site.archive(volume(first))
    base = await site.archive(volume(second))
    meddling = Meddling(site)
    meddling.before = [lambda: delete(site, [2], [(kind, base["attempt"], 0, 100)])]
    third = content(*range(12, 23), "new")
    report = await site.on(meddling).archive(volume(third))
    assert (report["snapshot"], report["base"]) == (4, 1)
    await site.check(first, third)
    assert all(entry.attempt.hex() == report["attempt"] for entry in (await site.entries(4)).values())


async def test_a_deletion_meanwhile_of_our_own_attempt_is_noticed(site: Site) -> None:
    meddling = Meddling(site)

    async def doom() -> None:
        (attempt,) = {key.rpartition("/")[2] for key in await site.store.list("") if "/attempts/" in key}
        await delete(site, [], [("data", attempt, 0, 100)])

    meddling.before = [doom]
    data = content(1, 2, 3, 4)
    report = await site.on(meddling).archive(volume(data))
    assert report["snapshot"] == 2 and report["blocks"]["stored"] == 4
    await site.check(data)


async def test_blocks_that_were_moved_out_of_a_doomed_chunk_are_not_missed(site: Site) -> None:
    first = content(1, 2)
    await site.archive(volume(first))
    (superblock,) = await site.snapshots()
    sealer = await site.sealer()
    old = await site.entries(1)
    new = some("repacking", 16)
    moves: list[Move] = []
    stored: list[bytes] = []
    for number, entry in old.items():
        whole = first[number * ARCHIVE_BLOCK : (number + 1) * ARCHIVE_BLOCK]
        codec, data = sealer.seal_block(new, number, memoryview(whole), 0)
        moves.append(Move(*entry[:3], new, 0, sum(len(one) for one in stored), len(data), codec))
        stored.append(data)
    await site.store.put_new(format.data_name(sealer.volume, new, 0), stored)

    async def repack() -> None:
        await append(site, Kind.REMAP, encode_remap(moves), 2)
        await delete(site, [], [("data", superblock.attempt, 0, 1)])
        await site.store.delete(format.data_name(sealer.volume, bytes.fromhex(superblock.attempt), 0))

    meddling = Meddling(site)
    meddling.before = [repack]
    second = content(1, 2, 3)
    report = await site.on(meddling).archive(volume(second))
    assert (report["snapshot"], report["base"], report["blocks"]["stored"]) == (4, 1, 1)
    assert await site.read(4) == second


async def test_deletions_without_end_are_given_up(site: Site) -> None:
    await site.archive(volume(content(1)))
    await site.archive(volume(content(2)))
    meddling = Meddling(site)

    async def doom() -> None:
        attempts = {key.rpartition("/")[2] for key in await site.store.list("") if "/attempts/" in key}
        await delete(site, [], [("data", attempt, 0, 100) for attempt in attempts])

    meddling.before = [doom] * 20
    with pytest.raises(BlockferryError) as told:
        await site.on(meddling).archive(volume(content(3)))
    assert told.value.code is Code.WRONG_STATE
    await site.check(content(1), content(2))


# --- stores without conditional writes --------------------------------------------------------------------------------


class Overwriting(MemoryStore):
    """Knows no conditions, and says so or does not; listings may lag behind."""

    def __init__(self, *, honest: bool = True) -> None:
        super().__init__()
        self.conditional = not honest

    async def put_new(self, key: str, parts: Sequence[Data]) -> None:
        self.objects[key] = b"".join(parts)
        await asyncio.sleep(0)

    async def put(self, key: str, data: Data) -> None:
        await super().put(key, data)
        await asyncio.sleep(0)

    async def entries(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        await asyncio.sleep(0)
        async for entry in super().entries(prefix, after=after):
            yield entry


@pytest.mark.parametrize("honest", [True, False], ids=["says so", "is found out"])
async def test_what_the_store_can_is_found_out_when_the_archive_is_created(site: Site, honest: bool) -> None:
    site.store = Overwriting(honest=honest)
    await site.archive(volume(content(1)))
    assert not (await site.catalog()).archive.conditional
    names = [key.rpartition("/")[2] for key in await site.store.list("") if "/log/" in key]
    attempt = (await site.snapshots())[0].attempt
    assert names == [f"0000000001-{attempt}", f"0000000001-{attempt}.done"]
    await site.archive(volume(content(2)))
    await site.check(content(1), content(2))


async def test_an_archive_with_conditional_writes_is_not_written_without_them(site: Site) -> None:
    await site.archive(volume(content(1)))
    assert isinstance(site.store, MemoryStore)
    site.store.conditional = False
    with pytest.raises(BlockferryError) as told:
        await site.archive(volume(content(2)))
    assert told.value.code is Code.UNSUPPORTED


@pytest.mark.parametrize("archivers", [2, 4])
async def test_archivers_at_the_same_time_all_commit_without_conditions(site: Site, archivers: int) -> None:
    site.store = Overwriting()
    await site.archive(volume(content(1)))
    sources = [content(f"{number}") for number in range(archivers)]
    reports = await asyncio.gather(
        *(site.beside(f"{number}").archive(volume(data)) for number, data in enumerate(sources))
    )
    numbers = [report["snapshot"] for report in reports]
    assert len(set(numbers)) == archivers and min(numbers) == 2 - 1 + 1
    by_number = dict(zip(numbers, sources, strict=True))
    await site.check(content(1), *(by_number[number] for number in sorted(numbers)))


async def test_a_committer_that_died_before_it_was_done_is_in_nobodys_way(site: Site) -> None:
    site.store = Overwriting()
    await site.archive(volume(content(1)))
    sealer = await site.sealer()
    await site.store.put(format.log_name(sealer.volume, 2, some("dead", 16)), b"half")
    report = await site.archive(volume(content(2)))
    assert report["snapshot"] == 3
    await site.check(content(1), content(2))


async def test_a_record_that_counts_and_was_not_seen_is_looked_at(site: Site) -> None:
    """It came between the look at the log and the choice of a number."""
    site.store = Overwriting()
    await site.archive(volume(content(1)))
    faulty = FaultyStore(site.store)

    class Late(WrappedStore):
        done = False

        async def put(self, key: str, data: Data) -> None:
            if "/log/" in key and not self.done:
                self.done = True
                await site.beside("other").archive(volume(content(5)))
            await super().put(key, data)

    report = await site.on(Late(faulty)).archive(volume(content(2)))
    assert report["snapshot"] == 3
    await site.check(content(1), content(5), content(2))
