"""NBD exports: qcow2, vmdk, vhdx, rbd and whatever else qemu-nbd, nbdkit or another server makes of them.

Allocation comes from block status in `base:allocation`, of which only the ZERO bit proves anything: a hole may read as
whatever was there before. Ranges are zeroed by WRITE_ZEROES, which may deallocate them; a TRIM promises nothing.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from blockferry.common.digests import Data, zeros
from blockferry.common.errors import BlockferryError, Code, first_of, from_os_error
from blockferry.common.linux import Zeroing
from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.protocol import MAX_STATUS, TransmissionFlag
from blockferry.common.nbd.uri import NbdUri
from blockferry.common.regions import BLOCK_SIZE, AllocationMap, Geometry, Provenance
from blockferry.common.settings import Tls
from blockferry.common.volumes.volume import MANY_EXTENTS, Volume, in_thread
from pyroaring import BitMap

T = TypeVar("T")

STATUS_REQUESTS = 8
"""Block status requests in flight while a map is drawn: the round trips of a large volume overlap."""

FRAGMENTED_UNIT = 1024 * 1024
"""Bytes of the ranges of which it is known whether they are in many pieces."""


class NbdVolume(Volume):
    """One export. Open it with `NbdVolume.open`."""

    def __init__(self, client: NbdClient, *, writable: bool) -> None:
        export = client.export
        self.uri = client.uri
        self.size = export.size
        self.block_size = BLOCK_SIZE
        self.sector_size = export.minimum
        self.preferred_size = export.preferred
        self._client = client
        self._writable = writable
        self._flushes = export.can(TransmissionFlag.SEND_FLUSH)
        self._zeroes = export.can(TransmissionFlag.SEND_WRITE_ZEROES)
        self._reads_whole = export.can(TransmissionFlag.SEND_DF)
        self._fragmented = BitMap()
        """Ranges of FRAGMENTED_UNIT with many extents, as the map was drawn last: a structured reply would have a chunk
        for each of them, and a step of Python for each chunk takes longer than receiving the zeros between them."""

    @classmethod
    async def open(
        cls,
        uri: str,
        *,
        writable: bool = False,
        insecure: bool = False,
        tls: ssl.SSLContext | None = None,
        files: Tls | None = None,
    ) -> NbdVolume:
        """Open an export. For `nbds://` and `nbds+unix://` there is `tls`, instead of what the URI says of
        certificates, and `files`, where it says nothing; `insecure` allows plaintext to another machine.

        Raises INVALID_ARGUMENT (the URI; an empty export), NOT_FOUND, UNAVAILABLE, PROTOCOL; and for writing READ_ONLY,
        or UNSUPPORTED where the server can make nothing durable or has blocks of more than 4 KiB.
        """
        where = NbdUri.parse(uri)
        if not (where.tls or where.local or insecure):
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                "cannot be opened without TLS",
                cause="it is not on this machine",
                next="write nbds://, or allow plaintext with --insecure",
                volume=uri,
            )
        if where.tls and tls is None:
            tls = await in_thread(_tls_context, where, files)
        client = await NbdClient.connect(where, tls=tls)
        try:
            _check_usable(client, writable)
        except BaseException:
            await client.close()
            raise
        return cls(client, writable=writable)

    @property
    def zeroing(self) -> str:
        if self._client.export.can(TransmissionFlag.READ_ONLY):
            return "read-only"
        return "write-zeroes" if self._zeroes else Zeroing.WRITE.value

    async def allocation(self, region_size: int) -> AllocationMap:
        geometry = Geometry(self.size, region_size)
        if self._client.export.context is None:
            return AllocationMap.full(geometry)
        if self._flushes and not self._client.export.can(TransmissionFlag.READ_ONLY):
            # Delayed allocation at the server: what is not on its way to the disk yet may be reported as a hole.
            await self._client.flush()
        regions = BitMap()
        self._fragmented.clear()
        parts = ((start, min(MAX_STATUS, self.size - start)) for start in range(0, self.size, MAX_STATUS))

        async def look() -> None:
            nonlocal regions
            for offset, length in parts:
                async for extents in self._client.data_extents(offset, length):
                    self._fragmented |= _fragmented(extents)
                    regions |= AllocationMap.from_extents(geometry, extents, Provenance.EXACT).regions

        await _side_by_side("block-status", [look() for _ in range(STATUS_REQUESTS)])
        return AllocationMap(geometry, regions, Provenance.EXACT)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._client.read_into(offset, buffer)

    async def read_data_into(self, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
        """Holes are those that the structured reply itself tells of, which costs nothing; qemu-nbd does."""
        if self._reads_whole and offset // FRAGMENTED_UNIT in self._fragmented:
            try:
                await self._client.read_into(offset, buffer, whole=True)
                return [(0, len(buffer))]
            except BlockferryError as error:
                if error.code is not Code.UNSUPPORTED:
                    raise
                self._reads_whole = False
        holes = await self._client.read_into(offset, buffer, sparse=True)
        found, position = [], 0
        for start, end in _whole_blocks(buffer, holes):
            if start > position:
                found.append((position, start - position))
            position = end
        if position < len(buffer):
            found.append((position, len(buffer) - position))
        return found

    async def read_data_many(self, parts: Sequence[tuple[int, memoryview]]) -> list[list[tuple[int, int]]]:
        return await _side_by_side("read", [self.read_data_into(offset, buffer) for offset, buffer in parts])

    async def write(self, extents: Sequence[tuple[int, Data]]) -> None:
        self._require_writable("cannot write")
        await self._client.write(extents, fua=not self._flushes)

    async def unmap(self, extents: Sequence[tuple[int, int]]) -> int:
        self._require_writable("cannot unmap")
        held = 0
        for offset, length in extents:
            held += await self._held(offset, length)
            if not await self._write_zeroes(offset, length, fast=False):
                await self._client.write(_zero_extents(offset, length), fua=not self._flushes)
        return held

    async def deallocate(self, extents: Sequence[tuple[int, int]]) -> tuple[int, Sequence[tuple[int, int]]]:
        """Only a server that knows FAST_ZERO tells instead of writing zeros out. Any other is not
        asked, because nothing would be known."""
        self._require_writable("cannot unmap")
        if not self._client.export.can(TransmissionFlag.SEND_FAST_ZERO):
            return 0, extents
        total, left = 0, []
        for offset, length in extents:
            held = await self._held(offset, length)
            if await self._write_zeroes(offset, length, fast=True):
                total += held
            else:
                left.append((offset, length))
        return total, left

    async def _held(self, offset: int, length: int) -> int:
        """Bytes of a range that are not proven to be zeros."""
        if self._client.export.context is None:
            return length
        return sum([size async for found in self._client.data_extents(offset, length) for _, size in found])

    async def _write_zeroes(self, offset: int, length: int, *, fast: bool) -> bool:
        """False where the server cannot do it; with `fast` for this range only."""
        if not self._zeroes:
            return False
        try:
            await self._client.write_zeroes(offset, length, fua=not self._flushes, fast=fast)
        except BlockferryError as error:
            if error.code is not Code.UNSUPPORTED:
                raise
            self._zeroes = fast
            return False
        return True

    async def flush(self) -> None:
        # Where the server knows no flush every write was durable when it returned (FUA).
        if self._flushes:
            await self._client.flush()

    async def close(self) -> None:
        await self._client.close()

    @property
    def is_lost(self) -> bool:
        """A connection has failed: nothing will work any more, and whether what was not flushed got there is unknown.
        Open the export anew."""
        return self._client.is_lost

    def let_go(self) -> None:
        """As `close`, at once and from any thread: the connections break, as if the process had died."""
        self._client.let_go()

    def _require_writable(self, what: str) -> None:
        if not self._writable:
            raise BlockferryError(
                Code.READ_ONLY, what, cause="it was opened for reading", next="open it for writing", volume=self.uri
            )


def _check_usable(client: NbdClient, writable: bool) -> None:
    export = client.export

    def refusal(code: Code, cause: str, next: str) -> BlockferryError:
        what = "cannot be opened for writing" if writable else "cannot be opened"
        return BlockferryError(code, what, cause=cause, next=next, volume=client.uri)

    if export.size == 0:
        raise refusal(Code.INVALID_ARGUMENT, "it is empty (0 bytes)", "check that this is the right export")
    if not writable:
        return
    if export.can(TransmissionFlag.READ_ONLY):
        raise refusal(Code.READ_ONLY, "the server offers it read-only", "let the server offer it writable")
    if not (export.can(TransmissionFlag.SEND_FLUSH) or export.can(TransmissionFlag.SEND_FUA)):
        raise refusal(
            Code.UNSUPPORTED,
            "the server offers neither flush nor FUA: nothing written there is ever known to be durable",
            "use another server or another plugin of it",
        )
    if export.minimum > BLOCK_SIZE:
        raise refusal(
            Code.UNSUPPORTED,
            f"the server writes in blocks of {export.minimum} bytes, and changes have {BLOCK_SIZE}",
            "let the server offer smaller blocks, such as by nbdkit's blocksize filter",
        )


async def _side_by_side(name: str, work: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """The results of all, whose round trips overlap. The first that fails ends the others and is raised."""
    failure: BlockferryError | None = None
    running: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            for number, one in enumerate(work):
                running.append(tasks.create_task(one, name=f"{name}-{number}"))
    except* BlockferryError as group:
        failure = first_of(group)
    if failure is not None:
        # Not raised above: before Python 3.11.4 whatever leaves an `except*` is wrapped in a group again.
        raise failure
    return [one.result() for one in running]


def _fragmented(extents: Sequence[tuple[int, int]]) -> BitMap:
    """The numbers of the FRAGMENTED_UNITs in which many of these (offset, length) begin."""
    begun = Counter(offset // FRAGMENTED_UNIT for offset, _ in extents)
    return BitMap([number for number, count in begun.items() if count >= MANY_EXTENTS])


def _whole_blocks(buffer: memoryview, holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, end) of the whole blocks inside each (start, length); what is left of them at either side becomes zeros
    in the buffer."""
    for start, length in holes:
        end = start + length
        first = -(-start // BLOCK_SIZE) * BLOCK_SIZE
        last = end if end == len(buffer) else end // BLOCK_SIZE * BLOCK_SIZE
        if first >= last:
            buffer[start:end] = bytes(length)
            continue
        buffer[start:first] = bytes(first - start)
        buffer[last:end] = bytes(end - last)
        yield first, last


def _zero_extents(offset: int, length: int) -> Iterator[tuple[int, Data]]:
    for part in zeros(length):
        yield offset, part
        offset += len(part)


def _tls_context(uri: NbdUri, files: Tls | None) -> ssl.SSLContext:
    """The server is always verified: by the URI's certificates if it names any, else by `files`, else by the system's
    authorities."""
    if files is not None and not uri.tls_certificates:
        # Imported here because it takes a while, and most commands need none.
        from blockferry.common.tls import client_context

        return client_context(files)
    directory = Path(uri.tls_certificates) if uri.tls_certificates else None
    try:
        context = ssl.create_default_context(cafile=None if directory is None else str(directory / "ca-cert.pem"))
        if directory is not None and (directory / "client-cert.pem").exists():
            context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    except ssl.SSLError as error:
        raise BlockferryError(
            Code.UNREADABLE,
            f"cannot use the certificates in {directory}",
            cause=str(error),
            next="check ca-cert.pem, client-cert.pem and client-key.pem there",
            volume=uri.uri,
        ) from error
    except OSError as error:
        raise from_os_error(error, f"cannot use the certificates in {directory}", volume=uri.uri) from error
    return context
