"""The file behind a loop device, which knows what the device cannot tell: where there are holes.

device  0 ......................... size            of a partition: its start is added to the base
        |                            |
file    base (the loop's offset) ... base + size ... end of the file
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blockferry.common import blockdev, disk, linux
from blockferry.common.blockdev import LoopStatus, Node


class Backing:
    """The backing file, open for reading beside the device. Methods raise OSError."""

    def __init__(self, path: Path, fd: int, node: Node, size: int, status: LoopStatus) -> None:
        self.path = path
        self._fd = fd
        self._node = node
        self._size = size
        self._base = status.offset + node.start
        self._status = status

    @classmethod
    def open(cls, device: int, node: Node, size: int) -> Backing | None:
        """What is behind the loop device, or the partition of one, that is open as `device` and has `size` bytes.

        None if nothing can be proven through it: no loop device, one that encrypts, a backing file that this process
        cannot open or that is none but another device.
        """
        status = blockdev.loop_status(device, node)
        path = blockdev.backing_file(device, node)
        if status is None or status.transformed or path is None:
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        found = cls(path, fd, node, size, status)
        info = os.fstat(fd)
        same = (info.st_dev, info.st_ino) == (status.device, status.inode)
        if same and stat.S_ISREG(info.st_mode) and found.extents(0, 1) is not None:
            return found
        found.close()
        return None

    def holds_for(self, device: int) -> bool:
        """Whether the file is still what the device shows: a loop device can be given another offset while it is open,
        and the file can be cut off below it, after which what is missing is no hole but an error."""
        same = blockdev.loop_status(device, self._node) == self._status
        return same and os.fstat(self._fd).st_size >= self._base + self._size

    def flush(self) -> None:
        """Delayed allocation, as with any file: what is not on its way to the disk yet may be reported as a hole."""
        disk.fsync(self._fd)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]] | None:
        """(offset, length) on the device of what is data, ascending; None where the file system cannot tell. Only what
        has left the device's page cache (`blockdev.settle`) counts."""
        start = self._base + offset
        try:
            found = linux.data_extents_apart(self._fd, start, start + length)
            return [(at - self._base, size) for at, size in found]
        except OSError as error:
            if error.errno in linux.NOT_SUPPORTED:
                return None
            raise

    @property
    def identity(self) -> str:
        """`file:DEVICE:INODE:BASE` of what the device shows."""
        return f"file:{self._status.device}:{self._status.inode}:{self._base}"

    def close(self) -> None:
        """Let go of the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
