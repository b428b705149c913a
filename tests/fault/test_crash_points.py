"""Death at every crash point of the source: SIGKILL of the server or of the client exactly there, on real processes.

Every name found in the source is gone through, at several passes of it in one life of a replica: a first sync, a
checkpoint, an update, a session that is discarded, an update after which a recovery point is dropped, an orderly end
and another start. A name that is never hit fails. After each death the newest generation is the one before or the one
that was asked for (certainly the latter if the client has been told), every point is byte for byte what was committed,
no file lies about that nobody needs, and the next sync succeeds.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import blockferry.client
import blockferry.common
import blockferry.server
import pytest
from blockferry.server import identity

from tests.fault.contents import contents_in
from tests.fault.raw import Raw
from tests.fault.stage import KEEP, KILLED, SMALL, Death, Stage, StageFactory, plain_xfs, stages

PASSES = int(os.environ.get("BLOCKFERRY_CRASH_PASSES", "2"))
"""Passes tried of a name: a first sync and an update. Names that fire for many files are tried at every pass."""

ALL_PASSES = 40
"""A bound on them."""

_POINT = re.compile(r"crash_point\(\s*\"([^\"]+)\"")


def _named(*packages: object) -> set[str]:
    """The crash points in packages."""
    found: set[str] = set()
    for package in packages:
        for path in Path(str(getattr(package, "__file__", ""))).parent.rglob("*.py"):
            found |= set(_POINT.findall(path.read_text()))
    return found


ARCHIVING = {
    name
    for name in _named(blockferry.common, blockferry.client)
    if name.startswith(("archive-", "restore-", "object-"))
}
"""Of archives, which no sync comes by: gone through in tests/integration/test_archive_*.py."""

BOTH = _named(blockferry.common) - ARCHIVING
SERVER = {
    name
    for name in _named(blockferry.server)
    if not name.startswith(("device-", "group-", "start-group-", "rehydrate-"))
}
"""Those of devices alone are gone through in test_device_crashes.py, those of several commits in one in
test_group_commits.py, those of disks that are rehydrated in test_rehydration_crashes.py."""
CLIENT = {name for name in _named(blockferry.client) - ARCHIVING if not name.startswith("cycle-")}
"""Those of an agent's replication are gone through in test_cycle_crashes.py."""

CLONES_ONLY = {"open-cloned"}
_JOURNAL = ("complete-", "commit-undo-", "commit-redo-", "commit-space-", "drop-undo-", "drop-merge-", "delta-")
JOURNAL_ONLY = {
    name
    for name in SERVER
    if name.startswith(
        ("complete-", "commit-undo-", "commit-redo-", "commit-space-", "drop-undo-", "drop-merge-", "delta-")
    )
}
STARTING = {name for name in SERVER if name.startswith("start-")}
MERGING = {name for name in SERVER if name.startswith(("drop-undo-", "drop-merge-"))}
HANDING_OVER = {
    name for name in SERVER | BOTH if name.startswith(("promote-", "demote-", "delete-", "adopt-", "move-"))
}
"""Gone through in test_handover_crashes.py."""


def _passes(name: str) -> range:
    return range(1, 1 + (ALL_PASSES if name in BOTH | JOURNAL_ONLY else PASSES))


@pytest.fixture(scope="module")
def plain_pool_root(tmp_path_factory: pytest.TempPathFactory, xfs_pool_root: Path) -> Iterator[Path]:
    """A file system that cannot clone files. Where the other can be mounted, so can this."""
    with plain_xfs(tmp_path_factory.mktemp("plain")) as mount:
        yield mount


@pytest.fixture
def make_stage(tmp_path: Path) -> Iterator[StageFactory]:
    """Makes stages, each with a pool and a server of its own."""
    with stages(tmp_path) as make:
        yield make


async def _life(stage: Stage) -> Death | None:
    """Until the server dies, or to the end."""
    stage.change_source()
    death = await stage.survive(stage.sync())
    death = death or await stage.survive(stage.checkpoint())
    for number in range(2):
        if death is None:
            stage.change_source()
            death = await stage.survive(stage.sync())
        if death is None and number == 0:
            death = await stage.survive(stage.discard())
    if death is None:
        status = stage.server.stop()
        if status:
            death = Death(status)
        stage.server.doom = ""
        stage.server.start()
    return death


async def _dies(stage: Stage) -> bool:
    """Whether the server dies in its life; if so, everything that must hold then is checked."""
    status = await asyncio.to_thread(stage.server.status_of_start)
    if status is None:
        death = await _life(stage)
    else:
        # At its very start, when it makes a pool of the directory.
        death = Death(status)
        stage.server.doom = ""
        stage.server.start()
    if death is None:
        return False
    assert death.status == KILLED
    await stage.verify()
    await stage.verify_next()
    return True


@pytest.mark.parametrize("name", sorted((SERVER | BOTH) - JOURNAL_ONLY - STARTING - HANDING_OVER))
async def test_the_server_dies(make_stage: StageFactory, xfs_pool_root: Path, name: str) -> None:
    hits = 0
    for number in _passes(name):
        if not await _dies(make_stage(xfs_pool_root, f"{name}:{number}")):
            break
        hits += 1
    assert hits, f"{name} is never passed"
    print(f"{hits} deaths at {name}")


