"""Kills at random instants by the thousand: BLOCKFERRY_SOAK_KILLS of them (default 2000) from BLOCKFERRY_SOAK_SEED.

Half of them on a file system that can clone, half on one where updates go through a journal.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.fault.kills import campaign
from tests.fault.stage import plain_xfs, stages

KILLS = int(os.environ.get("BLOCKFERRY_SOAK_KILLS", "2000"))
SEED = int(os.environ.get("BLOCKFERRY_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


@pytest.mark.timeout(0)
async def test_killed_at_random_on_clones(xfs_pool_root: Path, tmp_path: Path) -> None:
    print(f"BLOCKFERRY_SOAK_SEED={SEED}")
    with stages(tmp_path) as make:
        done = await campaign(lambda: make(xfs_pool_root), SEED, KILLS // 2)
    print(done)
    assert done.total == KILLS // 2


@pytest.mark.timeout(0)
async def test_killed_at_random_with_a_journal(xfs_pool_root: Path, tmp_path: Path) -> None:
    print(f"BLOCKFERRY_SOAK_SEED={SEED}")
    base = tmp_path / "plain"
    base.mkdir()
    with plain_xfs(base) as root, stages(tmp_path) as make:
        done = await campaign(lambda: make(root, clones=False), SEED, KILLS // 2)
    print(done)
    assert done.total == KILLS // 2
