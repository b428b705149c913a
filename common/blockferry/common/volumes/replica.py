"""A committed generation of a replica, read over gRPC: `grpc://HOST:PORT/VOLUME[@NUMBER]`, read-only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NoReturn

from blockferry.common.address import Address
from blockferry.common.digests import digest_size
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Run, runs_of
from blockferry.common.rpc import Connection
from blockferry.common.settings import Tls
from blockferry.common.volumes.volume import ReadOnlyVolume
from blockferry.common.wire import map_from_messages, runs_to_wire
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

AGAIN_SECONDS = 0.5
"""Between two attempts to reach a server that is away: it takes about that long to start."""


class ReplicaVolume(ReadOnlyVolume):
    """One generation, pinned when it is opened: a later commit does not change what is read."""

    kind = "a committed generation"
    otherwise = "sync to the replica instead"

    def __init__(self, connection: Connection, point: pb.PointRef, found: AllocationMap, commit_id: bytes) -> None:
        self.uri = connection.address.uri
        self.size = found.geometry.size
        self.block_size = BLOCK_SIZE
        self.snapshot_id = f"commit:{commit_id.hex()}"
        self._connection = connection
        self._point = point
        self._map = found
        self.commit_id = commit_id
        self.patience = 0.0
        """Seconds for which a read is repeated while the server is away."""

    @classmethod
    async def open(cls, uri: str, *, insecure: bool = False, tls: Tls | None = None) -> ReplicaVolume:
        """Raises NOT_FOUND where there is no such replica or no committed generation."""
        address = Address.parse(uri).require_volume()
        connection = Connection(address, insecure=insecure, tls=tls)
        try:
            point = pb.PointRef(volume=address.volume, number=address.number)
            found, header = await fetch_map(connection, point, 0)
            if header.generation == 0:
                raise BlockferryError(
                    Code.NOT_FOUND,
                    f"{uri} has no committed generation",
                    cause="its first sync has not finished",
                    next="finish it with blockferry sync",
                    volume=uri,
                )
            point.number = header.generation
            return cls(connection, point, found, header.commit_id)
        except BaseException:
            await connection.close()
            raise

    @property
    def zeroing(self) -> str:
        return "read-only"

    @property
    def generation(self) -> int:
        """Its number."""
        return self._point.number

    @property
    def region_size(self) -> int:
        """The replica's own region size in bytes."""
        return self._map.geometry.region_size

    async def allocation(self, region_size: int) -> AllocationMap:
        if region_size == self._map.geometry.region_size:
            return self._map
        found, _ = await fetch_map(self._connection, self._point, region_size)
        return found

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        # The generation never changes, and neither does its map.
        size, end = self.region_size, offset + length
        window = BitMap()
        window.add_range(offset // size, -(-end // size))
        found = []
        for first, count in runs_of(self._map.regions & window, self.geometry.count):
            start = max(first * size, offset)
            found.append((start, min((first + count) * size, end) - start))
        return found

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.read_many([(offset, buffer)])

    async def read_many(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        """In one call; what is proven to be zeros is not asked for."""
        wanted: list[tuple[int, memoryview]] = []
        for offset, buffer in extents:
            if await self.data_extents(offset, len(buffer)):
                wanted.append((offset, buffer))
            else:
                buffer[:] = bytes(len(buffer))
        if wanted:
            await self._with_patience(wanted)

    async def _with_patience(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.patience
        while True:
            try:
                return await self._read(extents)
            except BlockferryError as error:
                if error.code is not Code.UNAVAILABLE or clock() + AGAIN_SECONDS > deadline:
                    raise
            await asyncio.sleep(AGAIN_SECONDS)

    async def _read(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        request = replicas.ReadRegionsRequest(point=self._point)
        for offset, buffer in extents:
            request.ranges.add(offset=offset, length=len(buffer))
        asked = iter(extents)
        offset, buffer = next(asked)
        done = 0
        async for part in self._connection.stream("Replicas/ReadRegions", request, replicas.ReadRegionsResponse):
            if done == len(buffer):
                offset, buffer = next(asked, (0, memoryview(b"")))
                done = 0
            length = part.zeros or len(part.data)
            if part.offset != offset + done or done + length > len(buffer):
                raise _broken(self.uri, offset + done)
            buffer[done : done + length] = bytes(length) if part.zeros else part.data
            done += length
        if done != len(buffer) or next(asked, None) is not None:
            raise _broken(self.uri, offset + done)

    async def keep(self, told: Callable[[BlockferryError | None], None]) -> NoReturn:
        """Keep the generation from being dropped, until cancelled. A server that goes away is asked again, until it is
        back. `told` is called whenever the server confirms (None) or is away (why). Raises NOT_FOUND where the
        generation was dropped meanwhile, and SOURCE_CHANGED where its number means another one."""
        request = replicas.HoldPointRequest(point=self._point)
        while True:
            try:
                async for held in self._connection.stream("Replicas/HoldPoint", request, replicas.HoldPointResponse):
                    if held.commit_id != self.commit_id:
                        raise BlockferryError(
                            Code.SOURCE_CHANGED,
                            f"{self.uri} is another generation now",
                            cause="the replica was deleted or restored, and synced anew",
                            next="look at its recovery points, and begin again with one of them",
                            volume=self.uri,
                            expected=self.commit_id.hex(),
                            found=held.commit_id.hex(),
                        )
                    told(None)
            except BlockferryError as error:
                if error.code is not Code.UNAVAILABLE:
                    raise
                told(error)
            await asyncio.sleep(AGAIN_SECONDS)

    async def read_digests(
        self, piece_size: int, pieces: Sequence[Run], key: bytes, region_size: int
    ) -> tuple[bytes, int]:
        if piece_size == region_size != self.region_size:
            # The server tells regions from smaller pieces by its own region size; read instead of guessing.
            return await super().read_digests(piece_size, pieces, key, region_size)
        request = pb.GetRegionDigestsRequest(
            point=self._point, piece_size=piece_size, pieces=runs_to_wire(pieces), key=key
        )
        found, read = [], 0
        async for part in self._connection.stream("Replication/GetRegionDigests", request, pb.GetRegionDigestsResponse):
            found.append(part.digests)
            read += part.bytes_read
        joined = b"".join(found)
        if len(joined) != sum(count for _, count in pieces) * digest_size(piece_size, region_size):
            raise _broken(self.uri, pieces[0][0] * piece_size)
        return joined, read

    async def close(self) -> None:
        await self._connection.close()

    @property
    def geometry(self) -> Geometry:
        """The replica's own geometry."""
        return self._map.geometry


async def fetch_map(
    connection: Connection, point: pb.PointRef, region_size: int = 0
) -> tuple[AllocationMap, pb.AllocationMapHeader]:
    """The map of a committed generation and what it describes; `region_size` 0 for the replica's own. Generation 0 in
    the header: nothing is committed, and the map is that of an unfinished first sync."""
    request = pb.GetAllocationMapRequest(point=point, region_size=region_size)
    messages: AsyncIterator[pb.GetAllocationMapResponse] = connection.stream(
        "Replication/GetAllocationMap", request, pb.GetAllocationMapResponse
    )
    return await map_from_messages(messages)


def _broken(uri: str, offset: int) -> BlockferryError:
    return BlockferryError(
        Code.PROTOCOL,
        f"{uri} answered with other bytes than asked for",
        next="check that both sides run a released version of blockferry",
        offset=offset,
    )
