"""Wall clocks that jump: the order of recovery points and the leases of sessions do not care.

The system's clock is moved a day forward and a day back between commits, and over restarts. Numbers rise, the newest
point is the one committed last and is never dropped, retention's buckets are those of the times that were noted, and a
lease lasts as long as monotonic time says.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.server import generations as generations_module
from blockferry.server import points as points_module
from blockferry.server import replica as replica_module
from blockferry.v1 import replication_pb2 as pb

from tests.fault.local import Clock, Local
from tests.fault.raw import REGION
from tests.images import noise

NAME = "v"
LEASE = 60.0
DAY = timedelta(days=1)


class WallClock:
    """Stands in for the `time` module of generations.py."""

    def __init__(self) -> None:
        self.now = datetime(2024, 2, 29, 23, 30, tzinfo=UTC)

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        return int(self.now.timestamp()) * 1_000_000_000


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    wall = WallClock()
    monkeypatch.setattr(generations_module, "time", wall)
    return wall


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (replica_module, points_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
async def local(xfs_pool_root: Path, tmp_path: Path, wall: WallClock, clock: Clock) -> AsyncIterator[Local]:
    local = await Local.start(xfs_pool_root / tmp_path.name, lease=LEASE)
    yield local
    await local.stop()


_ids = itertools.count(1)


async def commit(local: Local, seed: int, **keep: int) -> int:
    """Commit one region of noise; the number of the generation."""
    session = (await local.open(NAME, REGION)).session
    await local.write(session, 0, noise(seed, REGION))
    done = await local.commit(NAME, session, next(_ids).to_bytes(16, "big"), pb.Retention(**keep) if keep else None)
    return done.generation


JUMPS = [(DAY, -DAY), (-DAY, DAY), (DAY, DAY), (-DAY, -DAY), (timedelta(days=400), timedelta(days=-800))]


@pytest.mark.parametrize("jumps", JUMPS)
@pytest.mark.parametrize("restart", [False, True])
async def test_points_stay_in_the_order_of_their_commits(
    local: Local, wall: WallClock, jumps: Sequence[timedelta], restart: bool
) -> None:
    assert await commit(local, 1, last=9) == 1
    for number, jump in enumerate(jumps, 2):
        wall.now += jump
        if restart:
            await local.stop()
            local.__dict__.update((await Local.start(local.pool.path, lease=LEASE)).__dict__)
        assert await commit(local, number) == number
    points = await local.points(NAME)
    assert [point.number for point in points] == [3, 2, 1]
    assert "newest" in points[0].kept_by
    assert (await local.show(NAME)).generation == 3
    for point in points:
        assert await local.read(NAME, point.number, 0, REGION) == noise(point.number, REGION)
        # What was noted is what the clock said, however odd.
    assert points[0].committed_at_us - points[2].committed_at_us == sum(jumps, timedelta()) // timedelta(microseconds=1)


async def test_the_newest_is_never_dropped_for_an_older_one_with_a_later_time(local: Local, wall: WallClock) -> None:
    await commit(local, 1, last=1)
    wall.now += 2 * DAY
    await commit(local, 2)
    assert [point.number for point in await local.points(NAME)] == [2]
    wall.now -= 4 * DAY
    await commit(local, 3)
    assert [point.number for point in await local.points(NAME)] == [3]
    assert await local.read(NAME, 0, 0, REGION) == noise(3, REGION)


async def test_a_day_forward_and_back_gives_odd_days_and_no_loss_of_the_newest(local: Local, wall: WallClock) -> None:
    await commit(local, 1, daily=2)
    wall.now += DAY
    await commit(local, 2)
    wall.now -= DAY
    await commit(local, 3)
    # In the order of numbers the days are Friday, Saturday, Friday: the two newest buckets are those of 3 and 2.
    found = {point.number: set(point.kept_by) for point in await local.points(NAME)}
    assert found == {3: {"newest", "last", "daily"}, 2: {"daily"}}


async def test_buckets_over_real_time(local: Local, wall: WallClock) -> None:
    """A commit every six hours for five days, over a month's end: what is kept after each is what the rules say."""
    for number in range(1, 21):
        await commit(local, number, last=2, daily=3, monthly=2)
        wall.now += timedelta(hours=6)
    found = {point.number: list(point.kept_by) for point in await local.points(NAME)}
    # From 23:30 on the 29th of February: 1 is alone in its month; then four a day.
    assert found == {
        20: ["newest", "last", "daily", "monthly"],
        19: ["last"],
        17: ["daily"],
        13: ["daily"],
        1: ["monthly"],
    }


@pytest.mark.parametrize("jump", [DAY, -DAY])
async def test_a_lease_knows_monotonic_time_only(local: Local, wall: WallClock, clock: Clock, jump: timedelta) -> None:
    first = (await local.open(NAME, REGION)).session
    wall.now += jump
    with pytest.raises(BlockferryError) as caught:
        await local.open(NAME, REGION)
    assert caught.value.code is Code.IN_USE
    clock.now += LEASE - 1
    with pytest.raises(BlockferryError):
        await local.open(NAME, REGION)
    clock.now += 1
    second = (await local.open(NAME, REGION)).session
    assert second.epoch == first.epoch + 1


async def test_a_pin_knows_monotonic_time_only(local: Local, wall: WallClock, clock: Clock) -> None:
    await commit(local, 1, last=1)
    await local.read(NAME, 1, 0, REGION)
    wall.now += DAY
    await commit(local, 2)
    assert [point.number for point in await local.points(NAME)] == [2, 1]
    clock.now += LEASE
    await commit(local, 3)
    assert [point.number for point in await local.points(NAME)] == [3]
    assert local.pool._floor == Retention(last=1)
