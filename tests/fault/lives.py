"""Lives of a replica and its source, recorded for the tests of power failures; what is promised in them, and the check
that a state a power failure may leave keeps all of it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
from blockferry.client.commits import CommitLedger
from blockferry.common import disk
from blockferry.common.digests import digest
from blockferry.common.durable import Log, write_new, write_unsynced
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.common.volumes import ImageVolume
from blockferry.server import commits
from blockferry.server.cache import DigestCache
from blockferry.server.generations import Point
from blockferry.server.replica import Replica
from blockferry.server.session import State as ReplicaState
from blockferry.server.store import Store
from blockferry.v1 import replication_pb2 as pb

from tests.fault.contents import content_of, files_of
from tests.fault.powerloss import FlushFile, Killed, Operation, Recorder
from tests.images import BLOCK, KIB, noise

REGION = 64 * KIB
SIZE = 4 * REGION + 3 * BLOCK
REGIONS = 5
KEEP = Retention(last=2)
NAME = "v"


def _picture(*seeds: int) -> bytes:
    """An image of five regions, the last one short; seed 0 is a region of zeros."""
    whole = b"".join(noise(seed, REGION) if seed else bytes(REGION) for seed in seeds)
    return whole[:SIZE]


SNAPSHOTS = {
    "a": _picture(1, 2, 3, 4, 5),
    "b": _picture(1, 20, 3, 0, 50),
    "c": _picture(10, 20, 0, 4, 50),
    "d": _picture(10, 21, 31, 0, 0),
    "e": _picture(0, 21, 32, 41, 51),
    "f": _picture(61, 62, 63, 64, 65),
}
"""By snapshot id."""


# --- what was promised ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opening:
    """A session is about to be asked for."""

    snapshot: str


@dataclass(frozen=True)
class Opened:
    """A client has seen this epoch."""

    epoch: int


@dataclass(frozen=True)
class Checkpointed:
    """These regions of the work were acknowledged as durable."""

    snapshot: str
    regions: frozenset[int]


@dataclass(frozen=True)
class Discarding:
    """The session's work is about to be given up."""


@dataclass(frozen=True)
class Minted:
    """The source has minted this id and is about to ask for the commit of `snapshot`."""

    commit_id: bytes
    snapshot: str
    keep: Retention | None


@dataclass(frozen=True)
class Answered:
    """The destination has answered that the commit happened."""

    commit_id: bytes
    keep: Retention | None


@dataclass
class Promises:
    """Everything that holds at one moment."""

    epoch: int = 0
    snapshot: str = "a"
    checkpoint: Checkpointed | None = None
    asked: dict[bytes, str] = field(default_factory=dict)
    minted: list[bytes] = field(default_factory=list)
    answered: list[bytes] = field(default_factory=list)
    keep: Retention | None = None

    def take(self, what: object) -> None:
        """The next mark."""
        match what:
            case Opening(snapshot):
                self.snapshot = snapshot
                if self.checkpoint is not None and self.checkpoint.snapshot != snapshot:
                    self.checkpoint = None
            case Opened(epoch):
                assert epoch > self.epoch
                self.epoch = epoch
            case Checkpointed():
                self.checkpoint = what
            case Discarding():
                self.checkpoint = None
            case Minted(commit_id, snapshot, _):
                self.checkpoint = None
                self.minted.append(commit_id)
                self.asked[commit_id] = snapshot
            case Answered(commit_id, keep):
                self.answered.append(commit_id)
                self.keep = keep or self.keep


# --- a source and a destination -------------------------------------------------------------------------------------


