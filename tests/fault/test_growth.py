"""A session that makes a replica larger, and death at the points where what it has done differs: the replica has its
old size or its new one, older generations keep theirs, and the next sync succeeds, larger or not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blockferry.client.sync import SyncOptions

from tests.fault.raw import Raw
from tests.fault.stage import KILLED, REGION, SMALL, Death, Stage, plain_xfs, stages
from tests.images import BLOCK
from tests.support import ok

LARGER = SMALL + 6 * REGION + BLOCK + 7
"""Bytes: neither size is a multiple of a region, and this one of no block either."""

CLONES = ["commit-renamed", "commit-recorded"]
JOURNAL = ["commit-undo-captured", "commit-space-reserved", "commit-recorded", "complete-applied"]
"""Where it makes a difference that the sizes differ; `tests/unit/test_journal_recovery.py` grows at every point."""


class GrowingStage(Stage):
    """A stage whose syncs may make the replica larger."""

    @property
    def options(self) -> SyncOptions:
        return replace(super().options, grow=True)

    @property
    def words(self) -> list[str]:
        return [*super().words, "--grow"]

    def grow(self) -> None:
        """From now on the source is larger."""
        self.size = LARGER

    def sizes(self) -> dict[int, int]:
        """The size of every recovery point."""
        with Raw(self.server.address) as raw:
            return {point.number: point.size for point in raw.points(self.volume)}

    def read(self) -> dict[int, bytes]:
        """What every recovery point holds to whoever reads it; that keeps it for a while."""
        with Raw(self.server.address) as raw:
            return {number: raw.read(self.volume, number, 0, size) for number, size in self.sizes().items()}


@pytest.fixture(scope="module")
def plain_pool_root(tmp_path_factory: pytest.TempPathFactory, xfs_pool_root: Path) -> Iterator[Path]:
    """A file system that cannot clone files. Where the other can be mounted, so can this."""
    with plain_xfs(tmp_path_factory.mktemp("plain")) as mount:
        yield mount


@pytest.fixture(params=[True, False], ids=["clones", "journal"])
def clones(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def root(clones: bool, request: pytest.FixtureRequest) -> Path:
    found = request.getfixturevalue("xfs_pool_root" if clones else "plain_pool_root")
    assert isinstance(found, Path)
    return found


@pytest.fixture
def stage(root: Path, clones: bool, tmp_path: Path) -> Iterator[GrowingStage]:
    """A stage on a pool of this kind."""
    with stages(tmp_path, GrowingStage) as make:
        found = make(root, clones=clones)
        assert isinstance(found, GrowingStage)
        yield found


async def begun(stage: GrowingStage) -> None:
    """One generation of the old size, and a source that has grown."""
    stage.server.start()
    stage.change_source()
    await stage.sync()
    stage.grow()
    stage.change_source()


async def check(stage: GrowingStage) -> None:
    """Every generation is what was committed, its size too; the next sync succeeds, and leaves the last ones so."""
    await stage.verify()
    assert stage.sizes() == {number: len(stage.contents[number]) for number in range(1, stage.newest + 1)}
    await stage.verify_next()
    assert stage.read() == {number: stage.contents[number] for number in (stage.newest - 1, stage.newest)}
    assert (len(stage.contents[1]), len(stage.contents[stage.newest])) == (SMALL, LARGER)


@pytest.mark.parametrize(
    ("clones", "name"),
    [*((True, name) for name in CLONES), *((False, name) for name in JOURNAL)],
    ids=[*(f"clones-{name}" for name in CLONES), *(f"journal-{name}" for name in JOURNAL)],
    indirect=["clones"],
)
async def test_the_server_dies_while_a_replica_grows(stage: GrowingStage, name: str) -> None:
    await begun(stage)
    # Only the session that grows is gone through.
    assert stage.server.stop() == 0
    stage.server.doom = f"{name}:1"
    stage.server.start()
    death = await stage.survive(stage.sync())
    if death is None:
        # After its answer, when the journal is applied.
        death = Death(await asyncio.wait_for(stage.server.death(), 30))
        stage.server.doom = ""
        stage.server.start()
    assert death.status == KILLED
    await check(stage)


async def test_the_client_dies_while_a_replica_grows(stage: GrowingStage) -> None:
    await begun(stage)
    assert stage.status_of_client("client-commit-minted:1") == KILLED
    await stage.restart()
    assert stage.sizes() == {1: SMALL}
    await check(stage)


async def test_growing_that_was_given_up_leaves_the_old_size(stage: GrowingStage) -> None:
    """The next source has the old size again and says nothing of growing: nothing of the larger one is left."""
    await begun(stage)
    assert stage.status_of_client("client-transferred:1") == KILLED
    await stage.restart()
    stage.size = SMALL
    stage.change_source()
    report = ok("sync", stage.source, stage.server.url(stage.volume), "--state-dir", stage.state)
    assert (report["generation"], report["volume_size"]) == (2, SMALL)
    stage.contents[2] = stage.attempted
    # And what it grows by afterwards is zeros, whatever had been written there.
    os.truncate(stage.source, LARGER)
    stage.attempted = stage.source.read_bytes()
    report = ok("sync", stage.source, stage.server.url(stage.volume), "--state-dir", stage.state, "--grow")
    assert report["bytes"]["data_sent"] == 0
    stage.contents[3] = stage.attempted
    assert stage.contents[3] == stage.contents[2] + bytes(LARGER - SMALL)
    await stage.points()
    assert stage.read() == {number: stage.contents[number] for number in (2, 3)}
    assert stage.server.snapshot(stage.volume).content == stage.contents[3]
