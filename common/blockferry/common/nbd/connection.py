"""One connection to an NBD server: what arrives is put where it belongs, and nothing waits for ever.

Many requests are in flight, told apart by cookie; their replies come in any order, and structured ones in any number of
chunks. Data of reads lands in the caller's buffer: a reply's header and what came along with it (at most
`SCRATCH_SIZE`) is received into a scratch buffer, and the rest of the data goes from the kernel straight to its place.

A connection that breaks, breaks the protocol or shows no progress has failed for good: every request in flight fails,
and every later one. It is never opened again silently, because nobody knows what the server did with those writes.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from blockferry.common.digests import Data, zeros
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd import protocol, transmission
from blockferry.common.nbd.protocol import ChunkKind, Command, ProtocolError
from blockferry.common.nbd.transmission import Chunk, SimpleReply

SCRATCH_SIZE = 16 * 1024
"""Bytes received at once where no data is awaited: some hundred replies of writes, and small beside a large read."""

MAX_REQUESTS = 16
"""Requests in flight per connection: what qemu-nbd and nbdkit each work on at a time."""

WRITE_AHEAD = 4 * 1024 * 1024
"""Bytes of requests that wait for the kernel before the next one waits itself."""

CLOSE_SECONDS = 5
"""How long a server may take to let go of a connection that was closed."""

_TICKS = 8
"""A connection has failed after this many looks in a row, an eighth of the time-out apart, that saw no progress.
Counting looks instead of reading the clock: a process that was stopped for a while has data waiting, not a fault."""

_MAX_RANGES = 64 * 1024
"""Gaps between chunks of one read. Servers send chunks ascending, which leaves no gap."""


@dataclass(frozen=True)
class Failure:
    """Why a connection can no longer be used."""

    code: Code
    cause: str
    next: str = "check the server and its log, then run it again"


class Pending:
    """A request in flight. `done` is set when it is over, whatever came of it; then `problem` or the results hold."""

    def __init__(
        self, command: Command, offset: int, length: int, target: memoryview | None = None, *, sparse: bool = False
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.target = target
        """Where a read's data goes; None: nobody wants it any more."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.problem: BlockferryError | None = None
        self.holes: list[tuple[int, int]] = []
        """(start, length) in the target of what the server said is zeros; filled in unless `sparse`."""
        self.extents: tuple[tuple[int, int], ...] = ()
        """Of a block status: (length, flags), consecutive."""
        self.error: transmission.ErrorChunk | None = None
        self._sparse = sparse
        self._ranges: list[tuple[int, int]] = []

    def place(self, offset: int, length: int) -> int:
        """Where in the target a piece of the export belongs. Raises unless it is part of the read and new: a gap must
        never be taken for data that has arrived."""
        start = offset - self.offset
        end = start + length
        if self.command != Command.READ or start < 0 or end > self.length:
            raise ProtocolError(f"data of {length} bytes at {offset} that nobody asked for")
        index = bisect.bisect(self._ranges, (start, end))
        before = self._ranges[index - 1] if index else (0, 0)
        after = self._ranges[index] if index < len(self._ranges) else (self.length, self.length)
        if (index and before[1] > start) or after[0] < end:
            raise ProtocolError(f"data of {length} bytes at {offset} twice")
        low, high = index, index
        if index and before[1] == start:
            low, start = index - 1, before[0]
        if index < len(self._ranges) and after[0] == end:
            high, end = index + 1, after[1]
        self._ranges[low:high] = [(start, end)]
        if len(self._ranges) > _MAX_RANGES:
            raise ProtocolError("a read in far too many pieces")
        return offset - self.offset

    def place_hole(self, offset: int, length: int) -> None:
        """Zeros at `offset`."""
        start = self.place(offset, length)
        self.holes.append((start, length))
        if self.target is not None and not self._sparse:
            for part in zeros(length):
                self.target[start : start + len(part)] = part
                start += len(part)

    def check_complete(self) -> None:
        """Raise where a reply without an error leaves something out."""
        if self.command == Command.READ and self._ranges != [(0, self.length)]:
            raise ProtocolError("a read that was answered in part")
        if self.command == Command.BLOCK_STATUS and not self.extents:
            raise ProtocolError("a block status without extents")

    def finish(self, problem: BlockferryError | None) -> None:
        """It is over."""
        self.problem = problem
        if not self.done.done():
            self.done.set_result(None)


