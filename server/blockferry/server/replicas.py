"""The Replicas service: looking at replicas, reading their committed generations, and handing them over."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import grpc.aio
from blockferry.common.address import check_volume_name
from blockferry.common.digests import is_zero
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import in_thread
from blockferry.server import handover
from blockferry.server.access import Access
from blockferry.server.generations import Promotion
from blockferry.server.pool import Pool
from blockferry.server.pools import Pools
from blockferry.server.replica import Replica
from blockferry.server.room import bytes_held
from blockferry.server.scrub import ScrubRecord, last_scrub, verify_point
from blockferry.v1 import replicas_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]

PROGRESS_SECONDS = 1.0
"""Between two messages of something that takes long."""

HOLD_SECONDS = 10.0
"""Between two messages of HoldPoint: with each it is looked whether the caller may still have it."""

READ_SIZE = 1024 * 1024
"""Bytes of data per message of ReadRegions."""

RESTORED_REPLICA = (
    "its pool was restored from a backup or copied (noticed {}): generations newer than the backup are lost, and the "
    "next sync compares everything"
)
RESTORED_POOL = (
    "restored from a backup or copied (noticed {}): {} of {} replicas have not been synced since; their generations "
    "newer than the backup are lost, and their next sync compares everything"
)


OUT_OF_SERVICE = "it is out of service until its device can be used: {}"


class ReplicasService:
    """Serves `blockferry.v1.Replicas` over all pools."""

    def __init__(self, pools: Pools, access: Access, stopping: asyncio.Event | None = None) -> None:
        """`stopping` is set when calls that would never end by themselves are to end."""
        self._pools = pools
        self._access = access
        self._stopping = stopping or asyncio.Event()

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Context) -> pb.ListReplicasResponse:
        listed = self._listed(self._pools.list(), context)
        return pb.ListReplicasResponse(replicas=[await self._described(replica) for replica in listed])

    async def GetReplica(self, request: pb.GetReplicaRequest, _: Context) -> pb.GetReplicaResponse:
        return pb.GetReplicaResponse(replica=await self._described(self._pools.get(request.volume)))

    async def ListPools(self, request: pb.ListPoolsRequest, context: Context) -> pb.ListPoolsResponse:
        described = [await _describe_pool(pool, self._listed(pool.list(), context)) for pool in self._pools]
        return pb.ListPoolsResponse(pools=described)

    def _listed(self, replicas: list[Replica], context: Context) -> list[Replica]:
        return [replica for replica in replicas if self._access.may_look(context, replica.name)]

    async def ListRecoveryPoints(
        self, request: pb.ListRecoveryPointsRequest, _: Context
    ) -> pb.ListRecoveryPointsResponse:
        replica = self._pools.get(request.volume)
        response = pb.ListRecoveryPointsResponse()
        kept = replica.points.kept()
        content, generations = replica.store.content, replica.store.generations
        for point in reversed(list(generations.points)):
            try:
                problem = await in_thread(content.problem, point)
                held = 0 if problem else await in_thread(content.bytes_held, point)
            except OSError as error:
                # One that cannot be looked at hides none of the others.
                held, problem = 0, f"it cannot be looked at: {os.strerror(error.errno or 0).lower()}"
            if generations.point(point.number) is None:
                # Dropped while the others were looked at.
                continue
            response.points.add(
                number=point.number,
                commit_id=point.commit_id,
                committed_at_us=point.committed_at_us,
                size=point.size,
                bytes_held=held,
                path=content.location(point),
                kept_by=kept[point.number],
                problem=problem,
            )
        return response

    async def VerifyReplica(
        self, request: pb.VerifyReplicaRequest, _: Context
    ) -> AsyncIterator[pb.VerifyReplicaResponse]:
        replica = self._pools.get(request.point.volume)
        async with contextlib.aclosing(verify_point(replica, request.point.number)) as found:
            async for response in found:
                yield response

    async def ReadRegions(self, request: pb.ReadRegionsRequest, _: Context) -> AsyncIterator[pb.ReadRegionsResponse]:
        replica = self._pools.get(request.point.volume)
        async with replica.points.reading(request.point.number) as volume:
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

    async def HoldPoint(self, request: pb.HoldPointRequest, _: Context) -> AsyncIterator[pb.HoldPointResponse]:
        replica = self._pools.get(request.point.volume)
        with replica.points.holding(request.point.number) as point:
            while not self._stopping.is_set():
                yield pb.HoldPointResponse(generation=point.number, commit_id=point.commit_id)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), HOLD_SECONDS)
        raise BlockferryError(
            Code.UNAVAILABLE,
            "the point is no longer held",
            cause="the server is being stopped",
            next="hold it again when the server runs",
            volume=replica.name,
        )

    # --- handing over ---------------------------------------------------------------------------------------------

    async def PromoteReplica(
        self, request: pb.PromoteReplicaRequest, _: Context
    ) -> AsyncIterator[pb.PromoteReplicaResponse]:
        replica = self._pools.get(request.point.volume)
        _check_confirmed(request.confirm, replica.name)
        state = pb.PromoteReplicaResponse()

        def progress(done: int, total: int) -> None:
            state.bytes_done, state.bytes_total = done, total

        work = asyncio.create_task(handover.promote(replica, request.point.number, progress))
        try:
            while not (await asyncio.wait([work], timeout=PROGRESS_SECONDS))[0]:
                yield state
            promotion = await work
        finally:
            # It goes on without whoever asked; nobody else may hear of its failure.
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
        state.promotion.CopyFrom(_promotion(replica, promotion))
        yield state

    async def DemoteReplica(self, request: pb.DemoteReplicaRequest, _: Context) -> pb.DemoteReplicaResponse:
        replica = self._pools.get(request.volume)
        _check_confirmed(request.confirm, replica.name)
        point = await handover.demote(replica, keep_changes=request.keep_changes)
        return pb.DemoteReplicaResponse(generation=point.number, commit_id=point.commit_id)

    async def DeleteReplica(self, request: pb.DeleteReplicaRequest, _: Context) -> pb.DeleteReplicaResponse:
        replica = self._pools.get(request.volume)
        _check_confirmed(request.confirm, replica.name)
        await self._pools.delete(replica)
        return pb.DeleteReplicaResponse()

    async def AdoptReplica(self, request: pb.AdoptReplicaRequest, _: Context) -> pb.AdoptReplicaResponse:
        check_volume_name(request.volume)
        replica, size = await self._pools.adopt(request.volume, request.seed, request.region_size, request.pool)
        return pb.AdoptReplicaResponse(size=size, region_size=replica.store.identity.region_size)

    async def _described(self, replica: Replica) -> pb.Replica:
        return await _describe(replica, self._pools.home(replica))


def _why(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _check_confirmed(confirm: str, name: str) -> None:
    if confirm != name:
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            f"{name} is not confirmed",
            cause=f"the request repeats {confirm!r} instead of the name",
            next="repeat the name of the replica; nothing was changed",
            volume=name,
        )


def _promotion(replica: Replica, promotion: Promotion) -> pb.Promotion:
    return pb.Promotion(
        generation=promotion.number,
        commit_id=promotion.commit_id,
        promoted_at_us=promotion.at_us,
        path=replica.store.content.handed_out,
    )


async def _describe(replica: Replica, pool: Pool) -> pb.Replica:
    store, generations = replica.store, replica.store.generations
    newest, promoted, session = generations.newest, generations.promoted, replica.session
    scrub = await in_thread(last_scrub, store)
    described = pb.Replica(
        volume=replica.name,
        replica_uuid=bytes.fromhex(store.identity.uuid),
        size=generations.committed_size or store.session.size or generations.adopted_size or 0,
        region_size=store.identity.region_size,
        state=f"REPLICA_STATE_{replica.state.value}",
        generation=newest.number if newest else 0,
        commit_id=newest.commit_id if newest else b"",
        committed_at_us=newest.committed_at_us if newest else 0,
        bytes_held=await in_thread(bytes_held, store.directory),
        path=store.content.location(newest) if newest is not None else "",
        session_client=session.client if session else "",
        pool=replica.pool,
        kind=store.content.kind,
        scrub=_scrub_to_wire(scrub) if scrub is not None else None,
        notice="; ".join(await _notices(replica, pool)),
    )
    if promoted is not None:
        described.promotion.CopyFrom(_promotion(replica, promoted))
    return described


async def _notices(replica: Replica, pool: Pool) -> list[str]:
    found = [RESTORED_REPLICA.format(_date(pool.restored_at_us))] if pool.is_behind(replica) else []
    trouble = await replica.store.content.trouble()
    return [*found, OUT_OF_SERVICE.format(trouble)] if trouble else found


def _scrub_to_wire(scrub: ScrubRecord) -> pb.Scrub:
    return pb.Scrub(
        at_us=scrub.at_us,
        generation=scrub.generation,
        bytes=scrub.bytes,
        rotten=[pb.ReadRange(offset=offset, length=length) for offset, length in scrub.rotten],
        problem=scrub.problem,
    )


async def _describe_pool(pool: Pool, replicas: list[Replica]) -> pb.Pool:
    behind = sum(pool.is_behind(replica) for replica in replicas)
    description = pb.Pool(
        name=pool.name,
        path=str(pool.path),
        kind="clones" if pool.clones else "journal",
        quota=pool.room.limits.quota,
        devices=sorted(pool.devices),
        replicas=len(replicas),
        notice=RESTORED_POOL.format(_date(pool.restored_at_us), behind, len(replicas)) if behind else "",
    )
    try:
        found = await pool.room.measure()
        description.total, description.free, description.reserve = found.total, found.free, found.reserve
        for replica in replicas:
            description.bytes_held += await in_thread(bytes_held, replica.store.directory)
    except OSError as error:
        # One that cannot be looked at hides none of the others.
        description.problem = f"it cannot be looked at: {_why(error)}"
    return description


def _date(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")
