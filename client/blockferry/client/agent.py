"""The agent: carries out policies for years.

One named task for each run (schedule.py decides which, cycle.py does it). Nothing a run does reaches another one: each
has its own part of the bytes in flight, so that a destination that stands still holds up only its own, and all send
within one bandwidth. What must outlive the process is in memory.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog
from blockferry.client import cycle
from blockferry.client.memory import Clock, Failure, Memory, Moment, Outcome, StateDirectory
from blockferry.client.report import Phase, Progress
from blockferry.client.schedule import Run, Schedule, Standing, Terms
from blockferry.common.agent_config import AgentConfig, Policy
from blockferry.common.errors import BlockferryError, Code, first_of, from_os_error
from blockferry.common.flow import ByteBudget, RateLimiter
from blockferry.common.tasks import Supervisor
from blockferry.common.units import parse_window
from blockferry.common.volumes.volume import in_thread

log = structlog.get_logger("blockferry.agent")

TICK_SECONDS = 1.0
"""A missed RPO is noticed within this time, and so is a window that opens, also after the clock was set."""

Report = dict[str, Any]
"""Of a sync, schema 1."""


Cycle = Callable[[Sequence[cycle.Member], cycle.Terms], Awaitable[Mapping[str, Report]]]
"""Replicates the members of a run, all or none, and returns the report of each: `cycle.run_cycle`."""


Recover = Callable[[Sequence[cycle.Member], cycle.Terms], Awaitable[None]]
"""Puts right what a crash has left: `cycle.recover`."""


class Watcher:
    """Is told what becomes of runs. Nothing it does may wait."""

    def begun(self, name: str) -> None:
        """A run of a policy has begun."""

    def committed(self, name: str, report: Report, seconds: float) -> None:
        """It was committed."""

    def failed(self, name: str, error: BlockferryError, seconds: float) -> None:
        """It was not."""


@dataclass
class Watched:
    """A policy, and what is known of it."""

    name: str
    policy: Policy
    memory: Memory
    limiter: RateLimiter
    progress: Progress | None = None
    """While it runs."""
    began_wall: float = 0.0
    runs_begun: int = 0
    runs_ended: int = 0
    missed: bool = False
    """As it was last seen."""
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    alarm: asyncio.Task[Any] | None = None
    """The failure hook at work."""
    _phase: Phase | None = None
    _since: float = 0.0
    _base: int = 0

    def pace(self, now: float) -> tuple[Phase | None, float, float | None]:
        """The phase at work, its bytes per second so far, and the seconds it has left, if anybody can tell."""
        phase = self.progress.phases[-1] if self.progress and self.progress.phases else None
        if phase is None:
            return None, 0.0, None
        if phase is not self._phase:
            self._phase, self._since, self._base = phase, now, phase.done
        passed = now - self._since
        rate = (phase.done - self._base) / passed if passed > 0 else 0.0
        return phase, rate, (phase.total - phase.done) / rate if rate > 0 and phase.total else None


Alarm = Callable[[Watched, Mapping[str, str]], Awaitable[None]]
"""Runs the failure hook of a policy with this in its environment; bounded in time."""


class Agent:
    """All policies of a configuration. Use `open`, run `run` until the end, and close the state directory after it."""

    def __init__(
        self,
        config: AgentConfig,
        state: StateDirectory,
        run_cycle: Cycle,
        supervisor: Supervisor,
        *,
        alarm: Alarm,
        recover: Recover | None = None,
        watcher: Watcher | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self.clock = clock or Clock()
        self._state = state
        self._cycle = run_cycle
        self._supervisor = supervisor
        self._alarm = alarm
        self._recover = recover
        self._watcher = watcher or Watcher()
        self._schedule = Schedule(config.limits.transfers, random.randrange(1 << 32))
        self._bandwidth = RateLimiter(config.limits.bandwidth)
        self._in_flight = ByteBudget(config.limits.bytes_in_flight)
        self.policies: dict[str, Watched] = {}
        self._wake = asyncio.Event()
        self._watching: set[asyncio.Event] = set()
        self._ending = False

    @classmethod
    async def open(
        cls,
        config: AgentConfig,
        state: StateDirectory,
        run_cycle: Cycle,
        supervisor: Supervisor,
        *,
        alarm: Alarm,
        recover: Recover | None = None,
        watcher: Watcher | None = None,
        clock: Clock | None = None,
    ) -> Agent:
        """With what is remembered."""
        agent = cls(config, state, run_cycle, supervisor, alarm=alarm, recover=recover, watcher=watcher, clock=clock)
        await agent.reload(config)
        return agent

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Put right what a crash has left, then begin what is due, for ever."""
        await asyncio.gather(*(self._recovered(one) for one in self.policies.values()))
        while True:
            now = self.clock.now()
            if not self._ending:
                for run in self._schedule.start(now, self.clock.minute()):
                    self._begin(run)
            self._look_at_rpos(now)
            wake = None if self._ending else self._schedule.wake()
            pause = TICK_SECONDS if wake is None else min(max(wake - now, 0.0), TICK_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()

    async def _recovered(self, one: Watched) -> None:
        """A guest that was frozen is thawed at once, also if its next run is far away."""
        if self._recover is None:
            return
        try:
            member = cycle.Member(one.name, one.policy, one.limiter)
            await self._recover([member], cycle.Terms(self._state.path))
        except (BlockferryError, OSError) as error:
            log.error("cannot put right what the last agent has left", policy=one.name, error=str(error))

    def _begin(self, run: Run) -> None:
        wall = self.clock.wall()
        for name in run.members:
            watched = self.policies[name]
            watched.progress, watched.began_wall = Progress(), wall
            watched.runs_begun += 1
            self._watcher.begun(name)
        # They are what they are now, whatever is reloaded meanwhile.
        members = [self.policies[name] for name in run.members]
        self._supervisor.work(f"run of {', '.join(run.members)}", self._carry_out(run, members))
        self._notify()

    async def _carry_out(self, run: Run, members: Sequence[Watched]) -> None:
        taking_part = [cycle.Member(one.name, one.policy, one.limiter, one.progress or Progress()) for one in members]
        config = self.config
        # With less than it needs a run would crawl: rather fewer at once.
        part = max(config.limits.bytes_in_flight // config.limits.transfers, cycle.LEAST_IN_FLIGHT * len(members))
        reports: Mapping[str, Report] = {}
        error: BlockferryError | None = None
        try:
            await self._in_flight.acquire(part)
            try:
                terms = cycle.Terms(self._state.path, self._bandwidth, part, config.insecure, config.tls)
                reports = await self._cycle(taking_part, terms)
            finally:
                self._in_flight.release(part)
        except Exception as caught:
            error = _understood(caught, members)
        finally:
            # Also where it was cancelled: nothing else would ever begin in its place.
            now = self.clock.now()
            self._schedule.finished(run, now, committed=bool(reports))
            for one in members:
                one.progress = None
                one.runs_ended += 1
            self._wake.set()
            self._notify()
        # Whoever looks sees that it is over and what came of it, for all members, or nothing of that.
        for one in members:
            if error is None:
                self._note_commit(one, run, reports[one.name], now - run.begun)
            else:
                self._note_failure(one, error, now - run.begun)
        for one in members:
            await self._remember(one)

    def _note_commit(self, one: Watched, run: Run, report: Report, seconds: float) -> None:
        moment = Moment.at(self.clock, run.begun)
        before = one.memory.committed
        interval = max(0.0, run.begun - before.on(self.clock)) if before is not None else 0.0
        moved = report.get("bytes", {})
        outcome = Outcome(
            wall=moment.wall,
            seconds=seconds,
            generation=report["generation"],
            commit_id=report["commit_id"],
            volume_size=report.get("volume_size", 0),
            interval=interval,
            full=report.get("full_compare") or "",
            **{name: moved.get(name, 0) for name in ("data_sent", "source_read", "wire_sent", "unmapped")},
        )
        self._watcher.committed(one.name, report, seconds)
        if one.memory.failure is not None:
            log.info("works again", policy=one.name, generation=outcome.generation)
        one.memory = msgspec.structs.replace(one.memory, committed=moment, last=outcome, failure=None)

    def _note_failure(self, one: Watched, error: BlockferryError, seconds: float) -> None:
        failure = Failure.of(error, self.clock.wall())
        self._watcher.failed(one.name, error, seconds)
        log.warning("failed", policy=one.name, **{name: value for name, value in error.fields().items() if value})
        one.memory = msgspec.structs.replace(one.memory, failure=failure)
        self._sound(one, "run-failed", failure)

    async def _remember(self, one: Watched) -> None:
        """A disk that does not take it costs what is remembered over a restart, no more."""
        if self.policies.get(one.name, one) is not one:
            # Another pair of volumes has the name now.
            return
        try:
            await self._keep(one)
        except BlockferryError as error:
            log.error("cannot be remembered", policy=one.name, error=error.line(), next="make room in state_dir")

    async def _keep(self, one: Watched) -> None:
        async with one.saving:
            await in_thread(self._state.save, one.name, one.memory)

    # --- what went wrong --------------------------------------------------------------------------------------------

    def _look_at_rpos(self, now: float) -> None:
        minute = self.clock.minute()
        for name, one in self.policies.items():
            standing = self._schedule.standing(name, now, minute)
            if standing.missed == one.missed:
                continue
            one.missed = standing.missed
            seconds = round(standing.lag, 1)
            if standing.missed:
                log.warning("RPO missed", policy=name, lag=seconds, rpo=one.policy.rpo, state=standing.state.value)
                self._sound(one, "rpo-missed", one.memory.failure)
            else:
                log.info("RPO kept again", policy=name, lag=seconds, rpo=one.policy.rpo)
            self._notify()

    def _sound(self, one: Watched, event: str, failure: Failure | None) -> None:
        """Start the failure hook, unless it still runs: a hook that hangs must not gather others behind it."""
        if not one.policy.hooks.failure or self._ending:
            return
        if one.alarm is not None and not one.alarm.done():
            log.warning("failure hook is still at work", policy=one.name, skipped=event)
            return
        standing = self.standing(one.name) if self.policies.get(one.name) is one else None
        environment = {
            "BLOCKFERRY_EVENT": event,
            "BLOCKFERRY_POLICY": one.name,
            "BLOCKFERRY_GROUP": one.policy.group or "",
            "BLOCKFERRY_SOURCE": one.policy.source,
            "BLOCKFERRY_DESTINATION": one.policy.destination,
            "BLOCKFERRY_RPO": str(one.policy.rpo),
            "BLOCKFERRY_LAG": f"{standing.lag:.0f}" if standing else "",
            "BLOCKFERRY_RPO_MISSED": str(int(standing.missed)) if standing else "",
            "BLOCKFERRY_FAILURES": str(standing.failures) if standing else "",
            "BLOCKFERRY_CODE": failure.code if failure else "",
            "BLOCKFERRY_ERROR": failure.line if failure else "",
            "BLOCKFERRY_NEXT": failure.next if failure else "",
        }
        one.alarm = self._supervisor.work(f"failure hook of {one.name}", self._alarm_of(one, environment))

    async def _alarm_of(self, one: Watched, environment: Mapping[str, str]) -> None:
        try:
            await self._alarm(one, environment)
        except BlockferryError as error:
            log.error("failure hook failed", policy=one.name, error=error.line())

    # --- what people ask for ----------------------------------------------------------------------------------------

    def find(self, name: str) -> Watched:
        """Raises NOT_FOUND."""
        if name not in self.policies:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"there is no policy {name}",
                cause=f"this agent has {', '.join(self.policies) or 'none'}",
                next="list them with blockferry agent status",
            )
        return self.policies[name]

    def standing(self, name: str) -> Standing:
        """Where a policy stands now."""
        return self._schedule.standing(name, self.clock.now(), self.clock.minute())

    def sync(self, name: str) -> int:
        """Have a policy, and its group, replicated now; the run is over when its `runs_ended` is more than what is
        returned. Raises NOT_FOUND and WRONG_STATE."""
        one = self.find(name)
        paused = self._schedule.request(name)
        if paused:
            raise BlockferryError(
                Code.WRONG_STATE,
                f"{name} is not replicated",
                cause=f"{', '.join(paused)} is paused",
                next=f"resume it: blockferry agent resume {paused[0]}",
            )
        self._wake.set()
        self._notify()
        return one.runs_begun

    async def pause(self, name: str) -> None:
        """Begin nothing more of a policy and its group; durable when this returns. Raises NOT_FOUND, and what a full
        disk raises."""
        one = self.find(name)
        self._schedule.pause(name)
        one.memory = msgspec.structs.replace(one.memory, paused=True)
        self._notify()
        await self._keep(one)

    async def resume(self, name: str) -> None:
        """Go on. As `pause`."""
        one = self.find(name)
        self._schedule.resume(name)
        one.memory = msgspec.structs.replace(one.memory, paused=False)
        self._wake.set()
        self._notify()
        await self._keep(one)

    async def reload(self, config: AgentConfig) -> None:
        """Take up another configuration. What runs goes on under what it began with; bandwidth counts at once."""
        fresh = [name for name, policy in config.policy.items() if not self._is_same(name, policy)]
        remembered = await in_thread(lambda: {name: self._state.load(name) for name in fresh})
        policies: dict[str, Watched] = {}
        for name, policy in config.policy.items():
            one = self.policies.get(name)
            if one is None or not self._is_same(name, policy):
                memory = Memory(policy.source, policy.destination)
                known = remembered.get(name)
                if known is not None and (known.source, known.destination) == (policy.source, policy.destination):
                    memory = known
                elif known is not None:
                    # Whoever paused it meant the policy.
                    memory = msgspec.structs.replace(memory, paused=known.paused)
                one = Watched(name, policy, memory, RateLimiter(policy.bandwidth))
            one.policy = policy
            one.limiter.rate = policy.bandwidth
            policies[name] = one
        limits = config.limits
        self._bandwidth.rate = limits.bandwidth
        self._in_flight.limit = limits.bytes_in_flight
        # Whoever waits for room may have it now.
        self._in_flight.release(0)
        before, self.policies, self.config = self.policies, policies, config
        now = self.clock.now()
        self._schedule.update({name: _terms(one.policy) for name, one in policies.items()}, now, limits.transfers)
        for name, one in policies.items():
            if before.get(name) is not one:
                moment = one.memory.committed
                committed = moment.on(self.clock) if moment is not None else None
                self._schedule.restore(name, committed, paused=one.memory.paused)
        self._wake.set()
        self._notify()

    def _is_same(self, name: str, policy: Policy) -> bool:
        one = self.policies.get(name)
        return one is not None and _identity(one.policy) == _identity(policy)

    # --- watching ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever anything has changed; clear it before looking."""
        event = asyncio.Event()
        self._watching.add(event)
        try:
            yield event
        finally:
            self._watching.discard(event)

    def _notify(self) -> None:
        for event in self._watching:
            event.set()

    # --- the end ----------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Begin nothing more."""
        self._ending = True


def _identity(policy: Policy) -> str:
    return f"{policy.source} -> {policy.destination}"


def _terms(policy: Policy) -> Terms:
    return Terms(_identity(policy), policy.rpo, policy.priority, parse_window(policy.window), policy.group)


def _understood(error: Exception, members: Sequence[Watched]) -> BlockferryError:
    """The error of a run, with what an agent knows about it."""
    what = f"{', '.join(one.name for one in members)} cannot be replicated"
    if isinstance(error, ExceptionGroup):
        matching = error.subgroup(BlockferryError)
        error = first_of(matching) if matching is not None else error
    if isinstance(error, OSError):
        error = from_os_error(error, what)
    if not isinstance(error, BlockferryError):
        log.error("bug", exc_info=error)
        return BlockferryError(Code.INTERNAL, what, cause=repr(error), next="report this")
    replicas = {one.policy.address.volume for one in members}
    if error.code in (Code.STALE_EPOCH, Code.IN_USE) and error.volume in replicas:
        # Nobody but its agent should write to a replica.
        error.next = f"{error.next}; if that is another agent with this policy, stop one of them".removeprefix("; ")
    return error
