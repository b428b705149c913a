"""A pool: one directory of replicas on one file system, used by one server at a time."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import uuid
from pathlib import Path

import structlog
from blockferry.common import disk, linux
from blockferry.common.address import check_volume_name
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import DEFAULT_REGION_SIZE, check_region_size
from blockferry.common.retention import Retention
from blockferry.common.volumes import in_thread
from blockferry.server import handover
from blockferry.server.replica import Replica
from blockferry.server.store import NEW_PREFIX, Store

log = structlog.get_logger("blockferry.pool")

_LOCK = ".blockferry-lock"
_DELETED_PREFIX = ".deleted-"
SEEDS = ".seeds"
"""Where an administrator puts images that are to be adopted."""


class Pool:
    """All replicas in one directory. Names become directory entries only after `check_volume_name`."""

    def __init__(self, name: str, path: Path, lease: float, floor: Retention) -> None:
        self.name = name
        self.path = path
        self._lease = lease
        self._floor = floor
        self._replicas: dict[str, Replica] = {}
        self._creating = asyncio.Lock()
        self._unfinished: set[asyncio.Task[Replica]] = set()
        self._lock_fd = -1
        self.clones = False

    @classmethod
    async def open(cls, name: str, path: Path, lease: float, floor: Retention) -> Pool:
        """Lock the directory and open every replica in it. `lease` in seconds; `floor` are the recovery points kept
        whatever a source asks for. Raises NOT_FOUND, READ_ONLY, UNREADABLE or IN_USE."""
        pool = cls(name, path, lease, floor)
        try:
            await in_thread(pool._open)
        except OSError as error:
            raise from_os_error(error, f"cannot use {path} as a pool") from error
        for replica in pool.list():
            replica.complete_soon()
        return pool

    def _open(self) -> None:
        if not self.path.is_dir():
            raise BlockferryError(
                Code.NOT_FOUND,
                f"cannot use {self.path} as a pool",
                cause="it is not a directory" if self.path.exists() else "no such directory",
                next="create it, or name an existing directory",
            )
        self._lock_fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockferryError(
                Code.IN_USE,
                f"cannot use {self.path} as a pool",
                cause="another blockferry-server has it open",
                next="stop that server, or use another directory",
            ) from error
        self.clones = _can_clone(self.path)
        for entry in sorted(self.path.iterdir()):
            if entry.name.startswith((NEW_PREFIX, _DELETED_PREFIX)):
                shutil.rmtree(entry)
            elif entry.is_dir() and not entry.name.startswith("."):
                try:
                    store = Store(entry, clones=self.clones)
                except (OSError, BlockferryError) as error:
                    # One damaged replica must not take the others down with it.
                    log.error("replica left out", volume=entry.name, error=str(error))
                    continue
                self._replicas[entry.name] = Replica(entry.name, self.name, store, self._lease, self._floor)

    def list(self) -> list[Replica]:
        """All replicas, by name."""
        return [self._replicas[name] for name in sorted(self._replicas)]

    def get(self, name: str) -> Replica:
        """The replica with this name, or NOT_FOUND."""
        replica = self._replicas.get(check_volume_name(name))
        if replica is None:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"there is no replica {name}",
                cause=f"pool {self.name} does not hold it",
                next="list what there is with blockferry replica list",
                volume=name,
            )
        return replica

    async def get_or_create(self, name: str, region_size: int) -> Replica:
        """The replica with this name, made if need be (`region_size` 0: the default)."""
        known = self._replicas.get(check_volume_name(name))
        if known is not None:
            return known
        wanted = check_region_size(region_size or DEFAULT_REGION_SIZE)
        # To its end even if the client goes away: the directory would be there, and nobody would know the replica.
        making = asyncio.create_task(self._make(name, wanted))
        self._unfinished.add(making)
        making.add_done_callback(self._unfinished.discard)
        making.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(making)

    async def _make(self, name: str, region_size: int) -> Replica:
        async with self._creating:
            if name not in self._replicas:
                directory = self.path / name
                try:
                    if directory.exists():
                        # Left out when the server started, or made by an attempt that failed at its very end.
                        store = await in_thread(Store, directory, clones=self.clones)
                    else:
                        store = await in_thread(Store.create, directory, region_size, clones=self.clones)
                except OSError as error:
                    raise from_os_error(error, f"cannot create {name} in pool {self.name}", volume=name) from error
                except BlockferryError as error:
                    log.error("replica left out", volume=name, error=str(error))
                    raise BlockferryError(
                        error.code,
                        f"{name} cannot be used",
                        cause="what lies in its directory is not usable",
                        next="look at the server's log; move the directory away or repair it",
                        volume=name,
                    ) from error
                self._replicas[name] = Replica(name, self.name, store, self._lease, self._floor)
            return self._replicas[name]

    async def delete(self, replica: Replica) -> None:
        """Remove a replica and all its recovery points. Raises IN_USE or WRONG_STATE."""
        await replica.to_the_end(self._delete(replica))

    async def _delete(self, replica: Replica) -> None:
        await replica.retire_for_good()
        grave = self.path / f"{_DELETED_PREFIX}{uuid.uuid4().hex}"
        try:
            await in_thread(disk.rename, self.path / replica.name, grave)
            await in_thread(disk.fsync_directory, self.path)
        except OSError as error:
            del self._replicas[replica.name]
            if (self.path / replica.name).exists():
                # It was let go of, and is still there.
                await self._make(replica.name, replica.store.identity.region_size)
            raise from_os_error(error, f"cannot delete {replica.name}", volume=replica.name) from error
        del self._replicas[replica.name]
        disk.crash_point("delete-renamed")
        # Whatever is left of it goes with the next start.
        await in_thread(shutil.rmtree, grave, ignore_errors=True)

    async def adopt(self, name: str, seed: str, region_size: int) -> tuple[Replica, int]:
        """Make `seed`, a file in the pool's `.seeds` directory, the start of a first sync; returns the replica and its
        size in bytes."""
        path = self.path / SEEDS / check_volume_name(seed)
        # Before the replica is made: a slip of the pen leaves nothing.
        await in_thread(handover.check_seed, name, path)
        replica = await self.get_or_create(name, region_size)
        return replica, await handover.adopt(replica, path, region_size)

    def find_session(self, session_id: str) -> Replica | None:
        """The replica with this open session."""
        return next(
            (one for one in self._replicas.values() if one.session and one.session.session_id == session_id), None
        )

    async def close(self) -> None:
        """End all sessions and unlock the directory."""
        await asyncio.gather(*self._unfinished, return_exceptions=True)
        for replica in self._replicas.values():
            await replica.close()
        os.close(self._lock_fd)


def _can_clone(path: Path) -> bool:
    """Whether the file system shares extents between files (XFS, Btrfs), tried rather than guessed."""
    source, target = path / ".probe-source", path / ".probe-target"
    try:
        with source.open("w+b") as source_file, target.open("wb") as target_file:
            source_file.write(bytes(4096))
            source_file.flush()
            linux.reflink(source_file.fileno(), target_file.fileno())
    except OSError as error:
        if error.errno in linux.NOT_SUPPORTED:
            return False
        raise
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    return True
