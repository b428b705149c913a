"""A volume as an export: what all its clients share, and what an NBD request means for a volume.

Invariant 3, after a failed flush nothing that was written is trusted: the kernel tells of it once, so that the export
refuses every change and every flush from then on. What was flushed before can still be read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import structlog
from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.linux import ZERO_CHUNK
from blockferry.common.nbd.handshake import BlockSizes
from blockferry.common.nbd.offer import Offer
from blockferry.common.nbd.ordering import Ordering
from blockferry.common.nbd.protocol import BASE_ALLOCATION, MAX_PAYLOAD, Allocation, Errno, TransmissionFlag
from blockferry.common.regions import BLOCK_SIZE
from blockferry.common.volumes.volume import Volume

SPARSE_LEAST = 64 * 1024
"""Bytes of a read from which on it is looked for holes first: for less, looking costs more than reading."""

ZERO_SIZE = 64 * 1024 * 1024
"""Bytes that are zeroed by one call: a device that writes them out keeps a thread for that long."""

STATUS_WINDOW = 16 * 1024 * 1024, 256 * 1024 * 1024
"""Bytes (first, most) that are looked at in one go for a block status: alternating blocks in a window of the most are
32768 extents, and a terabyte without data takes 4096 looks."""

MAX_EXTENTS = 8192
"""Extents of one block status reply (64 KiB); a client asks on from where it ends."""

LOG_SECONDS = 1.0
"""Between two lines about the same kind of event of an export; what is left out is counted."""

_PREFERRED = 4096, 1024 * 1024
"""Bytes: the bounds of the block size that is recommended; a power of two."""

_ERRNO = {
    Code.OUT_OF_SPACE: Errno.ENOSPC,
    Code.READ_ONLY: Errno.EPERM,
    Code.UNSUPPORTED: Errno.ENOTSUP,
    Code.INVALID_ARGUMENT: Errno.EINVAL,
}

log = structlog.get_logger("blockferry.nbd")


def errno_of(error: BlockferryError) -> Errno:
    """What a client is told of a failure."""
    return _ERRNO.get(error.code, Errno.EIO)


class Export:
    """`volume` under a name. It belongs to whoever made this, and nobody else may change it meanwhile."""

    def __init__(self, name: str, volume: Volume, *, read_only: bool, description: str = "") -> None:
        self.name = name
        self.volume = volume
        self.read_only = read_only
        self.ordering = Ordering()
        self.failed: BlockferryError | None = None
        """The flush that failed."""
        self._description = description
        # Ends and beginnings of changes so far, and how many there had been when the last flush began.
        self._changes = 0
        self._flushed = 0 if read_only else -1
        self._flush: asyncio.Task[None] | None = None
        self._next_flush: asyncio.Task[None] | None = None
        self._said: dict[str, tuple[float, int]] = {}

    @property
    def offer(self) -> Offer:
        """What clients are told. CAN_MULTI_CONN is true of every volume: whatever the connection, a write that has
        returned is seen by all, and `flush` makes it durable."""
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_CACHE
        if self.read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA | TransmissionFlag.SEND_TRIM
            flags |= TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        least, most = _PREFERRED
        preferred = min(max(1 << (self.volume.preferred_size - 1).bit_length(), least), most)
        sizes = BlockSizes(1, preferred, MAX_PAYLOAD)
        contexts = (BASE_ALLOCATION, *self.volume.contexts)
        return Offer(self.name, self.volume.size, flags, sizes, self._description, contexts)

    @property
    def clean(self) -> bool:
        """Nothing has changed since the last flush, so that holes are holes: with data that is not on its way to the
        disk yet some file systems report holes where it is going to be."""
        return self._flushed == self._changes

    # --- reading ------------------------------------------------------------------------------------------------------

    async def read(
        self, parts: Sequence[tuple[int, memoryview]], *, sparse: bool
    ) -> list[list[tuple[int, int]]] | None:
        """Fill each (offset, buffer). None: all of it; else, for each, (start, length) of what was filled, and the rest
        is zeros. That is found out where `sparse` says that whoever asks can make use of it."""
        if (
            sparse
            and self.clean
            and all(len(buffer) >= SPARSE_LEAST and offset % BLOCK_SIZE == 0 for offset, buffer in parts)
        ):
            held = await self.volume.read_data_many(parts)
            whole = all(one == [(0, len(buffer))] for one, (_, buffer) in zip(held, parts, strict=True))
            return None if whole else held
        await self.volume.read_many(parts)
        return None

    async def status(self, context: str, offset: int, length: int, most: int) -> list[tuple[int, int]]:
        """(length, flags) from `offset`, at most `most` of them, which may end before the range does."""
        if context != BASE_ALLOCATION:
            found = await self.volume.status(context, offset, length)
            return _merged(found)[:most]
        if not self.clean and self.failed is None:
            await self.flush()
        return await self._allocation(offset, length, min(most, MAX_EXTENTS))

    async def _allocation(self, offset: int, length: int, most: int) -> list[tuple[int, int]]:
        hole = int(Allocation.HOLE | Allocation.ZERO)
        window, largest = STATUS_WINDOW
        found: list[tuple[int, int]] = []
        position, end = offset, offset + length
        while position < end and len(found) <= most:
            step = min(window, end - position)
            for start, size in await self.volume.data_extents(position, step):
                if start > position:
                    _extend(found, start - position, hole)
                _extend(found, size, 0)
                position, step = start + size, step - (start + size - position)
            if step:
                _extend(found, step, hole)
                position += step
            window = min(2 * window, largest)
        return found[:most]

    # --- changing -----------------------------------------------------------------------------------------------------

    def begin_change(self) -> None:
        """A change begins. Raises what a flush has failed with."""
        if self.failed is not None:
            raise self.failed
        self._changes += 1

    def end_change(self) -> None:
        """It is over, whatever came of it."""
        self._changes += 1

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        """Write each (offset, data)."""
        self.begin_change()
        try:
            await self.volume.write(extents)
        finally:
            self.end_change()

    async def zero(self, offset: int, length: int, *, fast: bool, hole: bool) -> None:
        """Make a range read as zeros. `fast`: raise UNSUPPORTED rather than write them out; unless `hole` the range is
        to be allocated, for which they are written out."""
        if fast and not hole:
            raise self._not_fast(offset, length)
        self.begin_change()
        try:
            most = ZERO_SIZE if hole else len(ZERO_CHUNK)
            for start in range(offset, offset + length, most):
                size = min(most, offset + length - start)
                if not hole:
                    await self.volume.write([(start, memoryview(ZERO_CHUNK)[:size])])
                elif not fast:
                    await self.volume.unmap([(start, size)])
                elif (await self.volume.deallocate([(start, size)]))[1]:
                    raise self._not_fast(start, size)
        finally:
            self.end_change()

    def _not_fast(self, offset: int, length: int) -> BlockferryError:
        return BlockferryError(
            Code.UNSUPPORTED,
            "cannot zero fast",
            cause="zeros would have to be written out",
            next="ask again without FAST_ZERO",
            volume=self.volume.uri,
            offset=offset,
            length=length,
        )

    async def trim(self, offset: int, length: int) -> None:
        """Give back the space of a range where the volume can; what is read there afterwards may be anything, by the
        protocol, and is zeros or what it was here."""
        self.begin_change()
        try:
            for start in range(offset, offset + length, ZERO_SIZE):
                await self.volume.deallocate([(start, min(ZERO_SIZE, offset + length - start))])
        finally:
            self.end_change()

    async def flush(self) -> None:
        """Make every change that has returned durable. Whoever comes while a flush is under way waits for the next one,
        together with all others who do: it covers what that one may have missed."""
        if self.read_only:
            return
        if self._next_flush is None:
            self._next_flush = asyncio.create_task(self._flush_after(self._flush), name="nbd-flush")
            # All who waited may be gone when it fails; `failed` remembers it.
            self._next_flush.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Whoever is cancelled leaves the others theirs.
        await asyncio.shield(self._next_flush)

    async def _flush_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._flush, self._next_flush = self._next_flush, None
        if self.failed is not None:
            raise self.failed
        seen = self._changes
        try:
            await self.volume.flush()
        except BlockferryError as error:
            self.failed = error
            self.say("the export takes no more changes", error=error.line(), next="restart it once the disk is sound")
            raise
        self._flushed = seen

    # --- what people are told -----------------------------------------------------------------------------------------

    def say(self, event: str, **fields: object) -> None:
        """A line in the log about what is wrong."""
        self._line(log.warning, event, fields)

    def mention(self, event: str, **fields: object) -> None:
        """A line in the log about what happens."""
        self._line(log.info, event, fields)

    def _line(self, write: Callable[..., object], event: str, fields: Mapping[str, object]) -> None:
        """Seldom enough that no client can fill the disk with them."""
        now = time.monotonic()
        last, missed = self._said.get(event, (now - LOG_SECONDS, 0))
        if now - last < LOG_SECONDS:
            self._said[event] = last, missed + 1
            return
        self._said[event] = now, 0
        write(event, export=self.name, **({"left_out": missed} if missed else {}), **fields)


def _extend(found: list[tuple[int, int]], length: int, flags: int) -> None:
    if found and found[-1][1] == flags:
        length += found.pop()[0]
    found.append((length, flags))


def _merged(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for length, flags in extents:
        _extend(found, length, flags)
    return found
