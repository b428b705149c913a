"""The commands of replication: plan, sync, verify, volume show, replica list and show."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from blockferry.client.cli.main import Command
from blockferry.client.cli.picture import picture, shades_for
from blockferry.client.cli.render import Console, human_seconds, table
from blockferry.client.forecast import Forecast
from blockferry.client.plan import Plan
from blockferry.client.report import SCHEMA, Progress, plan_report
from blockferry.client.sync import SyncOptions, plan, sync
from blockferry.client.verify import verify
from blockferry.common.address import Address
from blockferry.common.regions import DEFAULT_REGION_SIZE
from blockferry.common.rpc import Connection
from blockferry.common.units import human_bytes
from blockferry.common.volumes import Volume, open_volume
from blockferry.v1 import replicas_pb2 as pb
from blockferry.v1.replication_pb2 import PointRef

SHOWN_RANGES = 20
"""Differing ranges listed for people; `--json` has them all."""


def _options(arguments: argparse.Namespace) -> SyncOptions:
    return SyncOptions(
        region_size=arguments.region_size,
        bwlimit=getattr(arguments, "bwlimit", 0),
        grow=arguments.grow,
        live=getattr(arguments, "live", False),
        insecure=arguments.insecure,
        tls=arguments.tls,
        keep=getattr(arguments, "keep", None),
        pool=arguments.pool or "",
        state_directory=getattr(arguments, "state_dir", None),
    )


@contextlib.asynccontextmanager
async def opened(uri: str, arguments: argparse.Namespace) -> AsyncIterator[Volume]:
    """What a URI names, for reading."""
    volume = await open_volume(uri, insecure=arguments.insecure, tls=arguments.tls, access=arguments.access)
    try:
        yield volume
    finally:
        await volume.close()


@contextlib.asynccontextmanager
async def connected(arguments: argparse.Namespace) -> AsyncIterator[Connection]:
    """A connection to the server that `arguments.address` names."""
    connection = Connection(Address.parse(arguments.address), insecure=arguments.insecure, tls=arguments.tls)
    try:
        yield connection
    finally:
        await connection.close()


# --- plan and sync ----------------------------------------------------------------------------------------------


async def _plan(arguments: argparse.Namespace, console: Console) -> int:
    destination = Address.parse(arguments.destination).require_volume()
    async with opened(arguments.source, arguments) as source:
        decided, forecast = await plan(source, destination, _options(arguments))
    report = plan_report(arguments.source, arguments.destination, decided, forecast)
    lines = [f"{arguments.source} -> {arguments.destination}", *_plan_lines(decided)]
    if forecast is not None:
        lines.append(_forecast_line(forecast))
    console.result(report, lines)
    return 0


def _plan_lines(decided: Plan) -> list[str]:
    size = decided.geometry
    rows = [
        ("skip", decided.skip_count, "both sides are zero: nothing is read or sent"),
        ("unmap", len(decided.unmap), "only the destination holds data: it is deallocated"),
        ("send", len(decided.send), "only the source holds data: its non-zero blocks are sent"),
        ("compare", len(decided.compare), "both hold data: digests decide, differing blocks are sent"),
    ]
    lines = [f"  {name:<8}{count:>10} regions  {why}" for name, count, why in rows]
    lines.append(
        f"  volume {human_bytes(size.size)} in regions of {human_bytes(size.region_size)}; "
        f"source map {decided.source_map.value}, destination map {decided.destination_map.value}"
    )
    lines.append(
        f"  to read {human_bytes(decided.bytes_to_read)}, "
        f"to send between nothing and {human_bytes(decided.bytes_to_read)}"
    )
    return lines


def _forecast_line(forecast: Forecast) -> str:
    needed = f"at most {human_bytes(forecast.needed_max)} more on the disk"
    room = (
        f"pool {forecast.pool} has {human_bytes(forecast.free)} free and keeps {human_bytes(forecast.reserve)} of them"
    )
    if forecast.quota:
        room += f"; the replica holds {human_bytes(forecast.held)} of its quota of {human_bytes(forecast.quota)}"
    return f"  {needed}: {'it fits' if forecast.fits else 'it MAY NOT FIT'} ({room})"


async def _sync(arguments: argparse.Namespace, console: Console) -> int:
    destination = Address.parse(arguments.destination).require_volume()
    progress = Progress()
    async with opened(arguments.source, arguments) as source, console.showing(progress):
        report = await sync(source, destination, _options(arguments), progress)
    console.result(report, _sync_lines(report))
    return 0


def _sync_lines(report: dict[str, object]) -> list[str]:
    regions, results, moved, seconds = (report[name] for name in ("regions", "results", "bytes", "seconds"))
    assert isinstance(regions, dict) and isinstance(results, dict)
    assert isinstance(moved, dict) and isinstance(seconds, dict)
    lines = [
        f"{report['source']} -> {report['destination']}: generation {report['generation']} committed",
        f"  regions    {regions['skip']} skipped, {regions['unmap']} unmapped, "
        f"{regions['send']} to send, {regions['compare']} to compare",
        f"  found      {results['zero']} zero, {results['equal']} equal, {results['changed']} changed",
        f"  data sent  {human_bytes(moved['data_sent'])} ({human_bytes(moved['wire_sent'])} on the wire); "
        f"unmapped {human_bytes(moved['unmapped'])}",
        f"  read       {human_bytes(moved['source_read'])} at the source, "
        f"{human_bytes(moved['destination_read'])} at the destination",
        f"  took       {seconds['total']:.1f} s",
    ]
    if report["warning"]:
        lines.append(f"  WARNING    {report['warning']}")
    return lines


# --- verify -----------------------------------------------------------------------------------------------------


async def _verify(arguments: argparse.Namespace, console: Console) -> int:
    progress = Progress()
    async with opened(arguments.a, arguments) as left, opened(arguments.b, arguments) as right:
        async with console.showing(progress):
            found = await verify(left, right, progress.start("verify"))
            progress.finish()
        report = found.report(left, right)
    lines = [
        f"{arguments.a} and {arguments.b} {'differ' if found.ranges else 'are equal'}: "
        f"{human_bytes(found.bytes_compared)} compared, {human_bytes(found.bytes_skipped)} proven zero on both sides"
    ]
    lines += [f"  differs at {offset}, {length} bytes" for offset, length in found.ranges[:SHOWN_RANGES]]
    if len(found.ranges) > SHOWN_RANGES:
        lines.append(f"  and {len(found.ranges) - SHOWN_RANGES} more ranges; --json lists them all")
    console.result(report, lines)
    return 3 if found.ranges else 0


# --- looking ----------------------------------------------------------------------------------------------------


async def _volume_show(arguments: argparse.Namespace, console: Console) -> int:
    async with opened(arguments.uri, arguments) as volume:
        found = await volume.allocation(DEFAULT_REGION_SIZE)
        writers, holders = await volume.writers(), await volume.holders()
        report: dict[str, object] = {
            "schema": SCHEMA,
            "uri": volume.uri,
            "size": volume.size,
            "block_size": volume.block_size,
            "sector_size": volume.sector_size,
            "preferred_size": volume.preferred_size,
            "region_size": DEFAULT_REGION_SIZE,
            "regions": found.geometry.count,
            "allocated_regions": len(found.regions),
            "allocated_bytes": found.allocated_bytes,
            "runs": sum(1 for _ in found.runs()),
            "map": found.provenance.value,
            "zeroing": volume.zeroing,
            "snapshot_id": volume.snapshot_id,
            "identity": volume.identity or None,
            "writers": writers,
            "holders": holders,
        }
    share = found.allocated_bytes / volume.size
    lines = [
        arguments.uri,
        f"  size       {human_bytes(volume.size)} ({volume.size} bytes), blocks of {volume.block_size}",
        f"  I/O        sectors of {volume.sector_size}, {human_bytes(volume.preferred_size)} at a time preferred",
        f"  allocated  {human_bytes(found.allocated_bytes)} ({share:.0%}) in {report['runs']} runs, "
        f"map {found.provenance.value}",
        f"  zeroing    {volume.zeroing}",
        f"  in use by  {', '.join(holders) or 'nobody who writes'}",
    ]
    if volume.identity or volume.snapshot_id:
        lines.append(f"  identity   {volume.identity or volume.snapshot_id}")
    shades = shades_for(getattr(sys.stdout, "encoding", None))
    lines += [f"  |{row}|" for row in picture(found, shades)]
    console.result(report, lines)
    return 0


def promotion_fields(promotion: pb.Promotion) -> dict[str, object]:
    """What was handed out, for `--json`."""
    return {
        "generation": promotion.generation,
        "commit_id": promotion.commit_id.hex(),
        "promoted_at": _time(promotion.promoted_at_us),
        "path": promotion.path,
    }


def _replica_fields(replica: pb.Replica) -> dict[str, object]:
    return {
        "volume": replica.volume,
        "pool": replica.pool,
        "uuid": replica.replica_uuid.hex(),
        "state": pb.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_"),
        "size": replica.size,
        "region_size": replica.region_size,
        "generation": replica.generation,
        "commit_id": replica.commit_id.hex() or None,
        "committed_at": _time(replica.committed_at_us),
        "bytes_held": replica.bytes_held,
        "path": replica.path or None,
        "kind": replica.kind,
        "session_client": replica.session_client or None,
        "promotion": promotion_fields(replica.promotion) if replica.HasField("promotion") else None,
        "scrub": _scrub_fields(replica),
        "notice": replica.notice or None,
    }


def _scrub_fields(replica: pb.Replica) -> dict[str, object] | None:
    if not replica.HasField("scrub"):
        return None
    return {
        "at": _time(replica.scrub.at_us),
        "generation": replica.scrub.generation,
        "bytes": replica.scrub.bytes,
        "rotten": [{"offset": one.offset, "length": one.length} for one in replica.scrub.rotten],
        "problem": replica.scrub.problem or None,
    }


def _scrub_age(replica: pb.Replica) -> str:
    """For a table: how long ago, and whether something was wrong."""
    scrub = replica.scrub
    mark = "ROTTEN " if scrub.rotten else "FAILED " if scrub.problem else ""
    return mark + _age(scrub.at_us)


def _scrub_line(replica: pb.Replica) -> str:
    scrub = replica.scrub
    if not scrub.at_us:
        return "never"
    if scrub.problem:
        found = f"FAILED: {scrub.problem}"
    elif scrub.rotten:
        rotten = sum(one.length for one in scrub.rotten)
        found = f"{human_bytes(rotten)} in {len(scrub.rotten)} ranges were ROTTEN: see blockferry replica verify"
    else:
        found = f"{human_bytes(scrub.bytes)} read, all sound"
    return f"{_age(scrub.at_us)}, generation {scrub.generation}: {found}"


def _time(microseconds: int) -> str | None:
    """ISO 8601 in UTC, or None for never."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds") if microseconds else None


