"""Kills at random instants: a sample (`make soak` does thousands); what a first sync sends again after a kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.kills import campaign
from tests.fault.stage import KILLED, REGION, StageFactory, plain_xfs, stages
from tests.images import BLOCK, MIB, build, differing_blocks, noise
from tests.support import finish, until

SEED = 3
KILLS = {True: 20, False: 20}
"""On a file system that can clone, and on one that cannot: about a minute together."""

SIZE = 64 * MIB
LIMIT = 64 * MIB
"""Bytes per second: slow enough to be killed at 90 %."""


@pytest.fixture
def make_stage(tmp_path: Path) -> Iterator[StageFactory]:
    """Makes stages, each with a pool and a server of its own."""
    with stages(tmp_path) as make:
        yield make


async def test_killed_at_random_on_clones(make_stage: StageFactory, xfs_pool_root: Path) -> None:
    done = await campaign(lambda: make_stage(xfs_pool_root), SEED, KILLS[True])
    print(f"seed {SEED}: {done}")
    assert done.total == KILLS[True]
    assert {victim for victim, _, _ in done.kills} == {"server", "client"}
    assert {kind for _, kind, _ in done.kills} == {"first", "update"}


async def test_killed_at_random_with_a_journal(make_stage: StageFactory, xfs_pool_root: Path, tmp_path: Path) -> None:
    base = tmp_path / "plain"
    base.mkdir()
    with plain_xfs(base) as root, stages(tmp_path) as make:
        done = await campaign(lambda: make(root, clones=False), SEED, KILLS[False])
    print(f"seed {SEED}: {done}")
    assert done.total == KILLS[False]


@pytest.mark.parametrize("victim", ["server", "client"])
async def test_what_is_sent_again_after_a_kill_at_90_percent(
    make_stage: StageFactory, xfs_pool_root: Path, victim: str
) -> None:
    """Only what had not arrived: the next sync finds the rest in its place."""
    stage = make_stage(xfs_pool_root, size=SIZE)
    stage.server.start()
    build(stage.source, SIZE, [(0, noise("all of it", SIZE))])
    stage.attempted = stage.source.read_bytes()
    client = stage.start_client("--bwlimit", LIMIT)
    until(lambda: stage.server.bytes_written() >= SIZE * 9 // 10, "nine tenths are written")
    if victim == "server":
        stage.server.kill()
        assert finish(client).status == 1
    else:
        client.kill()
        assert finish(client).status == KILLED
        stage.server.kill()
    work = stage.directory / "work.img"
    arrived = work.read_bytes()
    missing = differing_blocks(arrived, stage.attempted)
    incomplete = {block * BLOCK // REGION for block in missing}
    stage.server.start()
    await stage.verify()
    report = await stage.sync()
    await stage.verify_rest()
    sent = report["bytes"]["data_sent"]
    print(f"{victim}: {sent} of {SIZE} bytes sent again, {len(missing) * BLOCK} had not arrived")
    assert len(missing) * BLOCK <= sent <= len(incomplete) * REGION
    assert sent <= SIZE // 8
