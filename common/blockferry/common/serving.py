"""What every program that serves has on always: health checking and reflection."""

from __future__ import annotations

from collections.abc import Sequence

from blockferry.common.rpc import Server
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection


async def add_health_and_reflection(server: Server, names: Sequence[str]) -> None:
    """For services with these full names, all of which serve from now on."""
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for name in ["", *names]:
        await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