def _age(microseconds: int) -> str:
    if not microseconds:
        return "never"
    return human_seconds(max(0.0, datetime.now(UTC).timestamp() - microseconds / 1e6)) + " ago"


async def _replica_list(arguments: argparse.Namespace, console: Console) -> int:
    async with connected(arguments) as connection:
        response = await connection.call("Replicas/ListReplicas", pb.ListReplicasRequest(), pb.ListReplicasResponse)
    rows = [("VOLUME", "STATE", "GENERATION", "COMMITTED", "SCRUBBED", "SIZE", "HELD", "POOL")]
    rows += [
        (
            replica.volume,
            pb.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_"),
            str(replica.generation or "-"),
            _age(replica.committed_at_us),
            _scrub_age(replica),
            human_bytes(replica.size),
            human_bytes(replica.bytes_held),
            replica.pool,
        )
        for replica in response.replicas
    ]
    lines = table(rows)
    report = {"schema": SCHEMA, "replicas": [_replica_fields(replica) for replica in response.replicas]}
    console.result(report, lines if response.replicas else [f"{arguments.address} holds no replicas"])
    return 0


async def _replica_show(arguments: argparse.Namespace, console: Console) -> int:
    async with connected(arguments) as connection:
        volume = connection.address.require_volume().volume
        response = await connection.call(
            "Replicas/GetReplica", pb.GetReplicaRequest(volume=volume), pb.GetReplicaResponse
        )
    replica = response.replica
    fields = {"schema": SCHEMA, **_replica_fields(replica)}
    committed = f"{_time(replica.committed_at_us)} ({_age(replica.committed_at_us)})" if replica.generation else "never"
    lines = [
        f"{replica.volume}: {fields['state']}",
        f"  generation  {replica.generation or 'none'}, commit {fields['commit_id'] or '-'}",
        f"  committed   {committed}",
        f"  size        {human_bytes(replica.size)} in regions of {human_bytes(replica.region_size)}; "
        f"holds {human_bytes(replica.bytes_held)}",
        f"  pool        {replica.pool}",
        f"  image       {replica.path or 'none'}",
        f"  kept as     {replica.kind}",
        f"  scrubbed    {_scrub_line(replica)}",
        f"  session     {replica.session_client or 'none'}",
    ]
    if replica.HasField("promotion"):
        one = replica.promotion
        lines.append(f"  promoted    generation {one.generation}, {_age(one.promoted_at_us)}: {one.path}")
    if replica.notice:
        lines.append(f"  NOTICE      {replica.notice}")
    console.result(fields, lines)
    return 0


