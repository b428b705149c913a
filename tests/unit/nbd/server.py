"""An NBD server that does what a test says: right by default, and wrong, slow or silent where it is told to be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError
from blockferry.common.nbd import handshake, transmission
from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.protocol import ChunkKind, Command, Option, OptionReply, ProtocolError, TransmissionFlag
from blockferry.common.nbd.uri import NbdUri

from tests.images import KIB, noise

Answer = Callable[[transmission.Request, bytes], bytes]
"""What is sent for a request and the data of a write: a reply, nothing yet, or several."""

ALL = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)
CONTENT = noise("nbd", 256 * KIB)
BOUND = 10.0
"""Seconds after which something hangs."""
CONTEXT = 7
"""The number this server gives to `base:allocation`."""


class NbdServer:
    """Serves `content` as the export `disk`."""

    def __init__(
        self,
        content: bytes,
        *,
        flags: TransmissionFlag = ALL,
        lacks: Collection[Option] = (),
        greeting: bytes = handshake.encode_greeting(3),
        sizes: handshake.BlockSizes | None = None,
        limit: int = 100,
    ) -> None:
        self.content = bytearray(content)
        self.flags = flags
        self.lacks = lacks
        self.greeting = greeting
        self.sizes = sizes
        self.limit = limit
        """Connections that get an answer."""
        self.status: list[tuple[int, int]] = [(len(content), 0)]
        """(length, flags) of `base:allocation`, from the beginning."""
        self.option_replies: dict[int, bytes] = {}
        """Sent for an option instead of what is right."""
        self.answer: Answer = self.right
        self.options: list[int] = []
        self.requests: list[transmission.Request] = []
        self.connections = 0
        self.goodbyes = 0
        self.writers: list[asyncio.StreamWriter] = []
        self._structured = False
        self._serving: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def at(self, directory: Path) -> AsyncIterator[str]:
        """Run; gives the export's URI."""
        path = directory / "nbd.sock"
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._accept, path)
        try:
            yield f"nbd+unix:///disk?socket={path}"
        finally:
            server.close()
            self.hang_up()
            await asyncio.wait_for(asyncio.gather(*self._serving), 10)

    def hang_up(self) -> None:
        """Break all connections."""
        for writer in self.writers:
            writer.transport.abort()

    def of(self, command: Command) -> list[tuple[int, int]]:
        """(offset, length) of the requests of one kind."""
        return [(one.offset, one.length) for one in self.requests if one.command == command]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self._serving.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.connections > self.limit:
            await reader.read()
            return
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, ProtocolError):
            writer.write(self.greeting)
            await reader.readexactly(handshake.CLIENT_FLAGS_SIZE)
            if await self._negotiate(reader, writer):
                await self._transmit(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _negotiate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        while True:
            header = handshake.OptionHeader.decode(await reader.readexactly(handshake.OPTION_HEADER_SIZE))
            payload = await reader.readexactly(header.length)
            self.options.append(header.option)

            def reply(kind: int, data: bytes = b"", option: int = header.option) -> None:
                writer.write(handshake.encode_option_reply(option, kind, data))

            if header.option in self.option_replies:
                writer.write(self.option_replies[header.option])
                if header.option == Option.GO:
                    return True
                continue
            if header.option in self.lacks:
                reply(OptionReply.ERR_UNSUP, b"not here")
                continue
            match header.option:
                case Option.STRUCTURED_REPLY:
                    self._structured = True
                    reply(OptionReply.ACK)
                case Option.SET_META_CONTEXT:
                    request = handshake.MetaContextRequest.decode(payload)
                    assert request.queries == ("base:allocation",)
                    if request.export != "disk":
                        reply(OptionReply.ERR_UNKNOWN)
                        continue
                    reply(OptionReply.META_CONTEXT, handshake.MetaContext(CONTEXT, "base:allocation").encode())
                    reply(OptionReply.ACK)
                case Option.GO:
                    wanted = handshake.GoRequest.decode(payload)
                    if wanted.name != "disk":
                        reply(OptionReply.ERR_UNKNOWN, b"only disk is here")
                        continue
                    reply(OptionReply.INFO, handshake.encode_info(handshake.OtherInfo(99)))
                    reply(OptionReply.INFO, handshake.encode_info(handshake.DescriptionInfo("a disk")))
                    if self.sizes:
                        reply(OptionReply.INFO, handshake.encode_info(self.sizes))
                    reply(OptionReply.INFO, handshake.encode_info(handshake.ExportInfo(len(self.content), self.flags)))
                    reply(OptionReply.ACK)
                    return True
                case Option.EXPORT_NAME:
                    if payload != b"disk":
                        return False
                    writer.write(handshake.ExportInfo(len(self.content), self.flags).encode())
                    if not self.greeting.endswith(bytes([3])) and not self.greeting.endswith(bytes([2])):
                        writer.write(bytes(handshake.EXPORT_NAME_ZEROES))
                    return True
                case _:
                    reply(OptionReply.ERR_UNSUP)

    async def _transmit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = transmission.Request.decode(await reader.readexactly(transmission.REQUEST_SIZE))
            if request.command == Command.DISC:
                self.goodbyes += 1
                return
            data = await reader.readexactly(request.length) if request.command == Command.WRITE else b""
            self.requests.append(request)
            writer.write(self.answer(request, data))

    # --- right answers ----------------------------------------------------------------------------------------------

    def right(self, request: transmission.Request, data: bytes) -> bytes:
        """What a server without faults answers; data structured where that was agreed upon."""
        start, end = request.offset, request.offset + request.length
        match request.command:
            case Command.READ if self._structured:
                return chunks(request, data_chunk(start, self.content[start:end]))
            case Command.READ:
                return transmission.SimpleReply(request.cookie).encode() + self.content[start:end]
            case Command.WRITE:
                self.content[start:end] = data
            case Command.WRITE_ZEROES:
                self.content[start:end] = bytes(request.length)
            case Command.BLOCK_STATUS:
                return chunks(request, status_chunk(clipped(self.status, start, end)))
        return transmission.SimpleReply(request.cookie).encode()


def clipped(status: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The part of (length, flags) from the beginning that lies in [start, end)."""
    found, position = [], 0
    for length, flags in status:
        low, high = max(position, start), min(position + length, end)
        if low < high:
            found.append((high - low, flags))
        position += length
    return found


def chunks(request: transmission.Request, *parts: tuple[int, bytes]) -> bytes:
    """A structured reply."""
    return transmission.encode_chunks(request.cookie, parts)


def data_chunk(offset: int, data: bytes | bytearray) -> tuple[int, bytes]:
    """A piece of a read."""
    return ChunkKind.OFFSET_DATA, transmission.encode_offset(offset) + data


def hole_chunk(offset: int, length: int) -> tuple[int, bytes]:
    """Zeros in a read."""
    return ChunkKind.OFFSET_HOLE, transmission.encode_hole(offset, length)


def status_chunk(extents: list[tuple[int, int]], context: int = CONTEXT) -> tuple[int, bytes]:
    """(length, flags) of a block status."""
    return ChunkKind.BLOCK_STATUS, transmission.BlockStatus(context, tuple(extents)).encode()


def error_chunk(error: int, message: str = "", offset: int | None = None) -> tuple[int, bytes]:
    """A failure."""
    kind = ChunkKind.ERROR if offset is None else ChunkKind.ERROR_OFFSET
    return kind, transmission.ErrorChunk(error, message, offset).encode()


# --- what tests do with it ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def connected(
    server: NbdServer, directory: Path, *, timeout: float = 60, handshake: float = BOUND, connections: int = 1
) -> AsyncIterator[NbdClient]:
    """Run the server and open its export; nothing takes longer than `BOUND`."""
    async with server.at(directory) as uri, asyncio.timeout(BOUND):
        client = await NbdClient.connect(
            NbdUri.parse(uri), timeout=timeout, handshake=handshake, connections=connections
        )
        try:
            yield client
        finally:
            await client.close()


async def read(client: NbdClient, offset: int, length: int) -> bytes:
    """A piece of the export."""
    buffer = bytearray(b"?" * length)
    await client.read_into(offset, memoryview(buffer))
    return bytes(buffer)


async def failure(work: Awaitable[object]) -> BlockferryError:
    """The error that something ends with."""
    with pytest.raises(BlockferryError) as caught:
        await work
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task does."""
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
