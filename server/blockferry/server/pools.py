"""All pools of a server, as if they were one: a volume's name is unique over all of them."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blockferry.common.address import check_volume_name, is_volume_name
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import DEFAULT, Retention
from blockferry.server.devices import DeviceSpec, check_distinct_devices
from blockferry.server.pool import Pool, open_pools
from blockferry.server.replica import Replica
from blockferry.server.space import UNLIMITED, Limits

DEFAULT_NAME = "main"
"""The pool of a server that has only one and gives it no name."""


@dataclass(frozen=True)
class PoolSpec:
    """A pool that is to be opened, or a directory of journals of devices: its path, the recovery points kept there
    whatever a source asks for, and what its administrator allows."""

    name: str
    path: Path
    floor: Retention = DEFAULT
    limits: Limits = UNLIMITED
    devices: tuple[DeviceSpec, ...] = ()
    """Those whose journals lie in it."""
    only_devices: bool = False
    """It is named for these alone, and no other replica is made in it."""


def parse_pool(text: str) -> PoolSpec:
    """`[NAME=]DIR`; what stands before the first `=` is a name unless it has a slash. Raises INVALID_ARGUMENT."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name:
        name, path = DEFAULT_NAME, text
    if not path:
        raise BlockferryError(
            Code.INVALID_ARGUMENT, f"{text!r} names no directory", next="write --pool DIR or --pool NAME=DIR"
        )
    return PoolSpec(check_volume_name(name), Path(path).absolute())


def with_devices(pools: Sequence[PoolSpec], devices: Sequence[DeviceSpec]) -> list[PoolSpec]:
    """The pools, and behind them a pool for each further directory that holds journals, called as the directory is."""
    check_distinct_devices(devices)
    specs = list(pools)
    for device in devices:
        for index, spec in enumerate(specs):
            if _same(spec.path, device.journal):
                specs[index] = replace(spec, devices=(*spec.devices, device))
                break
        else:
            name = _free_name(device.journal, specs)
            specs.append(PoolSpec(name, device.journal, devices=(device,), only_devices=True))
    return specs


