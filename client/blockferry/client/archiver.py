"""Archive a snapshot: data chunks, then the metadata that was staged meanwhile, then the superblock (US10853312B2).

    source ─ scan ─ outcomes ─┬─ packer ─ note, store          data chunks, several at a time
                              └─ edits ── tree ─ nodes         staged metadata chunks
                                                  └ all data is there ─ note, store ─ all nodes are there ─ superblock

Invariant 5: nothing is uploaded before what it refers to, and the superblock comes last. Invariant 3: it is one object,
created or not. Whatever ends an attempt before that leaves garbage that no snapshot refers to, and a staging directory
from which the next run goes on.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockferry.client.nodes import Nodes
from blockferry.client.packer import Chunk, Packer
from blockferry.client.report import Progress, Stopwatch
from blockferry.client.scan import Earlier, Outcome, Scan, Verdict
from blockferry.client.sources import refuse_in_use, refuse_resized
from blockferry.client.staging import Noted, Staging
from blockferry.common.archive import format, tree
from blockferry.common.archive.catalog import Catalog, Log
from blockferry.common.archive.columns import Child, NodeRef, Trailer
from blockferry.common.archive.committer import Committer
from blockferry.common.archive.creation import now, volume_or_new
from blockferry.common.archive.format import (
    ARCHIVE_BLOCK,
    NOBODY,
    TAIL_SIZE,
    Attempt,
    Deletion,
    Kind,
    NodeAt,
    Superblock,
)
from blockferry.common.archive.seal import parse_level
from blockferry.common.archive.store import Exists
from blockferry.common.disk import crash_point
from blockferry.common.errors import BlockferryError, Code, first_of, from_os_error
from blockferry.common.regions import AllocationMap, runs_of
from blockferry.common.volumes import Volume, in_thread
from pyroaring import BitMap

UPLOADS = 4
"""Chunks on their way at the same time: 64 MiB, which fills a link of 1 Gbit/s with half a second of delay."""
RENEW_SECONDS = 300
"""How often an attempt says that it lives; a sweep waits days."""
EDITS_AHEAD = 64
"""Batches of edits that the tree may be behind."""
RESTARTS = 5
"""Runs that a deletion may spoil; nobody deletes that often."""
COMMIT_TRIES = 100
"""Numbers that others may take before us: more than archivers of one volume that anybody has."""


@dataclass(frozen=True)
class Changed:
    """What a change tracker knows: only these regions may differ from the snapshot with the id `base`. Bytes."""

    base: str
    regions: BitMap
    region_size: int

    def blocks(self, old_size: int, new_size: int) -> BitMap:
        """The archive blocks that may differ, those included that one of the sizes cuts."""
        found = BitMap()
        for first, count in runs_of(self.regions, self.regions.max() + 1 if self.regions else 0):
            start, end = first * self.region_size, (first + count) * self.region_size
            found.add_range(start // ARCHIVE_BLOCK, -(-end // ARCHIVE_BLOCK))
        if old_size != new_size:
            low, high = sorted((old_size, new_size))
            found.add_range(low // ARCHIVE_BLOCK, -(-high // ARCHIVE_BLOCK))
        return found


@dataclass(frozen=True)
class ArchiveOptions:
    """How to archive. `compression` empty for the archive's own; `staging` is the directory for all archives."""

    volume: str
    staging: Path
    compression: str = ""
    live: bool = False
    changed: Changed | None = None
    uploads: int = UPLOADS
    renew_seconds: float = RENEW_SECONDS


async def archive(source: Volume, catalog: Catalog, options: ArchiveOptions, progress: Progress) -> dict[str, object]:
    """Make the source's content the next snapshot of a volume in the archive, and return the report (schema 1).

    Whatever goes wrong, no snapshot appears; the next call goes on with what is in the archive already. Where the
    newest snapshot is of the very same immutable source, nothing is done.
    """
    await refuse_in_use(source, live=options.live)
    volume = await volume_or_new(catalog, options.volume)
    staging = await in_thread(Staging.open, options.staging / catalog.archive.id / volume.hex())
    try:
        for _ in range(RESTARTS):
            report = await _Run(source, catalog, volume, staging, options, progress).run()
            if report is not None:
                return report
            # What it was made from was deleted meanwhile. It is made from what is there now.
        raise BlockferryError(
            Code.WRONG_STATE,
            f"{options.volume} cannot be archived",
            cause=f"what it was made from was deleted meanwhile, {RESTARTS} times",
            next="let the deletions come to an end, then run it again",
            volume=options.volume,
        )
    finally:
        staging.close()


