"""Copies between volumes and deltas, in batches that are large enough not to feel the hand-off to a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from blockferry.common.digests import nonzero_extents
from blockferry.common.disk import crash_point
from blockferry.common.regions import BLOCK_SIZE
from blockferry.common.volumes import Volume, in_thread
from blockferry.server.apply import Result, differing_blocks, zero_out
from blockferry.server.delta import Delta, below, extents
from pyroaring import BitMap64

BATCH_SIZE = 8 * 1024 * 1024
"""Bytes copied in one go."""

BATCH_EXTENTS = 4096
"""Extents in one go: changes that are scattered in single blocks make small batches."""

Part = tuple[int, memoryview]
"""(offset in the volume, bytes)"""


def _batches(wanted: Iterable[tuple[int, int]]) -> Iterator[list[Part]]:
    """Buffers for (offset, length) ranges, ascending; a range may be split between blocks."""
    batch: list[Part] = []
    room = BATCH_SIZE
    for start, size in wanted:
        offset, end = start, start + size
        while offset < end:
            part = memoryview(bytearray(min(end - offset, room)))
            batch.append((offset, part))
            offset, room = offset + len(part), room - len(part)
            if room < BLOCK_SIZE or len(batch) == BATCH_EXTENTS:
                yield batch
                batch, room = [], BATCH_SIZE
    if batch:
        yield batch


def _nonzero(parts: Sequence[Part]) -> list[Part]:
    return [
        (offset + start, part[start : start + size]) for offset, part in parts for start, size in nonzero_extents(part)
    ]


def _read_all(delta: Delta, parts: Sequence[Part]) -> None:
    for offset, part in parts:
        delta.read_into(offset, part)


async def capture(volume: Volume, blocks: BitMap64, undo: Delta) -> None:
    """Put what `volume` holds in `blocks` into `undo`: what is not zero as data, all else as zeros."""
    for batch in _batches(extents(blocks, undo.size)):
        await volume.read_many(batch)
        held = await in_thread(_nonzero, batch)
        await in_thread(undo.write, held)
        _mark(undo.data, ((offset, len(part)) for offset, part in held))
    undo.zero = blocks - undo.data


async def apply(redo: Delta, volume: Volume) -> None:
    """Put everything in `redo` into `volume`. May be done again, after any part of it."""
    for batch in _batches(extents(redo.data, redo.size)):
        await in_thread(_read_all, redo, batch)
        await volume.write(batch)
        crash_point("complete-written")
    await zero_out(volume, extents(redo.zero, redo.size), Result())


async def merge(undo: Delta, older: Delta) -> None:
    """Have `older` hold what `undo` does and it does not: it then leads to its generation without `undo`."""
    known = older.data | older.zero
    data, zero = below(undo.data, older.size) - known, below(undo.zero, older.size) - known
    for batch in _batches(extents(data, older.size)):
        await in_thread(_read_all, undo, batch)
        await in_thread(older.write, batch)
    await in_thread(older.flush)
    crash_point("drop-undo-merged")
    await in_thread(older.save, older.data | data, older.zero | zero)
    crash_point("drop-merge-recorded")
    older.data, older.zero = older.data | data, older.zero | zero


async def copy(source: Volume, target: Volume, progress: Callable[[int, int], None]) -> None:
    """Put what `source` holds into `target`, of the same size and all zeros. `progress` is told of (bytes done, bytes
    in all)."""
    wanted = await source.data_extents(0, source.size)
    total, done = sum(length for _, length in wanted), 0
    for batch in _batches(wanted):
        await source.read_many(batch)
        await target.write(await in_thread(_nonzero, batch))
        crash_point("promote-copying")
        done += sum(len(part) for _, part in batch)
        progress(done, total)


async def bring(source: Volume, target: Volume) -> None:
    """Bring `target`, of which no more than what lies past the end of `source` may be larger, to what `source` holds.
    Blocks that are equal are left alone (invariant 6)."""
    both = BitMap64()
    for volume in (source, target):
        _mark(both, await volume.data_extents(0, volume.size))
    for batch in _batches(extents(both, source.size)):
        await source.read_many(batch)
        present = [(offset, memoryview(bytearray(len(part)))) for offset, part in batch]
        await target.read_many(present)
        changed = await in_thread(_differing, batch, present)
        await target.write(await in_thread(_nonzero, changed))
        await target.unmap(await in_thread(_zeros, changed))
    if target.size > source.size:
        await target.unmap([(source.size, target.size - source.size)])


def _mark(blocks: BitMap64, found: Iterable[tuple[int, int]]) -> None:
    for offset, length in found:
        blocks.add_range(offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE))


def _differing(wanted: Sequence[Part], present: Sequence[Part]) -> list[Part]:
    return [
        (offset + start, data)
        for (offset, part), (_, there) in zip(wanted, present, strict=True)
        for start, data in differing_blocks(there, 0, part)
    ]


def _zeros(parts: Iterable[Part]) -> list[tuple[int, int]]:
    """(offset, length) of the blocks of `parts` that are all zeros."""
    found = []
    for offset, part in parts:
        position = 0
        for start, size in [*nonzero_extents(part), (len(part), 0)]:
            if start > position:
                found.append((offset + position, start - position))
            position = start + size
    return found
