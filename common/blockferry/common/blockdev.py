"""Block devices: what the kernel says about one, and which device it is.

Sources: linux/fs.h, linux/loop.h, block/ioctl.c, block/fops.c, sync_file_range(2), loop(4), sysfs(5),
Documentation/ABI/stable/sysfs-block. Whatever changes a device is in `disk.py` and `linux.py`.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import ctypes.util
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from blockferry.common import disk
from blockferry.common.linux import NOT_SUPPORTED

SECTOR = 512
"""Bytes of the kernel's own sectors, in which sysfs counts whatever the device's logical sectors are."""

_BLKROGET = 0x125E
_BLKFLSBUF = 0x1261
_BLKSSZGET = 0x1268
_BLKIOMIN = 0x1278
_BLKIOOPT = 0x1279
_BLKPBSZGET = 0x127B
_BLKGETSIZE64 = 0x80081272
_LOOP_GET_STATUS64 = 0x4C05

_SYNC_FILE_RANGE_ALL = 1 | 2 | 4
"""WAIT_BEFORE, WRITE and WAIT_AFTER: on return nothing of the range is dirty in the page cache."""

_libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def _number(fd: int, request: int, kind: str) -> int:
    value = array.array(kind, [0])
    fcntl.ioctl(fd, request, value)
    return value[0]


def size(fd: int) -> int:
    """Bytes of the device; 0 where nothing is attached to it."""
    return _number(fd, _BLKGETSIZE64, "Q")


def is_read_only(fd: int) -> bool:
    """Whether the kernel refuses writes to it."""
    return _number(fd, _BLKROGET, "i") != 0


@dataclass(frozen=True)
class Limits:
    """Sizes of requests in bytes."""

    logical: int
    """The least that can be addressed."""
    physical: int
    """The least that is written without reading first."""
    minimum: int
    """The least that is not slow: a RAID chunk, say."""
    optimal: int
    """What sustained I/O should be a multiple of: a RAID stripe; 0 where the device does not say."""

    @property
    def preferred(self) -> int:
        """Bytes at a time that the device likes best."""
        return max(self.optimal, self.minimum, self.physical)


def limits(fd: int) -> Limits:
    """What the device prefers."""
    return Limits(
        _number(fd, _BLKSSZGET, "i"),
        _number(fd, _BLKPBSZGET, "I"),
        _number(fd, _BLKIOMIN, "I"),
        _number(fd, _BLKIOOPT, "I"),
    )


def drop_cache(fd: int) -> None:
    """Write out what is dirty in the device's page cache and forget the rest, so that the next read asks the device.

    BLKFLSBUF needs CAP_SYS_ADMIN; without it POSIX_FADV_DONTNEED drops what is clean and not in use, which is the same
    for a device nobody else is working with.
    """
    try:
        fcntl.ioctl(fd, _BLKFLSBUF)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED | {errno.EACCES, errno.EPERM}:
            raise
        disk.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def settle(fd: int, offset: int, length: int) -> None:
    """Hand what is dirty in the page cache over to the device, without asking the device to make it durable."""
    while _libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_ALL):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


# --- nodes and identity -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A device as sysfs describes it. Tests give roots of their own."""

    number: int
    """Major and minor, as in `st_rdev`."""
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")

    @property
    def label(self) -> str:
        """`8:1`, as in sysfs and /proc/self/mountinfo."""
        return f"{os.major(self.number)}:{os.minor(self.number)}"

    @property
    def directory(self) -> Path:
        """Its directory in sysfs."""
        return (self.sys / "dev/block" / self.label).resolve()

    @property
    def name(self) -> str:
        """The kernel's name, such as `sda1`."""
        return self.directory.name

    def read(self, name: str) -> str:
        """An attribute without its line end; empty where the device has none."""
        try:
            return (self.directory / name).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    @property
    def start(self) -> int:
        """Where a partition begins on its disk, in bytes; 0 for a disk."""
        return int(self.read("start") or 0) * SECTOR

    def related(self) -> list[Node]:
        """The device itself, then its partitions, or the disk it is a partition of: whoever writes to those writes to
        this one."""
        found = [self.directory]
        if self.read("partition"):
            found.append(self.directory.parent)
        else:
            found += sorted(one.parent for one in self.directory.glob("*/partition"))
        return [self, *(Node(number, self.sys, self.dev) for number in map(_device_number, found[1:]) if number)]


