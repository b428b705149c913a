"""What an archiver keeps on its own disk while it works, so that an interruption costs no upload twice (US10853312B2).

    DIR/lock            held (flock) by the one archiver that uses the directory
    DIR/journal         a log: the attempt, its runs, every chunk whose upload was begun, and the commit
    DIR/trailers        the trailers of those data chunks, one after the other
    DIR/meta-NNNNNN     metadata chunks as they will be stored
    DIR/superblock      the log record that was to be committed
    DIR/cache/          metadata chunks of snapshots that are in the archive

A chunk is noted, durably, before its upload begins. Whether one that was noted is there is asked of the store once,
when the next run begins; those known to be there are named by later notes. Losing all of this costs time, and nothing
else: so whatever is damaged is dropped. Metadata chunks and the cache are made without a flush, because every node in
them carries its own checksum.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockferry.common import disk
from blockferry.common.durable import Log, make_directories, write_atomic
from blockferry.common.errors import BlockferryError, Code, from_os_error

VERSION = 1

CACHE_LIMIT = 1024 * 1024 * 1024
"""Bytes of metadata kept of snapshots in the archive: those of a volume of some 5 TiB."""

_META = re.compile(r"meta-([0-9]{6,})")


@dataclass(frozen=True)
class Noted:
    """A chunk whose upload was begun. Data chunks have their trailer at `at`, `length` bytes long, and blocks from
    `first` to `last` (-1: none)."""

    number: int
    size: int
    tail: bytes
    done: bool = False
    run: int = 0
    at: int = 0
    length: int = 0
    first: int = -1
    last: int = -1


@dataclass
class State:
    """What the journal says. `runs` are the snapshot ids of the runs of the attempt, in order."""

    attempt: bytes = b""
    seen: int = 0
    started: str = ""
    runs: list[str] = field(default_factory=list)
    data: dict[int, Noted] = field(default_factory=dict)
    meta: dict[int, Noted] = field(default_factory=dict)
    commit: int = 0
    """the number that was tried last; 0: none"""
    committed: int = 0

    def apply(self, record: dict[str, Any]) -> None:
        """Take in one record of the journal. Raises ValueError, KeyError or TypeError for what is none."""
        match record.get("kind"):
            case "attempt":
                if record["version"] != VERSION:
                    raise ValueError("another version")
                self.attempt = bytes.fromhex(record["attempt"])
                self.seen, self.started = int(record["seen"]), str(record["started"])
            case "run":
                self.runs.append(str(record["snapshot_id"]))
            case "data" | "meta" as kind:
                fields = {name: value for name, value in record.items() if name not in ("kind", "tail", "done")}
                noted = Noted(**fields, tail=bytes.fromhex(record["tail"]))
                (self.data if kind == "data" else self.meta)[noted.number] = noted
            case "commit":
                self.commit = int(record["number"])
            case "committed":
                self.committed = int(record["number"])
            case other:
                raise ValueError(f"{other!r}")
        for kind, number in record.get("done", ()):
            self.finished(kind, number)

    def finished(self, kind: str, number: int) -> None:
        """A chunk is known to be in the store."""
        chunks = self.data if kind == "data" else self.meta
        chunks[number] = replace(chunks[number], done=True)


class Staging:
    """The directory of one volume. Blocking calls; open one with `Staging.open`, and close it."""

    def __init__(self, directory: Path, lock: int) -> None:
        self.directory = directory
        self._lock = lock
        self._journal: Log | None = None
        self._trailers = -1
        self._trailers_end = 0
        self._done: list[tuple[str, int]] = []
        self.state = State()

    @classmethod
    def open(cls, directory: Path) -> Staging:
        """Raises IN_USE where another archiver works there."""
        try:
            make_directories(directory / "cache")
            lock = disk.create(directory / "lock")
        except OSError as error:
            raise from_os_error(error, f"cannot use {directory} for staging") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise BlockferryError(
                Code.IN_USE,
                f"{directory} is in use",
                cause="another archiver of this volume is at work there",
                next="wait until it is done",
            ) from error
        staging = cls(directory, lock)
        try:
            staging._load()
        except BaseException:
            staging.close()
            raise
        return staging

    def close(self) -> None:
        """Give the directory back; what is in it stays."""
        self._close_files()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _close_files(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._trailers >= 0:
            os.close(self._trailers)
            self._trailers = -1

    # --- beginning and end --------------------------------------------------------------------------------------------

    def _load(self) -> None:
        lost = (self.directory / "journal").exists() and not (self.directory / "trailers").exists()
        try:
            if lost:
                raise ValueError("the trailers are gone")
            self._open_files()
            assert self._journal is not None
            for record in self._journal.records:
                self.state.apply(record)
            self._journal.records.clear()
            if not self.state.attempt and (self.state.runs or self.state.data or self.state.meta):
                raise ValueError("no attempt")
        except (BlockferryError, ValueError, KeyError, TypeError):
            # What it knew is uploaded again; the store does not mind.
            self.drop()
            return
        self._trailers_end = max((one.at + one.length for one in self.state.data.values()), default=0)
        disk.truncate(self._trailers, self._trailers_end)
        for path in self.directory.glob("meta-*"):
            found = _META.fullmatch(path.name)
            if found is None or int(found[1]) not in self.state.meta:
                disk.unlink(path)

    def _open_files(self) -> None:
        try:
            self._trailers = disk.create(self.directory / "trailers")
            # A new journal makes its name durable, and with it that of the trailers.
            self._journal = Log(self.directory / "journal")
        except OSError as error:
            raise from_os_error(error, f"cannot use {self.directory} for staging") from error

    def begin(self, attempt: bytes, seen: int, started: str) -> None:
        """A new attempt, durable when this returns."""
        self._append({
            "kind": "attempt", "version": VERSION, "attempt": attempt.hex(), "seen": seen, "started": started,
        })  # fmt: skip

    def begin_run(self, snapshot_id: str) -> int:
        """The next run of the attempt; its number, from 0."""
        self._append({"kind": "run", "snapshot_id": snapshot_id})
        return len(self.state.runs) - 1

    def drop(self) -> None:
        """Forget the attempt. The cache stays."""
        self._close_files()
        # The journal goes first: without it nothing else means anything.
        for name in ("journal", "trailers", "superblock"):
            disk.unlink(self.directory / name)
        for path in self.directory.glob("meta-*"):
            disk.unlink(path)
        self.state, self._trailers_end, self._done = State(), 0, []
        self._open_files()

    def finish(self, used: Iterable[str]) -> None:
        """The attempt is committed: keep its metadata chunks and those with the names in `used`, as far as there is
        room, and forget all else."""
        cache = self.directory / "cache"
        names = set(used)
        for number, noted in self.state.meta.items():
            path = self.meta_path(number)
            if noted.done and path.exists():
                target = cache / f"{self.state.attempt.hex()}-{number:06}"
                disk.rename(path, target)
                names.add(target.name)
        disk.crash_point("archive-cached")
        self.drop()
        self._shrink_cache(cache, names)

    def _shrink_cache(self, cache: Path, used: set[str]) -> None:
        found = []
        for path in cache.iterdir():
            with contextlib.suppress(FileNotFoundError):
                info = path.stat()
                found.append((path.name in used, info.st_mtime_ns, info.st_size, path))
        room = CACHE_LIMIT
        for _, _, size, path in sorted(found, reverse=True):
            room -= size
            if room < 0:
                disk.unlink(path)

    # --- the journal --------------------------------------------------------------------------------------------------

    def _append(self, record: dict[str, Any]) -> None:
        assert self._journal is not None
        if self._done:
            record = {**record, "done": [list(one) for one in self._done]}
        try:
            self._journal.append(record)
        except OSError as error:
            raise from_os_error(error, f"cannot write {self._journal.path}") from error
        self._journal.records.clear()
        self._done = []
        self.state.apply(record)

    def note_data(self, number: int, size: int, tail: bytes, run: int, trailer: bytes, first: int, last: int) -> None:
        """A data chunk is about to be stored. Durable when this returns."""
        at, view = self._trailers_end, memoryview(trailer)
        try:
            while view:
                view = view[disk.pwrite(self._trailers, view, at + len(trailer) - len(view)) :]
            disk.fsync(self._trailers)
        except OSError as error:
            raise from_os_error(error, f"cannot write {self.directory / 'trailers'}") from error
        self._trailers_end += len(trailer)
        self._append({
            "kind": "data", "number": number, "size": size, "tail": tail.hex(), "run": run, "at": at,
            "length": len(trailer), "first": first, "last": last,
        })  # fmt: skip

    def note_meta(self, number: int, size: int, tail: bytes) -> None:
        """A metadata chunk is about to be stored. Durable when this returns."""
        self._append({"kind": "meta", "number": number, "size": size, "tail": tail.hex()})

    def done(self, kind: str, number: int) -> None:
        """A chunk is in the store. Made durable with the next note; should that never come, the store is asked."""
        self.state.finished(kind, number)
        self._done.append((kind, number))

    def note_commit(self, number: int, frame: bytes) -> None:
        """A log record is about to be created. Durable when this returns."""
        try:
            write_atomic(self.directory / "superblock", frame)
        except OSError as error:
            raise from_os_error(error, f"cannot write {self.directory / 'superblock'}") from error
        self._append({"kind": "commit", "number": number})

    def note_committed(self, number: int) -> None:
        """The record is there."""
        self._append({"kind": "committed", "number": number})

    # --- files --------------------------------------------------------------------------------------------------------

    def superblock(self) -> bytes:
        """What was noted by `note_commit`; empty if it is gone."""
        try:
            return (self.directory / "superblock").read_bytes()
        except FileNotFoundError:
            return b""

    def read_trailer(self, noted: Noted) -> bytes:
        """The frame of a trailer, or what is left of it."""
        return os.pread(self._trailers, noted.length, noted.at)

    def meta_path(self, number: int) -> Path:
        """Where a metadata chunk is staged."""
        return self.directory / f"meta-{number:06}"

    def cache_path(self, attempt: bytes, number: int) -> Path:
        """Where a metadata chunk of the archive is kept."""
        return self.directory / "cache" / f"{attempt.hex()}-{number:06}"

    def free_space(self) -> int:
        """Bytes that may be staged."""
        return shutil.disk_usage(self.directory).free
