"""The snapshots of one policy: taken, kept as the base of the next replication, and removed; none is lost sight of.

    STATE/snapshots/POLICY.json    every snapshot that exists or may exist, and whether something is frozen

A record is durable before its snapshot is begun and goes after it is gone, so whatever a crash leaves is found again:

    taking ──▶ taken ──commit confirmed──▶ base ──a later one confirmed──▶ removing ──▶ (gone)
       └─────────┴──────────gave up─────────────────────────────────────────▲

The commit id is minted with the record, long before the commit is asked for. If nobody heard whether that happened,
the snapshot stays `taken` until a session tells which generation is the newest: `resolve`. Nothing is ever taken for
the base because it looks like one.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Literal

import msgspec
import structlog
from blockferry.client.commits import new_commit_id
from blockferry.client.hooks import finished, run_hook
from blockferry.client.methods import Clones, Commands, Method, path_of
from blockferry.client.tracking import Frozen, Stamp, Tracked, track
from blockferry.common.agent_config import Policy
from blockferry.common.disk import crash_point
from blockferry.common.durable import make_directories, write_atomic
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.units import human_bytes
from blockferry.common.volumes import Volume, in_thread, open_volume

log = structlog.get_logger("blockferry.snapshots")

FORMAT = 1
DIRECTORY = "snapshots"


class Record(msgspec.Struct, frozen=True):
    """One snapshot. `path` is a file or a URI, empty while it is not known; `seconds` is how long it took; `cycle` is
    the same for all that were taken together."""

    commit_id: str
    method: str
    source: str
    state: Literal["taking", "taken", "base", "removing"]
    made_at_us: int
    path: str = ""
    stamp: Stamp | None = None
    """Of a file: what it was when it was complete."""
    seconds: float = 0.0
    cycle: str = ""


class _Journal(msgspec.Struct, frozen=True):
    policy: str
    frozen: str = ""
    """The commit id for which the source was being frozen, until it is thawed."""
    snapshots: tuple[Record, ...] = ()
    format: int = FORMAT


class Snapshots:
    """Of one policy, by one process at a time. `warnings` are for people: what did not work, and hurts nobody yet."""

    def __init__(self, name: str, policy: Policy, state_directory: Path) -> None:
        self.name = name
        self.policy = policy
        self.warnings: list[str] = []
        self._path = state_directory / DIRECTORY / f"{name}.json"
        self._journal = self._read()
        self._method: Method | None = None
        if policy.snapshot == "reflink":
            self._method = Clones(name, policy)
        elif policy.snapshot == "command":
            self._method = Commands(name, policy)

    def _read(self) -> _Journal:
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_Journal)
        except FileNotFoundError:
            return _Journal(self.name)
        except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise BlockferryError(
                Code.CORRUPT_STATE,
                f"{self._path} cannot be read",
                cause=str(error),
                next="remove the snapshots of this policy and then this file; the next replication compares everything",
                volume=self.name,
            ) from error
        if found.format > FORMAT:
            raise BlockferryError(
                Code.UNSUPPORTED,
                f"{self._path} was written by a newer blockferry",
                cause=f"it has format {found.format}, this agent knows {FORMAT}",
                next="run the newer agent; nothing was changed",
                volume=self.name,
            )
        return found

    async def _write(self, journal: _Journal) -> None:
        try:
            await in_thread(make_directories, self._path.parent)
            await in_thread(write_atomic, self._path, msgspec.json.encode(journal))
        except OSError as error:
            raise from_os_error(error, f"cannot keep the snapshots of {self.name} in {self._path}") from error
        self._journal = journal

    async def _put(self, record: Record) -> Record:
        others = [one for one in self._journal.snapshots if one.commit_id != record.commit_id]
        await self._write(msgspec.structs.replace(self._journal, snapshots=(*others, record)))
        return record

    @property
    def records(self) -> tuple[Record, ...]:
        """Every snapshot that exists or may exist, oldest first."""
        return self._journal.snapshots

    @property
    def base(self) -> Record | None:
        """The snapshot that is known to be the replica's newest generation, as far as this agent knows."""
        return next((one for one in reversed(self.records) if one.state == "base"), None)

    # --- a crash --------------------------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Put right what the last process has left; to be called before every cycle. What is frozen is thawed, and what
        was on its way, or on its way out, is removed."""
        if self._journal.frozen:
            await self.thaw()
        for record in self.records:
            kept = record.state in ("taken", "base") and record.source == self.policy.source
            if not kept or record.method != self.policy.snapshot:
                await self._remove(record)
        if self._method is not None:
            known = {one.path for one in self.records}
            for path in await self._method.strays(known):
                log.warning("removed a snapshot that nobody knew of", volume=self.name, path=str(path))

    # --- freezing -------------------------------------------------------------------------------------------------

    async def freeze(self, commit_id: str) -> None:
        """Run the freeze hook. From the moment it is tried the source counts as frozen, and `thaw` must follow."""
        words = self.policy.hooks.freeze
        if words:
            await self._write(msgspec.structs.replace(self._journal, frozen=commit_id))
            crash_point("cycle-freezing")
            await run_hook("freeze", words, self._environment(commit_id), self.policy.hook_timeout, self.name)
            crash_point("cycle-frozen")

    async def thaw(self) -> None:
        """Run the thaw hook, once, if freezing was tried; also if nobody waits for it any more."""
        if self._journal.frozen:
            await finished(self._thaw())

    async def _thaw(self) -> None:
        words = self.policy.hooks.thaw
        if words:
            environment = self._environment(self._journal.frozen)
            await run_hook("thaw", words, environment, self.policy.hook_timeout, self.name)
            crash_point("cycle-thawed")
        await self._write(msgspec.structs.replace(self._journal, frozen=""))

    def _environment(self, commit_id: str, **more: str) -> dict[str, str]:
        """What a hook is told about what it acts on."""
        return {
            "BLOCKFERRY_POLICY": self.name,
            "BLOCKFERRY_GROUP": self.policy.group or "",
            "BLOCKFERRY_SOURCE": self.policy.source,
            "BLOCKFERRY_SNAPSHOT_ID": commit_id,
            "BLOCKFERRY_SNAPSHOT": "",
            **more,
        }

    # --- taking ---------------------------------------------------------------------------------------------------

    async def check_floor(self) -> None:
        """Have as much free as the policy says, if need be by giving up the base (invariant 9: a snapshot never fills
        the source's file system). Raises OUT_OF_SPACE where that is not enough."""
        if self._method is None or not self.is_low():
            return
        await self.give_up_all_but(None)
        if self.is_low():
            raise self.low()

    async def give_up_all_but(self, current: Record | None) -> None:
        """Remove what is kept of earlier replications: the next one compares everything."""
        for record in self.records:
            if current is None or record.commit_id != current.commit_id:
                self._warn(f"dropped the snapshot of the last replication: {self._low_words()}")
                await self._remove(record)

    def is_low(self) -> bool:
        """Whether less is free than the policy asks for. Blocking, for a moment."""
        place = self._method.place if self._method is not None else None
        if place is None or not self.policy.snapshot_floor:
            return False
        return free_bytes(place) < self.policy.snapshot_floor

    def low(self) -> BlockferryError:
        """The error for that."""
        return BlockferryError(
            Code.OUT_OF_SPACE,
            f"{self.name}: there is no room for a snapshot of {self.policy.source}",
            cause=self._low_words(),
            next="free some space there, or lower snapshot_floor",
            volume=self.name,
        )

    def _low_words(self) -> str:
        return f"less than snapshot_floor ({human_bytes(self.policy.snapshot_floor)}) is free on its file system"

    def unfinished(self) -> Record | None:
        """The snapshot of a first replication that was interrupted: it is gone on with, and what has arrived of it need
        not be read again. Later ones begin anew, since only what changed has to be looked at then."""
        taken = [one for one in self.records if one.state == "taken"]
        if len(taken) != 1 or self.base is not None or taken[0].stamp != _stamp_of(taken[0].path):
            return None
        return taken[0]

    async def take(self, commit_id: str, cycle: str) -> Record:
        """Take one. Nothing is left of it where it fails. Raises HOOK, UNSUPPORTED, OUT_OF_SPACE and the like."""
        method = self._method
        assert method is not None, "a source at rest has no snapshots"
        made_at_us = time.time_ns() // 1000
        path = method.path_for(commit_id)
        record = Record(commit_id, self.policy.snapshot, self.policy.source, "taking", made_at_us, path, cycle=cycle)
        await self._put(record)
        crash_point("cycle-snapshot-begun")
        began = time.monotonic()
        try:
            path = await method.make(record.path, self._environment(commit_id))
            seconds = round(time.monotonic() - began, 3)
            # A URI that the hook has printed is known only now.
            record = await self._put(msgspec.structs.replace(record, path=path, seconds=seconds))
            stamp = await in_thread(_stamp_of, path)
        except BaseException:
            await self._remove(record)
            raise
        record = await self._put(msgspec.structs.replace(record, state="taken", stamp=stamp))
        crash_point("cycle-snapshot-taken")
        return record

    async def open(self, record: Record) -> Volume:
        """A snapshot as a volume; the caller closes it."""
        volume = await open_volume(record.path)
        volume.snapshot_id = f"snapshot:{record.commit_id}"
        return volume

    async def tracked(self, new: Record) -> list[Tracked]:
        """What has changed since each snapshot that may be the replica's newest generation."""
        found = []
        if self.policy.tracks == "reflink" and new.stamp is not None:
            for base in self.records:
                if base.state in ("taken", "base") and base.commit_id != new.commit_id and base.stamp is not None:
                    before, now = path_of(base.path), path_of(new.path)
                    assert before is not None and now is not None
                    commit_id = bytes.fromhex(base.commit_id)
                    found.append(await track(commit_id, Frozen(before, base.stamp), Frozen(now, new.stamp)))
        return found

    # --- what becomes of them -------------------------------------------------------------------------------------

    async def resolve(self, newest_commit_id: bytes, current: Record) -> None:
        """A session tells what the replica's newest generation is: the snapshot with that commit id is the base, and
        all others but `current` are of no use."""
        for record in self.records:
            if record.commit_id == current.commit_id:
                continue
            if record.commit_id == newest_commit_id.hex():
                if record.state == "taken":
                    await self._put(msgspec.structs.replace(record, state="base"))
            else:
                await self._remove(record)

    async def confirmed(self, current: Record) -> None:
        """The commit of `current` happened: it is the base from here on, if one is kept, and older ones go."""
        crash_point("cycle-confirmed")
        if self.policy.tracks == "reflink" and current.stamp is not None and not self.is_low():
            await self._put(msgspec.structs.replace(current, state="base"))
            crash_point("cycle-base-kept")
        else:
            await self._remove(current)
        for record in self.records:
            if record.commit_id != current.commit_id:
                await self._remove(record)
        crash_point("cycle-older-removed")

    async def forsake(self, current: Record, *, keep: bool) -> None:
        """The replication of `current` failed. It is kept where its commit was asked for and may have happened, so that
        the next session tells, and where the next replication is to go on with it."""
        if not keep:
            await self._remove(current)

    async def _remove(self, record: Record) -> None:
        """Remove a snapshot and then its record. What cannot be removed now is tried again with the next cycle."""
        if record.state != "removing":
            record = await self._put(msgspec.structs.replace(record, state="removing"))
        crash_point("cycle-removing")
        method = Clones(self.name, self.policy) if record.method == "reflink" else Commands(self.name, self.policy)
        try:
            await method.unmake(record.path, self._environment(record.commit_id, BLOCKFERRY_SNAPSHOT=record.path))
        except BlockferryError as error:
            log.error("cannot remove a snapshot", volume=self.name, path=record.path, error=str(error))
            self._warn(f"cannot remove a snapshot: {error.line()}")
            return
        crash_point("cycle-removed")
        others = tuple(one for one in self.records if one.commit_id != record.commit_id)
        await self._write(msgspec.structs.replace(self._journal, snapshots=others))

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def mint() -> str:
    """The commit id of a snapshot that is about to be taken."""
    return new_commit_id()


def free_bytes(path: Path) -> int:
    """Bytes that are free for everybody where `path` is, or will be."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _stamp_of(path: str) -> Stamp | None:
    """What a snapshot is now, if it is a regular file."""
    file = path_of(path)
    if file is None or not file.is_file():
        return None
    with contextlib.suppress(OSError):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return Stamp.of(fd)
        finally:
            os.close(fd)
    return None