def _device_number(directory: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        major, minor = (directory / "dev").read_text().split(":")
        return os.makedev(int(major), int(minor))
    return 0


_LINKS = ("wwn-", "nvme-eui.", "nvme-uuid.", "dm-uuid-", "md-uuid-", "virtio-", "scsi-", "ata-", "nvme-")
"""Beginnings of names in /dev/disk/by-id, the least likely to change first; others come last."""


def identity(node: Node) -> str:
    """What stays the same when the device gets another name, for programs to compare; empty if nothing does.

    A partition's UUID; the UUID of device-mapper; a world-wide name; a link in /dev/disk/by-id; a serial number.
    """
    if node.read("partition"):
        for line in node.read("uevent").splitlines():
            if line.startswith("PARTUUID="):
                return f"partuuid:{line.removeprefix('PARTUUID=')}"
        return next((f"partuuid:{name}" for name in _links_to(node, "by-partuuid")), "")
    for kind, name in (("dm", "dm/uuid"), ("md", "md/uuid"), ("wwid", "wwid"), ("wwid", "device/wwid")):
        if found := node.read(name):
            return f"{kind}:{found}"
    for name in _links_to(node, "by-id"):
        return f"id:{name}"
    serial = node.read("serial") or node.read("device/serial")
    return f"serial:{serial}" if serial else ""


def _links_to(node: Node, directory: str) -> list[str]:
    found = []
    for link in (node.dev / "disk" / directory).glob("*"):
        with contextlib.suppress(OSError):
            if link.resolve().name == node.name:
                found.append(link.name)

    def rank(name: str) -> tuple[int, str]:
        return next((place for place, prefix in enumerate(_LINKS) if name.startswith(prefix)), len(_LINKS)), name

    return sorted(found, key=rank)


# --- loop devices -----------------------------------------------------------------------------------------------------

_LOOP_INFO = struct.Struct("=QQQQQIIII64s64s32sQQ")
"""struct loop_info64"""


@dataclass(frozen=True)
class LoopStatus:
    """What a loop device shows of which file. Offset and limit in bytes; limit 0: to the end of the file."""

    device: int
    """The backing file's `st_dev`."""
    inode: int
    offset: int
    limit: int
    transformed: bool
    """What is in the file is not what is read: the loop device encrypts."""


def parse_loop_status(data: bytes) -> LoopStatus:
    """From `struct loop_info64`."""
    device, inode, _, offset, limit, _, transfer, *_ = _LOOP_INFO.unpack(data)
    # The kernel's 32-bit encoding of device numbers (new_encode_dev), which is not the C library's.
    major, minor = (device & 0xFFF00) >> 8, (device & 0xFF) | ((device >> 12) & 0xFFF00)
    return LoopStatus(os.makedev(major, minor), inode, offset, limit, transfer != 0)


def _backing_attribute(node: Node) -> str:
    return "../loop/backing_file" if node.read("partition") else "loop/backing_file"


def loop_status(fd: int, node: Node) -> LoopStatus | None:
    """What is behind a loop device or its partition; None for other devices and where nothing is attached.

    Device-mapper passes ioctls on to the device below, so an answer alone does not make it a loop device.
    """
    if not node.read(_backing_attribute(node)):
        return None
    buffer = bytearray(_LOOP_INFO.size)
    try:
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, buffer)
    except OSError as error:
        if error.errno in NOT_SUPPORTED | {errno.ENXIO, errno.EPERM, errno.EACCES}:
            return None
        raise
    return parse_loop_status(bytes(buffer))


def backing_file(fd: int, node: Node) -> Path | None:
    """The file behind a loop device; None for other devices, and where its name means another file here and now."""
    status = loop_status(fd, node)
    path = Path(node.read(_backing_attribute(node)))
    with contextlib.suppress(OSError):
        info = os.stat(path)
        if status is not None and (info.st_dev, info.st_ino) == (status.device, status.inode):
            return path
    return None
