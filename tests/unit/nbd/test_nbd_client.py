"""The NBD client against a scripted server: replies of every shape, and servers that lie, break off or say nothing.
Every failure names where it happened, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd import handshake, protocol, transmission
from blockferry.common.nbd.client import NbdClient
from blockferry.common.nbd.connection import MAX_REQUESTS, SCRATCH_SIZE
from blockferry.common.nbd.protocol import Command, Errno, Option, OptionReply, TransmissionFlag

from tests.images import KIB, MIB
from tests.unit.nbd.server import (
    ALL,
    CONTENT,
    CONTEXT,
    NbdServer,
    chunks,
    connected,
    data_chunk,
    error_chunk,
    failure,
    hole_chunk,
    read,
    status_chunk,
    until,
)

# --- replies --------------------------------------------------------------------------------------------------------


async def test_a_read_in_pieces_in_any_order(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)

    def answer(request: transmission.Request, data: bytes) -> bytes:
        at = request.offset
        pieces = [(60000, 70000), (0, 1), (1000, 60000), (70000, 100000), (1, 1000)]
        found = [data_chunk(at + start, CONTENT[at + start : at + end]) for start, end in pieces]
        found[2:2] = [hole_chunk(at + 100000, 3000), hole_chunk(at + 104000, 96000)]
        return chunks(request, *found, hole_chunk(at + 103000, 1000), (protocol.ChunkKind.NONE, b""))

    server.answer = answer
    async with connected(server, tmp_path) as client:
        assert await read(client, 10, 200000) == CONTENT[10:100010] + bytes(100000)
        buffer = memoryview(bytearray(b"?" * 200000))
        assert await client.read_into(10, buffer, sparse=True) == [(100000, 100000)]
        assert buffer[:100000] == CONTENT[10:100010]
        assert buffer[100000:] == b"?" * 100000


async def test_replies_in_any_order_and_any_portions(tmp_path: Path) -> None:
    """Sixteen reads answered last first, a byte, three bytes and then all the rest at a time."""
    server = NbdServer(CONTENT)
    waiting: list[bytes] = []

    def answer(request: transmission.Request, data: bytes) -> bytes:
        waiting.append(server.right(request, data))
        if len(waiting) < MAX_REQUESTS:
            return b""
        reply = b"".join(reversed(waiting))
        asyncio.get_running_loop().create_task(trickle(server, [reply[:1], reply[1:4], reply[4:25], reply[25:]]))
        return b""

    server.answer = answer
    async with connected(server, tmp_path) as client:
        found = await asyncio.gather(*(read(client, at * 9000, 9000) for at in range(MAX_REQUESTS)))
    assert b"".join(found) == CONTENT[: MAX_REQUESTS * 9000]


async def trickle(server: NbdServer, parts: list[bytes], pause: float = 0.01) -> None:
    for part in parts:
        server.writers[0].write(part)
        await asyncio.sleep(pause)


async def test_no_more_requests_than_a_server_works_on(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    waiting: list[bytes] = []

    def answer(request: transmission.Request, data: bytes) -> bytes:
        waiting.append(server.right(request, data))
        return b""

    server.answer = answer
    async with connected(server, tmp_path) as client:
        reads = asyncio.gather(*(read(client, at, 1) for at in range(40)))
        for expected in (MAX_REQUESTS, MAX_REQUESTS, 40 - 2 * MAX_REQUESTS):
            await until(lambda: len(waiting) >= expected)  # noqa: B023
            await asyncio.sleep(0.02)
            assert len(waiting) == expected
            server.writers[0].write(b"".join(waiting))
            waiting.clear()
        assert b"".join(await reads) == CONTENT[:40]


async def data_of(client: NbdClient, offset: int, length: int) -> list[list[tuple[int, int]]]:
    return [list(found) async for found in client.data_extents(offset, length)]


async def test_block_status_short_long_and_split(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    replies = [
        [(1000, 0), (1000, 0), (1000, 1), (1000, 2), (1000, 3), (1000, 4)],  # short, split, a hole that proves nothing
        [(2000, 0), (500000, 2)],  # long: known up to the end, and beyond
    ]
    server.answer = lambda request, _: chunks(request, status_chunk(replies[len(server.requests) - 1]))
    async with connected(server, tmp_path) as client:
        assert await data_of(client, 0, 100000) == [[(0, 3000), (5000, 1000)], [(6000, 2000)]]
        assert server.of(Command.BLOCK_STATUS) == [(0, 100000), (6000, 94000)]
        assert {request.flags for request in server.requests} == {0}
        server.requests.clear()
        replies[0] = [(1 << 31, 0)]
        assert await data_of(client, 5, 10) == [[(5, 10)]]


async def test_requests_are_split_and_rounded(tmp_path: Path) -> None:
    server = NbdServer(CONTENT + b"tail", sizes=handshake.BlockSizes(4096, 4096, 64 * KIB))
    async with connected(server, tmp_path) as client:
        assert await read(client, 4096, 144 * KIB) == CONTENT[4096 : 4096 + 144 * KIB]
        assert server.of(Command.READ) == [(4096, 64 * KIB), (4096 + 64 * KIB, 64 * KIB), (4096 + 128 * KIB, 16 * KIB)]
        for offset, length, asked in (
            (5000, 10, [(4096, 4096)]),
            (4000, 200, [(0, 4096), (4096, 4096)]),
            (4000, 8192, [(0, 4096), (8192, 4096), (4096, 4096)]),
            (256 * KIB - 10, 14, [(256 * KIB - 4096, 4096), (256 * KIB, 4)]),
            (256 * KIB + 1, 2, [(256 * KIB, 4)]),
        ):
            server.requests.clear()
            assert await read(client, offset, length) == bytes(server.content[offset : offset + length])
            assert server.of(Command.READ) == asked
        server.requests.clear()
        await client.write([(0, bytes(65 * KIB - KIB)), (256 * KIB, b"ends")])
        assert server.of(Command.WRITE) == [(0, 64 * KIB), (256 * KIB, 4)]
        with pytest.raises(BlockferryError, match="blocks of 4096 bytes"):
            await client.write([(512, bytes(4096))])
        with pytest.raises(BlockferryError, match="blocks of 4096 bytes"):
            await client.write_zeroes(0, 512)


async def test_writes_and_zeroes_say_how(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    async with connected(server, tmp_path) as client:
        await client.write([(10, b"ab"), (20, memoryview(b"cd"))])
        await client.write([(30, bytearray(b"ef"))], fua=True)
        await client.write_zeroes(40, 2, fast=True)
        await client.write_zeroes(50, 2, fua=True)
        await client.flush()
        assert [(one.command, one.flags, one.offset, one.length) for one in server.requests] == [
            (Command.WRITE, 0, 10, 2), (Command.WRITE, 0, 20, 2), (Command.WRITE, 1, 30, 2),
            (Command.WRITE_ZEROES, 16, 40, 2), (Command.WRITE_ZEROES, 1, 50, 2), (Command.FLUSH, 0, 0, 0),
        ]  # fmt: skip
        assert client.sent == {Command.WRITE: 3, Command.WRITE_ZEROES: 2, Command.FLUSH: 1}
    expected = bytearray(CONTENT)
    for at, data in ((10, b"ab"), (20, b"cd"), (30, b"ef"), (40, b"\0\0"), (50, b"\0\0")):
        expected[at : at + 2] = data
    assert server.content == expected


# --- errors of the server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (Errno.EIO, Code.IO_ERROR), (Errno.EPERM, Code.READ_ONLY), (Errno.ENOSPC, Code.OUT_OF_SPACE),
        (Errno.ENOTSUP, Code.UNSUPPORTED), (Errno.ESHUTDOWN, Code.UNAVAILABLE), (4711, Code.IO_ERROR),
    ],
)  # fmt: skip
async def test_errors_of_the_server(tmp_path: Path, number: int, code: Code) -> None:
    """They say where and what, and the connection is as good as before."""
    server = NbdServer(CONTENT)
    async with connected(server, tmp_path) as client:
        server.answer = lambda request, _: transmission.SimpleReply(request.cookie, number).encode()
        with pytest.raises(BlockferryError) as caught:
            await client.write([(4096, b"12345678")])
        error = caught.value
        assert (error.code, error.volume, error.offset, error.length) == (code, client.uri, 4096, 8)
        assert protocol.error_text(number) in error.cause and error.next

        server.answer = lambda request, _: chunks(
            request, data_chunk(request.offset, b"x"), error_chunk(number, "bad\x1bsector", 77), error_chunk(5, "later")
        )
        with pytest.raises(BlockferryError) as caught:
            await read(client, 70, 100)
        of_reading = Code.UNREADABLE if code is Code.READ_ONLY else code
        assert (caught.value.code, caught.value.offset, caught.value.length) == (of_reading, 70, 100)
        assert caught.value.cause.endswith(" at 77: bad?sector")

        server.answer = server.right
        assert await read(client, 70, 100) == CONTENT[70:170]


async def test_one_failure_among_many(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    async with connected(server, tmp_path) as client:
        server.answer = lambda request, data: (
            transmission.SimpleReply(request.cookie, Errno.EIO).encode()
            if request.offset == 3 * 4096
            else server.right(request, data)
        )
        with pytest.raises(BlockferryError) as caught:
            await client.write([(at * 4096, b"new") for at in range(8)])
        assert (caught.value.offset, caught.value.length) == (3 * 4096, 3)
        assert len(server.requests) == 8


# --- servers that lie -----------------------------------------------------------------------------------------------

Lie = Callable[[transmission.Request], bytes]

LIES: dict[str, Lie] = {
    "wrong magic": lambda one: b"\x12\x34\x56\x78" + bytes(12),
    "wrong cookie": lambda one: struct.pack(">IIQ", 0x67446698, 0, one.cookie + 1),
    "wrong cookie of a chunk": lambda one: struct.pack(">IHHQI", 0x668E33EF, 1, 0, 0, 0),
    "a simple reply to a structured read": lambda one: struct.pack(">IIQ", 0x67446698, 0, one.cookie) + bytes(100),
    "nothing": lambda one: chunks(one, (0, b"")),
    "less than was asked for": lambda one: chunks(one, data_chunk(one.offset, bytes(one.length - 1))),
    "a gap": lambda one: chunks(one, data_chunk(one.offset, b"a"), hole_chunk(one.offset + 2, one.length - 2)),
    "more than was asked for": lambda one: chunks(one, data_chunk(one.offset, bytes(one.length + 1))),
    "data before": lambda one: chunks(one, data_chunk(one.offset - 1, bytes(one.length))),
    "data behind": lambda one: chunks(one, data_chunk(one.offset + one.length, b"x")),
    "data far away": lambda one: chunks(one, data_chunk((1 << 64) - 1, b"x")),
    "a hole behind": lambda one: chunks(one, hole_chunk(one.offset, one.length + 1)),
    "data twice": lambda one: chunks(one, data_chunk(one.offset, b"ab"), data_chunk(one.offset + 1, b"cd")),
    "data twice, the later first": lambda one: chunks(
        one, data_chunk(one.offset + 1, b"ab"), data_chunk(one.offset, b"cd")
    ),
    "data twice in a hole": lambda one: chunks(one, hole_chunk(one.offset, one.length), data_chunk(one.offset, b"x")),
    "a chunk beyond all bounds": lambda one: struct.pack(">IHHQI", 0x668E33EF, 1, 1, one.cookie, (1 << 32) - 1),
    "a hole that is none": lambda one: chunks(one, hole_chunk(one.offset, 0)),
    "a block status": lambda one: chunks(one, status_chunk([(one.length, 0)])),
    "an unknown chunk": lambda one: chunks(one, (99, b"")),
    "an error that is none": lambda one: chunks(one, (protocol.ChunkKind.ERROR, bytes(6))),
}  # fmt: skip

LIES_ABOUT_ALLOCATION: dict[str, Lie] = {
    "another context": lambda one: chunks(one, status_chunk([(one.length, 0)], CONTEXT + 1)),
    "nothing": lambda one: chunks(one, (0, b"")),
    "no length": lambda one: chunks(one, (5, struct.pack(">III", CONTEXT, 0, 0))),
    "twice": lambda one: chunks(one, status_chunk([(one.length, 2)]), status_chunk([(one.length, 0)])),
    "half an extent": lambda one: chunks(one, (5, struct.pack(">IIII", CONTEXT, 1, 0, 1))),
    "a simple reply": lambda one: transmission.SimpleReply(one.cookie).encode(),
    "data": lambda one: chunks(one, data_chunk(one.offset, b"x")),
    "too many extents": lambda one: struct.pack(
        ">IHHQI", 0x668E33EF, 1, 5, one.cookie, 4 + 8 * (protocol.MAX_EXTENTS + 1)
    ),
}


@pytest.mark.parametrize("name", LIES)
async def test_lies_about_data(tmp_path: Path, name: str) -> None:
    await lied_to(tmp_path, LIES[name], lambda client: read(client, 4096, 100))


@pytest.mark.parametrize("name", LIES_ABOUT_ALLOCATION)
async def test_lies_about_allocation(tmp_path: Path, name: str) -> None:
    await lied_to(tmp_path, LIES_ABOUT_ALLOCATION[name], lambda client: data_of(client, 4096, 100))


async def test_a_structured_reply_that_was_not_agreed_upon(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, lacks=[Option.STRUCTURED_REPLY])
    await lied_to(tmp_path, LIES["nothing"], lambda client: read(client, 4096, 100), server)


async def lied_to(
    directory: Path, lie: Lie, ask: Callable[[NbdClient], Awaitable[object]], server: NbdServer | None = None
) -> None:
    """A lie ends everything that is in flight, and everything later."""
    server = server or NbdServer(CONTENT)
    async with connected(server, directory) as client:
        # Another one is in flight, and has nothing to do with it.
        server.answer = lambda request, _: b"" if request.command == Command.WRITE else lie(request)
        writing = asyncio.create_task(client.write([(512, b"x" * 512)]))
        await asyncio.sleep(0)
        for error, where in (
            (await failure(ask(client)), (4096, 100)),
            (await failure(writing), (512, 512)),
            (await failure(client.flush()), (0, 0)),
        ):
            assert (error.code, error.offset, error.length) == (Code.PROTOCOL, *where)
            assert error.volume == client.uri and "NBD protocol" in error.cause


async def test_an_answer_to_nothing(tmp_path: Path) -> None:
    """Said right after the handshake."""
    server = NbdServer(CONTENT)
    export = handshake.encode_option_reply(Option.GO, 3, handshake.encode_info(handshake.ExportInfo(512, ALL)))
    ack = handshake.encode_option_reply(Option.GO, OptionReply.ACK)
    server.option_replies[Option.GO] = export + ack + transmission.SimpleReply(99).encode()
    async with connected(server, tmp_path) as client:
        assert (await failure(client.flush())).code is Code.PROTOCOL


# --- servers that are gone, or silent -------------------------------------------------------------------------------


async def test_a_connection_that_breaks(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    server.answer = lambda request, data: b""
    async with connected(server, tmp_path) as client:
        reads = [asyncio.create_task(read(client, at * 100, 100)) for at in range(MAX_REQUESTS + 4)]
        await until(lambda: len(server.requests) == MAX_REQUESTS)
        server.hang_up()
        for at, one in enumerate(reads):
            error = await failure(one)
            assert (error.code, error.offset, error.length) == (Code.UNAVAILABLE, at * 100, 100)
            assert error.volume == client.uri
        server.answer = server.right
        # It is not connected again.
        assert (await failure(read(client, 0, 1))).code is Code.UNAVAILABLE
        assert server.connections == 1


async def test_a_reply_that_breaks_off(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)

    def answer(request: transmission.Request, data: bytes) -> bytes:
        server.writers[0].write(server.right(request, data)[:-1])
        server.writers[0].close()
        return b""

    server.answer = answer
    async with connected(server, tmp_path) as client:
        error = await failure(read(client, 0, 100000))
        assert (error.code, error.length) == (Code.UNAVAILABLE, 100000)


async def test_silence_has_a_bound(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    async with connected(server, tmp_path, timeout=0.2) as client:
        assert await read(client, 0, 10) == CONTENT[:10]
        server.answer = lambda request, data: b""
        error = await failure(read(client, 50, 10))
        assert (error.code, error.offset, error.length) == (Code.UNAVAILABLE, 50, 10)
        assert "no progress for 0.2 s" in error.cause
        assert (await failure(client.flush())).code is Code.UNAVAILABLE


async def test_a_server_that_takes_nothing_has_a_bound(tmp_path: Path) -> None:
    """Its socket buffers are full: the write cannot even be sent."""
    stopped = asyncio.Event()

    class Deaf(NbdServer):
        async def _transmit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await stopped.wait()

    async with connected(Deaf(bytes(64 * MIB)), tmp_path, timeout=0.2) as client:
        errors = await asyncio.gather(*(failure(client.write([(at, bytes(16 * MIB))])) for at in (0, 16 * MIB)))
        assert [error.code for error in errors] == [Code.UNAVAILABLE] * 2
        stopped.set()


async def test_slow_is_not_silent(tmp_path: Path) -> None:
    """Data that comes in drops for longer than the time-out: every drop is progress."""
    server = NbdServer(CONTENT)

    def answer(request: transmission.Request, data: bytes) -> bytes:
        reply = server.right(request, data)
        asyncio.get_running_loop().create_task(
            trickle(server, [reply[at : at + 50] for at in range(0, len(reply), 50)], pause=0.06)
        )
        return b""

    server.answer = answer
    async with connected(server, tmp_path, timeout=0.4) as client:
        started = asyncio.get_running_loop().time()
        assert await read(client, 0, 500) == CONTENT[:500]
        assert asyncio.get_running_loop().time() - started > 0.4


async def test_idle_is_not_silent(tmp_path: Path) -> None:
    async with connected(NbdServer(CONTENT), tmp_path, timeout=0.1) as client:
        assert await read(client, 0, 10) == CONTENT[:10]
        await asyncio.sleep(0.3)
        assert await read(client, 0, 10) == CONTENT[:10]


async def test_a_closed_client_fails(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    server.answer = lambda request, data: b""
    async with connected(server, tmp_path) as client:
        reading = asyncio.create_task(read(client, 0, 10))
        await asyncio.sleep(0.01)
        await client.close()
        assert (await failure(reading)).code is Code.UNAVAILABLE
        assert (await failure(client.flush())).code is Code.UNAVAILABLE


# --- cancelling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent_before", [0, 10, SCRATCH_SIZE, 150000])
async def test_the_buffer_of_a_cancelled_read_is_left_alone(tmp_path: Path, sent_before: int) -> None:
    """Whether or not a part of the data had come already; what follows is understood all the same."""
    server = NbdServer(CONTENT)
    replies: list[bytes] = []

    def answer(request: transmission.Request, data: bytes) -> bytes:
        if replies:
            return server.right(request, data)
        replies.append(server.right(request, data))
        return replies[0][:sent_before]

    server.answer = answer
    async with connected(server, tmp_path) as client:
        buffer = bytearray(200000)
        reading = asyncio.create_task(client.read_into(0, memoryview(buffer)))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        buffer[:] = b"?" * len(buffer)
        server.writers[0].write(replies[0][sent_before:])
        assert await read(client, 5, 1000) == CONTENT[5:1005]
        assert buffer == b"?" * len(buffer)


async def test_a_cancelled_write_is_over_when_it_ends(tmp_path: Path) -> None:
    server = NbdServer(CONTENT)
    replies: list[bytes] = []

    def answer(request: transmission.Request, data: bytes) -> bytes:
        replies.append(server.right(request, data))
        return b""

    server.answer = answer
    async with connected(server, tmp_path) as client:
        writing = asyncio.create_task(client.write([(0, b"new"), (10, b"too")]))
        await asyncio.sleep(0.02)
        writing.cancel()
        await asyncio.sleep(0.02)
        writing.cancel()
        await asyncio.sleep(0.02)
        assert not writing.done()
        server.writers[0].write(b"".join(replies))
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert server.content[:13] == b"new" + CONTENT[3:10] + b"too"


# --- several connections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "connections"), [(ALL, 1), (ALL | TransmissionFlag.CAN_MULTI_CONN, 4)])
async def test_several_connections_where_the_server_says_so(
    tmp_path: Path, flags: TransmissionFlag, connections: int
) -> None:
    server = NbdServer(CONTENT, flags=flags)
    async with connected(server, tmp_path, connections=4) as client:
        await asyncio.gather(*client._joining)
        found = await asyncio.gather(*(read(client, at * 1000, 1000) for at in range(100)))
        assert b"".join(found) == CONTENT[:100000]
        assert server.connections == connections
        used = [one.sent[Command.READ] for one in client._connections]
        assert len(used) == connections and min(used) > 10
    assert server.goodbyes == connections


async def test_a_server_with_room_for_two(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, flags=ALL | TransmissionFlag.CAN_MULTI_CONN, limit=2)
    async with connected(server, tmp_path, connections=4, handshake=0.3) as client:
        # Nothing waits for the others.
        assert await read(client, 0, 1000) == CONTENT[:1000]
        await asyncio.gather(*client._joining)
        assert len(client._connections) == 2
        assert await read(client, 0, 1000) == CONTENT[:1000]


async def test_one_of_several_connections_breaks(tmp_path: Path) -> None:
    server = NbdServer(CONTENT, flags=ALL | TransmissionFlag.CAN_MULTI_CONN)
    async with connected(server, tmp_path, connections=2) as client:
        await asyncio.gather(*client._joining)
        server.writers[1].transport.abort()
        await until(lambda: client._connections[1].failure is not None)
        assert (await failure(read(client, 0, 1))).code is Code.UNAVAILABLE
