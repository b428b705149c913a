"""Every call by which blockferry changes files and devices, and the crash points between them.

Callers use these functions through the module (`disk.fsync(fd)`), so that a test can stand in between: it records what
was written and what was flushed, and replays every state a power failure may leave. `linux.fallocate` and
`linux.reflink` belong to the same layer.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from pathlib import Path

from blockferry.common.digests import Data

_BLKZEROOUT = 0x127F


def create(path: Path, flags: int = os.O_RDWR) -> int:
    """Open a file of our own, creating it if need be; mode 0600."""
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)


def set_mode(fd: int, mode: int) -> None:
    """fchmod(2)."""
    os.fchmod(fd, mode)


def make_directory(path: Path) -> None:
    """mkdir(2), mode 0700; not durable until the directory above is flushed."""
    os.mkdir(path, 0o700)


def pwrite(fd: int, data: Data, offset: int) -> int:
    """pwrite(2); returns the bytes written, which may be fewer."""
    return os.pwrite(fd, data, offset)


def append(fd: int, data: Data) -> int:
    """write(2) to a file opened for appending, or at its own offset; returns the bytes written."""
    return os.write(fd, data)


def truncate(fd: int, size: int) -> None:
    """ftruncate(2)."""
    os.ftruncate(fd, size)


def zero_out(fd: int, offset: int, length: int) -> None:
    """BLKZEROOUT: make whole logical sectors of a block device read as zeros, by writing if need be (linux/fs.h)."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))


def fsync(fd: int) -> None:
    """fsync(2): the file's data and size survive a power failure afterwards; its name may not."""
    os.fsync(fd)


def fsync_directory(path: Path) -> None:
    """Make names created, renamed or removed in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Rename, replacing `target`; not durable until its directory is flushed."""
    os.replace(source, target)


def link(source: Path, target: Path) -> None:
    """Give a file a second name; not durable until the directory of `target` is flushed."""
    os.link(source, target)


def unlink(path: Path) -> None:
    """Remove a name that may be gone already; not durable until its directory is flushed."""
    path.unlink(missing_ok=True)


_crash_at, _, _crash_count = os.environ.get("BLOCKFERRY_CRASH_POINT", "").partition(":")
_passes_left = int(_crash_count or 1)


def crash_point(name: str) -> None:
    """A place where tests let the process die by SIGKILL: `BLOCKFERRY_CRASH_POINT=NAME[:PASS]` in its environment."""
    global _passes_left
    if name != _crash_at:
        return
    _passes_left -= 1
    if _passes_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
