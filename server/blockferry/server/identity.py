"""Which pool a directory is: a pool that was moved, or restored from a backup, is recognised when the server starts.

`.blockferry-pool` says where the pool was and which file it was itself: device, inode and time of birth. A file keeps
all three when its directory is moved, and gets others when it is copied, whatever copies it.

    path    file     the pool
    same    same     is where it was (the device may be numbered anew at each boot)
    other   same     was moved: its device must be the same, too
    any     other    was restored from a backup, or copied: nothing in it may vouch for content without reading
    -       none     is new, or comes from where there was no such file: nothing in it vouches either

Two copies of one pool that run at the same time are two pools: no server can know of the other's.
"""

from __future__ import annotations

import enum
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
from blockferry.common import linux
from blockferry.common.durable import write_atomic
from blockferry.common.errors import BlockferryError, Code

log = structlog.get_logger("blockferry.pool")

FORMAT = 1
"""A newer server reads older ones; an older server does not start on a newer one, and changes nothing."""

NAME = ".blockferry-pool"


class Verdict(enum.Enum):
    """What a pool turned out to be."""

    NEW = "new"
    KNOWN = "known"
    MOVED = "moved"
    RESTORED = "restored"


@dataclass(frozen=True)
class File:
    """What tells one file from another; `born_ns` in nanoseconds since 1970, 0 where the file system does not say."""

    device: int
    inode: int
    born_ns: int

    @classmethod
    def of(cls, fd: int) -> File:
        """An open file's."""
        info = os.fstat(fd)
        return cls(info.st_dev, info.st_ino, linux.birth_ns(fd))


class PoolRecord(msgspec.Struct, frozen=True):
    """The content of `.blockferry-pool`. Times in microseconds since 1970."""

    format: int
    uuid: str
    path: str
    device: int
    inode: int
    born_ns: int
    created_at_us: int
    restored_at_us: int = 0
    behind: dict[str, int] = {}
    """The newest generation that each replica had when the pool was found to be restored: a replica that still has it
    has not been synced since."""


class _Version(msgspec.Struct, frozen=True):
    format: int


def judge(record: PoolRecord | None, path: str, found: File | None) -> Verdict:
    """What a pool at `path` is, whose `.blockferry-pool` is the file `found` and says `record` (pure)."""
    if record is None or found is None:
        return Verdict.NEW if found is None else Verdict.RESTORED
    if (record.inode, record.born_ns) != (found.inode, found.born_ns):
        return Verdict.RESTORED
    if record.path == path:
        return Verdict.KNOWN
    return Verdict.MOVED if record.device == found.device else Verdict.RESTORED


class PoolIdentity:
    """What is known of a pool, and whether it is where it was. `settle` ends the look."""

    def __init__(self, directory: Path) -> None:
        """Raises UNSUPPORTED where a newer server has written it, and OSError."""
        self._file = directory / NAME
        self._path = _text(os.path.realpath(directory))
        self.record, found = self._read()
        self.verdict = judge(self.record, self._path, found)

    def _read(self) -> tuple[PoolRecord | None, File | None]:
        try:
            fd = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None, None
        with open(fd, "rb") as file:
            found, content = File.of(fd), file.read()
        try:
            # First of all, and alone: a newer format may have other fields.
            version = msgspec.json.decode(content, type=_Version)
            if version.format <= FORMAT:
                return msgspec.json.decode(content, type=PoolRecord), found
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            log.error("cannot read what is known of a pool", path=str(self._file), error=str(error))
            return None, found
        raise BlockferryError(
            Code.UNSUPPORTED,
            f"{self._file} was written by a newer blockferry",
            cause=f"it has format {version.format}, this server knows {FORMAT}",
            next="run the newer server; nothing was changed",
        )

    def settle(self, generations: Mapping[str, int]) -> None:
        """Note durably what was found; `generations` are the newest ones by name of the replica. Whatever vouches for
        content must be gone before, if the pool was restored. Raises OSError."""
        before, verdict = self.record, self.verdict
        if verdict is Verdict.KNOWN:
            return
        now_us = time.time_ns() // 1000
        restored_at_us, behind = (before.restored_at_us, before.behind) if before is not None else (0, {})
        if verdict is Verdict.RESTORED:
            restored_at_us, behind = now_us, dict(generations)

        def content(fd: int) -> bytes:
            itself = File.of(fd)
            self.record = PoolRecord(
                format=FORMAT,
                uuid=before.uuid if before is not None else str(uuid.uuid4()),
                path=self._path,
                device=itself.device,
                inode=itself.inode,
                born_ns=itself.born_ns,
                created_at_us=before.created_at_us if before is not None else now_us,
                restored_at_us=restored_at_us,
                behind=behind,
            )
            return msgspec.json.encode(self.record)

        write_atomic(self._file, content)
        match verdict:
            case Verdict.MOVED:
                log.info("the pool was moved", path=self._path, before=before.path if before is not None else "")
            case Verdict.RESTORED:
                log.warning(
                    "the pool was restored from a backup or copied: the next sync of each replica compares everything",
                    path=self._path,
                    before=before.path if before is not None else "",
                )
            case _:
                pass

    def is_behind(self, volume: str, generation: int) -> bool:
        """Whether a replica whose newest generation is `generation` has not been synced since its pool was restored."""
        return self.record is not None and self.record.behind.get(volume) == generation

    @property
    def restored_at_us(self) -> int:
        """When the pool was found to be restored; 0 for never."""
        return self.record.restored_at_us if self.record is not None else 0


def _text(path: str) -> str:
    """A path may hold bytes that are no UTF-8; JSON may not."""
    return path.encode("utf-8", "backslashreplace").decode()
