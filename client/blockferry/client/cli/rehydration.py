"""The commands of disks that are being rehydrated: rehydration show, watch, snapshot."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

from blockferry.client.cli.main import Command
from blockferry.client.cli.render import Console, table
from blockferry.client.report import SCHEMA, Progress
from blockferry.common.address import Address, is_address
from blockferry.common.rehydration import SOCKET, line, report
from blockferry.common.rpc import Connection
from blockferry.common.units import human_bytes
from blockferry.v1 import rehydration_pb2 as pb


def _address(where: str) -> Address:
    if not is_address(where):
        where = f"grpc+unix://{quote(str(Path(where).absolute() / SOCKET))}"
    return Address.parse(where)


@contextlib.asynccontextmanager
async def _connected(arguments: argparse.Namespace) -> AsyncIterator[Connection]:
    """To the socket in a --state directory, or wherever else the address says."""
    address = _address(arguments.address)
    connection = Connection(address, insecure=arguments.insecure, tls=arguments.tls, program="blockferry-rehydrate")
    try:
        yield connection
    finally:
        await connection.close()


def _lines(status: pb.RehydrationStatus) -> list[str]:
    demand = status.demand
    rows = [
        ("primary", status.primary),
        ("served at", status.address),
        ("snapshot", status.snapshot_id),
        ("size", human_bytes(status.size)),
        ("progress", line(status)),
        (
            "on demand",
            f"{demand.demands} requests, median {demand.median_ms:.1f} ms, 99 % within {demand.p99_ms:.1f} ms, "
            f"most {demand.most_ms:.1f} ms"
            if demand.demands
            else "no request has waited for a source",
        ),
    ]
    for source in status.sources:
        state = source.problem or ("connected" if source.connected else "not connected")
        rows.append(("source", f"{source.uri}, {human_bytes(source.bytes_fetched)}, {state}"))
    # Their headings would only repeat what they are.
    return table([("", ""), *rows])[1:]


async def _show(arguments: argparse.Namespace, console: Console) -> int:
    async with _connected(arguments) as connection:
        response = await connection.call(
            "Rehydration/ShowRehydration", pb.ShowRehydrationRequest(), pb.ShowRehydrationResponse
        )
    console.result({"schema": SCHEMA, **report(response.status)}, _lines(response.status))
    return 0


async def _watch(arguments: argparse.Namespace, console: Console) -> int:
    progress = Progress()
    phase = progress.start("rehydrate")
    status = pb.RehydrationStatus()
    async with _connected(arguments) as connection, console.showing(progress):
        async for part in connection.stream(
            "Rehydration/WatchRehydration", pb.WatchRehydrationRequest(), pb.WatchRehydrationResponse
        ):
            status = part.status
            phase.total = status.data or status.size
            phase.done = phase.total - (status.data_left if status.data else status.size - status.hydrated)
        progress.finish()
    console.result({"schema": SCHEMA, **report(status)}, [line(status)])
    return 0


async def _snapshot(arguments: argparse.Namespace, console: Console) -> int:
    request = pb.SnapshotRehydrationRequest(name=arguments.name)
    async with _connected(arguments) as connection:
        response = await connection.call("Rehydration/SnapshotRehydration", request, pb.SnapshotRehydrationResponse)
    console.result(
        {"schema": SCHEMA, "path": response.path, "state": response.state, "hydrated": response.hydrated},
        [
            f"{response.path}: {human_bytes(response.hydrated)} are hydrated",
            f"  to go on with it  blockferry-rehydrate SOURCE {response.path} --state {response.state} --nbd ...",
        ],
    )
    return 0


COMMANDS: dict[str, Command] = {
    "rehydration_show": _show,
    "rehydration_watch": _watch,
    "rehydration_snapshot": _snapshot,
}
