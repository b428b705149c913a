"""The bytes of a replica: of its committed generations, and of the session that works on the next one.

There are two kinds. `clones.py`: every generation is an image of its own that shares its extents with the others, where
the file system can do that. `journal.py`: one image, the changes of a session beside it, and before-images that lead
back to older generations; for any file system.

A commit has four steps, and the record in the log is the second:

    seal      all that the record will vouch for is durable (invariant 5); after a failure the generation before stands
    publish   the record is written, and readers see the new generation
    complete  what may be done later: afterwards the newest generation is one complete image
    drop      of older generations, as retention asks for it
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from blockferry.common import linux
from blockferry.common.regions import Geometry
from blockferry.common.volumes import ImageVolume, Volume, in_thread
from blockferry.server.cache import Stamp
from blockferry.server.generations import Generations, Point
from pyroaring import BitMap

PROMOTED = "promoted.img"
"""What was handed out by a promotion."""


class Content(abc.ABC):
    """Methods are called one at a time, except for `open_point` and what only looks. All may raise BlockferryError."""

    kind: str

    def __init__(self, directory: Path, generations: Generations) -> None:
        self.directory = directory
        self.generations = generations

    @property
    def promoted(self) -> Path:
        """Where a promoted image is, whether or not it exists."""
        return self.directory / PROMOTED

    @property
    def in_place(self) -> bool:
        """Whether a promotion hands out what the newest generation is on, and no file: then all other generations, and
        what leads to them, are given up by it."""
        return False

    @property
    def handed_out(self) -> str:
        """Where people find what was promoted."""
        return str(self.promoted)

    @abc.abstractmethod
    def recover(self) -> None:
        """Put right whatever the last process left, when the replica is opened. Blocking."""

    @abc.abstractmethod
    async def reload(self, generations: Generations) -> None:
        """Believe only what is on the disk, after a failure. Readers go on."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything, as it is. Blocking."""

    # --- a session's work -----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def has_work(self) -> bool:
        """Whether an earlier session has left work."""

    async def check(self, size: int) -> None:
        """Raise unless a session of a source of `size` bytes may begin. Nothing is changed."""
        return

    @property
    @abc.abstractmethod
    def unfinished(self) -> Path:
        """Where the image of a first sync is, whether or not it exists."""

    async def open_unfinished(self, size: int) -> Volume | None:
        """What a first sync of `size` bytes would go on with, as a read-only volume; the caller closes it. None where
        there is nothing."""
        return await open_image(self.unfinished)

    @abc.abstractmethod
    async def begin(self, size: int) -> tuple[Volume, bool]:
        """The work as a volume of `size` bytes: what an earlier session left (then True), else what the newest
        generation holds. Nothing here needs a flush: what a power failure damages is compared like anything else."""

    @abc.abstractmethod
    def altered(self, point: Point, geometry: Geometry, *, continued: bool) -> BitMap:
        """The regions in which the work that `begin` gave may differ from `point`, the newest generation; `continued`:
        an earlier session had left it. Blocking; may raise OSError."""

    @abc.abstractmethod
    async def end(self, work: Volume) -> None:
        """Let go of the volume that `begin` gave; the work stays."""

    @abc.abstractmethod
    async def discard(self) -> None:
        """Give up the work and the space it takes."""

    @abc.abstractmethod
    async def adopt(self, image: Path) -> None:
        """Move an image of somebody else's here, as the work of a first sync."""

    @abc.abstractmethod
    async def take_back(self, image: Path) -> None:
        """Make the work what `image` holds, which is no smaller than the newest generation. Not durable yet."""

    # --- a commit -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def seal(self, work: Volume, point: Point) -> None:
        """Make the work durable under the name of `point`, with all that its generation needs."""

    @abc.abstractmethod
    async def publish(self, point: Point, record: Callable[[], None]) -> None:
        """Write the record (a blocking call) and show `point` to readers from then on."""

    @property
    @abc.abstractmethod
    def incomplete(self) -> bool:
        """Whether a commit has put something off, so that the newest generation is no complete image yet."""

    @abc.abstractmethod
    async def complete(self) -> None:
        """Finish what a commit has put off; nothing if there is nothing. Another session needs it done."""

    @abc.abstractmethod
    async def drop(self, point: Point, record: Callable[[], None]) -> None:
        """Give up an older generation; the record is written once all others can do without it."""

    # --- committed generations ------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def open_point(self, point: Point) -> Volume:
        """A generation as a read-only volume; the caller closes it. Later commits do not change what it reads."""

    @abc.abstractmethod
    def path(self, point: Point) -> Path | None:
        """The complete image of a generation, where there is one."""

    def location(self, point: Point) -> str:
        """The same for people, also where it is no path; empty where there is none."""
        return str(self.path(point) or "")

    @abc.abstractmethod
    def stamp(self, point: Point) -> Stamp | None:
        """What tells whether anybody has touched the complete image of a generation; None where nothing can. Blocking;
        may raise OSError."""

    async def trouble(self) -> str:
        """Why nothing can be read or written now, in words; empty if it can."""
        return ""

    async def release(self) -> None:
        """Let go of what others may want to use; it is taken again when it is needed."""
        return

    @abc.abstractmethod
    def problem(self, point: Point) -> str:
        """What is wrong with a generation, in words; empty if nothing was noticed. Blocking."""

    @abc.abstractmethod
    def bytes_held(self, point: Point) -> int:
        """Bytes of disk that would be freed if only this point were dropped. Blocking."""

    @abc.abstractmethod
    def forget_pages(self, point: Point) -> None:
        """Have the kernel drop what it remembers of a generation, so that it is read from the disk. Blocking."""

    @abc.abstractmethod
    async def room_to_hand_out(self, point: Point) -> int:
        """Bytes of disk that `hand_out` needs."""

    @abc.abstractmethod
    async def hand_out(self, point: Point, target: Path, progress: Callable[[int, int], None]) -> None:
        """Make `target` a file with what a generation holds, to be written by others. Not durable yet. `progress` is
        told of (bytes done, bytes in all)."""

    # --- handing over in place ------------------------------------------------------------------------------------

    async def rewind(self, point: Point, record: Callable[[], None]) -> None:
        """Make the generation before the newest the newest one again; the record gives the newer one up. `complete` is
        due afterwards, and goes on after a crash."""
        raise NotImplementedError

    async def give_away(self, record: Callable[[], None]) -> None:
        """Hand out what the newest generation is on; the record gives all others up."""
        raise NotImplementedError

    async def take_back_in_place(self, point: Point, record: Callable[[], None]) -> None:
        """Take back what was handed out, durably as it is, as the generation `point`."""
        raise NotImplementedError


async def open_image(path: Path) -> Volume | None:
    """An image for reading; None where there is none, or nothing in it."""
    if not await in_thread(lambda: path.exists() and path.stat().st_size > 0):
        return None
    return await ImageVolume.open(path)


def forget_pages_of(path: Path) -> None:
    """Have the kernel drop what it remembers of a file."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def unshared_bytes_of(path: Path) -> int:
    """Bytes of disk that removing a file would free."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return linux.unshared_bytes(fd)
    finally:
        os.close(fd)
