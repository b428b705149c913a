"""The record by which several replicas get their next generation together: all of them or none. Blocking.

    POOL/.group-ID     what a commit makes of each of its members, in every pool that has one of them; in the home pool
                       this one fsynced file is the commit (invariant 3)

First the members' work is sealed under their commit ids. Then the file is written to the other pools (a pool that is
opened without the home pool must not take its members' work for work), and then to the home pool: it is committed. Each
member's own log gets its record after that, and when all have theirs the files go. A server that dies in between leaves
them, and `settle` writes what is missing when the next one starts, before any replica is opened.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
from blockferry.common import disk
from blockferry.common.durable import remove_durably, write_atomic
from blockferry.common.errors import BlockferryError, Code
from blockferry.server.generations import Generations, Point
from blockferry.server.store import LOG, replica_uuid

log = structlog.get_logger("blockferry.groups")

PREFIX = ".group-"
FORMAT = 1
"""A newer server reads older ones. An older server that meets a newer one opens none of the pool's replicas."""


class Member(msgspec.Struct, frozen=True):
    """What becomes of one replica: hexadecimal ids, bytes, microseconds since 1970."""

    pool: str
    volume: str
    replica: str
    number: int
    commit_id: str
    size: int
    at_us: int

    @property
    def point(self) -> Point:
        """The generation it gets."""
        return Point(self.number, bytes.fromhex(self.commit_id), self.size, self.at_us)


class _Group(msgspec.Struct, frozen=True):
    format: int
    home: str
    """UUID of the pool whose file is the commit."""
    home_path: str
    """Where that pool was, for people."""
    members: list[Member]


@dataclass(frozen=True)
class Record:
    """One that is written; `forget` it once every member's log has its record."""

    home: Path
    others: tuple[Path, ...]

    def forget(self) -> None:
        """Remove the files. One that comes back says nothing that the logs do not say."""
        disk.unlink(self.home)
        disk.crash_point("group-forgotten")
        for path in self.others:
            disk.unlink(path)


def record(members: Sequence[Member], pools: Mapping[str, Path]) -> Record:
    """Write down what becomes of the members: when this returns it is so. Where it raises OSError nothing is. `pools`
    are their pools' directories, by UUID; the first member's is home."""
    home = members[0].pool
    name = f"{PREFIX}{uuid.uuid4().hex}"
    data = msgspec.json.encode(_Group(FORMAT, home, _text(pools[home]), list(members)))
    made = Record(pools[home] / name, tuple(path / name for pool, path in pools.items() if pool != home))
    try:
        for path in made.others:
            write_atomic(path, data)
            disk.crash_point("group-announced")
        write_atomic(made.home, data)
    except OSError:
        # It may be there already, and its name not durable. Nobody has been told anything, so it did not happen.
        remove_durably(made.home)
        for path in made.others:
            disk.unlink(path)
        raise
    disk.crash_point("group-recorded")
    return made


def settle(pools: Iterable[tuple[str, Path]]) -> dict[Path, dict[str, str]]:
    """Finish what a server has left in the (UUID, directory) pools that are about to be opened. Returns for each
    directory the replicas of which nobody can say what became of their last commit, and why."""
    places = list(pools)
    served = {own for own, _ in places}
    doubts: dict[Path, dict[str, str]] = {path: {} for _, path in places}
    found = [(own, file, _read(file)) for own, path in places for file in _files(path)]
    decided = {file.name for own, file, group in found if _is_home(own, group)}
    for own, file, group in found:
        if _is_home(own, group):
            if not _finish(group, file.parent, dict(places)):
                continue
        elif file.name not in decided and group.home not in served:
            doubts[file.parent] |= _doubts(own, file.parent, group)
            continue
        # Either the logs have it all, or it never happened.
        disk.unlink(file)
        disk.crash_point("start-group-settled")
    return doubts


def _files(pool: Path) -> list[Path]:
    for path in pool.glob(PREFIX + "*.tmp"):
        disk.unlink(path)
    return sorted(pool.glob(PREFIX + "*"))


def _read(path: Path) -> _Group:
    try:
        group = msgspec.json.decode(path.read_bytes(), type=_Group)
        for member in group.members:
            bytes.fromhex(member.commit_id)
    except (ValueError, msgspec.MsgspecError) as error:
        raise _unusable(Code.CORRUPT_STATE, path, str(error)) from error
    if group.format > FORMAT or not group.members:
        raise _unusable(Code.UNSUPPORTED, path, f"it has format {group.format}, this server knows {FORMAT}")
    return group


def _unusable(code: Code, path: Path, cause: str) -> BlockferryError:
    """Without it nobody knows which replicas are half-way through a commit: none is opened."""
    return BlockferryError(
        code,
        f"{path} cannot be read",
        cause=cause,
        next="run the newer server if there was one; else move the file away: volumes that were committed together in "
        "that moment may then be at different generations",
    )


def _is_home(own: str, group: _Group) -> bool:
    return own == group.home or len({member.pool for member in group.members}) == 1


def _finish(group: _Group, home: Path, pools: Mapping[str, Path]) -> bool:
    """Have the members' logs say what was committed. Whether nothing is left to be done."""
    alone = len({member.pool for member in group.members}) == 1
    done = [_redo(home if alone else pools.get(member.pool), member) for member in group.members]
    return all(done)


def _redo(pool: Path | None, member: Member) -> bool:
    if pool is None:
        return False
    directory = pool / member.volume
    try:
        if replica_uuid(directory) != member.replica:
            # It was deleted since.
            return True
        generations = Generations(directory / LOG)
    except (OSError, BlockferryError) as error:
        log.error("cannot finish a commit", volume=member.volume, error=str(error))
        return False
    try:
        if generations.committed(member.point.commit_id) is None:
            if member.number != generations.last_number + 1:
                # An older server has gone on without knowing of this.
                log.error("a commit of several volumes is lost for one", volume=member.volume, number=member.number)
                return True
            generations.commit(member.point, demotes=False)
            disk.crash_point("start-group-redone")
    finally:
        generations.close()
    return True


def _doubts(own: str, pool: Path, group: _Group) -> dict[str, str]:
    """Those of a pool's members that may or may not have got their generation."""
    found = {}
    for member in group.members:
        directory = pool / member.volume
        if member.pool != own or replica_uuid(directory) != member.replica:
            continue
        generations = Generations(directory / LOG)
        try:
            if generations.committed(member.point.commit_id) is None:
                found[member.volume] = f"whether its last commit happened is known in the pool at {group.home_path}"
        finally:
            generations.close()
    return found


def _text(path: Path) -> str:
    """A path may hold bytes that are no UTF-8; JSON may not."""
    return str(path).encode("utf-8", "backslashreplace").decode()