class World:
    """One replica in `root`, and the ledger of its source."""

    def __init__(self, root: Path, *, clones: bool, mark: Callable[[object], None] = lambda what: None) -> None:
        self.root = root
        self.clones = clones
        self._mark = mark
        self._replica: Replica | None = None

    @property
    def replica(self) -> Replica:
        """The replica; the server is started if it does not run."""
        if self._replica is None:
            directory = self.root / NAME
            if directory.exists():
                store = Store(directory, clones=self.clones)
            else:
                store = Store.create(directory, REGION, clones=self.clones)
            self._replica = Replica(NAME, "pool", store, 60.0, Retention(last=1))
        return self._replica

    @property
    def ledger(self) -> CommitLedger:
        """The source's."""
        return CommitLedger(self.root / "state" / "blockferry")

    def abandon(self) -> None:
        """The server has died, or dies now: its descriptors are closed, and nothing else happens."""
        replica, self._replica = self._replica, None
        if replica is not None:
            replica.store.abandon()
            if replica.session is not None and isinstance(replica.session.volume, ImageVolume):
                replica.session.volume.let_go()

    async def stop(self) -> None:
        """The server ends in an orderly way."""
        replica, self._replica = self._replica, None
        if replica is not None:
            await replica.close()

    async def sync(
        self, snapshot: str, *, stop_at: int = REGIONS, keep: Retention | None = None, checkpoints: bool = True
    ) -> Point | None:
        """One sync as the client does it; with `stop_at` its client is gone before that region."""
        replica = self.replica
        store = replica.store
        newest = store.generations.newest
        self._mark(Opening(snapshot))
        session = await replica.open_session(pb.OpenSessionRequest(volume=NAME, size=SIZE, snapshot_id=snapshot))
        self._mark(Opened(session.epoch))
        ref = pb.SessionRef(session_id=session.session_id, epoch=session.epoch)
        replica_uuid = bytes.fromhex(store.identity.uuid)
        self.ledger.reconcile(replica_uuid, newest.commit_id if newest else b"", newest.number if newest else 0)
        for region in sorted(set(range(stop_at)) - set(session.settled)):
            await self._bring(ref, region, SNAPSHOTS[snapshot])
            if checkpoints and region in (1, 3):
                await replica.flush(ref)
                self._mark(Checkpointed(snapshot, frozenset(session.settled)))
        if stop_at < REGIONS:
            replica.release(ref)
            return None
        record = self.ledger.mint(replica_uuid, NAME, "a source")
        commit_id = bytes.fromhex(record.commit_id)
        self._mark(Minted(commit_id, snapshot, keep))
        try:
            (point,) = await commits.commit([commits.Asked(replica, ref, commit_id, keep)])
        except Killed as death:
            raise _AnswerLost(ref, commit_id, keep) from death
        self._mark(Answered(commit_id, keep))
        self.ledger.confirm(record, point.number)
        await replica.complete()
        return point

    async def ask_again(self, lost: _AnswerLost) -> None:
        """The client repeats its request to the next server."""
        await commits.commit([commits.Asked(self.replica, lost.ref, lost.commit_id, lost.keep)])
        self._mark(Answered(lost.commit_id, lost.keep))

    async def _bring(self, ref: pb.SessionRef, region: int, content: bytes) -> None:
        offset = region * REGION
        ours = content[offset : offset + REGION]
        theirs, _ = await self.replica.session_digests(ref, REGION, [(region, 1)], fresh=False)
        if theirs == digest(ours, self.replica.store.identity.key):
            await self.replica.settle(ref, [(region, 1)])
        elif any(ours):
            half = len(ours) // 2 // BLOCK * BLOCK
            extents = [pb.Extent(offset=0, length=half), pb.Extent(offset=half, length=len(ours) - half)]
            change = pb.WriteRegionRequest(offset=offset, length=len(ours), writes=extents)
            await self.replica.write_regions([(change, memoryview(ours))], ref)
        else:
            await self.replica.unmap_region(pb.UnmapRegionRequest(offset=offset, length=len(ours)), ref)


class _AnswerLost(BaseException):
    """The server died during a commit."""

    def __init__(self, ref: pb.SessionRef, commit_id: bytes, keep: Retention | None) -> None:
        self.ref, self.commit_id, self.keep = ref, commit_id, keep


class Recorded(Protocol):
    """Something whose changes to files were recorded, and that knows what must hold afterwards."""

    @property
    def log(self) -> list[Operation]: ...

    def promises(self) -> Any:
        """Nothing promised yet; `take` hears the marks."""

    async def check(self, root: Path, promises: Any) -> None:
        """Raise unless everything promised holds in `root`."""


