"""What one replica is on disk, whatever kind its content has.

    NAME/replica.json         identity: UUID, region size, digest key, whether it is on a device. Written once.
    NAME/commits.log          the truth (generations.py). One fsynced record is the commit.
    NAME/session.json         the epoch of the last session.
    NAME/COMMIT-ID.digests    the digests of a committed generation (cache.py).
    NAME/progress.json        regions of the work that are durable, for a session of the same immutable snapshot.
    NAME/clean.json           left by a clean shutdown: which images nobody has touched since.
    NAME/promoted.img         what a promotion has handed out.
    NAME/device.json          which device it is on (external.py).
    NAME/...                  the bytes of generations and of a session's work (clones.py, journal.py).

What is blocking says so; the rest may be awaited by one caller at a time.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
import uuid
from pathlib import Path

import msgspec
from blockferry.common import disk
from blockferry.common.digests import KEY_SIZE
from blockferry.common.durable import Log, remove_durably, write_atomic, write_unsynced
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import Geometry, check_region_size
from blockferry.common.volumes import Volume, in_thread
from blockferry.server import cache
from blockferry.server.cache import DigestCache, Stamp
from blockferry.server.clones import CloneContent
from blockferry.server.content import Content, forget_pages_of
from blockferry.server.external import ExternalBase
from blockferry.server.generations import Generations, Point, Promotion, corrupt
from blockferry.server.journal import JournalContent
from pyroaring import BitMap

FORMAT = 3
"""Version of everything in a replica's directory. A newer server reads older ones; an older server refuses newer ones
and changes nothing."""
FORMAT_OF_FILES = 2
"""What is written where there is no device: older servers understand all of it."""

_IDENTITY = "replica.json"
LOG = "commits.log"
_SESSION = "session.json"
_PROGRESS = "progress.json"
_CLEAN = "clean.json"
VOUCHERS = (_CLEAN, _PROGRESS)
"""Files by which content is believed without reading it."""
_DIGESTS = ".digests"
SCRUB = "scrub.json"
ROTTEN = "it was read again, and is not what was committed"
NEW_PREFIX = ".new-"
DELETED_PREFIX = ".deleted-"
_UUID_SIZE = 16


class Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a replica is for ever. `uuid` and `digest_key` are hexadecimal."""

    format: int
    uuid: str
    region_size: int
    digest_key: str
    created_at_us: int
    device: bool = False
    """Its newest generation is on a device or an export, not in this directory."""

    def __post_init__(self) -> None:
        # Whoever reads it back takes this for damage (ValueError): better at the start than at the first use.
        if len(bytes.fromhex(self.uuid)) != _UUID_SIZE or len(self.key) != KEY_SIZE:
            raise ValueError(f"the UUID has {_UUID_SIZE} bytes and the digest key {KEY_SIZE}, in hexadecimal")
        try:
            check_region_size(self.region_size)
        except BlockferryError as error:
            raise ValueError(f"{error.what}: {error.cause}") from error

    @property
    def key(self) -> bytes:
        """The key of every digest of this replica."""
        return bytes.fromhex(self.digest_key)


class _Version(msgspec.Struct, frozen=True):
    format: int


class _Scrub(msgspec.Struct, frozen=True):
    generation: int
    rotten: list[tuple[int, int]] = []


class _Uuid(msgspec.Struct, frozen=True):
    uuid: str


class SessionRecord(msgspec.Struct, frozen=True):
    """The durable part of a session. `epoch` only ever rises."""

    epoch: int = 0
    session_id: str = ""
    size: int = 0
    client: str = ""


class _Progress(msgspec.Struct, frozen=True):
    snapshot_id: str
    size: int
    regions: bytes


class _CleanStamp(msgspec.Struct, frozen=True):
    inode: int
    size: int
    ctime_ns: int


