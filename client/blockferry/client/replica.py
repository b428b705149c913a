"""One session with one replica: everything `sync` says to the destination goes through here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from blockferry.client.report import Tally
from blockferry.common.address import Address
from blockferry.common.digests import digest_size
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.flow import AllOf, ByteBudget
from blockferry.common.framing import Outgoing, encode_request
from blockferry.common.regions import AllocationMap, Run
from blockferry.common.retention import Retention
from blockferry.common.rpc import Connection, from_status
from blockferry.common.wire import PROTOCOL_VERSION, map_from_messages, retention_to_wire, runs_to_wire
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

COMMIT_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Pauses between attempts to learn whether a commit happened: a server that restarts is back within them."""

STALL_SECONDS = 3.0
"""Without an acknowledgement for this long people are told that the destination does not keep up."""


class ReplicaSession:
    """An open session, until it is committed (`commit_sessions`) or aborted."""

    def __init__(self, connection: Connection, volume: str, opened: pb.OpenSessionResponse) -> None:
        self._connection = connection
        self.volume = volume
        self.ref = opened.session
        self.key = opened.digest_key
        self.region_size = opened.region_size
        self.replica_uuid = opened.replica_uuid
        self.lease_seconds = opened.lease_ms / 1000
        self.bytes_in_flight = opened.bytes_in_flight
        self.newest_commit_id = opened.commit_id
        self.newest_generation = opened.generation
        self.durable = BitMap()
        """Regions that are durable from an interrupted session of the same immutable snapshot."""
        for run in opened.durable_regions:
            self.durable.add_range(run.first, run.first + run.count)
        self.altered: BitMap | None = None
        """Regions in which the session may begin with something else than the newest generation holds; None: nobody can
        say, and `doubt` says why."""
        self.doubt = opened.base_doubt or "the server does not say what a session begins with"
        if opened.base_known:
            self.altered = BitMap()
            for run in opened.altered_regions:
                self.altered.add_range(run.first, run.first + run.count)

    @classmethod
    async def open(
        cls,
        connection: Connection,
        address: Address,
        size: int,
        *,
        region_size: int = 0,
        grow: bool = False,
        snapshot_id: str = "",
        pool: str = "",
    ) -> ReplicaSession:
        """Take the replica for writing; it is created if it does not exist."""
        if address.number:
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"cannot write to {address.uri}",
                cause="a committed generation never changes",
                next="leave out the @number",
            )
        opened = await connection.call(
            "Replication/OpenSession",
            pb.OpenSessionRequest(
                protocol_version=PROTOCOL_VERSION,
                volume=address.volume,
                size=size,
                region_size=region_size,
                grow=grow,
                client=f"{socket.gethostname()} (process {os.getpid()})",
                snapshot_id=snapshot_id,
                pool=pool,
            ),
            pb.OpenSessionResponse,
        )
        return cls(connection, address.volume, opened)

    async def allocation(self) -> AllocationMap:
        """The destination's map."""
        found, _ = await map_from_messages(
            self._connection.stream(
                "Replication/GetAllocationMap",
                pb.GetAllocationMapRequest(session=self.ref),
                pb.GetAllocationMapResponse,
            )
        )
        return found

    async def digests(self, piece_size: int, pieces: Sequence[Run], tally: Tally) -> bytes:
        """The destination's digests of the numbered pieces, one after the other."""
        request = pb.GetRegionDigestsRequest(session=self.ref, piece_size=piece_size, pieces=runs_to_wire(pieces))
        found = []
        async for part in self._connection.stream("Replication/GetRegionDigests", request, pb.GetRegionDigestsResponse):
            found.append(part.digests)
            tally.destination_read += part.bytes_read
        joined = b"".join(found)
        if len(joined) != sum(count for _, count in pieces) * digest_size(piece_size, self.region_size):
            raise BlockferryError(
                Code.PROTOCOL,
                "the server answered with other digests than asked for",
                next="check that both sides run a released version of blockferry",
                volume=self.volume,
            )
        return joined

    async def abort(self) -> None:
        """End the session without a commit, as far as the server can still be reached."""
        with contextlib.suppress(BlockferryError, TimeoutError):
            async with asyncio.timeout(5):
                await self._connection.call(
                    "Replication/AbortSession", pb.AbortSessionRequest(session=self.ref), pb.AbortSessionResponse
                )


