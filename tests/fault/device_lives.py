"""The life of a replica on a device, for the tests of power failures. The device is a file in the same root, so that
what is written to it is recorded too."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from blockferry.common import disk
from blockferry.common.retention import Retention
from blockferry.common.volumes import Volume
from blockferry.server import handover
from blockferry.server.replica import Replica
from blockferry.server.store import Store

from tests.fault.contents import content_of
from tests.fault.lives import NAME, REGION, SIZE, SNAPSHOTS, World
from tests.fault.powerloss import Operation, Recorder
from tests.images import BLOCK, noise
from tests.unit.devices import FileBase, base_of

GUEST = noise("a guest was here", BLOCK)
USED = GUEST + SNAPSHOTS["a"][BLOCK:]
"""What the device holds once a guest has written to it."""


@dataclass(frozen=True)
class Perhaps:
    """From here on the newest generation may hold this."""

    content: bytes


@dataclass(frozen=True)
class Answered:
    """And from here on it does, and nothing else."""

    content: bytes


@dataclass(frozen=True)
class Rewinding:
    """Newer points may be given up for the oldest."""


@dataclass(frozen=True)
class Promoted:
    """It was handed out."""


@dataclass
class Promises:
    """What holds at one moment."""

    newest: set[bytes] = field(default_factory=set)
    certain: bool = False
    rewinding: bool = False
    promoted: bool = False
    demoted: bool = False

    def take(self, what: object) -> None:
        """The next mark."""
        match what:
            case Perhaps(content):
                self.newest = self.newest | {content}
            case Answered(content):
                self.newest, self.certain = {content}, True
                self.promoted, self.demoted = False, self.demoted or self.promoted
            case Rewinding():
                self.rewinding = True
            case Promoted():
                self.promoted = True


class NamedBase(FileBase):
    """In what a power failure leaves all files are other ones."""

    def _identity(self, volume: Volume) -> str:
        return "the device"


class DeviceWorld(World):
    """A replica on the file `device` in `root`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, clones=False)

    @property
    def replica(self) -> Replica:
        """As in a pool."""
        if self._replica is None:
            directory = self.root / NAME
            base = NamedBase(base_of(self.root / "device", directory).spec, directory)
            if directory.exists():
                store = Store(directory, clones=False, base=base)
            else:
                store = Store.create(directory, REGION, clones=False, base=base)
            self._replica = Replica(NAME, "pool", store, 60.0, Retention(last=1))
        return self._replica


class DeviceLife:
    """Synced, interrupted, promoted to an older point, written to, taken back, synced again."""

    def __init__(self, root: Path) -> None:
        self.log: list[Operation] = []
        self._root = root

    async def live(self) -> None:
        """All of it."""
        recorder = Recorder(self._root)
        self.log = recorder.log
        world = DeviceWorld(self._root)
        with recorder.recording():
            try:
                _make(self._root / "device")
                for snapshot in ("a", "b", "c"):
                    recorder.mark(Perhaps(SNAPSHOTS[snapshot]))
                    await world.sync(snapshot, keep=Retention(last=9))
                    recorder.mark(Answered(SNAPSHOTS[snapshot]))
                await world.sync("d", stop_at=3)
                world.abandon()
                recorder.mark(Rewinding())
                recorder.mark(Perhaps(SNAPSHOTS["a"]))
                await handover.promote(world.replica, 1, lambda done, total: None)
                recorder.mark(Promoted())
                recorder.mark(Perhaps(USED))
                _write(self._root / "device")
                world.abandon()
                await handover.demote(world.replica, keep_changes=True)
                recorder.mark(Answered(USED))
                recorder.mark(Perhaps(SNAPSHOTS["e"]))
                await world.sync("e", keep=Retention(last=9))
                recorder.mark(Answered(SNAPSHOTS["e"]))
            finally:
                world.abandon()

    def promises(self) -> Promises:
        """Nothing yet."""
        return Promises()

    async def check(self, root: Path, promises: Promises) -> None:
        """The newest generation is one of those it may be, older ones are what they were, the device gets what it has
        to, and what was handed out is left alone."""
        if not (root / NAME).exists():
            assert not promises.certain, "the replica is gone"
            return
        world = DeviceWorld(root)
        try:
            store = world.replica.store
            generations = store.generations
            assert not promises.promoted or generations.promoted or generations.last_number > 3, "it is not promoted"
            if generations.promoted is not None:
                assert not promises.demoted, "a demotion is forgotten"
                held = (root / "device").read_bytes()
                assert held[BLOCK:] == USED[BLOCK:], "something was written to what was handed out"
                return
            newest = generations.newest
            assert newest is not None or not promises.certain, "a generation is gone"
            if newest is None:
                return
            content = await content_of(store, newest)
            assert content in promises.newest, "the newest generation holds something else"
            if newest.number <= 3:
                assert content == SNAPSHOTS["abc"[newest.number - 1]], "the newest generation is another one"
            for point in generations.points[:-1]:
                expected = USED if promises.demoted else SNAPSHOTS["abc"[point.number - 1]]
                assert await content_of(store, point) == expected, "an older point is not what it was"
            missing = {1, 2, 3} - {point.number for point in generations.points}
            assert promises.rewinding or not any(number < newest.number for number in missing), "a point is gone"
            await world.replica.complete()
            assert (root / "device").read_bytes() == content, "the device holds something else"
        finally:
            world.abandon()


def _make(device: Path) -> None:
    fd = disk.create(device)
    disk.pwrite(fd, noise("before", SIZE), 0)
    disk.fsync(fd)
    disk.fsync_directory(device.parent)
    os.close(fd)


def _write(device: Path) -> None:
    """As a guest that does not flush."""
    fd = os.open(device, os.O_RDWR)
    disk.pwrite(fd, GUEST, 0)
    os.close(fd)
