"""The ladder of ways to make a range of a block device read as zeros.

Sources: fallocate(2), linux/falloc.h, linux/fs.h, block/fops.c (blkdev_fallocate), block/blk-lib.c.
"""

from __future__ import annotations

from blockferry.common import disk, linux
from blockferry.common.linux import NOT_SUPPORTED, ZERO_CHUNK, Zeroing

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


class DeviceZeroing:
    """Makes ranges of one device read as zeros by the best way that works, and remembers which one that is.

    1. fallocate(PUNCH_HOLE): the kernel zeroes with permission to deallocate, and refuses where only writing would do
       (blkdev_issue_zeroout with NOFALLBACK). It is no discard: what has been punched reads as zeros, or it fails.
    2. BLKZEROOUT: zeroes without deallocating, by the device's own command or by writing.
    3. zeros are written from here.

    BLKDISCARD promises nothing about what is read afterwards and is never used. All but the last work on whole logical
    sectors, so that the edges of a range that has others are written. Each of the first two invalidates the page cache
    of its range (since Linux 4.9), so that no stale page survives it.
    """

    def __init__(self, sector: int) -> None:
        self.method = Zeroing.PUNCH_HOLE
        self._sector = sector

    def whole(self, offset: int, length: int) -> bool:
        """Whether a range is made of whole sectors."""
        return offset % self._sector == length % self._sector == 0

    def zero(self, fd: int, offset: int, length: int) -> None:
        """Zero [offset, offset + length); raise OSError."""
        end = offset + length
        start, stop = -(-offset // self._sector) * self._sector, end // self._sector * self._sector
        if start >= stop:
            _write_zeros(fd, offset, end)
            return
        _write_zeros(fd, offset, start)
        if not self.punch(fd, start, stop - start) and not self._zero_out(fd, start, stop - start):
            _write_zeros(fd, start, stop)
        _write_zeros(fd, stop, end)

    def punch(self, fd: int, offset: int, length: int) -> bool:
        """Deallocate whole sectors so that they read as zeros; False, with nothing changed, if that is not possible."""
        if self.method is Zeroing.PUNCH_HOLE:
            try:
                linux.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, length)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
                self.method = Zeroing.ZERO_OUT
        return self.method is Zeroing.PUNCH_HOLE

    def _zero_out(self, fd: int, offset: int, length: int) -> bool:
        if self.method is Zeroing.ZERO_OUT:
            try:
                disk.zero_out(fd, offset, length)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
                self.method = Zeroing.WRITE
        return self.method is Zeroing.ZERO_OUT


def _write_zeros(fd: int, offset: int, end: int) -> None:
    while offset < end:
        offset += disk.pwrite(fd, memoryview(ZERO_CHUNK)[: end - offset], offset)
