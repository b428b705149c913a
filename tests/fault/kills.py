"""Kills at random instants, as many as somebody asks for: of the server or the client, during first syncs, updates and
commits. After each one everything that must hold is checked, and the next sync succeeds."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from blockferry.common.errors import BlockferryError, Code

from tests.fault.stage import KILLED, Stage
from tests.support import finish

KILLS_PER_POOL = 50
"""Then a new server on a new pool: the old ones would fill the disk."""

KILLS_PER_VOLUME = 4
"""Every so often a replica is new, and its first sync is what is killed."""

POLL_SECONDS = 0.002


@dataclass
class Campaign:
    """What came of it: kills by victim, kind of sync and whether its commit had happened."""

    kills: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    missed: int = 0
    """Syncs that were over before their time."""

    @property
    def total(self) -> int:
        """All kills."""
        return sum(self.kills.values())

    def __str__(self) -> str:
        parts = [f"{count} {' '.join(kind)}" for kind, count in sorted(self.kills.items())]
        return f"{self.total} kills survived ({', '.join(parts)}); {self.missed} syncs were over before"


async def campaign(make_stage: Callable[[], Stage], seed: int, kills: int) -> Campaign:
    """Kill until `kills` have hit."""
    rng = random.Random(seed)
    done = Campaign()
    durations = {"server": 0.2, "client": 0.5}
    stage: Stage | None = None
    while done.total < kills:
        attempt = done.total + done.missed
        if stage is None or attempt % KILLS_PER_POOL == 0:
            if stage is not None:
                stage.server.kill()
            stage = make_stage()
            stage.server.start()
        elif attempt % KILLS_PER_VOLUME == 0:
            stage = stage.beside()
        victim = rng.choice(("server", "client"))
        kind = "update" if stage.contents else "first"
        before = stage.newest
        stage.change_source()
        delay = rng.uniform(0, durations[victim])
        took = await (_kill_server(stage, delay) if victim == "server" else _kill_client(stage, delay))
        if took is not None:
            done.missed += 1
            # What a sync takes here and now: kills are spread over all of it.
            durations[victim] = 0.5 * durations[victim] + 0.5 * took
            continue
        await stage.verify()
        done.kills[victim, kind, "committed" if stage.newest > before else "not committed"] += 1
        await _next_sync(stage)
    if stage is not None:
        stage.server.kill()
    return done


async def _kill_server(stage: Stage, delay: float) -> float | None:
    """Kill the server `delay` seconds into a sync; the next one starts at once. The seconds the sync took if it was
    over before."""
    began = time.monotonic()
    killer = asyncio.create_task(_later(stage, delay))
    death = await stage.survive(stage.sync())
    took = time.monotonic() - began
    killer.cancel()
    if death is None:
        return took
    assert death.status == KILLED
    return None


async def _later(stage: Stage, delay: float) -> None:
    await asyncio.sleep(delay)
    stage.server.shoot()


async def _kill_client(stage: Stage, delay: float) -> float | None:
    """Kill a client `delay` seconds after it has its session, however long this machine takes to start one. The seconds
    it went on if it was over before."""
    before = stage.session_mark()
    client = stage.start_client()
    took = await asyncio.to_thread(_kill_in_session, stage, client, before, delay)
    done = await asyncio.to_thread(finish, client)
    if done.status == KILLED:
        return None
    assert done.status == 0, done.stderr
    stage.answered(json.loads(done.stdout))
    return took


def _kill_in_session(stage: Stage, client: subprocess.Popen[str], before: int, delay: float) -> float:
    while client.poll() is None and stage.session_mark() == before:
        time.sleep(POLL_SECONDS)
    began = time.monotonic()
    while client.poll() is None and time.monotonic() - began < delay:
        time.sleep(POLL_SECONDS)
    took = time.monotonic() - began
    client.kill()
    return took


async def _next_sync(stage: Stage) -> None:
    try:
        await stage.verify_next()
    except BlockferryError as error:
        if error.code is not Code.IN_USE:
            raise
        # A dead client's lease: nobody has to wait for it once the server is another one.
        stage.server.kill()
        await asyncio.to_thread(stage.server.start)
        await stage.sync()
        await stage.verify_rest()
