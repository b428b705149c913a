"""What has changed between two snapshots, by the extents they share: nothing is read for it.

A tracked set is bound to the commit id of its base, and is believed only where the replica's newest generation has that
id (invariant 1). Where anything keeps it from being proven there is a reason instead, and everything is compared.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blockferry.common import linux
from blockferry.common.errors import BlockferryError
from blockferry.common.extents import coarsened
from blockferry.common.regions import MIN_REGION_SIZE, Geometry
from blockferry.common.sharing import regions_not_shared
from blockferry.common.volumes import in_thread
from pyroaring import BitMap


class Stamp(msgspec.Struct, frozen=True):
    """What tells whether somebody has touched a file. `ctime_ns` in nanoseconds since 1970."""

    device: int
    inode: int
    size: int
    ctime_ns: int

    @classmethod
    def of(cls, fd: int) -> Stamp:
        """An open file's."""
        info = os.fstat(fd)
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_ctime_ns)


@dataclass(frozen=True)
class Tracked:
    """What may have changed since the generation with the commit id `base`. `changed` are regions of 64 KiB of a volume
    of `size` bytes; None where nothing can be proven, and then `reason` says why."""

    base: bytes
    size: int
    changed: BitMap | None
    reason: str = ""

    def regions(self, region_size: int) -> BitMap | None:
        """The same in regions of another size."""
        if self.changed is None:
            return None
        return coarsened(self.changed, Geometry(self.size, MIN_REGION_SIZE), region_size)


@dataclass(frozen=True)
class Frozen:
    """A snapshot as a file, and what it was when it was complete."""

    path: Path
    stamp: Stamp


async def track(commit_id: bytes, base: Frozen, new: Frozen) -> Tracked:
    """What may have changed from the snapshot `base`, which became the generation `commit_id`, to `new`."""
    try:
        changed, reason = await in_thread(_track, base, new)
    except OSError as error:
        if error.errno in linux.NOT_SUPPORTED:
            why = "the file system does not tell where files lie"
        else:
            why = f"cannot look at the snapshots: {os.strerror(error.errno or errno.EIO).lower()}"
        changed, reason = None, why
    except BlockferryError as error:
        changed, reason = None, error.line()
    return Tracked(commit_id, new.stamp.size, changed, reason)


def _track(base: Frozen, new: Frozen) -> tuple[BitMap | None, str]:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    with (
        open(os.open(base.path, flags), "rb", 0) as base_file,
        open(os.open(new.path, flags), "rb", 0) as new_file,
    ):
        files = [(base_file.fileno(), base, "the last snapshot"), (new_file.fileno(), new, "the new snapshot")]
        if reason := _touched(files):
            return None, reason
        if base.stamp.device != new.stamp.device:
            return None, "the two snapshots are on different file systems"
        changed = regions_not_shared(base_file.fileno(), new_file.fileno(), Geometry(new.stamp.size, MIN_REGION_SIZE))
        # What was read of their extents belongs to the content that was stamped only if nobody came in between.
        return (None, reason) if (reason := _touched(files)) else (changed, "")


def _touched(files: list[tuple[int, Frozen, str]]) -> str:
    """Why one of the files is not known to be what it was; empty if all are."""
    for fd, frozen, name in files:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) or mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
            return f"{name} can be written to"
        if Stamp.of(fd) != frozen.stamp:
            return f"{name} was touched since it was taken"
    return ""
