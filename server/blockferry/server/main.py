"""blockferry-server: keeps replicas in pools and serves them over gRPC."""

from __future__ import annotations

import asyncio
import signal
import sys
import time

import structlog
import uvloop
from blockferry.common import linux, rpc, telemetry
from blockferry.common.config import DeviceConfig, PoolConfig, ServerConfig
from blockferry.common.credentials import Credentials
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.metrics import Pages
from blockferry.common.serving import add_health_and_reflection
from blockferry.common.settings import USELESS, plaintext
from blockferry.common.volumes import in_thread
from blockferry.server import handshakes, space
from blockferry.server.access import Access
from blockferry.server.admission import Admission
from blockferry.server.arguments import configuration
from blockferry.server.devices import DeviceSpec
from blockferry.server.limits import Limits
from blockferry.server.metrics import Metrics
from blockferry.server.pools import Pools, PoolSpec, with_devices
from blockferry.server.replicas import ReplicasService
from blockferry.server.replication import ReplicationService
from blockferry.server.scrubber import Scrubber
from blockferry.v1 import replicas_pb2, replication_pb2

log = structlog.get_logger("blockferry.server")

SHUTDOWN_SECONDS = 10.0
"""Calls in progress may finish within this time; then they are cut off."""

REFUSED_STREAMS = 16
"""Streams of a connection above what its client may have in progress. Without any, HTTP/2 would hold back at the client
what is too much, and a sync whose next call waits for room that only its own stream could give would stand still."""


async def serve(config: ServerConfig) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    for uri in config.listen if config.grant else ():
        if plaintext(uri):
            cause, next_step = USELESS
            raise BlockferryError(Code.USAGE, f"cannot listen on {uri}", cause=cause, next=next_step)
    credentials = await in_thread(Credentials, config.tls) if config.tls else None
    specs = [_spec(name, pool) for name, pool in config.pool.items()]
    devices = [_device(name, device, config.insecure) for name, device in config.device.items()]
    pools = await Pools.open(with_devices(specs, devices), config.limits.lease)
    tasks: list[asyncio.Task[None]] = []
    metrics = Metrics(pools)
    pages = Pages({"/metrics": metrics.page})
    try:
        limits = Limits(config.limits, time.monotonic)
        server = rpc.make_server(
            interceptors=[Admission(limits)],
            message_size=config.limits.message_size,
            connections=config.limits.connections,
            streams=config.limits.per_client.calls + REFUSED_STREAMS,
        )
        access = Access(pools, config.grant, credentials)
        services = {
            replication_pb2.DESCRIPTOR.services_by_name["Replication"]: ReplicationService(pools, limits, access),
            replicas_pb2.DESCRIPTOR.services_by_name["Replicas"]: ReplicasService(pools, access, stop),
        }
        for descriptor, servicer in services.items():
            raw = getattr(servicer, "RAW_METHODS", ())
            rpc.add_service(server, descriptor, servicer, access, raw=raw, watch=metrics.call)
        await add_health_and_reflection(server, [descriptor.full_name for descriptor in services])

        addresses = [rpc.bind(server, uri, insecure=config.insecure, credentials=credentials) for uri in config.listen]
        await server.start()
        if config.status_page:
            log.info("status page", url=f"{await pages.open(config.status_page)}/metrics")
        for address in addresses:
            print(f"listening on {address}", flush=True)
        if config.scrub_every:
            tasks.append(asyncio.create_task(Scrubber(pools, config.scrub_every).run(), name="scrubber"))
        if credentials is not None:
            if not config.grant:
                log.warning("whoever has a certificate may do everything", next="say who may do what: [[grant]]")
            tasks.append(asyncio.create_task(credentials.watch(), name="certificates"))
        await stop.wait()
        await server.stop(SHUTDOWN_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await pages.close()
        await pools.close()


def _spec(name: str, pool: PoolConfig) -> PoolSpec:
    allowed = space.Limits(pool.reserve, pool.quota, pool.journal_limit)
    return PoolSpec(name, pool.path, pool.keep_at_least, allowed)


def _device(name: str, device: DeviceConfig, insecure: bool) -> DeviceSpec:
    return DeviceSpec(
        name, device.path, device.journal, device.journal_limit, floor=device.keep_at_least, insecure=insecure
    )


def main() -> int:
    """Entry point of the console script."""
    linux.occupy_standard_descriptors()
    try:
        config = configuration(sys.argv[1:])
        handshakes.watch()
        telemetry.configure_logging()
        linux.keep_freed_memory()
        uvloop.run(serve(config))
    except BlockferryError as error:
        for line in error.lines():
            print(f"blockferry-server: {line}", file=sys.stderr)
        return 1
    return 0
