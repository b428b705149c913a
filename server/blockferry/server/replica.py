"""A live replica: its open session, the gate in front of its writes, and the life of its recovery points."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import AllocationMap, Geometry, Run, runs_of
from blockferry.common.retention import Retention, reasons_to_keep
from blockferry.common.volumes import ImageVolume, Volume, in_thread
from blockferry.server import apply
from blockferry.server.cache import DigestCache
from blockferry.server.gate import Gate
from blockferry.server.room import ReplicaRoom, Room
from blockferry.server.session import Event, State, state_at_rest, transition
from blockferry.server.space import UNLIMITED
from blockferry.server.store import Point, SessionRecord, Store
from blockferry.v1 import replication_pb2 as pb
from pyroaring import BitMap

T = TypeVar("T")

log = structlog.get_logger("blockferry.replica")


@dataclass
class Session:
    """One writer's fenced access."""

    session_id: str
    epoch: int
    client: str
    geometry: Geometry
    volume: Volume
    snapshot_id: str
    settled: BitMap
    """Regions that hold what the source's immutable snapshot holds."""
    digests: DigestCache
    allocated: BitMap | None = None
    """Regions that may hold data, once a map was asked for; all others are proven zero."""
    last_seen: float = field(default_factory=lambda: time.monotonic())
    """Monotonic seconds of the last call."""
    failed: BlockferryError | None = None
    """A flush failed: nothing about the work image can be believed any more (invariant 3)."""
    applying: asyncio.Lock = field(default_factory=asyncio.Lock)
    racing: list[BitMap] = field(default_factory=list)
    """For everybody who reads the work image, the regions that changed meanwhile."""

    def change(self, first: int, count: int) -> None:
        """These regions change: to be said before the change, and again after it. Whoever reads a region meanwhile
        began after the first word or will hear the second."""
        self.digests.forget(first, count)
        for changed in self.racing:
            changed.add_range(first, first + count)

    @contextlib.contextmanager
    def watching(self) -> Iterator[BitMap]:
        """The regions that change in here."""
        changed = BitMap()
        self.racing.append(changed)
        try:
            yield changed
        finally:
            # By identity: list.remove would take away an equal set that belongs to another reader.
            self.racing = [one for one in self.racing if one is not changed]


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
        self._floor = floor
        self._room = room or ReplicaRoom(Room(pool, store.directory, UNLIMITED), name, store.directory)
        self._gate = Gate()
        self._pins: dict[int, float] = {}
        self._readers: dict[int, int] = {}
        self._overwriting = False
        self._unfinished: set[asyncio.Task[object]] = set()
        self.state = self._state_at_rest()

    def _state_at_rest(self) -> State:
        return state_at_rest(
            committed=self.store.newest is not None, started=self.store.session.epoch > 0, promoted=False
        )

    async def _to_the_end(self, work: Coroutine[object, object, T]) -> T:
        """Finish `work` even if the caller gives up: a client that goes away must not leave the replica between two
        states, and the outcome of a flush must not get lost (the kernel tells it once)."""
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    # --- opening --------------------------------------------------------------------------------------------------

    async def open_session(self, request: pb.OpenSessionRequest) -> Session:
        """Take the replica for one writer, or raise IN_USE, SIZE_MISMATCH, REGION_SIZE_MISMATCH, UNSUPPORTED or
        WRONG_STATE before anything changes."""
        opened: list[Session] = []
        try:
            return await self._to_the_end(self._open_session(request, opened))
        except asyncio.CancelledError:
            # Nobody is left to hear of the session: the next one need not wait for it.
            self._unfinished.add(task := asyncio.create_task(self._forsake(opened)))
            task.add_done_callback(self._unfinished.discard)
            raise

    async def _forsake(self, opened: list[Session]) -> None:
        async with self._gate.closed():
            for session in opened:
                session.last_seen = -self.lease_seconds

    async def _open_session(self, request: pb.OpenSessionRequest, opened: list[Session]) -> Session:
        async with self._gate.closed():
            self._refuse_if_held(request)
            self._refuse_other_geometry(request)
            await self._room.check_start()
            self._refuse_overwriting(request)
            state = transition(self.name, self.state, Event.OPEN)
            # From here on nobody begins to read what is about to be overwritten.
            self._overwriting = not self.store.clones
            try:
                await self._end_session()
                self.session = await self._begin(request)
            except (OSError, BlockferryError) as error:
                # What the disk holds by now decides.
                await in_thread(self._reopen)
                self.state = self._state_at_rest()
                ours = _as_ours(error, f"cannot open a session of {self.name}")
                ours.volume = self.name
                raise ours from error
            finally:
                self._overwriting = False
            if self.store.overwritten and state is State.UPDATING:
                state = transition(self.name, state, Event.OVERWRITE)
            self.state = state
            opened.append(self.session)
            return self.session

    async def _begin(self, request: pb.OpenSessionRequest) -> Session:
        record = SessionRecord(self.store.session.epoch + 1, uuid.uuid4().hex, request.size, request.client[:256])
        await in_thread(self.store.write_session, record)
        crash_point("open-epoch-durable")
        settled, digests = await in_thread(self.store.begin_work, request.size, request.snapshot_id)
        return Session(
            session_id=record.session_id,
            epoch=record.epoch,
            client=record.client,
            geometry=Geometry(request.size, self.store.identity.region_size),
            volume=await ImageVolume.open(self.store.work, writable=True),
            snapshot_id=request.snapshot_id,
            settled=settled,
            digests=digests,
        )

    def _refuse_if_held(self, request: pb.OpenSessionRequest) -> None:
        held = self.session
        if held is None or held.session_id == request.resume_session_id:
            return
        left = self.lease_seconds - (time.monotonic() - held.last_seen)
        if left > 0:
            raise BlockferryError(
                Code.IN_USE,
                f"{self.name} has a writer already",
                cause=f"{held.client or 'a client without a name'} has an open session",
                next=f"wait until it ends; if it died its lease runs out in {left:.0f} s",
                volume=self.name,
            )

    def _refuse_other_geometry(self, request: pb.OpenSessionRequest) -> None:
        identity, size = self.store.identity, self.store.committed_size
        if request.region_size not in (0, identity.region_size):
            raise BlockferryError(
                Code.REGION_SIZE_MISMATCH,
                f"{self.name} has another region size",
                cause=f"the replica has {identity.region_size} bytes, the sync asks for {request.region_size}",
                next="leave --region-size out: it is fixed when the replica is created",
                volume=self.name,
                expected=str(identity.region_size),
                found=str(request.region_size),
            )
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

    def _refuse_overwriting(self, request: pb.OpenSessionRequest) -> None:
        if self.store.clones or self.store.newest is None:
            return
        if request.in_place:
            if not self._readers:
                return
            raise BlockferryError(
                Code.IN_USE,
                f"{self.name} cannot be overwritten now",
                cause="its only committed generation is being read",
                next="wait until the verify, plan or sync that reads it is over",
                volume=self.name,
            )
        raise BlockferryError(
            Code.UNSUPPORTED,
            f"{self.name} cannot be updated safely",
            cause=f"the file system of pool {self.pool} cannot clone files, so an update would overwrite the only "
            "committed generation",
            next="move the pool to XFS or Btrfs, or say --in-place to go without a consistent replica while it runs",
            volume=self.name,
        )

    # --- fenced use -----------------------------------------------------------------------------------------------

    def _checked(self, ref: pb.SessionRef) -> Session:
        """The open session if `ref` names it. Only what is checked inside the gate holds while writing."""
        held = self.session
        if held is None or held.session_id != ref.session_id or held.epoch != ref.epoch:
            raise BlockferryError(
                Code.STALE_EPOCH,
                f"this session of {self.name} is over",
                cause="it ended or the server was restarted" if held is None else "another writer took the replica",
                next="run the sync again; it continues with what is already there",
                volume=self.name,
                expected=str(self.store.session.epoch),
                found=str(ref.epoch),
            )
        if held.failed is not None:
            raise held.failed
        held.last_seen = time.monotonic()
        return held

    @contextlib.asynccontextmanager
    async def _using(self, ref: pb.SessionRef) -> AsyncIterator[Session]:
        """Pass the gate as the session `ref` names: nobody else opens, commits or ends it meanwhile. Never wait for a
        client inside: whoever wants to take over waits for whoever is in here."""
        async with self._gate.passing():
            try:
                yield self._checked(ref)
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
        return await self._to_the_end(self._session_allocation(ref, region_size))

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
        self, ref: pb.SessionRef, piece_size: int, run: Run, *, fresh: bool, key: bytes = b""
    ) -> tuple[bytes, int]:
        """Digests of consecutive pieces of the work image, and the bytes read for them. Known digests of whole regions
        are taken from the cache unless `fresh`. With a `key` that is not the replica's own nothing known is of use, and
        nothing is remembered."""
        async with self._using(ref) as session:
            region_size = session.geometry.region_size
            key = key or self.store.identity.key
            if piece_size != region_size or key != self.store.identity.key:
                return await session.volume.digests(piece_size, [run], key, region_size), _length(
                    session, piece_size, run
                )
            first, count = run
            wanted = BitMap(range(first, first + count))
            missing = wanted if fresh else wanted - session.digests.known
            if missing:
                await self._learn(session, missing)
            found = [session.digests.get(region) for region in wanted]
            if None in found:
                # Changed while it was read: what is there now is what the client gets, and nothing is remembered.
                return await session.volume.digests(piece_size, [run], key, region_size), _length(
                    session, piece_size, run
                )
            return b"".join(one for one in found if one is not None), session.geometry.bytes_in(missing)

    async def _learn(self, session: Session, regions: BitMap) -> None:
        """Read regions and remember their digests, except of those that change meanwhile."""
        key, region_size = self.store.identity.key, session.geometry.region_size
        runs = list(runs_of(regions, session.geometry.count))
        with session.watching() as changed:
            found = await session.volume.digests(region_size, runs, key, region_size)
        size = len(found) // len(regions)
        for index, region in enumerate(regions):
            if region not in changed:
                session.digests.put(region, found[index * size : (index + 1) * size])

    async def write_regions(
        self, requests: Sequence[tuple[pb.WriteRegionRequest, memoryview]], ref: pb.SessionRef
    ) -> list[apply.Result]:
        """Check and apply changes of different regions, each with its data."""
        return await self._to_the_end(self._write_regions(requests, ref))

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
        return await self._to_the_end(self._unmap_region(request, ref))

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
        await self._to_the_end(self._flush(ref))

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
                session.failed = _as_ours(error, f"cannot flush {self.name}")
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
        await self._to_the_end(self._abort(ref, discard))

    async def _abort(self, ref: pb.SessionRef, discard: bool) -> None:
        async with self._gate.closed():
            held = self.session
            if held is None or (held.session_id, held.epoch) != (ref.session_id, ref.epoch):
                return
            await self._end_session()
            if discard:
                await in_thread(self.store.discard_work)
            self.state = transition(self.name, self.state, Event.CLOSE)

    async def commit(self, ref: pb.SessionRef, commit_id: bytes, keep: Retention | None) -> Point:
        """Make the session's content the newest generation (invariant 3). Idempotent by commit id."""
        return await self._to_the_end(self._commit(ref, commit_id, keep))

    async def _commit(self, ref: pb.SessionRef, commit_id: bytes, keep: Retention | None) -> Point:
        async with self._gate.closed():
            done = self.store.committed(commit_id)
            if done is not None:
                return done
            session = self._checked(ref)
            state = transition(self.name, self.state, Event.COMMIT)
            try:
                await session.volume.flush()
                crash_point("commit-flushed")
                if keep is not None:
                    await in_thread(self.store.set_keep, keep)
                    crash_point("commit-rules-kept")
                point = await in_thread(self.store.commit, commit_id, session.geometry.size, session.digests)
            except (OSError, BlockferryError) as error:
                # Nothing about the session can be believed; read back what the disk says.
                session.failed = _as_ours(error, f"cannot commit {self.name}")
                await self._end_session()
                await in_thread(self._reopen)
                await in_thread(self.store.discard_work)
                self.state = self._state_at_rest()
                raise session.failed from error
            await self._end_session()
            self.state = state
            await self._retire()
            crash_point("commit-unanswered")
            return point

    async def _end_session(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            await session.volume.close()
            if session.failed is not None:
                await in_thread(self.store.discard_work)

    def _reopen(self) -> None:
        try:
            store = Store(self.store.directory, clones=self.store.clones)
        except (OSError, BlockferryError) as error:
            # What was believed so far is all there is to go by; whatever needs the disk will fail again.
            log.error("cannot read a replica back", volume=self.name, error=str(error))
            return
        self.store.abandon()
        self.store = store

    async def close(self) -> None:
        """End whatever is open; work done so far stays for the next session."""
        async with self._gate.closed():
            await self._end_session()
            crash_point("shutdown-sessions-ended")
            await in_thread(self.store.close)

    # --- recovery points ------------------------------------------------------------------------------------------

    def kept(self) -> dict[int, list[str]]:
        """Why each point is kept, by number; a point without a reason goes with the next commit."""
        now = time.monotonic()
        self._pins = {number: until for number, until in self._pins.items() if until > now}
        points = [(point.number, point.committed_at_us) for point in self.store.points]
        return dict(reasons_to_keep(points, (self.store.keep, self._floor), {*self._pins, *self._readers}))

    async def _retire(self) -> None:
        for point in list(self.store.points):
            # Asked anew each time: somebody may have begun to read it while the last one was dropped.
            if self.kept()[point.number]:
                continue
            try:
                await in_thread(self.store.drop, point)
            except OSError as error:
                # The commit stands. The next one tries again, with what the disk says is there.
                log.error("cannot drop a recovery point", volume=self.name, number=point.number, error=str(error))
                await in_thread(self._reopen)
                return

    def resolve(self, number: int) -> Point:
        """The generation with this number (0: the newest), or NOT_FOUND."""
        point = self.store.point(number)
        if point is None or self._overwriting:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"{self.name} has no {f'generation {number}' if number else 'committed generation'}",
                cause=self._why_missing(),
                next="list what there is with blockferry replica points" if number else "sync to it first",
                volume=self.name,
            )
        return point

    def _why_missing(self) -> str:
        if self._overwriting or self.store.overwritten:
            return "it is being overwritten in place"
        return "retention may have dropped it" if self.store.points else "its first sync has not finished"

    @contextlib.asynccontextmanager
    async def reading(self, number: int) -> AsyncIterator[Volume]:
        """A committed generation as a read-only volume; it is kept at least for a lease after its last use."""
        point = self.resolve(number)
        self._readers[point.number] = self._readers.get(point.number, 0) + 1
        try:
            volume = await ImageVolume.open(self.store.image(point))
            try:
                yield volume
            finally:
                await volume.close()
        finally:
            self._pins[point.number] = time.monotonic() + self.lease_seconds
            self._readers[point.number] -= 1
            if not self._readers[point.number]:
                del self._readers[point.number]

    @contextlib.asynccontextmanager
    async def reading_start(self) -> AsyncIterator[Volume]:
        """What the next session would start from, where nothing is committed: the work of an unfinished first sync."""
        if not self.store.work.exists() or self.store.work.stat().st_size == 0:
            self.resolve(0)
        volume = await ImageVolume.open(self.store.work)
        try:
            yield volume
        finally:
            await volume.close()

    @property
    def path(self) -> Path | None:
        """The image of the newest committed generation."""
        newest = self.store.newest
        return self.store.image(newest) if newest is not None else None


def _length(session: Session, piece_size: int, run: Run) -> int:
    return min(run[1] * piece_size, session.geometry.size - run[0] * piece_size)


def _as_ours(error: OSError | BlockferryError, what: str) -> BlockferryError:
    return from_os_error(error, what) if isinstance(error, OSError) else error
