"""Stores that fail, are slow, lose, alter or forget: the archive is whole or the archiver says what is wrong."""

from __future__ import annotations

import asyncio
import time

import pytest
from blockferry.common.archive import committer
from blockferry.common.archive.retry import Patience, Retrying
from blockferry.common.errors import BlockferryError, Code

from tests.archive_faults import CountingStore, FaultyStore, busy, flip, full, unanswered
from tests.unit.archive.site import Site, content, volume

DATA = content(*range(10))
QUICK = Patience(attempts=8, first_attempts=8, pause=0.0005, most=0.001)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "READ_BACK_SECONDS", (0.0, 0.001, 0.001))


@pytest.mark.parametrize("after", range(3))
@pytest.mark.parametrize("part", ["archive.json", "names/", "/attempts/", "/data/", "/meta/", "/log/"])
@pytest.mark.parametrize("lost", [False, True], ids=["not done", "answer lost"])
async def test_what_fails_once_is_done_once(site: Site, part: str, after: int, lost: bool) -> None:
    counting = CountingStore(site.store)
    faulty = FaultyStore(counting)
    faulty.rule(part=part, after=after, times=2, **{"afterwards" if lost else "before": unanswered})
    report = await site.on(Retrying(faulty, QUICK)).archive(volume(DATA))
    assert report["snapshot"] == 1 and not report["resumed"]
    await site.check(DATA)
    assert await site.stored_twice() == []


async def test_every_answer_is_lost_once(site: Site) -> None:
    faulty = FaultyStore(site.store)
    for number in range(200):
        faulty.rule(after=number * 2, times=1, afterwards=unanswered)
    for data in (DATA, content(*range(5), 50, *range(6, 10))):
        await site.on(Retrying(faulty, QUICK)).archive(volume(data))
    await site.check(DATA, content(*range(5), 50, *range(6, 10)))
    assert await site.stored_twice() == []


async def test_a_store_that_is_busy_for_a_minute_is_waited_for(site: Site) -> None:
    """A minute on a clock that is a thousand times as fast."""
    await site.archive(volume(content(1)))
    faulty = FaultyStore(site.store)
    rule = faulty.rule("put_new", part="/data/", before=busy)
    patience = Patience(attempts=20, pause=0.00025, most=0.008)

    async def recovers() -> None:
        began = time.monotonic()
        while rule.seen < 5 or time.monotonic() - began < 0.060:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        faulty.rules.clear()

    await asyncio.gather(recovers(), site.on(Retrying(faulty, patience)).archive(volume(DATA)))
    await site.check(content(1), DATA)
    assert rule.seen >= 5


@pytest.mark.parametrize("part", ["/attempts/", "/data/", "/meta/", "/log/"])
async def test_a_store_that_stays_away_ends_the_attempt_with_its_own_words(site: Site, part: str) -> None:
    await site.archive(volume(content(1)))
    faulty = FaultyStore(site.store)
    faulty.rule("put", "put_new", part=part, before=full)
    with pytest.raises(BlockferryError) as told:
        await site.on(Retrying(faulty, QUICK)).archive(volume(DATA))
    assert told.value.code is Code.OUT_OF_SPACE
    await site.archive(volume(DATA))
    await site.check(content(1), DATA)
    assert await site.stored_twice() == []


async def test_slow_answers_in_any_order_change_nothing(site: Site) -> None:
    faulty = FaultyStore(site.store)
    for number, delay in enumerate((0.02, 0.0, 0.01, 0.005)):
        faulty.rule("put_new", part="/data/", after=number, times=1, delay=delay)
    await site.on(faulty).archive(volume(DATA))
    await site.check(DATA)


async def test_the_superblock_waits_for_every_chunk(site: Site) -> None:
    """The first data chunk is held back: nothing but other data is written meanwhile."""
    counting = CountingStore(site.store)
    faulty = FaultyStore(counting)
    held = asyncio.Event()
    faulty.rule("put_new", part="/data/", times=1, until=held)
    work = asyncio.ensure_future(site.on(faulty).archive(volume(DATA)))
    while counting.count("put_new", "/data/") < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    assert counting.count("put_new", "/meta/") == counting.count("put_new", "/log/") == 0
    held.set()
    await work
    await site.check(DATA)


