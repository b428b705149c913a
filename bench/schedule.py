"""A month of scheduling: 200 policies with an RPO of 60 s, some without a destination, on a clock that is not waited
for."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from dataclasses import dataclass
from typing import Any

from blockferry.client.schedule import Run, Schedule, Terms

NAME = "schedule"

UNREACHABLE_SECONDS = 20.0
"""A destination that does not answer is given up after this long."""


@dataclass
class Simulated:
    """What a simulation saw. `worst_interval`: seconds from start to start of a policy whose destination is there;
    `missed`: how often that was more than the RPO."""

    cycles: int = 0
    failures: int = 0
    worst_interval: float = 0.0
    missed: int = 0


SETTLED_SECONDS = 300.0
"""All begin at once; after a few rounds they have spread."""


def simulate(policies: int, rpo: float, transfers: int, seconds: float, unreachable: int) -> Simulated:
    """Let policies run for so many seconds; a cycle takes 0.2 to 1.4 s, by chance."""
    chance = random.Random(1)
    schedule = Schedule(transfers)
    schedule.update({f"policy-{number}": Terms("x", rpo) for number in range(policies)}, 0.0)
    dead = {f"policy-{number}" for number in range(0, policies, policies // unreachable)} if unreachable else set()
    found = Simulated()
    last: dict[str, float] = {}
    ends: list[tuple[float, int, Run]] = []
    ties = itertools.count()
    now = 0.0
    while now < seconds:
        for run in schedule.start(now, int(now // 60) % 1440):
            (name,) = run.members
            takes = UNREACHABLE_SECONDS if name in dead else 0.2 + 1.2 * chance.random()
            heapq.heappush(ends, (now + takes, next(ties), run))
            if name in dead:
                continue
            before = last.get(name)
            last[name] = now
            if before is not None and before > SETTLED_SECONDS:
                found.worst_interval = max(found.worst_interval, now - before)
                found.missed += now - before > rpo
        wake = schedule.wake()
        if ends and (wake is None or ends[0][0] <= wake or len(ends) >= transfers):
            now, _, run = heapq.heappop(ends)
            committed = run.members[0] not in dead
            schedule.finished(run, now, committed=committed)
            found.cycles += committed
            found.failures += not committed
        else:
            assert wake is not None
            now = max(now, wake)
    return found


def measure() -> dict[str, Any]:
    """A month with all destinations there, and some days with one of twenty missing."""
    rows = []
    broken = []
    for unreachable, days in ((0, 30), (10, 3)):
        began = time.process_time()
        found = simulate(200, 60.0, 8, days * 86400.0, unreachable)
        took = time.process_time() - began
        rows.append(
            {
                "days": days,
                "unreachable": unreachable,
                "cycles": found.cycles,
                "failed": found.failures,
                "seconds": round(took, 1),
                "µs_each": round(took / (found.cycles + found.failures) * 1e6, 1),
                "worst_interval": round(found.worst_interval, 1),
                "missed": found.missed,
            }
        )
        if found.missed:
            broken.append(f"{found.missed} of {found.cycles} cycles began after more than their RPO")
    return {
        "name": NAME,
        "title": "A month of 200 policies with an RPO of 60 s, scheduled",
        "rows": rows,
        "summary": "seconds: of one processor for all of it; worst interval: from start to start, in seconds",
        "broken": broken,
    }
