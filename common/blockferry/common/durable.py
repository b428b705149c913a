"""The only place where small state meets the disk: atomic files and checksummed logs.

Invariant 3: one fsynced record is the commit. Whatever a function here returns from has survived a power failure.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from blockferry.common import disk
from blockferry.common.errors import BlockferryError, Code

_TEMPORARY = ".tmp"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[disk.append(fd, view) :]


def write_unsynced(path: Path, data: bytes) -> None:
    """Replace `path` with `data` without waiting for the disk: for what carries its own checksum and can be rebuilt."""
    temporary = path.with_name(path.name + _TEMPORARY)
    fd = disk.create(temporary, os.O_WRONLY | os.O_TRUNC)
    try:
        _write_all(fd, data)
    finally:
        os.close(fd)
    disk.rename(temporary, path)


def write_atomic(path: Path, data: bytes | Callable[[int], bytes], *, mode: int = 0o600) -> None:
    """Replace `path` with `data`: afterwards, whatever happened, it holds the old bytes or the new ones, whole. Data
    that depends on which file it is in is made from the file's descriptor."""
    temporary = _complete(path, data, mode)
    disk.crash_point("atomic-before-rename")
    rename_durably(temporary, path)


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Make a file that appears with all its bytes and its mode, or not at all. Raises FileExistsError where there is
    one, whoever made it."""
    # What a process that died has left; anybody else's would be used below if it were not made anew.
    disk.unlink(path.with_name(path.name + _TEMPORARY))
    temporary = _complete(path, data, mode, os.O_EXCL)
    try:
        # Unlike rename(2) this never replaces anything.
        disk.link(temporary, path)
    finally:
        disk.unlink(temporary)
    disk.fsync_directory(path.parent)


def _complete(path: Path, data: bytes | Callable[[int], bytes], mode: int, flags: int = os.O_TRUNC) -> Path:
    """A temporary file beside `path` with durable content."""
    temporary = path.with_name(path.name + _TEMPORARY)
    fd = disk.create(temporary, os.O_WRONLY | flags)
    try:
        _write_all(fd, data if isinstance(data, bytes) else data(fd))
        if mode != 0o600:
            disk.set_mode(fd, mode)
        disk.fsync(fd)
    finally:
        os.close(fd)
    return temporary


def rename_durably(source: Path, target: Path) -> None:
    """Rename within one directory, durably."""
    disk.rename(source, target)
    disk.crash_point("rename-before-fsync")
    disk.fsync_directory(target.parent)


def move_durably(source: Path, target: Path) -> None:
    """Move a file into another directory of the same file system. It has both names in between, so that no power
    failure leaves it with none; the old one may come back."""
    disk.link(source, target)
    try:
        disk.fsync_directory(target.parent)
        disk.crash_point("move-before-unlink")
        disk.unlink(source)
    except OSError:
        # It did not happen, as far as anybody may tell.
        disk.unlink(target)
        raise


def make_directories(path: Path) -> None:
    """Make a directory (mode 0700) and those missing above it, durably. Where a process died while it made them, the
    lowest directory that exists is what it has not flushed: that one is flushed too."""
    if not path.is_dir():
        make_directories(path.parent)
        try:
            disk.make_directory(path)
        except FileExistsError as error:
            # Another process was quicker, or it is something else.
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
    # Where we may not look we have made nothing.
    with contextlib.suppress(PermissionError):
        disk.fsync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """Remove a file that may be gone already, durably."""
    disk.unlink(path)
    disk.fsync_directory(path.parent)


class Log:
    """An append-only log of small JSON records, one per line: `CRC32 JSON`.

    A torn last line is what a crash during an append leaves: it was never acknowledged, and is cut off when the log is
    opened. A bad line anywhere else means the disk lost something that was acknowledged: CORRUPT_STATE.
    """

    def __init__(self, path: Path, *, at_least: int = 0) -> None:
        """Open a log, creating it if need be. So many bytes of it are known to have been durable: what is wrong with
        those, or that they are missing, is never taken for a torn end."""
        self.path = path
        self._broken = False
        self._at_least = at_least
        self.records: list[dict[str, object]] = []
        created = not path.exists()
        self._fd = disk.create(path, os.O_RDWR | os.O_APPEND)
        try:
            if created:
                disk.fsync_directory(path.parent)
            self._load()
        except BaseException:
            os.close(self._fd)
            raise

    @classmethod
    def create(cls, path: Path, records: Sequence[dict[str, object]]) -> Log:
        """A new log in the place of whatever `path` is, which appears with all these records."""
        data = b"".join(map(_encode, records))
        write_atomic(path, data)
        return cls(path, at_least=len(data))

    def _load(self) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        good = 0
        while good < len(data):
            end = data.find(b"\n", good)
            line = data[good : end if end >= 0 else len(data)]
            record = _decode(line) if end >= 0 else None
            if record is None:
                if end >= 0 and (end + 1 < len(data) or _ends_with_record(line)):
                    raise self._damaged(f"the record at byte {good} fails its checksum and is not the last one")
                if good >= self._at_least:
                    disk.truncate(self._fd, good)
                break
            self.records.append(record)
            good = end + 1
        if good < self._at_least:
            raise self._damaged(f"{good} bytes of it are whole, and {self._at_least} were durable")
        if good > self._at_least:
            # A process that died before its flush may have left some in memory only. None is believed, and told to
            # anybody, before it is durable.
            disk.fsync(self._fd)

    def _damaged(self, cause: str) -> BlockferryError:
        return BlockferryError(
            Code.CORRUPT_STATE,
            f"{self.path} is damaged",
            cause=cause,
            next="restore the file from a backup of the pool, or delete the replica and sync it anew",
        )

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._fd).st_size

    def replace(self, records: Sequence[dict[str, object]]) -> None:
        """Put these records in the place of all there are: durably, and all of them or none. After an OSError the log
        is as it was, or must be opened again before anything is believed."""
        data = b"".join(map(_encode, records))
        try:
            write_atomic(self.path, data)
            fd = disk.create(self.path, os.O_RDWR | os.O_APPEND)
        except OSError:
            # Whether the name now means the new file, and will tomorrow, decides where later records would go.
            self._broken = self._broken or not os.path.samestat(os.stat(self.path), os.fstat(self._fd))
            raise
        os.close(self._fd)
        self._fd, self._broken = fd, False
        self.records = list(records)

    def append(self, record: dict[str, object]) -> None:
        """Add a record durably, or not at all. After a failure the log must be opened again before anything is
        believed."""
        if self._broken:
            raise OSError(errno.EIO, f"{self.path} could not be written before")
        end = os.fstat(self._fd).st_size
        try:
            _write_all(self._fd, _encode(record))
            disk.crash_point("log-before-fsync")
            disk.fsync(self._fd)
        except OSError:
            # It may be in the page cache and not on the disk: whoever reads it there must not believe it.
            self._broken = True
            disk.truncate(self._fd, end)
            disk.fsync(self._fd)
            self._broken = False
            raise
        self.records.append(record)

    def close(self) -> None:
        """Close the descriptor, once; everything appended is durable already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _encode(record: dict[str, object]) -> bytes:
    body = msgspec.json.encode(record)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _decode(line: bytes) -> dict[str, object] | None:
    body = line[9:]
    # Compared as written: a checksum in capitals is a changed byte, too.
    if line[:9] != b"%08x " % zlib.crc32(body):
        return None
    try:
        record = msgspec.json.decode(body)
    except (ValueError, msgspec.MsgspecError):
        return None
    return record if isinstance(record, dict) else None


def _ends_with_record(line: bytes) -> bool:
    """Whether a whole record ends a damaged last line: then the newline before it is what was lost, and the damage is
    not in the last record."""
    return any(_decode(line[start:]) is not None for start in range(1, len(line)))