async def test_no_more_uploads_at_a_time_than_are_allowed(site: Site) -> None:
    running = most = 0
    both = asyncio.Event()

    class Counting(FaultyStore):
        async def put_new(self, key: str, parts: object) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running > 1:
                both.set()
            try:
                if "/data/" in key:
                    # Nothing is stored before two are on their way.
                    await asyncio.wait_for(both.wait(), 10)
                await asyncio.sleep(0.002)
                await super().put_new(key, parts)  # type: ignore[arg-type]
            finally:
                running -= 1

    await site.on(Counting(site.store)).archive(volume(content(*range(30))), uploads=2)
    assert most == 2


@pytest.mark.parametrize("corrupt", [flip(40), flip(-1)])
async def test_a_superblock_that_is_not_what_was_written_is_an_error(site: Site, corrupt: object) -> None:
    faulty = FaultyStore(site.store)
    faulty.rule("put_new", part="/log/", corrupt=corrupt)
    with pytest.raises(BlockferryError) as told:
        await site.on(faulty).archive(volume(DATA))
    assert told.value.code is Code.DATA_MISMATCH


async def test_a_superblock_that_was_acknowledged_and_lost_is_an_error_and_comes_with_the_next_run(site: Site) -> None:
    faulty = FaultyStore(site.store)
    faulty.rule("put_new", part="/log/", lose=True)
    with pytest.raises(BlockferryError) as told:
        await site.on(faulty).archive(volume(DATA))
    assert told.value.code is Code.DATA_MISMATCH and "has no such object" in told.value.cause
    report = await site.archive(volume(DATA))
    assert report["resumed"] and report["blocks"]["stored"] == 0
    await site.check(DATA)


async def test_an_old_view_of_the_store_cannot_replace_what_is_newer(site: Site) -> None:
    await site.archive(volume(content(1)))
    faulty = FaultyStore(site.store)
    await faulty.freeze()
    await site.beside("other").archive(volume(content(2)))
    with pytest.raises(BlockferryError):
        await site.on(faulty).archive(volume(content(3)))
    await site.archive(volume(content(3)))
    await site.check(content(1), content(2), content(3))


async def test_what_is_read_of_the_base_and_was_altered_is_refused(site: Site) -> None:
    await site.archive(volume(DATA))
    faulty = FaultyStore(site.store)
    faulty.rule("get", part="/meta/", corrupt=flip(100))
    with pytest.raises(BlockferryError) as told:
        await site.beside("other").on(faulty).archive(volume(DATA))
    assert told.value.code is Code.CORRUPT_STATE and "/meta/" in told.value.line()
    await site.check(DATA) if not [k for k in await site.store.list("") if "/attempts/" in k] else None


async def test_renewals_that_fail_end_the_attempt(site: Site) -> None:
    """A sweep could take it for dead."""
    faulty = FaultyStore(site.store)
    faulty.rule("put", part="/attempts/", after=1, before=full)
    faulty.rule("put_new", part="/data/", until=asyncio.Event())
    with pytest.raises(BlockferryError) as told:
        await site.on(faulty).archive(volume(DATA), renew_seconds=0.001)
    assert told.value.code is Code.OUT_OF_SPACE


async def test_cancelled_at_any_request_the_next_run_goes_on(site: Site) -> None:
    await site.archive(volume(content(1)))
    for after in range(8):
        faulty = FaultyStore(site.store)
        reached = asyncio.Event()

        class Reporting(FaultyStore):
            async def _meet(self, operation: str, key: str) -> object:  # type: ignore[override]
                found = [one for one in self.rules if one.seen >= one.after]
                if found:
                    reached.set()  # noqa: B023
                return await super()._meet(operation, key)

        faulty = Reporting(site.store)
        faulty.rule("put", "put_new", "delete", after=after, until=asyncio.Event())
        data = content(*range(10), after)
        work = asyncio.ensure_future(site.on(faulty).archive(volume(data), uploads=1))
        await asyncio.wait([work, asyncio.ensure_future(reached.wait())], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.01)
        work.cancel()
        await asyncio.wait([work])
        await site.archive(volume(data))
        assert await site.read() == data
        assert await site.stored_twice() == []
