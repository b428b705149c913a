"""The recovery points of a live replica: why each is kept, and who reads it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import structlog
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention, reasons_to_keep
from blockferry.common.volumes import Volume
from blockferry.server.generations import Point
from blockferry.server.store import Store

log = structlog.get_logger("blockferry.points")


class Points:
    """Resolves, reads and retires the points of one replica. `floor` is kept whatever the source asks for; a point is
    kept for `pin_seconds` after its last use."""

    def __init__(self, name: str, store: Store, floor: Retention, pin_seconds: float) -> None:
        self._name = name
        self._store = store
        self._floor = floor
        self._pin_seconds = pin_seconds
        self._pins: dict[int, float] = {}
        self._readers: dict[int, int] = {}

    @property
    def in_use(self) -> bool:
        """Whether anybody reads a point now."""
        return bool(self._readers)

    def kept(self) -> dict[int, list[str]]:
        """Why each point is kept, by number; a point without a reason goes with the next commit."""
        now = time.monotonic()
        self._pins = {number: until for number, until in self._pins.items() if until > now}
        generations = self._store.generations
        points = [(point.number, point.committed_at_us) for point in generations.points]
        in_use = {*self._pins, *self._readers}
        if generations.promoted is not None:
            in_use.add(generations.promoted.number)
        return dict(reasons_to_keep(points, (generations.keep, self._floor), in_use))

    async def retire(self) -> None:
        """Drop the points that nothing keeps."""
        for point in list(self._store.generations.points):
            # Asked anew each time: somebody may have begun to read it while the last one was dropped.
            if self.kept()[point.number]:
                continue
            try:
                await self._store.drop(point)
            except (OSError, BlockferryError) as error:
                # The commit stands. The next one tries again, with what the disk says is there.
                log.error("cannot drop a recovery point", volume=self._name, number=point.number, error=str(error))
                with contextlib.suppress(OSError, BlockferryError):
                    await self._store.reload()
                return

    def resolve(self, number: int) -> Point:
        """The generation with this number (0: the newest), or NOT_FOUND."""
        generations = self._store.generations
        point = generations.point(number)
        if point is None:
            raise self._missing(number)
        return point

    def _missing(self, number: int) -> BlockferryError:
        dropped = bool(self._store.generations.points)
        return BlockferryError(
            Code.NOT_FOUND,
            f"{self._name} has no {f'generation {number}' if number else 'committed generation'}",
            cause="retention may have dropped it" if dropped else "its first sync has not finished",
            next="list what there is with blockferry replica points" if number else "sync to it first",
            volume=self._name,
        )

    @contextlib.asynccontextmanager
    async def reading(self, number: int) -> AsyncIterator[Volume]:
        """A committed generation as a read-only volume."""
        with self.holding(number) as point:
            volume = await self._store.content.open_point(point)
            try:
                yield volume
            except BlockferryError as error:
                # Clients know the volume by its name, not by a path on this host.
                error.volume = self._name
                raise
            finally:
                await volume.close()

    @contextlib.contextmanager
    def holding(self, number: int) -> Iterator[Point]:
        """A committed generation that is in use; it is kept at least for a while after its last use."""
        point = self.resolve(number)
        self._readers[point.number] = self._readers.get(point.number, 0) + 1
        try:
            yield point
        finally:
            self._pins[point.number] = time.monotonic() + self._pin_seconds
            self._readers[point.number] -= 1
            if not self._readers[point.number]:
                del self._readers[point.number]

    @contextlib.asynccontextmanager
    async def reading_start(self) -> AsyncIterator[Volume]:
        """What the next session would start from, where nothing is committed: the work of an unfinished first sync."""
        volume = await self._store.content.open_unfinished(self._store.session.size)
        if volume is None:
            raise self._missing(0)
        try:
            yield volume
        finally:
            await volume.close()
