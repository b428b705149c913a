"""A live replica: its open session and the gate in front of its writes. points.py and handover.py have the rest."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import TypeVar

import structlog
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import AllocationMap, Geometry, Run, runs_of
from blockferry.common.retention import Retention
from blockferry.common.volumes import in_thread
from blockferry.server import apply
from blockferry.server.gate import Gate
from blockferry.server.points import Points
from blockferry.server.room import ReplicaRoom, Room
from blockferry.server.session import Event, State, state_at_rest, transition
from blockferry.server.space import UNLIMITED
from blockferry.server.store import SessionRecord, Store
from blockferry.server.tally import Tally
from blockferry.server.writer import Session
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

T = TypeVar("T")

log = structlog.get_logger("blockferry.replica")


class Replica:
    """One replica of a pool. Its methods may be called concurrently."""

    def __init__(
        self, name: str, pool: str, store: Store, lease: float, floor: Retention, room: ReplicaRoom | None = None
    ) -> None:
        self.name = name
        self.pool = pool
        self.store = store
        self.session: Session | None = None
        self.lease_seconds = lease
        """Seconds without a call after which a session may be taken over."""
        self._room = room or ReplicaRoom(Room(pool, store.directory, UNLIMITED), name, store.directory)
        self.points = Points(name, store, floor, lease)
        self.gate = Gate()
        self.gone = False
        """It was deleted."""
        self._completing = asyncio.Lock()
        self._unfinished: set[asyncio.Task[object]] = set()
        self.tally = Tally()
        self.state = self.state_at_rest()

    def state_at_rest(self) -> State:
        """The state without a session, by what is on the disk."""
        generations = self.store.generations
        return state_at_rest(
            committed=generations.newest is not None,
            started=self.store.session.epoch > 0 or generations.adopted_size is not None,
            promoted=generations.promoted is not None,
        )

    async def to_the_end(self, work: Coroutine[object, object, T]) -> T:
        """Finish `work` even if the caller gives up: a client that goes away must not leave the replica between two
        states, and the outcome of a flush must not get lost (the kernel tells it once)."""
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    # --- opening --------------------------------------------------------------------------------------------------

    async def open_session(self, request: pb.OpenSessionRequest, owner: str = "") -> Session:
        """Take the replica for one writer, which is `owner`, or raise IN_USE, SIZE_MISMATCH,
        REGION_SIZE_MISMATCH, UNSUPPORTED or WRONG_STATE before anything changes."""
        opened: list[Session] = []
        try:
            return await self.to_the_end(self._open_session(request, owner, opened))
        except asyncio.CancelledError:
            # Nobody is left to hear of the session: the next one need not wait for it.
            self._unfinished.add(task := asyncio.create_task(self._forsake(opened)))
            task.add_done_callback(self._unfinished.discard)
            raise

    async def _forsake(self, opened: list[Session]) -> None:
        async with self.gate.closed():
            for session in opened:
                session.last_seen = -self.lease_seconds

    async def _open_session(self, request: pb.OpenSessionRequest, owner: str, opened: list[Session]) -> Session:
        async with self.gate.closed():
            await self.settle_owed()
            self.refuse_if_gone()
            self._refuse_if_held(request.resume_session_id, owner)
            self._refuse_other_geometry(request)
            await self._room.check_start()
            await self._check_base(request.size)
            state = transition(self.name, self.state, Event.OPEN)
            try:
                await self.end_session()
                await self.complete()
                self.session = await self._begin(request, owner)
            except (OSError, BlockferryError) as error:
                # What the disk holds by now decides.
                await self.believe_the_disk()
                ours = as_ours(error, f"cannot open a session of {self.name}")
                ours.volume = self.name
                raise ours from error
            self.state = state
            self.tally.sessions += 1
            opened.append(self.session)
            return self.session

    async def _check_base(self, size: int) -> None:
        if self.state is State.PROMOTED:
            # It is in somebody else's hands.
            return
        try:
            await self.store.content.check(size)
        except BlockferryError as error:
            error.volume = self.name
            raise

    async def _begin(self, request: pb.OpenSessionRequest, owner: str) -> Session:
        # What one identity says is durable another one must not leave out.
        snapshot_id = f"{owner} {request.snapshot_id}" if owner and request.snapshot_id else request.snapshot_id
        record = SessionRecord(self.store.session.epoch + 1, uuid.uuid4().hex, request.size, request.client[:256])
        await in_thread(self.store.write_session, record)
        crash_point("open-epoch-durable")
        continued = self.store.content.has_work()
        work, settled, digests = await self.store.begin_work(request.size, snapshot_id)
        altered, doubt = await self.store.difference(request.size, continued=continued)
        return Session(
            session_id=record.session_id,
            epoch=record.epoch,
            client=record.client,
            geometry=Geometry(request.size, self.store.identity.region_size),
            volume=work,
            snapshot_id=snapshot_id,
            owner=owner,
            last_seen=time.monotonic(),
            settled=settled,
            digests=digests,
            altered=altered,
            doubt=doubt,
        )

    def refuse_if_gone(self) -> None:
        """Raise NOT_FOUND if it was deleted, and UNAVAILABLE while its log lags behind; the caller has closed the
        gate."""
        if self.store.owed is not None:
            raise self.owed_error()
        if self.gone:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"there is no replica {self.name}",
                cause="it was deleted a moment ago",
                next="run it again to make a new one",
                volume=self.name,
            )

    @property
    def lease_left(self) -> float:
        """Seconds until its session may be taken over; 0 or less: at once."""
        held = self.session
        return self.lease_seconds - (time.monotonic() - held.last_seen) if held is not None else 0.0

    def _refuse_if_held(self, resume_session_id: str, owner: str) -> None:
        held = self.session
        if held is None or (held.session_id, held.owner) == (resume_session_id, owner):
            return
        if (left := self.lease_left) > 0:
            raise BlockferryError(
                Code.IN_USE,
                f"{self.name} has a writer already",
                cause=f"{held.client or 'a client without a name'} has an open session",
                next=f"wait until it ends; if it died its lease runs out in {left:.0f} s",
                volume=self.name,
            )

    def _refuse_other_geometry(self, request: pb.OpenSessionRequest) -> None:
        self.refuse_other_region_size(request.region_size)
        generations = self.store.generations
        size = generations.committed_size or generations.adopted_size
        if size is None or request.size == size or (request.grow and request.size > size):
            return
        smaller = request.size < size
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            f"{self.name} has another size",
            cause=f"the replica has {size} bytes, the source {request.size}",
            next="a replica never shrinks: use another name"
            if smaller
            else "run it with --grow to enlarge the replica",
            volume=self.name,
            expected=str(size),
            found=str(request.size),
        )

    def refuse_other_region_size(self, asked: int) -> None:
        """Raise REGION_SIZE_MISMATCH unless `asked` is the replica's own, or 0."""
        own = self.store.identity.region_size
        if asked not in (0, own):
            raise BlockferryError(
                Code.REGION_SIZE_MISMATCH,
                f"{self.name} has another region size",
                cause=f"the replica has {own} bytes, and {asked} are asked for",
                next="leave --region-size out: it is fixed when the replica is created",
                volume=self.name,
                expected=str(own),
                found=str(asked),
            )

    # --- fenced use -----------------------------------------------------------------------------------------------

    def checked(self, ref: pb.SessionRef) -> Session:
        """The open session if `ref` names it. Only what is checked inside the gate holds while writing."""
        held = self.session
        if held is None or held.session_id != ref.session_id or held.epoch != ref.epoch:
            raise self.session_over(ref)
        if held.failed is not None:
            raise held.failed
        held.last_seen = time.monotonic()
        return held

    def session_over(self, ref: pb.SessionRef) -> BlockferryError:
        """What whoever uses a session is told when it is not the open one."""
        next_step = "run the sync again; it continues with what is already there"
        if self.state is State.PROMOTED:
            cause, next_step = "the replica was promoted", "demote it before the next sync; nothing was committed"
        elif self.session is None:
            cause = "it ended or the server was restarted"
        else:
            cause = "another writer took the replica"
        return BlockferryError(
            Code.STALE_EPOCH,
            f"this session of {self.name} is over",
            cause=cause,
            next=next_step,
            volume=self.name,
            expected=str(self.store.session.epoch),
            found=str(ref.epoch),
        )

    @contextlib.asynccontextmanager
    async def _using(self, ref: pb.SessionRef) -> AsyncIterator[Session]:
        """Pass the gate as the session `ref` names: nobody else opens, commits or ends it meanwhile. Never wait for a
        client inside: whoever wants to take over waits for whoever is in here."""
        async with self.gate.passing():
            try:
                yield self.checked(ref)
            except BlockferryError as error:
                # The client knows the volume by its name, not by a path on this host.
                error.volume = self.name
                raise

    async def renew(self, ref: pb.SessionRef) -> None:
        """Renew the lease."""
        async with self._using(ref):
            pass

    async def session_allocation(self, ref: pb.SessionRef, region_size: int) -> AllocationMap:
        """The map of the work image."""
        return await self.to_the_end(self._session_allocation(ref, region_size))

    async def _session_allocation(self, ref: pb.SessionRef, region_size: int) -> AllocationMap:
        async with self._using(ref) as session:
            try:
                with session.watching() as changed:
                    found = await session.volume.allocation(region_size or session.geometry.region_size)
            except BlockferryError as error:
                # Looking at the map flushes the image.
                session.failed = error
                raise
            if found.geometry == session.geometry:
                session.allocated = found.regions | changed
            return found

    async def session_digests(
        self, ref: pb.SessionRef, piece_size: int, runs: Sequence[Run], *, fresh: bool, key: bytes = b""
    ) -> tuple[bytes, int]:
        """Digests of runs of pieces of the work image, and the bytes read for them. Known digests of whole regions
        are taken from the cache unless `fresh`. With a `key` that is not the replica's own nothing known is of use, and
        nothing is remembered."""
        async with self._using(ref) as session:
            region_size = session.geometry.region_size
            key = key or self.store.identity.key
            if piece_size != region_size or key != self.store.identity.key:
                return await self._read_digests(session, piece_size, runs, key)
            wanted = [region for first, count in runs for region in range(first, first + count)]
            missing = BitMap(wanted) if fresh else BitMap(wanted) - session.digests.known
            read = await self._learn(session, missing) if missing else 0
            known = session.geometry.bytes_in(BitMap(wanted) - missing)
            found = [session.digests.get(region) for region in wanted]
            if None in found:
                # Changed while it was read: what is there now is what the client gets, and nothing is remembered.
                return await self._read_digests(session, piece_size, runs, key)
            self.tally.digests_known += known
            return b"".join(one for one in found if one is not None), read

    async def _read_digests(
        self, session: Session, piece_size: int, runs: Sequence[Run], key: bytes
    ) -> tuple[bytes, int]:
        found, read = await session.volume.read_digests(piece_size, runs, key, session.geometry.region_size)
        self.tally.read_for_digests += read
        return found, read

    async def _learn(self, session: Session, regions: BitMap) -> int:
        """Read regions and remember their digests, except of those that change meanwhile; the bytes read."""
        key, region_size = self.store.identity.key, session.geometry.region_size
        runs = list(runs_of(regions, session.geometry.count))
        with session.watching() as changed:
            found, read = await self._read_digests(session, region_size, runs, key)
        size = len(found) // len(regions)
        for index, region in enumerate(regions):
            if region not in changed:
                session.digests.put(region, found[index * size : (index + 1) * size])
        return read

    async def write_regions(
        self, requests: Sequence[tuple[pb.WriteRegionRequest, memoryview]], ref: pb.SessionRef
    ) -> list[apply.Result]:
        """Check and apply changes of different regions, each with its data."""
        return await self.to_the_end(self._write_regions(requests, ref))

    async def _write_regions(
        self, requests: Sequence[tuple[pb.WriteRegionRequest, memoryview]], ref: pb.SessionRef
    ) -> list[apply.Result]:
        async with self._using(ref) as session, session.applying:
            for request, data in requests:
                apply.check_write(self.name, session.geometry, request, len(data))
            changes = []
            for request, data in requests:
                region = request.offset // session.geometry.region_size
                was_zero = session.allocated is not None and region not in session.allocated
                changes.append(apply.Write(request, data, was_zero))
                session.change(region, 1)
                if session.allocated is not None:
                    session.allocated.add(region)
            try:
                await self._survive(session, self._write(session, changes))
            finally:
                for change in changes:
                    session.change(change.request.offset // session.geometry.region_size, 1)
            for change in changes:
                self.tally.add(change.result)
                region = change.request.offset // session.geometry.region_size
                if change.result.digest is not None:
                    session.digests.put(region, change.result.digest)
                if change.result.mismatch:
                    session.settled.discard(region)
                elif session.snapshot_id:
                    session.settled.add(region)
            return [change.result for change in changes]

    async def _write(self, session: Session, changes: Sequence[apply.Write]) -> None:
        async with self._room.writing(sum(len(change.data) for change in changes)):
            await apply.write_regions(session.volume, self.store.identity.key, changes)

    async def unmap_region(self, request: pb.UnmapRegionRequest, ref: pb.SessionRef) -> apply.Result:
        """Check and apply one change."""
        return await self.to_the_end(self._unmap_region(request, ref))

    async def _unmap_region(self, request: pb.UnmapRegionRequest, ref: pb.SessionRef) -> apply.Result:
        async with self._using(ref) as session, session.applying:
            apply.check_unmap(self.name, session.geometry, request)
            first = request.offset // session.geometry.region_size
            count = -(-request.length // session.geometry.region_size)
            session.change(first, count)
            try:
                result = await self._survive(session, apply.unmap_region(session.volume, request))
            finally:
                session.change(first, count)
            self.tally.add(result)
            if session.snapshot_id:
                session.settled.add_range(first, first + count)
            return result

    async def settle(self, ref: pb.SessionRef, runs: list[Run]) -> None:
        """Note regions that need no change."""
        async with self._using(ref) as session:
            if session.snapshot_id:
                for first, count in runs:
                    if first + count <= session.geometry.count:
                        session.settled.add_range(first, first + count)

    async def _survive(self, session: Session, change: Awaitable[T]) -> T:
        """A full disk ends the session and gives its space back: the committed generations need none of it."""
        try:
            return await change
        except BlockferryError as error:
            if error.code is Code.OUT_OF_SPACE:
                session.failed = error
            raise

    async def flush(self, ref: pb.SessionRef) -> None:
        """Make all that is applied durable, and note how far an immutable snapshot has come (invariant 5)."""
        await self.to_the_end(self._flush(ref))

    async def _flush(self, ref: pb.SessionRef) -> None:
        async with self._using(ref) as session:
            settled = session.settled.copy()
            try:
                await session.volume.flush()
                crash_point("checkpoint-flushed")
                if session.snapshot_id:
                    await in_thread(self.store.write_progress, session.snapshot_id, session.geometry.size, settled)
                await self._room.check()
            except (OSError, BlockferryError) as error:
                session.failed = as_ours(error, f"cannot flush {self.name}")
                raise session.failed from error
            crash_point("checkpoint-recorded")

    # --- ending ---------------------------------------------------------------------------------------------------

    def release(self, ref: pb.SessionRef) -> None:
        """Forget the lease of a session whose client is gone: the next one need not wait."""
        held = self.session
        if held is not None and (held.session_id, held.epoch) == (ref.session_id, ref.epoch):
            held.last_seen = -self.lease_seconds

    async def abort(self, ref: pb.SessionRef, *, discard: bool) -> None:
        """End a session without a commit; a session that is not open any more is left alone."""
        await self.to_the_end(self._abort(ref, discard))

    async def _abort(self, ref: pb.SessionRef, discard: bool) -> None:
        async with self.gate.closed():
            held = self.session
            if held is None or (held.session_id, held.epoch) != (ref.session_id, ref.epoch):
                return
            await self.end_session()
            if discard:
                await self.store.discard_work()
            self.state = transition(self.name, self.state, Event.CLOSE)

    async def settle_owed(self) -> None:
        """Have the log say what a commit of several sessions has made, where it did not take that at the time; the
        caller has closed the gate. Raises UNAVAILABLE where it still does not."""
        if self.store.owed is not None:
            await self.believe_the_disk()
            if self.store.owed is not None:
                raise self.owed_error()

    def owed_error(self) -> BlockferryError:
        """Why nobody may use it before its log says what was committed."""
        return BlockferryError(
            Code.UNAVAILABLE,
            f"{self.name} cannot be used now",
            cause="it was committed together with others, and its disk did not take the record in its own log yet",
            next="see to its disk; ask again, or restart the server: the commit stands",
            volume=self.name,
        )

    async def end_session(self, *, discard: bool = True) -> None:
        """End the open session, if there is one; the caller has closed the gate. What a failed one has done is given up
        unless the caller sees to that."""
        session, self.session = self.session, None
        if session is not None:
            await self.store.content.end(session.volume)
            if session.failed is not None and discard:
                await self.store.discard_work()

    async def believe_the_disk(self) -> None:
        """Take the state from the disk after a failure; the caller has closed the gate."""
        try:
            # A commit may still be completed in the background, and would read from what is closed here.
            async with self._completing:
                await self.store.reload()
        except (OSError, BlockferryError) as error:
            # What was believed so far is all there is to go by; whatever needs the disk will fail again.
            log.error("cannot read a replica back", volume=self.name, error=str(error))
        self.state = self.state_at_rest()

    # --- after a commit -------------------------------------------------------------------------------------------

    async def complete(self) -> None:
        """See to it that the newest generation is one complete image."""
        async with self._completing:
            await self.store.complete()

    def complete_soon(self) -> None:
        """Begin to, and let nobody wait for it."""
        if self.store.content.incomplete:
            self._unfinished.add(task := asyncio.create_task(self._complete_alone(), name=f"complete-{self.name}"))
            task.add_done_callback(self._unfinished.discard)

    def settle_soon(self) -> None:
        """Take hold of what the replica is on, and finish what the last process has left; nobody waits for it."""
        if self.store.content.in_place:
            self._unfinished.add(task := asyncio.create_task(self._settle_alone(), name=f"complete-{self.name}"))
            task.add_done_callback(self._unfinished.discard)
        else:
            self.complete_soon()

    async def _settle_alone(self) -> None:
        trouble = await self.store.content.trouble()
        if trouble:
            log.error("out of service until its device can be used", volume=self.name, error=trouble)
        elif self.store.content.incomplete:
            await self._complete_alone()

    async def _complete_alone(self) -> None:
        try:
            await self.complete()
        except (OSError, BlockferryError) as error:
            # Readers read through the journal. The next session, or the next start, tries again.
            log.error("cannot apply the journal", volume=self.name, error=str(error))

    async def stop_completing(self) -> None:
        """Leave what a commit has put off as it is; it begins anew with the next session or the next start."""
        for task in [one for one in self._unfinished if one.get_name() == f"complete-{self.name}"]:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """End whatever is open; work done so far stays for the next session."""
        async with self.gate.closed():
            await self.end_session()
            await self.stop_completing()
            crash_point("shutdown-sessions-ended")
            await self.store.content.release()
            await in_thread(self.store.close)

    async def retire_for_good(self) -> None:
        """Let go of the replica, which is about to be deleted. Raises IN_USE or WRONG_STATE, and then nothing has
        changed."""
        async with self.gate.closed():
            self.refuse_if_gone()
            self._refuse_if_held("", "")
            if self.state is State.PROMOTED:
                raise BlockferryError(
                    Code.WRONG_STATE,
                    f"cannot delete {self.name}",
                    cause="it is promoted: somebody may be using it",
                    next="demote it first",
                    volume=self.name,
                )
            if self.points.in_use:
                raise BlockferryError(
                    Code.IN_USE,
                    f"cannot delete {self.name}",
                    cause="a recovery point of it is being read",
                    next="wait until the verify, plan or sync that reads it is over",
                    volume=self.name,
                )
            self.gone = True
            await self.end_session()
            async with self._completing:
                await self.store.content.release()
                await in_thread(self.store.abandon)

    @property
    def path(self) -> Path | None:
        """The complete image of the newest committed generation; None for a moment while a journal is applied."""
        newest = self.store.generations.newest
        return self.store.content.path(newest) if newest is not None else None


def as_ours(error: OSError | BlockferryError, what: str) -> BlockferryError:
    """The error as one of ours."""
    return from_os_error(error, what) if isinstance(error, OSError) else error
