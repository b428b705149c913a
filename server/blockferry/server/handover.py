"""Handing a replica over for use, taking it back, and beginning with an image that was there before.

    promote   sessions are ended and refused; a recovery point becomes a file of its own, to boot or mount
    demote    the file is dropped, or becomes the newest generation; syncs go on
    adopt     an image brought by other means becomes the work of a first sync, which then compares instead of sending

Each leaves the recovery points whole. Promotion and demotion mint commit ids, so that nothing which knew the replica
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

from blockferry.common import disk, linux
from blockferry.common.durable import rename_durably
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.volumes import in_thread
from blockferry.server.generations import Point, Promotion
from blockferry.server.replica import Replica, as_ours
from blockferry.server.session import Event, State, transition

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
        done = store.generations.promoted
        if done is not None and done.number == (number or done.number):
            return done
        point = replica.points.resolve(number)
        state = transition(replica.name, replica.state, Event.PROMOTE)
        await _refuse_without_room(replica, point)
        await replica.end_session()
        await store.discard_work()
        # From here on sessions are refused, and no commit drops a point.
        replica.state = state
    target = store.content.promoted
    temporary = target.with_suffix(".tmp")
    try:
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
    needed = await content.room_to_hand_out(point)
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
        state = transition(replica.name, replica.state, Event.DEMOTE)
        store, image = replica.store, replica.store.content.promoted
        newest = store.generations.newest
        if store.generations.promoted is None or newest is None:
            raise BlockferryError(
                Code.WRONG_STATE,
                f"cannot demote {replica.name}",
                cause="its promotion has not finished",
                next="wait until it has",
                volume=replica.name,
            )
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
            await replica.believe_the_disk()
            ours = as_ours(error, f"cannot demote {replica.name}")
            ours.volume = replica.name
            raise ours from error
        replica.state = state
        disk.crash_point("demote-recorded")
        await in_thread(disk.unlink, image)
        await replica.points.retire()
    replica.complete_soon()
    return point


def _refuse_in_use(name: str, image: Path) -> None:
    if not image.exists():
        return
    users = [f"{device} (loop device)" for device in linux.loop_devices_over(image)] + linux.writers_of(image)
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


async def adopt(replica: Replica, seed: Path) -> int:
    """Make an image that lies in the pool the work of the replica's first sync; its size in bytes. The replica must
    have nothing. Raises NOT_FOUND, UNSUPPORTED, IN_USE, WRONG_STATE."""
    return await replica.to_the_end(_adopt(replica, seed))


async def _adopt(replica: Replica, seed: Path) -> int:
    async with replica.gate.closed():
        store = replica.store
        if replica.session is not None or store.generations.newest is not None or store.content.has_work():
            raise BlockferryError(
                Code.WRONG_STATE,
                f"cannot adopt {seed.name} as {replica.name}",
                cause=f"{replica.name} holds data already: it is {replica.state.value}",
                next="adopt it under another name, or delete the replica first; nothing was changed",
                volume=replica.name,
            )
        size = await in_thread(_checked_seed, replica.name, seed)
        try:
            await store.adopt(seed)
        except OSError as error:
            await replica.believe_the_disk()
            raise as_ours(error, f"cannot adopt {seed.name} as {replica.name}") from error
        replica.state = State.SYNCING
        return size


def _checked_seed(name: str, seed: Path) -> int:
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
    users = [f"{device} (loop device)" for device in linux.loop_devices_over(seed)] + linux.writers_of(seed)
    if users:
        raise BlockferryError(
            Code.IN_USE,
            what,
            cause=f"it is in use: {', '.join(users)}",
            next="wait until it is written, or stop what uses it",
            volume=name,
        )
    return info.st_size
