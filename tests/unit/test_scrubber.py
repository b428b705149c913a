"""What is scrubbed when: by the age in the file, over restarts, and whatever the clock does."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from blockferry.common.retention import Retention
from blockferry.server import commits, scrub, scrubber
from blockferry.server.pools import Pools, PoolSpec
from blockferry.server.replica import Replica
from blockferry.server.scrub import ScrubRecord, last_scrub, record_scrub, verify_point
from blockferry.server.scrubber import Scrubber
from blockferry.v1 import replication_pb2 as pb

REGION = 65536
SIZE = 40 * REGION
EVERY = 1000
SECOND = 1_000_000


class Clock:
    """Microseconds since 1970, as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10**6 * SECOND
        for module in (scrub, scrubber):
            monkeypatch.setattr(module, "now_us", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that the rate was asked for."""
    found: list[int] = []

    async def acquire(_: object, amount: int) -> None:
        found.append(amount)

    monkeypatch.setattr("blockferry.server.scrubber.RateLimiter.acquire", acquire)
    return found


async def _commit(pools: Pools, name: str) -> Replica:
    replica = await pools.get_or_create(name, REGION)
    session = await replica.open_session(pb.OpenSessionRequest(volume=name, size=SIZE))
    ref = pb.SessionRef(session_id=session.session_id, epoch=session.epoch)
    request = pb.WriteRegionRequest(offset=0, length=REGION)
    request.writes.add(offset=0, length=REGION)
    for number in range(2):
        request.offset = number * REGION
        await replica.write_regions([(request, memoryview(b"x" * REGION))], ref)
    await commits.commit([commits.Asked(replica, ref, os.urandom(16))])
    return replica


async def _open(path: Path) -> Pools:
    return await Pools.open([PoolSpec("main", path, Retention(last=1))], 60.0)


@pytest_asyncio.fixture
async def pools(tmp_path: Path, clock: Clock) -> AsyncIterator[Pools]:
    """A pool with two committed replicas and one that is empty."""
    opened = await _open(tmp_path)
    for name in ("a", "b"):
        await _commit(opened, name)
    await opened.get_or_create("empty", 0)
    yield opened
    await opened.close()


def _ages(pools: Pools, clock: Clock) -> dict[str, float | None]:
    found = {replica.name: last_scrub(replica.store) for replica in pools.list()}
    return {name: (clock.now - one.at_us) / SECOND if one is not None else None for name, one in found.items()}


async def test_what_was_never_scrubbed_is_due_and_read_at_the_rate(
    pools: Pools, clock: Clock, waited: list[int]
) -> None:
    assert _ages(pools, clock) == {"a": None, "b": None, "empty": None}
    await Scrubber(pools, EVERY).round()
    assert _ages(pools, clock) == {"a": 0, "b": 0, "empty": None}
    assert sum(waited) == 2 * 2 * REGION
    assert last_scrub(pools.get("a").store) == ScrubRecord(clock.now, 1, 2 * REGION)


async def test_it_is_due_again_after_its_time_and_not_before(pools: Pools, clock: Clock, waited: list[int]) -> None:
    one = Scrubber(pools, EVERY)
    await one.round()
    clock.now += EVERY * SECOND - 1
    await one.round()
    assert _ages(pools, clock)["a"] == pytest.approx(EVERY)
    clock.now += 1
    await one.round()
    assert _ages(pools, clock) == {"a": 0, "b": 0, "empty": None}


async def test_the_age_survives_a_restart(tmp_path: Path, clock: Clock, waited: list[int]) -> None:
    pools = await _open(tmp_path)
    await _commit(pools, "a")
    await Scrubber(pools, EVERY).round()
    await pools.close()
    clock.now += 10 * SECOND
    pools = await _open(tmp_path)
    await Scrubber(pools, EVERY).round()
    assert _ages(pools, clock) == {"a": 10}
    await pools.close()


async def test_a_clock_that_is_set_back_makes_no_storm(pools: Pools, clock: Clock, waited: list[int]) -> None:
    one = Scrubber(pools, EVERY)
    await one.round()
    read = sum(waited)
    for _ in range(5):
        clock.now -= 365 * 86400 * SECOND
        await one.round()
        # It counts from when that was noticed, and is due in time.
        assert _ages(pools, clock) == {"a": 0, "b": 0, "empty": None}
    assert sum(waited) == read
    clock.now += EVERY * SECOND
    await one.round()
    assert sum(waited) == 2 * read


async def test_rot_is_kept_and_told(pools: Pools, clock: Clock, waited: list[int]) -> None:
    replica = pools.get("a")
    assert replica.path is not None
    with replica.path.open("r+b") as file:
        file.seek(REGION + 5)
        file.write(b"!")
    await Scrubber(pools, EVERY).round()
    assert last_scrub(replica.store) == ScrubRecord(clock.now, 1, 2 * REGION, [(REGION, REGION)])
    sound = last_scrub(pools.get("b").store)
    assert sound is not None and sound.rotten == []


async def test_what_cannot_be_read_is_told_and_tried_again_in_time(
    pools: Pools, clock: Clock, waited: list[int]
) -> None:
    replica = pools.get("a")
    assert replica.path is not None
    away = replica.path.with_suffix(".away")
    replica.path.rename(away)
    one = Scrubber(pools, EVERY)
    await one.round()
    found = last_scrub(replica.store)
    assert found is not None and (found.generation, found.bytes, found.rotten) == (1, 0, [])
    assert "missing" in found.problem
    assert _ages(pools, clock)["b"] == 0, "one that cannot be read holds up the others"
    away.rename(replica.path)
    await one.round()
    assert last_scrub(replica.store) == found
    clock.now += EVERY * SECOND
    await one.round()
    assert last_scrub(replica.store) == ScrubRecord(clock.now, 1, 2 * REGION)


async def test_only_one_that_came_to_its_end_is_kept(pools: Pools) -> None:
    replica = pools.get("a")
    verifying = verify_point(replica, 0)
    await anext(verifying)
    await verifying.aclose()
    assert last_scrub(replica.store) is None
    async for _ in verify_point(replica, 1):
        pass
    assert last_scrub(replica.store) is not None


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff", b'{"at_us": "x"}'])
async def test_a_record_that_cannot_be_used_is_as_good_as_none(
    pools: Pools, clock: Clock, waited: list[int], content: bytes
) -> None:
    store = pools.get("a").store
    (store.directory / scrub.NAME).write_bytes(content)
    assert last_scrub(store) is None
    await Scrubber(pools, EVERY).round()
    assert _ages(pools, clock)["a"] == 0


async def test_a_disk_that_takes_no_record_does_not_hide_the_result(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, data: bytes) -> None:
        raise OSError(28, "injected")

    monkeypatch.setattr(scrub, "write_atomic", fails)
    record_scrub(pools.get("a").store, ScrubRecord(1, 1))
    answers = [one async for one in verify_point(pools.get("a"), 0)]
    assert answers[-1].bytes_done == 2 * REGION
