"""Carries out the requests of one client, and answers them.

    READ in memory   read at once into one piece of memory after the other, headers and data side by side, which is sent
                     in one go when no more requests are at hand
    other READ       what came together is handed to the volume together, in a few parts, if it `batches`; else each
                     waits for itself. A long one is read and sent piece by piece
    WRITE            as it comes, in pieces: each is written when it is complete
    all others       each by itself

Answers leave as they are ready, in any order. Changes that overlap wait for each other (ordering.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd import transmission
from blockferry.common.nbd.export import MAX_EXTENTS, Export, errno_of
from blockferry.common.nbd.ordering import Span
from blockferry.common.nbd.protocol import Buffer, ChunkKind, Command, CommandFlag, Errno, printable
from blockferry.common.nbd.rules import Refusal, refusal
from blockferry.common.nbd.transmission import DATA_HEADER_SIZE, SIMPLE_REPLY_SIZE, Chunk, SimpleReply
from blockferry.common.volumes.volume import IO_THREADS

PIECE = 1024 * 1024
"""Bytes of one step of a read or write. Whoever asks for more at once waits for a step to be sent, or to arrive, before
the next one is begun: that bounds what a client can make the server hold."""

INLINE = 256 * 1024
"""Bytes of a read that may be done on the event loop where nothing has to be waited for: copying them takes it about as
long as handing them to a thread."""

ARENA = INLINE + 64 * 1024
"""Bytes of the memory in which such answers are laid side by side: one large one, or some sixty of 4 KiB."""

PREFETCH = 32 * 1024 * 1024
"""Bytes of one step of a CACHE."""

_NAMES = {one.value: one.name for one in Command}


class Request:
    """A request under way."""

    __slots__ = ("command", "cookie", "cost", "flags", "left", "length", "offset", "problem")

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int, cost: int) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.cost = cost
        """Bytes that are given back with the answer."""
        self.left = length
        """Of a write: bytes that are not written yet."""
        self.problem: Refusal | None = None


class Sender(Protocol):
    """The connection, as far as answers need it."""

    def send(self, parts: Sequence[Buffer], cost: int = 0, answered: int = 0, *, part: bool = False) -> bool:
        """Send, or keep until there is room. When it has left, `cost` bytes are given back and `answered` requests are
        over. Whether it has left already, so that the memory may be used again. `part`: of the answer that is alone."""
        ...

    def alone(self, begins: bool) -> None:
        """An answer begins that is sent in parts with nothing in between; or it is over."""
        ...

    def release(self, cost: int) -> None:
        """Give bytes back before the answer."""
        ...

    async def sendable(self) -> None:
        """Wait until nothing that was sent waits for the client."""
        ...

    def broken(self, cause: str) -> None:
        """The connection cannot go on."""
        ...


class Arenas:
    """Memory for answers that is used again: what is fresh has to be filled by the kernel first. At most `spare` are
    kept."""

    def __init__(self, size: int, spare: int = 4) -> None:
        self.size = size
        self._spare = spare
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        """One of `size` bytes; what is in it is somebody else's answer."""
        return self._free.pop() if self._free else bytearray(self.size)

    def give(self, memory: bytearray) -> None:
        """Nobody looks at it any more."""
        if len(self._free) < self._spare:
            self._free.append(memory)


