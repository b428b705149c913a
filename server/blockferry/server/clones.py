"""Generations as files that share their extents (XFS, Btrfs).

    NAME/COMMIT-ID.img   the image of a committed generation; never written again
    NAME/work.img        the image a session works on: a clone of the newest one

A commit flushes the work image and renames it to its commit id. Dying before the record leaves an image that no record
names: it becomes the work image again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from blockferry.common import disk, linux
from blockferry.common.durable import move_durably, rename_durably
from blockferry.common.regions import Geometry
from blockferry.common.sharing import regions_not_shared
from blockferry.common.volumes import ImageVolume, Volume, in_thread
from blockferry.server.cache import Stamp
from blockferry.server.content import Content, forget_pages_of, unshared_bytes_of
from blockferry.server.generations import Generations, Point
from pyroaring import BitMap

IMAGE = ".img"


class CloneContent(Content):
    """One image for each generation."""

    kind = "clones"

    @property
    def work(self) -> Path:
        """Where the image of a session is, whether or not it exists."""
        return self.directory / ("work" + IMAGE)

    def image(self, point: Point) -> Path:
        """Where a generation's image is."""
        return self.directory / (point.commit_id.hex() + IMAGE)

    def recover(self) -> None:
        known = {self.image(point) for point in self.generations.points} | {self.work, self.promoted}
        for path in sorted(self.directory.glob("*" + IMAGE)):
            if path in known:
                continue
            # Renamed for a commit whose record was never written; or dropped, and not yet removed.
            if self.work.exists() or self.generations.was_committed(path.stem):
                disk.unlink(path)
            else:
                disk.rename(path, self.work)
            disk.crash_point("start-image-settled")

    async def reload(self, generations: Generations) -> None:
        self.generations = generations
        await in_thread(self.recover)

    def close(self) -> None:
        return

    # --- a session's work -----------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return self.work.exists()

    @property
    def unfinished(self) -> Path:
        return self.work

    async def begin(self, size: int) -> tuple[Volume, bool]:
        continued = await in_thread(self._make_work, size)
        return await ImageVolume.open(self.work, writable=True), continued

    def _make_work(self, size: int) -> bool:
        newest = self.generations.newest
        continued = self.work.exists()
        if not continued:
            if newest is None:
                os.close(disk.create(self.work))
            else:
                self._clone(self.image(newest), self.work)
        disk.crash_point("open-work-made")
        fd = os.open(self.work, os.O_RDWR | os.O_CLOEXEC)
        try:
            if newest is None and self.generations.adopted_size is None and os.fstat(fd).st_size > size:
                # An unfinished first sync of a larger source: nothing is committed, so start over.
                disk.truncate(fd, 0)
                continued = False
            disk.truncate(fd, size)
        finally:
            os.close(fd)
        return continued

    def _clone(self, source: Path, target: Path) -> None:
        temporary = target.with_suffix(".tmp")
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            target_fd = disk.create(temporary, os.O_WRONLY | os.O_TRUNC)
            try:
                linux.reflink(source_fd, target_fd)
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)
        disk.crash_point("open-cloned")
        disk.rename(temporary, target)

    def altered(self, point: Point, geometry: Geometry, *, continued: bool) -> BitMap:
        if not continued:
            # What it grew by reads as zeros.
            return BitMap()
        with open(self.image(point), "rb", 0) as committed, open(self.work, "rb", 0) as work:
            return regions_not_shared(committed.fileno(), work.fileno(), geometry)

    async def end(self, work: Volume) -> None:
        await work.close()

    async def discard(self) -> None:
        await in_thread(disk.unlink, self.work)
        disk.crash_point("discard-removed")

    async def adopt(self, image: Path) -> None:
        await in_thread(move_durably, image, self.work)

    async def take_back(self, image: Path) -> None:
        await in_thread(self._clone, image, self.work)

    # --- a commit -------------------------------------------------------------------------------------------------

    async def seal(self, work: Volume, point: Point) -> None:
        await in_thread(rename_durably, self.work, self.image(point))
        disk.crash_point("commit-renamed")

    async def publish(self, point: Point, record: Callable[[], None]) -> None:
        await in_thread(record)

    @property
    def incomplete(self) -> bool:
        return False

    async def complete(self) -> None:
        return

    async def drop(self, point: Point, record: Callable[[], None]) -> None:
        # The record first, so that no record ever names a missing image.
        await in_thread(record)
        disk.crash_point("drop-recorded")
        await in_thread(disk.unlink, self.image(point))
        disk.crash_point("drop-image-removed")

    # --- committed generations ------------------------------------------------------------------------------------

    async def open_point(self, point: Point) -> Volume:
        return await ImageVolume.open(self.image(point))

    def path(self, point: Point) -> Path | None:
        return self.image(point)

    def stamp(self, point: Point) -> Stamp:
        return Stamp.of(self.image(point))

    def problem(self, point: Point) -> str:
        return "" if self.image(point).exists() else "its image is missing"

    def bytes_held(self, point: Point) -> int:
        return unshared_bytes_of(self.image(point))

    def forget_pages(self, point: Point) -> None:
        forget_pages_of(self.image(point))

    async def room_to_hand_out(self, point: Point) -> int:
        return 0

    async def hand_out(self, point: Point, target: Path, progress: Callable[[int, int], None]) -> None:
        await in_thread(self._clone, self.image(point), target)
