"""Interrupted attempts: whatever ended one, the next run of the same snapshot uploads no finished chunk again, and
losing the staging directory costs uploads and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from blockferry.common.archive.store import Transient
from blockferry.common.errors import BlockferryError

from tests.archive_faults import CountingStore, FaultyStore, unanswered
from tests.unit.archive.site import Site, chunks, content, volume

DATA = content(*range(10), None, *range(20, 25), tail=77)
"""Sixteen blocks, the last a short one: five data chunks, and with small nodes as many metadata chunks or more."""
BLOCKS = 16

pytestmark = pytest.mark.usefixtures("small_metadata")


async def fails(site: Site, operation: str, part: str, after: int, *, lost: bool, snapshot_id: str) -> bool:
    """Archive until a request fails, done or not; whether one did. Without retries."""
    faulty = FaultyStore(site.store)
    how = {"afterwards": unanswered} if lost else {"before": unanswered}
    faulty.rule(operation, part=part, after=after, **how)
    try:
        await site.on(faulty).archive(volume(DATA, snapshot_id), uploads=1)
    except Transient:
        return True
    return False


REQUESTS = [
    ("put_new", "/data/", 5),
    ("put_new", "/meta/", 3),
    ("put_new", "/log/", 1),
    ("get", "/log/", 2),
    ("put", "/attempts/", 1),
    ("delete", "/attempts/", 1),
]
"""Kind, part of the name, and how many there are at least."""


@pytest.mark.parametrize("lost", [False, True], ids=["not done", "answer lost"])
@pytest.mark.parametrize("snapshot_id", ["", "one"], ids=["mutable", "immutable"])
@pytest.mark.parametrize(("operation", "part", "passes"), REQUESTS)
async def test_no_chunk_is_uploaded_twice(
    site: Site, operation: str, part: str, passes: int, snapshot_id: str, lost: bool
) -> None:
    await site.archive(volume(content(None)))
    for after in range(passes):
        one = site.beside(f"{after}")
        assert await fails(one, operation, part, after, lost=lost, snapshot_id=snapshot_id)
        arrived = set(await trailers_blocks(site))
        counting, source = CountingStore(site.store), volume(DATA, snapshot_id)
        report = await one.on(counting).archive(source)
        assert await site.read() == DATA
        remaining = BLOCKS - 1 - len(arrived - {BLOCKS})
        present = report["outcome"] == "present"
        assert len(chunks(counting, "data")) == (0 if present else max(1, -(-remaining // 3)))
        assert report["blocks"]["stored"] == BLOCKS - len(arrived)
        if snapshot_id and not remaining:
            assert source.of("read") == []
        assert await site.stored_twice() == []
        assert await repeated_nodes(site) == []
        await reset(site)


async def trailers_blocks(site: Site) -> list[int]:
    """Blocks in data chunks in the store."""
    sealer = await site.sealer()
    found = []
    for key in await site.store.list(f"{sealer.volume.hex()}/data/"):
        of, _, digits = key.rpartition("/")[2].partition("-")
        found += (await site.trailer(sealer, bytes.fromhex(of), int(digits))).keys
    return found


async def repeated_nodes(site: Site) -> list[str]:
    """Metadata chunks with the same content, but for where it stands."""
    seen: set[bytes] = set()
    twice = []
    sealer = await site.sealer()
    for key in await site.store.list(f"{sealer.volume.hex()}/meta/"):
        data = await site.store.get(key)
        # After the header and without the tag: the plain body of the first node.
        if data[32:-16] in seen:
            twice.append(key)
        seen.add(data[32:-16])
    return twice


async def reset(site: Site) -> None:
    """Empty the store but for the first snapshot."""
    for key in await site.store.list(""):
        if "/" in key and not key.startswith("names/") and not key.endswith("/log/0000000001"):
            await site.store.delete(key)


async def test_a_source_that_changed_meanwhile_is_archived_as_it_is_now(site: Site) -> None:
    assert await fails(site, "put_new", "/meta/", 0, lost=False, snapshot_id="")
    now = content(*range(5), 50, None, *range(7, 10), 60, *range(20, 25), tail=77)
    report = await site.archive(volume(now))
    await site.check(now)
    assert report["blocks"] == {"archived": 16, "zero": 0, "equal": 0, "stored": 2, "kept": 14, "holes": 0}


async def test_another_immutable_snapshot_takes_over_what_is_equal(site: Site) -> None:
    assert await fails(site, "put_new", "/data/", 4, lost=False, snapshot_id="one")
    source = volume(DATA, "two")
    report = await site.archive(source)
    await site.check(DATA)
    assert report["blocks"]["kept"] == 12 and len(source.of("read")) > 0


async def test_interrupted_again_and_again(site: Site) -> None:
    """Each run gets one chunk further, and says in its trailers what it keeps."""
    for after in range(1, 5):
        assert await fails(site, "put_new", "/data/", 1, lost=False, snapshot_id="")
        assert (
            len(set(await trailers_blocks(site)))
            == len(await trailers_blocks(site))
            == min(3 * after, BLOCKS) - (after == 6)
        )
        if after == 5:
            break
    await site.archive(volume(DATA))
    await site.check(DATA)
    assert await site.stored_twice() == []


async def test_staging_that_was_lost_costs_uploads_and_nothing_else(site: Site) -> None:
    assert await fails(site, "put_new", "/meta/", 0, lost=False, snapshot_id="")
    shutil.rmtree(site.directory)
    report = await site.archive(volume(DATA))
    assert not report["resumed"] and report["blocks"]["stored"] == BLOCKS
    assert await site.read() == DATA
    # What the lost attempt left is garbage: it still says that it was at work.
    assert len([key for key in await site.store.list("") if "/attempts/" in key]) == 1


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    assert whole
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "empty"])
@pytest.mark.parametrize("name", ["journal", "trailers", "meta-*"])
async def test_staging_that_was_damaged_is_not_believed(site: Site, name: str, how: str) -> None:
    assert await fails(site, "put_new", "/log/", 0, lost=False, snapshot_id="one")
    damage(next(site.directory.glob(f"*/*/{name}")), how)
    await site.archive(volume(DATA, "one"))
    assert await site.read() == DATA
    snapshots = await site.snapshots()
    assert await site.entries(snapshots[-1].number) == await site.rebuilt(snapshots[-1].attempt)


async def test_a_commit_that_was_noted_and_whose_record_is_gone_is_made_anew(site: Site) -> None:
    assert await fails(site, "put_new", "/log/", 0, lost=False, snapshot_id="")
    next(site.directory.glob("*/*/superblock")).unlink()
    await site.archive(volume(DATA))
    await site.check(DATA)


async def test_a_chunk_whose_name_is_taken_by_other_bytes_is_not_relied_on(site: Site) -> None:
    assert await fails(site, "put_new", "/data/", 0, lost=True, snapshot_id="")
    (key,) = [key for key in await site.store.list("") if "/data/" in key]
    await site.store.put(key, (await site.store.get(key))[:-30] + bytes(30))
    await site.archive(volume(DATA))
    assert await site.read() == DATA


async def test_an_attempt_that_a_deletion_took_away_is_begun_anew(site: Site) -> None:
    """A sweep took it for dead: what it had stored may be gone at any time."""
    from tests.unit.archive.test_races import delete

    await site.archive(volume(content(1)))
    assert await fails(site, "put_new", "/meta/", 0, lost=False, snapshot_id="")
    (attempt,) = {key.rpartition("/")[2][:32] for key in await site.store.list("") if "/attempts/" in key}
    await delete(site, [], [("data", attempt, 0, 100)])
    report = await site.archive(volume(DATA))
    assert not report["resumed"] and report["attempt"] != attempt
    assert all(entry.attempt.hex() != attempt for entry in (await site.entries(report["snapshot"])).values())
    assert await site.read() == DATA


def test_errors_that_are_tried_again_are_of_this_kind() -> None:
    assert issubclass(Transient, BlockferryError)
