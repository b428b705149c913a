"""Bring a replica to the content of a source: maps, plan, transfer, commit."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from blockferry.client.commits import CommitLedger, default_state_directory
from blockferry.client.forecast import Forecast, ask_forecast
from blockferry.client.plan import Plan, decide
from blockferry.client.replica import ChangeStream, ReplicaSession
from blockferry.client.report import Progress, Stopwatch, Tally, sync_report
from blockferry.client.sources import refuse_in_use, refuse_resized
from blockferry.client.transfer import BYTES_IN_FLIGHT, Transfer
from blockferry.common.address import Address
from blockferry.common.config import Tls
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import RateLimiter
from blockferry.common.regions import DEFAULT_REGION_SIZE, AllocationMap, Geometry, Provenance
from blockferry.common.retention import Retention
from blockferry.common.rpc import Connection
from blockferry.common.volumes import Volume
from blockferry.common.volumes.replica import fetch_map
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap


@dataclass(frozen=True)
class SyncOptions:
    """How to sync. `bwlimit` in bytes per second, 0 for none; `region_size` 0 for the replica's own; `pool` for a new
    replica, empty for the server's first."""

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


async def sync(source: Volume, destination: Address, options: SyncOptions, progress: Progress) -> dict[str, object]:
    """Make the source's content the replica's next generation and return the report (schema 1).

    Whatever goes wrong, no generation is committed and the session is ended; the next sync continues with what is
    already at the destination.
    """
    watch = Stopwatch()
    tally = Tally()
    await refuse_in_use(source, live=options.live)
    connection = Connection(destination.require_volume(), insecure=options.insecure, tls=options.tls)
    try:
        session = await ReplicaSession.open(
            connection,
            destination,
            source.size,
            region_size=options.region_size,
            grow=options.grow,
            snapshot_id=source.snapshot_id,
            pool=options.pool,
        )
        crash_point("client-session-opened")
        ledger = CommitLedger(options.state_directory or default_state_directory())
        try:
            warning = ledger.reconcile(session.replica_uuid, session.newest_commit_id, session.newest_generation)
            stream = ChangeStream(
                connection, session, RateLimiter(options.bwlimit), options.bytes_in_flight // 2, tally
            )
            # The stream keeps the lease while the maps are drawn, which may take long, and gives it back if we die.
            async with stream:
                progress.start("map")
                ours, theirs = await asyncio.gather(source.allocation(session.region_size), session.allocation())
                decided = decide(ours, theirs)
                watch.lap("map")
                phase = progress.start("transfer")
                phase.note = stream.stalled
                await Transfer(source, session, stream, decided, options.bytes_in_flight // 2, phase, tally).run()
            crash_point("client-transferred")
            await refuse_resized(source)
            watch.lap("transfer")

            progress.start("commit")
            record = ledger.mint(session.replica_uuid, destination.volume, source.uri)
            crash_point("client-commit-minted")
            committed = await session.commit(bytes.fromhex(record.commit_id), options.keep)
            crash_point("client-commit-answered")
            ledger.confirm(record, committed.generation)
            crash_point("client-commit-confirmed")
            watch.lap("commit")
        except BaseException:
            await asyncio.shield(session.abort())
            raise
        progress.finish()
        return sync_report(source.uri, destination.uri, decided, tally, watch, committed, connection, warning)
    finally:
        await connection.close()
