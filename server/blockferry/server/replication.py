"""The Replication service: from messages to the replica they name, and back. No decisions are made here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from blockferry.common.address import check_volume_name
from blockferry.common.digests import KEY_SIZE, PIECE_SIZE
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE, Geometry, check_region_size, split_runs
from blockferry.common.volumes import Volume
from blockferry.common.wire import PROTOCOL_VERSION, map_to_messages, runs_from_wire
from blockferry.server.pool import Pool
from blockferry.server.replica import Replica
from blockferry.server.store import Point
from blockferry.v1 import replication_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]

DIGEST_BATCH = 8 * 1024 * 1024
"""Bytes hashed per answer of GetRegionDigests."""

COMMIT_ID_SIZE = 16


class ReplicationService:
    """Serves `blockferry.v1.Replication` over one pool."""

    def __init__(self, pool: Pool, bytes_in_flight: int) -> None:
        self._pool = pool
        self._bytes_in_flight = bytes_in_flight

    async def OpenSession(self, request: pb.OpenSessionRequest, _: Context) -> pb.OpenSessionResponse:
        if request.protocol_version < 1:
            raise _invalid("the protocol version is missing", f"this server speaks {PROTOCOL_VERSION}")
        check_volume_name(request.volume)
        if request.region_size:
            check_region_size(request.region_size)
        Geometry(request.size, request.region_size or BLOCK_SIZE * 256)
        if request.size > (1 << 63) - 1:
            raise _invalid(f"a volume of {request.size} bytes is not possible", "files end at 2^63 - 1 bytes")
        replica = await self._pool.get_or_create(request.volume, request.region_size)
        session = await replica.open_session(request)
        newest = replica.store.newest
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
            bytes_in_flight=self._bytes_in_flight,
        )

    @contextlib.asynccontextmanager
    async def _target(
        self, request: pb.GetAllocationMapRequest | pb.GetRegionDigestsRequest
    ) -> AsyncIterator[tuple[Replica, Volume, pb.AllocationMapHeader]]:
        """What a request reads: the volume of its session, or a committed generation."""
        if request.WhichOneof("target") == "session":
            replica = self._by_session(request.session)
            async with replica.using(request.session) as session:
                yield replica, session.volume, _header(replica, None)
            return
        replica = self._pool.get(request.point.volume)
        if request.point.number == 0 and replica.store.newest is None:
            async with replica.reading_start() as volume:
                yield replica, volume, _header(replica, None)
            return
        point = replica.resolve(request.point.number)
        async with replica.reading(point.number) as volume:
            yield replica, volume, _header(replica, point)

    async def GetAllocationMap(
        self, request: pb.GetAllocationMapRequest, _: Context
    ) -> AsyncIterator[pb.GetAllocationMapResponse]:
        if request.region_size:
            check_region_size(request.region_size)
        async with self._target(request) as (replica, volume, header):
            found = await volume.allocation(request.region_size or replica.store.identity.region_size)
            for message in map_to_messages(found, header):
                yield message

    async def GetRegionDigests(
        self, request: pb.GetRegionDigestsRequest, context: Context
    ) -> AsyncIterator[pb.GetRegionDigestsResponse]:
        async with self._target(request) as (replica, volume, _):
            region_size = replica.store.identity.region_size
            if request.piece_size not in (region_size, PIECE_SIZE, BLOCK_SIZE):
                raise _invalid(
                    f"digests per {request.piece_size} bytes are not possible",
                    f"a piece has {region_size}, {PIECE_SIZE} or {BLOCK_SIZE} bytes",
                )
            key = request.key or (replica.store.identity.key if request.HasField("session") else b"")
            if len(key) != KEY_SIZE:
                raise _invalid("the digest key is not usable", f"a key has {KEY_SIZE} bytes")
            pieces = list(runs_from_wire(request.pieces))
            count = -(-volume.size // request.piece_size)
            for first, length in pieces:
                if length < 1 or first + length > count:
                    raise _invalid(
                        f"pieces ({first}, {length}) are not in the volume", f"it has {count} pieces of that size"
                    )
            for run in split_runs(pieces, max(DIGEST_BATCH // request.piece_size, 1)):
                found = await volume.digests(request.piece_size, [run], key, region_size)
                read = min(run[1] * request.piece_size, volume.size - run[0] * request.piece_size)
                yield pb.GetRegionDigestsResponse(digests=found, bytes_read=read)

    async def WriteRegion(self, request: pb.WriteRegionRequest, _: Context) -> pb.WriteRegionResponse:
        response = pb.WriteRegionResponse()
        await self._apply(pb.Change(write=request), request.session, response.result)
        return response

    async def UnmapRegion(self, request: pb.UnmapRegionRequest, _: Context) -> pb.UnmapRegionResponse:
        response = pb.UnmapRegionResponse()
        await self._apply(pb.Change(unmap=request), request.session, response.result)
        return response

    async def ApplyChanges(
        self, requests: AsyncIterator[pb.ApplyChangesRequest], _: Context
    ) -> AsyncIterator[pb.ApplyChangesResponse]:
        ref = pb.SessionRef()
        expected = 1
        try:
            async for request in requests:
                if request.HasField("session"):
                    ref = request.session
                if request.sequence != expected:
                    raise _invalid(f"change message {request.sequence} is out of order", f"{expected} was due")
                expected += 1
                response = pb.ApplyChangesResponse(received=request.sequence)
                for change in request.changes:
                    mismatch = await self._apply(change, ref, response.totals)
                    if mismatch:
                        response.mismatched_offsets.append(change.write.offset)
                if not request.changes:
                    async with self._by_session(ref).using(ref):
                        pass
                if request.flush:
                    async with self._by_session(ref).using(ref) as session:
                        await session.volume.flush()
                    response.durable = request.sequence
                yield response
        finally:
            # A client that closes the stream goes on to commit, or is gone and will not use its lease.
            replica = self._pool.find_session(ref.session_id)
            if replica is not None:
                await replica.release(ref)

    async def _apply(self, change: pb.Change, ref: pb.SessionRef, totals: pb.ChangeResult) -> bool:
        """Apply a change, whichever way it came; whether the region's digest does not match."""
        replica = self._by_session(ref)
        match change.WhichOneof("change"):
            case "write":
                result = await replica.write_region(change.write, ref)
            case "unmap":
                result = await replica.unmap_region(change.unmap, ref)
            case _:
                raise _invalid("a change without content", "it is neither a write nor an unmap")
        result.add_to(totals)
        return result.mismatch

    async def CommitSessions(self, request: pb.CommitSessionsRequest, _: Context) -> pb.CommitSessionsResponse:
        if len(request.commits) != 1:
            raise _invalid(
                f"cannot commit {len(request.commits)} sessions at once", "this server commits one at a time"
            )
        response = pb.CommitSessionsResponse()
        for commit in request.commits:
            if len(commit.commit_id) != COMMIT_ID_SIZE:
                raise _invalid("the commit id is not usable", f"it has {COMMIT_ID_SIZE} bytes")
            point = await self._pool.get(commit.volume).commit(commit.session, commit.commit_id)
            response.commits.add(
                volume=commit.volume,
                generation=point.number,
                commit_id=point.commit_id,
                committed_at_us=point.committed_at_us,
            )
        return response

    async def AbortSession(self, request: pb.AbortSessionRequest, _: Context) -> pb.AbortSessionResponse:
        replica = self._pool.find_session(request.session.session_id)
        if replica is not None:
            await replica.abort(request.session, discard=request.discard)
        return pb.AbortSessionResponse()

    def _by_session(self, ref: pb.SessionRef) -> Replica:
        replica = self._pool.find_session(ref.session_id)
        if replica is None:
            raise BlockferryError(
                Code.STALE_EPOCH,
                "this session is over",
                cause="it ended, another writer took the replica, or the server was restarted",
                next="run the sync again; it continues with what is already there",
            )
        return replica


def _header(replica: Replica, point: Point | None) -> pb.AllocationMapHeader:
    """What a map describes; without a point it is work that is not committed."""
    return pb.AllocationMapHeader(
        generation=point.number if point else 0,
        commit_id=point.commit_id if point else b"",
        replica_uuid=bytes.fromhex(replica.store.identity.uuid),
    )


def _invalid(what: str, cause: str) -> BlockferryError:
    return BlockferryError(Code.INVALID_ARGUMENT, what, cause=cause, next="nothing was changed; correct the request")