async def _replica_points(arguments: argparse.Namespace, console: Console) -> int:
    async with connected(arguments) as connection:
        volume = connection.address.require_volume().volume
        response = await connection.call(
            "Replicas/ListRecoveryPoints",
            pb.ListRecoveryPointsRequest(volume=volume),
            pb.ListRecoveryPointsResponse,
        )
    rows = [("NUMBER", "COMMITTED", "AGE", "SIZE", "HELD", "KEPT BY", "COMMIT")]
    rows += [
        (
            str(point.number),
            _time(point.committed_at_us) or "",
            _age(point.committed_at_us),
            human_bytes(point.size),
            "unknown" if point.problem else human_bytes(point.bytes_held),
            ", ".join(point.kept_by) or "nothing: goes with the next commit",
            point.commit_id.hex(),
        )
        for point in response.points
    ]
    report = {
        "schema": SCHEMA,
        "volume": volume,
        "points": [
            {
                "number": point.number,
                "commit_id": point.commit_id.hex(),
                "committed_at": _time(point.committed_at_us),
                "size": point.size,
                "bytes_held": None if point.problem else point.bytes_held,
                "path": point.path or None,
                "kept_by": list(point.kept_by),
                "problem": point.problem or None,
            }
            for point in response.points
        ],
    }
    lines = table(rows) if response.points else [f"{volume} has no recovery points yet"]
    lines += [
        f"generation {one.number}: {one.problem}" + (f" ({one.path})" if one.path else "")
        for one in response.points
        if one.problem
    ]
    console.result(report, lines)
    return 0


