"""Restore an archived snapshot, whole, to an image, a block device or an NBD export.

It is the plan of a sync with archive blocks for regions: what both sides prove zero is skipped, what only the target
holds is deallocated, what only the snapshot holds is fetched, and what both hold is compared by digest before it is
fetched. So a restore over an older copy fetches what differs, and one that was interrupted goes on by looking at what
is there, whatever a crash has left.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from blockferry.client.commits import default_state_directory
from blockferry.client.plan import Plan, decide
from blockferry.client.report import SCHEMA, Phase, Progress, Stopwatch
from blockferry.client.targets import Target
from blockferry.common import disk
from blockferry.common.archive.columns import Entry
from blockferry.common.archive.format import ARCHIVE_BLOCK
from blockferry.common.archive.reader import SnapshotVolume
from blockferry.common.archive.seal import Sealer
from blockferry.common.archive.walk import Damage
from blockferry.common.digests import Data, is_zero, nonzero_extents
from blockferry.common.durable import make_directories, remove_durably, write_atomic
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Provenance, runs_of, split_runs
from blockferry.common.volumes import in_thread
from pyroaring import BitMap

COMPARED = 32
"""Blocks whose content at the target is read and hashed in one go: 8 MiB."""
UNMAP_BLOCKS = 4096
"""Blocks deallocated by one call, so that very long holes still show progress: 1 GiB."""


@dataclass
class Damaged:
    """What of a snapshot cannot be read, and why: in bytes of the volume, by offset."""

    size: int
    causes: dict[tuple[int, int], str] = field(default_factory=dict)

    def add(self, error: BlockferryError, first: int, end: int) -> None:
        """Note the blocks from `first` up to `end`. Called from I/O threads, too."""
        offset = first * ARCHIVE_BLOCK
        length = min(end * ARCHIVE_BLOCK, self.size) - offset
        self.causes.setdefault((offset, length), f"{error.what}: {error.cause}" if error.cause else error.what)

    def fields(self) -> list[dict[str, object]]:
        """For reports."""
        return [
            {"offset": offset, "length": length, "cause": cause}
            for (offset, length), cause in sorted(self.causes.items())
        ]


@dataclass
class Counts:
    """Archive blocks by what came of them, and bytes."""

    zero: int = 0
    equal: int = 0
    changed: int = 0
    target_read: int = 0
    target_written: int = 0
    unmapped: int = 0


@dataclass(frozen=True)
class RestoreOptions:
    """`overwrite`: the target may hold something. `allow_damaged`: what cannot be read becomes zeros, and is listed."""

    overwrite: bool = False
    allow_damaged: bool = False
    state_directory: Path | None = None


class Undertaking(msgspec.Struct, frozen=True):
    """That this snapshot is being restored to this target: then what is on it is ours, and it goes on without a
    question. Nothing else is taken from it."""

    target: str
    identity: str
    snapshot: str


async def restore(
    snapshot: SnapshotVolume, target: Target, options: RestoreOptions, progress: Progress
) -> dict[str, object]:
    """Make the target's first bytes those of the snapshot, durably; return the report.

    Raises WRONG_STATE where the target holds something and may not be overwritten, and whatever reading and writing
    raise; then it can be run again.
    """
    watch = Stopwatch()
    geometry = Geometry(snapshot.size, ARCHIVE_BLOCK)
    damaged = Damaged(snapshot.size)
    damage = damaged.add if options.allow_damaged else None
    phase = progress.start("map")
    held = BitMap()
    async for entries in snapshot.tree.leaves(damage=damage):
        held.update(block for block, _ in entries)
    found = await target.volume.allocation(ARCHIVE_BLOCK)
    decided = decide(AllocationMap(geometry, held, Provenance.EXACT), found.cut_to(geometry))
    undertaking = Undertaking(_text(target.uri), _text(target.identity), snapshot.snapshot_id)
    path = _path(options, target)
    if found.regions and not options.overwrite and await in_thread(_read, path) != undertaking:
        raise _not_empty(target, found)
    await in_thread(_write, path, undertaking)
    disk.crash_point("restore-begun")
    watch.lap("map")
    phase = progress.start("restore", geometry.bytes_in(held))
    run = _Run(snapshot, target, decided, phase, damaged, damage)
    await run.unmap(decided.unmap)
    await snapshot.fetch(run.wanted(), run.put, damage)
    await run.unmap(run.damaged_blocks() & decided.compare)
    watch.lap("restore")
    progress.start("flush")
    await target.finish()
    disk.crash_point("restore-finished")
    await in_thread(remove_durably, path)
    watch.lap("flush")
    progress.finish()
    return _report(snapshot, target, decided, run.counts, damaged, watch)


class _Run:
    """One restore at work."""

    def __init__(
        self,
        snapshot: SnapshotVolume,
        target: Target,
        plan: Plan,
        phase: Phase,
        damaged: Damaged,
        damage: Damage | None,
    ) -> None:
        self.counts = Counts()
        self._snapshot = snapshot
        self._target = target.volume
        self._plan = plan
        self._phase = phase
        self._damaged = damaged
        self._damage = damage

    async def wanted(self) -> AsyncIterator[Sequence[tuple[int, Entry]]]:
        """The blocks to fetch: those that the target does not have yet."""
        async for entries in self._snapshot.tree.leaves(damage=self._damage):
            for start in range(0, len(entries), COMPARED):
                part = entries[start : start + COMPARED]
                equal = await self._equal([one for one in part if one[0] in self._plan.compare])
                self._done(equal)
                self.counts.equal += len(equal)
                yield [one for one in part if one[0] not in equal]

    async def _equal(self, entries: Sequence[tuple[int, Entry]]) -> set[int]:
        """Which blocks the target has already.

        Invariant 1: nothing is ever assumed equal. A record of what an earlier run has written would be true only as
        long as nobody touched the target and the disk lost nothing.
        """
        if not entries:
            return set()
        buffers = [memoryview(bytearray(self._snapshot.blocks.extent(block)[1])) for block, _ in entries]
        extents = [(block * ARCHIVE_BLOCK, buffer) for (block, _), buffer in zip(entries, buffers, strict=True)]
        await self._target.read_many(extents)
        self.counts.target_read += sum(map(len, buffers))
        return await in_thread(_same, self._snapshot.sealer, entries, buffers)

    async def put(self, blocks: list[tuple[int, bytes]]) -> None:
        """Write what differs: blocks of 4 KiB that are not zero; those that became zero are deallocated."""
        writes: list[tuple[int, Data]] = []
        zeros: list[tuple[int, int]] = []
        for block, data in blocks:
            offset = block * ARCHIVE_BLOCK
            view = memoryview(data)
            if block in self._plan.send:
                writes += [(offset + start, view[start : start + length]) for start, length in nonzero_extents(view)]
                continue
            buffer = bytearray(len(data))
            await self._target.read_into(offset, memoryview(buffer))
            self.counts.target_read += len(data)
            for start, length in _differing(data, bytes(buffer)):
                part = view[start : start + length]
                inside = list(nonzero_extents(part))
                writes += [(offset + start + at, part[at : at + size]) for at, size in inside]
                zeros += [(offset + start + at, size) for at, size in _gaps(inside, length)]
        if writes:
            await self._target.write(writes)
        if zeros:
            self.counts.unmapped += await self._target.unmap(zeros)
        self.counts.target_written += sum(len(data) for _, data in writes)
        self.counts.changed += len(blocks)
        self._done(block for block, _ in blocks)
        disk.crash_point("restore-written")

    def _done(self, blocks: Iterator[int] | set[int]) -> None:
        self._phase.done += sum(self._snapshot.blocks.extent(block)[1] for block in blocks)

    async def unmap(self, blocks: BitMap) -> None:
        """Make blocks read as zeros (invariant 2: zero is an operation, not an absence). Those that only writing could
        zero are read first (invariant 6: equal bytes are never rewritten)."""
        geometry = self._plan.geometry
        for first, count in split_runs(runs_of(blocks, geometry.count), UNMAP_BLOCKS):
            held, left = await self._target.deallocate([geometry.extent(first, count)])
            self.counts.unmapped += held
            for offset, length in left:
                await self._zero_out(offset, length)
            self.counts.zero += count

    async def _zero_out(self, offset: int, length: int) -> None:
        buffer = memoryview(bytearray(min(length, COMPARED * ARCHIVE_BLOCK)))
        for start in range(offset, offset + length, len(buffer)):
            part = buffer[: min(len(buffer), offset + length - start)]
            await self._target.read_into(start, part)
            self.counts.target_read += len(part)
            if not await in_thread(is_zero, part):
                extents = [(start + at, size) for at, size in nonzero_extents(part)]
                self.counts.unmapped += await self._target.unmap(extents)

    def damaged_blocks(self) -> BitMap:
        """Blocks that could not be read."""
        found = BitMap()
        for offset, length in self._damaged.causes:
            found.add_range(offset // ARCHIVE_BLOCK, -(-(offset + length) // ARCHIVE_BLOCK))
        return found


def _same(sealer: Sealer, entries: Sequence[tuple[int, Entry]], buffers: Sequence[memoryview]) -> set[int]:
    return {block for (block, entry), data in zip(entries, buffers, strict=True) if sealer.digest(data) == entry.digest}


def _differing(ours: bytes, theirs: bytes) -> Iterator[tuple[int, int]]:
    """(offset, length) of the maximal runs of 4 KiB blocks that differ."""
    start = -1
    for at in range(0, len(ours), BLOCK_SIZE):
        if ours[at : at + BLOCK_SIZE] == theirs[at : at + BLOCK_SIZE]:
            if start >= 0:
                yield start, at - start
            start = -1
        elif start < 0:
            start = at
    if start >= 0:
        yield start, len(ours) - start


def _gaps(extents: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """What lies between ascending extents, up to `length`."""
    position = 0
    for start, size in [*extents, (length, 0)]:
        if start > position:
            yield position, start - position
        position = start + size


def _not_empty(target: Target, found: AllocationMap) -> BlockferryError:
    known = found.provenance is not Provenance.ABSENT
    return BlockferryError(
        Code.WRONG_STATE,
        f"{target.uri} is left as it is",
        cause="it is not empty" if known else "it cannot tell whether it is empty",
        next="check that this is the right target; --overwrite replaces what it holds",
        volume=target.uri,
    )


# --- the undertaking --------------------------------------------------------------------------------------------------


def _path(options: RestoreOptions, target: Target) -> Path:
    name = hashlib.sha256(target.identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return (options.state_directory or default_state_directory()) / "restores" / f"{name}.json"


def _text(name: str) -> str:
    """A path may hold bytes that are no UTF-8; JSON may not."""
    return name.encode("utf-8", "backslashreplace").decode()


def _read(path: Path) -> Undertaking | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Undertaking)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
        return None


def _write(path: Path, undertaking: Undertaking) -> None:
    try:
        make_directories(path.parent)
        write_atomic(path, msgspec.json.encode(undertaking))
    except OSError as error:
        raise from_os_error(error, f"cannot note in {path.parent} what is restored") from error


def _report(
    snapshot: SnapshotVolume, target: Target, plan: Plan, counts: Counts, damaged: Damaged, watch: Stopwatch
) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "snapshot": snapshot.uri,
        "number": snapshot.superblock.number,
        "snapshot_id": snapshot.snapshot_id,
        "target": target.uri,
        "outcome": "damaged" if damaged.causes else "restored",
        "volume_size": snapshot.size,
        "target_size": target.volume.size,
        "block_size": ARCHIVE_BLOCK,
        "target_map": plan.destination_map.value,
        "blocks": plan.counts(),
        "results": {"zero": counts.zero, "equal": counts.equal, "changed": counts.changed},
        "bytes": {
            "archive_read": snapshot.blocks.bytes_read,
            "target_read": counts.target_read,
            "target_written": counts.target_written,
            "unmapped": counts.unmapped,
        },
        "damaged": damaged.fields(),
        "warning": snapshot.notice or None,
        "seconds": watch.report("map", "restore", "flush"),
    }
