"""An agent without volumes: its cycles do what the test says, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockferry.client.agent import Agent, Report, Watched
from blockferry.client.agent_metrics import Meters, Standings
from blockferry.client.cycle import Member, Terms
from blockferry.client.memory import Clock, StateDirectory
from blockferry.common.agent_config import AgentConfig, AgentLimits, Policy
from blockferry.common.errors import BlockferryError
from blockferry.common.metrics import new_registry
from blockferry.common.tasks import Supervisor
from prometheus_client import CollectorRegistry

WAIT_SECONDS = 10.0
"""A bound on what takes no time."""

REPORT: Report = {
    "volume_size": 3 << 20,
    "region_size": 1 << 20,
    "regions": {"skip": 1, "unmap": 0, "send": 1, "compare": 1},
    "bytes": {
        "source_read": 2 << 20,
        "destination_read": 1 << 20,
        "destination_written": 4096,
        "data_sent": 4096,
        "wire_sent": 5000,
        "wire_received": 300,
        "unmapped": 0,
    },
    "seconds": {"total": 2.0, "map": 0.5, "transfer": 1.0, "commit": 0.5},
    "full_compare": None,
}


class FakeClock(Clock):
    """Moves when the test says so."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.offset = 50_000.0
        self.at_minute = 12 * 60
        self.boot_id = "first"

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time + self.offset

    def minute(self) -> int:
        return self.at_minute

    def boot(self) -> str:
        return self.boot_id


@dataclass
class Call:
    """A cycle that has begun, and how it is to end."""

    names: tuple[str, ...]
    members: Sequence[Member]
    terms: Terms
    answer: asyncio.Future[dict[str, Any]]
    cancelled: bool = False

    def commit(self, **said: Any) -> None:
        """Let it end well."""
        self.answer.set_result(said)

    def fail(self, error: BaseException) -> None:
        """Let it fail."""
        self.answer.set_exception(error)


@dataclass
class Stage:
    """An agent at work, and what it does."""

    agent: Agent
    clock: FakeClock
    supervisor: Supervisor
    registry: CollectorRegistry
    calls: list[Call]
    alarms: list[Mapping[str, str]]
    incidents: list[str]
    alarm_lasts: asyncio.Event = field(default_factory=asyncio.Event)

    async def pass_time(self, seconds: float = 0.0, minute: int | None = None) -> None:
        """Move the clock and let everything happen that happens then."""
        self.clock.time += seconds
        if minute is not None:
            self.clock.at_minute = minute
        self.agent._wake.set()
        await settled()

    async def begun(self, *names: str) -> Call:
        """Wait for a cycle of these policies that is at work."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                for call in self.calls:
                    if call.names == names and not call.answer.done():
                        return call
                await asyncio.sleep(0.001)

    async def ended(self, call: Call) -> None:
        """Wait until what became of a cycle is known, and remembered."""
        name = f"run of {', '.join(call.names)}"
        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.wait([task for task in asyncio.all_tasks() if task.get_name() == name])
        await asyncio.sleep(0)

    async def commit(self, *names: str, **said: Any) -> None:
        """Let the cycle of these policies that is at work end well."""
        call = await self.begun(*names)
        call.commit(**said)
        await self.ended(call)

    async def fail(self, *names: str, error: BaseException) -> None:
        """Let it fail."""
        call = await self.begun(*names)
        call.fail(error)
        await self.ended(call)

    def at_work(self) -> list[tuple[str, ...]]:
        """Cycles that have begun and not ended."""
        return [call.names for call in self.calls if not call.answer.done()]


async def settled() -> None:
    """Let tasks that can go on do so, threads included."""
    for _ in range(5):
        await asyncio.sleep(0.002)


def policy(name: str, **said: Any) -> Policy:
    """A policy of this name, with an RPO of 100 s."""
    return Policy(**{"source": f"/srv/{name}", "destination": f"grpc://127.0.0.1:1/{name}", "rpo": 100, **said})


def config(directory: Path, *, limits: AgentLimits | None = None, **policies: Policy) -> AgentConfig:
    """With state in a directory."""
    return AgentConfig(state_dir=directory / "state", policy=policies, limits=limits or AgentLimits())


@contextlib.asynccontextmanager
async def staged(configured: AgentConfig, clock: FakeClock | None = None) -> AsyncIterator[Stage]:
    """An agent that runs until the end of the body."""
    calls: list[Call] = []
    alarms: list[Mapping[str, str]] = []
    incidents: list[str] = []
    supervisor = Supervisor(lambda name, error: incidents.append(f"{name}: {error!r}"))
    state = StateDirectory(configured.state_dir)
    registry = new_registry()
    alarm_ends = asyncio.Event()
    alarm_ends.set()

    async def cycle(members: Sequence[Member], terms: Terms) -> Mapping[str, Report]:
        names = tuple(member.name for member in members)
        call = Call(names, members, terms, asyncio.get_running_loop().create_future())
        calls.append(call)
        try:
            said = await call.answer
        except asyncio.CancelledError:
            call.cancelled = True
            raise
        return {name: {**REPORT, "generation": len(calls), "commit_id": f"{len(calls):032x}", **said} for name in names}

    async def alarm(_: Watched, environment: Mapping[str, str]) -> None:
        alarms.append(environment)
        await alarm_ends.wait()

    clock = clock or FakeClock()
    agent = await Agent.open(configured, state, cycle, supervisor, alarm=alarm, watcher=Meters(registry), clock=clock)
    Standings(agent, registry)
    supervisor.service("schedule", agent.run())
    stage = Stage(agent, clock, supervisor, registry, calls, alarms, incidents, alarm_ends)
    try:
        await settled()
        yield stage
    finally:
        agent.end()
        await supervisor.cancel(WAIT_SECONDS)
        state.close()


def broken(code: Any, what: str = "it does not work", **fields: Any) -> BlockferryError:
    """An error of a cycle."""
    return BlockferryError(code, what, cause="because", next="do something", **fields)
