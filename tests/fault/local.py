"""The services of a server inside the test's own process, over real files: for faults that no client can cause."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from blockferry.common import disk, rpc
from blockferry.common.config import LimitsConfig
from blockferry.common.flow import ByteBudget
from blockferry.common.retention import Retention
from blockferry.server import pool as pool_module
from blockferry.server.access import Access
from blockferry.server.devices import DeviceSpec
from blockferry.server.limits import Limits
from blockferry.server.pool import Pool
from blockferry.server.pools import Pools
from blockferry.server.replica import Replica
from blockferry.server.replicas import ReplicasService
from blockferry.server.replication import ReplicationService
from blockferry.v1 import replicas_pb2 as replicas
from blockferry.v1 import replication_pb2 as pb

from tests.fault.raw import REGION, change_message, wire_runs, write_request


class _Nobody:
    """All that the services ask of a gRPC context: who calls."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return "unix:"


NO_CONTEXT: Any = _Nobody()


class Clock:
    """Stands in for the `time` module of replica.py: leases and pins follow it, asyncio does not."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        """Monotonic seconds."""
        return self.now


class Local:
    """One pool with its services. Every refusal is a BlockferryError."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        pools = Pools([pool])
        self.access = Access(pools)
        self.limits = Limits(LimitsConfig(bytes_in_flight=64 * 1024 * 1024), time.monotonic)
        self.replication = ReplicationService(pools, self.limits, self.access)
        self.replicas = ReplicasService(pools, self.access)

    @classmethod
    async def start(
        cls,
        directory: Path,
        *,
        lease: float = 60.0,
        floor: Retention | None = None,
        clones: bool | None = None,
        devices: Sequence[DeviceSpec] = (),
    ) -> Local:
        """Open a pool; `clones` False: as on a file system that cannot clone."""
        await asyncio.to_thread(directory.mkdir, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            if clones is False:
                patch.setattr(pool_module, "_can_clone", lambda path: False)
            pool = await Pool.open("main", directory, lease, floor or Retention(last=1), devices=devices)
        assert clones is None or pool.clones == clones, f"{directory} is on a file system that cannot clone files"
        return cls(pool)

    async def stop(self) -> None:
        """A clean shutdown."""
        await self.pool.close()

    async def die(self) -> None:
        """As if the process were killed: files are let go of as they are, and nothing is noted."""
        for replica in self.pool.list():
            await replica.stop_completing()
            if replica.session is not None:
                await replica.session.volume.close()
            replica.store.abandon()
        self.pool._replicas.clear()
        await self.pool.close()

    @property
    def budget(self) -> ByteBudget:
        """The bytes of changes that all streams together may have in flight."""
        return self.limits.budget

    def replica(self, volume: str) -> Replica:
        """What a client never sees."""
        return self.pool.get(volume)

    # --- calls ----------------------------------------------------------------------------------------------------

    async def open(self, volume: str, size: int, **fields: Any) -> pb.OpenSessionResponse:
        """OpenSession."""
        request = pb.OpenSessionRequest(
            protocol_version=1, volume=volume, size=size, **{"region_size": REGION, **fields}
        )
        return await self.replication.OpenSession(request, NO_CONTEXT)

    async def write(self, session: pb.SessionRef, offset: int, data: bytes) -> pb.ChangeResult:
        """WriteRegion of a whole region."""
        return await self.change(write_request(offset, data, session))

    async def change(self, request: pb.WriteRegionRequest) -> pb.ChangeResult:
        """WriteRegion."""
        return (await self.replication.WriteRegion(request, NO_CONTEXT)).result

    async def unmap(self, session: pb.SessionRef, offset: int, length: int) -> pb.ChangeResult:
        """UnmapRegion."""
        request = pb.UnmapRegionRequest(session=session, offset=offset, length=length)
        return (await self.replication.UnmapRegion(request, NO_CONTEXT)).result

    async def apply(self, messages: Sequence[pb.ApplyChangesRequest | bytes]) -> list[pb.ApplyChangesResponse]:
        """ApplyChanges; bytes go in as they are."""

        async def requests() -> AsyncIterator[bytes]:
            for message in messages:
                yield message if isinstance(message, bytes) else message.SerializeToString()

        return [answer async for answer in self.replication.ApplyChanges(requests(), NO_CONTEXT)]

    async def flush(self, session: pb.SessionRef) -> None:
        """Make everything so far durable, by a stream of one message."""
        message = change_message(1, session=session, flush=True)
        message.last = True
        answers = await self.apply([message])
        assert answers[-1].durable == 1

    async def commit(
        self, volume: str, session: pb.SessionRef, commit_id: bytes, keep: pb.Retention | None = None
    ) -> pb.Committed:
        """CommitSessions."""
        request = pb.CommitSessionsRequest()
        request.commits.add(session=session, volume=volume, commit_id=commit_id, keep=keep)
        return (await self.replication.CommitSessions(request, NO_CONTEXT)).commits[0]

    async def abort(self, session: pb.SessionRef, *, discard: bool = False) -> None:
        """AbortSession."""
        await self.replication.AbortSession(pb.AbortSessionRequest(session=session, discard=discard), NO_CONTEXT)

    async def digests(
        self, session: pb.SessionRef, runs: Sequence[tuple[int, int]], piece_size: int = REGION
    ) -> tuple[bytes, int]:
        """GetRegionDigests of a session, and the bytes read for them."""
        request = pb.GetRegionDigestsRequest(session=session, piece_size=piece_size, pieces=wire_runs(runs))
        answers = [one async for one in self.replication.GetRegionDigests(request, NO_CONTEXT)]
        return b"".join(one.digests for one in answers), sum(one.bytes_read for one in answers)

    async def map(self, session: pb.SessionRef) -> set[int]:
        """GetAllocationMap of a session: the allocated regions."""
        request = pb.GetAllocationMapRequest(session=session)
        answers = [one async for one in self.replication.GetAllocationMap(request, NO_CONTEXT)]
        return {
            region for one in answers for run in one.allocated for region in range(run.first, run.first + run.count)
        }

    async def show(self, volume: str) -> replicas.Replica:
        """GetReplica."""
        return (await self.replicas.GetReplica(replicas.GetReplicaRequest(volume=volume), NO_CONTEXT)).replica

    async def points(self, volume: str) -> list[replicas.RecoveryPoint]:
        """ListRecoveryPoints, newest first."""
        request = replicas.ListRecoveryPointsRequest(volume=volume)
        return list((await self.replicas.ListRecoveryPoints(request, NO_CONTEXT)).points)

    async def read(self, volume: str, number: int, offset: int, length: int) -> bytes:
        """ReadRegions of one range."""
        request = replicas.ReadRegionsRequest(point=pb.PointRef(volume=volume, number=number))
        request.ranges.add(offset=offset, length=length)
        return b"".join([one.data or bytes(one.zeros) async for one in self.replicas.ReadRegions(request, NO_CONTEXT)])


@contextlib.asynccontextmanager
async def served(local: Local) -> AsyncIterator[str]:
    """Serve it over gRPC from this process; gives the address."""
    server = rpc.make_server()
    service = pb.DESCRIPTOR.services_by_name["Replication"]
    rpc.add_service(server, service, local.replication, local.access, raw=local.replication.RAW_METHODS)
    address = rpc.bind(server, "grpc://127.0.0.1:0", insecure=False)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


class Stall:
    """A disk that stands still: the next call of one of disk.py's functions waits until `go`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.going = threading.Event()

    async def wait(self) -> None:
        """Until a call has been held up."""
        await asyncio.to_thread(self.reached.wait, 30)
        assert self.reached.is_set(), "the disk was never called"

    def go(self) -> None:
        """Let it go on, and everything after it."""
        self.going.set()


@contextlib.contextmanager
def stalled(monkeypatch: pytest.MonkeyPatch, name: str, *, once: bool = False) -> Any:
    """Hold up the next call of `disk.name`, and every one after it unless `once`."""
    stall = Stall()
    real: Callable[..., Any] = getattr(disk, name)

    def held(*args: Any) -> Any:
        if once and stall.reached.is_set():
            return real(*args)
        stall.reached.set()
        assert stall.going.wait(60), "nobody let the disk go on"
        return real(*args)

    monkeypatch.setattr(disk, name, held)
    try:
        yield stall
    finally:
        stall.go()
        monkeypatch.setattr(disk, name, real)
