"""Block devices.

A block device cannot say where it has never been written, so everything counts as allocated unless somebody else can
prove more: the backing file of a loop device, or the metadata of an LVM thin volume (`ThinProof`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockferry.common import blockdev, disk, holders, thin
from blockferry.common.blockdev import Node
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.holders import Holder
from blockferry.common.regions import AllocationMap, Geometry, Provenance
from blockferry.common.volumes.descriptor import DescriptorVolume
from blockferry.common.volumes.loop import Backing
from blockferry.common.volumes.volume import in_thread
from blockferry.common.volumes.zeroing import DeviceZeroing

_DUMP_PART = 1024 * 1024
"""Bytes of a thin_dump read at a time."""


@dataclass(frozen=True)
class ThinProof:
    """What proves the holes of an LVM thin volume. It must describe the volume as it will be read: dump a metadata
    snapshot (`thin_dump -m`) that was reserved after the last write, of a thin snapshot best."""

    dump: Path
    """A file with the XML of thin_dump(8)."""
    table: str
    """What `dmsetup table` prints for the volume: its number in the metadata, and whether it has an external origin."""


class DeviceVolume(DescriptorVolume):
    """A block device, or a partition of one. Open one with `DeviceVolume.open`."""

    def __init__(
        self, path: Path, fd: int, size: int, writable: bool, node: Node, mapped: list[thin.Extent] | None
    ) -> None:
        super().__init__(path, fd, size, writable)
        limits = blockdev.limits(fd)
        self.sector_size = limits.logical
        self.preferred_size = limits.preferred
        self._node = node
        self._zeroing = DeviceZeroing(limits.logical)
        self._mapped = mapped
        self._backing = Backing.open(fd, node, size)
        self.identity = self._backing.identity if self._backing else blockdev.identity(node)

    @classmethod
    async def open(cls, path: Path, *, writable: bool = False, thin: ThinProof | None = None) -> DeviceVolume:
        """Open a device; a writable one is claimed (O_EXCL) until it is closed.

        Raises NOT_FOUND, UNREADABLE, UNSUPPORTED (no block device), INVALID_ARGUMENT (nothing is attached to it), and
        for writing READ_ONLY or IN_USE, which says who uses it. Nothing is changed then.
        """
        return await in_thread(cls._open, path, writable, thin)

    @classmethod
    def _open(cls, path: Path, writable: bool, proof: ThinProof | None) -> DeviceVolume:
        if writable and proof is not None:
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"{path} cannot be written with a map from its pool",
                cause="what is written is not in it",
                next="open it for reading",
                volume=str(path),
            )
        with contextlib.ExitStack() as stack:
            fd = _open_device(path, os.O_RDONLY)
            stack.callback(lambda: os.close(fd))
            try:
                node = Node(os.fstat(fd).st_rdev)
                if writable:
                    # The descriptor for reading tells whether it may be opened for writing: merely closing one that
                    # could write makes udev look at the device anew.
                    _refuse_read_only(path, fd)
                    _refuse_in_use(path, fd, node)
                    claimed = _claim(path, fd, node)
                    os.close(fd)
                    fd = claimed
                size = blockdev.size(fd)
                if size == 0:
                    raise _bad(path, Code.INVALID_ARGUMENT, "nothing is attached to it (0 bytes)")
                # What the page cache holds may be older than the device: another host, a partition's own cache or the
                # file behind a loop device may have changed it. What is read from here on comes from the device.
                blockdev.drop_cache(fd)
                mapped = None if proof is None else _thin_extents(proof, size)
                volume = cls(path, fd, size, writable, node, mapped)
            except OSError as error:
                raise from_os_error(error, f"cannot open {path}", volume=str(path)) from error
            stack.pop_all()
            return volume

    @property
    def zeroing(self) -> str:
        return self._zeroing.method.value

    def size_now(self) -> int:
        return blockdev.size(self._fd)

    def is_current(self) -> bool:
        """Whether the path still means the device that is open, and it has something attached."""
        try:
            return os.stat(self.path).st_rdev == self._node.number and blockdev.size(self._fd) > 0
        except OSError:
            return False

    def drop_cache(self) -> None:
        """What is read from here on comes from the device. Raises BlockferryError."""
        with self._failing("cannot drop what is cached", 0, self.size):
            blockdev.drop_cache(self._fd)

    # --- allocation ---------------------------------------------------------------------------------------------------

    async def allocation(self, region_size: int) -> AllocationMap:
        return await in_thread(self._allocation, Geometry(self.size, region_size))

    def _allocation(self, geometry: Geometry) -> AllocationMap:
        with self._failing("cannot read the allocation", 0, self.size):
            if self._mapped is not None:
                return AllocationMap.from_extents(geometry, self._mapped, Provenance.CONSERVATIVE)
            disk.fsync(self._fd)
            backing = self._proof()
            if backing is not None:
                backing.flush()
                found = backing.extents(0, self.size)
                if found is not None:
                    return AllocationMap.from_extents(geometry, found, Provenance.EXACT)
            return AllocationMap.full(geometry)

    def _proof(self) -> Backing | None:
        """The backing file, as long as it is what the device shows."""
        return self._backing if self._backing is not None and self._backing.holds_for(self._fd) else None

    def _held_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        with self._failing("cannot read the allocation", offset, length):
            backing = self._proof()
            found = None
            if backing is not None:
                blockdev.settle(self._fd, offset, length)
                found = backing.extents(offset, length)
            return [(offset, length)] if found is None else found

    # --- zeroing ------------------------------------------------------------------------------------------------------

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        return await in_thread(self._unmap, extents)

    def _unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        self.refuse_read_only()
        held = 0
        for offset, length in extents:
            held += sum(size for _, size in self._held_extents(offset, length))
            with self._failing("cannot unmap", offset, length):
                self._zeroing.zero(self._fd, offset, length)
        return held

    async def deallocate(self, extents: Sequence[tuple[int, int]]) -> tuple[int, Sequence[tuple[int, int]]]:
        return await in_thread(self._deallocate, extents)

    def _deallocate(self, extents: Sequence[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
        # Invariant 6, equal bytes are never rewritten. Whether a device deallocates or writes when it is told to zero
        # cannot be known in general, so that whoever asks has to compare first. A loop device can be known: it punches
        # its backing file, or refuses.
        self.refuse_read_only()
        held = 0
        left = []
        for offset, length in extents:
            with self._failing("cannot unmap", offset, length):
                provable = self._proof() is not None and self._zeroing.whole(offset, length)
                data = self._held_extents(offset, length) if provable else []
                if provable and self._zeroing.punch(self._fd, offset, length):
                    held += sum(size for _, size in data)
                else:
                    left.append((offset, length))
        return held, left

    @contextlib.contextmanager
    def _failing(self, what: str, offset: int, length: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise from_os_error(error, what, volume=self.uri, offset=offset, length=length) from error

    # --- who else is there --------------------------------------------------------------------------------------------

    async def holders(self) -> list[str]:
        return [one.text for one in await in_thread(self._holders)]

    async def writers(self) -> list[str]:
        return [one.text for one in await in_thread(self._holders) if one.writes]

    def _holders(self) -> list[Holder]:
        found = holders.holders_of(self._node, blockdev.backing_file(self._fd, self._node))
        # Our own claim would be taken for somebody else's.
        if not found and not self._writable and holders.is_claimed(self.path):
            found = [Holder(holders.UNSEEN, True)]
        return found

    def let_go(self) -> None:
        super().let_go()
        if self._backing is not None:
            self._backing.close()


def _bad(path: Path, code: Code, cause: str) -> BlockferryError:
    return BlockferryError(
        code, f"cannot open {path}", cause=cause, next="check that this is the right device", volume=str(path)
    )


def _open_device(path: Path, flags: int) -> int:
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise _bad(path, Code.UNSUPPORTED, "it is not a block device")
        # O_NONBLOCK: a drive without a medium must not wait for one.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOMEDIUM):
            raise _bad(path, Code.INVALID_ARGUMENT, "nothing is attached to it") from error
        raise from_os_error(error, f"cannot open {path}", volume=str(path)) from error
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise _bad(path, Code.UNSUPPORTED, "it is not a block device")
    return fd


def _refuse_read_only(path: Path, fd: int) -> None:
    if blockdev.is_read_only(fd):
        raise BlockferryError(
            Code.READ_ONLY,
            f"{path} cannot be written",
            cause="the device is read-only",
            next="make it writable (blockdev --setrw) or name another one",
            volume=str(path),
        )


def _refuse_in_use(path: Path, fd: int, node: Node, found: Sequence[Holder] = ()) -> None:
    """Invariant 4, one writer: whoever has it mounted, holds it or may write to it comes first."""
    found = found or holders.holders_of(node, blockdev.backing_file(fd, node))
    if found:
        raise BlockferryError(
            Code.IN_USE,
            f"{path} is in use",
            cause=", ".join(one.text for one in found),
            next="unmount it or stop what uses it, and check that this is the right device",
            volume=str(path),
        )


def _claim(path: Path, fd: int, node: Node) -> int:
    """The device open for writing with a claim that keeps others from mounting it, and nobody else using it."""
    try:
        claimed = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EBUSY:
            # Whoever came since we looked, or somebody inside the kernel.
            _refuse_in_use(path, fd, node)
            _refuse_in_use(path, fd, node, [Holder(holders.UNSEEN, True)])
        raise
    try:
        if os.fstat(claimed).st_rdev != node.number:
            raise _bad(path, Code.SOURCE_CHANGED, "its name means another device now")
        # A claim does not keep out whoever opens the device without one.
        _refuse_in_use(path, claimed, node)
    except BaseException:
        os.close(claimed)
        raise
    return claimed


def _thin_extents(proof: ThinProof, size: int) -> list[thin.Extent]:
    table = thin.parse_table(proof.table)
    if table.size != size:
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            "the table is not that of this volume",
            expected=str(size),
            found=str(table.size),
            cause=f"it says {table.size} bytes and the device has {size}",
            next="give what dmsetup table prints for this volume",
        )
    with proof.dump.open("rb") as file:
        return thin.parse_dump(iter(lambda: file.read(_DUMP_PART), b""), table.device_id)
