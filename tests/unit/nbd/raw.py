"""A client of an NBD server that sends and takes messages as a test says, and a server in the same process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockferry.common.nbd import handshake, transmission
from blockferry.common.nbd.export import Export
from blockferry.common.nbd.peer import Limits
from blockferry.common.nbd.protocol import BASE_ALLOCATION, ChunkKind, Command, Errno, Option, OptionReply
from blockferry.common.nbd.server import NbdServer
from blockferry.common.nbd.transmission import Chunk, SimpleReply
from blockferry.common.nbd.uri import NbdListen
from blockferry.common.volumes import Volume

BOUND = 10.0
"""Seconds after which something hangs."""
BASE = (BASE_ALLOCATION,)


_connected: list[Raw] = []
"""Those of the test that runs."""


@dataclass
class Answer:
    """What came for one request."""

    cookie: int
    error: int = 0
    message: str = ""
    data: dict[int, bytes] = field(default_factory=dict)
    """By offset."""
    holes: list[tuple[int, int]] = field(default_factory=list)
    status: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """By number of the context."""
    chunks: int = 0

    @property
    def whole(self) -> bytes:
        """Data and holes, put together."""
        parts = {**self.data, **{offset: bytes(length) for offset, length in self.holes}}
        return b"".join(parts[offset] for offset in sorted(parts))


class Raw:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.structured = False
        self._cookies = itertools.count(1)
        self._lengths: dict[int, tuple[int, int]] = {}
        self._partial: dict[int, Answer] = {}
        _connected.append(self)

    @classmethod
    async def connect(cls, path: Path) -> Raw:
        """Connect, and say nothing."""
        return cls(*await asyncio.open_unix_connection(path, limit=1 << 26))

    @classmethod
    async def open(
        cls, path: Path, *, structured: bool = True, contexts: Sequence[str] = (), name: str = "disk"
    ) -> Raw:
        """Connect, and choose an export."""
        one = await cls.connect(path)
        await one.greet()
        if structured:
            one.structured = True
            assert await one.option(Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
        if contexts:
            found = await one.option(
                Option.SET_META_CONTEXT, handshake.MetaContextRequest(name, tuple(contexts)).encode()
            )
            assert len(found) == len(contexts) + 1
        assert (await one.option(Option.GO, handshake.GoRequest(name).encode()))[-1] == (OptionReply.ACK, b"")
        return one

    async def greet(self) -> None:
        """The greeting, and its answer."""
        assert handshake.decode_greeting(await self.read(handshake.GREETING_SIZE)) == 3
        self.writer.write(handshake.encode_client_flags(3))

    async def read(self, length: int) -> bytes:
        """The next bytes."""
        async with asyncio.timeout(BOUND):
            return await self.reader.readexactly(length)

    async def option(self, option: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        """Say an option; the (reply, payload) of its answer."""
        self.writer.write(handshake.encode_option(option, payload))
        found: list[tuple[int, bytes]] = []
        while not found or not (found[-1][0] == OptionReply.ACK or found[-1][0] & (1 << 31)):
            header = handshake.OptionReplyHeader.decode(await self.read(handshake.OPTION_REPLY_HEADER_SIZE))
            assert header.option == option
            found.append((header.reply, await self.read(header.length)))
        return found

    def ask(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> int:
        """Send a request; its cookie."""
        cookie = next(self._cookies)
        length = len(data) or length
        self._lengths[cookie] = (offset, length if command == Command.READ else 0)
        self.writer.write(transmission.Request(command, cookie, offset, length, int(flags)).encode() + data)
        return cookie

    async def answer(self) -> Answer:
        """The next answer that is complete, whatever it is to."""
        while True:
            magic = await self.read(4)
            header = transmission.decode_reply_header(
                magic + await self.read(transmission.reply_header_size(magic) - 4)
            )
            found = self._partial.setdefault(header.cookie, Answer(header.cookie))
            if isinstance(header, SimpleReply):
                offset, length = self._lengths.pop(header.cookie)
                found.error = header.error
                if length and not header.error:
                    assert not self.structured
                    found.data[offset] = await self.read(length)
                return self._partial.pop(header.cookie)
            assert self.structured
            found.chunks += 1
            self._chunk(found, header, await self.read(header.length))
            if header.done:
                self._lengths.pop(header.cookie)
                return self._partial.pop(header.cookie)

    @staticmethod
    def _chunk(found: Answer, header: Chunk, payload: bytes) -> None:
        if header.is_error:
            error = transmission.ErrorChunk.decode(header.kind, payload)
            found.error, found.message = error.error, error.message
        elif header.kind == ChunkKind.OFFSET_DATA:
            found.data[transmission.decode_offset(payload[:8])] = payload[8:]
        elif header.kind == ChunkKind.OFFSET_HOLE:
            found.holes.append(transmission.decode_hole(payload))
        elif header.kind == ChunkKind.BLOCK_STATUS:
            status = transmission.BlockStatus.decode(payload)
            found.status[status.context] = status.extents

    async def get(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> Answer:
        """Send one request and take its answer, which is the next one."""
        cookie = self.ask(command, offset, length, flags, data)
        found = await self.answer()
        assert found.cookie == cookie
        return found

    async def fine(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> Answer:
        """As `get`, and nothing failed."""
        found = await self.get(command, offset, length, flags, data)
        assert not found.error, (Errno(found.error), found.message)
        return found

    async def ended(self) -> bool:
        """The server has let go of this connection."""
        async with asyncio.timeout(BOUND):
            try:
                return not await self.reader.read()
            except OSError:
                return True

    def cut(self) -> None:
        """Break the connection, as the death of a client does."""
        self.writer.transport.abort()


@dataclass
class Served:
    """A server, and where it is."""

    server: NbdServer
    export: Export
    path: Path

    async def open(self, *, structured: bool = True, contexts: Sequence[str] = ()) -> Raw:
        """A client of the export."""
        return await Raw.open(self.path, structured=structured, contexts=contexts)


@contextlib.asynccontextmanager
async def served(
    volume: Volume, directory: Path, *, read_only: bool = False, limits: Limits | None = None
) -> AsyncIterator[Served]:
    """Serve a volume as `disk`; at the end nothing is held any more."""
    export = Export("disk", volume, read_only=read_only, description="a disk")
    server = NbdServer([export], limits=limits)
    path = directory / "nbd.sock"
    await server.listen(NbdListen(str(path), "", 0))
    try:
        async with asyncio.timeout(3 * BOUND):
            yield Served(server, export, path)
    finally:
        async with asyncio.timeout(BOUND):
            await server.close()
            while _connected:
                one = _connected.pop()
                one.cut()
                with contextlib.suppress(OSError):
                    await one.writer.wait_closed()
            while server.clients:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    assert server.room.used == 0
    assert (export.ordering.running, export.ordering.waiting) == (0, 0)
    assert not path.exists()