class Store:
    """One replica's directory. Opening it recovers from whatever the last process left. Blocking."""

    def __init__(
        self, directory: Path, *, clones: bool, journal_limit: int = 0, base: ExternalBase | None = None
    ) -> None:
        self.directory = directory
        self.identity = self._read_identity()
        self._refuse_other_base(base)
        self.generations = Generations(directory / LOG)
        try:
            self.session = self._read_session()
            if self.identity.format < FORMAT_OF_FILES:
                # Before anything is written that an older server would take for damage.
                self.identity = msgspec.structs.replace(self.identity, format=FORMAT_OF_FILES)
                write_atomic(directory / _IDENTITY, msgspec.json.encode(self.identity))
            if self.session.epoch == 0:
                # Its name may be in memory only, whoever gave it: durable before anybody has a session.
                disk.fsync_directory(directory.parent)
            self._stamps = self._take_clean_stamps()
            self._committed_here: set[bytes] = set()
            self.distrusted: dict[bytes, str] = {}
            """By commit id, why a generation may hold something else than was committed."""
            self.owed: Point | None = None
            """A generation that the record of a group (groups.py) says it has, and its own log does not yet."""
            self.content: Content
            if base is None and clones and not JournalContent.is_in(directory):
                self.content = CloneContent(directory, self.generations)
            else:
                self.content = JournalContent(directory, self.generations, limit=journal_limit, base=base)
            self.content.recover()
            self._remove_strays()
        except BaseException:
            self.generations.close()
            raise

    @classmethod
    def create(
        cls,
        directory: Path,
        region_size: int,
        *,
        clones: bool,
        journal_limit: int = 0,
        base: ExternalBase | None = None,
    ) -> Store:
        """Make a new, empty replica. It appears under its name whole or not at all."""
        new = directory.with_name(f"{NEW_PREFIX}{uuid.uuid4().hex}")
        disk.make_directory(new)
        try:
            Log(new / LOG).close()
            identity = Identity(
                FORMAT_OF_FILES if base is None else FORMAT,
                uuid.uuid4().hex,
                region_size,
                secrets.token_hex(KEY_SIZE),
                time.time_ns() // 1000,
                device=base is not None,
            )
            write_atomic(new / _IDENTITY, msgspec.json.encode(identity))
            disk.crash_point("create-before-rename")
            disk.rename(new, directory)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        disk.crash_point("create-renamed")
        return cls(directory, clones=clones, journal_limit=journal_limit, base=base)

    def _refuse_other_base(self, base: ExternalBase | None) -> None:
        """Without its device a replica would be taken for one that has lost its image, and the other way round."""
        if self.identity.device == (base is not None):
            return
        name = self.directory.name
        raise BlockferryError(
            Code.WRONG_STATE,
            f"{name} is not what the server was told",
            cause=f"{self.directory} is the journal of a device, and no device is called {name}"
            if base is None
            else f"{self.directory} holds the generations of {name} itself, and {base.location} is called so, too",
            next=f"start the server with --device {name}=…,journal={self.directory.parent}"
            if base is None
            else "give the device another name or another directory; nothing was changed",
            volume=name,
        )

    def close(self) -> None:
        """A clean end: note which images are as this process left them. Blocking."""
        stamps = {
            point.commit_id.hex(): _CleanStamp(stamp.inode, stamp.size, stamp.ctime_ns)
            for point in self.generations.points
            if (stamp := self._stamps.get(point.commit_id)) is not None
        }
        with contextlib.suppress(OSError):
            write_unsynced(self.directory / _CLEAN, msgspec.json.encode(stamps))
        disk.crash_point("shutdown-stamped")
        self.abandon()

    def abandon(self) -> None:
        """Let go of everything and vouch for nothing. Blocking."""
        self.content.close()
        self.generations.close()

    async def reload(self) -> None:
        """Believe only what the disk says, after a failure. Raises if that cannot be read."""
        generations = await in_thread(Generations, self.directory / LOG)
        if self.owed is not None:
            try:
                if generations.committed(self.owed.commit_id) is None:
                    await in_thread(generations.commit, self.owed, demotes=False)
            except OSError:
                generations.close()
                raise
            self.owed = None
        self.generations.close()
        self.generations = generations
        self._stamps = {}
        self._committed_here = set()
        self.session = await in_thread(self._read_session)
        await self.content.reload(generations)
        await in_thread(self._remove_strays)

    # --- reading back ---------------------------------------------------------------------------------------------

    def _read_identity(self) -> Identity:
        path = self.directory / _IDENTITY
        try:
            content = path.read_bytes()
            # First of all, and alone: a newer format may have other fields.
            version = msgspec.json.decode(content, type=_Version)
            if version.format <= FORMAT:
                return msgspec.json.decode(content, type=Identity)
        except (FileNotFoundError, UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise corrupt(path, str(error)) from error
        raise BlockferryError(
            Code.UNSUPPORTED,
            f"{path} was written by a newer blockferry",
            cause=f"it has format {version.format}, this server knows {FORMAT}",
            next="run the newer server; nothing was changed",
        )

    def _read_session(self) -> SessionRecord:
        path = self.directory / _SESSION
        try:
            return msgspec.json.decode(path.read_bytes(), type=SessionRecord)
        except FileNotFoundError:
            return SessionRecord()
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            # Going on with a lower epoch could let a fenced writer back in.
            raise corrupt(path, str(error)) from error

    def _take_clean_stamps(self) -> dict[bytes, Stamp]:
        """The stamps of a clean shutdown, once: a process that dies leaves none."""
        path = self.directory / _CLEAN
        try:
            found = msgspec.json.decode(path.read_bytes(), type=dict[str, _CleanStamp])
            stamps = {bytes.fromhex(name): Stamp(one.inode, one.size, one.ctime_ns) for name, one in found.items()}
        except (OSError, ValueError, msgspec.MsgspecError):
            stamps = {}
        disk.unlink(path)
        disk.crash_point("start-stamps-taken")
        return stamps

    def _remove_strays(self) -> None:
        known = {self._digests(point) for point in self.generations.points}
        for path in self.directory.glob("*" + _DIGESTS):
            if path not in known:
                disk.unlink(path)
        for path in self.directory.glob("*.tmp"):
            disk.unlink(path)
        if self.generations.promoted is None:
            disk.unlink(self.content.promoted)

    def total_bytes_held(self) -> int:
        """Bytes of disk of everything; extents shared between clones count once for each of them. Blocking."""
        total = 0
        # It may be deleted meanwhile.
        with contextlib.suppress(FileNotFoundError):
            for path in self.directory.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_blocks * 512
        return total

    # --- digests --------------------------------------------------------------------------------------------------

    def _digests(self, point: Point) -> Path:
        return self.directory / (point.commit_id.hex() + _DIGESTS)

    def recorded_digests(self, point: Point) -> DigestCache | None:
        """What was committed, region by region, whatever the disk holds now. Blocking."""
        return cache.load(self._digests(point), point.commit_id, self.identity.region_size)

    def trusted_digests(self, point: Point) -> DigestCache | None:
        """What the image holds now without reading it, or None if anything may have touched it since its commit.
        Blocking."""
        stamp = self._stamps.get(point.commit_id)
        try:
            if stamp is None or stamp != self.content.stamp(point):
                return None
        except OSError:
            return None
        return self.recorded_digests(point)

    def distrust(self, point: Point) -> None:
        """The image was found to hold something else than was committed: let the next sync read it."""
        self._stamps.pop(point.commit_id, None)
        self._committed_here.discard(point.commit_id)
        self.distrusted[point.commit_id] = ROTTEN

    # --- sessions -------------------------------------------------------------------------------------------------

    def write_session(self, record: SessionRecord) -> None:
        """Make a session's epoch durable (invariant 4: before OpenSession answers). Blocking."""
        write_atomic(self.directory / _SESSION, msgspec.json.encode(record))
        self.session = record

    async def begin_work(self, size: int, snapshot_id: str) -> tuple[Volume, BitMap, DigestCache]:
        """The work as a volume of `size` bytes; the regions of it that are durable from an interrupted session of the
        same immutable snapshot; and the digests that are known of it without reading it."""
        newest = self.generations.newest
        digests, progress = None, None
        if self.content.has_work():
            progress = await in_thread(self._read_progress, snapshot_id, size)
        elif newest is not None:
            digests = await in_thread(self.trusted_digests, newest)
        if progress is None:
            # Durably, and before there is any other work: what it says is no longer so.
            await in_thread(remove_durably, self.directory / _PROGRESS)
            disk.crash_point("open-progress-removed")
        work, continued = await self.content.begin(size)
        if not continued and progress is not None:
            # Nor may a later session believe it.
            await in_thread(remove_durably, self.directory / _PROGRESS)
            progress = None
        if digests is not None and newest is not None and newest.size != size:
            digests.forget(newest.size // self.identity.region_size)
        return work, progress or BitMap(), digests or DigestCache()

    async def difference(self, size: int, *, continued: bool) -> tuple[BitMap | None, str]:
        """The regions in which the work of `size` bytes that `begin_work` gave may differ from the newest generation as
        it was committed; or None, and why nobody can say. `continued`: there was work before."""
        newest = self.generations.newest
        doubt = await in_thread(self._doubt, newest) if newest is not None else "nothing is committed yet"
        if doubt or newest is None:
            return None, doubt
        geometry = Geometry(size, self.identity.region_size)
        try:
            return await in_thread(self.content.altered, newest, geometry, continued=continued), ""
        except OSError as error:
            return None, f"what an interrupted session has left cannot be told apart: {os.strerror(error.errno or 0)}"

    def _doubt(self, newest: Point) -> str:
        """Why the newest generation may hold something else than was committed; empty if nothing says so."""
        if newest.commit_id in self.distrusted:
            return self.distrusted[newest.commit_id]
        stamp = self._stamps.get(newest.commit_id)
        if (stamp is not None or self.content.in_place) and stamp != self.content.stamp(newest):
            if self.content.in_place:
                return "its device was opened anew, and others may have written to it in between"
            return "its image was touched since it was committed"
        with contextlib.suppress(OSError, UnicodeDecodeError, msgspec.MsgspecError):
            scrub = msgspec.json.decode((self.directory / SCRUB).read_bytes(), type=_Scrub)
            if scrub.generation == newest.number and scrub.rotten:
                return ROTTEN
        return ""

    def _read_progress(self, snapshot_id: str, size: int) -> BitMap | None:
        if not snapshot_id:
            return None
        try:
            found = msgspec.json.decode((self.directory / _PROGRESS).read_bytes(), type=_Progress)
            return BitMap.deserialize(found.regions) if (found.snapshot_id, found.size) == (snapshot_id, size) else None
        except (OSError, msgspec.MsgspecError, ValueError):
            return None

    def write_progress(self, snapshot_id: str, size: int, regions: BitMap) -> None:
        """Note regions of the work that the caller has flushed (invariant 5). Blocking."""
        record = _Progress(snapshot_id, size, regions.serialize())
        write_atomic(self.directory / _PROGRESS, msgspec.json.encode(record))

    async def discard_work(self) -> None:
        """Give up the work, unless it is an image that was adopted: that came from elsewhere, and nobody may have
        another."""
        if self.generations.newest is None and self.generations.adopted_size is not None:
            # A write that failed may be gone from the disk and still be in memory, where it would be compared.
            await in_thread(forget_pages_of, self.content.unfinished)
            return
        await self.content.discard()

    async def adopt(self, image: Path) -> None:
        """Make an image that lies on the same file system the work of a first sync: it is compared, not overwritten."""
        size = (await in_thread(image.stat)).st_size
        await in_thread(self.generations.adopt, size)
        disk.crash_point("adopt-recorded")
        await self.content.adopt(image)

    # --- commits --------------------------------------------------------------------------------------------------

    async def commit(
        self, work: Volume, commit_id: bytes, size: int, digests: DigestCache, *, demotes: bool = False
    ) -> Point:
        """Make the work, which the caller has flushed, the newest generation; `complete` is due afterwards."""
        point = await self.seal(work, commit_id, size, digests)
        await self.publish(point, demotes=demotes)
        return point

    async def seal(self, work: Volume, commit_id: bytes, size: int, digests: DigestCache) -> Point:
        """All of a commit but its record: the generation that it would make."""
        point = self.generations.next(commit_id, size)
        await in_thread(cache.save, self._digests(point), digests, commit_id, self.identity.region_size)
        disk.crash_point("commit-digests-written")
        await self.content.seal(work, point)
        return point

    async def publish(self, point: Point, *, demotes: bool = False) -> None:
        """Write the record of what was sealed, and show it to readers."""
        await self.content.publish(point, lambda: self.generations.commit(point, demotes=demotes))
        disk.crash_point("commit-recorded")
        self._committed_here.add(point.commit_id)
        await self._stamp(point)

    async def complete(self) -> None:
        """Finish what a commit has put off: afterwards the newest generation is one complete image."""
        newest = self.generations.newest
        if newest is not None and self.content.incomplete:
            await self.content.complete()
            # What another process committed may lie on an image that was touched between the two.
            if newest.commit_id in self._committed_here:
                await self._stamp(newest)

    async def _stamp(self, point: Point) -> None:
        stamp = None if self.content.incomplete else await in_thread(self.content.stamp, point)
        if stamp is not None:
            self._stamps[point.commit_id] = stamp

    async def rewind(self, point: Point) -> None:
        """Make an older generation the newest one again, and give up those that are newer; `complete` is due
        afterwards."""
        newer = [one for one in self.generations.points if one.number > point.number]
        for one in newer[:-1]:
            # What leads to the older one is then in one piece.
            await self.drop(one)
        await self.content.rewind(point, lambda: self.generations.rewind(point))
        await in_thread(disk.unlink, self._digests(newer[-1]))

    async def give_away(self, promotion: Promotion) -> None:
        """Hand out what the newest generation is on, and give up all others."""
        await self.content.give_away(lambda: self.generations.promote(promotion))
        self._stamps = {}
        await in_thread(self._remove_strays)

    async def take_back_in_place(self, commit_id: bytes) -> Point:
        """Take back what was handed out: as it is, it is the newest generation."""
        newest = self.generations.newest
        assert newest is not None
        point = self.generations.next(commit_id, newest.size)
        await self.content.take_back_in_place(point, lambda: self.generations.commit(point, demotes=True))
        await in_thread(self._remove_strays)
        return point

    async def drop(self, point: Point) -> None:
        """Give up an older generation."""
        await self.content.drop(point, lambda: self.generations.drop(point))
        await in_thread(disk.unlink, self._digests(point))
        self._stamps.pop(point.commit_id, None)


def replica_uuid(directory: Path) -> str:
    """The UUID of the replica in a directory; empty where there is none. Raises CORRUPT_STATE. Blocking."""
    path = directory / _IDENTITY
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Uuid).uuid
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise corrupt(path, str(error)) from error


def bury(directory: Path) -> Path:
    """Take a replica's directory out of its pool, durably; where it is then, to be removed. Blocking."""
    grave = directory.with_name(f"{DELETED_PREFIX}{uuid.uuid4().hex}")
    disk.rename(directory, grave)
    disk.fsync_directory(directory.parent)
    return grave