class Life:
    """A world that is recorded, and whose processes may die once."""

    def __init__(self, root: Path, *, clones: bool, doomed: Callable[[Operation], bool] = lambda one: False) -> None:
        self.clones = clones
        self.recorder = Recorder(root, doomed)
        self._world = World(root, clones=clones, mark=self.recorder.mark)

        self.died_at: int | None = None
        """The number of the operation before which a process died."""

    @property
    def log(self) -> list[Operation]:
        """What happened."""
        return self.recorder.log

    def promises(self) -> Promises:
        return Promises()

    async def check(self, root: Path, promises: Promises) -> None:
        await check(root, self.clones, promises)

    async def live(self) -> None:
        """From the creation of a replica to its last sync."""
        with self.recorder.recording():
            try:
                await self._live()
            finally:
                self._world.abandon()

    async def _live(self) -> None:
        await self._sync("a", stop_at=3)
        await self._restart(clean=False)
        await self._sync("a", stop_at=4)
        await self._sync("a", stop_at=4)
        await self._sync("b")
        await self._sync("c", keep=KEEP)
        await self._restart(clean=True)
        await self._sync("d", stop_at=3)
        await self._restart(clean=False)
        await self._sync("d", keep=KEEP)
        await self._sync("e", keep=KEEP)
        await self._discarded("f")
        await self._restart(clean=True)
        await self._sync("a", keep=KEEP)

    async def _sync(self, snapshot: str, *, stop_at: int = REGIONS, keep: Retention | None = None) -> None:
        while True:
            try:
                await self._world.sync(snapshot, stop_at=stop_at, keep=keep)
                return
            except Killed:
                await self._restart(clean=False)
            except _AnswerLost as lost:
                await self._restart(clean=False)
                try:
                    await self._world.ask_again(lost)
                    return
                except BlockferryError as error:
                    if error.code is not Code.STALE_EPOCH:
                        raise

    async def _discarded(self, snapshot: str) -> None:
        await self._sync(snapshot, stop_at=3)
        session = self._world.replica.session
        if session is not None:
            ref = pb.SessionRef(session_id=session.session_id, epoch=session.epoch)
            self.recorder.mark(Discarding())
            try:
                await self._world.replica.abort(ref, discard=True)
            except Killed:
                await self._restart(clean=False)

    async def _restart(self, *, clean: bool) -> None:
        if clean:
            try:
                await self._world.stop()
            except Killed:
                await self._restart(clean=False)
        else:
            self._world.abandon()
            if self.recorder.dead:
                self.died_at = len(self.log)
                self.recorder.revive()


REFUSED: dict[str, object] = {"number": 99}
KEY = b"secret"


@dataclass(frozen=True)
class Seen:
    """So many records of a log are known to somebody; perhaps also that another one was refused."""

    count: int
    refused: bool = False


@dataclass
class _Records:
    """How many records of a log are promised, and whether one is promised never to be seen."""

    count: int = 0
    refused: bool = False

    def take(self, what: Seen) -> None:
        """More of them."""
        self.count = what.count
        self.refused = what.refused


class LogLife:
    """A log by itself, in a directory that nobody else flushes."""

    def __init__(self) -> None:
        self.log: list[Operation] = []

    def live(self, root: Path) -> None:
        """Append, die before the flush of the second record, and let another process read."""
        flushes = itertools.count()
        recorder = Recorder(root, lambda operation: isinstance(operation, FlushFile) and next(flushes) == 1)
        with recorder.recording():
            log = Log(root / "log")
            log.append({"number": 0})
            recorder.mark(Seen(1))
            with contextlib.suppress(Killed):
                log.append({"number": 1})
            log.close()
            recorder.revive()
            log = Log(root / "log")
            recorder.mark(Seen(len(log.records)))
            log.close()
        self.log = recorder.log

    def promises(self) -> _Records:
        return _Records()

    async def check(self, root: Path, promises: _Records) -> None:
        log = Log(root / "log")
        try:
            assert log.records[: promises.count] == [{"number": number} for number in range(promises.count)]
            assert not (promises.refused and REFUSED in log.records), "a record that was refused is there"
        finally:
            log.close()


class NewFileLife:
    """A file that must never be there in part, such as a private key."""

    def __init__(self) -> None:
        self.log: list[Operation] = []

    def live(self, root: Path) -> None:
        """Make it, and say so."""
        recorder = Recorder(root)
        with recorder.recording():
            write_new(root / "key", KEY)
            recorder.mark(Seen(1))
        self.log = recorder.log

    def promises(self) -> _Records:
        return _Records()

    async def check(self, root: Path, promises: _Records) -> None:
        found = (root / "key").read_bytes() if (root / "key").exists() else None
        assert found in ((KEY,) if promises.count else (KEY, None))


