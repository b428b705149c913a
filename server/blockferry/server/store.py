"""What one replica is on disk. Blocking calls; `replica.py` runs them on threads.

    NAME/replica.json        identity: UUID, region size, digest key. Written once.
    NAME/commits.log         the truth: commit, drop and overwrite records. One fsynced record is the commit.
    NAME/session.json        the epoch, and what is known of the session at work.
    NAME/COMMIT-ID.img       the image of a committed generation; never written again.
    NAME/work.img            the image a session works on.

Invariant 3: images are named by commit id and everything else is derived from the log. A commit is: flush the work
image, rename it to its commit id, fsync the directory, append the record. Dying before the record leaves an image that
no record names: it becomes the work image again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blockferry.common import linux
from blockferry.common.digests import KEY_SIZE
from blockferry.common.durable import Log, fsync_directory, rename_durably, write_atomic
from blockferry.common.errors import BlockferryError, Code

FORMAT = 1
"""Version of everything in a replica's directory. A newer server reads older ones; an older server refuses newer ones
and changes nothing."""

_IDENTITY = "replica.json"
_LOG = "commits.log"
_SESSION = "session.json"
_WORK = "work.img"
_SUFFIX = ".img"
NEW_PREFIX = ".new-"


class Identity(msgspec.Struct, frozen=True):
    """What a replica is for ever. `uuid` and `digest_key` are hexadecimal."""

    format: int
    uuid: str
    region_size: int
    digest_key: str
    created_at_us: int

    @property
    def key(self) -> bytes:
        """The key of every digest of this replica."""
        return bytes.fromhex(self.digest_key)


class SessionRecord(msgspec.Struct, frozen=True):
    """The durable part of a session. `epoch` only ever rises."""

    epoch: int = 0
    session_id: str = ""
    size: int = 0
    snapshot_id: str = ""
    client: str = ""


@dataclass(frozen=True)
class Point:
    """A committed generation: number, commit id (16 bytes), size in bytes, time in microseconds since 1970."""

    number: int
    commit_id: bytes
    size: int
    committed_at_us: int

    @property
    def file_name(self) -> str:
        """Name of its image inside the replica's directory."""
        return self.commit_id.hex() + _SUFFIX


