"""Every kind of volume, made from a description, for the conformance suite.

A new kind is a maker and a line in `KINDS`. A maker gets the size in bytes and the pieces that hold data (all else is
zeros), and yields how to open what it made, as often as one likes, until it is left.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import shutil
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from blockferry.common.archive.format import ARCHIVE_BLOCK
from blockferry.common.archive.store import open_store
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import Provenance
from blockferry.common.volumes import DeviceVolume, ImageVolume, NbdVolume, ReplicaVolume, Volume, open_volume
from blockferry.common.volumes.scratch import ScratchVolume
from blockferry.server.cache import DigestCache
from blockferry.server.delta import Delta
from blockferry.server.gate import Gate
from blockferry.server.overlay import OverlayVolume
from blockferry.server.store import Store

from tests.archives import Maker
from tests.filesystems import FileSystems
from tests.images import BLOCK, build, noise
from tests.nbd import Served, nbdcopy, nbdkit, qemu_img, qemu_nbd
from tests.nbd_serving import serving
from tests.processes import loop_device
from tests.support import Server
from tests.unit.memory_volume import MemoryVolume
from tests.unit.stores import IDS, working

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
    """None where the kind is never written."""
    shorten: Callable[[int], None] | None = None
    """Takes away what lies behind this many bytes, behind the back of a volume that is open."""


@dataclass(frozen=True)
class Kind:
    """A kind of volume, and what the suite may expect of it."""

    make: Callable[[Site, int, Pieces], AbstractContextManager[Made]]
    provenance: Provenance = Provenance.EXACT
    """Of maps of regions of at least `coarse` bytes; of smaller ones they are conservative."""
    coarse: int = 0
    written: bool = True
    """Whether volumes of this kind can be opened for writing."""
    granularity: int = 1
    """Sizes are multiples of this many bytes."""
    deallocates: bool = True
    """What is unmapped, whole blocks at least, is no longer allocated."""
    vouches: bool = True
    """What can be deallocated is known to be so without writing zeros; otherwise `deallocate` leaves everything."""
    page_size: int = BLOCK
    """Bytes that are allocated together: unmapped in part they stay."""
    tail_stays: bool = False
    """A last block that is short stays allocated when it is unmapped: nobody punches past the end of the file behind
    the device, where the rest of that block is."""
    looks_for_zeros: bool = False
    """Zeros that are written are found out to be zeros."""

    def knows(self, region_size: int) -> Provenance:
        """What a map of such regions is."""
        return self.provenance if region_size >= self.coarse else Provenance.CONSERVATIVE

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


def _served(export: Served, shorten: Callable[[int], None] | None = None) -> Made:
    return Made(lambda: NbdVolume.open(export.uri), lambda: NbdVolume.open(export.uri, writable=True), shorten)


@contextlib.contextmanager
def nbdkit_memory(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """An export that is memory."""
    path = build(site.path("temporary"), size, pieces)
    try:
        with nbdkit(path.parent, "memory", f"size={size}") as export:
            nbdcopy(path, export.uri)
            yield _served(export)
    finally:
        path.unlink()


@contextlib.contextmanager
def nbdkit_file(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """An export that is a file."""
    path = build(site.path("ext4"), size, pieces)
    try:
        with nbdkit(site.file_systems.directory("temporary"), "file", path) as export:
            yield _served(export, lambda length: os.truncate(path, length))
    finally:
        path.unlink()


@contextlib.contextmanager
def qemu(site: Site, size: int, pieces: Pieces, *, format: str) -> Iterator[Made]:
    """An export of QEMU's. What is cut off behind its back reads as zeros there, which no client can tell."""
    raw = build(site.path("ext4"), size, pieces)
    image = raw
    try:
        if format != "raw":
            image = raw.with_suffix(f".{format}")
            # Clusters of a block, so that it can be said exactly what is allocated.
            qemu_img("convert", "-f", "raw", "-O", format, "-o", f"cluster_size={BLOCK}", raw, image)
        sockets = site.file_systems.directory("temporary")
        with qemu_nbd(sockets, f"--format={format}", "--discard=unmap", image) as export:
            yield _served(export)
    finally:
        raw.unlink()
        image.unlink(missing_ok=True)


