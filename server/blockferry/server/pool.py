"""A pool: one directory of replicas on one file system, used by one server at a time."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Required, TypedDict

import structlog
from blockferry.common import disk, linux
from blockferry.common.address import check_volume_name, is_volume_name
from blockferry.common.durable import remove_durably
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import DEFAULT_REGION_SIZE, check_region_size
from blockferry.common.retention import Retention
from blockferry.common.volumes import in_thread
from blockferry.server import groups, handover
from blockferry.server.devices import DeviceSpec
from blockferry.server.external import ExternalBase, external_base
from blockferry.server.identity import PoolIdentity, Verdict
from blockferry.server.replica import Replica
from blockferry.server.room import ReplicaRoom, Room
from blockferry.server.space import UNLIMITED, Limits
from blockferry.server.store import DELETED_PREFIX, NEW_PREFIX, VOUCHERS, Store, bury

log = structlog.get_logger("blockferry.pool")

_LOCK = ".blockferry-lock"
SEEDS = ".seeds"
"""Where an administrator puts images that are to be adopted."""


class _StoreOptions(TypedDict, total=False):
    clones: Required[bool]
    journal_limit: int
    base: ExternalBase


class Pool:
    """All replicas in one directory. Names become directory entries only after `check_volume_name`."""

    def __init__(
        self,
        name: str,
        path: Path,
        lease: float,
        floor: Retention,
        limits: Limits = UNLIMITED,
        *,
        devices: Sequence[DeviceSpec] = (),
        only_devices: bool = False,
    ) -> None:
        self.name = name
        self.path = path
        self.devices = {device.name: device for device in devices}
        """Replicas that are on a device or an export; all else of them lies here."""
        self._only_devices = only_devices
        self.room = Room(name, path, limits)
        self.names: list[str] = []
        """Names taken when the pool was opened, also by replicas that had to be left out."""
        self._lease = lease
        self._floor = floor
        self._replicas: dict[str, Replica] = {}
        self._making: dict[str, asyncio.Task[Replica]] = {}
        self._lock_fd = -1
        self.clones = False
        self._doubts: Mapping[str, str] = {}
        """Replicas that nobody may open now, and why."""

    @classmethod
    async def open(
        cls,
        name: str,
        path: Path,
        lease: float,
        floor: Retention,
        limits: Limits = UNLIMITED,
        *,
        devices: Sequence[DeviceSpec] = (),
        only_devices: bool = False,
    ) -> Pool:
        """Lock the directory and open every replica in it. `lease` in seconds; `floor` are the recovery points kept
        whatever a source asks for; `devices` have their journals here, and with `only_devices` nothing else is made
        here. Raises NOT_FOUND, READ_ONLY, UNREADABLE, UNSUPPORTED or IN_USE."""
        pool = cls(name, path, lease, floor, limits, devices=devices, only_devices=only_devices)
        await open_pools([pool])
        return pool

    def _claim(self) -> None:
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
        self._identity = PoolIdentity(self.path)

    @property
    def uuid(self) -> str:
        """Which pool it is; empty while it is new."""
        return self._identity.record.uuid if self._identity.record is not None else ""

    def _load(self, doubts: Mapping[str, str]) -> None:
        self._doubts = doubts
        for entry in sorted(self.path.iterdir()):
            if entry.name.startswith((NEW_PREFIX, DELETED_PREFIX)):
                shutil.rmtree(entry)
            elif entry.is_dir() and is_volume_name(entry.name) and self._is_ours(entry.name):
                self.names.append(entry.name)
        if self._identity.verdict in (Verdict.NEW, Verdict.RESTORED):
            self._doubt()
        found = list(self.names)
        self.names += [name for name in self.devices if name not in found]
        for name in found:
            if name in doubts:
                log.error("replica left out", volume=name, error=doubts[name])
                continue
            try:
                store = Store(self.path / name, **self._options(name, self._base(name)))
            except (OSError, BlockferryError) as error:
                # One damaged replica must not take the others down with it.
                log.error("replica left out", volume=name, error=str(error))
                continue
            self._replicas[name] = self._replica(name, store)
        self._identity.settle({name: replica.store.generations.last_number for name, replica in self._replicas.items()})
        for replica in self._replicas.values():
            newest = replica.store.generations.newest
            if newest is not None and self.is_behind(replica):
                replica.store.distrusted[newest.commit_id] = "its pool was restored from a backup"

    def _is_ours(self, name: str) -> bool:
        """A directory for journals alone may hold other things, too."""
        return not self._only_devices or name in self.devices

    def _doubt(self) -> None:
        """Invariant 1: in files that are not known to be those this pool had before, nothing vouches for content. Gone
        durably before anything is believed, and before the pool counts as known again."""
        for name in self.names:
            for voucher in VOUCHERS:
                remove_durably(self.path / name / voucher)

    def _base(self, name: str) -> ExternalBase | None:
        device = self.devices.get(name)
        return external_base(device, self.path / name) if device is not None else None

    def _options(self, name: str, base: ExternalBase | None) -> _StoreOptions:
        device = self.devices.get(name)
        options = _StoreOptions(clones=self.clones, journal_limit=self.room.limits.journal)
        if device is not None and base is not None:
            options["base"] = base
            options["journal_limit"] = device.journal_limit or self.room.limits.journal
        return options

    def _replica(self, name: str, store: Store) -> Replica:
        room = ReplicaRoom(self.room, name, store.directory)
        device = self.devices.get(name)
        floor = device.floor if device is not None else None
        return Replica(name, self.name, store, self._lease, floor or self._floor, room)

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
                cause="no pool of this server holds it",
                next="list what there is with blockferry replica list",
                volume=name,
            )
        return replica

    def holds(self, name: str) -> bool:
        """Whether a name is taken here: by a replica, by one that is being made, or by whatever lies there."""
        known = name in self._replicas or name in self._making or name in self.devices
        return known or (self.path / name).exists()

    async def get_or_create(self, name: str, region_size: int, size: int = 0) -> Replica:
        """The replica with this name, made if need be (`region_size` 0: the default) for a source of `size` bytes."""
        known = self._replicas.get(check_volume_name(name))
        if known is not None:
            return known
        wanted = check_region_size(region_size or DEFAULT_REGION_SIZE)
        if self._only_devices and name not in self.devices:
            raise BlockferryError(
                Code.NOT_FOUND,
                f"there is no replica {name}",
                cause=f"this server replicates to devices only: {', '.join(sorted(self.devices))}",
                next="name one of these, or start the server with a --pool for others",
                volume=name,
            )
        making = self._making.get(name)
        if making is None:
            # To its end even if the client goes away: the directory would be there, and nobody would know the replica.
            making = self._making[name] = asyncio.create_task(self._make(name, wanted, size))
            making.add_done_callback(lambda done: self._making.pop(name))
            making.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(making)

    async def _make(self, name: str, region_size: int, size: int = 0) -> Replica:
        base = self._base(name)
        try:
            if base is not None:
                # Before anything is made for a device that cannot be used.
                await base.check(size, 0)
            store = await self._made_store(name, region_size, base)
        except BaseException as error:
            if base is not None:
                await base.release()
            if isinstance(error, BlockferryError):
                error.volume = name
            raise
        self._replicas[name] = self._replica(name, store)
        return self._replicas[name]

    async def _made_store(self, name: str, region_size: int, base: ExternalBase | None) -> Store:
        directory, options = self.path / name, self._options(name, base)
        if name in self._doubts:
            raise BlockferryError(
                Code.WRONG_STATE,
                f"{name} cannot be used",
                cause=self._doubts[name],
                next="restart the server with that pool as well; nothing was changed",
                volume=name,
            )
        try:
            if directory.exists():
                # Left out when the server started, or made by an attempt that failed at its very end.
                store = await in_thread(Store, directory, **options)
            else:
                await self.room.check(name, f"cannot create {name}")
                store = await in_thread(Store.create, directory, region_size, **options)
        except OSError as error:
            raise from_os_error(error, f"cannot create {name} in pool {self.name}", volume=name) from error
        except BlockferryError as error:
            if error.code is Code.OUT_OF_SPACE:
                raise
            log.error("replica left out", volume=name, error=str(error))
            raise BlockferryError(
                error.code,
                f"{name} cannot be used",
                cause="what lies in its directory is not usable",
                next="look at the server's log; move the directory away or repair it",
                volume=name,
            ) from error
        return store

    async def delete(self, replica: Replica) -> None:
        """Remove a replica and all its recovery points. Raises IN_USE or WRONG_STATE."""
        await replica.to_the_end(self._delete(replica))

    async def _delete(self, replica: Replica) -> None:
        await replica.retire_for_good()
        try:
            grave = await in_thread(bury, self.path / replica.name)
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
        if name in self.devices:
            raise BlockferryError(
                Code.UNSUPPORTED,
                f"cannot adopt {seed} as {name}",
                cause=f"{name} is on {self.devices[name].uri}, whose own content the first sync compares with anyway",
                next=f"copy {seed} onto the device and sync to it; nothing was changed",
                volume=name,
            )
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
        await asyncio.gather(*self._making.values(), return_exceptions=True)
        for replica in self._replicas.values():
            await replica.close()
        self._unlock()

    def _unlock(self) -> None:
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    # --- a pool that was restored ---------------------------------------------------------------------------------

    def is_behind(self, replica: Replica) -> bool:
        """Whether a replica has not been synced since the pool was restored."""
        return self._identity.is_behind(replica.name, replica.store.generations.last_number)

    @property
    def restored_at_us(self) -> int:
        """When it was found that the pool had been restored, in microseconds since 1970; 0 for never."""
        return self._identity.restored_at_us


async def open_pools(pools: Sequence[Pool]) -> None:
    """Lock the directories of pools, finish what was to be committed in several of their replicas together, and open
    the replicas. All of them, or none; raises as `Pool.open`."""
    try:
        for pool in pools:
            with _as_a_pool(pool):
                await in_thread(pool._claim)
        places = [(pool.uuid, pool.path) for pool in pools]
        try:
            doubts = await in_thread(groups.settle, places)
        except OSError as error:
            raise from_os_error(error, "cannot finish what several volumes were to commit together") from error
        for pool in pools:
            with _as_a_pool(pool):
                await in_thread(pool._load, doubts[pool.path])
    except BaseException:
        for pool in pools:
            await pool.close()
        raise
    for pool in pools:
        for replica in pool.list():
            replica.settle_soon()


@contextlib.contextmanager
def _as_a_pool(pool: Pool) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, f"cannot use {pool.path} as a pool") from error


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
