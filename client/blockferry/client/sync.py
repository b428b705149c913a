"""Bring a replica to the content of a source: maps, plan, transfer, commit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from blockferry.client.commits import CommitLedger, CommitRecord, default_state_directory
from blockferry.client.forecast import Forecast, ask_forecast
from blockferry.client.plan import Plan, decide
from blockferry.client.replica import ChangeStream, Commit, ReplicaSession, commit_sessions
from blockferry.client.report import Progress, Stopwatch, Tally, sync_report
from blockferry.client.sources import refuse_in_use, refuse_resized
from blockferry.client.tracking import Tracked
from blockferry.client.transfer import BYTES_IN_FLIGHT, Transfer
from blockferry.common.address import Address
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import AllOf, RateLimiter
from blockferry.common.regions import DEFAULT_REGION_SIZE, AllocationMap, Geometry, Provenance
from blockferry.common.retention import Retention
from blockferry.common.rpc import Connection
from blockferry.common.settings import Tls
from blockferry.common.volumes import Volume
from blockferry.common.volumes.replica import fetch_map
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap


@dataclass(frozen=True)
class SyncOptions:
    """How to sync. `bwlimit` in bytes per second, 0 for none, and `limiters` are more limits, which may be shared and
    changed; `region_size` 0 for the replica's own; `pool` for a new replica, empty for the server's first; `commit_id`
    in hexadecimal, if it was minted with a snapshot."""

    region_size: int = 0
    bwlimit: int = 0
    grow: bool = False
    live: bool = False
    insecure: bool = False
    tls: Tls | None = None
    keep: Retention | None = None
    pool: str = ""
    bytes_in_flight: int = BYTES_IN_FLIGHT
    state_directory: Path | None = None
    limiters: tuple[RateLimiter, ...] = ()
    commit_id: str = ""


async def plan(source: Volume, destination: Address, options: SyncOptions) -> tuple[Plan, Forecast | None]:
    """What a sync would do, and whether there is room for it (None: the server does not say). Takes no session and
    writes nothing; a replica that does not exist is taken as empty."""
    connection = Connection(destination.require_volume(), insecure=options.insecure, tls=options.tls)
    try:
        found = await _map_without_session(connection, destination, source.size, options)
        decided = decide(await source.allocation(found.geometry.region_size), found)
        return decided, await ask_forecast(connection, destination.volume, options.pool, decided)
    finally:
        await connection.close()


async def _map_without_session(
    connection: Connection, destination: Address, size: int, options: SyncOptions
) -> AllocationMap:
    try:
        point = pb.PointRef(volume=destination.volume, number=destination.number)
        found, _ = await fetch_map(connection, point)
    except BlockferryError as error:
        if error.code is not Code.NOT_FOUND or destination.number:
            raise
        geometry = Geometry(size, options.region_size or DEFAULT_REGION_SIZE)
        return AllocationMap(geometry, BitMap(), Provenance.EXACT)
    if options.grow and found.geometry.size < size:
        # What a replica grows by reads as zeros.
        return AllocationMap(Geometry(size, found.geometry.region_size), found.regions, found.provenance)
    return found


async def sync(
    source: Volume,
    destination: Address,
    options: SyncOptions,
    progress: Progress,
    tracked: Sequence[Tracked] = (),
) -> dict[str, object]:
    """Make the source's content the replica's next generation and return the report (schema 1).

    Of what was `tracked` the set whose base is the replica's newest generation narrows the regions that are looked at;
    where there is none the report says why everything was compared.

    Whatever goes wrong, no generation is committed and the session is ended; the next sync continues with what is
    already at the destination.
    """
    async with Syncing(source, destination, options, progress, tracked) as syncing:
        await syncing.transfer()
        await commit_all([syncing])
        return syncing.report()


class Syncing:
    """A sync under its session, up to its commit: an asynchronous context manager, which ends the session if it is left
    without one. The session is kept alive until `commit_all`."""

    def __init__(
        self,
        source: Volume,
        destination: Address,
        options: SyncOptions,
        progress: Progress,
        tracked: Sequence[Tracked] = (),
    ) -> None:
        self.source = source
        self.destination = destination
        self.options = options
        self.progress = progress
        self.tally = Tally()
        self.connection: Connection
        self.session: ReplicaSession
        self.committed: pb.Committed | None = None
        self.asked = False
        """Whether the commit was asked for: it may have happened even if nobody has heard so."""
        self._tracked = tracked
        self._watch = Stopwatch()
        self._ledger = CommitLedger(options.state_directory or default_state_directory())
        self._warning = self._full_compare = ""
        self._plan: Plan
        self._record: CommitRecord
        self._stream: ChangeStream
        self._held = contextlib.AsyncExitStack()
        self._writing = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Syncing:
        options = self.options
        await refuse_in_use(self.source, live=options.live)
        async with contextlib.AsyncExitStack() as held:
            self.connection = Connection(self.destination.require_volume(), insecure=options.insecure, tls=options.tls)
            held.push_async_callback(self.connection.close)
            self.session = await ReplicaSession.open(
                self.connection,
                self.destination,
                self.source.size,
                region_size=options.region_size,
                grow=options.grow,
                snapshot_id=self.source.snapshot_id,
                pool=options.pool,
            )
            crash_point("client-session-opened")
            held.push_async_callback(self._abort)
            session = self.session
            self._warning = self._ledger.reconcile(
                session.replica_uuid, session.newest_commit_id, session.newest_generation
            )
            limiter = AllOf([RateLimiter(options.bwlimit), *options.limiters])
            self._stream = ChangeStream(self.connection, session, limiter, options.bytes_in_flight // 2, self.tally)
            held.push_async_exit(self._writing)
            # The stream keeps the lease from here on, however long the rest takes, and gives it back if we die.
            await self._writing.enter_async_context(self._stream)
            self._held = held.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._held.__aexit__(kind, error, trace)

    async def _abort(self) -> None:
        done = self.committed
        if done is None or done.generation <= self.session.newest_generation:
            # Nothing was committed; or it had been before, and nobody had heard so.
            await asyncio.shield(self.session.abort())

    async def transfer(self) -> None:
        """Bring the destination to what the source holds, uncommitted."""
        session = self.session
        self.progress.start("map")
        ours, theirs = await asyncio.gather(self.source.allocation(session.region_size), session.allocation())
        narrowed, self._full_compare = self._narrowed()
        self._plan = decide(ours, theirs, narrowed)
        self._watch.lap("map")
        phase = self.progress.start("transfer")
        phase.note = self._stream.stalled
        buffers = self.options.bytes_in_flight // 2
        await Transfer(self.source, session, self._stream, self._plan, buffers, phase, self.tally).run()
        crash_point("client-transferred")
        await refuse_resized(self.source)
        self._watch.lap("transfer")

    def _narrowed(self) -> tuple[BitMap | None, str]:
        """The regions to look at; or None for all, and why (invariant 1: the base of a tracked set is valid only on an
        equal commit id, and only for what the session is known to have begun with)."""
        session = self.session
        if not self._tracked:
            return None, "no changes were tracked"
        if not session.newest_commit_id:
            return None, "nothing is committed yet"
        found = [one for one in self._tracked if one.base == session.newest_commit_id]
        if not found:
            return None, f"generation {session.newest_generation} is not one that changes are known since"
        if session.altered is None:
            return None, session.doubt
        if found[0].size != self.source.size:
            return None, "changes were tracked in a volume of another size"
        regions = found[0].regions(session.region_size)
        if regions is None:
            return None, found[0].reason
        return regions | session.altered, ""

    async def end_stream(self) -> None:
        """Nothing more is sent; what was is applied when this returns."""
        await self._writing.aclose()
        self._watch.lap("transfer")

    def mint(self) -> Commit:
        """What is to be committed, with its commit id durable here."""
        self.progress.start("commit")
        record = self._ledger.mint(
            self.session.replica_uuid, self.destination.volume, self.source.uri, self.options.commit_id
        )
        self._record = record
        crash_point("client-commit-minted")
        return Commit(self.session, bytes.fromhex(record.commit_id), self.options.keep)

    def confirm(self, committed: pb.Committed) -> None:
        """The commit happened."""
        self.committed = committed
        self._ledger.confirm(self._record, committed.generation)
        crash_point("client-commit-confirmed")
        self._watch.lap("commit")
        self.progress.finish()

    def report(self) -> dict[str, object]:
        """The report of schema 1, once it is committed."""
        assert self.committed is not None
        return sync_report(
            self.source.uri,
            self.destination.uri,
            self._plan,
            self.tally,
            self._watch,
            self.committed,
            self.connection,
            self._warning,
            self._full_compare,
        )


async def commit_all(syncings: Sequence[Syncing]) -> None:
    """Commit what was transferred by one call: all of it, or none. All of them have sessions of one server."""
    for one in syncings:
        await one.end_stream()
    commits = [one.mint() for one in syncings]
    for one in syncings:
        one.asked = True
    answers = await commit_sessions(syncings[0].connection, commits)
    crash_point("client-commit-answered")
    for one, committed in zip(syncings, answers, strict=True):
        one.confirm(committed)
