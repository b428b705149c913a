"""The commands that hand a replica over, take it back, adopt one and delete one."""

from __future__ import annotations

import argparse
import sys

from blockferry.client.cli.main import Command
from blockferry.client.cli.render import Console
from blockferry.client.cli.replicate import connected, promotion_fields
from blockferry.client.report import SCHEMA, Progress
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.rpc import Connection
from blockferry.common.units import human_bytes
from blockferry.v1 import replicas_pb2 as pb
from blockferry.v1.replication_pb2 import PointRef


async def _shown(connection: Connection) -> pb.Replica:
    """The replica that the connection's address names."""
    volume = connection.address.require_volume().volume
    response = await connection.call("Replicas/GetReplica", pb.GetReplicaRequest(volume=volume), pb.GetReplicaResponse)
    return response.replica


def _whole(connection: Connection) -> str:
    """The volume that an address names. Raises USAGE where it names one of its generations: `delete VOLUME@3` must not
    delete everything."""
    address = connection.address.require_volume()
    if address.number:
        raise BlockferryError(
            Code.USAGE,
            f"{address.volume} is left as it is",
            cause=f"the address names its generation {address.number}, and this is about the whole replica",
            next="leave the @number out if the whole replica is meant",
            volume=address.volume,
        )
    return address.volume


def confirm(arguments: argparse.Namespace, volume: str, consequences: str, kind: str = "replica") -> None:
    """Have the name of the volume typed, or `--yes` said, before anything that cannot be undone. Raises USAGE."""
    if arguments.yes:
        return
    if not sys.stdin.isatty():
        raise BlockferryError(
            Code.USAGE,
            f"{volume} is left as it is",
            cause=f"{consequences}, and nobody is here to confirm it",
            next="say --yes if that is meant",
            volume=volume,
        )
    print(f"{volume}: {consequences}.", file=sys.stderr)
    print(f"Type the name of the {kind} to go on: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != volume:
        raise BlockferryError(
            Code.USAGE,
            f"{volume} is left as it is",
            cause="something else was typed",
            next="run it again and type the name, or say --yes",
            volume=volume,
        )


async def _promote(arguments: argparse.Namespace, console: Console) -> int:
    progress = Progress()
    async with connected(arguments) as connection:
        replica = await _shown(connection)
        address = connection.address
        client = replica.session_client
        in_place = replica.kind == "device"
        confirm(
            arguments,
            address.volume,
            "it will be handed out and takes no more syncs until it is demoted"
            + (
                f"; {replica.path or 'its device'} itself is, and all other recovery points are lost"
                if in_place
                else ""
            )
            + (f"; the sync of {client} is ended" if client else ""),
        )
        request = pb.PromoteReplicaRequest(
            point=PointRef(volume=address.volume, number=address.number), confirm=address.volume
        )
        promotion = pb.Promotion()
        phase = progress.start("copy")
        async with console.showing(progress):
            async for part in connection.stream("Replicas/PromoteReplica", request, pb.PromoteReplicaResponse):
                phase.done, phase.total = part.bytes_done, part.bytes_total
                promotion = part.promotion
            progress.finish()
    report = {"schema": SCHEMA, "volume": address.volume, **promotion_fields(promotion)}
    fate = "in place of all recovery points" if in_place else "and the recovery point stays whole"
    back = "--keep-changes" if in_place else "--keep-changes or --discard"
    console.result(
        report,
        [
            f"{address.volume}: generation {promotion.generation} is handed out, {fate}",
            f"  on the server  {promotion.path}",
            f"  to go back     blockferry replica demote, with {back}, once nothing uses it",
        ],
    )
    return 0


async def _demote(arguments: argparse.Namespace, console: Console) -> int:
    async with connected(arguments) as connection:
        volume = _whole(connection)
        if arguments.discard:
            confirm(arguments, volume, "everything written since its promotion will be dropped")
        request = pb.DemoteReplicaRequest(volume=volume, keep_changes=arguments.keep_changes, confirm=volume)
        response = await connection.call("Replicas/DemoteReplica", request, pb.DemoteReplicaResponse)
    kept = "what was promoted, with its changes" if arguments.keep_changes else "what was committed before"
    report = {
        "schema": SCHEMA,
        "volume": volume,
        "generation": response.generation,
        "commit_id": response.commit_id.hex(),
        "kept_changes": arguments.keep_changes,
    }
    console.result(report, [f"{volume}: generation {response.generation} is {kept}; syncs are taken again"])
    return 0


async def _delete(arguments: argparse.Namespace, console: Console) -> int:
    async with connected(arguments) as connection:
        volume = _whole(connection)
        replica = await _shown(connection)
        generations = f", newest generation {replica.generation}" if replica.generation else ""
        confirm(
            arguments,
            volume,
            f"it will be deleted with all its recovery points ({human_bytes(replica.bytes_held)}{generations})"
            + ("; what is on its device stays there" if replica.kind == "device" else ""),
        )
        request = pb.DeleteReplicaRequest(volume=volume, confirm=volume)
        await connection.call("Replicas/DeleteReplica", request, pb.DeleteReplicaResponse)
    report = {"schema": SCHEMA, "volume": volume, "deleted": True, "bytes_held": replica.bytes_held}
    console.result(report, [f"{volume}: deleted, with {human_bytes(replica.bytes_held)} of recovery points"])
    return 0


async def _adopt(arguments: argparse.Namespace, console: Console) -> int:
    async with connected(arguments) as connection:
        volume = _whole(connection)
        request = pb.AdoptReplicaRequest(volume=volume, seed=arguments.seed, region_size=arguments.region_size)
        response = await connection.call("Replicas/AdoptReplica", request, pb.AdoptReplicaResponse)
    report = {"schema": SCHEMA, "volume": volume, "size": response.size, "region_size": response.region_size}
    console.result(
        report,
        [
            f"{volume}: {arguments.seed} is adopted, {human_bytes(response.size)}",
            "  its first sync compares, and sends only what differs",
        ],
    )
    return 0


COMMANDS: dict[str, Command] = {
    "replica_promote": _promote,
    "replica_demote": _demote,
    "replica_delete": _delete,
    "replica_adopt": _adopt,
}