@dataclass(frozen=True)
class Commit:
    """A session whose content is to become its replica's newest generation. `commit_id` must be durable at the source
    before it is asked for; `keep` None leaves the retention rules as they are."""

    session: ReplicaSession
    commit_id: bytes
    keep: Retention | None


async def commit_sessions(connection: Connection, commits: Sequence[Commit]) -> list[pb.Committed]:
    """Ask for commits on one server: all of them happen, or none. Where the answer is lost it is asked for again: a
    commit id commits once."""
    request = pb.CommitSessionsRequest()
    for one in commits:
        request.commits.add(
            session=one.session.ref,
            volume=one.session.volume,
            commit_id=one.commit_id,
            keep=retention_to_wire(one.keep) if one.keep is not None else None,
        )
    for pause in (*COMMIT_RETRY_SECONDS, None):
        try:
            response = await connection.call("Replication/CommitSessions", request, pb.CommitSessionsResponse)
        except BlockferryError as error:
            # One that the server has no room for at the moment is not lost: a minute's work might be.
            if error.code not in (Code.UNAVAILABLE, Code.LIMITED) or (error.code is Code.LIMITED and pause is None):
                raise
            if pause is None:
                raise BlockferryError(
                    Code.UNAVAILABLE,
                    f"no answer to the commit from {connection.address.uri}",
                    cause="the server went away; it may have committed or not",
                    next="check that blockferry-server runs there, then run this again: either way it goes on "
                    "from there",
                ) from error
            await asyncio.sleep(pause)
        else:
            return list(response.commits)
    raise AssertionError


