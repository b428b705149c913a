"""Generations as one image, a redo journal and undo files: for devices, and file systems that cannot share extents.

    NAME/image.raw            the newest generation, once its redo is applied; a first sync writes it in place
    NAME/work.redo            the changes of a session, read over the image
    NAME/COMMIT-ID.redo       the changes of the newest generation, while they are being applied to the image
    NAME/COMMIT-ID.undo       before-images: what leads from the next newer generation back to this one
    NAME/*.index              the index of each of these (delta.py)

        newest   redo, image                      older   undo, undo of the next one, …, image
        work     work.redo, image

A commit:  flush the work, capture the before-images of all it changes, reserve the space the image will need
           rename the work to its commit id, write the record                   (here the generation exists)
           apply the redo to the image, flush, remove the redo

Before the record a failure leaves the image untouched. After it the redo is applied again, from its start and as often
as need be, and readers read through it meanwhile. Before-images are complete, and durable, before the first byte of the
image changes, and are never captured again: what is applied twice would be captured half-way. The undo of a generation
holds every block that its successor changes, so readers of older generations never see the applying.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from blockferry.common import disk
from blockferry.common.durable import remove_durably, rename_durably
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import BLOCK_SIZE, Geometry
from blockferry.common.volumes import ImageVolume, Volume, in_thread
from blockferry.server import copying
from blockferry.server.base import IMAGE_NAME, Base, ImageBase
from blockferry.server.cache import Stamp
from blockferry.server.clones import IMAGE
from blockferry.server.content import Content, forget_pages_of, unshared_bytes_of
from blockferry.server.delta import Delta, below, extents, index_of
from blockferry.server.gate import Gate
from blockferry.server.generations import Generations, Point, corrupt
from blockferry.server.overlay import OverlayVolume
from pyroaring import BitMap, BitMap64

REDO = ".redo"
UNDO = ".undo"


class JournalContent(Content):
    """A base and deltas. `limit` bounds the bytes of a session's changes; 0 for none. Without a `base` it is an image
    in the replica's directory."""

    def __init__(self, directory: Path, generations: Generations, *, limit: int = 0, base: Base | None = None) -> None:
        super().__init__(directory, generations)
        self._limit = limit
        self._gate = Gate()
        self.base = base or ImageBase(directory)
        self.kind = "journal" if self.base.ours else "device"
        self._work_hold = ImageBase.hold
        """Of the base, when work on it began."""
        self._work: Delta | None = None
        self._redo: Delta | None = None
        self._undo: dict[bytes, Delta] = {}
        """By the commit id of the generation each leads back to."""
        self._broken: dict[bytes, str] = {}
        """Generations whose before-images cannot be read, and why."""
        self._reservations = 0
        """Attempts to commit whose space may still be reserved in the image."""

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether a replica's content has this kind. It keeps it, also on a file system that can clone."""
        return ImageBase.is_in(directory)

    @property
    def image(self) -> Path:
        """The one image, where the base is one."""
        return self.directory / IMAGE_NAME

    @property
    def work(self) -> Path:
        """Where the changes of a session are."""
        return self.directory / ("work" + REDO)

    def _named(self, point: Point, suffix: str) -> Path:
        return self.directory / (point.commit_id.hex() + suffix)

    # --- opening --------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        try:
            self._recover()
        except BaseException:
            self._let_go()
            raise

    def _recover(self) -> None:
        newest, older = self.generations.newest, self.generations.points[:-1]
        if self._is_handed_out:
            # Whatever was read through these was given up by that, and must never be applied to it.
            self._remove_deltas()
            return
        if isinstance(self.base, ImageBase):
            known = {self._named(point, IMAGE) for point in self.generations.points} | {self.promoted}
            found = list(self.directory.glob("*" + IMAGE))
            self.base.settle(self._named(newest, IMAGE) if newest is not None else None, known, found)
        self._settle_redos(newest)
        for path in self.directory.glob("*" + REDO):
            if not index_of(path).exists():
                # Data without an index was never made durable, or was applied: it means nothing.
                disk.unlink(path)
        if newest is not None and self._named(newest, REDO).exists():
            self._redo = Delta.open(self._named(newest, REDO))
        known = {self._named(point, UNDO) for point in older}
        for path in sorted(self.directory.glob("*" + UNDO)):
            if path not in known:
                # Captured for a commit whose record was never written, or dropped and not yet removed.
                Delta.remove(path)
                self._reservations = 1
        for path in self.directory.glob("*" + UNDO + ".index"):
            if path.with_suffix("") not in known:
                disk.unlink(path)
        for point in older:
            self._open_undo(point)

    @property
    def in_place(self) -> bool:
        return not self.base.ours

    @property
    def handed_out(self) -> str:
        return self.base.location if self.in_place else super().handed_out

    @property
    def _is_handed_out(self) -> bool:
        """Whether the base is in somebody else's hands."""
        return self.in_place and self.generations.promoted is not None

    def _refuse_handed_out(self) -> None:
        if self._is_handed_out:
            raise BlockferryError(
                Code.WRONG_STATE,
                f"{self.base.location} cannot be used",
                cause="it was handed out, and somebody may be writing to it",
                next="demote the replica first",
            )

    def _remove_deltas(self) -> None:
        for suffix in (REDO, UNDO):
            for index in self.directory.glob("*" + suffix + ".index"):
                disk.unlink(index)
            for path in self.directory.glob("*" + suffix):
                disk.unlink(path)

    def _settle_redos(self, newest: Point | None) -> None:
        """A redo that no record names was on its way: it is work again, unless other work has begun since. One of an
        older generation was applied."""
        known = {"work"} if newest is None else {"work", newest.commit_id.hex()}
        for name in sorted({path.name.split(".")[0] for path in self.directory.glob("*" + REDO + "*")} - known):
            redo = self.directory / (name + REDO)
            if self.generations.was_committed(name) or (self.work.exists() and index_of(self.work).exists()):
                Delta.remove(redo)
            else:
                # Dying between two renames leaves one of each.
                for path, target in ((redo, self.work), (index_of(redo), index_of(self.work))):
                    if path.exists():
                        disk.rename(path, target)
            disk.crash_point("start-redo-settled")

    def _open_undo(self, point: Point) -> None:
        if self._whole(point):
            return
        try:
            self._undo[point.commit_id] = Delta.open(self._named(point, UNDO))
        except BlockferryError as error:
            if error.code is not Code.CORRUPT_STATE:
                raise
            # One that is damaged hides none of the newer ones.
            self._broken[point.commit_id] = error.cause

    def _whole(self, point: Point) -> bool:
        """Whether a generation has an image of its own, from a time when the pool could clone."""
        return self._named(point, IMAGE).exists()

    async def reload(self, generations: Generations) -> None:
        async with self._gate.closed():
            self._let_go()
            self.generations = generations
            await in_thread(self.recover)

    def _let_go(self) -> None:
        deltas = [self._work, self._redo, *self._undo.values()]
        self._work, self._redo, self._undo, self._broken = None, None, {}, {}
        for delta in deltas:
            if delta is not None:
                delta.close()

    def close(self) -> None:
        self._let_go()
        self.base.let_go()

    async def _opened_base(self) -> Volume:
        self._refuse_handed_out()
        return await self.base.opened(self.generations.committed_size or 0)

    # --- a session's work -----------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        if self.generations.newest is None:
            return self.base.exists()
        return self._work is not None or index_of(self.work).exists()

    @property
    def unfinished(self) -> Path:
        return self.image

    async def open_unfinished(self, size: int) -> Volume | None:
        return await self.base.unfinished(size)

    async def check(self, size: int) -> None:
        await self.base.check(size, self.generations.committed_size or 0)

    async def trouble(self) -> str:
        if self._is_handed_out:
            return ""
        return await self.base.trouble(self.generations.committed_size or 0)

    async def release(self) -> None:
        await self.base.release()

    async def begin(self, size: int) -> tuple[Volume, bool]:
        newest = self.generations.newest
        if newest is None:
            # Nothing is committed yet, so there is nothing to lose: the first sync writes in place.
            work, continued = await self.base.begin(size, adopted=self.generations.adopted_size is not None)
            goes_on = self._goes_on()
            disk.crash_point("open-work-made")
            return work, continued and goes_on
        assert self._redo is None, "work is read over the image alone"
        base = await self._opened_base()
        goes_on = self._goes_on()
        continued = await in_thread(self._open_work, size)
        top = self._work
        assert top is not None
        if not self.base.ours and size > newest.size:
            await self._cover(top, base, newest.size)
        volume = OverlayVolume(str(self.work), size, base, lambda: (top,), self._gate, top=top, limit=self._limit)
        return volume, continued and goes_on

    def _goes_on(self) -> bool:
        """Whether work that begins now begins on what the work before had: what was found to be equal then, or written,
        still is."""
        before, self._work_hold = self._work_hold, self.base.hold
        return before == self.base.hold

    async def _cover(self, top: Delta, base: Volume, end: int) -> None:
        """Have `top` hold all that lies past the `end` of the newest generation: on a base that is not ours this is not
        zeros but anything."""
        first = end // BLOCK_SIZE
        past = BitMap64()
        past.add_range(first, -(-top.size // BLOCK_SIZE))
        past -= top.data | top.zero
        if end % BLOCK_SIZE and first in past:
            block = memoryview(bytearray(min(BLOCK_SIZE, top.size - first * BLOCK_SIZE)))
            await base.read_into(first * BLOCK_SIZE, block[: end % BLOCK_SIZE])
            await in_thread(top.write, [(first * BLOCK_SIZE, block)])
            top.data.add(first)
            past.remove(first)
        top.zero |= past

    def _open_work(self, size: int) -> bool:
        continued = True
        if self._work is None:
            try:
                self._work = Delta.open(self.work)
            except BlockferryError as error:
                if error.code is not Code.CORRUPT_STATE:
                    raise
                # Missing or damaged: it costs time, nothing else.
                Delta.remove(self.work)
                self._work = Delta.create(self.work, size)
                continued = False
        self._work.resize(size)
        disk.crash_point("open-work-made")
        return continued

    def altered(self, point: Point, geometry: Geometry, *, continued: bool) -> BitMap:
        assert self._work is not None
        found = BitMap()
        for blocks in (self._work.data, self._work.zero):
            for offset, length in extents(blocks, geometry.size):
                found.add_range(offset // geometry.region_size, -(-(offset + length) // geometry.region_size))
        return found

    async def end(self, work: Volume) -> None:
        # What it did since its last checkpoint is known to this process alone: the next session goes on with it.
        await work.close()

    async def discard(self) -> None:
        delta, self._work = self._work, None
        if delta is not None:
            delta.close()
        if self.generations.newest is None:
            await self.base.discard()
        else:
            await in_thread(Delta.remove, self.work)
            if self._reservations and self._redo is None:
                # While a redo is applied what it needs is not in use yet; `complete` sees to the rest.
                await self.base.unreserve()
                self._reservations = 0
        disk.crash_point("discard-removed")

    async def adopt(self, image: Path) -> None:
        assert isinstance(self.base, ImageBase)
        await self.base.adopt(image)

    async def take_back(self, image: Path) -> None:
        newest = self.generations.newest
        assert newest is not None
        theirs = await ImageVolume.open(image)
        try:
            ours, _ = await self.begin(max(theirs.size, newest.size))
            try:
                await copying.bring(theirs, ours)
            finally:
                await self.end(ours)
        finally:
            await theirs.close()

    # --- a commit -------------------------------------------------------------------------------------------------

    async def seal(self, work: Volume, point: Point) -> None:
        newest, redo = self.generations.newest, self._work
        if self.base.hold != self._work_hold:
            raise self._lost()
        if newest is None:
            await in_thread(disk.fsync_directory, self.directory)
            return
        assert redo is not None
        self._undo[newest.commit_id] = await self._capture(newest, redo)
        base = await self._opened_base()
        self._reservations += 1
        await base.reserve(extents(redo.data, redo.size))
        disk.crash_point("commit-space-reserved")
        target = self._named(point, REDO)
        await in_thread(disk.rename, self.work, target)
        disk.crash_point("commit-redo-renamed")
        await in_thread(rename_durably, index_of(self.work), index_of(target))
        redo.path = target
        disk.crash_point("commit-renamed")

    def _lost(self) -> BlockferryError:
        return BlockferryError(
            Code.UNAVAILABLE,
            f"{self.base.location} was lost during the session",
            cause="it is another opening of it now, and others may have written in between",
            next="run it again; what was committed stands",
        )

    async def _capture(self, newest: Point, redo: Delta) -> Delta:
        """The before-images of everything that `redo` changes, complete and durable."""
        path = self._named(newest, UNDO)
        undo = await in_thread(Delta.create, path, newest.size)
        try:
            await copying.capture(await self._opened_base(), below(redo.data | redo.zero, newest.size), undo)
            await in_thread(undo.flush)
            disk.crash_point("commit-undo-flushed")
            await in_thread(undo.save, undo.data, undo.zero)
        except BaseException:
            undo.close()
            raise
        disk.crash_point("commit-undo-captured")
        return undo

    async def publish(self, point: Point, record: Callable[[], None]) -> None:
        async with self._gate.closed():
            await in_thread(record)
            self._redo, self._work = self._work, None

    @property
    def incomplete(self) -> bool:
        return self._redo is not None

    async def complete(self) -> None:
        redo = self._redo
        if redo is None:
            return
        await self.base.reserve(redo.size)
        base = await self._opened_base()
        disk.crash_point("complete-begun")
        try:
            await copying.apply(redo, base)
            disk.crash_point("complete-applied")
            await base.flush()
        except (OSError, BlockferryError):
            self.base.doubt()
            raise
        if self._reservations > 1:
            # An attempt before this one may have reserved what this one did not need.
            await base.release()
        self._reservations = 0
        disk.crash_point("complete-flushed")
        async with self._gate.closed():
            self._redo = None
            redo.close()
        await in_thread(Delta.remove, redo.path)
        disk.crash_point("complete-redo-removed")

    async def drop(self, point: Point, record: Callable[[], None]) -> None:
        undo = self._undo.get(point.commit_id)
        before = [one for one in self.generations.points if one.number < point.number]
        if before and not self._whole(before[-1]):
            await self._hand_down(point, before[-1])
        await in_thread(record)
        disk.crash_point("drop-recorded")
        async with self._gate.closed():
            self._undo.pop(point.commit_id, None)
            self._broken.pop(point.commit_id, None)
            if undo is not None:
                undo.close()
        await in_thread(Delta.remove, self._named(point, UNDO))
        await in_thread(disk.unlink, self._named(point, IMAGE))
        disk.crash_point("drop-image-removed")

    async def _hand_down(self, point: Point, older: Point) -> None:
        """Give `older` what it needs of the next newer `point`, which is about to go."""
        undo, theirs = self._undo.get(point.commit_id), self._undo.get(older.commit_id)
        if undo is not None and theirs is not None:
            await copying.merge(undo, theirs)
            return
        # One of them is damaged. The older one, and what is older still, must never be read without it.
        await in_thread(remove_durably, index_of(self._named(older, UNDO)))
        async with self._gate.closed():
            cause = f"those of generation {point.number}, which it needs, were damaged"
            self._broken.setdefault(older.commit_id, cause)
            self._undo.pop(older.commit_id, None)
            if theirs is not None:
                theirs.close()

    # --- committed generations ------------------------------------------------------------------------------------

    def _layers(self, point: Point) -> list[Delta]:
        """What is read over the image for a generation, in this order."""
        if point == self.generations.newest:
            return [self._redo] if self._redo is not None else []
        if self.generations.point(point.number) != point:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"generation {point.number} of {self.directory.name} was dropped",
                cause="retention let go of it while its reading began",
                next="read a newer one",
            )
        newer = [one for one in self.generations.points[:-1] if one.number >= point.number]
        with contextlib.suppress(KeyError):
            layers = [self._undo[one.commit_id] for one in newer]
            # While an older generation is made the newest again, what the base does not have of it yet.
            return [*layers, self._redo] if self._redo is not None else layers
        raise corrupt(self._named(point, UNDO), self.problem(point))

    async def rewind(self, point: Point, record: Callable[[], None]) -> None:
        undo = self._undo.get(point.commit_id)
        if undo is None or point != self.generations.points[-2]:
            raise corrupt(self._named(point, UNDO), self.problem(point) or "newer generations are in between")
        path = self._named(point, REDO)
        await in_thread(_link, undo.path, path)
        disk.crash_point("device-rewind-linked")
        async with self._gate.closed():
            await in_thread(record)
            self._redo = self._undo.pop(point.commit_id)
            undo.path = path
        disk.crash_point("device-rewind-recorded")
        await in_thread(Delta.remove, self._named(point, UNDO))

    async def give_away(self, record: Callable[[], None]) -> None:
        assert self._redo is None
        # A redo that was applied may come back after a power failure. `recover` removes it, whatever it is.
        async with self._gate.closed():
            await in_thread(record)
            self._let_go()
        disk.crash_point("device-given-away")
        await in_thread(self._remove_deltas)
        await self.base.release()

    async def take_back_in_place(self, point: Point, record: Callable[[], None]) -> None:
        try:
            base = await self.base.opened(point.size)
            await base.flush()
            disk.crash_point("device-taken-back")
            await in_thread(record)
        except BaseException:
            await self.base.release()
            raise
        # What anybody knew of it was before somebody wrote to it.
        self._work_hold = -1

    async def open_point(self, point: Point) -> Volume:
        if self._whole(point) and point != self.generations.newest:
            return await ImageVolume.open(self._named(point, IMAGE))
        self._refuse_handed_out()
        problem = self.problem(point)
        if problem:
            raise corrupt(self._named(point, UNDO), problem)
        return OverlayVolume(
            f"{self.base.location}@{point.number}",
            point.size,
            await self._opened_base(),
            lambda: self._layers(point),
            self._gate,
        )

    def path(self, point: Point) -> Path | None:
        if point == self.generations.newest:
            return self.base.path if self._redo is None else None
        return self._named(point, IMAGE) if self._whole(point) else None

    def location(self, point: Point) -> str:
        if point == self.generations.newest:
            return self.base.location if self._redo is None else ""
        return super().location(point)

    def stamp(self, point: Point) -> Stamp | None:
        if point == self.generations.newest:
            known = self._redo is None and self.base.hold == self._work_hold
            return self.base.stamp() if known else None
        return Stamp.of(self._named(point, IMAGE)) if self._whole(point) else None

    def problem(self, point: Point) -> str:
        if self._whole(point):
            return ""
        if self._is_handed_out:
            return "its device was handed out, and may have been written to since"
        if not self.base.exists():
            return "its image is missing"
        for one in self.generations.points[:-1]:
            if one.number >= point.number and one.commit_id in self._broken:
                return f"the before-images of generation {one.number} are damaged: {self._broken[one.commit_id]}"
        return ""

    def bytes_held(self, point: Point) -> int:
        if self._whole(point):
            return unshared_bytes_of(self._named(point, IMAGE))
        if point == self.generations.newest:
            return self.base.bytes_held()
        return unshared_bytes_of(self._named(point, UNDO))

    def forget_pages(self, point: Point) -> None:
        if self._whole(point):
            forget_pages_of(self._named(point, IMAGE))
        else:
            self.base.forget_pages()
        for delta in self._layers(point):
            delta.forget_pages()

    async def room_to_hand_out(self, point: Point) -> int:
        volume = await self.open_point(point)
        try:
            if self.in_place:
                return 0
            return sum(length for _, length in await volume.data_extents(0, volume.size))
        finally:
            await volume.close()

    async def hand_out(self, point: Point, target: Path, progress: Callable[[int, int], None]) -> None:
        volume = await self.open_point(point)
        try:
            made = await ImageVolume.create(target, volume.size)
            try:
                await copying.copy(volume, made, progress)
            finally:
                await made.close()
        finally:
            await volume.close()


def _link(delta: Path, target: Path) -> None:
    """Give a delta a second name, durably."""
    disk.link(delta, target)
    disk.link(index_of(delta), index_of(target))
    disk.fsync_directory(target.parent)