async def _replica_verify(arguments: argparse.Namespace, console: Console) -> int:
    progress = Progress()
    rotten: list[tuple[int, int]] = []
    unrecorded = 0
    async with connected(arguments) as connection:
        address = connection.address.require_volume()
        shown = await connection.call(
            "Replicas/GetReplica", pb.GetReplicaRequest(volume=address.volume), pb.GetReplicaResponse
        )
        point = PointRef(volume=address.volume, number=address.number)
        phase = progress.start("verify")
        async with console.showing(progress):
            async for part in connection.stream(
                "Replicas/VerifyReplica", pb.VerifyReplicaRequest(point=point), pb.VerifyReplicaResponse
            ):
                phase.done, phase.total = part.bytes_done, part.bytes_total
                unrecorded += part.bytes_unrecorded
                rotten += [(one.offset, one.length) for one in part.rotten]
            progress.finish()
    advice = _what_to_do_about_rot(address.number, shown.replica.generation) if rotten else None
    report = {
        "schema": SCHEMA,
        "volume": address.volume,
        "outcome": "rotten" if rotten else "sound",
        "next": advice,
        "bytes": {
            "checked": phase.total,
            "rotten": sum(length for _, length in rotten),
            "unrecorded": unrecorded,
        },
        "ranges": [{"offset": offset, "length": length} for offset, length in rotten],
    }
    lines = [
        f"{arguments.address}: {human_bytes(phase.total)} read, "
        + (f"{human_bytes(sum(length for _, length in rotten))} are not what was committed" if rotten else "all sound")
    ]
    lines += [f"  rotten at {offset}, {length} bytes" for offset, length in rotten[:SHOWN_RANGES]]
    if advice is not None:
        lines.append(f"  {advice}")
    if unrecorded:
        lines.append(f"  {human_bytes(unrecorded)} have no recorded digest: nothing can be said about them")
    console.result(report, lines)
    return 3 if rotten else 0


def _what_to_do_about_rot(number: int, newest: int) -> str:
    """The next step for generation `number` (0: the newest). A sync starts from the newest one, and no generation is
    ever written again."""
    if number in (0, newest):
        return (
            "sync again to repair it: that reads the replica instead of trusting what it knows, and makes a sound next "
            "generation"
        )
    return (
        f"no sync repairs generation {number}: it is not the newest. Recover from another one (blockferry "
        "replica points), and verify the newest too (leave the number out): generations share what has not changed"
    )


COMMANDS: dict[str, Command] = {
    "plan": _plan,
    "sync": _sync,
    "verify": _verify,
    "volume_show": _volume_show,
    "replica_list": _replica_list,
    "replica_show": _replica_show,
    "replica_points": _replica_points,
    "replica_verify": _replica_verify,
}