class Store:
    """One replica's directory. Opening it recovers from whatever the last process left."""

    def __init__(self, directory: Path, *, clones: bool) -> None:
        self.directory = directory
        self.clones = clones
        self.identity = self._read_identity()
        self._log = Log(directory / _LOG)
        self.points: list[Point] = []
        """Committed generations, oldest first."""
        self.last_number = 0
        self.committed_size: int | None = None
        """Bytes of the newest commit, also while that generation is being overwritten; None before the first."""
        self.overwritten = False
        """The newest committed generation was given up to an update in place that has not been committed."""
        for record in self._log.records:
            self._replay(record)
        self.session = self._read_session()
        self._recover()

    @classmethod
    def create(cls, directory: Path, region_size: int, *, clones: bool) -> Store:
        """Make a new, empty replica. It appears under its name whole or not at all."""
        new = directory.with_name(f"{NEW_PREFIX}{uuid.uuid4().hex}")
        new.mkdir(mode=0o700)
        identity = Identity(FORMAT, uuid.uuid4().hex, region_size, secrets.token_hex(KEY_SIZE), time.time_ns() // 1000)
        write_atomic(new / _IDENTITY, msgspec.json.encode(identity))
        Log(new / _LOG).close()
        rename_durably(new, directory)
        return cls(directory, clones=clones)

    def close(self) -> None:
        """Let go of the log."""
        self._log.close()

    # --- reading back ---------------------------------------------------------------------------------------------

    def _read_identity(self) -> Identity:
        path = self.directory / _IDENTITY
        try:
            identity = msgspec.json.decode(path.read_bytes(), type=Identity)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
            raise _corrupt(path, str(error)) from error
        if identity.format > FORMAT:
            raise BlockferryError(
                Code.UNSUPPORTED,
                f"{path} was written by a newer blockferry",
                cause=f"it has format {identity.format}, this server knows {FORMAT}",
                next="run the newer server; nothing was changed",
            )
        return identity

    def _read_session(self) -> SessionRecord:
        path = self.directory / _SESSION
        try:
            return msgspec.json.decode(path.read_bytes(), type=SessionRecord)
        except FileNotFoundError:
            return SessionRecord()
        except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
            # Going on with a lower epoch could let a fenced writer back in.
            raise _corrupt(path, str(error)) from error

    def _replay(self, record: dict[str, object]) -> None:
        kind, number = record.get("kind"), record.get("number")
        if kind == "commit" and isinstance(number, int):
            size, at, commit = record.get("size"), record.get("at_us"), record.get("commit_id")
            if isinstance(size, int) and isinstance(at, int) and isinstance(commit, str):
                self.points.append(Point(number, bytes.fromhex(commit), size, at))
                self.last_number = number
                self.committed_size = size
                self.overwritten = False
                return
        elif kind in ("drop", "overwrite") and isinstance(number, int):
            self.points = [point for point in self.points if point.number != number]
            self.overwritten = self.overwritten or kind == "overwrite"
            return
        raise _corrupt(self.directory / _LOG, f"unknown record {record!r}")

    def _recover(self) -> None:
        known = {point.file_name for point in self.points}
        work = self.directory / _WORK
        changed = False
        for path in sorted(self.directory.glob("*" + _SUFFIX)):
            if path.name in known or path == work:
                continue
            # Renamed for a commit whose record was never written; or dropped, and not yet removed.
            if work.exists() or self._was_committed(path.stem):
                path.unlink()
            else:
                path.rename(work)
            changed = True
        for path in self.directory.glob("*.tmp"):
            path.unlink()
            changed = True
        if changed:
            fsync_directory(self.directory)

    def _was_committed(self, commit_id: str) -> bool:
        """Whether an image without a point is one that was committed and dropped, rather than one on its way."""
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
                number, size, at = record["number"], record["size"], record["at_us"]
                assert isinstance(number, int) and isinstance(size, int) and isinstance(at, int)
                return Point(number, commit_id, size, at)
        return None

    def image(self, point: Point) -> Path:
        """Where a generation's image is."""
        return self.directory / point.file_name

    @property
    def work(self) -> Path:
        """Where the image of a session is, whether or not it exists."""
        return self.directory / _WORK

    def bytes_held(self) -> int:
        """Bytes of disk the replica occupies. Extents shared between clones count once for each."""
        total = 0
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
        return total

    # --- changing -------------------------------------------------------------------------------------------------

    def write_session(self, record: SessionRecord) -> None:
        """Make a session's epoch durable (invariant 4: before OpenSession answers)."""
        write_atomic(self.directory / _SESSION, msgspec.json.encode(record))
        self.session = record

    def begin_work(self, size: int) -> None:
        """See to it that the work image exists, with `size` bytes: the one an earlier session left, a clone of the
        newest generation, that generation itself where the pool cannot clone, or a new file for a first sync."""
        work = self.work
        newest = self.newest
        if not work.exists():
            if newest is None:
                os.close(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            elif self.clones:
                self._clone(self.image(newest), work)
            else:
                # The record comes first: from here on the generation does not exist.
                self._log.append({"kind": "overwrite", "number": newest.number})
                self._replay(self._log.records[-1])
                os.rename(self.image(newest), work)
            fsync_directory(self.directory)
        if self.committed_size is None and work.stat().st_size > size:
            # An unfinished first sync of a larger source: nothing is committed, so start over.
            os.truncate(work, 0)
        os.truncate(work, size)

    @staticmethod
    def _clone(source: Path, target: Path) -> None:
        temporary = target.with_suffix(".tmp")
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            target_fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                linux.reflink(source_fd, target_fd)
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)
        os.rename(temporary, target)

    def discard_work(self) -> None:
        """Drop the work image, unless it is all there is left of an overwritten generation."""
        if not self.overwritten:
            self.work.unlink(missing_ok=True)
            fsync_directory(self.directory)

    def commit(self, commit_id: bytes, size: int) -> Point:
        """Make the work image, which the caller has flushed, the newest generation."""
        point = Point(self.last_number + 1, commit_id, size, time.time_ns() // 1000)
        rename_durably(self.work, self.image(point))
        self._log.append(
            {
                "kind": "commit",
                "number": point.number,
                "commit_id": commit_id.hex(),
                "size": size,
                "at_us": point.committed_at_us,
            }
        )
        self._replay(self._log.records[-1])
        return point

    def drop(self, point: Point) -> None:
        """Give up an older generation: the record first, so that no record ever names a missing image."""
        self._log.append({"kind": "drop", "number": point.number})
        self._replay(self._log.records[-1])
        self.image(point).unlink(missing_ok=True)
        fsync_directory(self.directory)


def _corrupt(path: Path, cause: str) -> BlockferryError:
    return BlockferryError(
        Code.CORRUPT_STATE,
        f"{path} is damaged",
        cause=cause,
        next="restore it from a backup of the pool, or delete the replica and sync it anew",
    )