class RefusedLogLife(LogLife):
    """A log whose disk fails once: what it refuses must not come back, though it may have reached the disk."""

    def live(self, root: Path) -> None:
        """Append, and fail to flush the second record."""
        recorder = Recorder(root)
        with recorder.recording(), pytest.MonkeyPatch.context() as patch:
            log = Log(root / "log")
            log.append({"number": 0})
            recorder.mark(Seen(1))
            flush = disk.fsync
            failures = [OSError(errno.EIO, "once")]

            def fsync(fd: int) -> None:
                if failures:
                    raise failures.pop()
                flush(fd)

            patch.setattr(disk, "fsync", fsync)
            with pytest.raises(OSError, match="once"):
                log.append(REFUSED)
            recorder.mark(Seen(1, refused=True))
            # Moments at which power may fail: that the record reached the disk and its removal did not is rare.
            for moment in range(30):
                write_unsynced(root / "later", bytes([moment]))
            log.close()
        self.log = recorder.log


# --- holding a state to its promises ----------------------------------------------------------------------------------


async def check(root: Path, clones: bool, promises: Promises) -> None:
    """Raise AssertionError or BlockferryError unless everything promised holds in what a power failure left."""
    directory = root / NAME
    if not directory.exists():
        assert promises.epoch == 0, "the replica is gone"
    world = World(root, clones=clones)
    try:
        store = world.replica.store
        assert store.session.epoch >= promises.epoch, "an epoch that a client has seen is forgotten"
        await _check_points(store, promises)
        _check_ledger(world, store, promises)
        await _check_next_sync(world, directory, promises)
    finally:
        world.abandon()


async def _check_points(store: Store, promises: Promises) -> None:
    generations = store.generations
    present = {point.commit_id: point for point in generations.points}
    newest = generations.newest
    for commit_id, point in present.items():
        assert await content_of(store, point) == SNAPSHOTS[promises.asked[commit_id]], "a point is not what it was"
        trusted = store.trusted_digests(point)
        for region, known in (trusted or DigestCache()).items():
            content = SNAPSHOTS[promises.asked[commit_id]][region * REGION : (region + 1) * REGION]
            assert known == digest(content, store.identity.key), "a digest vouches for something else"
    for commit_id in promises.answered:
        known_as = generations.committed(commit_id)
        assert known_as is not None, "an acknowledged commit is forgotten"
        dropped = newest is not None and newest.number - known_as.number >= KEEP.last
        assert commit_id in present or dropped, "a point is gone"
    if promises.keep is not None:
        assert generations.keep == promises.keep, "the retention rules are forgotten"


def _check_ledger(world: World, store: Store, promises: Promises) -> None:
    last = world.ledger.last(bytes.fromhex(store.identity.uuid))
    if not promises.minted:
        return
    assert last is not None, "the source has forgotten the commit id it asked for"
    commit_id = bytes.fromhex(last.commit_id)
    # A later id may be on the disk already: it is minted before anybody knows.
    assert commit_id not in promises.minted[:-1], "the source remembers an older commit id"
    assert not last.confirmed or store.generations.committed(commit_id) is not None, (
        "a commit that is not there is confirmed"
    )


async def _check_next_sync(world: World, directory: Path, promises: Promises) -> None:
    """Sync what the destination offers to resume: if it claims too much the result is wrong."""
    store = world.replica.store
    snapshot = promises.snapshot
    with contextlib.suppress(OSError, ValueError):
        snapshot = json.loads((directory / "progress.json").read_bytes())["snapshot_id"]
    checkpoint = promises.checkpoint
    if checkpoint is not None:
        assert checkpoint.snapshot == snapshot, "durable progress is forgotten"
        session = await world.replica.open_session(pb.OpenSessionRequest(volume=NAME, size=SIZE, snapshot_id=snapshot))
        assert checkpoint.regions <= set(session.settled), "durable regions are forgotten"
        world.replica.release(pb.SessionRef(session_id=session.session_id, epoch=session.epoch))
    point = await world.sync(snapshot)
    assert point is not None
    assert await content_of(store, point) == SNAPSHOTS[snapshot], "the next sync commits something else"
    path = world.replica.path
    assert path is not None and path.read_bytes() == SNAPSHOTS[snapshot], "the image is something else"
    assert world.replica.state is ReplicaState.CONSISTENT
    needed, allowed = files_of(store)
    files = set(os.listdir(directory))
    assert needed <= files <= allowed, "files nobody needs are left"
