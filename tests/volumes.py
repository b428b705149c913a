"""Every kind of volume, made from a description, for the conformance suite.

A new kind is a maker and a line in `KINDS`. A maker gets the size in bytes and the pieces that hold data (all else is
zeros), and yields how to open what it made, as often as one likes, until it is left.
"""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from blockferry.common.regions import Provenance
from blockferry.common.volumes import DeviceVolume, ImageVolume, ReplicaVolume, Volume

from tests.filesystems import FileSystems
from tests.images import BLOCK, build
from tests.processes import loop_device
from tests.support import Server
from tests.unit.memory_volume import MemoryVolume

Pieces = Sequence[tuple[int, bytes]]
"""(offset, data), disjoint"""

Opener = Callable[[], Awaitable[Volume]]


@dataclass
class Site:
    """Where volumes are made. What is not needed is not started."""

    file_systems: FileSystems
    server: Callable[[], Server]

    def path(self, kind: str) -> Path:
        """A new name on a file system of this kind."""
        return self.file_systems.directory(kind) / uuid.uuid4().hex


@dataclass(frozen=True)
class Made:
    """A device that can be opened as a volume."""

    readable: Opener
    writable: Opener | None = None
    """None: volumes of this kind are never written."""
    shorten: Callable[[int], None] | None = None
    """Takes away what lies behind this many bytes, behind the back of a volume that is open."""


@dataclass(frozen=True)
class Kind:
    """A kind of volume, and what the suite may expect of it."""

    make: Callable[[Site, int, Pieces], AbstractContextManager[Made]]
    provenance: Provenance = Provenance.EXACT
    granularity: int = 1
    """Sizes are multiples of this many bytes."""
    deallocates: bool = True
    """What is unmapped, whole blocks at least, is no longer allocated."""
    tail_stays: bool = False
    """A last block that is short stays allocated when it is unmapped: a loop device cannot punch past the end of the
    file, where the rest of that block is."""

    def size(self, size: int) -> int:
        """The next size that is possible."""
        return -(-size // self.granularity) * self.granularity

    def stays(self, size: int) -> int:
        """Bytes at the end of a volume of `size` bytes that stay allocated."""
        return size % BLOCK if self.tail_stays else 0


@contextlib.contextmanager
def image(site: Site, size: int, pieces: Pieces, *, on: str) -> Iterator[Made]:
    """A raw image on a file system of kind `on`."""
    path = build(site.path(on), size, pieces)
    try:
        yield Made(
            lambda: ImageVolume.open(path),
            lambda: ImageVolume.open(path, writable=True),
            lambda length: os.truncate(path, length),
        )
    finally:
        path.unlink()


@contextlib.contextmanager
def loop(site: Site, size: int, pieces: Pieces, *, sector: int, on: str = "ext4") -> Iterator[Made]:
    """A loop device with sectors of `sector` bytes over a file on a file system of kind `on`."""
    path = build(site.path(on), size, pieces)
    try:
        with loop_device(path, "--sector-size", str(sector)) as device:
            yield Made(
                lambda: DeviceVolume.open(Path(device)),
                lambda: DeviceVolume.open(Path(device), writable=True),
                lambda length: os.truncate(path, length),
            )
    finally:
        path.unlink()


@contextlib.contextmanager
def unproven_loop(site: Site, size: int, pieces: Pieces, *, sector: int) -> Iterator[Made]:
    """A block device of which nothing can be proven, as most: its backing file has lost the name it had."""
    path = build(site.path("ext4"), size, pieces)
    with loop_device(path, "--sector-size", str(sector)) as device:
        path.unlink()
        yield Made(lambda: DeviceVolume.open(Path(device)), lambda: DeviceVolume.open(Path(device), writable=True))


@contextlib.contextmanager
def memory(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """The memory of the unit tests: what they prove is only as good as it."""
    content = bytearray(size)
    for offset, data in pieces:
        content[offset : offset + len(data)] = data
    volume = MemoryVolume(bytes(content))

    async def opened(writable: bool) -> Volume:
        return volume.opened(writable=writable)

    yield Made(functools.partial(opened, False), functools.partial(opened, True))


@contextlib.contextmanager
def replica(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """A committed generation of a replica, read over gRPC."""
    path = build(site.path("temporary"), size, pieces)
    server, name = site.server(), f"conforming-{uuid.uuid4().hex}"
    try:
        server.sync(path, name)
    finally:
        path.unlink()
    yield Made(lambda: ReplicaVolume.open(server.url(name)))


KINDS = {
    "image-ext4": Kind(functools.partial(image, on="ext4")),
    "image-xfs": Kind(functools.partial(image, on="xfs")),
    "image-btrfs": Kind(functools.partial(image, on="btrfs")),
    "image-tmpfs": Kind(functools.partial(image, on="tmpfs")),
    "loop-512": Kind(functools.partial(loop, sector=512), granularity=512, tail_stays=True),
    "loop-4096": Kind(functools.partial(loop, sector=4096), granularity=4096),
    "loop-tmpfs": Kind(functools.partial(loop, sector=512, on="tmpfs"), granularity=512, tail_stays=True),
    "device": Kind(functools.partial(unproven_loop, sector=512), Provenance.ABSENT, 512, deallocates=False),
    "memory": Kind(memory),
    "replica": Kind(replica),
}
