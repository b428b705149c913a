"""A live replica: its open session, the gate in front of its writes, and its committed generations as volumes."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from pathlib import Path

from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import Geometry
from blockferry.common.volumes import ImageVolume, Volume, in_thread
from blockferry.server import apply
from blockferry.server.gate import Gate
from blockferry.server.session import Event, State, state_at_rest, transition
from blockferry.server.store import Point, SessionRecord, Store
from blockferry.v1 import replication_pb2 as pb


@dataclass
class Session:
    """One writer's fenced access. `last_seen` is monotonic seconds."""

    session_id: str
    epoch: int
    client: str
    geometry: Geometry
    volume: Volume
    last_seen: float = field(default_factory=time.monotonic)


class Replica:
    """One replica of a pool. Its methods may be called concurrently."""

    def __init__(self, name: str, pool: str, store: Store, lease: float) -> None:
        self.name = name
        self.pool = pool
        self.store = store
        self.session: Session | None = None
        self._lease = lease
        self._gate = Gate()
        self.state = self._state_at_rest()

    def _state_at_rest(self) -> State:
        return state_at_rest(
            committed=self.store.newest is not None, started=self.store.session.epoch > 0, promoted=False
        )

    @property
    def lease_seconds(self) -> float:
        """Seconds without a call after which a session may be taken over."""
        return self._lease

    # --- sessions -------------------------------------------------------------------------------------------------

    async def open_session(self, request: pb.OpenSessionRequest) -> Session:
        """Take the replica for one writer, or raise IN_USE, SIZE_MISMATCH, REGION_SIZE_MISMATCH or WRONG_STATE before
        anything changes."""
        async with self._gate.closed():
            self._refuse_if_held(request)
            self._refuse_other_geometry(request)
            state = transition(self.name, self.state, Event.OPEN)
            geometry = Geometry(request.size, self.store.identity.region_size)
            if self.session is not None:
                await self._end_session()
            record = SessionRecord(
                epoch=self.store.session.epoch + 1,
                session_id=uuid.uuid4().hex,
                size=request.size,
                snapshot_id=request.snapshot_id,
                client=request.client[:256],
            )
            try:
                await in_thread(self.store.write_session, record)
                await in_thread(self.store.begin_work, request.size)
            except OSError as error:
                raise from_os_error(error, f"cannot open a session of {self.name}", volume=self.name) from error
            if self.store.overwritten and self.state is State.CONSISTENT:
                state = transition(self.name, state, Event.OVERWRITE)
            volume = await ImageVolume.open(self.store.work, writable=True)
            self.session = Session(record.session_id, record.epoch, record.client, geometry, volume)
            self.state = state
            return self.session

    def _refuse_if_held(self, request: pb.OpenSessionRequest) -> None:
        held = self.session
        if held is None or held.session_id == request.resume_session_id:
            return
        left = self._lease - (time.monotonic() - held.last_seen)
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

    def _checked(self, ref: pb.SessionRef) -> Session:
        """The open session if `ref` names it. Only what is checked inside the gate holds while writing."""
        held = self.session
        if held is None or held.session_id != ref.session_id or held.epoch != ref.epoch:
            raise BlockferryError(
                Code.STALE_EPOCH,
                f"this session of {self.name} is over",
                cause="the server was restarted" if held is None else "another writer has taken the replica",
                next="run the sync again; it continues with what is already there",
                volume=self.name,
                expected=str(self.store.session.epoch),
                found=str(ref.epoch),
            )
        held.last_seen = time.monotonic()
        return held

    @contextlib.asynccontextmanager
    async def using(self, ref: pb.SessionRef) -> AsyncIterator[Session]:
        """Pass the gate as the session `ref` names: nobody else opens, commits or ends it meanwhile."""
        async with self._gate.passing():
            yield self._checked(ref)

    async def write_region(self, request: pb.WriteRegionRequest, ref: pb.SessionRef) -> apply.Result:
        """Check and apply one change."""
        async with self.using(ref) as session:
            apply.check_write(self.name, session.geometry, request)
            return await self._applied(apply.write_region(session.volume, self.store.identity.key, request))

    async def unmap_region(self, request: pb.UnmapRegionRequest, ref: pb.SessionRef) -> apply.Result:
        """Check and apply one change."""
        async with self.using(ref) as session:
            apply.check_unmap(self.name, session.geometry, request)
            return await self._applied(apply.unmap_region(session.volume, request))

    async def _applied(self, change: Awaitable[apply.Result]) -> apply.Result:
        try:
            return await change
        except BlockferryError as error:
            # The client knows the volume by its name, not by a path on this host.
            error.volume = self.name
            raise

    async def release(self, ref: pb.SessionRef) -> None:
        """Forget the lease of a session whose client is gone: the next one need not wait."""
        if self.session is not None and self.session.session_id == ref.session_id and self.session.epoch == ref.epoch:
            self.session.last_seen = -self._lease

    async def abort(self, ref: pb.SessionRef, *, discard: bool) -> None:
        """End a session without a commit; a session that is not open any more is left alone."""
        async with self._gate.closed():
            held = self.session
            if held is None or held.session_id != ref.session_id or held.epoch != ref.epoch:
                return
            await self._end_session()
            if discard:
                await in_thread(self.store.discard_work)
            self.state = transition(self.name, self.state, Event.CLOSE)

    async def commit(self, ref: pb.SessionRef, commit_id: bytes) -> Point:
        """Make the session's content the newest generation (invariant 3)."""
        async with self._gate.closed():
            done = self.store.committed(commit_id)
            if done is not None:
                return done
            session = self._checked(ref)
            state = transition(self.name, self.state, Event.COMMIT)
            try:
                await session.volume.flush()
                point = await in_thread(self.store.commit, commit_id, session.geometry.size)
            except (OSError, BlockferryError) as error:
                # Invariant 3: after a failed fsync nothing about the session can be believed.
                await self._end_session()
                await in_thread(self._reopen)
                self.state = self._state_at_rest()
                if isinstance(error, OSError):
                    raise from_os_error(error, f"cannot commit {self.name}", volume=self.name) from error
                error.volume = self.name
                raise
            await self._end_session()
            for old in self.store.points[:-1]:
                await in_thread(self.store.drop, old)
            self.state = state
            return point

    def _reopen(self) -> None:
        self.store.close()
        self.store = Store(self.store.directory, clones=self.store.clones)

    async def _end_session(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            await session.volume.close()

    async def close(self) -> None:
        """End whatever is open; work done so far stays for the next session."""
        async with self._gate.closed():
            await self._end_session()
            self.store.close()

    # --- reading --------------------------------------------------------------------------------------------------

    def resolve(self, number: int) -> Point:
        """The generation with this number (0: the newest), or NOT_FOUND."""
        point = self.store.point(number)
        if point is None:
            wanted = f"generation {number}" if number else "committed generation"
            raise BlockferryError(
                Code.NOT_FOUND,
                f"{self.name} has no {wanted}",
                cause="its first sync has not finished" if not self.store.points else "retention may have dropped it",
                next="list what there is with blockferry replica points" if number else "sync to it first",
                volume=self.name,
            )
        return point

    @contextlib.asynccontextmanager
    async def reading(self, number: int) -> AsyncIterator[Volume]:
        """A committed generation as a read-only volume."""
        volume = await ImageVolume.open(self.store.image(self.resolve(number)))
        try:
            yield volume
        finally:
            await volume.close()

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
