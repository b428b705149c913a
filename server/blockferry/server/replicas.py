"""The Replicas service: looking at replicas and reading their committed generations."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from blockferry.common.digests import is_zero
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import in_thread
from blockferry.server.pool import Pool
from blockferry.server.replica import Replica
from blockferry.server.scrub import verify_point
from blockferry.v1 import replicas_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]

READ_SIZE = 1024 * 1024
"""Bytes of data per message of ReadRegions."""


class ReplicasService:
    """Serves `blockferry.v1.Replicas` over one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def ListReplicas(self, request: pb.ListReplicasRequest, _: Context) -> pb.ListReplicasResponse:
        return pb.ListReplicasResponse(replicas=[await _describe(replica) for replica in self._pool.list()])

    async def GetReplica(self, request: pb.GetReplicaRequest, _: Context) -> pb.GetReplicaResponse:
        return pb.GetReplicaResponse(replica=await _describe(self._pool.get(request.volume)))

    async def ListRecoveryPoints(
        self, request: pb.ListRecoveryPointsRequest, _: Context
    ) -> pb.ListRecoveryPointsResponse:
        replica = self._pool.get(request.volume)
        response = pb.ListRecoveryPointsResponse()
        kept = replica.kept()
        for point in reversed(list(replica.store.points)):
            try:
                held, problem = await in_thread(replica.store.bytes_held, point), ""
            except OSError as error:
                if replica.store.point(point.number) is None:
                    # Dropped while the others were looked at.
                    continue
                # One that cannot be looked at hides none of the others.
                held, problem = 0, _problem(error)
            response.points.add(
                number=point.number,
                commit_id=point.commit_id,
                committed_at_us=point.committed_at_us,
                size=point.size,
                bytes_held=held,
                path=str(replica.store.image(point)),
                kept_by=kept[point.number],
                problem=problem,
            )
        return response

    async def VerifyReplica(
        self, request: pb.VerifyReplicaRequest, _: Context
    ) -> AsyncIterator[pb.VerifyReplicaResponse]:
        replica = self._pool.get(request.point.volume)
        async with contextlib.aclosing(verify_point(replica, request.point.number)) as found:
            async for response in found:
                yield response

    async def ReadRegions(self, request: pb.ReadRegionsRequest, _: Context) -> AsyncIterator[pb.ReadRegionsResponse]:
        replica = self._pool.get(request.point.volume)
        async with replica.reading(request.point.number) as volume:
            for wanted in request.ranges:
                if wanted.length < 1 or wanted.offset + wanted.length > volume.size:
                    raise BlockferryError(
                        Code.INVALID_ARGUMENT,
                        "cannot read",
                        cause=f"the range is empty or ends past {volume.size} bytes",
                        next="correct the request",
                        volume=replica.name,
                        offset=wanted.offset,
                        length=wanted.length,
                    )
            for wanted in request.ranges:
                end = wanted.offset + wanted.length
                for offset in range(wanted.offset, end, READ_SIZE):
                    part = memoryview(bytearray(min(READ_SIZE, end - offset)))
                    await volume.read_into(offset, part)
                    if is_zero(part):
                        yield pb.ReadRegionsResponse(offset=offset, zeros=len(part))
                    else:
                        yield pb.ReadRegionsResponse(offset=offset, data=bytes(part))


def _problem(error: OSError) -> str:
    """What an image that cannot be opened means for its recovery point."""
    if isinstance(error, FileNotFoundError):
        return "its image is missing"
    return f"its image cannot be looked at: {os.strerror(error.errno).lower() if error.errno else error}"


async def _describe(replica: Replica) -> pb.Replica:
    store = replica.store
    newest = store.newest
    session = replica.session
    return pb.Replica(
        volume=replica.name,
        replica_uuid=bytes.fromhex(store.identity.uuid),
        size=store.committed_size or store.session.size,
        region_size=store.identity.region_size,
        state=f"REPLICA_STATE_{replica.state.value}",
        generation=newest.number if newest else 0,
        commit_id=newest.commit_id if newest else b"",
        committed_at_us=newest.committed_at_us if newest else 0,
        bytes_held=await in_thread(store.total_bytes_held),
        path=str(replica.path or ""),
        unsafe=store.overwritten,
        session_client=session.client if session else "",
        pool=replica.pool,
    )