@pytest.mark.parametrize("name", sorted((SERVER | BOTH) - CLONES_ONLY - STARTING - HANDING_OVER - MERGING))
async def test_the_server_dies_where_nothing_can_be_cloned(
    make_stage: StageFactory, plain_pool_root: Path, name: str
) -> None:
    hits = 0
    for number in _passes(name):
        if not await _dies(make_stage(plain_pool_root, f"{name}:{number}", clones=False)):
            break
        hits += 1
    assert hits, f"{name} is never passed"
    print(f"{hits} deaths at {name}")


@pytest.mark.parametrize(
    ("clones", "name", "before"),
    [
        (True, "start-stamps-taken", ""),
        (True, "start-image-settled", "commit-renamed"),
        (True, "start-image-settled", "drop-recorded"),
        # While it notes which file names the pool.
        (True, "atomic-before-rename", ""),
        (True, "rename-before-fsync", ""),
        (False, "start-stamps-taken", ""),
        (False, "start-redo-settled", "commit-redo-renamed"),
        (False, "start-redo-settled", "commit-renamed"),
        (False, "delta-index-removed", "commit-space-reserved"),
        (False, "delta-index-removed", "drop-recorded"),
        (False, "complete-begun", "commit-recorded:2"),
        (False, "complete-written", "complete-applied"),
        (False, "complete-flushed", "complete-written"),
        (False, "complete-redo-removed", "complete-flushed"),
    ],
)
async def test_the_server_dies_while_it_recovers(
    make_stage: StageFactory, xfs_pool_root: Path, plain_pool_root: Path, clones: bool, name: str, before: str
) -> None:
    """`before`: where the server before it died, so that there is something to put right; then the one that puts it
    right dies too."""
    stage = make_stage(xfs_pool_root if clones else plain_pool_root, before, clones=clones)
    stage.server.start()
    if before:
        assert await _syncs_to_death(stage) == KILLED
    else:
        stage.change_source()
        await stage.sync()
        assert stage.server.stop() == 0
    if name in BOTH:
        (stage.server.pool / identity.NAME).unlink()
    stage.server.doom = f"{name}:1"
    status = stage.server.status_of_start()
    assert (status if status is not None else await asyncio.wait_for(stage.server.death(), 30)) == KILLED
    stage.server.doom = ""
    stage.server.start()
    await stage.verify()
    await stage.verify_next()


@pytest.mark.parametrize("name", sorted(MERGING))
async def test_the_server_dies_while_before_images_are_merged(
    make_stage: StageFactory, plain_pool_root: Path, name: str
) -> None:
    """A point in the middle goes, while the oldest one is kept because somebody reads it."""
    stage = make_stage(plain_pool_root, f"{name}:1", clones=False)
    stage.server.start()
    for _ in range(KEEP):
        stage.change_source()
        await stage.sync()
    with Raw(stage.server.address) as raw:
        assert raw.read(stage.volume, 1, 0, SMALL) == stage.contents[1]
    death = None
    while death is None:
        stage.change_source()
        death = await stage.survive(stage.sync())
    assert death.status == KILLED
    found = await contents_in(stage.directory, stage.source.parent)
    # Generation 4 is committed, whether or not its client has asked again; 1 is read, 3 is kept, and 2 was about to go.
    stage.contents[KEEP + 2] = stage.attempted
    assert found == {number: stage.contents[number] for number in (1, 2, 3, 4)}
    await stage.verify_next()


async def _syncs_to_death(stage: Stage) -> int | None:
    """Sync until the server dies, and leave it dead; its exit status."""
    death = asyncio.create_task(stage.server.death())
    for _ in range(KEEP + 1):
        stage.change_source()
        syncing = asyncio.create_task(stage.sync())
        await asyncio.wait([syncing, death], return_when=asyncio.FIRST_COMPLETED)
        if death.done():
            syncing.cancel()
            await asyncio.gather(syncing, return_exceptions=True)
            return death.result()
        await syncing
    death.cancel()
    return None


TOLD = {"client-commit-answered", "client-commit-confirmed"}
"""Where the client has been told that its commit happened."""


@pytest.mark.parametrize("first", [True, False], ids=["first", "update"])
@pytest.mark.parametrize("name", sorted(CLIENT | BOTH - {"log-before-fsync"} - HANDING_OVER))
async def test_the_client_dies(make_stage: StageFactory, xfs_pool_root: Path, name: str, first: bool) -> None:
    stage = make_stage(xfs_pool_root)
    stage.server.start()
    hits = 0
    for number in _passes(name):
        if number > 1 and first:
            stage = stage.beside()
        if not first:
            stage.change_source()
            await stage.sync()
        stage.change_source()
        status = stage.status_of_client(f"{name}:{number}")
        if status == 0:
            break
        assert status == KILLED
        hits += 1
        before = stage.newest
        await stage.restart()
        await stage.verify()
        if name in TOLD:
            assert stage.newest == before + 1
        await stage.verify_next()
        assert [path.suffix for path in (stage.state / "commits").iterdir()] == [".json"]
    assert hits, f"{name} is never passed"
    print(f"{hits} deaths at {name}")


def test_every_name_is_gone_through() -> None:
    """Each name belongs to the side it is named after, and to one of the tests above."""
    assert {name for name in CLIENT if not name.startswith("client-")} == set()
    assert {name for name in SERVER | BOTH if name.startswith("client-")} == set()
    assert {"start-stamps-taken", "start-image-settled", "start-redo-settled"} == STARTING
    assert len(SERVER | CLIENT | BOTH) == len(SERVER) + len(CLIENT) + len(BOTH)
    print(f"{len(SERVER | CLIENT | BOTH)} crash points: {', '.join(sorted(SERVER | CLIENT | BOTH))}")