class Connection(asyncio.BufferedProtocol):
    """`volume` names the export in errors; `timeout` in seconds."""

    def __init__(self, volume: str, timeout: float) -> None:
        self._volume = volume
        self._interval = timeout / _TICKS
        self._timeout = timeout
        self.failure: Failure | None = None
        self.sent: collections.Counter[Command] = collections.Counter()
        """Requests sent so far, by command."""

        self._transport: asyncio.Transport | None = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._scratch = bytearray(SCRATCH_SIZE)
        self._begin = self._end = 0  # what is in the scratch buffer and not yet looked at
        self._left = 0  # bytes of a payload that are still to come
        self._target: memoryview | None = None  # where they go; None: nowhere
        self._owner: Pending | None = None  # whose buffer that is
        self._then: Callable[[], None] | None = None  # what happens when they are there
        self._stopped = False  # the scratch buffer is full, and nothing more is received

        self._transmitting = False
        self._structured = False
        self._context: int | None = None
        self._next_cookie = 1
        self._in_flight: dict[int, Pending] = {}
        self._slots = asyncio.Semaphore(MAX_REQUESTS)
        self._writable = asyncio.Event()
        self._writable.set()

        self._timer: asyncio.TimerHandle | None = None
        self._quiet = 0
        self._received = False
        self._written = 0
        self._unsent = 0

    # --- handshake: one thing after the other -----------------------------------------------------------------------

    async def read(self, length: int) -> bytearray:
        """The next `length` bytes. Raises UNAVAILABLE where the connection ends before."""
        buffer = bytearray(length)
        arrived = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not arrived.done():
                arrived.set_result(None)

        self._expect(memoryview(buffer), length, None, wake)
        self._advance()
        if self._then is not None and self.failure is None:
            await arrived
        if self._then is not None:
            raise self._error("cannot be opened")
        return buffer

    def send(self, data: Data) -> None:
        """Send a message of the handshake."""
        if self.failure is not None or self._transport is None:
            raise self._error("cannot be opened")
        self._transport.write(data)

    async def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        """Go on encrypted. Whatever came before, unencrypted and unasked, is an attack."""
        assert self._transport is not None
        if self._begin != self._end:
            raise ProtocolError("it sent something between agreeing to TLS and TLS")
        transport = await asyncio.get_running_loop().start_tls(self._transport, self, context, server_hostname=hostname)
        if transport is None:
            raise self._error("cannot be opened")
        self._transport = transport
        transport.set_write_buffer_limits(WRITE_AHEAD)

    # --- transmission: many things at once --------------------------------------------------------------------------

    def start(self, *, structured: bool, context: int | None) -> None:
        """From now on there are requests and replies. `context` is the number of `base:allocation`."""
        self._transmitting = True
        self._structured = structured
        self._context = context
        self._advance_or_fail()

    @property
    def in_flight(self) -> int:
        """Requests in flight."""
        return len(self._in_flight)

    async def submit(self, pending: Pending, *, flags: int = 0, data: Data | None = None) -> None:
        """Send a request when there is room for it; `pending.done` tells when it is over. Raises where the connection
        has failed: then it was not sent."""
        await self._slots.acquire()
        try:
            while self.failure is None and not self._writable.is_set():
                await self._writable.wait()
            if self.failure is not None or self._transport is None:
                raise self._error(_verb(pending.command), pending)
        except BaseException:
            self._slots.release()
            raise
        cookie, self._next_cookie = self._next_cookie, self._next_cookie + 1
        header = transmission.Request(pending.command, cookie, pending.offset, pending.length, flags).encode()
        if not self._in_flight:
            self._watch()
        self._in_flight[cookie] = pending
        self.sent[pending.command] += 1
        self._written += len(header) + (0 if data is None else len(data))
        if data is None:
            self._transport.write(header)
        else:
            self._transport.writelines([header, data])

    def abandon(self, pending: Pending) -> None:
        """Nobody waits for this read any more: its buffer is not touched again, and its data dropped as it comes."""
        pending.target = None
        if self._owner is pending:
            self._target = None

    def fail(self, failure: Failure) -> None:
        """Every request in flight fails, and every later one."""
        if self.failure is not None:
            return
        self.failure = failure
        if self._timer is not None:
            self._timer.cancel()
        self._target = None
        pending, self._in_flight = list(self._in_flight.values()), {}
        for one in pending:
            one.finish(self._error(_verb(one.command), one))
            self._slots.release()
        self._writable.set()
        if not self._transmitting and self._then is not None:
            self._then()
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Say goodbye and let go; whatever is still in flight fails. Takes `CLOSE_SECONDS` at most."""
        if self._transport is None:
            return
        if self.failure is None:
            if self._transmitting and not self._in_flight:
                self._transport.write(transmission.Request(Command.DISC, self._next_cookie, 0, 0).encode())
                self._transport.close()
                await asyncio.wait([self._lost], timeout=CLOSE_SECONDS)
            self.fail(Failure(Code.UNAVAILABLE, "it was closed", "run it again"))
        await asyncio.wait([self._lost], timeout=CLOSE_SECONDS)

    async def abort(self) -> None:
        """Let go without a word, as after a handshake that failed."""
        self.fail(Failure(Code.UNAVAILABLE, "the connection was given up"))
        if self._transport is not None:
            await asyncio.wait([self._lost], timeout=CLOSE_SECONDS)

    # --- what the event loop calls ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_AHEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_result(None)
        cause = "the server closed the connection" if exc is None else f"the connection broke: {exc}"
        self.fail(Failure(Code.UNAVAILABLE, cause))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        scratch = memoryview(self._scratch)
        if self.failure is not None:
            return scratch
        if self._left:
            return scratch[: self._left] if self._target is None else self._target
        return scratch[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self.failure is not None:
            return
        self._received = True
        if self._left:
            self._left -= nbytes
            if self._target is not None:
                self._target = self._target[nbytes:]
        else:
            self._end += nbytes
        self._advance_or_fail()

    # --- from bytes to replies --------------------------------------------------------------------------------------

    def _advance_or_fail(self) -> None:
        try:
            self._advance()
        except ProtocolError as error:
            self.fail(
                Failure(Code.PROTOCOL, f"the server broke the NBD protocol: {error}", "check the server's version")
            )

    def _advance(self) -> None:
        """Do all that can be done with what has arrived."""
        while True:
            if self._left and not self._take():
                return
            if self._then is not None:
                then, self._then, self._owner, self._target = self._then, None, None, None
                then()
            elif not self._transmitting or not self._take_header():
                self._make_room()
                return

    def _expect(self, target: memoryview | None, length: int, owner: Pending | None, then: Callable[[], None]) -> None:
        """The next `length` bytes go to `target` (None: nowhere), which is `owner`'s; then `then` is called."""
        self._target, self._left, self._owner, self._then = target, length, owner, then

    def _take(self) -> bool:
        """Move what the scratch buffer has of the payload under way; whether that is all of it."""
        count = min(self._left, self._end - self._begin)
        if count:
            if self._target is not None:
                self._target[:count] = memoryview(self._scratch)[self._begin : self._begin + count]
                self._target = self._target[count:]
            self._begin += count
            self._left -= count
        if self._begin == self._end:
            self._begin = self._end = 0
            self._stop_or_go()
        return self._left == 0

    def _make_room(self) -> None:
        """Behind what nobody can use yet: less than a header, or in the handshake what is not asked for yet."""
        rest = self._scratch[self._begin : self._end]
        self._scratch[: len(rest)] = rest
        self._begin, self._end = 0, len(rest)
        self._stop_or_go()

    def _stop_or_go(self) -> None:
        """Receive while there is room: in the handshake a server may say more than was asked for so far."""
        if self._transport is not None and (self._end == SCRATCH_SIZE) != self._stopped:
            self._stopped = not self._stopped
            if self._stopped:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _take_header(self) -> bool:
        have = self._end - self._begin
        if have < 4:
            return False
        view = memoryview(self._scratch)[self._begin : self._end]
        size = transmission.reply_header_size(view[:4])
        if have < size:
            return False
        header = transmission.decode_reply_header(view[:size])
        if isinstance(header, Chunk) and header.kind == ChunkKind.OFFSET_DATA:
            size += transmission.OFFSET_SIZE
            if have < size:
                return False
            self._begin += size
            self._data_chunk(header, transmission.decode_offset(view[size - transmission.OFFSET_SIZE : size]))
            return True
        self._begin += size
        if isinstance(header, SimpleReply):
            self._simple(header)
        else:
            self._chunk(header)
        return True

    def _pending(self, cookie: int) -> Pending:
        found = self._in_flight.get(cookie)
        if found is None:
            raise ProtocolError(f"a reply to a request that was not made (cookie {cookie:#x})")
        return found

    def _simple(self, reply: SimpleReply) -> None:
        pending = self._pending(reply.cookie)
        if reply.error:
            pending.error = transmission.ErrorChunk(reply.error)
        elif pending.command == Command.BLOCK_STATUS or (self._structured and pending.command == Command.READ):
            raise ProtocolError("a simple reply where a structured one is due")
        elif pending.command == Command.READ:
            pending.place(pending.offset, pending.length)
            self._expect(pending.target, pending.length, pending, lambda: self._over(reply.cookie))
            return
        self._over(reply.cookie)

    def _data_chunk(self, chunk: Chunk, offset: int) -> None:
        pending = self._structured_pending(chunk)
        length = chunk.length - transmission.OFFSET_SIZE
        start = pending.place(offset, length)
        target = None if pending.target is None else pending.target[start : start + length]
        self._expect(target, length, pending, lambda: self._over(chunk.cookie) if chunk.done else None)

    def _chunk(self, chunk: Chunk) -> None:
        pending = self._structured_pending(chunk)
        if chunk.kind == ChunkKind.BLOCK_STATUS and pending.command != Command.BLOCK_STATUS:
            raise ProtocolError("a block status that nobody asked for")
        payload = bytearray(chunk.length)
        self._expect(memoryview(payload), len(payload), None, lambda: self._chunk_payload(chunk, pending, payload))

    def _structured_pending(self, chunk: Chunk) -> Pending:
        if not self._structured:
            raise ProtocolError("a structured reply that was not agreed upon")
        return self._pending(chunk.cookie)

    def _chunk_payload(self, chunk: Chunk, pending: Pending, payload: bytearray) -> None:
        if chunk.is_error:
            found = transmission.ErrorChunk.decode(chunk.kind, payload)
            pending.error = pending.error or found
        elif chunk.kind == ChunkKind.OFFSET_HOLE:
            pending.place_hole(*transmission.decode_hole(payload))
        elif chunk.kind == ChunkKind.BLOCK_STATUS:
            status = transmission.BlockStatus.decode(payload)
            if status.context != self._context or pending.extents:
                raise ProtocolError(f"a block status of context {status.context} that nobody asked for")
            pending.extents = status.extents
        if chunk.done:
            self._over(chunk.cookie)

    def _over(self, cookie: int) -> None:
        pending = self._in_flight[cookie]
        if pending.error is None:
            pending.check_complete()
        del self._in_flight[cookie]
        self._slots.release()
        pending.finish(None if pending.error is None else self._refusal(pending, pending.error))

    # --- never a hang -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        # A timer of an earlier request fires early: its look does not count.
        self._quiet = -1 if self._timer is not None else 0
        self._received, self._written, self._unsent = False, 0, 0
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._in_flight or self._transport is None:
            return
        unsent = self._transport.get_write_buffer_size()
        # Bytes that the kernel took count only where it was waited for: a server that is silent does not become alive
        # because it is asked more.
        progress = self._received or (self._unsent > 0 and self._written - unsent > 0)
        self._unsent, self._written, self._received = unsent, unsent, False
        self._quiet = 0 if progress else self._quiet + 1
        if self._quiet >= _TICKS:
            self.fail(Failure(Code.UNAVAILABLE, f"the server shows no progress for {self._timeout:g} s"))
        else:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._look)

    # --- errors -----------------------------------------------------------------------------------------------------

    def _error(self, what: str, pending: Pending | None = None) -> BlockferryError:
        failure = self.failure or Failure(Code.UNAVAILABLE, "there is no connection")
        return BlockferryError(
            failure.code,
            what,
            cause=failure.cause,
            next=failure.next,
            volume=self._volume,
            offset=pending.offset if pending else None,
            length=pending.length if pending else None,
        )

    def _refusal(self, pending: Pending, error: transmission.ErrorChunk) -> BlockferryError:
        code, next_step = _REFUSALS.get(
            error.error, (Code.IO_ERROR, "check the server's disk and log, then run it again")
        )
        if code is Code.READ_ONLY and pending.command in (Command.READ, Command.BLOCK_STATUS):
            code = Code.UNREADABLE
        where = "" if error.offset is None else f" at {error.offset}"
        message = f": {protocol.printable(error.message)}" if error.message else ""
        return BlockferryError(
            code,
            _verb(pending.command),
            cause=f"the server answers {protocol.error_text(error.error)}{where}{message}",
            next=next_step,
            volume=self._volume,
            offset=pending.offset,
            length=pending.length,
        )


_REFUSALS: dict[int, tuple[Code, str]] = {
    protocol.Errno.EPERM: (Code.READ_ONLY, "check whether the server allows it"),
    protocol.Errno.ENOSPC: (Code.OUT_OF_SPACE, "free or add space, then run it again"),
    protocol.Errno.ENOTSUP: (Code.UNSUPPORTED, "check what the server supports"),
    protocol.Errno.EOVERFLOW: (Code.UNSUPPORTED, "let the server answer in pieces"),
    protocol.Errno.ESHUTDOWN: (Code.UNAVAILABLE, "start the server again"),
}

_VERBS = {
    Command.READ: "cannot read",
    Command.WRITE: "cannot write",
    Command.FLUSH: "cannot flush",
    Command.TRIM: "cannot trim",
    Command.WRITE_ZEROES: "cannot unmap",
    Command.BLOCK_STATUS: "cannot read the allocation",
}


def _verb(command: Command) -> str:
    return _VERBS.get(command, "cannot use it")