class ChangeStream:
    """The ApplyChanges stream of a session: sends changes, takes acknowledgements, and bounds what lies between them.

    Use it as an asynchronous context manager; leaving it without an error waits for every acknowledgement.
    """

    def __init__(
        self, connection: Connection, session: ReplicaSession, limiter: AllOf, in_flight: int, tally: Tally
    ) -> None:
        self._connection = connection
        self._session = session
        self._limiter = limiter
        self._tally = tally
        self.budget = ByteBudget(min(in_flight, session.bytes_in_flight or in_flight))
        self._call = connection.bidirectional("Replication/ApplyChanges", pb.ApplyChangesResponse)
        self._writing = asyncio.Lock()
        self._sequence = 0
        self._unacknowledged: deque[tuple[int, int]] = deque()
        self._answered = asyncio.Event()
        self._mismatched: list[int] = []
        self._acknowledging: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._beating: asyncio.Task[None] | None = None
        self._unsaid: list[Run] = []
        self._heard = time.monotonic()
        self.durable = 0
        """Messages up to this one survive a power failure of the destination."""

    async def __aenter__(self) -> ChangeStream:
        self._acknowledging = asyncio.create_task(self._acknowledge(), name="acknowledgements")
        self._beating = asyncio.create_task(self._beat(), name="heartbeat")
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        assert self._acknowledging is not None
        assert self._beating is not None
        try:
            if kind is None:
                # Not while it writes: gRPC ends the whole call when a write is cancelled.
                async with self._writing:
                    self._beating.cancel()
                await self.send([], last=True)
                with self._connection.translated():
                    await self._call.done_writing()
                await self._acknowledging
                self._raise_failure()
        finally:
            # A write may be under way to a destination that stands still: it must not hold up the end.
            self._call.cancel()
            self._beating.cancel()
            await asyncio.gather(self._acknowledging, self._beating, return_exceptions=True)

    @property
    def rate(self) -> int:
        """Bytes per second it is limited to; 0 for no limit."""
        return self._limiter.rate

    async def send(self, changes: Sequence[Outgoing], *, last: bool = False) -> None:
        """Send changes in one message; waits while too much is in flight. `last`: nothing follows."""
        weight = sum(change.size for change in changes)
        await self.budget.acquire(weight)
        try:
            # A heartbeat does not queue up behind data that waits for its bandwidth: the lease would run out.
            if weight:
                await self._limiter.acquire(weight)
            async with self._writing:
                self._raise_failure()
                self._sequence += 1
                head = pb.ApplyChangesRequest(sequence=self._sequence, settled=runs_to_wire(self._unsaid), last=last)
                self._unsaid.clear()
                if self._sequence == 1:
                    head.session.CopyFrom(self._session.ref)
                if not self._unacknowledged:
                    self._heard = time.monotonic()
                self._unacknowledged.append((self._sequence, weight))
                with self._connection.translated():
                    await self._call.write(encode_request(head, changes))
        except (asyncio.InvalidStateError, BlockferryError):
            # A write on a stream that the server has ended; the reason comes with the answers.
            assert self._acknowledging is not None
            await asyncio.wait([self._acknowledging])
            self._raise_failure()
            raise
        crash_point("client-changes-sent")
        self._tally.data_sent += sum(change.payload for change in changes)

    def settle(self, first: int, count: int) -> None:
        """Say with the next message that these regions need no change."""
        self._unsaid.append((first, count))

    async def _beat(self) -> None:
        """Renew the lease while there is nothing else to say; at once, too: from then on it ends with the stream."""
        while True:
            await self.send([])
            await asyncio.sleep(self._session.lease_seconds / 3)

    def stalled(self) -> str:
        """What to tell people while the destination does not keep up; empty if it does."""
        silent = time.monotonic() - self._heard
        if not self._unacknowledged or silent < STALL_SECONDS:
            return ""
        return f"waiting for the destination for {silent:.0f} s"

    async def drain(self) -> list[int]:
        """Wait until everything sent so far is applied; return the offsets of regions whose digest did not match.

        Heartbeats go on meanwhile: with a short lease and a long line one of them is always on its way.
        """
        last = self._sequence
        while self._unacknowledged and self._unacknowledged[0][0] <= last:
            self._answered.clear()
            await self._answered.wait()
        self._raise_failure()
        mismatched, self._mismatched = self._mismatched, []
        return mismatched

    async def _acknowledge(self) -> None:
        try:
            with self._connection.translated():
                async for response in self._call:
                    self._take(response)
            if self._unacknowledged:
                raise BlockferryError(
                    Code.UNAVAILABLE,
                    f"lost the connection to {self._connection.address.uri}",
                    cause="the server ended the stream early",
                    next="check that blockferry-server runs there, then run this again",
                )
        except (BlockferryError, asyncio.CancelledError) as error:
            self._failure = error
            # Nobody may wait for room that will never come.
            while self._unacknowledged:
                self.budget.release(self._unacknowledged.popleft()[1])
        finally:
            self._answered.set()

    def _take(self, response: pb.ApplyChangesResponse) -> None:
        self._heard = time.monotonic()
        if response.error:
            raise from_status(response.error) or BlockferryError(
                Code.PROTOCOL,
                "the server refuses the changes without saying why",
                next="check that both sides run a released version of blockferry",
            )
        self.durable = max(self.durable, response.durable)
        while self._unacknowledged and self._unacknowledged[0][0] <= response.received:
            self.budget.release(self._unacknowledged.popleft()[1])
        self._tally.destination_written += response.totals.bytes_written
        self._tally.destination_read += response.totals.bytes_read
        self._tally.unmapped += response.totals.bytes_unmapped
        self._mismatched.extend(response.mismatched_offsets)
        self._answered.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
