"""An NBD export as a client uses it: connections, pieces of requests that are too large, and errors with fields."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

from blockferry.common.digests import Data
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.nbd.connection import Connection, Failure, Pending
from blockferry.common.nbd.negotiate import Export, negotiate
from blockferry.common.nbd.protocol import MAX_STATUS, Allocation, Command, CommandFlag, ProtocolError, TransmissionFlag
from blockferry.common.nbd.uri import NbdUri

HANDSHAKE_SECONDS = 10.0
"""From the first packet to an open export."""

TIMEOUT_SECONDS = 60.0
"""How long a connection with requests in flight may show no progress."""

CONNECTIONS = 4
"""To servers that announce it: what nbdcopy uses, so that none of a server's threads waits for another's socket."""

ZERO_SIZE = 256 * 1024 * 1024
"""Bytes zeroed by one request: a server that has to write them out shows progress within the time-out, at 5 MB/s."""

Extent = tuple[int, int]
"""(offset, length) in bytes"""

_NEVER_GIVEN_UP = (Command.WRITE, Command.WRITE_ZEROES, Command.FLUSH)


class NbdClient:
    """An open export. Made by `connect`; every method may raise BlockferryError, and after the first failure of a
    connection all of them do."""

    def __init__(self, uri: NbdUri, export: Export, first: Connection) -> None:
        self.uri = uri.uri
        self.export = export
        self._connections = [first]
        self._joining: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(
        cls,
        uri: NbdUri,
        *,
        tls: ssl.SSLContext | None = None,
        timeout: float = TIMEOUT_SECONDS,
        handshake: float = HANDSHAKE_SECONDS,
        connections: int = CONNECTIONS,
    ) -> NbdClient:
        """`tls` is used exactly where the URI asks for TLS. `timeout` and `handshake` in seconds."""
        if uri.tls != (tls is not None):
            raise BlockferryError(
                Code.INVALID_ARGUMENT,
                "cannot be opened",
                cause="its scheme and the TLS settings contradict each other",
                next="write nbds:// or nbds+unix:// for TLS, and give certificates with it",
                volume=uri.uri,
            )
        connection, export = await _open(uri, tls, timeout, handshake)
        client = cls(uri, export, connection)
        if export.can(TransmissionFlag.CAN_MULTI_CONN):
            client._joining = [
                asyncio.create_task(client._join(uri, tls, timeout, handshake), name=f"nbd-{number}")
                for number in range(1, connections)
            ]
        return client

    async def _join(self, uri: NbdUri, tls: ssl.SSLContext | None, timeout: float, handshake: float) -> None:
        """Add a connection. One that cannot be had is done without: servers limit how many there may be."""
        try:
            connection, export = await _open(uri, tls, timeout, handshake)
        except BlockferryError:
            return
        if (export.size, export.flags) == (self.export.size, self.export.flags):
            self._connections.append(connection)
        else:
            await connection.abort()

    @property
    def sent(self) -> collections.Counter[Command]:
        """Requests sent so far, by command."""
        return sum((one.sent for one in self._connections), collections.Counter[Command]())

    async def close(self) -> None:
        """Take leave of the server; whatever is in flight fails. Does not flush."""
        for task in self._joining:
            task.cancel()
        await asyncio.gather(*self._joining, return_exceptions=True)
        await asyncio.gather(*(connection.close() for connection in self._connections))

    @property
    def is_lost(self) -> bool:
        """A connection has failed, and so does every request from here on."""
        return any(connection.failure is not None for connection in self._connections)

    def let_go(self) -> None:
        """As `close`, at once and from any thread."""
        # The loop is gone at the very end of a process, and its connections with it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._abandon)

    def _abandon(self) -> None:
        for task in self._joining:
            task.cancel()
        for connection in self._connections:
            connection.fail(Failure(Code.UNAVAILABLE, "it was let go of"))

    # --- requests ---------------------------------------------------------------------------------------------------

    async def read_into(
        self, offset: int, buffer: memoryview, *, sparse: bool = False, whole: bool = False
    ) -> list[Extent]:
        """Fill `buffer`. Returns the merged (start, length) in it of what the server says is zeros, as far as it says
        so; `sparse` leaves these as they were. What does not begin or end at the server's minimum block size is read
        with its surroundings. `whole`, where the export can SEND_DF: no holes, and each request is answered in one
        piece; raises UNSUPPORTED where that is too large for the server."""
        unit, end = self.export.minimum, offset + len(buffer)
        first, last = -(-offset // unit) * unit, end if end == self.export.size else end // unit * unit
        if first > last:
            # Inside one block.
            await self._read_part(first - unit, offset, buffer)
            return []
        if first > offset:
            await self._read_part(first - unit, offset, buffer[: first - offset])
        if last < end:
            await self._read_part(last, last, buffer[last - offset :])
        if first == last:
            return []
        middle = buffer[first - offset : last - offset]
        flags = int(CommandFlag.DF) if whole else 0
        pending = [
            (Pending(Command.READ, first + start, length, middle[start : start + length], sparse=sparse), flags, None)
            for start, length in _pieces(len(middle), self.export.maximum)
        ]
        await self._run(pending)
        holes = sorted((one.offset - offset + start, length) for one, _, _ in pending for start, length in one.holes)
        return list(_merged(holes))

    async def _read_part(self, block: int, offset: int, buffer: memoryview) -> None:
        """Read the minimum block at `block` for the sake of a part of it."""
        whole = memoryview(bytearray(min(self.export.minimum, self.export.size - block)))
        await self._run([(Pending(Command.READ, block, len(whole), whole), 0, None)])
        buffer[:] = whole[offset - block : offset - block + len(buffer)]

    async def write(self, extents: Iterable[tuple[int, Data]], *, fua: bool = False) -> None:
        """Write each (offset, data), side by side; `fua`: durable when this returns."""
        flags = CommandFlag.FUA if fua else 0
        pending = []
        for offset, data in extents:
            view = memoryview(data)
            self._check_aligned("cannot write", offset, len(view))
            for start, length in _pieces(len(view), self.export.maximum):
                part = view[start : start + length]
                pending.append((Pending(Command.WRITE, offset + start, length), int(flags), part))
        await self._run(pending)

    async def write_zeroes(self, offset: int, length: int, *, fua: bool = False, fast: bool = False) -> None:
        """Make a range read as zeros; the server may deallocate it. `fast`: raise UNSUPPORTED instead of writing zeros
        out, with perhaps a part of it done."""
        self._check_aligned("cannot unmap", offset, length)
        flags = (CommandFlag.FUA if fua else 0) | (CommandFlag.FAST_ZERO if fast else 0)
        await self._run(
            [
                (Pending(Command.WRITE_ZEROES, offset + start, size), int(flags), None)
                for start, size in _pieces(length, ZERO_SIZE)
            ]
        )

    async def flush(self) -> None:
        """Make every write that has returned durable, whatever connection it took: CAN_MULTI_CONN says so."""
        await self._run([(Pending(Command.FLUSH, 0, 0), 0, None)])

    async def data_extents(self, offset: int, length: int) -> AsyncIterator[Sequence[Extent]]:
        """What is not proven to read as zeros in a range, ascending, a list per reply. Only the ZERO bit proves."""
        position, end = offset, offset + length
        while position < end:
            pending = Pending(Command.BLOCK_STATUS, position, min(end - position, MAX_STATUS))
            await self._run([(pending, 0, None)])
            found: list[Extent] = []
            for size, flags in pending.extents:
                if position >= end:
                    break
                if not flags & Allocation.ZERO:
                    found.append((position, min(size, end - position)))
                position += size
            yield list(_merged(found))

    def _check_aligned(self, what: str, offset: int, length: int) -> None:
        unit, end = self.export.minimum, offset + length
        if offset % unit or (end % unit and end != self.export.size):
            raise BlockferryError(
                Code.UNSUPPORTED,
                what,
                cause=f"the server writes in blocks of {unit} bytes",
                next="let the server offer smaller blocks",
                volume=self.uri,
                offset=offset,
                length=length,
            )

    async def _run(self, requests: Sequence[tuple[Pending, int, Data | None]]) -> None:
        """Send requests and wait until all are over; raise the first problem.

        Whoever is cancelled here may reuse his buffers at once: reads in flight are given up, and writes, which may
        still be under way, are waited for. The time-out of their connection bounds that.
        """
        sent: list[tuple[Connection, Pending]] = []
        try:
            for pending, flags, data in requests:
                connection = self._connection()
                await connection.submit(pending, flags=flags, data=data)
                sent.append((connection, pending))
            await _over(pending for _, pending in sent)
        except BaseException:
            for connection, pending in sent:
                if pending.command not in _NEVER_GIVEN_UP:
                    connection.abandon(pending)
            await _over_whatever_comes(pending for _, pending in sent if pending.command in _NEVER_GIVEN_UP)
            raise
        for _, pending in sent:
            if pending.problem is not None:
                raise pending.problem

    def _connection(self) -> Connection:
        """The one with the fewest requests in flight. One that has failed is chosen before all others: it raises, and
        nothing goes on as if nothing had happened."""
        return min(self._connections, key=lambda one: -1 if one.failure is not None else one.in_flight)


async def _over(pending: Iterable[Pending]) -> None:
    waiting = [one.done for one in pending]
    if waiting:
        # Unlike awaiting them this leaves them alone where the waiting is cancelled.
        await asyncio.wait(waiting)


async def _over_whatever_comes(pending: Iterable[Pending]) -> None:
    waiting = [one.done for one in pending]
    while not all(one.done() for one in waiting):
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError:
            continue


def _pieces(length: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, length) of consecutive pieces."""
    return ((start, min(most, length - start)) for start in range(0, length, most))


