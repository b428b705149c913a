"""Lives in which a replica is handed over, taken back, adopted and deleted, for the tests of power failures."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from blockferry.common import disk
from blockferry.server import handover
from blockferry.server.store import Store, bury

from tests.fault.contents import content_of, read_all
from tests.fault.lives import NAME, REGION, REGIONS, SNAPSHOTS, World
from tests.fault.powerloss import Operation, Recorder
from tests.images import BLOCK, noise

GUEST = 2 * REGION
"""Offset in bytes of what is written to a promoted image."""


def _without_progress(done: int, total: int) -> None:
    return


def _written(content: bytes, seed: int) -> bytes:
    return content[:GUEST] + noise(seed, BLOCK) + content[GUEST + BLOCK :]


_CONTENTS = {1: SNAPSHOTS["a"], 2: SNAPSHOTS["b"], 3: _written(SNAPSHOTS["a"], 71)}
"""What the generations hold that are ever older ones, by number."""


@dataclass(frozen=True)
class Promoted:
    """A client was told that a generation with this content was handed out."""

    commit_id: bytes
    content: bytes


@dataclass(frozen=True)
class Demoting:
    """The replica is about to be taken back; its newest generation will hold this."""

    content: bytes


@dataclass(frozen=True)
class Demoted:
    """A client was told that it is."""


@dataclass
class _Handed:
    promoted: Promoted | None = None
    newest: set[bytes] = field(default_factory=set)
    """What the newest generation may hold."""
    certain: bool = False
    """There is one."""

    def take(self, what: object) -> None:
        """The next mark."""
        match what:
            case Promoted():
                self.promoted = what
            case Demoting(content):
                self.promoted = None
                self.newest.add(content)
                self._next = content
            case Demoted():
                self.newest, self.certain = {self._next}, True


class HandoverLife:
    """Promoted twice: once to keep what is written to it, once not."""

    def __init__(self, root: Path, *, clones: bool) -> None:
        self.clones = clones
        self.log: list[Operation] = []
        self._root = root

    async def live(self) -> None:
        """From the first sync to the sync after the last demotion."""
        recorder = Recorder(self._root)
        self.log = recorder.log
        world = World(self._root, clones=self.clones)
        with recorder.recording():
            try:
                for snapshot in ("a", "b"):
                    recorder.mark(Demoting(SNAPSHOTS[snapshot]))
                    # Nothing but the commit makes it durable.
                    await world.sync(snapshot, checkpoints=False)
                    recorder.mark(Demoted())
                for number, before, seed, keep in ((1, "a", 71, True), (0, "", 72, False)):
                    replica = world.replica
                    promotion = await handover.promote(replica, number, _without_progress)
                    content = SNAPSHOTS[before] if before else _written(SNAPSHOTS["a"], 71)
                    recorder.mark(Promoted(promotion.commit_id, content))
                    fd = os.open(replica.store.content.promoted, os.O_RDWR)
                    disk.pwrite(fd, noise(seed, BLOCK), GUEST)
                    os.close(fd)
                    recorder.mark(Demoting(_written(content, seed) if keep else content))
                    await handover.demote(replica, keep_changes=keep)
                    recorder.mark(Demoted())
                    await replica.complete()
            finally:
                world.abandon()

    def promises(self) -> _Handed:
        """Nothing yet."""
        return _Handed()

    async def check(self, root: Path, promises: _Handed) -> None:
        """What was handed out is there and whole, and the newest generation is what it should be."""
        if not promises.newest:
            return
        world = World(root, clones=self.clones)
        try:
            store = world.replica.store
            newest = store.generations.newest
            assert newest is not None or not promises.certain, "a generation is gone"
            if newest is None:
                return
            assert await content_of(store, newest) in promises.newest, "the newest generation holds something else"
            for point in store.generations.points[:-1]:
                assert await content_of(store, point) == _CONTENTS[point.number], "an older point is not what it was"
            handed = promises.promoted
            if handed is not None:
                assert store.generations.promoted is not None, "the promotion is forgotten"
                assert store.generations.promoted.commit_id == handed.commit_id
                found = store.content.promoted.read_bytes()
                assert len(found) == len(handed.content)
                assert found[:GUEST] == handed.content[:GUEST], "what was handed out is not whole"
                assert found[GUEST + BLOCK :] == handed.content[GUEST + BLOCK :], "what was handed out is not whole"
        finally:
            world.abandon()


SEED = SNAPSHOTS["f"]


@dataclass(frozen=True)
class Brought:
    """The seed is durable where an administrator has put it."""


@dataclass(frozen=True)
class Adopted:
    """A client was told that it was adopted."""


@dataclass
class _Seeded:
    brought: bool = False
    adopted: bool = False

    def take(self, what: object) -> None:
        """The next mark."""
        self.brought = self.brought or isinstance(what, Brought)
        self.adopted = self.adopted or isinstance(what, Adopted)


class AdoptionLife:
    """A seed is brought and adopted."""

    def __init__(self, root: Path, *, clones: bool) -> None:
        self.clones = clones
        self.log: list[Operation] = []
        self._root = root

    async def live(self) -> None:
        """Until it is adopted."""
        recorder = Recorder(self._root)
        self.log = recorder.log
        world = World(self._root, clones=self.clones)
        with recorder.recording():
            try:
                seeds = self._root / "seeds"
                disk.make_directory(seeds)
                disk.fsync_directory(self._root)
                fd = disk.create(seeds / "seed")
                disk.pwrite(fd, SEED, 0)
                disk.fsync(fd)
                os.close(fd)
                disk.fsync_directory(seeds)
                recorder.mark(Brought())
                await handover.adopt(world.replica, seeds / "seed", 0)
                recorder.mark(Adopted())
            finally:
                world.abandon()

    def promises(self) -> _Seeded:
        """Nothing yet."""
        return _Seeded()

    async def check(self, root: Path, promises: _Seeded) -> None:
        """Wherever it is, the seed is there; and once it is adopted it is compared with."""
        if not promises.brought:
            return
        seed = root / "seeds" / "seed"
        if not (root / NAME).exists():
            assert seed.read_bytes() == SEED, "the seed is lost"
            return
        world = World(root, clones=self.clones)
        try:
            store = world.replica.store
            here = store.content.unfinished.exists()
            # Without the record a smaller source would cut it off.
            assert not here or store.generations.adopted_size == len(SEED), "it is not known for what it is"
            assert here or seed.exists(), "the seed is lost"
            assert here or not promises.adopted, "the adoption is forgotten"
            if here:
                assert store.content.unfinished.read_bytes() == SEED
                work, _, _ = await store.begin_work(len(SEED), "")
                assert await read_all(work) == SEED
                await store.content.end(work)
            else:
                # It can be asked for again.
                await handover.adopt(world.replica, seed, 0)
                assert store.content.unfinished.read_bytes() == SEED
        finally:
            world.abandon()


@dataclass(frozen=True)
class Deleted:
    """A client was told that the replica is gone."""


@dataclass
class _Gone:
    deleted: bool = False

    def take(self, what: object) -> None:
        """The next mark."""
        self.deleted = self.deleted or isinstance(what, Deleted)


class DeletionLife:
    """A replica is made and deleted."""

    def __init__(self, root: Path, *, clones: bool) -> None:
        self.clones = clones
        self.log: list[Operation] = []
        self._root = root

    async def live(self) -> None:
        """Until it is gone."""
        recorder = Recorder(self._root)
        self.log = recorder.log
        with recorder.recording():
            Store.create(self._root / NAME, REGION, clones=self.clones).abandon()
            bury(self._root / NAME)
            recorder.mark(Deleted())

    def promises(self) -> _Gone:
        """Nothing yet."""
        return _Gone()

    async def check(self, root: Path, promises: _Gone) -> None:
        """It does not come back."""
        assert not (promises.deleted and (root / NAME).exists()), "a deleted replica is back"


assert REGIONS * REGION > GUEST + BLOCK
