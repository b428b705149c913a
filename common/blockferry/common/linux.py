"""Linux system calls that Python does not offer, and the ladder of ways to make a range read as zeros.

Sources: fallocate(2), lseek(2), ioctl_ficlone(2), ioctl_fiemap(2), fcntl(2) "Leases", linux/falloc.h, linux/fs.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import enum
import errno
import fcntl
import os
import signal
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from blockferry.common import disk
from blockferry.common.extents import DELALLOC, INLINE, SHARED, UNKNOWN, UNWRITTEN, Extent

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10
_FICLONE = 0x40049409

PUNCH_HOLE = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
"""The mode of fallocate that gives space back."""
RESERVE = _FALLOC_FL_KEEP_SIZE
"""The mode of fallocate that takes space for later writes; what was a hole still reads as zeros."""

_libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX = struct.Struct("=I76xqI164x")
"""struct statx: stx_mask first, stx_btime at byte 80; 256 bytes in all (linux/stat.h)."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 32 * 1024 * 1024
"""Bytes: above every buffer and message (a region of 16 MiB and its envelope); the most that 64-bit glibc accepts."""
_TRIM_THRESHOLD = 64 * 1024 * 1024
"""Bytes kept on top of the heap: what a transfer has in flight."""

NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENODEV, errno.ENOTTY, errno.ENOSYS, errno.EINVAL})
"""What file systems and devices answer to an operation they do not know; never a failure of the data."""

ZERO_CHUNK = bytes(1024 * 1024)
"""Written where zeros have to be written out."""


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode; raise OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def keep_freed_memory() -> None:
    """Let malloc keep large freed buffers instead of giving them back to the kernel.

    Otherwise each message of a transfer is built in pages that the kernel must zero first, which becomes the largest
    cost of a copy. Other C libraries than glibc have no such call and are left alone.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


def occupy_standard_descriptors() -> None:
    """To be called before anything else is opened: whoever started this process may have closed stdin, stdout or
    stderr, and the event loop aborts the process when one of its own descriptors has such a number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        # What is meant for it would go to stdout: that is what print() makes of None.
        sys.stderr = os.fdopen(2, "w", closefd=False)


def birth_ns(fd: int) -> int:
    """When a file was made, in nanoseconds since 1970, which nobody can set (statx(2)); 0 where it is not known."""
    statx = getattr(_libc, "statx", None)
    buffer = ctypes.create_string_buffer(_STATX.size)
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        return 0
    mask, seconds, nanoseconds = _STATX.unpack(buffer.raw)
    return int(seconds) * 10**9 + int(nanoseconds) if mask & _STATX_BTIME else 0


_STATFS_SIZE = 256
"""Bytes: more than any struct statfs has; f_type is the first word of it (statfs(2))."""
_IN_MEMORY = frozenset({0x01021994, 0x858458F6})
"""TMPFS_MAGIC, RAMFS_MAGIC (linux/magic.h)."""


def lies_in_memory(fd: int) -> bool:
    """Whether a file is on a file system that has no device behind it, so that reading it waits for nothing."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if not hasattr(_libc, "fstatfs") or _libc.fstatfs(fd, buffer) != 0 or stat.S_ISBLK(os.fstat(fd).st_mode):
        return False
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) in _IN_MEMORY


def reflink(source_fd: int, target_fd: int) -> None:
    """Make the target share all extents of the source (FICLONE); raise OSError where the file system cannot."""
    fcntl.ioctl(target_fd, _FICLONE, source_fd)


_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP_HEADER = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQQQIIII")
_FIEMAP_FLAG_SYNC = 0x0001
_FIEMAP_LAST = 0x0001
UNPLACED = UNKNOWN | DELALLOC | INLINE
"""Flags of extents without a place of their own on the disk yet, or at all: unknown, delayed allocation, inline."""
_FIEMAP_BATCH = 512
_FIEMAP_END = (1 << 64) - 1


def extents(fd: int, start: int = 0, end: int = _FIEMAP_END, *, sync: bool = False) -> Iterator[Extent]:
    """Every extent of a file that reaches into [start, end), by FIEMAP; raise OSError where it is unknown. With `sync`
    everything written there so far is placed first."""
    buffer = bytearray(_FIEMAP_HEADER.size + _FIEMAP_BATCH * _FIEMAP_EXTENT.size)
    while start < end:
        flags = _FIEMAP_FLAG_SYNC if sync else 0
        _FIEMAP_HEADER.pack_into(buffer, 0, start, end - start, flags, 0, _FIEMAP_BATCH, 0)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
        mapped = _FIEMAP_HEADER.unpack_from(buffer)[3]
        for index in range(mapped):
            found = _FIEMAP_EXTENT.unpack_from(buffer, _FIEMAP_HEADER.size + index * _FIEMAP_EXTENT.size)
            yield found[0], found[1], found[2], found[5]
            start = found[0] + found[2]
            if found[5] & _FIEMAP_LAST:
                return
        if mapped == 0:
            return


def unwritten_extents(fd: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what was reserved and never written; raise OSError where it is unknown."""
    # An extent counts as never written until what was written to it has reached the disk.
    return ((start, length) for start, _, length, flags in extents(fd, sync=True) if flags & UNWRITTEN)


