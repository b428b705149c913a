"""The Replication service: from messages to the replica they name, and back. No decisions are made here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from blockferry.common.access import identity_of
from blockferry.common.address import check_volume_name
from blockferry.common.digests import KEY_SIZE, PIECE_SIZE
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.framing import decode_request
from blockferry.common.regions import BLOCK_SIZE, Geometry, Run, check_region_size, group_runs, runs_of
from blockferry.common.wire import (
    PROTOCOL_VERSION,
    map_to_messages,
    retention_from_wire,
    runs_from_wire,
    runs_to_wire,
)
from blockferry.server import commits
from blockferry.server.access import Access
from blockferry.server.changes import ChangeReceiver
from blockferry.server.generations import Point
from blockferry.server.limits import Limits
from blockferry.server.pools import Pools
from blockferry.server.replica import Replica
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

Context = grpc.aio.ServicerContext[Any, Any]

DIGEST_BATCH = 8 * 1024 * 1024
"""Bytes hashed per answer of GetRegionDigests."""

COMMIT_ID_SIZE = 16


class ReplicationService:
    """Serves `blockferry.v1.Replication` over all pools."""

    RAW_METHODS = ("ApplyChanges",)

    def __init__(self, pools: Pools, limits: Limits, access: Access) -> None:
        self._pools = pools
        self._limits = limits
        self._access = access

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Context) -> pb.OpenSessionResponse:
        if request.protocol_version < 1:
            raise _invalid("the protocol version is missing", f"this server speaks {PROTOCOL_VERSION}")
        check_volume_name(request.volume)
        if request.region_size:
            check_region_size(request.region_size)
        Geometry(request.size, request.region_size or BLOCK_SIZE * 256)
        if request.size > (1 << 63) - 1:
            raise _invalid(f"a volume of {request.size} bytes is not possible", "files end at 2^63 - 1 bytes")
        client = identity_of(context)
        with self._limits.opening(client, request.volume, self._pools.held_sessions()) as opened:
            replica = await self._pools.get_or_create(request.volume, request.region_size, request.pool, request.size)
            session = await replica.open_session(request, self._access.owner(context))
            opened(session.session_id)
        newest = replica.store.generations.newest
        return pb.OpenSessionResponse(
            protocol_version=min(PROTOCOL_VERSION, request.protocol_version),
            session=pb.SessionRef(session_id=session.session_id, epoch=session.epoch),
            replica_uuid=bytes.fromhex(replica.store.identity.uuid),
            digest_key=replica.store.identity.key,
            region_size=session.geometry.region_size,
            size=session.geometry.size,
            generation=newest.number if newest else 0,
            commit_id=newest.commit_id if newest else b"",
            lease_ms=int(replica.lease_seconds * 1000),
            bytes_in_flight=self._limits.bytes_in_flight(client).limit,
            durable_regions=runs_to_wire(runs_of(session.settled, session.geometry.count)),
            base_known=session.altered is not None,
            altered_regions=runs_to_wire(runs_of(session.altered or BitMap(), session.geometry.count)),
            base_doubt=session.doubt,
        )

    async def GetAllocationMap(
        self, request: pb.GetAllocationMapRequest, _: Context
    ) -> AsyncIterator[pb.GetAllocationMapResponse]:
        if request.region_size:
            check_region_size(request.region_size)
        if request.WhichOneof("target") == "session":
            replica = self._by_session(request.session)
            found = await replica.session_allocation(request.session, request.region_size)
            header = _header(replica, None)
        else:
            replica = self._pools.get(request.point.volume)
            unfinished = request.point.number == 0 and replica.store.generations.newest is None
            header = _header(replica, None if unfinished else replica.points.resolve(request.point.number))
            async with (
                replica.points.reading_start() if unfinished else replica.points.reading(header.generation) as volume
            ):
                found = await volume.allocation(request.region_size or replica.store.identity.region_size)
        for message in map_to_messages(found, header):
            yield message

    async def GetRegionDigests(
        self, request: pb.GetRegionDigestsRequest, _: Context
    ) -> AsyncIterator[pb.GetRegionDigestsResponse]:
        if request.WhichOneof("target") == "session":
            replica = self._by_session(request.session)
            if request.key:
                _check_key(request.key)
            session = replica.session
            size = session.geometry.size if session else 0
            for runs in _checked_pieces(request, replica.store.identity.region_size, size):
                found, read = await replica.session_digests(
                    request.session, request.piece_size, runs, fresh=request.bypass_cache, key=request.key
                )
                yield pb.GetRegionDigestsResponse(digests=found, bytes_read=read)
            return
        replica = self._pools.get(request.point.volume)
        _check_key(request.key)
        async with replica.points.reading(request.point.number) as volume:
            region_size = replica.store.identity.region_size
            for runs in _checked_pieces(request, region_size, volume.size):
                found, read = await volume.read_digests(request.piece_size, runs, request.key, region_size)
                yield pb.GetRegionDigestsResponse(digests=found, bytes_read=read)

    async def WriteRegion(self, request: pb.WriteRegionRequest, _: Context) -> pb.WriteRegionResponse:
        response = pb.WriteRegionResponse()
        replica = self._by_session(request.session)
        (result,) = await replica.write_regions([(request, memoryview(request.data))], request.session)
        result.add_to(response.result)
        return response

    async def UnmapRegion(self, request: pb.UnmapRegionRequest, _: Context) -> pb.UnmapRegionResponse:
        response = pb.UnmapRegionResponse()
        result = await self._by_session(request.session).unmap_region(request, request.session)
        result.add_to(response.result)
        return response

    async def ApplyChanges(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[pb.ApplyChangesResponse]:
        first = await anext(requests, None)
        if first is None:
            return
        ref = decode_request(first)[0].session
        replica = self._by_session(ref)
        receiver = ChangeReceiver(replica, ref, self._limits.bytes_in_flight(identity_of(context)))
        try:
            async with contextlib.aclosing(receiver.responses(first, requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            if not receiver.ended_well:
                # The client is gone or must start over: it will not use its lease.
                replica.release(ref)

    async def CommitSessions(self, request: pb.CommitSessionsRequest, _: Context) -> pb.CommitSessionsResponse:
        asked = []
        for commit in request.commits:
            if len(commit.commit_id) != COMMIT_ID_SIZE:
                raise _invalid("the commit id is not usable", f"it has {COMMIT_ID_SIZE} bytes")
            keep = retention_from_wire(commit.keep) if commit.HasField("keep") else None
            replica = self._pools.get(commit.volume)
            pool = self._pools.home(replica).uuid
            asked.append(commits.Asked(replica, commit.session, commit.commit_id, keep, pool))
        response = pb.CommitSessionsResponse()
        for one, point in zip(asked, await commits.commit(asked), strict=True):
            response.commits.add(
                volume=one.replica.name,
                generation=point.number,
                commit_id=point.commit_id,
                committed_at_us=point.committed_at_us,
            )
        return response

    async def AbortSession(self, request: pb.AbortSessionRequest, _: Context) -> pb.AbortSessionResponse:
        replica = self._pools.find_session(request.session.session_id)
        if replica is not None:
            await replica.abort(request.session, discard=request.discard)
        return pb.AbortSessionResponse()

    def _by_session(self, ref: pb.SessionRef) -> Replica:
        replica = self._pools.find_session(ref.session_id)
        if replica is None:
            for one in self._pools.list():
                if ref.session_id and one.store.session.session_id == ref.session_id:
                    raise one.session_over(ref)
            raise BlockferryError(
                Code.STALE_EPOCH,
                "this session is over",
                cause="it ended, or another writer took the replica",
                next="run the sync again; it continues with what is already there",
            )
        return replica


def _check_key(key: bytes) -> None:
    if len(key) != KEY_SIZE:
        raise _invalid("the digest key is not usable", f"a key has {KEY_SIZE} bytes")


def _checked_pieces(request: pb.GetRegionDigestsRequest, region_size: int, size: int) -> list[list[Run]]:
    """The runs of pieces a request asks for, in groups of what is hashed at once; INVALID_ARGUMENT where they are not
    in a volume of `size` bytes."""
    if request.piece_size not in (region_size, PIECE_SIZE, BLOCK_SIZE):
        raise _invalid(
            f"digests per {request.piece_size} bytes are not possible",
            f"a piece has {region_size}, {PIECE_SIZE} or {BLOCK_SIZE} bytes",
        )
    count = -(-size // request.piece_size)
    for run in request.pieces:
        if run.count < 1 or run.first + run.count > count:
            raise _invalid(f"pieces ({run.first}, {run.count}) are not in the volume", f"it has {count} of that size")
    return list(group_runs(runs_from_wire(request.pieces), max(DIGEST_BATCH // request.piece_size, 1)))


def _header(replica: Replica, point: Point | None) -> pb.AllocationMapHeader:
    """What a map describes; without a point it is work that is not committed."""
    return pb.AllocationMapHeader(
        generation=point.number if point else 0,
        commit_id=point.commit_id if point else b"",
        replica_uuid=bytes.fromhex(replica.store.identity.uuid),
    )


def _invalid(what: str, cause: str) -> BlockferryError:
    return BlockferryError(Code.INVALID_ARGUMENT, what, cause=cause, next="nothing was changed; correct the request")
