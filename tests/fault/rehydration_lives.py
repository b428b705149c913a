"""A disk that is rehydrated, recorded: begun, written, flushed, killed, resumed, snapshotted, completed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from blockferry.common import disk
from blockferry.common.errors import BlockferryError
from blockferry.common.volumes import ImageVolume
from blockferry.server.rehydrate import map as maps
from blockferry.server.rehydrate.hydration import Hydration, Options

from tests.fault.powerloss import Killed, Operation, Recorder
from tests.unit.rehydration import SECTOR, B, Site, World, pattern, read

SIZE = 24 * B + 100
SOURCE = pattern(1, 8 * B) + bytes(8 * B) + pattern(2, SIZE - 16 * B)


@dataclass(frozen=True)
class Began:
    """The disk is served."""


@dataclass(frozen=True)
class Writing:
    """A guest is about to change this."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class Flushed:
    """A flush was answered; this is what the disk holds."""

    content: bytes


@dataclass(frozen=True)
class Snapshotted:
    """A snapshot was answered."""

    content: bytes


@dataclass(frozen=True)
class Completed:
    """Everything is in the primary, durably; but for what the guest itself has not flushed."""


@dataclass
class Promises:
    """What must hold: for each sector the contents that it may have."""

    began: bool = False
    completed: bool = False
    snapshot: bytes | None = None
    flushed: bytes = SOURCE
    since: list[Writing] = field(default_factory=list)

    def take(self, what: object) -> None:
        """One more."""
        match what:
            case Began():
                self.began = True
            case Writing():
                self.since.append(what)
            case Flushed(content):
                self.flushed, self.since = content, []
            case Snapshotted(content):
                self.snapshot = content
            case Completed():
                self.completed = True

    def check(self, found: bytes) -> None:
        """Raise unless each sector is what was flushed, or something newer."""
        for start in range(0, SIZE, SECTOR):
            allowed = {self.flushed[start : start + SECTOR]}
            for one in self.since:
                now = bytearray(self.flushed)
                now[one.offset : one.offset + len(one.data)] = one.data
                allowed.add(bytes(now[start : start + SECTOR]))
            assert found[start : start + SECTOR] in allowed, f"the sector at {start} is lost, or older than it may be"


@contextlib.contextmanager
def small_maps() -> Iterator[None]:
    """Maps are folded soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "FOLD_BYTES", 1)
        patch.setattr(maps, "MOST_RUNS", 3)
        yield


PRIMARY, STATE = "disks/disk.raw", "state"
"""In directories of their own: neither is made durable by a flush that is meant for the other."""


async def _opened(root: Path, primary: str = PRIMARY, state: str = STATE) -> Hydration:
    options = Options(["source"], str(root / primary), root / state)
    return await Hydration.open(options, World(source=Site(SOURCE)).open)


async def _abandon(disk: Hydration) -> None:
    """Its process has died: descriptors are closed, and nothing else happens."""
    await disk.volume.fetcher.close()
    assert isinstance(disk.volume.primary, ImageVolume)
    disk.volume.primary.let_go()
    disk.volume.map.close()
    os.close(disk._lock)


class RehydrationLife:
    """From an empty directory to a primary of its own."""

    def __init__(self, root: Path, *, doomed: Callable[[Operation], bool] = lambda one: False) -> None:
        self.recorder = Recorder(root, doomed)
        self.died_at: int | None = None
        self._root = root
        self._disk: Hydration | None = None

    @property
    def log(self) -> list[Operation]:
        """What happened."""
        return self.recorder.log

    def promises(self) -> Promises:
        return Promises()

    async def live(self) -> None:
        """All of it; whoever dies on the way is followed by another process, which does the rest."""
        with small_maps(), self.recorder.recording():
            for step in (
                self._make_home,
                self._open,
                lambda: self._write(2 * B, pattern(3, 2 * B)),
                self._flush,
                lambda: self._write(5 * B + 512, pattern(4, 1024)),
                lambda: self._zero(9 * B, 2 * B),
                self._flush,
                lambda: self._write(20 * B, pattern(5, 2 * B)),
                self._die,
                lambda: self._write(2 * B, pattern(6, 2 * B)),
                self._flush,
                lambda: self._write(12 * B, pattern(7, 2 * B)),
                self._flush,
                self._snapshot,
                lambda: self._write(18 * B, pattern(8, B)),
                self._complete,
                lambda: self._write(18 * B, pattern(9, B)),
                self._flush,
                self._close,
                self._open,
                self._close,
            ):
                await self._survive(step)

    async def _survive(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except (Killed, BlockferryError):
            # Whoever waited for a fetch that died is told so.
            if not self.recorder.dead:
                raise
            self.died_at = len(self.log)
            self.recorder.revive()
            if self._disk is not None:
                await _abandon(self._disk)
                self._disk = None
            await self._make_home()
            await self._open()
            # The next process's guest makes sure of what it sees.
            await self._flush()

    @property
    def disk(self) -> Hydration:
        """The process at work."""
        assert self._disk is not None
        return self._disk

    async def _make_home(self) -> None:
        """What an administrator does beforehand."""
        home = (self._root / PRIMARY).parent
        if not home.is_dir():
            disk.make_directory(home)
        disk.fsync_directory(self._root)

    async def _content(self) -> bytes:
        return await read(self.disk.volume, 0, SIZE)

    async def _open(self) -> None:
        self._disk = await _opened(self._root)
        self.recorder.mark(Began())

    async def _write(self, offset: int, data: bytes) -> None:
        self.recorder.mark(Writing(offset, data))
        await self.disk.volume.write([(offset, data)])

    async def _zero(self, offset: int, length: int) -> None:
        self.recorder.mark(Writing(offset, bytes(length)))
        await self.disk.volume.unmap([(offset, length)])

    async def _flush(self) -> None:
        await self.disk.volume.flush()
        self.recorder.mark(Flushed(await self._content()))

    async def _die(self) -> None:
        await _abandon(self.disk)
        self._disk = None
        await self._open()

    async def _snapshot(self) -> None:
        content = await self._content()
        await self.disk.volume.fetcher.idle()
        await self.disk.snapshot("copy")
        self.recorder.mark(Snapshotted(content))

    async def _complete(self) -> None:
        await asyncio.wait_for(self.disk.run(), 20)
        self.recorder.mark(Completed())

    async def _close(self) -> None:
        content = await self._content()
        disk, self._disk = self.disk, None
        await disk.close()
        self.recorder.mark(Flushed(content))

    async def check(self, root: Path, promises: Promises) -> None:
        """Raise unless everything promised holds in `root`."""
        primary = root / PRIMARY
        assert not promises.began or primary.exists(), "the primary has lost its name"
        if promises.completed:
            promises.check(primary.read_bytes())
        if not primary.parent.exists():
            return
        with small_maps():
            disk = await _opened(root)
            try:
                promises.check(await read(disk.volume, 0, SIZE))
            finally:
                await _abandon(disk)
            if promises.snapshot is not None:
                assert (root / f"{PRIMARY}.copy").exists(), "the snapshot has lost its name"
                copy = await _opened(root, f"{PRIMARY}.copy", f"{STATE}/snapshots/copy")
                try:
                    assert await read(copy.volume, 0, SIZE) == promises.snapshot
                finally:
                    await _abandon(copy)