def unshared_bytes(fd: int) -> int:
    """Bytes of disk that would be freed if this file alone were deleted: those no clone shares."""
    try:
        return sum(length for _, _, length, flags in extents(fd) if not flags & SHARED)
    except OSError as error:
        if error.errno in NOT_SUPPORTED:
            return os.fstat(fd).st_blocks * 512
        raise


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what SEEK_DATA/SEEK_HOLE report as data in [start, end).

    `fd` must be used for nothing else meanwhile: lseek moves its offset. ENXIO means a hole up to the end.
    """
    position = start
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if data >= end:
            return
        position = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        yield data, position - data


def data_extents_apart(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """As `data_extents`, on a descriptor of its own: others may use `fd` meanwhile."""
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from data_extents(own, start, end)
    finally:
        os.close(own)


class Zeroing(enum.Enum):
    """Ways to make a range of a file or device read as zeros, best first."""

    PUNCH_HOLE = "punch-hole"
    ZERO_RANGE = "zero-range"
    ZERO_OUT = "zero-out"
    WRITE = "write"


class ZeroingLadder:
    """Makes ranges of one descriptor read as zeros by the best way that works, and remembers which one that is."""

    def __init__(self, first: Zeroing = Zeroing.PUNCH_HOLE) -> None:
        self.method = first

    def zero(self, fd: int, offset: int, length: int, size: int, *, write: bool = True) -> bool:
        """Zero [offset, offset + length) of a file of `size` bytes; never changes the size.

        A hole that reaches the end of the file is punched past the end (KEEP_SIZE): otherwise the last partial page
        stays allocated for ever. Without `write` it stops before zeros would be written out, with nothing changed, and
        returns False: which step works is known only by trying, and whoever may not rewrite equal bytes has to compare
        before that one.
        """
        if self.method is Zeroing.PUNCH_HOLE:
            reach = length + 2 * os.sysconf("SC_PAGESIZE") if offset + length >= size else length
            if self._try(fd, PUNCH_HOLE, offset, reach):
                return True
            self.method = Zeroing.ZERO_RANGE
        if self.method is Zeroing.ZERO_RANGE:
            if self._try(fd, _FALLOC_FL_ZERO_RANGE | _FALLOC_FL_KEEP_SIZE, offset, length):
                return True
            self.method = Zeroing.WRITE
        if not write:
            return False
        end = offset + length
        while offset < end:
            offset += disk.pwrite(fd, memoryview(ZERO_CHUNK)[: end - offset], offset)
        return True

    @staticmethod
    def _try(fd: int, mode: int, offset: int, length: int) -> bool:
        try:
            fallocate(fd, mode, offset, length)
        except OSError as error:
            if error.errno in NOT_SUPPORTED:
                return False
            raise
        return True


def loop_devices_over(path: Path) -> list[str]:
    """Names of the loop devices whose backing file is `path`."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = Path(entry.read_text().strip())
            if backing.samefile(path):
                found.append(f"/dev/{entry.parent.parent.name}")
        except OSError:
            continue
    return sorted(found)


def opened_for_writing(fd: int) -> bool:
    """Whether anyone, this process included, has the file open for writing.

    A read lease can be had only on a file that nobody has open for writing. `fd` must be open read-only. Where leases
    are not possible (another owner's file, a file system without them) the answer is no.
    """
    # Somebody who opens the file while we hold the lease makes the kernel signal us: by default with SIGIO, which ends
    # a process; SIGURG is ignored.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def open_descriptors() -> Iterator[Path]:
    """`/proc/PID/fd/N` of all other processes that may be looked at. A process may end while one looks."""
    for process in os.listdir("/proc"):
        if process.isdigit() and process != str(os.getpid()):
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{process}/fd"):
                    yield Path(f"/proc/{process}/fd/{number}")


def is_writing(link: Path) -> bool:
    """Whether the descriptor of `/proc/PID/fd/N` is open for writing; raise OSError, IndexError or ValueError if it is
    gone."""
    flags = int((link.parent.parent / "fdinfo" / link.name).read_text().split("flags:")[1].split()[0], 8)
    return flags & os.O_ACCMODE != os.O_RDONLY


def writers_of(path: Path) -> list[str]:
    """`name (pid)` of other processes that have `path` open for writing, as far as this user may look."""
    found = []
    target = path.stat()
    for link in open_descriptors():
        process = link.parent.parent
        try:
            info = link.stat()
            if (info.st_dev, info.st_ino) != (target.st_dev, target.st_ino):
                continue
            if is_writing(link):
                found.append(f"{(process / 'comm').read_text().strip()} ({process.name})")
        except (OSError, IndexError, ValueError):
            continue
    return sorted(set(found))


def users_of(path: Path, fd: int) -> list[str]:
    """Who may be changing a file, in words: loop devices over it, and processes that have it open for writing. `fd` is
    the file, open read-only."""
    found = [f"{device} (loop device)" for device in loop_devices_over(path)]
    if opened_for_writing(fd):
        found += writers_of(path)
        if not found:
            found.append("a process that cannot be seen from here")
    return found