class Answers:
    """To one client of `export`. `contexts`: the metadata contexts agreed upon."""

    def __init__(
        self,
        export: Export,
        sender: Sender,
        *,
        structured: bool,
        contexts: Sequence[str],
        inline: Arenas,
        pieces: Arenas,
    ) -> None:
        self._export = export
        self._volume = export.volume
        self._size = export.volume.size
        self._sender = sender
        self._structured = structured
        self._contexts = contexts
        self._header = DATA_HEADER_SIZE if structured else SIMPLE_REPLY_SIZE
        self._reads: list[Request] = []
        self._writes: list[tuple[Request, int, bytearray, Span]] = []
        self._waiting: set[asyncio.Task[None]] = set()
        self._changing: set[asyncio.Task[None]] = set()
        self._one_long = asyncio.Lock()
        self._turns: set[asyncio.Future[None]] = set()
        self._closing = False

        self._arenas = inline
        self._pieces = pieces
        self._arena: bytearray | None = None
        self._view = memoryview(b"")
        self._filled = 0

    # --- taking requests --------------------------------------------------------------------------------------------

    def refusal(self, command: int, flags: int, offset: int, length: int) -> Refusal | None:
        """Why a request is not even begun."""
        if self._closing:
            return Errno.ESHUTDOWN, "the server is being stopped"
        read_only, status = self._export.read_only, bool(self._contexts)
        return refusal(command, flags, offset, length, self._size, read_only=read_only, status=status)

    def read_now(self, cookie: int, offset: int, length: int) -> bool:
        """Answer a read at once, if nothing has to be waited for; the answer leaves with `settle` at the latest."""
        size = length + self._header
        if self._closing or not 0 < length <= INLINE or offset + length > self._size:
            return False
        if self._arena is None or self._filled + size > ARENA:
            self._send_arena()
            self._arena = self._arenas.take()
            self._view = memoryview(self._arena)
        start = self._filled + self._header
        if not self._volume.read_now(offset, self._view[start : start + length]):
            return False
        self._pack_header(self._arena, self._filled, cookie, offset, length)
        self._filled += size
        return True

    def take(self, request: Request) -> None:
        """A request other than a write, that was not refused."""
        if request.command == Command.READ and request.length:
            self._reads.append(request)
        elif request.command in (Command.TRIM, Command.WRITE_ZEROES) and request.length:
            self._enter(request.offset, request.length, lambda span: self._start_change(self._change(request, span)))
        else:
            self._start(self._waiting, self._other(request), [request])

    def take_piece(self, request: Request, offset: int, data: bytearray) -> None:
        """A piece of a write has arrived."""
        self._enter(offset, len(data), lambda span: self._piece_may_begin(request, offset, data, span))

    def _piece_may_begin(self, request: Request, offset: int, data: bytearray, span: Span) -> None:
        self._writes.append((request, offset, data, span))
        if not self._taking:
            self.settle()

    _taking = False
    """Requests are being taken, and `settle` will be called."""

    def begin(self) -> None:
        """Requests are at hand."""
        self._taking = True

    def settle(self) -> None:
        """No more requests are at hand: begin with what was taken, and send what is answered."""
        self._taking = False
        self._send_arena()
        reads, self._reads = self._reads, []
        for group in self._grouped(reads):
            self._start(self._waiting, self._read_group(group), group)
        writes, self._writes = self._writes, []
        if self._volume.batches and writes:
            self._start_change(self._write(writes))
        else:
            for one in writes:
                self._start_change(self._write([one]))

    def close(self) -> None:
        """From now on everything is refused."""
        self._closing = True

    def abandon(self) -> None:
        """The client is gone: nobody waits for what was read. Changes that have arrived are made."""
        for task in self._waiting:
            task.cancel()

    async def finished(self) -> None:
        """Wait until nothing is under way."""
        while under_way := [*self._waiting, *self._changing, *self._turns]:
            await asyncio.wait(under_way)

    def _enter(self, offset: int, length: int, begin: Callable[[Span], None]) -> None:
        def later(span: Span) -> None:
            turn.set_result(None)
            begin(span)

        span = self._export.ordering.enter(offset, length, later)
        if span is not None:
            begin(span)
            return
        turn = asyncio.get_running_loop().create_future()
        self._turns.add(turn)
        turn.add_done_callback(self._turns.discard)

    def _start_change(self, work: Coroutine[Any, Any, None]) -> None:
        self._start(self._changing, work)

    def _start(
        self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], requests: Sequence[Request] = ()
    ) -> None:
        """Have `requests` answered by `work`."""

        def over(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if task.cancelled():
                self._sender.release(sum(one.cost for one in requests))
            elif error := task.exception():
                self._export.say("bug", exc_info=error)
                self._sender.broken("the server failed")

        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(over)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _grouped(self, reads: list[Request]) -> list[list[Request]]:
        """Reads that are handed over together: in as many parts as there are threads, at least."""
        if not self._volume.batches:
            return [[one] for one in reads]
        most = -(-len(reads) // IO_THREADS)
        groups: list[list[Request]] = []
        size = PIECE + 1
        for one in reads:
            if size + one.length > PIECE or len(groups[-1]) >= most:
                groups.append([])
                size = 0
            groups[-1].append(one)
            size += one.length
        return groups

    async def _read_group(self, group: list[Request]) -> None:
        if group[0].length > PIECE:
            await self._read_long(group[0])
            return
        total = sum(one.length + self._header for one in group)
        pooled = PIECE // 4 < total <= self._pieces.size
        memory = self._pieces.take() if pooled else bytearray(total)
        view, position = memoryview(memory), 0
        parts: list[tuple[int, memoryview]] = []
        for one in group:
            start = position + self._header
            position = start + one.length
            parts.append((one.offset, view[start:position]))
        sparse = self._structured and not any(one.flags & CommandFlag.DF for one in group)
        try:
            held = await self._export.read(parts, sparse=sparse)
        except Exception as error:
            if len(group) > 1:
                # Which one it was, and whether the others can be read, is found out one by one.
                for one in group:
                    self._start(self._waiting, self._read_group([one]), [one])
            else:
                self._fail(group[0], error)
            return
        start = 0
        answer: list[Buffer] = []
        for number, one in enumerate(group):
            if held is None or held[number] == [(0, one.length)]:
                self._pack_header(memory, start, one.cookie, one.offset, one.length)
                answer.append(view[start : start + self._header + one.length])
            else:
                answer += _sparse_chunks(one.cookie, one.offset, parts[number][1], held[number], done=True)
            start += self._header + one.length
        if held is None:
            answer = [view[:position]]
        if self._sender.send(answer, sum(one.cost for one in group), len(group)) and pooled:
            self._pieces.give(memory)

    async def _read_long(self, request: Request) -> None:
        """Piece by piece, never more than one ahead of the client."""
        if self._structured:
            await self._read_in_chunks(request)
            return
        # One at a time: without chunks nothing can come between the parts of an answer.
        async with self._one_long:
            await self._read_whole(request)

    async def _read_whole(self, request: Request) -> None:
        end, begun = request.offset + request.length, False
        try:
            for offset in range(request.offset, end, PIECE):
                await self._sender.sendable()
                part = memoryview(bytearray(min(PIECE, end - offset)))
                await self._export.read([(offset, part)], sparse=False)
                last = offset + len(part) == end
                answer: list[Buffer] = [part]
                if not begun:
                    self._sender.alone(True)
                    answer, begun = [SimpleReply(request.cookie).encode(), part], True
                self._sender.send(answer, request.cost if last else 0, int(last), part=True)
        except Exception as error:
            if not begun:
                self._fail(request, error)
                return
            # The answer has begun as a success, and nothing else can be said any more.
            self._sender.release(request.cost)
            self._sender.broken(f"a read failed half-way: {self._explain(request, error)[1]}")
        finally:
            if begun:
                self._sender.alone(False)

    async def _read_in_chunks(self, request: Request) -> None:
        end = request.offset + request.length
        for offset in range(request.offset, end, PIECE):
            await self._sender.sendable()
            part = memoryview(bytearray(min(PIECE, end - offset)))
            try:
                held = await self._export.read([(offset, part)], sparse=True)
            except Exception as error:
                self._fail(request, error)
                return
            last = offset + len(part) == end
            found = [(0, len(part))] if held is None else held[0]
            answer = _sparse_chunks(request.cookie, offset, part, found, done=last)
            self._sender.send(answer, request.cost if last else 0, int(last))

    def _pack_header(self, memory: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
        if self._structured:
            transmission.pack_data_header(memory, position, cookie, offset, length, 1)
        else:
            transmission.pack_simple_reply(memory, position, cookie)

    def _send_arena(self) -> None:
        """Send the answers that were laid side by side, and let go of their memory."""
        memory, filled = self._arena, self._filled
        if memory is None:
            return
        part = self._view[:filled]
        self._arena, self._view, self._filled = None, memoryview(b""), 0
        if not filled or self._sender.send([part]):
            self._arenas.give(memory)

    # --- changing ---------------------------------------------------------------------------------------------------

    async def _write(self, pieces: Sequence[tuple[Request, int, bytearray, Span]]) -> None:
        """Write pieces that do not overlap; answer the requests of which it was the last one."""
        try:
            await self._export.write([(offset, data) for _, offset, data, _ in pieces])
        except Exception as error:
            if len(pieces) > 1:
                # Which one it was is found out one by one; what is written twice is the same.
                for one in pieces:
                    self._start_change(self._write([one]))
                return
            pieces[0][0].problem = self._explain(pieces[0][0], error)
        over: list[Request] = []
        for request, _, data, span in pieces:
            request.left -= len(data)
            self._export.ordering.leave(span)
            self._sender.release(len(data))
            if not request.left:
                over.append(request)
        await self._durable([one for one in over if one.flags & CommandFlag.FUA and one.problem is None])
        if over:
            self._sender.send([self._reply(one) for one in over], sum(one.cost for one in over), len(over))

    async def _durable(self, requests: Sequence[Request]) -> None:
        """FUA: what these have changed is on the disk when they are answered."""
        if not requests:
            return
        try:
            await self._export.flush()
        except Exception as error:
            for one in requests:
                one.problem = self._explain(one, error)

    async def _change(self, request: Request, span: Span) -> None:
        try:
            if request.command == Command.TRIM:
                await self._export.trim(request.offset, request.length)
            else:
                await self._export.zero(
                    request.offset,
                    request.length,
                    fast=bool(request.flags & CommandFlag.FAST_ZERO),
                    hole=not request.flags & CommandFlag.NO_HOLE,
                )
        except Exception as error:
            request.problem = self._explain(request, error)
        finally:
            self._export.ordering.leave(span)
        if request.flags & CommandFlag.FUA and request.problem is None:
            await self._durable([request])
        self._answer(request)

    # --- all others -------------------------------------------------------------------------------------------------

    async def _other(self, request: Request) -> None:
        try:
            match request.command:
                case Command.BLOCK_STATUS:
                    await self._status(request)
                    return
                case Command.FLUSH:
                    await self._export.flush()
                case Command.CACHE:
                    end = request.offset + request.length
                    for offset in range(request.offset, end, PREFETCH):
                        await self._volume.prefetch(offset, min(PREFETCH, end - offset))
        except Exception as error:
            request.problem = self._explain(request, error)
        self._answer(request)

    async def _status(self, request: Request) -> None:
        most = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
        chunks: list[tuple[int, Buffer]] = []
        for number, context in enumerate(self._contexts, 1):
            found = await self._export.status(context, request.offset, request.length, most)
            chunks.append((ChunkKind.BLOCK_STATUS, transmission.BlockStatus(number, tuple(found)).encode()))
        self._sender.send([transmission.encode_chunks(request.cookie, chunks)], request.cost, 1)

    # --- answers ----------------------------------------------------------------------------------------------------

    def refuse(self, request: Request, problem: Refusal) -> None:
        """Answer what is not even begun."""
        request.problem = problem
        number, text = problem
        if number is not Errno.ESHUTDOWN:
            self._export.say("request refused", **self._place(request), cause=text, errno=number.name)
        self._answer(request)

    def _answer(self, request: Request) -> None:
        self._sender.send([self._reply(request)], request.cost, 1)

    def _reply(self, request: Request) -> bytes:
        if request.problem is None:
            if request.command == Command.READ and self._structured:
                return Chunk(request.cookie, ChunkKind.NONE, 0).encode()
            return SimpleReply(request.cookie).encode()
        number, text = request.problem
        if not self._structured:
            return SimpleReply(request.cookie, number).encode()
        found = transmission.ErrorChunk(number, printable(text)[: transmission.MAX_MESSAGE])
        return transmission.encode_chunks(request.cookie, [(ChunkKind.ERROR, found.encode())])

    def _fail(self, request: Request, error: Exception) -> None:
        request.problem = self._explain(request, error)
        self._answer(request)

    def _explain(self, request: Request, error: Exception) -> Refusal:
        """Log a failure, and say what the client is told."""
        if isinstance(error, BlockferryError):
            fast = request.flags & CommandFlag.FAST_ZERO and error.code is Code.UNSUPPORTED
            if not fast:
                # That one is no failure: whoever asks wants to know.
                self._export.say("request failed", **self._place(request), cause=error.line())
            # Not the whole story: that is about paths of this host.
            return errno_of(error), error.cause or error.code.value
        self._export.say("bug", **self._place(request), exc_info=error)
        return (Errno.ENOMEM if isinstance(error, MemoryError) else Errno.EIO), "the server failed"

    def _place(self, request: Request) -> dict[str, object]:
        return {
            "request": _NAMES.get(request.command, str(request.command)),
            "volume": self._volume.uri,
            "offset": request.offset,
            "length": request.length,
        }


def _sparse_chunks(
    cookie: int, offset: int, data: memoryview, held: Sequence[tuple[int, int]], *, done: bool
) -> list[Buffer]:
    """Chunks of data, and of holes where nothing is held; `done`: the last of them is the last of the answer."""
    marked: list[tuple[int, int, bool]] = []
    position = 0
    for start, length in held:
        if start > position:
            marked.append((position, start - position, False))
        elif marked:
            # Two in a row are one.
            first, before, _ = marked.pop()
            start, length = first, before + length
        marked.append((start, length, True))
        position = start + length
    if position < len(data):
        marked.append((position, len(data) - position, False))
    parts: list[Buffer] = []
    for number, (start, length, filled) in enumerate(marked, 1):
        last = done and number == len(marked)
        if filled:
            parts.append(Chunk(cookie, ChunkKind.OFFSET_DATA, transmission.OFFSET_SIZE + length, last).encode())
            parts += [transmission.encode_offset(offset + start), data[start : start + length]]
        else:
            hole = transmission.encode_hole(offset + start, length)
            parts += [Chunk(cookie, ChunkKind.OFFSET_HOLE, len(hole), last).encode(), hole]
    return parts