def _free_name(path: Path, specs: Sequence[PoolSpec]) -> str:
    wanted = path.name if is_volume_name(path.name) else "journal"
    taken = {spec.name for spec in specs}
    names = itertools.chain([wanted], (f"{wanted[:120]}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def check_distinct(specs: Sequence[PoolSpec]) -> None:
    """Raise INVALID_ARGUMENT unless all names differ and no directory is or contains another."""
    for index, later in enumerate(specs):
        for earlier in specs[:index]:
            if earlier.name == later.name:
                raise _refuse(
                    earlier,
                    later,
                    f"both are called {later.name}",
                    "give each a name of its own: --pool NAME=DIR",
                )
            if _same(earlier.path, later.path):
                raise _refuse(earlier, later, "they are the same directory", "name each directory once")
            for outer, inner in ((earlier, later), (later, earlier)):
                if any(_same(outer.path, parent) for parent in Path(os.path.realpath(inner.path)).parents):
                    raise _refuse(
                        earlier, later, f"{inner.path} is inside {outer.path}", "use directories beside each other"
                    )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one directory, however they are written or mounted."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        # One that does not exist is refused when it is opened.
        return os.path.realpath(one) == os.path.realpath(other)


def _refuse(one: PoolSpec, other: PoolSpec, cause: str, next_step: str) -> BlockferryError:
    return BlockferryError(
        Code.INVALID_ARGUMENT,
        f"cannot use {one.path} and {other.path} as pools of one server",
        cause=cause,
        next=next_step,
    )


class Pools:
    """One or more open pools. New replicas go to the first unless another is named."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        """Raises IN_USE where two pools hold a replica of the same name."""
        self._pools = list(pools)
        places: dict[str, Path] = {}
        for pool in self._pools:
            for name in pool.names:
                if name in places:
                    raise BlockferryError(
                        Code.IN_USE,
                        f"two pools hold a replica called {name}",
                        cause=f"{places[name]} and {pool.path / name}",
                        next="move one of the two directories out of its pool, or serve the pools with two servers",
                        volume=name,
                    )
                places[name] = pool.path / name

    @classmethod
    async def open(cls, specs: Sequence[PoolSpec], lease: float) -> Pools:
        """Open every pool, or none; `lease` in seconds. Raises what `Pool.open` and `check_distinct` raise, and IN_USE
        where two pools hold a replica of the same name."""
        check_distinct(specs)
        opened = [
            Pool(
                spec.name,
                spec.path,
                lease,
                spec.floor,
                spec.limits,
                devices=spec.devices,
                only_devices=spec.only_devices,
            )
            for spec in specs
        ]
        await open_pools(opened)
        try:
            return cls(opened)
        except BaseException:
            for pool in opened:
                await pool.close()
            raise

    def __iter__(self) -> Iterator[Pool]:
        """The pools, in the order they were named."""
        return iter(self._pools)

    def list(self) -> list[Replica]:
        """All replicas, by name."""
        return sorted((replica for pool in self._pools for replica in pool.list()), key=lambda one: one.name)

    def get(self, name: str) -> Replica:
        """The replica with this name, or NOT_FOUND."""
        return self._home(name).get(name)

    def home(self, replica: Replica) -> Pool:
        """The pool a replica is in."""
        return self._home(replica.name)

    async def get_or_create(self, name: str, region_size: int, pool: str = "", size: int = 0) -> Replica:
        """The replica with this name, made if need be for a source of `size` bytes, and in the pool called `pool`
        (empty: the first). Raises NOT_FOUND where there is no such pool, and INVALID_ARGUMENT where the replica is in
        another one."""
        wanted = self._named(pool) if pool else None
        home = self._home(name, wanted)
        if wanted not in (None, home):
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                f"{name} is not in pool {pool}",
                cause=f"it exists in pool {home.name}",
                next=f"leave --pool out, or say --pool {home.name}",
                volume=name,
                expected=home.name,
                found=pool,
            )
        return await home.get_or_create(name, region_size, size)

    async def delete(self, replica: Replica) -> None:
        """Remove a replica and all its recovery points. Raises IN_USE or WRONG_STATE."""
        await self.home(replica).delete(replica)

    async def adopt(self, name: str, seed: str, region_size: int, pool: str = "") -> tuple[Replica, int]:
        """Make a file in the `.seeds` directory of a replica's pool the start of its first sync; the replica, which is
        made if need be as by `get_or_create`, and its size in bytes."""
        wanted = self._named(pool) if pool else None
        return await self._home(name, wanted).adopt(name, seed, region_size)

    def _home(self, name: str, otherwise: Pool | None = None) -> Pool:
        """The pool that holds a name or is about to, else `otherwise`, else the first."""
        check_volume_name(name)
        return next((pool for pool in self._pools if pool.holds(name)), otherwise or self._pools[0])

    def _named(self, name: str) -> Pool:
        for pool in self._pools:
            if pool.name == name:
                return pool
        raise BlockferryError(
            Code.NOT_FOUND,
            f"there is no pool {check_volume_name(name)}",
            cause=f"this server has {', '.join(pool.name for pool in self._pools)}",
            next="list what there is with blockferry pool list",
        )

    def find_session(self, session_id: str) -> Replica | None:
        """The replica with this open session."""
        found = (pool.find_session(session_id) for pool in self._pools)
        return next((replica for replica in found if replica is not None), None)

    def owner_of(self, session_id: str) -> tuple[str, str | None] | None:
        """Volume and owner of a session; no owner where it is over, None where it is unknown."""
        replica = self.find_session(session_id)
        if replica is not None and replica.session is not None:
            return replica.name, replica.session.owner
        last = (one for one in self.list() if session_id and one.store.session.session_id == session_id)
        return next(((one.name, None) for one in last), None)

    def held_sessions(self) -> dict[str, str]:
        """The ids of the sessions whose lease runs, by volume."""
        return {one.name: one.session.session_id for one in self.list() if one.session and one.lease_left > 0}

    async def close(self) -> None:
        """End all sessions and unlock the directories."""
        await asyncio.gather(*(pool.close() for pool in self._pools))
