"""A month of generations with retention, once as clones and once with a journal: both end with the same recovery
points, byte for byte, and no file that nobody needs."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from blockferry.server import generations as generations_module
from blockferry.v1 import replication_pb2 as pb

from tests.fault.contents import content_of, files_of
from tests.fault.local import Local
from tests.fault.raw import REGION
from tests.images import noise

NAME = "v"
REGIONS = 6
EVERY = timedelta(hours=2)
DAYS = 30
KEEP = pb.Retention(last=4, hourly=6, daily=7, weekly=3, monthly=2)
LEASE = 0.001
"""Seconds: nothing is read before the end, and nothing may be kept for having been read."""


class Wall:
    """Stands in for the `time` module of generations.py."""

    now = datetime(2024, 2, 1, 0, 30, tzinfo=UTC)

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        return int(self.now.timestamp()) * 1_000_000_000


async def _update(local: Local, number: int, content: dict[int, bytes], changed: list[int]) -> None:
    opened = await local.open(NAME, REGIONS * REGION)
    for region in changed:
        if any(content[region]):
            await local.write(opened.session, region * REGION, content[region])
        else:
            await local.unmap(opened.session, region * REGION, REGION)
    await local.commit(NAME, opened.session, number.to_bytes(16, "big"), KEEP)


async def test_a_month_ends_in_the_same_points(
    xfs_pool_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = Wall()
    monkeypatch.setattr(generations_module, "time", wall)
    base = xfs_pool_root / tmp_path.name
    base.mkdir()
    rng = random.Random(20240201)
    kinds = {clones: await Local.start(base / f"{clones}", clones=clones, lease=LEASE) for clones in (True, False)}
    content = {region: bytes(REGION) for region in range(REGIONS)}
    history: dict[int, bytes] = {}
    count = DAYS * 24 // 2
    for number in range(1, count + 1):
        changed = rng.sample(range(REGIONS), rng.randint(0, 3))
        for region in changed:
            content[region] = bytes(REGION) if rng.random() < 0.2 else noise(rng.randrange(1 << 30), REGION)
        history[number] = b"".join(content[region] for region in range(REGIONS))
        for local in kinds.values():
            await _update(local, number, content, changed)
        wall.now += EVERY

    expected: list[int] = []
    for clones, local in kinds.items():
        for _ in range(2):
            replica = local.replica(NAME)
            await replica.complete()
            store = replica.store
            numbers = [point.number for point in store.generations.points]
            expected = expected or numbers
            assert numbers == expected
            for point in store.generations.points:
                assert await content_of(store, point) == history[point.number], f"generation {point.number}"
            needed, allowed = files_of(store)
            names = {path.name for path in store.directory.iterdir()}
            assert needed <= names <= allowed
            await local.stop()
            local = await Local.start(base / f"{clones}", clones=clones, lease=LEASE)
            (local.replica(NAME).store.directory / "clean.json").unlink(missing_ok=True)
        await local.stop()
    assert expected[-1] == count
    print(f"{count} generations; kept in the end: {expected}")
