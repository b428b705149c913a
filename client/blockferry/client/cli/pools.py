"""The commands of pools: pool list."""

from __future__ import annotations

import argparse

from blockferry.client.cli.main import Command
from blockferry.client.cli.render import Console, table
from blockferry.client.cli.replicate import connected
from blockferry.client.report import SCHEMA
from blockferry.common.units import human_bytes
from blockferry.v1 import replicas_pb2 as pb


def _fields(pool: pb.Pool) -> dict[str, object]:
    return {
        "name": pool.name,
        "path": pool.path,
        "kind": pool.kind,
        "total": pool.total,
        "free": pool.free,
        "reserve": pool.reserve,
        "quota": pool.quota or None,
        "replicas": pool.replicas,
        "bytes_held": pool.bytes_held,
        "problem": pool.problem or None,
        "notice": pool.notice or None,
    }


async def _pool_list(arguments: argparse.Namespace, console: Console) -> int:
    async with connected(arguments) as connection:
        response = await connection.call("Replicas/ListPools", pb.ListPoolsRequest(), pb.ListPoolsResponse)
    rows = [("POOL", "KIND", "REPLICAS", "HELD", "FREE", "RESERVE", "TOTAL", "QUOTA", "PATH")]
    rows += [
        (
            pool.name,
            pool.kind,
            str(pool.replicas),
            human_bytes(pool.bytes_held),
            human_bytes(pool.free),
            human_bytes(pool.reserve),
            human_bytes(pool.total),
            human_bytes(pool.quota) if pool.quota else "none",
            pool.path,
        )
        for pool in response.pools
    ]
    lines = table(rows)
    lines += [f"{pool.name}: {text}" for pool in response.pools for text in (pool.problem, pool.notice) if text]
    console.result({"schema": SCHEMA, "pools": [_fields(pool) for pool in response.pools]}, lines)
    return 0


COMMANDS: dict[str, Command] = {"pool_list": _pool_list}