@contextlib.contextmanager
def overlay(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """An image that stays as it is under a delta that is empty at first; what is written stays in its memory."""
    path = build(site.path("ext4"), size, pieces)
    delta = Delta.create(path.with_suffix(".redo"), size)

    async def opened(writable: bool) -> Volume:
        # By the name of the image, which is in the errors.
        base = await ImageVolume.open(path)
        return _Overlay(str(path), size, base, lambda: (delta,), Gate(), top=delta if writable else None)

    try:
        yield Made(
            functools.partial(opened, False),
            functools.partial(opened, True),
            lambda length: os.truncate(path, length),
        )
    finally:
        delta.close()
        Delta.remove(delta.path)
        path.unlink()


class _Scratch(ScratchVolume):
    """It is opened as often as one likes, keeps what was written meanwhile, and may be for reading."""

    writable = True

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        self._refuse()
        await super().write(extents)

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        self._refuse()
        return await super().unmap(extents)

    def _refuse(self) -> None:
        if not self.writable:
            raise BlockferryError(Code.READ_ONLY, "cannot be written", cause="it is for reading", next="nothing")

    async def close(self) -> None:
        """The maker does."""


@contextlib.contextmanager
def scratch(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """An image that stays as it is under changes that are thrown away."""
    path = build(site.path("ext4"), size, pieces)
    before = path.read_bytes()
    found: list[tuple[_Scratch, ImageVolume]] = []

    async def opened(writable: bool) -> Volume:
        if not found:
            base = await ImageVolume.open(path)
            made = await _Scratch.open(base, path.parent, 64 * size + 64 * BLOCK)
            assert isinstance(made, _Scratch)
            found.append((made, base))
        volume = copy.copy(found[0][0])
        volume.writable = writable
        return volume

    try:
        yield Made(
            functools.partial(opened, False),
            functools.partial(opened, True),
            lambda length: os.truncate(path, length),
        )
        if path.stat().st_size == size:
            assert path.read_bytes() == before
    finally:
        for made, base in found:
            os.close(made._fd)
            base.let_go()
        path.unlink()


@contextlib.contextmanager
def own_server(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """An export of our own NBD server."""
    path = build(site.path("ext4"), size, pieces)
    try:
        with serving(lambda: ImageVolume.open(path, writable=True)) as found:
            yield Made(
                lambda: NbdVolume.open(found.uri),
                lambda: NbdVolume.open(found.uri, writable=True),
                lambda length: os.truncate(path, length),
            )
    finally:
        path.unlink()


class _Overlay(OverlayVolume):
    """Closes what is below it, which is nobody else's."""

    async def close(self) -> None:
        await super().close()
        await self.base.close()


@contextlib.contextmanager
def archived(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """A snapshot in an archive, made from a base that had other data in a third of it."""
    root = site.path("temporary")
    root.mkdir()
    content = bytearray(size)
    for offset, data in pieces:
        content[offset : offset + len(data)] = data
    blocks: dict[int, bytes | None] = {}
    for start in range(0, size, ARCHIVE_BLOCK):
        data = bytes(content[start : start + ARCHIVE_BLOCK])
        blocks[start // ARCHIVE_BLOCK] = data if any(data) else None
    uri = f"file://{root}"

    async def opened() -> Volume:
        async with await open_store(uri) as store:
            if not await store.list("names/"):
                maker = await Maker(store).create()
                older = {block: noise("older", length_of(block)) for block in blocks if block % 3 == 0}
                base = await maker.snapshot(size, older)
                await maker.snapshot(size, blocks, base=base)
        return await open_volume(f"{uri}#vm")

    def length_of(block: int) -> int:
        return min(ARCHIVE_BLOCK, size - block * ARCHIVE_BLOCK)

    try:
        yield Made(opened)
    finally:
        shutil.rmtree(root)


@contextlib.contextmanager
def recovery_point(site: Site, size: int, pieces: Pieces) -> Iterator[Made]:
    """A generation that is read through before-images: the next one has written a third of the volume, zeroed another
    third, and left the rest as it is."""
    store = Store.create(site.path("ext4"), 65536, clones=False)

    async def commit(number: int, writes: Pieces, zeroes: Sequence[tuple[int, int]]) -> None:
        async with working(store, size) as work:
            await work.write(writes)
            await work.unmap(zeroes)
            await work.flush()
            await store.commit(work, IDS[number], size, DigestCache())
        await store.complete()

    async def opened() -> Volume:
        if store.generations.newest is None:
            third = -(-size // 3)
            await commit(1, pieces, [])
            await commit(2, [(0, noise("newer", third))], [(third, min(third, size - third))] if size > 1 else [])
        point = store.generations.point(1)
        assert point is not None
        return await store.content.open_point(point)

    try:
        yield Made(opened)
    finally:
        store.abandon()
        shutil.rmtree(store.directory)


KINDS = {
    "image-ext4": Kind(functools.partial(image, on="ext4")),
    "image-xfs": Kind(functools.partial(image, on="xfs")),
    "image-btrfs": Kind(functools.partial(image, on="btrfs")),
    "image-tmpfs": Kind(functools.partial(image, on="tmpfs")),
    "loop-512": Kind(functools.partial(loop, sector=512), granularity=512, tail_stays=True),
    "loop-4096": Kind(functools.partial(loop, sector=4096), granularity=4096),
    "loop-tmpfs": Kind(functools.partial(loop, sector=512, on="tmpfs"), granularity=512, tail_stays=True),
    "device": Kind(
        functools.partial(unproven_loop, sector=512),
        Provenance.ABSENT,
        granularity=512,
        deallocates=False,
        vouches=False,
    ),
    "memory": Kind(memory),
    "nbdkit-memory": Kind(nbdkit_memory, page_size=32768, looks_for_zeros=True),
    "nbdkit-file": Kind(nbdkit_file, vouches=False, tail_stays=True),
    "qemu-raw": Kind(functools.partial(qemu, format="raw"), granularity=512, tail_stays=True),
    "qemu-qcow2": Kind(functools.partial(qemu, format="qcow2"), granularity=512),
    "own-nbd": Kind(own_server),
    "overlay": Kind(overlay),
    "scratch": Kind(scratch),
    "recovery-point": Kind(recovery_point, written=False),
    "replica": Kind(replica, written=False),
    "archive": Kind(archived, coarse=ARCHIVE_BLOCK, written=False),
}