def considered(base: Superblock | None, changed: Changed | None, size: int) -> BitMap | None:
    """The only blocks that may differ from the base; None for all. A tracker is believed only about the very snapshot
    that the base is."""
    if changed is None or base is None or not changed.base or changed.base != base.snapshot_id:
        return None
    return changed.blocks(base.size, size)


def root_of(superblock: Superblock | None) -> tree.Root | None:
    """The tree of a snapshot."""
    if superblock is None or superblock.root is None:
        return None
    at = superblock.root
    return tree.Root(NodeRef(bytes.fromhex(at.attempt), at.chunk, at.offset, at.length), at.level, at.blocks)


@dataclass(frozen=True)
class Found:
    """What a run begins with: the newest snapshot, and the log up to the record `top` (0: it is empty)."""

    base: Superblock | None
    log: Log
    top: int


def _top(log: Log) -> int:
    return log.numbers[-1] if log.numbers else 0


class _Run:
    """One run of an attempt, from a base to its superblock."""

    def __init__(
        self,
        source: Volume,
        catalog: Catalog,
        volume: bytes,
        staging: Staging,
        options: ArchiveOptions,
        progress: Progress,
    ) -> None:
        self._source = source
        self._catalog = catalog
        self._store = catalog.store
        self._volume = volume
        self._sealer = catalog.sealer(volume)
        self._committer = Committer(catalog, volume)
        self._staging = staging
        self._options = options
        self._progress = progress
        self._watch = Stopwatch()
        self._level = parse_level(options.compression or catalog.archive.compression)
        self._journal = asyncio.Lock()
        self._slots = asyncio.Semaphore(options.uploads)
        self._edits: asyncio.Queue[list[tree.Edit] | None] = asyncio.Queue(EDITS_AHEAD)
        self._uploaded = 0
        self._objects = {"data": 0, "meta": 0}
        self._renewals = 0
        self._used: list[str] = []
        self._doomed = False

    @property
    def _attempt(self) -> bytes:
        return self._staging.state.attempt

    async def run(self) -> dict[str, object] | None:
        """The report; None where everything is to be done again, from another base."""
        await self._settle_commit()
        log = await self._catalog.log(self._volume)
        base = await log.newest()
        found = Found(base, log, _top(log))
        if self._source.snapshot_id and base is not None and base.snapshot_id == self._source.snapshot_id:
            await self._give_up_attempt()
            return self._report(base, "present", None, None)
        resumed = await self._begin(found)
        failure: BlockferryError | OSError | None = None
        report: dict[str, object] | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                renewing = tasks.create_task(self._renew(found), name="renew")
                report = await self._work(found, resumed)
                renewing.cancel()
        except* (BlockferryError, OSError) as group:
            failure = first_of(group)
        if isinstance(failure, OSError):
            raise from_os_error(failure, f"cannot use {self._staging.directory} for staging") from failure
        if failure is not None and not self._doomed:
            # Not raised above: before Python 3.11.4 whatever leaves an `except*` is wrapped in a group again.
            raise failure
        # When nobody renews it any more.
        if report is not None:
            await self._clean_up(self._used)
        elif self._doomed:
            await self._give_up_attempt()
        return report

    # --- the attempt --------------------------------------------------------------------------------------------------

    async def _settle_commit(self) -> None:
        """Learn what became of a commit whose end was not seen."""
        state = self._staging.state
        if state.commit and not state.committed:
            frame = await in_thread(self._staging.superblock)
            if frame and await self._committer.is_committed(state.attempt, state.commit, frame):
                await in_thread(self._staging.note_committed, state.commit)
        if state.committed:
            await self._clean_up(())

    async def _clean_up(self, used: Sequence[str]) -> None:
        await self._store.delete(format.attempt_name(self._volume, self._attempt))
        crash_point("archive-attempt-removed")
        await in_thread(self._staging.finish, used)
        crash_point("archive-finished")

    async def _give_up_attempt(self) -> None:
        if self._attempt:
            await self._store.delete(format.attempt_name(self._volume, self._attempt))
            await in_thread(self._staging.drop)

    async def _begin(self, found: Found) -> bool:
        """Begin an attempt, or go on with the one that was interrupted; whether it was the latter."""
        state = self._staging.state
        if state.attempt and found.top > state.seen:
            records = await found.log.records(one for one in found.log.numbers if one > state.seen)
            if any(_dooms(one, state.attempt) for one in records if isinstance(one, Deletion)):
                await self._give_up_attempt()
        resumed = bool(self._attempt)
        if not resumed:
            attempt = secrets.token_bytes(format.ID_SIZE)
            await in_thread(self._staging.begin, attempt, found.top, now())
            crash_point("archive-attempt-begun")
        # Before anything of the base is relied on: a sweep leaves alone what an attempt that lives relies on.
        await self._put_attempt(found)
        return resumed

    async def _put_attempt(self, found: Found) -> None:
        record = Attempt(
            attempt=self._attempt.hex(),
            volume=self._volume.hex(),
            host=socket.gethostname(),
            started=self._staging.state.started,
            renewals=self._renewals,
            base=found.base.number if found.base is not None else 0,
            seen=found.top,
        )
        frame = self._sealer.seal_frame(Kind.ATTEMPT, self._attempt, format.encode(record))
        await self._store.put(format.attempt_name(self._volume, self._attempt), frame)

    async def _renew(self, found: Found) -> None:
        while True:
            await asyncio.sleep(self._options.renew_seconds)
            self._renewals += 1
            await self._put_attempt(found)

    # --- data and tree ------------------------------------------------------------------------------------------------

    async def _work(self, found: Found, resumed: bool) -> dict[str, object] | None:
        base = found.base
        self._progress.start("map")
        await self._ask_for_unfinished()
        run = await in_thread(self._staging.begin_run, self._source.snapshot_id)
        allocation = await self._source.allocation(ARCHIVE_BLOCK)
        self._watch.lap("map")

        nodes = await in_thread(Nodes, self._staging, self._store, self._sealer, self._attempt)
        try:
            packer = self._packer(base, run)
            scan = self._scan(allocation, base, nodes)
            root = await self._upload_data(scan, packer, nodes, run, root_of(base))
            self._watch.lap("data")
            crash_point("archive-all-data-stored")
            await self._upload_nodes(nodes)
            self._watch.lap("metadata")
            crash_point("archive-all-metadata-stored")

            self._progress.start("commit")
            superblock = await self._commit(found, root, nodes, packer.number, scan)
            if superblock is None:
                return None
            self._used = sorted(nodes.used)
        finally:
            nodes.close()
        self._watch.lap("commit")
        self._progress.finish()
        report = self._report(superblock, "archived", scan, allocation)
        report["resumed"] = resumed
        return report

    def _packer(self, base: Superblock | None, run: int) -> Packer:
        first = max(self._staging.state.data, default=-1) + 1

        def trailer() -> Trailer:
            return Trailer(
                run,
                base.number if base is not None else 0,
                bytes.fromhex(base.attempt) if base is not None else NOBODY,
                self._source.size,
                int(time.time() * 1e6),
                first=first,
            )

        return Packer(self._sealer, self._attempt, first, trailer)

    def _scan(self, allocation: AllocationMap, base: Superblock | None, nodes: Nodes) -> Scan:
        return Scan(
            self._source,
            allocation,
            root_of(base),
            nodes.load,
            considered(base, self._options.changed, self._source.size),
            Earlier(self._staging, self._sealer, self._attempt, self._source.snapshot_id),
            self._sealer,
            self._attempt,
            self._level,
            self._progress.start("data"),
        )

    async def _batches_of_edits(self) -> AsyncIterator[Sequence[tree.Edit]]:
        while (edits := await self._edits.get()) is not None:
            yield edits

    # --- uploads ------------------------------------------------------------------------------------------------------

    async def _ask_for_unfinished(self) -> None:
        """Which of the chunks whose upload was begun are there? A handful: later notes name those before them."""
        for kind, chunks in (("data", self._staging.state.data), ("meta", self._staging.state.meta)):
            for noted in [one for one in chunks.values() if not one.done]:
                if await self._is_there(self._object(kind, noted.number), noted):
                    self._staging.done(kind, noted.number)

    async def _is_there(self, key: str, noted: Noted) -> bool:
        try:
            return await self._store.get_range(key, noted.size - TAIL_SIZE, TAIL_SIZE) == noted.tail
        except BlockferryError as error:
            # Nothing of that name, or something shorter.
            if error.code in (Code.NOT_FOUND, Code.DATA_MISMATCH):
                return False
            raise

    def _object(self, kind: str, number: int) -> str:
        name = format.data_name if kind == "data" else format.meta_name
        return name(self._volume, self._attempt, number)

    async def _upload_data(
        self, scan: Scan, packer: Packer, nodes: Nodes, run: int, base: tree.Root | None
    ) -> tree.Root | None:
        """Returns the new tree, when all data is stored and all nodes are laid down."""
        async with asyncio.TaskGroup() as tasks:
            making = tasks.create_task(tree.edit(base, self._batches_of_edits(), nodes.load, nodes.save), name="tree")

            async def upload(chunks: Sequence[Chunk]) -> None:
                for chunk in chunks:
                    await self._slots.acquire()
                    tasks.create_task(self._store_data(run, chunk), name=f"data-{chunk.number}")

            async def consume(outcomes: list[Outcome]) -> None:
                edits = [_carry_out(packer, outcome) for outcome in outcomes]
                await upload(packer.full())
                if edits:
                    await self._edits.put(edits)

            await scan.run(consume)
            await refuse_resized(self._source)
            await upload(packer.finish())
            await self._edits.put(None)
        return making.result()

    async def _store_data(self, run: int, chunk: Chunk) -> None:
        try:
            keys = chunk.content.keys or [-1]
            async with self._journal:
                await in_thread(
                    self._staging.note_data,
                    chunk.number, chunk.size, chunk.tail, run, chunk.trailer, keys[0], keys[-1],
                )  # fmt: skip
            crash_point("archive-data-noted")
            await self._put("data", self._staging.state.data[chunk.number], chunk.parts)
            crash_point("archive-data-stored")
            await self._finished("data", chunk.number)
        finally:
            self._slots.release()

    async def _upload_nodes(self, nodes: Nodes) -> None:
        phase = self._progress.start("metadata", sum(nodes.laid.values()))

        async def store(number: int) -> None:
            try:
                data = await in_thread(nodes.read_chunk, number)
                async with self._journal:
                    await in_thread(self._staging.note_meta, number, len(data), data[-TAIL_SIZE:])
                crash_point("archive-metadata-noted")
                await self._put("meta", self._staging.state.meta[number], [data])
                crash_point("archive-metadata-stored")
                await self._finished("meta", number)
                phase.done += len(data)
            finally:
                self._slots.release()

        async with asyncio.TaskGroup() as tasks:
            for number in nodes.laid:
                await self._slots.acquire()
                tasks.create_task(store(number), name=f"meta-{number}")

    async def _put(self, kind: str, noted: Noted, parts: Sequence[bytes]) -> None:
        key = self._object(kind, noted.number)
        try:
            await self._store.put_new(key, parts)
        except Exists:
            # A request of ours that was given up arrived after all; nobody else has this attempt.
            if not await self._is_there(key, noted):
                # Or the journal has forgotten that we used this number: it is worth nothing, then.
                self._doomed = True
                raise
        self._uploaded += noted.size
        self._objects[kind] += 1

    async def _finished(self, kind: str, number: int) -> None:
        async with self._journal:
            self._staging.done(kind, number)

    # --- commit -------------------------------------------------------------------------------------------------------

    async def _commit(
        self, found: Found, root: tree.Root | None, nodes: Nodes, data_chunks: int, scan: Scan
    ) -> Superblock | None:
        """Create the superblock under the next number that is free. None where a deletion mark that was not seen before
        takes away what the new tree refers to."""
        seen = found.top
        number = await self._committer.next_number(seen)
        for _ in range(COMMIT_TRIES):
            superblock = self._superblock(number, seen, found.base, root, nodes.chunks, data_chunks, scan)
            frame = self._sealer.seal_frame(Kind.SUPERBLOCK, self._attempt, format.encode(superblock), number=number)
            await in_thread(self._staging.note_commit, number, frame)
            crash_point("archive-commit-noted")
            if await self._committer.append(self._attempt, number, frame, seen):
                crash_point("archive-committed")
                await in_thread(self._staging.note_committed, number)
                return superblock
            # Somebody was quicker: another archiver, which takes nothing from us, or a deletion.
            for later in await found.log.refresh():
                record = await found.log.record(later)
                if isinstance(record, Deletion) and await self._takes_from(record, found.log, root, nodes):
                    self._doomed = _dooms(record, self._attempt)
                    return None
                seen = max(seen, later)
            number = await self._committer.next_number(seen)
        raise BlockferryError(
            Code.UNAVAILABLE,
            f"the snapshot of {self._options.volume} cannot be committed",
            cause=f"{COMMIT_TRIES} numbers of its log were taken by others",
            next="see who else archives this volume; then run it again, and what was uploaded is found",
            volume=self._options.volume,
        )

    def _superblock(
        self,
        number: int,
        seen: int,
        base: Superblock | None,
        root: tree.Root | None,
        meta_chunks: int,
        data_chunks: int,
        scan: Scan,
    ) -> Superblock:
        at = None
        if root is not None:
            at = NodeAt(
                attempt=root.ref.attempt.hex(), chunk=root.ref.chunk, offset=root.ref.offset, length=root.ref.length,
                level=root.level, blocks=root.blocks,
            )  # fmt: skip
        return Superblock(
            number=number,
            volume=self._volume.hex(),
            attempt=self._attempt.hex(),
            base=base.number if base is not None else 0,
            base_attempt=base.attempt if base is not None else "",
            seen=seen,
            created=now(),
            # A path may hold bytes that are no UTF-8; JSON may not.
            source=self._source.uri.encode("utf-8", "backslashreplace").decode(),
            snapshot_id=self._source.snapshot_id,
            size=self._source.size,
            block_size=ARCHIVE_BLOCK,
            root=at,
            data_chunks=data_chunks,
            meta_chunks=meta_chunks,
            stored=scan.counts.stored_bytes,
        )

    async def _takes_from(self, mark: Deletion, log: Log, root: tree.Root | None, nodes: Nodes) -> bool:
        """Whether the tree refers to a chunk that the mark names, other than to blocks that were moved out of it."""
        if not mark.chunks:
            return False
        moves = await log.moves()
        async for ref, node in tree.nodes(root, nodes.load):
            if _names(mark, "meta", ref.attempt, ref.chunk):
                return True
            if node.level == 0:
                for entry in node.items:
                    assert not isinstance(entry, Child)
                    moved = moves.get((entry.attempt, entry.chunk, entry.offset))
                    if moved is None and _names(mark, "data", entry.attempt, entry.chunk):
                        return True
        return False

    # --- the report ---------------------------------------------------------------------------------------------------

    def _report(
        self, superblock: Superblock, outcome: str, scan: Scan | None, allocation: AllocationMap | None
    ) -> dict[str, object]:
        counts = scan.counts if scan is not None else None
        return {
            "schema": 1,
            "source": self._source.uri,
            "store": self._store.uri,
            "volume": self._options.volume,
            "outcome": outcome,
            "snapshot": superblock.number,
            "base": superblock.base or None,
            "attempt": superblock.attempt,
            "snapshot_id": superblock.snapshot_id or None,
            "volume_size": superblock.size,
            "block_size": superblock.block_size,
            "source_map": allocation.provenance.value if allocation is not None else None,
            "encrypted": self._sealer.encrypted,
            "resumed": False,
            "blocks": {
                "archived": superblock.root.blocks if superblock.root is not None else 0,
                **{
                    name: getattr(counts, name) if counts is not None else 0
                    for name in ("zero", "equal", "stored", "kept", "holes")
                },
            },
            "bytes": {
                "source_read": counts.bytes_read if counts is not None else 0,
                "stored": counts.stored_bytes if counts is not None else 0,
                "uploaded": self._uploaded,
            },
            "objects": dict(self._objects),
            "seconds": self._watch.report("map", "data", "metadata", "commit"),
        }


def _carry_out(packer: Packer, outcome: Outcome) -> tree.Edit:
    if outcome.verdict is Verdict.STORE:
        return outcome.block, packer.add(outcome.block, outcome.codec, outcome.stored, outcome.digest)
    if outcome.verdict is Verdict.KEEP:
        assert outcome.entry is not None
        packer.keep(outcome.block, outcome.entry)
        return outcome.block, outcome.entry
    packer.hole(outcome.block)
    return outcome.block, None


def _names(mark: Deletion, kind: str, attempt: bytes, number: int) -> bool:
    wanted = attempt.hex()
    return any(
        one.kind == kind and one.attempt == wanted and one.first <= number < one.first + one.count
        for one in mark.chunks
    )


def _dooms(mark: Deletion, attempt: bytes) -> bool:
    return any(one.attempt == attempt.hex() for one in mark.chunks)
