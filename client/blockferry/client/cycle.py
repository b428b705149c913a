"""One replication of a policy, or of the policies of a group together: a policy by itself is a group of one.

    freeze all ─ snapshot all ─ thaw all ─ find changes ─ open sessions ─ transfer all ─ commit all by one call
                                                                                              │
                                                confirm ─ the new snapshots are the bases, the older ones go

Nothing is committed unless all of it is, and whatever fails leaves the generations, the bases and the sources as they
were. The next cycle begins with what this one, or a crash of it, has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from blockferry.client.quiescence import Mark, look, refuse_changed
from blockferry.client.report import Progress
from blockferry.client.snapshots import Record, Snapshots, mint
from blockferry.client.sync import Syncing, SyncOptions, commit_all
from blockferry.client.tracking import Tracked
from blockferry.client.transfer import BYTES_IN_FLIGHT
from blockferry.client.watchdog import watched
from blockferry.common.agent_config import Policy
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code, first_of
from blockferry.common.flow import RateLimiter
from blockferry.common.settings import Tls
from blockferry.common.volumes import Volume, open_volume

log = structlog.get_logger("blockferry.cycle")

ATTEMPTS = 3
"""How often a source that should be at rest, and is not, is replicated anew before that is an error."""

FLOOR_SECONDS = 1.0
"""Between two looks at how much is free on the source's file system: at 1 GB/s a guest writes a fraction of the default
floor meanwhile."""

RESUMED = (Code.UNAVAILABLE, Code.LIMITED, Code.STALE_EPOCH)
"""After these a first replication goes on with the snapshot that it has: what went wrong was on the way, or there."""

LEAST_IN_FLIGHT = 16 * 1024 * 1024
"""Bytes: with fewer a member of a large group would send region by region."""


@dataclass(frozen=True)
class Member:
    """A policy that takes part. `limiter` is its own bandwidth, which may be changed while it runs."""

    name: str
    policy: Policy
    limiter: RateLimiter | None = None
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Terms:
    """What all cycles of an agent have in common. `bandwidth` is what they share; it may be changed while they run."""

    state_directory: Path
    bandwidth: RateLimiter | None = None
    bytes_in_flight: int = BYTES_IN_FLIGHT
    """Bytes, of the members of a cycle together."""
    insecure: bool = False
    tls: Tls | None = None


_Work = Coroutine[object, object, None]

Reports = dict[str, dict[str, Any]]
"""By policy: the report of its sync (schema 1), with `policy`, `snapshot` and `attempts`."""


async def run_cycle(members: Sequence[Member], terms: Terms) -> Reports:
    """Replicate the members together, once; what came of it. Raises what kept it from being committed: then no member
    has a new generation, or, where the answer to the commit was lost, all have it and the next cycle goes on from
    there."""
    _refuse_apart(members)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await _Cycle(members, terms, attempt).run()
        except BlockferryError as error:
            if error.code is not Code.SOURCE_CHANGED or attempt == ATTEMPTS:
                raise
            log.warning("the source changed while it was read; once more", error=str(error), attempt=attempt)
    raise AssertionError


async def recover(members: Sequence[Member], terms: Terms) -> None:
    """Put right what a crash has left, without replicating: sources are thawed, and half-made snapshots removed. To be
    called when an agent starts. Raises CORRUPT_STATE, HOOK."""
    for member in members:
        await Snapshots(member.name, member.policy, terms.state_directory).recover()


def _refuse_apart(members: Sequence[Member]) -> None:
    places = {(one.policy.address.target, one.policy.address.tls) for one in members}
    volumes = {one.policy.address.volume for one in members}
    if len(places) != 1 or len(volumes) != len(members):
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"cannot replicate {', '.join(one.name for one in members)} together",
            cause="they go to different servers" if len(places) != 1 else "two of them go to the same replica",
            next="a group is committed by one server, each member to a replica of its own",
        )


@dataclass
class _Part:
    """What the cycle knows of one member."""

    member: Member
    snapshots: Snapshots
    commit_id: str
    record: Record | None = None
    source: Volume | None = None
    before: Mark | None = None
    """What a source without snapshots looked like."""
    tracked: list[Tracked] = field(default_factory=list)
    syncing: Syncing | None = None
    frozen_seconds: float = 0.0
    confirmed: bool = False

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def policy(self) -> Policy:
        return self.member.policy

    def looks(self) -> object:
        """What moves while there is progress."""
        phases = self.member.progress.phases
        tally = self.syncing.tally if self.syncing is not None else None
        moved = (tally.source_read, tally.destination_read, tally.destination_written) if tally is not None else ()
        return len(phases), phases[-1].done if phases else 0, moved

    def phase(self) -> str:
        """What it is at, for people."""
        phases = self.member.progress.phases
        return phases[-1].name if phases else "start"


class _Cycle:
    """One attempt."""

    def __init__(self, members: Sequence[Member], terms: Terms, attempt: int) -> None:
        self._terms = terms
        self._attempt = attempt
        self._parts = [_Part(one, Snapshots(one.name, one.policy, terms.state_directory), mint()) for one in members]

    async def run(self) -> Reports:
        """All of it."""
        for part in self._parts:
            part.member.progress.start("snapshot")
            await part.snapshots.recover()
            await part.snapshots.check_floor()
        try:
            if not self._take_up():
                await self._take_all()
            async with contextlib.AsyncExitStack() as held:
                await self._open_all(held)
                await self._transfer_all()
                await self._commit_all()
                reports = {part.name: self._report(part) for part in self._parts}
        except BaseException as error:
            await self._forsake(error)
            raise
        for part in self._parts:
            # Nobody reads it any more.
            if part.record is not None:
                await part.snapshots.confirmed(part.record)
            reports[part.name]["warning"] = _joined(reports[part.name]["warning"], part.snapshots.warnings)
        return reports

    # --- snapshots ------------------------------------------------------------------------------------------------

    def _take_up(self) -> bool:
        """Go on with what was taken for a first replication that was interrupted, if all members have it still."""
        found = [record for part in self._parts if (record := part.snapshots.unfinished()) is not None]
        if len(found) < len(self._parts) or len({record.cycle for record in found}) > 1:
            return False
        for part, record in zip(self._parts, found, strict=True):
            part.record, part.commit_id = record, record.commit_id
        return True

    async def _take_all(self) -> None:
        """Freeze all, snapshot all, thaw all. Whatever happens, what freezing was tried on is thawed, once."""
        began = time.monotonic()
        try:
            for part in self._parts:
                await part.snapshots.freeze(part.commit_id)
            await _together([self._take(part) for part in self._parts if part.policy.snapshot != "none"])
        except BaseException:
            with contextlib.suppress(BlockferryError):
                # Why it was not taken is what people must know first; that it may be frozen still is in the journal.
                await self._thaw_all()
            raise
        await self._thaw_all()
        for part in self._parts:
            part.frozen_seconds = round(time.monotonic() - began, 3)

    async def _take(self, part: _Part) -> None:
        part.record = await part.snapshots.take(part.commit_id, self._parts[0].commit_id)

    async def _thaw_all(self) -> None:
        outcomes = await asyncio.gather(*(part.snapshots.thaw() for part in self._parts), return_exceptions=True)
        for part, outcome in zip(self._parts, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                log.error("the source may still be frozen", volume=part.name, error=str(outcome))
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _forsake(self, error: BaseException) -> None:
        resumed = isinstance(error, asyncio.CancelledError)
        resumed = resumed or (isinstance(error, BlockferryError) and error.code in RESUMED)
        for part in self._parts:
            if part.record is not None and not part.confirmed:
                syncing = part.syncing
                first = syncing is not None and not syncing.session.newest_commit_id
                keep = syncing is not None and (syncing.asked or (first and resumed))
                with contextlib.suppress(BlockferryError):
                    await part.snapshots.forsake(part.record, keep=keep)

    # --- sessions -------------------------------------------------------------------------------------------------

    async def _open_all(self, held: contextlib.AsyncExitStack) -> None:
        """Open the snapshots, find what has changed in them, and open a session for each."""
        for part in self._parts:
            part.source = await self._open_source(part)
            held.push_async_callback(part.source.close)
        for part in self._parts:
            part.member.progress.start("changes")
            if part.record is not None:
                part.tracked = await part.snapshots.tracked(part.record)
        for part in self._parts:
            assert part.source is not None
            syncing = Syncing(part.source, part.policy.address, self._options(part), part.member.progress, part.tracked)
            part.syncing = await held.enter_async_context(syncing)
            if part.record is not None:
                await part.snapshots.resolve(syncing.session.newest_commit_id, part.record)
        crash_point("cycle-sessions-open")

    async def _open_source(self, part: _Part) -> Volume:
        if part.record is not None:
            return await part.snapshots.open(part.record)
        source = await open_volume(part.policy.source, insecure=self._terms.insecure, tls=self._terms.tls)
        try:
            part.before = await look(source)
        except BaseException:
            await source.close()
            raise
        return source

    def _options(self, part: _Part) -> SyncOptions:
        limiters = (part.member.limiter, self._terms.bandwidth)
        return SyncOptions(
            region_size=part.policy.region_size,
            insecure=self._terms.insecure,
            tls=self._terms.tls,
            keep=part.policy.keep,
            bytes_in_flight=max(self._terms.bytes_in_flight // len(self._parts), LEAST_IN_FLIGHT),
            state_directory=self._terms.state_directory,
            limiters=tuple(one for one in limiters if one is not None),
            commit_id=part.commit_id,
        )

    async def _transfer_all(self) -> None:
        await _together([self._transfer(part) for part in self._parts])
        for part in self._parts:
            if part.source is not None and part.before is not None:
                await refuse_changed(part.source, part.before)

    async def _transfer(self, part: _Part) -> None:
        assert part.syncing is not None
        transfer = watched(part.syncing.transfer(), part.looks, part.policy.stall_timeout, part.name, part.phase)
        if part.record is None:
            await transfer
        else:
            await _together([transfer], beside=self._watch_floor(part))
        crash_point("cycle-transferred")

    async def _watch_floor(self, part: _Part) -> None:
        """Give up rather than fill the source's file system."""
        while True:
            await asyncio.sleep(FLOOR_SECONDS)
            if part.snapshots.is_low():
                assert part.record is not None
                await part.snapshots.give_up_all_but(part.record)
                if part.snapshots.is_low():
                    raise part.snapshots.low()

    async def _commit_all(self) -> None:
        syncings = [part.syncing for part in self._parts if part.syncing is not None]
        parts = self._parts
        await watched(
            commit_all(syncings),
            lambda: [part.looks() for part in parts],
            max(part.policy.stall_timeout for part in parts),
            ", ".join(part.name for part in parts),
            lambda: "commit",
        )
        for part in parts:
            part.confirmed = True

    def _report(self, part: _Part) -> dict[str, Any]:
        assert part.syncing is not None
        report = part.syncing.report()
        taken = part.record
        return {
            **report,
            # What was replicated, not the copy it was read from.
            "source": part.policy.source,
            "policy": part.name,
            "attempts": self._attempt,
            "snapshot": None
            if taken is None
            else {
                "method": taken.method,
                "path": taken.path,
                "taken_at_us": taken.made_at_us,
                "seconds": taken.seconds,
                "frozen_seconds": part.frozen_seconds if part.policy.hooks.freeze else None,
            },
        }


async def _together(work: Sequence[_Work], beside: _Work | None = None) -> None:
    """Do all of it side by side; the first failure ends the rest, and is raised by itself. What runs `beside` ends with
    the work."""
    failure: BlockferryError | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            doing = [tasks.create_task(one) for one in work]
            if beside is not None:
                watching = tasks.create_task(beside)
                await asyncio.wait(doing, return_when=asyncio.FIRST_EXCEPTION)
                watching.cancel()
    except* BlockferryError as group:
        failure = first_of(group)
    if failure is not None:
        raise failure


def _joined(warning: object, more: Sequence[str]) -> str | None:
    return "; ".join([*([str(warning)] if warning else []), *more]) or None
