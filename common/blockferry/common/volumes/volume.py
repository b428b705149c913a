"""What every volume can do, whatever it is made of."""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from blockferry.common.digests import Data, digest_size, digests_of_parts
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.linux import Zeroing
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Run, group_runs

P = ParamSpec("P")
T = TypeVar("T")

IO_THREADS = 4
"""Threads for blocking calls, shared by all volumes of a process: two to keep both cores of a small host busy hashing,
and two more so that a slow disk does not hold up a fast one."""

READ_SIZE = 8 * 1024 * 1024
"""Bytes read for digests in one go: large enough that a thread hand-off (about 50 us) does not count."""

MANY_EXTENTS = 64
"""From here on reading all of a buffer is taken to be cheaper than reading its data piece by piece."""

_executor = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="blockferry-io")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking call on the process's I/O threads.

    A thread cannot be interrupted. Whoever is cancelled here goes on only when the call is over: else a write would
    still be under way after its gate was left, on a descriptor that is closed or with a buffer that is reused.
    """
    work = _executor.submit(function, *args, **kwargs)
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        while not work.done():
            waiting = asyncio.wrap_future(work)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([waiting])
            if waiting.done() and not waiting.cancelled():
                waiting.exception()
        raise


class Volume(abc.ABC):
    """A fixed-size array of bytes. Offsets and lengths are in bytes; every method may raise BlockferryError.

    Reads and writes outside [0, size) are programming errors of the caller: whatever comes from outside is checked
    before it gets here.
    """

    uri: str
    size: int
    block_size: int
    sector_size: int = 1
    """The least the device addresses, in bytes; 1 where any byte can be. Reads and writes may have any alignment."""
    preferred_size: int = BLOCK_SIZE
    """Bytes at a time that the device likes best."""
    snapshot_id: str = ""
    """Identity of an immutable snapshot; empty where the content may change."""
    identity: str = ""
    """Which device it is, whatever it is called today; empty where nobody can say."""
    batches: bool = False
    """Many reads, or many writes, in one call cost hardly more than one and wait for nothing but the device. Where one
    of them may wait for something else, such as a network, they are better asked for one by one."""
    contexts: Sequence[str] = ()
    """What else it can tell of ranges, by names such as `blockferry:hydrated` (`status`)."""

    @abc.abstractmethod
    async def allocation(self, region_size: int) -> AllocationMap:
        """Which regions may hold data, as of now, of everything written so far."""

    @abc.abstractmethod
    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. A short read is an error, never silently zeros."""

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` from `offset` if that takes no waiting at all, because it is in memory; else False, and
        `buffer` may hold anything. Never blocks: an event loop may call it."""
        return False

    async def read_many(self, extents: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each (offset, buffer)."""
        for offset, buffer in extents:
            await self.read_into(offset, buffer)

    async def data_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(offset, length) in the volume of what may hold data in a range, ascending; all else is proven to read as
        zeros. Volumes that cannot tell name everything."""
        return [(offset, length)]

    async def read_data_into(self, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
        """Fill `buffer` from `offset` where the device has data; return (start, length) in the buffer of what was
        filled, ascending, made of whole blocks. All else is proven to read as zeros and left as it was in `buffer`.

        Volumes that cannot tell fill everything. The offset must be a multiple of the block size.
        """
        extents = await self.data_extents(offset, len(buffer))
        if len(extents) > MANY_EXTENTS:
            extents = [(offset, len(buffer))]
        held = [(start - offset, length) for start, length in extents]
        await self.read_many([(offset + start, buffer[start : start + length]) for start, length in held])
        return held

    async def read_data_many(self, parts: Sequence[tuple[int, memoryview]]) -> list[list[tuple[int, int]]]:
        """`read_data_into` for each (offset, buffer)."""
        return [await self.read_data_into(offset, buffer) for offset, buffer in parts]

    async def prefetch(self, offset: int, length: int) -> None:
        """This range will soon be read: begin to fetch it, where that makes sense."""
        return

    async def status(self, context: str, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """Consecutive (length, flags) from `offset`, of one of `contexts`; they may end before the range does."""
        raise NotImplementedError

    async def read_and_digest(
        self, parts: Sequence[tuple[int, memoryview]], piece_size: int, key: bytes, size: int
    ) -> tuple[list[list[tuple[int, int]]], bytes]:
        """As `read_data_many`, and what was not filled reads as zeros in the buffers then; with it the keyed digests,
        of `size` bytes each, of the pieces of all parts. Each part begins with a piece."""
        held = await self.read_data_many(parts)
        filled = [(buffer, one) for (_, buffer), one in zip(parts, held, strict=True)]
        return held, await in_thread(digests_of_parts, filled, piece_size, key, size)

    @abc.abstractmethod
    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        """Write each (offset, data). Returns when readable, not when durable."""

    @abc.abstractmethod
    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        """Make each (offset, length) read as zeros; return the bytes that held data before."""

    async def deallocate(self, extents: Sequence[tuple[int, int]]) -> tuple[int, Sequence[tuple[int, int]]]:
        """As `unmap`, without ever writing zeros out (invariant 6: equal bytes are never rewritten). Returns the bytes
        that held data before, and the extents that were left as they are because only writing could zero them.

        Devices may find out what they can do only by being asked: these override it.
        """
        if self.zeroing == Zeroing.WRITE.value:
            return 0, extents
        return await self.unmap(extents), ()

    async def reserve(self, extents: Sequence[tuple[int, int]]) -> None:
        """Take the space that writing each (offset, length) will need, as far as the device knows of such a thing: what
        reads as zeros still does. Raises OUT_OF_SPACE."""
        return

    async def release(self) -> None:
        """Give back what was reserved and not written. Nobody may write meanwhile."""
        return

    @abc.abstractmethod
    async def flush(self) -> None:
        """Make everything written and unmapped so far durable. After a failure the volume must not be trusted."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of the device. Does not flush."""

    @property
    @abc.abstractmethod
    def zeroing(self) -> str:
        """How unmap works here: a name for people; `write` means that zeros are written out. Before the first one it
        may be a hope."""

    async def current_size(self) -> int:
        """The device's size in bytes now; differs from `size` if it was resized since it was opened."""
        return self.size

    async def writers(self) -> list[str]:
        """Who has the device mounted or open for writing, as far as can be told; for people, empty if nobody.

        Only meaningful for a volume opened read-only: this process counts too.
        """
        return []

    async def holders(self) -> list[str]:
        """As `writers`, and whoever merely uses it: a file system that is mounted read-only, for instance."""
        return await self.writers()

    async def digests(self, piece_size: int, pieces: Sequence[Run], key: bytes, region_size: int) -> bytes:
        """Keyed digests of the numbered pieces, one after the other, of what the volume itself holds."""
        return (await self.read_digests(piece_size, pieces, key, region_size))[0]

    async def read_digests(
        self, piece_size: int, pieces: Sequence[Run], key: bytes, region_size: int
    ) -> tuple[bytes, int]:
        """As `digests`, and the bytes that were read for them: what is proven zero is neither read nor hashed."""
        size = digest_size(piece_size, region_size)
        buffer = memoryview(bytearray(min(max(READ_SIZE, piece_size), sum(count for _, count in pieces) * piece_size)))
        found, read = [], 0
        for group in group_runs(pieces, max(READ_SIZE // piece_size, 1)):
            parts = parts_of(buffer, [(first * piece_size, count * piece_size) for first, count in group], self.size)
            held, digests = await self.read_and_digest(parts, piece_size, key, size)
            read += sum(length for one in held for _, length in one)
            found.append(digests)
        return b"".join(found), read


class ReadOnlyVolume(Volume):
    """A volume that never changes."""

    kind: str
    """What it is, for people."""
    otherwise: str
    """What to write to."""

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        raise self._read_only()

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        raise self._read_only()

    def _read_only(self) -> BlockferryError:
        return BlockferryError(
            Code.READ_ONLY,
            f"{self.uri} cannot be written",
            cause=f"{self.kind} never changes",
            next=self.otherwise,
        )

    async def flush(self) -> None:
        """Nothing is ever written."""


def parts_of(buffer: memoryview, extents: Iterable[tuple[int, int]], size: int) -> list[tuple[int, memoryview]]:
    """Lay (offset, length) extents of a volume of `size` bytes, cut at its end, one after the other into a buffer that
    has room for them: (offset, the part of the buffer)."""
    found, position = [], 0
    for offset, length in extents:
        length = min(length, size - offset)
        found.append((offset, buffer[position : position + length]))
        position += length
    return found
