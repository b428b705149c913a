"""Archivers killed at random instants: BLOCKFERRY_SOAK_KILLS of them (default 2000) from BLOCKFERRY_SOAK_SEED."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.fault.test_archive_crashes import Host, after_death

KILLS = int(os.environ.get("BLOCKFERRY_SOAK_KILLS", "2000"))
SEED = int(os.environ.get("BLOCKFERRY_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


@pytest.mark.timeout(0)
async def test_archivers_killed_at_random(tmp_path: Path) -> None:
    print(f"BLOCKFERRY_SOAK_SEED={SEED}")
    rng = random.Random(SEED)
    killed = missed = 0
    longest = 0.5
    while killed < KILLS:
        host = Host(tmp_path / f"{killed + missed}")
        snapshot_id = rng.choice(["", "one"])
        began = time.monotonic()
        process = host.start(snapshot_id)
        await asyncio.sleep(rng.uniform(0, longest))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            missed += 1
            # Most of the time the run lasts should be hit.
            longest = max(0.05, 0.9 * longest + 0.1 * (time.monotonic() - began) * 0.9)
        else:
            killed += 1
            await after_death(host, snapshot_id)
        shutil.rmtree(host.directory)
    print(f"{killed} kills survived; {missed} runs were over before")
