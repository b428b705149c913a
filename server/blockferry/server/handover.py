"""Handing a replica over for use, taking it back, and beginning with an image that was there before.

    promote   sessions are ended and refused; a recovery point becomes a file of its own, to boot or mount
    demote    the file is dropped, or becomes the newest generation; syncs go on
    adopt     an image brought by other means becomes the work of a first sync, which then compares instead of sending

Each leaves the recovery points whole, except on devices: there the device itself is handed out and taken back, and it
is the one point that is left. Promotion and demotion mint commit ids, so that nothing which knew the replica
before takes its content for granted.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from blockferry.common import disk, linux
from blockferry.common.durable import rename_durably
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.volumes import in_thread
from blockferry.server.generations import Point, Promotion
from blockferry.server.replica import Replica, as_ours
from blockferry.server.session import Event, State, transition

log = structlog.get_logger("blockferry.handover")

COMMIT_ID_SIZE = 16

Progress = Callable[[int, int], None]
"""Told of (bytes done, bytes in all)."""


# --- promote ----------------------------------------------------------------------------------------------------


async def promote(replica: Replica, number: int, progress: Progress) -> Promotion:
    """Hand out a recovery point (0: the newest) as `replica.store.content.promoted`. Asking again for the one that is
    promoted answers the same. Raises NOT_FOUND, WRONG_STATE, OUT_OF_SPACE."""
    return await replica.to_the_end(_promote(replica, number, progress))


async def _promote(replica: Replica, number: int, progress: Progress) -> Promotion:
    store = replica.store
    async with replica.gate.closed():
        replica.refuse_if_gone()
        point = replica.points.resolve(number)
        done = store.generations.promoted
        if done is not None and done.number == point.number:
            return done
        _refuse_unfinished(replica, "promote")
        state = transition(replica.name, replica.state, Event.PROMOTE)
        _refuse_readers(replica)
        await _refuse_without_room(replica, point)
        await replica.end_session()
        replica.state = replica.state_at_rest()
        await store.discard_work()
        # From here on sessions are refused, and no commit drops a point.
        replica.state = state
    target = store.content.promoted
    temporary = target.with_suffix(".tmp")
    try:
        if store.content.in_place:
            return await _give_away(replica, point)
        await in_thread(disk.unlink, temporary)
        await store.content.hand_out(point, temporary, progress)
        await in_thread(_make_durable, temporary, target)
        promotion = Promotion(point.number, secrets.token_bytes(COMMIT_ID_SIZE), time.time_ns() // 1000)
        await in_thread(store.generations.promote, promotion)
    except (OSError, BlockferryError) as error:
        async with replica.gate.closed():
            await in_thread(disk.unlink, temporary)
            await replica.believe_the_disk()
        ours = as_ours(error, f"cannot promote {replica.name}")
        ours.volume = replica.name
        raise ours from error
    disk.crash_point("promote-recorded")
    return promotion


async def _give_away(replica: Replica, point: Point) -> Promotion:
    """Bring the device to what a point holds, and hand it out."""
    store = replica.store
    await replica.complete()
    if point != store.generations.newest:
        await store.rewind(point)
        await replica.complete()
    promotion = Promotion(point.number, secrets.token_bytes(COMMIT_ID_SIZE), time.time_ns() // 1000, in_place=True)
    await store.give_away(promotion)
    return promotion


def _refuse_readers(replica: Replica) -> None:
    """What is handed out in place takes all points with it."""
    if replica.store.content.in_place and replica.points.in_use:
        raise BlockferryError(
            Code.IN_USE,
            f"cannot promote {replica.name}",
            cause="a recovery point of it is being read, and promoting a device gives them up",
            next="wait until the verify, plan or sync that reads it is over",
            volume=replica.name,
        )


def _refuse_unfinished(replica: Replica, verb: str) -> None:
    """While a point is copied the replica is promoted already, and nothing is handed out yet."""
    if replica.state is State.PROMOTED and replica.store.generations.promoted is None:
        raise BlockferryError(
            Code.WRONG_STATE,
            f"cannot {verb} {replica.name}",
            cause="its promotion has not finished",
            next="wait until it has: blockferry replica show says so",
            volume=replica.name,
        )


def _make_durable(temporary: Path, target: Path) -> None:
    fd = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
    try:
        disk.fsync(fd)
    finally:
        os.close(fd)
    disk.crash_point("promote-image-flushed")
    rename_durably(temporary, target)
    disk.crash_point("promote-image-made")


async def _refuse_without_room(replica: Replica, point: Point) -> None:
    """Where a point can only be copied, look for the room before anything is ended."""
    content = replica.store.content
    try:
        needed = await content.room_to_hand_out(point)
    except BlockferryError as error:
        error.volume = replica.name
        raise
    free = (await in_thread(shutil.disk_usage, content.directory)).free
    if needed > free:
        raise BlockferryError(
            Code.OUT_OF_SPACE,
            f"cannot promote {replica.name}",
            cause=f"its generation {point.number} has to be copied: {needed} bytes, and {free} are free",
            next="free space in the pool, or read it from elsewhere as a volume; nothing was changed",
            volume=replica.name,
        )


# --- demote -----------------------------------------------------------------------------------------------------


async def demote(replica: Replica, *, keep_changes: bool) -> Point:
    """Take a promoted replica back. Its newest generation is a new one afterwards: what was promoted and changed, or
    what was the newest before. Raises WRONG_STATE, IN_USE, SIZE_MISMATCH, OUT_OF_SPACE."""
    return await replica.to_the_end(_demote(replica, keep_changes))


async def _demote(replica: Replica, keep_changes: bool) -> Point:
    async with replica.gate.closed():
        replica.refuse_if_gone()
        state = transition(replica.name, replica.state, Event.DEMOTE)
        _refuse_unfinished(replica, "demote")
        store, image = replica.store, replica.store.content.promoted
        newest = replica.points.resolve(0)
        if store.content.in_place:
            return await _take_back_in_place(replica, state, keep_changes)
        await in_thread(_refuse_in_use, replica.name, image)
        size = newest.size
        try:
            # Work is read over the image alone: what the last commit has put off comes first.
            await replica.complete()
            # What an attempt before this one has left must not become part of anything.
            await store.discard_work()
            if keep_changes:
                size = await in_thread(_checked_size, replica.name, image, newest.size)
                await store.content.take_back(image)
                disk.crash_point("demote-taken-back")
            work, _, digests = await store.begin_work(size, "")
            try:
                await work.flush()
                point = await store.commit(work, secrets.token_bytes(COMMIT_ID_SIZE), size, digests, demotes=True)
            finally:
                await store.content.end(work)
        except (OSError, BlockferryError) as error:
            ours = as_ours(error, f"cannot demote {replica.name}")
            ours.volume = replica.name
            await replica.believe_the_disk()
            # It may be half of what it was to be, and its space is needed.
            await store.discard_work()
            raise ours from error
        replica.state = state
        disk.crash_point("demote-recorded")
        try:
            await in_thread(disk.unlink, image)
        except OSError as error:
            # It is demoted all the same. What is left goes with the next start.
            log.error("cannot remove what was promoted", volume=replica.name, error=str(error))
        await replica.points.retire()
    replica.complete_soon()
    return point


async def _take_back_in_place(replica: Replica, state: State, keep_changes: bool) -> Point:
    store = replica.store
    if not keep_changes:
        raise BlockferryError(
            Code.UNSUPPORTED,
            f"cannot demote {replica.name} without its changes",
            cause=f"{store.content.handed_out} itself was handed out: what it held before is nowhere else",
            next="demote it with --keep-changes, and let the next sync overwrite what differs; nothing was changed",
            volume=replica.name,
        )
    try:
        point = await store.take_back_in_place(secrets.token_bytes(COMMIT_ID_SIZE))
    except (OSError, BlockferryError) as error:
        ours = as_ours(error, f"cannot demote {replica.name}")
        ours.volume = replica.name
        await replica.believe_the_disk()
        raise ours from error
    replica.state = state
    disk.crash_point("demote-recorded")
    return point


def _refuse_in_use(name: str, image: Path) -> None:
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        users = linux.users_of(image, fd)
    finally:
        os.close(fd)
    if users:
        raise BlockferryError(
            Code.IN_USE,
            f"cannot demote {name}",
            cause=f"what was promoted is in use: {', '.join(users)}",
            next="unmount it or stop what uses it; nothing was changed",
            volume=name,
        )


def _checked_size(name: str, image: Path, least: int) -> int:
    """The size of the promoted image."""
    if not image.exists():
        raise BlockferryError(
            Code.NOT_FOUND,
            f"cannot demote {name} with its changes",
            cause=f"{image} is gone",
            next="put it back, or demote with --discard to go on from the newest generation",
            volume=name,
        )
    size = image.stat().st_size
    if size < least:
        raise BlockferryError(
            Code.SIZE_MISMATCH,
            f"cannot demote {name} with its changes",
            cause=f"what was promoted has {size} bytes now, and the newest generation {least}: a replica never shrinks",
            next="give it its size back, or demote with --discard",
            volume=name,
            expected=str(least),
            found=str(size),
        )
    return size


# --- adopt ------------------------------------------------------------------------------------------------------


async def adopt(replica: Replica, seed: Path, region_size: int) -> int:
    """Make an image that lies in the pool the work of the replica's first sync; its size in bytes. The replica must
    have nothing. Raises REGION_SIZE_MISMATCH, WRONG_STATE, and what `check_seed` does."""
    return await replica.to_the_end(_adopt(replica, seed, region_size))


async def _adopt(replica: Replica, seed: Path, region_size: int) -> int:
    async with replica.gate.closed():
        replica.refuse_if_gone()
        replica.refuse_other_region_size(region_size)
        store = replica.store
        if replica.session is not None or store.generations.newest is not None or store.content.has_work():
            raise BlockferryError(
                Code.WRONG_STATE,
                f"cannot adopt {seed.name} as {replica.name}",
                cause=f"{replica.name} holds data already: it is {replica.state.value}",
                next="adopt it under another name, or delete the replica first; nothing was changed",
                volume=replica.name,
            )
        size = await in_thread(check_seed, replica.name, seed)
        try:
            await store.adopt(seed)
        except OSError as error:
            await replica.believe_the_disk()
            raise as_ours(error, f"cannot adopt {seed.name} as {replica.name}") from error
        disk.crash_point("adopt-moved")
        replica.state = State.SYNCING
        return size


def check_seed(name: str, seed: Path) -> int:
    """Bytes of an image that may be adopted. Raises NOT_FOUND, UNSUPPORTED, UNREADABLE or IN_USE. Blocking."""
    what = f"cannot adopt {seed.name} as {name}"
    try:
        info = os.lstat(seed)
    except FileNotFoundError as error:
        raise BlockferryError(
            Code.NOT_FOUND,
            what,
            cause=f"there is no such file in {seed.parent}",
            next="put the image there, on the server, and name the file alone",
            volume=name,
        ) from error
    if not stat.S_ISREG(info.st_mode) or info.st_size == 0 or info.st_nlink != 1:
        kind = "is empty" if stat.S_ISREG(info.st_mode) and not info.st_size else "is not a file of its own"
        raise BlockferryError(
            Code.UNSUPPORTED, what, cause=f"it {kind}", next="put a raw image there, not a link", volume=name
        )
    if info.st_dev != os.stat(seed.parent.parent).st_dev:
        raise BlockferryError(
            Code.UNSUPPORTED,
            what,
            cause="it lies on another file system than the pool",
            next=f"make {seed.parent} a directory of the pool, and copy it there",
            volume=name,
        )
    try:
        # Afterwards it is ours to write.
        os.close(os.open(seed, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
        fd = os.open(seed, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, what, volume=name) from error
    try:
        users = linux.users_of(seed, fd)
    finally:
        os.close(fd)
    if users:
        raise BlockferryError(
            Code.IN_USE,
            what,
            cause=f"it is in use: {', '.join(users)}",
            next="wait until it is written, or stop what uses it",
            volume=name,
        )
    return info.st_size
