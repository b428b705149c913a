"""What one replica is on disk. Blocking calls; `replica.py` runs them on threads.

    NAME/replica.json         identity: UUID, region size, digest key. Written once.
    NAME/commits.log          the truth: commit, drop, overwrite and keep records. One fsynced record is the commit.
    NAME/session.json         the epoch of the last session.
    NAME/COMMIT-ID.img        the image of a committed generation; never written again.
    NAME/COMMIT-ID.digests    its digests (cache.py).
    NAME/work.img             the image a session works on.
    NAME/progress.json        regions of work.img that are durable, for a session of the same immutable snapshot.
    NAME/clean.json           left by a clean shutdown: which images nobody has touched since.

Invariant 3: images are named by commit id and everything else is derived from the log. A commit is: flush the work
image, rename it to its commit id, fsync the directory, append the record. Dying before the record leaves an image that
no record names: it becomes the work image again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blockferry.common import disk, linux
from blockferry.common.digests import KEY_SIZE
from blockferry.common.durable import Log, remove_durably, rename_durably, write_atomic, write_unsynced
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.regions import check_region_size
from blockferry.common.retention import DEFAULT, Retention
from blockferry.server import cache
from blockferry.server.cache import DigestCache, Stamp
from pyroaring import BitMap

FORMAT = 1
"""Version of everything in a replica's directory. A newer server reads older ones; an older server refuses newer ones
and changes nothing."""

_IDENTITY = "replica.json"
_LOG = "commits.log"
_SESSION = "session.json"
_WORK = "work.img"
_PROGRESS = "progress.json"
_CLEAN = "clean.json"
VOUCHERS = (_CLEAN, _PROGRESS)
"""Files by which content is believed without reading it."""
_IMAGE = ".img"
_DIGESTS = ".digests"
NEW_PREFIX = ".new-"
_UUID_SIZE = 16


class Identity(msgspec.Struct, frozen=True):
    """What a replica is for ever. `uuid` and `digest_key` are hexadecimal."""

    format: int
    uuid: str
    region_size: int
    digest_key: str
    created_at_us: int

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


@dataclass(frozen=True)
class Point:
    """A committed generation: number, commit id (16 bytes), size in bytes, time in microseconds since 1970."""

    number: int
    commit_id: bytes
    size: int
    committed_at_us: int


class Store:
    """One replica's directory. Opening it recovers from whatever the last process left."""

    def __init__(self, directory: Path, *, clones: bool) -> None:
        self.directory = directory
        self.clones = clones
        self.identity = self._read_identity()
        if not (directory / _LOG).exists():
            # A new one would forget every generation, and their images would be taken for work.
            raise _corrupt(directory / _LOG, "it is missing")
        self._log = Log(directory / _LOG)
        self.points: list[Point] = []
        """Committed generations, oldest first."""
        self.last_number = 0
        self.committed_size: int | None = None
        """Bytes of the newest commit, also while that generation is being overwritten; None before the first."""
        self.overwritten = False
        """The newest committed generation was given up to an update in place that has not been committed."""
        self.keep = DEFAULT
        """How the replica's source wants its recovery points kept."""
        try:
            for record in self._log.records:
                self._replay(record)
            self.session = self._read_session()
            if self.session.epoch == 0:
                # Its name may be in memory only, whoever gave it: durable before anybody has a session.
                disk.fsync_directory(directory.parent)
            self._stamps = self._take_clean_stamps()
            self._recover()
        except BaseException:
            self._log.close()
            raise

    @classmethod
    def create(cls, directory: Path, region_size: int, *, clones: bool) -> Store:
        """Make a new, empty replica. It appears under its name whole or not at all."""
        new = directory.with_name(f"{NEW_PREFIX}{uuid.uuid4().hex}")
        disk.make_directory(new)
        try:
            Log(new / _LOG).close()
            identity = Identity(FORMAT, uuid.uuid4().hex, region_size, secrets.token_hex(KEY_SIZE), _now_us())
            write_atomic(new / _IDENTITY, msgspec.json.encode(identity))
            disk.crash_point("create-before-rename")
            disk.rename(new, directory)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        disk.crash_point("create-renamed")
        return cls(directory, clones=clones)

    def close(self) -> None:
        """A clean end: note which images are as this process left them."""
        stamps = {
            point.commit_id.hex(): _CleanStamp(stamp.inode, stamp.size, stamp.ctime_ns)
            for point in self.points
            if (stamp := self._stamps.get(point.commit_id)) is not None
        }
        with contextlib.suppress(OSError):
            write_unsynced(self.directory / _CLEAN, msgspec.json.encode(stamps))
        disk.crash_point("shutdown-stamped")
        self.abandon()

    def abandon(self) -> None:
        """Let go of the log and vouch for nothing."""
        self._log.close()

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
            raise _corrupt(path, str(error)) from error
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
            raise _corrupt(path, str(error)) from error

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

    def _replay(self, record: dict[str, object]) -> None:
        kind, number = record.get("kind"), record.get("number")
        if kind == "commit" and isinstance(number, int):
            point = _point_of(record)
            if point is not None:
                self.points.append(point)
                self.last_number, self.committed_size = number, point.size
                self.overwritten = False
                return
        elif kind in ("drop", "overwrite") and isinstance(number, int):
            self.points = [point for point in self.points if point.number != number]
            self.overwritten = self.overwritten or kind == "overwrite"
            return
        elif kind == "keep":
            with contextlib.suppress(msgspec.ValidationError):
                self.keep = msgspec.convert(record.get("rules"), Retention)
                return
        raise _corrupt(self.directory / _LOG, f"unknown record {record!r}")

    def _append(self, record: dict[str, object]) -> None:
        self._log.append(record)
        self._replay(record)

    def _recover(self) -> None:
        known = {self.image(point).name for point in self.points}
        for path in sorted(self.directory.glob("*" + _IMAGE)):
            if path.name in known or path == self.work:
                continue
            # Renamed for a commit whose record was never written; or dropped, and not yet removed.
            if self.work.exists() or self._was_dropped(path.stem):
                disk.unlink(path)
            else:
                disk.rename(path, self.work)
            disk.crash_point("start-image-settled")
        for path in self.directory.glob("*" + _DIGESTS):
            if path.with_suffix(_IMAGE).name not in known:
                disk.unlink(path)
        for path in self.directory.glob("*.tmp"):
            disk.unlink(path)

    def _was_dropped(self, commit_id: str) -> bool:
        """Whether an image without a point was committed and dropped, rather than being on its way."""
        overwritten = [record["number"] for record in self._log.records if record.get("kind") == "overwrite"]
        return any(
            record.get("commit_id") == commit_id and record["number"] not in overwritten
            for record in self._log.records
            if record.get("kind") == "commit"
        )

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def newest(self) -> Point | None:
        """The newest committed generation that still exists."""
        return self.points[-1] if self.points else None

    def point(self, number: int) -> Point | None:
        """The generation with this number; 0 means the newest."""
        if number == 0:
            return self.newest
        return next((point for point in self.points if point.number == number), None)

    def committed(self, commit_id: bytes) -> Point | None:
        """The generation a commit id became, even if retention has dropped it since."""
        for record in reversed(self._log.records):
            if record.get("kind") == "commit" and record.get("commit_id") == commit_id.hex():
                return _point_of(record)
        return None

    def image(self, point: Point) -> Path:
        """Where a generation's image is."""
        return self.directory / (point.commit_id.hex() + _IMAGE)

    @property
    def work(self) -> Path:
        """Where the image of a session is, whether or not it exists."""
        return self.directory / _WORK

    def bytes_held(self, point: Point) -> int:
        """Bytes of disk that would be freed if only this point were deleted."""
        fd = os.open(self.image(point), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return linux.unshared_bytes(fd)
        finally:
            os.close(fd)

    def total_bytes_held(self) -> int:
        """Bytes of disk of all images; extents shared between clones count once for each of them."""
        total = 0
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
        return total

    # --- digests --------------------------------------------------------------------------------------------------

    def recorded_digests(self, point: Point) -> DigestCache | None:
        """What was committed, region by region, whatever the image holds now."""
        path = self.image(point).with_suffix(_DIGESTS)
        return cache.load(path, point.commit_id, self.identity.region_size)

    def trusted_digests(self, point: Point) -> DigestCache | None:
        """What the image holds now without reading it, or None if anything may have touched it since its commit."""
        stamp = self._stamps.get(point.commit_id)
        try:
            if stamp is None or stamp != Stamp.of(self.image(point)):
                return None
        except OSError:
            return None
        return self.recorded_digests(point)

    # --- sessions -------------------------------------------------------------------------------------------------

    def write_session(self, record: SessionRecord) -> None:
        """Make a session's epoch durable (invariant 4: before OpenSession answers)."""
        write_atomic(self.directory / _SESSION, msgspec.json.encode(record))
        self.session = record

    def begin_work(self, size: int, snapshot_id: str) -> tuple[BitMap, DigestCache]:
        """See to it that the work image exists, with `size` bytes: the one an earlier session left, a clone of the
        newest generation, that generation itself where the pool cannot clone, or a new file for a first sync.

        Returns the regions that are durable from an interrupted session of the same immutable snapshot, and the digests
        that are known of the work image without reading it. Nothing here needs a flush: a work image that a power
        failure damages is compared like any other.
        """
        newest = self.newest
        progress = self._read_progress(snapshot_id, size)
        if progress is None:
            # Durably, and before the first write: what it says is no longer so.
            remove_durably(self.directory / _PROGRESS)
            disk.crash_point("open-progress-removed")
        if self.work.exists():
            digests = None
        else:
            digests = self.trusted_digests(newest) if newest is not None and self.clones else None
            self._make_work(newest)
        disk.crash_point("open-work-made")
        fd = os.open(self.work, os.O_RDWR | os.O_CLOEXEC)
        try:
            if self.committed_size is None and os.fstat(fd).st_size > size:
                # An unfinished first sync of a larger source: nothing is committed, so start over.
                disk.truncate(fd, 0)
            if digests is not None and os.fstat(fd).st_size != size:
                digests.forget(os.fstat(fd).st_size // self.identity.region_size)
            disk.truncate(fd, size)
        finally:
            os.close(fd)
        return progress or BitMap(), digests or DigestCache()

    def _make_work(self, newest: Point | None) -> None:
        if newest is None:
            os.close(disk.create(self.work))
        elif self.clones:
            temporary = self.work.with_suffix(".tmp")
            source_fd = os.open(self.image(newest), os.O_RDONLY | os.O_CLOEXEC)
            try:
                target_fd = disk.create(temporary, os.O_WRONLY | os.O_TRUNC)
                try:
                    linux.reflink(source_fd, target_fd)
                finally:
                    os.close(target_fd)
            finally:
                os.close(source_fd)
            disk.crash_point("open-cloned")
            disk.rename(temporary, self.work)
        else:
            # The record comes first: from here on the generation does not exist.
            self._append({"kind": "overwrite", "number": newest.number})
            disk.crash_point("open-overwrite-recorded")
            disk.rename(self.image(newest), self.work)
            disk.crash_point("open-overwrite-renamed")
            disk.unlink(self.image(newest).with_suffix(_DIGESTS))
            self._stamps.pop(newest.commit_id, None)

    def _read_progress(self, snapshot_id: str, size: int) -> BitMap | None:
        if not snapshot_id or not self.work.exists():
            return None
        try:
            found = msgspec.json.decode((self.directory / _PROGRESS).read_bytes(), type=_Progress)
            return BitMap.deserialize(found.regions) if (found.snapshot_id, found.size) == (snapshot_id, size) else None
        except (OSError, msgspec.MsgspecError, ValueError):
            return None

    def write_progress(self, snapshot_id: str, size: int, regions: BitMap) -> None:
        """Note regions of the work image that the caller has flushed (invariant 5)."""
        record = _Progress(snapshot_id, size, regions.serialize())
        write_atomic(self.directory / _PROGRESS, msgspec.json.encode(record))

    def discard_work(self) -> None:
        """Drop the work image, unless it is all there is left of an overwritten generation."""
        if not self.overwritten:
            disk.unlink(self.work)
            disk.crash_point("discard-removed")
            return
        # A write that failed may be gone from the disk and still be in memory, where the next session would compare it.
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self.work, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def set_keep(self, keep: Retention) -> None:
        """Remember how the source wants its points kept."""
        if keep != self.keep:
            self._append({"kind": "keep", "rules": msgspec.to_builtins(keep)})

    def commit(self, commit_id: bytes, size: int, digests: DigestCache) -> Point:
        """Make the work image, which the caller has flushed, the newest generation."""
        point = Point(self.last_number + 1, commit_id, size, _now_us())
        image = self.image(point)
        cache.save(image.with_suffix(_DIGESTS), digests, commit_id, self.identity.region_size)
        disk.crash_point("commit-digests-written")
        rename_durably(self.work, image)
        disk.crash_point("commit-renamed")
        self._append(
            {
                "kind": "commit",
                "number": point.number,
                "commit_id": commit_id.hex(),
                "size": size,
                "at_us": point.committed_at_us,
            }
        )
        disk.crash_point("commit-recorded")
        self._stamps[commit_id] = Stamp.of(image)
        return point

    def distrust(self, point: Point) -> None:
        """The image was found to hold something else than was committed: let the next sync read it."""
        self._stamps.pop(point.commit_id, None)

    def drop(self, point: Point) -> None:
        """Give up an older generation: the record first, so that no record ever names a missing image."""
        self._append({"kind": "drop", "number": point.number})
        disk.crash_point("drop-recorded")
        disk.unlink(self.image(point))
        disk.crash_point("drop-image-removed")
        disk.unlink(self.image(point).with_suffix(_DIGESTS))
        self._stamps.pop(point.commit_id, None)


def _point_of(record: dict[str, object]) -> Point | None:
    """The point of a commit record, or None where the record is not one."""
    match record:
        case {"number": int(number), "commit_id": str(commit_id), "size": int(size), "at_us": int(at_us)}:
            with contextlib.suppress(ValueError):
                return Point(number, bytes.fromhex(commit_id), size, at_us)
    return None


def _now_us() -> int:
    return time.time_ns() // 1000


def _corrupt(path: Path, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.CORRUPT_STATE,
        f"{path} is damaged",
        cause=cause,
        next="restore it from a backup of the pool, or delete the replica and sync it anew",
    )