def _merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Ascending extents with those joined that touch."""
    at, size = 0, 0
    for offset, length in extents:
        if size and at + size == offset:
            size += length
            continue
        if size:
            yield at, size
        at, size = offset, length
    if size:
        yield at, size


async def _open(uri: NbdUri, tls: ssl.SSLContext | None, timeout: float, handshake: float) -> tuple[Connection, Export]:
    connection = Connection(uri.uri, timeout)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(handshake):
            if uri.socket:
                await loop.create_unix_connection(lambda: connection, uri.socket)
            else:
                await loop.create_connection(lambda: connection, uri.host, uri.port)
            export = await negotiate(connection, uri.uri, uri.export, tls, uri.tls_hostname)
    except (ProtocolError, OSError) as error:
        await connection.abort()
        raise _explained(error, uri, handshake) from error
    except BaseException:
        await connection.abort()
        raise
    return connection, export


def _explained(error: Exception, uri: NbdUri, handshake: float) -> BlockferryError:
    """What a handshake that failed means."""
    code, cause, next_step = Code.UNAVAILABLE, str(error), "check that the server runs"
    if isinstance(error, ProtocolError):
        code, cause = Code.PROTOCOL, f"the server broke the NBD protocol: {error}"
        next_step = "check that an NBD server is there"
    elif isinstance(error, ssl.SSLError):
        cause = f"TLS failed: {error}"
        next_step = "check the server's certificate, its name and the authorities that are trusted"
    elif isinstance(error, TimeoutError) and not error.errno:
        cause = f"the server did not answer in {handshake:g} s"
        next_step = "check that an NBD server is there and has room for another client"
    elif isinstance(error, OSError) and uri.socket:
        return from_os_error(error, "cannot be opened", volume=uri.uri)
    return BlockferryError(code, "cannot be opened", cause=cause, next=next_step, volume=uri.uri)
