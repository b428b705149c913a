"""blockferry-server: keeps replicas in pools and serves them over gRPC."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import uvloop
from blockferry.common import linux, retention, rpc, telemetry
from blockferry.common.arguments import argument
from blockferry.common.credentials import Credentials
from blockferry.common.errors import BlockferryError
from blockferry.common.tls import complete
from blockferry.common.units import parse_duration, parse_size
from blockferry.common.volumes import in_thread
from blockferry.server import handshakes
from blockferry.server.access import Access
from blockferry.server.pools import Pools, parse_pool
from blockferry.server.replicas import ReplicasService
from blockferry.server.replication import ReplicationService
from blockferry.server.scrubber import Scrubber
from blockferry.server.space import Limits
from blockferry.v1 import replicas_pb2, replication_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

DEFAULT_LISTEN = "grpc://127.0.0.1:9870"
LEASE_SECONDS = 60.0
"""Default: longer than any pause of a source that is alive, shorter than anybody likes to wait for a dead one."""

BYTES_IN_FLIGHT = 64 * 1024 * 1024
SHUTDOWN_SECONDS = 10.0
"""Calls in progress may finish within this time; then they are cut off."""


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blockferry-server", description="Keep replicas of block volumes and serve them over gRPC."
    )
    parser.add_argument(
        "--pool",
        action="append",
        type=argument(parse_pool),
        required=True,
        metavar="[NAME=]DIR",
        help="existing directory for replicas, called main unless named; repeatable: new replicas go to the first",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help=f"grpc://HOST:PORT (port 0: any free one) or grpc+unix:///SOCKET; repeatable (default {DEFAULT_LISTEN})",
    )
    parser.add_argument(
        "--keep-at-least",
        type=argument(retention.parse),
        default=retention.DEFAULT,
        metavar="RULES",
        help="recovery points that no source can give up, such as last=3,daily=7 (default last=3)",
    )
    parser.add_argument(
        "--lease",
        type=_lease,
        default=LEASE_SECONDS,
        metavar="SECONDS",
        help="how long a silent source keeps a replica to itself, 0.1 to 86400 (default 60)",
    )
    parser.add_argument(
        "--reserve",
        type=argument(parse_size),
        metavar="SIZE",
        help="bytes that sessions leave free in each pool's file system (default 1G, or 5 %% of a small one; 0: none)",
    )
    parser.add_argument(
        "--quota",
        type=argument(parse_size),
        default=0,
        metavar="SIZE",
        help="bytes that each replica may hold, recovery points included (default 0: any number)",
    )
    parser.add_argument(
        "--journal-limit",
        type=argument(parse_size),
        default=0,
        metavar="SIZE",
        help="bytes of changes of one session, in pools that cannot clone files (default 0: any number)",
    )
    parser.add_argument(
        "--scrub-every",
        type=argument(parse_duration),
        default=0,
        metavar="DURATION",
        help="re-read the newest generation of each replica this often, such as 7d or 12h (default 0: never)",
    )
    for name, what in (
        ("cert", "certificate of this server, PEM, with intermediate ones behind it"),
        ("key", "its private key"),
        ("ca", "the authorities that have issued what clients show"),
        ("crl", "their revocation lists"),
    ):
        parser.add_argument(
            f"--tls-{name}", type=Path, metavar="FILE", help=f"{what}; for grpcs:// and read again when it changes"
        )
    parser.add_argument("--insecure", action="store_true", help="allow plaintext on addresses other machines can reach")
    return parser.parse_args(argv)


def _lease(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    # Written so that nan is refused too.
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a lease; write seconds from 0.1 to 86400")
    return seconds


async def serve(arguments: argparse.Namespace) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    files = complete(arguments.tls_cert, arguments.tls_key, arguments.tls_ca, arguments.tls_crl)
    credentials = await in_thread(Credentials, files) if files is not None else None
    limits = Limits(arguments.reserve, arguments.quota, arguments.journal_limit)
    pools = await Pools.open(arguments.pool, arguments.lease, arguments.keep_at_least, limits)
    tasks: list[asyncio.Task[None]] = []
    try:
        server = rpc.make_server()
        access = Access(pools, (), credentials)
        services = {
            replication_pb2.DESCRIPTOR.services_by_name["Replication"]: ReplicationService(
                pools, BYTES_IN_FLIGHT, access
            ),
            replicas_pb2.DESCRIPTOR.services_by_name["Replicas"]: ReplicasService(pools, access),
        }
        for descriptor, servicer in services.items():
            rpc.add_service(server, descriptor, servicer, access, raw=getattr(servicer, "RAW_METHODS", ()))
        await _add_health_and_reflection(server, [descriptor.full_name for descriptor in services])

        addresses = [
            rpc.bind(server, uri, insecure=arguments.insecure, credentials=credentials)
            for uri in arguments.listen or [DEFAULT_LISTEN]
        ]
        await server.start()
        for address in addresses:
            print(f"listening on {address}", flush=True)
        if arguments.scrub_every:
            tasks.append(asyncio.create_task(Scrubber(pools, arguments.scrub_every).run(), name="scrubber"))
        if credentials is not None:
            tasks.append(asyncio.create_task(credentials.watch(), name="certificates"))
        await stop.wait()
        await server.stop(SHUTDOWN_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await pools.close()


async def _add_health_and_reflection(server: rpc.Server, names: list[str]) -> None:
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for name in ["", *names]:
        await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)


def main() -> int:
    """Entry point of the console script."""
    linux.occupy_standard_descriptors()
    arguments = _arguments(sys.argv[1:])
    handshakes.watch()
    telemetry.configure_logging()
    linux.keep_freed_memory()
    try:
        uvloop.run(serve(arguments))
    except BlockferryError as error:
        print(f"blockferry-server: {error.line()}", file=sys.stderr)
        return 1
    return 0
