"""A commit, of one session or of several: all of them happen, or none.

Invariant 3: one fsynced record is the commit. For one session it is the record in its replica's log; for several a file
beside the replicas (groups.py), which the logs then follow. Nobody uses any of the replicas meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.common.volumes import in_thread
from blockferry.server import groups, identity
from blockferry.server.generations import Point
from blockferry.server.replica import Replica, as_ours
from blockferry.server.session import Event, State, transition
from blockferry.server.writer import Session
from blockferry.v1 import replication_pb2 as pb

log = structlog.get_logger("blockferry.commits")


@dataclass(frozen=True)
class Asked:
    """A session whose content is to become the newest generation of its replica. `pool` is the UUID of the pool."""

    replica: Replica
    ref: pb.SessionRef
    commit_id: bytes
    keep: Retention | None = None
    pool: str = ""


@dataclass
class _Member:
    """One that takes part."""

    asked: Asked
    session: Session
    after: State

    @property
    def replica(self) -> Replica:
        return self.asked.replica


async def commit(asked: Sequence[Asked]) -> list[Point]:
    """Make what each session holds the newest generation. Idempotent by commit ids. Raises INVALID_ARGUMENT where some
    of them were committed before and others not, and whatever keeps a member from being committed."""
    if len({one.replica.name for one in asked}) != len(asked) or not asked:
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            "cannot commit these sessions together",
            cause="a volume is named twice" if asked else "none is named",
            next="name each volume once; nothing was changed",
        )
    points = await asked[0].replica.to_the_end(_commit(asked))
    for one in asked:
        one.replica.complete_soon()
    return points


async def _commit(asked: Sequence[Asked]) -> list[Point]:
    began = time.monotonic()
    async with _alone(asked):
        for one in asked:
            await one.replica.settle_owed()
        done = [one.replica.store.generations.committed(one.commit_id) for one in asked]
        if any(done):
            return _all_of(asked, done)
        members = [
            _Member(one, one.replica.checked(one.ref), transition(one.replica.name, one.replica.state, Event.COMMIT))
            for one in asked
        ]
        record = None
        try:
            points = await _seal(members)
            if len(members) > 1:
                record = await _record(members, points)
            else:
                await _publish(members[0], points[0])
        except (OSError, BlockferryError) as error:
            raise await _give_up(members, error) from error
        if record is not None:
            await _publish_all(members, points)
            await in_thread(record.forget)
        for member in members:
            await member.replica.end_session()
            member.replica.state = member.after
            member.replica.tally.commits += 1
            member.replica.tally.commit_seconds += time.monotonic() - began
            await member.replica.points.retire()
        crash_point("commit-unanswered")
        return points


@contextlib.asynccontextmanager
async def _alone(asked: Sequence[Asked]) -> AsyncIterator[None]:
    """With every gate closed; always in the same order, so that two that ask never wait for each other."""
    async with contextlib.AsyncExitStack() as gates:
        for one in sorted(asked, key=lambda one: one.replica.name):
            await gates.enter_async_context(one.replica.gate.closed())
        yield


def _all_of(asked: Sequence[Asked], done: Sequence[Point | None]) -> list[Point]:
    points = [point for point in done if point is not None]
    if len(points) < len(asked):
        missing = next(one.replica.name for one, point in zip(asked, done, strict=True) if point is None)
        raise BlockferryError(
            Code.INVALID_ARGUMENT,
            "cannot commit these sessions together",
            cause=f"some of these commit ids were committed before, and that of {missing} was not",
            next="mint new commit ids; nothing was changed",
            volume=missing,
        )
    return points


# --- before the record ------------------------------------------------------------------------------------------------


async def _seal(members: Sequence[_Member]) -> list[Point]:
    """Make all that the record will vouch for durable (invariant 5), side by side; the failure of one is raised when
    all are done."""
    sealed = await asyncio.gather(*map(_seal_one, members), return_exceptions=True)
    for member, outcome in zip(members, sealed, strict=True):
        if isinstance(outcome, OSError | BlockferryError):
            # Nothing about the session can be believed.
            member.session.failed = as_ours(outcome, f"cannot commit {member.replica.name}")
    for outcome in sealed:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in sealed if isinstance(outcome, Point)]


async def _seal_one(member: _Member) -> Point:
    store, session = member.replica.store, member.session
    await session.volume.flush()
    crash_point("commit-flushed")
    if member.asked.keep is not None:
        await in_thread(store.generations.set_keep, member.asked.keep)
        crash_point("commit-rules-kept")
    return await store.seal(session.volume, member.asked.commit_id, session.geometry.size, session.digests)


async def _record(members: Sequence[_Member], points: Sequence[Point]) -> groups.Record:
    pools: dict[str, Path] = {}
    for member in members:
        path = member.replica.store.directory.parent
        if pools.setdefault(member.asked.pool, path) != path:
            raise BlockferryError(
                Code.UNSUPPORTED,
                "cannot commit these sessions together",
                cause=f"{path} is a copy of the pool at {pools[member.asked.pool]}",
                next=f"stop the server, and remove {identity.NAME} from the copy: it becomes a pool of its own",
            )
    records = [
        groups.Member(
            member.asked.pool,
            member.replica.name,
            member.replica.store.identity.uuid,
            point.number,
            point.commit_id.hex(),
            point.size,
            point.committed_at_us,
        )
        for member, point in zip(members, points, strict=True)
    ]
    crash_point("group-sealed")
    return await in_thread(groups.record, records, pools)


async def _give_up(members: Sequence[_Member], error: OSError | BlockferryError) -> BlockferryError:
    """Nothing was committed: all sessions end, and what the disk says is believed. Returns what to tell the client."""
    if len(members) == 1:
        members[0].session.failed = members[0].session.failed or as_ours(
            error, f"cannot commit {members[0].replica.name}"
        )
    for member in members:
        replica, failed = member.replica, member.session.failed
        await replica.end_session(discard=False)
        await replica.believe_the_disk()
        if failed is not None:
            await replica.store.discard_work()
            failed.volume = replica.name
    failures = [member.session.failed for member in members if member.session.failed is not None]
    return failures[0] if failures else as_ours(error, "cannot commit these sessions together")


# --- the record is written --------------------------------------------------------------------------------------------


async def _publish(member: _Member, point: Point) -> None:
    await member.replica.store.publish(point)


async def _publish_all(members: Sequence[_Member], points: Sequence[Point]) -> None:
    """Have the logs follow the record of the group. One whose log does not take it stays out of use until it does."""
    stuck: list[_Member] = []
    for member, point in zip(members, points, strict=True):
        try:
            await _publish(member, point)
        except (OSError, BlockferryError) as error:
            log.error("a commit is not in its log yet", volume=member.replica.name, error=str(error))
            member.replica.store.owed = point
            await member.replica.end_session(discard=False)
            await member.replica.believe_the_disk()
            if member.replica.store.owed is not None:
                stuck.append(member)
        crash_point("group-published")
    if stuck:
        for member in members:
            await member.replica.end_session(discard=False)
            member.replica.state = member.replica.state_at_rest()
        raise stuck[0].replica.owed_error()
